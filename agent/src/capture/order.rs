//! One machine's write order: which writes go into the stream, and which only make blocks dirty.
//!
//! Every block of a disk is either *in the stream* (a write to it is added to the order) or *dirty*
//! (its content is in no batch yet; a write to it changes nothing here, because the sync will read
//! the block later, at a place of its own in the order). A machine whose blocks are all in the
//! stream is *ordered*, and the target holds a prefix of its writes. Otherwise it is *syncing*.
//!
//! Blocks become dirty when a generation begins (all of them: nothing is known of what happened
//! before) and when the queue is full (those that could not be queued). They return to the stream
//! when the sync reads them. So overload costs granularity, never a write, and never a stall.
//!
//! Pure: the callers hold the lock, know the time and carry out what is returned.

use backhaul_proto::batch::{BatchKind, PlainBatch, Record, RecordKind};
use backhaul_proto::id::{BatchSeq, DiskIndex, Generation, PointId};
use backhaul_proto::limits::BLOCK_BYTES;
use bytes::Bytes;

use crate::batch::{Builder, RECORD_MEMORY_BYTES, held_bytes};
use crate::capture::DirtyMap;

const BLOCK: u64 = BLOCK_BYTES as u64;

/// Bounds of an [`Order`].
#[derive(Debug, Clone, Copy)]
pub struct OrderOptions {
    /// Bytes of writes that may wait for acknowledgement. Beyond it, writes only make blocks dirty:
    /// the machine loses its place in the order until a sync has caught up.
    pub queue_bytes_max: u64,
}

/// What a write changed.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// These bytes, shared with the NBD buffer.
    Data(Bytes),
    /// Zeroes.
    Zero {
        /// How many.
        len_bytes: u64,
        /// The target may give the space back.
        may_unmap: bool,
    },
}

/// How the machine stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Every write is in the order.
    Ordered,
    /// Some blocks are dirty.
    Syncing {
        /// The target's content is unknown: compare hashes before sending. Without it every dirty
        /// block is known to differ, as after an overflow.
        compare: bool,
        /// Bytes that were dirty when it began, or became so since.
        total_bytes: u64,
    },
}

/// The order of one machine, over all its disks.
#[derive(Debug)]
pub struct Order {
    options: OrderOptions,
    builder: Builder,
    dirty: Vec<DirtyMap>,
    mode: Mode,
    /// Bytes that wait for acknowledgement, in whatever form.
    queued_bytes: u64,
    last_point: PointId,
    uncaptured: u64,
    sealed: Vec<PlainBatch>,
}

impl Order {
    /// A new generation for disks of these sizes: everything is dirty, and the stream starts with
    /// the marker that says so.
    pub fn new(
        options: OrderOptions,
        generation: Generation,
        disk_bytes: &[u64],
        last_point: PointId,
        now_us: u64,
    ) -> Self {
        let mut order = Self {
            options,
            builder: Builder::new(generation),
            dirty: disk_bytes.iter().map(|size| DirtyMap::all_dirty(*size)).collect(),
            mode: Mode::Ordered,
            queued_bytes: 0,
            last_point,
            uncaptured: 0,
            sealed: Vec::new(),
        };
        order.begin_sync(true, now_us);
        order
    }

    /// The generation it belongs to.
    pub fn generation(&self) -> Generation {
        self.builder.generation()
    }

    /// How the machine stands.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The newest point it made, or was told of at the start.
    pub fn last_point(&self) -> PointId {
        self.last_point
    }

    /// Points made from here on come after `point`, whatever the clock says.
    pub fn raise_last_point(&mut self, point: PointId) {
        self.last_point = self.last_point.max(point);
    }

    /// What a batch is to have of data at most, in bytes.
    pub fn batch_bytes_max(&self) -> u32 {
        self.builder.batch_bytes_max()
    }

    /// Batches have so many bytes of data at most from now on, as a ceiling wants it.
    pub fn set_batch_bytes_max(&mut self, bytes: u32) {
        self.builder.set_batch_bytes_max(bytes);
    }

    /// The last batch that was sealed.
    pub fn newest(&self) -> BatchSeq {
        self.builder.newest()
    }

