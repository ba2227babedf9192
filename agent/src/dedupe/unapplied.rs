//! Where the target's images may not be as the protected disks are. Pure.
//!
//! A guest's write is on its disk before its batch is even sealed, and on the image only once the target has applied
//! that. In between the disk says what the image does not hold. For every leaf it is known which batch wrote to it
//! last; a table of fixed size holds that, in which leaves that share a slot count as one: that finds too little
//! unapplied never, and too much now and then.

use std::ops::Range;

use backhaul_proto::batch::{BatchKind, PlainBatch, RecordKind, Reference};
use backhaul_proto::id::{BatchSeq, DiskIndex};
use backhaul_proto::limits::{DISKS_MAX, LEAF_BYTES};

use super::{PIECE_BYTES, Place};

/// A megabyte of memory, for 4 GiB that are written between points.
const SLOTS: u64 = 64 << 10;

const LEAF: u64 = LEAF_BYTES as u64;

/// The last batch that wrote to each leaf.
#[derive(Debug, Default)]
pub(super) struct Unapplied {
    ordered: LastWrites,
    sync: LastWrites,
    /// Every batch up to here is on stable storage.
    durable: BatchSeq,
    /// Every batch up to here is on the images.
    applied: BatchSeq,
}

/// Of batches of one kind.
#[derive(Debug, Default)]
struct LastWrites {
    newest: BatchSeq,
    /// Empty until the first use: an agent whose link is fast never needs it.
    slots: Vec<BatchSeq>,
}

impl LastWrites {
    fn handle_written(&mut self, slots: impl Iterator<Item = usize>, batch: BatchSeq) {
        self.newest = self.newest.max(batch);
        if self.slots.is_empty() {
            return;
        }
        for slot in slots {
            self.slots[slot] = self.slots[slot].max(batch);
        }
    }

    /// What was written before this may be anywhere.
    fn begin(&mut self) {
        if self.slots.is_empty() {
            self.slots = vec![self.newest; SLOTS as usize];
        }
    }

    fn last(&self, slot: usize) -> BatchSeq {
        self.slots.get(slot).copied().unwrap_or(self.newest)
    }
}

/// The slots of the leaves that a range touches.
fn slots(disk: DiskIndex, offset_bytes: u64, len_bytes: u32) -> impl Iterator<Item = usize> {
    let first = offset_bytes / LEAF;
    let last = offset_bytes.saturating_add(len_bytes.saturating_sub(1).into()) / LEAF;
    // The same places of two disks do not share one.
    let shift = u64::from(disk.0) * (SLOTS / DISKS_MAX as u64);
    (first..=last).map(move |leaf| ((leaf + shift) % SLOTS) as usize)
}

impl Unapplied {
    /// A batch was sealed; they come in their order.
    pub(super) fn handle_sealed(&mut self, batch: &PlainBatch) {
        let writes = match batch.kind {
            BatchKind::Ordered => &mut self.ordered,
            BatchKind::Sync => &mut self.sync,
        };
        for record in &batch.records {
            let (RecordKind::Data { offset_bytes, len_bytes }
            | RecordKind::Zero { offset_bytes, len_bytes, .. }) = record.kind
            else {
                continue;
            };
            writes.handle_written(slots(record.disk, offset_bytes, len_bytes), batch.batch);
        }
    }

    /// The target holds these batches. What it says of batches that it does not hold is not believed.
    pub(super) fn handle_acked(&mut self, durable: BatchSeq, applied: BatchSeq) {
        self.durable = self.durable.max(durable);
        self.applied = self.applied.max(applied).min(self.durable);
    }

    /// The images did not hold what these refer to. They do once all that was sealed is applied.
    pub(super) fn handle_unresolved(&mut self, references: &[Reference]) {
        self.begin();
        for one in references {
            let slots = slots(one.disk, one.offset_bytes, one.len_bytes);
            let newest = self.ordered.newest.max(self.sync.newest);
            self.ordered.handle_written(slots, newest);
        }
    }

    /// Content is going to be known: from now on every write is.
    pub(super) fn begin(&mut self) {
        self.ordered.begin();
        self.sync.begin();
    }

    /// Where the image is as the disk was a moment ago, around a place and within its piece. What a sync sent is on
    /// the image when it is acknowledged; ordered batches may wait in the journal up to the newest point.
    pub(super) fn applied_around(&self, place: Place) -> Range<u64> {
        let is_applied = |offset_bytes: u64| {
            slots(place.disk, offset_bytes, 1).all(|slot| {
                self.ordered.last(slot) <= self.applied && self.sync.last(slot) <= self.durable
            })
        };
        let piece = place.offset_bytes / PIECE_BYTES * PIECE_BYTES;
        let leaf = place.offset_bytes / LEAF * LEAF;
        let (mut start, mut end) = (leaf, leaf);
        while end < piece + PIECE_BYTES && is_applied(end) {
            end += LEAF;
        }
        while end > leaf && start > piece && is_applied(start - LEAF) {
            start -= LEAF;
        }
        start..end
    }
}

#[cfg(test)]
mod tests {
    use backhaul_proto::batch::{BatchKind, PlainBatch, Record, RecordKind, Reference};
    use backhaul_proto::id::{BatchSeq, DiskIndex, Generation, WriteSeq};

    use super::{LEAF, Place, SLOTS, Unapplied};

    const DISK: DiskIndex = DiskIndex(63);

    fn at(leaf: u64) -> Place {
        Place { disk: DISK, offset_bytes: leaf * LEAF }
    }

    fn is_applied(unapplied: &Unapplied, place: Place) -> bool {
        unapplied.applied_around(place).contains(&place.offset_bytes)
    }

