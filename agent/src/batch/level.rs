//! How hard to compress: as hard as the processors can while the link is the bottleneck, and not at
//! all while they are. Pure.
//!
//! What waits for the link tells which of the two it is. Enough to keep it busy for a while: the next
//! level is taken, provided that the encoders, from how fast they were and what levels usually cost,
//! stay faster than the link. Not enough, while batches wait for the encoders: the level before.
//! Neither, for seconds: the processors are left to others.

use std::time::{Duration, Instant};

/// The levels of zstd, in the order in which they are tried. Those between gain next to nothing
/// over the one before; those above 9 gain 1 % for twice the time, on pieces of 1 MiB.
const LADDER: [Option<i32>; STEPS] = [None, Some(1), Some(3), Some(6), Some(9)];
const STEPS: usize = 5;

/// Time that a byte takes on each step, with level 1 as the measure: hashing alone, then zstd on
/// files of all sorts. Only the proportions count.
const COST: [f64; STEPS] = [0.2, 1.0, 1.7, 4.0, 7.0];

/// Plain bytes a second of one thread at level 1, until it is measured.
const SPEED_GUESS: f64 = 300e6;

/// What the guess, and every measurement after it, weighs at least, in bytes at level 1: a first
/// small batch that was slow for reasons of its own says little.
const SPEED_WEIGHT: f64 = 16e6;

/// How much faster than the link the encoders must be before a level is taken: the link's own
/// encryption needs the processors as well.
const HEADROOM: f64 = 1.25;

/// Above this rate, in bytes a second, compressing would take more from the target than it gives.
const FAST_LINK_BYTES_PER_SECOND: f64 = 150e6;

/// The link is fed when it has work for so long, besides what is under way.
const FED: Duration = Duration::from_millis(500);

/// It is never fed by less than this, nor, whatever its rate, found hungry with more than a
/// quarter of the queue.
const FED_BYTES_MIN: u64 = 2 << 20;

/// Less than this waiting for the encoders is their ordinary work: a region of a sync.
const ENCODER_BACKLOG_BYTES: u64 = 6 << 20;

/// Each of these that waits for the encoders lowers the level of the next batch by one step: a
/// burst of the guest does not wait for the next look at the backlog.
const RELIEF_BYTES: u64 = 12 << 20;
/// What the encoders will be done with within this time needs no relief.
const RELIEF: Duration = Duration::from_millis(100);

/// How often the level may change: long enough for what was encoded before to be out of the way.
const PERIOD: Duration = Duration::from_millis(200);

/// For so long a level that was too slow is not tried again. Trying costs little: the link is fed.
const TOO_SLOW: Duration = Duration::from_secs(3);

/// For so long it counts as known what the link takes. Trying to send plain costs a lot where the
/// link is slow: all that is queued then has its full size.
const LINK_KNOWN: Duration = Duration::from_secs(20);

/// A level must bring so much more than another to be preferred to it.
const BETTER: f64 = 1.05;

/// A link that was no bottleneck must be one for so long before it counts as one.
const DOUBT: Duration = Duration::from_secs(1);

/// When the link has been no bottleneck for so long, bytes are not worth saving any more. They may
/// be what keeps it from being one: when it becomes one again, the time is doubled.
const PATIENCE_FIRST: Duration = Duration::from_secs(2);
/// The longest of these times.
const PATIENCE_LONGEST: Duration = Duration::from_secs(64);

/// What is remembered of what was encoded shrinks by this every period.
const MEMORY: f64 = 0.8;

/// What waits, and what got through.
#[derive(Debug, Clone, Copy, Default)]
pub struct Backlog {
    /// Bytes that wait for the encoders.
    pub encoder_bytes: u64,
    /// Bytes that are encoded and not acknowledged, as they travel.
    pub link_bytes: u64,
    /// Bytes of batches, as they travel, that were acknowledged since the start.
    pub acked_wire_bytes: u64,
    /// The link's round-trip time.
    pub round_trip: Duration,
}

