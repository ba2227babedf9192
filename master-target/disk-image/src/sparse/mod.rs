//! Hosted sparse extents: monolithicSparse, twoGbMaxExtentSparse, and the compressed grains of
//! streamOptimized.
//!
//! Invariants of a writable extent:
//! 1. A table entry reaches the disk only after the grain that it names is durable there.
//! 2. The redundant copy of a table is durable before the primary is touched.
//! 3. A grain that was freed is used again only after the entry that named it is durably gone.
//!
//! So after a crash every entry names a whole grain, at least one copy of each table is whole, and
//! what was flushed is there. What may be left over is space that nothing names.

mod bits;
mod check;
pub(crate) mod create;
pub(crate) mod header;
pub(crate) mod inflate;
mod layout;
mod parts;
mod pointers;
mod shape;
mod survey;
pub(crate) mod tables;

pub(crate) use parts::{read_descriptor, read_fields, read_footer, read_header};

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::{
    error::{ErrorKind, ImageError, Result},
    extent::{Backing, Extent},
    fix::Sink,
    image::{Deep, RunState, SECTOR_BYTES},
    report::{ExtentInfo, Finding, Progress},
    sparse::{
        header::{DIRECTORY_AT_END, FLAG_ZEROED_GRAINS, Header, UNCLEAN_OFFSET},
        inflate::Inflated,
        pointers::{Cure, Misled},
        tables::{BAD, MISSING, Tables, ZEROED},
    },
    storage::Store,
};

/// Tables that may be dirty before a write makes a checkpoint by itself: 2 MiB of memory, and at
/// most as many small writes when a flush comes.
const DIRTY_TABLES_MAX: usize = 1024;

/// Freed grains that are remembered for use; beyond it they wait for the next check or conversion.
const FREE_GRAINS_MAX: usize = 1 << 20;

/// An open sparse extent.
pub(crate) struct SparseExtent {
    store: Arc<Store>,
    header: Header,
    /// Fields that `header` has right and the file has not.
    misled: Vec<Misled>,
    writable: bool,
    /// Held for reading while grains are read or written in place, for writing while the map of
    /// grains changes: so no grain is given away under a reader.
    grains: RwLock<()>,
    state: Mutex<State>,
    inflated: Inflated,
}

struct State {
    tables: Tables,
    /// Where the next grain goes.
    next_sector: u64,
    /// Grains that nothing on disk names.
    free: Vec<u32>,
    /// Grains that the tables on disk may still name.
    freed: Vec<u32>,
    /// This writer has set the unclean mark.
    marked: bool,
    /// A checkpoint failed, so what the tables on disk hold is unknown.
    failed: bool,
}

/// Where a piece of the disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spot {
    Missing,
    Zero,
    /// Byte of the file.
    At(u64),
    /// Sector of the file and number of the grain.
    Compressed(u32, u64),
}

impl SparseExtent {
    /// Opens the extent in a file, which has so many sectors of the disk as its descriptor says; that is
    /// the caller's to read, also where it is in the file.
    pub(crate) fn open(store: Arc<Store>, line_sectors: u64, writable: bool) -> Result<Self> {
        let mut header = read_fields(&store)?;
        if header.directory_sector == DIRECTORY_AT_END {
            // A stream is never written in place, and the mark in front is the one that a repair clears.
            header = read_header(&store, 0)?;
            header = Header { unclean: header.unclean, ..read_footer(&store, &header)? };
        }
        if writable && header.is_compressed() {
            let sentence = "compressed grains cannot be written in place; convert the image to \
                            monolithicSparse, or write a new one in one pass";
            return Err(ImageError::new(ErrorKind::ReadOnly, &store.path, sentence));
        }
        if writable && header.version == 3 {
            let sentence = "a sparse extent of version 3 may have a change map that a write would \
                            make wrong; open it read only, or convert it";
            return Err(ImageError::new(ErrorKind::ReadOnly, &store.path, sentence));
        }
        let misled = shape::correct(&store, &mut header, line_sectors)?;
        if let Some(pointer) = misled.iter().find(|field| writable && field.cure != Cure::NotNeeded)
        {
            let sentence = format!("{}; repair it before writing", pointer.sentence());
            return Err(
                ImageError::new(ErrorKind::Damaged, &store.path, sentence).at(pointer.offset)
            );
        }
        let tables = Tables::load(&store, header, writable)?;
        let first_free = tables.file_sectors.max(header.overhead_sectors);
        let next_sector = first_free.next_multiple_of(header.grain_sectors);
        Ok(Self {
            header,
            misled,
            writable,
            grains: RwLock::new(()),
            state: Mutex::new(State {
                tables,
                next_sector,
                free: Vec::new(),
                freed: Vec::new(),
                marked: false,
                failed: false,
            }),
            inflated: Inflated::new(header),
            store,
        })
    }

