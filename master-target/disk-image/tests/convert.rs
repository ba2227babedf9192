//! Conversions between all kinds, judged by qemu-img and libvmdk; comparison; repair.

mod support;
#[path = "support/whole.rs"]
mod whole;

use std::{fs::File, os::unix::fs::FileExt, path::Path};

use backhaul_disk_image::{
    CreateOptions, Deep, DiskImage, ErrorKind, Kind, OpenOptions, RunState, Severity, Silent,
    create, open,
    ops::{ConvertOptions, Leaks, apply_repair, check, compare, convert, info, map, plan_repair},
};
use support::{Random, qemu, run, text};
use whole::{content, repair, repair_with};

const CREATABLE: [Kind; 8] = [
    Kind::Raw,
    Kind::MonolithicFlat,
    Kind::TwoGbMaxExtentFlat,
    Kind::Vmfs,
    Kind::MonolithicSparse,
    Kind::TwoGbMaxExtentSparse,
    Kind::StreamOptimized,
    Kind::FixedVhd,
];

/// A raw disk with noise, text, zeros and holes at places that are not whole grains.
fn raw_disk(path: &Path, size_bytes: u64) -> Box<dyn DiskImage> {
    let file = File::create(path).unwrap();
    file.set_len(size_bytes).unwrap();
    let mut random = Random(size_bytes | 1);
    for number in 0..40 {
        let at = random.below(size_bytes / 512) * 512;
        let length = (1 + random.below(300)) * 512;
        let mut bytes = vec![0; length.min(size_bytes - at) as usize];
        match number % 3 {
            0 => random.fill(&mut bytes),
            1 => bytes.fill(b'x'),
            _ => {}
        }
        file.write_all_at(&bytes, at).unwrap();
    }
    file.write_all_at(&[1; 512], size_bytes - 512).unwrap();
    open(path, &OpenOptions::read_only().of_kind(Kind::Raw)).unwrap()
}

fn format(kind: Kind) -> &'static str {
    match kind {
        Kind::Raw => "raw",
        Kind::FixedVhd => "vpc",
        _ => "vmdk",
    }
}

#[test]
fn every_kind_becomes_every_kind() {
    let dir = tempfile::tempdir().unwrap();
    for size_bytes in [512, 65_536 * 7 + 512, (66 << 20) + 1024] {
        let oracle = dir.path().join(format!("oracle-{size_bytes}.raw"));
        let source = raw_disk(&oracle, size_bytes);
        for first in CREATABLE {
            let one = dir.path().join(format!("{size_bytes}-{first}.vmdk"));
            let report = convert(source.as_ref(), &one, &ConvertOptions::new(first), &mut Silent);
            assert_eq!(report.unwrap().size_bytes, first.padded_bytes(size_bytes));
            qemu(&["compare", "-f", format(first), "-F", "raw", text(&one), text(&oracle)]);
            let opened = open(&one, &OpenOptions::read_only().of_kind(first)).unwrap();
            let checked = opened.check(Deep::Yes, &mut Silent).unwrap();
            assert!(checked.is_clean(), "{first}: {:?}", checked.findings);
            for second in CREATABLE {
                let two = dir.path().join(format!("{size_bytes}-{first}-{second}.vmdk"));
                convert(opened.as_ref(), &two, &ConvertOptions::new(second), &mut Silent).unwrap();
                let back = open(&two, &OpenOptions::read_only().of_kind(second)).unwrap();
                let same = compare(back.as_ref(), source.as_ref(), None, &mut Silent).unwrap();
                assert!(same.same_content, "{first} to {second}: {same:?}");
            }
        }
    }
}

#[test]
fn libvmdk_understands_what_we_make() {
    let dir = tempfile::tempdir().unwrap();
    let source = raw_disk(&dir.path().join("oracle.raw"), 3 << 20);
    for kind in CREATABLE.into_iter().filter(|kind| format(*kind) == "vmdk") {
        let image = dir.path().join(format!("{kind}.vmdk"));
        convert(source.as_ref(), &image, &ConvertOptions::new(kind), &mut Silent).unwrap();
        let (good, said) = run("vmdkinfo", "libvmdk-utils", &[text(&image)]);
        assert!(good && said.contains("3145728 bytes"), "{kind}: {said}");
    }
}

