//! `backhaul image`, as an administrator uses it; qemu-img and qemu-io judge.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use backhaul_lab::random::Random;

/// No multiple of a grain.
const DISK_BYTES: usize = (5 << 20) + 1536;

const KINDS: [&str; 8] = [
    "raw",
    "monolithicFlat",
    "twoGbMaxExtentFlat",
    "vmfs",
    "monolithicSparse",
    "twoGbMaxExtentSparse",
    "streamOptimized",
    "vhd",
];

fn backhaul(words: &[&str]) -> Output {
    let program = backhaul_tests::programs().join("backhaul");
    Command::new(program).arg("image").args(words).output().unwrap()
}

fn good(words: &[&str]) -> String {
    let output = backhaul(words);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn image_path(dir: &Path, kind: &str) -> PathBuf {
    let ending = match kind {
        "raw" => "raw",
        "vhd" => "vhd",
        _ => "vmdk",
    };
    dir.join(format!("{kind}.{ending}"))
}

/// A disk with data, zeros that are written, and holes.
fn content() -> Vec<u8> {
    let mut disk = vec![0; DISK_BYTES];
    Random::new(91).fill(&mut disk[70_000..1_500_000]);
    Random::new(92).fill(&mut disk[DISK_BYTES - 700..]);
    disk
}

/// Fails unless the image holds `disk`, as somebody else reads it.
fn judge(image: &Path, kind: &str, raw: &Path) {
    if kind == "vhd" {
        // qemu takes a fixed VHD's size from its geometry; the data before the footer are the disk.
        let (found, expected) = (std::fs::read(image).unwrap(), std::fs::read(raw).unwrap());
        assert_eq!(found.len(), expected.len() + 512);
        return assert!(found[..expected.len()] == expected);
    }
    backhaul_tests::compare(raw, image).unwrap_or_else(|error| panic!("{kind}: {error}"));
}

#[test]
fn every_kind_is_converted_into_every_other() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("disk.raw");
    std::fs::write(&raw, content()).unwrap();
    for from in KINDS {
        let source_dir = dir.path().join(from);
        std::fs::create_dir(&source_dir).unwrap();
        let source = image_path(&source_dir, from);
        good(&["convert", "-f", "raw", "-O", from, text(&raw), text(&source)]);
        judge(&source, from, &raw);
        for to in KINDS {
            let folder = source_dir.join(to);
            std::fs::create_dir(&folder).unwrap();
            let target = image_path(&folder, to);
            good(&["convert", "-f", from, "-O", to, text(&source), text(&target)]);
            judge(&target, to, &raw);
            assert!(good(&["compare", text(&source), text(&target)]).contains("are equal"));
            std::fs::remove_dir_all(&folder).unwrap();
        }
    }
}

