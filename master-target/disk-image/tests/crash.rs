//! Power cuts: a sparse image over a disk that loses what was not synced.
//!
//! Every run makes the same writes and cuts the power at another operation. What the disk then
//! holds is the synced state and any part of what came later, sector by sector. The image must
//! open, lose no table entry, show every sector as flushed or as written since, be repairable to
//! a clean state, and take writes again.

mod support;

use std::{
    io,
    path::Path,
    sync::{Arc, Mutex},
};

use backhaul_disk_image::{
    CreateOptions, Deep, DiskImage, ErrorKind, Kind, OpenOptions, Silent, create_storage, open,
    open_storage,
    ops::{Leaks, apply_repair, plan_repair},
    storage::{MemoryStorage, Storage},
};
use support::Random;

const DISK_BYTES: usize = 2 << 20;
const SECTOR: usize = 512;

#[derive(Clone)]
struct FaultyDisk(Arc<Mutex<Faulty>>);

struct Faulty {
    now: Vec<u8>,
    synced: Vec<u8>,
    /// Writes since the last sync.
    later: Vec<(usize, Vec<u8>)>,
    /// Operations until the power goes.
    left: usize,
}

impl FaultyDisk {
    fn new(bytes: Vec<u8>, left: usize) -> Self {
        let faulty = Faulty { synced: bytes.clone(), now: bytes, later: Vec::new(), left };
        Self(Arc::new(Mutex::new(faulty)))
    }

    /// What is on the disk after the cut: of the later writes, sectors chosen by chance.
    fn after_cut(&self, random: &mut Random) -> Vec<u8> {
        let faulty = self.0.lock().unwrap();
        let mut bytes = faulty.synced.clone();
        let mode = random.below(4);
        for (offset, data) in &faulty.later {
            for (index, sector) in data.chunks(SECTOR).enumerate() {
                let kept = match mode {
                    0 => false,
                    1 => true,
                    _ => random.below(2) == 0,
                };
                if kept {
                    let at = offset + index * SECTOR;
                    if bytes.len() < at + sector.len() {
                        bytes.resize(at + sector.len(), 0);
                    }
                    bytes[at..at + sector.len()].copy_from_slice(sector);
                }
            }
        }
        bytes
    }
}

impl Faulty {
    fn step(&mut self) -> io::Result<()> {
        if self.left == 0 {
            return Err(io::Error::other("the power is gone"));
        }
        self.left -= 1;
        Ok(())
    }
}

impl Storage for FaultyDisk {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let faulty = self.0.lock().unwrap();
        let range = offset as usize..offset as usize + buf.len();
        let bytes = faulty.now.get(range).ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(bytes);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut faulty = self.0.lock().unwrap();
        let offset = offset as usize;
        let end = offset + buf.len();
        let written = faulty.step();
        // The write that was under way may be on the disk, too. A single byte is written as the
        // sector that holds it.
        let start = offset - offset % SECTOR;
        let mut sectors = faulty.now.clone();
        if sectors.len() < end {
            sectors.resize(end, 0);
        }
        sectors[offset..end].copy_from_slice(buf);
        let until = end.next_multiple_of(SECTOR).min(sectors.len());
        faulty.later.push((start, sectors[start..until].to_vec()));
        if written.is_ok() {
            faulty.now = sectors;
        }
        written
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().now.len() as u64)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        let mut faulty = self.0.lock().unwrap();
        faulty.step()?;
        faulty.now.resize(length as usize, 0);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut faulty = self.0.lock().unwrap();
        faulty.step()?;
        faulty.synced = faulty.now.clone();
        faulty.later.clear();
        Ok(())
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<bool> {
        let there = (self.length()?).saturating_sub(offset).min(length);
        self.write_at(&vec![0; there as usize], offset)?;
        Ok(true)
    }
}

/// What each sector may hold: a stamp for every write since the last flush that was acknowledged.
struct Model {
    may: Vec<Vec<u64>>,
    last: Vec<u64>,
}

impl Model {
    fn new() -> Self {
        let sectors = DISK_BYTES / SECTOR;
        Self { may: vec![vec![0]; sectors], last: vec![0; sectors] }
    }

