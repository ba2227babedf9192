//! Plain system calls, one after the other: for kernels and containers without io_uring.

use std::io;
use std::path::Path;

use rustix::io::Errno;

use crate::storage::os_file::{self, FileTable, OsFile, Route};
use crate::storage::{FileId, Op, OpenMode, Storage, StorageError};

/// Files through `pread`, `pwrite`, `fallocate` and `fdatasync`.
#[derive(Default)]
pub struct PortableStorage {
    files: FileTable,
}

impl PortableStorage {
    /// A storage with no file open.
    pub fn new() -> Self {
        Self::default()
    }
}

/// Runs one operation to its end in the calling thread.
pub(super) fn run_op(files: &FileTable, op: &mut Op<'_>) -> Result<(), StorageError> {
    let route = files.route(op);
    match op {
        Op::Read { file, offset_bytes, buf } => {
            let file = files.get(*file);
            read_all(file, route, *offset_bytes, buf)
                .map_err(|source| file.error("read", Some(*offset_bytes), source))
        }
        Op::Write { file, offset_bytes, buf } => {
            let file = files.get(*file);
            write_all(file, route, *offset_bytes, buf)
                .map_err(|source| file.error("write", Some(*offset_bytes), source))
        }
        Op::Zero { file, offset_bytes, len_bytes, may_unmap } => {
            let file = files.get(*file);
            zero(file, *offset_bytes, *len_bytes, *may_unmap)
                .map_err(|source| file.error("zero a part of", Some(*offset_bytes), source))
        }
        Op::Sync { file } => {
            let file = files.get(*file);
            rustix::fs::fdatasync(file.fd(Route::Buffered))
                .map_err(|source| file.error("sync", None, source))
        }
    }
}

fn read_all(file: &OsFile, route: Route, offset_bytes: u64, buf: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < buf.len() {
        match rustix::io::pread(file.fd(route), &mut buf[done..], offset_bytes + done as u64) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => done += n,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn write_all(file: &OsFile, route: Route, offset_bytes: u64, buf: &[u8]) -> io::Result<()> {
    let mut done = 0;
    while done < buf.len() {
        match rustix::io::pwrite(file.fd(route), &buf[done..], offset_bytes + done as u64) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => done += n,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn zero(file: &OsFile, offset_bytes: u64, len_bytes: u64, may_unmap: bool) -> io::Result<()> {
    let fd = file.fd(Route::Buffered);
    match rustix::fs::fallocate(fd, os_file::zero_flags(may_unmap), offset_bytes, len_bytes) {
        Ok(()) => Ok(()),
        Err(e) if os_file::is_unsupported(e.raw_os_error()) => {
            file.write_zeroes(offset_bytes, len_bytes)
        }
        Err(error) => Err(error.into()),
    }
}

impl Storage for PortableStorage {
    fn open(&mut self, path: &Path, mode: OpenMode) -> Result<FileId, StorageError> {
        self.files.open(path, mode)
    }

    fn close(&mut self, file: FileId) {
        self.files.close(file);
    }

    fn run(&mut self, ops: &mut [Op<'_>]) -> Result<(), StorageError> {
        for route in [Route::Direct, Route::Buffered] {
            for op in ops.iter_mut() {
                if self.files.route(op) == route {
                    run_op(&self.files, op)?;
                }
            }
        }
        Ok(())
    }

    fn len_bytes(&mut self, file: FileId) -> Result<u64, StorageError> {
        self.files.len_bytes(file)
    }

    fn preallocate(&mut self, file: FileId, len_bytes: u64) -> Result<(), StorageError> {
        self.files.preallocate(file, len_bytes)
    }

    fn rename(&mut self, from: &Path, to: &Path) -> Result<(), StorageError> {
        os_file::rename(from, to)
    }

    fn remove(&mut self, path: &Path) -> Result<(), StorageError> {
        os_file::remove(path)
    }

    fn list(&mut self, dir: &Path) -> Result<Vec<String>, StorageError> {
        os_file::list(dir)
    }

    fn create_dir(&mut self, dir: &Path) -> Result<(), StorageError> {
        os_file::create_dir(dir)
    }

    fn sync_dir(&mut self, dir: &Path) -> Result<(), StorageError> {
        os_file::sync_dir(dir)
    }
}
