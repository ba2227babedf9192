//! The controller's core: packets sent, acknowledged and lost go in, a window comes out.
//!
//! No clock, no quinn. `README.md` beside this file has the states and the reasons; the rules of
//! when a state ends are in `phase.rs`, what a state may have in flight is here.

use std::time::{Duration, Instant};

use crate::quic::congestion::delivery::{Delivery, Sample};
use crate::quic::congestion::filter::{MaxRate, MinRtt};
use crate::quic::congestion::known::KnownPath;
use crate::quic::congestion::loss::LossBase;
use crate::quic::congestion::pace::{self, Pace};
use crate::quic::congestion::phase::{Doubted, Phase};
use crate::quic::congestion::rival::Rival;
use crate::quic::congestion::round::{Round, RoundEnd};
use crate::quic::congestion::share::Share;
use crate::quic::congestion::standing::Standing;

/// The model of one path, and what may be in flight on it.
#[derive(Debug, Clone)]
pub(super) struct Flow {
    pub(super) mtu_bytes: f64,
    pub(super) phase: Phase,
    pub(super) delivery: Delivery,
    pub(super) max_rate: MaxRate,
    /// What came out while a queue of ours stood: `max_rate` may promise more.
    pub(super) standing: Standing,
    /// Bound on the rate after congestion, in bytes a second, until the next probe.
    pub(super) rate_lo: Option<f64>,
    /// What was in flight when a probe went too far, in bytes.
    pub(super) inflight_hi: Option<f64>,
    pub(super) min_rtt: MinRtt,
    pub(super) loss: LossBase,
    pub(super) round: Round,
    /// Delay above the smallest round-trip time that stays when our own queue is empty: jitter,
    /// clumped acknowledgements, somebody else's queue.
    pub(super) floor: Duration,
    /// The least delay above the smallest round-trip time in each of the last drains: jitter lets
    /// some packets through at once, somebody else's queue none. Who shares a path is not always
    /// there, so three are kept.
    pub(super) company: [Duration; 3],
    /// Bytes that arrive in a clump beyond what the rate explains.
    pub(super) clump: MaxRate,
    pub(super) smoothed_rtt: Duration,
    pub(super) probed_rtt_at: Instant,
    /// Rounds in a row that were slower than the model and had a queue.
    pub(super) slow_rounds: u32,
    /// The rate was lowered: so many rounds without a queue, and a probe looks whether that still holds.
    pub(super) look_after: Option<u32>,
    /// When a probe looked so for the last time.
    pub(super) looked_at: Option<Instant>,
    /// Rounds in a row of a cruise that were congested.
    pub(super) congested_rounds: u32,
    /// Delivery rate before the drain, in bytes a second.
    pub(super) loaded_rate: f64,
    /// What ended startup, if it was loss alone, until the drain says whose that was.
    pub(super) doubted: Option<Doubted>,
    /// The highest rate when startup was resumed, in bytes a second.
    pub(super) resumed_rate: f64,
    /// The window beside somebody else who yields.
    pub(super) rival: Option<Rival>,
    /// How much of a shared path is ours.
    pub(super) share: Share,
    /// Other connections of our link are in use.
    pub(super) has_siblings: bool,
    /// Mean round-trip time of the last whole round.
    pub(super) round_rtt: Duration,
    /// When it ended.
    round_at: Instant,
    /// Highest round-trip time that was seen lately: with it, the queue is full.
    peak_rtt: Duration,
    pub(super) clump_epoch: (Instant, f64),
    pub(super) window_bytes: f64,
    pub(super) pace: Pace,
    /// When `max_rate` was last measured with always something to send.
    rate_at: Instant,
    /// What earlier connections learned, until the first round trip says whether it is this path.
    known: Option<KnownPath>,
    random: u64,
}

