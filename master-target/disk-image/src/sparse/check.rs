//! A sparse extent's metadata, looked at whole.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::Arc,
};

use crate::{
    error::Result,
    fix::{Action, Leaks, Sink},
    image::{Deep, SECTOR_BYTES},
    report::{Finding, Progress, Severity, advance},
    sparse::{
        SparseExtent,
        create::copy_sectors,
        header::{FLAG_ZEROED_GRAINS, UNCLEAN_OFFSET},
        pointers::Misled,
        tables::{BAD, MISSING, Tables, ZEROED},
    },
};

/// Places that several grains name, and places that the other copies offer instead, which are held in
/// memory. Beyond so many none is offered, and the first of the grains in one place keeps it.
const SHARED_MAX: usize = 16_384;

/// One bit for every place of the file where a grain can be: 4 MiB of memory for 2 TiB in grains
/// of 64 KiB, at most 64 MiB. All that is named is marked before the first table is judged, so that
/// the order in which they are looked at decides nothing.
struct Used {
    bits: Vec<u64>,
    grain_sectors: u64,
    /// Places that several grains name, at most [`SHARED_MAX`]: their marks are taken away again, for
    /// the grain that keeps the place.
    shared: BTreeSet<u64>,
    /// There are more of them, so that every place has to be asked for.
    all_shared: bool,
    /// Sectors that nothing names but the other copy of an entry that shares its place; `false` where
    /// several such do. At most [`SHARED_MAX`].
    offers: BTreeMap<u32, bool>,
    /// Whether the regular place of a table that the directory of a copy does not name is free.
    is_regular_free: [bool; 2],
    /// Where a repair puts what needs a new place.
    append_sector: u64,
}

impl Used {
    fn new(file_sectors: u64, grain_sectors: u64) -> Self {
        let slots = file_sectors.min(1 << 32).div_ceil(grain_sectors);
        Self {
            bits: vec![0; slots.div_ceil(64) as usize],
            grain_sectors,
            shared: BTreeSet::new(),
            all_shared: false,
            offers: BTreeMap::new(),
            is_regular_free: [false; 2],
            append_sector: file_sectors,
        }
    }

    fn slots(&self, sector: u64, sectors: u64) -> Range<u64> {
        sector / self.grain_sectors..(sector + sectors).div_ceil(self.grain_sectors)
    }

    /// Marks the places of a range; says whether one of them was marked before.
    fn mark(&mut self, sector: u64, sectors: u64) -> bool {
        let mut before = false;
        for slot in self.slots(sector, sectors) {
            if let Some(word) = self.bits.get_mut((slot / 64) as usize) {
                before |= *word & (1 << (slot % 64)) != 0;
                *word |= 1 << (slot % 64);
            }
        }
        before
    }

    fn is_marked(&self, slot: u64) -> bool {
        self.bits.get((slot / 64) as usize).is_some_and(|word| word & (1 << (slot % 64)) != 0)
    }

    /// Marks a grain that a table names.
    fn name(&mut self, entry: u32) {
        let twice = self.mark(u64::from(entry), self.grain_sectors);
        if twice && self.is_aligned(entry) {
            self.all_shared |= self.shared.len() >= SHARED_MAX;
            if !self.all_shared {
                self.shared.insert(u64::from(entry) / self.grain_sectors);
            }
        }
    }

    fn is_aligned(&self, entry: u32) -> bool {
        u64::from(entry).is_multiple_of(self.grain_sectors)
    }

    fn is_shared(&self, entry: u32) -> bool {
        let mut slots = self.slots(u64::from(entry), self.grain_sectors);
        self.all_shared || slots.any(|slot| self.shared.contains(&slot))
    }

    /// Remembers what the `other` copy has for an entry that shares its place, if nothing uses that.
    fn offer(&mut self, entry: u32, other: u32) {
        let mut slots = self.slots(u64::from(other), self.grain_sectors);
        let is_free = self.is_aligned(other) && !slots.any(|slot| self.is_marked(slot));
        let has_room = self.offers.len() < SHARED_MAX || self.offers.contains_key(&other);
        if is_free && has_room && self.is_aligned(entry) && self.is_shared(entry) {
            self.offers.entry(other).and_modify(|alone| *alone = false).or_insert(true);
        }
    }

    /// Takes the marks of shared places away, for the grains that will keep them.
    fn reopen(&mut self) {
        if self.all_shared {
            self.bits.fill(0);
            self.shared.clear();
            self.offers.clear();
        }
        for slot in &self.shared {
            if let Some(word) = self.bits.get_mut((slot / 64) as usize) {
                *word &= !(1 << (slot % 64));
            }
        }
    }

