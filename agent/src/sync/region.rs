//! Dealing with one region: reading it, comparing it, and handing what differs to the order.

use std::io;
use std::sync::Arc;

use backhaul_proto::batch::{Record, RecordKind};
use backhaul_proto::id::Generation;
use backhaul_proto::limits::{BLOCK_BYTES, LEAF_BYTES, REGION_BYTES};
use bytes::{Bytes, BytesMut};

use crate::batch::{alone, is_zero};
use crate::capture::{CapturedDisk, MachineCapture, now_us};
use crate::sync::{Known, RegionRef};

const BLOCK: u64 = BLOCK_BYTES as u64;
const LEAF: u64 = LEAF_BYTES as u64;

/// How a region turned out.
#[derive(Debug)]
pub(super) enum Outcome {
    /// Dealt with; this many bytes had to be sent.
    Done {
        /// Bytes of data in its batches.
        sent_bytes: u64,
    },
    /// Its root differs, and which leaves do is not known yet.
    Differs,
    /// Some blocks cannot be read; they stay dirty, the others are dealt with.
    Unreadable {
        /// Where on the disk.
        offset_bytes: u64,
        /// What the system said.
        error: io::Error,
    },
}

/// [`Order::epoch`](crate::capture::Order::epoch) when something was known.
type Epoch = (Generation, u64);

/// Deals with a region, given what is known of the target's content of it, and since when.
pub(super) fn deal_with(
    machine: &Arc<MachineCapture>,
    region: RegionRef,
    (known, epoch): (&Known, Epoch),
    runtime: &tokio::runtime::Handle,
) -> Outcome {
    let disk = &machine.disks()[usize::from(region.disk.0)];
    let start = region.region * u64::from(REGION_BYTES);
    let end = (start + u64::from(REGION_BYTES)).min(disk.device.size_bytes());
    match known {
        Known::Root(root) => compare_root(machine, disk, start..end, (root, epoch), runtime),
        _ => send(machine, disk, start..end, (known, epoch), runtime),
    }
}

fn compare_root(
    machine: &MachineCapture,
    disk: &Arc<CapturedDisk>,
    range: std::ops::Range<u64>,
    (root, epoch): (&[u8; 32], Epoch),
    runtime: &tokio::runtime::Handle,
) -> Outcome {
    let len = range.end - range.start;
    let locked = runtime.block_on(disk.ranges.acquire(range.start, len));
    // A write that waited for the same range may have overflowed meanwhile: what the target held
    // when it was asked proves nothing any more.
    let now = machine.order().epoch();
    if now != epoch {
        drop(locked);
        return send(machine, disk, range, (&Known::Nothing, now), runtime);
    }
    let Ok(content) = disk.device.read_new(len as usize, range.start) else {
        // Block by block will tell which sector it is.
        return Outcome::Differs;
    };
    let mut hasher = blake3::Hasher::new();
    for leaf in content.chunks(LEAF as usize) {
        hasher.update(blake3::hash(leaf).as_bytes());
    }
    if hasher.finalize() != *root {
        return Outcome::Differs;
    }
    let blocks = range.start / BLOCK..range.end.div_ceil(BLOCK);
    machine.with_order(|order| {
        // In a new generation everything is dirty again, and is asked for again.
        if order.generation() == epoch.0 {
            order.handle_synced(now_us(), disk.index, blocks, Vec::new(), Vec::new());
        }
    });
    drop(locked);
    Outcome::Done { sent_bytes: 0 }
}

