//! A protected disk as an NBD export: the write splitter.

use std::io;
use std::sync::Arc;

use backhaul_nbd::{BlockSize, Errno, Export, IoFuture, Run, ZeroOptions};
use backhaul_proto::id::DiskIndex;
use bytes::{Bytes, BytesMut};

use crate::capture::machine::now_us;
use crate::capture::{CapturedDisk, Change, Device, MachineCapture};

/// Reads up to this size are done in place; larger ones may wait for a disk for long, and go to a
/// thread of their own.
const INLINE_BYTES_MAX: u32 = 256 << 10;

/// Runs in one answer: each costs two seeks, and a client asks again from where the answer ends.
const RUNS_MAX: usize = 512;

/// Changes up to this size are done in place. Larger ones take longer than the way to a thread of their
/// own, up to gigabytes where a disk can only be zeroed by writing.
const CHANGE_INLINE_BYTES_MAX: u64 = 64 << 10;

fn read(disk: &CapturedDisk, offset_bytes: u64, len_bytes: u32) -> io::Result<Bytes> {
    let mut content = BytesMut::zeroed(len_bytes as usize);
    disk.device.read(&mut content, offset_bytes)?;
    Ok(content.freeze())
}

/// Changes the disk, and records what became of it in the machine's order. The range is locked.
fn change_locked(
    machine: &MachineCapture,
    disk: &CapturedDisk,
    offset_bytes: u64,
    len_bytes: u64,
    change: impl FnOnce(&Device) -> io::Result<Option<Change>>,
) -> Result<bool, Errno> {
    // Looked at under the range lock: a fence that returned has seen every write before it.
    if machine.is_fenced() {
        return Err(Errno::ESHUTDOWN);
    }
    match change(&disk.device) {
        Ok(None) => Ok(false),
        Ok(Some(change)) => {
            machine.with_order(|order| {
                order.handle_write(now_us(), disk.index, offset_bytes, change);
            });
            Ok(true)
        }
        Err(error) => {
            // A write that failed may have reached the disk in part.
            machine.with_order(|order| {
                order.handle_uncaptured(now_us(), disk.index, offset_bytes, len_bytes);
            });
            let path = disk.device.path().display();
            tracing::error!(%error, disk = %path, offset_bytes, len_bytes, "a write failed");
            Err(Errno::from(error))
        }
    }
}

/// Serves one disk of a machine, and adds every write to the machine's order.
///
/// The place in the order is taken after the write reached the disk and before the guest is
/// answered, while the range is locked. A guest that waits for one write before it sends the next
/// therefore finds them in that order at the target, whatever runs beside them.
pub struct DiskExport {
    machine: Arc<MachineCapture>,
    disk: Arc<CapturedDisk>,
}

impl DiskExport {
    /// The export of the machine's disk at `index`.
    pub fn new(machine: Arc<MachineCapture>, index: DiskIndex) -> Self {
        let disk = Arc::clone(&machine.disks()[usize::from(index.0)]);
        Self { machine, disk }
    }

    /// Runs `change` on the disk with the range locked, then records it; returns whether anything
    /// changed. Once it is begun it is also recorded, even when the client is gone meanwhile.
    async fn change(
        &self,
        offset_bytes: u64,
        len_bytes: u64,
        change: impl FnOnce(&Device) -> io::Result<Option<Change>> + Send + 'static,
    ) -> Result<bool, Errno> {
        let range = self.disk.ranges.acquire(offset_bytes, len_bytes).await;
        let (machine, disk) = (Arc::clone(&self.machine), Arc::clone(&self.disk));
        let run = move || {
            let _range = range;
            change_locked(&machine, &disk, offset_bytes, len_bytes, change)
        };
        if len_bytes <= CHANGE_INLINE_BYTES_MAX {
            return run();
        }
        tokio::task::spawn_blocking(run).await.unwrap_or(Err(Errno::EIO))
    }

    async fn flush_device(&self) -> Result<(), Errno> {
        let disk = Arc::clone(&self.disk);
        let flushed = tokio::task::spawn_blocking(move || disk.device.flush()).await;
        let result = flushed.unwrap_or_else(|_| Err(io::ErrorKind::Other.into()));
        result.map_err(|error| {
            let path = self.disk.device.path().display();
            tracing::error!(%error, disk = %path, "a flush failed; the disk takes no more writes");
            Errno::EIO
        })
    }
}

impl Export for DiskExport {
    fn size_bytes(&self) -> u64 {
        self.disk.device.size_bytes()
    }

    fn description(&self) -> String {
        format!("disk {} of machine {}", self.disk.name, self.machine.name())
    }

    fn block_size(&self) -> BlockSize {
        BlockSize { minimum: 512, preferred: 4096 }
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read(&self, offset_bytes: u64, len_bytes: u32) -> IoFuture<'_, Bytes> {
        Box::pin(async move {
            if len_bytes <= INLINE_BYTES_MAX {
                return Ok(read(&self.disk, offset_bytes, len_bytes)?);
            }
            let disk = Arc::clone(&self.disk);
            let reading = move || read(&disk, offset_bytes, len_bytes);
            let content = tokio::task::spawn_blocking(reading).await.map_err(|_| Errno::EIO)?;
            Ok(content?)
        })
    }

    fn write(&self, offset_bytes: u64, data: Bytes, fua: bool) -> IoFuture<'_, ()> {
        Box::pin(async move {
            let len_bytes = data.len() as u64;
            self.change(offset_bytes, len_bytes, move |device| {
                device.write(&data, offset_bytes)?;
                Ok(Some(Change::Data(data)))
            })
            .await?;
            if fua { self.flush_device().await } else { Ok(()) }
        })
    }

    fn write_zeroes(
        &self,
        offset_bytes: u64,
        len_bytes: u32,
        options: ZeroOptions,
    ) -> IoFuture<'_, ()> {
        let len_bytes = u64::from(len_bytes);
        let may_unmap = !options.no_hole;
        Box::pin(async move {
            let done = self.change(offset_bytes, len_bytes, move |device| {
                let zeroed = device.zero(offset_bytes, len_bytes, may_unmap, options.fast)?;
                Ok(zeroed.then_some(Change::Zero { len_bytes, may_unmap }))
            });
            // Only a fast zeroing that would not be fast changes nothing.
            if !done.await? {
                return Err(Errno::ENOTSUP);
            }
            if options.fua { self.flush_device().await } else { Ok(()) }
        })
    }

    fn trim(&self, offset_bytes: u64, len_bytes: u32, fua: bool) -> IoFuture<'_, ()> {
        let len_bytes = u64::from(len_bytes);
        Box::pin(async move {
            self.change(offset_bytes, len_bytes, move |device| {
                let zeroed = device.trim(offset_bytes, len_bytes)?;
                Ok(zeroed.then_some(Change::Zero { len_bytes, may_unmap: true }))
            })
            .await?;
            if fua { self.flush_device().await } else { Ok(()) }
        })
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        Box::pin(self.flush_device())
    }

    fn runs(&self, offset_bytes: u64, len_bytes: u32) -> IoFuture<'_, Vec<Run>> {
        Box::pin(async move {
            let end = offset_bytes + u64::from(len_bytes);
            let mut runs = Vec::new();
            let mut at = offset_bytes;
            while at < end && runs.len() < RUNS_MAX {
                let (stop, hole) = self.disk.device.run(at, end);
                runs.push(Run { len_bytes: stop - at, hole });
                at = stop;
            }
            Ok(runs)
        })
    }
}
