//! Makes good for what quinn's pacer forgets while its task waits for a processor.
//!
//! The pacer keeps two milliseconds of what might have been sent. A sender that runs every five sends two
//! fifths of its window, finds that no more comes out, and takes that for the line's rate: an idle line of
//! 500 Mbit/s and 100 ms stayed at 20 Mbit/s for as long as a guest kept the processors busy.
//!
//! The pacer knows a window only, but asks for it before every packet. While less than the window is in
//! flight it may as well be told a larger one: that raises the pace, and bounds nothing.

/// By how much the window is larger for the pacer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    gain: f64,
}

impl Default for Pace {
    fn default() -> Self {
        Self { gain: 1.0 }
    }
}

impl Pace {
    /// A round ended in which, with always something to send, at most this share of the window was in
    /// flight.
    pub(super) fn end_round(&mut self, fullest: f64) {
        self.gain *= if is_held_back(fullest) { STEP_UP } else { STEP_DOWN };
        self.gain = self.gain.clamp(1.0, GAIN_MAX);
    }

    /// The window that the pacer is told: `window_bytes` itself once that much is in flight.
    pub(super) fn window(&self, window_bytes: f64, in_flight_bytes: f64) -> f64 {
        if in_flight_bytes < window_bytes { window_bytes * self.gain } else { window_bytes }
    }

    #[cfg(test)]
    pub(super) fn gain(&self) -> f64 {
        self.gain
    }
}

/// Whether it was the pacer that kept a round from more, when at most this share of the window was in flight.
pub(super) fn is_held_back(fullest: f64) -> bool {
    fullest < HELD_BACK
}

/// Of a window that binds more is in flight at some time of each round.
const HELD_BACK: f64 = 0.9;
const STEP_UP: f64 = 2.0;
const STEP_DOWN: f64 = 0.9;
/// Sixteen milliseconds at a time: who runs more rarely has a rarer problem.
const GAIN_MAX: f64 = 8.0;

#[cfg(test)]
mod tests {
    use super::{GAIN_MAX, Pace};

    #[test]
    fn a_window_that_binds_is_told_as_it_is() {
        let mut pace = Pace::default();
        for _ in 0..5 {
            pace.end_round(1.0);
        }
        assert_eq!(pace.window(1e6, 0.0), 1e6);
    }

    #[test]
    fn who_is_held_back_may_catch_up_but_never_exceeds_the_window() {
        let mut pace = Pace::default();
        for _ in 0..9 {
            pace.end_round(0.4);
        }
        assert_eq!(pace.window(1e6, 0.9e6), GAIN_MAX * 1e6);
        assert_eq!(pace.window(1e6, 1e6), 1e6);
        for _ in 0..30 {
            pace.end_round(1.0);
        }
        assert_eq!(pace.gain(), 1.0);
    }
}