fn send(
    machine: &MachineCapture,
    disk: &Arc<CapturedDisk>,
    range: std::ops::Range<u64>,
    (known, epoch): (&Known, Epoch),
    runtime: &tokio::runtime::Handle,
) -> Outcome {
    let mut sent_bytes = 0;
    let mut unreadable = None;
    let mut at = range.start;
    while at < range.end {
        // What is read at a time is one batch. It is a whole number of leaves.
        let piece_bytes = u64::from(machine.order().batch_bytes_max());
        let end = (at + piece_bytes).min(range.end);
        let _locked = runtime.block_on(disk.ranges.acquire(at, end - at));
        let now = machine.order().epoch();
        let known = if now == epoch { known } else { &Known::Nothing };
        let (content, bad) = read(disk, at, end);
        let same = same_leaves(content.as_ref(), (at, end), range.start, known);
        let mut piece = Piece { start: at, content, known, same };
        let dirty: Vec<_> = {
            let order = machine.order();
            let runs = order.dirty(disk.index).runs(at / BLOCK, end.div_ceil(BLOCK));
            runs.filter(|run| run.dirty).map(|run| run.first * BLOCK..run.end * BLOCK).collect()
        };
        let (records, data) = piece.records(disk, &dirty, &bad);
        let data = alone(data, (end - at) as usize);
        sent_bytes += data.iter().map(|bytes| bytes.len() as u64).sum::<u64>();
        machine.with_order(|order| {
            if order.generation() != now.0 {
                return;
            }
            let blocks = at / BLOCK..end.div_ceil(BLOCK);
            order.handle_synced(now_us(), disk.index, blocks, records, data);
            for (block, _) in &bad {
                let len = BLOCK.min(disk.device.size_bytes() - block);
                order.handle_unreadable(disk.index, *block, len);
            }
        });
        unreadable = unreadable.or(bad.into_iter().next());
        at = end;
    }
    match unreadable {
        Some((offset_bytes, error)) => Outcome::Unreadable { offset_bytes, error },
        None => Outcome::Done { sent_bytes },
    }
}

/// Reads a piece. When that fails, block by block, so that one bad sector costs one block; the bad
/// blocks come back with their errors. `None`: the whole piece is a hole.
fn read(disk: &CapturedDisk, start: u64, end: u64) -> (Option<Bytes>, Vec<(u64, io::Error)>) {
    let (run_end, hole) = disk.device.run(start, end);
    if hole && run_end >= end {
        return (None, Vec::new());
    }
    if let Ok(content) = disk.device.read_new((end - start) as usize, start) {
        return (Some(content.into()), Vec::new());
    }
    let mut content = BytesMut::zeroed((end - start) as usize);
    let mut bad = Vec::new();
    let mut at = start;
    while at < end {
        let stop = (at + BLOCK).min(end);
        let slice = &mut content[(at - start) as usize..(stop - start) as usize];
        if let Err(error) = disk.device.read(slice, at) {
            bad.push((at, error));
        }
        at = stop;
    }
    (Some(content.freeze()), bad)
}

struct Piece<'a> {
    start: u64,
    content: Option<Bytes>,
    known: &'a Known,
    same: Vec<bool>,
}

