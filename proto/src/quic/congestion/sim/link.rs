//! One bottleneck: a rate, a queue that drops what does not fit, a delay, and chance.

use std::time::Duration;

/// A random number generator that gives the same sequence everywhere.
#[derive(Debug, Clone)]
pub(super) struct Dice(u64);

impl Dice {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// A number in 0..1.
    pub(super) fn roll(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// What a link is like. Times are one way; the way back is only a delay.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) bits_per_second: f64,
    pub(super) rtt: Duration,
    /// Longest time that a packet may wait.
    pub(super) queue: Duration,
    /// Share of packets that vanish before the queue.
    pub(super) loss: f64,
    /// Delay added at random, order kept.
    pub(super) jitter: Duration,
    /// Share of packets that take `reorder_delay` longer and are overtaken.
    pub(super) reorder: f64,
    pub(super) reorder_delay: Duration,
    /// Share of packets that arrive twice.
    pub(super) duplicate: f64,
    /// Acknowledgements leave the receiver only at multiples of this.
    pub(super) clump: Duration,
    /// Nothing passes.
    pub(super) dark: bool,
}

impl Shape {
    pub(super) fn new(mbit: f64, rtt_millis: u64, loss: f64) -> Self {
        Self {
            bits_per_second: mbit * 1e6,
            rtt: Duration::from_millis(rtt_millis),
            queue: Duration::from_millis(50),
            loss,
            jitter: Duration::ZERO,
            reorder: 0.0,
            reorder_delay: Duration::ZERO,
            duplicate: 0.0,
            clump: Duration::ZERO,
            dark: false,
        }
    }

    pub(super) fn bytes_per_nano(&self) -> f64 {
        self.bits_per_second / 8e9
    }
}

/// What became of a packet.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Fate {
    /// Arrives then, having waited that long in the queue.
    Arrives { at: u64, waited: u64 },
    /// Chance took it.
    Lost,
    /// The queue was full.
    Dropped,
}

#[derive(Debug)]
pub(super) struct Link {
    pub(super) shape: Shape,
    free_at: u64,
    last_arrival: u64,
    dice: Dice,
}

impl Link {
    pub(super) fn new(shape: Shape, seed: u64) -> Self {
        Self { shape, free_at: 0, last_arrival: 0, dice: Dice::new(seed) }
    }

    /// Time that a packet arriving now would wait, in nanoseconds.
    pub(super) fn backlog(&self, now: u64) -> u64 {
        self.free_at.saturating_sub(now)
    }

    pub(super) fn pass(&mut self, now: u64, bytes: u64) -> Fate {
        let shape = self.shape;
        if shape.dark || (shape.loss > 0.0 && self.dice.roll() < shape.loss) {
            return Fate::Lost;
        }
        let waited = self.backlog(now);
        if waited > shape.queue.as_nanos() as u64 {
            return Fate::Dropped;
        }
        self.free_at = now + waited + (bytes as f64 / shape.bytes_per_nano()) as u64;
        let mut at = self.free_at + shape.rtt.as_nanos() as u64 / 2;
        if !shape.jitter.is_zero() {
            at += (shape.jitter.as_nanos() as f64 * self.dice.roll()) as u64;
        }
        if shape.reorder > 0.0 && self.dice.roll() < shape.reorder {
            at += shape.reorder_delay.as_nanos() as u64;
        } else {
            at = at.max(self.last_arrival);
            self.last_arrival = at;
        }
        Fate::Arrives { at, waited }
    }

    /// Whether a packet that arrives does so twice.
    pub(super) fn duplicates(&mut self) -> bool {
        self.shape.duplicate > 0.0 && self.dice.roll() < self.shape.duplicate
    }

    /// The link changes. What waits keeps its time of arrival; what comes now waits as if the queue were sent on at
    /// the new rate, and behind it.
    pub(super) fn change(&mut self, now: u64, shape: Shape) {
        let backlog = self.backlog(now) as f64;
        let scale = self.shape.bits_per_second / shape.bits_per_second;
        self.free_at = now + (backlog * scale) as u64;
        // Only a shorter route lets packets overtake those before.
        if shape.rtt < self.shape.rtt {
            self.last_arrival = 0;
        }
        self.shape = shape;
    }
}
