//! Every kind of damage to one copy of the metadata, and a few to both: what is read, what is told, what a
//! repair leaves. qemu-img judges.
//!
//! An image had its two copies judged entry by entry: a redundant copy whose entries were shifted, doubled
//! or random gave grains to empty parts of the disk, and a primary copy that was damaged like that was
//! written over the redundant one, which was whole; "0 bytes lost" was said of both.

#[path = "support/metadata.rs"]
mod metadata;
mod support;
#[path = "support/whole.rs"]
mod whole;

use std::{fs::File, os::unix::fs::FileExt, path::Path};

use backhaul_disk_image::{
    CreateOptions, Deep, DiskImage, Kind, OpenOptions, Severity, Silent, create, open,
    ops::{ConvertOptions, check, convert},
};
use metadata::Metadata;
use support::{Random, qemu, qemu_img, text};
use whole::repair;

const GRAIN: usize = 65_536;
/// Four tables: one full, one with every fourth grain, one empty, one with the disk's odd end.
const DISK_BYTES: usize = (96 << 20) + 3 * GRAIN + 512 * 3;

/// Damage to one copy, 0 for the primary.
type Damage = fn(&Metadata, usize);
type DamageToBoth = fn(&Metadata);
/// Damage with a name that tells where it is.
type Named = (String, Box<dyn Fn(&Metadata)>);

