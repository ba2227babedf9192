//! The protected disk itself: a raw file or a block device.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use backhaul_proto::limits::DISK_BYTES_MAX;
use rustix::buffer::spare_capacity;
use rustix::fs::FallocateFlags;
use thiserror::Error;

/// A protected disk, open for reading and writing.
///
/// Reads and writes go through the page cache and are done in place: a cached 4 KiB write takes
/// less time than handing it to another thread. Flushes are not, and the caller moves them.
#[derive(Debug)]
pub struct Device {
    path: PathBuf,
    file: File,
    size_bytes: u64,
    /// Set by a failed flush: the kernel has dropped what it could not write, so nothing that was
    /// answered before is certain any more, and going on would hide it.
    broken: AtomicBool,
}

/// Why a protected disk cannot be used.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// It cannot be opened.
    #[error("protected disk {path} cannot be opened for reading and writing: {source}", path = path.display())]
    Open {
        /// The file or device.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is a folder, a socket or the like.
    #[error("{path} is neither a file nor a block device, so it cannot be protected", path = path.display())]
    Kind {
        /// The path.
        path: PathBuf,
    },
    /// Another agent protects it.
    #[error(
        "protected disk {path} is used by another agent; a disk has one agent, stop the other", path = path.display()
    )]
    Taken {
        /// The file or device.
        path: PathBuf,
    },
    /// Its size is nothing a disk can have.
    #[error(
        "protected disk {path} has {size_bytes} bytes; a disk has a multiple of 512 bytes, more than 0, and at most 62 TiB", path = path.display()
    )]
    Size {
        /// The file or device.
        path: PathBuf,
        /// Its size.
        size_bytes: u64,
    },
}

impl Device {
    /// Opens the file or block device at `path`.
    pub fn open(path: &Path) -> Result<Self, DeviceError> {
        let open = |source| DeviceError::Open { path: path.to_owned(), source };
        let mut file = OpenOptions::new().read(true).write(true).open(path).map_err(open)?;
        let kind = file.metadata().map_err(open)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DeviceError::Kind { path: path.to_owned() });
        }
        // A block device's metadata says 0; its end is where seeking to the end leads.
        let size_bytes = file.seek(SeekFrom::End(0)).map_err(open)?;
        if size_bytes == 0 || !size_bytes.is_multiple_of(512) || size_bytes > DISK_BYTES_MAX {
            return Err(DeviceError::Size { path: path.to_owned(), size_bytes });
        }
        Ok(Self { path: path.to_owned(), file, size_bytes, broken: AtomicBool::new(false) })
    }

    /// Keeps other agents off this disk for as long as it is open: two would each see a part of its
    /// writes. The lock is advice (`flock`), which the guest's other users need not ask for.
    pub fn lock(&self) -> Result<(), DeviceError> {
        match self.file.try_lock() {
            Ok(()) => Ok(()),
            Err(TryLockError::WouldBlock) => Err(DeviceError::Taken { path: self.path.clone() }),
            Err(TryLockError::Error(source)) => {
                Err(DeviceError::Open { path: self.path.clone(), source })
            }
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its size when it was opened.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Its size now: a disk that was resized under the agent must be noticed.
    pub fn current_size_bytes(&self) -> io::Result<u64> {
        (&self.file).seek(SeekFrom::End(0))
    }

    fn check(&self) -> io::Result<()> {
        if self.broken.load(Ordering::Acquire) {
            return Err(io::Error::other(
                "an earlier flush of this disk failed; restart the agent once the disk is sound",
            ));
        }
        Ok(())
    }

    /// Fills `buf` from `offset_bytes`.
    pub fn read(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset_bytes)
    }

    /// The `len` bytes from `offset_bytes`, in memory that nobody fills with zeroes first: that would
    /// take half as long again as reading from the page cache.
    pub fn read_new(&self, len: usize, offset_bytes: u64) -> io::Result<Vec<u8>> {
        let mut content = Vec::with_capacity(len);
        while content.len() < len {
            let at = offset_bytes + content.len() as u64;
            match rustix::io::pread(&self.file, spare_capacity(&mut content), at) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        // The allocator may give more than it is asked for.
        content.truncate(len);
        Ok(content)
    }

    /// Writes all of `data`.
    pub fn write(&self, data: &[u8], offset_bytes: u64) -> io::Result<()> {
        self.check()?;
        self.file.write_all_at(data, offset_bytes)
    }

    /// Makes a range read as zeroes. `may_unmap` lets the file system or device give the space back.
    /// `Ok(false)`: it can only be done by writing zeroes, which was not asked for (`fast`).
    pub fn zero(
        &self,
        offset_bytes: u64,
        len_bytes: u64,
        may_unmap: bool,
        fast: bool,
    ) -> io::Result<bool> {
        self.check()?;
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let range = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        let ways: &[FallocateFlags] = if may_unmap { &[punch, range] } else { &[range] };
        for flags in ways {
            match rustix::fs::fallocate(&self.file, *flags, offset_bytes, len_bytes) {
                Ok(()) => return Ok(true),
                Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if fast {
            return Ok(false);
        }
        const ZEROES: &[u8] = &[0; 256 << 10];
        let end = offset_bytes + len_bytes;
        let mut at = offset_bytes;
        while at < end {
            let len = (end - at).min(ZEROES.len() as u64) as usize;
            self.file.write_all_at(&ZEROES[..len], at)?;
            at += len as u64;
        }
        Ok(true)
    }

    /// Gives the space of a range back so that it reads as zeroes. `Ok(false)`: the disk cannot, and
    /// nothing changed, which a trim allows.
    pub fn trim(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<bool> {
        self.check()?;
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.file, punch, offset_bytes, len_bytes) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Returns once every finished write is on stable storage.
    pub fn flush(&self) -> io::Result<()> {
        self.check()?;
        self.file.sync_data().inspect_err(|_| self.broken.store(true, Ordering::Release))
    }

    /// The end of the run that starts at `offset_bytes`, at most `end_bytes`, and whether the run is
    /// a hole. Devices that know no holes are data throughout.
    pub fn run(&self, offset_bytes: u64, end_bytes: u64) -> (u64, bool) {
        use rustix::fs::SeekFrom;
        let data = match rustix::fs::seek(&self.file, SeekFrom::Data(offset_bytes)) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => return (end_bytes, true),
            Err(_) => return (end_bytes, false),
        };
        if data > offset_bytes {
            return (data.min(end_bytes), true);
        }
        match rustix::fs::seek(&self.file, SeekFrom::Hole(offset_bytes)) {
            Ok(hole) if hole > offset_bytes => (hole.min(end_bytes), false),
            _ => (end_bytes, false),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use super::Device;

    #[test]
    fn what_is_read_into_new_memory_is_what_read_reads() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let content: Vec<u8> = (0..9 * 512).map(|at| (at / 512 + at) as u8).collect();
        std::fs::write(file.path(), &content).unwrap();
        let device = Device::open(file.path()).unwrap();
        for (offset, len) in [(0, 9 * 512), (512, 1024), (8 * 512, 512), (9 * 512, 0)] {
            let new = device.read_new(len, offset as u64).unwrap();
            assert_eq!(new, content[offset..offset + len]);
        }
        let short = device.read_new(1024, 8 * 512).unwrap_err();
        assert_eq!(short.kind(), ErrorKind::UnexpectedEof);
    }
}