/// A batch that was encoded.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// The step it was encoded at.
    pub step: Step,
    /// Its size before.
    pub plain_bytes: u64,
    /// Its size after.
    pub wire_bytes: u64,
    /// How long one thread took.
    pub took: Duration,
    /// Whether all of it went through zstd: noise and references are much faster, and say nothing
    /// about what comes after them.
    pub compressed: bool,
}

/// A place on the ladder of levels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Step(usize);

impl Step {
    /// The level of zstd; `None` for not compressing.
    pub fn level(self) -> Option<i32> {
        LADDER[self.0]
    }
}

/// Sums that forget.
#[derive(Debug, Clone, Copy, Default)]
struct Share {
    above: f64,
    below: f64,
}

impl Share {
    fn add(&mut self, above: f64, below: f64) {
        self.above += above;
        self.below += below;
    }

    fn forget(&mut self) {
        self.above *= MEMORY;
        self.below *= MEMORY;
    }

    fn get(self) -> Option<f64> {
        (self.below > 0.0 && self.above > 0.0).then(|| self.above / self.below)
    }
}

/// A rate, in bytes a second, and when it was measured.
#[derive(Debug, Clone, Copy)]
struct Measured {
    at: Instant,
    rate: f64,
}

impl Measured {
    fn within(self, now: Instant, time: Duration) -> Option<f64> {
        (now.saturating_duration_since(self.at) < time).then_some(self.rate)
    }
}

/// Decides the level, batch by batch.
#[derive(Debug, Clone)]
pub struct LevelControl {
    threads: f64,
    queue_bytes: u64,
    step: usize,
    /// Bytes of late by what they cost, as if they were at level 1, and the time that they took.
    worked: Share,
    /// What was encoded at the present step of late: plain bytes, and bytes on the wire.
    encoded: Share,
    /// Plain bytes that were encoded since the backlog was last looked at.
    encoded_bytes: u64,
    /// When the backlog was last looked at, and what was acknowledged by then.
    last: Option<(Instant, u64)>,
    /// Since when enough has been waiting for the link.
    fed_since: Option<Instant>,
    /// What the link takes while it is fed.
    link: Option<Measured>,
    /// Plain bytes that the encoders managed at each step where they were too slow.
    too_slow: [Option<Measured>; STEPS],
    link_limits: bool,
    /// Since when the link has been no bottleneck.
    idle_since: Option<Instant>,
    patience: Duration,
}

impl LevelControl {
    /// For so many encoder threads, and queues that hold so many bytes.
    pub fn new(threads: usize, queue_bytes: u64) -> Self {
        Self {
            threads: threads.max(1) as f64,
            queue_bytes,
            // What is queued before anything is known would otherwise go out plain, on a slow link
            // for many seconds; on a fast one this lasts a moment.
            step: 1,
            worked: Share { above: SPEED_WEIGHT, below: SPEED_WEIGHT / SPEED_GUESS },
            encoded: Share::default(),
            encoded_bytes: 0,
            last: None,
            fed_since: None,
            link: None,
            too_slow: [None; STEPS],
            // For the same reason.
            link_limits: true,
            idle_since: None,
            patience: PATIENCE_FIRST,
        }
    }

    /// The step for the next batch, when so many bytes wait for the encoders before it.
    pub fn poll_step(&self, waiting_bytes: u64) -> Step {
        let relief = (waiting_bytes / RELIEF_BYTES) as usize;
        // What the link does not need yet is not made larger for it.
        let least = usize::from(self.fed_since.is_some()).min(self.step);
        let mut step = self.step;
        while step > least && self.step - step < relief && self.is_behind(waiting_bytes, step) {
            step -= 1;
        }
        Step(step)
    }

    fn is_behind(&self, waiting_bytes: u64, step: usize) -> bool {
        waiting_bytes as f64 / self.capacity(step) > RELIEF.as_secs_f64()
    }