#[test]
fn a_stopped_conversion_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let source = raw_disk(&dir.path().join("oracle.raw"), 66 << 20);
    for kind in CREATABLE {
        let image = dir.path().join(format!("{kind}.vmdk"));
        let mut calls = 0;
        let mut stop = |_: u64, _: u64| {
            calls += 1;
            calls < 3
        };
        let error = convert(source.as_ref(), &image, &ConvertOptions::new(kind), &mut stop);
        assert_eq!(error.unwrap_err().kind(), ErrorKind::Cancelled);
        let left: Vec<_> =
            std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect();
        assert_eq!(left.len(), 1, "{kind} left {left:?}");
    }
}

#[test]
fn comparison_names_the_first_difference() {
    let dir = tempfile::tempdir().unwrap();
    let one = raw_disk(&dir.path().join("one.raw"), 40 << 20);
    let path = dir.path().join("two.vmdk");
    convert(one.as_ref(), &path, &ConvertOptions::new(Kind::MonolithicSparse), &mut Silent)
        .unwrap();
    let two = open(&path, &OpenOptions::writable()).unwrap();
    for at in [(39 << 20) + 5, (20 << 20) + 77] {
        let mut byte = [0];
        two.read_at(&mut byte, at).unwrap();
        two.write_at(&[byte[0] ^ 1], at).unwrap();
        let report = compare(one.as_ref(), two.as_ref(), None, &mut Silent).unwrap();
        assert_eq!(report.first_difference, Some(at));
        let report = compare(two.as_ref(), one.as_ref(), None, &mut Silent).unwrap();
        assert_eq!(report.first_difference, Some(at));
    }
}

#[test]
fn map_and_info_tell_what_is_stored_and_serialise() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("m.vmdk");
    let options = CreateOptions {
        zeroed_grains: true,
        ..CreateOptions::new(Kind::MonolithicSparse, 100 << 20)
    };
    create(&image, &options).unwrap();
    let opened = open(&image, &OpenOptions::writable()).unwrap();
    opened.write_at(&[1; 65_536], 1 << 20).unwrap();
    opened.flush().unwrap();
    let mut runs = Vec::new();
    let totals = map(opened.as_ref(), &mut |run| {
        runs.push((run.offset, run.length, run.state));
        true
    });
    let expected = [
        (0, 1 << 20, RunState::Unallocated),
        (1 << 20, 65_536, RunState::Data),
        ((1 << 20) + 65_536, (99 << 20) - 65_536, RunState::Unallocated),
    ];
    assert_eq!(runs, expected);
    assert_eq!(totals.unwrap().data_bytes, 65_536);
    drop(opened);
    let told = serde_json::to_value(info(&image, &OpenOptions::read_only()).unwrap()).unwrap();
    assert_eq!(told["kind"], "monolithicSparse");
    assert_eq!(told["extents"][0]["version"], 2);
}

/// A sparse image with every second grain written, closed.
fn sparse(path: &Path) -> Vec<u8> {
    create(path, &CreateOptions::new(Kind::MonolithicSparse, 64 << 20)).unwrap();
    let opened = open(path, &OpenOptions::writable()).unwrap();
    let mut model = vec![0; 64 << 20];
    for grain in (0..1024).step_by(2) {
        let range = grain * 65_536..(grain + 1) * 65_536;
        model[range.clone()].fill(1 + (grain % 251) as u8);
        opened.write_at(&model[range], grain as u64 * 65_536).unwrap();
    }
    opened.flush().unwrap();
    model
}

