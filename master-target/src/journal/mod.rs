//! The redo journal of one machine. `JOURNAL.md` beside this crate fixes its bytes, what is assumed
//! of the medium, and what recovery decides.
//!
//! Invariants:
//! - A batch counts as durable only after its record was synced.
//! - A record is written to a segment whose header and name were durable before.
//! - A segment is freed only when a durable checkpoint no longer needs it.
//! - After any failed write or sync the owner must not write again; see `store`.

mod checkpoint;
mod frame;
mod open;
pub(crate) mod reader;
mod recovery;
mod segment;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::PathBuf;

use backhaul_proto::id::{BatchSeq, Generation, PointId, WriteSeq};
use thiserror::Error;

use crate::batch_buffer::IncomingBatch;
use crate::storage::{AlignedBuf, FileId, Op, OpenMode, Storage, StorageError};

pub(crate) use checkpoint::{Checkpoint, CheckpointFile, Place};
pub(crate) use open::open;
pub(crate) use segment::{
    MachineTag, SEGMENT_HEADER_BYTES, SegmentHeader, SegmentKey, SegmentNumber,
};

/// Sizes of a journal.
#[derive(Debug, Clone)]
pub struct JournalOptions {
    /// Bytes of a segment, a multiple of 4096 (default 64 MiB). Larger ones are started less
    /// often; space comes back in steps of this. A batch that does not fit gets a segment of its
    /// own size.
    pub segment_bytes: u64,
    /// Most free segments kept for reuse (default 4); more are removed, and have to be written
    /// full of zeroes again when the journal grows.
    pub free_segments_max: usize,
}

impl Default for JournalOptions {
    fn default() -> Self {
        Self { segment_bytes: 64 << 20, free_segments_max: 4 }
    }
}

/// A marker in the write order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// The batch it stands in.
    pub batch: BatchSeq,
    /// Its own place.
    pub write: WriteSeq,
    /// The agent's clock at the newest record of the batch, in microseconds since 1970 UTC.
    pub captured_at_us: u64,
    /// What it marks.
    pub kind: MarkKind,
}

/// What a [`Mark`] marks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MarkKind {
    /// A recovery point.
    Point(PointId),
    /// The order is not consistent from here.
    SyncStart,
    /// The order is consistent again from here.
    SyncDone,
}

/// Acknowledged data that recovery could not find.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// The first batch that is gone.
    pub lost_from: BatchSeq,
    /// The damaged or missing file.
    pub path: PathBuf,
    /// Where in it.
    pub offset_bytes: u64,
    /// The image is known to stand at what recovery says is applied, or on the way from there to
    /// what it says is durable. Otherwise it may be ahead of both.
    pub known_image: bool,
    /// All of it in one sentence for the operator.
    pub sentence: String,
}

