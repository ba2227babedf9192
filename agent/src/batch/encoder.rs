//! Hashing and compression, on every core, off the owner loop.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;

use backhaul_proto::batch::{BatchKind, Compression, Compressor, EncodedBatch, PlainBatch};

use crate::batch::{elide_zeroes, held_bytes};

/// What the configuration says of compression.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompressionChoice {
    /// Compress while sealed batches wait for the link, not while the processor is the bottleneck.
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
    compression: Compression,
    done: Box<dyn FnOnce(Encoded) + Send>,
}

/// A pool of encoder threads. They finish in any order; the sender's caller puts the batches back
/// into theirs by sequence number. What waits here is bounded by the machine's queue.
#[derive(Clone)]
pub struct EncodePool {
    work: mpsc::Sender<Work>,
    link_limited: Arc<AtomicBool>,
    choice: CompressionChoice,
}

impl EncodePool {
    /// Starts `threads` encoders.
    pub fn new(threads: usize, choice: CompressionChoice) -> std::io::Result<Self> {
        let (work, queue) = mpsc::channel::<Work>();
        let queue = Arc::new(Mutex::new(queue));
        for index in 0..threads.max(1) {
            let queue = Arc::clone(&queue);
            thread::Builder::new().name(format!("encode-{index}")).spawn(move || run(&queue))?;
        }
        Ok(Self { work, link_limited: Arc::default(), choice })
    }

    /// Says whether batches wait for the link at present, which is when compressing pays.
    pub fn set_link_limited(&self, limited: bool) {
        self.link_limited.store(limited, Ordering::Relaxed);
    }

    /// Encodes `batch` on some thread, then calls `done` there.
    pub fn submit(&self, batch: PlainBatch, done: impl FnOnce(Encoded) + Send + 'static) {
        let compression = match self.choice {
            CompressionChoice::Off => Compression::Off,
            CompressionChoice::Level(level) => Compression::Zstd(level),
            CompressionChoice::Auto if self.link_limited.load(Ordering::Relaxed) => {
                Compression::Zstd(1)
            }
            CompressionChoice::Auto => Compression::Off,
        };
        // The threads end only with the last handle of the pool, so this send cannot fail.
        let _ = self.work.send(Work { batch, compression, done: Box::new(done) });
    }
}

fn run(queue: &Mutex<mpsc::Receiver<Work>>) {
    // The guest's writes share the cores with this, and come first; where it is not allowed they wait.
    let _ = rustix::process::nice(NICENESS);
    let mut compressor = Compressor::default();
    loop {
        let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Work { mut batch, compression, done }) = next else { return };
        let plain_held_bytes = held_bytes(&batch);
        // A sync has looked for zeroes already, where it could leave them out altogether.
        if batch.kind == BatchKind::Ordered {
            elide_zeroes(&mut batch);
        }
        let batch = batch.encode(compression, &mut compressor);
        done(Encoded { batch, plain_held_bytes });
    }
}
