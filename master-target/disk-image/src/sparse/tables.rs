//! Grain directory and grain tables of a hosted sparse extent, two copies of each.
//!
//! What is read is judged entry by entry: an entry of the primary copy that cannot be right, or that
//! names nothing, is taken from the redundant one, and told. What is changed stays in memory until a
//! checkpoint.

use std::{
    collections::{BTreeSet, HashMap},
    ops::Range,
    path::Path,
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
    /// Sectors of the table that a checkpoint must write. From the start, those where the primary
    /// copy lacks what the redundant one names: the first change makes both right.
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
    /// For each copy, a range of the file's bytes that was a hole when it was last asked for: most
    /// tables of a large disk lie in one.
    holes: [Range<u64>; 2],
    /// The lowest sector that an entry may name.
    pub(crate) first_sector: u64,
    findings: Vec<Finding>,
    /// Tables that were read from the redundant copy where the primary names nothing, at most
    /// [`FINDINGS_MAX`].
    behind: BTreeSet<usize>,
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
            holes: [0..0, 0..0],
            first_sector: if writable { header.overhead_sectors.max(1) } else { 1 },
            findings: Vec::new(),
            behind: BTreeSet::new(),
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

    /// What was met that is damaged, but for what every check finds by itself.
    pub(crate) fn damage(&self) -> &[Finding] {
        &self.findings
    }

    /// What was met and read from the other copy, as far as no checkpoint has mended it.
    pub(crate) fn findings(&self, path: &Path) -> Vec<Finding> {
        let missing = |index: &usize| Finding {
            severity: Severity::Redundancy,
            path: path.to_owned(),
            offset: Some(self.entry_byte(0, *index)),
            sentence: format!(
                "grain table {index}, or some of its entries, is missing in the first copy; it is read \
                 from the other"
            ),
        };
        let room = FINDINGS_MAX.saturating_sub(self.findings.len());
        let behind = self.behind.iter().take(room).map(missing);
        self.findings.iter().cloned().chain(behind).collect()
    }

    /// Byte of the file where the directory of `copy`, 0 for the primary, names the table at `index`.
    pub(crate) fn entry_byte(&self, copy: usize, index: usize) -> u64 {
        let directory = [self.directory_sector, self.header.redundant_sector][copy];
        directory.saturating_mul(SECTOR_BYTES).saturating_add(index as u64 * 4)
    }

    /// Where the two copies of the table at `index` are: the primary, the redundant.
    pub(crate) fn places(&self, index: usize) -> [u32; 2] {
        [&self.primary, &self.redundant].map(|copy| copy.get(index).copied().unwrap_or(MISSING))
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

    /// Whether the table at `index` has its place in the primary copy.
    pub(crate) fn is_placed(&self, index: usize) -> bool {
        self.places(index)[0] != MISSING
    }

    /// Whether a copy names the table at `index`.
    pub(crate) fn is_named(&self, index: usize) -> bool {
        self.places(index) != [MISSING; 2]
    }

    /// Whether the table at `index` is in a `copy`, 0 for the primary, and not in a hole of the file:
    /// there, it is empty.
    pub(crate) fn is_stored(&mut self, store: &Store, copy: usize, index: usize) -> bool {
        let sector = self.places(index)[copy];
        sector != MISSING && !self.is_hole(store, copy, u64::from(sector))
    }

    /// Whether the place of a table at `sector` is a hole of the file.
    pub(crate) fn is_hole(&mut self, store: &Store, copy: usize, sector: u64) -> bool {
        let start = sector * SECTOR_BYTES;
        let end = start + self.header.table_sectors() * SECTOR_BYTES;
        let hole = &mut self.holes[copy];
        if hole.contains(&start) && end <= hole.end {
            return true;
        }
        let file_bytes = self.file_sectors * SECTOR_BYTES;
        if end > file_bytes {
            return false;
        }
        match store.stored_run(start, file_bytes) {
            Ok((false, until)) => *hole = start..until,
            _ => return false,
        }
        end <= hole.end
    }

    /// Whether nothing of the table at `index` is allocated, as far as that is quick to tell.
    pub(crate) fn is_empty(&mut self, store: &Store, index: usize) -> bool {
        !self.cached.contains_key(&index)
            && !self.is_stored(store, 0, index)
            && !self.is_stored(store, 1, index)
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

    /// Whether an entry names a place where writers put grains: beyond the header's metadata.
    fn is_grain(&self, entry: u32) -> bool {
        let is_zeros = entry == ZEROED && self.header.has(FLAG_ZEROED_GRAINS);
        is_zeros || u64::from(entry) >= self.header.overhead_sectors
    }

    /// Entry `at` of the table at `index`, as both copies have it; `None` for a copy that cannot be
    /// read. [`BAD`] where neither can be right.
    pub(crate) fn choose(&self, copies: [Option<u32>; 2], index: usize, at: usize) -> u32 {
        let sound = |entry: Option<u32>| entry.filter(|entry| self.is_sound(*entry, index, at));
        match copies.map(sound) {
            // A crash between the two copies leaves the redundant one ahead, and what was zeroed by
            // accident is no reason to forget a grain.
            [Some(MISSING), Some(ahead)] => ahead,
            [Some(entry), Some(other)] if !self.is_grain(entry) && self.is_grain(other) => other,
            [Some(entry), _] | [None, Some(entry)] => entry,
            [None, None] => BAD,
        }
    }

    fn read(&mut self, store: &Store, index: usize) -> Result<Table> {
        let count = self.entries_of(index);
        let places = self.places(index);
        let clean = |entries| Table { entries, dirty: BTreeSet::new(), damaged: false };
        if !self.is_named(index) {
            return Ok(clean(vec![MISSING; count]));
        }
        let primary = self.raw(store, places[0], index).ok().flatten();
        if let Some(entries) = &primary
            && (0..count).all(|at| {
                let entry = entries[at];
                entry != MISSING && self.is_grain(entry) && self.is_sound(entry, index, at)
            })
        {
            return Ok(clean(entries.clone()));
        }
        let redundant = self.raw(store, places[1], index).ok().flatten();
        let of = |copy: &Option<Vec<u32>>, at: usize| copy.as_ref().map(|entries| entries[at]);
        let entries: Vec<u32> = (0..count)
            .map(|at| self.choose([of(&primary, at), of(&redundant, at)], index, at))
            .collect();
        let sound = |at: usize| {
            let first = of(&primary, at).filter(|entry| self.is_sound(*entry, index, at));
            first.is_some_and(|entry| entry == MISSING || entry == entries[at])
        };
        if entries.contains(&BAD) || (places[0] != MISSING && !(0..count).all(sound)) {
            let sentence = match entries.contains(&BAD) {
                true => "a grain table has entries that cannot be right in any copy",
                false => "a grain table is damaged; it is read from its other copy",
            };
            let sector = places.into_iter().find(|place| *place != MISSING).unwrap_or(MISSING);
            self.note(
                &ImageError::new(ErrorKind::Damaged, &store.path, sentence)
                    .at(u64::from(sector) * SECTOR_BYTES),
            );
            return Ok(Table { damaged: true, ..clean(entries) });
        }
        let lacking = |at: &usize| of(&primary, *at).unwrap_or(MISSING) != entries[*at];
        let dirty: BTreeSet<usize> =
            (0..count).filter(lacking).map(|at| at * 4 / SECTOR_BYTES as usize).collect();
        if !dirty.is_empty() && self.behind.len() < FINDINGS_MAX {
            self.behind.insert(index);
        }
        Ok(Table { dirty, ..clean(entries) })
    }

    /// The table at `index`, to be changed.
    ///
    /// # Errors
    /// It is damaged, so that writing it could make things worse.
    pub(crate) fn get_sound(&mut self, store: &Store, index: usize) -> Result<&mut Table> {
        let table = self.get(store, index)?;
        if table.damaged {
            let sentence = "its grain table is damaged; repair the image before writing here";
            return Err(ImageError::new(ErrorKind::Damaged, &store.path, sentence));
        }
        Ok(table)
    }

    /// Sets an entry, in memory, of a table that has its place.
    pub(crate) fn set(&mut self, store: &Store, index: usize, at: usize, entry: u32) -> Result<()> {
        let table = self.get_sound(store, index)?;
        table.entries[at] = entry;
        table.dirty.insert(at * 4 / SECTOR_BYTES as usize);
        self.dirty.insert(index);
        Ok(())
    }

    /// Whether the primary copy of the table at `index`, which was just read, lacks something that
    /// no checkpoint is to write yet.
    pub(crate) fn is_behind(&self, index: usize) -> bool {
        !self.dirty.contains(&index)
            && self.cached.get(&index).is_some_and(|table| !table.dirty.is_empty())
    }

    /// Makes the table at `index`, which has its place, part of the next checkpoint.
    pub(crate) fn settle(&mut self, index: usize) {
        if self.is_behind(index) {
            self.dirty.insert(index);
        }
    }

    /// Gives a table that was read and has no place in the primary copy one, from `sector` on: first
    /// the redundant copy if that lacks it too, then the primary. Returns the sectors used.
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
        self.holes = [0..0, 0..0];
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
            self.behind.remove(&index);
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
