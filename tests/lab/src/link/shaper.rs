//! The pure core of one direction of the link: what happens to each packet, and when.
//!
//! A packet waits for the bottleneck (or is dropped when the queue is too long), occupies it for
//! its length at the rate, may then be lost, and arrives after the delay. Every time is computed,
//! not observed: a driver that wakes late delivers late, but the rate does not suffer.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::spec::{DirectionSpec, Probability};
use crate::random::Random;

/// One direction of an emulated line; `P` is whatever holds a packet.
#[derive(Debug)]
pub struct Shaper<P> {
    spec: DirectionSpec,
    random: Random,
    blackout: bool,
    /// When the first packet entered.
    began_at: Option<Instant>,
    /// When the last bit of the last packet leaves the bottleneck; `None` before the first.
    wire_free_at: Option<Instant>,
    /// What integer division left of the last packet's wire time, in bit-nanoseconds a second:
    /// without it, odd rates would drift by up to 1 ns a packet.
    wire_carry: u64,
    /// No packet that keeps its order may arrive before this.
    arrives_after: Option<Instant>,
    in_flight: BinaryHeap<InFlight<P>>,
    accepted_count: u64,
    stats: DirectionStats,
}

/// What became of a packet that entered.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict<P> {
    /// It will come out of [`Shaper::poll_departure`].
    Accepted,
    /// It will not; the holder is given back.
    Dropped {
        /// Why.
        reason: DropReason,
        /// The holder, to be used again.
        packet: P,
    },
}

/// Why a packet was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DropReason {
    /// The line's random loss.
    Loss,
    /// It would have had to wait longer than the queue allows.
    Queue,
    /// The line is cut.
    Blackout,
    /// It is larger than the black hole lets through.
    Size,
    /// [`PACKETS_IN_FLIGHT_MAX`] was reached: the instrument's own limit, not the line's.
    Limit,
}

/// A packet that arrives at the far end.
#[derive(Debug, PartialEq, Eq)]
pub struct Departure<P> {
    /// The packet.
    pub packet: P,
    /// How often it arrives: 2 for a duplicated one.
    pub copies: u8,
}

/// Counters since the link was made. Bytes are of whole IP packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DirectionStats {
    /// Packets that came to the line, dropped ones included.
    pub entered_packets: u64,
    /// Their bytes.
    pub entered_bytes: u64,
    /// Packets that came out, duplicates included.
    pub delivered_packets: u64,
    /// Their bytes.
    pub delivered_bytes: u64,
    /// Packets that came out twice.
    pub duplicated_packets: u64,
    /// Packets that were held back for others to overtake.
    pub reordered_packets: u64,
    /// Packets lost at random.
    pub dropped_by_loss: u64,
    /// Packets that found the queue full.
    pub dropped_by_queue: u64,
    /// Packets that came while the line was cut.
    pub dropped_by_blackout: u64,
    /// Packets above the black hole's size.
    pub dropped_by_size: u64,
    /// Packets dropped because the emulation itself holds too many; a measurement in which this
    /// is not 0 is void.
    pub dropped_by_limit: u64,
    /// Time spent waiting for the bottleneck, summed over the accepted packets.
    pub queue_wait_nanos_total: u64,
    /// The longest of those waits.
    pub queue_wait_nanos_max: u64,
    /// The latest that a packet was handed over after its time: how good the emulation is.
    pub late_nanos_max: u64,
    /// Packets handed over more than 1 ms after their time.
    pub late_packets: u64,
}

impl<P> Shaper<P> {
    /// A line that has carried nothing yet; `seed` decides its random choices.
    pub fn new(spec: DirectionSpec, seed: u64) -> Self {
        Self {
            spec,
            random: Random::new(seed),
            blackout: false,
            began_at: None,
            wire_free_at: None,
            wire_carry: 0,
            arrives_after: None,
            in_flight: BinaryHeap::new(),
            accepted_count: 0,
            stats: DirectionStats::default(),
        }
    }

