//! Writing streamOptimized: grains in order, each compressed, tables after the grains that they
//! name, the directory and the footer last. Nothing is written twice but the header's neighbours.

use flate2::{Compress, Compression, FlushCompress, Status};

use crate::{
    create::{CreateOptions, describe},
    error::{ErrorKind, ImageError, Result},
    image::SECTOR_BYTES,
    sparse::{
        create::DESCRIPTOR_SECTORS,
        header::{
            DIRECTORY_AT_END, ENTRIES_PER_TABLE, FLAG_COMPRESSED, FLAG_LINE_ENDS, FLAG_MARKERS,
            GRAIN_SECTORS, Header,
        },
        inflate::MARKER_BYTES,
    },
    storage::Store,
};

/// Bytes of an uncompressed grain.
pub(crate) const GRAIN_BYTES: usize = (GRAIN_SECTORS * SECTOR_BYTES) as usize;

/// Bytes that are gathered before they are written.
const BUFFER_BYTES: usize = 1 << 20;

/// Kinds of marker (the second word of a marker whose data length is zero).
pub(crate) const MARKER_TABLE: u32 = 1;
pub(crate) const MARKER_DIRECTORY: u32 = 2;
pub(crate) const MARKER_FOOTER: u32 = 3;

/// Writes one stream.
pub(crate) struct StreamWriter<'a> {
    store: &'a Store,
    header: Header,
    buffer: Vec<u8>,
    /// Where in the file the buffer begins.
    buffer_at: u64,
    directory: Vec<u32>,
    /// The table being filled, and its number.
    table: Vec<u32>,
    index: usize,
    next_grain: u64,
}

impl<'a> StreamWriter<'a> {
    /// Writes header and descriptor. `name` is what the descriptor calls its extent.
    pub(crate) fn start(store: &'a Store, name: &str, options: &CreateOptions) -> Result<Self> {
        let capacity_sectors = options.size_bytes / SECTOR_BYTES;
        let header = Header {
            version: 3,
            flags: FLAG_LINE_ENDS | FLAG_COMPRESSED | FLAG_MARKERS,
            capacity_sectors,
            grain_sectors: GRAIN_SECTORS,
            descriptor_sector: 1,
            descriptor_sectors: DESCRIPTOR_SECTORS,
            entries_per_table: ENTRIES_PER_TABLE,
            redundant_sector: 0,
            directory_sector: DIRECTORY_AT_END,
            overhead_sectors: GRAIN_SECTORS,
            unclean: false,
            compression: 1,
        };
        let extents = vec![(capacity_sectors, name.to_owned())];
        let text = describe(&store.path, options, extents, None)?;
        if text.len() as u64 > DESCRIPTOR_SECTORS * SECTOR_BYTES {
            let sentence = "its descriptor would be too long; choose a shorter name";
            return Err(ImageError::new(ErrorKind::Invalid, &store.path, sentence));
        }
        let mut buffer = header.encode().to_vec();
        buffer.extend_from_slice(text.as_bytes());
        buffer.resize(GRAIN_BYTES, 0);
        Ok(Self {
            store,
            buffer,
            buffer_at: 0,
            directory: vec![0; header.directory_entries() as usize],
            table: Vec::new(),
            index: 0,
            next_grain: 0,
            header,
        })
    }

    /// Appends grain number `grain`, which must be higher than all before it.
    pub(crate) fn append(&mut self, grain: u64, compressed: &[u8]) -> Result<()> {
        debug_assert!(grain >= self.next_grain);
        self.next_grain = grain + 1;
        let per_table = u64::from(ENTRIES_PER_TABLE);
        let index = (grain / per_table) as usize;
        if index != self.index {
            self.end_table()?;
            self.index = index;
        }
        let sector = self.here()?;
        self.table.resize(ENTRIES_PER_TABLE as usize, 0);
        self.table[(grain % per_table) as usize] = sector;
        self.buffer.extend_from_slice(&(grain * GRAIN_SECTORS).to_le_bytes());
        self.buffer.extend_from_slice(&(compressed.len() as u32).to_le_bytes());
        self.buffer.extend_from_slice(compressed);
        self.pad();
        self.write_full()
    }