/// Byte of a copy of table 0: the redundant directory stands at sector 21, the primary at 21 + 9.
fn table_byte(file: &File, redundant: bool) -> u64 {
    let mut header = [0; 512];
    file.read_exact_at(&mut header, 0).unwrap();
    let at = if redundant { 48 } else { 56 };
    let directory = u64::from_le_bytes(header[at..at + 8].try_into().unwrap()) * 512;
    let mut entry = [0; 4];
    file.read_exact_at(&mut entry, directory).unwrap();
    u64::from(u32::from_le_bytes(entry)) * 512
}

#[test]
fn one_damaged_copy_is_read_from_the_other_and_repaired() {
    let dir = tempfile::tempdir().unwrap();
    for redundant in [false, true] {
        let image = dir.path().join(format!("{redundant}.vmdk"));
        let model = sparse(&image);
        let file = File::options().read(true).write(true).open(&image).unwrap();
        file.write_all_at(&[0xff; 1000], table_byte(&file, redundant)).unwrap();
        assert!(content(&image) == model);
        let before = check(&image, &OpenOptions::read_only(), Deep::No, &mut Silent).unwrap();
        assert!(before.redundancies > 0 && before.losses == 0, "{before:?}");
        assert!(before.findings.iter().any(|finding| finding.severity == Severity::Redundancy));
        assert_eq!(repair(&image), 0);
        let after = check(&image, &OpenOptions::read_only(), Deep::No, &mut Silent).unwrap();
        assert!(after.is_clean(), "{after:?}");
        assert!(content(&image) == model);
        qemu(&["check", "-f", "vmdk", text(&image)]);
    }
}

#[test]
fn a_directory_entry_that_cannot_be_is_read_from_the_other_copy_and_repaired() {
    let dir = tempfile::tempdir().unwrap();
    for field in [48, 56] {
        let image = dir.path().join(format!("{field}.vmdk"));
        let model = sparse(&image);
        let file = File::options().read(true).write(true).open(&image).unwrap();
        let mut header = [0; 512];
        file.read_exact_at(&mut header, 0).unwrap();
        let directory = u64::from_le_bytes(header[field..field + 8].try_into().unwrap()) * 512;
        file.write_all_at(&[0xfe; 4], directory).unwrap();
        assert!(content(&image) == model);
        assert_eq!(repair(&image), 0);
        let after = check(&image, &OpenOptions::read_only(), Deep::No, &mut Silent).unwrap();
        assert!(after.is_clean(), "{after:?}");
        assert!(content(&image) == model);
        let oracle = dir.path().join("oracle.raw");
        std::fs::write(&oracle, &model).unwrap();
        qemu(&["compare", "-f", "vmdk", "-F", "raw", text(&image), text(&oracle)]);
    }
}

#[test]
fn what_is_lost_in_both_copies_is_said_and_becomes_zeros() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("lost.vmdk");
    let mut model = sparse(&image);
    let file = File::options().read(true).write(true).open(&image).unwrap();
    for redundant in [false, true] {
        file.write_all_at(&[0xff; 4], table_byte(&file, redundant)).unwrap();
    }
    let opened = open(&image, &OpenOptions::read_only()).unwrap();
    let error = opened.read_at(&mut [0], 5).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Damaged, "{error}");
    opened.read_at(&mut [0], 65_536).unwrap();
    drop(opened);
    assert_eq!(repair(&image), 65_536);
    model[..65_536].fill(0);
    // The grain itself is still there, for whoever looks for it.
    assert_eq!(repair_with(&image, Leaks::Free), 0);
    assert!(content(&image) == model);
    let after = check(&image, &OpenOptions::read_only(), Deep::No, &mut Silent).unwrap();
    assert!(after.is_clean(), "{after:?}");
}

