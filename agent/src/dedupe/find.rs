//! From blocks that the index knows to runs that are worth a reference. Pure but for the reading.
//!
//! The index knows one block in four. A block that it names is a seed: from there the batch's data
//! is compared with the disk, forwards and backwards, for as long as they are alike.

use std::ops::Range;

use backhaul_proto::batch::{PlainBatch, RecordKind, Reference};
use backhaul_proto::limits::{BLOCK_BYTES, REFERENCES_MAX};
use bytes::Bytes;

use super::Place;

const BLOCK: usize = BLOCK_BYTES as usize;

/// Of so many blocks one is in the index. Its content says whether it is: two copies of a run are
/// sampled alike, wherever they begin.
const SAMPLED: u64 = 4;

/// A shorter run is sent as it is: reading it costs the target a seek.
const RUN_BYTES_MIN: usize = 16 << 10;

/// What is compared at a time.
const STEP_BYTES: usize = 64 << 10;

/// After so many seeds that led to nothing, the rest of the batch is sent as it is: content that is
/// everywhere in small pieces would cost more reading than it saves.
const FAILURES_MAX: usize = 16;

/// A block of a batch that the index may know.
#[derive(Debug, Clone, Copy)]
pub(super) struct Block {
    /// Where it is in the batch's data.
    pub(super) at: usize,
    /// Which data record it belongs to.
    chunk: usize,
    /// Its hash.
    pub(super) hash: u64,
    /// Where it goes on its disk.
    pub(super) place: Place,
}

/// Where the index says that a block is, and how far around it the image is as the disk.
#[derive(Debug, Clone)]
pub(super) struct Source {
    pub(super) place: Place,
    /// Offsets on the disk, the place's among them.
    pub(super) applied: Range<u64>,
}

/// The blocks of a batch's data that the index may know: whole ones, aligned on their disk.
pub(super) fn sample_blocks(batch: &PlainBatch) -> Vec<Block> {
    let mut blocks = Vec::new();
    let (mut start, mut chunk) = (0, 0);
    for record in &batch.records {
        let RecordKind::Data { offset_bytes, .. } = record.kind else { continue };
        let Some(data) = batch.data.get(chunk) else { break };
        if offset_bytes % BLOCK as u64 == 0 {
            for (index, block) in data.chunks_exact(BLOCK).enumerate() {
                let hash = hash(block);
                if (hash >> 32).is_multiple_of(SAMPLED) {
                    let offset_bytes = offset_bytes + (index * BLOCK) as u64;
                    let place = Place { disk: record.disk, offset_bytes };
                    blocks.push(Block { at: start + index * BLOCK, chunk, hash, place });
                }
            }
        }
        start += data.len();
        chunk += 1;
    }
    blocks
}

fn hash(block: &[u8]) -> u64 {
    let mut first = [0; 8];
    first.copy_from_slice(&blake3::hash(block).as_bytes()[..8]);
    u64::from_le_bytes(first)
}

/// Whether what is at this place of the data is referred to. References are in order.
pub(super) fn is_covered(references: &[Reference], at: usize) -> bool {
    let next = references.partition_point(|one| one.range().end <= at);
    references.get(next).is_some_and(|one| one.range().contains(&at))
}

/// Collects the references of one batch.
pub(super) struct Finder<'a, R> {
    chunks: &'a [Bytes],
    /// Where each of them begins in the data.
    starts: Vec<usize>,
    /// Reads the disk at a place; false when it cannot.
    read: R,
    buffer: Vec<u8>,
    references: Vec<Reference>,
    stale: Vec<(u64, Place)>,
    failures: usize,
}

impl<'a, R: FnMut(Place, &mut [u8]) -> bool> Finder<'a, R> {
    pub(super) fn new(batch: &'a PlainBatch, read: R) -> Self {
        let mut start = 0;
        let starts = batch.data.iter().map(|data| {
            let at = start;
            start += data.len();
            at
        });
        Self {
            starts: starts.collect(),
            chunks: &batch.data,
            read,
            buffer: Vec::new(),
            references: Vec::new(),
            stale: Vec::new(),
            failures: 0,
        }
    }

