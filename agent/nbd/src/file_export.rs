//! A plain file as an export.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use rustix::fs::{FallocateFlags, SeekFrom, seek};

use crate::{BlockSize, Errno, Export, IoFuture, Run, ZeroOptions};

/// A raw file, served as it is. Reads and writes are done in place, because the page cache answers
/// them faster than another thread could be woken.
#[derive(Debug)]
pub struct FileExport {
    file: Arc<File>,
    size_bytes: u64,
    read_only: bool,
}

impl FileExport {
    /// Opens `path`.
    pub fn open(path: &Path, read_only: bool) -> io::Result<Self> {
        let file = File::options().read(true).write(!read_only).open(path)?;
        let size_bytes = file.metadata()?.len();
        Ok(Self { file: Arc::new(file), size_bytes, read_only })
    }

    fn finish(&self, result: io::Result<()>, fua: bool) -> Result<(), Errno> {
        result?;
        if fua {
            self.file.sync_data()?;
        }
        Ok(())
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
        Box::pin(async move {
            let mut buf = BytesMut::zeroed(len_bytes as usize);
            self.file.read_exact_at(&mut buf, offset_bytes)?;
            Ok(buf.freeze())
        })
    }

    fn write(&self, offset_bytes: u64, data: Bytes, fua: bool) -> IoFuture<'_, ()> {
        Box::pin(async move { self.finish(self.file.write_all_at(&data, offset_bytes), fua) })
    }

    fn write_zeroes(
        &self,
        offset_bytes: u64,
        len_bytes: u32,
        options: ZeroOptions,
    ) -> IoFuture<'_, ()> {
        let mode = if options.no_hole {
            FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE
        } else {
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE
        };
        Box::pin(async move {
            let done = rustix::fs::fallocate(&self.file, mode, offset_bytes, len_bytes.into());
            let result = match done {
                Err(rustix::io::Errno::OPNOTSUPP) if options.fast => return Err(Errno::ENOTSUP),
                Err(rustix::io::Errno::OPNOTSUPP) => {
                    self.file.write_all_at(&vec![0; len_bytes as usize], offset_bytes)
                }
                other => other.map_err(io::Error::from),
            };
            self.finish(result, options.fua)
        })
    }

    fn trim(&self, offset_bytes: u64, len_bytes: u32, fua: bool) -> IoFuture<'_, ()> {
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Box::pin(async move {
            match rustix::fs::fallocate(&self.file, mode, offset_bytes, len_bytes.into()) {
                Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
                other => self.finish(other.map_err(io::Error::from), fua),
            }
        })
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        let file = Arc::clone(&self.file);
        Box::pin(async move {
            let synced = tokio::task::spawn_blocking(move || file.sync_data()).await;
            Ok(synced.map_err(|_| Errno::EIO)??)
        })
    }

    fn runs(&self, offset_bytes: u64, len_bytes: u32) -> IoFuture<'_, Vec<Run>> {
        Box::pin(async move {
            let end = offset_bytes + u64::from(len_bytes);
            let mut runs = Vec::new();
            let mut at = offset_bytes;
            while at < end {
                let (stop, hole) = match seek(&self.file, SeekFrom::Data(at)) {
                    Ok(data) if data > at => (data.min(end), true),
                    Err(rustix::io::Errno::NXIO) => (end, true),
                    _ => (seek(&self.file, SeekFrom::Hole(at)).map_or(end, |h| h.min(end)), false),
                };
                runs.push(Run { len_bytes: stop - at, hole });
                at = stop;
            }
            Ok(runs)
        })
    }
}