const TO_ONE_COPY: &[(&str, Damage)] = &[
    ("directory of zeros", |m, c| m.fill_directory(c, || 0)),
    ("directory of ones", |m, c| m.fill_directory(c, || u32::MAX)),
    ("random directory", |m, c| {
        let mut random = Random(7);
        m.fill_directory(c, || random.next() as u32);
    }),
    ("tables of zeros", |m, c| m.fill_all(c, || 0)),
    ("tables of ones", |m, c| m.fill_all(c, || u32::MAX)),
    ("random tables", |m, c| {
        let mut random = Random(8);
        m.fill_all(c, || random.next() as u32);
    }),
    ("random tables of small numbers", |m, c| {
        let (mut random, end) = (Random(9), m.file.metadata().unwrap().len() / 512);
        m.fill_all(c, || (m.overhead + random.below(end - m.overhead)) as u32);
    }),
    ("random tables of grains", |m, c| {
        let (mut random, end) = (Random(10), m.file.metadata().unwrap().len() / 512);
        let (first, grain) = (m.overhead / m.grain_sectors, m.grain_sectors);
        m.fill_all(c, || ((first + random.below(end / grain - first)) * grain) as u32);
    }),
    ("directory and tables of zeros", |m, c| {
        m.fill_all(c, || 0);
        m.fill_directory(c, || 0);
    }),
    ("a table of zeros", |m, c| m.fill(c, 1, &vec![0; m.entries_per_table])),
    ("a sector of a table of zeros", |m, c| m.fill(c, 0, &[0; 128])),
    ("an entry of zero", |m, c| m.put(c, 0, m.named(0)[3], 0)),
    ("an entry of one", |m, c| m.put(c, 0, m.named(0)[3], 1)),
    ("an entry into the header", |m, c| m.put(c, 0, m.named(0)[3], 5)),
    ("an entry beyond the file", |m, c| m.put(c, 0, m.named(0)[3], 0x7fff_ff80)),
    ("an entry between two grains", |m, c| {
        let at = m.named(0)[3];
        m.put(c, 0, at, m.table(c, 0)[at] + 3);
    }),
    ("an entry that is a later one's", |m, c| {
        m.put(c, 0, m.named(0)[3], m.table(c, 0)[m.named(0)[7]]);
    }),
    ("an entry that is an earlier one's", |m, c| {
        m.put(c, 0, m.named(0)[7], m.table(c, 0)[m.named(0)[3]]);
    }),
    ("an entry that is an earlier table's", |m, c| {
        m.put(c, 1, m.named(1)[3], m.table(c, 0)[m.named(0)[7]]);
    }),
    ("an entry that is a later table's", |m, c| {
        m.put(c, 0, m.named(0)[3], m.table(c, 1)[m.named(1)[7]]);
    }),
    ("an entry for no grain that is another's", |m, c| {
        m.put(c, 1, m.missing(1), m.table(c, 0)[m.named(0)[7]]);
    }),
    ("an entry for no grain of an empty table that is another's", |m, c| {
        m.put(c, 2, 9, m.table(c, 0)[m.named(0)[7]]);
    }),
    ("a directory entry of zero", |m, c| m.name(c, 1, 0)),
    ("a directory entry into a grain", |m, c| m.name(c, 1, m.table(0, 0)[m.named(0)[0]])),
    ("a directory entry into a grain of its own", |m, c| {
        m.name(c, 1, m.table(0, 1)[m.named(1)[0]])
    }),
    ("a directory entry beyond the file", |m, c| m.name(c, 1, 0x7fff_ffff)),
    ("a directory entry that is another's", |m, c| m.name(c, 1, m.directory(c)[0])),
    ("a directory entry that is an empty table's", |m, c| m.name(c, 1, m.directory(c)[2])),
    ("a directory entry that is the other copy's", |m, c| m.name(c, 1, m.directory(1 - c)[1])),
    ("a directory entry into the descriptor", |m, c| m.name(c, 1, 1)),
    ("a directory that is one entry throughout", |m, c| {
        let entry = m.directory(c)[0];
        m.fill_directory(c, || entry);
    }),
    ("two directory entries exchanged", |m, c| {
        let entries = m.directory(c);
        m.name(c, 0, entries[1]);
        m.name(c, 1, entries[0]);
    }),
    ("a pointer of zero", |m, c| m.point(c, 0)),
    ("a pointer beyond the file", |m, c| m.point(c, u64::MAX / 255 * 254)),
    ("a pointer into a grain", |m, c| m.point(c, u64::from(m.table(0, 0)[m.named(0)[0]]))),
    ("a pointer to the other directory", |m, c| m.point(c, m.directories[1 - c])),
    ("a pointer off by one", |m, c| m.point(c, m.directories[c] + 1)),
    ("a pointer to the tables", |m, c| {
        m.point(c, m.directories[c] + (m.tables as u64 * 4).div_ceil(512));
    }),
    ("a table shifted by an entry", |m, c| shift(m, c, 0)),
    ("a chain of entries that are the next one's", |m, c| {
        let (named, entries) = (m.named(0), m.table(c, 0));
        for at in 3..10 {
            m.put(c, 0, named[at], entries[named[at + 1]]);
        }
    }),
    ("a table copied over the next", |m, c| m.fill(c, 1, &m.table(c, 0))),
    ("a table copied over an empty one", |m, c| m.fill(c, 2, &m.table(c, 1))),
    ("many entries that are one grain's", |m, c| {
        let (named, entries) = (m.named(0), m.table(c, 0));
        for at in 1..20 {
            m.put(c, 0, named[at], entries[named[0]]);
        }
    }),
];

