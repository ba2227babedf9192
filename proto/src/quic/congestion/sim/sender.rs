//! A sender as quinn is one: window, pacer, loss detection and probes, around any controller.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// A congestion controller, as the sender calls it. The calls and their order are quinn's.
pub(super) trait Control {
    fn on_sent(&mut self, now: Instant, bytes: u64);
    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: Duration);
    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, rtt: Duration);
    fn on_loss(&mut self, now: Instant, sent: Instant, bytes: u64, persistent: bool);
    fn window(&self) -> u64;
    fn pace(&self) -> Pace {
        Pace::Quinn
    }
    fn state(&self) -> String {
        String::new()
    }
}

/// How bursts are spread.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Pace {
    /// quinn's formula: 1.25 × window ÷ smoothed round-trip time.
    Quinn,
    /// Not at all, as the kernel's Cubic.
    Unpaced,
    /// At this many bytes a second, as the kernel's BBR.
    Rate(f64),
}

/// quinn's token bucket (quinn-proto 0.11, `connection/pacing.rs`).
#[derive(Debug, Default)]
struct Pacer {
    tokens: f64,
    previous: u64,
}

impl Pacer {
    /// When to ask again, if not now.
    fn delay(&mut self, now: u64, rate: f64, burst: f64, bytes: f64) -> Option<u64> {
        let elapsed = (now - self.previous) as f64 / 1e9;
        self.tokens = (self.tokens + rate * elapsed).min(burst);
        self.previous = now;
        if self.tokens >= bytes {
            return None;
        }
        let wait = ((burst.max(bytes) - self.tokens) / rate * 1e9) as u64;
        // tokio's timers tick in milliseconds, and fire after the tick.
        Some((now + wait).div_ceil(MILLI) * MILLI)
    }
}

const MILLI: u64 = 1_000_000;
/// quinn's bursts last two milliseconds and have 10 to 256 packets.
const BURST_SECONDS: f64 = 0.002;
const ACK_DELAY: Duration = Duration::from_millis(25);

#[derive(Debug, Clone, Copy)]
struct Packet {
    sent: u64,
    open: bool,
}

/// When the application has something to send.
#[derive(Debug, Clone, Copy)]
pub(super) enum App {
    /// Always, from then on.
    Bulk { from: u64 },
    /// For `on` nanoseconds of each `period`.
    Bursts { on: u64, period: u64 },
    /// One packet, and the next when `period` nanoseconds are over.
    Heartbeats { period: u64 },
    /// A producer of that many bytes a second.
    Slow { bytes_per_second: f64 },
}

pub(super) struct Sender {
    pub(super) control: Box<dyn Control>,
    pub(super) app: App,
    pub(super) mtu: u64,
    packets: VecDeque<Packet>,
    first: u64,
    largest_acked: Option<u64>,
    pub(super) in_flight: u64,
    pub(super) smoothed: Duration,
    variance: Duration,
    latest: Duration,
    sampled: bool,
    pacer: Pacer,
    app_limited: bool,
    produced: f64,
    pto_count: u32,
    last_sent: u64,
    /// Packets that loss makes tolerable to overtake (24 in Backhaul, 3 in the kernel).
    threshold: u64,
    pub(super) epoch: Instant,
}

impl Sender {
    pub(super) fn new(control: Box<dyn Control>, app: App, mtu: u64, epoch: Instant) -> Self {
        let threshold = if control.pace() == Pace::Quinn { 24 } else { 3 };
        Self {
            control,
            app,
            mtu,
            packets: VecDeque::new(),
            first: 0,
            largest_acked: None,
            in_flight: 0,
            smoothed: Duration::from_millis(333),
            variance: Duration::from_millis(166),
            latest: Duration::from_millis(333),
            sampled: false,
            pacer: Pacer::default(),
            app_limited: false,
            produced: 0.0,
            pto_count: 0,
            last_sent: 0,
            threshold,
            epoch,
        }
    }

    fn at(&self, nanos: u64) -> Instant {
        self.epoch + Duration::from_nanos(nanos)
    }

    /// Whether there is something to send; if not, when there will be.
    fn next_data(&self, now: u64) -> Result<(), Option<u64>> {
        match self.app {
            App::Bulk { from } if now < from => Err(Some(from)),
            App::Bulk { .. } => Ok(()),
            App::Bursts { on, period } if now % period < on => Ok(()),
            App::Bursts { period, .. } => Err(Some((now / period + 1) * period)),
            App::Heartbeats { period } if now >= self.last_sent + period => Ok(()),
            App::Heartbeats { period } => Err(Some(self.last_sent + period)),
            App::Slow { bytes_per_second } => {
                let ready = (self.produced + self.mtu as f64) / bytes_per_second * 1e9;
                if now as f64 >= ready { Ok(()) } else { Err(Some(ready as u64 + 1)) }
            }
        }
    }

    /// Sends what may be sent: returns packet numbers, and when to wake up.
    pub(super) fn send(&mut self, now: u64, sent: &mut Vec<u64>) -> Option<u64> {
        let mut batch = 0;
        let wake = loop {
            if batch == 10 {
                self.control.on_sent(self.at(now), batch * self.mtu);
                batch = 0;
            }
            self.app_limited = false;
            if let Err(later) = self.next_data(now) {
                self.app_limited = batch == 0 && sent.is_empty();
                break later;
            }
            if self.in_flight + self.mtu >= self.control.window() {
                break None;
            }
            if let Some(at) = self.pacer_delay(now) {
                break Some(at);
            }
            self.pacer.tokens -= self.mtu as f64;
            sent.push(self.packet(now));
            batch += 1;
        };
        if batch > 0 {
            self.control.on_sent(self.at(now), batch * self.mtu);
        }
        if self.next_data(now).is_err() {
            self.app_limited = true;
        }
        wake
    }

