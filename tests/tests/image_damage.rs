//! `backhaul image check`, `compare` and `repair` on images that are damaged, and a conversion of them;
//! qemu-img judges.

use std::path::Path;

use backhaul_tests::image_command::{backhaul, content, good, image_path, json, judge, said, text};

/// Changes the first grain table's first entry so that it points beyond the file.
fn damage(image: &Path) -> Vec<u8> {
    let mut bytes = std::fs::read(image).unwrap();
    let table = u64::from_le_bytes(bytes[56..64].try_into().unwrap()) as usize * 512;
    let first = u32::from_le_bytes(bytes[table..table + 4].try_into().unwrap()) as usize * 512;
    bytes[first + 4..first + 8].copy_from_slice(&0x00ff_ffffu32.to_le_bytes());
    std::fs::write(image, &bytes).unwrap();
    bytes
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

/// A check of what could not be opened for its damage ended as a command that failed.
#[test]
fn a_check_of_an_image_that_cannot_be_opened_finds_damage() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image.vhd");
    good(&["create", "-O", "vhd", "--size", "1M", text(&image)]);
    let mut bytes = std::fs::read(&image).unwrap();
    let checksum = bytes.len() - 512 + 64;
    bytes[checksum] ^= 1;
    std::fs::write(&image, bytes).unwrap();
    let checked = backhaul(&["check", text(&image)]);
    assert_eq!(checked.status.code(), Some(3), "{}", said(&checked));
    good(&["repair", "--yes", text(&image)]);
    good(&["check", text(&image)]);
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
    assert!(String::from_utf8_lossy(&refused.stdout).contains("1 fix;"), "the plan is shown");
    let (code, answer) = json(&["repair", text(&image)]);
    assert_eq!((code, &answer["applied"]), (Some(3), &0.into()), "{answer}");
    assert!(!answer["plan"]["fixes"].as_array().unwrap().is_empty(), "{answer}");
    assert_eq!(std::fs::read(&image).unwrap(), damaged);
    let (code, answer) = json(&["repair", "--yes", text(&image)]);
    assert_eq!((code, &answer["clean"]), (Some(0), &true.into()), "{answer}");
    good(&["check", text(&image)]);
    backhaul_tests::compare(&raw, &image).unwrap();
}

/// A conversion said nothing of damage that it read around, where a check did.
#[test]
fn a_conversion_tells_the_damage_that_it_met() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, image) = (dir.path().join("disk.raw"), dir.path().join("image.vmdk"));
    std::fs::write(&raw, content()).unwrap();
    good(&["convert", "-f", "raw", "-O", "monolithicSparse", text(&raw), text(&image)]);
    let whole = std::fs::read(&image).unwrap();
    let quiet = backhaul(&["convert", "-O", "raw", text(&image), text(&dir.path().join("0.raw"))]);
    assert!(quiet.status.success() && said(&quiet).is_empty(), "{}", said(&quiet));

    damage(&image);
    let back = dir.path().join("1.raw");
    let told = backhaul(&["convert", "-O", "raw", text(&image), text(&back)]);
    assert!(told.status.success(), "{}", said(&told));
    for words in ["image.vmdk", "a grain table is damaged", "image check"] {
        assert!(said(&told).contains(words), "{}", said(&told));
    }
    assert!(std::fs::read(&back).unwrap() == content());
    let third = dir.path().join("2.raw");
    let (_, report) = json(&["convert", "-O", "raw", text(&image), text(&third)]);
    assert_eq!(report["findings"][0]["severity"], "redundancy", "{report}");

    // One place for two grains, in both copies: one of the two is gone.
    let mut shared = whole;
    for field in [48, 56] {
        let at = |at: usize| u32::from_le_bytes(shared[at..at + 4].try_into().unwrap()) as usize;
        let table = at(at(field) * 512) * 512;
        let entry = shared[table + 4..table + 8].to_vec();
        shared[table + 8..table + 12].copy_from_slice(&entry);
    }
    std::fs::write(&image, shared).unwrap();
    let refused =
        backhaul(&["convert", "-O", "raw", text(&image), text(&dir.path().join("3.raw"))]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(said(&refused).contains("shares its place"), "{}", said(&refused));
    let (_, answer) = json(&["repair", text(&image)]);
    assert_eq!(answer["plan"]["lost_bytes"], 65_536, "{answer}");
}

#[test]
fn leaked_space_is_given_back_only_where_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, image) = (dir.path().join("disk.raw"), dir.path().join("image.vmdk"));
    std::fs::write(&raw, content()).unwrap();
    good(&["convert", "-f", "raw", "-O", "monolithicSparse", text(&raw), text(&image)]);
    let mut bytes = std::fs::read(&image).unwrap();
    let whole = bytes.len();
    bytes.resize(whole + 3 * 65_536, 7);
    std::fs::write(&image, &bytes).unwrap();
    let kept = backhaul(&["repair", "--yes", text(&image)]);
    let told = String::from_utf8_lossy(&kept.stdout).into_owned();
    assert!(told.contains("196608 bytes") && told.contains("--free-leaks"), "{told}");
    assert!(std::fs::read(&image).unwrap() == bytes);
    let (code, answer) = json(&["repair", "--yes", "--free-leaks", text(&image)]);
    assert_eq!((code, &answer["clean"]), (Some(0), &true.into()), "{answer}");
    assert!(std::fs::read(&image).unwrap() == bytes[..whole]);
    backhaul_tests::compare(&raw, &image).unwrap();
}

#[test]
fn headers_and_footers_are_repaired_after_their_plan_was_shown() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("disk.raw");
    std::fs::write(&raw, content()).unwrap();
    for (kind, from_end, at, bytes, plan) in [
        ("monolithicSparse", false, 56, [0xfe; 3].as_slice(), "pointer to a grain directory"),
        ("monolithicSparse", false, 48, &[0xfe; 3], "pointer to a grain directory"),
        ("streamOptimized", false, 12, &[0; 8], "from its footer"),
        ("vhd", true, 512 - 50, &[1], "new VHD footer"),
    ] {
        let image = image_path(dir.path(), kind);
        let _ = std::fs::remove_file(&image);
        good(&["convert", "-f", "raw", "-O", kind, text(&raw), text(&image)]);
        let mut damaged = std::fs::read(&image).unwrap();
        let at = if from_end { damaged.len() - at } else { at };
        damaged[at..at + bytes.len()].copy_from_slice(bytes);
        std::fs::write(&image, &damaged).unwrap();
        let shown = backhaul(&["repair", text(&image)]);
        let text_shown = String::from_utf8_lossy(&shown.stdout).replace(['\n', '│'], " ");
        let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(words(&text_shown).contains(plan), "{kind}: {text_shown} {}", said(&shown));
        assert!(std::fs::read(&image).unwrap() == damaged, "{kind}");
        let (code, answer) = json(&["repair", "--yes", text(&image)]);
        assert_eq!((code, &answer["clean"]), (Some(0), &true.into()), "{kind}: {answer}");
        judge(&image, kind, &raw);
    }
}