    /// The index says that a block is at `source`. Blocks come in the order of their places.
    pub(super) fn handle_hit(&mut self, block: &Block, source: Source) {
        let Source { place: source, applied } = source;
        let covered = self.references.last().map_or(0, |last| last.range().end);
        let full = self.references.len() >= REFERENCES_MAX as usize;
        if block.at < covered || full || self.failures >= FAILURES_MAX {
            return;
        }
        let start = self.starts[block.chunk];
        let seed = block.at - start;
        let data = &self.chunks[block.chunk];
        let [before, after] =
            [source.offset_bytes - applied.start, applied.end - source.offset_bytes];
        let before = (seed - covered.saturating_sub(start).min(seed)).min(before as usize);
        let after = (data.len() - seed).min(after as usize);
        let forwards = self.alike_after(&data[seed..seed + after], source);
        if forwards < BLOCK {
            self.stale.push((block.hash, source));
            self.failures += 1;
            return;
        }
        let backwards = self.alike_before(&data[seed - before..seed], source);
        let run: Range<usize> = seed - backwards..seed + forwards;
        if run.len() < RUN_BYTES_MIN {
            self.failures += 1;
            return;
        }
        self.references.push(Reference {
            at_bytes: (start + run.start) as u32,
            len_bytes: run.len() as u32,
            disk: source.disk,
            offset_bytes: source.offset_bytes - backwards as u64,
        });
    }

    /// How many bytes at the start of `data` the disk has from `source` on; whole blocks.
    fn alike_after(&mut self, data: &[u8], source: Place) -> usize {
        let mut alike = 0;
        for step in data.chunks(STEP_BYTES) {
            let offset_bytes = source.offset_bytes + alike as u64;
            let Some(found) = self.fetch(Place { offset_bytes, ..source }, step.len()) else {
                break;
            };
            let same = same_blocks(step.chunks(BLOCK), found.chunks(BLOCK));
            alike += same;
            if same < step.len() {
                break;
            }
        }
        alike
    }

    /// How many bytes at the end of `data` the disk has before `source`; whole blocks.
    fn alike_before(&mut self, data: &[u8], source: Place) -> usize {
        let mut alike = 0;
        for step in data.rchunks(STEP_BYTES) {
            let offset_bytes = source.offset_bytes - (alike + step.len()) as u64;
            let Some(found) = self.fetch(Place { offset_bytes, ..source }, step.len()) else {
                break;
            };
            let same = same_blocks(step.rchunks(BLOCK), found.rchunks(BLOCK));
            alike += same;
            if same < step.len() {
                break;
            }
        }
        alike
    }

    fn fetch(&mut self, place: Place, len: usize) -> Option<&[u8]> {
        self.buffer.resize(STEP_BYTES, 0);
        let into = &mut self.buffer[..len];
        (self.read)(place, into).then_some(into)
    }

    /// The references, and what the index should forget.
    pub(super) fn finish(self) -> (Vec<Reference>, Vec<(u64, Place)>) {
        (self.references, self.stale)
    }
}

/// Bytes of the blocks that are alike, up to the first that is not.
fn same_blocks<'b>(
    ours: impl Iterator<Item = &'b [u8]>,
    theirs: impl Iterator<Item = &'b [u8]>,
) -> usize {
    ours.zip(theirs).take_while(|(a, b)| a == b).map(|(a, _)| a.len()).sum()
}

#[cfg(test)]
mod tests {
    use backhaul_proto::batch::{BatchKind, PlainBatch, Record, RecordKind};
    use backhaul_proto::id::{BatchSeq, DiskIndex, Generation, WriteSeq};
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::{BLOCK, FAILURES_MAX, Finder, Place, Source, is_covered, sample_blocks};
    use crate::dedupe::PIECE_BYTES;

    fn noise(seed: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
        out
    }

    fn batch(parts: Vec<(u64, Vec<u8>)>) -> PlainBatch {
        let records = parts.iter().map(|(offset_bytes, data)| Record {
            disk: DiskIndex(1),
            kind: RecordKind::Data { offset_bytes: *offset_bytes, len_bytes: data.len() as u32 },
        });
        PlainBatch {
            kind: BatchKind::Sync,
            generation: Generation(1),
            batch: BatchSeq(1),
            first_write: WriteSeq(1),
            captured_at_us: 0,
            records: records.collect(),
            data_bytes: parts.iter().map(|(_, data)| data.len()).sum(),
            data: parts.into_iter().map(|(_, data)| Bytes::from(data)).collect(),
        }
    }

