//! Both copies of the tables, looked at whole.
//!
//! An entry by itself rarely shows that it is wrong: another grain's place is a place. That a copy names one
//! place twice does show it, and so the copy that is wholly consistent is believed where the two differ.
//! Reading and checking judge by this, so that they never disagree. A reader makes it when it first meets
//! copies that differ.

use crate::{
    error::Result,
    report::{Progress, advance},
    sparse::{
        bits::Bits,
        header::{FLAG_ZEROED_GRAINS, Header},
        tables::{BAD, MISSING, Tables, ZEROED},
    },
    storage::Store,
};

/// Tables whose entries tell how the grains of a file are aligned.
const TABLES_SAMPLED: usize = 64;

/// Both copies of a table, the primary first; `None` for one that is not there or cannot be read.
pub(crate) type Copies = [Option<Vec<u32>>; 2];

/// What an entry should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Judged {
    /// [`BAD`] where no copy can be right.
    pub(crate) entry: u32,
    /// Each copy gives the grain a place that the other gives to another grain, and nothing tells which
    /// one is right: this is the primary's.
    pub(crate) is_crossed: bool,
}

/// How good an entry is by itself and beside the others of its copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    /// It cannot be: it leads out of the file.
    Unsound,
    /// It leads into metadata, beside the grid on which the other grains lie, or to a place that its copy
    /// names for another grain, too.
    Doubtful,
    Good,
}

/// What there is to know about both copies.
#[derive(Debug)]
pub(crate) struct Survey {
    header: Header,
    /// What is added to a sector to make the grains' places multiples of a grain.
    shift: u64,
    file_sectors: u64,
    first_sector: u64,
    has_redundant: bool,
    /// Places that tables name whose copies agree, and places that each copy names in the others.
    both: Bits,
    own: [Bits; 2],
    /// Places that a copy names more than once.
    twice: [Bits; 2],
    /// Places of the file with tables that stand among the grains.
    tables: Bits,
    /// Directory entries that lead to no table of theirs, beyond those that the layout tells.
    strayed: [Bits; 2],
    /// Tables that were found at their regular place, though the directory does not name it.
    found: [Bits; 2],
    /// Tables with an entry that is not good; those where most are not.
    faulty: [Bits; 2],
    ruined: [Bits; 2],
    /// The copy that is believed where they differ, if there is a reason for one.
    favoured: Option<usize>,
    /// It is because the other one has faults, and not because it names all that the other one names.
    is_by_faults: bool,
    /// Tables in whose entries that are good in both copies there is no telling by the faults of others.
    undecided: Bits,
    /// The copies are not the same everywhere.
    differ: bool,
    /// Places of grains as they should be, where a copy differs from the other; those that several
    /// grains, or a grain and a table, have.
    right: Bits,
    shared: Bits,
    /// An entry that should be used leads into the metadata.
    has_low: bool,
    /// Nothing differs and nothing is wrong: then all that is named is right.
    is_plain: bool,
}

