//! What we make, qemu must read; what qemu makes, we must read and write.

mod support;

use std::{os::unix::fs::FileExt, path::Path};

use backhaul_disk_image::{
    CreateOptions, Deep, DiskImage, ErrorKind, Kind, OpenOptions, Silent, create, open,
};
use support::{Random, qemu, qemu_img, qemu_io, text};

/// The format's name in qemu.
fn format(kind: Kind) -> &'static str {
    match kind {
        Kind::Raw => "raw",
        Kind::FixedVhd => "vpc",
        _ => "vmdk",
    }
}

const WRITABLE_KINDS: [Kind; 7] = [
    Kind::Raw,
    Kind::MonolithicFlat,
    Kind::TwoGbMaxExtentFlat,
    Kind::Vmfs,
    Kind::MonolithicSparse,
    Kind::TwoGbMaxExtentSparse,
    Kind::FixedVhd,
];

/// Pieces of a disk that are likely to show a mistake, with their content.
fn pieces(size_bytes: u64, random: &mut Random) -> Vec<(u64, Vec<u8>)> {
    let mut pieces = Vec::new();
    let mut places = vec![(0, 512), (size_bytes - 512, 512), (size_bytes / 2 / 512 * 512, 1536)];
    places.extend([(65_536 - 512, 1024), (3 << 20, 200_000 / 512 * 512), ((2 << 30) - 512, 1024)]);
    places.extend([((32 << 20) - 65_536, 131_072), ((2047 << 20) - 512, 1024)]);
    for (at, length) in places {
        if at < size_bytes {
            let mut bytes = vec![0; length.min((size_bytes - at) as usize)];
            random.fill(&mut bytes);
            pieces.push((at, bytes));
        }
    }
    pieces
}

fn check_clean(image: &dyn DiskImage) {
    let report = image.check(Deep::Yes, &mut Silent).unwrap();
    assert!(report.is_clean(), "{}: {:?}", image.path().display(), report.findings);
}

#[test]
fn qemu_reads_what_we_write_in_every_kind_and_size() {
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random(0x1234_5678_9abc);
    for kind in WRITABLE_KINDS {
        for size_bytes in [512, 513 * 512, (100 << 20) + 512, (5 << 30) + 1536, (3 << 40) + 512] {
            let huge = size_bytes > 1 << 40;
            if huge
                && matches!(
                    kind,
                    Kind::TwoGbMaxExtentFlat | Kind::TwoGbMaxExtentSparse | Kind::FixedVhd
                )
            {
                // Some 1,500 files; and more than qemu lets a VHD have.
                continue;
            }
            let image = dir.path().join(format!("{kind}-{size_bytes} disk.vmdk"));
            create(&image, &CreateOptions::new(kind, size_bytes)).unwrap();
            let opened = open(&image, &OpenOptions::writable().of_kind(kind)).unwrap();
            assert_eq!((opened.size_bytes(), opened.kind()), (size_bytes, kind));
            let oracle = dir.path().join("oracle.raw");
            let raw = std::fs::File::create(&oracle).unwrap();
            raw.set_len(size_bytes).unwrap();
            for (at, bytes) in pieces(size_bytes, &mut random) {
                opened.write_at(&bytes, at).unwrap();
                raw.write_all_at(&bytes, at).unwrap();
            }
            opened.flush().unwrap();
            check_clean(opened.as_ref());
            drop(opened);
            let format = format(kind);
            let info = qemu(&["info", "-f", format, "--output=json", text(&image)]);
            assert!(info.contains(&format!("\"virtual-size\": {size_bytes}")), "{info}");
            if format == "vmdk" {
                assert!(info.contains(&format!("\"create-type\": \"{kind}\"")), "{info}");
                if !matches!(kind, Kind::MonolithicFlat | Kind::Vmfs | Kind::TwoGbMaxExtentFlat) {
                    qemu(&["check", "-f", "vmdk", text(&image)]);
                }
            }
            if huge {
                // qemu walks every cluster of a terabyte to compare it; a few reads say as much.
                let read = |at: u64, byte: u8| format!("read -P {byte} {at} 512");
                let last = std::fs::File::open(&oracle).unwrap();
                let mut sector = [0; 512];
                last.read_exact_at(&mut sector, size_bytes - 512).unwrap();
                assert_ne!(sector, [0; 512]);
                let opened = open(&image, &OpenOptions::writable().of_kind(kind)).unwrap();
                opened.write_at(&[7; 512], size_bytes - 512).unwrap();
                opened.flush().unwrap();
                drop(opened);
                let said = qemu_io(format, &image, &[read(size_bytes - 512, 7), read(1 << 40, 0)]);
                assert!(!said.contains("Pattern verification failed"), "{said}");
            } else {
                qemu(&["compare", "-f", format, "-F", "raw", text(&image), text(&oracle)]);
            }
        }
    }
}

