//! Snapshots of ESXi, read only: COWD (`vmfsSparse`) and seSparse extents. `FORMATS.md` has the
//! tables of their bytes.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use crate::{
    error::{ErrorKind, ImageError, Result},
    extent::{Backing, Extent},
    fix::{Action, Fix, Sink},
    image::{DISK_BYTES_MAX, Deep, RunState, SECTOR_BYTES},
    kind::Kind,
    report::{ExtentInfo, Finding, Progress, Severity, advance},
    sparse::header::{DIRECTORY_ENTRIES_MAX, GRAIN_SECTORS_MAX, array},
    storage::Store,
};

/// Entries of a COWD grain table.
const COWD_TABLE_ENTRIES: u64 = 4096;

/// Where every known COWD writer puts the directory, behind a header of 2 KiB.
const COWD_DIRECTORY_SECTOR: u64 = 4;

/// Bytes of a directory that are looked at to tell whether it is one.
const SEEN_BYTES_MAX: u64 = 16 << 10;

/// seSparse has one size of grain and one of table.
const SE_GRAIN_SECTORS: u64 = 8;
const SE_TABLE_SECTORS: u64 = 64;

/// Tables held in memory: 32 KiB each.
const TABLES_CACHED_MAX: usize = 256;

/// An open extent of a snapshot.
pub(crate) struct DeltaExtent {
    store: Arc<Store>,
    dialect: Dialect,
    capacity_sectors: u64,
    grain_sectors: u64,
    /// Entries of the directory as they are on disk; COWD's are widened.
    directory: Vec<u64>,
    cached: Mutex<HashMap<usize, Arc<[u64]>>>,
}

#[derive(Debug, Clone, Copy)]
enum Dialect {
    Cowd,
    SeSparse { tables_sector: u64, grains_sector: u64 },
}

/// Where a piece of the disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spot {
    Missing,
    Zero,
    At(u64),
}

impl DeltaExtent {
    pub(crate) fn open(store: Arc<Store>, kind: Kind) -> Result<Self> {
        let mut start = [0; 512];
        store.read(&mut start, 0)?;
        match kind {
            Kind::SeSparse => Self::open_sesparse(store, &start),
            _ => Self::open_cowd(store, &start),
        }
    }

    fn open_cowd(store: Arc<Store>, start: &[u8; 512]) -> Result<Self> {
        let field = |at| u64::from(u32::from_le_bytes(array(start, at)));
        let (capacity_sectors, grain_sectors) = (field(12), field(16));
        let (directory_sector, entries) = (field(20), field(24));
        let damaged =
            |sentence: &str| Err(ImageError::new(ErrorKind::Damaged, &store.path, sentence).at(0));
        if !start.starts_with(b"COWD") {
            return damaged("this is no COWD extent: it does not begin with COWD");
        }
        if field(4) != 1 {
            let sentence = "its COWD header has a version other than 1";
            return Err(ImageError::new(ErrorKind::Unsupported, &store.path, sentence).at(4));
        }
        if capacity_sectors == 0 || !(1..=GRAIN_SECTORS_MAX).contains(&grain_sectors) {
            return damaged("its COWD header gives an impossible capacity or grain size");
        }
        let needed = capacity_sectors.div_ceil(grain_sectors * COWD_TABLE_ENTRIES);
        if entries < needed || needed > DIRECTORY_ENTRIES_MAX {
            let error =
                damaged("its COWD header gives a grain directory that does not fit its capacity");
            return match needed <= DIRECTORY_ENTRIES_MAX
                && cowd_directory(&store, COWD_DIRECTORY_SECTOR, needed)
            {
                true => error
                    .map_err(|error| mended(error, "length", 24, (needed as u32).to_le_bytes())),
                false => error,
            };
        }
        if !cowd_directory(&store, directory_sector, needed)
            && directory_sector != COWD_DIRECTORY_SECTOR
            && cowd_directory(&store, COWD_DIRECTORY_SECTOR, needed)
        {
            let error = damaged(
                "its COWD header names a grain directory elsewhere than at sector 4, where one is; \
                 repair the image",
            );
            let right = (COWD_DIRECTORY_SECTOR as u32).to_le_bytes();
            return error.map_err(|error| mended(error, "place", 20, right));
        }
        let bytes = read_within(&store, directory_sector, needed * 4)?;
        let directory = bytes.chunks_exact(4).map(narrow).collect();
        let dialect = Dialect::Cowd;
        let cached = Mutex::default();
        Ok(Self { store, dialect, capacity_sectors, grain_sectors, directory, cached })
    }

