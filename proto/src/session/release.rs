//! When the bytes of a batch are due under a ceiling.

use std::time::{Duration, Instant};

use bytes::Bytes;

/// Time between two pieces: timers tick in milliseconds, and every piece is a system call or two.
const STEP: Duration = Duration::from_millis(5);

/// Fewer bytes than this, a TLS record, are not cut off for themselves: the last packet of a piece is
/// not full, and its headers cost the same.
const PIECE_BYTES_MIN: usize = 16 << 10;

/// Longest that a batch is spread over. A ceiling that is raised meanwhile counts from the next batch
/// on; only a batch that was sealed under a higher ceiling takes so long.
const SPREAD_MAX: Duration = Duration::from_secs(5);

/// The time over which a batch is paid for: its bytes leave evenly over it, so that a ceiling holds
/// within a batch too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Release {
    from: Instant,
    to: Instant,
}

impl Release {
    /// All of it is due now.
    pub fn at_once(now: Instant) -> Self {
        Self { from: now, to: now }
    }

    /// Whether no byte is due later than another.
    pub(crate) fn is_at_once(self) -> bool {
        self.from == self.to
    }

    /// It is due evenly over `time` from `from` on, or over what a batch takes at most.
    pub(super) fn over(from: Instant, time: Duration) -> Self {
        Self { from, to: from + time.min(SPREAD_MAX) }
    }

    /// Cuts a batch into pieces, each with the moment at which it is due. Copies nothing.
    pub(crate) fn pieces(self, chunks: Vec<Bytes>) -> Vec<(Instant, Vec<Bytes>)> {
        let bytes: usize = chunks.iter().map(Bytes::len).sum();
        let time = self.to - self.from;
        let steps = (time.as_nanos() / STEP.as_nanos()) as usize;
        let steps = steps.min(bytes / PIECE_BYTES_MIN).max(1);
        if steps == 1 {
            return vec![(self.from, chunks)];
        }
        let piece_bytes = bytes.div_ceil(steps);
        let mut pieces = Vec::with_capacity(steps);
        let mut piece = Vec::new();
        let (mut done_bytes, mut room_bytes) = (0, piece_bytes);
        for mut chunk in chunks {
            while !chunk.is_empty() {
                let part = chunk.split_to(chunk.len().min(room_bytes));
                room_bytes -= part.len();
                piece.push(part);
                if room_bytes == 0 {
                    let due = self.from + time.mul_f64(done_bytes as f64 / bytes as f64);
                    pieces.push((due, std::mem::take(&mut piece)));
                    (done_bytes, room_bytes) = (done_bytes + piece_bytes, piece_bytes);
                }
            }
        }
        if !piece.is_empty() {
            let due = self.from + time.mul_f64(done_bytes as f64 / bytes as f64);
            pieces.push((due, piece));
        }
        pieces
    }
}

/// When a batch leaves under both of the ceilings that it is under.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Due {
    /// Its machine's.
    pub machine: Release,
    /// The link's, while which nobody else may send either.
    pub link: Release,
}

impl Due {
    /// All of it is due now.
    pub fn at_once(now: Instant) -> Self {
        Self { machine: Release::at_once(now), link: Release::at_once(now) }
    }

    /// The one that lasts longer.
    pub(crate) fn longer(self) -> Release {
        if self.link.to > self.machine.to { self.link } else { self.machine }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use bytes::Bytes;

    use super::{Due, Release};

    /// A batch left in one burst and was followed by silence: a second, at a low rate.
    #[test]
    fn a_batch_leaves_evenly_and_whole() {
        let content: Vec<u8> = (0..300_000_u32).map(|at| (at % 251) as u8).collect();
        let content = Bytes::from(content);
        let chunks =
            vec![content.slice(..128), content.slice(128..200_000), content.slice(200_000..)];
        let from = Instant::now();
        let time = Duration::from_millis(600);
        let pieces = Release::over(from, time).pieces(chunks);
        let mut sent = Vec::new();
        for (due, piece) in &pieces {
            let share = (*due - from).as_secs_f64() / time.as_secs_f64();
            assert!((sent.len() as f64 / 300_000.0 - share).abs() < 1e-6, "{share}");
            piece.iter().for_each(|part| sent.extend_from_slice(part));
        }
        assert_eq!(sent, content);
        assert_eq!(pieces.len(), 18, "each of 16 KiB at least");
    }

    #[test]
    fn what_takes_no_time_stays_whole_and_nothing_takes_for_ever() {
        let now = Instant::now();
        let chunks = vec![Bytes::from(vec![1; 128]), Bytes::from(vec![2; 1 << 20])];
        for release in [Release::at_once(now), Release::over(now, Duration::from_millis(9))] {
            assert_eq!(release.pieces(chunks.clone()), [(now, chunks.clone())]);
        }
        assert_eq!(Release::at_once(now).pieces(Vec::new()), [(now, Vec::new())]);
        // 8 kbit/s.
        let slow = Release::over(now, Duration::from_secs(1048));
        assert!(
            Due { machine: slow, link: Release::at_once(now) }
                .longer()
                .pieces(chunks)
                .last()
                .unwrap()
                .0
                < now + Duration::from_secs(5)
        );
    }
}
