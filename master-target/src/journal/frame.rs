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
