//! Exports in memory that tests can look into, hold up and break.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use backhaul_nbd::{BlockSize, Errno, Export, IoFuture, Run, ZeroOptions};
use bytes::Bytes;
use tokio::sync::Semaphore;

/// A disk in memory, in blocks that are holes until written. Counts what is asked of it.
pub struct Memory {
    pub data: Mutex<Vec<u8>>,
    holes: Mutex<Vec<bool>>,
    pub minimum: u32,
    pub read_only: bool,
    pub flushes: AtomicUsize,
    pub fua: AtomicUsize,
    /// Every third request waits this many turns, so that others overtake it.
    pub turns: usize,
    requests: AtomicUsize,
}

/// Granularity of holes.
pub const BLOCK: usize = 4096;

impl Memory {
    pub fn new(size_bytes: u64) -> Self {
        Self {
            data: Mutex::new(vec![0; size_bytes as usize]),
            holes: Mutex::new(vec![true; (size_bytes as usize).div_ceil(BLOCK)]),
            minimum: 1,
            read_only: false,
            flushes: AtomicUsize::new(0),
            fua: AtomicUsize::new(0),
            turns: 0,
            requests: AtomicUsize::new(0),
        }
    }

    async fn dawdle(&self) {
        if self.requests.fetch_add(1, Ordering::Relaxed).is_multiple_of(3) {
            for _ in 0..self.turns {
                tokio::task::yield_now().await;
            }
        }
    }

    fn change(&self, offset_bytes: u64, len: usize, fua: bool, change: impl FnOnce(&mut [u8])) {
        let start = offset_bytes as usize;
        change(&mut self.data.lock().unwrap()[start..start + len]);
        self.holes.lock().unwrap()[start / BLOCK..(start + len).div_ceil(BLOCK)].fill(false);
        self.fua.fetch_add(usize::from(fua), Ordering::Relaxed);
    }
}

impl Export for Memory {
    fn size_bytes(&self) -> u64 {
        self.data.lock().unwrap().len() as u64
    }

    fn description(&self) -> String {
        "a disk in memory".into()
    }

    fn block_size(&self) -> BlockSize {
        BlockSize { minimum: self.minimum, preferred: 4096 }
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read(&self, offset_bytes: u64, len_bytes: u32) -> IoFuture<'_, Bytes> {
        Box::pin(async move {
            self.dawdle().await;
            let start = offset_bytes as usize;
            let data = self.data.lock().unwrap();
            Ok(Bytes::copy_from_slice(&data[start..start + len_bytes as usize]))
        })
    }

    fn write(&self, offset_bytes: u64, data: Bytes, fua: bool) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.dawdle().await;
            self.change(offset_bytes, data.len(), fua, |place| place.copy_from_slice(&data));
            Ok(())
        })
    }

    /// Never fast.
    fn write_zeroes(
        &self,
        offset_bytes: u64,
        len_bytes: u32,
        options: ZeroOptions,
    ) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.dawdle().await;
            if options.fast {
                return Err(Errno::ENOTSUP);
            }
            self.change(offset_bytes, len_bytes as usize, options.fua, |place| place.fill(0));
            Ok(())
        })
    }

    /// Zeroes, and makes holes of whole blocks.
    fn trim(&self, offset_bytes: u64, len_bytes: u32, fua: bool) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.dawdle().await;
            self.change(offset_bytes, len_bytes as usize, fua, |place| place.fill(0));
            let start = offset_bytes as usize;
            let whole = start.div_ceil(BLOCK)..(start + len_bytes as usize) / BLOCK;
            if let Some(holes) = self.holes.lock().unwrap().get_mut(whole) {
                holes.fill(true);
            }
            Ok(())
        })
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        Box::pin(async { Ok(()) })
    }

    /// One run a block, which the server has to join, from the start of a block to beyond the end.
    fn runs(&self, offset_bytes: u64, len_bytes: u32) -> IoFuture<'_, Vec<Run>> {
        let (start, len) = (offset_bytes as usize, len_bytes as usize);
        let holes = self.holes.lock().unwrap();
        let blocks = start / BLOCK..(start + len).div_ceil(BLOCK);
        let runs = blocks.map(|block| {
            let from = start.max(block * BLOCK);
            Run { len_bytes: ((block + 1) * BLOCK - from) as u64, hole: holes[block] }
        });
        let runs = runs.collect();
        Box::pin(async { Ok(runs) })
    }
}

/// What a [`Gated`] export does with a request that got through.
pub enum Then {
    Answer,
    Panic,
    PanicAtOnce,
}

