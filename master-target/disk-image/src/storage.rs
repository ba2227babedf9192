//! What an image's files are reached through: small, so that tests can lose what was not synced.

use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
};

use rustix::{
    fs::{FallocateFlags, SeekFrom, fallocate, fdatasync, seek},
    io::Errno,
};

use crate::{
    bulk::Bulk,
    error::{ErrorKind, ImageError, Result},
};

/// A file of an image. Offsets and lengths are bytes from its start.
pub trait Storage: Send + Sync {
    /// Fills `buf`; the end of the file within it is an error (`UnexpectedEof`).
    ///
    /// # Errors
    /// The system's.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all of `buf`, enlarging the file where needed.
    ///
    /// # Errors
    /// The system's.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// The file's length, or the size of a block device.
    ///
    /// # Errors
    /// The system's.
    fn length(&self) -> io::Result<u64>;

    /// Gives the file a length; what is new reads as zeros.
    ///
    /// # Errors
    /// The system's.
    fn set_length(&self, length: u64) -> io::Result<()>;

    /// Puts every write that returned before this call on stable storage.
    ///
    /// # Errors
    /// The system's.
    fn sync(&self) -> io::Result<()>;

    /// Makes a range read as zeros without storing them. `false`: not with this file.
    ///
    /// # Errors
    /// The system's.
    fn punch(&self, _offset: u64, _length: u64) -> io::Result<bool> {
        Ok(false)
    }

    /// Whether bytes are stored at `offset`, and where that ends: after `offset`, at most at `end`.
    ///
    /// # Errors
    /// The system's.
    fn stored_run(&self, _offset: u64, end: u64) -> io::Result<(bool, u64)> {
        Ok((true, end))
    }

    /// Bytes that the file takes up, where they can be told from its length.
    ///
    /// # Errors
    /// The system's.
    fn stored_bytes(&self) -> io::Result<u64> {
        self.length()
    }

    /// Reserves space for the range, where the file system can.
    ///
    /// # Errors
    /// The system's: a full disk.
    fn reserve(&self, _offset: u64, _length: u64) -> io::Result<()> {
        Ok(())
    }

    /// The file itself, for an engine that does its own I/O.
    fn file(&self) -> Option<&File> {
        None
    }
}