impl Flow {
    /// `seed` spreads the probes of connections that begin together; `known` is what an earlier one of
    /// the same link learned.
    pub(super) fn new(now: Instant, mtu: u16, seed: u64, known: Option<KnownPath>) -> Self {
        Self {
            mtu_bytes: mtu.into(),
            phase: Phase::startup(),
            delivery: Delivery::new(now),
            max_rate: MaxRate::default(),
            standing: Standing::default(),
            rate_lo: None,
            inflight_hi: None,
            min_rtt: MinRtt::default(),
            loss: LossBase::default(),
            round: Round::new(0),
            floor: Duration::ZERO,
            company: [Duration::ZERO; 3],
            clump: MaxRate::default(),
            smoothed_rtt: Duration::from_millis(100),
            probed_rtt_at: now,
            slow_rounds: 0,
            look_after: None,
            looked_at: None,
            congested_rounds: 0,
            loaded_rate: 0.0,
            doubted: None,
            resumed_rate: 0.0,
            rival: None,
            share: Share::default(),
            has_siblings: false,
            round_rtt: Duration::ZERO,
            round_at: now,
            peak_rtt: Duration::ZERO,
            clump_epoch: (now, 0.0),
            window_bytes: WINDOW_PACKETS_INITIAL * f64::from(mtu),
            pace: Pace::default(),
            rate_at: now,
            known,
            random: seed | 1,
        }
    }

    /// `bytes` were sent.
    pub(super) fn on_sent(&mut self, now: Instant, bytes: u64) {
        self.delivery.on_sent(now, bytes);
        let in_flight = self.delivery.in_flight_bytes() as f64;
        let filled = pace::filled(in_flight, self.window_bytes, self.mtu_bytes);
        self.round.fullest = self.round.fullest.max(filled);
    }

