//! Is it chance, or is it us? Loss that a link has anyway is told from loss that a full queue makes.
//!
//! Chance does not care how much is in flight. So the loss of rounds in which no queue was seen is
//! the link's own, its *base*; a round that loses clearly more than that is congested. With a
//! queue in sight 2 % more is enough (the draft's LossThresh), without one it takes 10 %: that is
//! a policer or a very short queue. A drained round that is congested adds what the drain proves to
//! be chance: see `Flow::learn_chance`.

/// Excess that means congestion when the round-trip time has risen.
const EXCESS_QUEUED: f64 = 0.02;
/// Excess that means congestion when it has not.
const EXCESS_UNQUEUED: f64 = 0.10;
/// The base remembers about this many packets: enough to tell 0.5 % from 2 %.
const BASE_PACKETS: f64 = 1_000.0;
/// No base above this is believed to be chance. With the excess it bears a link that loses, or holds
/// back too long, a fifth.
const BASE_MAX: f64 = 0.13;

/// The loss of the link itself.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct LossBase {
    lost: f64,
    total: f64,
}

impl LossBase {
    /// The share of packets that get lost whatever we do.
    pub(super) fn share(&self) -> f64 {
        if self.total < 1.0 { 0.0 } else { (self.lost / self.total.max(100.0)).min(BASE_MAX) }
    }

    /// Adds a round in which no queue was seen, or what is known to be chance of one.
    pub(super) fn add(&mut self, lost_packets: f64, total_packets: f64) {
        self.lost += lost_packets;
        self.total += total_packets;
        if self.total > BASE_PACKETS {
            let keep = BASE_PACKETS / self.total;
            self.lost *= keep;
            self.total *= keep;
        }
    }

    /// Whether a round lost anything that stands out: beside Cubic, which yields to every loss,
    /// with a queue that is full.
    pub(super) fn is_noticed(&self, lost_packets: f64, total_packets: f64) -> bool {
        let expected = self.share() * total_packets;
        lost_packets > expected + 2.0 * expected.sqrt() + 0.5
    }

    /// Whether a round lost more than chance explains: beyond the expected loss, the excess, and
    /// three standard deviations of a coin tossed that often.
    pub(super) fn is_exceeded(&self, lost_packets: f64, total_packets: f64, queued: bool) -> bool {
        let share = self.share();
        let excess = if queued { EXCESS_QUEUED } else { EXCESS_UNQUEUED };
        let expected = share * total_packets;
        let scatter = 3.0 * (expected * (1.0 - share)).max(1.0).sqrt();
        lost_packets > expected + excess * total_packets + scatter
    }
}

#[cfg(test)]
mod tests {
    use super::LossBase;

    #[test]
    fn two_percent_of_chance_is_not_congestion_and_ten_more_are() {
        let mut base = LossBase::default();
        assert!(!base.is_exceeded(4.0, 100.0, true), "four of a hundred may be chance");
        for _ in 0..50 {
            base.add(2.0, 100.0);
        }
        assert!((base.share() - 0.02).abs() < 0.002);
        assert!(!base.is_exceeded(6.0, 100.0, true));
        assert!(!base.is_exceeded(35.0, 1000.0, true));
        assert!(base.is_exceeded(60.0, 1000.0, true));
        assert!(!base.is_exceeded(60.0, 1000.0, false));
        assert!(base.is_exceeded(150.0, 1000.0, false));
    }

    #[test]
    fn a_base_forgets() {
        let mut base = LossBase::default();
        base.add(100.0, 1000.0);
        for _ in 0..50 {
            base.add(0.0, 100.0);
        }
        assert!(base.share() < 0.002);
    }
}
