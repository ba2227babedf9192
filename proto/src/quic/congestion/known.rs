//! What a link's earlier connections learned of their path, so that the next one need not begin with
//! nothing: after thirty seconds of dark there is a backlog, and finding the rate of a long line anew
//! takes as long as ten round trips.
//!
//! After Careful Resume (draft-ietf-tsvwg-careful-resume): what was learned is used once, when a first
//! round trip says that the path is about as long as it was, and to one half. The rest is the
//! start-up's to find.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A path is not what it was after so long (the draft leaves it to the implementation).
const AGE_MAX: Duration = Duration::from_mins(5);
/// A first round trip is of the same path when it is at least half and at most ten times as long as
/// the smallest was (the draft's bounds): it may meet a queue.
const RTT_LEAST: f64 = 0.5;
const RTT_MOST: f64 = 10.0;
/// How much of it may be in flight at once (the draft's bound).
const SHARE: f64 = 0.5;

/// What was learned of a path.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct KnownPath {
    /// Its rate, in bytes a second.
    pub(super) rate: f64,
    /// Its smallest round-trip time.
    pub(super) rtt: Duration,
    /// When the rate was last measured with always something to send.
    pub(super) learned_at: Instant,
}

impl KnownPath {
    /// What a connection may have in flight whose first round trip took `rtt`, in bytes; nothing where
    /// that is another path.
    pub(super) fn start_bytes(&self, rtt: Duration) -> f64 {
        let known = self.rtt.as_secs_f64();
        let same = (RTT_LEAST * known..=RTT_MOST * known).contains(&rtt.as_secs_f64());
        if same { self.rate * known * SHARE } else { 0.0 }
    }
}

/// Where the connections of one link, one after the other, leave what they learned.
#[derive(Debug, Clone, Default)]
pub struct PathMemory(Arc<Mutex<Memory>>);

#[derive(Debug, Default)]
struct Memory {
    peer: Option<IpAddr>,
    path: Option<KnownPath>,
}

impl PathMemory {
    /// The next connection is to `peer`: a name may have another address by now, and what was learned of
    /// the way to the old one is forgotten.
    pub(crate) fn expect(&self, peer: IpAddr) {
        let mut memory = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if memory.peer.replace(peer) != Some(peer) {
            memory.path = None;
        }
    }

    /// What is known and not too old.
    pub(super) fn recall(&self, now: Instant) -> Option<KnownPath> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner).path;
        known.filter(|path| now.saturating_duration_since(path.learned_at) <= AGE_MAX)
    }

    pub(super) fn keep(&self, path: KnownPath) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).path = Some(path);
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{AGE_MAX, KnownPath, PathMemory};

    #[test]
    fn half_of_what_was_learned_is_used_where_the_path_is_about_as_long() {
        let rtt = Duration::from_millis(100);
        let path = KnownPath { rate: 1e7, rtt, learned_at: Instant::now() };
        for (millis, start_bytes) in [(49, 0.0), (51, 5e5), (100, 5e5), (999, 5e5), (1001, 0.0)] {
            let rtt = Duration::from_millis(millis);
            assert_eq!(path.start_bytes(rtt), start_bytes, "{millis} ms");
        }
    }

    /// The line of an hour ago may be somebody else's by now.
    #[test]
    fn what_is_old_is_forgotten() {
        let (memory, now) = (PathMemory::default(), Instant::now());
        assert_eq!(memory.recall(now), None);
        let path = KnownPath { rate: 1e7, rtt: Duration::from_millis(9), learned_at: now };
        memory.clone().keep(path);
        assert_eq!(memory.recall(now + AGE_MAX), Some(path));
        assert_eq!(memory.recall(now + AGE_MAX + Duration::from_secs(1)), None);
    }

    /// The target's name leads to the backup line now.
    #[test]
    fn the_way_to_another_address_is_another_path() {
        let (memory, now) = (PathMemory::default(), Instant::now());
        let [one, other] = ["192.0.2.1", "192.0.2.2"].map(|peer| peer.parse().unwrap());
        memory.expect(one);
        let path = KnownPath { rate: 1e7, rtt: Duration::from_millis(9), learned_at: now };
        memory.keep(path);
        memory.expect(one);
        assert_eq!(memory.recall(now), Some(path));
        memory.expect(other);
        assert_eq!(memory.recall(now), None);
    }
}
