//! Gathers records into batches. Pure: it neither reads a clock nor sends anything.

use backhaul_proto::batch::{BatchKind, PlainBatch, Record, RecordKind};
use backhaul_proto::id::{BatchSeq, DiskIndex, Generation, WriteSeq};
use backhaul_proto::limits::{BATCH_DATA_BYTES_TARGET, BATCH_RECORDS_MAX, RECORD_DATA_BYTES_MAX};
use bytes::Bytes;

/// Memory that a record takes besides its data: itself, the handle of the data, and the head of its
/// request, which stands before it in the buffer that both are slices of. With the smallest writes
/// this is a seventh of what a full queue takes.
pub const RECORD_MEMORY_BYTES: usize = size_of::<Record>() + size_of::<Bytes>() + 28;

/// The batch that is being filled, and the next numbers of the order.
#[derive(Debug)]
pub struct Builder {
    generation: Generation,
    next_batch: BatchSeq,
    next_write: WriteSeq,
    captured_at_us: u64,
    records: Vec<Record>,
    data: Vec<Bytes>,
    data_bytes: usize,
    /// Data at which a batch is sealed.
    batch_bytes_max: u32,
}

impl Builder {
    /// An empty builder at the start of a generation.
    pub fn new(generation: Generation) -> Self {
        Self {
            generation,
            next_batch: BatchSeq(1),
            next_write: WriteSeq(1),
            captured_at_us: 0,
            records: Vec::new(),
            data: Vec::new(),
            data_bytes: 0,
            batch_bytes_max: BATCH_DATA_BYTES_TARGET,
        }
    }

    /// Data at which a batch is sealed, in bytes.
    pub fn batch_bytes_max(&self) -> u32 {
        self.batch_bytes_max
    }

    /// Batches have so many bytes of data from now on: a whole number of sectors, and the target size
    /// of a batch at most.
    pub fn set_batch_bytes_max(&mut self, bytes: u32) {
        self.batch_bytes_max = bytes.min(BATCH_DATA_BYTES_TARGET);
    }

    /// The generation of its batches.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// The last batch that was sealed.
    pub fn newest(&self) -> BatchSeq {
        BatchSeq(self.next_batch.0 - 1)
    }

    /// Whether no record waits to be sealed.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Memory that the open batch holds, as the queue bound counts it.
    pub fn held_bytes(&self) -> u64 {
        (self.data_bytes + self.records.len() * RECORD_MEMORY_BYTES) as u64
    }

    /// Adds a guest's data, split so that no record is over its bound or larger than a batch is to be.
    /// Full batches go to `out`. Copies nothing: the slices share `data`'s buffer.
    pub fn push_data(
        &mut self,
        now_us: u64,
        disk: DiskIndex,
        offset_bytes: u64,
        mut data: Bytes,
        out: &mut Vec<PlainBatch>,
    ) {
        let mut offset_bytes = offset_bytes;
        let piece_bytes = RECORD_DATA_BYTES_MAX.min(self.batch_bytes_max) as usize;
        while !data.is_empty() {
            let piece = data.split_to(data.len().min(piece_bytes));
            let len_bytes = piece.len() as u32;
            self.data_bytes += piece.len();
            self.data.push(piece);
            self.push_record(
                now_us,
                Record { disk, kind: RecordKind::Data { offset_bytes, len_bytes } },
                out,
            );
            offset_bytes += u64::from(len_bytes);
        }
    }

    /// Adds zeroes, split so that each record's length fits its field.
    pub fn push_zero(
        &mut self,
        now_us: u64,
        disk: DiskIndex,
        offset_bytes: u64,
        len_bytes: u64,
        may_unmap: bool,
        out: &mut Vec<PlainBatch>,
    ) {
        const PIECE: u64 = 1 << 30;
        let end = offset_bytes + len_bytes;
        let mut offset_bytes = offset_bytes;
        while offset_bytes < end {
            let len_bytes = (end - offset_bytes).min(PIECE) as u32;
            let kind = RecordKind::Zero { offset_bytes, len_bytes, may_unmap };
            self.push_record(now_us, Record { disk, kind }, out);
            offset_bytes += u64::from(len_bytes);
        }
    }

    /// Adds a marker, and seals: a marker is the last record of its batch, so that the target can
    /// stop exactly there.
    pub fn push_marker(&mut self, now_us: u64, kind: RecordKind, out: &mut Vec<PlainBatch>) {
        self.push_record(now_us, Record { disk: DiskIndex(0), kind }, out);
        out.extend(self.seal(BatchKind::Ordered));
    }

