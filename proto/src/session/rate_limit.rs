//! A ceiling on what is sent, kept by counting: a token bucket.

use std::time::{Duration, Instant};

/// What may be saved up while nothing is sent. Less would make timers the limit, more would let a
/// pause be followed by a burst that a policer drops.
const BURST: Duration = Duration::from_millis(20);

/// Releases batches at a rate. What is taken is paid for afterwards, so a batch of any size goes
/// out whole and the next one waits for it: over a time long enough for several batches the rate is
/// exact.
#[derive(Debug, Clone)]
pub struct RateLimit {
    bytes_per_second: Option<u64>,
    /// When everything that was sent is paid for.
    paid_at: Option<Instant>,
}

impl RateLimit {
    /// Without a ceiling.
    pub fn unlimited() -> Self {
        Self { bytes_per_second: None, paid_at: None }
    }

    /// Changes the ceiling from `now` on; what is owed at the old rate stays owed.
    pub fn set(&mut self, bytes_per_second: Option<u64>) {
        self.bytes_per_second = bytes_per_second;
        if bytes_per_second.is_none() {
            self.paid_at = None;
        }
    }

    /// The ceiling.
    pub fn bytes_per_second(&self) -> Option<u64> {
        self.bytes_per_second
    }

    /// Whether something may be sent now; if not, when.
    pub fn poll_ready(&self, now: Instant) -> Result<(), Instant> {
        match self.paid_at {
            Some(at) if at > now => Err(at),
            _ => Ok(()),
        }
    }

    /// So many bytes were sent.
    pub fn handle_sent(&mut self, now: Instant, bytes: u64) {
        let Some(rate) = self.bytes_per_second else { return };
        let from = self.paid_at.unwrap_or(now).max(now.checked_sub(BURST).unwrap_or(now));
        let cost = Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
        self.paid_at = Some(from + cost);
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::RateLimit;

    /// Sends batches of these sizes as soon as it may, for so long; returns the bytes.
    fn send(limit: &mut RateLimit, start: Instant, time: Duration, batch_bytes: u64) -> u64 {
        let (mut now, mut sent) = (start, 0);
        while now < start + time {
            match limit.poll_ready(now) {
                Ok(()) => {
                    limit.handle_sent(now, batch_bytes);
                    sent += batch_bytes;
                }
                Err(at) => now = at,
            }
        }
        sent
    }

    #[test]
    fn ten_seconds_are_exact_for_any_batch() {
        for batch_bytes in [1_000, 64 << 10, 1 << 20] {
            let start = Instant::now();
            let mut limit = RateLimit::unlimited();
            limit.set(Some(6_250_000));
            let sent = send(&mut limit, start, Duration::from_secs(10), batch_bytes);
            let share = sent as f64 / 62_500_000.0;
            assert!((0.97..1.03).contains(&share), "{batch_bytes}: {share}");
        }
    }

    #[test]
    fn a_change_counts_at_once_and_a_pause_saves_up_little() {
        let start = Instant::now();
        let mut limit = RateLimit::unlimited();
        limit.set(Some(1_000_000));
        send(&mut limit, start, Duration::from_secs(1), 10_000);
        let later = start + Duration::from_secs(60);
        limit.set(Some(10_000_000));
        let sent = send(&mut limit, later, Duration::from_secs(1), 10_000);
        assert!((10_000_000..10_300_000).contains(&sent), "{sent}");
        limit.set(None);
        assert_eq!(limit.poll_ready(later), Ok(()));
    }
}