impl Survey {
    /// Looks at all tables that are stored on disk, but for those that are new in memory.
    pub(crate) fn of(
        tables: &mut Tables,
        store: &Store,
        progress: &mut dyn Progress,
    ) -> Result<Self> {
        let header = tables.header;
        let slots = tables.file_sectors.min(1 << 32).div_ceil(header.grain_sectors) + 1;
        let count = tables.primary.len() as u64;
        let none = || [Bits::below(slots), Bits::below(slots)];
        let no_table = || [Bits::below(count), Bits::below(count)];
        let mut survey = Self {
            header,
            shift: 0,
            file_sectors: tables.file_sectors,
            first_sector: tables.first_sector,
            has_redundant: !tables.redundant.is_empty(),
            both: Bits::below(slots),
            own: none(),
            twice: none(),
            tables: Bits::below(slots),
            strayed: no_table(),
            found: no_table(),
            faulty: no_table(),
            ruined: no_table(),
            favoured: None,
            is_by_faults: false,
            undecided: Bits::below(count),
            differ: false,
            right: Bits::below(slots),
            shared: Bits::below(slots),
            has_low: false,
            is_plain: false,
        };
        if header.is_compressed() {
            return Ok(survey);
        }
        survey.shift = survey.find_shift(tables, store);
        // Tables at their regular places show which places are grains', and so whether a table among
        // the grains can be one.
        for at_regular_places in [true, false] {
            survey.each(tables, store, progress, |survey, tables, index| {
                if tables.is_regular(index) == at_regular_places {
                    survey.take(tables, store, index, at_regular_places);
                }
            })?;
        }
        if survey.twice.iter().any(|twice| !twice.is_empty()) {
            survey.each(tables, store, progress, |survey, tables, index| {
                survey.count_faults(tables, store, index);
            })?;
        }
        survey.favour(tables);
        let [faulty, twice] = [&survey.faulty[0], &survey.twice[0]];
        survey.is_plain =
            !survey.differ && faulty.is_empty() && twice.is_empty() && survey.tables.is_empty();
        if survey.is_plain {
            survey.right = std::mem::take(&mut survey.both);
            return Ok(survey);
        }
        survey.each(tables, store, progress, |survey, tables, index| {
            survey.mark_right(tables, store, index);
        })?;
        Ok(survey)
    }

    /// Calls for every table that is stored.
    fn each(
        &mut self,
        tables: &mut Tables,
        store: &Store,
        progress: &mut dyn Progress,
        mut each: impl FnMut(&mut Self, &Tables, usize),
    ) -> Result<()> {
        for index in 0..tables.primary.len() {
            if index % 256 == 0 {
                advance(progress, &store.path, 0, self.header.capacity_bytes())?;
            }
            let is_stored = tables.is_stored(store, 0, index) || tables.is_stored(store, 1, index);
            if is_stored && !tables.is_new(index) {
                each(self, tables, index);
            }
        }
        Ok(())
    }

    /// Writers put grains at multiples of a grain; one that begins elsewhere goes on like that.
    fn find_shift(&self, tables: &mut Tables, store: &Store) -> u64 {
        let grain_sectors = self.header.grain_sectors;
        let (mut candidate, mut votes, mut sampled) = (0, 0_u64, Vec::new());
        for index in 0..tables.primary.len() {
            if sampled.len() >= TABLES_SAMPLED {
                break;
            }
            let is_stored = [0, 1].map(|copy| tables.is_stored(store, copy, index));
            if !tables.is_regular(index) || is_stored == [false; 2] {
                continue;
            }
            let copies = self.copies(tables, store, index);
            let entries = copies.into_iter().flatten().flatten();
            sampled.push(entries.filter(|entry| self.is_within(*entry)).collect::<Vec<u32>>());
        }
        let residue = |entry: &u32| u64::from(*entry) % grain_sectors;
        for found in sampled.iter().flatten().map(residue) {
            match votes {
                0 => (candidate, votes) = (found, 1),
                _ if found == candidate => votes += 1,
                _ => votes -= 1,
            }
        }
        let count = |wanted: u64| {
            sampled.iter().flatten().map(residue).filter(|found| *found == wanted).count()
        };
        let is_most = count(candidate) * 2 > sampled.iter().map(Vec::len).sum();
        if is_most { (grain_sectors - candidate) % grain_sectors } else { 0 }
    }

    /// Whether an entry names a place behind the metadata and within the file.
    fn is_within(&self, entry: u32) -> bool {
        self.is_place(entry)
            && u64::from(entry) >= self.header.overhead_sectors
            && u64::from(entry) < self.file_sectors
    }

    /// Whether an entry names a place at all.
    pub(crate) fn is_place(&self, entry: u32) -> bool {
        let is_zeros = entry == ZEROED && self.header.has(FLAG_ZEROED_GRAINS);
        entry != MISSING && entry != BAD && !is_zeros
    }

    /// The places that a range of sectors touches, as numbers.
    pub(crate) fn slots(&self, sector: u64, sectors: u64) -> std::ops::Range<u64> {
        let grain_sectors = self.header.grain_sectors;
        (sector + self.shift) / grain_sectors
            ..(sector + sectors + self.shift).div_ceil(grain_sectors)
    }

