//! Grain directory and grain tables of a hosted sparse extent, two copies of each.
//!
//! What is read is judged entry by entry: an entry of the primary copy that cannot be right is
//! taken from the redundant one, and told. What is changed stays in memory until a checkpoint.

use std::{
    collections::{BTreeSet, HashMap},
    ops::Range,
};

use crate::{
    error::{ErrorKind, ImageError, Result},
    image::SECTOR_BYTES,
    report::{FINDINGS_MAX, Finding, Severity},
    sparse::header::{FLAG_REDUNDANT, FLAG_ZEROED_GRAINS, Header},
    storage::Store,
};

/// An entry of a table: nothing is stored.
pub(crate) const MISSING: u32 = 0;
/// An entry of a table, where the header allows it: the grain is zeros.
pub(crate) const ZEROED: u32 = 1;
/// Our own mark for an entry that is wrong in every copy. No grain can begin there: it would end
/// beyond the 2 TiB that entries reach.
pub(crate) const BAD: u32 = u32::MAX;

/// Tables held in memory: 16 MiB, the tables of 256 GiB.
const TABLES_CACHED_MAX: usize = 8192;

/// One grain table.
#[derive(Debug, Clone)]
pub(crate) struct Table {
    pub(crate) entries: Vec<u32>,
    /// Sectors of the table that a checkpoint must write.
    dirty: BTreeSet<usize>,
    /// An entry was not as it should be, so writing the table could make things worse.
    pub(crate) damaged: bool,
}

/// Directory and tables.
#[derive(Debug)]
pub(crate) struct Tables {
    pub(crate) header: Header,
    /// Sectors of the tables of each copy. Empty where there is no redundant copy.
    pub(crate) primary: Vec<u32>,
    pub(crate) redundant: Vec<u32>,
    /// Where the directory is that `primary` was read from.
    pub(crate) directory_sector: u64,
    cached: HashMap<usize, Table>,
    /// Tables with dirty sectors.
    dirty: BTreeSet<usize>,
    /// Tables that are new: their directory entries are not on disk.
    new: BTreeSet<usize>,
    pub(crate) file_sectors: u64,
    /// A range of the file's bytes that was a hole when it was last asked for: most tables of a
    /// large disk lie in one.
    hole: Range<u64>,
    /// The lowest sector that an entry may name.
    pub(crate) first_sector: u64,
    pub(crate) findings: Vec<Finding>,
}

impl Tables {
    pub(crate) fn load(store: &Store, header: Header, writable: bool) -> Result<Self> {
        let file_sectors = store.length()?.div_ceil(SECTOR_BYTES);
        let mut tables = Self {
            header,
            primary: Vec::new(),
            redundant: Vec::new(),
            directory_sector: header.directory_sector,
            cached: HashMap::new(),
            dirty: BTreeSet::new(),
            new: BTreeSet::new(),
            file_sectors,
            hole: 0..0,
            first_sector: if writable { header.overhead_sectors.max(1) } else { 1 },
            findings: Vec::new(),
        };
        let redundant = header
            .has(FLAG_REDUNDANT)
            .then(|| tables.load_directory(store, header.redundant_sector))
            .transpose();
        match (tables.load_directory(store, header.directory_sector), redundant) {
            (Ok(primary), Ok(redundant)) => {
                tables.primary = primary;
                tables.redundant = redundant.unwrap_or_default();
            }
            (Ok(primary), Err(error)) => {
                tables.note(&error);
                tables.primary = primary;
            }
            (Err(error), Ok(Some(redundant))) => {
                tables.note(&error);
                // Reading goes through the redundant tables alone; writing is refused.
                tables.primary = redundant;
                tables.directory_sector = header.redundant_sector;
                tables.first_sector = u64::MAX;
            }
            (Err(error), _) => return Err(error),
        }
        if tables.first_sector == u64::MAX {
            if writable {
                let sentence = "its grain directory is damaged and only the redundant one can be \
                                read; repair it before writing";
                return Err(ImageError::new(ErrorKind::Damaged, &store.path, sentence)
                    .at(header.directory_sector.saturating_mul(SECTOR_BYTES)));
            }
            tables.first_sector = 1;
        }
        Ok(tables)
    }

    fn load_directory(&self, store: &Store, sector: u64) -> Result<Vec<u32>> {
        let bytes = self.header.directory_entries() * 4;
        let sectors = bytes.div_ceil(SECTOR_BYTES);
        let end = sector.checked_add(sectors);
        if sector == 0 || end.is_none_or(|end| end > self.file_sectors) {
            let sentence = "a grain directory lies outside of the file";
            return Err(ImageError::new(ErrorKind::Damaged, &store.path, sentence)
                .at(sector.saturating_mul(SECTOR_BYTES)));
        }
        // At most 16 MiB: the header's bound on entries.
        let bytes = store.read_vec(sector * SECTOR_BYTES, bytes as usize)?;
        Ok(words(&bytes).collect())
    }