#[test]
fn grains_that_share_a_place_are_parted() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("shared.vmdk");
    let mut model = sparse(&image);
    let file = File::options().read(true).write(true).open(&image).unwrap();
    for redundant in [false, true] {
        let table = table_byte(&file, redundant);
        let mut entry = [0; 4];
        file.read_exact_at(&mut entry, table).unwrap();
        file.write_all_at(&entry, table + 8).unwrap();
    }
    let first = model[..65_536].to_vec();
    model[131_072..196_608].copy_from_slice(&first);
    let before = check(&image, &OpenOptions::read_only(), Deep::No, &mut Silent).unwrap();
    assert_eq!(before.losses, 1, "{before:?}");
    repair(&image);
    assert_eq!(repair_with(&image, Leaks::Free), 0);
    assert!(content(&image) == model);
    let after = check(&image, &OpenOptions::read_only(), Deep::No, &mut Silent).unwrap();
    assert!(after.is_clean(), "{after:?}");
    qemu(&["check", "-f", "vmdk", text(&image)]);
}

#[test]
fn leaked_space_is_found_and_given_back() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("leak.vmdk");
    let model = sparse(&image);
    let file = File::options().read(true).write(true).open(&image).unwrap();
    let length = file.metadata().unwrap().len();
    file.write_all_at(&[1; 65_536 * 3], length).unwrap();
    let before = check(&image, &OpenOptions::read_only(), Deep::No, &mut Silent).unwrap();
    assert_eq!((before.leaked_bytes, before.losses), (65_536 * 3, 0));
    assert_eq!(repair(&image), 0);
    assert_eq!(file.metadata().unwrap().len(), length + 65_536 * 3, "it was not asked for");
    assert_eq!(repair_with(&image, Leaks::Free), 0);
    assert_eq!(file.metadata().unwrap().len(), length);
    assert!(content(&image) == model);
}

/// Zeros in one copy of the metadata were read as zeros of the disk, without a word, and a repair of
/// a directory that was zeroed found the same damage again.
#[test]
fn zeros_in_one_copy_are_read_from_the_other_and_repaired() {
    let dir = tempfile::tempdir().unwrap();
    let oracle = dir.path().join("oracle.raw");
    for (by_qemu, redundant, whole_directory) in
        (0..8).map(|bits| (bits & 1 != 0, bits & 2 != 0, bits & 4 != 0))
    {
        let story =
            format!("by qemu {by_qemu}, redundant {redundant}, directory {whole_directory}");
        let image = dir.path().join("zeroed.vmdk");
        let _ = std::fs::remove_file(&image);
        let model = sparse(&image);
        std::fs::write(&oracle, &model).unwrap();
        if by_qemu {
            std::fs::remove_file(&image).unwrap();
            qemu(&["convert", "-f", "raw", "-O", "vmdk", text(&oracle), text(&image)]);
        }
        let whole = std::fs::read(&image).unwrap();
        let file = File::options().read(true).write(true).open(&image).unwrap();
        let mut header = [0; 512];
        file.read_exact_at(&mut header, 0).unwrap();
        let field = if redundant { 48 } else { 56 };
        let directory = u64::from_le_bytes(header[field..field + 8].try_into().unwrap()) * 512;
        match whole_directory {
            true => file.write_all_at(&[0; 8], directory).unwrap(),
            false => file.write_all_at(&[0; 2048], table_byte(&file, redundant)).unwrap(),
        }
        assert!(content(&image) == model, "{story}");
        let before = check(&image, &OpenOptions::read_only(), Deep::No, &mut Silent).unwrap();
        assert!(before.redundancies > 0 && before.losses == 0, "{story}: {before:?}");
        assert_eq!(repair(&image), 0, "{story}");
        let after = check(&image, &OpenOptions::read_only(), Deep::No, &mut Silent).unwrap();
        assert!(after.is_clean(), "{story}: {after:?}");
        assert!(std::fs::read(&image).unwrap() == whole, "{story}");
        qemu(&["check", "-f", "vmdk", text(&image)]);
        qemu(&["compare", "-f", "vmdk", "-F", "raw", text(&image), text(&oracle)]);
    }
}

