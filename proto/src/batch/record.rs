//! The records of a batch: what happened to which bytes of which disk.

use thiserror::Error;

use crate::batch::{BatchHeader, BatchKind};
use crate::id::{DiskIndex, PointId};
use crate::limits::{DISK_BYTES_MAX, RECORD_DATA_BYTES_MAX};

/// Bytes of one entry of the record table.
pub const RECORD_BYTES: usize = 16;

/// One entry of a batch's record table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// The disk it concerns; 0 in markers, which concern the whole machine.
    pub disk: DiskIndex,
    /// What happened.
    pub kind: RecordKind,
}

/// What a record says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordKind {
    /// `len_bytes` bytes, taken from the batch's data area in order, now stand at `offset_bytes`.
    Data {
        /// Where on the disk.
        offset_bytes: u64,
        /// 1 to [`RECORD_DATA_BYTES_MAX`].
        len_bytes: u32,
    },
    /// `len_bytes` bytes at `offset_bytes` now read as zero.
    Zero {
        /// Where on the disk.
        offset_bytes: u64,
        /// At least 1.
        len_bytes: u32,
        /// The image may give the space back (a trim, or a write-zeroes without `NO_HOLE`).
        may_unmap: bool,
    },
    /// A crash-consistent recovery point: the state of all disks after every record before this.
    Point(PointId),
    /// From here on there is a gap in the write order: the machine is not consistent until the
    /// matching [`RecordKind::SyncDone`].
    SyncStart,
    /// Every block is in the stream again: after this record the image is a prefix again.
    SyncDone,
}

impl Record {
    /// Bytes of the data area that this record owns.
    pub fn data_bytes(&self) -> usize {
        match self.kind {
            RecordKind::Data { len_bytes, .. } => len_bytes as usize,
            _ => 0,
        }
    }

    /// The entry's bytes in the table.
    pub fn encode(&self) -> [u8; RECORD_BYTES] {
        let (kind, flags, len, offset) = match self.kind {
            RecordKind::Data { offset_bytes, len_bytes } => (1, 0, len_bytes, offset_bytes),
            RecordKind::Zero { offset_bytes, len_bytes, may_unmap } => {
                (2, u8::from(may_unmap), len_bytes, offset_bytes)
            }
            RecordKind::Point(id) => (3, 0, 0, id.0),
            RecordKind::SyncStart => (4, 0, 0, 0),
            RecordKind::SyncDone => (5, 0, 0, 0),
        };
        let mut out = [0; RECORD_BYTES];
        out[0] = kind;
        out[1] = flags;
        out[2..4].copy_from_slice(&self.disk.0.to_le_bytes());
        out[4..8].copy_from_slice(&len.to_le_bytes());
        out[8..16].copy_from_slice(&offset.to_le_bytes());
        out
    }

    fn decode(bytes: &[u8; RECORD_BYTES], index: usize) -> Result<Self, BodyError> {
        let [kind, flags, d0, d1, l0, l1, l2, l3, offset @ ..] = *bytes;
        let disk = DiskIndex(u16::from_le_bytes([d0, d1]));
        let len_bytes = u32::from_le_bytes([l0, l1, l2, l3]);
        let offset_bytes = u64::from_le_bytes(offset);
        let bad = Err(BodyError::Record { index });
        let extent_fits = len_bytes > 0
            && offset_bytes.checked_add(len_bytes.into()).is_some_and(|end| end <= DISK_BYTES_MAX);
        let kind = match (kind, flags) {
            (1, 0) if extent_fits && len_bytes <= RECORD_DATA_BYTES_MAX => {
                RecordKind::Data { offset_bytes, len_bytes }
            }
            (2, 0 | 1) if extent_fits => {
                RecordKind::Zero { offset_bytes, len_bytes, may_unmap: flags == 1 }
            }
            (3, 0) if disk.0 == 0 && len_bytes == 0 => RecordKind::Point(PointId(offset_bytes)),
            (4, 0) if disk.0 == 0 && len_bytes == 0 && offset_bytes == 0 => RecordKind::SyncStart,
            (5, 0) if disk.0 == 0 && len_bytes == 0 && offset_bytes == 0 => RecordKind::SyncDone,
            _ => return bad,
        };
        Ok(Self { disk, kind })
    }
}

/// Why a batch's body is refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum BodyError {
    /// Fewer or more bytes than the header says.
    #[error("the batch's body has {found_bytes} bytes, its header says {expected_bytes}")]
    Length {
        /// What the header says.
        expected_bytes: usize,
        /// What was there.
        found_bytes: usize,
    },
    /// The content is not what was sent.
    #[error("the batch's body is damaged: its blake3 hash does not match")]
    Hash,
    /// A zstd body did not decompress to the announced size.
    #[error("the batch's body does not decompress")]
    Compression,
    /// A record is not of a known form, or out of bounds.
    #[error("record {index} of the batch is malformed or out of bounds")]
    Record {
        /// Its place in the batch.
        index: usize,
    },
    /// A reference is not of the known form, out of order, or out of bounds.
    #[error("reference {index} of the batch is malformed or out of bounds")]
    Reference {
        /// Its place in the batch.
        index: usize,
    },
    /// The records' data does not add up to the data area.
    #[error("the batch's records do not add up to its {data_bytes} bytes of data")]
    Data {
        /// Size of the data area.
        data_bytes: usize,
    },
}

/// Decodes a record table and checks that it accounts for exactly the header's data bytes, and that
/// a sync batch holds nothing but data and zeroes.
pub fn decode_table(header: &BatchHeader, table: &[u8]) -> Result<Vec<Record>, BodyError> {
    if table.len() != header.table_bytes() {
        return Err(BodyError::Length {
            expected_bytes: header.table_bytes(),
            found_bytes: table.len(),
        });
    }
    let (entries, _) = table.as_chunks::<RECORD_BYTES>();
    let mut records = Vec::with_capacity(entries.len());
    let mut data_bytes = 0;
    for (index, entry) in entries.iter().enumerate() {
        let record = Record::decode(entry, index)?;
        let content = matches!(record.kind, RecordKind::Data { .. } | RecordKind::Zero { .. });
        if header.kind == BatchKind::Sync && !content {
            return Err(BodyError::Record { index });
        }
        data_bytes += record.data_bytes();
        records.push(record);
    }
    if data_bytes != header.data_bytes() {
        return Err(BodyError::Data { data_bytes: header.data_bytes() });
    }
    Ok(records)
}

/// Checks a plain body, given as its table and its data, against the header's hash, then decodes
/// its records. Table and data come apart because the target keeps them apart, for alignment.
pub fn check_body(
    header: &BatchHeader,
    table: &[u8],
    data: &[u8],
) -> Result<Vec<Record>, BodyError> {
    let found_bytes = table.len() + data.len();
    if found_bytes != header.plain_bytes as usize {
        return Err(BodyError::Length { expected_bytes: header.plain_bytes as usize, found_bytes });
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(table).update(data);
    if *hasher.finalize().as_bytes() != header.body_hash {
        return Err(BodyError::Hash);
    }
    decode_table(header, table)
}
