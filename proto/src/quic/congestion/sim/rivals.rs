//! Those we share a link with: the kernel's Cubic and its first BBR, as far as sharing goes.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::sender::{Control, Pace};
use crate::quic::congestion::delivery::Delivery;

/// RFC 9438, with the Reno-friendly region; no HyStart.
pub(super) struct Cubic {
    mtu: f64,
    window: f64,
    threshold: f64,
    w_max: f64,
    w_reno: f64,
    epoch: Option<Instant>,
    recovery_until: Option<Instant>,
}

const CUBIC_C: f64 = 0.4;
const CUBIC_BETA: f64 = 0.7;

impl Cubic {
    pub(super) fn new(mtu: u64) -> Self {
        Self {
            mtu: mtu as f64,
            window: 10.0,
            threshold: f64::INFINITY,
            w_max: 0.0,
            w_reno: 0.0,
            epoch: None,
            recovery_until: None,
        }
    }
}

impl Control for Cubic {
    fn on_sent(&mut self, _: Instant, _: u64) {}

    fn on_ack(&mut self, now: Instant, sent: Instant, _: u64, app_limited: bool, rtt: Duration) {
        if app_limited || self.recovery_until.is_some_and(|until| sent <= until) {
            return;
        }
        if self.window < self.threshold {
            self.window += 1.0;
            return;
        }
        let epoch = *self.epoch.get_or_insert(now);
        let t = now.duration_since(epoch).as_secs_f64() + rtt.as_secs_f64();
        let k = (self.w_max * (1.0 - CUBIC_BETA) / CUBIC_C).cbrt();
        let target = CUBIC_C * (t - k).powi(3) + self.w_max;
        let alpha = 3.0 * (1.0 - CUBIC_BETA) / (1.0 + CUBIC_BETA);
        self.w_reno += alpha / self.window;
        let target = target.clamp(self.window, self.window * 1.5);
        self.window += (target - self.window) / self.window;
        self.window = self.window.max(self.w_reno);
    }

    fn on_end_acks(&mut self, _: Instant, _: u64, _: bool, _: Duration) {}

    fn on_loss(&mut self, now: Instant, sent: Instant, _: u64, persistent: bool) {
        if self.recovery_until.is_some_and(|until| sent <= until) {
            return;
        }
        self.recovery_until = Some(now);
        self.w_max = if self.window < self.w_max {
            self.window * (1.0 + CUBIC_BETA) / 2.0
        } else {
            self.window
        };
        self.window = (self.window * CUBIC_BETA).max(2.0);
        (self.threshold, self.w_reno, self.epoch) = (self.window, self.window, None);
        if persistent {
            self.window = 2.0;
        }
    }

    fn window(&self) -> u64 {
        (self.window * self.mtu) as u64 + self.mtu as u64
    }

    fn pace(&self) -> Pace {
        Pace::Unpaced
    }
}

/// The kernel's first BBR (`tcp_bbr.c`): its gains and when one gives way to the next, its two
/// bandwidth-delay products in flight and what it adds for clumped acknowledgements, the round of
/// packet conservation after a loss, and a probe for the round-trip time every ten seconds. Its model of
/// policers is left out: it asks for a fifth of all packets lost.
pub(super) struct Bbr {
    mtu: f64,
    delivery: Delivery,
    /// Highest rate of each of the last rounds.
    rates: VecDeque<f64>,
    round_ends: u64,
    min_rtt: (Duration, Option<Instant>),
    full: (f64, u32),
    mode: Mode,
    cycle: (usize, Option<Instant>),
    /// Largest clump of this window of rounds and the one before, and the epoch it is measured in.
    extra: [f64; 2],
    extra_epoch: (Option<Instant>, f64),
    rounds: u32,
    window: f64,
    /// Packets conserved until the round ends, and the window to go back to.
    recovery: Option<(u64, f64)>,
    lost_in_batch: bool,
    acked_in_batch: f64,
}

#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Startup,
    Drain,
    Probe,
    Rtt(Option<Instant>),
}

const BBR_GAINS: [f64; 8] = [1.25, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0];
const BBR_HIGH: f64 = 2.885;

impl Bbr {
    pub(super) fn new(mtu: u64, epoch: Instant) -> Self {
        Self {
            mtu: mtu as f64,
            delivery: Delivery::new(epoch),
            rates: VecDeque::from([0.0]),
            round_ends: 0,
            min_rtt: (Duration::MAX, None),
            full: (0.0, 0),
            mode: Mode::Startup,
            cycle: (2, None),
            extra: [0.0; 2],
            extra_epoch: (None, 0.0),
            rounds: 0,
            window: 10.0 * mtu as f64,
            recovery: None,
            lost_in_batch: false,
            acked_in_batch: 0.0,
        }
    }

    fn rate(&self) -> f64 {
        self.rates.iter().copied().fold(0.0, f64::max)
    }

    fn bdp(&self) -> f64 {
        self.rate() * self.min_rtt.0.min(Duration::from_secs(1)).as_secs_f64()
    }

    fn pacing_gain(&self) -> f64 {
        match self.mode {
            Mode::Startup => BBR_HIGH,
            Mode::Drain => 1.0 / BBR_HIGH,
            Mode::Probe => BBR_GAINS[self.cycle.0],
            Mode::Rtt(_) => 1.0,
        }
    }

