//! What a fuzz target does with its input; also what the corpus test does with every kept input.

use std::path::Path;

use backhaul_disk_image::{
    Deep, OpenOptions, Silent, descriptor::Descriptor, open_storage, storage::MemoryStorage,
};

/// Largest file that an input unpacks to.
const FILE_BYTES_MAX: usize = 1 << 20;

/// Unpacks an input: patches of a sector number (2 bytes, little endian), a length in units of 4
/// bytes (1 byte) and that many bytes; zeros between them. The last patch may be short.
pub fn unpack(input: &[u8]) -> Vec<u8> {
    let (mut file, mut rest) = (Vec::new(), input);
    while let [low, high, length, data @ ..] = rest {
        let start = usize::from(u16::from_le_bytes([*low, *high])) * 512;
        let take = ((usize::from(*length) + 1) * 4).min(data.len());
        let end = (start + take).min(FILE_BYTES_MAX);
        if start < end {
            let whole = end.next_multiple_of(512);
            if file.len() < whole {
                file.resize(whole, 0);
            }
            file[start..end].copy_from_slice(&data[..end - start]);
        }
        rest = &data[take..];
    }
    file
}

/// Packs a file so that [`unpack`] makes it again, but for zeros at its end.
pub fn pack(file: &[u8]) -> Vec<u8> {
    let mut input = Vec::new();
    for (number, sector) in file.chunks(512).enumerate() {
        let end = sector.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        let end = if number * 512 + 512 >= file.len() { end.max(4) } else { end };
        if end > 0 {
            let words = end.div_ceil(4);
            input.extend_from_slice(&(number as u16).to_le_bytes());
            input.push((words - 1) as u8);
            input.extend_from_slice(&sector[..words * 4]);
        }
    }
    input
}

/// Opens a file in memory and uses it in every way. Errors are fine; panics are not.
pub fn image(file: Vec<u8>) {
    let path = Path::new("fuzz.vmdk");
    for options in [OpenOptions::read_only(), OpenOptions::writable()] {
        let storage = Box::new(MemoryStorage::new(file.clone()));
        let Ok(image) = open_storage(path, storage, &options) else { continue };
        let _ = image.info();
        let _ = image.check(Deep::Yes, &mut Silent);
        let size = image.size_bytes();
        let mut buf = vec![0; 70_000_usize.min(size as usize)];
        for run in image.extents(0, size).take(32).flatten() {
            assert!(run.length > 0 && run.offset + run.length <= size);
            let length = (buf.len() as u64).min(run.length) as usize;
            let _ = image.read_at(&mut buf[..length], run.offset);
        }
        let last = size - buf.len() as u64;
        let _ = image.read_at(&mut buf, last);
        let _ = image.write_at(&buf, last);
        let _ = image.write_zeroes_at(0, buf.len() as u64);
        let _ = image.trim(last, buf.len() as u64);
        if image.flush().is_ok() && options.writable {
            // What was written and flushed can be read.
            let _ = image.read_at(&mut buf, last);
        }
    }
}

/// Parses a text as a descriptor.
pub fn descriptor(text: &[u8]) {
    let claimed = Descriptor::is_claimed_by(text);
    if let Ok(descriptor) = Descriptor::parse(text) {
        assert_eq!(descriptor.text().as_bytes(), text);
        for extent in descriptor.extents() {
            assert!(extent.sectors > 0);
        }
        let _ = (claimed, descriptor.uuid(), descriptor.encoding(), descriptor.content_id());
    }
}
