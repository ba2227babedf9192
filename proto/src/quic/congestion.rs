//! Congestion control: how much may be in flight.
//!
//! A failback's link is long and loses packets for reasons of its own (radio, tunnels, policers).
//! Controllers that take every loss for congestion fall to nothing there. [`Model`] takes the
//! delivery rate and the smallest round-trip time for what they are, an estimate of the link, as
//! BBR does (Cardwell et al., "BBR: Congestion-Based Congestion Control", ACM Queue 2016), and
//! answers loss only when there is too much of it to be chance.

use std::any::Any;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory};
use quinn_proto::RttEstimator;

const WINDOW_PACKETS_MIN: u64 = 4;
const WINDOW_PACKETS_INITIAL: u64 = 32;
/// Doubles the rate every round trip (2 / ln 2, as in BBR).
const GAIN_STARTUP: f64 = 2.885;
/// Rounds over which the highest delivery rate counts.
const RATE_ROUNDS: usize = 10;
/// How long a smallest round-trip time counts: routes change.
const MIN_RTT_AGE: Duration = Duration::from_secs(10);
/// Loss above this share of a round is congestion, not chance.
const LOSS_CONGESTED: f64 = 0.10;
/// Gains of the rounds of a cruise: probe for more, let the queue drain, then hold. The window must
/// stay a little above one bandwidth-delay product, because acknowledgements come in clumps.
const GAINS_CRUISE: [f64; 8] = [1.5, 1.0, 1.2, 1.2, 1.2, 1.2, 1.2, 1.2];

/// The pure model: acknowledgements in, a window out.
#[derive(Debug, Clone)]
pub(crate) struct Model {
    mtu: u64,
    phase: Phase,
    round: Option<Round>,
    /// Delivery rates of the last rounds, in bytes a second.
    rates: VecDeque<f64>,
    min_rtt: Option<(Duration, Instant)>,
    /// Below 1 for a while after congestion.
    backoff: f64,
    window: u64,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Phase {
    /// Looking for the link's rate: `flat` rounds in a row brought no more.
    Startup { best: f64, flat: u32 },
    /// The rate is known.
    Cruise { round: usize },
}

/// What happened since the round began.
#[derive(Debug, Clone, Copy)]
struct Round {
    started: Instant,
    acked_bytes: u64,
    lost_bytes: u64,
    app_limited: bool,
}

impl Model {
    pub(crate) fn new(mtu: u16) -> Self {
        Self {
            mtu: mtu.into(),
            phase: Phase::Startup { best: 0.0, flat: 0 },
            round: None,
            rates: VecDeque::with_capacity(RATE_ROUNDS),
            min_rtt: None,
            backoff: 1.0,
            window: WINDOW_PACKETS_INITIAL * u64::from(mtu),
        }
    }

    pub(crate) fn window(&self) -> u64 {
        self.window
    }

    fn rate(&self) -> f64 {
        self.rates.iter().copied().fold(0.0, f64::max)
    }

    pub(crate) fn handle_ack(
        &mut self,
        now: Instant,
        bytes: u64,
        app_limited: bool,
        rtt: Duration,
        smoothed_rtt: Duration,
    ) {
        let stale = |(_, at): &(Duration, Instant)| now.duration_since(*at) > MIN_RTT_AGE;
        match &self.min_rtt {
            Some(known) if rtt > known.0 && !stale(known) => {}
            _ => self.min_rtt = Some((rtt, now)),
        }
        let round = self.round.get_or_insert(Round {
            started: now,
            acked_bytes: 0,
            lost_bytes: 0,
            app_limited: false,
        });
        round.acked_bytes += bytes;
        round.app_limited |= app_limited;
        // In startup the window may grow with every acknowledgement, as slow start does.
        if matches!(self.phase, Phase::Startup { .. }) && !app_limited {
            self.window += bytes;
        }
        let elapsed = now.duration_since(round.started);
        if elapsed >= smoothed_rtt.max(Duration::from_millis(1)) {
            let round = *round;
            self.end_round(round, elapsed);
            self.round = Some(Round { started: now, acked_bytes: 0, lost_bytes: 0, app_limited });
        }
    }

    pub(crate) fn handle_loss(&mut self, lost_bytes: u64) {
        if let Some(round) = &mut self.round {
            round.lost_bytes += lost_bytes;
        }
    }

    /// Everything in flight was lost for several round trips: what is known of the link is void.
    pub(crate) fn handle_persistent_congestion(&mut self) {
        *self = Self { min_rtt: self.min_rtt, ..Self::new(self.mtu as u16) };
    }

    pub(crate) fn handle_mtu(&mut self, mtu: u16) {
        self.mtu = mtu.into();
        self.window = self.window.max(WINDOW_PACKETS_MIN * self.mtu);
    }

