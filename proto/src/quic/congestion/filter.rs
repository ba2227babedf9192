//! Windowed extremes: the highest bandwidth of two probing cycles, the smallest round-trip time
//! of twenty seconds.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How long a smallest round-trip time counts: routes change (draft-ietf-ccwg-bbr, MinRTTFilterLen).
const MIN_RTT_AGE: Duration = Duration::from_secs(20);
/// Candidates for the next minimum are at least this far apart, which bounds their number.
const CANDIDATE_GAP: Duration = Duration::from_millis(250);

/// The highest delivery rate of this probing cycle and the one before, in bytes a second.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct MaxRate {
    previous: f64,
    current: f64,
}

impl MaxRate {
    pub(super) fn get(&self) -> f64 {
        self.previous.max(self.current)
    }

    pub(super) fn update(&mut self, rate: f64) {
        self.current = self.current.max(rate);
    }

    /// Begins a cycle. A cycle that measured nothing does not push out what is known.
    pub(super) fn advance(&mut self) {
        if self.current > 0.0 {
            *self = Self { previous: self.current, current: 0.0 };
        }
    }

    /// Forgets what was known.
    pub(super) fn set(&mut self, rate: f64) {
        *self = Self { previous: 0.0, current: rate };
    }
}

/// The smallest round-trip time.
#[derive(Debug, Clone, Default)]
pub(super) struct MinRtt {
    /// Rising in both fields; the first is the minimum.
    candidates: VecDeque<(Instant, Duration)>,
    /// When a sample last came close to the minimum.
    confirmed_at: Option<Instant>,
}

impl MinRtt {
    pub(super) fn get(&self) -> Option<Duration> {
        self.candidates.front().map(|(_, rtt)| *rtt)
    }

    pub(super) fn update(&mut self, now: Instant, rtt: Duration) {
        while self.candidates.back().is_some_and(|(_, known)| *known >= rtt) {
            self.candidates.pop_back();
        }
        let near = |at: &Instant| now.saturating_duration_since(*at) < CANDIDATE_GAP;
        if !self.candidates.back().is_some_and(|(at, _)| near(at)) {
            self.candidates.push_back((now, rtt));
        }
        let old = |at: &Instant| now.saturating_duration_since(*at) > MIN_RTT_AGE;
        while self.candidates.len() > 1 && self.candidates.front().is_some_and(|(at, _)| old(at)) {
            self.candidates.pop_front();
        }
        let min = self.get().unwrap_or(rtt);
        if rtt <= min + (min / 16).max(Duration::from_millis(1)) {
            self.confirmed_at = Some(now);
        }
    }

    /// How long no sample has come close to the minimum.
    pub(super) fn unconfirmed_for(&self, now: Instant) -> Duration {
        self.confirmed_at.map_or(Duration::ZERO, |at| now.saturating_duration_since(at))
    }

    /// Puts the next probe off: one has just been, without a result.
    pub(super) fn confirm(&mut self, now: Instant) {
        self.confirmed_at = Some(now);
    }

    /// Replaces what is known: `rtt` was measured with the queue drained.
    pub(super) fn set(&mut self, now: Instant, rtt: Duration) {
        self.candidates.clear();
        self.update(now, rtt);
        self.confirmed_at = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{MIN_RTT_AGE, MaxRate, MinRtt};

    #[test]
    fn a_rate_lives_for_two_cycles() {
        let mut max = MaxRate::default();
        max.update(5.0);
        max.advance();
        max.update(3.0);
        assert_eq!(max.get(), 5.0);
        max.advance();
        assert_eq!(max.get(), 3.0);
        max.advance();
        max.advance();
        assert_eq!(max.get(), 3.0, "cycles without a sample keep it");
    }

    /// Against the plain definition: the minimum of the window.
    #[test]
    fn the_minimum_is_that_of_its_window() {
        let start = Instant::now();
        let mut min = MinRtt::default();
        let mut all = Vec::new();
        let mut state = 7u64;
        for step in 0..4000u32 {
            let now = start + step * Duration::from_millis(13);
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let drift = u64::from(step / 40);
            let rtt = Duration::from_micros(40_000 + drift * 500 + (state >> 40) % 9_000);
            min.update(now, rtt);
            all.push((now, rtt));
            let fresh = all.iter().filter(|(at, _)| now - *at <= MIN_RTT_AGE);
            let expected = fresh.map(|(_, rtt)| *rtt).min().unwrap();
            let found = min.get().unwrap();
            assert!(found >= expected && found < expected + Duration::from_millis(5), "{step}");
        }
        assert!(min.candidates.len() <= 81);
    }
}