    /// Writes the last table, the directory and the footer. The caller syncs.
    pub(crate) fn finish(mut self) -> Result<()> {
        self.end_table()?;
        let sectors = (self.directory.len() as u64 * 4).div_ceil(SECTOR_BYTES);
        self.marker(sectors, MARKER_DIRECTORY);
        let directory_sector = u64::from(self.here()?);
        let bytes: Vec<u8> = self.directory.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        self.buffer.extend_from_slice(&bytes);
        self.pad();
        self.marker(1, MARKER_FOOTER);
        let footer = Header { directory_sector, ..self.header };
        self.buffer.extend_from_slice(&footer.encode());
        // The end of the stream is a marker of zeros.
        self.marker(0, 0);
        self.store.write(&self.buffer, self.buffer_at)
    }

    fn end_table(&mut self) -> Result<()> {
        if self.table.is_empty() {
            return Ok(());
        }
        self.marker(u64::from(ENTRIES_PER_TABLE) * 4 / SECTOR_BYTES, MARKER_TABLE);
        self.directory[self.index] = self.here()?;
        let bytes: Vec<u8> = self.table.drain(..).flat_map(u32::to_le_bytes).collect();
        self.buffer.extend_from_slice(&bytes);
        self.write_full()
    }

    fn marker(&mut self, sectors: u64, kind: u32) {
        self.buffer.extend_from_slice(&marker(sectors, kind));
    }

    /// The sector that the next byte belongs to.
    fn here(&self) -> Result<u32> {
        let sector = (self.buffer_at + self.buffer.len() as u64) / SECTOR_BYTES;
        u32::try_from(sector).map_err(|_| {
            let sentence = "the compressed disk needs more than the 2 TiB that its tables can name; \
                            choose another kind";
            ImageError::new(ErrorKind::Full, &self.store.path, sentence)
        })
    }

    fn pad(&mut self) {
        self.buffer.resize(self.buffer.len().next_multiple_of(SECTOR_BYTES as usize), 0);
    }

    fn write_full(&mut self) -> Result<()> {
        if self.buffer.len() >= BUFFER_BYTES {
            self.store.write(&self.buffer, self.buffer_at)?;
            self.buffer_at += self.buffer.len() as u64;
            self.buffer.clear();
        }
        Ok(())
    }
}

/// A marker that is not a grain's.
pub(crate) fn marker(sectors: u64, kind: u32) -> [u8; 512] {
    let mut bytes = [0; 512];
    bytes[..8].copy_from_slice(&sectors.to_le_bytes());
    bytes[MARKER_BYTES as usize..16].copy_from_slice(&kind.to_le_bytes());
    bytes
}

/// Compresses grains; reuses its memory.
pub(crate) struct Deflater {
    compress: Compress,
}

impl Deflater {
    pub(crate) fn new(level: u32) -> Self {
        Self { compress: Compress::new(Compression::new(level.clamp(1, 9)), true) }
    }

    /// Never much larger than the grain: what does not get smaller is stored.
    pub(crate) fn deflate(&mut self, grain: &[u8]) -> Vec<u8> {
        self.compress.reset();
        let bytes = deflate_with(&mut self.compress, grain);
        // The fastest level makes noise an eighth larger, which readers need not expect.
        if bytes.len() <= grain.len() {
            return bytes;
        }
        deflate_with(&mut Compress::new(Compression::none(), true), grain)
    }
}

