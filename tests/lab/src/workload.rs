//! What a guest does to its disk: a seeded stream of operations, and the model that says what the
//! disk must hold afterwards.
//!
//! The stream is pure: the same spec gives the same operations with the same bytes. Every sector
//! that it writes says which operation wrote it ([`Stamp`]), so that a difference found later
//! tells its own story.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FallocateFlags, fallocate};

use crate::random::Random;

/// What the stream is like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadSpec {
    /// Where it may write, in whole sectors.
    pub ranges: Vec<Range<u64>>,
    /// Bytes written a second; `None` is as fast as they are taken.
    pub rate_bytes_per_second: Option<u64>,
    /// A flush follows each so many operations; 0 is never.
    pub flush_every: u64,
    /// Decides the stream.
    pub seed: u64,
}

/// One operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Op {
    /// Its place in the stream, from 1.
    pub number: u64,
    /// When it is due, counted from the start of the stream.
    pub due: Duration,
    /// What to do.
    pub action: Action,
}

/// What an operation does. Offsets and lengths are whole sectors and never leave a range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Writes [`Workload::fill`]'s bytes.
    Write {
        /// Where, and how much.
        range: Range<u64>,
        /// Durable when answered.
        fua: bool,
        /// What the bytes are like.
        pattern: Pattern,
    },
    /// Zeroes.
    WriteZeroes {
        /// Where, and how much.
        range: Range<u64>,
        /// The space stays allocated.
        no_hole: bool,
    },
    /// The guest does not need this any more. Backhaul's exports read zeroes afterwards, and the
    /// [`Oracle`] expects that.
    Trim {
        /// Where, and how much.
        range: Range<u64>,
    },
    /// Everything answered before becomes durable.
    Flush,
}

impl Action {
    /// The bytes it changes; `None` for a flush. Operations whose ranges overlap must not be under
    /// way together: their order would be anybody's guess.
    pub fn range(&self) -> Option<&Range<u64>> {
        match self {
            Self::Write { range, .. } | Self::WriteZeroes { range, .. } | Self::Trim { range } => {
                Some(range)
            }
            Self::Flush => None,
        }
    }
}

/// What written bytes are like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Sentences: compresses to a fraction.
    Text,
    /// Random bytes: does not compress.
    Packed,
}

/// The stream of operations; endless.
#[derive(Clone, Debug)]
pub struct Workload {
    spec: WorkloadSpec,
    random: Random,
    /// Length of all ranges laid end to end; places are drawn in that space.
    total_bytes: u64,
    hot_spots: Vec<u64>,
    /// Where the current sequential run goes on, and how many writes it still has.
    run_at: u64,
    run_left: u64,
    number: u64,
    written_bytes: u64,
}

impl Workload {
    /// Begins a stream.
    ///
    /// # Errors
    /// When there is no range, or one is empty or not in whole sectors.
    pub fn new(spec: WorkloadSpec) -> Result<Self, WorkloadError> {
        for range in &spec.ranges {
            let aligned = [range.start, range.end].iter().all(|at| at.is_multiple_of(SECTOR_BYTES));
            if range.start >= range.end || !aligned {
                return Err(WorkloadError::Range { start: range.start, end: range.end });
            }
        }
        let total_bytes: u64 = spec.ranges.iter().map(|range| range.end - range.start).sum();
        if total_bytes == 0 {
            return Err(WorkloadError::Nowhere);
        }
        let mut random = Random::new(spec.seed);
        let hot_spots = (0..HOT_SPOTS).map(|_| random.below(total_bytes)).collect();
        Ok(Self {
            spec,
            random,
            total_bytes,
            hot_spots,
            run_at: 0,
            run_left: 0,
            number: 0,
            written_bytes: 0,
        })
    }