#[test]
fn we_read_and_write_what_qemu_makes() {
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random(77);
    let formats = [
        "monolithicFlat",
        "twoGbMaxExtentFlat",
        "monolithicSparse",
        "twoGbMaxExtentSparse",
        "streamOptimized",
    ];
    for subformat in formats {
        for size_bytes in [512, 333 * 512, (40 << 20) + 512, (5_u64 << 30) + 512] {
            let source = dir.path().join("source.raw");
            let raw = std::fs::File::create(&source).unwrap();
            raw.set_len(size_bytes).unwrap();
            for (at, bytes) in pieces(size_bytes, &mut random) {
                raw.write_all_at(&bytes, at).unwrap();
            }
            let image = dir.path().join(format!("{subformat}-{size_bytes}.vmdk"));
            let options = format!("subformat={subformat}");
            let convert = ["convert", "-f", "raw", "-O", "vmdk", "-o"];
            qemu(&[&convert[..], &[&options, text(&source), text(&image)]].concat());
            let kind: Kind = subformat.parse().unwrap();
            let opened = open(&image, &OpenOptions::read_only().of_kind(kind)).unwrap();
            assert_eq!(opened.size_bytes(), size_bytes);
            check_clean(opened.as_ref());
            compare(opened.as_ref(), &source);
            drop(opened);
            if !kind.is_writable() {
                let error = open(&image, &OpenOptions::writable()).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::ReadOnly, "{error}");
                continue;
            }
            let opened = open(&image, &OpenOptions::writable()).unwrap();
            let old = opened.content_id();
            for (at, bytes) in pieces(size_bytes, &mut random) {
                opened.write_at(&bytes, at).unwrap();
                raw.write_all_at(&bytes, at).unwrap();
            }
            opened.flush().unwrap();
            assert_ne!(opened.content_id(), old);
            drop(opened);
            qemu(&["compare", "-f", "vmdk", "-F", "raw", text(&image), text(&source)]);
        }
    }
}

/// Every stored byte of `image` is what `raw` has there, and nothing is stored elsewhere.
fn compare(image: &dyn DiskImage, raw: &Path) {
    let raw = std::fs::File::open(raw).unwrap();
    let mut next = 0;
    for run in image.extents(0, image.size_bytes()) {
        let run = run.unwrap();
        assert_eq!(run.offset, next);
        next += run.length;
        if run.length > 64 << 20 {
            assert_ne!(run.state, backhaul_disk_image::RunState::Data);
            continue;
        }
        let (mut ours, mut theirs) = (vec![1; run.length as usize], vec![2; run.length as usize]);
        image.read_at(&mut ours, run.offset).unwrap();
        raw.read_exact_at(&mut theirs, run.offset).unwrap();
        assert!(ours == theirs, "differs in {run:?}");
    }
    assert_eq!(next, image.size_bytes());
}