impl Piece<'_> {
    /// The records of the dirty blocks that the target does not have. Neighbouring blocks of one
    /// sort become one record; data is sliced from the piece.
    fn records(
        &mut self,
        disk: &CapturedDisk,
        dirty: &[std::ops::Range<u64>],
        bad: &[(u64, io::Error)],
    ) -> (Vec<Record>, Vec<Bytes>) {
        let mut records: Vec<Record> = Vec::new();
        let mut data = Vec::new();
        let mut open: Option<(u64, u64, bool)> = None;
        let size = disk.device.size_bytes();
        let mut close = |run: Option<(u64, u64, bool)>| {
            let Some((from, to, zero)) = run else { return };
            let (offset_bytes, len_bytes) = (from, (to - from) as u32);
            let kind = if zero {
                RecordKind::Zero { offset_bytes, len_bytes, may_unmap: true }
            } else {
                RecordKind::Data { offset_bytes, len_bytes }
            };
            records.push(Record { disk: disk.index, kind });
            if !zero && let Some(content) = &self.content {
                let (a, b) = ((from - self.start) as usize, (to - self.start) as usize);
                data.push(content.slice(a..b));
            }
        };
        for block in dirty.iter().flat_map(|range| range.clone().step_by(BLOCK as usize)) {
            let end = (block + BLOCK).min(size);
            let zero = self.is_zero(block, end);
            let skip = bad.iter().any(|(at, _)| *at == block) || self.target_has(block, zero);
            match &mut open {
                Some((_, to, sort)) if !skip && *to == block && *sort == zero => *to = end,
                _ => {
                    close(open.take());
                    open = (!skip).then_some((block, end, zero));
                }
            }
        }
        close(open);
        (records, data)
    }

    fn is_zero(&self, from: u64, to: u64) -> bool {
        let Some(content) = &self.content else { return true };
        let slice = &content[(from - self.start) as usize..(to - self.start) as usize];
        is_zero(slice)
    }

    /// Whether the target is known to hold this block's content.
    fn target_has(&self, block: u64, zero: bool) -> bool {
        match self.known {
            Known::Nothing | Known::Root(_) => false,
            Known::Zero => zero,
            Known::Leaves(_) => self.same[((block - self.start) / LEAF) as usize],
        }
    }
}

/// For each leaf of a piece, whether the target has it.
fn same_leaves(
    content: Option<&Bytes>,
    (start, end): (u64, u64),
    region_start: u64,
    known: &Known,
) -> Vec<bool> {
    let Known::Leaves(leaves) = known else { return Vec::new() };
    let first = ((start - region_start) / LEAF) as usize;
    let zeroes = [0; LEAF as usize];
    (0..(end - start).div_ceil(LEAF))
        .map(|index| {
            let (from, to) = (index * LEAF, ((index + 1) * LEAF).min(end - start));
            let leaf = match content {
                Some(content) => &content[from as usize..to as usize],
                None => &zeroes[..(to - from) as usize],
            };
            leaves.get(first + index as usize).is_some_and(|hash| blake3::hash(leaf) == *hash)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use backhaul_proto::id::{DiskIndex, Generation, PointId};

    use super::{Outcome, deal_with};
    use crate::capture::{CapturedDisk, Device, Fence, MachineCapture, Order, OrderOptions};
    use crate::sync::{Known, RegionRef};

    /// A queue had overflowed over a slow link, and one block in every MiB was dirty. Each held the
    /// MiB that it had been read with: with 2 MiB in the queue the agent took 460 MiB.
    #[test]
    fn a_dirty_block_does_not_hold_the_piece_around_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![7; 4 << 20]).unwrap();
        let index = DiskIndex(0);
        let disk = CapturedDisk {
            index,
            name: "disk0".parse().unwrap(),
            device: Device::open(file.path()).unwrap(),
            ranges: Arc::default(),
        };
        let options = OrderOptions { queue_bytes_max: 1 << 20 };
        let mut order = Order::new(options, Generation(1), &[4 << 20], PointId(0), 0);
        order.handle_synced(0, index, 0..1024, Vec::new(), Vec::new());
        order.finish_sync(0).unwrap();
        order.handle_uncaptured(0, index, 8192, 4096);
        order.take_sealed(true);
        let epoch = order.epoch();
        let name = "web01".parse().unwrap();
        let machine = MachineCapture::new(name, vec![Arc::new(disk)], order, Fence::Down);
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let region = RegionRef { disk: index, region: 0 };
        let outcome = deal_with(&machine, region, (&Known::Nothing, epoch), runtime.handle());
        assert!(matches!(outcome, Outcome::Done { sent_bytes: 4096 }), "{outcome:?}");
        let batches = machine.order().take_sealed(true);
        let mut data = batches.into_iter().flat_map(|batch| batch.data);
        let held = data.next().unwrap().try_into_mut().unwrap().capacity();
        assert!(held < 64 << 10, "{held} bytes for one block");
        assert!(data.next().is_none());
    }
}