    /// The next operation.
    pub fn next_op(&mut self) -> Op {
        self.number += 1;
        let flush = self.spec.flush_every > 0 && self.number.is_multiple_of(self.spec.flush_every);
        let action = if flush { Action::Flush } else { self.change() };
        let due = match self.spec.rate_bytes_per_second {
            Some(rate) if rate > 0 => {
                Duration::from_secs_f64(self.written_bytes as f64 / rate as f64)
            }
            _ => Duration::ZERO,
        };
        if let Action::Write { range, .. } = &action {
            self.written_bytes += range.end - range.start;
        }
        Op { number: self.number, due, action }
    }

    /// The bytes of the write `op`, of which `data` must have the length.
    pub fn fill(&self, op: &Op, data: &mut [u8]) {
        fill(self.spec.seed, op, data);
    }

    fn change(&mut self) -> Action {
        match self.random.below(100) {
            0..=3 => {
                let no_hole = self.random.chance(1, 2);
                Action::WriteZeroes { range: self.place(), no_hole }
            }
            4..=7 => Action::Trim { range: self.place() },
            _ => {
                let range = self.place();
                let fua = self.random.chance(1, 50);
                let pattern =
                    if self.random.chance(1, 3) { Pattern::Packed } else { Pattern::Text };
                Action::Write { range, fua, pattern }
            }
        }
    }

    /// Half of all operations go to a few hot spots, a tenth belong to sequential runs.
    fn place(&mut self) -> Range<u64> {
        if self.run_left == 0 && self.random.chance(1, 300) {
            self.run_at = self.random.below(self.total_bytes) / 4096 * 4096;
            self.run_left = 16 + self.random.below(48);
        }
        if self.run_left > 0 {
            self.run_left -= 1;
            let range = self.on_disk(self.run_at, RUN_WRITE_BYTES);
            self.run_at = (self.run_at + (range.end - range.start)) % self.total_bytes;
            return range;
        }
        let at = if self.random.chance(1, 2) {
            let spot = self.hot_spots[self.random.below(HOT_SPOTS) as usize];
            (spot + self.random.below(HOT_SPOT_BYTES)) % self.total_bytes
        } else {
            self.random.below(self.total_bytes)
        };
        // Old guests still write single sectors; everything else is in pages.
        let (unit, len) = match self.random.below(100) {
            0..=2 => (SECTOR_BYTES, SECTOR_BYTES * (1 + self.random.below(7))),
            3..=49 => (4096, 4096),
            50..=69 => (4096, 8192),
            70..=84 => (4096, 16384),
            _ => (4096, 4096 * (5 + self.random.below(60))),
        };
        self.on_disk(at / unit * unit, len)
    }

    /// At most `len_bytes` from `at` in the space of all ranges, cut at the end of its range.
    fn on_disk(&self, at: u64, len_bytes: u64) -> Range<u64> {
        let mut left = at;
        for range in &self.spec.ranges {
            let size = range.end - range.start;
            if left < size {
                let start = range.start + left;
                return start..range.end.min(start + len_bytes);
            }
            left -= size;
        }
        // `at` is below the total, so the loop has returned; the first range is as good as any.
        self.spec.ranges[0].clone()
    }
}

/// What a workload's sector says about itself: its first 32 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// The stream's seed.
    pub seed: u64,
    /// The operation that wrote it.
    pub number: u64,
    /// Where it was to be written.
    pub offset_bytes: u64,
}

impl Stamp {
    /// Reads a sector's stamp; `None` when the workload did not write it.
    pub fn read(sector: &[u8]) -> Option<Self> {
        let field = |index: usize| -> Option<u64> {
            let bytes = sector.get(index * 8..index * 8 + 8)?;
            Some(u64::from_le_bytes(bytes.try_into().ok()?))
        };
        (field(0)? == STAMP_MAGIC).then_some(())?;
        Some(Self { seed: field(1)?, number: field(2)?, offset_bytes: field(3)? })
    }

    fn write(self, sector: &mut [u8]) {
        let fields = [STAMP_MAGIC, self.seed, self.number, self.offset_bytes];
        for (bytes, field) in sector.chunks_exact_mut(8).zip(fields) {
            bytes.copy_from_slice(&field.to_le_bytes());
        }
    }
}