    /// The batch that everything captured so far is in or before, sealed or not.
    pub fn newest_with_open(&self) -> BatchSeq {
        if self.has_open_batch() { self.newest().next() } else { self.newest() }
    }

    /// Whether writes wait in a batch that is not sealed.
    pub fn has_open_batch(&self) -> bool {
        !self.builder.is_empty()
    }

    /// Bytes that wait for acknowledgement.
    pub fn queued_bytes(&self) -> u64 {
        self.queued_bytes
    }

    /// Bytes of all disks that are in no batch.
    pub fn dirty_bytes(&self) -> u64 {
        self.dirty.iter().map(DirtyMap::dirty_blocks).sum::<u64>() * BLOCK
    }

    /// How often something became dirty that was in the stream. A hash of the target's content
    /// proves nothing about blocks that became dirty after it was asked for.
    pub fn uncaptured(&self) -> u64 {
        self.uncaptured
    }

    /// What an answer of the target is good for: this generation, as long as nothing that was in
    /// the stream becomes dirty.
    pub fn epoch(&self) -> (Generation, u64) {
        (self.generation(), self.uncaptured)
    }

    /// The dirty map of a disk.
    pub fn dirty(&self, disk: DiskIndex) -> &DirtyMap {
        &self.dirty[usize::from(disk.0)]
    }

    /// A write reached the protected disk; its range is still locked.
    pub fn handle_write(
        &mut self,
        now_us: u64,
        disk: DiskIndex,
        offset_bytes: u64,
        change: Change,
    ) {
        let len_bytes = match &change {
            Change::Data(data) => data.len() as u64,
            Change::Zero { len_bytes, .. } => *len_bytes,
        };
        if len_bytes == 0 {
            return;
        }
        let (first, end) = (offset_bytes / BLOCK, (offset_bytes + len_bytes).div_ceil(BLOCK));
        let map = &self.dirty[usize::from(disk.0)];
        let clean_blocks = if map.dirty_blocks() == 0 {
            end - first
        } else {
            map.runs(first, end).filter(|run| !run.dirty).map(|run| run.end - run.first).sum()
        };
        if clean_blocks == 0 {
            return;
        }
        let data_bytes = match &change {
            Change::Data(_) => (clean_blocks * BLOCK).min(len_bytes),
            Change::Zero { .. } => 0,
        };
        if self.queued_bytes + data_bytes + RECORD_MEMORY_BYTES as u64
            > self.options.queue_bytes_max
        {
            self.handle_uncaptured(now_us, disk, offset_bytes, len_bytes);
            return;
        }
        let before = self.pending_bytes();
        // Counted in blocks: a write that is no multiple of them may have more clean bytes around
        // it than it has itself, and still touch a dirty block.
        if clean_blocks == end - first {
            self.push(now_us, disk, offset_bytes, change);
        } else {
            self.push_clean_parts(now_us, disk, offset_bytes, change);
        }
        self.queued_bytes += self.pending_bytes() - before;
    }

    /// Content changed that is in no batch: a full queue, or a write that failed half-way. The
    /// blocks are dirty until a sync has read them.
    pub fn handle_uncaptured(
        &mut self,
        now_us: u64,
        disk: DiskIndex,
        offset_bytes: u64,
        len_bytes: u64,
    ) {
        self.uncaptured += 1;
        let map = &mut self.dirty[usize::from(disk.0)];
        let before = map.dirty_blocks();
        map.set(offset_bytes / BLOCK, (offset_bytes + len_bytes).div_ceil(BLOCK), true);
        let added_bytes = (map.dirty_blocks() - before) * BLOCK;
        match &mut self.mode {
            Mode::Ordered => self.begin_sync(false, now_us),
            Mode::Syncing { total_bytes, .. } => *total_bytes += added_bytes,
        }
    }

    /// The sync could not read these blocks: they stay dirty, and the sync does not end, until they
    /// can be read or are written anew.
    pub fn handle_unreadable(&mut self, disk: DiskIndex, offset_bytes: u64, len_bytes: u64) {
        let end = (offset_bytes + len_bytes).div_ceil(BLOCK);
        self.dirty[usize::from(disk.0)].set(offset_bytes / BLOCK, end, true);
    }

    fn begin_sync(&mut self, compare: bool, now_us: u64) {
        self.mode = Mode::Syncing { compare, total_bytes: self.dirty_bytes() };
        self.marker(now_us, RecordKind::SyncStart);
    }

