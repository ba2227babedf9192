//! Several threads work on chunks of a disk; the results come in the order of the disk.

use std::{
    collections::BTreeMap,
    num::NonZeroUsize,
    path::Path,
    sync::{
        Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
};

use crate::{
    error::{ErrorKind, ImageError, Result},
    image::{MapDisk, RunState},
};

/// Bytes of a chunk: large enough that a system call is cheap, a whole number of every grain that
/// is common.
pub(super) const CHUNK_BYTES: u64 = 1 << 20;

/// Chunks that may be worked on or wait for their turn, per thread: memory is a few MiB, and a slow
/// chunk does not stop the others at once.
const AHEAD_PER_THREAD: u64 = 4;

/// Bytes of a chunk in which nothing is stored: nobody reads it.
const EMPTY_CHUNK_BYTES: u64 = 1 << 30;

/// Part of a disk. With data, not longer than [`CHUNK_BYTES`], and within one aligned chunk.
#[derive(Debug, Clone, Copy)]
pub(super) struct Chunk {
    pub(super) offset: u64,
    pub(super) length: u64,
    /// Something is stored here, which may still be zeros.
    pub(super) data: bool,
}

impl Chunk {
    pub(super) fn end(&self) -> u64 {
        self.offset + self.length
    }
}

/// The chunks of a disk in which data is stored.
pub(super) fn data_chunks(image: &dyn MapDisk) -> impl Iterator<Item = Result<Chunk>> + Send + '_ {
    all_chunks(image).filter(|chunk| chunk.as_ref().map_or(true, |chunk| chunk.data))
}

/// All chunks of a disk.
pub(super) fn all_chunks(image: &dyn MapDisk) -> impl Iterator<Item = Result<Chunk>> + Send + '_ {
    let mut runs = image.extents(0, image.size_bytes());
    let (mut next, mut end, mut data) = (0, 0, false);
    std::iter::from_fn(move || {
        while next >= end {
            match runs.next()? {
                Ok(run) => {
                    (next, end) = (run.offset, run.offset + run.length);
                    data = run.state == RunState::Data;
                }
                Err(error) => return Some(Err(error)),
            }
        }
        let offset = next;
        let most = if data { CHUNK_BYTES } else { EMPTY_CHUNK_BYTES };
        next = end.min((offset + 1).next_multiple_of(most));
        Some(Ok(Chunk { offset, length: next - offset, data }))
    })
}

/// Threads to use where the caller does not say: all cores.
pub(super) fn threads_or_all(threads: Option<NonZeroUsize>) -> usize {
    threads.or_else(|| thread::available_parallelism().ok()).map_or(1, NonZeroUsize::get)
}

/// Runs `work` on all chunks in `threads` threads, each with memory that it keeps from chunk to
/// chunk, and `take` on the results, in order, in this one. The first error, of a chunk, of the work
/// or of the taking, ends everything.
pub(super) fn run<T: Send>(
    path: &Path,
    chunks: impl Iterator<Item = Result<Chunk>> + Send,
    threads: usize,
    work: impl Fn(Chunk, &mut Vec<u8>) -> Result<T> + Sync,
    mut take: impl FnMut(Chunk, T) -> Result<()>,
) -> Result<()> {
    let shared = Shared {
        chunks: Mutex::new((chunks, 0)),
        turn: Mutex::new(0),
        moved: Condvar::new(),
        stopped: AtomicBool::new(false),
        ahead: AHEAD_PER_THREAD * threads as u64,
    };
    thread::scope(|scope| {
        let (results, arrived) = mpsc::channel();
        for _ in 0..threads {
            let results = results.clone();
            let (shared, work) = (&shared, &work);
            let started =
                thread::Builder::new().name("image".into()).spawn_scoped(scope, move || {
                    let _stop = StopOnPanic(&shared.stopped, &shared.moved);
                    let mut memory = Vec::new();
                    while let Some((number, chunk)) = shared.next() {
                        let done = chunk.and_then(|chunk| {
                            work(chunk, &mut memory).map(|result| (chunk, result))
                        });
                        if results.send((number, done)).is_err() {
                            break;
                        }
                    }
                });
            if let Err(source) = started {
                shared.stop();
                return Err(ImageError::io("start a thread for", path, source));
            }
        }
        drop(results);
        let result = take_in_order(&shared, arrived, &mut take);
        shared.stop();
        result?;
        match shared.is_stopped_early() {
            true => Err(ImageError::new(ErrorKind::Io, path, "a thread of the operation failed")),
            false => Ok(()),
        }
    })
}