    /// Zeroes from one leaf up to another one.
    fn written(kind: BatchKind, batch: u64, from: u64, to: u64) -> PlainBatch {
        let offset_bytes = from * LEAF;
        let len_bytes = u32::try_from((to - from) * LEAF).unwrap();
        let kinds = RecordKind::Zero { offset_bytes, len_bytes, may_unmap: false };
        PlainBatch {
            kind,
            generation: Generation(1),
            batch: BatchSeq(batch),
            first_write: WriteSeq(batch),
            captured_at_us: 0,
            records: vec![Record { disk: DISK, kind: kinds }],
            data_bytes: 0,
            data: Vec::new(),
        }
    }

    fn ordered(batch: u64, leaf: u64) -> PlainBatch {
        written(BatchKind::Ordered, batch, leaf, leaf + 1)
    }

    #[test]
    fn a_write_of_a_guest_is_there_once_it_is_applied() {
        let mut unapplied = Unapplied::default();
        unapplied.begin();
        unapplied.handle_sealed(&ordered(5, 7));
        assert!(!is_applied(&unapplied, at(7)) && is_applied(&unapplied, at(6)));
        assert!(is_applied(&unapplied, at(8)));
        let elsewhere = Place { disk: DiskIndex(62), ..at(7) };
        assert!(is_applied(&unapplied, elsewhere));
        unapplied.handle_acked(BatchSeq(4), BatchSeq(5));
        assert!(!is_applied(&unapplied, at(7)), "applied before it was durable");
        unapplied.handle_acked(BatchSeq(9), BatchSeq(4));
        assert!(!is_applied(&unapplied, at(7)), "it may wait in the journal");
        unapplied.handle_acked(BatchSeq(9), BatchSeq(5));
        assert!(is_applied(&unapplied, at(7)));
        unapplied.handle_acked(BatchSeq(10), BatchSeq(0));
        assert!(is_applied(&unapplied, at(7)), "a target that does not say takes nothing back");
        unapplied.handle_sealed(&ordered(11, 7));
        assert!(!is_applied(&unapplied, at(7)), "it was written over");
    }

    /// A piece of which one block had just been written was refused as a whole, which, while a guest wrote all over
    /// its disk, was all of it.
    #[test]
    fn what_is_applied_reaches_up_to_what_is_not_and_not_beyond_its_piece() {
        let mut unapplied = Unapplied::default();
        unapplied.begin();
        let inside = Place { offset_bytes: 20 * LEAF + 4096, ..at(0) };
        assert_eq!(unapplied.applied_around(inside), 16 * LEAF..32 * LEAF);
        unapplied.handle_sealed(&ordered(5, 17));
        unapplied.handle_sealed(&ordered(6, 24));
        assert_eq!(unapplied.applied_around(inside), 18 * LEAF..24 * LEAF);
        assert_eq!(unapplied.applied_around(at(16)), 16 * LEAF..17 * LEAF);
        assert_eq!(unapplied.applied_around(at(17)), 17 * LEAF..17 * LEAF);
        assert_eq!(unapplied.applied_around(at(31)), 25 * LEAF..32 * LEAF);
    }

    #[test]
    fn what_a_sync_sent_is_there_when_it_is_durable() {
        let mut unapplied = Unapplied::default();
        unapplied.begin();
        unapplied.handle_sealed(&written(BatchKind::Sync, 3, 2, 4));
        assert!(!is_applied(&unapplied, at(2)) && !is_applied(&unapplied, at(3)));
        unapplied.handle_acked(BatchSeq(3), BatchSeq(0));
        assert!(is_applied(&unapplied, at(2)) && is_applied(&unapplied, at(3)));
    }

    /// Before the index is used, nobody wrote down what was written where.
    #[test]
    fn what_was_written_before_the_beginning_may_be_anywhere() {
        let mut unapplied = Unapplied::default();
        unapplied.handle_sealed(&ordered(5, 7));
        unapplied.begin();
        unapplied.handle_acked(BatchSeq(5), BatchSeq(4));
        assert!(!is_applied(&unapplied, at(123)));
        unapplied.handle_acked(BatchSeq(5), BatchSeq(5));
        assert!(is_applied(&unapplied, at(123)));
    }

    #[test]
    fn a_place_that_proved_wrong_is_tried_again_when_all_is_applied() {
        let mut unapplied = Unapplied::default();
        unapplied.begin();
        unapplied.handle_sealed(&ordered(8, 1));
        unapplied.handle_acked(BatchSeq(7), BatchSeq(7));
        assert!(is_applied(&unapplied, at(9)));
        let wrong = Reference { at_bytes: 0, len_bytes: 4096, disk: DISK, offset_bytes: 9 * LEAF };
        unapplied.handle_unresolved(&[wrong]);
        assert!(!is_applied(&unapplied, at(9)) && is_applied(&unapplied, at(10)));
        unapplied.handle_acked(BatchSeq(8), BatchSeq(8));
        assert!(is_applied(&unapplied, at(9)));
    }

    #[test]
    fn a_large_record_is_all_of_its_leaves() {
        let mut unapplied = Unapplied::default();
        unapplied.begin();
        unapplied.handle_sealed(&written(BatchKind::Ordered, 2, 100, 4195));
        let found: Vec<_> = (0..SLOTS).filter(|leaf| !is_applied(&unapplied, at(*leaf))).collect();
        assert_eq!(found, Vec::from_iter(100..4195));
        let mut beyond = written(BatchKind::Ordered, 3, 0, 1);
        let (offset_bytes, len_bytes) = (u64::MAX - 1, u32::MAX);
        beyond.records[0].kind = RecordKind::Zero { offset_bytes, len_bytes, may_unmap: true };
        unapplied.handle_sealed(&beyond);
    }
}