    fn packet(&mut self, now: u64) -> u64 {
        self.packets.push_back(Packet { sent: now, open: true });
        self.in_flight += self.mtu;
        self.produced += self.mtu as f64;
        self.last_sent = now;
        self.first + self.packets.len() as u64 - 1
    }

    fn pacer_delay(&mut self, now: u64) -> Option<u64> {
        let mtu = self.mtu as f64;
        match self.control.pace() {
            Pace::Unpaced => None,
            Pace::Rate(rate) => {
                // The kernel's segmentation makes bursts of a millisecond.
                self.pacer.delay(now, rate, (rate / 1e3).max(2.0 * mtu), mtu)
            }
            Pace::Quinn => {
                let rate = self.control.window() as f64 / self.smoothed.as_secs_f64();
                let burst = (rate * BURST_SECONDS).clamp(10.0 * mtu, 256.0 * mtu);
                self.pacer.delay(now, 1.25 * rate, burst, mtu)
            }
        }
    }

    /// An acknowledgement of these packets. Returns the bytes that were new.
    pub(super) fn ack(&mut self, now: u64, numbers: &[u64]) -> u64 {
        let (at, smoothed, app_limited) = (self.at(now), self.smoothed, self.app_limited);
        let mut acked = 0;
        let mut newest = None;
        for &number in numbers {
            let Some(index) = number.checked_sub(self.first) else { continue };
            let Some(packet) = self.packets.get_mut(index as usize) else { continue };
            if !std::mem::replace(&mut packet.open, false) {
                continue;
            }
            let sent = packet.sent;
            acked += self.mtu;
            self.in_flight -= self.mtu;
            if self.largest_acked.is_none_or(|largest| number > largest) {
                self.largest_acked = Some(number);
                newest = Some(sent);
            }
            self.control.on_ack(at, self.at(sent), self.mtu, app_limited, smoothed);
        }
        if acked == 0 {
            return 0;
        }
        self.control.on_end_acks(at, self.in_flight, app_limited, smoothed);
        if let Some(sent) = newest {
            self.sample(Duration::from_nanos(now - sent));
        }
        self.detect_lost(now, true);
        self.pto_count = 0;
        acked
    }

    fn sample(&mut self, rtt: Duration) {
        self.latest = rtt;
        if self.sampled {
            self.variance = (3 * self.variance + self.smoothed.abs_diff(rtt)) / 4;
            self.smoothed = (7 * self.smoothed + rtt) / 8;
        } else {
            (self.smoothed, self.variance, self.sampled) = (rtt, rtt / 2, true);
        }
    }

    fn pto(&self) -> Duration {
        self.smoothed + (4 * self.variance).max(Duration::from_millis(1)) + ACK_DELAY
    }

    fn detect_lost(&mut self, now: u64, due_to_ack: bool) {
        let Some(largest) = self.largest_acked else { return };
        let delay = self.smoothed.max(self.latest).mul_f64(1.125).as_nanos() as u64;
        let period = 3 * self.pto().as_nanos() as u64;
        let (mut lost, mut newest, mut run, mut persistent) = (0, 0, None, false);
        for index in 0..self.packets.len().min((largest - self.first.min(largest)) as usize) {
            let number = self.first + index as u64;
            let packet = &mut self.packets[index];
            if !packet.open {
                run = None;
                continue;
            }
            if now - packet.sent >= delay || largest >= number + self.threshold {
                packet.open = false;
                lost += self.mtu;
                newest = packet.sent;
                let begin = *run.get_or_insert(packet.sent);
                persistent |= due_to_ack && packet.sent - begin > period;
            } else {
                run = None;
            }
        }
        while self.packets.front().is_some_and(|packet| !packet.open) {
            self.packets.pop_front();
            self.first += 1;
        }
        if lost > 0 {
            self.in_flight -= lost;
            self.control.on_loss(self.at(now), self.at(newest), lost, persistent);
        }
    }

    /// When the loss timer or the probe timer fires.
    pub(super) fn timer(&self) -> Option<u64> {
        let first = self.packets.front()?;
        let number = self.first;
        if self.largest_acked.is_some_and(|largest| number < largest) {
            let delay = self.smoothed.max(self.latest).mul_f64(1.125).as_nanos() as u64;
            return Some(first.sent + delay + 1);
        }
        let pto = self.pto().as_nanos() as u64;
        Some(self.last_sent + (pto << self.pto_count.min(16)))
    }

    /// The timer fired: declares losses, or sends two probes past the window.
    pub(super) fn on_timer(&mut self, now: u64, sent: &mut Vec<u64>) {
        let Some(number) = self.packets.front().map(|_| self.first) else { return };
        if self.largest_acked.is_some_and(|largest| number < largest) {
            self.detect_lost(now, false);
            return;
        }
        self.pto_count += 1;
        sent.push(self.packet(now));
        sent.push(self.packet(now));
        self.control.on_sent(self.at(now), 2 * self.mtu);
    }

    /// The user reconnected, or a keep-alive went out: probes begin again at once.
    pub(super) fn nudge(&mut self) {
        self.pto_count = 0;
    }
}