    /// Bytes held in the open batch and in sealed ones not taken yet.
    fn pending_bytes(&self) -> u64 {
        self.builder.held_bytes() + self.sealed.iter().map(held_bytes).sum::<u64>()
    }

    fn push(&mut self, now_us: u64, disk: DiskIndex, offset_bytes: u64, change: Change) {
        let out = &mut self.sealed;
        match change {
            Change::Data(data) => self.builder.push_data(now_us, disk, offset_bytes, data, out),
            Change::Zero { len_bytes, may_unmap } => {
                self.builder.push_zero(now_us, disk, offset_bytes, len_bytes, may_unmap, out);
            }
        }
    }

    fn push_clean_parts(
        &mut self,
        now_us: u64,
        disk: DiskIndex,
        offset_bytes: u64,
        change: Change,
    ) {
        let len_bytes = match &change {
            Change::Data(data) => data.len() as u64,
            Change::Zero { len_bytes, .. } => *len_bytes,
        };
        let write_end = offset_bytes + len_bytes;
        let (first, end) = (offset_bytes / BLOCK, write_end.div_ceil(BLOCK));
        let runs: Vec<_> =
            self.dirty[usize::from(disk.0)].runs(first, end).filter(|run| !run.dirty).collect();
        for run in runs {
            let from = (run.first * BLOCK).max(offset_bytes);
            let to = (run.end * BLOCK).min(write_end);
            let part = match &change {
                Change::Data(data) => {
                    let (a, b) = ((from - offset_bytes) as usize, (to - offset_bytes) as usize);
                    Change::Data(data.slice(a..b))
                }
                Change::Zero { may_unmap, .. } => {
                    Change::Zero { len_bytes: to - from, may_unmap: *may_unmap }
                }
            };
            self.push(now_us, disk, from, part);
        }
    }

    fn marker(&mut self, now_us: u64, kind: RecordKind) {
        let before = self.pending_bytes();
        self.builder.push_marker(now_us, kind, &mut self.sealed);
        self.queued_bytes += self.pending_bytes() - before;
    }

    /// The sync dealt with the blocks `[first, end)` of a disk, whose range is locked: `records`
    /// and `data` are what of them the target does not have (nothing, when it has it all).
    pub fn handle_synced(
        &mut self,
        now_us: u64,
        disk: DiskIndex,
        blocks: std::ops::Range<u64>,
        records: Vec<Record>,
        data: Vec<Bytes>,
    ) {
        self.dirty[usize::from(disk.0)].set(blocks.start, blocks.end, false);
        if !records.is_empty() {
            let before = self.pending_bytes();
            self.builder.push_sync(now_us, records, data, &mut self.sealed);
            self.queued_bytes += self.pending_bytes() - before;
        }
    }

    /// Ends the sync if no block is dirty any more, and sets the point that it makes possible.
    pub fn finish_sync(&mut self, now_us: u64) -> Option<PointId> {
        if self.mode == Mode::Ordered || self.dirty_bytes() > 0 {
            return None;
        }
        self.mode = Mode::Ordered;
        self.marker(now_us, RecordKind::SyncDone);
        self.set_point(now_us).map(|(point, _)| point)
    }

    /// Sets a crash-consistent point here, and says which batch ends with it. `None` while syncing:
    /// there is no prefix to point at.
    pub fn set_point(&mut self, now_us: u64) -> Option<(PointId, BatchSeq)> {
        if self.mode != Mode::Ordered {
            return None;
        }
        let point = PointId(now_us.max(self.last_point.0 + 1));
        self.last_point = point;
        self.marker(now_us, RecordKind::Point(point));
        Some((point, self.newest()))
    }

    /// Ends the open batch and hands out every batch that is sealed.
    pub fn take_sealed(&mut self, seal_open: bool) -> Vec<PlainBatch> {
        if seal_open {
            self.sealed.extend(self.builder.seal(BatchKind::Ordered));
        }
        std::mem::take(&mut self.sealed)
    }

    /// Whether batches wait for [`Order::take_sealed`].
    pub fn has_sealed(&self) -> bool {
        !self.sealed.is_empty()
    }

