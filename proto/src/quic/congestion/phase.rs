//! The states, and when one gives way to the next.

use std::time::{Duration, Instant};

use crate::quic::congestion::delivery::Sample;
use crate::quic::congestion::flow::{Flow, WINDOW_PACKETS_INITIAL};
use crate::quic::congestion::pace::HELD_BACK;
use crate::quic::congestion::round::RoundEnd;

/// What the controller is doing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Phase {
    /// Looking for the rate, doubling: `flat_rounds` rounds in a row brought no quarter more than
    /// `best_rate`.
    Startup { best_rate: f64, flat_rounds: u32 },
    /// Waiting for the queue that startup has made to empty.
    Drain,
    /// A little below the rate, so that our queue is gone and the floor can be seen.
    /// `drained_rounds` ended since no more than `window_bytes` was in flight.
    Down { window_bytes: f64, drained_rounds: Option<u32> },
    /// Holding the rate until the next probe.
    Cruise { until: Instant },
    /// A round at the full rate, for acknowledgements that tell of nothing else.
    Refill,
    /// A little more in flight, to see whether more comes out: `add_bytes` more than a cruise.
    Up { add_bytes: f64, rounds: u32, best_rate: f64 },
    /// Half in flight, to see the path without our queue. Once that is all, round-trip times count
    /// from the first instant of `span`, a round trip later, to the second.
    ProbeRtt { span: Option<(Instant, Instant)>, seen: RoundTrips },
}

/// Round-trip times while a path is probed. Their mean is compared with the least: a few
/// acknowledgements are always late, as receivers wait for a second packet.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct RoundTrips {
    least: Duration,
    sum: Duration,
    count: u32,
}

impl RoundTrips {
    fn add(&mut self, rtt: Duration) {
        self.least = self.least.min(rtt);
        self.sum += rtt;
        self.count += 1;
    }

    fn mean(&self) -> Duration {
        self.sum / self.count.max(1)
    }
}

impl Default for RoundTrips {
    fn default() -> Self {
        Self { least: Duration::MAX, sum: Duration::ZERO, count: 0 }
    }
}

/// A startup that ended by loss alone.
#[derive(Debug, Clone, Copy)]
pub(super) struct Doubted {
    /// What was lost of its last round, as a share.
    lost: f64,
    /// The most that any round of it delivered, in bytes a second.
    rate: f64,
    /// The highest that a round delivered since, of what was under way by then.
    rate_since: f64,
}

impl Phase {
    pub(super) fn startup() -> Self {
        Self::Startup { best_rate: 0.0, flat_rounds: 0 }
    }

    /// The state's name, as metrics and status say it.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Startup { .. } => "startup",
            Self::Drain => "drain",
            Self::Down { .. } => "probe_bw_down",
            Self::Cruise { .. } => "probe_bw_cruise",
            Self::Refill => "probe_bw_refill",
            Self::Up { .. } => "probe_bw_up",
            Self::ProbeRtt { .. } => "probe_rtt",
        }
    }
}

impl Flow {
    /// What each acknowledgement may end.
    pub(super) fn step(&mut self, now: Instant, sample: &Sample) {
        let in_flight = self.delivery.in_flight_bytes() as f64;
        let slack = 2.0 * self.mtu_bytes;
        match self.phase {
            Phase::Drain if in_flight <= self.bdp() + slack => self.enter_down(),
            Phase::Down { window_bytes, drained_rounds: None }
                if in_flight <= window_bytes + slack =>
            {
                self.phase = Phase::Down { window_bytes, drained_rounds: Some(0) };
                self.loaded_rate = sample.rate;
                self.round.ends_at_bytes = self.delivery.delivered_bytes();
            }
            Phase::Cruise { until } if now >= until => {
                if self.rival.is_some() {
                    // Cubic's law probes by itself; only whether anybody is there must be seen.
                    self.enter_down();
                } else {
                    self.refill();
                }
            }
            Phase::ProbeRtt { span, seen } => self.probe_rtt(now, sample, span, seen),
            _ => {}
        }
        let probing = matches!(self.phase, Phase::Startup { .. } | Phase::ProbeRtt { .. });
        if !probing && self.min_rtt.unconfirmed_for(now) > PROBE_RTT_INTERVAL {
            self.enter_probe_rtt();
        }
    }