/// An export whose reads and writes wait for a permit each; the first byte at any place is 7.
pub struct Gated {
    pub gate: Semaphore,
    /// One permit for each request that arrived.
    pub arrived: Semaphore,
    pub under_way: AtomicUsize,
    pub under_way_peak: AtomicUsize,
    pub then: Then,
}

impl Gated {
    pub fn new(then: Then) -> Arc<Self> {
        Arc::new(Self {
            gate: Semaphore::new(0),
            arrived: Semaphore::new(0),
            under_way: AtomicUsize::new(0),
            under_way_peak: AtomicUsize::new(0),
            then,
        })
    }

    /// Waits until `count` more requests arrived.
    pub async fn wait_for(&self, count: u32) {
        self.arrived.acquire_many(count).await.unwrap().forget();
    }

    async fn pass(&self) {
        let under_way = self.under_way.fetch_add(1, Ordering::SeqCst) + 1;
        self.under_way_peak.fetch_max(under_way, Ordering::SeqCst);
        self.arrived.add_permits(1);
        assert!(!matches!(self.then, Then::PanicAtOnce), "as the test wants");
        self.gate.acquire().await.unwrap().forget();
        self.under_way.fetch_sub(1, Ordering::SeqCst);
        assert!(!matches!(self.then, Then::Panic), "as the test wants");
    }
}

impl Export for Gated {
    fn size_bytes(&self) -> u64 {
        1 << 30
    }

    fn description(&self) -> String {
        String::new()
    }

    fn block_size(&self) -> BlockSize {
        BlockSize { minimum: 1, preferred: 4096 }
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read(&self, _: u64, len_bytes: u32) -> IoFuture<'_, Bytes> {
        Box::pin(async move {
            self.pass().await;
            Ok(vec![7; len_bytes as usize].into())
        })
    }

    fn write(&self, _: u64, _: Bytes, _: bool) -> IoFuture<'_, ()> {
        Box::pin(async {
            self.pass().await;
            Ok(())
        })
    }

    fn write_zeroes(&self, _: u64, _: u32, _: ZeroOptions) -> IoFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn trim(&self, _: u64, _: u32, _: bool) -> IoFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn runs(&self, _: u64, len_bytes: u32) -> IoFuture<'_, Vec<Run>> {
        Box::pin(async move { Ok(vec![Run { len_bytes: len_bytes.into(), hole: false }]) })
    }
}

/// How many bytes of read replies are alive, now and at most.
#[derive(Default)]
pub struct Gauge {
    now: AtomicU64,
    pub peak: AtomicU64,
}

/// An export of any size whose reads cost nothing but are counted while they are alive.
pub struct Measured {
    pub gauge: Arc<Gauge>,
    block: Arc<[u8]>,
    /// Whether a read waits a turn, and so gets a task of its own.
    pub waits: bool,
}

impl Measured {
    pub fn new(waits: bool) -> Self {
        Self { gauge: Arc::default(), block: vec![0; 32 << 20].into(), waits }
    }
}

struct Counted {
    gauge: Arc<Gauge>,
    block: Arc<[u8]>,
    len: usize,
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.block[..self.len]
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.gauge.now.fetch_sub(self.len as u64, Ordering::SeqCst);
    }
}

impl Export for Measured {
    fn size_bytes(&self) -> u64 {
        1 << 40
    }

    fn description(&self) -> String {
        String::new()
    }

    fn block_size(&self) -> BlockSize {
        BlockSize { minimum: 1, preferred: 4096 }
    }

    fn read_only(&self) -> bool {
        true
    }

    fn read(&self, _: u64, len_bytes: u32) -> IoFuture<'_, Bytes> {
        let (gauge, block, len) = (&self.gauge, &self.block, len_bytes as usize);
        let now = gauge.now.fetch_add(len as u64, Ordering::SeqCst) + len as u64;
        gauge.peak.fetch_max(now, Ordering::SeqCst);
        let counted = Counted { gauge: Arc::clone(gauge), block: Arc::clone(block), len };
        Box::pin(async move {
            if self.waits {
                tokio::task::yield_now().await;
            }
            Ok(Bytes::from_owner(counted))
        })
    }

    fn write(&self, _: u64, _: Bytes, _: bool) -> IoFuture<'_, ()> {
        Box::pin(async { Err(Errno::EPERM) })
    }

    fn write_zeroes(&self, _: u64, _: u32, _: ZeroOptions) -> IoFuture<'_, ()> {
        Box::pin(async { Err(Errno::EPERM) })
    }

    fn trim(&self, _: u64, _: u32, _: bool) -> IoFuture<'_, ()> {
        Box::pin(async { Err(Errno::EPERM) })
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn runs(&self, _: u64, _: u32) -> IoFuture<'_, Vec<Run>> {
        Box::pin(async { Err(Errno::EIO) })
    }
}