/// Damage to both copies, each part of which is whole in one of them, or where it regularly lies.
const TO_BOTH: &[(&str, DamageToBoth)] = &[
    ("the halves of all tables, of zeros", |m| {
        let half = vec![0; m.entries_per_table / 2];
        for table in 0..m.tables {
            m.fill(0, table, &half);
            m.write(m.table_at(1, table) + half.len() as u64 * 4, &half);
        }
    }),
    ("directory entries of zero, and a table", |m| {
        m.fill(0, 3, &vec![0; m.entries_per_table]);
        m.name(0, 0, 0);
        m.name(1, 1, 0);
    }),
    ("directory entries that cannot be", |m| {
        m.name(0, 0, 0);
        m.name(1, 1, 0x7fff_ffff);
        m.name(0, 2, 0x7fff_ffff);
        m.name(1, 3, m.directory(1)[2]);
    }),
    ("both directories of zeros", |m| [0, 1].into_iter().for_each(|c| m.fill_directory(c, || 0))),
    ("a directory entry of zero in both", |m| [0, 1].into_iter().for_each(|c| m.name(c, 1, 0))),
    ("the primary directory and the redundant tables of zeros", |m| {
        m.fill_all(1, || 0);
        m.fill_directory(0, || 0);
    }),
    ("the redundant directory and the primary tables of zeros", |m| {
        m.fill_all(0, || 0);
        m.fill_directory(1, || 0);
    }),
    ("a directory entry into a grain, the other directory of ones", |m| {
        m.name(0, 1, m.table(0, 0)[m.named(0)[0]]);
        m.fill_directory(1, || u32::MAX);
    }),
    ("an entry of each copy that is another grain's", |m| {
        m.put(0, 0, m.named(0)[3], m.table(0, 0)[m.named(0)[7]]);
        m.put(1, 1, m.named(1)[3], m.table(1, 1)[m.named(1)[7]]);
    }),
    ("a table of zeros, and an entry of the other copy between two grains", |m| {
        m.fill(0, 1, &vec![0; m.entries_per_table]);
        m.put(1, 0, m.named(0)[3], m.table(1, 0)[m.named(0)[3]] + 3);
    }),
];

fn exchange(m: &Metadata, copy: usize) {
    let (named, entries) = (m.named(0), m.table(copy, 0));
    m.put(copy, 0, named[3], entries[named[7]]);
    m.put(copy, 0, named[7], entries[named[3]]);
}

fn shift(m: &Metadata, copy: usize, table: usize) {
    let mut entries = m.table(copy, table);
    entries.insert(0, 0);
    m.fill(copy, table, &entries[..m.entries_per_table]);
}

/// Content of the disk: a full table, every fourth grain, nothing, the end.
fn disk() -> Vec<u8> {
    let mut disk = vec![0; DISK_BYTES];
    for grain in (0..512).chain((512..1024).step_by(4)).chain([1536, 1539]) {
        let start = grain * GRAIN;
        let end = (start + GRAIN).min(DISK_BYTES);
        let mut random = Random(grain as u64 + 1);
        // A few sectors tell the grains apart and cost little.
        random.fill(&mut disk[start..(start + 1024).min(end)]);
        random.fill(&mut disk[end - 512..end]);
    }
    disk
}

/// Images with two copies, and the file that has the metadata: ours, qemu's, in extents, a delta.
const IMAGES: [(&str, &str); 5] = [
    ("ours.vmdk", "ours.vmdk"),
    ("qemu.vmdk", "qemu.vmdk"),
    ("zeroed.vmdk", "zeroed.vmdk"),
    ("split.vmdk", "split-s001.vmdk"),
    ("delta.vmdk", "delta.vmdk"),
];

fn make_images(dir: &Path, raw: &Path, disk: &[u8]) {
    let source = open(raw, &OpenOptions::read_only().of_kind(Kind::Raw)).unwrap();
    let converted = |source: &dyn DiskImage, name: &str, kind| {
        let path = dir.join(name);
        convert(source, &path, &ConvertOptions::new(kind), &mut Silent).unwrap();
        path
    };
    converted(source.as_ref(), "ours.vmdk", Kind::MonolithicSparse);
    converted(source.as_ref(), "split.vmdk", Kind::TwoGbMaxExtentSparse);
    for (name, options) in [("qemu", "subformat=monolithicSparse"), ("zeroed", "zeroed_grain=on")] {
        let path = dir.join(format!("{name}.vmdk"));
        qemu(&["convert", "-f", "raw", "-O", "vmdk", "-o", options, text(raw), text(&path)]);
    }
    // The parent has other content where the delta has its own.
    let parent = converted(source.as_ref(), "parent.vmdk", Kind::MonolithicSparse);
    let own: Vec<usize> =
        (0..512).step_by(7).chain([511]).chain((512..1024).step_by(4)).chain([1536]).collect();
    let below = open(&parent, &OpenOptions::writable()).unwrap();
    for grain in &own {
        below.write_at(&[0xee; GRAIN], (grain * GRAIN) as u64).unwrap();
    }
    below.flush().unwrap();
    drop(below);
    let delta = dir.join("delta.vmdk");
    let kind = CreateOptions::new(Kind::MonolithicSparse, disk.len() as u64);
    create(&delta, &CreateOptions { parent: Some(parent), ..kind }).unwrap();
    let above = open(&delta, &OpenOptions::writable()).unwrap();
    for start in own.iter().map(|grain| grain * GRAIN) {
        above.write_at(&disk[start..start + GRAIN], start as u64).unwrap();
    }
    above.flush().unwrap();
}