/// An entry of the primary copy that led into the header's metadata was believed: the grain read as
/// metadata, without a word, and a repair put that over the redundant entry, which was right.
#[test]
fn an_entry_that_leads_into_the_metadata_is_taken_from_the_other_copy() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("low.vmdk");
    for low in [1_u32, 5, 40] {
        let model = sparse(&image);
        let file = File::options().read(true).write(true).open(&image).unwrap();
        file.write_all_at(&low.to_le_bytes(), table_byte(&file, false)).unwrap();
        assert!(content(&image) == model, "{low}");
        let before = check(&image, &OpenOptions::read_only(), Deep::No, &mut Silent).unwrap();
        assert!(before.redundancies > 0 && before.losses == 0, "{before:?}");
        assert_eq!(repair(&image), 0);
        assert!(content(&image) == model, "{low}");
        let after = check(&image, &OpenOptions::read_only(), Deep::No, &mut Silent).unwrap();
        assert!(after.is_clean(), "{after:?}");
        std::fs::remove_file(&image).unwrap();
    }
}

/// A writer of an image whose primary table or directory was zeroed wrote over nothing that only the
/// redundant copy names, and left the primary copy as it was.
#[test]
fn a_writer_makes_a_copy_that_is_behind_right() {
    let dir = tempfile::tempdir().unwrap();
    let (image, oracle) = (dir.path().join("behind.vmdk"), dir.path().join("oracle.raw"));
    for (whole_directory, at) in [(false, 0), (false, 65_536), (true, 0), (true, 65_536)] {
        let _ = std::fs::remove_file(&image);
        let mut model = sparse(&image);
        let file = File::options().read(true).write(true).open(&image).unwrap();
        let mut header = [0; 512];
        file.read_exact_at(&mut header, 0).unwrap();
        let directory = u64::from_le_bytes(header[56..64].try_into().unwrap()) * 512;
        match whole_directory {
            true => file.write_all_at(&[0; 4], directory).unwrap(),
            false => file.write_all_at(&[0; 2048], table_byte(&file, false)).unwrap(),
        }
        let opened = open(&image, &OpenOptions::writable()).unwrap();
        opened.write_at(&[77; 1000], at).unwrap();
        model[at as usize..at as usize + 1000].fill(77);
        opened.flush().unwrap();
        drop(opened);
        std::fs::write(&oracle, &model).unwrap();
        // qemu reads the primary copy alone.
        qemu(&["compare", "-f", "vmdk", "-F", "raw", text(&image), text(&oracle)]);
        let after = check(&image, &OpenOptions::read_only(), Deep::No, &mut Silent).unwrap();
        assert_eq!((after.losses, after.redundancies), (0, 0), "{after:?}");
    }
}

/// A primary entry that named another grain's place was believed, though the redundant one named a
/// grain that nothing else does: the right one was lost. Either of the two may come first.
#[test]
fn a_grain_in_anothers_place_is_taken_from_the_other_copy() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("shared.vmdk");
    for (wrong, named) in [(0, 4), (4, 0), (2, 600)] {
        let _ = std::fs::remove_file(&image);
        let model = sparse(&image);
        let file = File::options().read(true).write(true).open(&image).unwrap();
        let table = table_byte(&file, false);
        let mut entry = [0; 4];
        file.read_exact_at(&mut entry, table + named * 4).unwrap();
        file.write_all_at(&entry, table + wrong * 4).unwrap();
        let before = check(&image, &OpenOptions::read_only(), Deep::No, &mut Silent).unwrap();
        assert!(before.losses == 0 && before.redundancies > 0, "{before:?}");
        assert_eq!(repair(&image), 0);
        assert!(content(&image) == model, "{wrong}, {named}");
        let after = check(&image, &OpenOptions::read_only(), Deep::No, &mut Silent).unwrap();
        assert!(after.is_clean(), "{after:?}");
    }
}

