//! Hashing and compression, on every core, off the owner loop.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::Instant;

use backhaul_proto::batch::{BatchKind, Codec, Compression, Compressor, EncodedBatch, PlainBatch};

use crate::batch::{Backlog, LevelControl, Sample, elide_zeroes, held_bytes};
use crate::dedupe::Dedupe;

/// What the configuration says of compression.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompressionChoice {
    /// As hard as the processors can while the link is the bottleneck, and not at all while they are.
    Auto,
    /// Never.
    Off,
    /// Always, at this zstd level (1 to 19).
    Level(i32),
}

/// A batch that is ready to travel.
#[derive(Debug)]
pub struct Encoded {
    /// The batch.
    pub batch: EncodedBatch,
    /// What it took in the queue before, to be replaced by what it takes now.
    pub plain_held_bytes: u64,
}

/// How far the encoders stand back for the threads that serve the guest; Linux keeps it per thread.
const NICENESS: i32 = 5;

struct Work {
    batch: PlainBatch,
    dedupe: Arc<Dedupe>,
    done: Box<dyn FnOnce(Encoded) + Send>,
}

/// A pool of encoder threads. They finish in any order; the sender's caller puts the batches back
/// into theirs by sequence number. What waits here is bounded by the machine's queue.
#[derive(Clone)]
pub struct EncodePool {
    work: mpsc::Sender<Work>,
    shared: Arc<Shared>,
}

/// What every encoder looks at.
struct Shared {
    choice: CompressionChoice,
    control: Mutex<LevelControl>,
    waiting_bytes: AtomicU64,
    /// The target knows what references are.
    references: AtomicBool,
}

impl EncodePool {
    /// Starts `threads` encoders, for machines whose queues hold `queue_bytes` together.
    pub fn new(
        threads: usize,
        choice: CompressionChoice,
        queue_bytes: u64,
    ) -> std::io::Result<Self> {
        let (work, queue) = mpsc::channel::<Work>();
        let queue = Arc::new(Mutex::new(queue));
        let control = Mutex::new(LevelControl::new(threads, queue_bytes));
        let shared = Arc::new(Shared {
            choice,
            control,
            waiting_bytes: AtomicU64::new(0),
            references: AtomicBool::new(false),
        });
        for index in 0..threads.max(1) {
            let (queue, shared) = (Arc::clone(&queue), Arc::clone(&shared));
            let name = format!("encode-{index}");
            thread::Builder::new().name(name).spawn(move || run(&queue, &shared))?;
        }
        Ok(Self { work, shared })
    }

    /// A link is up: whether it is so short that it is fast.
    pub fn handle_connected(&self, short: bool) {
        self.shared.control().handle_connected(short);
    }

    /// Says what waits for the link, which knows nothing of what waits here; `None` while there is
    /// no link.
    pub fn handle_link(&self, now: Instant, link: Option<Backlog>) {
        let encoder_bytes = self.shared.waiting_bytes.load(Ordering::Relaxed);
        let mut control = self.shared.control();
        match link {
            Some(link) => control.handle_backlog(now, Backlog { encoder_bytes, ..link }),
            None => control.handle_disconnected(),
        }
    }

    /// The level of zstd that batches are compressed at now, 0 for not at all.
    pub fn level(&self) -> i32 {
        match self.shared.choice {
            CompressionChoice::Off => 0,
            CompressionChoice::Level(level) => level,
            CompressionChoice::Auto => self.shared.control().step().level().unwrap_or(0),
        }
    }

    /// How many plain bytes a byte on the wire stands for, of late.
    pub fn ratio(&self) -> f64 {
        self.shared.control().ratio()
    }

    /// Says whether the target knows what references are.
    pub fn allow_references(&self, allowed: bool) {
        self.shared.references.store(allowed, Ordering::Relaxed);
    }

    /// Encodes `batch` of the machine that `dedupe` is of on some thread, then calls `done` there.
    pub fn submit(
        &self,
        batch: PlainBatch,
        dedupe: Arc<Dedupe>,
        done: impl FnOnce(Encoded) + Send + 'static,
    ) {
        self.shared.waiting_bytes.fetch_add(held_bytes(&batch), Ordering::Relaxed);
        // The threads end only with the last handle of the pool, so this send cannot fail.
        let _ = self.work.send(Work { batch, dedupe, done: Box::new(done) });
    }
}

impl Shared {
    fn control(&self) -> MutexGuard<'_, LevelControl> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn encode(
        &self,
        mut batch: PlainBatch,
        dedupe: &Dedupe,
        compressor: &mut Compressor,
    ) -> Encoded {
        let plain_held_bytes = held_bytes(&batch);
        let waiting_bytes = self.waiting_bytes.load(Ordering::Relaxed);
        let (step, link_limits) = {
            let control = self.control();
            let waiting_bytes = waiting_bytes.saturating_sub(plain_held_bytes);
            (control.poll_step(waiting_bytes), control.link_limits())
        };
        let compression = match self.choice {
            CompressionChoice::Off => Compression::Off,
            CompressionChoice::Level(level) => Compression::Zstd(level),
            CompressionChoice::Auto => step.level().map_or(Compression::Off, Compression::Zstd),
        };
        let began = Instant::now();
        // A sync has looked for zeroes already, where it could leave them out altogether.
        if batch.kind == BatchKind::Ordered {
            elide_zeroes(&mut batch);
        }
        let references = if link_limits && self.references.load(Ordering::Relaxed) {
            dedupe.references(&batch)
        } else {
            Vec::new()
        };
        let batch = batch.encode_folded(references, compression, compressor);
        self.control().handle_encoded(Sample {
            step,
            plain_bytes: batch.header.plain_bytes.into(),
            wire_bytes: batch.header.wire_bytes.into(),
            took: began.elapsed(),
            compressed: batch.header.codec == Codec::Zstd && batch.header.folded.is_none(),
        });
        Encoded { batch, plain_held_bytes }
    }
}

fn run(queue: &Mutex<mpsc::Receiver<Work>>, shared: &Shared) {
    // The guest's writes share the cores with this, and come first; where it is not allowed they wait.
    let _ = rustix::process::nice(NICENESS);
    let mut compressor = Compressor::default();
    loop {
        let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Work { batch, dedupe, done }) = next else { return };
        let encoded = shared.encode(batch, &dedupe, &mut compressor);
        shared.waiting_bytes.fetch_sub(encoded.plain_held_bytes, Ordering::Relaxed);
        done(encoded);
    }
}
