//! A link at packet level, to run the controller on: deterministic, no clock, no sockets.
//!
//! The grids of 510 links that we have for ourselves take half a minute of one core at 2.5 GHz in a debug build, that of 144 shared
//! ones as long, and with everything else in `tests` and `sharing` it is some four minutes: shared links, which run for a
//! minute of their time each, and lines of 200 Mbit/s and more in packets of an Ethernet's size take most of them.

mod hostile;
mod link;
mod rivals;
mod sender;
mod sharing;
mod tests;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::{Duration, Instant};

use crate::quic::congestion::ceiling::{Ceiling, RateLimit};
use crate::quic::congestion::fixed::Fixed;
use crate::quic::congestion::flow::Flow;
use crate::quic::congestion::known::KnownPath;
use link::{Fate, Link, Shape};
use sender::{App, Control, Sender};

/// IPv4 and UDP headers of a datagram.
const HEADER_BYTES: u64 = 28;

/// Our controller, composed as the adapter for quinn composes it.
struct Ours {
    flow: Flow,
    ceiling: Ceiling,
}

impl Ours {
    fn boxed(epoch: Instant, mtu: u64, seed: u64, limit: &RateLimit) -> Box<dyn Control> {
        Self::knowing(epoch, mtu, seed, limit, None)
    }

    /// One to which an earlier connection left what it learned.
    fn knowing(
        epoch: Instant,
        mtu: u64,
        seed: u64,
        limit: &RateLimit,
        known: Option<KnownPath>,
    ) -> Box<dyn Control> {
        let seed = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let flow = Flow::new(epoch, mtu as u16, seed, known);
        Box::new(Self { flow, ceiling: Ceiling::new(limit.clone(), mtu, HEADER_BYTES) })
    }

    /// One of `count` connections of a link.
    fn sibling(epoch: Instant, mtu: u64, seed: u64, count: usize) -> Box<dyn Control> {
        let seed = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mut flow = Flow::new(epoch, mtu as u16, seed, None);
        flow.set_siblings(count);
        Box::new(Self { flow, ceiling: Ceiling::new(RateLimit::default(), mtu, HEADER_BYTES) })
    }

    fn is_capped(&self) -> bool {
        self.ceiling.lower(self.flow.window()) < self.flow.window()
    }
}

impl Control for Ours {
    fn on_sent(&mut self, now: Instant, bytes: u64) {
        self.ceiling.on_sent(now, bytes);
        self.flow.on_sent(now, bytes);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, _: bool, rtt: Duration) {
        self.ceiling.on_ack(now, rtt);
        self.flow.on_ack(now, sent, bytes, rtt);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, _: Duration) {
        let limited = app_limited || self.is_capped();
        self.flow.on_end_acks(now, in_flight, limited);
    }

    fn on_loss(&mut self, now: Instant, sent: Instant, bytes: u64, persistent: bool) {
        self.flow.on_loss(now, sent, bytes, persistent);
    }

    fn window(&self) -> u64 {
        if self.is_capped() {
            self.ceiling.lower(self.flow.window())
        } else {
            self.flow.paced_window()
        }
    }

    fn state(&self) -> String {
        format!(
            "{} rate {:.1} Mbit/s base {:?} floor {:?} cushion {:?} base loss {:.4} lo {:?} hi {:?} share {:?} pace {:.1} {}",
            self.flow.phase.name(),
            self.flow.rate() * 8e-6,
            self.flow.base_rtt(),
            self.flow.floor,
            self.flow.cushion(),
            self.flow.loss.share(),
            self.flow.rate_lo.map(|rate| (rate * 8e-6) as u64),
            self.flow.inflight_hi.map(|bytes| bytes as u64),
            self.flow.share.estimate(),
            self.flow.pace.gain(),
            if self.flow.rival.is_some() { "shared" } else { "alone" },
        )
    }
}

/// A line whose rate is known, as the adapter for quinn runs it.
struct Bought(Fixed);

impl Control for Bought {
    fn on_sent(&mut self, _: Instant, _: u64) {}

    fn on_ack(&mut self, now: Instant, sent: Instant, _: u64, app_limited: bool, _: Duration) {
        self.0.on_ack(now, sent, app_limited);
    }

    fn on_end_acks(&mut self, _: Instant, _: u64, _: bool, _: Duration) {}

    fn on_loss(&mut self, _: Instant, _: Instant, _: u64, _: bool) {}

    fn window(&self) -> u64 {
        self.0.window()
    }
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrive {
        flow: usize,
        number: u64,
    },
    /// It arrived before.
    ArriveAgain {
        flow: usize,
        number: u64,
    },
    Acknowledge {
        flow: usize,
    },
    /// Acknowledges what has waited long enough.
    AckTimer {
        flow: usize,
    },
    Wake {
        flow: usize,
    },
    Change {
        index: usize,
    },
}