    /// The first sector of a place.
    pub(crate) fn sector_of(&self, slot: u64) -> u64 {
        (slot * self.header.grain_sectors).saturating_sub(self.shift)
    }

    /// The first place from `sector` on.
    pub(crate) fn align(&self, sector: u64) -> u64 {
        (sector + self.shift).next_multiple_of(self.header.grain_sectors) - self.shift
    }

    /// The place of an entry that lies as the other grains do.
    fn slot_of(&self, entry: u32) -> Option<u64> {
        let sector = u64::from(entry) + self.shift;
        let is_aligned = sector.is_multiple_of(self.header.grain_sectors);
        is_aligned.then_some(sector / self.header.grain_sectors)
    }

    /// Whether the directory entry of a copy leads to no table of its index.
    pub(crate) fn is_strayed(&self, tables: &Tables, copy: usize, index: usize) -> bool {
        tables.layout.is_strayed(copy, index) || self.strayed[copy].has(index as u64)
    }

    /// Whether a table is at its regular place, which its directory does not name.
    pub(crate) fn is_found(&self, copy: usize, index: usize) -> bool {
        self.found[copy].has(index as u64)
    }

    pub(crate) fn is_faulty(&self, copy: usize, index: usize) -> bool {
        self.faulty[copy].has(index as u64)
    }

    /// Whether an entry that should be used leads into the metadata, so that nothing is free there.
    pub(crate) fn has_low(&self) -> bool {
        self.has_low
    }

    /// Both copies of a table, as far as they are tables of that index.
    pub(crate) fn copies(&self, tables: &Tables, store: &Store, index: usize) -> Copies {
        [0, 1].map(|copy| {
            let place = match tables.places(index)[copy] {
                place if place != MISSING && !self.is_strayed(tables, copy, index) => Some(place),
                _ if self.is_found(copy, index) => tables.layout.free_place(copy, index),
                _ => None,
            };
            tables.raw(store, place?, index).ok().flatten()
        })
    }

    /// Takes a table into the account.
    fn take(&mut self, tables: &Tables, store: &Store, index: usize, is_regular: bool) {
        if !is_regular {
            let count = if self.has_redundant { 2 } else { 1 };
            for copy in 0..count {
                self.find_table(tables, store, copy, index);
            }
        }
        let copies = self.copies(tables, store, index);
        if let [Some(primary), redundant] = &copies
            && (!self.has_redundant || redundant.as_ref() == Some(primary))
        {
            return self.name_all(primary, index, None);
        }
        self.differ = true;
        let named = tables.places(index);
        for (copy, entries) in copies.iter().enumerate() {
            match entries {
                Some(entries) => self.name_all(entries, index, Some(copy)),
                None if named[copy] != MISSING => {
                    self.faulty[copy].put(index as u64);
                }
                None => {}
            }
        }
    }

    /// Whether a copy names a place.
    fn names_slot(&self, slot: u64) -> bool {
        self.both.has(slot) || self.own.iter().any(|own| own.has(slot))
    }

