//! The checkpoint: up to where the image is on stable storage, and where the journal goes on.

use std::path::{Path, PathBuf};

use backhaul_proto::id::{BatchSeq, Generation, WriteSeq};

use crate::journal::segment::{MachineTag, SegmentNumber};
use crate::storage::{AlignedBuf, FileId, Op, OpenMode, PAGE_BYTES, Storage, StorageError};

const FILE: &str = "checkpoint";
const FILE_NEW: &str = "checkpoint.new";
const MAGIC: [u8; 8] = *b"BHCKPT1\0";
const VERSION: u32 = 1;
const HASHED_BYTES: usize = 96;
const FLAG_CONSISTENT: u32 = 1;

/// A place in the journal: where a record starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Place {
    /// 0: in whichever segment comes next.
    pub(crate) segment: SegmentNumber,
    pub(crate) offset_bytes: u64,
}

/// A checkpoint. `JOURNAL.md` has the byte table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Checkpoint {
    pub(crate) generation: Generation,
    pub(crate) applied: BatchSeq,
    pub(crate) applied_write: WriteSeq,
    pub(crate) durable: BatchSeq,
    /// Where the record after `applied` is or will be.
    pub(crate) next: Place,
    /// The image at `applied` is a prefix of the write order.
    pub(crate) consistent: bool,
}

/// What the checkpoint file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Found {
    /// There is no such file.
    Absent,
    /// No slot is valid.
    Damaged,
    /// The newest valid slot and its number.
    Good(u64, Checkpoint),
}

/// The checkpoint file of a machine.
#[derive(Debug)]
pub(crate) struct CheckpointFile {
    dir: PathBuf,
    machine: MachineTag,
    file: Option<FileId>,
    /// Number of the last checkpoint written.
    number: u64,
}

impl CheckpointFile {
    /// Reads the file, if there is one.
    pub(crate) fn open(
        storage: &mut dyn Storage,
        dir: &Path,
        machine: MachineTag,
    ) -> Result<(Self, Found), StorageError> {
        let mut this = Self { dir: dir.to_owned(), machine, file: None, number: 0 };
        let file = match storage.open(&dir.join(FILE), OpenMode::ReadWrite) {
            Ok(file) => file,
            Err(error) if error.is_not_found() => return Ok((this, Found::Absent)),
            Err(error) => return Err(error),
        };
        let mut newest = None;
        for slot in 0..2 {
            let mut page = AlignedBuf::zeroed(PAGE_BYTES);
            let offset_bytes = slot * PAGE_BYTES as u64;
            // An unreadable or missing slot is an invalid one: that is what the other is for.
            if storage.run(&mut [Op::Read { file, offset_bytes, buf: &mut page }]).is_ok()
                && let Some((number, checkpoint)) = decode(&page, machine)
                && number % 2 == slot
                && newest.as_ref().is_none_or(|(best, _)| number > *best)
            {
                newest = Some((number, checkpoint));
            }
        }
        match newest {
            Some((number, checkpoint)) => {
                // Segments below it are freed next; the slot may be in a cache only.
                storage.run(&mut [Op::Sync { file }])?;
                this.file = Some(file);
                this.number = number;
                Ok((this, Found::Good(number, checkpoint)))
            }
            None => {
                storage.close(file);
                Ok((this, Found::Damaged))
            }
        }
    }

    /// Where the file is.
    pub(crate) fn path(&self) -> PathBuf {
        self.dir.join(FILE)
    }