    /// Whether the place of `entry` belongs to another grain; else it is this one's from now on.
    fn is_taken(&mut self, entry: u32) -> bool {
        self.is_shared(entry)
            && self.mark(u64::from(entry), self.grain_sectors)
            && self.is_aligned(entry)
    }
}

impl SparseExtent {
    pub(super) fn examine(
        &self,
        deep: Deep,
        sink: &mut Sink<'_>,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let _guard = self.own();
        let mut state = self.state();
        if self.writable {
            self.checkpoint(&mut state)?;
        }
        let tables = &mut state.tables;
        if self.header.unclean {
            sink.find(self.finding(
                Severity::Note,
                UNCLEAN_OFFSET,
                "its last writer did not close it".into(),
            ));
            sink.fix(&self.store.path, "clear the mark of a writer that did not close it", || {
                Action::Write { offset: UNCLEAN_OFFSET, bytes: [0].into() }
            });
        }
        for (pointer, finding) in self.misled.iter().zip(self.misled_findings()) {
            sink.find(finding);
            let sentence =
                format!("correct the header's pointer to a grain directory: {}", pointer.right);
            sink.fix(&self.store.path, &sentence, || Action::Write {
                offset: pointer.offset,
                bytes: pointer.right.to_le_bytes().as_slice().into(),
            });
        }
        for finding in tables.damage() {
            sink.find(finding.clone());
        }
        let mut used = self.survey(tables, progress)?;
        sink.report.grains_total += self.header.grains();
        let count = tables.primary.len();
        let per_table = u64::from(self.header.entries_per_table) * self.header.grain_bytes();
        for index in 0..count {
            if index % 256 == 0 {
                let done = (index as u64 * per_table).min(self.header.capacity_bytes());
                advance(progress, &self.store.path, done, self.header.capacity_bytes())?;
            }
            self.examine_table(tables, index, deep, &mut used, sink)?;
        }
        if !self.header.is_compressed() {
            self.examine_leaks(tables, &used, sink);
        }
        let capacity = self.header.capacity_bytes();
        advance(progress, &self.store.path, capacity, capacity)
    }

    pub(super) fn misled_findings(&self) -> Vec<Finding> {
        let find = |pointer: &Misled| {
            self.finding(Severity::Redundancy, pointer.offset, pointer.sentence())
        };
        self.misled.iter().map(find).collect()
    }

    fn finding(&self, severity: Severity, offset: u64, sentence: String) -> Finding {
        Finding { severity, path: self.store.path.clone(), offset: Some(offset), sentence }
    }

    /// Marks all that the tables name.
    fn survey(&self, tables: &mut Tables, progress: &mut dyn Progress) -> Result<Used> {
        let mut used = Used::new(tables.file_sectors, self.header.grain_sectors);
        if self.header.is_compressed() {
            return Ok(used);
        }
        let is_free = self.mark_tables(tables, &mut used);
        let mut lowest = u32::MAX;
        self.each_named(tables, progress, |entry, _| {
            lowest = lowest.min(entry);
            used.name(entry);
        })?;
        if u64::from(lowest) >= self.header.overhead_sectors {
            used.is_regular_free = is_free;
        }
        if !used.shared.is_empty() && !used.all_shared {
            self.each_named(tables, progress, |entry, other| {
                if let Some(other) = other {
                    used.offer(entry, other);
                }
            })?;
        }
        used.reopen();
        self.mark_tables(tables, &mut used);
        Ok(used)
    }

    /// Marks the tables that stand behind the overhead. Returns for each copy whether its regular
    /// places belong to its tables alone.
    fn mark_tables(&self, tables: &Tables, used: &mut Used) -> [bool; 2] {
        let header = &self.header;
        let directories = [tables.directory_sector, header.redundant_sector];
        let copies = directories.map(|start| start..start.saturating_add(copy_sectors(header)));
        let descriptor = header.descriptor_sector
            ..header.descriptor_sector.saturating_add(header.descriptor_sectors);
        let apart =
            |one: &Range<u64>, other: &Range<u64>| one.end <= other.start || other.end <= one.start;
        let end = header.overhead_sectors.min(tables.file_sectors);
        let mut strays = false;
        for index in 0..tables.primary.len() {
            for (place, directory) in tables.places(index).into_iter().zip(directories) {
                let place = u64::from(place);
                if place >= header.overhead_sectors {
                    used.mark(place, header.table_sectors());
                } else {
                    strays |= place != 0 && place != self.regular_place(directory, index);
                }
            }
        }
        [0, 1].map(|copy| {
            let (this, other) = (&copies[copy], &copies[1 - copy]);
            this.start > 0
                && this.end <= end
                && apart(this, &descriptor)
                && apart(this, other)
                && !strays
        })
    }