impl Storage for File {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(buf, offset)
    }

    fn length(&self) -> io::Result<u64> {
        // Seeking also tells the size of a block device.
        Ok(seek(self, SeekFrom::End(0))?)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.set_len(length)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(fdatasync(self)?)
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<bool> {
        if length == 0 {
            return Ok(true);
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        loop {
            match fallocate(self, flags, offset, length) {
                Err(Errno::INTR) => {}
                Err(error) if not_with_this_file(error) => return Ok(false),
                result => return Ok(result.map(|()| true)?),
            }
        }
    }

    fn stored_run(&self, offset: u64, end: u64) -> io::Result<(bool, u64)> {
        let data = match seek(self, SeekFrom::Data(offset)) {
            Ok(data) => data,
            // No data from here to the end of the file.
            Err(Errno::NXIO) => return Ok((false, end)),
            // Block devices and old file systems do not know; then everything counts as data.
            Err(error) if not_with_this_file(error) => return Ok((true, end)),
            Err(error) => return Err(error.into()),
        };
        if data > offset {
            return Ok((false, data.min(end)));
        }
        let hole = match seek(self, SeekFrom::Hole(offset)) {
            Ok(hole) => hole,
            Err(Errno::NXIO) => end,
            Err(error) => return Err(error.into()),
        };
        // A hole punched between the two questions may begin right here: answer one byte of data
        // rather than a run of no length.
        Ok((true, hole.clamp(offset + 1, end)))
    }

    fn stored_bytes(&self) -> io::Result<u64> {
        // POSIX counts st_blocks in units of 512 bytes on Linux, whatever the file system.
        Ok(self.metadata()?.blocks().saturating_mul(512))
    }

    fn reserve(&self, offset: u64, length: u64) -> io::Result<()> {
        match fallocate(self, FallocateFlags::KEEP_SIZE, offset, length) {
            Err(error) if !not_with_this_file(error) => Err(error.into()),
            _ => Ok(()),
        }
    }

    fn file(&self) -> Option<&File> {
        Some(self)
    }
}

/// Whether the error says "not with this file", where plain writing would still work. `EINVAL`
/// comes from block devices for ranges that are not whole blocks of theirs.
fn not_with_this_file(error: Errno) -> bool {
    matches!(error, Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::NODEV | Errno::PERM)
}

/// A file in memory: for fuzzers and tests, which have no use for a disk.
#[derive(Debug, Default)]
pub struct MemoryStorage {
    bytes: Mutex<Vec<u8>>,
}

impl MemoryStorage {
    /// A file with this content.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { bytes: Mutex::new(bytes) }
    }

    /// A copy of the content.
    pub fn content(&self) -> Vec<u8> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Largest file that [`MemoryStorage`] grows to: a hostile offset must not cost memory.
const MEMORY_BYTES_MAX: usize = 256 << 20;

fn memory_range(offset: u64, length: usize) -> io::Result<std::ops::Range<usize>> {
    let start = usize::try_from(offset).ok();
    start
        .and_then(|start| Some(start..start.checked_add(length)?))
        .filter(|range| range.end <= MEMORY_BYTES_MAX)
        .ok_or_else(|| io::Error::from(io::ErrorKind::FileTooLarge))
}

impl Storage for MemoryStorage {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = self.lock();
        let eof = || io::Error::from(io::ErrorKind::UnexpectedEof);
        let range = memory_range(offset, buf.len()).map_err(|_| eof())?;
        buf.copy_from_slice(bytes.get(range).ok_or_else(eof)?);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let range = memory_range(offset, buf.len())?;
        let mut bytes = self.lock();
        if bytes.len() < range.end {
            bytes.resize(range.end, 0);
        }
        bytes[range].copy_from_slice(buf);
        Ok(())
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.lock().len() as u64)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        let range = memory_range(0, usize::try_from(length).unwrap_or(usize::MAX))?;
        self.lock().resize(range.end, 0);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A file of an image with the path to report it by.
pub(crate) struct Store {
    pub(crate) path: PathBuf,
    storage: Box<dyn Storage>,
    bulk: OnceLock<Bulk>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Store {
    pub(crate) fn new(path: &Path, storage: Box<dyn Storage>) -> Self {
        Self { path: path.to_owned(), storage, bulk: OnceLock::new() }
    }

    /// From now on the file is filled at once: see [`Bulk`]. Without `durable` no sync is one.
    pub(crate) fn write_in_bulk(&self, durable: bool) {
        self.bulk.get_or_init(|| Bulk::new(self.storage.file(), durable));
    }

    pub(crate) fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.storage.read_at(buf, offset).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => ImageError::new(
                ErrorKind::Damaged,
                &self.path,
                format!(
                    "the file ends within {} bytes that belong to the disk; restore it from its source",
                    buf.len()
                ),
            )
            .at(offset),
            _ => self.failed("read", source).at(offset),
        })
    }

    pub(crate) fn read_vec(&self, offset: u64, length: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.read(&mut bytes, offset)?;
        Ok(bytes)
    }

    pub(crate) fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        let written = match self.bulk.get() {
            Some(bulk) => bulk.write(self.storage.as_ref(), buf, offset),
            None => self.storage.write_at(buf, offset),
        };
        written.map_err(|source| self.failed("write", source).at(offset))
    }

    pub(crate) fn sync(&self) -> Result<()> {
        if self.bulk.get().is_some_and(|bulk| !bulk.durable) {
            return Ok(());
        }
        self.storage.sync().map_err(|source| self.failed("sync", source))
    }

    pub(crate) fn length(&self) -> Result<u64> {
        self.storage.length().map_err(|source| self.failed("measure", source))
    }

    pub(crate) fn set_length(&self, length: u64) -> Result<()> {
        self.storage.set_length(length).map_err(|source| self.failed("resize", source))
    }

    pub(crate) fn reserve(&self, offset: u64, length: u64) -> Result<()> {
        let reserved = self.storage.reserve(offset, length);
        reserved.map_err(|source| self.failed("reserve space in", source))
    }

    pub(crate) fn stored_run(&self, offset: u64, end: u64) -> Result<(bool, u64)> {
        let run = self.storage.stored_run(offset, end);
        run.map_err(|source| self.failed("map", source).at(offset))
    }

    pub(crate) fn stored_bytes(&self) -> Result<u64> {
        self.storage.stored_bytes().map_err(|source| self.failed("measure", source))
    }

    /// A hole where the file has holes, else nothing.
    pub(crate) fn free(&self, offset: u64, length: u64) -> Result<()> {
        let freed = self.storage.punch(offset, length);
        freed.map(|_| ()).map_err(|source| self.failed("trim", source).at(offset))
    }

    /// A hole where the file has holes, else written zeros.
    pub(crate) fn zero(&self, offset: u64, length: u64) -> Result<()> {
        static ZEROS: [u8; 256 << 10] = [0; 256 << 10];
        let failed = |source| self.failed("write zeros to", source).at(offset);
        if self.storage.punch(offset, length).map_err(failed)? {
            return Ok(());
        }
        let mut done = 0;
        while done < length {
            let step = (length - done).min(ZEROS.len() as u64);
            self.storage.write_at(&ZEROS[..step as usize], offset + done).map_err(failed)?;
            done += step;
        }
        Ok(())
    }

    pub(crate) fn file(&self) -> Option<&File> {
        self.storage.file()
    }

    fn failed(&self, action: &str, source: io::Error) -> ImageError {
        ImageError::io(action, &self.path, source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `/dev/full` answers every write with ENOSPC and knows no holes, so zeros must be written.
    #[test]
    fn a_full_disk_is_an_error_that_names_the_place() {
        let full = File::options().read(true).write(true).open("/dev/full").unwrap();
        let store = Store::new(Path::new("disk.img"), Box::new(full));
        for error in [store.write(&[1], 512), store.zero(512, 9)] {
            let error = error.unwrap_err().to_string();
            assert!(error.contains("disk.img at byte 512"), "{error}");
            assert!(error.contains("No space"), "{error}");
        }
        store.free(0, 512).expect("advice that cannot be followed is no error");
    }

    #[test]
    fn zeros_are_written_where_holes_cannot_be() {
        let store = Store::new(Path::new("m"), Box::new(MemoryStorage::new(vec![7; 1 << 20])));
        store.zero(1000, 600_000).unwrap();
        let mut expected = vec![7; 1 << 20];
        expected[1000..601_000].fill(0);
        assert!(store.read_vec(0, 1 << 20).unwrap() == expected);
    }

    #[test]
    fn memory_refuses_absurd_offsets() {
        let memory = MemoryStorage::default();
        assert!(memory.write_at(&[1], u64::MAX).is_err());
        assert!(memory.read_at(&mut [0], u64::MAX).is_err());
        assert!(memory.set_length(u64::MAX).is_err());
    }
}
