//! The fixed header of a batch.

use thiserror::Error;

use crate::batch::{RECORD_BYTES, REFERENCE_BYTES};
use crate::id::{BatchSeq, Generation, MachineIndex, WriteSeq};
use crate::limits::{BATCH_PLAIN_BYTES_MAX, BATCH_RECORDS_MAX, REFERENCES_MAX};

/// Bytes of a batch header on the wire and in the journal.
pub const HEADER_BYTES: usize = 128;

const MAGIC: [u8; 4] = *b"BHB1";
const HASHED_BYTES: usize = 112;

/// What the records of a batch are, and with that how the target stores them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchKind {
    /// Guest writes and markers, in the machine's write order: journalled, then applied.
    Ordered,
    /// Regions read by a sync: written straight to the image.
    Sync,
}

/// How the body travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// As it is.
    Plain,
    /// One zstd frame whose content size is [`BatchHeader::packed_bytes`].
    Zstd,
}

/// Says that a part of the data travels as references.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Folded {
    /// How many, 1 to [`REFERENCES_MAX`].
    pub references: u32,
    /// Bytes of the folded body: record table, references, and the rest of the data.
    pub bytes: u32,
}

/// The header of a batch. `SPEC.md` has the byte table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchHeader {
    /// The machine, by its place in the connection's hello. Meaningless in the journal.
    pub machine: MachineIndex,
    /// How the target stores it.
    pub kind: BatchKind,
    /// How the body travels.
    pub codec: Codec,
    /// Whether the body is folded; never in the journal.
    pub folded: Option<Folded>,
    /// The generation that the sequence numbers belong to.
    pub generation: Generation,
    /// The batch's place in its generation.
    pub batch: BatchSeq,
    /// The place of its first record in the write order; the others follow without a gap.
    pub first_write: WriteSeq,
    /// Number of records, 1 to [`BATCH_RECORDS_MAX`].
    pub records: u32,
    /// The agent's wall clock at the newest record, in microseconds since 1970 UTC.
    pub captured_at_us: u64,
    /// Bytes of the plain body (table and data), at most [`BATCH_PLAIN_BYTES_MAX`].
    pub plain_bytes: u32,
    /// Bytes of the body as it travels; never more than `plain_bytes`.
    pub wire_bytes: u32,
    /// blake3 of the plain body.
    pub body_hash: [u8; 32],
}

/// Why 128 bytes are not a batch header.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum HeaderError {
    /// The first bytes are not those of a batch.
    #[error("these bytes do not start a batch")]
    Magic,
    /// The header's hash does not match.
    #[error("the batch header is damaged: its hash does not match")]
    Hash,
    /// A field has a value that this version does not know or allow.
    #[error("the batch header's field `{field}` has the value {value}, which is not allowed")]
    Field {
        /// The field as [`BatchHeader`] names it.
        field: &'static str,
        /// What it held.
        value: u64,
    },
}

impl BatchHeader {
    /// Bytes of the record table at the start of the plain body.
    pub fn table_bytes(&self) -> usize {
        self.records as usize * RECORD_BYTES
    }

    /// Bytes of data behind the record table.
    pub fn data_bytes(&self) -> usize {
        (self.plain_bytes as usize).saturating_sub(self.table_bytes())
    }

    /// Bytes of the body before zstd, folded or plain.
    pub fn packed_bytes(&self) -> u32 {
        self.folded.map_or(self.plain_bytes, |folded| folded.bytes)
    }

    /// Bytes that references keep off the wire, before zstd.
    pub fn referenced_bytes(&self) -> u32 {
        self.plain_bytes.saturating_sub(self.packed_bytes())
    }