/// Both directories were damaged, or gone, and the tables and grains were whole: the repair took the
/// grains for space that nothing uses, said that nothing would be lost, and cut all of them off.
#[test]
fn a_repair_gives_nothing_back_that_may_be_somebodys_data() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("lost.vmdk");
    let model = sparse(&image);
    let whole = std::fs::read(&image).unwrap();
    let directory = |at: usize| {
        let sector = u64::from_le_bytes(whole[at..at + 8].try_into().unwrap());
        sector as usize * 512
    };
    for byte in [0xff, 0] {
        let mut damaged = whole.clone();
        for place in [directory(48), directory(56)] {
            damaged[place..place + 4].fill(byte);
        }
        std::fs::write(&image, &damaged).unwrap();
        let plan =
            plan_repair(&image, &OpenOptions::read_only(), Leaks::Keep, &mut Silent).unwrap();
        apply_repair(&plan, &mut Silent).unwrap();
        // Whoever puts the directories back finds everything.
        let mut mended = std::fs::read(&image).unwrap();
        assert_eq!(mended.len(), whole.len(), "{byte}: {:?}", plan.fixes);
        for place in [directory(48), directory(56)] {
            mended[place..place + 4].copy_from_slice(&whole[place..place + 4]);
        }
        std::fs::write(&image, &mended).unwrap();
        assert!(content(&image) == model, "{byte}");
    }
}

/// What a stream holds is only known once it is inflated: a changed byte in a grain was called clean.
#[test]
fn a_repair_does_not_call_a_damaged_stream_clean() {
    let dir = tempfile::tempdir().unwrap();
    let source = raw_disk(&dir.path().join("oracle.raw"), 4 << 20);
    let image = dir.path().join("s.vmdk");
    convert(source.as_ref(), &image, &ConvertOptions::new(Kind::StreamOptimized), &mut Silent)
        .unwrap();
    let file = File::options().read(true).write(true).open(&image).unwrap();
    let mut byte = [0];
    let middle = file.metadata().unwrap().len() / 2;
    file.read_exact_at(&mut byte, middle).unwrap();
    file.write_all_at(&[byte[0] ^ 0x55], middle).unwrap();
    let plan = plan_repair(&image, &OpenOptions::read_only(), Leaks::Keep, &mut Silent).unwrap();
    assert!(plan.report.is_some_and(|report| report.losses > 0), "{:?}", plan.fixes);
}

/// A stream whose descriptor was damaged, with its end in place and one grain changed: a repair cut off
/// everything from that grain on, which mended nothing.
#[test]
fn a_stream_that_has_its_end_is_never_cut() {
    let dir = tempfile::tempdir().unwrap();
    let source = raw_disk(&dir.path().join("oracle.raw"), 66 << 20);
    let image = dir.path().join("s.vmdk");
    convert(source.as_ref(), &image, &ConvertOptions::new(Kind::StreamOptimized), &mut Silent)
        .unwrap();
    let mut damaged = std::fs::read(&image).unwrap();
    let cid = damaged.windows(4).position(|word| word == b"CID=").unwrap();
    damaged[cid] = b'X';
    let middle = damaged.len() / 2;
    damaged[middle..middle + 4096].fill(0xff);
    std::fs::write(&image, &damaged).unwrap();
    let plan = plan_repair(&image, &OpenOptions::read_only(), Leaks::Keep, &mut Silent);
    assert_eq!(plan.unwrap_err().kind(), ErrorKind::Damaged);
    // Nothing is left of this one but its head: an end would make nothing readable.
    std::fs::write(&image, &damaged[..600]).unwrap();
    plan_repair(&image, &OpenOptions::read_only(), Leaks::Keep, &mut Silent).unwrap_err();
}

#[test]
fn an_interrupted_stream_gets_its_end_again() {
    let dir = tempfile::tempdir().unwrap();
    let oracle = dir.path().join("oracle.raw");
    let source = raw_disk(&oracle, 66 << 20);
    let image = dir.path().join("s.vmdk");
    convert(source.as_ref(), &image, &ConvertOptions::new(Kind::StreamOptimized), &mut Silent)
        .unwrap();
    let whole = std::fs::read(&image).unwrap();
    for cut in [whole.len() - 1024, whole.len() - 512, whole.len() - 3000] {
        std::fs::write(&image, &whole[..cut]).unwrap();
        let error = open(&image, &OpenOptions::read_only()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Damaged, "{error}");
        repair(&image);
        qemu(&["compare", "-f", "vmdk", "-F", "raw", text(&image), text(&oracle)]);
    }
    // Cut within the grains, the first ones are still there.
    std::fs::write(&image, &whole[..whole.len() / 2]).unwrap();
    repair(&image);
    let opened = open(&image, &OpenOptions::read_only()).unwrap();
    let report = opened.check(Deep::Yes, &mut Silent).unwrap();
    assert!(report.is_clean() && report.grains_allocated > 0, "{report:?}");
}

