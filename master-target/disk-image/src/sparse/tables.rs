//! Grain directory and grain tables of a hosted sparse extent, two copies of each.
//!
//! A table whose copies agree is read as it is; where they differ, a look at both copies as a whole
//! decides, and that is told. What is changed stays in memory until a checkpoint.

use std::{
    collections::{BTreeSet, HashMap},
    ops::Range,
    path::Path,
    sync::Arc,
};

use crate::{
    error::{ErrorKind, ImageError, Result},
    image::SECTOR_BYTES,
    report::{FINDINGS_MAX, Finding, Progress, Severity, Silent},
    sparse::{
        header::{FLAG_REDUNDANT, FLAG_ZEROED_GRAINS, Header},
        layout::Layout,
        survey::Survey,
    },
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
    /// Nothing tells which copy is right, so that a write could hit another grain.
    crossed: bool,
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
    /// What the directories told when they were read.
    pub(crate) layout: Layout,
    /// Both copies as a whole, once that was needed.
    survey: Option<Arc<Survey>>,
    cached: HashMap<usize, Table>,
    /// Tables with dirty sectors.
    dirty: BTreeSet<usize>,
    /// Tables that are new: their directory entries are not on disk.
    new: BTreeSet<usize>,
    /// Tables that got their place from this writer, so that it is known to be theirs.
    placed: BTreeSet<usize>,
    pub(crate) file_sectors: u64,
    /// For each copy, a range of the file's bytes that was a hole when it was last asked for: most
    /// tables of a large disk lie in one.
    holes: [Range<u64>; 2],
    /// The lowest sector that an entry may name.
    pub(crate) first_sector: u64,
    findings: Vec<Finding>,
    /// Findings of opening, the first ones; the others a check makes by itself.
    found_at_opening: usize,
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
            layout: Layout::of(&header, header.directory_sector, [&[], &[]], file_sectors),
            survey: None,
            cached: HashMap::new(),
            dirty: BTreeSet::new(),
            new: BTreeSet::new(),
            placed: BTreeSet::new(),
            file_sectors,
            holes: [0..0, 0..0],
            first_sector: if writable { header.overhead_sectors.max(1) } else { 1 },
            findings: Vec::new(),
            found_at_opening: 0,
            behind: BTreeSet::new(),
        };
        let redundant = (header.has(FLAG_REDUNDANT) && !header.has_one_directory())
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
        if header.has_one_directory() {
            let sentence =
                "the header names one grain directory for both copies, so that there is only one";
            let at = header.directory_sector.saturating_mul(SECTOR_BYTES);
            tables.note(&ImageError::new(ErrorKind::Damaged, &store.path, sentence).at(at));
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
        let copies = [&tables.primary, &tables.redundant].map(Vec::as_slice);
        tables.layout = Layout::of(&header, tables.directory_sector, copies, file_sectors);
        tables.found_at_opening = tables.findings.len();
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
        self.note_as(Severity::Redundancy, error);
    }

    fn note_as(&mut self, severity: Severity, error: &ImageError) {
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(Finding {
                severity,
                path: error.path().to_owned(),
                offset: error.offset(),
                sentence: error.to_string(),
            });
        }
    }

    /// What was met that is damaged, but for what every check finds by itself.
    pub(crate) fn damage(&self) -> &[Finding] {
        &self.findings[..self.found_at_opening]
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

    /// Whether the header promises a redundant copy, and there is none.
    pub(crate) fn lacks_redundant(&self) -> bool {
        self.header.has(FLAG_REDUNDANT)
            && self.redundant.is_empty()
            && self.directory_sector == self.header.directory_sector
    }

    /// The table at `index`, from memory or from whichever copy is sound.
    pub(crate) fn get(&mut self, store: &Store, index: usize) -> Result<&mut Table> {
        self.remember(store, index)?;
        let vanished = || ImageError::new(ErrorKind::Damaged, &store.path, "a table vanished");
        self.cached.get_mut(&index).ok_or_else(vanished)
    }

    fn remember(&mut self, store: &Store, index: usize) -> Result<()> {
        if !self.cached.contains_key(&index) {
            let table = self.read(store, index)?;
            if self.cached.len() >= TABLES_CACHED_MAX {
                let dirty = &self.dirty;
                self.cached.retain(|index, _| dirty.contains(index));
            }
            self.cached.insert(index, table);
        }
        Ok(())
    }

    /// The entries of the table at `index`, and what is known of both copies as a whole.
    pub(crate) fn entries(
        &mut self,
        store: &Store,
        index: usize,
    ) -> Result<(&[u32], Option<&Survey>)> {
        self.remember(store, index)?;
        let entries = self.cached.get(&index).map_or(&[][..], |table| &table.entries);
        Ok((entries, self.survey.as_deref()))
    }

    /// Whether the table at `index` has its place in the primary copy.
    pub(crate) fn is_placed(&self, index: usize) -> bool {
        self.places(index)[0] != MISSING
    }

    /// Whether a copy names the table at `index`.
    pub(crate) fn is_named(&self, index: usize) -> bool {
        self.places(index) != [MISSING; 2]
    }

    /// Whether the directory of a copy names the regular place for the table at `index`.
    pub(crate) fn is_regular_in(&self, copy: usize, index: usize) -> bool {
        u64::from(self.places(index)[copy]) == self.layout.regular_place(copy, index)
    }

    /// Whether all copies of the table at `index` are at their regular places.
    pub(crate) fn is_regular(&self, index: usize) -> bool {
        self.is_regular_in(0, index) && (self.redundant.is_empty() || self.is_regular_in(1, index))
    }

    /// Whether the table at `index` is on disk only after the next checkpoint.
    pub(crate) fn is_new(&self, index: usize) -> bool {
        self.new.contains(&index)
    }

    /// Whether there may be something in a `copy`, 0 for the primary, of the table at `index`: in a
    /// hole of the file, it is empty. What the directory does not name may be at its regular place.
    pub(crate) fn is_stored(&mut self, store: &Store, copy: usize, index: usize) -> bool {
        let named = self.places(index)[copy];
        let place = match named == MISSING || self.layout.is_strayed(copy, index) {
            true => self.layout.free_place(copy, index).unwrap_or(named),
            false => named,
        };
        place != MISSING && !self.is_hole(store, copy, u64::from(place))
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

    /// Both copies as a whole, as they are on disk; made when it is first asked for.
    pub(crate) fn survey(
        &mut self,
        store: &Store,
        progress: &mut dyn Progress,
    ) -> Result<Arc<Survey>> {
        if let Some(survey) = &self.survey {
            return Ok(survey.clone());
        }
        let survey = Arc::new(Survey::of(self, store, progress)?);
        self.survey = Some(survey.clone());
        self.note_entries(store);
        Ok(survey)
    }

    /// Notes the entries of one directory that are wrong or missing: whose tables are empty, or are found
    /// at their regular places, no reading would tell.
    fn note_entries(&mut self, store: &Store) {
        let is_missing = |index: &usize| {
            let [primary, redundant] = self.places(*index);
            !self.redundant.is_empty() && primary != MISSING && redundant == MISSING
        };
        let is_wrong = |index: &usize| {
            is_missing(index) || [0, 1].iter().any(|copy| self.layout.is_strayed(*copy, *index))
        };
        let count = (0..self.primary.len()).filter(is_wrong).count();
        if count > 0 {
            let tables = if count == 1 { "grain table" } else { "grain tables" };
            let sentence = format!(
                "a copy of the grain directory is damaged: it names no place, or a wrong one, for {count} \
                 {tables}"
            );
            let at = self.directory_sector.saturating_mul(SECTOR_BYTES);
            self.note(&ImageError::new(ErrorKind::Damaged, &store.path, sentence).at(at));
        }
    }

    fn read(&mut self, store: &Store, index: usize) -> Result<Table> {
        if let Some(table) = self.read_agreed(store, index) {
            return Ok(table);
        }
        let survey = self.survey(store, &mut Silent)?;
        let places = self.places(index);
        let copies = survey.copies(self, store, index);
        let mut crossed = 0;
        let judge = |at| {
            let judged = survey.judge(&copies, index, at);
            crossed += u64::from(judged.is_crossed);
            judged.entry
        };
        let mut entries: Vec<u32> = (0..self.entries_of(index)).map(judge).collect();
        if copies == [None, None] && places == [MISSING; 2] {
            entries.fill(MISSING);
        }
        let primary = |at: usize| copies[0].as_ref().map_or(BAD, |entries| entries[at]);
        let is_strayed = [0, 1].map(|copy| places[copy] != MISSING && copies[copy].is_none());
        let is_found = [0, 1].map(|copy| survey.is_found(copy, index));
        let is_sound = |at: usize| primary(at) == MISSING || primary(at) == entries[at];
        let count = entries.len();
        let is_bad = entries.contains(&BAD);
        let is_damaged = is_bad
            || crossed > 0
            || is_strayed.contains(&true)
            || (places[0] != MISSING && !(0..count).all(is_sound))
            // What is found, and not in the other copy, is not sure enough to be written.
            || (is_found.contains(&true) && copies[0] != copies[1]);
        if is_damaged {
            let (severity, sentence) = match (is_bad, crossed) {
                (true, _) => (
                    Severity::Loss,
                    "a grain table has entries that cannot be right in any copy".to_owned(),
                ),
                (false, 0) => (
                    Severity::Redundancy,
                    "a grain table is damaged; it is read from its other copy".to_owned(),
                ),
                (false, crossed) => (Severity::Loss, crossed_sentence(index, crossed)),
            };
            let sector = places.into_iter().find(|place| *place != MISSING).unwrap_or(MISSING);
            self.note_as(
                severity,
                &ImageError::new(ErrorKind::Damaged, &store.path, sentence)
                    .at(u64::from(sector) * SECTOR_BYTES),
            );
            return Ok(Table { damaged: true, crossed: crossed > 0, ..clean(entries) });
        }
        let named = |at: usize| if places[0] == MISSING { MISSING } else { primary(at) };
        let lacking = |at: &usize| named(*at) != entries[*at];
        let dirty: BTreeSet<usize> =
            (0..count).filter(lacking).map(|at| at * 4 / SECTOR_BYTES as usize).collect();
        if !dirty.is_empty() && self.behind.len() < FINDINGS_MAX {
            self.behind.insert(index);
        }
        Ok(Table { dirty, ..clean(entries) })
    }

    /// The table at `index` where its copies are the same, or there is only one.
    fn read_agreed(&mut self, store: &Store, index: usize) -> Option<Table> {
        let (count, places) = (self.entries_of(index), self.places(index));
        if places == [MISSING; 2] {
            let is_found = [0, 1].map(|copy| self.is_stored(store, copy, index));
            return (is_found == [false; 2]).then(|| clean(vec![MISSING; count]));
        }
        let copies = if self.redundant.is_empty() { 1 } else { 2 };
        let is_named =
            |copy: usize| places[copy] != MISSING && !self.layout.is_strayed(copy, index);
        if !(0..copies).all(is_named) {
            return None;
        }
        let mut entries = self.raw(store, places[0], index).ok().flatten()?;
        if copies == 2 && self.raw(store, places[1], index).ok().flatten()? != entries {
            return None;
        }
        let mut damaged = false;
        for (at, entry) in entries.iter_mut().enumerate() {
            if !self.is_sound(*entry, index, at) {
                *entry = BAD;
                damaged = true;
            }
        }
        if damaged {
            let sentence = "a grain table has entries that cannot be right in any copy";
            let error = ImageError::new(ErrorKind::Damaged, &store.path, sentence)
                .at(u64::from(places[0]) * SECTOR_BYTES);
            self.note_as(Severity::Loss, &error);
        }
        Some(Table { damaged, ..clean(entries) })
    }

    /// The table at `index`, to be changed.
    ///
    /// # Errors
    /// It is damaged, so that writing it could make things worse.
    pub(crate) fn get_sound(&mut self, store: &Store, index: usize) -> Result<&mut Table> {
        if !self.is_regular(index) && !self.placed.contains(&index) {
            // A directory entry that leads into a grain looks like any other.
            let survey = self.survey(store, &mut Silent)?;
            if [0, 1].into_iter().any(|copy| survey.is_strayed(self, copy, index)) {
                self.get(store, index)?.damaged = true;
            }
        }
        let table = self.get(store, index)?;
        if table.damaged {
            let sentence = "its grain table is damaged; repair the image before writing here";
            return Err(ImageError::new(ErrorKind::Damaged, &store.path, sentence));
        }
        Ok(table)
    }

    /// Refuses to write over grains of the table at `index`, which was just read, if they may be others.
    pub(crate) fn refuse_crossed(&self, store: &Store, index: usize) -> Result<()> {
        if !self.cached.get(&index).is_some_and(|table| table.crossed) {
            return Ok(());
        }
        let sentence = "its grain table is damaged, and the grain here may be another one's; repair the \
                        image before writing here";
        Err(ImageError::new(ErrorKind::Damaged, &store.path, sentence))
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
        self.placed.insert(index);
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

fn clean(entries: Vec<u32>) -> Table {
    Table { entries, dirty: BTreeSet::new(), damaged: false, crossed: false }
}

/// What is said of a table whose copies are both consistent and name grains crosswise.
pub(crate) fn crossed_sentence(index: usize, grains: u64) -> String {
    format!(
        "the two copies of grain table {index} exchange the places of {grains} grains, and nothing tells \
         which copy is right; the first one is used"
    )
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
