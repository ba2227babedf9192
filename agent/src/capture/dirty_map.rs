//! Which blocks of a disk are not in the stream yet.

use backhaul_proto::limits::BLOCK_BYTES;

/// Blocks in one chunk: 65,536 of 4 KiB are 256 MiB, 8 KiB of bitmap.
const CHUNK_BLOCKS: u64 = 1 << 16;
const CHUNK_WORDS: usize = (CHUNK_BLOCKS / 64) as usize;

/// A bitmap of [`BLOCK_BYTES`] blocks. Memory: at most one bit a block, and 16 bytes for each
/// 256 MiB while a chunk is wholly clean or wholly dirty.
#[derive(Debug, Clone)]
pub struct DirtyMap {
    blocks: u64,
    dirty_blocks: u64,
    chunks: Vec<Chunk>,
}

#[derive(Debug, Clone)]
enum Chunk {
    Clean,
    Dirty,
    Mixed { dirty: u32, words: Box<[u64; CHUNK_WORDS]> },
}

/// A run of blocks, as `[first, end)` in block numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockRun {
    /// First block.
    pub first: u64,
    /// One past the last block.
    pub end: u64,
    /// What all of them are.
    pub dirty: bool,
}

impl DirtyMap {
    /// A map for a disk of `size_bytes`, with every block dirty: nothing is known to be clean.
    pub fn all_dirty(size_bytes: u64) -> Self {
        let blocks = size_bytes.div_ceil(BLOCK_BYTES.into());
        let chunks = vec![Chunk::Dirty; blocks.div_ceil(CHUNK_BLOCKS) as usize];
        Self { blocks, dirty_blocks: blocks, chunks }
    }

    /// Number of blocks that are dirty.
    pub fn dirty_blocks(&self) -> u64 {
        self.dirty_blocks
    }

    /// Number of blocks of the disk.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    fn chunk_blocks(&self, chunk: u64) -> u32 {
        (self.blocks - chunk * CHUNK_BLOCKS).min(CHUNK_BLOCKS) as u32
    }

    /// Whether `block` is dirty. Blocks behind the end are not.
    pub fn is_dirty(&self, block: u64) -> bool {
        if block >= self.blocks {
            return false;
        }
        match &self.chunks[(block / CHUNK_BLOCKS) as usize] {
            Chunk::Clean => false,
            Chunk::Dirty => true,
            Chunk::Mixed { words, .. } => {
                let at = (block % CHUNK_BLOCKS) as usize;
                words[at / 64] >> (at % 64) & 1 == 1
            }
        }
    }

    /// Makes the blocks of `[first, end)` dirty or clean.
    pub fn set(&mut self, first: u64, end: u64, dirty: bool) {
        let end = end.min(self.blocks);
        let mut at = first;
        while at < end {
            let index = at / CHUNK_BLOCKS;
            let stop = end.min((index + 1) * CHUNK_BLOCKS);
            let from = (at % CHUNK_BLOCKS) as u32;
            self.set_in_chunk(index, from, from + (stop - at) as u32, dirty);
            at = stop;
        }
    }

    fn set_in_chunk(&mut self, index: u64, from: u32, to: u32, dirty: bool) {
        let size = self.chunk_blocks(index);
        let chunk = &mut self.chunks[index as usize];
        let before = match chunk {
            Chunk::Clean => 0,
            Chunk::Dirty => size,
            Chunk::Mixed { dirty, .. } => *dirty,
        };
        if (before == 0 && !dirty) || (before == size && dirty) {
            return;
        }
        if let Chunk::Clean | Chunk::Dirty = chunk {
            let mut words = Box::new([0; CHUNK_WORDS]);
            if before > 0 {
                for_each_word(0, size, |word, mask| words[word] |= mask);
            }
            *chunk = Chunk::Mixed { dirty: before, words };
        }
        let Chunk::Mixed { dirty: count, words } = chunk else { return };
        for_each_word(from, to, |word, mask| {
            let old = words[word];
            words[word] = if dirty { old | mask } else { old & !mask };
            *count = *count + words[word].count_ones() - old.count_ones();
        });
        let after = *count;
        if after == 0 {
            *chunk = Chunk::Clean;
        } else if after == size {
            *chunk = Chunk::Dirty;
        }
        self.dirty_blocks = self.dirty_blocks + u64::from(after) - u64::from(before);
    }

    /// The runs of equal blocks within `[first, end)`, in order.
    pub fn runs(&self, first: u64, end: u64) -> impl Iterator<Item = BlockRun> + '_ {
        let end = end.min(self.blocks);
        let mut at = first;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let dirty = self.is_dirty(at);
            let first = at;
            at = self.next_change(at, end, dirty);
            Some(BlockRun { first, end: at, dirty })
        })
    }

    /// The first dirty block at or after `from`.
    pub fn next_dirty(&self, from: u64) -> Option<u64> {
        let run = self.runs(from, self.blocks).find(|run| run.dirty)?;
        Some(run.first)
    }

    fn next_change(&self, from: u64, end: u64, dirty: bool) -> u64 {
        let mut at = from;
        while at < end {
            let index = at / CHUNK_BLOCKS;
            let chunk_end = ((index + 1) * CHUNK_BLOCKS).min(end);
            match &self.chunks[index as usize] {
                Chunk::Clean if !dirty => at = chunk_end,
                Chunk::Dirty if dirty => at = chunk_end,
                Chunk::Clean | Chunk::Dirty => return at,
                Chunk::Mixed { words, .. } => {
                    let local = (at % CHUNK_BLOCKS) as usize;
                    let word = if dirty { !words[local / 64] } else { words[local / 64] };
                    let ahead = word >> (local % 64);
                    if ahead != 0 {
                        return (at + u64::from(ahead.trailing_zeros())).min(end);
                    }
                    at = (at / 64 + 1) * 64;
                }
            }
        }
        end
    }
}

