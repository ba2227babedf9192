//! Opening a journal: read what is there, decide, and put aside what is not needed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use backhaul_proto::batch::{BatchKind, RecordKind};
use backhaul_proto::id::{BatchSeq, MachineName, WriteSeq};

use crate::journal::checkpoint::{Checkpoint, CheckpointFile, Found, Place};
use crate::journal::reader::{Loaded, Order, Parsed, Reader};
use crate::journal::recovery::{
    Cause, CheckpointFact, EndFact, Facts, ProofFact, SegmentsFact, StartFact, Verdict, decide,
};
use crate::journal::segment::{
    MachineTag, SEGMENT_HEADER_BYTES, SegmentHeader, SegmentKey, SegmentNumber,
};
use crate::journal::{
    Damage, FreeSegment, Journal, JournalError, JournalOptions, Mark, MarkKind, Segment,
};
use crate::storage::{AlignedBuf, Op, OpenMode, PAGE_BYTES, Storage, StorageError};

/// What opening found, for the store.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) journal: Journal,
    /// As of the last batch known to be on the image; the store applies from here.
    pub(crate) checkpoint: Option<Checkpoint>,
    /// Markers after the checkpoint, in order.
    pub(crate) marks: Vec<Mark>,
    /// One sentence when the journal did not end cleanly and nothing was lost.
    pub(crate) torn_tail: Option<String>,
}

type Headers = BTreeMap<SegmentNumber, Option<(SegmentHeader, SegmentKey)>>;

/// Opens the journal in `dir`, which is made if it is missing.
pub(crate) fn open(
    storage: &mut dyn Storage,
    dir: &Path,
    machine: &MachineName,
    options: JournalOptions,
) -> Result<Opened, JournalError> {
    let machine = MachineTag::of(machine);
    storage.create_dir(dir)?;
    // A killed predecessor may have left names that only the cache knows.
    storage.sync_dir(dir)?;
    let names = storage.list(dir)?;
    for name in names.iter().filter(|name| name.ends_with(".new")) {
        storage.remove(&dir.join(name))?;
    }
    let mut headers = Headers::new();
    for number in names.iter().filter_map(|name| SegmentNumber::parse(name)) {
        headers.insert(number, read_header(storage, dir, number, machine));
    }
    let (checkpoint_file, found) = CheckpointFile::open(storage, dir, machine)?;
    let mut walk = Walk::default();
    let mut facts = Facts {
        checkpoint: CheckpointFact::Good,
        segments: if headers.is_empty() { SegmentsFact::None } else { SegmentsFact::Some },
        start: StartFact::Found,
        end: EndFact::Blank,
        proof: ProofFact::None,
    };
    let checkpoint = match found {
        Found::Absent => {
            facts.checkpoint = CheckpointFact::Absent;
            None
        }
        Found::Damaged => {
            facts.checkpoint = CheckpointFact::Damaged;
            None
        }
        Found::Good(_, checkpoint) => {
            walk = Walk::new(&checkpoint);
            walk.follow(storage, dir, &headers, &mut facts)?;
            if walk.proof(storage, dir, &headers, &checkpoint)? {
                facts.proof = ProofFact::Found;
            }
            Some(checkpoint)
        }
    };
    let verdict = decide(facts);
    sync_segments(storage, dir, &walk.segments)?;
    let damage = match verdict {
        Verdict::Lost(cause) => Some(walk.damage(dir, cause)),
        Verdict::Fresh | Verdict::Intact | Verdict::TornTail => None,
    };
    let torn_tail = (verdict == Verdict::TornTail).then(|| walk.torn_tail(dir));
    let last_number = names.iter().filter_map(|name| any_number(name)).max().unwrap_or_default();
    let checkpoint_number = walk.checkpoint.as_ref().map_or(0, |c| c.next.segment.0);
    let mut journal = Journal {
        dir: dir.to_owned(),
        machine,
        options,
        checkpoint_file,
        generation: checkpoint.as_ref().map(|c| c.generation),
        durable: walk.order().map_or(BatchSeq(0), |o| BatchSeq(o.batch.0 - 1)),
        durable_write: walk.order().map_or(WriteSeq(0), |o| WriteSeq(o.write.0 - 1)),
        segments: walk.segments,
        tail: None,
        free: Vec::new(),
        unusable: Vec::new(),
        next_number: last_number.0.max(checkpoint_number) + 1,
        damage,
    };
    journal.sort_out(storage, &names, &headers, checkpoint.as_ref())?;
    Ok(Opened { journal, checkpoint: walk.checkpoint, marks: walk.marks, torn_tail })
}

fn any_number(name: &str) -> Option<SegmentNumber> {
    let name = name.strip_prefix("damaged-").unwrap_or(name);
    SegmentNumber::parse(name).or_else(|| SegmentNumber::parse_free(name))
}

/// The header of a segment; `None` if it cannot be read or is not valid.
fn read_header(
    storage: &mut dyn Storage,
    dir: &Path,
    number: SegmentNumber,
    machine: MachineTag,
) -> Option<(SegmentHeader, SegmentKey)> {
    let file = storage.open(&dir.join(number.file_name()), OpenMode::Read).ok()?;
    let mut page = AlignedBuf::zeroed(PAGE_BYTES);
    let read = storage.run(&mut [Op::Read { file, offset_bytes: 0, buf: &mut page }]);
    storage.close(file);
    read.ok()?;
    SegmentHeader::decode(&page, machine)
}