    /// A packet of `len_bytes` enters at `now`.
    pub fn handle_packet(&mut self, now: Instant, len_bytes: usize, packet: P) -> Verdict<P> {
        self.stats.entered_packets += 1;
        self.stats.entered_bytes += len_bytes as u64;
        let age = now.saturating_duration_since(*self.began_at.get_or_insert(now));
        if self.blackout || self.spec.blackout.is_some_and(|blackout| blackout.is_dark(age)) {
            self.stats.dropped_by_blackout += 1;
            return Verdict::Dropped { reason: DropReason::Blackout, packet };
        }
        if self.spec.blackhole_bytes.is_some_and(|max| len_bytes > usize::from(max)) {
            self.stats.dropped_by_size += 1;
            return Verdict::Dropped { reason: DropReason::Size, packet };
        }
        if self.in_flight.len() >= PACKETS_IN_FLIGHT_MAX {
            self.stats.dropped_by_limit += 1;
            return Verdict::Dropped { reason: DropReason::Limit, packet };
        }
        let Some(left_wire_at) = self.serialise(now, len_bytes) else {
            self.stats.dropped_by_queue += 1;
            return Verdict::Dropped { reason: DropReason::Queue, packet };
        };
        if self.happens(self.spec.loss) {
            self.stats.dropped_by_loss += 1;
            return Verdict::Dropped { reason: DropReason::Loss, packet };
        }
        let arrives_at = self.arrival(left_wire_at);
        let copies = 1 + u8::from(self.happens(self.spec.duplicate));
        self.accepted_count += 1;
        let number = self.accepted_count;
        self.in_flight.push(InFlight { arrives_at, number, len_bytes, copies, packet });
        Verdict::Accepted
    }

    /// The next packet that has arrived by `now`, in order of arrival.
    pub fn poll_departure(&mut self, now: Instant) -> Option<Departure<P>> {
        if self.in_flight.peek()?.arrives_at > now {
            return None;
        }
        let InFlight { arrives_at, len_bytes, copies, packet, .. } = self.in_flight.pop()?;
        let late = now.saturating_duration_since(arrives_at);
        self.stats.late_nanos_max = self.stats.late_nanos_max.max(late.as_nanos() as u64);
        self.stats.late_packets += u64::from(late > LATE);
        self.stats.delivered_packets += u64::from(copies);
        self.stats.delivered_bytes += len_bytes as u64 * u64::from(copies);
        self.stats.duplicated_packets += u64::from(copies > 1);
        Some(Departure { packet, copies })
    }

    /// When [`Shaper::poll_departure`] has something next; `None` while nothing is under way.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.in_flight.peek().map(|next| next.arrives_at)
    }

    /// Changes the line for packets that enter from now on. Those under way keep their times, and
    /// no later packet overtakes them because of a shorter delay.
    pub fn set_spec(&mut self, spec: DirectionSpec) {
        self.spec = spec;
    }

    /// Cuts the line or mends it. What is under way still arrives; what enters is lost.
    pub fn set_blackout(&mut self, blackout: bool) {
        self.blackout = blackout;
    }

    /// Counters since the line was made.
    pub fn stats(&self) -> DirectionStats {
        self.stats
    }

    /// Takes the packet's place on the bottleneck and says when it has left; `None` when the
    /// queue is too long.
    fn serialise(&mut self, now: Instant, len_bytes: usize) -> Option<Instant> {
        let starts_at = self.wire_free_at.map_or(now, |free_at| free_at.max(now));
        let wait = starts_at.duration_since(now);
        if wait > self.spec.queue {
            return None;
        }
        if wait.is_zero() {
            self.wire_carry = 0;
        }
        let rate = self.spec.rate.0.max(1);
        let bit_nanos = len_bytes as u64 * 8 * 1_000_000_000 + self.wire_carry;
        self.wire_carry = bit_nanos % rate;
        let free_at = starts_at + Duration::from_nanos(bit_nanos / rate);
        self.wire_free_at = Some(free_at);
        self.stats.queue_wait_nanos_total += wait.as_nanos() as u64;
        self.stats.queue_wait_nanos_max =
            self.stats.queue_wait_nanos_max.max(wait.as_nanos() as u64);
        Some(free_at)
    }

    fn arrival(&mut self, left_wire_at: Instant) -> Instant {
        let jitter_nanos = self.spec.jitter.as_nanos() as u64;
        let jitter = match jitter_nanos {
            0 => Duration::ZERO,
            nanos => Duration::from_nanos(self.random.below(nanos + 1)),
        };
        let in_order = left_wire_at + self.spec.delay + jitter;
        let in_order = self.arrives_after.map_or(in_order, |after| after.max(in_order));
        if self.happens(self.spec.reorder) {
            self.stats.reordered_packets += 1;
            return in_order + self.spec.reorder_by;
        }
        self.arrives_after = Some(in_order);
        in_order
    }

    fn happens(&mut self, probability: Probability) -> bool {
        self.random.chance(u64::from(probability.parts_per_billion), 1_000_000_000)
    }
}

#[derive(Debug)]
struct InFlight<P> {
    arrives_at: Instant,
    /// Keeps packets of one instant in the order in which they entered.
    number: u64,
    len_bytes: usize,
    copies: u8,
    packet: P,
}

