//! A ceiling on the rate, changed while connections run.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const UNLIMITED: u64 = u64::MAX;
/// Time over which a deviation is made good; short enough that ten seconds hold the ceiling, long
/// against a round trip (see [`Ceiling::settle_time`]), or the correction would swing.
const SETTLE: Duration = Duration::from_millis(200);
/// Unused allowance that is kept: what an idle second saved must not come out as a burst.
const SAVED: Duration = Duration::from_millis(50);
/// Packets a round trip that the ceiling never goes below: two, so that the peer acknowledges at
/// once, and one for quinn's strict comparison.
const WINDOW_PACKETS_MIN: u64 = 3;

/// A ceiling shared with every controller that was made with it. Clones are handles to the same
/// ceiling; a change counts from the next packet or acknowledgement on.
#[derive(Debug, Clone)]
pub struct RateLimit(Arc<AtomicU64>);

impl Default for RateLimit {
    fn default() -> Self {
        Self(Arc::new(AtomicU64::new(UNLIMITED)))
    }
}

impl RateLimit {
    /// No more than this many bytes a second on the wire, IP and UDP headers included; `None`
    /// lifts the ceiling. 0 is taken for 1: a ceiling slows a connection down, it does not stop it.
    pub fn set(&self, bytes_per_second: Option<u64>) {
        let value = bytes_per_second.map_or(UNLIMITED, |rate| rate.clamp(1, UNLIMITED - 1));
        self.0.store(value, Ordering::Relaxed);
    }

    /// The ceiling at present, in bytes a second.
    pub fn get(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Relaxed)).filter(|rate| *rate != UNLIMITED)
    }
}

/// Whether a window can keep this ceiling on a path with such a round trip and such packets: with twice
/// the smallest window under way there is room to correct in.
pub(crate) fn keeps_ceiling(bytes_per_second: u64, rtt: Duration, mtu: u16) -> bool {
    let flight_bytes = bytes_per_second as f64 * rtt.as_secs_f64();
    flight_bytes >= (2 * WINDOW_PACKETS_MIN * u64::from(mtu)) as f64
}

/// What a connection may send under a [`RateLimit`], as a window. The window is `rate × RTT`,
/// corrected by a ledger of what was sent against what was allowed.
#[derive(Debug, Clone)]
pub(super) struct Ceiling {
    limit: RateLimit,
    mtu_bytes: u64,
    /// IP and UDP headers of a datagram, which the link carries and quinn does not count.
    header_bytes: u64,
    ledger: Option<Ledger>,
}

#[derive(Debug, Clone, Copy)]
struct Ledger {
    bytes_per_second: f64,
    /// Allowed minus sent.
    balance_bytes: f64,
    settled_at: Instant,
    smoothed_rtt: Duration,
}

impl Ceiling {
    pub(super) fn new(limit: RateLimit, mtu_bytes: u64, header_bytes: u64) -> Self {
        Self { limit, mtu_bytes, header_bytes, ledger: None }
    }

    pub(super) fn on_sent(&mut self, now: Instant, bytes: u64) {
        self.settle(now, None);
        if let Some(ledger) = &mut self.ledger {
            let datagrams = bytes.div_ceil(self.mtu_bytes);
            ledger.balance_bytes -= (bytes + datagrams * self.header_bytes) as f64;
        }
    }

    pub(super) fn on_ack(&mut self, now: Instant, smoothed_rtt: Duration) {
        self.settle(now, Some(smoothed_rtt));
    }

    pub(super) fn on_mtu(&mut self, mtu_bytes: u64) {
        self.mtu_bytes = mtu_bytes;
    }

