//! Data that the target holds already goes as a reference: where it is worth it, and only while the
//! link is the bottleneck.
//!
//! ```text
//! index (pure, bounded): hash of a block → where it was sent to
//! unapplied (pure, bounded): where the images may not be as the disks are now
//! find (pure): grows what the index names to runs, by comparing with the disk as it is now
//! ```
//!
//! All of it may be wrong or lost without harm: the target believes only what it reads and hashes, and asks for the
//! batch again, which costs a round trip.

mod find;
mod index;
mod unapplied;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use backhaul_proto::batch::{PlainBatch, Reference};
use backhaul_proto::id::{BatchSeq, DiskIndex, Generation};

use crate::capture::CapturedDisk;
use find::{Finder, Source, sample_blocks};
use index::ContentIndex;
use unapplied::Unapplied;

/// A reference lies within such a piece of a disk.
const PIECE_BYTES: u64 = 1 << 20;

/// Where a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The disk.
    pub disk: DiskIndex,
    /// Where on it.
    pub offset_bytes: u64,
}

/// What is known of one machine's content at the target.
#[derive(Debug)]
pub struct Dedupe {
    known: Mutex<Known>,
    disks: Vec<Arc<CapturedDisk>>,
}

/// Of one generation.
#[derive(Debug)]
struct Known {
    generation: Generation,
    index: ContentIndex,
    unapplied: Unapplied,
}

impl Known {
    /// Whether anything can be known of this batch's content.
    fn is_about(&self, batch: &PlainBatch) -> bool {
        self.index.is_enabled() && self.generation == batch.generation
    }
}

impl Dedupe {
    /// Knows nothing, and will take `index_bytes` of memory for its index at most; 0 finds nothing ever.
    pub fn new(index_bytes: u64, generation: Generation, disks: Vec<Arc<CapturedDisk>>) -> Self {
        let (index, unapplied) = (ContentIndex::new(index_bytes), Unapplied::default());
        Self { known: Mutex::new(Known { generation, index, unapplied }), disks }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A batch of the machine was sealed; they come in their order.
    pub fn handle_sealed(&self, batch: &PlainBatch) {
        let mut known = self.known();
        if known.is_about(batch) {
            known.unapplied.handle_sealed(batch);
        }
    }

    /// Every batch up to `durable` is on stable storage at the target, and up to `applied`, or what was said of it
    /// before, on its images.
    pub fn handle_acked(&self, durable: BatchSeq, applied: BatchSeq) {
        self.known().unapplied.handle_acked(durable, applied);
    }

    /// A new generation begins: what the target holds is unknown.
    pub fn handle_generation(&self, generation: Generation) {
        let mut known = self.known();
        known.generation = generation;
        known.index.clear();
        known.unapplied = Unapplied::default();
    }

    /// The target does not hold what these refer to.
    pub fn handle_unresolved(&self, references: &[Reference]) {
        self.known().unapplied.handle_unresolved(references);
    }

    /// What of a batch, which was sealed before, can be referred to. Reads from the protected disks where the index
    /// says that it is worth it. Takes note of what is sent, for when the images hold it.
    pub fn references(&self, batch: &PlainBatch) -> Vec<Reference> {
        if !self.known().is_about(batch) {
            return Vec::new();
        }
        let blocks = sample_blocks(batch);
        let sources: Vec<Option<Source>> = {
            let known = self.known();
            let source = |place| {
                let applied = known.unapplied.applied_around(place);
                (!applied.is_empty()).then_some(Source { place, applied })
            };
            blocks.iter().map(|block| known.index.find(block.hash).and_then(source)).collect()
        };
        let mut finder = Finder::new(batch, |place: Place, into: &mut [u8]| {
            let disk = self.disks.get(usize::from(place.disk.0));
            disk.is_some_and(|disk| disk.device.read(into, place.offset_bytes).is_ok())
        });
        for (block, source) in blocks.iter().zip(sources) {
            if let Some(source) = source {
                finder.handle_hit(block, source);
            }
        }
        let (references, stale) = finder.finish();
        let mut known = self.known();
        if !known.is_about(batch) {
            return Vec::new();
        }
        for (hash, place) in stale {
            known.index.remove(hash, place);
        }
        known.unapplied.begin();
        for block in blocks.iter().filter(|block| !find::is_covered(&references, block.at)) {
            known.index.insert(block.hash, block.place);
        }
        references
    }
}
