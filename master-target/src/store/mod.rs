//! One machine's journal and images, written in the order that must hold.
//!
//! Invariants:
//! - A batch is reported durable after its record was synced, for a sync batch after the image was
//!   synced before that.
//! - A journal segment is freed after a checkpoint was synced, and that after the image was.
//! - The image holds exactly the batches up to the applied one (with redo after a crash), never a
//!   later one, except for the batches of a sync, during which the machine is not consistent.
//! - After a failed write or sync everything is refused until the store is opened again; only a
//!   full disk, noticed before anything was acknowledged, may simply be tried again.
//!
//! Everything blocks. One thread per machine owns a [`MachineStore`].

mod cache;
mod error;
mod image;

use std::path::{Path, PathBuf};

use backhaul_proto::batch::{BatchHeader, BatchKind, Record, RecordKind};
use backhaul_proto::id::{BatchSeq, DiskIndex, Generation, MachineName, WriteSeq};

use crate::batch_buffer::{BatchView, IncomingBatch};
use crate::journal::reader::{Loaded, Order, Parsed, Reader};
use crate::journal::{self, Checkpoint, Damage, Journal, JournalOptions, Mark, Place};
use crate::storage::Storage;
use crate::store::cache::Cache;
pub use crate::store::error::{OrderPlace, StoreError};
use crate::store::image::Images;

/// A file that holds the bytes of one disk, one after the other: a raw image or a flat extent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageFile {
    /// The file; it exists and is large enough.
    pub path: PathBuf,
    /// Where the disk starts in it.
    pub base_offset_bytes: u64,
    /// Size of the disk.
    pub size_bytes: u64,
}

/// Sizes of a [`MachineStore`].
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// The journal's sizes.
    pub journal: JournalOptions,
    /// Most bytes of just journalled batches kept in memory, so that applying them reads nothing
    /// back (default 4 MiB). What does not fit is read from the journal.
    pub cache_bytes_max: usize,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self { journal: JournalOptions::default(), cache_bytes_max: 4 << 20 }
    }
}

/// What opening a store found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovered {
    /// The generation of the batches below; `None` if none was ever begun here.
    pub generation: Option<Generation>,
    /// Every batch up to here is on stable storage.
    pub durable: BatchSeq,
    /// The last place of that batch in the write order.
    pub durable_write: WriteSeq,
    /// Every batch up to here is on the image; later ones may be partly, until they are applied.
    pub applied: BatchSeq,
    /// The last place of that batch in the write order.
    pub applied_write: WriteSeq,
    /// The image at `applied` is a prefix of the write order: no sync was under way.
    pub consistent: bool,
    /// The markers in the journal after the last checkpoint, in order. Some may stand at or before
    /// `applied`.
    pub marks: Vec<Mark>,
    /// One sentence if the journal ended in the middle of a write that was never acknowledged.
    pub torn_tail: Option<String>,
    /// Acknowledged data is gone: batches are refused until a new generation begins.
    pub damage: Option<Damage>,
}

/// Up to where batches are on stable storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Appended {
    /// Every batch up to here.
    pub durable: BatchSeq,
    /// The last place of that batch in the write order.
    pub durable_write: WriteSeq,
}

/// Up to where the image holds the write order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Applied {
    /// Every batch up to here.
    pub through: BatchSeq,
    /// The last place of that batch in the write order.
    pub through_write: WriteSeq,
}

/// Sizes, for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Bytes of journal files that hold something needed.
    pub journal_bytes: u64,
    /// Bytes of journal files kept for reuse.
    pub journal_free_bytes: u64,
    /// Batches that are durable and not applied.
    pub unapplied_batches: u64,
    /// Bytes of memory of batches kept for applying.
    pub cache_bytes: usize,
}

/// One machine's journal and images.
pub struct MachineStore {
    storage: Box<dyn Storage>,
    journal: Journal,
    images: Images,
    cache: Cache,
    applied: BatchSeq,
    applied_write: WriteSeq,
    /// Where the record after `applied` is or will be.
    next: Place,
    consistent: bool,
    /// What the checkpoint file says.
    checkpointed: Option<Checkpoint>,
    latched: Option<String>,
}

