//! Beside somebody who yields, yield as they do.
//!
//! A model that keeps its rate while another's queue grows wins against Cubic as often as it
//! loses, whoever came first. So on a shared path the window follows Cubic's own law (RFC 9438),
//! with one difference: only congestion cuts it, chance does not. Two that obey one law share
//! evenly.

use std::time::{Duration, Instant};

/// RFC 9438, section 5.
const C: f64 = 0.4;
const BETA: f64 = 0.7;
/// A congested round this soon after a cut tells of the same full queue.
const SAME_ROUNDS: u32 = 2;

/// The window Cubic would have here, in packets.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rival {
    window: f64,
    w_max: f64,
    reno: f64,
    epoch: Instant,
    rounds_since_cut: u32,
}

impl Rival {
    pub(super) fn new(now: Instant, window_packets: f64) -> Self {
        Self {
            window: window_packets,
            w_max: window_packets,
            reno: window_packets,
            epoch: now,
            rounds_since_cut: u32::MAX,
        }
    }

    pub(super) fn window_packets(&self) -> f64 {
        self.window
    }

    /// Has `gain` times as much in flight from now on, as if it had just been cut to that.
    pub(super) fn raise(&mut self, now: Instant, gain: f64) {
        if gain > 1.0 {
            self.window *= gain;
            self.w_max = self.w_max.max(self.window);
            (self.reno, self.epoch) = (self.window, now);
        }
    }

    /// `packets` were acknowledged while the window was in use.
    pub(super) fn grow(&mut self, now: Instant, packets: f64, smoothed_rtt: Duration) {
        let since = now.saturating_duration_since(self.epoch) + smoothed_rtt;
        let k = (self.w_max * (1.0 - BETA) / C).cbrt();
        let target = C * (since.as_secs_f64() - k).powi(3) + self.w_max;
        let target = target.clamp(self.window, self.window * 1.5);
        self.window += (target - self.window) * packets / self.window;
        self.reno += 3.0 * (1.0 - BETA) / (1.0 + BETA) * packets / self.window;
        self.window = self.window.max(self.reno);
    }

    /// A round ended. Returns whether its congestion is news.
    pub(super) fn end_round(&mut self, now: Instant, congested: bool) -> bool {
        self.rounds_since_cut = self.rounds_since_cut.saturating_add(1);
        if !congested || self.rounds_since_cut <= SAME_ROUNDS {
            return false;
        }
        self.rounds_since_cut = 0;
        let before = self.window;
        // Fast convergence: who has less than before leaves room for who came.
        self.w_max = if before < self.w_max { before * (1.0 + BETA) / 2.0 } else { before };
        self.window = before * BETA;
        self.reno = self.window;
        self.epoch = now;
        true
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::Rival;

    #[test]
    fn a_cut_is_grown_back_in_the_time_the_rfc_says() {
        let (start, rtt) = (Instant::now(), Duration::from_millis(100));
        let mut rival = Rival::new(start, 500.0);
        assert!(rival.end_round(start, true));
        assert!(!rival.end_round(start, true), "the same queue is not news");
        assert_eq!(rival.window_packets(), 350.0);
        // K is the cube root of 500 × 0.3 ÷ 0.4: 7.2 s.
        let mut regained = None;
        for round in 1..100u32 {
            let now = start + round * rtt;
            rival.grow(now, rival.window_packets(), rtt);
            if rival.window_packets() >= 499.0 && regained.is_none() {
                regained = Some(f64::from(round) / 10.0);
            }
        }
        assert!((5.5..8.0).contains(&regained.unwrap()), "{regained:?}");
    }
}