#[test]
fn a_chain_is_read_as_one_disk_and_json_is_for_programs() {
    let dir = tempfile::tempdir().unwrap();
    let (base, delta) = (dir.path().join("base.vmdk"), dir.path().join("delta.vmdk"));
    good(&["create", "-O", "monolithicSparse", "--size", "8MiB", text(&base)]);
    let io = |image: &Path, command: &str| {
        let output = Command::new("qemu-io")
            .args(["-f", "vmdk", "-c", command, text(image)])
            .output()
            .expect("qemu-io is missing: install the Debian package qemu-utils");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    io(&base, "write -P 0x11 0 1M");
    good(&["create", "-O", "monolithicSparse", "--parent", text(&base), text(&delta)]);
    io(&delta, "write -P 0x22 512k 1M");
    let raw = dir.path().join("flat.raw");
    good(&["convert", "-O", "raw", text(&delta), text(&raw)]);
    let disk = std::fs::read(&raw).unwrap();
    assert_eq!(disk.len(), 8 << 20);
    assert!(disk[..512 << 10].iter().all(|byte| *byte == 0x11));
    assert!(disk[512 << 10..1536 << 10].iter().all(|byte| *byte == 0x22));
    assert!(disk[1536 << 10..].iter().all(|byte| *byte == 0));

    let info: serde_json::Value =
        serde_json::from_str(&good(&["info", "--json", text(&delta)])).unwrap();
    assert_eq!(info["kind"], "monolithicSparse", "{info}");
    assert_eq!(info["size_bytes"], 8 << 20, "{info}");
    assert_eq!(info["parent"]["path"], text(&base), "{info}");
    let map: serde_json::Value =
        serde_json::from_str(&good(&["map", "--json", text(&delta)])).unwrap();
    assert_eq!(map["totals"]["data_bytes"], 1536 << 10, "{map}");
    let check: serde_json::Value =
        serde_json::from_str(&good(&["check", "--json", text(&delta)])).unwrap();
    assert_eq!(check["losses"], 0, "{check}");
}

/// Changes the first grain table's first entry so that it points beyond the file.
fn damage(image: &Path) -> Vec<u8> {
    let mut bytes = std::fs::read(image).unwrap();
    let table = u64::from_le_bytes(bytes[56..64].try_into().unwrap()) as usize * 512;
    let first = u32::from_le_bytes(bytes[table..table + 4].try_into().unwrap()) as usize * 512;
    bytes[first + 4..first + 8].copy_from_slice(&0x00ff_ffffu32.to_le_bytes());
    std::fs::write(image, &bytes).unwrap();
    bytes
}

fn json(words: &[&str]) -> (Option<i32>, serde_json::Value) {
    let output = backhaul(&[words, &["--json"]].concat());
    let said = String::from_utf8_lossy(&output.stdout);
    let value = serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}"));
    (output.status.code(), value)
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn what_qemu_makes_of_every_subformat_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("disk.raw");
    let mut disk = content();
    // qemu rounds its disks up to a grain where the kind has grains.
    disk.resize(6 << 20, 0);
    std::fs::write(&raw, &disk).unwrap();
    let subformats = [
        "monolithicFlat",
        "twoGbMaxExtentFlat",
        "monolithicSparse",
        "twoGbMaxExtentSparse",
        "streamOptimized",
    ];
    for from in subformats {
        let theirs = dir.path().join(format!("{from}.vmdk"));
        let made = Command::new("qemu-img")
            .args(["convert", "-f", "raw", "-O", "vmdk", "-o"])
            .arg(format!("subformat={from}"))
            .args([&raw, &theirs])
            .output()
            .expect("qemu-img is missing: install the Debian package qemu-utils");
        assert!(made.status.success(), "{}", said(&made));
        let (code, info) = json(&["info", text(&theirs)]);
        assert_eq!(
            (code, &info["kind"], &info["size_bytes"]),
            (Some(0), &from.into(), &(6 << 20).into())
        );
        good(&["check", "--deep", text(&theirs)]);
        good(&["compare", "-F", "raw", text(&theirs), text(&raw)]);
        for to in KINDS {
            let folder = dir.path().join(format!("{from}-{to}"));
            std::fs::create_dir(&folder).unwrap();
            let target = image_path(&folder, to);
            good(&["convert", "-f", from, "-O", to, text(&theirs), text(&target)]);
            judge(&target, to, &raw);
        }
    }
}

#[test]
fn compare_and_check_tell_by_their_exit_codes() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, image) = (dir.path().join("disk.raw"), dir.path().join("image.vmdk"));
    std::fs::write(&raw, content()).unwrap();
    good(&["convert", "-f", "raw", "-O", "monolithicSparse", text(&raw), text(&image)]);
    assert_eq!(json(&["check", text(&image)]).0, Some(0));

    let mut other = content();
    other[1_000_000] ^= 1;
    let different = dir.path().join("other.raw");
    std::fs::write(&different, other).unwrap();
    let (code, report) = json(&["compare", text(&image), text(&different)]);
    assert_eq!((code, &report["first_difference"]), (Some(1), &1_000_000.into()), "{report}");
    let differs = backhaul(&["compare", text(&image), text(&different)]);
    assert!(String::from_utf8_lossy(&differs.stdout).contains("first at byte 1000000"));
    let nowhere = backhaul(&["compare", text(&image), "nowhere.vmdk"]);
    assert_eq!(nowhere.status.code(), Some(2));
    assert_eq!(said(&nowhere).matches("No such file").count(), 1, "{}", said(&nowhere));
    assert_eq!(
        backhaul(&["compare", "-F", "vhd", text(&image), text(&raw)]).status.code(),
        Some(2)
    );

    damage(&image);
    let (code, report) = json(&["check", text(&image)]);
    assert_eq!(
        (code, report["findings"][0]["path"].as_str()),
        (Some(3), image.to_str()),
        "{report}"
    );
}

