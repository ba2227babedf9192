//! A ceiling on what is sent, kept by counting: a token bucket.

use std::time::{Duration, Instant};

use crate::limits::{BATCH_DATA_BYTES_TARGET, LEAF_BYTES};
use crate::session::Release;

/// What may be saved up while nothing is sent. Less would make timers the limit, more would let a
/// pause be followed by a burst that a policer drops.
const BURST: Duration = Duration::from_millis(20);

/// What is made good when batches waited and were sent late, as by a busy host: that is no pause.
const LATE_MAX: Duration = Duration::from_millis(200);

/// What a batch may take at the ceiling: over TCP, where a machine's batches leave whole, ten seconds are
/// off by one at most, and what the transport holds for it is given to nobody else.
const BATCH_TIME: Duration = Duration::from_millis(100);

/// Longest that a new ceiling lets a machine wait for what was under way before it: at 1 Mbit/s, 48 MB would
/// be more than six minutes, in which the target falls ever further behind.
const DEBT_TIME_MAX: Duration = Duration::from_secs(20);

/// Releases batches at a rate. What is taken is paid for afterwards: a batch is released whole, to leave
/// evenly over the time that it costs, and the next one waits for the end of that.
#[derive(Debug, Clone)]
pub struct BatchLimit {
    bytes_per_second: Option<u64>,
    /// When everything that was sent is paid for.
    paid_at: Option<Instant>,
    /// Nothing waited to be sent.
    idle: bool,
}

impl BatchLimit {
    /// Without a ceiling.
    pub fn unlimited() -> Self {
        Self { bytes_per_second: None, paid_at: None, idle: true }
    }

    /// Changes the ceiling, from `now` on. Of what was sent before, that is a debt under this one which
    /// is on its way into the link still: `unsent_bytes`, without what was paid for already,
    /// and no more than twenty seconds pay for.
    pub fn set(&mut self, now: Instant, bytes_per_second: Option<u64>, unsent_bytes: u64) {
        let before = std::mem::replace(&mut self.bytes_per_second, bytes_per_second);
        if before == bytes_per_second {
            return;
        }
        let unpaid = self.paid_at.map_or(Duration::ZERO, |at| at.saturating_duration_since(now));
        let unpaid_bytes = before.map_or(f64::MAX, |rate| unpaid.as_secs_f64() * rate as f64);
        let debt_bytes = unpaid_bytes.min(unsent_bytes as f64);
        self.paid_at = bytes_per_second
            .filter(|_| debt_bytes > 0.0)
            .map(|rate| Duration::from_secs_f64(debt_bytes / rate.max(1) as f64))
            .map(|time| now + time.min(DEBT_TIME_MAX));
    }

    /// What is owed counts no more: it was lost with its link, and is paid for when it is sent again; or
    /// somebody waits for what comes after it.
    pub fn forgive_debt(&mut self) {
        self.paid_at = None;
    }

    /// The ceiling.
    pub fn bytes_per_second(&self) -> Option<u64> {
        self.bytes_per_second
    }

    /// Most bytes of data that a batch is to have under this ceiling: a whole number of leaves, so that
    /// content is found again in it, and no more than a batch ever has.
    pub fn batch_bytes_max(&self) -> u32 {
        let Some(rate) = self.bytes_per_second else { return BATCH_DATA_BYTES_TARGET };
        let bytes = (rate as f64 * BATCH_TIME.as_secs_f64()) as u64;
        let leaves = (bytes / u64::from(LEAF_BYTES)).max(1);
        (leaves * u64::from(LEAF_BYTES)).min(BATCH_DATA_BYTES_TARGET.into()) as u32
    }

    /// Whether something may be sent now; if not, when.
    pub fn poll_ready(&self, now: Instant) -> Result<(), Instant> {
        match self.paid_at {
            Some(at) if at > now => Err(at),
            _ => Ok(()),
        }
    }

    /// Nothing waits to be sent.
    pub fn handle_idle(&mut self) {
        self.idle = true;
    }

    /// Whether nothing waits to be sent, or this ceiling holds it back.
    pub fn is_still(&self, now: Instant) -> bool {
        self.idle || self.poll_ready(now).is_err()
    }

