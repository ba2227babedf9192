//! Hashing and compression, on every core, off the owner loop.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use backhaul_proto::batch::{BatchKind, Codec, Compression, Compressor, EncodedBatch, PlainBatch};
use backhaul_proto::limits::LIGHT_BYTES_MAX;

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

/// Records without data that are not worth compressing.
const BARE_RECORDS_MAX: usize = 16;

struct Work {
    batch: PlainBatch,
    dedupe: Arc<Dedupe>,
    done: Box<dyn FnOnce(Encoded) + Send>,
}

/// A pool of encoder threads. They finish in any order; the sender's caller puts the batches back
/// into theirs by sequence number. What waits here is bounded by the machine's queue.
#[derive(Clone)]
pub struct EncodePool {
    queue: Arc<OpenQueue>,
    shared: Arc<Shared>,
}

/// What waits for an encoder: small batches first. They are quick, and one of a quiet machine would wait for all
/// that another machine's sync has gathered, seconds at the levels that a slow line makes worth while.
#[derive(Default)]
struct Queue {
    state: Mutex<QueueState>,
    changed: Condvar,
}

#[derive(Default)]
struct QueueState {
    small: VecDeque<Work>,
    large: VecDeque<Work>,
    closed: bool,
}

/// Ends the encoders with the last handle of the pool.
struct OpenQueue(Arc<Queue>);

impl Drop for OpenQueue {
    fn drop(&mut self) {
        self.0.state().closed = true;
        self.0.changed.notify_all();
    }
}

impl Queue {
    fn push(&self, work: Work) {
        let mut state = self.state();
        match held_bytes(&work.batch) {
            ..=LIGHT_BYTES_MAX => state.small.push_back(work),
            _ => state.large.push_back(work),
        }
        self.changed.notify_one();
    }

    /// Waits for the next one; `None` once there will be no more.
    fn pop(&self) -> Option<Work> {
        let mut state = self.state();
        loop {
            let QueueState { small, large, closed } = &mut *state;
            let next = small.pop_front().or_else(|| large.pop_front());
            if next.is_some() || *closed {
                return next;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn state(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What every encoder looks at.
struct Shared {
    choice: CompressionChoice,
    control: Mutex<LevelControl>,
    waiting_bytes: AtomicU64,
    /// For batches without data: making one costs more than such a batch.
    bare: Mutex<Compressor>,
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
        let queue = Arc::<Queue>::default();
        let control = Mutex::new(LevelControl::new(threads, queue_bytes));
        let shared = Arc::new(Shared {
            choice,
            control,
            waiting_bytes: AtomicU64::new(0),
            bare: Mutex::default(),
            references: AtomicBool::new(false),
        });
        for index in 0..threads.max(1) {
            let (queue, shared) = (Arc::clone(&queue), Arc::clone(&shared));
            let name = format!("encode-{index}");
            thread::Builder::new().name(name).spawn(move || run(&queue, &shared))?;
        }
        Ok(Self { queue: Arc::new(OpenQueue(queue)), shared })
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

    /// Encodes `batch` of the machine that `dedupe` is of on some thread, then calls `done` there. A batch of a
    /// few records without data, the marker of a point above all, is encoded here: that takes less time than
    /// an encoder's turn.
    pub fn submit(
        &self,
        batch: PlainBatch,
        dedupe: Arc<Dedupe>,
        done: impl FnOnce(Encoded) + Send + 'static,
    ) {
        dedupe.handle_sealed(&batch);
        if batch.data_bytes == 0 && batch.records.len() <= BARE_RECORDS_MAX {
            let plain_held_bytes = held_bytes(&batch);
            let batch = {
                let mut bare = self.shared.bare.lock().unwrap_or_else(PoisonError::into_inner);
                batch.encode(Compression::Off, &mut bare)
            };
            return done(Encoded { batch, plain_held_bytes });
        }
        self.shared.waiting_bytes.fetch_add(held_bytes(&batch), Ordering::Relaxed);
        self.queue.0.push(Work { batch, dedupe, done: Box::new(done) });
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

fn run(queue: &Queue, shared: &Shared) {
    // The guest's writes share the cores with this, and come first; where it is not allowed they wait.
    let _ = rustix::process::nice(NICENESS);
    let mut compressor = Compressor::default();
    while let Some(Work { batch, dedupe, done }) = queue.pop() {
        let encoded = shared.encode(batch, &dedupe, &mut compressor);
        shared.waiting_bytes.fetch_sub(encoded.plain_held_bytes, Ordering::Relaxed);
        done(encoded);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, mpsc};

    use backhaul_proto::batch::{PlainBatch, Record, RecordKind};
    use backhaul_proto::id::{BatchSeq, DiskIndex, Generation, PointId};
    use bytes::Bytes;

    use super::{CompressionChoice, EncodePool, OpenQueue, Queue, Work};
    use crate::dedupe::Dedupe;

    fn work(seq: u64, bytes: usize) -> Work {
        let data = Bytes::from(vec![1; bytes]);
        let batch = PlainBatch::of_one_write(Generation(1), BatchSeq(seq), 0, data);
        Work {
            batch,
            dedupe: Arc::new(Dedupe::new(0, Generation(1), Vec::new())),
            done: Box::new(|_| {}),
        }
    }

    /// The marker of a quiet machine's point waited for all that another machine's sync had gathered.
    #[test]
    fn small_batches_are_encoded_before_large_ones_and_each_in_their_order() {
        let queue = Queue::default();
        for (seq, bytes) in [(1, 1 << 20), (2, 1 << 20), (3, 512), (4, 32 << 10)] {
            queue.push(work(seq, bytes));
        }
        let order: Vec<_> = (0..4).map(|_| queue.pop().unwrap().batch.batch.0).collect();
        assert_eq!(order, [3, 4, 1, 2]);
    }

    /// It waited for a processor behind the encoders of another machine's sync: 13 ms for one in a hundred on
    /// two busy cores, of the 25 that a point may take beyond its round trip.
    #[test]
    fn the_marker_of_a_point_waits_for_no_encoder() {
        let pool = EncodePool::new(1, CompressionChoice::Off, 1 << 30).unwrap();
        // The only encoder hangs in the first batch until this test is over.
        let (_hold, held) = mpsc::channel::<()>();
        let Work { batch, dedupe, .. } = work(1, 1 << 20);
        pool.submit(batch, dedupe, move |_| held.recv().unwrap_or_default());
        let Work { batch, dedupe, .. } = work(2, 0);
        let kind = RecordKind::Point(PointId(1));
        let records = vec![Record { disk: DiskIndex(0), kind }];
        let (done, encoded) = mpsc::channel();
        let marker = PlainBatch { records, ..batch };
        pool.submit(marker, dedupe, move |encoded| {
            done.send(encoded.batch.header.batch.0).unwrap_or_default();
        });
        assert_eq!(encoded.try_recv(), Ok(2));
    }

    #[test]
    fn encoders_end_with_the_pool() {
        let queue = Arc::new(Queue::default());
        let open = OpenQueue(Arc::clone(&queue));
        open.0.push(work(1, 1));
        let (ended, end) = mpsc::channel();
        std::thread::spawn(move || {
            let mut encoded = 0;
            while queue.pop().is_some() {
                encoded += 1;
            }
            ended.send(encoded)
        });
        drop(open);
        let encoded = end.recv_timeout(std::time::Duration::from_secs(10));
        assert_eq!(encoded, Ok(1), "what was handed over before is encoded still");
    }
}