#[test]
fn repair_does_nothing_without_being_asked() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, image) = (dir.path().join("disk.raw"), dir.path().join("image.vmdk"));
    std::fs::write(&raw, content()).unwrap();
    good(&["convert", "-f", "raw", "-O", "monolithicSparse", text(&raw), text(&image)]);
    let damaged = damage(&image);
    let refused = backhaul(&["repair", text(&image)]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(said(&refused).contains("--yes"), "{}", said(&refused));
    assert!(String::from_utf8_lossy(&refused.stdout).contains("fixes"), "the plan is shown");
    let (code, answer) = json(&["repair", text(&image)]);
    assert_eq!((code, &answer["applied"]), (Some(3), &0.into()), "{answer}");
    assert!(!answer["plan"]["fixes"].as_array().unwrap().is_empty(), "{answer}");
    assert_eq!(std::fs::read(&image).unwrap(), damaged);
    let (code, answer) = json(&["repair", "--yes", text(&image)]);
    assert_eq!((code, &answer["clean"]), (Some(0), &true.into()), "{answer}");
    good(&["check", text(&image)]);
    backhaul_tests::compare(&raw, &image).unwrap();
}

#[test]
fn an_image_is_replaced_only_by_force_and_only_by_a_whole_one() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, image) = (dir.path().join("disk.raw"), dir.path().join("image.vmdk"));
    std::fs::write(&raw, content()).unwrap();
    let names = || -> Vec<String> {
        let entries = std::fs::read_dir(dir.path()).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    good(&["convert", "-f", "raw", "-O", "vmfs", text(&raw), text(&image)]);
    let before = std::fs::read(&image).unwrap();
    let again = backhaul(&["convert", "-O", "monolithicSparse", text(&raw), text(&image)]);
    assert_eq!(again.status.code(), Some(1));
    assert!(
        said(&again).contains("image.vmdk") && said(&again).contains("--force"),
        "{}",
        said(&again)
    );
    assert_eq!(std::fs::read(&image).unwrap(), before);

    // Each kind has other files; those of the old image go.
    for (kind, files) in [
        ("twoGbMaxExtentSparse", ["disk.raw", "image-s001.vmdk", "image.vmdk"].as_slice()),
        ("monolithicSparse", &["disk.raw", "image.vmdk"]),
        ("streamOptimized", &["disk.raw", "image.vmdk"]),
        ("vmfs", &["disk.raw", "image-flat.vmdk", "image.vmdk"]),
    ] {
        good(&["convert", "--force", "-f", "raw", "-O", kind, text(&raw), text(&image)]);
        assert_eq!(names(), files);
        judge(&image, kind, &raw);
    }
    // The source is never replaced, nor a file that is no part of the old image.
    let itself = backhaul(&["convert", "--force", "-O", "raw", text(&image), text(&image)]);
    assert_eq!(itself.status.code(), Some(1));
    assert!(said(&itself).contains("holds what is to be converted"), "{}", said(&itself));
    std::fs::write(dir.path().join("image-s001.vmdk"), "somebody's").unwrap();
    let files = names();
    let split = ["convert", "--force", "-O", "twoGbMaxExtentSparse", text(&raw), text(&image)];
    assert_eq!(backhaul(&split).status.code(), Some(1));
    assert_eq!(names(), files, "nothing is left behind");
    judge(&image, "vmfs", &raw);
}

#[test]
fn what_is_wrong_is_said_in_one_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("disk.raw");
    std::fs::write(&raw, content()).unwrap();
    let image = dir.path().join("image.vmdk");
    for (words, expected) in [
        (["info", "-f", "vmfs", text(&raw)].as_slice(), "disk.raw"),
        (&["convert", "-O", "seSparse", text(&raw), text(&image)], "choose another kind"),
        (&["create", "-O", "vmfs", "--size", "1000", text(&image)], "multiple of 512"),
        (&["create", "-O", "vmfs", "--parent", text(&raw), text(&image)], "cannot be a delta"),
        (&["map", text(&image)], "No such file"),
    ] {
        let output = backhaul(words);
        assert_eq!(output.status.code(), Some(1), "{words:?}");
        assert!(said(&output).contains(expected), "{words:?}: {}", said(&output));
        assert_eq!(said(&output).lines().count(), 1, "{words:?}: {}", said(&output));
        let (code, failure) = json(words);
        assert_eq!(code, Some(1));
        assert!(failure["sentence"].as_str().unwrap().contains(expected), "{failure}");
        assert!(!image.exists(), "{words:?}");
    }
}