    fn open_sesparse(store: Arc<Store>, start: &[u8; 512]) -> Result<Self> {
        let field = |at| u64::from_le_bytes(array(start, at));
        let fail =
            |kind, at, sentence: &str| Err(ImageError::new(kind, &store.path, sentence).at(at));
        if field(0) != 0xcafe_babe {
            return fail(ErrorKind::Damaged, 0, "this is no seSparse extent");
        }
        if field(8) != 0x2_0000_0001 {
            return fail(ErrorKind::Unsupported, 8, "its seSparse header is not of version 2.1");
        }
        let capacity_sectors = field(16);
        if capacity_sectors == 0 || capacity_sectors > DISK_BYTES_MAX / SECTOR_BYTES {
            return fail(ErrorKind::Damaged, 16, "its capacity is not between 1 sector and 62 TiB");
        }
        if field(24) != SE_GRAIN_SECTORS || field(32) != SE_TABLE_SECTORS {
            return fail(ErrorKind::Unsupported, 24, "its grains or tables have an unknown size");
        }
        if field(40) != 0 {
            return fail(ErrorKind::Unsupported, 40, "it has flags whose meaning is not published");
        }
        let mut volatile = [0; 512];
        let at = field(80).saturating_mul(SECTOR_BYTES);
        store.read(&mut volatile, at)?;
        if u64::from_le_bytes(array(&volatile, 0)) != 0xcafe_cafe {
            return fail(ErrorKind::Damaged, at, "its volatile header is damaged");
        }
        if u64::from_le_bytes(array(&volatile, 24)) != 0 {
            let sentence = "its journal waits to be replayed; power the machine on once, or \
                            consolidate the snapshot, on its host";
            return fail(ErrorKind::Unsupported, at, sentence);
        }
        let (directory_sector, directory_sectors) = (field(128), field(136));
        let per_table = SE_TABLE_SECTORS * SECTOR_BYTES / 8;
        let right = field(144).saturating_sub(directory_sectors);
        let total = capacity_sectors.div_ceil(SE_GRAIN_SECTORS * per_table);
        if directory_sector != right
            && se_directory(&store, right, total)
            && (directory_sector.abs_diff(right) < directory_sectors
                || !se_directory(&store, directory_sector, total))
        {
            let error = fail(
                ErrorKind::Damaged,
                128,
                "its header names a place for its grain directory where none is, but one is right \
                 before its tables; repair the image",
            );
            return error.map_err(|error| mended(error, "place", 128, right.to_le_bytes()));
        }
        let needed = total;
        if directory_sectors.saturating_mul(SECTOR_BYTES / 8) < needed {
            return fail(
                ErrorKind::Damaged,
                136,
                "its grain directory is too short for its capacity",
            );
        }
        // 62 TiB need 4,063,232 entries, 31 MiB.
        let bytes = read_within(&store, directory_sector, needed * 8)?;
        let directory = bytes.chunks_exact(8).map(wide).collect();
        let dialect = Dialect::SeSparse { tables_sector: field(144), grains_sector: field(192) };
        let (grain_sectors, cached) = (SE_GRAIN_SECTORS, Mutex::default());
        Ok(Self { store, dialect, capacity_sectors, grain_sectors, directory, cached })
    }

    pub(crate) fn length_bytes(&self) -> u64 {
        self.capacity_sectors * SECTOR_BYTES
    }