    /// Judges a table whose place is not the regular one, or that its directory does not name.
    fn find_table(&mut self, tables: &Tables, store: &Store, copy: usize, index: usize) {
        let named = tables.places(index)[copy];
        let has_table = |survey: &Self, place: u32| {
            let entries = tables.raw(store, place, index).ok().flatten().unwrap_or_default();
            let is_good = |(at, entry): (usize, &u32)| {
                let is_named = survey
                    .slot_of(*entry)
                    .is_some_and(|slot| survey.both.has(slot) || survey.own[copy].has(slot));
                *entry == MISSING
                    || (survey.rank(*entry, (index, at), copy) == Rank::Good && !is_named)
            };
            entries.iter().any(|entry| *entry != MISSING) && entries.iter().enumerate().all(is_good)
        };
        if named != MISSING && !tables.layout.is_strayed(copy, index) {
            if tables.is_regular_in(copy, index) {
                return;
            }
            let sectors = self.header.table_sectors();
            let slots = self.slots(u64::from(named), sectors);
            // The other copy's table is not in the account yet.
            let other = match tables.is_regular_in(1 - copy, index) {
                true => tables.raw(store, tables.places(index)[1 - copy], index).ok().flatten(),
                false => None,
            };
            let is_grain = slots.clone().any(|slot| self.names_slot(slot))
                || other.iter().flatten().any(|entry| {
                    self.is_within(*entry)
                        && self.slot_of(*entry).is_some_and(|slot| slots.contains(&slot))
                });
            if !is_grain || has_table(self, named) {
                for slot in self.slots(u64::from(named), sectors) {
                    if self.sector_of(slot) + self.header.grain_sectors
                        > self.header.overhead_sectors
                    {
                        self.tables.put(slot);
                    }
                }
                return;
            }
            self.strayed[copy].put(index as u64);
        }
        if let Some(place) = tables.layout.free_place(copy, index)
            && has_table(self, place)
        {
            self.found[copy].put(index as u64);
        }
    }

    /// Marks what the entries of a table name, in both copies or in one, and whether some are not good.
    fn name_all(&mut self, entries: &[u32], index: usize, copy: Option<usize>) {
        let copies = match copy {
            None => 0..2,
            Some(copy) => copy..copy + 1,
        };
        let (mut named, mut faults) = (0, 0);
        for (at, entry) in entries.iter().enumerate() {
            if !self.is_place(*entry) {
                continue;
            }
            named += 1;
            match self.slot_of(*entry) {
                Some(slot) if self.rank(*entry, (index, at), copies.start) == Rank::Good => {
                    self.name(slot, copy);
                }
                _ => faults += 1,
            }
        }
        for copy in copies {
            self.note_faults(copy, index, faults, named);
        }
    }

    /// Marks a place: in both copies, or in one.
    fn name(&mut self, slot: u64, copy: Option<usize>) {
        let in_both = match copy {
            None => self.both.put(slot),
            Some(_) => self.both.has(slot),
        };
        for (number, own) in self.own.iter_mut().enumerate() {
            let before = match copy {
                None => own.has(slot),
                Some(copy) if copy == number => own.put(slot),
                Some(_) => continue,
            };
            if in_both || before {
                self.twice[number].put(slot);
            }
        }
    }

    fn note_faults(&mut self, copy: usize, index: usize, faults: u64, named: u64) {
        if faults > 0 {
            self.faulty[copy].put(index as u64);
        }
        if faults * 2 > named {
            self.ruined[copy].put(index as u64);
        }
    }

    /// Judges a table again, once it is known what is named twice.
    fn count_faults(&mut self, tables: &Tables, store: &Store, index: usize) {
        for (copy, entries) in self.copies(tables, store, index).iter().enumerate() {
            let places = entries.iter().flatten().enumerate();
            let (mut named, mut faults) = (0, 0);
            for (at, entry) in places.filter(|(_, entry)| self.is_place(**entry)) {
                named += 1;
                faults += u64::from(self.rank(*entry, (index, at), copy) < Rank::Good);
            }
            self.note_faults(copy, index, faults, named);
        }
    }

    fn favour(&mut self, tables: &Tables) {
        let is_consistent = [0, 1].map(|copy| {
            let marks = [&self.faulty[copy], &self.strayed[copy], &self.twice[copy]];
            marks.iter().all(|marks| marks.is_empty()) && !tables.layout.has_strayed(copy)
        });
        self.is_by_faults = is_consistent[0] != is_consistent[1];
        self.favoured = match is_consistent {
            _ if !self.has_redundant => Some(0),
            [true, false] => Some(0),
            [false, true] => Some(1),
            [false, false] => None,
            [true, true] => {
                // What one copy names and the other does not was lost there, or is not there yet.
                let lacks =
                    [0, 1].map(|copy| !self.own[1 - copy].is_within([&self.both, &self.own[copy]]));
                match lacks {
                    [true, false] => Some(1),
                    [false, true] => Some(0),
                    _ => None,
                }
            }
        };
    }