    /// Plain bytes a second that the encoders manage at a step.
    fn capacity(&self, step: usize) -> f64 {
        self.threads * self.worked.get().unwrap_or(SPEED_GUESS) / COST[step]
    }

    /// Whether the link is the bottleneck, or was a moment ago, or nothing is known yet: what costs
    /// time and saves bytes pays.
    pub fn link_limits(&self) -> bool {
        self.link_limits
    }

    /// The step at present, without regard to bursts.
    pub fn step(&self) -> Step {
        Step(self.step)
    }

    /// How many plain bytes a byte on the wire stands for at this step, of late.
    pub fn ratio(&self) -> f64 {
        self.encoded.get().unwrap_or(1.0)
    }

    /// A batch was encoded.
    pub fn handle_encoded(&mut self, sample: Sample) {
        let Sample { step: Step(step), plain_bytes, wire_bytes, took, compressed } = sample;
        self.encoded_bytes += plain_bytes;
        if compressed {
            self.worked.add(plain_bytes as f64 * COST[step], took.as_secs_f64());
        }
        if step == self.step {
            self.encoded.add(plain_bytes as f64, wire_bytes as f64);
        }
    }

    /// A link is up, and so short that it is fast, or not. That decides until it is measured.
    pub fn handle_connected(&mut self, short: bool) {
        if self.link.is_none() {
            self.link_limits = !short;
            self.set_step(usize::from(!short));
        }
    }

    /// There is no link: nothing can be learnt, and what comes in is compressed as it was.
    pub fn handle_disconnected(&mut self) {
        self.last = None;
    }

    /// Looks at what waits. To be called several times a second; more often changes nothing.
    pub fn handle_backlog(&mut self, now: Instant, backlog: Backlog) {
        let Some((since, acked)) = self.last else {
            self.last = Some((now, backlog.acked_wire_bytes));
            self.encoded_bytes = 0;
            return;
        };
        let elapsed = now.saturating_duration_since(since);
        if elapsed < PERIOD {
            return;
        }
        self.last = Some((now, backlog.acked_wire_bytes));
        let bytes = backlog.acked_wire_bytes.saturating_sub(acked);
        let rate = bytes as f64 / elapsed.as_secs_f64();
        let plain_rate = std::mem::take(&mut self.encoded_bytes) as f64 / elapsed.as_secs_f64();
        let fed = backlog.link_bytes > self.fed_bytes(rate, backlog.round_trip);
        let fed_since = fed.then(|| self.fed_since.unwrap_or(now));
        self.fed_since = fed_since;
        if let Some(fed_since) = fed_since {
            self.idle_since = None;
            // What it took before was what it got.
            if fed_since < now {
                let known = self.link.map_or(rate, |link| link.rate);
                let rate = (known + rate) / 2.0;
                self.link = Some(Measured { at: now, rate });
                // A fast link is slow for a moment too, when it begins.
                if self.link_limits || now.duration_since(fed_since) >= DOUBT {
                    self.handle_link_limited(now, rate);
                }
            }
        } else if backlog.encoder_bytes > ENCODER_BACKLOG_BYTES {
            self.idle_since = None;
            self.handle_encoder_limited(now, plain_rate, rate);
        } else if self.link_limits {
            let since = *self.idle_since.get_or_insert(now);
            if now.duration_since(since) >= self.patience {
                self.link_limits = false;
                self.set_step(0);
            }
        }
        if self.worked.above > SPEED_WEIGHT {
            self.worked.forget();
        }
        self.encoded.forget();
    }

    /// How much must wait for the link to keep it busy until more is encoded.
    fn fed_bytes(&self, rate: f64, round_trip: Duration) -> u64 {
        let rate = self.link.map_or(rate, |link| link.rate.max(rate));
        let bytes = rate * (FED + round_trip.mul_f64(1.5)).as_secs_f64();
        (bytes as u64).max(FED_BYTES_MIN.min(self.queue_bytes / 8)).min(self.queue_bytes / 4)
    }