    /// What the end of a round may end.
    pub(super) fn turn(&mut self, now: Instant, end: &RoundEnd, queued: bool, congested: bool) {
        // A queue proves that the path was full.
        self.doubted = self
            .doubted
            .filter(|_| !queued)
            .map(|doubted| Doubted { rate_since: doubted.rate_since.max(end.rate), ..doubted });
        match self.phase {
            Phase::Startup { best_rate, flat_rounds } => {
                let grew = end.rate > best_rate * GROWTH_STARTUP;
                // What lets more out than before is not full, whatever it loses; and while the first
                // window is not exceeded, a round alone may be flat.
                let excused = end.is_held_back() && self.pace.can_rise();
                let few = end.total_bytes < FEW * WINDOW_PACKETS_INITIAL * self.mtu_bytes;
                // Who pauses now and then may fill window and path all the same. Who trickles hardly does, whosever queue
                // he meets.
                let stands = end.app_limited && queued && end.fullest >= HELD_BACK;
                if congested && (queued || (!grew && (flat_rounds > 0 || !few))) {
                    self.bound_inflight(end);
                    let lost = end.lost_bytes / end.total_bytes.max(1.0);
                    let rate = end.rate.max(best_rate);
                    let doubted = Doubted { lost, rate, rate_since: 0.0 };
                    self.doubted = (!queued).then_some(doubted);
                    self.phase = Phase::Drain;
                } else if grew {
                    self.phase = Phase::Startup { best_rate: end.rate, flat_rounds: 0 };
                } else if stands || (!end.app_limited && (queued || !excused)) {
                    let flat_rounds = flat_rounds + 1;
                    self.phase = Phase::Startup { best_rate, flat_rounds };
                    if flat_rounds >= FLAT_ROUNDS || (queued && !end.app_limited) {
                        self.phase = Phase::Drain;
                    }
                }
            }
            Phase::Drain | Phase::Down { drained_rounds: None, .. } => {
                // These packets left while a probe was on.
                if congested {
                    self.bound_inflight(end);
                }
            }
            Phase::Down { window_bytes, drained_rounds: Some(rounds) } => {
                // The first of the two rounds still acknowledges packets from before the drain.
                if rounds == 0 {
                    let drained_rounds = Some(1);
                    self.phase = Phase::Down { window_bytes, drained_rounds };
                } else {
                    self.leave_down(now, end, congested && !queued);
                }
            }
            Phase::Cruise { .. } | Phase::Refill => {
                self.judge(now, end, queued, congested);
                if self.congested_rounds == BURST_ROUNDS {
                    return self.enter_down();
                }
                if self.phase == Phase::Refill {
                    let best_rate = self.max_rate.get();
                    let add_bytes = self.probe_bytes();
                    self.phase = Phase::Up { add_bytes, rounds: 0, best_rate };
                }
            }
            Phase::Up { add_bytes, rounds, best_rate } => {
                if congested && !self.is_shared() {
                    self.bound_inflight(end);
                    self.enter_down();
                } else {
                    self.go_up(end, queued, add_bytes, rounds + 1, best_rate);
                }
            }
            Phase::ProbeRtt { .. } => {}
        }
    }