#[test]
fn qemu_io_and_we_write_by_turns() {
    let dir = tempfile::tempdir().unwrap();
    for kind in WRITABLE_KINDS.into_iter().filter(|kind| *kind != Kind::FixedVhd) {
        let size_bytes = (70 << 20) + 512;
        let image = dir.path().join(format!("turns-{kind}.vmdk"));
        create(&image, &CreateOptions::new(kind, size_bytes)).unwrap();
        let mut model = vec![0_u8; size_bytes as usize];
        let mut random = Random(5);
        for turn in 0..6 {
            let opened = open(&image, &OpenOptions::writable().of_kind(kind)).unwrap();
            let mut commands = Vec::new();
            for _ in 0..20 {
                let at = random.below(size_bytes / 512) * 512;
                let length = ((1 + random.below(400)) * 512).min(size_bytes - at) as usize;
                let byte = (random.next() % 255) as u8 + 1;
                let range = at as usize..at as usize + length;
                model[range.clone()].fill(byte);
                if turn % 2 == 0 {
                    opened.write_at(&model[range], at).unwrap();
                } else {
                    commands.push(format!("write -P {byte} {at} {length}"));
                }
            }
            opened.flush().unwrap();
            drop(opened);
            if !commands.is_empty() {
                qemu_io(format(kind), &image, &commands);
            }
            let mut found = vec![0; model.len()];
            let opened = open(&image, &OpenOptions::read_only().of_kind(kind)).unwrap();
            opened.read_at(&mut found, 0).unwrap();
            assert!(found == model, "{kind}, turn {turn}");
            check_clean(opened.as_ref());
        }
    }
}

#[test]
fn zeroed_grains_are_understood_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("zeroed.vmdk");
    let options = CreateOptions {
        zeroed_grains: true,
        ..CreateOptions::new(Kind::MonolithicSparse, 10 << 20)
    };
    create(&image, &options).unwrap();
    let child = dir.path().join("child.vmdk");
    {
        let base = open(&image, &OpenOptions::writable()).unwrap();
        base.write_at(&vec![9; 10 << 20], 0).unwrap();
        base.flush().unwrap();
    }
    create(&child, &CreateOptions { parent: Some(image.clone()), ..options }).unwrap();
    let opened = open(&child, &OpenOptions::writable()).unwrap();
    opened.write_zeroes_at(1 << 20, 1 << 20).unwrap();
    opened.write_zeroes_at((5 << 20) + 512, 65_536).unwrap();
    opened.write_at(&[3; 512], (1 << 20) + 65_536 + 512).unwrap();
    opened.flush().unwrap();
    let mut model = vec![9; 10 << 20];
    model[1 << 20..2 << 20].fill(0);
    model[(5 << 20) + 512..(5 << 20) + 512 + 65_536].fill(0);
    model[(1 << 20) + 66_048..(1 << 20) + 66_560].fill(3);
    let mut found = vec![0; 10 << 20];
    opened.read_at(&mut found, 0).unwrap();
    assert!(found == model);
    check_clean(opened.as_ref());
    drop(opened);
    let oracle = dir.path().join("oracle.raw");
    std::fs::write(&oracle, &model).unwrap();
    qemu(&["compare", "-f", "vmdk", "-F", "raw", text(&child), text(&oracle)]);
    qemu_io("vmdk", &child, &["write -z 7M 1M".into()]);
    model[7 << 20..8 << 20].fill(0);
    let opened = open(&child, &OpenOptions::read_only()).unwrap();
    opened.read_at(&mut found, 0).unwrap();
    assert!(found == model);
}

