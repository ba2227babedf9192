//! Filling a new image with everything it will ever get at once, as a conversion does.

use std::{fs::File, io, os::fd::AsRawFd, os::unix::fs::FileExt};

use rustix::fs::{Mode, OFlags, open};

use crate::storage::Storage;

/// What the memory of a direct write must be aligned to, its place and its length too: a page is
/// enough for every disk.
pub(crate) const DIRECT_ALIGNMENT: usize = 4096;

/// Least bytes of a direct write. Each waits for the disk, so small ones are left to the page cache,
/// which gathers them.
const DIRECT_BYTES_MIN: usize = 128 << 10;

/// How a file is written that is filled at once.
///
/// Its bytes are written once, and nobody reads them now. Large pieces therefore go from the
/// caller's memory to the disk, without the way through the page cache: the disk works from the
/// start, and the flush at the end finds next to nothing to do.
#[derive(Debug)]
pub(crate) struct Bulk {
    /// The file once more, open for direct writes, where its file system has them.
    direct: Option<File>,
    /// Whether a sync is one.
    pub(crate) durable: bool,
}

impl Bulk {
    pub(crate) fn new(file: Option<&File>, durable: bool) -> Self {
        // What need not reach the disk stays in memory.
        let direct = file.filter(|_| durable).and_then(open_direct);
        Self { direct, durable }
    }

    pub(crate) fn write(&self, storage: &dyn Storage, buf: &[u8], offset: u64) -> io::Result<()> {
        let Some(file) = &self.direct else { return storage.write_at(buf, offset) };
        let aligned = offset.is_multiple_of(DIRECT_ALIGNMENT as u64)
            && buf.as_ptr().addr().is_multiple_of(DIRECT_ALIGNMENT);
        let whole = if aligned { buf.len() - buf.len() % DIRECT_ALIGNMENT } else { 0 };
        if whole < DIRECT_BYTES_MIN {
            return storage.write_at(buf, offset);
        }
        let (pages, rest) = buf.split_at(whole);
        match file.write_all_at(pages, offset) {
            // A disk that wants another alignment, or a file system that only opens so.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                return storage.write_at(buf, offset);
            }
            result => result?,
        }
        if rest.is_empty() { Ok(()) } else { storage.write_at(rest, offset + whole as u64) }
    }
}

/// The same file, whatever its name leads to by now. Without `/proc` there are no direct writes.
fn open_direct(file: &File) -> Option<File> {
    let name = format!("/proc/self/fd/{}", file.as_raw_fd());
    let flags = OFlags::WRONLY | OFlags::DIRECT | OFlags::CLOEXEC;
    open(name, flags, Mode::empty()).ok().map(File::from)
}

/// Memory of that many bytes which direct writes can use.
pub(crate) fn aligned(memory: &mut Vec<u8>, length: usize) -> &mut [u8] {
    memory.resize(length + DIRECT_ALIGNMENT, 0);
    let skip = memory.as_ptr().align_offset(DIRECT_ALIGNMENT).min(DIRECT_ALIGNMENT);
    &mut memory[skip..skip + length]
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::{path::Path, sync::Arc};

    use super::*;
    use crate::storage::Store;

    /// Direct writes where the file system has them (a folder of the build, mostly on a disk) and
    /// where it may not (memory): the same bytes at every alignment.
    #[test]
    fn pieces_of_every_alignment_arrive() {
        let folders = [Path::new(env!("CARGO_MANIFEST_DIR")), Path::new("/dev/shm")];
        for folder in folders.into_iter().filter(|folder| folder.exists()) {
            let file = tempfile::tempfile_in(folder).unwrap();
            let bulk = Bulk::new(Some(&file), true);
            let mut model = vec![0; 4 << 20];
            let mut memory = Vec::new();
            let pieces = [
                (0, 0, 1 << 20),
                (0, 1 << 20, 300_000),
                (512, 2 << 20, 1 << 19),
                (0, 512, 1 << 18),
            ];
            for (number, (skip, offset, length)) in pieces.into_iter().enumerate() {
                let piece = &mut aligned(&mut memory, skip + length)[skip..];
                piece.fill(number as u8 + 1);
                model[offset..offset + length].copy_from_slice(piece);
                bulk.write(&file, piece, offset as u64).unwrap();
            }
            let mut found = vec![0; (2 << 20) + (1 << 19)];
            file.read_exact_at(&mut found, 0).unwrap();
            assert!(found == model[..found.len()], "{}", folder.display());
        }
    }

    /// Counts the syncs.
    struct Counting(Arc<AtomicUsize>);

    impl Storage for Counting {
        fn read_at(&self, _: &mut [u8], _: u64) -> io::Result<()> {
            Ok(())
        }

        fn write_at(&self, _: &[u8], _: u64) -> io::Result<()> {
            Ok(())
        }

        fn length(&self) -> io::Result<u64> {
            Ok(0)
        }

        fn set_length(&self, _: u64) -> io::Result<()> {
            Ok(())
        }

        fn sync(&self) -> io::Result<()> {
            self.0.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    }

    #[test]
    fn a_file_is_synced_unless_it_need_not_be_durable() {
        for (durable, expected) in [(true, 1), (false, 0)] {
            let syncs = Arc::new(AtomicUsize::new(0));
            let store = Store::new(Path::new("x"), Box::new(Counting(syncs.clone())));
            store.write_in_bulk(durable);
            store.sync().unwrap();
            assert_eq!(syncs.load(Ordering::SeqCst), expected);
        }
    }
}