    /// Marks the grains of a table as they should be.
    fn mark_right(&mut self, tables: &Tables, store: &Store, index: usize) {
        let copies = self.copies(tables, store, index);
        if self.is_undecided(&copies, index) {
            self.undecided.put(index as u64);
        }
        for at in 0..tables.entries_of(index) {
            let entry = self.judge(&copies, index, at).entry;
            if !self.is_place(entry) {
                continue;
            }
            self.has_low |= u64::from(entry) < self.header.overhead_sectors;
            match self.slot_of(entry) {
                Some(slot) => {
                    if self.right.put(slot) || self.tables.has(slot) {
                        self.shared.put(slot);
                    }
                }
                None => {
                    for slot in self.slots(u64::from(entry), self.header.grain_sectors) {
                        self.right.put(slot);
                    }
                }
            }
        }
    }

    /// Whether nothing tells which copy of a table is right where both are good. A fault of a copy is no
    /// reason to doubt its other entries, unless it shows what became of them: an entry that is
    /// another's as well, or a table of which nothing much is left. Nor is it one where entries only
    /// changed places.
    fn is_undecided(&self, copies: &Copies, index: usize) -> bool {
        let [Some(primary), Some(redundant)] = copies else { return false };
        let (mut named, mut has_double) = ([Vec::new(), Vec::new()], [false; 2]);
        let mut has_moved = false;
        for (at, pair) in primary.iter().zip(redundant).enumerate() {
            let entries = [*pair.0, *pair.1];
            if entries[0] == entries[1] {
                continue;
            }
            let ranks = [0, 1].map(|copy| self.rank(entries[copy], (index, at), copy));
            for copy in [0, 1] {
                let slot = self.slot_of(entries[copy]).filter(|_| self.is_place(entries[copy]));
                has_double[copy] |= slot.is_some_and(|slot| self.twice[copy].has(slot));
            }
            if ranks != [Rank::Good; 2] {
                continue;
            }
            has_moved |= self.is_elsewhere(entries);
            if entries.iter().all(|entry| self.is_place(*entry)) {
                named[0].push(entries[0]);
                named[1].push(entries[1]);
            }
        }
        named.iter_mut().for_each(|places| places.sort_unstable());
        let by_faults = match self.favoured {
            Some(copy) => self.is_by_faults.then_some(copy),
            None => self.sounder(index),
        };
        let is_unexplained = by_faults
            .is_some_and(|copy| !has_double[1 - copy] && !self.ruined[1 - copy].has(index as u64));
        let is_permuted = !named[0].is_empty() && named[0] == named[1];
        is_permuted || (has_moved && is_unexplained)
    }

    /// Whether the place that one copy has here is one that the other copy has for another grain.
    fn is_elsewhere(&self, entries: [u32; 2]) -> bool {
        [0, 1].into_iter().any(|copy| self.names(1 - copy, entries[copy]))
    }

    /// The copy of a table that has no faulty entry where the other one has.
    fn sounder(&self, index: usize) -> Option<usize> {
        match [0, 1].map(|copy| self.faulty[copy].has(index as u64)) {
            [true, false] => Some(1),
            [false, true] => Some(0),
            _ => None,
        }
    }

    fn rank(&self, entry: u32, (index, at): (usize, usize), copy: usize) -> Rank {
        if !self.is_place(entry) {
            return if entry == BAD { Rank::Unsound } else { Rank::Good };
        }
        let grain = index as u64 * u64::from(self.header.entries_per_table) + at as u64;
        let needed = match self.header.is_compressed() {
            true => 1,
            false => {
                let start = grain * self.header.grain_sectors;
                self.header.capacity_sectors.saturating_sub(start).min(self.header.grain_sectors)
            }
        };
        let sector = u64::from(entry);
        if sector < self.first_sector || sector + needed > self.file_sectors {
            return Rank::Unsound;
        }
        if self.header.is_compressed() {
            return Rank::Good;
        }
        match self.slot_of(entry) {
            Some(slot)
                if sector >= self.header.overhead_sectors
                    && !self.tables.has(slot)
                    && !self.twice[copy].has(slot) =>
            {
                Rank::Good
            }
            _ => Rank::Doubtful,
        }
    }