    fn table_entries(&self) -> u64 {
        match self.dialect {
            Dialect::Cowd => COWD_TABLE_ENTRIES,
            Dialect::SeSparse { .. } => SE_TABLE_SECTORS * SECTOR_BYTES / 8,
        }
    }

    fn damaged(&self, at: u64, sentence: impl Into<String>) -> ImageError {
        ImageError::new(ErrorKind::Damaged, &self.store.path, sentence).at(at)
    }

    /// Where the table at `index` begins, bytes; `None` where there is none.
    fn table_at(&self, index: usize) -> Result<Option<u64>> {
        let entry = self.directory.get(index).copied().unwrap_or(0);
        if entry == 0 {
            return Ok(None);
        }
        let sector = match self.dialect {
            Dialect::Cowd => Some(entry),
            // The topmost nibble says that a table is there, the low half which one.
            Dialect::SeSparse { tables_sector, .. } => (entry >> 32 == 0x1000_0000)
                .then(|| (entry & 0xffff_ffff) * SE_TABLE_SECTORS)
                .and_then(|sectors| sectors.checked_add(tables_sector)),
        };
        let sector = sector.filter(|sector| *sector <= u64::MAX / SECTOR_BYTES);
        let sentence =
            format!("entry {index} of its grain directory is {entry:#x}, which cannot be");
        sector.map(|sector| Some(sector * SECTOR_BYTES)).ok_or_else(|| self.damaged(0, sentence))
    }

    fn table(&self, index: usize) -> Result<Option<Arc<[u64]>>> {
        {
            let cached = self.cached.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(table) = cached.get(&index) {
                return Ok(Some(table.clone()));
            }
        }
        let Some(at) = self.table_at(index)? else { return Ok(None) };
        let table: Arc<[u64]> = match self.dialect {
            Dialect::Cowd => {
                let bytes = self.store.read_vec(at, COWD_TABLE_ENTRIES as usize * 4)?;
                bytes.chunks_exact(4).map(narrow).collect()
            }
            Dialect::SeSparse { .. } => {
                let bytes = self.store.read_vec(at, (SE_TABLE_SECTORS * SECTOR_BYTES) as usize)?;
                bytes.chunks_exact(8).map(wide).collect()
            }
        };
        let mut cached = self.cached.lock().unwrap_or_else(PoisonError::into_inner);
        if cached.len() >= TABLES_CACHED_MAX {
            cached.clear();
        }
        cached.insert(index, table.clone());
        Ok(Some(table))
    }

    /// What an entry means; `None` where it cannot mean anything.
    fn spot(&self, entry: u64) -> Option<Spot> {
        let place = |sector: u64| sector.checked_mul(SECTOR_BYTES).map(Spot::At);
        match self.dialect {
            Dialect::Cowd if entry == 0 => Some(Spot::Missing),
            Dialect::Cowd => place(entry),
            Dialect::SeSparse { grains_sector, .. } => match entry >> 60 {
                0 if entry == 0 => Some(Spot::Missing),
                // Unmapped by the guest, and zeroed.
                1 | 2 => Some(Spot::Zero),
                3 => {
                    // Twelve low bits of the number stand above its high ones.
                    let number = (entry >> 48 & 0xfff) | (entry & 0xffff_ffff_ffff) << 12;
                    let sector =
                        number.checked_mul(SE_GRAIN_SECTORS)?.checked_add(grains_sector)?;
                    place(sector)
                }
                _ => None,
            },
        }
    }