    /// All of its piece is applied.
    fn source(offset_bytes: u64) -> Source {
        let piece = offset_bytes / PIECE_BYTES * PIECE_BYTES;
        let place = Place { disk: DiskIndex(0), offset_bytes };
        Source { place, applied: piece..piece + PIECE_BYTES }
    }

    fn reader(disk: &[u8]) -> impl FnMut(Place, &mut [u8]) -> bool {
        move |place, into| {
            let at = place.offset_bytes as usize;
            disk.get(at..at + into.len()).is_some_and(|found| {
                into.copy_from_slice(found);
                true
            })
        }
    }

    #[test]
    fn a_copied_piece_is_one_reference_from_a_single_seed() {
        let disk = noise(1, 2 << 20);
        let batch = batch(vec![(0, noise(2, 8192)), (8 << 20, disk[1 << 20..].to_vec())]);
        let blocks = sample_blocks(&batch);
        assert!((30..110).contains(&blocks.len()), "{}", blocks.len());
        let mut finder = Finder::new(&batch, reader(&disk));
        let seed = blocks[blocks.len() / 2];
        let offset_bytes = (1 << 20) + (seed.at - 8192) as u64;
        finder.handle_hit(&seed, source(offset_bytes));
        let (references, stale) = finder.finish();
        let [one] = references[..] else { panic!("{references:?}") };
        assert_eq!((one.at_bytes, one.len_bytes, one.offset_bytes), (8192, 1 << 20, 1 << 20));
        assert!(stale.is_empty());
        assert!(is_covered(&references, 8192) && !is_covered(&references, 8191));
    }

    #[test]
    fn what_changed_is_stale_what_is_short_is_sent_and_seeds_run_out() {
        let disk = noise(1, 1 << 20);
        let mut changed = disk.clone();
        for block in changed.chunks_mut(2 * BLOCK) {
            block[0] ^= 1;
        }
        let batch = batch(vec![(0, disk.clone())]);
        let blocks = sample_blocks(&batch);
        assert!(blocks.len() > FAILURES_MAX);
        let mut finder = Finder::new(&batch, reader(&changed));
        for block in &blocks {
            finder.handle_hit(block, source(block.place.offset_bytes));
        }
        let odd = |at: usize| (at / BLOCK) % 2 == 1;
        let expected = blocks[..FAILURES_MAX].iter().filter(|block| !odd(block.at)).count();
        let (references, stale) = finder.finish();
        assert_eq!((references.len(), stale.len()), (0, expected));
    }

    proptest! {
        /// Wherever copies lie, whatever the index names: references are in order, do not overlap,
        /// stay inside the data and their pieces, and stand for what is there.
        #[test]
        fn references_stand_for_the_data(
            parts in prop::collection::vec((0usize..512, 1usize..64, any::<bool>()), 1..8),
            seeds in prop::collection::vec(0usize..512, 0..64),
            seed in any::<u64>(),
        ) {
            let disk = noise(seed, 512 * BLOCK);
            let parts = parts.into_iter().map(|(from, blocks, copied)| {
                let to = (from + blocks).min(512);
                let data = if copied {
                    disk[from * BLOCK..to * BLOCK].to_vec()
                } else {
                    noise(from as u64, (to - from) * BLOCK)
                };
                ((from * BLOCK) as u64, data)
            });
            let batch = batch(parts.collect());
            let content: Vec<u8> = batch.data.concat();
            let blocks = sample_blocks(&batch);
            let mut finder = Finder::new(&batch, reader(&disk));
            for (index, block) in blocks.iter().enumerate() {
                let offset_bytes = match seeds.get(index) {
                    Some(wild) => (*wild * BLOCK) as u64,
                    None => block.place.offset_bytes,
                };
                finder.handle_hit(block, source(offset_bytes));
            }
            let (references, _) = finder.finish();
            let mut end = 0;
            for one in &references {
                prop_assert!(one.range().start >= end && one.range().end <= content.len());
                end = one.range().end;
                let (from, len) = (one.offset_bytes, u64::from(one.len_bytes));
                prop_assert_eq!(from >> 20, (from + len - 1) >> 20);
                let source = &disk[from as usize..(from + len) as usize];
                prop_assert!(source == &content[one.range()]);
            }
        }
    }
}