    fn change(&mut self, sectors: std::ops::Range<usize>, stamp: u64) {
        for sector in sectors {
            self.may[sector].push(stamp);
            self.last[sector] = stamp;
        }
    }

    fn flushed(&mut self) {
        for (may, last) in self.may.iter_mut().zip(&self.last) {
            *may = vec![*last];
        }
    }

    fn judge(&self, image: &dyn DiskImage, story: &str) {
        let mut found = vec![0; DISK_BYTES];
        image.read_at(&mut found, 0).unwrap_or_else(|error| panic!("{story}: {error}"));
        for (number, sector) in found.chunks_exact(SECTOR).enumerate() {
            let stamp = u64::from_le_bytes(sector[..8].try_into().unwrap());
            let whole = sector.chunks_exact(8).all(|word| word == &sector[..8]);
            assert!(whole, "{story}: sector {number} is torn");
            let may = &self.may[number];
            assert!(may.contains(&stamp), "{story}: sector {number} holds {stamp}, not of {may:?}");
        }
    }
}

fn stamped(sectors: usize, stamp: u64) -> Vec<u8> {
    stamp.to_le_bytes().repeat(sectors * SECTOR / 8)
}

/// Writes, zeros, trims and flushes until the end or the cut.
fn work(image: &dyn DiskImage, model: &mut Model, random: &mut Random) -> bool {
    for stamp in 1..60 {
        let first = random.below((DISK_BYTES / SECTOR) as u64) as usize;
        let most = if random.below(3) == 0 { 700 } else { 20 };
        let last = (first + 1 + random.below(most) as usize).min(DISK_BYTES / SECTOR);
        let (at, length) = ((first * SECTOR) as u64, ((last - first) * SECTOR) as u64);
        let done = match random.below(8) {
            0 => {
                model.change(first..last, 0);
                image.write_zeroes_at(at, length)
            }
            1 => {
                // Freed sectors hold what they held, or zeros; the model learns which by reading.
                for sector in first..last {
                    model.may[sector].push(0);
                }
                let done = image.trim(at, length);
                if done.is_ok() {
                    let mut found = vec![0; length as usize];
                    image.read_at(&mut found, at).unwrap();
                    for (sector, bytes) in (first..last).zip(found.chunks_exact(SECTOR)) {
                        model.last[sector] = u64::from_le_bytes(bytes[..8].try_into().unwrap());
                    }
                }
                done
            }
            2 | 3 => {
                let flushed = image.flush();
                if flushed.is_ok() {
                    model.flushed();
                }
                flushed
            }
            _ => {
                model.change(first..last, stamp);
                image.write_at(&stamped(last - first, stamp), at)
            }
        };
        if done.is_err() {
            return false;
        }
    }
    true
}

fn new_image(zeroed_grains: bool) -> Vec<u8> {
    #[derive(Clone)]
    struct Shared(Arc<MemoryStorage>);
    impl Storage for Shared {
        fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
            self.0.read_at(buf, offset)
        }
        fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
            self.0.write_at(buf, offset)
        }
        fn length(&self) -> io::Result<u64> {
            self.0.length()
        }
        fn set_length(&self, length: u64) -> io::Result<()> {
            self.0.set_length(length)
        }
        fn sync(&self) -> io::Result<()> {
            Ok(())
        }
    }
    let memory = Shared(Arc::new(MemoryStorage::default()));
    let options = CreateOptions {
        zeroed_grains,
        ..CreateOptions::new(Kind::MonolithicSparse, DISK_BYTES as u64)
    };
    create_storage(Path::new("crash.vmdk"), Box::new(memory.clone()), &options).unwrap();
    memory.0.content()
}

/// Removes the tables that an empty image has, so that they are allocated by the writer: both
/// directories name none.
fn without_tables(mut bytes: Vec<u8>) -> Vec<u8> {
    for field in [48, 56] {
        let at = u64::from_le_bytes(bytes[field..field + 8].try_into().unwrap()) as usize * SECTOR;
        bytes[at..at + 4].fill(0);
    }
    bytes
}