/// Calls `f` with each word that `[from, to)` touches, and the mask of its bits in the range.
fn for_each_word(from: u32, to: u32, mut f: impl FnMut(usize, u64)) {
    let mut at = from;
    while at < to {
        let stop = to.min((at / 64 + 1) * 64);
        let mask = (!0u64 >> (64 - (stop - at))) << (at % 64);
        f((at / 64) as usize, mask);
        at = stop;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{CHUNK_BLOCKS, DirtyMap};

    #[test]
    fn starts_dirty_to_the_last_block_and_not_beyond() {
        let map = DirtyMap::all_dirty(4096 * 10 + 1);
        assert_eq!(map.dirty_blocks(), 11);
        assert!(map.is_dirty(10) && !map.is_dirty(11));
        assert_eq!(map.next_dirty(3), Some(3));
    }

    proptest! {
        #[test]
        fn behaves_as_a_plain_vector(
            ops in prop::collection::vec((0u64..140_000, 1u64..70_000, any::<bool>()), 1..20),
            probe in (0u64..140_000, 1u64..70_000),
        ) {
            let blocks = 2 * CHUNK_BLOCKS + 700;
            let mut map = DirtyMap::all_dirty(blocks * 4096);
            let mut model = vec![true; blocks as usize];
            for (first, len, dirty) in ops {
                map.set(first, first + len, dirty);
                let end = (first + len).min(blocks);
                for block in first.min(end)..end {
                    model[block as usize] = dirty;
                }
                let count = model.iter().filter(|d| **d).count() as u64;
                prop_assert_eq!(map.dirty_blocks(), count);
            }
            let (first, end) = (probe.0, (probe.0 + probe.1).min(blocks));
            let mut at = first;
            for run in map.runs(first, probe.0 + probe.1) {
                prop_assert_eq!(run.first, at);
                prop_assert!(run.end > run.first);
                for block in run.first..run.end {
                    prop_assert_eq!(model[block as usize], run.dirty);
                }
                at = run.end;
            }
            prop_assert_eq!(at, end.max(first));
        }
    }
}