    /// Calls for every grain that is stored: what its entry should be, and what the other copy has,
    /// where that is another grain.
    fn each_named(
        &self,
        tables: &mut Tables,
        progress: &mut dyn Progress,
        mut each: impl FnMut(u32, Option<u32>),
    ) -> Result<()> {
        for index in 0..tables.primary.len() {
            if index % 256 == 0 {
                advance(progress, &self.store.path, 0, self.header.capacity_bytes())?;
            }
            if !(tables.is_stored(&self.store, 0, index) || tables.is_stored(&self.store, 1, index))
            {
                continue;
            }
            let copies = self.copies(tables, index);
            for at in 0..tables.entries_of(index) {
                let (entry, other) = copies.judge(tables, at);
                if self.is_grain(entry) {
                    each(entry, other.filter(|other| self.is_grain(*other)));
                }
            }
        }
        Ok(())
    }

    /// Whether an entry that can be right names a place.
    fn is_grain(&self, entry: u32) -> bool {
        let is_zeroed = entry == ZEROED && self.header.has(FLAG_ZEROED_GRAINS);
        entry != MISSING && entry != BAD && !is_zeroed
    }

    fn copies(&self, tables: &Tables, index: usize) -> Copies {
        let places = tables.places(index);
        let entries = places.map(|place| tables.raw(&self.store, place, index).ok().flatten());
        Copies { index, places, entries, count: if tables.redundant.is_empty() { 1 } else { 2 } }
    }

    fn examine_table(
        &self,
        tables: &mut Tables,
        index: usize,
        deep: Deep,
        used: &mut Used,
        sink: &mut Sink<'_>,
    ) -> Result<()> {
        let is_stored = [0, 1].map(|copy| tables.is_stored(&self.store, copy, index));
        let places = tables.places(index);
        let lacks_place =
            !tables.redundant.is_empty() && tables.is_named(index) && places.contains(&MISSING);
        if is_stored == [false; 2] && !lacks_place {
            return Ok(());
        }
        let copies = self.copies(tables, index);
        for copy in 0..copies.count {
            let sentence = match (copies.places[copy], &copies.entries[copy]) {
                (MISSING, _) if lacks_place => {
                    format!("grain table {index} is missing in one copy of the grain directory")
                }
                (MISSING, _) | (_, Some(_)) => continue,
                (_, None) => format!("grain table {index} of one copy cannot be read"),
            };
            let at = tables.entry_byte(copy, index);
            sink.find(self.finding(Severity::Redundancy, at, sentence));
        }
        if copies.entries == [None, None] {
            let at = tables.entry_byte(0, index);
            let sentence = format!("grain table {index} cannot be read in any copy");
            sink.find(self.finding(Severity::Loss, at, sentence));
            return Ok(());
        }
        let right = self.judge_entries(tables, &copies, used, sink);
        if deep == Deep::Yes && self.header.is_compressed() {
            self.inflate_all(index, &right, sink);
        }
        Ok(())
    }