#[test]
fn chains_of_qemu_open_as_one_disk_and_a_changed_parent_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let size = 20 << 20;
    qemu(&["create", "-f", "vmdk", text(&path("base.vmdk")), "20M"]);
    qemu_io("vmdk", &path("base.vmdk"), &["write -P 1 0 5M".into()]);
    let make = ["create", "-f", "vmdk", "-F", "vmdk", "-b"];
    qemu(&[&make[..], &["base.vmdk", text(&path("one.vmdk"))]].concat());
    qemu_io("vmdk", &path("one.vmdk"), &["write -P 2 1M 1M".into()]);
    let options = CreateOptions {
        parent: Some(path("one.vmdk")),
        ..CreateOptions::new(Kind::MonolithicSparse, size)
    };
    create(&path("two.vmdk"), &options).unwrap();
    let opened = open(&path("two.vmdk"), &OpenOptions::writable()).unwrap();
    opened.write_at(&[3; 1000], (2 << 20) + 7).unwrap();
    opened.flush().unwrap();
    let mut model = vec![0; size as usize];
    model[..5 << 20].fill(1);
    model[1 << 20..2 << 20].fill(2);
    model[(2 << 20) + 7..(2 << 20) + 1007].fill(3);
    let mut found = vec![7; size as usize];
    opened.read_at(&mut found, 0).unwrap();
    assert!(found == model);
    let info = opened.info().unwrap();
    assert!(info.parent.is_some_and(|parent| parent.parent.is_some()));
    drop(opened);
    let oracle = path("oracle.raw");
    std::fs::write(&oracle, &model).unwrap();
    qemu(&["compare", "-f", "vmdk", "-F", "raw", text(&path("two.vmdk")), text(&oracle)]);
    {
        let base = open(&path("base.vmdk"), &OpenOptions::writable()).unwrap();
        base.write_at(&[9], 0).unwrap();
        base.flush().unwrap();
    }
    let error = open(&path("two.vmdk"), &OpenOptions::read_only()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Chain, "{error}");
    assert!(error.to_string().contains("was changed"), "{error}");
}

#[test]
fn a_disk_of_62_tib_can_be_sparse() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("huge.vmdk");
    let size_bytes = 62 << 40;
    create(&image, &CreateOptions::new(Kind::MonolithicSparse, size_bytes)).unwrap();
    let opened = open(&image, &OpenOptions::writable()).unwrap();
    opened.write_at(&[1; 4096], size_bytes - 4096).unwrap();
    opened.write_at(&[2; 4096], 31 << 40).unwrap();
    opened.flush().unwrap();
    let info = opened.info().unwrap();
    assert!(info.stored_bytes < 64 << 20, "{}", info.stored_bytes);
    drop(opened);
    let info = qemu(&["info", "--output=json", text(&image)]);
    assert!(info.contains(&format!("\"virtual-size\": {size_bytes}")), "{info}");
    let read = format!("read -P 1 {} 4096", size_bytes - 4096);
    let said = qemu_io("vmdk", &image, &[read, format!("read -P 2 {} 4096", 31_u64 << 40)]);
    assert!(!said.contains("Pattern verification failed"), "{said}");
}

#[test]
fn trimmed_grains_are_freed_and_used_again() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("trim.vmdk");
    create(&image, &CreateOptions::new(Kind::MonolithicSparse, 64 << 20)).unwrap();
    let opened = open(&image, &OpenOptions::writable()).unwrap();
    opened.write_at(&vec![1; 8 << 20], 0).unwrap();
    opened.flush().unwrap();
    let full = opened.info().unwrap().extents[0].file_bytes;
    opened.trim(0, 4 << 20).unwrap();
    opened.flush().unwrap();
    assert!(opened.info().unwrap().stored_bytes < 5 << 20);
    for grain in 0..64 {
        opened.write_at(&vec![2; 65_536], (32 << 20) + grain * 65_536).unwrap();
    }
    opened.flush().unwrap();
    assert_eq!(opened.info().unwrap().extents[0].file_bytes, full);
    check_clean(opened.as_ref());
    drop(opened);
    let (good, said) = qemu_img(&["check", "-f", "vmdk", text(&image)]);
    assert!(good, "{said}");
}