    fn locate(&self, offset: u64, limit: u64) -> Result<(Spot, u64)> {
        let grain_bytes = self.grain_sectors * SECTOR_BYTES;
        let (grain, within) = (offset / grain_bytes, offset % grain_bytes);
        let per_table = self.table_entries();
        let (index, at) = ((grain / per_table) as usize, (grain % per_table) as usize);
        let Some(table) = self.table(index)? else {
            let left = (per_table - at as u64) * grain_bytes - within;
            return Ok((Spot::Missing, left.min(limit)));
        };
        let bad = |entry: u64| {
            let sentence = format!(
                "the table entry of the grain of byte {offset} is {entry:#x}, which cannot be"
            );
            self.damaged(self.table_at(index).ok().flatten().unwrap_or(0) + at as u64 * 4, sentence)
        };
        let first = self.spot(table[at]).ok_or_else(|| bad(table[at]))?;
        let mut length = grain_bytes - within;
        for (count, entry) in (1_u64..).zip(&table[at + 1..]) {
            let goes_on = match (first, self.spot(*entry)) {
                (Spot::At(start), Some(Spot::At(next))) => {
                    count.checked_mul(grain_bytes).and_then(|ahead| ahead.checked_add(start))
                        == Some(next)
                }
                (first, next) => Some(first) == next,
            };
            if length >= limit || !goes_on {
                break;
            }
            length += grain_bytes;
        }
        let spot = match first {
            Spot::At(start) => Spot::At(start.saturating_add(within)),
            other => other,
        };
        Ok((spot, length.min(limit)))
    }

    fn refused(&self) -> ImageError {
        let sentence = "snapshots of ESXi are only read, never written, here; convert the image to \
                        another kind";
        ImageError::new(ErrorKind::ReadOnly, &self.store.path, sentence)
    }
}

impl Extent for DeltaExtent {
    fn status(&self, offset: u64, limit: u64) -> Result<(RunState, u64)> {
        let (spot, length) = self.locate(offset, limit)?;
        let state = match spot {
            Spot::Missing => RunState::Unallocated,
            Spot::Zero => RunState::Zero,
            Spot::At(_) => RunState::Data,
        };
        Ok((state, length))
    }

    fn read(&self, buf: &mut [u8], offset: u64, backing: Backing<'_>) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let (spot, length) = self.locate(at, (buf.len() - done) as u64)?;
            let part = &mut buf[done..done + length as usize];
            match spot {
                Spot::Missing => backing.read(part, at)?,
                Spot::Zero => part.fill(0),
                Spot::At(place) => self.store.read(part, place)?,
            }
            done += length as usize;
        }
        Ok(())
    }

    fn write(&self, _: &[u8], _: u64, _: Backing<'_>) -> Result<()> {
        Err(self.refused())
    }

    fn zero(&self, _: u64, _: u64, _: Backing<'_>) -> Result<()> {
        Err(self.refused())
    }

    fn trim(&self, _: u64, _: u64, _: Backing<'_>) -> Result<()> {
        Err(self.refused())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn info(&self) -> Result<ExtentInfo> {
        let (format, version) = match self.dialect {
            Dialect::Cowd => ("VMFSSPARSE", 1),
            Dialect::SeSparse { .. } => ("SESPARSE", 2),
        };
        Ok(ExtentInfo {
            path: Some(self.store.path.clone()),
            format,
            length_bytes: self.length_bytes(),
            offset_bytes: 0,
            file_bytes: self.store.length()?,
            grain_bytes: Some(self.grain_sectors * SECTOR_BYTES),
            version: Some(version),
            compressed: false,
            unclean: false,
        })
    }

    fn store(&self) -> Option<&Store> {
        Some(&self.store)
    }

    fn check(&self, _: Deep, sink: &mut Sink<'_>, progress: &mut dyn Progress) -> Result<()> {
        let file_bytes = self.store.length()?;
        let grain_bytes = self.grain_sectors * SECTOR_BYTES;
        let total = self.length_bytes();
        let grains = self.capacity_sectors.div_ceil(self.grain_sectors);
        sink.report.grains_total += grains;
        let loss = |offset: Option<u64>, sentence: String| Finding {
            severity: Severity::Loss,
            path: self.store.path.clone(),
            offset,
            sentence,
        };
        for index in 0..self.directory.len() {
            let first = index as u64 * self.table_entries();
            advance(progress, &self.store.path, (first * grain_bytes).min(total), total)?;
            let table = match self.table(index) {
                Ok(Some(table)) => table,
                Ok(None) => continue,
                Err(error) => {
                    sink.find(loss(error.offset(), error.sentence().to_owned()));
                    continue;
                }
            };
            for (grain, entry) in (first..grains).zip(table.iter()) {
                let visible = (total - grain * grain_bytes).min(grain_bytes);
                match self.spot(*entry) {
                    Some(Spot::At(at))
                        if at.checked_add(visible).is_some_and(|end| end <= file_bytes) =>
                    {
                        sink.report.grains_allocated += 1;
                    }
                    Some(Spot::Missing | Spot::Zero) => {}
                    _ => {
                        let at = grain * grain_bytes;
                        let sentence = format!(
                            "the table entry of the grain at byte {at} of the disk is wrong"
                        );
                        sink.find(loss(self.table_at(index).ok().flatten(), sentence));
                    }
                }
            }
        }
        advance(progress, &self.store.path, total, total)
    }
}