    /// Judges every entry of a table and returns what they should be.
    fn judge_entries(
        &self,
        tables: &mut Tables,
        copies: &Copies,
        used: &mut Used,
        sink: &mut Sink<'_>,
    ) -> Vec<u32> {
        let index = copies.index;
        let count = tables.entries_of(index);
        let mut right = Vec::with_capacity(count);
        let (mut differ, mut wrong, mut moved) = (0, 0, 0);
        for at in 0..count {
            let (mut entry, other) = copies.judge(tables, at);
            differ += u64::from(copies.differ(at));
            let grain = index as u64 * u64::from(self.header.entries_per_table) + at as u64;
            let disk_byte = grain * self.header.grain_bytes();
            if entry == BAD {
                wrong += 1;
                let sentence = format!(
                    "the table entry of the grain at byte {disk_byte} of the disk is wrong in every copy"
                );
                sink.find(self.finding(Severity::Loss, copies.byte_of(at), sentence));
                entry = MISSING;
            } else if self.is_grain(entry) {
                sink.report.grains_allocated += 1;
                let offered = other.filter(|other| {
                    used.is_shared(entry) && used.offers.get(other).is_some_and(|alone| *alone)
                });
                if let Some(other) = offered {
                    let sentence = format!(
                        "one copy of the table has the grain at byte {disk_byte} of the disk in the \
                         place of another one; the other copy has it in a place of its own"
                    );
                    sink.find(self.finding(Severity::Redundancy, copies.byte_of(at), sentence));
                    used.mark(u64::from(other), self.header.grain_sectors);
                    entry = other;
                } else if !self.header.is_compressed() && used.is_taken(entry) {
                    let sentence = format!(
                        "the grain at byte {disk_byte} of the disk shares its place in the file with \
                         another one; one of the two has lost its content"
                    );
                    sink.find(self.finding(Severity::Loss, copies.byte_of(at), sentence));
                    if let Some(sector) = self.fix_shared(entry, disk_byte, used, sink) {
                        entry = sector;
                        moved += 1;
                    }
                }
            }
            right.push(entry);
        }
        if differ > 0 {
            let sentence =
                format!("the two copies of grain table {index} differ in {differ} entries");
            sink.find(self.finding(Severity::Redundancy, copies.byte_of(0), sentence));
        }
        if differ > 0 || wrong > 0 || moved > 0 || copies.lacks_one() {
            self.fix_table(tables, copies, (&right, wrong), used, sink);
        }
        right
    }

    /// Gives a grain that shares its place a copy of its own: which of the two the bytes belong to
    /// cannot be told, but a write to one must not change the other.
    fn fix_shared(
        &self,
        entry: u32,
        disk_byte: u64,
        used: &mut Used,
        sink: &mut Sink<'_>,
    ) -> Option<u32> {
        let place = used.append_sector.next_multiple_of(self.header.grain_sectors);
        let sector = u32::try_from(place).ok().filter(|_| sink.fixes.is_some())?;
        let sentence = format!("give the grain at byte {disk_byte} of the disk a place of its own");
        sink.fix(&self.store.path, &sentence, || Action::Copy {
            from: u64::from(entry) * SECTOR_BYTES,
            to: place * SECTOR_BYTES,
            length: self.header.grain_bytes(),
        });
        used.append_sector = place + self.header.grain_sectors;
        Some(sector)
    }

    fn fix_table(
        &self,
        tables: &mut Tables,
        copies: &Copies,
        (right, wrong): (&[u32], u64),
        used: &mut Used,
        sink: &mut Sink<'_>,
    ) {
        let mut bytes: Vec<u8> = right.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        bytes.resize((self.header.table_sectors() * SECTOR_BYTES) as usize, 0);
        let bytes: Arc<[u8]> = bytes.into();
        let is_empty = right.iter().all(|entry| *entry == MISSING);
        let lost = wrong * self.header.grain_bytes();
        let index = copies.index;
        let sentence = match wrong {
            0 => format!("write both copies of grain table {index} from their sound entries"),
            _ => format!(
                "write both copies of grain table {index}; {wrong} grains ({lost} bytes) whose place \
                 is lost will read as zeros"
            ),
        };
        let directories = [tables.directory_sector, self.header.redundant_sector];
        let mut actions = Vec::new();
        // The redundant copy first, as a writer does it.
        for copy in (0..copies.count).rev() {
            let regular = self.regular_place(directories[copy], index);
            let found = u64::from(copies.places[copy]);
            let is_missing = copies.places[copy] == MISSING;
            // A directory entry that is wrong may lead into the middle of a grain: the table gets
            // a new place, and nothing is overwritten but the entry.
            let is_regular = found == regular || (is_missing && used.is_regular_free[copy]);
            let place = if is_regular { regular } else { used.append_sector };
            let Ok(sector) = u32::try_from(place) else { continue };
            if !is_regular {
                used.append_sector += self.header.table_sectors();
            }
            if !(is_empty && tables.is_hole(&self.store, copy, place)) {
                actions.push(Action::Write { offset: place * SECTOR_BYTES, bytes: bytes.clone() });
            }
            if found != place {
                let offset = tables.entry_byte(copy, index);
                actions.push(Action::Name { offset, bytes: sector.to_le_bytes() });
            }
        }
        sink.fix_losing(&self.store.path, sentence, lost, || actions);
    }

    /// Where the table at `index` is in a file whose tables follow their directory in order, as
    /// every known writer has it.
    fn regular_place(&self, directory: u64, index: usize) -> u64 {
        let sectors = (self.header.directory_entries() * 4).div_ceil(SECTOR_BYTES);
        directory.saturating_add(sectors + index as u64 * self.header.table_sectors())
    }

