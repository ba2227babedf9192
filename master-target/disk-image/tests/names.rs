//! Names, encodings and line ends that descriptors come with, and sizes that hurt.

mod support;

use std::{ffi::OsStr, fs::File, os::unix::ffi::OsStrExt, os::unix::fs::FileExt, path::Path};

use backhaul_disk_image::{
    CreateOptions, ErrorKind, Kind, OpenOptions, RunState, Silent, create, open,
    ops::{ConvertOptions, compare, convert, map},
};
use support::{qemu, text};

fn write_disk(dir: &Path, extent: &OsStr, descriptor: &[u8]) -> std::path::PathBuf {
    let file = File::create(dir.join(extent)).unwrap();
    file.set_len(8 * 512).unwrap();
    file.write_all_at(b"hello", 512).unwrap();
    let path = dir.join("d.vmdk");
    std::fs::write(&path, descriptor).unwrap();
    path
}

#[test]
fn names_of_every_sort_are_found() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("sub")).unwrap();
    let head = "# Disk DescriptorFile\nversion=1\nCID=00000001\ncreateType=\"monolithicFlat\"\n";
    let cases: [(&[u8], &[u8], &str); 7] = [
        (b"plain.vmdk", b"plain.vmdk", ""),
        (b"with blanks  in it.vmdk", b"with blanks  in it.vmdk", ""),
        (b"it's \"quoted\".vmdk", b"it's \"quoted\".vmdk", ""),
        (
            "B\u{fc}ro \u{20ac}.vmdk".as_bytes(),
            "B\u{fc}ro \u{20ac}.vmdk".as_bytes(),
            "encoding=\"UTF-8\"\n",
        ),
        ("B\u{fc}ro \u{20ac}.vmdk".as_bytes(), b"B\xfcro \x80.vmdk", "encoding=\"windows-1252\"\n"),
        (b"B\xfcro.vmdk", b"B\xfcro.vmdk", "encoding=\"windows-1252\"\n"),
        (b"sub/deep.vmdk", b"sub/deep.vmdk", ""),
    ];
    for (file, named, encoding) in cases {
        for line_end in ["\n", "\r\n"] {
            let mut descriptor = format!("{head}{encoding}# keep me\nRW 8 FLAT \"").into_bytes();
            descriptor.extend_from_slice(named);
            descriptor.extend_from_slice(b"\" 0\n\nddb.mine = \"kept\"\n");
            let descriptor: Vec<u8> = descriptor
                .split(|byte| *byte == b'\n')
                .collect::<Vec<_>>()
                .join(line_end.as_bytes());
            let path = write_disk(dir.path(), OsStr::from_bytes(file), &descriptor);
            let image = open(&path, &OpenOptions::writable()).unwrap();
            let mut found = [0; 5];
            image.read_at(&mut found, 512).unwrap();
            assert_eq!(&found, b"hello");
            image.write_at(b"x", 0).unwrap();
            image.flush().unwrap();
            let id = image.content_id().unwrap().to_string();
            drop(image);
            // Only the content id is another one.
            let expected = String::from_utf8_lossy(&descriptor).replace("00000001", &id);
            let now = std::fs::read(&path).unwrap();
            assert_eq!(String::from_utf8_lossy(&now), expected);
        }
    }
}

#[test]
fn a_longer_content_id_does_not_run_into_the_tables() {
    let dir = tempfile::tempdir().unwrap();
    for padded in [true, false] {
        let path = dir.path().join(format!("{padded}.vmdk"));
        create(&path, &CreateOptions::new(Kind::MonolithicSparse, 1 << 20)).unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        let area = String::from_utf8(bytes[512..21 * 512].to_vec()).unwrap();
        let (before, after) = area.split_once("CID=").unwrap();
        let mut short = format!("{before}CID=1{}", &after[8..]).into_bytes();
        short.resize(20 * 512, if padded { 0 } else { b'#' });
        bytes[512..21 * 512].copy_from_slice(&short);
        let tables = bytes[21 * 512..].to_vec();
        std::fs::write(&path, &bytes).unwrap();
        let image = open(&path, &OpenOptions::writable()).unwrap();
        let written = image.write_at(&[1; 512], 0).and_then(|()| image.flush());
        drop(image);
        if padded {
            written.unwrap();
            qemu(&["check", "-f", "vmdk", text(&path)]);
        } else {
            assert_eq!(written.unwrap_err().kind(), ErrorKind::Full);
            assert!(std::fs::read(&path).unwrap()[21 * 512..] == tables);
        }
        open(&path, &OpenOptions::read_only()).unwrap();
    }
}

#[test]
fn ways_out_of_the_folder_are_closed() {
    let dir = tempfile::tempdir().unwrap();
    let inner = dir.path().join("inner");
    std::fs::create_dir(&inner).unwrap();
    std::fs::write(dir.path().join("secret"), [1; 4096]).unwrap();
    std::os::unix::fs::symlink(dir.path().join("secret"), inner.join("link")).unwrap();
    let absolute = dir.path().join("secret");
    for name in ["../secret", "link", text(&absolute), "x/../../secret"] {
        let descriptor = format!(
            "# Disk DescriptorFile\nversion=1\nCID=1\ncreateType=\"vmfs\"\nRW 8 VMFS \"{name}\"\n"
        );
        let path = inner.join("d.vmdk");
        std::fs::write(&path, descriptor).unwrap();
        let error = open(&path, &OpenOptions::read_only()).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Outside | ErrorKind::Io), "{name}: {error}");
        assert!(!error.to_string().contains("Permission"), "{error}");
    }
    let trusted = OpenOptions { allow_outside: true, ..OpenOptions::read_only() };
    let descriptor =
        "# Disk DescriptorFile\nversion=1\nCID=1\ncreateType=\"vmfs\"\nRW 8 VMFS \"../secret\"\n";
    std::fs::write(inner.join("d.vmdk"), descriptor).unwrap();
    open(&inner.join("d.vmdk"), &trusted).unwrap();
}