    /// Whether a copy names the place of an entry.
    fn names(&self, copy: usize, entry: u32) -> bool {
        self.is_place(entry)
            && self
                .slot_of(entry)
                .is_some_and(|slot| self.both.has(slot) || self.own[copy].has(slot))
    }

    /// What entry `at` of the table at `index` should be.
    pub(crate) fn judge(&self, copies: &Copies, index: usize, at: usize) -> Judged {
        let entry =
            |copy: usize| copies[copy].as_ref().and_then(|entries| entries.get(at).copied());
        let sound = |entry: u32, copy| match self.rank(entry, (index, at), copy) {
            Rank::Unsound => BAD,
            _ => entry,
        };
        let plain = |entry: u32| Judged { entry, is_crossed: false };
        match [entry(0), entry(1)] {
            [None, None] => plain(BAD),
            [Some(entry), None] => plain(sound(entry, 0)),
            [None, Some(entry)] => plain(sound(entry, 1)),
            [Some(entry), Some(other)] if entry == other && self.is_plain => plain(entry),
            [Some(entry), Some(other)] if entry == other => plain(sound(entry, 0)),
            [Some(primary), Some(redundant)] => self.choose([primary, redundant], index, at),
        }
    }

    /// Which of two entries that differ is right.
    fn choose(&self, entries: [u32; 2], index: usize, at: usize) -> Judged {
        let plain = |entry: u32| Judged { entry, is_crossed: false };
        let ranks = [0, 1].map(|copy| self.rank(entries[copy], (index, at), copy));
        match ranks {
            [Rank::Unsound, Rank::Unsound] => return plain(BAD),
            [one, other] if one > other => return plain(entries[0]),
            [one, other] if one < other => return plain(entries[1]),
            [Rank::Doubtful, _] => return plain(entries[0]),
            _ => {}
        }
        let favoured = self.favoured.or(self.sounder(index));
        let copy = favoured.unwrap_or(0);
        let (ours, other) = (entries[copy], entries[1 - copy]);
        // A crash leaves one copy ahead of the other, and what was zeroed by accident is no reason to
        // forget a grain; but a place that is another grain's does not count.
        if !self.is_place(ours) && self.is_place(other) {
            let is_free = !self.names(copy, other) && !self.ruined[1 - copy].has(index as u64);
            if is_free {
                return plain(other);
            }
        }
        let is_crossed =
            (favoured.is_none() || self.undecided.has(index as u64)) && self.is_elsewhere(entries);
        Judged { entry: ours, is_crossed }
    }

    /// Whether a place that a table names is several grains', and nothing tells whose.
    pub(crate) fn is_shared(&self, entry: u32) -> bool {
        !self.shared.is_empty()
            && self.is_place(entry)
            && self.slot_of(entry).is_some_and(|slot| self.shared.has(slot))
    }

    /// The place of an entry that is shared, as a number.
    pub(crate) fn shared_slot(&self, entry: u32) -> Option<u64> {
        self.slot_of(entry).filter(|slot| self.shared.has(*slot))
    }

    /// Whether a grain or a table has this place.
    pub(crate) fn is_used(&self, slot: u64) -> bool {
        self.right.has(slot) || self.tables.has(slot)
    }

    /// Whether a grain lies where a table would be written.
    pub(crate) fn has_grain(&self, sector: u64) -> bool {
        self.slots(sector, self.header.table_sectors()).any(|slot| self.right.has(slot))
    }

    /// Whether a table among the grains has this place.
    pub(crate) fn has_table(&self, slot: u64) -> bool {
        self.tables.has(slot)
    }

    /// One more than the highest place that can be.
    pub(crate) fn slots_end(&self) -> u64 {
        (self.file_sectors.min(1 << 32) + self.shift) / self.header.grain_sectors
    }
}