    fn inflate_all(&self, index: usize, entries: &[u32], sink: &mut Sink<'_>) {
        for (at, entry) in entries.iter().enumerate() {
            if *entry == MISSING || (*entry == ZEROED && self.header.has(FLAG_ZEROED_GRAINS)) {
                continue;
            }
            let grain = index as u64 * u64::from(self.header.entries_per_table) + at as u64;
            if let Err(error) = self.inflated.inflate(&self.store, *entry, grain) {
                let offset = error.offset().unwrap_or(u64::from(*entry) * SECTOR_BYTES);
                sink.find(self.finding(Severity::Loss, offset, error.sentence().to_owned()));
            }
        }
    }

    /// Space that nothing names: what a crash, or a trim that was not followed by use, left over, or
    /// what lost tables named. No count tells the one from the other, in a new image least of all, so
    /// it is given back only to who asks for that.
    fn examine_leaks(&self, tables: &Tables, used: &Used, sink: &mut Sink<'_>) {
        let grain_sectors = self.header.grain_sectors;
        let first = self.header.overhead_sectors.div_ceil(grain_sectors);
        let end = tables.file_sectors.min(1 << 32) / grain_sectors;
        let grain_bytes = self.header.grain_bytes();
        let tail =
            (first..end).rev().find(|slot| used.is_marked(*slot)).map_or(first, |slot| slot + 1);
        let mut slot = first;
        while slot < end {
            if used.is_marked(slot) {
                slot += 1;
                continue;
            }
            let start = slot;
            while slot < end && !used.is_marked(slot) {
                slot += 1;
            }
            let (offset, length) = (start * grain_bytes, (slot - start) * grain_bytes);
            // A hole takes no space; what is stored there does.
            let stored = start >= tail
                || self
                    .store
                    .stored_run(offset, offset + length)
                    .is_ok_and(|(stored, run)| stored || run < offset + length);
            if !stored {
                continue;
            }
            sink.report.leaked_bytes = sink.report.leaked_bytes.saturating_add(length);
            let sentence = format!("{length} bytes belong to no grain");
            sink.find(self.finding(Severity::Leak, offset, sentence));
            let has_appended = used.append_sector > tables.file_sectors;
            if sink.leaks == Leaks::Keep
                || sink.report.losses > 0
                // A repair puts tables behind it; the next one frees it.
                || (start >= tail && has_appended)
            {
                continue;
            }
            if start >= tail {
                let sentence =
                    format!("cut off the last {length} bytes of the file, which nothing uses");
                sink.fix(&self.store.path, &sentence, || {
                    Action::SetLength(tail.max(first) * grain_bytes)
                });
            } else {
                let sentence = format!("free {length} bytes in the file that nothing uses");
                sink.fix(&self.store.path, &sentence, || Action::Free { offset, length });
            }
        }
    }
}

/// Both copies of a table and where they are: the primary, the redundant.
struct Copies {
    index: usize,
    places: [u32; 2],
    /// `None` for a copy that cannot be read, or that the directory does not name.
    entries: [Option<Vec<u32>>; 2],
    /// Copies that the file keeps, 1 or 2.
    count: usize,
}

impl Copies {
    fn entry(&self, copy: usize, at: usize) -> Option<u32> {
        self.entries[copy].as_ref().map(|entries| entries[at])
    }

    /// What entry `at` should be as far as the table tells, and what the other copy has instead, if
    /// that can be right as well.
    fn judge(&self, tables: &Tables, at: usize) -> (u32, Option<u32>) {
        let both = [self.entry(0, at), self.entry(1, at)];
        let entry = tables.choose(both, self.index, at);
        let is_sound = |other: &u32| *other != entry && tables.is_sound(*other, self.index, at);
        (entry, both.into_iter().flatten().find(is_sound))
    }

    /// Whether both copies can be read and are not the same in entry `at`.
    fn differ(&self, at: usize) -> bool {
        self.entries.iter().all(Option::is_some) && self.entry(0, at) != self.entry(1, at)
    }

    /// A copy that there should be is missing or could not be read.
    fn lacks_one(&self) -> bool {
        self.entries[..self.count].contains(&None)
    }

    /// Byte of the file of entry `at`.
    fn byte_of(&self, at: usize) -> u64 {
        let place = self.places.into_iter().find(|place| *place != MISSING);
        u64::from(place.unwrap_or(0)) * SECTOR_BYTES + at as u64 * 4
    }
}