    /// `window`, lowered to what the ceiling allows.
    pub(super) fn lower(&self, window_bytes: u64) -> u64 {
        let Some(ledger) = self.ledger.filter(|_| self.limit.get().is_some()) else {
            return window_bytes;
        };
        let settle = Self::settle_time(ledger.smoothed_rtt).as_secs_f64();
        let owed = ledger.balance_bytes / (ledger.bytes_per_second * settle);
        // quinn does not count the headers that the ceiling includes.
        let payload = self.mtu_bytes as f64 / (self.mtu_bytes + self.header_bytes) as f64;
        let flight = ledger.bytes_per_second * payload * ledger.smoothed_rtt.as_secs_f64();
        let allowed = flight * (1.0 + owed.clamp(-0.5, 0.5)) + self.mtu_bytes as f64;
        window_bytes.min((allowed as u64).max(WINDOW_PACKETS_MIN * self.mtu_bytes))
    }

    fn settle_time(smoothed_rtt: Duration) -> Duration {
        SETTLE.max(4 * smoothed_rtt)
    }

    fn settle(&mut self, now: Instant, smoothed_rtt: Option<Duration>) {
        let Some(limit) = self.limit.get() else {
            self.ledger = None;
            return;
        };
        let rate = limit as f64;
        let ledger = self.ledger.get_or_insert(Ledger {
            bytes_per_second: rate,
            balance_bytes: 0.0,
            settled_at: now,
            smoothed_rtt: Duration::from_millis(100),
        });
        if ledger.bytes_per_second != rate {
            // What was sent under another ceiling is no debt under this one.
            (ledger.bytes_per_second, ledger.balance_bytes) = (rate, 0.0);
        }
        if let Some(smoothed_rtt) = smoothed_rtt {
            ledger.smoothed_rtt = smoothed_rtt;
        }
        let elapsed = now.saturating_duration_since(ledger.settled_at).as_secs_f64();
        ledger.settled_at = ledger.settled_at.max(now);
        let floor = -rate * Self::settle_time(ledger.smoothed_rtt).as_secs_f64();
        let top = rate * SAVED.max(ledger.smoothed_rtt / 2).as_secs_f64();
        ledger.balance_bytes = (ledger.balance_bytes + rate * elapsed).clamp(floor, top);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::time::{Duration, Instant};

    use super::{Ceiling, RateLimit, keeps_ceiling};

    /// The headers of IPv6 are 20 bytes longer, which were sent on top of the ceiling.
    #[test]
    fn the_ceiling_counts_the_headers_of_its_peer() {
        const RATE: u64 = 1_000_000;
        const PACKET_BYTES: u64 = 1200;
        let rtt = Duration::from_millis(40);
        for header_bytes in [28, 48] {
            let limit = RateLimit::default();
            limit.set(Some(RATE));
            let mut ceiling = Ceiling::new(limit, PACKET_BYTES, header_bytes);
            let start = Instant::now();
            let (mut under_way, mut packets) = (VecDeque::new(), 0);
            for millis in 0..12_000 {
                let now = start + Duration::from_millis(millis);
                while under_way.pop_front_if(|sent| *sent + rtt <= now).is_some() {
                    ceiling.on_ack(now, rtt);
                }
                let window_bytes = ceiling.lower(50_000);
                while (under_way.len() as u64 + 1) * PACKET_BYTES < window_bytes {
                    under_way.push_back(now);
                    ceiling.on_sent(now, PACKET_BYTES);
                    packets += u64::from(millis >= 2_000);
                }
            }
            let share = (packets * (PACKET_BYTES + header_bytes)) as f64 / (10 * RATE) as f64;
            assert!((share - 1.0).abs() < 0.005, "with headers of {header_bytes}: {share}");
        }
    }

    /// Within a LAN three packets a round trip are more than a low ceiling allows, and nothing else
    /// would hold it.
    #[test]
    fn a_window_keeps_no_low_ceiling_over_a_short_path() {
        const MBIT: u64 = 125_000;
        for (mbit, rtt_micros, keeps) in
            [(8, 20_000, true), (8, 1_000, false), (500, 1_000, true), (500, 50, false)]
        {
            let rtt = Duration::from_micros(rtt_micros);
            assert_eq!(keeps_ceiling(mbit * MBIT, rtt, 1392), keeps, "{mbit} {rtt_micros}");
        }
    }
}