/// Reversed, because [`BinaryHeap`] gives the greatest first.
impl<P> Ord for InFlight<P> {
    fn cmp(&self, other: &Self) -> Ordering {
        (other.arrives_at, other.number).cmp(&(self.arrives_at, self.number))
    }
}

impl<P> PartialOrd for InFlight<P> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<P> PartialEq for InFlight<P> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl<P> Eq for InFlight<P> {}

/// Packets on the line at once, for bounded memory: 1.5 s of 1 Gbit/s in packets of 1420 bytes.
/// Beyond it packets are dropped and counted as [`DirectionStats::dropped_by_limit`].
pub const PACKETS_IN_FLIGHT_MAX: usize = 131_072;

/// A packet handed over later than this counts as late.
const LATE: Duration = Duration::from_millis(1);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::spec::LinkSpec;

    fn shaper(spec: &str) -> Shaper<u64> {
        let spec: LinkSpec = spec.parse().unwrap();
        Shaper::new(spec.up, spec.seed)
    }

    fn micros(micros: u64) -> Duration {
        Duration::from_micros(micros)
    }

    /// Offers a packet of 1000 bytes every `gap` for `count` packets; gives back what arrived.
    fn offer(shaper: &mut Shaper<u64>, gap: Duration, count: u64) -> Vec<(Duration, u64)> {
        let start = Instant::now();
        for number in 0..count {
            shaper.handle_packet(start + gap * number as u32, 1000, number);
        }
        drain(shaper, start)
    }

    fn drain(shaper: &mut Shaper<u64>, start: Instant) -> Vec<(Duration, u64)> {
        let mut arrived = Vec::new();
        while let Some(at) = shaper.poll_timeout() {
            assert_eq!(shaper.poll_departure(at - Duration::from_nanos(1)), None, "too early");
            let departure = shaper.poll_departure(at).unwrap();
            arrived.extend(vec![(at - start, departure.packet); usize::from(departure.copies)]);
        }
        arrived
    }

    #[test]
    fn a_lone_packet_arrives_after_exactly_its_wire_time_and_the_delay() {
        let mut line = shaper("80mbit,40ms");
        assert_eq!(offer(&mut line, micros(0), 1), [(micros(40_100), 0)]);
        assert_eq!(line.stats().late_nanos_max, 0);
    }

    #[test]
    fn the_rate_is_kept_whatever_is_offered() {
        // 7 Mbit/s does not divide a packet's bits evenly: the carry must hold the average.
        for (rate, bits) in [("7mbit", 7e6), ("50mbit", 50e6), ("1gbit", 1e9)] {
            let mut line = shaper(&format!("{rate},10ms"));
            let gap = Duration::from_nanos((8000e9 / (bits * 1.3)) as u64);
            let arrived = offer(&mut line, gap, 100_000);
            let span = (arrived.last().unwrap().0 - arrived[0].0).as_secs_f64();
            let measured = (arrived.len() - 1) as f64 * 8000.0 / span;
            assert!((measured / bits - 1.0).abs() < 1e-4, "{rate}: {measured} bit/s");
            assert!(line.stats().dropped_by_queue > 15_000);
        }
    }

    #[test]
    fn the_queue_is_bounded_in_time() {
        // 1000 bytes take 100 us at 80 Mbit/s: 5 ms hold 50 packets behind the one on the wire.
        let mut line = shaper("80mbit,0ms,0%,queue=5ms");
        let arrived = offer(&mut line, Duration::ZERO, 1000);
        assert_eq!(arrived.len(), 51);
        assert_eq!(arrived.last().unwrap().0, micros(5_100));
        assert_eq!(line.stats().dropped_by_queue, 949);
        assert_eq!(line.stats().queue_wait_nanos_max, 5_000_000);
    }

    #[test]
    fn loss_is_near_its_share_and_uses_the_wire() {
        let mut line = shaper("80mbit,0ms,2%");
        let arrived = offer(&mut line, micros(100), 100_000);
        let lost = line.stats().dropped_by_loss;
        assert!((1_800..2_200).contains(&lost), "{lost} lost");
        assert_eq!(arrived.len() as u64 + lost, 100_000);
        assert_eq!(arrived.last().unwrap().0, micros(100 * (arrived.last().unwrap().1 + 1)));
        let mut clean = shaper("80mbit");
        assert_eq!(offer(&mut clean, micros(100), 10_000).len(), 10_000);
    }

    #[test]
    fn the_seed_decides_everything() {
        let spec = "80mbit,5ms,3%,jitter=2ms,reorder=2%,duplicate=1%,seed=";
        let run = |seed: u64| offer(&mut shaper(&format!("{spec}{seed}")), micros(90), 5_000);
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
    }

    #[test]
    fn jitter_keeps_order_and_bounds() {
        let mut line = shaper("80mbit,5ms,0%,jitter=2ms");
        let arrived = offer(&mut line, micros(300), 5_000);
        assert!(arrived.is_sorted_by_key(|(_, number)| *number));
        for (at, number) in &arrived {
            let extra = *at - micros(300 * number + 5_100);
            assert!(extra <= micros(2_000), "{extra:?}");
        }
        let spread = arrived.iter().filter(|(at, number)| *at > micros(300 * number + 6_100));
        assert!((1_000..4_500).contains(&spread.count()));
    }

    #[test]
    fn reordered_packets_are_overtaken_and_none_is_missing() {
        let mut line = shaper("80mbit,5ms,0%,reorder=10%,reorder_by=1ms");
        let mut numbers: Vec<u64> =
            offer(&mut line, micros(100), 5_000).into_iter().map(|(_, number)| number).collect();
        let steps_back = numbers.windows(2).filter(|pair| pair[1] < pair[0]).count();
        assert!((350..600).contains(&steps_back), "{steps_back}");
        numbers.sort_unstable();
        assert!(numbers.into_iter().eq(0..5_000));
    }

    #[test]
    fn duplicates_arrive_twice() {
        let mut line = shaper("80mbit,5ms,0%,duplicate=5%");
        let arrived = offer(&mut line, micros(100), 10_000);
        let stats = line.stats();
        assert!((400..600).contains(&stats.duplicated_packets));
        assert_eq!(arrived.len() as u64, 10_000 + stats.duplicated_packets);
        assert_eq!(stats.delivered_packets, arrived.len() as u64);
    }

    #[test]
    fn a_blackout_drops_what_enters_and_delivers_what_is_under_way() {
        let mut line = shaper("80mbit,5ms");
        let start = Instant::now();
        assert_eq!(line.handle_packet(start, 1000, 1), Verdict::Accepted);
        line.set_blackout(true);
        assert_eq!(
            line.handle_packet(start, 1000, 2),
            Verdict::Dropped { reason: DropReason::Blackout, packet: 2 }
        );
        line.set_blackout(false);
        assert_eq!(line.handle_packet(start, 1000, 3), Verdict::Accepted);
        let arrived: Vec<u64> = drain(&mut line, start).into_iter().map(|(_, n)| n).collect();
        assert_eq!(arrived, [1, 3]);
        assert_eq!(line.stats().dropped_by_blackout, 1);
    }

    #[test]
    fn a_line_goes_dark_by_itself_again_and_again() {
        let mut line = shaper("80mbit,5ms,blackout=3s+1s");
        let start = Instant::now();
        let passes = |at_millis| {
            let now = start + Duration::from_millis(at_millis);
            line.handle_packet(now, 1000, 0) == Verdict::Accepted
        };
        let passed = [0, 2999, 3000, 3999, 4000, 6999, 7000, 8000].map(passes);
        assert_eq!(passed, [true, true, false, false, true, true, false, true]);
    }

    #[test]
    fn a_live_change_applies_to_later_packets_and_keeps_order() {
        let mut line = shaper("80mbit,50ms");
        let start = Instant::now();
        line.handle_packet(start, 1000, 1);
        line.set_spec("8mbit,1ms".parse::<LinkSpec>().unwrap().up);
        line.handle_packet(start, 1000, 2);
        line.handle_packet(start + micros(60_000), 1000, 3);
        let arrived = drain(&mut line, start);
        assert_eq!(arrived, [(micros(50_100), 1), (micros(50_100), 2), (micros(62_000), 3)]);
    }

    #[test]
    fn a_black_hole_swallows_only_large_packets() {
        let mut line = shaper("80mbit,blackhole=900");
        let start = Instant::now();
        assert!(matches!(
            line.handle_packet(start, 901, 1),
            Verdict::Dropped { reason: DropReason::Size, .. }
        ));
        assert_eq!(line.handle_packet(start, 900, 2), Verdict::Accepted);
    }

    #[test]
    fn memory_is_bounded() {
        let mut line = shaper("100gbit,60s,0%,queue=60s");
        let start = Instant::now();
        for number in 0..=PACKETS_IN_FLIGHT_MAX as u64 {
            line.handle_packet(start, 40, number);
        }
        assert_eq!(line.stats().dropped_by_limit, 1);
    }
}
