//! Where content is that the target's images hold: a table of fixed size. Pure.
//!
//! A sync's batches are on the images when they are acknowledged. Ordered ones may wait in the target's journal long
//! after that, up to its newest point: they are found once the target says that they are applied.
//!
//! A hash leads to one bucket; the newest entry of a bucket displaces its oldest. So the memory is
//! what was configured, from the first entry on, and a lookup is one cache miss.

use backhaul_proto::batch::{BatchKind, Reference};
use backhaul_proto::id::{BatchSeq, DiskIndex, Generation};

/// Entries of a bucket: 128 bytes, two cache lines.
const WAYS: usize = 8;

/// Where a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The disk.
    pub disk: DiskIndex,
    /// Where on it.
    pub offset_bytes: u64,
}

/// The batch that content was sent in.
#[derive(Debug, Clone, Copy)]
pub(super) struct SentIn {
    pub(super) batch: BatchSeq,
    pub(super) kind: BatchKind,
}

/// 16 bytes. A disk is smaller than 2^46 bytes, so its index fits above the offset, and a bit above that.
#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    /// The lower half of the hash; the upper half chose the bucket.
    tag: u32,
    /// The batch it was sent in; 0 in an empty entry.
    batch: u32,
    /// [`ORDERED`], disk, offset.
    place: u64,
}

const OFFSET_BITS: u32 = 46;

/// It was sent in an ordered batch.
const ORDERED: u64 = 1 << 63;

impl Entry {
    fn new(tag: u32, place: Place, batch: u32, kind: BatchKind) -> Self {
        let ordered = if kind == BatchKind::Ordered { ORDERED } else { 0 };
        let place = ordered | u64::from(place.disk.0) << OFFSET_BITS | place.offset_bytes;
        Self { tag, batch, place }
    }

    fn place(self) -> Place {
        Place {
            disk: DiskIndex((self.place >> OFFSET_BITS) as u16),
            offset_bytes: self.place & ((1 << OFFSET_BITS) - 1),
        }
    }
}

/// The table, of one generation.
#[derive(Debug)]
pub(super) struct ContentIndex {
    generation: Generation,
    durable: BatchSeq,
    applied: BatchSeq,
    buckets_max: usize,
    /// Empty until the first entry: an agent whose link is fast never needs it.
    buckets: Vec<[Entry; WAYS]>,
}

impl ContentIndex {
    pub(super) fn new(bytes: u64, generation: Generation) -> Self {
        let buckets_max = (bytes / size_of::<[Entry; WAYS]>() as u64) as usize;
        let (durable, applied) = (BatchSeq(0), BatchSeq(0));
        Self { generation, durable, applied, buckets_max, buckets: Vec::new() }
    }

    pub(super) fn is_enabled(&self) -> bool {
        self.buckets_max > 0
    }

    pub(super) fn generation(&self) -> Generation {
        self.generation
    }

    pub(super) fn reset(&mut self, generation: Generation) {
        self.generation = generation;
        (self.durable, self.applied) = (BatchSeq(0), BatchSeq(0));
        self.buckets.fill([Entry::default(); WAYS]);
    }

    pub(super) fn handle_acked(&mut self, durable: BatchSeq, applied: BatchSeq) {
        self.durable = self.durable.max(durable);
        // What is said of batches that were not sent yet is not believed.
        self.applied = self.applied.max(applied).min(self.durable);
    }

    fn bucket_of(&self, hash: u64) -> usize {
        ((u128::from(hash) * self.buckets.len() as u128) >> 64) as usize
    }

    /// Where the images hold content of this hash, if nothing was written over it since.
    pub(super) fn find(&self, hash: u64) -> Option<Place> {
        let bucket = self.buckets.get(self.bucket_of(hash))?;
        let entry = bucket.iter().find(|entry| entry.batch > 0 && entry.tag == hash as u32)?;
        let here = if entry.place & ORDERED == 0 { self.durable } else { self.applied };
        (u64::from(entry.batch) <= here.0).then(|| entry.place())
    }

    /// This content of this place is sent. The place that is known stays, so that runs of blocks stay runs.
    pub(super) fn insert(&mut self, hash: u64, place: Place, sent_in: SentIn) {
        // A generation of more batches than that, years of them, is not deduplicated to its end.
        let Ok(batch) = u32::try_from(sent_in.batch.0) else { return };
        if self.buckets.is_empty() {
            self.buckets = vec![[Entry::default(); WAYS]; self.buckets_max];
        }
        let index = self.bucket_of(hash);
        let Some(bucket) = self.buckets.get_mut(index) else { return };
        let tag = hash as u32;
        if bucket.iter().any(|entry| entry.batch > 0 && entry.tag == tag) {
            return;
        }
        bucket.rotate_right(1);
        bucket[0] = Entry::new(tag, place, batch, sent_in.kind);
    }

    /// The content is not there any more.
    pub(super) fn remove(&mut self, hash: u64, place: Place) {
        let index = self.bucket_of(hash);
        let Some(bucket) = self.buckets.get_mut(index) else { return };
        for entry in bucket {
            if entry.tag == hash as u32 && entry.place() == place {
                *entry = Entry::default();
            }
        }
    }