    /// The place of the last record in the write order.
    pub fn last_write(&self) -> WriteSeq {
        WriteSeq(self.first_write.0 + u64::from(self.records) - 1)
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            out[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        put(&MAGIC);
        put(&(HEADER_BYTES as u16).to_le_bytes());
        put(&[match self.kind {
            BatchKind::Ordered => 1,
            BatchKind::Sync => 2,
        }]);
        put(&[match (self.codec, self.folded) {
            (Codec::Plain, None) => 0,
            (Codec::Zstd, None) => 1,
            (Codec::Plain, Some(_)) => 2,
            (Codec::Zstd, Some(_)) => 3,
        }]);
        put(&self.machine.0.to_le_bytes());
        put(&[0; 2]);
        put(&self.records.to_le_bytes());
        put(&self.generation.0.to_le_bytes());
        put(&self.batch.0.to_le_bytes());
        put(&self.first_write.0.to_le_bytes());
        put(&self.captured_at_us.to_le_bytes());
        put(&self.plain_bytes.to_le_bytes());
        put(&self.wire_bytes.to_le_bytes());
        put(&self.body_hash);
        if let Some(Folded { references, bytes }) = self.folded {
            put(&references.to_le_bytes());
            put(&bytes.to_le_bytes());
        }
        let hash = blake3::hash(&out[..HASHED_BYTES]);
        out[HASHED_BYTES..].copy_from_slice(&hash.as_bytes()[..HEADER_BYTES - HASHED_BYTES]);
        out
    }

    /// Reads a header and checks its hash and every bound.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, HeaderError> {
        if bytes[..4] != MAGIC {
            return Err(HeaderError::Magic);
        }
        let hash = blake3::hash(&bytes[..HASHED_BYTES]);
        if hash.as_bytes()[..HEADER_BYTES - HASHED_BYTES] != bytes[HASHED_BYTES..] {
            return Err(HeaderError::Hash);
        }
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        let bad = |field, value: u64| Err(HeaderError::Field { field, value });

        if usize::from(u16_at(4)) != HEADER_BYTES {
            return bad("header_bytes", u16_at(4).into());
        }
        let kind = match bytes[6] {
            1 => BatchKind::Ordered,
            2 => BatchKind::Sync,
            other => return bad("kind", other.into()),
        };
        let folded = || Some(Folded { references: u32_at(88), bytes: u32_at(92) });
        let (codec, folded) = match bytes[7] {
            0 => (Codec::Plain, None),
            1 => (Codec::Zstd, None),
            2 => (Codec::Plain, folded()),
            3 => (Codec::Zstd, folded()),
            other => return bad("codec", other.into()),
        };
        let mut body_hash = [0; 32];
        body_hash.copy_from_slice(&bytes[56..88]);
        let header = Self {
            machine: MachineIndex(u16_at(8)),
            kind,
            codec,
            folded,
            records: u32_at(12),
            generation: Generation(u64_at(16)),
            batch: BatchSeq(u64_at(24)),
            first_write: WriteSeq(u64_at(32)),
            captured_at_us: u64_at(40),
            plain_bytes: u32_at(48),
            wire_bytes: u32_at(52),
            body_hash,
        };
        if header.records == 0 || header.records > BATCH_RECORDS_MAX {
            return bad("records", header.records.into());
        }
        if header.batch.0 == 0 || header.batch.0 > u64::MAX / 2 {
            return bad("batch", header.batch.0);
        }
        if header.first_write.0 == 0 || header.first_write.0 > u64::MAX / 2 {
            return bad("first_write", header.first_write.0);
        }
        let plain = header.plain_bytes as usize;
        if plain < header.table_bytes() || header.plain_bytes > BATCH_PLAIN_BYTES_MAX {
            return bad("plain_bytes", header.plain_bytes.into());
        }
        if let Some(Folded { references, bytes }) = header.folded {
            if references == 0 || references > REFERENCES_MAX {
                return bad("references", references.into());
            }
            let least = header.table_bytes() + references as usize * REFERENCE_BYTES;
            if (bytes as usize) < least || bytes >= header.plain_bytes {
                return bad("folded_bytes", bytes.into());
            }
        }
        let packed_bytes = header.packed_bytes();
        let wire_allowed = match header.codec {
            Codec::Plain => header.wire_bytes == packed_bytes,
            Codec::Zstd => header.wire_bytes > 0 && header.wire_bytes <= packed_bytes,
        };
        if !wire_allowed {
            return bad("wire_bytes", header.wire_bytes.into());
        }
        Ok(header)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::{BatchHeader, BatchKind, Codec, Folded, HEADER_BYTES, HeaderError};
    use crate::id::{BatchSeq, Generation, MachineIndex, WriteSeq};

    pub(crate) fn sample() -> BatchHeader {
        BatchHeader {
            machine: MachineIndex(3),
            kind: BatchKind::Ordered,
            codec: Codec::Zstd,
            folded: None,
            generation: Generation(0x0102_0304_0506_0708),
            batch: BatchSeq(9),
            first_write: WriteSeq(1000),
            records: 2,
            captured_at_us: 1_795_000_000_000_000,
            plain_bytes: 32 + 4096,
            wire_bytes: 100,
            body_hash: [0xab; 32],
        }
    }

    #[test]
    fn survives_a_round_trip() {
        let header = sample();
        assert_eq!(BatchHeader::decode(&header.encode()), Ok(header));
        for codec in [Codec::Plain, Codec::Zstd] {
            let folded = Some(Folded { references: 2, bytes: 100 });
            let header = BatchHeader { codec, folded, ..sample() };
            assert_eq!(BatchHeader::decode(&header.encode()), Ok(header));
        }
    }

    /// Version 1 knows codecs 0 and 1 only: it refuses what it could not read.
    #[test]
    fn a_folded_body_has_codecs_of_its_own() {
        let folded = Some(Folded { references: 2, bytes: 100 });
        let header = BatchHeader { folded, ..sample() };
        assert_eq!(header.encode()[7], 3);
        assert_eq!(header.encode()[88..96], [2, 0, 0, 0, 100, 0, 0, 0]);
    }

    /// The bytes are frozen: a journal written today must be read by every later version.
    #[test]
    fn bytes_are_frozen() {
        let hex: String = sample().encode().iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(&hex[..112], FROZEN);
    }

    const FROZEN: &str = "4248423180000101030000000200000008070605040302010900000000000000e80300000000000000305f018b6006002010000064000000";

    #[test]
    fn every_flipped_bit_is_found() {
        let good = sample().encode();
        for bit in 0..HEADER_BYTES * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(BatchHeader::decode(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn bounds_are_checked_behind_a_valid_hash() {
        let refused = |change: fn(&mut BatchHeader), field| {
            let mut header = sample();
            change(&mut header);
            match BatchHeader::decode(&header.encode()) {
                Err(HeaderError::Field { field: found, .. }) => assert_eq!(found, field),
                other => panic!("{field}: {other:?}"),
            }
        };
        refused(|h| h.records = 0, "records");
        refused(|h| h.records = 4097, "records");
        refused(|h| h.batch = BatchSeq(0), "batch");
        refused(|h| h.first_write = WriteSeq(u64::MAX), "first_write");
        refused(|h| h.plain_bytes = 31, "plain_bytes");
        refused(|h| h.plain_bytes = u32::MAX, "plain_bytes");
        refused(|h| h.wire_bytes = 0, "wire_bytes");
        refused(|h| h.wire_bytes = h.plain_bytes + 1, "wire_bytes");
        refused(|h| h.codec = Codec::Plain, "wire_bytes");
        refused(|h| h.folded = Some(Folded { references: 0, bytes: 100 }), "references");
        refused(|h| h.folded = Some(Folded { references: 513, bytes: 100 }), "references");
        refused(|h| h.folded = Some(Folded { references: 1, bytes: 55 }), "folded_bytes");
        refused(|h| h.folded = Some(Folded { references: 1, bytes: 4128 }), "folded_bytes");
        refused(|h| h.folded = Some(Folded { references: 1, bytes: 99 }), "wire_bytes");
    }
}
