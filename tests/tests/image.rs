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

#[test]
fn what_is_wrong_is_said_and_nothing_is_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("disk.raw");
    std::fs::write(&raw, content()).unwrap();
    let image = dir.path().join("image.vmdk");
    good(&["convert", "-f", "raw", "-O", "monolithicSparse", text(&raw), text(&image)]);
    let before = std::fs::read(&image).unwrap();
    let again =
        backhaul(&["convert", "-f", "raw", "-O", "monolithicSparse", text(&raw), text(&image)]);
    assert_eq!(again.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&again.stderr).contains("image.vmdk"));
    assert_eq!(std::fs::read(&image).unwrap(), before);

    let mut other = content();
    other[1_000_000] ^= 1;
    let different = dir.path().join("other.raw");
    std::fs::write(&different, other).unwrap();
    let differs = backhaul(&["compare", text(&image), text(&different)]);
    assert_eq!(differs.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&differs.stdout).contains("first at byte 1000000"));

    // A grain table entry that points beyond the file.
    let mut damaged = before.clone();
    let table = u64::from_le_bytes(damaged[56..64].try_into().unwrap()) as usize * 512;
    let first = u32::from_le_bytes(damaged[table..table + 4].try_into().unwrap()) as usize * 512;
    damaged[first + 4..first + 8].copy_from_slice(&0x00ff_ffffu32.to_le_bytes());
    std::fs::write(&image, &damaged).unwrap();
    let checked = backhaul(&["check", text(&image)]);
    assert_eq!(checked.status.code(), Some(3), "{}", String::from_utf8_lossy(&checked.stderr));
    let refused = backhaul(&["repair", text(&image)]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--yes"));
    assert_eq!(std::fs::read(&image).unwrap(), damaged, "nothing is done without being asked");
    good(&["repair", "--yes", text(&image)]);
    good(&["check", text(&image)]);
    backhaul_tests::compare(&raw, &image).unwrap();

    let nonsense = backhaul(&["info", "-f", "vmfs", text(&raw)]);
    assert_eq!(nonsense.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&nonsense.stderr).contains("disk.raw"));
}