impl MachineStore {
    /// Opens the store in `dir`, making it if it is missing, with the disks of the machine in
    /// their order. Reads the journal behind the last checkpoint once, and checks every byte.
    pub fn open(
        mut storage: Box<dyn Storage>,
        dir: &Path,
        machine: &MachineName,
        images: Vec<ImageFile>,
        options: StoreOptions,
    ) -> Result<(Self, Recovered), StoreError> {
        let images = Images::open(&mut *storage, images)?;
        let opened = journal::open(&mut *storage, dir, machine, options.journal)?;
        let at = opened.checkpoint.as_ref();
        let damage = opened.journal.damage.clone();
        let known_image = damage.as_ref().is_none_or(|damage| damage.known_image);
        let store = Self {
            storage,
            images,
            cache: Cache::new(options.cache_bytes_max),
            applied: at.map_or(BatchSeq(0), |c| c.applied),
            applied_write: at.map_or(WriteSeq(0), |c| c.applied_write),
            next: at.map_or(Place::default(), |c| c.next),
            consistent: at.is_some_and(|c| c.consistent) && known_image,
            checkpointed: None,
            latched: None,
            journal: opened.journal,
        };
        let recovered = Recovered {
            generation: store.journal.generation,
            durable: store.journal.durable,
            durable_write: store.journal.durable_write,
            applied: store.applied,
            applied_write: store.applied_write,
            consistent: store.consistent,
            marks: opened.marks,
            torn_tail: opened.torn_tail,
            damage,
        };
        Ok((store, recovered))
    }

    /// Begins a generation, whose batches count from 1. Everything journalled of the old one is
    /// applied first, and what recovery found damaged is set aside.
    pub fn begin_generation(&mut self, generation: Generation) -> Result<(), StoreError> {
        self.check_latch()?;
        if self.journal.generation == Some(generation) {
            return Err(StoreError::GenerationReused { generation });
        }
        if self.journal.generation.is_some() {
            self.apply(self.journal.durable, u64::MAX)?;
            self.checkpoint()?;
        }
        let checkpoint = Checkpoint {
            generation,
            applied: BatchSeq(0),
            applied_write: WriteSeq(0),
            durable: BatchSeq(0),
            next: Place::default(),
            consistent: self.consistent,
        };
        let begun = self.journal.begin_generation(&mut *self.storage, &checkpoint);
        self.latch(begun.map_err(StoreError::from))?;
        self.cache.clear();
        (self.applied, self.applied_write) = (BatchSeq(0), WriteSeq(0));
        self.next = Place::default();
        self.checkpointed = Some(checkpoint);
        Ok(())
    }

    /// Makes a group of batches durable, in order, with as few syncs as possible, and takes those
    /// that are out of `group`: with an error, it still holds the ones that are not durable.
    ///
    /// The whole group is checked against the order and the disks before any of it is written.
    pub fn append(&mut self, group: &mut Vec<IncomingBatch>) -> Result<Appended, StoreError> {
        self.check_latch()?;
        let generation = self.check_group(group)?;
        while let Some(first) = group.first() {
            let kind = first.header().kind;
            let count = group.iter().take_while(|b| b.header().kind == kind).count();
            let result = match kind {
                BatchKind::Ordered => self.append_ordered(generation, group, count),
                BatchKind::Sync => self.append_sync(generation, group, count),
            };
            self.latch(result)?;
        }
        Ok(self.durable())
    }

    fn append_ordered(
        &mut self,
        generation: Generation,
        group: &mut Vec<IncomingBatch>,
        count: usize,
    ) -> Result<(), StoreError> {
        let ends = self.journal.append(&mut *self.storage, generation, &mut group[..count])?;
        for (batch, end) in group.drain(..count).zip(ends) {
            self.cache.push(batch, end);
        }
        Ok(())
    }

    /// The record of a sync batch promises that everything up to it is on the image's stable
    /// storage, so the image comes first.
    fn append_sync(
        &mut self,
        generation: Generation,
        group: &mut Vec<IncomingBatch>,
        count: usize,
    ) -> Result<(), StoreError> {
        self.apply(self.journal.durable, u64::MAX)?;
        let run = &mut group[..count];
        let views: Vec<BatchView<'_>> = run.iter().map(IncomingBatch::view).collect();
        self.images.write(&mut *self.storage, &views)?;
        self.images.sync(&mut *self.storage)?;
        let ends = self.journal.append(&mut *self.storage, generation, run)?;
        (self.applied, self.applied_write) = (self.journal.durable, self.journal.durable_write);
        self.next = ends.last().copied().unwrap_or(self.next);
        group.drain(..count);
        Ok(())
    }

