//! A sparse extent's metadata, looked at whole.

use crate::{
    error::Result,
    fix::{Action, Sink},
    image::{Deep, SECTOR_BYTES},
    report::{Finding, Progress, Severity, advance},
    sparse::{
        SparseExtent,
        header::{FLAG_ZEROED_GRAINS, UNCLEAN_OFFSET},
        pointers::Misled,
        tables::{BAD, MISSING, Tables, ZEROED},
    },
};

/// Of so many grains in use, one may belong to nobody and be given back: a crash leaves few behind. More
/// than that may be what a lost table named.
const LEAK_SHARE: u64 = 8;

/// In an image that was hardly begun when its writer was cut off, so many are few.
const LEAK_GRAINS: u64 = 64;

/// One bit for every place of the file where a grain can be: 4 MiB of memory for 2 TiB in grains
/// of 64 KiB, at most 64 MiB.
struct Used {
    bits: Vec<u64>,
    grain_sectors: u64,
    /// Where a repair puts what needs a new place.
    append_sector: u64,
}

impl Used {
    fn new(file_sectors: u64, grain_sectors: u64) -> Self {
        let slots = file_sectors.min(1 << 32).div_ceil(grain_sectors);
        Self {
            bits: vec![0; slots.div_ceil(64) as usize],
            grain_sectors,
            append_sector: file_sectors,
        }
    }

