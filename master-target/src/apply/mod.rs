//! Which bytes of a run of batches reach the image: the pure half of applying.
//!
//! Invariants: the extents of a plan do not overlap, so they may be written at once and in any
//! order; together they leave the image as writing every record in order would.

use std::collections::BTreeMap;
use std::ops::Range;

use backhaul_proto::batch::RecordKind;
use backhaul_proto::id::DiskIndex;

use crate::batch_buffer::BatchView;

/// A range of a disk and what it holds after the planned batches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extent {
    /// The disk.
    pub disk: DiskIndex,
    /// Where on the disk.
    pub offset_bytes: u64,
    /// What to put there.
    pub content: Content,
}

/// What an [`Extent`] holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// This range of the data of the batch at this index.
    Data {
        /// Index of the batch in what was planned.
        batch: usize,
        /// Which bytes of its data.
        range: Range<usize>,
    },
    /// Zeroes.
    Zero {
        /// How many.
        len_bytes: u64,
        /// The space may be given back.
        may_unmap: bool,
    },
}

impl Extent {
    fn end_bytes(&self) -> u64 {
        let len_bytes = match &self.content {
            Content::Data { range, .. } => range.len() as u64,
            Content::Zero { len_bytes, .. } => *len_bytes,
        };
        self.offset_bytes + len_bytes
    }
}

/// Plans a run of batches, oldest first.
///
/// Goes from the newest record to the oldest and keeps of each only what no newer one covers: a
/// block that was rewritten a hundred times is written once. Neighbours whose bytes are neighbours
/// in memory too, as those of a sequential guest are, become one extent.
pub fn plan(batches: &[BatchView<'_>]) -> Vec<Extent> {
    let mut covered: BTreeMap<DiskIndex, Covered> = BTreeMap::new();
    let mut extents = Vec::new();
    for (batch, view) in batches.iter().enumerate().rev() {
        let mut data_end = view.data.len();
        for record in view.records.iter().rev() {
            let data_start = data_end - record.data_bytes();
            data_end = data_start;
            let (offset_bytes, len_bytes) = match record.kind {
                RecordKind::Data { offset_bytes, len_bytes }
                | RecordKind::Zero { offset_bytes, len_bytes, .. } => (offset_bytes, len_bytes),
                RecordKind::Point(_) | RecordKind::SyncStart | RecordKind::SyncDone => continue,
            };
            let covered = covered.entry(record.disk).or_default();
            covered.cover(offset_bytes..offset_bytes + u64::from(len_bytes), |part| {
                let skip = (part.start - offset_bytes) as usize;
                let content = match record.kind {
                    RecordKind::Zero { may_unmap, .. } => {
                        Content::Zero { len_bytes: part.end - part.start, may_unmap }
                    }
                    _ => {
                        let start = data_start + skip;
                        let range = start..start + (part.end - part.start) as usize;
                        Content::Data { batch, range }
                    }
                };
                extents.push(Extent { disk: record.disk, offset_bytes: part.start, content });
            });
        }
    }
    extents.sort_unstable_by_key(|extent| (extent.disk, extent.offset_bytes));
    merge(extents)
}

fn merge(sorted: Vec<Extent>) -> Vec<Extent> {
    let mut merged: Vec<Extent> = Vec::with_capacity(sorted.len());
    for extent in sorted {
        if let Some(last) = merged.last_mut()
            && last.disk == extent.disk
            && last.end_bytes() == extent.offset_bytes
        {
            match (&mut last.content, &extent.content) {
                (
                    Content::Data { batch: a, range: before },
                    Content::Data { batch: b, range: after },
                ) if a == b && before.end == after.start => {
                    before.end = after.end;
                    continue;
                }
                (
                    Content::Zero { len_bytes: a, may_unmap: x },
                    Content::Zero { len_bytes: b, may_unmap: y },
                ) if x == y => {
                    *a += b;
                    continue;
                }
                _ => {}
            }
        }
        merged.push(extent);
    }
    merged
}

/// Ranges that newer records cover; no two of them touch.
#[derive(Debug, Default)]
struct Covered {
    /// Start to end.
    ranges: BTreeMap<u64, u64>,
}

impl Covered {
    /// Covers `range` and names every part of it that was not covered before.
    fn cover(&mut self, range: Range<u64>, mut fresh: impl FnMut(Range<u64>)) {
        let (mut start, mut end) = (range.start, range.end);
        let mut at = range.start;
        if let Some((&before, &before_end)) = self.ranges.range(..=start).next_back()
            && before_end >= start
        {
            start = before;
            at = at.max(before_end);
        }
        while let Some((&next, &next_end)) = self.ranges.range(start..=end).next() {
            if at < next {
                fresh(at..next);
            }
            at = at.max(next_end);
            end = end.max(next_end);
            self.ranges.remove(&next);
        }
        if at < range.end {
            fresh(at..range.end);
        }
        self.ranges.insert(start, end);
    }
}

#[cfg(test)]
mod tests;
