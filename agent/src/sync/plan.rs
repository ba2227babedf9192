//! Which regions the sync takes next, and what it asks the target. Pure.

use std::collections::{BTreeMap, VecDeque};

use backhaul_proto::id::DiskIndex;
use backhaul_proto::limits::{BLOCK_BYTES, REGION_BYTES};

use crate::capture::Order;

/// Blocks of a region.
const REGION_BLOCKS: u64 = (REGION_BYTES / BLOCK_BYTES) as u64;
/// Regions in one request: 64 MiB of disk, a few tens of milliseconds of hashing.
const REGIONS_PER_REQUEST: u32 = 16;
/// Regions asked for or answered and not dealt with yet: 512 MiB of disk keep the target's hashing
/// ahead of this end's reading, for 40 bytes of memory each.
const REGIONS_AHEAD_MAX: usize = 128;

/// A region of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionRef {
    /// The disk.
    pub disk: DiskIndex,
    /// The region's number.
    pub region: u64,
}

/// What is known of the target's content of a region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Known {
    /// Nothing: send every dirty block.
    Nothing,
    /// It reads as zeroes throughout.
    Zero,
    /// The hash over its leaf hashes.
    Root([u8; 32]),
    /// Its leaf hashes.
    Leaves(Vec<[u8; 32]>),
}

/// A question to the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Question {
    /// Comes back with the answer.
    pub request: u64,
    /// First region.
    pub first: RegionRef,
    /// How many.
    pub regions: u32,
    /// With leaf hashes.
    pub leaves: bool,
}

/// The state of a sync.
#[derive(Debug)]
pub struct Plan {
    compare: bool,
    connected: bool,
    /// Where the search for dirty regions goes on, as disk and block.
    cursor: (usize, u64),
    next_request: u64,
    asked: BTreeMap<u64, (Question, u64)>,
    /// Regions whose root differs, which need their leaves.
    leaves_wanted: VecDeque<RegionRef>,
    /// Regions ready to be dealt with, and [`Order::uncaptured`] when they were asked for.
    ready: VecDeque<(RegionRef, Known, u64)>,
}

impl Plan {
    /// A sync that compares before it sends, or not.
    pub fn new(compare: bool) -> Self {
        Self {
            compare,
            connected: false,
            cursor: (0, 0),
            next_request: 1,
            asked: BTreeMap::new(),
            leaves_wanted: VecDeque::new(),
            ready: VecDeque::new(),
        }
    }

    /// A connection is up: questions can be asked.
    pub fn handle_connected(&mut self) {
        self.connected = true;
    }

    /// The connection is gone, and with it every answer that had not come.
    pub fn handle_disconnected(&mut self) {
        self.connected = false;
        for (_, (question, _)) in std::mem::take(&mut self.asked) {
            if question.leaves {
                self.leaves_wanted.push_back(question.first);
            } else {
                // The search starts over; what was dealt with meanwhile is clean and is skipped.
                self.cursor = (0, 0);
            }
        }
        if self.cursor == (0, 0) {
            self.ready.clear();
            self.leaves_wanted.clear();
        }
    }

    fn ahead(&self) -> usize {
        let asked: usize = self.asked.values().map(|(question, _)| question.regions as usize).sum();
        asked + self.ready.len() + self.leaves_wanted.len()
    }

    /// The next question, if there is one to ask now.
    pub fn poll_question(&mut self, order: &Order, disks: usize) -> Option<Question> {
        if !self.compare || !self.connected {
            return None;
        }
        let request = self.next_request;
        let question = if let Some(first) = self.leaves_wanted.pop_front() {
            Question { request, first, regions: 1, leaves: true }
        } else {
            if self.ahead() + REGIONS_PER_REQUEST as usize > REGIONS_AHEAD_MAX {
                return None;
            }
            let (first, regions) = self.next_dirty_regions(order, disks)?;
            Question { request, first, regions, leaves: false }
        };
        self.next_request += 1;
        self.asked.insert(request, (question, order.uncaptured()));
        Some(question)
    }

    /// The target's answer: a hash for each region (empty for zeroes), or for each leaf.
    /// Answers to questions that a reconnect made void are ignored.
    pub fn handle_answer(&mut self, request: u64, hashes: &[impl AsRef<[u8]>]) {
        let Some((question, uncaptured)) = self.asked.remove(&request) else { return };
        let full = |hash: &[u8]| <[u8; 32]>::try_from(hash).ok();
        if question.leaves {
            let leaves = hashes.iter().map(|hash| full(hash.as_ref())).collect::<Option<Vec<_>>>();
            let known = leaves.map_or(Known::Nothing, Known::Leaves);
            self.ready.push_back((question.first, known, uncaptured));
            return;
        }
        for index in 0..u64::from(question.regions) {
            let known = match hashes.get(index as usize).map(AsRef::as_ref) {
                Some([]) => Known::Zero,
                Some(hash) => full(hash).map_or(Known::Nothing, Known::Root),
                None => Known::Nothing,
            };
            let region = question.first.region + index;
            self.ready.push_back((RegionRef { region, ..question.first }, known, uncaptured));
        }
    }