/// Why the journal refused.
#[derive(Debug, Error)]
pub enum JournalError {
    /// There is no space for another segment. Nothing was written; it may be tried again.
    #[error("no space for a journal segment of {needed_bytes} bytes: {source}")]
    Full {
        /// Bytes that have to be free.
        needed_bytes: u64,
        /// Where and why.
        source: StorageError,
    },
    /// A file operation failed.
    #[error(transparent)]
    Io(#[from] StorageError),
}

/// A segment that is part of the order.
#[derive(Debug, Clone)]
pub(crate) struct Segment {
    pub(crate) number: SegmentNumber,
    pub(crate) key: SegmentKey,
    /// Where its last record ends.
    pub(crate) end_bytes: u64,
    pub(crate) file_bytes: u64,
}

#[derive(Debug)]
pub(crate) struct FreeSegment {
    path: PathBuf,
    file_bytes: u64,
}

/// The journal, open for one writer.
#[derive(Debug)]
pub(crate) struct Journal {
    pub(crate) dir: PathBuf,
    machine: MachineTag,
    options: JournalOptions,
    checkpoint_file: CheckpointFile,
    pub(crate) generation: Option<Generation>,
    pub(crate) durable: BatchSeq,
    pub(crate) durable_write: WriteSeq,
    /// The segments that hold the order, oldest first.
    pub(crate) segments: Vec<Segment>,
    /// The last of `segments`, if it is open for more records.
    tail: Option<FileId>,
    free: Vec<FreeSegment>,
    /// Segments that recovery could not use; set aside when a new generation begins.
    unusable: Vec<SegmentNumber>,
    next_number: u64,
    pub(crate) damage: Option<Damage>,
}

/// Where a batch of a group goes.
struct Slot {
    /// Index in [`Journal::segments`].
    segment: usize,
    file: FileId,
    offset_bytes: u64,
}

impl Journal {
    /// Makes a group durable: all records at once, then one sync. Batches must continue the order.
    /// Says where each record ends.
    ///
    /// With [`JournalError::Full`] nothing was written; after any other error nothing is known.
    pub(crate) fn append(
        &mut self,
        storage: &mut dyn Storage,
        generation: Generation,
        group: &mut [IncomingBatch],
    ) -> Result<Vec<Place>, JournalError> {
        let Some(last) = group.last().map(|b| (b.header().batch, b.header().last_write())) else {
            return Ok(Vec::new());
        };
        self.reserve(storage, group)?;
        let mut slots: Vec<Slot> = Vec::with_capacity(group.len());
        for batch in group.iter_mut() {
            let len_bytes = batch.journal_bytes().len() as u64;
            let file = match self.tail {
                Some(file) if self.room_bytes() >= len_bytes => file,
                _ => self.start_segment(storage, generation, batch)?,
            };
            let durable = self.durable;
            let index = self.segments.len() - 1;
            let segment = &mut self.segments[index];
            let offset_bytes = segment.end_bytes;
            let (frame, header) = batch.frame_and_header_mut();
            frame::seal(frame, header, &segment.key, offset_bytes, durable);
            segment.end_bytes += len_bytes;
            slots.push(Slot { segment: index, file, offset_bytes });
        }
        let mut writes: Vec<Op<'_>> = group
            .iter()
            .zip(&slots)
            .map(|(batch, slot)| Op::Write {
                file: slot.file,
                offset_bytes: slot.offset_bytes,
                buf: batch.journal_bytes(),
            })
            .collect();
        storage.run(&mut writes)?;
        let mut files: Vec<(usize, FileId)> = slots.iter().map(|s| (s.segment, s.file)).collect();
        files.dedup();
        let mut syncs: Vec<Op<'_>> =
            files.iter().map(|(_, file)| Op::Sync { file: *file }).collect();
        storage.run(&mut syncs)?;
        for (_, file) in &files[..files.len() - 1] {
            storage.close(*file);
        }
        (self.durable, self.durable_write) = last;
        let end = |(batch, slot): (&IncomingBatch, &Slot)| Place {
            segment: self.segments[slot.segment].number,
            offset_bytes: slot.offset_bytes + batch.journal_bytes().len() as u64,
        };
        Ok(group.iter().zip(&slots).map(end).collect())
    }

    /// The segment at `place`, and `place` moved to the start of the next segment if it is where
    /// the records of its segment end.
    pub(crate) fn locate(&self, place: Place) -> Option<(&Segment, Place)> {
        let index = self.segments.iter().position(|s| s.number >= place.segment)?;
        let start_of = |segment: &Segment| Place {
            segment: segment.number,
            offset_bytes: SEGMENT_HEADER_BYTES,
        };
        let mut at = if self.segments[index].number == place.segment {
            place
        } else {
            start_of(&self.segments[index])
        };
        let mut segment = &self.segments[index];
        for next in &self.segments[index + 1..] {
            if at.offset_bytes < segment.end_bytes {
                break;
            }
            segment = next;
            at = start_of(next);
        }
        Some((segment, at))
    }

    fn room_bytes(&self) -> u64 {
        self.segments.last().map_or(0, |s| s.file_bytes.saturating_sub(s.end_bytes))
    }

    fn segment_bytes_for(&self, record_bytes: u64) -> u64 {
        self.options.segment_bytes.max(SEGMENT_HEADER_BYTES + record_bytes)
    }

    /// Makes sure that there is a free segment for every one the group will start, before any of it
    /// is written: running out of space later would leave half a group.
    fn reserve(
        &mut self,
        storage: &mut dyn Storage,
        group: &[IncomingBatch],
    ) -> Result<(), JournalError> {
        let mut room_bytes = if self.tail.is_some() { self.room_bytes() } else { 0 };
        let mut needed: Vec<u64> = Vec::new();
        for batch in group {
            let len_bytes = batch.journal_bytes().len() as u64;
            if room_bytes < len_bytes {
                let segment_bytes = self.segment_bytes_for(len_bytes);
                needed.push(segment_bytes);
                room_bytes = segment_bytes - SEGMENT_HEADER_BYTES;
            }
            room_bytes -= len_bytes;
        }
        for (i, segment_bytes) in needed.iter().enumerate() {
            let wanted = needed[..=i].iter().filter(|b| *b == segment_bytes).count();
            let there = self.free.iter().filter(|f| f.file_bytes == *segment_bytes).count();
            if there < wanted {
                self.make_free_segment(storage, *segment_bytes, Fill::Reserved)?;
            }
        }
        Ok(())
    }

