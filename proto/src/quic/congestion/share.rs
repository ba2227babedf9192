//! How much of a shared bottleneck is ours, told from what our own dips do to its queue.
//!
//! All that is in flight at a bottleneck is its rate × the round-trip time. When we take Δw out of
//! flight and the others keep theirs, the round-trip time falls by Δrtt = Δw ÷ rate; so the rate of the
//! whole bottleneck is Δw ÷ Δrtt, whatever the others are, and our share is our own rate ÷ that.
//! (Nimbus, SIGCOMM 2022, looks for the same elasticity with pulses of another kind.)
//!
//! One dip is a rough measure: the others move too. Their packets make the round-trip time fall too
//! little as often as too much, so the mean of several dips is good to about an eighth.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Who has less than this of a bottleneck need not yield. Below one half, so that two of our kind
/// agree, and so that an estimate that is an eighth too low does no harm.
const FAIR: f64 = 0.48;
/// Loss beyond the link's own at which nothing is due to anybody: it falls on a line towards here.
/// Many that share a link find the loss at which what is due to each is what there is for each.
const LOSS_BEARABLE: f64 = 0.12;
/// Weight of the newest dip.
const WEIGHT: f64 = 0.35;
/// Most that one dip's result may raise the window.
const GAIN_MAX: f64 = 2.0;
/// Rounds over which loss is averaged.
const LOSS_ROUNDS: f64 = 24.0;
/// From this share on there is hardly anybody else.
const ALONE: f64 = 0.7;

/// How many connections of one link share what is due to it. All of them look at the same number.
#[derive(Debug, Clone)]
pub(crate) struct Siblings(Arc<AtomicUsize>);

impl Default for Siblings {
    fn default() -> Self {
        Self(Arc::new(AtomicUsize::new(1)))
    }
}

impl Siblings {
    /// So many are in use now.
    pub(crate) fn set(&self, count: usize) {
        self.0.store(count, Ordering::Relaxed);
    }

    pub(super) fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// Estimate of our share, between dips.
#[derive(Debug, Clone, Copy)]
pub(super) struct Share {
    /// What is due to us where nothing is lost.
    fair: f64,
    estimate: Option<f64>,
    /// Loss beyond the link's own, as a share of packets.
    excess: f64,
    /// Window in bytes and round-trip time when the dip began.
    before: Option<(f64, Duration)>,
}

impl Default for Share {
    fn default() -> Self {
        Self { fair: FAIR, estimate: None, excess: 0.0, before: None }
    }
}

impl Share {
    /// So many connections of our link, this one among them, share what is due to one.
    pub(super) fn set_siblings(&mut self, count: usize) {
        self.fair = FAIR / count.max(1) as f64;
    }

    /// Nothing is known of the others any more.
    pub(super) fn forget(&mut self) {
        *self = Self { fair: self.fair, ..Self::default() };
    }

    /// Our part of the bottleneck's rate, 0 to 1, when a dip was measured.
    #[cfg(test)]
    pub(super) fn estimate(&self) -> Option<f64> {
        self.estimate
    }

    /// We have less than is due to us: loss is no reason to yield.
    pub(super) fn is_wronged(&self) -> bool {
        self.estimate.is_some_and(|share| share < self.due())
    }

    /// Whether, as far as is known, nearly all that is in flight is ours.
    pub(super) fn is_alone(&self) -> bool {
        self.estimate.is_some_and(|share| share > ALONE)
    }

    /// A round lost `excess_packets` of `total_packets` beyond what the link loses by chance.
    pub(super) fn add_loss(&mut self, excess_packets: f64, total_packets: f64) {
        let excess = (excess_packets / total_packets.max(1.0)).clamp(0.0, 1.0);
        self.excess += (excess - self.excess) / LOSS_ROUNDS;
    }

    /// The window falls from `window_bytes`; until now packets took `rtt`.
    pub(super) fn begin_dip(&mut self, window_bytes: f64, rtt: Duration) {
        self.before = Some((window_bytes, rtt));
    }

    /// A round with `window_bytes` in flight took `rtt` on average. Returns by how much the window
    /// may grow from where it was: 1 and more.
    pub(super) fn end_dip(&mut self, window_bytes: f64, rtt: Duration) -> f64 {
        let Some((before_bytes, before)) = self.before.take() else { return 1.0 };
        let (before, after) = (before.as_secs_f64(), rtt.as_secs_f64());
        let less = before_bytes - window_bytes;
        if less < before_bytes / 16.0 {
            return 1.0;
        }
        // Not clamped: errors to both sides must cancel in the mean.
        let share = (before_bytes / before) * (before - after) / less;
        let known = self.estimate.unwrap_or(share);
        self.estimate = Some((known + (share - known) * WEIGHT).clamp(0.0, 1.0));
        if self.is_wronged() { self.gain() } else { 1.0 }
    }

    fn gain(&self) -> f64 {
        let share = self.estimate.unwrap_or(1.0).max(0.01);
        (self.due() / share).clamp(1.0, GAIN_MAX)
    }

    fn due(&self) -> f64 {
        self.fair * (1.0 - self.excess / LOSS_BEARABLE).max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{GAIN_MAX, Share};

    /// A link of 1,000 bytes a millisecond with `others` bytes of somebody else in flight.
    fn dip(share: &mut Share, ours: f64, others: f64) -> f64 {
        let rtt = |bytes: f64| Duration::from_secs_f64((bytes + others) / 1e6);
        share.begin_dip(ours, rtt(ours));
        share.end_dip(ours / 2.0, rtt(ours / 2.0))
    }

    #[test]
    fn a_dip_tells_the_share() {
        for (ours, others) in [(20e3, 80e3), (50e3, 50e3), (80e3, 20e3), (90e3, 0.0)] {
            let mut share = Share::default();
            dip(&mut share, ours, others);
            let expected = ours / (ours + others);
            assert!((share.estimate().unwrap() - expected).abs() < 1e-9, "{share:?}");
        }
    }

    #[test]
    fn who_has_little_grows_and_does_not_yield_until_loss_is_high() {
        let mut share = Share::default();
        assert!(!share.is_wronged(), "nothing is due to who knows nothing");
        assert_eq!(dip(&mut share, 10e3, 90e3), GAIN_MAX);
        assert!(share.is_wronged() && !share.is_alone());
        for _ in 0..200 {
            share.add_loss(140.0, 1000.0);
        }
        assert!(!share.is_wronged(), "a link that loses a seventh is full of others");
        assert_eq!(dip(&mut share, 10e3, 90e3), 1.0);
        for _ in 0..20 {
            dip(&mut share, 90e3, 10e3);
        }
        assert!(share.is_alone());
    }

    #[test]
    fn what_is_due_to_a_link_is_due_to_its_connections_together() {
        let mut share = Share::default();
        dip(&mut share, 20e3, 80e3);
        assert!(share.is_wronged());
        share.set_siblings(3);
        assert!(!share.is_wronged(), "a fifth is more than a third of a half");
        share.forget();
        dip(&mut share, 10e3, 90e3);
        assert!(share.is_wronged());
        dip(&mut share, 40e3, 60e3);
        assert!(!share.is_wronged(), "it is still one of three");
    }

    #[test]
    fn a_dip_too_small_to_measure_tells_nothing() {
        let mut share = Share::default();
        share.begin_dip(100e3, Duration::from_millis(50));
        assert_eq!(share.end_dip(99e3, Duration::from_millis(20)), 1.0);
        assert_eq!(share.end_dip(50e3, Duration::from_millis(20)), 1.0, "a dip that never began");
        assert_eq!(share.estimate(), None);
    }
}
