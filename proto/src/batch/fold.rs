//! References: a part of a batch's data travels as the place where the target holds it already.
//!
//! ```text
//! folded body = record table (16 each) | references (24 each) | the rest of the data, in order
//! ```
//!
//! What a reference stands for is proved by the hash of the plain body, which the header holds.

use crate::batch::{BatchHeader, BodyError};
use crate::id::DiskIndex;
use crate::limits::DISK_BYTES_MAX;

/// Bytes of a reference in a folded body.
pub const REFERENCE_BYTES: usize = 24;

/// A part of a batch's data, as the place on a disk of the same machine that holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reference {
    /// Where it belongs in the batch's data.
    pub at_bytes: u32,
    /// How many bytes, at least 1.
    pub len_bytes: u32,
    /// The disk that holds it.
    pub disk: DiskIndex,
    /// Where on that disk.
    pub offset_bytes: u64,
}

impl Reference {
    /// The bytes of a reference.
    pub fn encode(&self) -> [u8; REFERENCE_BYTES] {
        let mut out = [0; REFERENCE_BYTES];
        out[0..4].copy_from_slice(&self.at_bytes.to_le_bytes());
        out[4..8].copy_from_slice(&self.len_bytes.to_le_bytes());
        out[8..10].copy_from_slice(&self.disk.0.to_le_bytes());
        out[16..24].copy_from_slice(&self.offset_bytes.to_le_bytes());
        out
    }

    fn decode(bytes: &[u8; REFERENCE_BYTES]) -> Option<Self> {
        let [a0, a1, a2, a3, l0, l1, l2, l3, d0, d1, 0, 0, 0, 0, 0, 0, offset @ ..] = *bytes else {
            return None;
        };
        let reference = Self {
            at_bytes: u32::from_le_bytes([a0, a1, a2, a3]),
            len_bytes: u32::from_le_bytes([l0, l1, l2, l3]),
            disk: DiskIndex(u16::from_le_bytes([d0, d1])),
            offset_bytes: u64::from_le_bytes(offset),
        };
        let end = reference.offset_bytes.checked_add(reference.len_bytes.into())?;
        (reference.len_bytes > 0 && end <= DISK_BYTES_MAX).then_some(reference)
    }

    /// The bytes it stands for, in the batch's data.
    pub fn range(&self) -> std::ops::Range<usize> {
        let at = self.at_bytes as usize;
        at..at + self.len_bytes as usize
    }
}

/// A folded body, taken apart and checked against its header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoldedBody<'a> {
    /// The record table.
    pub table: &'a [u8],
    /// The references, in the order of their places in the data; they do not overlap.
    pub references: Vec<Reference>,
    /// The data that no reference stands for, in order.
    rest: &'a [u8],
}

impl<'a> FoldedBody<'a> {
    /// Takes a folded body apart. The header says that it is one, and was decoded, so its bounds
    /// hold.
    pub fn decode(header: &BatchHeader, body: &'a [u8]) -> Result<Self, BodyError> {
        let expected_bytes = header.packed_bytes() as usize;
        if body.len() != expected_bytes {
            return Err(BodyError::Length { expected_bytes, found_bytes: body.len() });
        }
        let count = header.folded.map_or(0, |folded| folded.references as usize);
        let split = (header.table_bytes(), count * REFERENCE_BYTES);
        let Some((table, body)) = body.split_at_checked(split.0) else {
            return Err(BodyError::Length { expected_bytes: split.0, found_bytes: body.len() });
        };
        let Some((entries, rest)) = body.split_at_checked(split.1) else {
            return Err(BodyError::Length { expected_bytes: split.1, found_bytes: body.len() });
        };
        let mut references = Vec::with_capacity(count);
        let (mut end, mut referenced_bytes) = (0, 0);
        for (index, entry) in entries.as_chunks::<REFERENCE_BYTES>().0.iter().enumerate() {
            let reference = Reference::decode(entry).ok_or(BodyError::Reference { index })?;
            let range = reference.range();
            if range.start < end || range.end > header.data_bytes() {
                return Err(BodyError::Reference { index });
            }
            end = range.end;
            referenced_bytes += range.len();
            references.push(reference);
        }
        if referenced_bytes + rest.len() != header.data_bytes() {
            return Err(BodyError::Data { data_bytes: header.data_bytes() });
        }
        Ok(Self { table, references, rest })
    }

    /// Fills a batch's data area, of exactly [`BatchHeader::data_bytes`]: the rest is copied to its
    /// places, and `read` puts what a reference stands for into the slice it is given.
    pub fn unfold<E>(
        &self,
        data: &mut [u8],
        mut read: impl FnMut(&Reference, &mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let (mut at, mut rest) = (0, self.rest);
        for reference in &self.references {
            let range = reference.range();
            let (here, later) = rest.split_at(range.start - at);
            data[at..range.start].copy_from_slice(here);
            (at, rest) = (range.end, later);
            read(reference, &mut data[range])?;
        }
        data[at..].copy_from_slice(rest);
        Ok(())
    }
}
