//! Turns data that is all zeroes into zero records, so that it costs nothing on the wire.

use backhaul_proto::batch::{PlainBatch, Record, RecordKind};
use bytes::Bytes;

/// Whether every byte is zero. The first and last bytes settle most cases.
pub(crate) fn is_zero(data: &[u8]) -> bool {
    let (Some(first), Some(last)) = (data.first(), data.last()) else { return true };
    // Comparing a slice with itself shifted by one is a memcmp: tens of gigabytes a second.
    *first == 0 && *last == 0 && data[1..] == data[..data.len() - 1]
}

/// Replaces the data records whose data is all zero, keeping their places in the order. The space
/// is not given back at the target: the guest wrote it, and may count on it.
///
/// When little is left it is copied: a queue full of small writes between large zeroes would hold the
/// zeroes.
pub fn elide_zeroes(batch: &mut PlainBatch) {
    let before_bytes = batch.data_bytes;
    let mut next_data = 0;
    let mut kept = Vec::with_capacity(batch.data.len());
    for record in &mut batch.records {
        let RecordKind::Data { offset_bytes, len_bytes } = record.kind else { continue };
        let data = &batch.data[next_data];
        next_data += 1;
        if is_zero(data) {
            let kind = RecordKind::Zero { offset_bytes, len_bytes, may_unmap: false };
            *record = Record { disk: record.disk, kind };
            batch.data_bytes -= len_bytes as usize;
        } else {
            kept.push(data.clone());
        }
    }
    batch.data = alone(kept, before_bytes);
}

/// The same pieces of `whole_bytes`; in a buffer of their own when they are a small part of it. A
/// slice keeps the whole of the buffer that it is a part of, which no queue counts.
pub(crate) fn alone(pieces: Vec<Bytes>, whole_bytes: usize) -> Vec<Bytes> {
    if pieces.iter().map(Bytes::len).sum::<usize>() > whole_bytes / 2 {
        return pieces;
    }
    let mut all = Bytes::from(pieces.concat());
    pieces.iter().map(|piece| all.split_to(piece.len())).collect()
}

#[cfg(test)]
mod tests {
    use backhaul_proto::batch::{BatchKind, RecordKind};
    use backhaul_proto::id::{DiskIndex, Generation};
    use bytes::Bytes;

    use super::{elide_zeroes, is_zero};
    use crate::batch::Builder;

    #[test]
    fn zeroes_are_told_from_data() {
        assert!(is_zero(&[]));
        assert!(is_zero(&[0; 4096]));
        for at in [0, 1, 2000, 4095] {
            let mut data = [0; 4096];
            data[at] = 1;
            assert!(!is_zero(&data), "{at}");
        }
        assert!(!is_zero(&[7; 64]));
    }

    #[test]
    fn only_zero_data_is_replaced() {
        let mut builder = Builder::new(Generation(1));
        let mut out = Vec::new();
        for (offset, byte) in [(0, 1), (4096, 0), (8192, 2)] {
            builder.push_data(1, DiskIndex(0), offset, Bytes::from(vec![byte; 4096]), &mut out);
        }
        let mut batch = builder.seal(BatchKind::Ordered).unwrap();
        elide_zeroes(&mut batch);
        assert_eq!(batch.data_bytes, 8192);
        assert_eq!(batch.data.len(), 2);
        let kind = RecordKind::Zero { offset_bytes: 4096, len_bytes: 4096, may_unmap: false };
        assert_eq!(batch.records[1].kind, kind);
    }

    /// A guest that fills its disk with zeroes and commits 512 bytes now and then, to a target that
    /// is away: the queue counted the 512 bytes, and held the zeroes with them, gigabytes.
    #[test]
    fn what_is_left_between_zeroes_does_not_hold_them() {
        let mut builder = Builder::new(Generation(1));
        let mut received = Bytes::from([vec![0; 65536], vec![3; 512]].concat());
        let buffer = received.as_ptr_range();
        let zeroes = received.split_to(65536);
        for (offset, data) in [(0, zeroes), (65536, received)] {
            builder.push_data(1, DiskIndex(0), offset, data, &mut Vec::new());
        }
        let mut batch = builder.seal(BatchKind::Ordered).unwrap();
        elide_zeroes(&mut batch);
        assert_eq!(batch.data, [vec![3; 512]]);
        assert!(!buffer.contains(&batch.data[0].as_ptr()));
    }
}