fn take_in_order<T, I>(
    shared: &Shared<I>,
    arrived: mpsc::Receiver<(u64, Result<(Chunk, T)>)>,
    take: &mut impl FnMut(Chunk, T) -> Result<()>,
) -> Result<()> {
    let (mut waiting, mut next) = (BTreeMap::new(), 0);
    for (number, done) in arrived {
        waiting.insert(number, done);
        while let Some(done) = waiting.remove(&next) {
            let (chunk, result) = done?;
            take(chunk, result)?;
            next += 1;
            *lock(&shared.turn) = next;
            shared.moved.notify_all();
        }
    }
    Ok(())
}

struct Shared<I> {
    /// The chunks, and the number of the next.
    chunks: Mutex<(I, u64)>,
    /// The number of the chunk whose result is taken next.
    turn: Mutex<u64>,
    moved: Condvar,
    stopped: AtomicBool,
    ahead: u64,
}

impl<I> Shared<I> {
    fn stop(&self) {
        let _turn = lock(&self.turn);
        if lock(&self.chunks).1 != ENDED {
            self.stopped.store(true, Ordering::SeqCst);
        }
        self.moved.notify_all();
    }

    fn is_stopped_early(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }
}

impl<I: Iterator<Item = Result<Chunk>>> Shared<I> {
    fn next(&self) -> Option<(u64, Result<Chunk>)> {
        let (number, chunk) = {
            let mut chunks = lock(&self.chunks);
            if chunks.1 == ENDED {
                return None;
            }
            match chunks.0.next() {
                Some(chunk) => {
                    let number = chunks.1;
                    chunks.1 += 1;
                    (number, chunk)
                }
                None => {
                    chunks.1 = ENDED;
                    return None;
                }
            }
        };
        let mut turn = lock(&self.turn);
        while number >= *turn + self.ahead && !self.stopped.load(Ordering::SeqCst) {
            turn = self.moved.wait(turn).unwrap_or_else(PoisonError::into_inner);
        }
        (!self.stopped.load(Ordering::SeqCst)).then_some((number, chunk))
    }
}

/// A number that no chunk has: there are no more.
const ENDED: u64 = u64::MAX;

/// A thread that panics must not leave the others waiting for its result.
struct StopOnPanic<'a>(&'a AtomicBool, &'a Condvar);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.store(true, Ordering::SeqCst);
            self.1.notify_all();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunks(count: u64) -> impl Iterator<Item = Result<Chunk>> + Send {
        (0..count).map(|offset| Ok(Chunk { offset, length: 1, data: true }))
    }

    #[test]
    fn results_come_in_order_whatever_the_work_takes() {
        let mut taken = Vec::new();
        let work = |chunk: Chunk, _: &mut Vec<u8>| {
            let spin = (chunk.offset * 7919) % 5000;
            Ok((0..spin).fold(chunk.offset, |sum, step| sum ^ std::hint::black_box(step ^ step)))
        };
        let take = |_: Chunk, result: u64| {
            taken.push(result);
            Ok(())
        };
        run(Path::new("x"), chunks(500), 3, work, take).unwrap();
        assert_eq!(taken, (0..500).collect::<Vec<_>>());
    }

    #[test]
    fn the_first_error_ends_everything() {
        let bad = || ImageError::new(ErrorKind::Damaged, Path::new("x"), "bad");
        let work = |chunk: Chunk, _: &mut Vec<u8>| {
            if chunk.offset == 40 { Err(bad()) } else { Ok(chunk.offset) }
        };
        let mut taken = 0;
        let take = |_: Chunk, _: u64| {
            taken += 1;
            Ok(())
        };
        let error = run(Path::new("x"), chunks(100_000), 2, work, take).unwrap_err();
        assert_eq!((error.kind(), taken), (ErrorKind::Damaged, 40));
        let refuse = |_: Chunk, _: u64| Err(bad());
        let good = |chunk: Chunk, _: &mut Vec<u8>| Ok(chunk.offset);
        run(Path::new("x"), chunks(100_000), 2, good, refuse).unwrap_err();
    }
}
