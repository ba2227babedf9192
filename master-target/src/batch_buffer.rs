//! A received batch in the one place it is ever copied to: laid out as the journal stores it.
//!
//! ```text
//! 0      64       192                     data offset (a multiple of 4096)
//! frame | header | record table | zeroes | data | zeroes to 4096
//! ```
//!
//! The network reads into [`BatchBuffer::table_mut`] and [`BatchBuffer::data_mut`] (or zstd writes
//! into [`BatchBuffer::plain_mut`]), the journal writes the whole to its segment, and the image is
//! written from the data area. The frame is the journal's; see `JOURNAL.md`.

use std::ops::Range;

use backhaul_proto::batch::{
    BatchHeader, BatchKind, BodyError, Codec, HEADER_BYTES, Record, RecordKind, check_body,
};
use backhaul_proto::id::MachineIndex;

use crate::storage::{AlignedBuf, PAGE_BYTES};

/// Bytes of the journal's frame before the batch header.
pub const FRAME_BYTES: usize = 64;

/// Where the record table starts.
pub const TABLE_OFFSET_BYTES: usize = FRAME_BYTES + HEADER_BYTES;

/// A batch being received.
#[derive(Debug)]
pub struct BatchBuffer {
    header: BatchHeader,
    bytes: AlignedBuf,
}

/// A batch whose body was checked against its hash.
#[derive(Debug)]
pub struct IncomingBatch {
    buffer: BatchBuffer,
    records: Vec<Record>,
}

/// A checked batch, wherever its bytes are.
#[derive(Debug, Clone, Copy)]
pub struct BatchView<'a> {
    /// The batch's header.
    pub header: &'a BatchHeader,
    /// Its records, in order.
    pub records: &'a [Record],
    /// The data of its data records, in order.
    pub data: &'a [u8],
}

/// Where the data of a batch stands in its journal record.
pub(crate) fn data_offset_bytes(header: &BatchHeader) -> usize {
    (TABLE_OFFSET_BYTES + header.table_bytes()).next_multiple_of(PAGE_BYTES)
}

/// Bytes of a batch's journal record.
pub(crate) fn record_bytes(header: &BatchHeader) -> usize {
    match header.kind {
        BatchKind::Ordered => {
            data_offset_bytes(header) + header.data_bytes().next_multiple_of(PAGE_BYTES)
        }
        BatchKind::Sync => PAGE_BYTES,
    }
}

impl BatchBuffer {
    /// Room for the batch that `header` announces. At most
    /// [`backhaul_proto::limits::BATCH_PLAIN_BYTES_MAX`] plus two pages, as decoding checked it.
    pub fn new(header: &BatchHeader) -> Self {
        let len_bytes =
            data_offset_bytes(header) + header.data_bytes().next_multiple_of(PAGE_BYTES);
        let mut bytes = AlignedBuf::stale(len_bytes);
        let header = BatchHeader {
            machine: MachineIndex(0),
            codec: Codec::Plain,
            folded: None,
            wire_bytes: header.plain_bytes,
            ..header.clone()
        };
        bytes[..FRAME_BYTES].fill(0);
        bytes[FRAME_BYTES..TABLE_OFFSET_BYTES].copy_from_slice(&header.encode());
        let mut buffer = Self { header, bytes };
        // The table and the data are filled from outside, whole, or the batch is not taken.
        let (table, data) = (buffer.table_range(), buffer.data_range());
        buffer.bytes[table.end..data.start].fill(0);
        buffer.bytes[data.end..].fill(0);
        buffer
    }

    /// The header as the journal keeps it: plain, and of no connection.
    pub fn header(&self) -> &BatchHeader {
        &self.header
    }

    fn table_range(&self) -> Range<usize> {
        TABLE_OFFSET_BYTES..TABLE_OFFSET_BYTES + self.header.table_bytes()
    }

    fn data_range(&self) -> Range<usize> {
        let start = data_offset_bytes(&self.header);
        start..start + self.header.data_bytes()
    }

    /// The record table, to be filled with the first bytes of a plain body.
    pub fn table_mut(&mut self) -> &mut [u8] {
        let range = self.table_range();
        &mut self.bytes[range]
    }

    /// The data area, to be filled with the rest of a plain body. Page-aligned.
    pub fn data_mut(&mut self) -> &mut [u8] {
        let range = self.data_range();
        &mut self.bytes[range]
    }

    /// Room for a whole plain body in one piece, for a decompressor; exactly
    /// [`BatchHeader::plain_bytes`] long. Call [`BatchBuffer::settle_plain`] when it is filled.
    pub fn plain_mut(&mut self) -> &mut [u8] {
        let data = self.data_range();
        &mut self.bytes[data.start - self.header.table_bytes()..data.end]
    }

    /// Moves the record table from the start of [`BatchBuffer::plain_mut`] to its place: the only
    /// copy, at most 64 KiB.
    pub fn settle_plain(&mut self) {
        let table = self.table_range();
        let data_start = self.data_range().start;
        self.bytes.copy_within(data_start - table.len()..data_start, table.start);
        self.bytes[table.end..data_start].fill(0);
    }

    /// Checks the body against the header's hash and decodes its records. The hash costs the time
    /// of reading every byte; call it where cores are to spare, not on the journal's thread.
    pub fn verify(self) -> Result<IncomingBatch, BodyError> {
        let table = &self.bytes[self.table_range()];
        let data = &self.bytes[self.data_range()];
        let records = check_body(&self.header, table, data)?;
        Ok(IncomingBatch { buffer: self, records })
    }
}

impl IncomingBatch {
    /// The batch's header, as the journal keeps it.
    pub fn header(&self) -> &BatchHeader {
        &self.buffer.header
    }

    /// The batch's records, in order.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// The data area: the data of the data records, in order.
    pub fn data(&self) -> &[u8] {
        &self.buffer.bytes[self.buffer.data_range()]
    }

    /// The data of the record at `index`; empty for records without data.
    pub fn data_of(&self, index: usize) -> &[u8] {
        let start = self.records[..index].iter().map(Record::data_bytes).sum::<usize>();
        &self.data()[start..start + self.records[index].data_bytes()]
    }

    /// Header, records and data without their owner.
    pub fn view(&self) -> BatchView<'_> {
        BatchView { header: self.header(), records: &self.records, data: self.data() }
    }

    /// What the journal writes: all of an ordered batch, the first page of a sync batch.
    pub fn journal_bytes(&self) -> &[u8] {
        &self.buffer.bytes[..record_bytes(self.header())]
    }

    /// The journal's part of [`IncomingBatch::journal_bytes`].
    pub(crate) fn frame_and_header_mut(&mut self) -> (&mut [u8], &[u8]) {
        let (frame, rest) = self.buffer.bytes[..TABLE_OFFSET_BYTES].split_at_mut(FRAME_BYTES);
        (frame, rest)
    }

    /// Bytes of memory it holds.
    pub fn memory_bytes(&self) -> usize {
        self.buffer.bytes.memory_bytes() + self.records.len() * size_of::<Record>()
    }
}

impl BatchView<'_> {
    /// Bytes that applying it writes; a zeroed range counts as a page, since it moves no data.
    pub(crate) fn apply_bytes(&self) -> u64 {
        let zeroes =
            self.records.iter().filter(|r| matches!(r.kind, RecordKind::Zero { .. })).count();
        (self.data.len() + zeroes * PAGE_BYTES) as u64
    }
}

#[cfg(test)]
pub(crate) mod tests;