    /// Lowers the model when a round without a probe says that it promises too much. Not in a refill (as
    /// the draft): a bound that a probe begins with would be all that it finds.
    fn judge(&mut self, now: Instant, end: &RoundEnd, queued: bool, congested: bool) {
        let rate = self.rate();
        if congested {
            // Beside others, the rival's law is the answer to loss.
            if self.is_shared() {
                self.congested_rounds = 0;
                return;
            }
            self.congested_rounds += 1;
            if self.phase != Phase::Refill {
                let floor = if self.congested_rounds <= BURST_ROUNDS { BURST_FLOOR } else { 0.0 };
                let floor = self.max_rate.get() * floor;
                self.rate_lo = Some(end.rate.max(rate * LOSS_BETA).max(floor));
                self.look_soon();
            }
            return;
        }
        self.congested_rounds = 0;
        let slow = !self.is_shared() && queued && !end.app_limited && end.rate < rate * SLOW;
        self.slow_rounds = if slow { self.slow_rounds + 1 } else { 0 };
        if self.slow_rounds >= SLOW_ROUNDS && self.phase != Phase::Refill {
            self.rate_lo = Some(end.rate);
            self.slow_rounds = 0;
            self.look_soon();
        } else if queued && self.look_after.is_some() {
            self.look_soon();
        } else if !queued && !end.app_limited {
            self.look(now);
        }
    }

    /// The rate was lowered, or may still have to be.
    fn look_soon(&mut self) {
        self.look_after = Some(CALM_ROUNDS);
    }

    /// A round had no queue. If that goes on, what lowered the rate was a moment's weakness, of the path or of
    /// this host, and nobody else fills the queue.
    fn look(&mut self, now: Instant) {
        self.look_after = self.look_after.map(|rounds| rounds.saturating_sub(1));
        let recent = self.looked_at.is_some_and(|at| now.saturating_duration_since(at) < CRUISE);
        let much = self.rate_lo.is_some_and(|lo| lo < self.max_rate.get() * SLOW);
        // The queue of a link with several connections is theirs, and they would all look at once.
        let alone = !self.has_siblings && !self.is_shared();
        if self.look_after == Some(0) && much && !recent && alone {
            self.looked_at = Some(now);
            self.phase = Phase::Cruise { until: now };
        }
    }

    /// A probe lost packets: this much in flight is too much.
    fn bound_inflight(&mut self, end: &RoundEnd) {
        let at_loss = end.in_flight_at_loss.unwrap_or(self.window_bytes);
        self.inflight_hi = Some(at_loss.max(self.bdp() * LOSS_BETA));
    }

    fn go_up(&mut self, end: &RoundEnd, queued: bool, add_bytes: f64, rounds: u32, best_rate: f64) {
        if let Some(hi) = &mut self.inflight_hi {
            *hi += self.mtu_bytes * f64::from(1 << rounds.min(16));
        }
        // A round's acknowledgements are for what was in flight a round before.
        let expected = add_bytes / self.bdp().max(1.0);
        let grew = end.rate > best_rate * (1.0 + expected / 2.0);
        if rounds < 2 {
            self.phase = Phase::Up { add_bytes, rounds, best_rate };
        } else if grew {
            self.standing.forget();
            let (add_bytes, best_rate) = (add_bytes.max(self.probe_bytes()) * 2.0, end.rate);
            let add_bytes = add_bytes.min(self.bdp());
            // More came out, and nothing was lost by it: the link is no longer what set this bound.
            self.inflight_hi = self.inflight_hi.map(|hi| hi.max(self.window_bytes + add_bytes));
            self.phase = Phase::Up { add_bytes, rounds: 0, best_rate };
        } else if queued || rounds >= UP_ROUNDS {
            self.enter_down();
        } else {
            self.phase = Phase::Up { add_bytes, rounds, best_rate };
        }
    }

    /// How much a probe adds: a quarter, or a queue of [`PROBE_QUEUE`] if that is less.
    fn probe_bytes(&self) -> f64 {
        let quarter = self.base_rtt().max(Duration::from_millis(4)) / 4;
        let delay = if self.is_shared() { quarter } else { quarter.min(PROBE_QUEUE) };
        self.rate() * delay.as_secs_f64() + self.mtu_bytes
    }

