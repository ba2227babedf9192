//! The journal's own bytes before each batch header: they bind a record to its segment and place.

use backhaul_proto::batch::{BatchHeader, HEADER_BYTES};
use backhaul_proto::id::BatchSeq;

use crate::batch_buffer::{FRAME_BYTES, TABLE_OFFSET_BYTES};
use crate::journal::segment::SegmentKey;

const MAGIC: [u8; 4] = *b"BHJ1";
const HASHED_BYTES: usize = 32;

/// A valid frame and the batch header behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Frame {
    /// Every batch up to here was on stable storage when the record was written.
    pub(crate) durable: BatchSeq,
    pub(crate) header: BatchHeader,
}

/// Fills in the frame of a record that goes to `offset_bytes` of the segment with `key`.
pub(crate) fn seal(
    frame: &mut [u8],
    header: &[u8],
    key: &SegmentKey,
    offset_bytes: u64,
    durable: BatchSeq,
) {
    frame.fill(0);
    frame[..4].copy_from_slice(&MAGIC);
    frame[8..16].copy_from_slice(&offset_bytes.to_le_bytes());
    frame[16..24].copy_from_slice(&durable.0.to_le_bytes());
    let hash = hash(&frame[..HASHED_BYTES], header, key);
    frame[HASHED_BYTES..].copy_from_slice(&hash);
}

/// The frame at the start of `bytes`, if one was written to exactly this place of this life of the
/// segment. `None` also if there are fewer bytes than a frame and a header.
pub(crate) fn decode(bytes: &[u8], key: &SegmentKey, offset_bytes: u64) -> Option<Frame> {
    let bytes = bytes.get(..TABLE_OFFSET_BYTES)?;
    let (frame, header) = bytes.split_at(FRAME_BYTES);
    if frame[..4] != MAGIC || frame[8..16] != offset_bytes.to_le_bytes() {
        return None;
    }
    if frame[HASHED_BYTES..] != hash(&frame[..HASHED_BYTES], header, key) {
        return None;
    }
    let durable = BatchSeq(u64::from_le_bytes(frame[16..24].try_into().ok()?));
    let header = BatchHeader::decode(<&[u8; HEADER_BYTES]>::try_from(header).ok()?).ok()?;
    Some(Frame { durable, header })
}

fn hash(frame: &[u8], header: &[u8], key: &SegmentKey) -> [u8; 32] {
    *blake3::Hasher::new_keyed(key.as_bytes()).update(frame).update(header).finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use backhaul_proto::batch::{BatchHeader, BatchKind, Codec};
    use backhaul_proto::id::{BatchSeq, Generation, MachineIndex, MachineName, WriteSeq};

    use super::{decode, seal};
    use crate::batch_buffer::{FRAME_BYTES, TABLE_OFFSET_BYTES};
    use crate::journal::segment::{MachineTag, SegmentHeader, SegmentKey, SegmentNumber};

    fn key(nonce: u8) -> SegmentKey {
        let name: MachineName = "web01".parse().unwrap();
        let header = SegmentHeader {
            number: SegmentNumber(1),
            generation: Generation(1),
            first_batch: BatchSeq(1),
            first_write: WriteSeq(1),
            durable: BatchSeq(0),
            segment_bytes: 1 << 20,
            machine: MachineTag::of(&name),
            nonce: [nonce; 16],
        };
        header.encode().1
    }

    fn sealed(key: &SegmentKey, offset_bytes: u64) -> [u8; TABLE_OFFSET_BYTES] {
        let header = BatchHeader {
            machine: MachineIndex(0),
            kind: BatchKind::Ordered,
            folded: None,
            codec: Codec::Plain,
            generation: Generation(1),
            batch: BatchSeq(5),
            first_write: WriteSeq(9),
            records: 1,
            captured_at_us: 1,
            plain_bytes: 16,
            wire_bytes: 16,
            body_hash: [3; 32],
        };
        let mut bytes = [0; TABLE_OFFSET_BYTES];
        bytes[FRAME_BYTES..].copy_from_slice(&header.encode());
        let (frame, header) = bytes.split_at_mut(FRAME_BYTES);
        seal(frame, header, key, offset_bytes, BatchSeq(4));
        bytes
    }

    /// A frame of the file's earlier life, or one that a guest made up, differs in the key; one
    /// that was copied from elsewhere in the segment differs in the place.
    #[test]
    fn a_frame_is_valid_in_one_life_and_place_only() {
        let good = sealed(&key(1), 8192);
        let frame = decode(&good, &key(1), 8192).unwrap();
        assert_eq!((frame.durable, frame.header.batch), (BatchSeq(4), BatchSeq(5)));
        assert_eq!(decode(&good, &key(2), 8192), None);
        assert_eq!(decode(&good, &key(1), 4096), None);
        assert_eq!(decode(&good[..TABLE_OFFSET_BYTES - 1], &key(1), 8192), None);
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let good = sealed(&key(1), 8192);
        for bit in 0..TABLE_OFFSET_BYTES * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(&bad, &key(1), 8192), None, "bit {bit}");
        }
    }
}
