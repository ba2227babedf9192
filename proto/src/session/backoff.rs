//! How long to wait before the next attempt to connect.

use std::time::Duration;

/// Exponential backoff with jitter and without an end: a link that comes back after a week is used.
#[derive(Debug, Clone)]
pub struct Backoff {
    attempts: u32,
    seed: u64,
}

impl Backoff {
    /// First wait, before jitter.
    pub const FIRST: Duration = Duration::from_millis(200);
    /// Longest wait, before jitter: a link that is up again is used within two seconds.
    pub const LONGEST: Duration = Duration::from_secs(1);

    /// A backoff whose jitter comes from `seed`, so that many agents do not return in step.
    pub fn new(seed: u64) -> Self {
        Self { attempts: 0, seed }
    }

    /// Attempts since the last success.
    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    /// The last attempt succeeded: the next failure waits [`Backoff::FIRST`] again.
    pub fn handle_success(&mut self) {
        self.attempts = 0;
    }

    /// The last attempt failed: how long to wait, between a half and the whole of the step.
    pub fn handle_failure(&mut self) -> Duration {
        let step = Self::FIRST.saturating_mul(1 << self.attempts.min(10)).min(Self::LONGEST);
        self.attempts = self.attempts.saturating_add(1);
        // xorshift64*: spreading waits needs no better generator than this.
        self.seed |= 1;
        self.seed ^= self.seed >> 12;
        self.seed ^= self.seed << 25;
        self.seed ^= self.seed >> 27;
        let share =
            (self.seed.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40) as f64 / (1u64 << 24) as f64;
        step.mul_f64(0.5 + share / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::Backoff;

    #[test]
    fn grows_to_its_bound_and_starts_again_after_success() {
        let mut backoff = Backoff::new(7);
        let waits: Vec<_> = (0..40).map(|_| backoff.handle_failure()).collect();
        assert!(waits[0] >= Backoff::FIRST / 2 && waits[0] <= Backoff::FIRST);
        assert!(waits.iter().all(|wait| *wait <= Backoff::LONGEST));
        assert!(waits[39] >= Backoff::LONGEST / 2);
        assert_ne!(waits[38], waits[39], "jitter");
        backoff.handle_success();
        assert!(backoff.handle_failure() <= Backoff::FIRST);
    }
}