fn is_same(path: &Path, disk: &[u8]) -> Result<bool, String> {
    let image = open(path, &OpenOptions::read_only()).map_err(|error| error.to_string())?;
    // qemu's disks are rounded up.
    let size = image.size_bytes() as usize;
    let mut found = vec![1; 1 << 20];
    for start in (0..size).step_by(1 << 20) {
        let found = &mut found[..(size - start).min(1 << 20)];
        image.read_at(found, start as u64).map_err(|error| error.to_string())?;
        let there = disk.len().saturating_sub(start).min(found.len());
        if found[..there] != disk[start..start + there] || found[there..].iter().any(|b| *b != 0) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Everything that must hold of a damaged image whose every part is whole somewhere.
fn judge(image: &Path, raw: &Path, disk: &[u8]) -> Vec<String> {
    let mut faults = Vec::new();
    let mut fault = |sentence: String| faults.push(sentence);
    match is_same(image, disk) {
        Ok(true) => {}
        read => fault(format!("read: {read:?}")),
    }
    let options = OpenOptions::read_only();
    let before = check(image, &options, Deep::No, &mut Silent).unwrap();
    if before.is_clean() {
        fault("the check calls it clean".into());
    }
    if before.losses > 0 {
        fault(format!("the check tells losses: {:?}", before.findings));
    }
    let lost = repair(image);
    match is_same(image, disk) {
        Ok(true) if lost == 0 => {}
        read => fault(format!("after the repair: {read:?}, {lost} bytes lost")),
    }
    let after = check(image, &options, Deep::No, &mut Silent).unwrap();
    if after.losses + after.redundancies > 0 {
        fault(format!("the check after the repair: {:?}", after.findings));
    }
    for words in [
        ["check", "-f", "vmdk", text(image)].as_slice(),
        &["compare", "-f", "vmdk", "-F", "raw", text(image), text(raw)],
    ] {
        let (good, said) = qemu_img(words);
        if !good {
            fault(format!("qemu-img {}: {said}", words[0]));
        }
    }
    faults
}

fn name_of(path: &Path) -> &str {
    text(Path::new(path.file_name().unwrap()))
}

/// The images, and what they were before somebody damages them.
struct Bench {
    dir: tempfile::TempDir,
    disk: Vec<u8>,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (disk, raw) = (disk(), dir.path().join("disk.raw"));
        std::fs::write(&raw, &disk).unwrap();
        make_images(dir.path(), &raw, &disk);
        Self { dir, disk }
    }

    /// Damages each image anew and calls `judge`; tells all that is wrong.
    fn each(&self, damages: &[Named], judge: impl Fn(&Path, &Path, &[u8]) -> Vec<String>) {
        let (mut all, raw) = (Vec::new(), self.dir.path().join("disk.raw"));
        for (image, extent) in IMAGES {
            let (image, extent) = (self.dir.path().join(image), self.dir.path().join(extent));
            let whole = Metadata::open(&extent);
            let length = whole.file.metadata().unwrap().len();
            let before = whole.read(0, whole.overhead as usize * 128);
            // Two images meet all damage; the others a part of it, which is enough to differ.
            let step = if ["ours.vmdk", "qemu.vmdk"].contains(&name_of(&image)) { 1 } else { 4 };
            for (name, damage) in damages.iter().step_by(step) {
                // What repairs append goes, and grains they must not have touched.
                whole.file.set_len(length).unwrap();
                whole.write(0, &before);
                damage(&whole);
                let faults = judge(&image, &raw, &self.disk);
                all.extend(
                    faults
                        .iter()
                        .map(|fault| format!("{}, {name}: {fault:.400}", name_of(&extent))),
                );
            }
        }
        assert!(all.is_empty(), "\n{}", all.join("\n"));
    }
}

fn to_one_copy(copy: usize) -> Vec<Named> {
    let named = |(name, damage): &(&str, Damage)| {
        let (name, damage) = (format!("{} copy: {name}", ["primary", "redundant"][copy]), *damage);
        let damage: Box<dyn Fn(&Metadata)> = Box::new(move |metadata| damage(metadata, copy));
        (name, damage)
    };
    TO_ONE_COPY.iter().map(named).collect()
}

fn to_both(damages: &[(&str, DamageToBoth)]) -> Vec<Named> {
    let named = |(name, damage): &(&str, DamageToBoth)| {
        let damage: Box<dyn Fn(&Metadata)> = Box::new(*damage);
        ((*name).to_owned(), damage)
    };
    damages.iter().map(named).collect()
}

#[test]
fn damage_to_the_primary_copy_alone_loses_nothing() {
    Bench::new().each(&to_one_copy(0), judge);
}

#[test]
fn damage_to_the_redundant_copy_alone_loses_nothing() {
    Bench::new().each(&to_one_copy(1), judge);
}

#[test]
fn damage_to_different_parts_of_both_copies_loses_nothing() {
    Bench::new().each(&to_both(TO_BOTH), judge);
}

/// Of damage that nothing can decide it was said that nothing is lost, and a conversion of grains that
/// share a place was silent.
#[test]
fn what_nothing_can_decide_is_told_and_never_called_whole() {
    let damages: [Named; 2] = [
        ("two entries exchanged in the primary copy".into(), Box::new(move |m| exchange(m, 0))),
        ("two entries exchanged in the redundant copy".into(), Box::new(move |m| exchange(m, 1))),
    ];
    Bench::new().each(&damages, |image, _, _| {
        let mut faults = Vec::new();
        let opened = open(image, &OpenOptions::read_only()).unwrap();
        let mut found = vec![0; DISK_BYTES];
        opened.read_at(&mut found, 0).unwrap();
        let told = opened.info().unwrap().findings;
        if !told.iter().any(|finding| finding.severity == Severity::Loss) {
            faults.push(format!("a reader is told {told:?}"));
        }
        drop(opened);
        let error = open(image, &OpenOptions::writable())
            .and_then(|opened| opened.write_zeroes_at(0, 100 << 16));
        if error.is_ok() {
            faults.push("it is written".into());
        }
        let report = check(image, &OpenOptions::read_only(), Deep::No, &mut Silent).unwrap();
        if report.losses != 1 {
            faults.push(format!("check: {:?}", report.findings));
        }
        if repair(image) != 2 * GRAIN as u64 {
            faults.push("the repair says that nothing can be lost".into());
        }
        // Nothing is decided by a repair but that both copies say the same.
        if is_same(image, &found) != Ok(true) {
            faults.push("the repair changed what is read".into());
        }
        faults
    });
    let share: [Named; 1] = [(
        "a place that is two grains'".into(),
        Box::new(|m| {
            let named = m.named(0);
            [0, 1].into_iter().for_each(|c| m.put(c, 0, named[3], m.table(c, 0)[named[7]]));
        }),
    )];
    Bench::new().each(&share, |image, _, _| {
        let mut faults = Vec::new();
        let opened = open(image, &OpenOptions::read_only()).unwrap();
        let target = image.with_extension("raw");
        let converted =
            convert(opened.as_ref(), &target, &ConvertOptions::new(Kind::Raw), &mut Silent);
        match converted {
            Err(error) if error.to_string().contains("shares its place") => {}
            other => faults.push(format!("conversion: {other:?}")),
        }
        drop(opened);
        if repair(image) != GRAIN as u64 {
            faults.push("the repair says that nothing is lost".into());
        }
        let (good, said) = qemu_img(&["check", "-f", "vmdk", text(image)]);
        if !good {
            faults.push(said);
        }
        faults
    });
}

/// One more fault, in the other copy, and the copy that was wrong all over was believed to the last entry: of
/// grains that had changed places with one another it was said that nothing is lost.
#[test]
fn a_fault_in_one_copy_does_not_make_the_other_one_right() {
    let mut damages: Vec<Named> = Vec::new();
    for copy in [0, 1] {
        let other = 1 - copy;
        damages.push((
            format!("two entries exchanged in copy {copy}, and one of the other copy that is 1"),
            Box::new(move |m| {
                let named = m.named(0);
                exchange(m, copy);
                m.put(other, 0, named[12], 1);
            }),
        ));
        damages.push((
            format!(
                "two entries exchanged in copy {copy}, and a directory entry that is another's"
            ),
            Box::new(move |m| {
                exchange(m, copy);
                m.name(other, 1, m.directory(other)[0]);
            }),
        ));
        damages.push((
            format!("two entries exchanged in copy {copy}, and one of the two is 1 in the other"),
            Box::new(move |m| {
                let named = m.named(0);
                exchange(m, copy);
                m.put(other, 0, named[3], 1);
            }),
        ));
        damages.push((
            format!(
                "a table of copy {copy} with room shifted, and an entry of the other beyond the file"
            ),
            Box::new(move |m| {
                let named = m.named(1);
                shift(m, copy, 1);
                m.put(other, 1, named[12], 0x7fff_ff80);
            }),
        ));
        damages.push((
            format!("a table of copy {copy} shifted, and an entry of the other beyond the file"),
            Box::new(move |m| {
                let named = m.named(0);
                shift(m, copy, 0);
                m.put(other, 0, named[12], 0x7fff_ff80);
            }),
        ));
    }
    Bench::new().each(&damages, |image, _, disk| {
        let mut faults = Vec::new();
        let (lost, same) = (repair(image), is_same(image, disk));
        if lost == 0 && same != Ok(true) {
            faults.push(format!("nothing is said to be lost, and it is not the same: {same:?}"));
        }
        let (good, said) = qemu_img(&["check", "-f", "vmdk", text(image)]);
        if !good {
            faults.push(said);
        }
        faults
    });
}

/// Writes in place went through a directory entry that led into a grain, and over that grain.
#[test]
fn a_writer_of_a_damaged_image_harms_nothing() {
    let bench = Bench::new();
    let oracle = File::options().write(true).open(bench.dir.path().join("disk.raw")).unwrap();
    // A grain that is there, and new ones of three tables.
    let places = [GRAIN * 3, GRAIN * 601, GRAIN * 1100, GRAIN * 1537];
    for copy in [0, 1] {
        bench.each(&to_one_copy(copy), |image, raw, disk| {
            let Ok(opened) = open(image, &OpenOptions::writable()) else { return Vec::new() };
            let mut faults = Vec::new();
            let mut changed = Vec::new();
            for at in places {
                if opened.write_at(&[0x77; 700], at as u64).is_ok() {
                    oracle.write_all_at(&[0x77; 700], at as u64).unwrap();
                    changed.push(at);
                }
            }
            faults.extend(opened.flush().err().map(|error| error.to_string()));
            drop(opened);
            let lost = repair(image);
            let words = ["compare", "-f", "vmdk", "-F", "raw", text(image), text(raw)];
            let (good, said) = qemu_img(&words);
            if lost > 0 || !good {
                faults.push(format!("{lost} bytes lost; {said}"));
            }
            // The grain that was there is as it was, for the next damage.
            let mended = open(image, &OpenOptions::writable()).unwrap();
            for at in changed {
                mended.write_at(&disk[at..at + 700], at as u64).unwrap();
                oracle.write_all_at(&disk[at..at + 700], at as u64).unwrap();
            }
            faults
        });
    }
}
