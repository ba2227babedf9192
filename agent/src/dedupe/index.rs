//! Where content is that was sent: a table of fixed size. Pure.
//!
//! A hash leads to one bucket; the newest entry of a bucket displaces its oldest. So the memory is
//! what was configured, from the first entry on, and a lookup is one cache miss.

use backhaul_proto::id::DiskIndex;

use super::Place;

/// Entries of a bucket: 128 bytes, two cache lines.
const WAYS: usize = 8;

/// 16 bytes. A disk is smaller than 2^46 bytes, so its index fits above the offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    hash: u64,
    place: u64,
}

const OFFSET_BITS: u32 = 46;

impl Entry {
    /// Of no disk.
    const EMPTY: Self = Self { hash: 0, place: u64::MAX };

    fn new(hash: u64, place: Place) -> Self {
        Self { hash, place: u64::from(place.disk.0) << OFFSET_BITS | place.offset_bytes }
    }

    fn place(self) -> Place {
        Place {
            disk: DiskIndex((self.place >> OFFSET_BITS) as u16),
            offset_bytes: self.place & ((1 << OFFSET_BITS) - 1),
        }
    }

    fn is(self, hash: u64) -> bool {
        self.hash == hash && self != Self::EMPTY
    }
}

/// The table.
#[derive(Debug)]
pub(super) struct ContentIndex {
    buckets_max: usize,
    /// Empty until the first entry: an agent whose link is fast never needs it.
    buckets: Vec<[Entry; WAYS]>,
}

impl ContentIndex {
    pub(super) fn new(bytes: u64) -> Self {
        let buckets_max = (bytes / size_of::<[Entry; WAYS]>() as u64) as usize;
        Self { buckets_max, buckets: Vec::new() }
    }

    pub(super) fn is_enabled(&self) -> bool {
        self.buckets_max > 0
    }

    pub(super) fn clear(&mut self) {
        self.buckets.fill([Entry::EMPTY; WAYS]);
    }

    fn bucket_of(&self, hash: u64) -> usize {
        ((u128::from(hash) * self.buckets.len() as u128) >> 64) as usize
    }

    /// Where content of this hash was.
    pub(super) fn find(&self, hash: u64) -> Option<Place> {
        let bucket = self.buckets.get(self.bucket_of(hash))?;
        bucket.iter().find(|entry| entry.is(hash)).map(|entry| entry.place())
    }

    /// This content of this place is sent. The place that is known stays, so that runs of blocks stay runs.
    pub(super) fn insert(&mut self, hash: u64, place: Place) {
        if self.buckets.is_empty() {
            self.buckets = vec![[Entry::EMPTY; WAYS]; self.buckets_max];
        }
        let index = self.bucket_of(hash);
        let Some(bucket) = self.buckets.get_mut(index) else { return };
        if bucket.iter().any(|entry| entry.is(hash)) {
            return;
        }
        bucket.rotate_right(1);
        bucket[0] = Entry::new(hash, place);
    }

    /// The content is not there any more.
    pub(super) fn remove(&mut self, hash: u64, place: Place) {
        let index = self.bucket_of(hash);
        let Some(bucket) = self.buckets.get_mut(index) else { return };
        for entry in bucket.iter_mut().filter(|entry| **entry == Entry::new(hash, place)) {
            *entry = Entry::EMPTY;
        }
    }
}

#[cfg(test)]
mod tests {
    use backhaul_proto::id::DiskIndex;

    use super::{ContentIndex, Place};

    fn place(block: u64) -> Place {
        Place { disk: DiskIndex(63), offset_bytes: block * 4096 }
    }

    fn hash(of: u64) -> u64 {
        u64::from_le_bytes(blake3::hash(&of.to_le_bytes()).as_bytes()[..8].try_into().unwrap())
    }

    #[test]
    fn the_first_place_stays_until_it_is_removed() {
        let mut index = ContentIndex::new(1 << 20);
        assert_eq!(index.find(hash(1)), None);
        let last = Place { disk: DiskIndex(u16::MAX), offset_bytes: (1 << 46) - 4096 };
        index.insert(hash(1), last);
        index.insert(hash(1), place(8));
        assert_eq!(index.find(hash(1)), Some(last));
        index.remove(hash(1), place(8));
        assert_eq!(index.find(hash(1)), Some(last), "another place");
        index.remove(hash(1), last);
        assert_eq!(index.find(hash(1)), None);
        index.insert(0, place(0));
        assert_eq!((index.find(0), index.find(hash(1))), (Some(place(0)), None));
        index.clear();
        assert_eq!(index.find(0), None);
    }

    #[test]
    fn the_newest_entries_fit_into_the_bound() {
        let mut index = ContentIndex::new(1 << 20);
        for of in 0..200_000 {
            index.insert(hash(of), place(of));
        }
        assert_eq!(size_of_val(&index.buckets[..]), 1 << 20);
        let found = |range: std::ops::Range<u64>| {
            range.filter(|of| index.find(hash(*of)) == Some(place(*of))).count()
        };
        // 65,536 entries have room; the last 30,000 are all but certainly among them.
        assert!(found(170_000..200_000) > 29_000);
        assert!(found(0..30_000) < 1_000);
        index.buckets_max = 0;
        assert!(!index.is_enabled());
    }
}