    fn enter_down(&mut self) {
        self.max_rate.advance();
        self.standing.advance();
        self.clump.advance();
        let window_bytes = if self.rival.is_some() {
            self.share.begin_dip(self.window_bytes, self.round_rtt);
            let empty = self.base_rtt().as_secs_f64() / self.round_rtt.as_secs_f64().max(1e-6);
            let least = if self.share.is_alone() { 0.0 } else { DIP_MIN };
            self.window_bytes * (empty * GAIN_DOWN).clamp(least, 1.0)
        } else {
            // Too high a rate would leave a queue here that looks like somebody else's.
            let rate = self.standing.lower(self.rate());
            rate * self.base_rtt().as_secs_f64() * GAIN_DOWN
        };
        self.phase = Phase::Down { window_bytes, drained_rounds: None };
    }

    /// Our queue is gone: what is left is not ours.
    fn leave_down(&mut self, now: Instant, end: &RoundEnd, congested: bool) {
        let was_shared = self.is_shared();
        let doubted = self.doubted.take();
        let base = self.base_rtt();
        if let Some(rival) = &mut self.rival
            && let Phase::Down { window_bytes, .. } = self.phase
            && !end.app_limited
        {
            rival.raise(now, self.share.end_dip(window_bytes, end.rtt_mean));
        }
        // A packet alone is acknowledged when the peer's patience ends: that tells of nobody's queue.
        if end.app_limited && end.total_bytes < ALONE_PACKETS * self.mtu_bytes {
            return self.cruise(now);
        }
        // A round that is not congested was added to the base as it is; beside a queue nothing is proved.
        let was_chance = doubted.is_some_and(|doubted| self.was_chance(&doubted, end));
        if congested && was_chance {
            self.loss.add(end.lost_bytes / self.mtu_bytes, end.total_bytes / self.mtu_bytes);
        } else if congested {
            self.learn_chance(end);
        }
        self.floor = end.rtt_mean.saturating_sub(base);
        let [_, second, third] = self.company;
        self.company = [second, third, end.rtt_min.saturating_sub(base)];
        if was_chance && !self.is_shared() {
            return self.resume_startup();
        }
        self.cruise(now);
        // Somebody came, or the route is longer than it was: only an empty path can tell.
        let recent = now.saturating_duration_since(self.probed_rtt_at) < PROBE_RTT_INTERVAL / 2;
        if self.is_clearly_longer(end.rtt_min) && !was_shared && !recent {
            self.enter_probe_rtt();
        }
    }

    /// A path that was full lets out in a drained round what it did before, or all that is sent. So what
    /// was lost of the round, as far as less came out than before, was lost by chance.
    fn learn_chance(&mut self, end: &RoundEnd) {
        if self.is_shared() || end.app_limited || self.loaded_rate <= 0.0 {
            return;
        }
        let (lost, total) = (end.lost_bytes / self.mtu_bytes, end.total_bytes / self.mtu_bytes);
        let less = (1.0 - end.last_rate / self.loaded_rate).max(0.0);
        self.loss.add(lost.min(less * total), total);
    }

    /// Whether the loss for which startup ended had nothing to do with what was sent: what was under way by then
    /// came out faster still, and a drained path without a queue loses as much.
    fn was_chance(&self, doubted: &Doubted, end: &RoundEnd) -> bool {
        let stays = end.lost_bytes > doubted.lost * end.total_bytes * STAYS;
        let grew = doubted.rate_since > doubted.rate.max(self.resumed_rate) * GROWTH_STARTUP;
        let empty = end.rtt_mean <= self.base_rtt() + self.noise();
        stays && grew && empty && !end.app_limited
    }

    fn resume_startup(&mut self) {
        self.resumed_rate = self.max_rate.get();
        self.inflight_hi = None;
        self.phase = Phase::startup();
    }

    fn is_clearly_longer(&self, rtt: Duration) -> bool {
        rtt > self.base_rtt().mul_f64(1.25) + FLOOR_SUSPECT
    }