/// What was read may still be in a volatile cache; acknowledging it needs more.
fn sync_segments(
    storage: &mut dyn Storage,
    dir: &Path,
    segments: &[Segment],
) -> Result<(), StorageError> {
    for segment in segments {
        let file = storage.open(&dir.join(segment.number.file_name()), OpenMode::ReadWrite)?;
        let synced = storage.run(&mut [Op::Sync { file }]);
        storage.close(file);
        synced?;
    }
    Ok(())
}

/// The walk along the order, from the checkpoint to the first record that is not there.
#[derive(Default)]
struct Walk {
    /// Moves forward over sync batches, whose records say that everything before is applied.
    checkpoint: Option<Checkpoint>,
    order: Option<Order>,
    /// Whether the order is consistent where the walk stands.
    consistent: bool,
    segments: Vec<Segment>,
    marks: Vec<Mark>,
    /// The segment and place where the walk ended.
    end: Place,
}

impl Walk {
    fn new(checkpoint: &Checkpoint) -> Self {
        let order = Order {
            generation: checkpoint.generation,
            batch: checkpoint.applied.next(),
            write: WriteSeq(checkpoint.applied_write.0 + 1),
        };
        Self {
            order: Some(order),
            consistent: checkpoint.consistent,
            checkpoint: Some(checkpoint.clone()),
            end: checkpoint.next,
            ..Self::default()
        }
    }

    fn order(&self) -> Option<&Order> {
        self.order.as_ref()
    }

    /// Goes from record to record and from segment to segment, and notes how it ended.
    fn follow(
        &mut self,
        storage: &mut dyn Storage,
        dir: &Path,
        headers: &Headers,
        facts: &mut Facts,
    ) -> Result<(), StorageError> {
        let mut at = self.end;
        if at.segment == SegmentNumber(0) {
            match self.next_segment(headers) {
                Some(first) => at = first,
                None => return Ok(()),
            }
        }
        loop {
            self.end = at;
            let key = match headers.get(&at.segment) {
                None => {
                    facts.start = StartFact::Missing;
                    return Ok(());
                }
                Some(Some((header, key)))
                    if header.number == at.segment
                        && Some(header.generation) == self.order.map(|o| o.generation) =>
                {
                    *key
                }
                Some(_) => {
                    facts.start = StartFact::Damaged;
                    return Ok(());
                }
            };
            let mut reader = Reader::open(storage, dir, at.segment, key)?;
            self.segments.push(Segment {
                number: at.segment,
                key,
                end_bytes: at.offset_bytes,
                file_bytes: reader.file_bytes(),
            });
            facts.end = self.follow_segment(storage, &mut reader, at.offset_bytes);
            reader.close(storage);
            match self.next_segment(headers) {
                Some(next) => at = next,
                None => return Ok(()),
            }
        }
    }

    fn follow_segment(
        &mut self,
        storage: &mut dyn Storage,
        reader: &mut Reader,
        mut offset_bytes: u64,
    ) -> EndFact {
        reader.load(storage, offset_bytes);
        loop {
            let Some(order) = self.order else { return EndFact::Blank };
            let end = match reader.parse(offset_bytes, &order) {
                Parsed::Record(loaded) => {
                    offset_bytes = loaded.end_bytes;
                    self.take(&loaded, reader.number());
                    continue;
                }
                Parsed::OutOfWindow => {
                    reader.load(storage, offset_bytes);
                    continue;
                }
                Parsed::Blank => EndFact::Blank,
                Parsed::Torn => EndFact::Torn,
                Parsed::Unreadable => EndFact::Unreadable,
            };
            self.end.offset_bytes = offset_bytes;
            return end;
        }
    }

    fn take(&mut self, loaded: &Loaded, segment: SegmentNumber) {
        let header = &loaded.header;
        for (i, record) in loaded.records.iter().enumerate() {
            let kind = match record.kind {
                RecordKind::Point(id) => MarkKind::Point(id),
                RecordKind::SyncStart => MarkKind::SyncStart,
                RecordKind::SyncDone => MarkKind::SyncDone,
                RecordKind::Data { .. } | RecordKind::Zero { .. } => continue,
            };
            match kind {
                MarkKind::SyncStart => self.consistent = false,
                MarkKind::SyncDone => self.consistent = true,
                MarkKind::Point(_) => {}
            }
            self.marks.push(Mark {
                batch: header.batch,
                write: WriteSeq(header.first_write.0 + i as u64),
                captured_at_us: header.captured_at_us,
                kind,
            });
        }
        if let Some(last) = self.segments.last_mut() {
            last.end_bytes = loaded.end_bytes;
        }
        self.order = Some(Order::after(header));
        if header.kind == BatchKind::Sync
            && let Some(checkpoint) = &mut self.checkpoint
        {
            checkpoint.applied = header.batch;
            checkpoint.applied_write = header.last_write();
            checkpoint.next = Place { segment, offset_bytes: loaded.end_bytes };
            checkpoint.consistent = self.consistent;
        }
    }