    /// A packet that left at `sent` was acknowledged; `smoothed_rtt` is what the pacer uses.
    pub(super) fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        smoothed_rtt: Duration,
    ) {
        self.smoothed_rtt = smoothed_rtt;
        self.delivery.on_ack(now, sent, bytes);
    }

    /// All packets of an acknowledgement were given to [`Flow::on_ack`].
    pub(super) fn on_end_acks(&mut self, now: Instant, in_flight_bytes: u64, app_limited: bool) {
        let rtt = self.smoothed_rtt;
        let sample = self.delivery.on_end_acks(now, in_flight_bytes, app_limited, rtt);
        let Some(sample) = sample else { return };
        self.min_rtt.update(now, sample.rtt);
        if let Some(known) = self.known.take() {
            self.window_bytes = self.window_bytes.max(known.start_bytes(sample.rtt));
        }
        self.round.add(&sample);
        // Over less than a round trip a rate says more about bursts than about the link.
        let whole = sample.interval >= self.base_rtt().mul_f64(0.9);
        if whole && (!sample.app_limited || sample.rate > self.max_rate.get()) {
            self.max_rate.update(sample.rate);
            if !sample.app_limited {
                self.rate_at = now;
            }
            self.round.rate = self.round.rate.max(sample.rate);
        }
        if matches!(self.phase, Phase::Cruise { .. }) {
            self.measure_clumps(now, sample.acked_bytes as f64);
        }
        if sample.prior_delivered_bytes >= self.round.ends_at_bytes {
            let end = self.round.finish(self.delivery.delivered_bytes());
            self.end_round(now, &end);
        }
        self.step(now, &sample);
        self.update_window(&sample);
    }

    /// Packets, the newest of which left at `sent`, were declared lost. `persistent`: nothing
    /// arrived for several round trips.
    pub(super) fn on_loss(&mut self, now: Instant, sent: Instant, bytes: u64, persistent: bool) {
        let in_flight = self.delivery.in_flight_at(sent);
        self.delivery.on_loss(bytes);
        self.round.lost_bytes += bytes as f64;
        self.round.in_flight_at_loss = in_flight.map(|bytes| bytes as f64);
        if persistent {
            self.restart(now);
        }
    }

    /// So many connections of one link, this one among them, share a path.
    pub(super) fn set_siblings(&mut self, count: usize) {
        self.share.set_siblings(count);
        self.has_siblings = count > 1;
    }

    /// The size of packets has changed.
    pub(super) fn on_mtu(&mut self, mtu: u16) {
        self.mtu_bytes = mtu.into();
        self.window_bytes = self.window_bytes.max(WINDOW_PACKETS_MIN * self.mtu_bytes);
    }

    /// Bytes that may be in flight.
    pub(super) fn window(&self) -> u64 {
        self.window_bytes as u64
    }

    /// What quinn is told of that. It paces at 1.25 × this ÷ its smoothed round-trip time.
    pub(super) fn paced_window(&self) -> u64 {
        let in_flight = self.delivery.in_flight_bytes() as f64;
        self.pace.window(self.window_bytes, in_flight, self.mtu_bytes) as u64
    }

    /// What the next connection may know of this path; nothing before its rate was found.
    pub(super) fn learned(&self) -> Option<KnownPath> {
        let found = !matches!(self.phase, Phase::Startup { .. } | Phase::Drain);
        let learned_at = self.rate_at;
        found.then(|| KnownPath { rate: self.rate(), rtt: self.base_rtt(), learned_at })
    }

    /// The rate the model sends at, in bytes a second.
    pub(super) fn rate(&self) -> f64 {
        let known = self.max_rate.get();
        let known = if self.is_alone() { self.standing.lower(known) } else { known };
        self.rate_lo.map_or(known, |lo| lo.min(known))
    }

    /// The smallest round-trip time, kept away from zero.
    pub(super) fn base_rtt(&self) -> Duration {
        self.min_rtt.get().unwrap_or(self.smoothed_rtt).max(RTT_MIN)
    }

    pub(super) fn bdp(&self) -> f64 {
        self.rate() * self.base_rtt().as_secs_f64()
    }

    /// Somebody else keeps the queue full, as far as one can see from here.
    pub(super) fn is_shared(&self) -> bool {
        self.company() > (self.base_rtt() / 8).clamp(FLOOR_SHARED, NOISE_MAX) + self.burst_time()
    }

    /// Nobody else can be there: a drained path is empty.
    fn is_alone(&self) -> bool {
        self.company() <= COMPANY
    }

    /// The least delay of a drained round, in that of the last drains in which it was longest.
    fn company(&self) -> Duration {
        self.company.into_iter().max().unwrap_or_default()
    }

    /// Queueing delay that cannot be told from noise.
    pub(super) fn noise(&self) -> Duration {
        self.floor + (self.base_rtt() / 8).clamp(NOISE_MIN, NOISE_MAX) + self.burst_time()
    }

    /// Mean wait behind the packets of one of quinn's bursts: a delay of our own making that no
    /// drain takes away.
    pub(super) fn burst_time(&self) -> Duration {
        let seconds = BURST_PACKETS / 2.0 * self.mtu_bytes / self.rate().max(self.mtu_bytes);
        Duration::from_secs_f64(seconds.min(BURST_TIME_MAX.as_secs_f64()))
    }

    /// A number in 0..1.
    pub(super) fn random(&mut self) -> f64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) as f64 / (1u64 << 53) as f64
    }

    /// What is known of the path is void. A quarter of what was in flight is a start that two
    /// round trips bring back if the path is the same, and that hurts nobody if it is not.
    fn restart(&mut self, now: Instant) {
        let start = (self.bdp() / 4.0).max(WINDOW_PACKETS_INITIAL * self.mtu_bytes);
        self.window_bytes =
            start.min(self.window_bytes.max(WINDOW_PACKETS_INITIAL * self.mtu_bytes));
        self.phase = Phase::startup();
        self.max_rate = MaxRate::default();
        self.standing.forget();
        self.min_rtt = MinRtt::default();
        (self.rate_lo, self.inflight_hi) = (None, None);
        (self.slow_rounds, self.congested_rounds) = (0, 0);
        self.look_after = None;
        (self.doubted, self.resumed_rate) = (None, 0.0);
        (self.floor, self.company) = (Duration::ZERO, [Duration::ZERO; 3]);
        self.clump = MaxRate::default();
        self.pace = Pace::default();
        self.probed_rtt_at = now;
        self.round = Round::new(self.delivery.delivered_bytes());
    }

    /// The draft's extra_acked: how far acknowledgements run ahead of the rate.
    fn measure_clumps(&mut self, now: Instant, acked_bytes: f64) {
        let (began, acked) = self.clump_epoch;
        let elapsed = now.saturating_duration_since(began);
        let expected = self.rate() * elapsed.as_secs_f64();
        // Over many round trips, a rate that is a little too low would look like a clump.
        if acked <= expected || elapsed > self.base_rtt() {
            self.clump_epoch = (now, acked_bytes);
            return;
        }
        self.clump_epoch.1 = acked + acked_bytes;
        self.clump.update((acked + acked_bytes - expected).min(self.bdp()));
    }

    /// Delay that is held in flight beyond the bare round trip, so that a late acknowledgement
    /// does not let the link run dry.
    pub(super) fn cushion(&self) -> Duration {
        let clump = self.clump.get() / self.rate().max(1.0);
        CUSHION + Duration::from_secs_f64(clump.min(CLUMP_MAX.as_secs_f64()))
    }

    /// What a cruise holds in flight, as a delay beyond the base round trip.
    fn hold(&self) -> Duration {
        let base = self.base_rtt();
        let queue = self.smoothed_rtt.saturating_sub(base);
        let cushion = self.cushion();
        let hold = if self.is_shared() {
            // rate × RTT, whatever the queue: our rate stays when another's queue grows.
            queue.max(cushion)
        } else {
            let ours = queue.saturating_sub(self.floor + cushion);
            self.floor + cushion + ours.mul_f64(QUEUE_KEPT)
        };
        hold.min(base.max(Duration::from_millis(4)))
    }

    fn update_window(&mut self, sample: &Sample) {
        let floor = WINDOW_PACKETS_MIN * self.mtu_bytes;
        if self.max_rate.get() == 0.0 {
            self.window_bytes += sample.acked_bytes as f64;
            return;
        }
        let (rate, bdp) = (self.rate(), self.bdp());
        let base = self.base_rtt();
        let cruise = match &self.rival {
            Some(rival) => (rival.window_packets() * self.mtu_bytes).min(RIVAL_MAX * bdp),
            _ => rate * (base + self.hold()).as_secs_f64() + self.mtu_bytes,
        };
        let target = match &self.phase {
            Phase::Startup { .. } => {
                let top = (GAIN_STARTUP * bdp).max(WINDOW_PACKETS_INITIAL * self.mtu_bytes);
                let limit = base + self.noise();
                let queued = self.round.rtt_samples >= 8 && self.round.rtt_min > limit;
                if !sample.app_limited && !queued && self.window_bytes < top {
                    self.window_bytes += sample.acked_bytes as f64;
                }
                return;
            }
            Phase::Drain => bdp,
            Phase::Down { window_bytes, .. } => *window_bytes,
            Phase::Cruise { .. } | Phase::Refill => cruise,
            Phase::Up { add_bytes, .. } if self.is_shared() => {
                (cruise + add_bytes).min(GAIN_UP_MAX * bdp)
            }
            Phase::Up { add_bytes, .. } => {
                rate * (base + self.floor + self.cushion()).as_secs_f64() + add_bytes
            }
            Phase::ProbeRtt { .. } => bdp * GAIN_PROBE_RTT,
        };
        let bound = match (&self.phase, self.inflight_hi) {
            (_, None) => f64::INFINITY,
            // What fits beside somebody else changes all the time.
            _ if self.is_shared() => f64::INFINITY,
            (Phase::Up { .. }, Some(hi)) => hi,
            // Room for others, but not below what the path holds without a queue.
            (_, Some(hi)) => (hi * HEADROOM).max(bdp.min(hi)),
        };
        self.window_bytes = target.min(bound).max(floor);
    }

    fn end_round(&mut self, now: Instant, end: &RoundEnd) {
        // In the first round the pacer works with a round-trip time that nobody has measured.
        if !self.round_rtt.is_zero() {
            self.pace.end_round(end);
        }
        let shared = self.is_shared();
        let limit = if shared { self.noise() - self.floor } else { self.noise() };
        let queued = end.rtt_mean > self.base_rtt() + limit;
        let (lost, total) = (end.lost_bytes / self.mtu_bytes, end.total_bytes / self.mtu_bytes);
        let congested = self.loss.is_exceeded(lost, total, queued);
        if !queued && !congested && !shared {
            self.loss.add(lost, total);
        }
        let base = self.base_rtt();
        let above = self.peak_rtt.saturating_sub(base).mul_f64(PEAK_KEPT);
        self.peak_rtt = end.rtt_max.max(base + above);
        let full = end.rtt_max >= base + above.mul_f64(PEAK_FULL);
        self.share.add_loss(lost - self.loss.share() * total, total);
        self.follow_rival(now, end, congested || (full && self.loss.is_noticed(lost, total)));
        self.watch_standing(now, end);
        self.turn(now, end, queued, congested);
        self.round_rtt = end.rtt_mean;
        self.round_at = now;
    }

    /// Takes note of a round in which a queue of ours was never empty.
    fn watch_standing(&mut self, now: Instant, end: &RoundEnd) {
        // Beside others, what comes out of a full line is our part of it; and who is there is not known before
        // the first drain, nor is a rate that grows a mean.
        let searches = matches!(self.phase, Phase::Startup { .. } | Phase::Drain);
        // Where packets come so late that they are sent again, what comes out is not what was let out.
        let is_ill = self.loss.share() > ILL;
        if searches || is_ill || self.is_shared() || self.has_siblings {
            return self.standing.forget();
        }
        // Behind a queue that stands a round is a whole path full, and as long as its packets took. A sender that had
        // not always something to send may have had a path full of it all the same.
        let least = if end.app_limited { STANDS_LIMITED } else { STANDS };
        let full = end.total_bytes > self.max_rate.get() * self.base_rtt().as_secs_f64() * least;
        if !full || now.saturating_duration_since(self.round_at) > 2 * end.rtt_max {
            return self.standing.skip_round();
        }
        // Half of the cushion: acknowledgements that wait for each other are no queue.
        let empty = self.base_rtt() + self.company() + self.cushion() / 2 + 2 * self.burst_time();
        self.standing.end_round(now, self.delivery.delivered_bytes(), end.rtt_min > empty);
    }

    /// Takes up, follows or gives up Cubic's law.
    fn follow_rival(&mut self, now: Instant, end: &RoundEnd, congested: bool) {
        if !self.is_shared() {
            self.rival = None;
            self.share.forget();
            return;
        }
        // A dip, or a probe for the round trip, is no measure of what we had.
        let start = self.window_bytes.max(self.bdp()) / self.mtu_bytes;
        let rival = self.rival.get_or_insert_with(|| Rival::new(now, start));
        rival.end_round(now, congested && !self.share.is_wronged());
        let probing = matches!(self.phase, Phase::Down { .. } | Phase::ProbeRtt { .. });
        if !probing && !end.app_limited {
            let packets = (end.total_bytes - end.lost_bytes) / self.mtu_bytes;
            rival.grow(now, packets, self.smoothed_rtt);
        }
    }
}