    /// Forgets every place that these cover. Looks at the whole table: this is rare.
    pub(super) fn forget(&mut self, references: &[Reference]) {
        for entry in self.buckets.as_flattened_mut() {
            let place = entry.place();
            let covers = |one: &Reference| {
                one.disk == place.disk
                    && place.offset_bytes >= one.offset_bytes
                    && place.offset_bytes - one.offset_bytes < u64::from(one.len_bytes)
            };
            if references.iter().any(covers) {
                *entry = Entry::default();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use backhaul_proto::batch::{BatchKind, Reference};
    use backhaul_proto::id::{BatchSeq, DiskIndex, Generation};

    use super::{ContentIndex, Place, SentIn};

    fn place(block: u64) -> Place {
        Place { disk: DiskIndex(63), offset_bytes: block * 4096 }
    }

    fn sync(batch: u64) -> SentIn {
        SentIn { batch: BatchSeq(batch), kind: BatchKind::Sync }
    }

    fn hash(of: u64) -> u64 {
        u64::from_le_bytes(blake3::hash(&of.to_le_bytes()).as_bytes()[..8].try_into().unwrap())
    }

    #[test]
    fn only_what_is_acknowledged_is_found() {
        let mut index = ContentIndex::new(1 << 20, Generation(1));
        assert_eq!(index.find(hash(1)), None);
        let last = Place { disk: DiskIndex(63), offset_bytes: (62 << 40) - 4096 };
        index.insert(hash(1), last, sync(5));
        index.handle_acked(BatchSeq(4), BatchSeq(0));
        assert_eq!(index.find(hash(1)), None);
        index.handle_acked(BatchSeq(5), BatchSeq(0));
        assert_eq!(index.find(hash(1)), Some(last));
        index.insert(hash(1), place(8), sync(6));
        assert_eq!(index.find(hash(1)), Some(last), "the first place stays");
        index.reset(Generation(2));
        index.handle_acked(BatchSeq(9), BatchSeq(0));
        assert_eq!(index.find(hash(1)), None);
    }

    /// What guests wrote was never referred to: it may wait in the journal, where a read of the image misses it.
    #[test]
    fn what_a_guest_wrote_is_found_once_it_is_applied() {
        let mut index = ContentIndex::new(1 << 20, Generation(1));
        let last = Place { disk: DiskIndex(u16::MAX), offset_bytes: (1 << 46) - 4096 };
        let ordered = SentIn { batch: BatchSeq(5), kind: BatchKind::Ordered };
        index.insert(hash(1), last, ordered);
        index.handle_acked(BatchSeq(4), BatchSeq(5));
        assert_eq!(index.find(hash(1)), None, "applied before it was durable");
        index.handle_acked(BatchSeq(9), BatchSeq(4));
        assert_eq!(index.find(hash(1)), None, "it may wait in the journal");
        index.handle_acked(BatchSeq(9), BatchSeq(5));
        assert_eq!(index.find(hash(1)), Some(last));
        index.handle_acked(BatchSeq(10), BatchSeq(0));
        assert_eq!(
            index.find(hash(1)),
            Some(last),
            "a target that does not say takes nothing back"
        );
        index.remove(hash(1), last);
        assert_eq!(index.find(hash(1)), None);
    }

    #[test]
    fn the_newest_entries_fit_into_the_bound() {
        let mut index = ContentIndex::new(1 << 20, Generation(1));
        for of in 0..200_000 {
            index.insert(hash(of), place(of), sync(1));
        }
        assert_eq!(size_of_val(&index.buckets[..]), 1 << 20);
        index.handle_acked(BatchSeq(1), BatchSeq(0));
        let found = |range: std::ops::Range<u64>| {
            range.filter(|of| index.find(hash(*of)) == Some(place(*of))).count()
        };
        // 65,536 entries have room; the last 30,000 are all but certainly among them.
        assert!(found(170_000..200_000) > 29_000);
        assert!(found(0..30_000) < 1_000);
        index.buckets_max = 0;
        assert!(!index.is_enabled());
    }

    #[test]
    fn what_proved_wrong_is_forgotten() {
        let mut index = ContentIndex::new(1 << 20, Generation(1));
        for of in 0..100 {
            index.insert(hash(of), place(of), sync(1));
        }
        index.handle_acked(BatchSeq(1), BatchSeq(0));
        index.remove(hash(3), place(4));
        assert!(index.find(hash(3)).is_some());
        index.remove(hash(3), place(3));
        assert_eq!(index.find(hash(3)), None);
        let (at_bytes, len_bytes, disk) = (0, 8192, DiskIndex(63));
        index.forget(&[Reference { at_bytes, len_bytes, disk, offset_bytes: 10 * 4096 }]);
        let left: Vec<_> = (8..14).filter(|of| index.find(hash(*of)).is_some()).collect();
        assert_eq!(left, [8, 9, 12, 13]);
    }
}