/// Whether a COWD directory of `entries` stands at `sector`: what it names are whole tables behind
/// it, and it names one.
fn cowd_directory(store: &Store, sector: u64, entries: u64) -> bool {
    let behind = sector + (entries * 4).div_ceil(SECTOR_BYTES);
    let file_sectors = store.length().unwrap_or(0).div_ceil(SECTOR_BYTES);
    let table_sectors = COWD_TABLE_ENTRIES * 4 / SECTOR_BYTES;
    is_directory(store, sector, entries * 4, |bytes| {
        let entry =
            |word| (word, word == 0 || word >= behind && word + table_sectors <= file_sectors);
        bytes.chunks_exact(4).map(narrow).map(entry).collect()
    })
}

/// Whether a seSparse directory of `entries` stands at `sector`, for as many tables.
fn se_directory(store: &Store, sector: u64, entries: u64) -> bool {
    is_directory(store, sector, entries * 8, |bytes| {
        let sound = |word: u64| word >> 32 == 0x1000_0000 && word & 0xffff_ffff < entries;
        bytes.chunks_exact(8).map(wide).map(|word| (word, word == 0 || sound(word))).collect()
    })
}

/// Whether all entries are sound and one names a table, as far as a first look goes.
fn is_directory(
    store: &Store,
    sector: u64,
    length: u64,
    judge: impl Fn(&[u8]) -> Vec<(u64, bool)>,
) -> bool {
    let seen = length.min(SEEN_BYTES_MAX);
    let Ok(bytes) = read_within(store, sector, seen) else { return false };
    let entries = judge(&bytes);
    sector > 0
        && entries.iter().all(|(_, sound)| *sound)
        && entries.iter().any(|(word, _)| *word != 0)
}

/// The error with a repair that writes one field of the header.
fn mended<const N: usize>(
    error: ImageError,
    what: &str,
    offset: u64,
    bytes: [u8; N],
) -> ImageError {
    let fix = Fix {
        path: error.path().to_owned(),
        sentence: format!("correct the {what} of the grain directory in the header"),
        lost_bytes: 0,
        freed_bytes: 0,
        actions: vec![Action::Write { offset, bytes: bytes.into() }],
    };
    error.mended_by(fix)
}

/// Reads `length` bytes that must lie within the file, so that a hostile number costs no memory.
fn read_within(store: &Store, sector: u64, length: u64) -> Result<Vec<u8>> {
    let file_bytes = store.length()?;
    let at = sector.checked_mul(SECTOR_BYTES);
    match at.filter(|at| at.checked_add(length).is_some_and(|end| end <= file_bytes)) {
        Some(at) => store.read_vec(at, length as usize),
        None => {
            let sentence = "its grain directory lies outside of the file";
            Err(ImageError::new(ErrorKind::Damaged, &store.path, sentence)
                .at(sector.saturating_mul(SECTOR_BYTES)))
        }
    }
}

fn narrow(word: &[u8]) -> u64 {
    u64::from(u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
}

fn wide(word: &[u8]) -> u64 {
    u64::from_le_bytes([word[0], word[1], word[2], word[3], word[4], word[5], word[6], word[7]])
}