    pub(crate) fn header(&self) -> &Header {
        &self.header
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn share(&self) -> RwLockReadGuard<'_, ()> {
        self.grains.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn own(&self) -> RwLockWriteGuard<'_, ()> {
        self.grains.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Table and entry of the grain at `offset`.
    fn place_of(&self, offset: u64) -> (usize, usize) {
        let grain = offset / self.header.grain_bytes();
        let per_table = u64::from(self.header.entries_per_table);
        ((grain / per_table) as usize, (grain % per_table) as usize)
    }

    /// Where `offset` is, and for how many bytes, at most `limit`, the file goes on like that.
    fn locate(&self, state: &mut State, offset: u64, limit: u64) -> Result<(Spot, u64)> {
        let grain_bytes = self.header.grain_bytes();
        let (index, at) = self.place_of(offset);
        let within = offset % grain_bytes;
        if state.tables.is_empty(&self.store, index) {
            let left =
                (u64::from(self.header.entries_per_table) - at as u64) * grain_bytes - within;
            return Ok((Spot::Missing, left.min(limit)));
        }
        let (entries, survey) = state.tables.entries(&self.store, index)?;
        let is_shared = |entry: u32| survey.is_some_and(|survey| survey.is_shared(entry));
        let first = entries.get(at).copied().unwrap_or(BAD);
        let spot = match first {
            BAD => {
                let sentence = format!(
                    "the grain of byte {offset} cannot be found: its table entry is wrong in every \
                     copy; restore the image, or repair it, which makes these {grain_bytes} bytes zeros"
                );
                return Err(ImageError::new(ErrorKind::Damaged, &self.store.path, sentence));
            }
            MISSING => Spot::Missing,
            ZEROED if self.header.has(FLAG_ZEROED_GRAINS) => Spot::Zero,
            sector if is_shared(sector) => {
                let sentence = format!(
                    "the grain of byte {offset} shares its place in the file with another one, and \
                     nothing tells whose the content is; restore the image, or repair it, which gives \
                     both the same {grain_bytes} bytes"
                );
                return Err(ImageError::new(ErrorKind::Damaged, &self.store.path, sentence));
            }
            sector if self.header.is_compressed() => {
                let grain = offset / grain_bytes;
                return Ok((Spot::Compressed(sector, grain), (grain_bytes - within).min(limit)));
            }
            sector => Spot::At(u64::from(sector) * SECTOR_BYTES + within),
        };
        let mut length = grain_bytes - within;
        for (count, entry) in entries[at..].iter().enumerate().skip(1) {
            let goes_on = match spot {
                Spot::At(_) => {
                    u64::from(*entry) == u64::from(first) + count as u64 * self.header.grain_sectors
                        && !is_shared(*entry)
                }
                _ => *entry == first,
            };
            if length >= limit || !goes_on {
                break;
            }
            length += grain_bytes;
        }
        Ok((spot, length.min(limit)))
    }

    /// Writes where no grain is: new grains, filled from `backing` where `buf` does not cover them.
    /// Returns the bytes of `buf` that were written. The map is the caller's alone.
    fn write_new(
        &self,
        state: &mut State,
        buf: &[u8],
        offset: u64,
        backing: Backing<'_>,
    ) -> Result<usize> {
        let grain_bytes = self.header.grain_bytes();
        let (index, at) = self.place_of(offset);
        let within = offset % grain_bytes;
        self.ensure_table(state, index)?;
        let whole = (buf.len() as u64 / grain_bytes) as usize;
        if within != 0 || whole == 0 {
            let take = (grain_bytes - within).min(buf.len() as u64) as usize;
            let mut grain = vec![0; grain_bytes as usize];
            let start = offset - within;
            // The last grain of a disk may stand for fewer bytes than it has.
            let there = (self.header.capacity_bytes() - start).min(grain_bytes) as usize;
            backing.read(&mut grain[..there], start)?;
            grain[within as usize..within as usize + take].copy_from_slice(&buf[..take]);
            let sector = self.take_grains(state, 1)?;
            self.store.write(&grain, u64::from(sector) * SECTOR_BYTES)?;
            state.tables.set(&self.store, index, at, sector)?;
            return Ok(take);
        }
        let entries = &state.tables.get(&self.store, index)?.entries;
        let is_new = |entry: &u32| *entry == MISSING || *entry == ZEROED;
        let count = entries[at..].iter().take(whole).take_while(|entry| is_new(entry)).count();
        let sector = self.take_grains(state, count)?;
        let take = count * grain_bytes as usize;
        self.store.write(&buf[..take], u64::from(sector) * SECTOR_BYTES)?;
        for number in 0..count {
            let entry = sector + (number as u64 * self.header.grain_sectors) as u32;
            state.tables.set(&self.store, index, at + number, entry)?;
        }
        Ok(take)
    }

    /// Sectors of `count` grains in a row.
    fn take_grains(&self, state: &mut State, count: usize) -> Result<u32> {
        if count == 1
            && let Some(sector) = state.free.pop()
        {
            return Ok(sector);
        }
        self.take_sectors(state, count as u64 * self.header.grain_sectors)
    }

    fn take_sectors(&self, state: &mut State, sectors: u64) -> Result<u32> {
        let sector = state.next_sector;
        let end = sector + sectors;
        if end >= u64::from(u32::MAX) {
            let sentence = "the extent's file has reached the 2 TiB that its tables can name; \
                            convert the image to twoGbMaxExtentSparse or a flat kind";
            return Err(ImageError::new(ErrorKind::Full, &self.store.path, sentence));
        }
        state.next_sector = end;
        state.tables.file_sectors = state.tables.file_sectors.max(end);
        Ok(sector as u32)
    }

    /// Gives the table at `index` its place where the primary copy has none for it.
    fn ensure_table(&self, state: &mut State, index: usize) -> Result<()> {
        if state.tables.is_placed(index) {
            return Ok(());
        }
        // Read before it has its place: what the redundant copy names goes into both.
        state.tables.get_sound(&self.store, index)?;
        let table_sectors = self.header.table_sectors() * 2;
        let sectors = table_sectors.next_multiple_of(self.header.grain_sectors);
        let sector = self.take_sectors(state, sectors)?;
        state.tables.place(index, sector);
        Ok(())
    }

    /// Has the next checkpoint write both copies of the table at `index`, whose grains are about to
    /// be written in place: a reader of the primary copy alone must find them, too.
    fn settle(&self, state: &mut State, index: usize) -> Result<()> {
        self.checkpoint_if_many(state)?;
        self.ensure_table(state, index)?;
        state.tables.settle(index);
        Ok(())
    }

    /// Makes grains and then tables durable. A failure latches: no write follows it.
    fn checkpoint(&self, state: &mut State) -> Result<()> {
        if state.failed {
            let sentence = "an earlier sync failed, so what the file holds is unknown; \
                            check its storage and open it again";
            return Err(ImageError::new(ErrorKind::Latched, &self.store.path, sentence));
        }
        state.failed = true;
        self.write_changes(state)?;
        state.failed = false;
        Ok(())
    }

    fn write_changes(&self, state: &mut State) -> Result<()> {
        let changed = state.tables.dirty_tables() > 0;
        if changed && !state.marked && !self.header.unclean {
            self.store.write(&[1], UNCLEAN_OFFSET)?;
            state.marked = true;
        }
        self.store.sync()?;
        state.tables.checkpoint(&self.store)?;
        for sector in std::mem::take(&mut state.freed) {
            self.store.free(u64::from(sector) * SECTOR_BYTES, self.header.grain_bytes())?;
            if state.free.len() < FREE_GRAINS_MAX {
                state.free.push(sector);
            }
        }
        Ok(())
    }

    fn checkpoint_if_many(&self, state: &mut State) -> Result<()> {
        let many = state.tables.dirty_tables() > DIRTY_TABLES_MAX;
        if many || state.failed || state.freed.len() > FREE_GRAINS_MAX {
            self.checkpoint(state)?;
        }
        Ok(())
    }

    /// Drops the whole grains from `offset` on, as far as the format can say so; returns how many
    /// bytes those are. The lock is taken anew for each step, so that a long range does not keep
    /// others waiting.
    fn drop_whole(
        &self,
        offset: u64,
        length: u64,
        cover: Cover,
        backing: Backing<'_>,
    ) -> Result<u64> {
        let mut done = 0;
        while cover == Cover::Whole && done < length {
            let _guard = self.own();
            let mut state = self.state();
            let left = (length - done).next_multiple_of(self.header.grain_bytes());
            match self.drop_grains(&mut state, offset + done, left, backing)? {
                0 => break,
                step => done += step,
            }
        }
        Ok(done)
    }

    /// Makes whole grains from `offset` on read as zeros without storing them, where the format
    /// can say so; returns the bytes done, 0 where it cannot.
    fn drop_grains(
        &self,
        state: &mut State,
        offset: u64,
        length: u64,
        backing: Backing<'_>,
    ) -> Result<u64> {
        let grain_bytes = self.header.grain_bytes();
        let gone = match (self.header.has(FLAG_ZEROED_GRAINS), backing.is_zero()) {
            // An absent grain of a disk without parent is zeros already.
            (_, true) => MISSING,
            (true, false) => ZEROED,
            (false, false) => return Ok(0),
        };
        let (index, at) = self.place_of(offset);
        let per_table = self.header.entries_per_table as usize;
        let whole = (length / grain_bytes) as usize;
        let count = whole.min(per_table - at);
        if !state.tables.is_named(index) && gone == MISSING {
            return Ok(count as u64 * grain_bytes);
        }
        self.ensure_table(state, index)?;
        for place in at..at + count {
            let entry = state.tables.get(&self.store, index)?.entries[place];
            if entry == gone || (entry == ZEROED && gone == MISSING) || entry == BAD {
                continue;
            }
            state.tables.set(&self.store, index, place, gone)?;
            if entry > ZEROED {
                state.freed.push(entry);
            }
        }
        self.checkpoint_if_many(state)?;
        Ok(count as u64 * grain_bytes)
    }

    /// Splits a range where grains are covered whole and calls for each piece; the last grain of
    /// the disk counts as whole when the range reaches the disk's end.
    fn by_grains(
        &self,
        offset: u64,
        length: u64,
        mut each: impl FnMut(u64, u64, Cover) -> Result<()>,
    ) -> Result<()> {
        let grain_bytes = self.header.grain_bytes();
        let capacity = self.header.capacity_bytes();
        let end = offset + length;
        let first = offset.next_multiple_of(grain_bytes).min(end);
        let last = if end == capacity { end } else { end - end % grain_bytes }.max(first);
        for (from, to, cover) in
            [(offset, first, Cover::Part), (first, last, Cover::Whole), (last, end, Cover::Part)]
        {
            if from < to {
                each(from, to - from, cover)?;
            }
        }
        Ok(())
    }

    fn zero_part(&self, offset: u64, length: u64, backing: Backing<'_>) -> Result<()> {
        let mut at = offset;
        while at < offset + length {
            let guard = self.share();
            let mut state = self.state();
            let (spot, run) = self.locate(&mut state, at, offset + length - at)?;
            let (index, _) = self.place_of(at);
            let is_behind = state.tables.is_behind(index);
            state.tables.refuse_crossed(&self.store, index)?;
            drop(state);
            match spot {
                Spot::At(_) if is_behind => {
                    drop(guard);
                    let _guard = self.own();
                    self.settle(&mut self.state(), index)?;
                    continue;
                }
                Spot::At(place) => self.store.zero(place, run)?,
                Spot::Missing if !backing.is_zero() => {
                    drop(guard);
                    let step = run.min(self.header.grain_bytes());
                    self.write(&vec![0; step as usize], at, backing)?;
                    at += step;
                    continue;
                }
                _ => {}
            }
            at += run;
        }
        Ok(())
    }
}

/// How much of each grain a piece covers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cover {
    Whole,
    Part,
}