    /// Makes one spare segment if there is none, so that the next batches do not wait for it.
    pub(crate) fn prepare(&mut self, storage: &mut dyn Storage) -> Result<(), JournalError> {
        let segment_bytes = self.options.segment_bytes;
        if self.free.iter().any(|f| f.file_bytes == segment_bytes) {
            return Ok(());
        }
        self.make_free_segment(storage, segment_bytes, Fill::Zeroes)
    }

    fn make_free_segment(
        &mut self,
        storage: &mut dyn Storage,
        file_bytes: u64,
        fill: Fill,
    ) -> Result<(), JournalError> {
        let number = SegmentNumber(self.next_number);
        self.next_number += 1;
        let path = self.dir.join(number.free_name());
        let file = storage.open(&path, OpenMode::CreateNew).map_err(full_or_io(file_bytes))?;
        let filled = fill_segment(storage, file, file_bytes, fill);
        storage.close(file);
        match filled {
            Ok(()) => {
                self.free.push(FreeSegment { path, file_bytes });
                Ok(())
            }
            Err(error) => {
                // What was reserved so far is what the operator is short of.
                let _ = storage.remove(&path);
                Err(full_or_io(file_bytes)(error))
            }
        }
    }

    /// Puts a reserved segment into use for `first`.
    fn start_segment(
        &mut self,
        storage: &mut dyn Storage,
        generation: Generation,
        first: &IncomingBatch,
    ) -> Result<FileId, JournalError> {
        let segment_bytes = self.segment_bytes_for(first.journal_bytes().len() as u64);
        let fits = |free: &FreeSegment| free.file_bytes == segment_bytes;
        let free = match self.free.iter().position(fits) {
            Some(index) => self.free.swap_remove(index),
            None => {
                self.make_free_segment(storage, segment_bytes, Fill::Reserved)?;
                self.free.swap_remove(self.free.len() - 1)
            }
        };
        let number = SegmentNumber(self.next_number);
        self.next_number += 1;
        let header = SegmentHeader {
            number,
            generation,
            first_batch: first.header().batch,
            first_write: first.header().first_write,
            durable: self.durable,
            segment_bytes,
            machine: self.machine,
            nonce: nonce(),
        };
        let (page, key) = header.encode();
        let file = storage.open(&free.path, OpenMode::ReadWrite)?;
        storage.run(&mut [Op::Write { file, offset_bytes: 0, buf: &page }])?;
        storage.run(&mut [Op::Sync { file }])?;
        storage.rename(&free.path, &self.dir.join(number.file_name()))?;
        storage.sync_dir(&self.dir)?;
        self.segments.push(Segment {
            number,
            key,
            end_bytes: SEGMENT_HEADER_BYTES,
            file_bytes: segment_bytes,
        });
        self.tail = Some(file);
        Ok(file)
    }

    /// Writes a checkpoint and then frees the segments it no longer needs.
    pub(crate) fn checkpoint(
        &mut self,
        storage: &mut dyn Storage,
        checkpoint: &Checkpoint,
    ) -> Result<(), JournalError> {
        self.checkpoint_file.write(storage, checkpoint)?;
        let below = checkpoint.next.segment;
        let freed: Vec<_> =
            self.segments.iter().map(|s| s.number).filter(|number| *number < below).collect();
        self.segments.retain(|s| s.number >= below);
        self.free_segments(storage, &freed)
    }

    /// Starts a new generation: nothing of the old one is needed any more.
    pub(crate) fn begin_generation(
        &mut self,
        storage: &mut dyn Storage,
        checkpoint: &Checkpoint,
    ) -> Result<(), JournalError> {
        self.set_aside(storage)?;
        self.checkpoint_file.write(storage, checkpoint)?;
        if let Some(file) = self.tail.take() {
            storage.close(file);
        }
        let freed: Vec<_> = self.segments.drain(..).map(|s| s.number).collect();
        self.free_segments(storage, &freed)?;
        self.generation = Some(checkpoint.generation);
        self.durable = checkpoint.durable;
        self.durable_write = checkpoint.applied_write;
        self.damage = None;
        Ok(())
    }