fn open_memory(bytes: Vec<u8>, options: OpenOptions) -> Box<dyn DiskImage> {
    let storage = Box::new(MemoryStorage::new(bytes));
    open_storage(Path::new("crash.vmdk"), storage, &options).expect("it opens after the cut")
}

fn cut_everywhere(base: &[u8], seed: u64, dir: &Path) {
    for cut in 0..2000 {
        let disk = FaultyDisk::new(base.to_vec(), cut);
        let mut model = Model::new();
        let (mut random, mut chance) = (Random(seed), Random(seed ^ (cut as u64 + 1) << 20));
        let storage = Box::new(disk.clone());
        let image = open_storage(Path::new("crash.vmdk"), storage, &OpenOptions::writable());
        let finished = work(image.unwrap().as_ref(), &mut model, &mut random);
        let story = format!("seed {seed}, cut after {cut} operations");
        let after = disk.after_cut(&mut chance);

        let image = open_memory(after.clone(), OpenOptions::read_only());
        let report = image.check(Deep::Yes, &mut Silent).unwrap();
        assert_eq!(report.losses, 0, "{story}: {:?}", report.findings);
        model.judge(image.as_ref(), &story);

        // The next writer goes on without harm.
        let image = open_memory(after.clone(), OpenOptions::writable());
        image.write_at(&stamped(300, 99), 512 * 1000).unwrap();
        model.change(1000..1300, 99);
        image.flush().unwrap();
        for sector in 1000..1300 {
            model.may[sector] = vec![99];
        }
        model.judge(image.as_ref(), &story);
        assert_eq!(image.check(Deep::Yes, &mut Silent).unwrap().losses, 0, "{story}");

        if cut % 16 == 0 {
            let path = dir.join("cut.vmdk");
            std::fs::write(&path, &after).unwrap();
            repair_clean(&path, &story);
        }
        if finished {
            return;
        }
    }
    panic!("the work never ended");
}

fn repair_clean(path: &Path, story: &str) {
    let before = open(path, &OpenOptions::read_only()).unwrap();
    let mut content = vec![0; DISK_BYTES];
    before.read_at(&mut content, 0).unwrap();
    drop(before);
    for _ in 0..3 {
        let plan = plan_repair(path, &OpenOptions::read_only(), Leaks::Free, &mut Silent).unwrap();
        assert_eq!(plan.lost_bytes, 0, "{story}");
        apply_repair(&plan, &mut Silent).unwrap();
    }
    let after = open(path, &OpenOptions::read_only()).unwrap();
    let report = after.check(Deep::Yes, &mut Silent).unwrap();
    assert!(report.is_clean(), "{story}: {:?}", report.findings);
}

#[test]
fn no_cut_loses_what_was_flushed() {
    let dir = tempfile::tempdir().unwrap();
    for (zeroed_grains, seed) in [(false, 11), (true, 12), (false, 13), (true, 14)] {
        cut_everywhere(&new_image(zeroed_grains), seed, dir.path());
    }
}

#[test]
fn no_cut_loses_what_was_flushed_while_tables_are_allocated() {
    let dir = tempfile::tempdir().unwrap();
    for seed in [21, 22, 23] {
        cut_everywhere(&without_tables(new_image(seed % 2 == 0)), seed, dir.path());
    }
}

#[test]
fn a_failed_flush_latches() {
    let disk = FaultyDisk::new(new_image(false), usize::MAX);
    let storage = Box::new(disk.clone());
    let image = open_storage(Path::new("l.vmdk"), storage, &OpenOptions::writable()).unwrap();
    image.write_at(&[1; 512], 0).unwrap();
    disk.0.lock().unwrap().left = 1;
    image.flush().unwrap_err();
    disk.0.lock().unwrap().left = usize::MAX;
    for refused in
        [image.flush(), image.write_at(&[1], 0), image.trim(0, 1), image.write_zeroes_at(0, 1)]
    {
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::Latched);
    }
    let mut found = [0; 512];
    image.read_at(&mut found, 0).unwrap();
    assert_eq!(found, [1; 512]);
}
