//! Whether TCP is still the right one within a LAN. Pure.

use crate::tcp::kernel::Info;

/// Fewer segments than this do not tell a lossy path from a burst that overflowed a switch: that
/// costs TCP as many as fit into its window, once in a while.
const SEGMENTS_MIN: u64 = 10_000;

/// What may be sent again of those. With more, QUIC, which random loss does not slow down, is the better
/// one: TCP's Cubic comes to some 200 Mbit/s over a round trip of 1 ms at this loss.
const LOST_MAX: f64 = 0.005;

/// Timeouts in a row, each twice as long as the one before: six seconds in which nothing of what was
/// sent arrived. A peer whose window is closed answers, and is not mistaken for this.
const TIMEOUTS_MAX: u8 = 5;

/// Judges a connection by what the kernel says of it, now and then.
#[derive(Debug, Default)]
pub(super) struct Fitness {
    /// Where the segments begin that are not judged yet.
    since: Info,
}

impl Fitness {
    /// Takes the kernel's word; returns why TCP is to be left, if it is.
    pub(super) fn handle_info(&mut self, info: Info) -> Option<String> {
        if info.timeouts >= TIMEOUTS_MAX {
            return Some("TCP got nothing through for seconds: QUIC is used instead".into());
        }
        let sent = info.sent_segments.saturating_sub(self.since.sent_segments);
        let lost = info.repeated_segments.saturating_sub(self.since.repeated_segments);
        if sent < SEGMENTS_MIN {
            return None;
        }
        self.since = info;
        let share = lost as f64 / sent as f64;
        (share > LOST_MAX).then(|| {
            format!("TCP lost {:.1} % of its segments: QUIC is used instead", share * 100.0)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Fitness;
    use crate::tcp::kernel::Info;

    fn info(sent_segments: u64, repeated_segments: u64) -> Info {
        Info { sent_segments, repeated_segments, ..Info::default() }
    }

    /// Judged every few seconds for themselves, the few segments that a bad path lets through never
    /// were enough to be judged at all.
    #[test]
    fn a_slow_path_is_judged_too_when_enough_has_been_sent() {
        let mut fitness = Fitness::default();
        for step in 1..10 {
            assert_eq!(fitness.handle_info(info(step * 1000, step * 300)), None);
        }
        let why = fitness.handle_info(info(10_000, 3000)).unwrap();
        assert!(why.contains("lost 30.0 %"), "{why}");
    }

    #[test]
    fn what_a_full_queue_costs_is_no_reason() {
        let mut fitness = Fitness::default();
        assert_eq!(fitness.handle_info(info(10_000, 40)), None);
        assert_eq!(fitness.handle_info(info(20_000, 80)), None);
        assert!(fitness.handle_info(info(30_000, 140)).is_some(), "of the last 10,000");
    }

    /// A switch passed smaller frames than both hosts sent: the handshake went through, heartbeats too,
    /// and the sync stood still for good.
    #[test]
    fn a_connection_that_stands_still_is_left_however_little_it_sent() {
        let mut fitness = Fitness::default();
        let stuck = |timeouts| Info { timeouts, ..info(25, 8) };
        assert_eq!(fitness.handle_info(stuck(4)), None);
        assert!(fitness.handle_info(stuck(5)).is_some());
    }
}