    /// Writes a checkpoint; durable when this returns. Makes the file the first time.
    pub(crate) fn write(
        &mut self,
        storage: &mut dyn Storage,
        checkpoint: &Checkpoint,
    ) -> Result<(), StorageError> {
        let number = self.number + 1;
        let page = encode(number, checkpoint, self.machine);
        let offset_bytes = (number % 2) * PAGE_BYTES as u64;
        match self.file {
            Some(file) => {
                storage.run(&mut [Op::Write { file, offset_bytes, buf: &page }])?;
                storage.run(&mut [Op::Sync { file }])?;
            }
            None => {
                let new = self.dir.join(FILE_NEW);
                let file = storage.open(&new, OpenMode::CreateNew)?;
                let mut whole = AlignedBuf::zeroed(2 * PAGE_BYTES);
                whole[offset_bytes as usize..][..PAGE_BYTES].copy_from_slice(&page);
                storage.preallocate(file, whole.len() as u64)?;
                storage.run(&mut [Op::Write { file, offset_bytes: 0, buf: &whole }])?;
                storage.run(&mut [Op::Sync { file }])?;
                storage.rename(&new, &self.path())?;
                storage.sync_dir(&self.dir)?;
                self.file = Some(file);
            }
        }
        self.number = number;
        Ok(())
    }
}

fn encode(number: u64, checkpoint: &Checkpoint, machine: MachineTag) -> AlignedBuf {
    let mut page = AlignedBuf::zeroed(PAGE_BYTES);
    page[..8].copy_from_slice(&MAGIC);
    page[8..12].copy_from_slice(&VERSION.to_le_bytes());
    let flags = if checkpoint.consistent { FLAG_CONSISTENT } else { 0 };
    page[12..16].copy_from_slice(&flags.to_le_bytes());
    let numbers = [
        number,
        checkpoint.generation.0,
        checkpoint.applied.0,
        checkpoint.applied_write.0,
        checkpoint.next.segment.0,
        checkpoint.next.offset_bytes,
        checkpoint.durable.0,
    ];
    for (i, number) in numbers.into_iter().enumerate() {
        page[16 + 8 * i..24 + 8 * i].copy_from_slice(&number.to_le_bytes());
    }
    page[80..96].copy_from_slice(machine.as_bytes());
    let hash = blake3::hash(&page[..HASHED_BYTES]);
    page[HASHED_BYTES..HASHED_BYTES + 32].copy_from_slice(hash.as_bytes());
    page
}

fn decode(page: &[u8], machine: MachineTag) -> Option<(u64, Checkpoint)> {
    let hash = blake3::hash(&page[..HASHED_BYTES]);
    let flags = u32::from_le_bytes(page[12..16].try_into().ok()?);
    let valid = page[..8] == MAGIC
        && page[8..12] == VERSION.to_le_bytes()
        && flags & !FLAG_CONSISTENT == 0
        && page[80..96] == *machine.as_bytes()
        && page[HASHED_BYTES..HASHED_BYTES + 32] == *hash.as_bytes();
    if !valid {
        return None;
    }
    let u64_at = |at: usize| Some(u64::from_le_bytes(page[at..at + 8].try_into().ok()?));
    let checkpoint = Checkpoint {
        generation: Generation(u64_at(24)?),
        applied: BatchSeq(u64_at(32)?),
        applied_write: WriteSeq(u64_at(40)?),
        durable: BatchSeq(u64_at(64)?),
        next: Place { segment: SegmentNumber(u64_at(48)?), offset_bytes: u64_at(56)? },
        consistent: flags & FLAG_CONSISTENT != 0,
    };
    Some((u64_at(16)?, checkpoint))
}

#[cfg(test)]
mod tests {
    use backhaul_proto::id::{BatchSeq, Generation, WriteSeq};

    use super::{Checkpoint, Place, decode, encode};
    use crate::journal::segment::{MachineTag, SegmentNumber};

    #[test]
    fn every_flipped_bit_is_found() {
        let machine = MachineTag::of(&"web01".parse().unwrap());
        let checkpoint = Checkpoint {
            generation: Generation(1),
            applied: BatchSeq(2),
            applied_write: WriteSeq(3),
            durable: BatchSeq(4),
            next: Place { segment: SegmentNumber(5), offset_bytes: 4096 },
            consistent: true,
        };
        let good = encode(7, &checkpoint, machine);
        assert_eq!(decode(&good, machine), Some((7, checkpoint)));
        for bit in 0..128 * 8 {
            let mut bad = good.to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(&bad, machine), None, "bit {bit}");
        }
    }
}