    fn cruise(&mut self, now: Instant) {
        let wait = CRUISE.mul_f64(1.0 + self.random() / 2.0);
        let wait = if self.share.is_wronged() { wait / 2 } else { wait };
        let wait = wait.max(6 * self.smoothed_rtt);
        self.phase = Phase::Cruise { until: now + wait };
        self.clump_epoch = (now, 0.0);
    }

    fn refill(&mut self) {
        let shared = self.is_shared();
        if let Some(lo) = self.rate_lo.take().filter(|_| !shared) {
            self.max_rate.set(lo);
        }
        (self.look_after, self.slow_rounds) = (None, 0);
        self.phase = Phase::Refill;
        self.round.ends_at_bytes = self.delivery.delivered_bytes();
    }

    fn enter_probe_rtt(&mut self) {
        self.doubted = None;
        self.phase = Phase::ProbeRtt { span: None, seen: RoundTrips::default() };
    }

    fn probe_rtt(
        &mut self,
        now: Instant,
        sample: &Sample,
        span: Option<(Instant, Instant)>,
        mut seen: RoundTrips,
    ) {
        let low = self.delivery.in_flight_bytes() as f64 <= self.window_bytes + self.mtu_bytes;
        match span {
            None if low => {
                // After a peer stood still for seconds the mean is seconds, for a while.
                let rtt = self.smoothed_rtt.min((2 * self.base_rtt()).max(PROBE_RTT_TIME));
                let span = Some((now + rtt, now + PROBE_RTT_TIME.max(2 * rtt)));
                self.phase = Phase::ProbeRtt { span, seen };
            }
            None => {}
            Some((from, _)) if now < from => {}
            Some((_, until)) => {
                seen.add(sample.rtt);
                self.phase = Phase::ProbeRtt { span, seen };
                if now >= until {
                    self.leave_probe_rtt(now, seen);
                }
            }
        }
    }

    /// Stillness is the path's own, so a clearly longer route is believed; others' queues move.
    fn leave_probe_rtt(&mut self, now: Instant, seen: RoundTrips) {
        let before = self.base_rtt();
        let is_still =
            seen.mean().saturating_sub(seen.least) < PROBE_RTT_STILL.max(self.burst_time());
        let is_longer = is_still && self.is_clearly_longer(seen.least);
        if is_longer || before >= seen.least {
            self.min_rtt.set(now, seen.least);
        } else {
            self.min_rtt.confirm(now);
        }
        let longer = self.base_rtt().saturating_sub(before);
        self.company = self.company.map(|delay| delay.saturating_sub(longer));
        self.floor = self.floor.saturating_sub(longer);
        self.probed_rtt_at = now;
        self.cruise(now);
    }
}

