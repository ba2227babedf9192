//! A sparse extent's metadata, looked at whole.

use std::sync::Arc;

use crate::{
    error::Result,
    fix::{Action, Leaks, Sink},
    image::{Deep, SECTOR_BYTES},
    report::{Finding, Progress, Severity, advance},
    sparse::{
        SparseExtent,
        bits::Bits,
        header::{FLAG_ZEROED_GRAINS, UNCLEAN_OFFSET},
        pointers::{Cure, Misled},
        survey::{Copies, Survey},
        tables::{BAD, MISSING, Tables, ZEROED, crossed_sentence},
    },
};

/// What a check knows while it goes through the tables.
struct Work {
    survey: Survey,
    /// Places that several grains have, and one of them keeps.
    kept: Bits,
    /// Where a repair puts what needs a new place.
    append_sector: u64,
}

/// A table that is checked: both copies and where their directories say they are.
struct Examined {
    index: usize,
    places: [u32; 2],
    copies: Copies,
    /// Copies that the file keeps, 1 or 2.
    count: usize,
}

/// What entries of a table should be, and what is wrong with them.
#[derive(Default)]
struct Verdict {
    right: Vec<u32>,
    /// Entries that differ between the copies; those that are wrong in both; those that name grains
    /// crosswise; those of grains that got a place of their own.
    differ: u64,
    wrong: u64,
    crossed: u64,
    moved: u64,
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
            if pointer.cure == Cure::Header {
                sink.fix(&self.store.path, &pointer.mend(), || Action::Write {
                    offset: pointer.offset,
                    bytes: pointer.bytes().into(),
                });
            }
        }
        // Under a header that was wrong nothing else is changed: the next plan sees it mended.
        let is_doubtful = self.misled.iter().any(|field| field.cure != Cure::NotNeeded);
        let fixes = if is_doubtful { sink.fixes.take() } else { None };
        let examined = self.examine_tables(tables, deep, sink, progress);
        sink.fixes = fixes.or(sink.fixes.take());
        examined
    }

    fn examine_tables(
        &self,
        tables: &mut Tables,
        deep: Deep,
        sink: &mut Sink<'_>,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        for finding in tables.damage() {
            sink.find(finding.clone());
        }
        let survey = Survey::of(tables, &self.store, progress)?;
        let kept = Bits::below(survey.slots_end() + 1);
        let mut work = Work { survey, kept, append_sector: tables.file_sectors };
        if tables.lacks_redundant() {
            self.part_directories(&mut work, sink);
        }
        sink.report.grains_total += self.header.grains();
        let count = tables.primary.len();
        let per_table = u64::from(self.header.entries_per_table) * self.header.grain_bytes();
        for index in 0..count {
            if index % 256 == 0 {
                let done = (index as u64 * per_table).min(self.header.capacity_bytes());
                advance(progress, &self.store.path, done, self.header.capacity_bytes())?;
            }
            self.examine_table(tables, index, deep, &mut work, sink);
        }
        if !self.header.is_compressed() {
            self.examine_leaks(tables, &work, sink, progress)?;
        }
        let capacity = self.header.capacity_bytes();
        advance(progress, &self.store.path, capacity, capacity)
    }

    pub(super) fn misled_findings(&self) -> Vec<Finding> {
        let find = |pointer: &Misled| {
            let severity = match pointer.cure {
                Cure::Header | Cure::Unknown => Severity::Redundancy,
                Cure::NotNeeded => Severity::Note,
            };
            self.finding(severity, pointer.offset, pointer.sentence())
        };
        self.misled.iter().map(find).collect()
    }

    fn finding(&self, severity: Severity, offset: u64, sentence: String) -> Finding {
        Finding { severity, path: self.store.path.clone(), offset: Some(offset), sentence }
    }

    /// Gives the redundant copy a directory of its own, without tables: the next plan adds those.
    fn part_directories(&self, work: &mut Work, sink: &mut Sink<'_>) {
        const REDUNDANT_POINTER: u64 = 48;
        let sectors = (self.header.directory_entries() * 4).div_ceil(SECTOR_BYTES);
        let Ok(sector) = u32::try_from(work.append_sector) else { return };
        work.append_sector += sectors;
        let sentence = "give the redundant grain directory a place of its own".to_owned();
        sink.fix_losing(&self.store.path, sentence, 0, || {
            let (offset, bytes) =
                (u64::from(sector) * SECTOR_BYTES, vec![0; (sectors * SECTOR_BYTES) as usize]);
            vec![
                Action::Write { offset, bytes: bytes.into() },
                Action::Name { offset: REDUNDANT_POINTER, bytes: sector.to_le_bytes() },
                Action::Name { offset: REDUNDANT_POINTER + 4, bytes: [0; 4] },
            ]
        });
    }

    fn examine_table(
        &self,
        tables: &mut Tables,
        index: usize,
        deep: Deep,
        work: &mut Work,
        sink: &mut Sink<'_>,
    ) {
        let is_stored = [0, 1].map(|copy| tables.is_stored(&self.store, copy, index));
        let places = tables.places(index);
        let has_redundant = !tables.redundant.is_empty();
        let lacks_place = has_redundant && tables.is_named(index) && places.contains(&MISSING);
        if is_stored == [false; 2] && !lacks_place {
            return;
        }
        let copies = work.survey.copies(tables, &self.store, index);
        let count = if has_redundant { 2 } else { 1 };
        let table = Examined { index, places, copies, count };
        if table.copies == [None, None] && places == [MISSING; 2] {
            return;
        }
        for copy in 0..count {
            if let Some(sentence) = self.judge_place(tables, &table, copy, work) {
                let at = tables.entry_byte(copy, index);
                sink.find(self.finding(Severity::Redundancy, at, sentence));
            }
        }
        if table.copies == [None, None] {
            let at = tables.entry_byte(0, index);
            let sentence = format!("grain table {index} cannot be read in any copy");
            return sink.find(self.finding(Severity::Loss, at, sentence));
        }
        let verdict = self.judge_entries(tables, &table, work, sink);
        if deep == Deep::Yes && self.header.is_compressed() {
            self.inflate_all(index, &verdict.right, sink);
        }
    }

    /// What is wrong with the place that one copy of the directory gives a table.
    fn judge_place(
        &self,
        tables: &Tables,
        table: &Examined,
        copy: usize,
        work: &Work,
    ) -> Option<String> {
        let index = table.index;
        let is_found = work.survey.is_found(copy, index);
        let found = if is_found { "; it is at its regular place" } else { "" };
        if table.places[copy] == MISSING {
            return Some(format!(
                "grain table {index} is missing in one copy of the grain directory{found}"
            ));
        }
        if work.survey.is_strayed(tables, copy, index) {
            return Some(format!(
                "one copy of the grain directory names sector {} for grain table {index}, which is no \
                 place for it{found}",
                table.places[copy]
            ));
        }
        let is_unread = table.copies[copy].is_none();
        is_unread.then(|| format!("grain table {index} of one copy cannot be read"))
    }

    /// Judges every entry of a table, and plans what mends it.
    fn judge_entries(
        &self,
        tables: &mut Tables,
        table: &Examined,
        work: &mut Work,
        sink: &mut Sink<'_>,
    ) -> Verdict {
        let index = table.index;
        let mut verdict = Verdict::default();
        for at in 0..tables.entries_of(index) {
            let judged = work.survey.judge(&table.copies, index, at);
            let mut entry = judged.entry;
            verdict.differ += u64::from(table.differ(at));
            verdict.crossed += u64::from(judged.is_crossed);
            let grain = index as u64 * u64::from(self.header.entries_per_table) + at as u64;
            let disk_byte = grain * self.header.grain_bytes();
            if entry == BAD {
                verdict.wrong += 1;
                let sentence = format!(
                    "the table entry of the grain at byte {disk_byte} of the disk is wrong in every copy"
                );
                sink.find(self.finding(Severity::Loss, table.byte_of(at), sentence));
                entry = MISSING;
            } else if work.survey.is_place(entry) {
                sink.report.grains_allocated += 1;
                if work.is_taken(entry) {
                    let sentence = format!(
                        "the grain at byte {disk_byte} of the disk shares its place in the file with \
                         another one; one of the two has lost its content"
                    );
                    sink.find(self.finding(Severity::Loss, table.byte_of(at), sentence));
                    if let Some(sector) = self.fix_shared(entry, disk_byte, work, sink) {
                        entry = sector;
                        verdict.moved += 1;
                    }
                }
            }
            verdict.right.push(entry);
        }
        if verdict.differ > 0 {
            let entries = if verdict.differ == 1 { "entry" } else { "entries" };
            let sentence = format!(
                "the two copies of grain table {index} differ in {} {entries}",
                verdict.differ
            );
            sink.find(self.finding(Severity::Redundancy, table.byte_of(0), sentence));
        }
        if verdict.crossed > 0 {
            let sentence = crossed_sentence(index, verdict.crossed);
            sink.find(self.finding(Severity::Loss, table.byte_of(0), sentence));
        }
        let is_found = (0..table.count).any(|copy| work.survey.is_found(copy, index));
        let is_wrong = verdict.differ + verdict.wrong + verdict.moved > 0;
        if is_wrong || is_found || table.lacks_one() {
            self.fix_table(tables, table, &verdict, work, sink);
        }
        verdict
    }

    /// Gives a grain that shares its place a copy of its own: which of the two the bytes belong to
    /// cannot be told, but a write to one must not change the other.
    fn fix_shared(
        &self,
        entry: u32,
        disk_byte: u64,
        work: &mut Work,
        sink: &mut Sink<'_>,
    ) -> Option<u32> {
        let place = work.survey.align(work.append_sector);
        let sector = u32::try_from(place).ok().filter(|_| sink.fixes.is_some())?;
        let length = self.header.grain_bytes();
        let sentence = format!(
            "give the grain at byte {disk_byte} of the disk a place of its own; the content of one of \
             the two ({length} bytes) is lost"
        );
        sink.fix_losing(&self.store.path, sentence, length, || {
            let from = u64::from(entry) * SECTOR_BYTES;
            vec![Action::Copy { from, to: place * SECTOR_BYTES, length }]
        });
        work.append_sector = place + self.header.grain_sectors;
        Some(sector)
    }

    fn fix_table(
        &self,
        tables: &mut Tables,
        table: &Examined,
        verdict: &Verdict,
        work: &mut Work,
        sink: &mut Sink<'_>,
    ) {
        let right = &verdict.right;
        let mut bytes: Vec<u8> = right.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        bytes.resize((self.header.table_sectors() * SECTOR_BYTES) as usize, 0);
        let bytes: Arc<[u8]> = bytes.into();
        let is_empty = right.iter().all(|entry| *entry == MISSING);
        let index = table.index;
        let (wrong, crossed) = (verdict.wrong, verdict.crossed);
        let lost = (wrong + crossed) * self.header.grain_bytes();
        let mut sentence = format!("write both copies of grain table {index}");
        if (wrong, crossed) == (0, 0) {
            sentence += " from their sound entries";
        }
        if wrong > 0 {
            sentence += &format!(
                "; {wrong} grains ({} bytes) whose place is lost will read as zeros",
                wrong * self.header.grain_bytes()
            );
        }
        if crossed > 0 {
            sentence += &format!(
                "; {crossed} grains ({} bytes) get what the first copy says, which may be another \
                 grain's content",
                crossed * self.header.grain_bytes()
            );
        }
        let mut actions = Vec::new();
        // The redundant copy first, as a writer does it.
        for copy in (0..table.count).rev() {
            let Some(place) = self.place_for(tables, table, copy, work) else { continue };
            let offset = u64::from(place) * SECTOR_BYTES;
            if !(is_empty && tables.is_hole(&self.store, copy, u64::from(place))) {
                actions.push(Action::Write { offset, bytes: bytes.clone() });
            }
            if table.places[copy] != place {
                let offset = tables.entry_byte(copy, index);
                actions.push(Action::Name { offset, bytes: place.to_le_bytes() });
            }
        }
        sink.fix_losing(&self.store.path, sentence, lost, || actions);
    }

    /// Where a copy of a table is written: where it is, if that is beyond doubt; else its regular
    /// place, if that is free; else a new one, so that nothing is overwritten but the directory entry.
    fn place_for(
        &self,
        tables: &Tables,
        table: &Examined,
        copy: usize,
        work: &mut Work,
    ) -> Option<u32> {
        let (index, found) = (table.index, table.places[copy]);
        let survey = &work.survey;
        let is_its_own = tables.is_regular_in(copy, index)
            || !survey.is_faulty(copy, index) && !survey.has_grain(u64::from(found));
        if table.copies[copy].is_some()
            && found != MISSING
            && !survey.is_strayed(tables, copy, index)
            && is_its_own
        {
            return Some(found);
        }
        let regular = tables.layout.free_place(copy, index).filter(|_| !survey.has_low());
        let sector = match regular {
            Some(sector) => sector,
            None => {
                let sector = u32::try_from(work.append_sector).ok()?;
                work.append_sector += self.header.table_sectors();
                sector
            }
        };
        Some(sector)
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
    fn examine_leaks(
        &self,
        tables: &Tables,
        work: &Work,
        sink: &mut Sink<'_>,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let survey = &work.survey;
        let first = survey.slots(0, self.header.overhead_sectors).end;
        let end = survey.slots_end();
        let byte = |slot: u64| survey.sector_of(slot) * SECTOR_BYTES;
        let tail =
            (first..end).rev().find(|slot| survey.is_used(*slot)).map_or(first, |slot| slot + 1);
        let mut slot = first;
        while slot < end {
            if survey.is_used(slot) {
                slot += 1;
                continue;
            }
            let start = slot;
            while slot < end && !survey.is_used(slot) {
                slot += 1;
            }
            let (offset, length) = (byte(start), byte(slot) - byte(start));
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
            let has_appended = work.append_sector > tables.file_sectors;
            if sink.leaks == Leaks::Keep
                || sink.report.losses > 0
                // A repair puts tables behind it; the next one frees it.
                || (start >= tail && has_appended)
            {
                continue;
            }
            if sink.fixes.is_none() {
                continue;
            }
            let held = self.held_bytes(offset, length, progress)?;
            let what_is_held = match held {
                0 => String::new(),
                _ => format!(
                    "; {held} of them are not zeros, and may be of the disk if tables were lost"
                ),
            };
            let (sentence, action) = match start >= tail {
                true => (
                    format!("cut off the last {length} bytes of the file, which no table names"),
                    Action::SetLength(byte(tail.max(first))),
                ),
                false => (
                    format!("free {length} bytes in the file that no table names"),
                    Action::Free { offset, length },
                ),
            };
            sink.fix_freeing(&self.store.path, sentence + &what_is_held, held, action);
        }
        Ok(())
    }

    /// Bytes of a range of the file, in whole grains, that are not zeros.
    fn held_bytes(&self, offset: u64, length: u64, progress: &mut dyn Progress) -> Result<u64> {
        let file = self.store.length()?;
        let end = (offset + length).min(file);
        let (mut at, mut held) = (offset, 0);
        while at < end {
            advance(progress, &self.store.path, 0, self.header.capacity_bytes())?;
            if let (false, until) = self.store.stored_run(at, end)? {
                if until >= end {
                    break;
                }
                // A grain that is a hole in part is looked at from its beginning.
                at = until - (until - offset) % self.header.grain_bytes();
            }
            let there = self.header.grain_bytes().min(end - at);
            if self.store.read_vec(at, there as usize)?.iter().any(|byte| *byte != 0) {
                held += there;
            }
            at += there;
        }
        Ok(held)
    }
}

impl Work {
    /// Whether a grain that has this place, which is shared, cannot keep it; the first one can.
    fn is_taken(&mut self, entry: u32) -> bool {
        self.survey
            .shared_slot(entry)
            .is_some_and(|slot| self.survey.has_table(slot) || self.kept.put(slot))
    }
}

impl Examined {
    fn entry(&self, copy: usize, at: usize) -> Option<u32> {
        self.copies[copy].as_ref().map(|entries| entries[at])
    }

    /// Whether both copies can be read and are not the same in entry `at`.
    fn differ(&self, at: usize) -> bool {
        self.copies.iter().all(Option::is_some) && self.entry(0, at) != self.entry(1, at)
    }

    /// A copy that there should be is missing or could not be read.
    fn lacks_one(&self) -> bool {
        self.copies[..self.count].contains(&None)
    }

    /// Byte of the file of entry `at`.
    fn byte_of(&self, at: usize) -> u64 {
        let place = self.places.into_iter().find(|place| *place != MISSING);
        u64::from(place.unwrap_or(0)) * SECTOR_BYTES + at as u64 * 4
    }
}