#[test]
fn a_second_writer_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for kind in WRITABLE_KINDS {
        let image = dir.path().join(format!("{kind}.image"));
        create(&image, &CreateOptions::new(kind, 1 << 20)).unwrap();
        let first = open(&image, &OpenOptions::writable()).unwrap();
        let second = open(&image, &OpenOptions::writable()).unwrap_err();
        assert_eq!(second.kind(), ErrorKind::Busy, "{second}");
        let reader = open(&image, &OpenOptions::read_only()).unwrap_err();
        assert_eq!(reader.kind(), ErrorKind::Busy, "{reader}");
        open(&image, &OpenOptions { shared: true, ..OpenOptions::read_only() }).unwrap();
        drop(first);
        open(&image, &OpenOptions::writable()).unwrap();
        let exists = create(&image, &CreateOptions::new(kind, 1 << 20)).unwrap_err();
        assert_eq!(exists.kind(), ErrorKind::Exists, "{exists}");
    }
}

#[test]
fn what_is_wrong_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("d.vmdk");
    let say = |text: &str| {
        std::fs::write(&image, text).unwrap();
        open(&image, &OpenOptions::writable()).unwrap_err().to_string()
    };
    let head = "# Disk DescriptorFile\nversion=1\nCID=12345678\ncreateType=\"vmfs\"\n";
    let snapshot = say(&head.replace("vmfs", "seSparse"));
    assert!(snapshot.contains("a seSparse snapshot is only read"), "{snapshot}");
    let outside = say(&format!("{head}RW 8 VMFS \"../d-flat.vmdk\"\n"));
    assert!(outside.contains("leaves the descriptor's folder"), "{outside}");
    let huge = say(&format!("{head}RW 99999999999999999 VMFS \"d-flat.vmdk\"\n"));
    assert!(huge.contains("line 5"), "{huge}");
    let missing = say(&format!("{head}RW 8 VMFS \"d-flat.vmdk\"\n"));
    assert!(missing.contains("cannot open") && missing.contains("d-flat.vmdk"), "{missing}");
    std::fs::write(dir.path().join("d-flat.vmdk"), [0; 512]).unwrap();
    let short = say(&format!("{head}RW 8 VMFS \"d-flat.vmdk\"\n"));
    assert!(short.contains("has 512 bytes, but its descriptor needs 4096"), "{short}");
}

/// Ranges of a disk that hold data, neighbours joined.
fn joined(ranges: impl Iterator<Item = (u64, u64)>) -> Vec<(u64, u64)> {
    let mut all: Vec<(u64, u64)> = Vec::new();
    for (start, end) in ranges {
        match all.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => all.push((start, end)),
        }
    }
    all
}

#[test]
fn our_map_is_that_of_qemu() {
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random(31);
    for kind in [Kind::MonolithicSparse, Kind::TwoGbMaxExtentSparse] {
        let size_bytes = (3 << 30) + 512;
        let base = dir.path().join(format!("map-{kind}.vmdk"));
        create(&base, &CreateOptions::new(kind, size_bytes)).unwrap();
        let child = dir.path().join(format!("map-{kind}-child.vmdk"));
        for (path, parent) in [(&base, None), (&child, Some(base.clone()))] {
            if parent.is_some() {
                create(path, &CreateOptions { parent, ..CreateOptions::new(kind, size_bytes) })
                    .unwrap();
            }
            let image = open(path, &OpenOptions::writable()).unwrap();
            for (at, bytes) in pieces(size_bytes, &mut random) {
                image.write_at(&bytes, at).unwrap();
            }
            image.write_at(&[1; 4096], random.below(size_bytes / 2)).unwrap();
            image.flush().unwrap();
            let ours = image.extents(0, size_bytes).map(|run| run.unwrap());
            let ours = ours.filter(|run| run.state == backhaul_disk_image::RunState::Data);
            let ours = joined(ours.map(|run| (run.offset, run.offset + run.length)));
            drop(image);
            let said = qemu(&["map", "-f", "vmdk", "--output=json", text(path)]);
            let said: serde_json::Value = serde_json::from_str(&said).unwrap();
            let runs = said.as_array().unwrap().iter().filter(|run| run["data"] == true);
            let theirs = joined(runs.map(|run| {
                let (start, length) = (run["start"].as_u64(), run["length"].as_u64());
                (start.unwrap(), start.unwrap() + length.unwrap())
            }));
            assert_eq!(ours, theirs, "{}", path.display());
        }
    }
}