/// Growth of a round that keeps startup going (draft: 25 %).
const GROWTH_STARTUP: f64 = 1.25;
/// First windows that a round of startup may have, to be forgiven a loss and no growth at once: chance
/// decides over so few packets. With 1.5, eight connections of one link drop 1.2 to 6.6 %.
const FEW: f64 = 1.1;
/// Share of the loss that ended startup, that a drained path has of it at least if it is chance.
const STAYS: f64 = 0.25;
/// Rounds without growth that end startup when no queue is seen (draft: 3), or when there was not always something
/// to send.
const FLAT_ROUNDS: u32 = 3;
/// Rounds after which a probe ends even if no queue is seen.
const UP_ROUNDS: u32 = 4;
/// Queue that a probe may make on a path that is not shared.
const PROBE_QUEUE: Duration = Duration::from_millis(15);
/// Below 1, so that the queue drains while packets still tell of it.
const GAIN_DOWN: f64 = 0.97;
/// Shortest time between probes; up to half of it is added by chance (draft: 2 to 3 s).
const CRUISE: Duration = Duration::from_secs(2);
/// Beside others a dip leaves this share of the window: it is for measuring, not for yielding.
const DIP_MIN: f64 = 0.5;
/// Draft: Beta, the most that one congested round takes.
const LOSS_BETA: f64 = 0.7;
/// Somebody's slow start ends within so many rounds. It may cost us half of what we had, or it would
/// take all; and it is over before a link that has become so slow is drowned.
const BURST_ROUNDS: u32 = 8;
const BURST_FLOOR: f64 = 0.5;
/// A round below this share of the modelled rate, with a queue, is slow.
const SLOW: f64 = 0.8;
/// That many slow rounds in a row say that the link is slower than it was.
const SLOW_ROUNDS: u32 = 3;
/// Rounds without a queue, at a rate that was lowered, before a probe looks whether that still holds.
const CALM_ROUNDS: u32 = 6;
/// Draft: ProbeRTTInterval.
const PROBE_RTT_INTERVAL: Duration = Duration::from_secs(5);
/// Draft: ProbeRTTDuration.
const PROBE_RTT_TIME: Duration = Duration::from_millis(200);
/// Fewer packets in a round are heartbeats, and what knocks let out.
const ALONE_PACKETS: f64 = 8.0;
/// Delay beyond a quarter of the round trip that makes a drained path suspicious.
const FLOOR_SUSPECT: Duration = Duration::from_millis(10);
/// Round-trip times that vary by less while half is in flight are the path's own.
const PROBE_RTT_STILL: Duration = Duration::from_micros(1500);

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{BURST_ROUNDS, Flow, Phase, RoundEnd};

    const RTT: Duration = Duration::from_millis(40);

    /// A flow in a cruise at 25 MB/s, on a path that drains to `company` beyond its round trip.
    fn cruising(now: Instant, company: Duration) -> Flow {
        let mut flow = Flow::new(now, 1200, 1, None);
        flow.min_rtt.set(now, RTT);
        flow.max_rate.update(25e6);
        flow.company = [company; 3];
        flow.phase = Phase::Cruise { until: now + Duration::from_secs(2) };
        flow
    }

    /// A round behind a full queue, a twentieth of which was lost.
    fn congested() -> RoundEnd {
        RoundEnd {
            rate: 20e6,
            last_rate: 20e6,
            rtt_min: 2 * RTT,
            rtt_mean: 2 * RTT,
            rtt_max: 2 * RTT,
            lost_bytes: 50e3,
            total_bytes: 1e6,
            in_flight_at_loss: None,
            fullest: 1.0,
            app_limited: false,
        }
    }

    /// After eight congested rounds a drain looks who is there. Where it found somebody the count stayed
    /// at eight, so that each further round of loss began a drain again, which takes half of the window.
    #[test]
    fn who_was_found_is_not_looked_for_again() {
        let now = Instant::now();
        let mut flow = cruising(now, Duration::ZERO);
        for _ in 0..BURST_ROUNDS {
            assert!(matches!(flow.phase, Phase::Cruise { .. }));
            flow.turn(now, &congested(), true, true);
        }
        assert!(matches!(flow.phase, Phase::Down { .. }), "{:?}", flow.phase);
        flow.company = [RTT; 3];
        flow.phase = Phase::Cruise { until: now + Duration::from_secs(2) };
        flow.turn(now, &congested(), true, true);
        assert!(matches!(flow.phase, Phase::Cruise { .. }), "{:?}", flow.phase);
    }

    /// A line that was weak while a probe refilled was probed from that moment's rate, and stayed at it for
    /// the two or three seconds to the next probe.
    #[test]
    fn a_refill_does_not_bound_its_probe() {
        let now = Instant::now();
        let mut flow = cruising(now, Duration::ZERO);
        flow.turn(now, &congested(), true, true);
        assert!(flow.rate_lo.is_some(), "a cruise yields");
        let mut flow = cruising(now, Duration::ZERO);
        flow.phase = Phase::Refill;
        flow.turn(now, &congested(), true, true);
        assert_eq!(flow.rate_lo, None);
        assert!(matches!(flow.phase, Phase::Up { .. }), "{:?}", flow.phase);
    }
}
