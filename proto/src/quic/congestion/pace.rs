//! Makes good for what quinn's pacer forgets while its task waits for a processor.
//!
//! The pacer keeps two milliseconds of what might have been sent. A sender that runs every five sends two
//! fifths of its window, finds that no more comes out, and takes that for the line's rate: an idle line of
//! 500 Mbit/s and 100 ms stayed at 20 Mbit/s for as long as a guest kept the processors busy.
//!
//! The pacer knows a window only, but asks for it before every packet. While less than the window is in
//! flight it may as well be told a larger one: that raises the pace, and nothing else.

use crate::quic::congestion::round::RoundEnd;

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
    /// A round ended.
    pub(super) fn end_round(&mut self, end: &RoundEnd) {
        self.gain *= match end {
            RoundEnd { app_limited: true, .. } => STEP_IDLE,
            end if end.is_held_back() => STEP_UP,
            _ => STEP_DOWN,
        };
        self.gain = self.gain.clamp(1.0, GAIN_MAX);
    }

    /// Whether a higher pace may show what the path lets out.
    pub(super) fn can_rise(&self) -> bool {
        self.gain < GAIN_MAX
    }

    /// The window that quinn is told: `window_bytes` itself as soon as one call of it might exceed that.
    pub(super) fn window(&self, window_bytes: f64, in_flight_bytes: f64, mtu_bytes: f64) -> f64 {
        let has_room = in_flight_bytes + CALL_PACKETS * mtu_bytes < window_bytes;
        if has_room { window_bytes * self.gain } else { window_bytes }
    }

    #[cfg(test)]
    pub(super) fn gain(&self) -> f64 {
        self.gain
    }
}

/// What `in_flight_bytes` fill of a window, as a share. A packet that does not fit any more is not missing.
pub(super) fn filled(in_flight_bytes: f64, window_bytes: f64, mtu_bytes: f64) -> f64 {
    (in_flight_bytes + 2.0 * mtu_bytes) / window_bytes
}

/// Of a window that binds, more is in flight at some time of each round.
pub(super) const HELD_BACK: f64 = 0.9;
/// quinn sends up to so many packets before it tells of them (`MAX_TRANSMIT_SEGMENTS`).
const CALL_PACKETS: f64 = 10.0;
const STEP_UP: f64 = 2.0;
const STEP_DOWN: f64 = 0.9;
/// Who has little to send needs no higher pace, and its next burst would leave at it.
const STEP_IDLE: f64 = 0.5;
/// Sixteen milliseconds at a time: who runs more rarely has a rarer problem.
const GAIN_MAX: f64 = 8.0;

#[cfg(test)]
mod tests {
    use super::{GAIN_MAX, HELD_BACK, Pace, filled};
    use crate::quic::congestion::round::{Round, RoundEnd};

    const MTU: f64 = 1400.0;

    fn round(fullest: f64, app_limited: bool) -> RoundEnd {
        RoundEnd { fullest, app_limited, ..Round::new(0).finish(0) }
    }

    #[test]
    fn a_window_that_binds_is_told_as_it_is() {
        let mut pace = Pace::default();
        for _ in 0..5 {
            pace.end_round(&round(1.0, false));
            pace.end_round(&round(0.1, true));
        }
        assert_eq!(pace.window(1e6, 0.0, MTU), 1e6);
    }

    #[test]
    fn who_is_held_back_may_catch_up_but_never_exceeds_the_window() {
        let mut pace = Pace::default();
        for _ in 0..9 {
            pace.end_round(&round(0.4, false));
        }
        assert!(!pace.can_rise());
        assert_eq!(pace.window(1e6, 0.9e6, MTU), GAIN_MAX * 1e6);
        assert_eq!(pace.window(1e6, 1e6 - 9.0 * MTU, MTU), 1e6);
        assert_eq!(pace.window(4.0 * MTU, 0.0, MTU), 4.0 * MTU, "the pacer lets ten out anyway");
        for _ in 0..30 {
            pace.end_round(&round(1.0, false));
        }
        assert_eq!(pace.gain(), 1.0);
    }

    /// Three packets are all that four packets' window lets out, and were taken for three quarters of it.
    #[test]
    fn a_small_window_is_full_with_what_fits() {
        for packets in 4..40 {
            let (window, fits) = (f64::from(packets) * MTU, f64::from(packets - 1) * MTU);
            assert!(filled(fits, window, MTU) >= HELD_BACK, "{packets}");
        }
    }
}
