//! What the NBD exports, the sync and the owner loop share of one machine.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use backhaul_proto::id::{DiskIndex, DiskName, MachineName};
use tokio::sync::Notify;

use crate::capture::{Device, Mode, Order, RangeLock};

/// A protected machine: its disks and its write order.
#[derive(Debug)]
pub struct MachineCapture {
    name: MachineName,
    disks: Vec<Arc<CapturedDisk>>,
    order: Mutex<Order>,
    fenced: AtomicBool,
    changed: Notify,
    /// Told when a sync ends.
    ordered: Notify,
}

/// One of its disks.
#[derive(Debug)]
pub struct CapturedDisk {
    /// Its place among the machine's disks.
    pub index: DiskIndex,
    /// Its name.
    pub name: DiskName,
    /// The file or block device.
    pub device: Device,
    /// Keeps overlapping operations apart.
    pub ranges: Arc<RangeLock>,
}

/// Whether a machine's exports take writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fence {
    /// Writes are refused: the machine is failed over, and what it wrote now would be lost.
    Up,
    /// Writes are taken.
    Down,
}

impl MachineCapture {
    /// A machine with these disks, in the order of their indices.
    pub fn new(
        name: MachineName,
        disks: Vec<Arc<CapturedDisk>>,
        order: Order,
        fence: Fence,
    ) -> Arc<Self> {
        Arc::new(Self {
            name,
            disks,
            order: Mutex::new(order),
            fenced: AtomicBool::new(fence == Fence::Up),
            changed: Notify::new(),
            ordered: Notify::new(),
        })
    }

    /// The machine's name.
    pub fn name(&self) -> &MachineName {
        &self.name
    }

    /// Its disks, in the order of their indices.
    pub fn disks(&self) -> &[Arc<CapturedDisk>] {
        &self.disks
    }

    /// The write order. Held only for as long as it takes to add to it: every writer needs it.
    pub fn order(&self) -> MutexGuard<'_, Order> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds to the order, and wakes the owner loop when there is something for it to do.
    pub fn with_order<R>(&self, change: impl FnOnce(&mut Order) -> R) -> R {
        let mut order = self.order();
        let idle = !order.has_open_batch() && !order.has_sealed();
        let was_syncing = order.mode() != Mode::Ordered;
        let result = change(&mut order);
        if was_syncing && order.mode() == Mode::Ordered {
            self.ordered.notify_waiters();
        }
        let wake = order.has_sealed() || idle && order.has_open_batch();
        drop(order);
        if wake {
            self.changed.notify_one();
        }
        result
    }

    /// Waits until [`MachineCapture::with_order`] left something to do.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Waits until every write is in the stream: at once, or when the sync under way ends.
    pub async fn ordered(&self) {
        loop {
            // Registered before the mode is looked at, so that no end is missed.
            let ended = self.ordered.notified();
            if self.order().mode() == Mode::Ordered {
                return;
            }
            ended.await;
        }
    }

    /// Whether writes are refused.
    pub fn is_fenced(&self) -> bool {
        self.fenced.load(Ordering::SeqCst)
    }

    /// Raises or lowers the fence. Once a raised fence returns, no write is under way or will be.
    pub async fn set_fence(&self, fence: Fence) {
        self.fenced.store(fence == Fence::Up, Ordering::SeqCst);
        if fence == Fence::Up {
            for disk in &self.disks {
                disk.ranges.quiesce().await;
            }
        }
    }
}

/// The wall clock, in microseconds since 1970 UTC.
pub fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}