    /// The next region to deal with.
    pub fn poll_region(&mut self, order: &Order, disks: usize) -> Option<(RegionRef, Known)> {
        if let Some((region, known, uncaptured)) = self.ready.pop_front() {
            let stale = uncaptured != order.uncaptured();
            return Some((region, if stale { Known::Nothing } else { known }));
        }
        if self.compare {
            return None;
        }
        let (region, _) = self.next_dirty_regions(order, disks)?;
        // One at a time: blocks become dirty and clean while the others would wait.
        self.cursor.1 = (region.region + 1) * REGION_BLOCKS;
        Some((region, Known::Nothing))
    }

    /// The region's root differed: its leaves are needed.
    pub fn handle_differs(&mut self, region: RegionRef) {
        self.leaves_wanted.push_back(region);
    }

    /// Whether the search has reached the end and nothing is on its way: what is still dirty (it
    /// became so behind the search, or could not be read) needs another pass.
    pub fn is_pass_over(&self, disks: usize) -> bool {
        self.cursor.0 >= disks && self.ahead() == 0
    }

    /// Starts the search over.
    pub fn restart(&mut self) {
        self.cursor = (0, 0);
    }

    /// The next run of regions that have dirty blocks, from the cursor on; moves the cursor.
    fn next_dirty_regions(&mut self, order: &Order, disks: usize) -> Option<(RegionRef, u32)> {
        while self.cursor.0 < disks {
            let disk = DiskIndex(self.cursor.0 as u16);
            let map = order.dirty(disk);
            let Some(block) = map.next_dirty(self.cursor.1) else {
                self.cursor = (self.cursor.0 + 1, 0);
                continue;
            };
            let region = block / REGION_BLOCKS;
            let mut regions = 1;
            while regions < REGIONS_PER_REQUEST {
                let next = (region + u64::from(regions)) * REGION_BLOCKS;
                let dirty = map.next_dirty(next).is_some_and(|at| at < next + REGION_BLOCKS);
                if !dirty {
                    break;
                }
                regions += 1;
            }
            self.cursor.1 = (region + u64::from(regions)) * REGION_BLOCKS;
            return Some((RegionRef { disk, region }, regions));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use backhaul_proto::id::{DiskIndex, Generation, PointId};

    use super::{Known, Plan, RegionRef};
    use crate::capture::{Order, OrderOptions};

    fn order() -> Order {
        let options = OrderOptions { queue_bytes_max: 1 << 20 };
        Order::new(options, Generation(1), &[40 << 20, 8 << 20], PointId(0), 0)
    }

    #[test]
    fn asks_for_roots_then_for_the_leaves_of_those_that_differ() {
        let order = order();
        let mut plan = Plan::new(true);
        assert_eq!(plan.poll_question(&order, 2), None, "not connected");
        plan.handle_connected();
        let first = plan.poll_question(&order, 2).unwrap();
        assert_eq!((first.regions, first.leaves), (10, false));
        let second = plan.poll_question(&order, 2).unwrap();
        assert_eq!(second.first, RegionRef { disk: DiskIndex(1), region: 0 });
        assert_eq!(plan.poll_question(&order, 2), None);
        let mut hashes = vec![vec![7; 32]; 10];
        hashes[1].clear();
        plan.handle_answer(first.request, &hashes);
        let (region, known) = plan.poll_region(&order, 2).unwrap();
        assert_eq!(known, Known::Root([7; 32]));
        plan.handle_differs(region);
        assert_eq!(plan.poll_region(&order, 2).unwrap().1, Known::Zero);
        let leaves = plan.poll_question(&order, 2).unwrap();
        assert!(leaves.leaves && leaves.first == region && !plan.is_pass_over(2));
    }

    #[test]
    fn a_disconnect_forgets_answers_on_their_way_and_asks_again() {
        let order = order();
        let mut plan = Plan::new(true);
        plan.handle_connected();
        let first = plan.poll_question(&order, 2).unwrap();
        plan.handle_disconnected();
        plan.handle_answer(first.request, &[[1; 32]]);
        assert_eq!(plan.poll_region(&order, 2), None);
        plan.handle_connected();
        assert_eq!(plan.poll_question(&order, 2).unwrap().first, first.first);
    }

    #[test]
    fn a_hash_asked_for_before_an_overflow_proves_nothing() {
        let mut order = order();
        let mut plan = Plan::new(true);
        plan.handle_connected();
        let first = plan.poll_question(&order, 2).unwrap();
        order.handle_uncaptured(1, DiskIndex(0), 0, 4096);
        plan.handle_answer(first.request, &vec![Vec::<u8>::new(); 10]);
        assert_eq!(plan.poll_region(&order, 2).unwrap().1, Known::Nothing);
    }

    #[test]
    fn without_comparing_every_dirty_region_comes_up_once() {
        let order = order();
        let mut plan = Plan::new(false);
        let regions = std::iter::from_fn(|| plan.poll_region(&order, 2)).count();
        assert_eq!(regions, 12);
        assert!(plan.is_pass_over(2));
    }
}