#[derive(Default)]
struct Receiver {
    waiting: Vec<u64>,
    oldest_at: u64,
    acks: VecDeque<Vec<u64>>,
}

/// What a flow experienced.
#[derive(Default)]
struct Tally {
    /// Bytes that arrived, by tick.
    arrived: Vec<f64>,
    sent_packets: Vec<u64>,
    dropped_packets: Vec<u64>,
    /// Bytes that were acknowledged before they were taken for lost, by tick. All others are sent
    /// again, so this is what arrives of the content.
    content: Vec<f64>,
    /// Acknowledgements that came back.
    heard: u64,
}

/// Length of a tick.
const TICK: u64 = 10_000_000;

struct World {
    now: u64,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    order: u64,
    link: Link,
    changes: Vec<Shape>,
    senders: Vec<Sender>,
    receivers: Vec<Receiver>,
    tallies: Vec<Tally>,
    /// When the sender is woken next, to keep one event each.
    wakes: Vec<u64>,
    /// Queueing delay in seconds, summed over the packets of a tick, and their number.
    queue: Vec<(f64, f64)>,
    /// Senders run at multiples of this many nanoseconds only: others have the processors.
    turn: u64,
    epoch: Instant,
    trace: bool,
}

impl World {
    fn new(shape: Shape, seed: u64) -> Self {
        Self {
            now: 0,
            events: BinaryHeap::new(),
            order: 0,
            link: Link::new(shape, seed),
            changes: Vec::new(),
            senders: Vec::new(),
            receivers: Vec::new(),
            tallies: Vec::new(),
            wakes: Vec::new(),
            queue: Vec::new(),
            turn: 1,
            epoch: Instant::now(),
            trace: false,
        }
    }

    fn add(&mut self, control: Box<dyn Control>, app: App, mtu: u64) {
        self.senders.push(Sender::new(control, app, mtu, self.epoch));
        self.receivers.push(Receiver::default());
        self.tallies.push(Tally::default());
        self.wakes.push(u64::MAX);
        self.wake(self.senders.len() - 1, 0);
    }

    /// From `seconds` on, the link is like this.
    fn change(&mut self, seconds: f64, shape: Shape) {
        let index = self.changes.len();
        self.changes.push(shape);
        self.push((seconds * 1e9) as u64, Event::Change { index });
    }

    fn push(&mut self, at: u64, event: Event) {
        self.order += 1;
        self.events.push(Reverse((at, self.order, event)));
    }

    fn wake(&mut self, flow: usize, at: u64) {
        let at = at.next_multiple_of(self.turn);
        if at < self.wakes[flow] {
            self.wakes[flow] = at;
            self.push(at, Event::Wake { flow });
        }
    }

