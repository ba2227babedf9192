use backhaul_proto::batch::{
    BatchHeader, BatchKind, BodyError, Codec, Compression, Compressor, HEADER_BYTES, PlainBatch,
    Record, RecordKind,
};
use backhaul_proto::id::{BatchSeq, DiskIndex, Generation, MachineIndex, WriteSeq};
use bytes::Bytes;

use super::{BatchBuffer, FRAME_BYTES, IncomingBatch, TABLE_OFFSET_BYTES, data_offset_bytes};
use crate::storage::AlignedBuf;

/// What a record of a test batch is made from.
#[derive(Debug, Clone)]
pub(crate) enum Write {
    Data { disk: u16, offset_bytes: u64, content: Vec<u8> },
    Other(Record),
}

/// A batch as it would come from the network.
pub(crate) fn plain(
    kind: BatchKind,
    generation: u64,
    batch: u64,
    first_write: u64,
    writes: &[Write],
) -> PlainBatch {
    let record = |write: &Write| match write {
        Write::Data { disk, offset_bytes, content } => Record {
            disk: DiskIndex(*disk),
            kind: RecordKind::Data { offset_bytes: *offset_bytes, len_bytes: content.len() as u32 },
        },
        Write::Other(record) => *record,
    };
    let data: Vec<Bytes> = writes
        .iter()
        .filter_map(|write| match write {
            Write::Data { content, .. } => Some(Bytes::from(content.clone())),
            Write::Other(_) => None,
        })
        .collect();
    PlainBatch {
        kind,
        generation: Generation(generation),
        batch: BatchSeq(batch),
        first_write: WriteSeq(first_write),
        captured_at_us: batch,
        records: writes.iter().map(record).collect(),
        data_bytes: data.iter().map(Bytes::len).sum(),
        data,
    }
}

/// Sends a batch through its wire form into a buffer.
pub(crate) fn receive(batch: PlainBatch, compression: Compression) -> IncomingBatch {
    buffer(batch, compression).verify().unwrap()
}

fn buffer(batch: PlainBatch, compression: Compression) -> BatchBuffer {
    let mut compressor = Compressor::default();
    let wire = batch.encode(compression, &mut compressor).chunks(MachineIndex(5)).concat();
    let (head, body) = wire.split_at(HEADER_BYTES);
    let header = BatchHeader::decode(head.try_into().unwrap()).unwrap();
    let mut buffer = BatchBuffer::new(&header);
    match header.codec {
        Codec::Plain => {
            let (table, data) = body.split_at(header.table_bytes());
            buffer.table_mut().copy_from_slice(table);
            buffer.data_mut().copy_from_slice(data);
        }
        Codec::Zstd => {
            let room = buffer.plain_mut();
            let n = zstd::bulk::decompress_to_buffer(body, room).unwrap();
            assert_eq!(n, header.plain_bytes as usize);
            buffer.settle_plain();
        }
    }
    buffer
}

fn sample(records: u64) -> PlainBatch {
    let writes: Vec<_> = (0..records)
        .map(|i| Write::Data { disk: 1, offset_bytes: i * 512, content: vec![i as u8; 512] })
        .collect();
    plain(BatchKind::Ordered, 3, 1, 1, &writes)
}

#[test]
fn plain_and_compressed_bodies_land_in_the_same_bytes() {
    // 245 records fill the first page to the byte, 246 need another one.
    for records in [1, 244, 245, 246, 4096] {
        let one = receive(sample(records), Compression::Off);
        let other = receive(sample(records), Compression::Zstd(1));
        assert_eq!(one.journal_bytes(), other.journal_bytes(), "{records} records");
        assert!(one.journal_bytes().len().is_multiple_of(4096));
        assert_eq!(one.data().as_ptr().addr() % 4096, 0);
        assert_eq!(one.data_of(records as usize - 1), vec![(records - 1) as u8; 512]);
        assert_eq!(one.header().codec, Codec::Plain);
    }
}

/// Buffers are taken from those that batches before left: nothing of them may reach the journal.
#[test]
fn what_a_buffer_held_before_is_not_journalled() {
    for compression in [Compression::Off, Compression::Zstd(1)] {
        let fresh = receive(sample(245), compression);
        for _ in 0..8 {
            let mut dirty = AlignedBuf::zeroed(fresh.journal_bytes().len());
            dirty.fill(0xff);
        }
        let batch = receive(sample(245), compression);
        let (header, bytes) = (batch.header(), batch.journal_bytes());
        assert_eq!(bytes, fresh.journal_bytes());
        let table_end = TABLE_OFFSET_BYTES + header.table_bytes();
        let data = data_offset_bytes(header);
        let zero = |range: &[u8]| range.iter().all(|byte| *byte == 0);
        assert!(zero(&bytes[..FRAME_BYTES]), "the frame");
        assert!(zero(&bytes[table_end..data]), "between table and data");
        assert!(zero(&bytes[data + header.data_bytes()..]), "behind the data");
    }
}

#[test]
fn a_changed_byte_is_refused() {
    let mut bad = buffer(sample(3), Compression::Off);
    bad.data_mut()[700] ^= 4;
    assert_eq!(bad.verify().unwrap_err(), BodyError::Hash);
    let mut bad = buffer(sample(3), Compression::Off);
    bad.table_mut()[0] ^= 1;
    assert_eq!(bad.verify().unwrap_err(), BodyError::Hash);
}

#[test]
fn a_sync_batch_is_one_page_in_the_journal() {
    let mut batch = sample(100);
    batch.kind = BatchKind::Sync;
    let batch = receive(batch, Compression::Off);
    assert_eq!(batch.journal_bytes().len(), 4096);
    assert_eq!(batch.data().len(), 51200);
}