    fn end_round(&mut self, sample_rate: f64, app_limited: bool) {
        self.round_ends = self.delivery.delivered_bytes();
        self.rates.push_back(sample_rate);
        if self.rates.len() > 10 {
            self.rates.pop_front();
        }
        self.rounds += 1;
        if self.rounds.is_multiple_of(5) {
            self.extra = [0.0, self.extra[0]];
        }
        if self.recovery.is_some_and(|(until, _)| self.delivery.delivered_bytes() >= until) {
            let (_, before) = self.recovery.take().unwrap_or_default();
            self.window = self.window.max(before);
        }
        if self.mode != Mode::Startup || app_limited {
            return;
        }
        if self.rate() >= self.full.0 * 1.25 {
            self.full = (self.rate(), 0);
        } else {
            self.full.1 += 1;
        }
    }

    fn update_mode(&mut self, now: Instant, in_flight: f64, rtt_expired: bool) {
        if self.mode == Mode::Startup && self.full.1 >= 3 {
            self.mode = Mode::Drain;
        }
        if self.mode == Mode::Drain && in_flight <= self.bdp() {
            (self.mode, self.cycle) = (Mode::Probe, (2, Some(now)));
        }
        if self.mode == Mode::Probe {
            let began = *self.cycle.1.get_or_insert(now);
            let long = now.saturating_duration_since(began) > self.min_rtt.0;
            let gain = BBR_GAINS[self.cycle.0];
            let over = if gain > 1.0 {
                long && (self.lost_in_batch || in_flight >= gain * self.bdp())
            } else if gain < 1.0 {
                long || in_flight <= self.bdp()
            } else {
                long
            };
            if over {
                self.cycle = ((self.cycle.0 + 1) % BBR_GAINS.len(), Some(now));
            }
        }
        if rtt_expired && !matches!(self.mode, Mode::Rtt(_)) {
            self.mode = Mode::Rtt(None);
        }
        match self.mode {
            Mode::Rtt(None) if in_flight <= 5.0 * self.mtu => {
                let round = self.min_rtt.0.min(Duration::from_secs(1));
                self.mode = Mode::Rtt(Some(now + round.max(Duration::from_millis(200))));
            }
            Mode::Rtt(Some(until)) if now >= until => {
                self.min_rtt.1 = Some(now);
                let started = self.full.1 >= 3;
                self.mode = if started { Mode::Probe } else { Mode::Startup };
                self.cycle = (2, Some(now));
                self.window = self.window.max(2.0 * self.bdp());
            }
            _ => {}
        }
    }

    fn measure_extra(&mut self, now: Instant, acked: f64) {
        let began = *self.extra_epoch.0.get_or_insert(now);
        let expected = self.rate() * now.saturating_duration_since(began).as_secs_f64();
        if self.extra_epoch.1 <= expected {
            self.extra_epoch = (Some(now), acked);
        } else {
            self.extra_epoch.1 += acked;
        }
        let began = self.extra_epoch.0.unwrap_or(now);
        let expected = self.rate() * now.saturating_duration_since(began).as_secs_f64();
        let extra = (self.extra_epoch.1 - expected).min(self.rate() * 0.1).min(self.window);
        self.extra[0] = self.extra[0].max(extra);
    }
}

impl Control for Bbr {
    fn on_sent(&mut self, now: Instant, bytes: u64) {
        self.delivery.on_sent(now, bytes);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, _: bool, _: Duration) {
        self.delivery.on_ack(now, sent, bytes);
        self.acked_in_batch += bytes as f64;
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, rtt: Duration) {
        let acked = std::mem::take(&mut self.acked_in_batch);
        let Some(sample) = self.delivery.on_end_acks(now, in_flight, app_limited, rtt) else {
            return;
        };
        let old = |at: Instant| now.saturating_duration_since(at) > Duration::from_secs(10);
        let expired = self.min_rtt.1.is_some_and(old);
        if sample.rtt <= self.min_rtt.0 || expired {
            self.min_rtt = (sample.rtt, Some(now));
        }
        // A rate over less than the smallest round trip is no sample to the kernel.
        if sample.interval >= self.min_rtt.0
            && let Some(last) = self.rates.back_mut()
        {
            *last = last.max(sample.rate);
        }
        if sample.prior_delivered_bytes >= self.round_ends {
            self.end_round(sample.rate, app_limited);
        }
        self.measure_extra(now, acked);
        self.update_mode(now, in_flight as f64 + acked, expired);
        self.lost_in_batch = false;
        let target = if self.mode == Mode::Startup { BBR_HIGH } else { 2.0 } * self.bdp()
            + self.extra[0].max(self.extra[1])
            + 3.0 * (self.rate() / 1e3).clamp(2.0 * self.mtu, 65_536.0);
        if self.recovery.is_some() {
            self.window = self.window.max(in_flight as f64 + acked);
        } else if self.full.1 >= 3 {
            self.window = (self.window + acked).min(target);
        } else if self.window < target {
            self.window += acked;
        }
        self.window = self.window.max(4.0 * self.mtu);
    }

    fn on_loss(&mut self, _: Instant, _: Instant, bytes: u64, _: bool) {
        self.delivery.on_loss(bytes);
        self.lost_in_batch = true;
        if self.recovery.is_none() {
            let until = self.delivery.delivered_bytes() + self.delivery.in_flight_bytes();
            self.recovery = Some((until, self.window));
            self.window = self.delivery.in_flight_bytes() as f64 + self.mtu;
        }
    }

    fn window(&self) -> u64 {
        let window = if matches!(self.mode, Mode::Rtt(_)) { 4.0 * self.mtu } else { self.window };
        (window + self.mtu) as u64
    }

    fn pace(&self) -> Pace {
        Pace::Rate((0.99 * self.pacing_gain() * self.rate()).max(100_000.0))
    }
}