    /// So many bytes are sent, when the answer says.
    pub fn handle_sent(&mut self, now: Instant, bytes: u64) -> Release {
        let was_idle = std::mem::take(&mut self.idle);
        let Some(rate) = self.bytes_per_second else { return Release::at_once(now) };
        let saved = if was_idle { BURST } else { LATE_MAX };
        let from = self.paid_at.unwrap_or(now).max(now.checked_sub(saved).unwrap_or(now));
        let cost = Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
        self.paid_at = Some(from + cost);
        Release::over(from, cost)
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use bytes::Bytes;

    use super::{BatchLimit, DEBT_TIME_MAX};

    const MBIT: u64 = 125_000;

    /// Bins of [`send`]'s answer in a second.
    const BINS: usize = 10;

    /// Sends batches of these sizes as soon as it may, for so long, noticing so late that it may;
    /// returns the bytes that leave in each tenth of a second.
    fn send(
        limit: &mut BatchLimit,
        start: Instant,
        time: Duration,
        late: Duration,
        mut batch_bytes: impl FnMut() -> usize,
    ) -> Vec<u64> {
        let zeroes = Bytes::from(vec![0; 1 << 20]);
        let (mut now, mut bins) = (start, Vec::new());
        while now < start + time {
            match limit.poll_ready(now) {
                Ok(()) => {
                    let batch = zeroes.slice(..batch_bytes());
                    let release = limit.handle_sent(now, batch.len() as u64);
                    for (due, piece) in release.pieces(vec![batch]) {
                        let at = due.max(now).duration_since(start).as_secs_f64();
                        let bin = (at * BINS as f64) as usize;
                        bins.resize(bins.len().max(bin + 1), 0);
                        bins[bin] += piece.iter().map(|part| part.len() as u64).sum::<u64>();
                    }
                }
                Err(at) => now = at + late,
            }
        }
        bins
    }

    /// A batch counted when it was given to the transport, whole: at 16 Mbit/s one of 1 MiB more or less
    /// was 5 % of ten seconds.
    #[test]
    fn ten_seconds_are_exact_for_any_batch() {
        for mbit in [2, 10, 16, 200] {
            for batch_bytes in [1_000, 64 << 10, 1 << 20] {
                for late_millis in [0, 30] {
                    let start = Instant::now();
                    let mut limit = BatchLimit::unlimited();
                    limit.set(start, Some(mbit * MBIT), 0);
                    let late = Duration::from_millis(late_millis);
                    let mut turn = 0;
                    let sizes = || {
                        turn += 1;
                        batch_bytes / (1 + turn % 3)
                    };
                    let bins = send(&mut limit, start, Duration::from_secs(24), late, sizes);
                    for from in 10 * BINS..14 * BINS {
                        let bytes: u64 = bins[from..from + 10 * BINS].iter().sum();
                        let share = bytes as f64 / (10 * mbit * MBIT) as f64;
                        assert!(
                            (0.97..1.03).contains(&share),
                            "{mbit} Mbit/s, {batch_bytes}, {late_millis} ms late, from {from}: {share}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_change_counts_at_once_and_a_pause_saves_up_little() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let mut limit = BatchLimit::unlimited();
        limit.set(start, Some(1_000_000), 0);
        send(&mut limit, start, second, Duration::ZERO, || 10_000);
        let later = start + Duration::from_secs(60);
        limit.set(later, Some(10_000_000), 0);
        for later in [later, later + Duration::from_secs(60)] {
            let bytes: u64 =
                send(&mut limit, later, second, Duration::ZERO, || 10_000).iter().sum();
            assert!((10_000_000..10_300_000).contains(&bytes), "{bytes}");
            limit.handle_idle();
        }
        limit.set(later, None, 0);
        assert_eq!(limit.poll_ready(later), Ok(()));
    }

    /// A first ceiling let all of it out, 41 MB, before it held.
    #[test]
    fn what_is_under_way_when_a_first_ceiling_comes_is_a_debt() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let mut limit = BatchLimit::unlimited();
        limit.handle_sent(start, 30_000_000);
        limit.set(start, Some(1_000_000), 20_000_000);
        assert_eq!(limit.poll_ready(start), Err(start + 20 * second));
        let mut low = BatchLimit::unlimited();
        low.set(start, Some(1_000), 20_000_000);
        assert_eq!(low.poll_ready(start), Err(start + DEBT_TIME_MAX));
        // Five seconds on, it is 5 MB less; and of that, some may have left sooner.
        let later = start + 5 * second;
        limit.set(later, Some(3_000_000), 20_000_000);
        assert_eq!(limit.poll_ready(later), Err(later + 5 * second));
        limit.set(later, Some(1_000_000), 6_000_000);
        assert_eq!(limit.poll_ready(later), Err(later + 6 * second));
        let bytes: u64 =
            send(&mut limit, later, 10 * second, Duration::ZERO, || 10_000).iter().sum();
        assert!((3_990_000..4_010_000).contains(&bytes), "{bytes}");
    }

    /// It is sent again, and would be paid for twice.
    #[test]
    fn what_was_lost_with_its_link_is_no_debt() {
        let start = Instant::now();
        let mut limit = BatchLimit::unlimited();
        limit.set(start, Some(1_000_000), 20_000_000);
        limit.forgive_debt();
        assert_eq!(limit.poll_ready(start), Ok(()));
    }

    /// A batch that was sent at 8 kbit/s held the stream up for a quarter of an hour after the ceiling
    /// had been raised.
    #[test]
    fn what_was_sent_under_a_low_ceiling_is_no_debt_under_a_high_one() {
        let start = Instant::now();
        let mut limit = BatchLimit::unlimited();
        limit.set(start, Some(1000), 0);
        limit.handle_sent(start, 1 << 20);
        limit.set(start, Some(1000), 0);
        assert!(limit.poll_ready(start).is_err(), "it is the same ceiling");
        limit.set(start, Some(10_000_000), 0);
        assert_eq!(limit.poll_ready(start), Ok(()));
    }

    /// Over TCP batches go one after the other: one machine's, let out slowly, holds the others up.
    #[test]
    fn a_low_ceiling_makes_small_batches() {
        let most = |mbit: u64| {
            let mut limit = BatchLimit::unlimited();
            limit.set(Instant::now(), (mbit > 0).then_some(mbit * MBIT), 0);
            limit.batch_bytes_max() >> 10
        };
        assert_eq!([0, 1, 2, 8, 20, 30, 200].map(most), [1024, 64, 64, 64, 192, 320, 1024]);
    }
}