    fn run(&mut self, seconds: f64) {
        let end = (seconds * 1e9) as u64;
        let mut traced = self.now;
        while let Some(Reverse((at, _, _))) = self.events.peek() {
            if *at > end {
                break;
            }
            let Some(Reverse((at, _, event))) = self.events.pop() else { break };
            self.now = at;
            self.handle(event);
            if self.trace && at >= traced {
                traced = at + 50_000_000;
                for sender in &self.senders {
                    eprintln!(
                        "{:7.3} queue {:5.1} ms srtt {:?} window {} flight {} {}",
                        at as f64 / 1e9,
                        self.link.backlog(at) as f64 / 1e6,
                        sender.smoothed,
                        sender.control.window(),
                        sender.in_flight,
                        sender.control.state()
                    );
                }
            }
        }
        self.now = end;
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Arrive { flow, number } => {
                let tick = (self.now / TICK) as usize;
                let bytes = self.senders[flow].mtu as f64;
                *slot(&mut self.tallies[flow].arrived, tick) += bytes;
                self.receive(flow, number);
            }
            Event::ArriveAgain { flow, number } => self.receive(flow, number),
            Event::AckTimer { flow } => {
                let receiver = &self.receivers[flow];
                let due = receiver.oldest_at + 25_000_000;
                if !receiver.waiting.is_empty() && self.now >= due {
                    self.acknowledge(flow);
                }
            }
            Event::Acknowledge { flow } => {
                let Some(numbers) = self.receivers[flow].acks.pop_front() else { return };
                if !self.link.shape.dark {
                    let acked = self.senders[flow].ack(self.now, &numbers) as f64;
                    *slot(&mut self.tallies[flow].content, (self.now / TICK) as usize) += acked;
                    self.tallies[flow].heard += 1;
                }
                self.drive(flow);
            }
            Event::Wake { flow } => {
                if self.wakes[flow] <= self.now {
                    self.wakes[flow] = u64::MAX;
                    let mut sent = Vec::new();
                    if self.senders[flow].timer().is_some_and(|at| at <= self.now) {
                        self.senders[flow].on_timer(self.now, &mut sent);
                        self.transmit(flow, &sent);
                    }
                    self.drive(flow);
                }
            }
            Event::Change { index } => {
                self.link.change(self.now, self.changes[index]);
            }
        }
    }

    fn drive(&mut self, flow: usize) {
        let mut sent = Vec::new();
        let wake = self.senders[flow].send(self.now, &mut sent);
        self.transmit(flow, &sent);
        let timer = self.senders[flow].timer();
        if let Some(at) = wake.into_iter().chain(timer).min() {
            self.wake(flow, at.max(self.now + 1));
        }
    }

    fn transmit(&mut self, flow: usize, numbers: &[u64]) {
        let mtu = self.senders[flow].mtu;
        let tick = (self.now / TICK) as usize;
        for &number in numbers {
            *slot(&mut self.tallies[flow].sent_packets, tick) += 1;
            match self.link.pass(self.now, mtu) {
                Fate::Arrives { at, waited } => {
                    let sum = slot(&mut self.queue, tick);
                    sum.0 += waited as f64 / 1e9;
                    sum.1 += 1.0;
                    self.push(at, Event::Arrive { flow, number });
                    if self.link.duplicates() {
                        self.push(at, Event::ArriveAgain { flow, number });
                    }
                }
                Fate::Lost => {}
                Fate::Dropped => *slot(&mut self.tallies[flow].dropped_packets, tick) += 1,
            }
        }
    }

    /// Acknowledges a packet soon, one that was acknowledged before as well: a receiver may.
    fn receive(&mut self, flow: usize, number: u64) {
        let receiver = &mut self.receivers[flow];
        if receiver.waiting.is_empty() {
            receiver.oldest_at = self.now;
        }
        receiver.waiting.push(number);
        if receiver.waiting.len() == 1 {
            self.push(self.now + 25_000_000, Event::AckTimer { flow });
        } else if self.link.shape.clump.is_zero() {
            self.acknowledge(flow);
        } else if self.receivers[flow].waiting.len() == 2 {
            let clump = self.link.shape.clump.as_nanos() as u64;
            let at = (self.now / clump + 1) * clump;
            self.receivers[flow].oldest_at = at.saturating_sub(25_000_000);
            self.push(at, Event::AckTimer { flow });
        }
    }

    fn acknowledge(&mut self, flow: usize) {
        let numbers = std::mem::take(&mut self.receivers[flow].waiting);
        self.receivers[flow].acks.push_back(numbers);
        let delay = self.link.shape.rtt.as_nanos() as u64 / 2;
        let at = (self.now + delay).next_multiple_of(self.turn);
        self.push(at, Event::Acknowledge { flow });
    }

    /// Share of the link's rate that arrived for `flow` between two times, in seconds.
    fn share(&self, flow: usize, from: f64, to: f64) -> f64 {
        let sum: f64 = ticks(&self.tallies[flow].arrived, from, to).iter().sum();
        sum * 8.0 / (to - from) / self.link.shape.bits_per_second
    }

    /// Share of the link's rate that was content of `flow` between two times, in seconds.
    fn content(&self, flow: usize, from: f64, to: f64) -> f64 {
        let sum: f64 = ticks(&self.tallies[flow].content, from, to).iter().sum();
        sum * 8.0 / (to - from) / self.link.shape.bits_per_second
    }

    /// Share of the packets sent that the full queue dropped.
    fn dropped(&self, flow: usize, from: f64, to: f64) -> f64 {
        let tally = &self.tallies[flow];
        let dropped: u64 = ticks(&tally.dropped_packets, from, to).iter().sum();
        let sent: u64 = ticks(&tally.sent_packets, from, to).iter().sum();
        dropped as f64 / sent.max(1) as f64
    }

    /// Mean queueing delay in seconds.
    fn queue(&self, from: f64, to: f64) -> f64 {
        let ticks = ticks(&self.queue, from, to);
        let (sum, number) =
            ticks.iter().fold((0.0, 0.0), |sum, tick| (sum.0 + tick.0, sum.1 + tick.1));
        sum / number.max(1.0)
    }

    /// When `flow` first held `share` of the rate for `over` seconds after `from`.
    fn reaches(&self, flow: usize, share: f64, from: f64, over: f64) -> f64 {
        let (mut at, end) = (from, self.now as f64 / 1e9);
        while at + over <= end {
            if self.share(flow, at, at + over) >= share {
                return at + over - from;
            }
            at += TICK as f64 / 1e9;
        }
        f64::INFINITY
    }
}

fn slot<T: Clone + Default>(ticks: &mut Vec<T>, tick: usize) -> &mut T {
    if ticks.len() <= tick {
        ticks.resize(tick + 1, T::default());
    }
    &mut ticks[tick]
}

fn ticks<T>(ticks: &[T], from: f64, to: f64) -> &[T] {
    let index = |seconds: f64| ((seconds * 1e9 / TICK as f64).round() as usize).min(ticks.len());
    &ticks[index(from)..index(to)]
}