    /// Marks the places of a range; says whether one of them was marked before.
    fn mark(&mut self, sector: u64, sectors: u64) -> bool {
        let slots = sector / self.grain_sectors..(sector + sectors).div_ceil(self.grain_sectors);
        let mut before = false;
        for slot in slots {
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
                Action::Write { offset: UNCLEAN_OFFSET, bytes: vec![0] }
            });
        }
        for (pointer, finding) in self.misled.iter().zip(self.misled_findings()) {
            sink.find(finding);
            let sentence =
                format!("correct the header's pointer to a grain directory: {}", pointer.right);
            sink.fix(&self.store.path, &sentence, || Action::Write {
                offset: pointer.offset,
                bytes: pointer.right.to_le_bytes().to_vec(),
            });
        }
        for finding in &tables.findings {
            sink.find(finding.clone());
        }
        let mut used = Used::new(tables.file_sectors, self.header.grain_sectors);
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

    fn examine_table(
        &self,
        tables: &mut Tables,
        index: usize,
        deep: Deep,
        used: &mut Used,
        sink: &mut Sink<'_>,
    ) -> Result<()> {
        let sectors = self.header.table_sectors();
        let places = [Some(&tables.primary), Some(&tables.redundant).filter(|all| !all.is_empty())];
        let places = places.map(|copy| copy.and_then(|copy| copy.get(index)).copied());
        for place in places.into_iter().flatten().filter(|place| *place != MISSING) {
            if u64::from(place) >= self.header.overhead_sectors {
                used.mark(u64::from(place), sectors);
            }
        }
        let mut holes = places.into_iter().flatten();
        if holes.all(|place| place == MISSING || tables.is_hole(&self.store, place)) {
            return Ok(());
        }
        let mut copies = [None, None];
        for (place, copy) in places.into_iter().zip(&mut copies) {
            let Some(place) = place.filter(|place| *place != MISSING) else { continue };
            *copy = tables.raw(&self.store, place, index).ok().flatten();
            if copy.is_none() {
                let sentence = format!("grain table {index} of one copy cannot be read");
                let severity = Severity::Redundancy;
                sink.find(self.finding(severity, u64::from(place) * SECTOR_BYTES, sentence));
            }
        }
        let exists = places.iter().flatten().any(|place| *place != MISSING);
        let [primary, redundant] = copies;
        if primary.is_none() && redundant.is_none() {
            if exists {
                let at = tables.directory_sector.saturating_mul(SECTOR_BYTES);
                let sentence = format!("grain table {index} cannot be read in any copy");
                sink.find(self.finding(Severity::Loss, at, sentence));
            }
            return Ok(());
        }
        let judged = Judged { index, primary, redundant, places };
        let right = self.judge_entries(tables, &judged, used, sink);
        if deep == Deep::Yes && self.header.is_compressed() {
            self.inflate_all(index, &right, sink);
        }
        Ok(())
    }

    /// Judges every entry of a table and returns what they should be.
    fn judge_entries(
        &self,
        tables: &Tables,
        judged: &Judged,
        used: &mut Used,
        sink: &mut Sink<'_>,
    ) -> Vec<u32> {
        let Judged { index, primary, redundant, .. } = judged;
        let grain_sectors = self.header.grain_sectors;
        let count = tables.entries_of(*index);
        let mut right = Vec::with_capacity(count);
        let (mut differ, mut wrong, mut moved) = (0, 0, 0);
        for at in 0..count {
            let sound = |copy: &Option<Vec<u32>>| {
                let entry = copy.as_ref().map(|entries| entries[at]);
                entry.filter(|entry| tables.is_sound(*entry, *index, at))
            };
            let (first, second) = (sound(primary), sound(redundant));
            let mut entry = match (first, second) {
                // A crash between the two copies leaves the redundant one ahead.
                (Some(MISSING), Some(ahead)) => ahead,
                (Some(entry), _) | (None, Some(entry)) => entry,
                (None, None) => BAD,
            };
            let of = |copy: &Option<Vec<u32>>| copy.as_ref().map(|entries| entries[at]);
            differ += u64::from(redundant.is_some() && of(primary) != of(redundant));
            let is_zeroed = entry == ZEROED && self.header.has(FLAG_ZEROED_GRAINS);
            let grain = *index as u64 * u64::from(self.header.entries_per_table) + at as u64;
            let disk_byte = grain * self.header.grain_bytes();
            if entry == BAD {
                wrong += 1;
                let sentence = format!(
                    "the table entry of the grain at byte {disk_byte} of the disk is wrong in every copy"
                );
                sink.find(self.finding(Severity::Loss, judged.byte_of(at), sentence));
                entry = MISSING;
            } else if entry != MISSING && !is_zeroed {
                sink.report.grains_allocated += 1;
                let aligned = u64::from(entry).is_multiple_of(grain_sectors);
                let twice =
                    !self.header.is_compressed() && used.mark(u64::from(entry), grain_sectors);
                if twice && aligned {
                    let sentence = format!(
                        "the grain at byte {disk_byte} of the disk shares its place in the file with \
                         another one; one of the two has lost its content"
                    );
                    sink.find(self.finding(Severity::Loss, judged.byte_of(at), sentence));
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
            sink.find(self.finding(Severity::Redundancy, judged.byte_of(0), sentence));
        }
        if differ > 0 || wrong > 0 || moved > 0 || judged.lacks_copy() {
            let directories = [tables.directory_sector, self.header.redundant_sector];
            self.fix_table(judged, directories, (&right, wrong), used, sink);
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
        judged: &Judged,
        directories: [u64; 2],
        (right, wrong): (&[u32], u64),
        used: &mut Used,
        sink: &mut Sink<'_>,
    ) {
        let bytes: Vec<u8> = right.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        let lost = wrong * self.header.grain_bytes();
        let index = judged.index;
        let sentence = match wrong {
            0 => format!("write both copies of grain table {index} from their sound entries"),
            _ => format!(
                "write both copies of grain table {index}; {wrong} grains ({lost} bytes) whose place \
                 is lost will read as zeros"
            ),
        };
        let mut write = |offset: u64, bytes: Vec<u8>| {
            let action = || Action::Write { offset, bytes };
            sink.fix_losing(&self.store.path, sentence.clone(), lost, action);
        };
        // The redundant copy first, as a writer does it.
        for (place, directory) in judged.places.iter().zip(directories).rev() {
            let Some(place) = place.filter(|place| *place != MISSING) else { continue };
            if u64::from(place) == self.regular_place(directory, index) {
                write(u64::from(place) * SECTOR_BYTES, bytes.clone());
                continue;
            }
            // A directory entry that is wrong may lead into the middle of a grain: the table gets
            // a new place, and nothing is overwritten but the entry.
            let Ok(sector) = u32::try_from(used.append_sector) else { continue };
            let mut table = bytes.clone();
            table.resize((self.header.table_sectors() * SECTOR_BYTES) as usize, 0);
            write(u64::from(sector) * SECTOR_BYTES, table);
            let entry = directory * SECTOR_BYTES + index as u64 * 4;
            write(entry, sector.to_le_bytes().to_vec());
            used.append_sector += self.header.table_sectors();
        }
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

    /// Space that nothing names: what a crash, or a trim that was not followed by use, left over. It is
    /// given back only where it can be nothing else: whoever lost the tables of a disk finds its data
    /// there, as long as nobody frees it.
    fn examine_leaks(&self, tables: &Tables, used: &Used, sink: &mut Sink<'_>) {
        let grain_sectors = self.header.grain_sectors;
        let first = self.header.overhead_sectors.div_ceil(grain_sectors);
        let end = tables.file_sectors.min(1 << 32) / grain_sectors;
        let grain_bytes = self.header.grain_bytes();
        let tail =
            (first..end).rev().find(|slot| used.is_marked(*slot)).map_or(first, |slot| slot + 1);
        let marked = (first..end).filter(|slot| used.is_marked(*slot)).count() as u64;
        let mut leaks = Vec::new();
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
            leaks.push((start, offset, length));
        }
        let leaked: u64 = leaks.iter().map(|(_, _, length)| length / grain_bytes).sum();
        let few = leaked <= LEAK_GRAINS || leaked.saturating_mul(LEAK_SHARE) <= marked;
        if sink.report.losses > 0 || !few {
            return;
        }
        for (start, offset, length) in leaks {
            if start >= tail && used.append_sector > tables.file_sectors {
                // A repair puts tables behind it; the next one frees it.
                continue;
            }
            if start >= tail {
                sink.fix(
                    &self.store.path,
                    "cut off the end of the file, which nothing uses",
                    || Action::SetLength(tail.max(first) * grain_bytes),
                );
            } else {
                sink.fix(&self.store.path, "free space in the file that nothing uses", || {
                    Action::Free { offset, length }
                });
            }
        }
    }
}

/// Both copies of a table and where they are.
struct Judged {
    index: usize,
    primary: Option<Vec<u32>>,
    redundant: Option<Vec<u32>>,
    places: [Option<u32>; 2],
}

impl Judged {
    /// A copy that the directory names could not be read.
    fn lacks_copy(&self) -> bool {
        let named = |place: Option<u32>| place.is_some_and(|place| place != MISSING);
        named(self.places[0]) && self.primary.is_none()
            || named(self.places[1]) && self.redundant.is_none()
    }

    /// Byte of the file of entry `at`.
    fn byte_of(&self, at: usize) -> u64 {
        let place = self.places.iter().flatten().copied().find(|place| *place != MISSING);
        u64::from(place.unwrap_or(0)) * SECTOR_BYTES + at as u64 * 4
    }
}