    fn note(&mut self, error: &ImageError) {
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(Finding {
                severity: Severity::Redundancy,
                path: error.path().to_owned(),
                offset: error.offset(),
                sentence: error.to_string(),
            });
        }
    }

    /// The table at `index`, from memory or from whichever copy is sound.
    pub(crate) fn get(&mut self, store: &Store, index: usize) -> Result<&mut Table> {
        if !self.cached.contains_key(&index) {
            let table = self.read(store, index)?;
            if self.cached.len() >= TABLES_CACHED_MAX {
                let dirty = &self.dirty;
                self.cached.retain(|index, _| dirty.contains(index));
            }
            self.cached.insert(index, table);
        }
        self.cached
            .get_mut(&index)
            .ok_or_else(|| ImageError::new(ErrorKind::Damaged, &store.path, "a table vanished"))
    }

    /// Whether the table at `index` exists in the copy that is read.
    pub(crate) fn exists(&self, index: usize) -> bool {
        self.primary.get(index).is_some_and(|sector| *sector != MISSING)
            || self.cached.contains_key(&index)
    }

    /// Whether the copy of the table at `sector` lies in a hole of the file, and so is empty.
    pub(crate) fn is_hole(&mut self, store: &Store, sector: u32) -> bool {
        let start = u64::from(sector) * SECTOR_BYTES;
        let end = start + self.header.table_sectors() * SECTOR_BYTES;
        if self.hole.contains(&start) && end <= self.hole.end {
            return true;
        }
        let file_bytes = self.file_sectors * SECTOR_BYTES;
        if end > file_bytes {
            return false;
        }
        match store.stored_run(start, file_bytes) {
            Ok((false, until)) => self.hole = start..until,
            _ => return false,
        }
        end <= self.hole.end
    }

    /// Whether nothing of the table at `index` is allocated, as far as that is quick to tell.
    pub(crate) fn is_empty(&mut self, store: &Store, index: usize) -> bool {
        let sector = self.primary.get(index).copied().unwrap_or(MISSING);
        !self.cached.contains_key(&index)
            && (sector == MISSING || (sector != BAD && self.is_hole(store, sector)))
    }

    /// Entries of the table at `index` that stand for sectors of the disk.
    pub(crate) fn entries_of(&self, index: usize) -> usize {
        let per_table = u64::from(self.header.entries_per_table);
        let left = self.header.grains().saturating_sub(index as u64 * per_table);
        left.min(per_table) as usize
    }

    /// One copy of a table as it is on disk; `None` where the directory names none, or names a
    /// place that cannot be.
    pub(crate) fn raw(&self, store: &Store, sector: u32, index: usize) -> Result<Option<Vec<u32>>> {
        let sector = u64::from(sector);
        if sector == 0 || sector + self.header.table_sectors() > self.file_sectors {
            return Ok(None);
        }
        let bytes = store.read_vec(sector * SECTOR_BYTES, self.entries_of(index) * 4)?;
        Ok(Some(words(&bytes).collect()))
    }

    /// Whether `entry`, number `at` of the table at `index`, can be right.
    pub(crate) fn is_sound(&self, entry: u32, index: usize, at: usize) -> bool {
        if entry == MISSING || (entry == ZEROED && self.header.has(FLAG_ZEROED_GRAINS)) {
            return true;
        }
        let sector = u64::from(entry);
        let needed = if self.header.is_compressed() {
            1
        } else {
            let per_table = u64::from(self.header.entries_per_table);
            let grain = index as u64 * per_table + at as u64;
            let left =
                self.header.capacity_sectors.saturating_sub(grain * self.header.grain_sectors);
            left.min(self.header.grain_sectors)
        };
        sector >= self.first_sector && entry != BAD && sector + needed <= self.file_sectors
    }

    fn read(&mut self, store: &Store, index: usize) -> Result<Table> {
        let count = self.entries_of(index);
        let empty =
            || Table { entries: vec![MISSING; count], dirty: BTreeSet::new(), damaged: false };
        let sector = self.primary.get(index).copied().unwrap_or(MISSING);
        if sector == MISSING {
            return Ok(empty());
        }
        let primary = self.raw(store, sector, index);
        let all_sound = |tables: &Self, entries: &[u32]| {
            entries.iter().enumerate().all(|(at, entry)| tables.is_sound(*entry, index, at))
        };
        if let Ok(Some(entries)) = &primary
            && all_sound(self, entries)
        {
            return Ok(Table { entries: entries.clone(), ..empty() });
        }
        let other = self.redundant.get(index).copied().unwrap_or(MISSING);
        let redundant = self.raw(store, other, index).ok().flatten();
        let primary = primary.ok().flatten();
        let choose = |at: usize| {
            let sound = |copy: &Option<Vec<u32>>| {
                copy.as_ref()
                    .map(|entries| entries[at])
                    .filter(|entry| self.is_sound(*entry, index, at))
            };
            sound(&primary).or_else(|| sound(&redundant)).unwrap_or(BAD)
        };
        let entries: Vec<u32> = (0..count).map(choose).collect();
        let sentence = match entries.contains(&BAD) {
            true => "a grain table has entries that cannot be right in any copy",
            false => "a grain table is damaged; it is read from its other copy",
        };
        self.note(
            &ImageError::new(ErrorKind::Damaged, &store.path, sentence)
                .at(u64::from(sector) * SECTOR_BYTES),
        );
        Ok(Table { entries, dirty: BTreeSet::new(), damaged: true })
    }

    /// Sets an entry, in memory.
    pub(crate) fn set(&mut self, store: &Store, index: usize, at: usize, entry: u32) -> Result<()> {
        let table = self.get(store, index)?;
        if table.damaged {
            let sentence = "its grain table is damaged; repair the image before writing here";
            return Err(ImageError::new(ErrorKind::Damaged, &store.path, sentence));
        }
        table.entries[at] = entry;
        table.dirty.insert(at * 4 / SECTOR_BYTES as usize);
        self.dirty.insert(index);
        Ok(())
    }

    /// Gives a table that does not exist its place, from `sector` on: first the redundant copy,
    /// then the primary. Returns the sectors used.
    pub(crate) fn place(&mut self, index: usize, sector: u32) -> u64 {
        let sectors = self.header.table_sectors();
        let mut used = 0;
        if let Some(place) = self.redundant.get_mut(index)
            && *place == MISSING
        {
            *place = sector;
            used = sectors;
        }
        self.primary[index] = sector + used as u32;
        self.new.insert(index);
        self.dirty.insert(index);
        used + sectors
    }

    pub(crate) fn dirty_tables(&self) -> usize {
        self.dirty.len()
    }

    /// Writes what is dirty: every step is durable before the next begins, and the caller has made
    /// the grains durable. The redundant copy goes first, so that at any moment one copy is whole.
    pub(crate) fn checkpoint(&mut self, store: &Store) -> Result<()> {
        if self.dirty.is_empty() {
            return Ok(());
        }
        self.hole = 0..0;
        for index in &self.new {
            // All of both copies: what lies there is whatever the file had.
            if let Some(table) = self.cached.get(index) {
                for directory in [&self.redundant, &self.primary] {
                    write_sectors(store, table, directory.get(*index), self.all_sectors())?;
                }
            }
        }
        if !self.redundant.is_empty() {
            self.write_dirty(store, &self.redundant)?;
            store.sync()?;
            if !self.new.is_empty() {
                self.write_entries(store, self.header.redundant_sector, &self.redundant)?;
            }
        }
        self.write_dirty(store, &self.primary)?;
        store.sync()?;
        if !self.new.is_empty() {
            self.write_entries(store, self.header.directory_sector, &self.primary)?;
            store.sync()?;
        }
        for index in std::mem::take(&mut self.dirty) {
            if let Some(table) = self.cached.get_mut(&index) {
                table.dirty.clear();
            }
        }
        self.new.clear();
        Ok(())
    }

    fn all_sectors(&self) -> impl Iterator<Item = usize> + use<> {
        0..self.header.table_sectors() as usize
    }

    fn write_dirty(&self, store: &Store, directory: &[u32]) -> Result<()> {
        for index in self.dirty.iter().filter(|index| !self.new.contains(index)) {
            if let Some(table) = self.cached.get(index) {
                write_sectors(store, table, directory.get(*index), table.dirty.iter().copied())?;
            }
        }
        Ok(())
    }

    /// The sectors of a directory that name new tables.
    fn write_entries(&self, store: &Store, sector: u64, directory: &[u32]) -> Result<()> {
        const PER_SECTOR: usize = SECTOR_BYTES as usize / 4;
        let sectors: BTreeSet<usize> = self.new.iter().map(|index| index / PER_SECTOR).collect();
        for number in sectors {
            let mut bytes = [0; SECTOR_BYTES as usize];
            let entries = directory.iter().skip(number * PER_SECTOR).take(PER_SECTOR);
            for (place, entry) in bytes.chunks_exact_mut(4).zip(entries) {
                place.copy_from_slice(&entry.to_le_bytes());
            }
            store.write(&bytes, (sector + number as u64) * SECTOR_BYTES)?;
        }
        Ok(())
    }
}

/// Writes some sectors of a table to the copy at `sector`, if there is that copy.
fn write_sectors(
    store: &Store,
    table: &Table,
    sector: Option<&u32>,
    sectors: impl Iterator<Item = usize>,
) -> Result<()> {
    const PER_SECTOR: usize = SECTOR_BYTES as usize / 4;
    let Some(sector) = sector.filter(|sector| **sector != MISSING) else { return Ok(()) };
    for number in sectors {
        let mut bytes = [0; SECTOR_BYTES as usize];
        let entries = table.entries.iter().skip(number * PER_SECTOR).take(PER_SECTOR);
        for (place, entry) in bytes.chunks_exact_mut(4).zip(entries) {
            place.copy_from_slice(&entry.to_le_bytes());
        }
        store.write(&bytes, (u64::from(*sector) + number as u64) * SECTOR_BYTES)?;
    }
    Ok(())
}

pub(crate) fn words(bytes: &[u8]) -> impl Iterator<Item = u32> + '_ {
    bytes.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
}