fn deflate_with(compress: &mut Compress, grain: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(grain.len() + grain.len() / 8 + 1024);
    loop {
        let taken = compress.total_in() as usize;
        let status = compress.compress_vec(&grain[taken..], &mut bytes, FlushCompress::Finish);
        if matches!(status, Ok(Status::StreamEnd)) {
            return bytes;
        }
        bytes.reserve(grain.len() / 8 + 1024);
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, path::Path, process::Command};

    use super::*;
    use crate::{
        kind::Kind,
        open::{OpenOptions, open},
        sparse::inflate::inflate,
    };

    impl StreamWriter<'_> {
        /// Goes on at another place of the file, as after so many bytes of grains.
        fn jump(&mut self, at: u64) {
            self.store.write(&self.buffer, self.buffer_at).unwrap();
            self.buffer.clear();
            self.buffer_at = at;
        }
    }

    /// A file of which the places are beyond 32 bits of bytes, as that of a disk with more than 4 GiB
    /// of data is. What is between is a hole, so nothing needs to be compressed for it.
    #[test]
    fn a_stream_beyond_4_gib_is_read_by_us_and_by_qemu() {
        let dir = tempfile::tempdir().unwrap();
        let (path, oracle) = (dir.path().join("s.vmdk"), dir.path().join("oracle.raw"));
        let options = CreateOptions::new(Kind::StreamOptimized, 96 << 20);
        let store = Store::new(&path, Box::new(File::create_new(&path).unwrap()));
        let mut writer = StreamWriter::start(&store, "s.vmdk", &options).unwrap();
        let (mut deflater, mut model) = (Deflater::new(6), vec![0; 96 << 20]);
        // Before 4 GiB, a table across it, whole tables behind it.
        for (grain, jump) in [(3, None), (700, None), (701, Some(5 << 30)), (1030, Some(9 << 30))] {
            if let Some(at) = jump {
                writer.jump(at);
            }
            let bytes = vec![(grain % 251) as u8; GRAIN_BYTES];
            model[grain * GRAIN_BYTES..][..GRAIN_BYTES].copy_from_slice(&bytes);
            writer.append(grain as u64, &deflater.deflate(&bytes)).unwrap();
        }
        writer.finish().unwrap();
        assert!(store.length().unwrap() > 9 << 30);
        let image = open(&path, &OpenOptions::read_only().of_kind(Kind::StreamOptimized)).unwrap();
        let mut found = vec![1; model.len()];
        image.read_at(&mut found, 0).unwrap();
        assert!(found == model);
        std::fs::write(&oracle, &model).unwrap();
        let compare = ["compare", "-f", "vmdk", "-F", "raw"];
        let compared = Command::new("qemu-img").args(compare).args([&path, &oracle]).output();
        let compared =
            compared.expect("qemu-img is missing: install the Debian package qemu-utils");
        assert!(compared.status.success(), "{compared:?}");
    }

    #[test]
    fn a_stream_beyond_2_tib_is_refused() {
        let file = File::options().write(true).open("/dev/null").unwrap();
        let store = Store::new(Path::new("s.vmdk"), Box::new(file));
        let options = CreateOptions::new(Kind::StreamOptimized, 1 << 40);
        let mut writer = StreamWriter::start(&store, "s.vmdk", &options).unwrap();
        writer.jump((2 << 40) - SECTOR_BYTES);
        writer.append(0, &[0; 100]).unwrap();
        let error = writer.append(1, &[0; 100]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Full, "{error}");
    }

    #[test]
    fn every_level_can_be_inflated_and_noise_hardly_grows() {
        let mut state = 88_172_645_463_325_252_u64;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .take(GRAIN_BYTES)
        .collect();
        let text: Vec<u8> = b"abcdefgh".repeat(GRAIN_BYTES / 8);
        for level in 1..=9 {
            let mut deflater = Deflater::new(level);
            for grain in [&noise, &text, &noise, &vec![0; GRAIN_BYTES]] {
                let bytes = deflater.deflate(grain);
                assert!(bytes.len() <= GRAIN_BYTES + 64, "level {level}: {}", bytes.len());
                assert!(&inflate(&bytes, GRAIN_BYTES, GRAIN_BYTES).unwrap() == grain);
            }
        }
    }
}