/// A model of the disk in a plain file: no pipeline, no queue, one operation after the other.
#[derive(Debug)]
pub struct Oracle {
    path: PathBuf,
    file: File,
    seed: u64,
    buffer: Vec<u8>,
}

impl Oracle {
    /// A model that begins with the content of `path`, which is changed in place: a copy of the
    /// disk as it was before the workload of this `seed`.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn open(path: &Path, seed: u64) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        Ok(Self { path: path.to_owned(), file, seed, buffer: Vec::new() })
    }

    /// Does to the model what `op` does to the disk.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn apply(&mut self, op: &Op) -> io::Result<()> {
        match &op.action {
            Action::Write { range, .. } => {
                self.buffer.resize((range.end - range.start) as usize, 0);
                fill(self.seed, op, &mut self.buffer);
                self.file.write_all_at(&self.buffer, range.start)
            }
            Action::WriteZeroes { range, .. } | Action::Trim { range } => {
                let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                Ok(fallocate(&self.file, mode, range.start, range.end - range.start)?)
            }
            Action::Flush => Ok(()),
        }
    }

    /// The file with the model's content.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Why no workload could begin.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum WorkloadError {
    /// A range is empty, reversed or not in whole sectors.
    #[error("the workload's range {start}..{end} is not a positive number of whole sectors")]
    Range {
        /// First byte.
        start: u64,
        /// One after the last.
        end: u64,
    },
    /// There are no ranges.
    #[error("the workload has no range to write to")]
    Nowhere,
}

fn fill(seed: u64, op: &Op, data: &mut [u8]) {
    let Action::Write { range, pattern, .. } = &op.action else { return };
    let mut random = Random::stream(seed, op.number);
    match pattern {
        Pattern::Packed => random.fill(data),
        Pattern::Text => {
            let text = format!("operation {} of seed {seed} was here and wrote this. ", op.number);
            for (byte, letter) in data.iter_mut().zip(text.bytes().cycle()) {
                *byte = letter;
            }
        }
    }
    let sectors = data.chunks_exact_mut(SECTOR_BYTES as usize);
    for (offset_bytes, sector) in (range.start..).step_by(SECTOR_BYTES as usize).zip(sectors) {
        Stamp { seed, number: op.number, offset_bytes }.write(sector);
    }
}

