//! A line whose rate is bought and known.

use std::time::{Duration, Instant};

/// Until the first acknowledgement, the round-trip time of a continent.
const RTT_ASSUMED: Duration = Duration::from_millis(100);
/// A little more than the bandwidth-delay product: acknowledgements come in clumps.
const MARGIN: f64 = 1.05;
/// On top of that, in packets: they are acknowledged in pairs, and quinn's comparison with the window is
/// strict. On a slow, short line a margin of 5 % is less than one packet.
const SPARE_PACKETS: u64 = 2;
const WINDOW_PACKETS_MIN: u64 = 4;
/// When every round trip has been longer for this long than a full window makes it, the route may have
/// changed. The smallest one of such a time would be no answer: it has the queue that the window makes, and
/// the window would grow by that, again and again. So the queue is drained first.
const DOUBT: Duration = Duration::from_secs(20);
/// What a round trip may be longer by, as a part of the smallest and at least.
const NEAR: f64 = 1.0 / 16.0;
const NEAR_MIN: Duration = Duration::from_millis(1);

/// The window is rate × smallest round-trip time and a little, whatever gets lost.
#[derive(Debug, Clone)]
pub(super) struct Fixed {
    bytes_per_second: u64,
    mtu_bytes: u64,
    min_rtt: Option<Duration>,
    /// When a round trip last was as short as the smallest one lets expect.
    confirmed_at: Option<Instant>,
    look: Option<Look>,
}

/// A look at the path, with next to nothing under way.
#[derive(Debug, Clone, Copy)]
struct Look {
    /// What is sent from then on finds no queue of ours.
    drained_at: Instant,
    /// The smallest round trip since it began.
    min_rtt: Duration,
}

impl Fixed {
    pub(super) fn new(bytes_per_second: u64, mtu: u16) -> Self {
        Self {
            bytes_per_second,
            mtu_bytes: mtu.into(),
            min_rtt: None,
            confirmed_at: None,
            look: None,
        }
    }

    pub(super) fn bytes_per_second(&self) -> u64 {
        self.bytes_per_second
    }

    pub(super) fn min_rtt(&self) -> Option<Duration> {
        self.min_rtt
    }

    /// `limited`: there was less to send than the window has room for. Packets that come alone are
    /// acknowledged late, and say nothing of the route.
    pub(super) fn on_ack(&mut self, now: Instant, sent: Instant, limited: bool) {
        let sample = now.saturating_duration_since(sent);
        self.min_rtt = Some(self.min_rtt.map_or(sample, |known| known.min(sample)));
        if let Some(look) = &mut self.look {
            look.min_rtt = look.min_rtt.min(sample);
            // The packet that began it may have been under way through a dark of seconds.
            look.drained_at = look.drained_at.min(now + sample);
            if sent >= look.drained_at {
                (self.min_rtt, self.confirmed_at) = (Some(look.min_rtt), Some(now));
                self.look = None;
            }
            return;
        }
        let confirmed_at = *self.confirmed_at.get_or_insert(now);
        if sample <= self.expected_rtt() {
            self.confirmed_at = Some(now);
        } else if !limited && now.saturating_duration_since(confirmed_at) > DOUBT {
            self.look = Some(Look { drained_at: now + sample, min_rtt: sample });
        }
    }

    /// The longest round trip that the window makes by itself.
    fn expected_rtt(&self) -> Duration {
        let full = self.window() as f64 / self.bytes_per_second.max(1) as f64;
        let near = self.min_rtt.unwrap_or(RTT_ASSUMED).mul_f64(NEAR).max(NEAR_MIN);
        Duration::from_secs_f64(full) + near
    }

    pub(super) fn on_mtu(&mut self, mtu: u16) {
        self.mtu_bytes = mtu.into();
    }

    pub(super) fn window(&self) -> u64 {
        if self.look.is_some() {
            return WINDOW_PACKETS_MIN * self.mtu_bytes;
        }
        let rtt = self.min_rtt.unwrap_or(RTT_ASSUMED);
        let bdp = self.bytes_per_second as f64 * rtt.as_secs_f64() * MARGIN;
        let spare_bytes = SPARE_PACKETS * self.mtu_bytes;
        (bdp as u64 + spare_bytes).max(WINDOW_PACKETS_MIN * self.mtu_bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::Fixed;

    #[test]
    fn the_window_is_rate_times_the_smallest_round_trip() {
        let mut fixed = Fixed::new(10_000_000, 1400);
        let sent = Instant::now();
        for millis in [80, 50, 90] {
            fixed.on_ack(sent + Duration::from_millis(millis), sent, false);
        }
        assert_eq!(fixed.window(), 525_000 + 2 * 1400);
        assert_eq!(Fixed::new(1, 1400).window(), 4 * 1400);
    }

    /// Heartbeats, each acknowledged when the peer's patience ends, would be taken for a longer route.
    #[test]
    fn an_idle_connection_learns_no_longer_route() {
        let mut fixed = Fixed::new(10_000_000, 1400);
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        fixed.on_ack(start + Duration::from_millis(50), start, false);
        let window = fixed.window();
        for beat in 1..100 {
            let sent = start + beat * second;
            fixed.on_ack(sent + Duration::from_millis(75), sent, true);
        }
        assert_eq!(fixed.window(), window);
        let sent = start + 100 * second;
        fixed.on_ack(sent + Duration::from_millis(75), sent, false);
        assert_eq!(fixed.window(), 4 * 1400, "it is looked at as soon as there is much to send");
    }
}
