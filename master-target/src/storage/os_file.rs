//! What both real storages share: open files, which descriptor an operation goes through, and the
//! operations that are not worth queueing.
//!
//! A file has a descriptor with O_DIRECT if its file system allows that. Operations that are
//! aligned for it go there; the others go through an ordinary descriptor and the page cache. The
//! kernel keeps the two coherent as long as they do not touch one page at the same time: a page
//! that a buffered write read in before a neighbouring direct write, and wrote back after it, would
//! undo the direct write. So a run does its direct operations first, then the others.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FallocateFlags, StatxFlags};

use crate::storage::{FileId, Op, OpenMode, StorageError};

/// Which descriptor an operation goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route {
    Direct,
    Buffered,
}

struct Direct {
    file: File,
    memory_align_bytes: usize,
    offset_align_bytes: u64,
}

pub(super) struct OsFile {
    path: PathBuf,
    buffered: File,
    direct: Option<Direct>,
}

impl OsFile {
    fn open(path: &Path, mode: OpenMode) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(mode != OpenMode::Read).create_new(mode == OpenMode::CreateNew);
        let buffered = options.open(path)?;
        let direct = open_direct(&buffered, mode);
        Ok(Self { path: path.to_owned(), buffered, direct })
    }

    fn route(&self, offset_bytes: u64, buf: &[u8]) -> Route {
        match &self.direct {
            Some(direct)
                if offset_bytes.is_multiple_of(direct.offset_align_bytes)
                    && (buf.len() as u64).is_multiple_of(direct.offset_align_bytes)
                    && buf.as_ptr().addr().is_multiple_of(direct.memory_align_bytes) =>
            {
                Route::Direct
            }
            _ => Route::Buffered,
        }
    }

    pub(super) fn fd(&self, route: Route) -> BorrowedFd<'_> {
        match (route, &self.direct) {
            (Route::Direct, Some(direct)) => direct.file.as_fd(),
            _ => self.buffered.as_fd(),
        }
    }

    pub(super) fn error(
        &self,
        action: &'static str,
        offset_bytes: Option<u64>,
        source: impl Into<io::Error>,
    ) -> StorageError {
        StorageError { path: self.path.clone(), action, offset_bytes, source: source.into() }
    }

    /// Zeroes for file systems that cannot do it themselves.
    pub(super) fn write_zeroes(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
        let zeroes = vec![0; len_bytes.min(1 << 20) as usize];
        let mut done_bytes = 0;
        while done_bytes < len_bytes {
            let piece = (len_bytes - done_bytes).min(zeroes.len() as u64) as usize;
            let at = offset_bytes + done_bytes;
            done_bytes += rustix::io::pwrite(&self.buffered, &zeroes[..piece], at)? as u64;
        }
        Ok(())
    }
}

/// A second descriptor with O_DIRECT, if `statx` says on which alignment it works.
fn open_direct(file: &File, mode: OpenMode) -> Option<Direct> {
    let stat = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
    let known = stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0;
    if !known || stat.stx_dio_offset_align == 0 || stat.stx_dio_mem_align == 0 {
        return None;
    }
    // By descriptor, not by name: the name may stand for another file by now.
    let file = OpenOptions::new()
        .read(true)
        .write(mode != OpenMode::Read)
        .custom_flags(libc::O_DIRECT)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .ok()?;
    Some(Direct {
        file,
        memory_align_bytes: stat.stx_dio_mem_align as usize,
        offset_align_bytes: stat.stx_dio_offset_align.into(),
    })
}

pub(super) fn zero_flags(may_unmap: bool) -> FallocateFlags {
    let how = if may_unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
    how | FallocateFlags::KEEP_SIZE
}

/// The file system does not know this kind of fallocate.
pub(super) fn is_unsupported(errno: i32) -> bool {
    errno == libc::EOPNOTSUPP || errno == libc::ENOSYS
}

/// The open files of a storage.
#[derive(Default)]
pub(super) struct FileTable {
    files: Vec<Option<OsFile>>,
}

impl FileTable {
    pub(super) fn open(&mut self, path: &Path, mode: OpenMode) -> Result<FileId, StorageError> {
        let action = if mode == OpenMode::CreateNew { "create" } else { "open" };
        let file = OsFile::open(path, mode).map_err(|source| named(path, action, source))?;
        let free = self.files.iter().position(Option::is_none);
        let slot = free.unwrap_or_else(|| {
            self.files.push(None);
            self.files.len() - 1
        });
        self.files[slot] = Some(file);
        Ok(FileId(slot))
    }

    pub(super) fn close(&mut self, id: FileId) {
        self.files[id.0] = None;
    }

    /// The open file. A closed or foreign id is a mistake in the caller, not in its input.
    pub(super) fn get(&self, id: FileId) -> &OsFile {
        self.files[id.0].as_ref().expect("a FileId is used while its file is open")
    }

    pub(super) fn route(&self, op: &Op<'_>) -> Route {
        match op {
            Op::Read { file, offset_bytes, buf } => self.get(*file).route(*offset_bytes, buf),
            Op::Write { file, offset_bytes, buf } => self.get(*file).route(*offset_bytes, buf),
            Op::Zero { .. } | Op::Sync { .. } => Route::Buffered,
        }
    }

    pub(super) fn len_bytes(&self, id: FileId) -> Result<u64, StorageError> {
        let file = self.get(id);
        let length = file.buffered.metadata().map(|m| m.len());
        length.map_err(|source| file.error("read the size of", None, source))
    }

    pub(super) fn preallocate(&self, id: FileId, len_bytes: u64) -> Result<(), StorageError> {
        let file = self.get(id);
        let reserved = rustix::fs::fallocate(&file.buffered, FallocateFlags::empty(), 0, len_bytes);
        match reserved {
            Ok(()) => Ok(()),
            Err(e) if is_unsupported(e.raw_os_error()) => file
                .buffered
                .set_len(len_bytes)
                .map_err(|source| file.error("reserve space for", None, source)),
            Err(source) => Err(file.error("reserve space for", None, source)),
        }
    }
}

fn named(path: &Path, action: &'static str, source: io::Error) -> StorageError {
    StorageError { path: path.to_owned(), action, offset_bytes: None, source }
}

pub(super) fn rename(from: &Path, to: &Path) -> Result<(), StorageError> {
    std::fs::rename(from, to).map_err(|source| named(from, "rename", source))
}

pub(super) fn remove(path: &Path) -> Result<(), StorageError> {
    std::fs::remove_file(path).map_err(|source| named(path, "remove", source))
}

pub(super) fn list(dir: &Path) -> Result<Vec<String>, StorageError> {
    let names = || -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(dir)? {
            names.extend(entry?.file_name().into_string());
        }
        names.sort();
        Ok(names)
    };
    names().map_err(|source| named(dir, "list", source))
}

pub(super) fn create_dir(dir: &Path) -> Result<(), StorageError> {
    std::fs::create_dir_all(dir).map_err(|source| named(dir, "create the directory", source))
}

pub(super) fn sync_dir(dir: &Path) -> Result<(), StorageError> {
    let synced = File::open(dir).and_then(|d| d.sync_all());
    synced.map_err(|source| named(dir, "sync the directory", source))
}