#[test]
fn a_vhd_with_a_wrong_checksum_and_a_short_flat_extent_are_repaired() {
    let dir = tempfile::tempdir().unwrap();
    let vhd = dir.path().join("d.vhd");
    create(&vhd, &CreateOptions::new(Kind::FixedVhd, 4 << 20)).unwrap();
    let file = File::options().write(true).open(&vhd).unwrap();
    file.write_all_at(&[9], (4 << 20) + 80).unwrap();
    open(&vhd, &OpenOptions::read_only()).unwrap_err();
    assert_eq!(repair(&vhd), 0);
    open(&vhd, &OpenOptions::writable().of_kind(Kind::FixedVhd)).unwrap();
    let flat = dir.path().join("f.vmdk");
    create(&flat, &CreateOptions::new(Kind::Vmfs, 4 << 20)).unwrap();
    let extent = File::options().write(true).open(dir.path().join("f-flat.vmdk")).unwrap();
    extent.set_len(3 << 20).unwrap();
    open(&flat, &OpenOptions::read_only()).unwrap_err();
    assert_eq!(repair(&flat), 1 << 20);
    assert_eq!(content(&flat).len(), 4 << 20);
}

/// Changes eight bytes of a file.
fn put(path: &Path, at: u64, value: u64) {
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(&value.to_le_bytes(), at).unwrap();
}

#[test]
fn a_directory_pointer_that_leads_elsewhere_is_derived_and_repaired() {
    let dir = tempfile::tempdir().unwrap();
    let by_qemu = dir.path().join("by-qemu.vmdk");
    qemu(&["create", "-f", "vmdk", text(&by_qemu), "64M"]);
    let image = dir.path().join("d.vmdk");
    let model = sparse(&image);
    let whole = std::fs::read(&image).unwrap();
    // Beyond the file, 0, into a hole, the descriptor, a grain; one pointer, or both.
    for wrong in [1 << 40, u64::MAX >> 1, 0, 40, 1, 300] {
        for fields in [[48].as_slice(), &[56], &[48, 56]] {
            std::fs::write(&image, &whole).unwrap();
            fields.iter().for_each(|field| put(&image, *field, wrong));
            assert!(content(&image) == model, "{wrong}, {fields:?}");
            let report = check(&image, &OpenOptions::read_only(), Deep::No, &mut Silent).unwrap();
            assert_eq!((report.losses, report.redundancies), (0, fields.len() as u64));
            let error = open(&image, &OpenOptions::writable()).unwrap_err();
            assert!(error.to_string().contains("repair it before writing"), "{error}");
            let plan =
                plan_repair(&image, &OpenOptions::read_only(), Leaks::Keep, &mut Silent).unwrap();
            assert!(plan.fixes[0].sentence.contains("pointer to a grain directory"), "{plan:?}");
            assert_eq!(repair(&image), 0);
            assert!(std::fs::read(&image).unwrap() == whole, "{wrong}, {fields:?}");
        }
    }
    // qemu puts its directories at the same places.
    let before = std::fs::read(&by_qemu).unwrap();
    for field in [48, 56] {
        put(&by_qemu, field, 1 << 33);
        assert_eq!(repair(&by_qemu), 0);
        assert!(std::fs::read(&by_qemu).unwrap() == before);
    }
}

