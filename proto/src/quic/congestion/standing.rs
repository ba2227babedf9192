//! What comes out while a queue of ours stands.
//!
//! The highest sample of two probing cycles is the rate where acknowledgements come evenly. On a host whose
//! processors are the limit they come in clumps, and a flight that ends with one holds more than the line let out
//! in its time: 6 to 20 % more on an emulated line of 1 Gbit/s, and a queue of as much. Rounds in which the queue
//! never was empty say the rate without that: what came out in all of them, by the time that they took.

use std::time::Instant;

/// The mean rate of the rounds in which the queue was never empty.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Standing {
    /// When the last round ended, what was delivered by then, and whether it stood.
    last: Option<(Instant, u64, bool)>,
    /// Of rounds that stood and came after one that stood.
    stood: Span,
    /// Of the last rounds, whatever they were.
    any: Span,
}

/// Some rounds.
#[derive(Debug, Clone, Copy, Default)]
struct Span {
    rounds: f64,
    seconds: f64,
    bytes: f64,
}

impl Span {
    fn add(&mut self, seconds: f64, bytes: f64) {
        self.rounds += 1.0;
        self.seconds += seconds;
        self.bytes += bytes;
    }

    /// Bytes a second, once they took so long that a clump at either end is little.
    fn rate(&self) -> Option<f64> {
        (self.rounds >= ROUNDS && self.seconds >= SECONDS).then(|| self.bytes / self.seconds)
    }
}

impl Standing {
    /// A round tells nothing: too little came out, or there was a pause in it.
    pub(super) fn skip_round(&mut self) {
        (self.last, self.any) = (None, Span::default());
    }

    /// A round ended, all of which had a queue of ours, or not.
    pub(super) fn end_round(&mut self, now: Instant, delivered_bytes: u64, stood: bool) {
        let last = self.last.replace((now, delivered_bytes, stood));
        let Some((before, delivered_before, stood_before)) = last else { return };
        let seconds = now.saturating_duration_since(before).as_secs_f64();
        let bytes = delivered_bytes.saturating_sub(delivered_before) as f64;
        if stood && stood_before {
            self.stood.add(seconds, bytes);
        }
        self.any.add(seconds, bytes);
        let Some(any) = self.any.rate() else { return };
        // The line has become faster.
        if self.stood.rate().is_some_and(|stood| any > stood * FASTER) {
            self.stood = Span::default();
        }
        self.any = Span::default();
    }

    /// Begins a probing cycle: what is old counts less.
    pub(super) fn advance(&mut self) {
        let Span { rounds, seconds, bytes } = self.stood;
        self.stood = Span { rounds: rounds / 2.0, seconds: seconds / 2.0, bytes: bytes / 2.0 };
    }

    /// The path lets out something else by now.
    pub(super) fn forget(&mut self) {
        *self = Self::default();
    }

    /// Lowers `rate`, the highest that was sampled, to what came out while a queue stood.
    pub(super) fn lower(&self, rate: f64) -> f64 {
        self.stood.rate().map_or(rate, |stood| stood.clamp(rate * LEAST, rate))
    }
}

/// Fewer rounds, and less time, say more about clumps than about the line.
const ROUNDS: f64 = 4.0;
const SECONDS: f64 = 0.2;
/// More came out of so many rounds than while a queue stood.
const FASTER: f64 = 1.03;
/// A line that has become slower than this is another matter, and so is somebody who takes a part of it.
const LEAST: f64 = 0.8;

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::Standing;

    /// Rounds of 50 ms that stand, or not, on a line of `rate` bytes a second.
    struct Line(Standing, Instant, f64);

    impl Line {
        fn rounds(&mut self, count: usize, rate: f64, stood: bool) {
            for _ in 0..count {
                self.1 += Duration::from_millis(50);
                self.2 += rate * 0.05;
                self.0.end_round(self.1, self.2 as u64, stood);
            }
        }
    }

    fn line() -> Line {
        Line(Standing::default(), Instant::now(), 0.0)
    }

    #[test]
    fn a_line_says_its_rate_while_its_queue_stands() {
        let mut line = line();
        line.rounds(4, 100e6, true);
        assert_eq!(line.0.lower(115e6), 115e6, "the first round only begins, three are too few");
        line.rounds(1, 100e6, true);
        let lowered = line.0.lower(115e6);
        assert!((lowered / 100e6 - 1.0).abs() < 1e-6, "{lowered}");
        // Where the queue ran empty it is the sender that was slow.
        line.rounds(40, 60e6, false);
        line.0.advance();
        line.rounds(6, 100e6, true);
        let lowered = line.0.lower(115e6);
        assert!((lowered / 100e6 - 1.0).abs() < 1e-6, "{lowered}");
        assert_eq!(line.0.lower(90e6), 90e6);
    }

    #[test]
    fn clumps_even_out_over_rounds() {
        let mut line = line();
        for rate in [106e6, 106e6, 88e6].into_iter().cycle().take(60) {
            line.rounds(1, rate, true);
        }
        let lowered = line.0.lower(115e6);
        assert!((lowered / 100e6 - 1.0).abs() < 0.01, "{lowered}");
    }

    /// The last round before a pause stood, and so did the first after it: a burst, acknowledged at once.
    #[test]
    fn a_pause_is_no_slow_line() {
        let mut line = line();
        line.rounds(20, 100e6, true);
        for _ in 0..20 {
            line.1 += Duration::from_secs(3);
            line.0.skip_round();
            line.rounds(1, 100e6, true);
        }
        let lowered = line.0.lower(115e6);
        assert!((lowered / 100e6 - 1.0).abs() < 1e-6, "{lowered}");
    }

    #[test]
    fn a_line_that_became_faster_is_not_held_back() {
        let mut line = line();
        line.rounds(20, 100e6, true);
        line.rounds(8, 104e6, false);
        assert_eq!(line.0.lower(115e6), 115e6);
    }

    /// Somebody who comes takes a part of what comes out: that is no slower line.
    #[test]
    fn it_lowers_by_a_fifth_at_most() {
        let mut line = line();
        line.rounds(20, 30e6, true);
        assert_eq!(line.0.lower(100e6), 80e6);
        line.0.forget();
        assert_eq!(line.0.lower(100e6), 100e6);
    }
}