    /// Brings the image forward in order, up to `limit` at most, and stops after about
    /// `budget_bytes` so that the caller can look after other things; at least one batch.
    ///
    /// Hold `limit` at the newest recovery point, and the image stays exactly that point.
    pub fn apply(&mut self, limit: BatchSeq, budget_bytes: u64) -> Result<Applied, StoreError> {
        self.check_latch()?;
        let limit = limit.min(self.journal.durable);
        let mut done_bytes = 0;
        let mut reader = None;
        let mut result = Ok(());
        while result.is_ok() && self.applied < limit && done_bytes < budget_bytes {
            let step_bytes = STEP_BYTES.min(budget_bytes - done_bytes);
            let step = if self.cache.starts_at(self.applied.next()) {
                self.apply_cached(limit, step_bytes)
            } else {
                self.apply_journalled(&mut reader, limit, step_bytes)
            };
            result = step.map(|bytes| done_bytes += bytes);
        }
        if let Some(reader) = reader {
            reader.close(&mut *self.storage);
        }
        self.latch(result)?;
        Ok(self.applied())
    }

    fn apply_cached(&mut self, limit: BatchSeq, step_bytes: u64) -> Result<u64, StoreError> {
        let mut views = Vec::new();
        let mut taken_bytes = 0;
        for (batch, _) in self.cache.iter() {
            if batch.header().batch > limit || (taken_bytes >= step_bytes && !views.is_empty()) {
                break;
            }
            taken_bytes += batch.view().apply_bytes();
            views.push(batch.view());
        }
        self.images.write(&mut *self.storage, &views)?;
        for _ in 0..views.len() {
            if let Some((batch, end)) = self.cache.pop() {
                self.advance(batch.header(), batch.records(), end);
            }
        }
        Ok(taken_bytes.max(1))
    }

    /// Applies what is no longer in memory, one window of the journal at a time.
    fn apply_journalled(
        &mut self,
        reader: &mut Option<Reader>,
        limit: BatchSeq,
        step_bytes: u64,
    ) -> Result<u64, StoreError> {
        let limit = self.cache.first().map_or(limit, |first| limit.min(BatchSeq(first.0 - 1)));
        let Some((segment, at)) = self.journal.locate(self.next) else {
            return Err(self.journal_damaged(self.next));
        };
        self.next = at;
        if reader.as_ref().is_none_or(|r| r.number() != segment.number) {
            if let Some(old) = reader.take() {
                old.close(&mut *self.storage);
            }
            let (number, key) = (segment.number, segment.key);
            *reader = Some(Reader::open(&mut *self.storage, &self.journal.dir, number, key)?);
        }
        let Some(reader) = reader else { return Ok(0) };
        let mut loaded = self.parse_run(reader, limit, step_bytes);
        if loaded.is_empty() {
            reader.load(&mut *self.storage, at.offset_bytes);
            loaded = self.parse_run(reader, limit, step_bytes);
        }
        if loaded.is_empty() {
            return Err(self.journal_damaged(at));
        }
        let views: Vec<BatchView<'_>> = loaded
            .iter()
            .map(|l| BatchView { header: &l.header, records: &l.records, data: reader.data(l) })
            .collect();
        self.images.write(&mut *self.storage, &views)?;
        let bytes = views.iter().map(BatchView::apply_bytes).sum::<u64>();
        for l in &loaded {
            self.advance(&l.header, &l.records, Place { offset_bytes: l.end_bytes, ..at });
        }
        Ok(bytes.max(1))
    }

    /// The next records, as far as the reader's window has them.
    fn parse_run(&self, reader: &Reader, limit: BatchSeq, step_bytes: u64) -> Vec<Loaded> {
        let mut order = Order {
            generation: self.journal.generation.unwrap_or_default(),
            batch: self.applied.next(),
            write: WriteSeq(self.applied_write.0 + 1),
        };
        let mut at = self.next.offset_bytes;
        let mut run = Vec::new();
        let mut run_bytes = 0;
        while order.batch <= limit && (run.is_empty() || run_bytes < step_bytes) {
            let Parsed::Record(loaded) = reader.parse(at, &order) else { break };
            order = Order::after(&loaded.header);
            run_bytes += loaded.end_bytes - at;
            at = loaded.end_bytes;
            run.push(loaded);
        }
        run
    }

    fn journal_damaged(&self, at: Place) -> StoreError {
        StoreError::JournalDamaged {
            path: self.journal.dir.join(at.segment.file_name()),
            offset_bytes: at.offset_bytes,
            batch: self.applied.next(),
        }
    }

    fn advance(&mut self, header: &BatchHeader, records: &[Record], end: Place) {
        for record in records {
            match record.kind {
                RecordKind::SyncStart => self.consistent = false,
                RecordKind::SyncDone => self.consistent = true,
                RecordKind::Data { .. } | RecordKind::Zero { .. } | RecordKind::Point(_) => {}
            }
        }
        (self.applied, self.applied_write) = (header.batch, header.last_write());
        self.next = end;
    }