#[test]
fn a_damaged_header_of_a_stream_is_written_anew_from_its_footer() {
    let dir = tempfile::tempdir().unwrap();
    let source = raw_disk(&dir.path().join("oracle.raw"), 40 << 20);
    let image = dir.path().join("s.vmdk");
    convert(source.as_ref(), &image, &ConvertOptions::new(Kind::StreamOptimized), &mut Silent)
        .unwrap();
    let whole = std::fs::read(&image).unwrap();
    // Version, capacity (absurd, and merely wrong), size of a grain.
    for (at, value) in [(4, 77), (12, 0), (12, 4096), (20, 3), (20, 64)] {
        put(&image, at, value);
        let error = open(&image, &OpenOptions::read_only()).unwrap_err();
        if error.kind() == ErrorKind::Unsupported {
            std::fs::write(&image, &whole).unwrap();
            continue;
        }
        let plan =
            plan_repair(&image, &OpenOptions::read_only(), Leaks::Keep, &mut Silent).unwrap();
        assert!(plan.cannot_open.is_some() && plan.fixes.len() == 1, "{plan:?}");
        assert_eq!(repair(&image), 0);
        assert!(std::fs::read(&image).unwrap() == whole, "byte {at}");
    }
}

#[test]
fn a_vhd_whose_footer_has_another_size_is_repaired() {
    let dir = tempfile::tempdir().unwrap();
    let vhd = dir.path().join("d.vhd");
    for grown in [true, false] {
        let _ = std::fs::remove_file(&vhd);
        create(&vhd, &CreateOptions::new(Kind::FixedVhd, 4 << 20)).unwrap();
        let bytes = std::fs::read(&vhd).unwrap();
        let size = if grown { 6 << 20 } else { 3 << 20 };
        let mut changed = bytes[..4 << 20].to_vec();
        changed.resize(size, 0);
        changed[70_000..71_000].fill(5);
        let disk = changed.clone();
        changed.extend_from_slice(&bytes[4 << 20..]);
        std::fs::write(&vhd, changed).unwrap();
        let error = open(&vhd, &OpenOptions::read_only()).unwrap_err();
        assert!(error.to_string().contains("4194304"), "{error}");
        assert_eq!(repair(&vhd), 0);
        assert!(content(&vhd) == disk);
        let raw = dir.path().join("oracle.raw");
        std::fs::write(&raw, disk).unwrap();
        qemu(&["compare", "-f", "vpc", "-F", "raw", text(&vhd), text(&raw)]);
    }
}

#[test]
fn a_stream_of_a_disk_beyond_4_gib_is_read_by_qemu_and_back() {
    let dir = tempfile::tempdir().unwrap();
    let size_bytes = (5 << 30) + 512;
    let (oracle, image) = (dir.path().join("oracle.raw"), dir.path().join("s.vmdk"));
    let source = raw_disk(&oracle, size_bytes);
    convert(source.as_ref(), &image, &ConvertOptions::new(Kind::StreamOptimized), &mut Silent)
        .unwrap();
    qemu(&["compare", "-f", "vmdk", "-F", "raw", text(&image), text(&oracle)]);
    let (opened, back) =
        (open(&image, &OpenOptions::read_only()).unwrap(), dir.path().join("back.raw"));
    convert(opened.as_ref(), &back, &ConvertOptions::new(Kind::Raw), &mut Silent).unwrap();
    qemu(&["compare", "-f", "raw", "-F", "raw", text(&back), text(&oracle)]);
}

/// Without a sync, an image goes the other way through the page cache; it must be the same.
#[test]
fn a_conversion_that_need_not_be_durable_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let oracle = dir.path().join("oracle.raw");
    let source = raw_disk(&oracle, (66 << 20) + 1024);
    for kind in CREATABLE {
        let image = dir.path().join(format!("{kind}.vmdk"));
        let options = ConvertOptions { durable: false, ..ConvertOptions::new(kind) };
        convert(source.as_ref(), &image, &options, &mut Silent).unwrap();
        qemu(&["compare", "-f", format(kind), "-F", "raw", text(&image), text(&oracle)]);
        let opened = open(&image, &OpenOptions::read_only().of_kind(kind)).unwrap();
        assert!(opened.check(Deep::Yes, &mut Silent).unwrap().is_clean(), "{kind}");
    }
}