    /// Renames what recovery could not use, so that nothing reads it and somebody can look at it.
    fn set_aside(&mut self, storage: &mut dyn Storage) -> Result<(), JournalError> {
        let Some(damage) = &self.damage else { return Ok(()) };
        let mut names: Vec<String> = self.unusable.iter().map(|n| n.file_name()).collect();
        // The damaged segment may have had good records before the damage.
        if let Some(at) =
            self.segments.iter().position(|s| self.dir.join(s.number.file_name()) == damage.path)
        {
            names.push(self.segments.remove(at).number.file_name());
        }
        for name in &names {
            storage.rename(&self.dir.join(name), &self.dir.join(format!("damaged-{name}")))?;
        }
        if damage.path == self.checkpoint_file.path()
            && storage.list(&self.dir)?.iter().any(|name| name == "checkpoint")
        {
            storage.rename(&damage.path, &self.dir.join("damaged-checkpoint"))?;
        }
        storage.sync_dir(&self.dir)?;
        self.unusable.clear();
        Ok(())
    }

    /// Keeps segments for reuse, or removes them. Durable when this returns: a free segment is
    /// overwritten, and must not come back under its old name then.
    fn free_segments(
        &mut self,
        storage: &mut dyn Storage,
        numbers: &[SegmentNumber],
    ) -> Result<(), JournalError> {
        if numbers.is_empty() {
            return Ok(());
        }
        for number in numbers {
            let from = self.dir.join(number.file_name());
            if self.free.len() >= self.options.free_segments_max {
                storage.remove(&from)?;
                continue;
            }
            let file = storage.open(&from, OpenMode::Read)?;
            let file_bytes = storage.len_bytes(file)?;
            storage.close(file);
            let path = self.dir.join(number.free_name());
            storage.rename(&from, &path)?;
            self.free.push(FreeSegment { path, file_bytes });
        }
        storage.sync_dir(&self.dir)?;
        Ok(())
    }

    /// Closes the files. Nothing is written.
    pub(crate) fn close(&mut self, storage: &mut dyn Storage) {
        if let Some(file) = self.tail.take() {
            storage.close(file);
        }
    }

    /// Bytes of files: segments in use, free ones not counted.
    pub(crate) fn used_bytes(&self) -> u64 {
        self.segments.iter().map(|s| s.file_bytes).sum()
    }

    /// Bytes of files kept for reuse.
    pub(crate) fn free_bytes(&self) -> u64 {
        self.free.iter().map(|f| f.file_bytes).sum()
    }
}

fn full_or_io(needed_bytes: u64) -> impl FnOnce(StorageError) -> JournalError {
    move |source| {
        if source.is_full() {
            JournalError::Full { needed_bytes, source }
        } else {
            JournalError::Io(source)
        }
    }
}

/// How a new segment is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fill {
    /// Space is reserved only. For a segment that batches wait for: large groups write into it at
    /// two thirds of the speed, but filling it first would halve the speed and stall them.
    Reserved,
    /// Written full of zeroes. For a segment made in advance.
    Zeroes,
}

fn fill_segment(
    storage: &mut dyn Storage,
    file: FileId,
    file_bytes: u64,
    fill: Fill,
) -> Result<(), StorageError> {
    storage.preallocate(file, file_bytes)?;
    if fill == Fill::Reserved {
        return storage.run(&mut [Op::Sync { file }]);
    }
    let zeroes = AlignedBuf::zeroed(ZEROES_BYTES.min(file_bytes as usize));
    let mut ops = Vec::new();
    let mut offset_bytes = 0;
    while offset_bytes < file_bytes {
        let len_bytes = (file_bytes - offset_bytes).min(zeroes.len() as u64);
        ops.push(Op::Write { file, offset_bytes, buf: &zeroes[..len_bytes as usize] });
        offset_bytes += len_bytes;
    }
    storage.run(&mut ops)?;
    storage.run(&mut [Op::Sync { file }])
}

/// 16 bytes nobody can foresee: the standard library seeds its hashers from the system.
fn nonce() -> [u8; 16] {
    let mut nonce = [0; 16];
    for half in nonce.chunks_mut(8) {
        half.copy_from_slice(&RandomState::new().build_hasher().finish().to_le_bytes());
    }
    nonce
}

/// Bytes of zeroes written at once into a new segment.
const ZEROES_BYTES: usize = 1 << 20;
