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

/// The window is rate × smallest round-trip time and a little, whatever gets lost.
#[derive(Debug, Clone)]
pub(super) struct Fixed {
    bytes_per_second: u64,
    mtu_bytes: u64,
    min_rtt: Option<Duration>,
}

impl Fixed {
    pub(super) fn new(bytes_per_second: u64, mtu: u16) -> Self {
        Self { bytes_per_second, mtu_bytes: mtu.into(), min_rtt: None }
    }

    pub(super) fn bytes_per_second(&self) -> u64 {
        self.bytes_per_second
    }

    pub(super) fn min_rtt(&self) -> Option<Duration> {
        self.min_rtt
    }

    pub(super) fn on_ack(&mut self, now: Instant, sent: Instant) {
        let sample = now.saturating_duration_since(sent);
        self.min_rtt = Some(self.min_rtt.map_or(sample, |known| known.min(sample)));
    }

    pub(super) fn on_mtu(&mut self, mtu: u16) {
        self.mtu_bytes = mtu.into();
    }

    pub(super) fn window(&self) -> u64 {
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
            fixed.on_ack(sent + Duration::from_millis(millis), sent);
        }
        assert_eq!(fixed.window(), 525_000 + 2 * 1400);
        assert_eq!(Fixed::new(1, 1400).window(), 4 * 1400);
    }
}
