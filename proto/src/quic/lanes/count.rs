//! How many connections a link should use.

/// Most connections of a link: each has a congestion controller of its own, and all but the first an
/// eighth of the first one's receive window.
pub const CONNECTIONS_MAX: usize = 8;

/// A driver that is at work for this share of the time is the limit. Short of all of it: between two
/// packets it waits for its socket and its locks.
const BUSY_SHARE: f64 = 0.8;

/// So many seconds in a row make it one that lasts.
const BUSY_SECONDS: u32 = 3;

/// Were one connection fewer to have the work, and each be at it for less than this share of the
/// time, one is not needed.
const CALM_SHARE: f64 = 0.5;

/// So many seconds in a row: what comes and goes with the guests' writes must not be followed.
const CALM_SECONDS: u32 = 30;

/// How many connections a link is given.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Connections {
    /// One, and more of them while the driver of one is what limits it and there are cores for more.
    #[default]
    Auto,
    /// So many, at most [`CONNECTIONS_MAX`].
    Exactly(usize),
}

/// Connections that a machine with so many cores is worth: each takes one, and hashing, compressing
/// and the disks take as much again.
pub(super) fn most_for(cores: usize) -> usize {
    (cores / 2).clamp(1, CONNECTIONS_MAX)
}

/// Decides how many connections are used.
#[derive(Debug)]
pub(super) struct LaneCount {
    fixed: Option<usize>,
    count: usize,
    busy_seconds: u32,
    calm_seconds: u32,
}

impl LaneCount {
    pub(super) fn new(choice: Connections) -> Self {
        let fixed = match choice {
            Connections::Auto => None,
            Connections::Exactly(count) => Some(count.clamp(1, CONNECTIONS_MAX)),
        };
        Self { fixed, count: fixed.unwrap_or(1), busy_seconds: 0, calm_seconds: 0 }
    }

    /// How many there should be, now that another second is over. `busiest` is the largest share of
    /// that second for which a driver, at either end, was at work; `most` is what the cores at both
    /// ends are worth; `standing` is how many there are.
    pub(super) fn handle_second(&mut self, busiest: f64, most: usize, standing: usize) -> usize {
        if let Some(fixed) = self.fixed {
            return fixed;
        }
        // What could not be opened does not count.
        self.count = self.count.min(standing.max(1));
        let fewer = self.count.saturating_sub(1);
        let is_calm = fewer > 0 && busiest * self.count as f64 / (fewer as f64) < CALM_SHARE;
        self.busy_seconds = if busiest >= BUSY_SHARE { self.busy_seconds + 1 } else { 0 };
        self.calm_seconds = if is_calm { self.calm_seconds + 1 } else { 0 };
        if self.busy_seconds >= BUSY_SECONDS {
            self.count += 1;
            self.busy_seconds = 0;
        } else if self.calm_seconds >= CALM_SECONDS {
            self.count = fewer;
            self.calm_seconds = 0;
        }
        self.count = self.count.clamp(1, most.clamp(1, CONNECTIONS_MAX));
        self.count
    }
}

#[cfg(test)]
mod tests {
    use super::{CALM_SECONDS, CONNECTIONS_MAX, Connections, LaneCount, most_for};

    fn after(count: &mut LaneCount, seconds: u32, busiest: f64, most: usize) -> usize {
        let mut standing = 1;
        for _ in 0..seconds {
            standing = standing.max(count.count);
            standing = count.handle_second(busiest, most, standing).max(standing);
        }
        count.count
    }

    #[test]
    fn one_more_after_every_three_busy_seconds_up_to_what_the_cores_are_worth() {
        let mut count = LaneCount::new(Connections::Auto);
        assert_eq!(after(&mut count, 2, 0.95, 4), 1);
        assert_eq!(after(&mut count, 1, 0.95, 4), 2);
        assert_eq!(after(&mut count, 3, 0.95, 4), 3);
        assert_eq!(after(&mut count, 60, 0.95, 4), 4);
        assert_eq!(after(&mut count, 60, 0.95, 99), CONNECTIONS_MAX);
    }

    #[test]
    fn busy_seconds_count_in_a_row_only() {
        let mut count = LaneCount::new(Connections::Auto);
        for _ in 0..20 {
            assert_eq!(after(&mut count, 2, 1.0, 8), 1);
            assert_eq!(after(&mut count, 1, 0.7, 8), 1);
        }
    }

    #[test]
    fn one_fewer_when_the_others_would_be_half_idle_for_long() {
        let mut count = LaneCount::new(Connections::Auto);
        after(&mut count, 6, 1.0, 8);
        assert_eq!(after(&mut count, 10 * CALM_SECONDS, 0.5, 8), 3, "0.75 each, were they two");
        assert_eq!(after(&mut count, CALM_SECONDS - 1, 0.3, 8), 3);
        assert_eq!(after(&mut count, 1, 0.3, 8), 2);
        assert_eq!(after(&mut count, 10 * CALM_SECONDS, 0.3, 8), 2, "0.6, were it one");
        assert_eq!(after(&mut count, 10 * CALM_SECONDS, 0.0, 8), 1);
    }

    #[test]
    fn a_machine_of_few_cores_has_one_and_a_number_is_a_number() {
        assert_eq!([1, 2, 3, 4, 8, 128].map(most_for), [1, 1, 1, 2, 4, CONNECTIONS_MAX]);
        let mut count = LaneCount::new(Connections::Auto);
        assert_eq!(after(&mut count, 60, 1.0, most_for(2)), 1);
        assert_eq!(LaneCount::new(Connections::Exactly(3)).handle_second(0.0, 1, 1), 3);
        assert_eq!(
            LaneCount::new(Connections::Exactly(99)).handle_second(0.0, 1, 1),
            CONNECTIONS_MAX
        );
    }
}