    /// A batch that was `before_bytes` now takes `after_bytes`: it was encoded, or acknowledged (0).
    pub fn handle_resized(&mut self, before_bytes: u64, after_bytes: u64) {
        self.queued_bytes = (self.queued_bytes + after_bytes).saturating_sub(before_bytes);
    }

    /// Whether the sync may queue another region: it leaves half of the queue to the guest.
    pub fn has_room_for_sync(&self) -> bool {
        self.queued_bytes < self.options.queue_bytes_max / 2
    }
}

#[cfg(test)]
mod tests {
    use backhaul_proto::batch::{PlainBatch, Record, RecordKind};
    use backhaul_proto::id::{DiskIndex, Generation, PointId};
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::{Change, Mode, Order, OrderOptions};
    use crate::batch::RECORD_MEMORY_BYTES;

    const DISK: DiskIndex = DiskIndex(0);

    fn order(queue_bytes_max: u64) -> Order {
        let options = OrderOptions { queue_bytes_max };
        Order::new(options, Generation(1), &[1 << 20], PointId(5), 1)
    }

    fn synced(queue_bytes_max: u64) -> Order {
        let mut order = order(queue_bytes_max);
        order.handle_synced(1, DISK, 0..256, Vec::new(), Vec::new());
        order.finish_sync(1).unwrap();
        order.take_sealed(true);
        order
    }

    fn kinds(batches: &[PlainBatch]) -> Vec<RecordKind> {
        batches.iter().flat_map(|batch| batch.records.iter().map(|record| record.kind)).collect()
    }

    #[test]
    fn a_generation_starts_with_everything_dirty_and_says_so() {
        let mut order = order(1 << 20);
        assert_eq!(order.mode(), Mode::Syncing { compare: true, total_bytes: 1 << 20 });
        assert_eq!(kinds(&order.take_sealed(true)), [RecordKind::SyncStart]);
        assert_eq!(order.set_point(9), None);
        assert_eq!(order.finish_sync(9), None);
    }

    #[test]
    fn only_the_clean_part_of_a_write_enters_the_stream() {
        let mut order = order(1 << 20);
        order.take_sealed(true);
        order.handle_synced(1, DISK, 0..2, Vec::new(), Vec::new());
        order.handle_write(2, DISK, 4096 + 512, Change::Data(Bytes::from(vec![3; 8192])));
        let expected = RecordKind::Data { offset_bytes: 4096 + 512, len_bytes: 3584 };
        assert_eq!(kinds(&order.take_sealed(true)), [expected]);
        order.handle_write(2, DISK, 8192, Change::Data(Bytes::from(vec![3; 4096])));
        assert!(order.take_sealed(true).is_empty(), "the sync will read it");
    }

    /// Each write has a record, a handle and its request's head beside its data, 84 bytes, of which
    /// the queue counted 16: a queue full of the smallest writes took an eighth more than it may.
    #[test]
    fn the_queue_counts_what_a_small_write_takes_besides_its_data() {
        let mut order = synced(1 << 20);
        let before = order.queued_bytes();
        for sector in 0..100 {
            order.handle_write(2, DISK, sector * 512, Change::Data(Bytes::from(vec![3; 512])));
        }
        let record = size_of::<Record>() + size_of::<Bytes>();
        assert!(order.queued_bytes() - before >= 100 * (512 + record) as u64);
    }

    /// A write of 1 KiB over the border of a clean and a dirty block entered the stream whole,
    /// because the clean block alone is larger than it. The guest then put back what was in the
    /// dirty block, which changes nothing here, and the sync found that the target, asked before
    /// both, had that very content: nothing was sent, and the target kept the first write.
    #[test]
    fn a_write_over_the_border_of_a_dirty_block_leaves_its_part_of_it_to_the_sync() {
        let mut order = order(1 << 20);
        order.take_sealed(true);
        order.handle_synced(1, DISK, 0..1, Vec::new(), Vec::new());
        order.handle_write(2, DISK, 4096 - 512, Change::Data(Bytes::from(vec![3; 1024])));
        let zeroes = Change::Zero { len_bytes: 1024, may_unmap: true };
        order.handle_write(2, DISK, 4096 - 512, zeroes);
        let (offset_bytes, len_bytes) = (4096 - 512, 512);
        let expected = [
            RecordKind::Data { offset_bytes, len_bytes },
            RecordKind::Zero { offset_bytes, len_bytes, may_unmap: true },
        ];
        assert_eq!(kinds(&order.take_sealed(true)), expected);
    }