const WINDOW_PACKETS_MIN: f64 = 4.0;
/// The draft's initial window is ten packets; a pacer spreads ours over the first round trip.
pub(super) const WINDOW_PACKETS_INITIAL: f64 = 48.0;
/// Doubles what is in flight each round trip (draft: StartupCwndGain).
const GAIN_STARTUP: f64 = 2.0;
/// Most a probe has in flight (draft: ProbeBW_UP cwnd_gain).
const GAIN_UP_MAX: f64 = 2.25;
/// Draft: ProbeRTTCwndGain.
const GAIN_PROBE_RTT: f64 = 0.5;
/// Share of the known bound that a cruise uses (draft: Headroom).
const HEADROOM: f64 = 0.85;
/// On paths of microseconds, scheduling is the delay.
const RTT_MIN: Duration = Duration::from_millis(1);
/// Standing queue that is held on purpose: timers of a millisecond and short stalls eat it.
const CUSHION: Duration = Duration::from_millis(2);
/// Most that is held on account of clumped acknowledgements.
const CLUMP_MAX: Duration = Duration::from_millis(6);
/// Base loss beyond which packets may be late rather than lost.
const ILL: f64 = 0.04;
/// Least share of what the highest rate has on an empty path that a round behind a standing queue brings.
const STANDS: f64 = 0.5;
const STANDS_LIMITED: f64 = 0.8;
/// Least delay of a drained round from which on somebody else may be there.
const COMPANY: Duration = Duration::from_millis(2);
/// How much of the highest queue is remembered from round to round.
const PEAK_KEPT: f64 = 0.99;
/// From this share of it on the queue counts as full.
const PEAK_FULL: f64 = 0.8;
/// Cubic's law fills a queue of any length; beyond this many bandwidth-delay products we do not.
const RIVAL_MAX: f64 = 4.0;
/// Share of a queue of ours beyond the cushion that a cruise leaves in place: below 1 it shrinks.
const QUEUE_KEPT: f64 = 0.25;
/// Queueing delay below this is noise on any path, and above the other on none.
const NOISE_MIN: Duration = Duration::from_millis(4);
const NOISE_MAX: Duration = Duration::from_millis(10);
/// quinn's pacer sends at least this many packets at once (`MIN_BURST_SIZE`).
const BURST_PACKETS: f64 = 10.0;
const BURST_TIME_MAX: Duration = Duration::from_millis(20);
/// Delay that stays after our queue was drained, from which on a path counts as shared.
const FLOOR_SHARED: Duration = Duration::from_millis(5);