    fn end_round(&mut self, round: Round, elapsed: Duration) {
        let rate = round.acked_bytes as f64 / elapsed.as_secs_f64();
        // An idle sender says nothing about the link, unless it went faster than was thought.
        if !round.app_limited || rate > self.rate() {
            if self.rates.len() == RATE_ROUNDS {
                self.rates.pop_front();
            }
            self.rates.push_back(rate);
        }
        let total = (round.acked_bytes + round.lost_bytes).max(1) as f64;
        let congested = round.lost_bytes as f64 / total > LOSS_CONGESTED
            && round.lost_bytes > WINDOW_PACKETS_MIN * self.mtu;
        self.backoff =
            if congested { (self.backoff * 0.85).max(0.3) } else { (self.backoff * 1.05).min(1.0) };
        let gain = match &mut self.phase {
            Phase::Startup { best, flat } => {
                if rate > *best * 1.25 {
                    (*best, *flat) = (rate, 0);
                } else if !round.app_limited {
                    *flat += 1;
                }
                if *flat >= 3 || congested {
                    self.phase = Phase::Cruise { round: 1 };
                    GAINS_CRUISE[1]
                } else {
                    // What slow start reached stands; the model only ever adds to it here.
                    let floor = self.bdp() * GAIN_STARTUP;
                    self.window = self.window.max(floor as u64);
                    return;
                }
            }
            Phase::Cruise { round } => {
                *round = (*round + 1) % GAINS_CRUISE.len();
                GAINS_CRUISE[*round]
            }
        };
        let window = (self.bdp() * gain * self.backoff) as u64;
        self.window = window.max(WINDOW_PACKETS_MIN * self.mtu);
    }

    /// Bandwidth × delay, in bytes. On a path of microseconds, scheduling is the delay: below a
    /// millisecond the estimate would strangle a fast local link.
    fn bdp(&self) -> f64 {
        let min_rtt = self.min_rtt.map_or(Duration::ZERO, |(rtt, _)| rtt);
        self.rate() * min_rtt.max(Duration::from_millis(2)).as_secs_f64()
    }
}

/// [`Model`] as quinn calls it.
#[derive(Debug, Clone)]
struct Steady {
    model: Model,
}

/// Makes [`Steady`] controllers.
#[derive(Debug)]
pub(crate) struct SteadyConfig;

impl ControllerFactory for SteadyConfig {
    fn build(self: Arc<Self>, _now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Steady { model: Model::new(current_mtu) })
    }
}

impl Controller for Steady {
    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        app_limited: bool,
        rtt: &RttEstimator,
    ) {
        let sample = now.saturating_duration_since(sent);
        self.model.handle_ack(now, bytes, app_limited, sample, rtt.get());
    }

    fn on_congestion_event(
        &mut self,
        _now: Instant,
        _sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        if is_persistent_congestion {
            self.model.handle_persistent_congestion();
        } else {
            self.model.handle_loss(lost_bytes);
        }
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.model.handle_mtu(new_mtu);
    }

    fn window(&self) -> u64 {
        self.model.window()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        WINDOW_PACKETS_INITIAL * self.model.mtu
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// A line whose rate is known: the window is rate × smallest round-trip time.
#[derive(Debug)]
pub(crate) struct FixedConfig {
    pub(crate) bytes_per_second: u64,
}

#[derive(Debug, Clone)]
struct Fixed {
    bytes_per_second: u64,
    mtu: u64,
    min_rtt: Option<Duration>,
}

impl ControllerFactory for FixedConfig {
    fn build(self: Arc<Self>, _now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        let mtu = current_mtu.into();
        Box::new(Fixed { bytes_per_second: self.bytes_per_second, mtu, min_rtt: None })
    }
}

impl Controller for Fixed {
    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        _bytes: u64,
        _app_limited: bool,
        _rtt: &RttEstimator,
    ) {
        let sample = now.saturating_duration_since(sent);
        self.min_rtt = Some(self.min_rtt.map_or(sample, |known| known.min(sample)));
    }

    fn on_congestion_event(
        &mut self,
        _now: Instant,
        _sent: Instant,
        _is_persistent_congestion: bool,
        _lost_bytes: u64,
    ) {
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.mtu = new_mtu.into();
    }

    fn window(&self) -> u64 {
        let rtt = self.min_rtt.unwrap_or(Duration::from_millis(100));
        let bdp = self.bytes_per_second as f64 * rtt.as_secs_f64() * 1.05;
        (bdp as u64).max(WINDOW_PACKETS_MIN * self.mtu)
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        WINDOW_PACKETS_INITIAL * self.mtu
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::Model;

    /// A link in rounds: each delivers what fits, loses `loss` of it, and queues the rest.
    fn run(rate_bytes: f64, rtt: Duration, loss: f64, seconds: f64) -> (f64, f64) {
        let mut model = Model::new(1400);
        let mut now = Instant::now();
        let bdp = rate_bytes * rtt.as_secs_f64();
        let (mut delivered, mut spent, mut worst_queue) = (0.0, 0.0, 0.0f64);
        while spent < seconds {
            let window = model.window() as f64;
            let queued = (window - bdp).max(0.0);
            let round = rtt + Duration::from_secs_f64(queued / rate_bytes);
            if spent > seconds / 2.0 {
                worst_queue = worst_queue.max(queued / rate_bytes);
            }
            let arrived = window * (1.0 - loss);
            for _ in 0..100 {
                now += round / 100;
                model.handle_ack(now, (arrived / 100.0) as u64, false, round, round);
            }
            model.handle_loss((window * loss) as u64);
            if spent > seconds / 2.0 {
                delivered += arrived;
            }
            spent += round.as_secs_f64();
        }
        (delivered / (seconds / 2.0) / rate_bytes, worst_queue)
    }

    #[test]
    fn random_loss_does_not_empty_a_long_link() {
        for loss in [0.0, 0.001, 0.01, 0.05] {
            let (share, queue) = run(25e6, Duration::from_millis(80), loss, 30.0);
            assert!(share > 0.85, "loss {loss}: {share}");
            assert!(queue < 0.06, "loss {loss}: queue of {queue} s");
        }
    }

    #[test]
    fn a_blackout_starts_over_and_keeps_a_floor() {
        let mut model = Model::new(1400);
        model.handle_persistent_congestion();
        assert!(model.window() >= 4 * 1400);
    }
}