    #[test]
    fn a_full_queue_makes_dirty_and_the_sync_brings_it_back() {
        let mut order = synced(100_000);
        for block in 0..40 {
            order.handle_write(2, DISK, block * 4096, Change::Data(Bytes::from(vec![3; 4096])));
        }
        // The marker that says so has a place in any case.
        assert!(order.queued_bytes() <= 100_000 + RECORD_MEMORY_BYTES as u64);
        let Mode::Syncing { compare: false, total_bytes } = order.mode() else { panic!() };
        assert_eq!(total_bytes, order.dirty_bytes());
        let batches = order.take_sealed(true);
        assert_eq!(kinds(&batches).last(), Some(&RecordKind::SyncStart));
        assert!(order.finish_sync(3).is_none());
        order.handle_synced(4, DISK, 0..40, Vec::new(), Vec::new());
        assert_eq!(order.finish_sync(4), Some(PointId(7)));
        assert_eq!(
            kinds(&order.take_sealed(true)),
            [RecordKind::SyncDone, RecordKind::Point(PointId(7))]
        );
    }

    #[test]
    fn points_increase_even_when_the_clock_goes_back() {
        let mut order = synced(1 << 20);
        let (first, _) = order.set_point(1000).unwrap();
        let (second, batch) = order.set_point(500).unwrap();
        assert_eq!((first, second), (PointId(1000), PointId(1001)));
        assert_eq!(batch, order.newest());
    }

    proptest! {
        /// Whatever is written: a block is dirty, or the stream holds its content.
        #[test]
        fn no_write_is_missed(
            ops in prop::collection::vec((0u64..1_000_000, 1u64..60_000, any::<u8>(), 0..4), 1..60),
            queue in 1u64..300_000,
        ) {
            let mut order = synced(queue);
            let mut disk = vec![0u8; 1 << 20];
            let mut image = disk.clone();
            for (offset, len, byte, kind) in ops {
                let len = len.min((1 << 20) - offset);
                let range = offset as usize..(offset + len) as usize;
                if kind == 0 {
                    disk[range].fill(0);
                    let change = Change::Zero { len_bytes: len, may_unmap: true };
                    order.handle_write(1, DISK, offset, change);
                } else {
                    disk[range.clone()].fill(byte);
                    let data = Bytes::copy_from_slice(&disk[range]);
                    order.handle_write(1, DISK, offset, Change::Data(data));
                }
                if kind == 3 {
                    let first = offset / 4096;
                    let runs: Vec<_> = order.dirty(DISK).runs(first, first + 8).collect();
                    for run in runs.into_iter().filter(|run| run.dirty) {
                        // The sync reads these blocks now; the model takes them over at once, as
                        // everything sealed before is applied first.
                        apply(&mut image, &order.take_sealed(true));
                        let bytes = (run.first * 4096) as usize..(run.end * 4096) as usize;
                        image[bytes.clone()].copy_from_slice(&disk[bytes]);
                        order.handle_synced(1, DISK, run.first..run.end, Vec::new(), Vec::new());
                    }
                }
            }
            apply(&mut image, &order.take_sealed(true));
            for block in 0..256u64 {
                let bytes = (block * 4096) as usize..((block + 1) * 4096) as usize;
                prop_assert!(order.dirty(DISK).is_dirty(block) || disk[bytes.clone()] == image[bytes]);
            }
        }
    }

    fn apply(image: &mut [u8], batches: &[PlainBatch]) {
        for batch in batches {
            let mut data = batch.data.iter();
            for record in &batch.records {
                match record.kind {
                    RecordKind::Data { offset_bytes, len_bytes } => {
                        let at = offset_bytes as usize;
                        image[at..at + len_bytes as usize].copy_from_slice(data.next().unwrap());
                    }
                    RecordKind::Zero { offset_bytes, len_bytes, .. } => {
                        let at = offset_bytes as usize;
                        image[at..at + len_bytes as usize].fill(0);
                    }
                    _ => {}
                }
            }
        }
    }
}
