//! A plain file or block device as an export.

use std::fs::File;
use std::io::{self, Seek};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use rustix::buffer::spare_capacity;
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};

use crate::{BlockSize, Errno, Export, IoFuture, Run, ZeroOptions};

/// Reads and writes up to this length are done in place: the page cache answers them sooner than
/// another thread would wake. Longer ones, and all that waits for the disk by intent (flush, FUA,
/// zeroing), run on a blocking thread, so that they do not hold up other connections.
const IN_PLACE_BYTES_MAX: usize = 256 << 10;

/// Runs looked up for one request, a system call each; a client asks again from where they end.
const RUNS_MAX: usize = 512;

/// Zeroes are written this many at a time where the file system cannot make them.
const ZEROES: &[u8] = &[0; 64 << 10];

/// A raw file, served as it is. It takes no writes any more after a sync failed, because nobody can
/// tell which of them are lost.
#[derive(Debug)]
pub struct FileExport {
    disk: Arc<Disk>,
    size_bytes: u64,
    read_only: bool,
}

impl FileExport {
    /// Opens `path`.
    pub fn open(path: &Path, read_only: bool) -> io::Result<Self> {
        let mut file = File::options().read(true).write(!read_only).open(path)?;
        // Not from the metadata: a block device has its size only here.
        let size_bytes = file.seek(io::SeekFrom::End(0))?;
        let disk = Arc::new(Disk { file, sync_failed: AtomicBool::new(false) });
        Ok(Self { disk, size_bytes, read_only })
    }

    /// Does `work` on a thread that may block.
    fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Disk) -> Result<T, Errno> + Send + 'static,
    ) -> IoFuture<'_, T> {
        let disk = Arc::clone(&self.disk);
        let done = tokio::task::spawn_blocking(move || work(&disk));
        Box::pin(async move { done.await.unwrap_or(Err(Errno::EIO)) })
    }
}

impl Export for FileExport {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn description(&self) -> String {
        "a file".into()
    }

    fn block_size(&self) -> BlockSize {
        BlockSize { minimum: 1, preferred: 4096 }
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read(&self, offset_bytes: u64, len_bytes: u32) -> IoFuture<'_, Bytes> {
        let len = len_bytes as usize;
        if len > IN_PLACE_BYTES_MAX {
            return self.blocking(move |disk| disk.read(offset_bytes, len));
        }
        Box::pin(async move { self.disk.read(offset_bytes, len) })
    }

    fn write(&self, offset_bytes: u64, data: Bytes, fua: bool) -> IoFuture<'_, ()> {
        if fua || data.len() > IN_PLACE_BYTES_MAX {
            return self.blocking(move |disk| {
                disk.write(offset_bytes, &data)?;
                disk.sync_if(fua)
            });
        }
        Box::pin(async move { self.disk.write(offset_bytes, &data) })
    }

    fn write_zeroes(
        &self,
        offset_bytes: u64,
        len_bytes: u32,
        options: ZeroOptions,
    ) -> IoFuture<'_, ()> {
        self.blocking(move |disk| {
            disk.zero(offset_bytes, len_bytes.into(), options)?;
            disk.sync_if(options.fua)
        })
    }

    fn trim(&self, offset_bytes: u64, len_bytes: u32, fua: bool) -> IoFuture<'_, ()> {
        self.blocking(move |disk| {
            match disk.zero(offset_bytes, len_bytes.into(), ZeroOptions { fast: true, ..PUNCH }) {
                // A trim is a wish.
                Err(Errno::ENOTSUP) => Ok(()),
                done => done.and_then(|()| disk.sync_if(fua)),
            }
        })
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        self.blocking(|disk| disk.sync_if(true))
    }

    fn runs(&self, offset_bytes: u64, len_bytes: u32) -> IoFuture<'_, Vec<Run>> {
        Box::pin(async move { Ok(self.disk.runs(offset_bytes, len_bytes)) })
    }
}

const PUNCH: ZeroOptions = ZeroOptions { fua: false, no_hole: false, fast: false };

#[derive(Debug)]
struct Disk {
    file: File,
    sync_failed: AtomicBool,
}

impl Disk {
    fn read(&self, offset_bytes: u64, len: usize) -> Result<Bytes, Errno> {
        let mut data = Vec::with_capacity(len);
        while data.len() < len {
            let at = offset_bytes + data.len() as u64;
            // The vector's capacity may be more than was asked for.
            let missing = len - data.len();
            match rustix::io::pread(&self.file, spare_capacity(&mut data), at) {
                // The file became shorter than the export.
                Ok(0) => return Err(Errno::EIO),
                Ok(read) if read > missing => data.truncate(len),
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(io::Error::from(error).into()),
            }
        }
        Ok(data.into())
    }

    fn write(&self, offset_bytes: u64, data: &[u8]) -> Result<(), Errno> {
        self.check_latch()?;
        Ok(self.file.write_all_at(data, offset_bytes)?)
    }

    fn zero(&self, offset_bytes: u64, len_bytes: u64, options: ZeroOptions) -> Result<(), Errno> {
        self.check_latch()?;
        let mode = match options.no_hole {
            true => FallocateFlags::ZERO_RANGE,
            false => FallocateFlags::PUNCH_HOLE,
        };
        let mode = mode | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, mode, offset_bytes, len_bytes) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::OPNOTSUPP) if options.fast => return Err(Errno::ENOTSUP),
            Err(rustix::io::Errno::OPNOTSUPP) => {}
            Err(error) => return Err(io::Error::from(error).into()),
        }
        let (mut at, end) = (offset_bytes, offset_bytes + len_bytes);
        while at < end {
            let part = (ZEROES.len() as u64).min(end - at);
            self.file.write_all_at(&ZEROES[..part as usize], at)?;
            at += part;
        }
        Ok(())
    }

    fn sync_if(&self, wanted: bool) -> Result<(), Errno> {
        if !wanted {
            return Ok(());
        }
        self.check_latch()?;
        self.file.sync_data().map_err(|error| {
            self.sync_failed.store(true, Ordering::Release);
            tracing::error!(%error, "a sync failed; the export takes no writes until reopened");
            Errno::EIO
        })
    }

    fn check_latch(&self) -> Result<(), Errno> {
        if self.sync_failed.load(Ordering::Acquire) { Err(Errno::EIO) } else { Ok(()) }
    }

    fn runs(&self, offset_bytes: u64, len_bytes: u32) -> Vec<Run> {
        let end = offset_bytes + u64::from(len_bytes);
        let mut runs = Vec::new();
        let mut at = offset_bytes;
        while at < end && runs.len() < RUNS_MAX {
            let (stop, hole) = match seek(&self.file, SeekFrom::Data(at)) {
                Ok(data) if data > at => (data.min(end), true),
                Err(rustix::io::Errno::NXIO) => (end, true),
                Ok(_) => match seek(&self.file, SeekFrom::Hole(at)) {
                    Ok(stop) if stop > at => (stop.min(end), false),
                    _ => (end, false),
                },
                Err(_) => (end, false),
            };
            runs.push(Run { len_bytes: stop - at, hole });
            at = stop;
        }
        runs
    }
}
