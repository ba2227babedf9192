//! Files behind one small trait: blocking, batch-oriented, used by one thread at a time.
//!
//! Invariants every implementation keeps:
//! - [`Storage::run`] returns when all of its operations have completed, failed or were never
//!   started; nothing touches a borrowed buffer after that.
//! - The operations of one run have no order between them. Whoever needs an order uses two runs.
//! - A successful [`Op::Sync`] makes every write of *earlier* runs to that file durable, with the
//!   size of the file; names need [`Storage::sync_dir`].

mod aligned;
mod os_file;
mod portable;
pub mod sim;
mod uring;

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

pub use aligned::{AlignedBuf, PAGE_BYTES};
pub use portable::PortableStorage;
pub use uring::UringStorage;

/// An open file of one [`Storage`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId(pub(crate) usize);

/// How to open a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenMode {
    /// It exists and is only read.
    Read,
    /// It exists and is read and written.
    ReadWrite,
    /// It must not exist and is made, empty.
    CreateNew,
}

/// One operation on an open file.
#[derive(Debug)]
pub enum Op<'a> {
    /// Fills `buf`. Fewer bytes than that in the file are an error.
    Read {
        /// The file.
        file: FileId,
        /// Where to start.
        offset_bytes: u64,
        /// What to fill.
        buf: &'a mut [u8],
    },
    /// Writes all of `buf`.
    Write {
        /// The file.
        file: FileId,
        /// Where to start.
        offset_bytes: u64,
        /// What to write.
        buf: &'a [u8],
    },
    /// Makes a range inside the file read as zero.
    Zero {
        /// The file.
        file: FileId,
        /// Where to start.
        offset_bytes: u64,
        /// How many bytes.
        len_bytes: u64,
        /// Give the space back; otherwise it stays reserved where the file system can do that.
        may_unmap: bool,
    },
    /// Makes every write of earlier runs durable.
    Sync {
        /// The file.
        file: FileId,
    },
}

/// A failed operation: what, on which file, where.
#[derive(Debug, Error)]
#[error("cannot {action} `{}`{}: {source}", path.display(), place(*offset_bytes))]
pub struct StorageError {
    /// The file or directory.
    pub path: PathBuf,
    /// What was tried, as a verb.
    pub action: &'static str,
    /// Where in the file, if the operation has a place.
    pub offset_bytes: Option<u64>,
    /// What the system said.
    #[source]
    pub source: io::Error,
}

fn place(offset_bytes: Option<u64>) -> String {
    offset_bytes.map_or(String::new(), |offset| format!(" at byte {offset}"))
}

impl StorageError {
    /// The file system or the quota is full: freeing space mends it.
    pub fn is_full(&self) -> bool {
        matches!(self.source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }

    /// There is no such file.
    pub fn is_not_found(&self) -> bool {
        self.source.kind() == io::ErrorKind::NotFound
    }
}

/// Files and directories, as the journal and the apply need them.
pub trait Storage: Send {
    /// Opens a file.
    fn open(&mut self, path: &Path, mode: OpenMode) -> Result<FileId, StorageError>;

    /// Closes a file. Does not sync it.
    fn close(&mut self, file: FileId);

    /// Runs all operations, in any order and at once, and returns when none is under way.
    ///
    /// With an error, any subset of the others may have happened.
    fn run(&mut self, ops: &mut [Op<'_>]) -> Result<(), StorageError>;

    /// The file's size in bytes.
    fn len_bytes(&mut self, file: FileId) -> Result<u64, StorageError>;

    /// Reserves space and makes the file `len_bytes` long. Fails with
    /// [`StorageError::is_full`] before anything was written.
    fn preallocate(&mut self, file: FileId, len_bytes: u64) -> Result<(), StorageError>;

    /// Renames a file, over an existing one too. An open file stays open.
    fn rename(&mut self, from: &Path, to: &Path) -> Result<(), StorageError>;

    /// Removes a file.
    fn remove(&mut self, path: &Path) -> Result<(), StorageError>;

    /// The names in a directory, sorted; names that are not UTF-8 are none of ours and left out.
    fn list(&mut self, dir: &Path) -> Result<Vec<String>, StorageError>;

    /// Makes a directory and what is missing above it; fine if it exists.
    fn create_dir(&mut self, dir: &Path) -> Result<(), StorageError>;

    /// Makes the names in a directory durable.
    fn sync_dir(&mut self, dir: &Path) -> Result<(), StorageError>;
}

/// The best storage this kernel offers: io_uring, else plain system calls. Says which in the log,
/// once per process.
pub fn open_best() -> Box<dyn Storage> {
    static SAID: std::sync::Once = std::sync::Once::new();
    match UringStorage::new() {
        Ok(storage) => {
            SAID.call_once(|| tracing::info!("disk I/O uses io_uring ({})", storage.describe()));
            Box::new(storage)
        }
        Err(error) => {
            SAID.call_once(|| {
                tracing::warn!("disk I/O uses plain system calls: io_uring is refused: {error}");
            });
            Box::new(PortableStorage::new())
        }
    }
}

#[cfg(test)]
mod tests;