    /// A batch of its own for a region read by a sync: whatever was captured before it is sealed
    /// first, so that the region takes its place in the order.
    pub fn push_sync(
        &mut self,
        now_us: u64,
        records: Vec<Record>,
        data: Vec<Bytes>,
        out: &mut Vec<PlainBatch>,
    ) {
        out.extend(self.seal(BatchKind::Ordered));
        self.captured_at_us = now_us;
        self.data_bytes = data.iter().map(Bytes::len).sum();
        self.records = records;
        self.data = data;
        out.extend(self.seal(BatchKind::Sync));
    }

    fn push_record(&mut self, now_us: u64, record: Record, out: &mut Vec<PlainBatch>) {
        self.captured_at_us = now_us;
        self.records.push(record);
        let full = self.data_bytes >= self.batch_bytes_max as usize
            || self.records.len() >= BATCH_RECORDS_MAX as usize;
        if full {
            out.extend(self.seal(BatchKind::Ordered));
        }
    }

    /// Ends the open batch, if it holds anything.
    pub fn seal(&mut self, kind: BatchKind) -> Option<PlainBatch> {
        if self.records.is_empty() {
            return None;
        }
        let batch = PlainBatch {
            kind,
            generation: self.generation,
            batch: self.next_batch,
            first_write: self.next_write,
            captured_at_us: self.captured_at_us,
            records: std::mem::take(&mut self.records),
            data: std::mem::take(&mut self.data),
            data_bytes: std::mem::take(&mut self.data_bytes),
        };
        self.next_batch = self.next_batch.next();
        self.next_write = WriteSeq(self.next_write.0 + batch.records.len() as u64);
        Some(batch)
    }
}

/// Memory that a plain batch holds, as the queue bound counts it.
pub fn held_bytes(batch: &PlainBatch) -> u64 {
    (batch.data_bytes + batch.records.len() * RECORD_MEMORY_BYTES) as u64
}

#[cfg(test)]
mod tests {
    use backhaul_proto::batch::{BatchKind, RecordKind};
    use backhaul_proto::id::{DiskIndex, Generation, PointId};
    use bytes::Bytes;

    use super::Builder;

    #[test]
    fn numbers_run_without_gaps_over_splits_markers_and_syncs() {
        let mut builder = Builder::new(Generation(1));
        let mut out = Vec::new();
        let disk = DiskIndex(2);
        builder.push_data(1, disk, 0, Bytes::from(vec![1; 5 << 20]), &mut out);
        builder.push_zero(2, disk, 0, 5 << 30, true, &mut out);
        builder.push_marker(3, RecordKind::Point(PointId(3)), &mut out);
        builder.push_data(4, disk, 512, Bytes::from_static(&[9; 512]), &mut out);
        let record = out[0].records[0];
        builder.push_sync(5, vec![record], vec![Bytes::from(vec![0; 1 << 20])], &mut out);
        assert!(builder.seal(BatchKind::Ordered).is_none());
        let (mut batch_seq, mut write_seq) = (1, 1);
        for batch in &out {
            assert_eq!((batch.batch.0, batch.first_write.0), (batch_seq, write_seq));
            batch_seq += 1;
            write_seq += batch.records.len() as u64;
        }
        let marker = &out[out.len() - 3];
        assert_eq!(marker.records.last().unwrap().kind, RecordKind::Point(PointId(3)));
        assert_eq!(out.last().unwrap().kind, BatchKind::Sync);
        assert_eq!(out.iter().map(|b| b.data_bytes).sum::<usize>(), (5 << 20) + 512 + (1 << 20));
    }

    #[test]
    fn a_batch_is_sealed_at_its_target_size() {
        let mut builder = Builder::new(Generation(1));
        let mut out = Vec::new();
        for block in 0..256 {
            builder.push_data(1, DiskIndex(0), block * 4096, Bytes::from(vec![1; 4096]), &mut out);
        }
        assert_eq!(out.len(), 1);
        assert!(builder.is_empty());
    }

    /// One guest's write of 4 MiB, under a ceiling, was let out in batches of 1 MiB: each held up every
    /// other machine's over TCP.
    #[test]
    fn under_a_low_ceiling_batches_and_their_records_are_small() {
        let mut builder = Builder::new(Generation(1));
        builder.set_batch_bytes_max(64 << 10);
        let mut out = Vec::new();
        builder.push_data(1, DiskIndex(0), 0, Bytes::from(vec![1; 4 << 20]), &mut out);
        assert!(out.iter().all(|batch| batch.data_bytes == 64 << 10), "{out:?}");
        assert_eq!(out.len(), 64);
    }
}