#[test]
fn a_stream_of_a_disk_beyond_4_gib_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let size_bytes = (9 << 30) + 512;
    let raw = dir.path().join("big.raw");
    let file = File::create(&raw).unwrap();
    file.set_len(size_bytes).unwrap();
    for at in [0, (2 << 30) - 700, (4 << 30) - 300, (4 << 30) + 65_536 * 3, size_bytes - 512] {
        file.write_all_at(&[(at >> 9) as u8 | 1; 512], at).unwrap();
    }
    let source = open(&raw, &OpenOptions::read_only().of_kind(Kind::Raw)).unwrap();
    let stream = dir.path().join("big.vmdk");
    convert(source.as_ref(), &stream, &ConvertOptions::new(Kind::StreamOptimized), &mut Silent)
        .unwrap();
    let opened = open(&stream, &OpenOptions::read_only()).unwrap();
    assert!(compare(opened.as_ref(), source.as_ref(), None, &mut Silent).unwrap().same_content);
    let back = dir.path().join("back.raw");
    qemu(&["convert", "-f", "vmdk", "-O", "raw", text(&stream), text(&back)]);
    let back = open(&back, &OpenOptions::read_only().of_kind(Kind::Raw)).unwrap();
    assert!(compare(back.as_ref(), source.as_ref(), None, &mut Silent).unwrap().same_content);
    // And one that qemu made.
    let theirs = dir.path().join("theirs.vmdk");
    let make = ["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized"];
    qemu(&[&make[..], &[text(&raw), text(&theirs)]].concat());
    let theirs = open(&theirs, &OpenOptions::read_only()).unwrap();
    assert!(compare(theirs.as_ref(), source.as_ref(), None, &mut Silent).unwrap().same_content);
}

#[test]
fn the_map_of_an_empty_disk_of_62_tib_is_one_run() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("empty.vmdk");
    create(&path, &CreateOptions::new(Kind::MonolithicSparse, 62 << 40)).unwrap();
    let image = open(&path, &OpenOptions::read_only()).unwrap();
    let mut runs = Vec::new();
    map(image.as_ref(), &mut |run| {
        runs.push((run.length, run.state));
        true
    })
    .unwrap();
    assert_eq!(runs, [(62 << 40, RunState::Unallocated)]);
    let report = image.check(backhaul_disk_image::Deep::No, &mut Silent).unwrap();
    assert!(report.is_clean(), "{report:?}");
}

#[test]
fn a_thick_disk_takes_its_space_and_a_thin_one_says_that_it_is_thin() {
    let dir = tempfile::tempdir().unwrap();
    for thin in [true, false] {
        let path = dir.path().join(format!("{thin}.vmdk"));
        create(&path, &CreateOptions { thin, ..CreateOptions::new(Kind::Vmfs, 8 << 20) }).unwrap();
        let info = open(&path, &OpenOptions::read_only()).unwrap().info().unwrap();
        assert_eq!(info.thin, thin);
        assert_eq!(info.stored_bytes >= 8 << 20, !thin);
        let descriptor = std::fs::read_to_string(&path).unwrap();
        assert_eq!(descriptor.contains("ddb.thinProvisioned = \"1\""), thin);
        assert!(descriptor.contains("ddb.uuid = \"60 00 c2 9"), "{descriptor}");
        assert!(descriptor.contains("ddb.longContentID"), "{descriptor}");
    }
}

/// The tables name places of up to 2 TiB in the file: what goes beyond is refused, and what was
/// written before stays.
#[test]
fn a_sparse_file_of_2_tib_is_full_and_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (path, oracle) = (dir.path().join("full.vmdk"), dir.path().join("oracle.raw"));
    let grain = 65_536;
    create(&path, &CreateOptions::new(Kind::MonolithicSparse, 64 << 20)).unwrap();
    File::options().write(true).open(&path).unwrap().set_len((2 << 40) - 3 * grain).unwrap();
    let image = open(&path, &OpenOptions::writable()).unwrap();
    let mut model = vec![0; 64 << 20];
    let mut refused = Vec::new();
    for number in 0..4_u64 {
        let bytes = vec![number as u8 + 1; grain as usize];
        match image.write_at(&bytes, number * 2 * grain) {
            Ok(()) => model[(number * 2 * grain) as usize..][..bytes.len()].copy_from_slice(&bytes),
            Err(error) => refused.push(error.kind()),
        }
    }
    assert_eq!(refused, [ErrorKind::Full, ErrorKind::Full]);
    image.flush().unwrap();
    drop(image);
    std::fs::write(&oracle, model).unwrap();
    qemu(&["compare", "-f", "vmdk", "-F", "raw", text(&path), text(&oracle)]);
}