    fn handle_link_limited(&mut self, now: Instant, rate: f64) {
        let was_limiting = self.link_limits;
        self.link_limits = rate < FAST_LINK_BYTES_PER_SECOND;
        if !self.link_limits {
            return self.set_step(0);
        }
        if !was_limiting {
            self.patience = (self.patience * 2).min(PATIENCE_LONGEST);
        }
        let next = self.step + 1;
        let Some(ratio) = self.encoded.get().filter(|_| next < STEPS) else { return };
        let brings = rate * ratio;
        let known = self.too_slow[next].and_then(|slow| slow.within(now, TOO_SLOW));
        let worth_it = match known {
            Some(known) => known > brings * BETTER,
            None => self.capacity(next) >= brings * HEADROOM,
        };
        if worth_it {
            self.set_step(next);
        }
    }

    fn handle_encoder_limited(&mut self, now: Instant, plain_rate: f64, wire_rate: f64) {
        self.too_slow[self.step] = Some(Measured { at: now, rate: plain_rate });
        let link = self.link.and_then(|link| link.within(now, LINK_KNOWN));
        match self.step {
            0 => self.link_limits = false,
            // Without zstd the link brings what it takes, and no more.
            1 if link
                .is_some_and(|link| link < plain_rate * BETTER && wire_rate < link * BETTER) => {}
            step => self.set_step(step - 1),
        }
    }