    /// The segment after the current one that starts with the expected batch.
    fn next_segment(&self, headers: &Headers) -> Option<Place> {
        let order = self.order?;
        let later = headers
            .range((std::ops::Bound::Excluded(self.end.segment), std::ops::Bound::Unbounded));
        let fits = |(number, header): (&SegmentNumber, &Option<(SegmentHeader, SegmentKey)>)| {
            let (header, _) = header.as_ref()?;
            let fits = header.number == *number
                && header.generation == order.generation
                && header.first_batch == order.batch
                && header.first_write == order.write;
            fits.then_some(*number)
        };
        let segment = later.filter_map(fits).next()?;
        Some(Place { segment, offset_bytes: SEGMENT_HEADER_BYTES })
    }

    /// Whether anything was written after the first missing batch had been synced.
    fn proof(
        &self,
        storage: &mut dyn Storage,
        dir: &Path,
        headers: &Headers,
        checkpoint: &Checkpoint,
    ) -> Result<bool, StorageError> {
        let Some(order) = self.order else { return Ok(false) };
        if checkpoint.durable >= order.batch {
            return Ok(true);
        }
        for (number, header) in headers.range(self.end.segment..) {
            let Some((header, key)) = header else {
                // A segment in use always had a valid header: no crash takes it away.
                return Ok(true);
            };
            if header.number != *number || header.generation != order.generation {
                continue;
            }
            if header.durable >= order.batch {
                return Ok(true);
            }
            let from = if *number == self.end.segment { self.end.offset_bytes } else { 0 };
            let mut reader = Reader::open(storage, dir, *number, *key)?;
            let found = reader.any_frame(storage, from.max(SEGMENT_HEADER_BYTES), |frame| {
                frame.header.generation == order.generation && frame.durable >= order.batch
            });
            reader.close(storage);
            if found {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn end_path(&self, dir: &Path) -> PathBuf {
        if self.end.segment == SegmentNumber(0) {
            dir.to_owned()
        } else {
            dir.join(self.end.segment.file_name())
        }
    }

    fn torn_tail(&self, dir: &Path) -> String {
        let batch = self.order.map_or(BatchSeq(0), |o| o.batch);
        format!(
            "the journal ends in `{}` at byte {} before batch {batch}, which was being written when \
             the machine stopped; had it been acknowledged, the agent would send it again",
            self.end_path(dir).display(),
            self.end.offset_bytes
        )
    }

    fn damage(&self, dir: &Path, cause: Cause) -> Damage {
        let batch = self.order.map_or(BatchSeq(1), |o| o.batch);
        let (path, offset_bytes) = match cause {
            Cause::CheckpointMissing | Cause::CheckpointDamaged => (dir.join("checkpoint"), 0),
            _ => (self.end_path(dir), self.end.offset_bytes),
        };
        let what = match cause {
            Cause::CheckpointMissing => "is missing although the journal has segments",
            Cause::CheckpointDamaged => "is damaged: neither of its slots is valid",
            Cause::StartMissing => "is missing although the checkpoint names it",
            Cause::StartDamaged => "is damaged: its header is not valid",
            Cause::Unreadable => "cannot be read",
            Cause::Records => "is damaged",
        };
        let known_image = !matches!(
            cause,
            Cause::CheckpointMissing
                | Cause::CheckpointDamaged
                | Cause::StartMissing
                | Cause::StartDamaged
        );
        let sentence = format!(
            "`{}` {what} (byte {offset_bytes}): acknowledged data from batch {batch} on is lost and \
             the machine needs a sync; the damaged files are kept as `damaged-…`",
            path.display()
        );
        Damage { lost_from: batch, path, offset_bytes, known_image, sentence }
    }
}

impl Journal {
    /// Frees every segment that is not part of the order, or notes it as damaged.
    fn sort_out(
        &mut self,
        storage: &mut dyn Storage,
        names: &[String],
        headers: &Headers,
        checkpoint: Option<&Checkpoint>,
    ) -> Result<(), JournalError> {
        for name in names {
            if SegmentNumber::parse_free(name).is_some() {
                let path = self.dir.join(name);
                let file = storage.open(&path, OpenMode::Read)?;
                let file_bytes = storage.len_bytes(file)?;
                storage.close(file);
                self.free.push(FreeSegment { path, file_bytes });
            }
        }
        let start = checkpoint.map_or(SegmentNumber(0), |c| c.next.segment);
        let mut not_needed = Vec::new();
        for (number, header) in headers {
            if self.segments.iter().any(|s| s.number == *number) {
                continue;
            }
            let other_life = header.as_ref().is_some_and(|(header, _)| {
                header.number != *number || Some(header.generation) != self.generation
            });
            if self.damage.is_some()
                && *number >= start
                && !(other_life && self.generation.is_some())
            {
                self.unusable.push(*number);
            } else {
                not_needed.push(*number);
            }
        }
        self.free_segments(storage, &not_needed)?;
        Ok(())
    }
}