impl Extent for SparseExtent {
    fn status(&self, offset: u64, limit: u64) -> Result<(RunState, u64)> {
        let (spot, length) = self.locate(&mut self.state(), offset, limit)?;
        let state = match spot {
            Spot::Missing => RunState::Unallocated,
            Spot::Zero => RunState::Zero,
            Spot::At(_) | Spot::Compressed(..) => RunState::Data,
        };
        Ok((state, length))
    }

    fn read(&self, buf: &mut [u8], offset: u64, backing: Backing<'_>) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let _guard = self.share();
            let (spot, length) = self.locate(&mut self.state(), at, (buf.len() - done) as u64)?;
            let part = &mut buf[done..done + length as usize];
            match spot {
                Spot::Missing => backing.read(part, at)?,
                Spot::Zero => part.fill(0),
                Spot::At(place) => self.store.read(part, place)?,
                Spot::Compressed(sector, grain) => {
                    let within = (at % self.header.grain_bytes()) as usize;
                    self.inflated.read(&self.store, sector, grain, within, part)?;
                }
            }
            done += length as usize;
        }
        Ok(())
    }

    fn write(&self, buf: &[u8], offset: u64, backing: Backing<'_>) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let left = (buf.len() - done) as u64;
            {
                let _guard = self.share();
                let mut state = self.state();
                let (spot, length) = self.locate(&mut state, at, left)?;
                let (index, _) = self.place_of(at);
                let is_behind = state.tables.is_behind(index);
                state.tables.refuse_crossed(&self.store, index)?;
                drop(state);
                if let Spot::At(place) = spot
                    && !is_behind
                {
                    self.store.write(&buf[done..done + length as usize], place)?;
                    done += length as usize;
                    continue;
                }
            }
            let _guard = self.own();
            let mut state = self.state();
            self.checkpoint_if_many(&mut state)?;
            // Another writer may have come between the two locks.
            let (spot, _) = self.locate(&mut state, at, left)?;
            match spot {
                Spot::Missing => done += self.write_new(&mut state, &buf[done..], at, backing)?,
                // A zeroed grain hides the parent.
                Spot::Zero => {
                    let hidden = Backing { parent: None, ..backing };
                    done += self.write_new(&mut state, &buf[done..], at, hidden)?;
                }
                Spot::At(_) => self.settle(&mut state, self.place_of(at).0)?,
                Spot::Compressed(..) => {}
            }
        }
        Ok(())
    }

    fn zero(&self, offset: u64, length: u64, backing: Backing<'_>) -> Result<()> {
        self.by_grains(offset, length, |offset, length, cover| {
            let done = self.drop_whole(offset, length, cover, backing)?;
            match length.saturating_sub(done) {
                0 => Ok(()),
                left => self.zero_part(offset + done, left, backing),
            }
        })
    }

    fn trim(&self, offset: u64, length: u64, backing: Backing<'_>) -> Result<()> {
        self.by_grains(offset, length, |offset, length, cover| {
            self.drop_whole(offset, length, cover, backing).map(drop)
        })
    }

    fn flush(&self) -> Result<()> {
        if !self.writable {
            return Ok(());
        }
        let _guard = self.own();
        self.checkpoint(&mut self.state())
    }

    fn close(&self) -> Result<()> {
        let mut state = self.state();
        if state.marked && state.tables.dirty_tables() == 0 {
            self.store.write(&[0], UNCLEAN_OFFSET)?;
            self.store.sync()?;
            state.marked = false;
        }
        Ok(())
    }

    fn info(&self) -> Result<ExtentInfo> {
        Ok(ExtentInfo {
            path: Some(self.store.path.clone()),
            format: "SPARSE",
            length_bytes: self.header.capacity_bytes(),
            offset_bytes: 0,
            file_bytes: self.store.length()?,
            grain_bytes: Some(self.header.grain_bytes()),
            version: Some(self.header.version),
            compressed: self.header.is_compressed(),
            unclean: self.header.unclean,
        })
    }

    fn store(&self) -> Option<&Store> {
        Some(&self.store)
    }

    fn findings(&self) -> Vec<Finding> {
        let mut findings = self.misled_findings();
        findings.extend(self.state().tables.findings(&self.store.path));
        findings
    }

    fn survey(&self, progress: &mut dyn Progress) -> Result<()> {
        let _guard = self.own();
        self.state().tables.survey(&self.store, progress).map(drop)
    }

    fn check(&self, deep: Deep, sink: &mut Sink<'_>, progress: &mut dyn Progress) -> Result<()> {
        self.examine(deep, sink, progress)
    }
}