    fn set_step(&mut self, step: usize) {
        if step != self.step {
            self.step = step;
            self.encoded = Share::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{Backlog, LevelControl, Sample, Step};

    const TICK: Duration = Duration::from_millis(10);
    const QUEUE_BYTES: f64 = 32e6;
    const BATCH_BYTES: f64 = 1e6;

    /// A sync that reads as fast as the queue has room, two encoders, and a link.
    struct World {
        now: Instant,
        control: LevelControl,
        link_bytes_per_second: f64,
        /// Plain bytes a second of one thread at level 1.
        speed: f64,
        /// Wire share of each step.
        shares: [f64; 5],
        waiting_bytes: f64,
        held_bytes: f64,
        under_way: Vec<(Instant, f64)>,
        /// The batch in the encoders: its step and the thread-seconds it still needs.
        encoding: Option<(Step, f64)>,
        acked_wire_bytes: f64,
        done_plain_bytes: f64,
        fixed: Option<usize>,
        /// What comes does not compress.
        noise: bool,
    }

    impl World {
        fn new(link_bytes_per_second: f64, speed: f64) -> Self {
            Self {
                now: Instant::now(),
                control: LevelControl::new(2, 64 << 20),
                link_bytes_per_second,
                speed,
                shares: [1.0, 0.40, 0.37, 0.35, 0.345],
                waiting_bytes: 0.0,
                held_bytes: 0.0,
                under_way: Vec::new(),
                encoding: None,
                acked_wire_bytes: 0.0,
                done_plain_bytes: 0.0,
                fixed: None,
                noise: false,
            }
        }

        fn seconds_of(&self, step: Step) -> f64 {
            // Not what the control takes levels to cost.
            let cost = if self.noise { 0.12 } else { [0.1, 1.0, 2.1, 3.4, 8.0][step.0] };
            cost * BATCH_BYTES / self.speed
        }

        fn tick(&mut self) {
            self.now += TICK;
            while self.waiting_bytes + self.held_bytes < QUEUE_BYTES {
                self.waiting_bytes += 4.0 * BATCH_BYTES;
            }
            let mut budget = 2.0 * TICK.as_secs_f64();
            while budget > 0.0 && self.waiting_bytes >= BATCH_BYTES {
                let next = || {
                    let chosen = self.control.poll_step(self.waiting_bytes as u64);
                    self.fixed.map_or(chosen, Step)
                };
                let (step, left) = self.encoding.unwrap_or_else(|| {
                    let step = next();
                    (step, self.seconds_of(step))
                });
                if left > budget {
                    self.encoding = Some((step, left - budget));
                    break;
                }
                budget -= left;
                self.encoding = None;
                self.waiting_bytes -= BATCH_BYTES;
                let share = if self.noise { 1.0 } else { self.shares[step.0] };
                let wire_bytes = BATCH_BYTES * share;
                self.held_bytes += wire_bytes;
                self.done_plain_bytes += BATCH_BYTES;
                self.control.handle_encoded(Sample {
                    step,
                    plain_bytes: BATCH_BYTES as u64,
                    wire_bytes: wire_bytes as u64,
                    took: Duration::from_secs_f64(self.seconds_of(step)),
                    compressed: step.0 > 0 && !self.noise,
                });
            }
            let unsent: f64 =
                self.held_bytes - self.under_way.iter().map(|(_, bytes)| bytes).sum::<f64>();
            let sent = unsent.min(self.link_bytes_per_second * TICK.as_secs_f64());
            // A fast link is a short one: otherwise the queue would be what limits.
            let round_trip = Duration::from_secs_f64((6e6 / self.link_bytes_per_second).min(0.08));
            self.under_way.push((self.now + round_trip, sent));
            let now = self.now;
            let acked: f64 =
                self.under_way.iter().filter(|(at, _)| *at <= now).map(|(_, bytes)| bytes).sum();
            self.under_way.retain(|(at, _)| *at > now);
            self.held_bytes -= acked;
            self.acked_wire_bytes += acked;
            self.control.handle_backlog(
                self.now,
                Backlog {
                    encoder_bytes: self.waiting_bytes as u64,
                    link_bytes: self.held_bytes as u64,
                    acked_wire_bytes: self.acked_wire_bytes as u64,
                    round_trip,
                },
            );
        }

        /// Plain bytes a second over so long, and how often the level changed.
        fn run(&mut self, seconds: u32) -> (f64, u32) {
            let (before, mut step, mut changes) = (self.done_plain_bytes, self.control.step(), 0);
            for _ in 0..seconds * 100 {
                self.tick();
                if self.control.step() != step {
                    step = self.control.step();
                    changes += 1;
                }
            }
            ((self.done_plain_bytes - before) / f64::from(seconds), changes)
        }

        /// Runs until everything that was queued is gone.
        fn settle(&mut self) {
            self.run(5 + (1.5 * QUEUE_BYTES / self.link_bytes_per_second) as u32);
        }

        /// What the best level, chosen by hand, brings.
        fn best(&self) -> f64 {
            let through = (0..5).map(|step| {
                let mut world = World::new(self.link_bytes_per_second, self.speed);
                (world.shares, world.fixed) = (self.shares, Some(step));
                world.settle();
                world.run(20).0
            });
            through.fold(0.0, f64::max)
        }
    }

    #[test]
    fn it_settles_near_the_best_level_on_every_link() {
        for link in [1e6, 6e6, 25e6, 60e6, 125e6, 1.2e9] {
            for speed in [60e6, 380e6] {
                let mut world = World::new(link, speed);
                world.settle();
                let (rate, changes) = world.run(60);
                let best = world.best();
                assert!(rate > 0.93 * best, "link {link}, speed {speed}: {rate} of {best}");
                assert!(changes <= 12, "link {link}, speed {speed}: {changes} changes");
            }
        }
    }

    #[test]
    fn it_follows_the_link_and_the_data() {
        let mut world = World::new(6e6, 380e6);
        world.run(10);
        assert_eq!(world.control.step().level(), Some(9));
        world.link_bytes_per_second = 100e6;
        world.run(3);
        let (rate, _) = world.run(10);
        assert!(rate > 0.9 * world.best(), "{rate} of {}", world.best());
        assert!(world.control.step().level() < Some(9));
        world.link_bytes_per_second = 1.2e9;
        world.run(3);
        assert_eq!(world.control.step().level(), None, "no link is faster than plain");
        assert!(world.run(5).0 > 1.1e9);
        world.link_bytes_per_second = 25e6;
        world.run(5);
        assert!(world.control.link_limits());
        let (rate, _) = world.run(20);
        assert!(rate > 0.9 * world.best(), "{rate} of {}", world.best());
    }

    /// Noise goes through at any level as fast as it comes, and must not be taken for a promise.
    #[test]
    fn what_comes_after_noise_does_not_starve_the_link() {
        let mut world = World::new(25e6, 380e6);
        world.run(10);
        world.noise = true;
        let (rate, _) = world.run(20);
        assert!(rate > 0.95 * 25e6, "{rate}");
        world.noise = false;
        let before = world.acked_wire_bytes;
        world.run(4);
        let through = (world.acked_wire_bytes - before) / 4.0;
        assert!(through > 0.93 * 25e6, "{through}");
    }

    /// Somebody else takes the processors for a second, now and then.
    #[test]
    fn a_moment_without_processors_costs_a_moment() {
        let mut world = World::new(12e6, 380e6);
        world.run(10);
        let (best, before) = (world.best(), world.done_plain_bytes);
        for _ in 0..6 {
            world.speed /= 30.0;
            world.run(1);
            world.speed *= 30.0;
            world.run(9);
        }
        let rate = (world.done_plain_bytes - before) / 60.0;
        assert!(rate > 0.85 * best, "{rate} of {best}");
    }

    #[test]
    fn a_burst_is_let_through_before_the_next_look_at_the_backlog() {
        let mut world = World::new(6e6, 380e6);
        world.run(10);
        let levels = |control: &LevelControl| {
            [1 << 20, 20 << 20, 900 << 20].map(|waiting| control.poll_step(waiting).level())
        };
        assert_eq!(
            levels(&world.control),
            [Some(9), Some(6), Some(1)],
            "the link has enough to do"
        );
        world.control.fed_since = None;
        assert_eq!(levels(&world.control), [Some(9), Some(6), None]);
    }

    /// Saving bytes may be why the link is no bottleneck any more: giving up is tried more and more
    /// rarely.
    #[test]
    fn a_link_that_was_no_bottleneck_for_long_is_none() {
        let start = Instant::now();
        let mut control = LevelControl::new(2, 64 << 20);
        let mut now = start;
        let mut run = |control: &mut LevelControl, link_bytes: u64| {
            let limited = control.link_limits();
            let since = now;
            while control.link_limits() == limited {
                now += Duration::from_millis(250);
                let acked_wire_bytes = (now - start).as_millis() as u64 * 1000;
                let backlog = Backlog { link_bytes, acked_wire_bytes, ..Backlog::default() };
                control.handle_backlog(now, backlog);
            }
            (now - since).as_secs()
        };
        assert!(control.link_limits(), "unknown as yet");
        assert_eq!(run(&mut control, 0), 2);
        assert_eq!(run(&mut control, 30 << 20), 1);
        assert_eq!(run(&mut control, 0), 4);
        assert_eq!(run(&mut control, 30 << 20), 1);
        assert_eq!(run(&mut control, 0), 8);
    }

    #[test]
    fn a_short_link_is_taken_for_a_fast_one_until_it_is_measured() {
        let mut world = World::new(12e6, 380e6);
        world.control.handle_connected(true);
        assert_eq!((world.control.step().level(), world.control.link_limits()), (None, false));
        world.run(5);
        assert!(world.control.link_limits() && world.control.step().level() >= Some(6));
        let step = world.control.step();
        world.control.handle_connected(true);
        assert_eq!(world.control.step(), step, "it is known now");
    }

    #[test]
    fn without_a_link_nothing_is_concluded() {
        let mut world = World::new(25e6, 380e6);
        world.run(10);
        let step = world.control.step();
        world.control.handle_disconnected();
        let full = Backlog { encoder_bytes: 0, link_bytes: 32 << 20, ..Backlog::default() };
        world.control.handle_backlog(world.now + Duration::from_secs(60), full);
        assert_eq!(world.control.step(), step);
    }
}