    /// Makes the image durable, notes how far it is, and gives back the journal space before that.
    pub fn checkpoint(&mut self) -> Result<Applied, StoreError> {
        self.check_latch()?;
        let Some(generation) = self.journal.generation else { return Ok(self.applied()) };
        if let Some((_, at)) = self.journal.locate(self.next) {
            self.next = at;
        }
        // A checkpoint must not forget the loss: the next opening has to find it again.
        let damage = self.journal.damage.as_ref();
        let durable = damage.map_or(self.journal.durable, |damage| damage.lost_from);
        let checkpoint = Checkpoint {
            generation,
            applied: self.applied,
            applied_write: self.applied_write,
            durable,
            next: self.next,
            consistent: self.consistent,
        };
        self.flush_image()?;
        if self.checkpointed.as_ref() != Some(&checkpoint) {
            let written = self.journal.checkpoint(&mut *self.storage, &checkpoint);
            self.latch(written.map_err(StoreError::from))?;
            self.checkpointed = Some(checkpoint);
        }
        Ok(self.applied())
    }

    /// Makes everything applied durable on the image.
    pub fn flush_image(&mut self) -> Result<(), StoreError> {
        self.check_latch()?;
        let synced = self.images.sync(&mut *self.storage);
        self.latch(synced)
    }

    /// Makes a spare journal segment if there is none. Call it when there is nothing else to do:
    /// otherwise the batch that needs one goes into reserved but
    /// unwritten space, which is slower. Takes the time of writing a segment.
    pub fn prepare(&mut self) -> Result<(), StoreError> {
        self.check_latch()?;
        let prepared = self.journal.prepare(&mut *self.storage);
        self.latch(prepared.map_err(StoreError::from))
    }

    /// Reads from a disk as it stands at [`MachineStore::applied`].
    pub fn read_image(
        &mut self,
        disk: DiskIndex,
        offset_bytes: u64,
        buf: &mut [u8],
    ) -> Result<(), StoreError> {
        self.images.read(&mut *self.storage, disk, offset_bytes, buf)
    }

    /// Up to where batches are on stable storage.
    pub fn durable(&self) -> Appended {
        Appended { durable: self.journal.durable, durable_write: self.journal.durable_write }
    }

    /// Up to where the image holds the write order.
    pub fn applied(&self) -> Applied {
        Applied { through: self.applied, through_write: self.applied_write }
    }

    /// The image is a prefix of the write order: no sync is under way in what was applied.
    pub fn is_consistent(&self) -> bool {
        self.consistent
    }

    /// Sizes, for metrics.
    pub fn usage(&self) -> Usage {
        Usage {
            journal_bytes: self.journal.used_bytes(),
            journal_free_bytes: self.journal.free_bytes(),
            unapplied_batches: self.journal.durable.0 - self.applied.0,
            cache_bytes: self.cache.bytes(),
        }
    }

    /// Makes the image durable and writes a last checkpoint, so that the next opening reads little.
    pub fn close(mut self) -> Result<(), StoreError> {
        self.checkpoint()?;
        self.journal.close(&mut *self.storage);
        self.images.close(&mut *self.storage);
        Ok(())
    }

    /// Checks that a group continues the order and stays inside the disks.
    fn check_group(&self, group: &[IncomingBatch]) -> Result<Generation, StoreError> {
        let generation = self.journal.generation.ok_or(StoreError::NoGeneration)?;
        if let Some(damage) = &self.journal.damage {
            return Err(StoreError::Lost { damage: damage.clone() });
        }
        let mut batch = self.journal.durable.next();
        let mut write = WriteSeq(self.journal.durable_write.0 + 1);
        for incoming in group {
            let header = incoming.header();
            if (header.generation, header.batch, header.first_write) != (generation, batch, write) {
                return Err(StoreError::Order {
                    found: (header.generation, header.batch, header.first_write),
                    expected: (generation, batch, write),
                });
            }
            self.images.check(&incoming.view())?;
            batch = batch.next();
            write = WriteSeq(header.last_write().0 + 1);
        }
        Ok(generation)
    }

    fn check_latch(&self) -> Result<(), StoreError> {
        match &self.latched {
            Some(reason) => Err(StoreError::Latched { reason: reason.clone() }),
            None => Ok(()),
        }
    }

    /// After a failed write or sync nothing is known about the file: refuse everything from now on.
    fn latch<T>(&mut self, result: Result<T, StoreError>) -> Result<T, StoreError> {
        if let Err(error) = &result
            && error.latches()
        {
            self.latched.get_or_insert_with(|| error.to_string());
        }
        result
    }
}

/// Bytes applied in one run of the storage: enough to keep a disk busy, little enough to plan fast.
const STEP_BYTES: u64 = 8 << 20;

#[cfg(test)]
mod tests;
