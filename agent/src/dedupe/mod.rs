//! Data that the target holds already goes as a reference: where it is worth it, and only while the
//! link is the bottleneck.
//!
//! ```text
//! index (pure, bounded): hash of a block → where the images have it
//! find (pure): grows what the index names to runs, by comparing with the disk as it is now
//! ```
//!
//! The index may be wrong or lost without harm: the target believes only what it reads and hashes.

mod find;
mod index;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use backhaul_proto::batch::{PlainBatch, Reference};
use backhaul_proto::id::{BatchSeq, Generation};

use crate::capture::CapturedDisk;
use find::{Finder, sample_blocks};
pub use index::Place;
use index::{ContentIndex, SentIn};

/// What is known of one machine's content at the target.
#[derive(Debug)]
pub struct Dedupe {
    index: Mutex<ContentIndex>,
    disks: Vec<Arc<CapturedDisk>>,
}

impl Dedupe {
    /// Knows nothing, and will take `index_bytes` of memory at most; 0 finds nothing ever.
    pub fn new(index_bytes: u64, generation: Generation, disks: Vec<Arc<CapturedDisk>>) -> Self {
        Self { index: Mutex::new(ContentIndex::new(index_bytes, generation)), disks }
    }

    fn index(&self) -> MutexGuard<'_, ContentIndex> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every batch up to `durable` is on stable storage at the target, and up to `applied`, or what was said of it
    /// before, on its images.
    pub fn handle_acked(&self, durable: BatchSeq, applied: BatchSeq) {
        self.index().handle_acked(durable, applied);
    }

    /// A new generation begins: what the target holds is unknown.
    pub fn handle_generation(&self, generation: Generation) {
        self.index().reset(generation);
    }

    /// The target does not hold what these refer to.
    pub fn handle_unresolved(&self, references: &[Reference]) {
        self.index().forget(references);
    }

    /// What of a batch can be referred to. Reads from the protected disks where the index says that
    /// it is worth it. Takes note of what is sent, for when the images hold it.
    pub fn references(&self, batch: &PlainBatch) -> Vec<Reference> {
        {
            let index = self.index();
            if !index.is_enabled() || index.generation() != batch.generation {
                return Vec::new();
            }
        }
        let blocks = sample_blocks(batch);
        let places: Vec<Option<Place>> = {
            let index = self.index();
            blocks.iter().map(|block| index.find(block.hash)).collect()
        };
        let mut finder = Finder::new(batch, |place: Place, into: &mut [u8]| {
            let disk = self.disks.get(usize::from(place.disk.0));
            disk.is_some_and(|disk| disk.device.read(into, place.offset_bytes).is_ok())
        });
        for (block, place) in blocks.iter().zip(&places) {
            if let Some(place) = place {
                finder.handle_hit(block, *place);
            }
        }
        let (references, stale) = finder.finish();
        let mut index = self.index();
        if index.generation() != batch.generation {
            return Vec::new();
        }
        for (hash, place) in stale {
            index.remove(hash, place);
        }
        let sent_in = SentIn { batch: batch.batch, kind: batch.kind };
        for block in blocks.iter().filter(|block| !find::is_covered(&references, block.at)) {
            index.insert(block.hash, block.place, sent_in);
        }
        references
    }
}
