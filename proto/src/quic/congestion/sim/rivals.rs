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

/// The first BBR: gains 1.25, 0.75, 1 × 6; twice the bandwidth-delay product in flight; a probe
/// for the round-trip time every ten seconds.
pub(super) struct Bbr {
    mtu: f64,
    delivery: Delivery,
    rates: VecDeque<f64>,
    round_ends: u64,
    min_rtt: (Duration, Option<Instant>),
    full: (f64, u32),
    started: bool,
    cycle: (usize, Option<Instant>),
    probe_until: Option<Instant>,
}

const BBR_GAINS: [f64; 8] = [1.25, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0];

impl Bbr {
    pub(super) fn new(mtu: u64, epoch: Instant) -> Self {
        Self {
            mtu: mtu as f64,
            delivery: Delivery::new(epoch),
            rates: VecDeque::from([0.0]),
            round_ends: 0,
            min_rtt: (Duration::MAX, None),
            full: (0.0, 0),
            started: false,
            cycle: (0, None),
            probe_until: None,
        }
    }

    fn rate(&self) -> f64 {
        self.rates.iter().copied().fold(0.0, f64::max)
    }

    fn bdp(&self) -> f64 {
        self.rate() * self.min_rtt.0.min(Duration::from_secs(1)).as_secs_f64()
    }
}

impl Control for Bbr {
    fn on_sent(&mut self, now: Instant, bytes: u64) {
        self.delivery.on_sent(now, bytes);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, _: bool, _: Duration) {
        self.delivery.on_ack(now, sent, bytes);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, rtt: Duration) {
        let Some(sample) = self.delivery.on_end_acks(now, in_flight, app_limited, rtt) else {
            return;
        };
        let old = |at: Instant| now.duration_since(at) > Duration::from_secs(10);
        let expired = self.min_rtt.1.is_some_and(old);
        if sample.rtt <= self.min_rtt.0 || expired {
            self.min_rtt = (sample.rtt, Some(now));
        }
        if expired && self.started {
            self.probe_until = Some(now + Duration::from_millis(200) + rtt);
        }
        if self.probe_until.is_some_and(|until| now >= until) {
            self.probe_until = None;
        }
        if let Some(last) = self.rates.back_mut() {
            *last = last.max(sample.rate);
        }
        if sample.prior_delivered_bytes >= self.round_ends {
            self.round_ends = self.delivery.delivered_bytes();
            self.rates.push_back(sample.rate);
            if self.rates.len() > 10 {
                self.rates.pop_front();
            }
            if self.rate() > self.full.0 * 1.25 {
                self.full = (self.rate(), 0);
            } else {
                self.full.1 += 1;
                self.started |= self.full.1 >= 3;
            }
        }
        let began = *self.cycle.1.get_or_insert(now);
        let drained = self.cycle.0 == 1 && (in_flight as f64) < self.bdp();
        if now.duration_since(began) > self.min_rtt.0 || drained {
            self.cycle = ((self.cycle.0 + 1) % BBR_GAINS.len(), Some(now));
        }
    }

    fn on_loss(&mut self, _: Instant, _: Instant, bytes: u64, _: bool) {
        self.delivery.on_loss(bytes);
    }

    fn window(&self) -> u64 {
        let gain = if self.started { 2.0 } else { 2.885 };
        let window = if self.probe_until.is_some() { 0.0 } else { gain * self.bdp() };
        window.max(if self.rate() > 0.0 { 5.0 } else { 11.0 } * self.mtu) as u64
    }

    fn pace(&self) -> Pace {
        let gain = if self.started { BBR_GAINS[self.cycle.0] } else { 2.885 };
        Pace::Rate((gain * self.rate()).max(100_000.0))
    }
}