const SECTOR_BYTES: u64 = 512;
const HOT_SPOTS: u64 = 16;
const HOT_SPOT_BYTES: u64 = 1 << 20;
const RUN_WRITE_BYTES: u64 = 64 << 10;
const STAMP_MAGIC: u64 = u64::from_le_bytes(*b"BHLABOP1");

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> WorkloadSpec {
        WorkloadSpec {
            ranges: vec![4096..1 << 20, (4 << 20)..(32 << 20), (64 << 20)..(64 << 20) + 1536],
            rate_bytes_per_second: None,
            flush_every: 50,
            seed: 5,
        }
    }

    fn ops(spec: WorkloadSpec, count: usize) -> Vec<Op> {
        let mut workload = Workload::new(spec).unwrap();
        (0..count).map(|_| workload.next_op()).collect()
    }

    #[test]
    fn operations_stay_inside_the_ranges_in_whole_sectors() {
        for op in ops(spec(), 50_000) {
            let Some(range) = op.action.range() else { continue };
            assert!(range.start < range.end && range.end - range.start <= 256 << 10);
            assert!(range.start % 512 == 0 && range.end % 512 == 0);
            let inside = |outer: &Range<u64>| outer.start <= range.start && range.end <= outer.end;
            assert!(spec().ranges.iter().any(inside), "{op:?}");
        }
    }

    #[test]
    fn the_mix_has_every_kind_and_mostly_small_writes() {
        let all = ops(spec(), 20_000);
        let count =
            |wanted: fn(&Action) -> bool| all.iter().filter(|op| wanted(&op.action)).count();
        assert_eq!(count(|action| matches!(action, Action::Flush)), 400);
        assert!((600..1000).contains(&count(|action| matches!(action, Action::Trim { .. }))));
        assert!((600..1000).contains(&count(|a| matches!(a, Action::WriteZeroes { .. }))));
        assert!(count(|action| matches!(action, Action::Write { fua: true, .. })) > 200);
        assert!(count(|a| matches!(a, Action::Write { pattern: Pattern::Packed, .. })) > 5_000);
        let small =
            count(|action| action.range().is_some_and(|range| range.end - range.start <= 16 << 10));
        assert!(small > 13_000, "{small}");
        let sequential = all
            .windows(2)
            .filter(|pair| match (pair[0].action.range(), pair[1].action.range()) {
                (Some(first), Some(second)) => first.end == second.start,
                _ => false,
            })
            .count();
        assert!(sequential > 1_000, "{sequential}");
    }

    #[test]
    fn the_seed_decides_operations_and_bytes() {
        assert_eq!(ops(spec(), 2_000), ops(spec(), 2_000));
        assert_ne!(ops(spec(), 2_000), ops(WorkloadSpec { seed: 6, ..spec() }, 2_000));
    }

    #[test]
    fn the_rate_is_kept() {
        let rate = 10_000_000;
        let all = ops(WorkloadSpec { rate_bytes_per_second: Some(rate), ..spec() }, 20_000);
        let written: u64 = all
            .iter()
            .filter(|op| matches!(op.action, Action::Write { .. }))
            .filter_map(|op| op.action.range())
            .map(|range| range.end - range.start)
            .sum();
        let seconds = all.last().unwrap().due.as_secs_f64();
        assert!((written as f64 / seconds / rate as f64 - 1.0).abs() < 0.01);
        assert!(all.is_sorted_by_key(|op| op.due));
    }

    #[test]
    fn written_sectors_say_who_wrote_them() {
        let mut workload = Workload::new(spec()).unwrap();
        let op = std::iter::repeat_with(|| workload.next_op())
            .find(|op| matches!(op.action, Action::Write { .. }))
            .unwrap();
        let range = op.action.range().unwrap().clone();
        let mut data = vec![0; (range.end - range.start) as usize];
        workload.fill(&op, &mut data);
        for (offset_bytes, sector) in range.step_by(512).zip(data.chunks(512)) {
            let expected = Stamp { seed: 5, number: op.number, offset_bytes };
            assert_eq!(Stamp::read(sector), Some(expected));
        }
        assert_eq!(Stamp::read(&[0; 512]), None);
        assert_eq!(Stamp::read(b"BHLABOP1"), None);
    }

    #[test]
    fn the_oracle_holds_the_last_word_on_every_sector() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        std::fs::write(&path, vec![0xee; (64 << 20) + 1536]).unwrap();
        let mut oracle = Oracle::open(&path, 5).unwrap();
        // A model of the model: who touched each sector last; 0 for zeroes.
        let mut last = vec![None; ((64 << 20) + 1536) / 512];
        for op in ops(spec(), 3_000) {
            oracle.apply(&op).unwrap();
            let Some(range) = op.action.range() else { continue };
            let writer = if matches!(op.action, Action::Write { .. }) { op.number } else { 0 };
            last[(range.start / 512) as usize..(range.end / 512) as usize].fill(Some(writer));
        }
        let content = std::fs::read(oracle.path()).unwrap();
        for (sector, writer) in content.chunks(512).zip(last) {
            match writer {
                None => assert!(sector.iter().all(|byte| *byte == 0xee)),
                Some(0) => assert!(sector.iter().all(|byte| *byte == 0)),
                Some(number) => assert_eq!(Stamp::read(sector).unwrap().number, number),
            }
        }
    }

    #[test]
    fn impossible_ranges_are_refused() {
        let with = |ranges| Workload::new(WorkloadSpec { ranges, ..spec() }).unwrap_err();
        assert_eq!(with(Vec::new()), WorkloadError::Nowhere);
        let odd = std::iter::once(0..700).collect();
        assert_eq!(with(odd), WorkloadError::Range { start: 0, end: 700 });
    }
}
