//! `backhaul image`, as an administrator uses it; qemu-img and qemu-io judge.

use std::path::Path;
use std::process::Command;

use backhaul_tests::image_command::{
    DISK_BYTES, backhaul, content, good, image_path, json, judge, said, text,
};

#[path = "../../master-target/disk-image/tests/support/esxi.rs"]
mod esxi;

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
            let compared = good(&["compare", text(&source), text(&target)]);
            assert!(compared.contains("are equal"), "{compared}");
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

/// The reasons were guesses: a killed run, another program.
#[test]
fn a_target_that_cannot_be_is_told_with_the_right_reason() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, image) = (dir.path().join("disk.raw"), dir.path().join("image.vmdk"));
    std::fs::write(&raw, content()).unwrap();
    good(&["convert", "-f", "raw", "-O", "monolithicSparse", text(&raw), text(&image)]);
    for folder in [raw.clone(), raw.join("deeper")] {
        let refused =
            backhaul(&["convert", "-O", "vmfs", text(&image), text(&folder.join("x.vmdk"))]);
        assert_eq!(refused.status.code(), Some(1));
        assert!(said(&refused).contains("is a file, where a folder must be"), "{}", said(&refused));
    }
    let link = dir.path().join("link.vmdk");
    std::fs::hard_link(&image, &link).unwrap();
    let refused = backhaul(&["convert", "-O", "vmfs", "--force", text(&image), text(&link)]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(said(&refused).contains("two names of one file"), "{}", said(&refused));
    backhaul_tests::compare(&raw, &link).unwrap();
}

/// A loop device over a file full of somebody's old data, detached at the end.
struct LoopDevice(String);

impl LoopDevice {
    fn over(file: &Path) -> Self {
        let output = Command::new("losetup").args(["--find", "--show"]).arg(file).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Self(String::from_utf8(output.stdout).unwrap().trim().to_owned())
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

/// A block device is the only thing that is overwritten in place: by force, when it is free and large
/// enough, and with zeros where the disk has none of its own data.
#[test]
fn a_disk_is_written_over_a_block_device_by_force() {
    if !backhaul_tests::is_root() || !Path::new("/dev/loop-control").exists() {
        println!("skipped: loop devices need root and the kernel's module");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (raw, image) = (dir.path().join("disk.raw"), dir.path().join("image.vmdk"));
    std::fs::write(&raw, content()).unwrap();
    good(&["convert", "-f", "raw", "-O", "monolithicSparse", text(&raw), text(&image)]);
    let backing = dir.path().join("backing");
    let old = vec![0xaa; DISK_BYTES + (1 << 20)];
    std::fs::write(&backing, &old).unwrap();
    let device = LoopDevice::over(&backing);
    let onto = |more: &[&str]| backhaul(&[&["convert", text(&image), &device.0], more].concat());
    for (more, words) in [
        (["-O", "raw"].as_slice(), ["block device", "--force"]),
        (&["-O", "vmfs", "--force"], ["block device", "-O raw"]),
    ] {
        let refused = onto(more);
        assert_eq!(refused.status.code(), Some(1));
        let said = said(&refused);
        assert!(said.contains(&device.0) && words.iter().all(|word| said.contains(word)), "{said}");
    }
    assert!(std::fs::read(&device.0).unwrap() == old, "a refusal changes nothing");

    let force = ["-O", "raw", "--force"];
    let done = onto(&force);
    assert!(done.status.success(), "{}", said(&done));
    let now = std::fs::read(&device.0).unwrap();
    assert!(now[..DISK_BYTES] == content(), "the disk, holes included");
    assert!(now[DISK_BYTES..] == old[DISK_BYTES..], "what lies behind it is as it was");

    // The way back: what is on the device is the source now.
    let itself = backhaul(&["convert", "-O", "raw", "--force", &device.0, &device.0]);
    assert!(said(&itself).contains("holds what is to be converted"), "{}", said(&itself));

    let mounted = dir.path().join("mounted");
    std::fs::create_dir(&mounted).unwrap();
    let run = |program: &str, words: &[&str]| {
        let output = Command::new(program).args(words).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    run("mkfs.ext4", &["-q", "-F", &device.0]);
    run("mount", &[&device.0, text(&mounted)]);
    let used = onto(&force);
    run("umount", &[text(&mounted)]);
    assert!(said(&used).contains("is in use"), "{}", said(&used));
    drop(device);

    std::fs::write(&backing, vec![0xaa; 1 << 20]).unwrap();
    let small = LoopDevice::over(&backing);
    let refused = backhaul(&[&["convert", text(&image), &small.0], &force[..]].concat());
    assert!(said(&refused).contains("does not fit"), "{}", said(&refused));
    assert!(std::fs::read(&small.0).unwrap() == vec![0xaa; 1 << 20]);
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
    // An extent without its descriptor is what is named: it is what has to be moved away.
    std::fs::remove_file(&image).unwrap();
    let orphan = backhaul(&["convert", "-O", "vmfs", text(&raw), text(&image)]);
    assert!(said(&orphan).contains("image-flat.vmdk: exists already"), "{}", said(&orphan));
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
        assert_eq!(failure["code"], "failed");
        assert!(!image.exists(), "{words:?}");
    }
}

/// An image in more files than the usual limit of 1,024 was made and then could not be opened.
#[test]
fn an_image_of_many_files_is_opened_or_says_what_it_needs() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("many.vmdk");
    let limited = |limit: &str, words: &[&str]| {
        let program = backhaul_tests::programs().join("backhaul");
        let mut command = Command::new("prlimit");
        command.arg(format!("--nofile={limit}")).arg(program).arg("image").args(words);
        command.output().expect("prlimit is missing: install the Debian package util-linux")
    };
    let create = ["create", "-O", "twoGbMaxExtentFlat", "--size", "240GiB", text(&image)];
    let made = limited("64:1024", &create);
    assert!(made.status.success(), "{}", said(&made));
    let told = limited("100:100", &["info", text(&image)]);
    assert_eq!(told.status.code(), Some(1));
    for words in ["many.vmdk: it has 121 extents", "the 100 files", "ulimit -n 342"] {
        assert!(said(&told).contains(words), "{}", said(&told));
    }
}

/// Errors named a hidden file that nobody had named, and no mend.
#[test]
fn a_full_disk_is_told_of_the_image_that_was_asked_for() {
    if !backhaul_tests::is_root() {
        println!("skipped: a small file system needs root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (raw, small) = (dir.path().join("disk.raw"), dir.path().join("small"));
    std::fs::write(&raw, content()).unwrap();
    std::fs::create_dir(&small).unwrap();
    let mut mount = Command::new("mount");
    mount.args(["-t", "tmpfs", "-o", "size=512k", "tmpfs"]).arg(&small);
    if !mount.status().unwrap().success() {
        println!("skipped: a tmpfs cannot be mounted here");
        return;
    }
    let told = KINDS.map(|kind| {
        let image = image_path(&small, kind);
        let told = backhaul(&["convert", "-f", "raw", "-O", kind, text(&raw), text(&image)]);
        let left = std::fs::read_dir(&small).unwrap().count();
        (kind, told.status.code(), said(&told), left)
    });
    assert!(Command::new("umount").arg(&small).status().unwrap().success());
    for (kind, code, said, left) in told {
        assert_eq!((code, left), (Some(1), 0), "{kind}: {said}");
        assert!(said.starts_with(&format!("{}/{kind}", text(&small))), "{said}");
        assert!(said.contains("No space left") && said.contains("free some space"), "{said}");
    }
}

/// A stream whose first sector was zeroed was taken for a raw disk, and its compressed bytes for the
/// guest's; the repair of one that was cut off said that nothing was lost.
#[test]
fn a_vmdk_without_its_head_is_no_raw_disk_and_one_without_its_end_lost_something() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, image) = (dir.path().join("disk.raw"), dir.path().join("image.vmdk"));
    std::fs::write(&raw, content()).unwrap();
    good(&["convert", "-f", "raw", "-O", "streamOptimized", text(&raw), text(&image)]);
    let whole = std::fs::read(&image).unwrap();

    let mut headless = whole.clone();
    headless[..512].fill(0);
    std::fs::write(&image, &headless).unwrap();
    let refused = backhaul(&["info", text(&image)]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(said(&refused).contains("repair the image"), "{}", said(&refused));
    good(&["info", "-f", "raw", text(&image)]);
    let (code, answer) = json(&["repair", "--yes", text(&image)]);
    assert_eq!((code, &answer["clean"]), (Some(0), &true.into()), "{answer}");
    judge(&image, "streamOptimized", &raw);

    std::fs::write(&image, vec![0; 4096]).unwrap();
    let refused = backhaul(&["info", text(&image)]);
    assert!(said(&refused).contains("(-f raw)"), "{}", said(&refused));

    // Grains 1 to 22 hold data, and the last; the end without the footer holds them all.
    for (length, lost) in [(1_000_000, true), (whole.len() - 512, false)] {
        std::fs::write(&image, &whole[..length]).unwrap();
        let (_, answer) = json(&["repair", text(&image)]);
        let lost_bytes = answer["plan"]["lost_bytes"].as_u64().unwrap();
        assert_eq!(lost_bytes > 3 << 20 && lost_bytes < DISK_BYTES as u64, lost, "{answer}");
        let sentence = answer["plan"]["fixes"][0]["sentence"].as_str().unwrap();
        assert_eq!(sentence.contains(&format!("at most {lost_bytes} bytes")), lost, "{answer}");
    }
}

/// The issue wants every name; a double quote was refused for kinds with a descriptor.
#[test]
fn quotes_in_a_name_are_written_and_read_by_us_and_by_qemu() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("disk.raw");
    let mut disk = content();
    disk.resize(6 << 20, 0);
    std::fs::write(&raw, disk).unwrap();
    for kind in KINDS {
        let folder = dir.path().join(kind);
        std::fs::create_dir(&folder).unwrap();
        let ending = image_path(&folder, kind).extension().unwrap().to_owned();
        let image = folder.join("it's \"Büro\" 1").with_extension(ending);
        good(&["convert", "-f", "raw", "-O", kind, text(&raw), text(&image)]);
        judge(&image, kind, &raw);
        good(&["convert", "--force", "-f", "raw", "-O", "vmfs", text(&raw), text(&image)]);
        good(&["compare", "-f", "vmfs", "-F", "raw", text(&image), text(&raw)]);
    }
    let parent = dir.path().join("a\"b.vmdk");
    good(&["create", "-O", "monolithicSparse", "--size", "1M", text(&parent)]);
    let delta = dir.path().join("delta.vmdk");
    let refused =
        backhaul(&["create", "-O", "monolithicSparse", "--parent", text(&parent), text(&delta)]);
    assert!(said(&refused).contains("double quote"), "{}", said(&refused));
}

#[test]
fn a_vhd_says_who_takes_it() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("large.vhd");
    for (size, words) in [("2040GiB", None), ("2041GiB", Some("2,040 GiB"))] {
        let (code, info) = json(&["create", "-O", "vhd", "--size", size, text(&image)]);
        let sentence = info["findings"][0]["sentence"].as_str();
        assert_eq!(code, Some(0), "{info}");
        assert_eq!(words.is_none(), sentence.is_none(), "{info}");
        assert!(words.is_none_or(|words| sentence.unwrap().contains(words)), "{info}");
        std::fs::remove_file(&image).unwrap();
    }
    let refused = backhaul(&["create", "-O", "vhd", "--size", "33T", text(&image)]);
    assert!(said(&refused).contains("32 TiB"), "{}", said(&refused));
}

#[test]
fn what_was_created_is_told_to_programs() {
    let dir = tempfile::tempdir().unwrap();
    for (number, kind) in KINDS.into_iter().enumerate() {
        let folder = dir.path().join(number.to_string());
        std::fs::create_dir(&folder).unwrap();
        let image = image_path(&folder, kind);
        let (code, info) = json(&["create", "-O", kind, "--size", "3MiB", text(&image)]);
        assert_eq!((code, info["kind"].as_str()), (Some(0), Some(kind)), "{info}");
        assert_eq!(info["size_bytes"], 3 << 20, "{info}");
        assert_eq!(info["path"].as_str(), image.canonicalize().unwrap().to_str(), "{info}");
        let extents = info["extents"].as_array().unwrap();
        assert!(extents.iter().all(|extent| extent["path"].as_str().is_some()), "{info}");
        let (code, failure) = json(&["create", "-O", kind, "--size", "3MiB", text(&image)]);
        assert_eq!((code, &failure["code"]), (Some(1), &"failed".into()), "{failure}");
        assert!(failure["sentence"].as_str().unwrap().contains(text(&image)), "{failure}");
    }
}

#[test]
fn a_vhd_is_padded_to_whole_mib_and_that_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, image) = (dir.path().join("disk.raw"), dir.path().join("disk.vhd"));
    std::fs::write(&raw, content()).unwrap();
    let said = good(&["convert", "-f", "raw", "-O", "vhd", text(&raw), text(&image)]);
    let padding = (6 << 20) - DISK_BYTES;
    assert!(said.contains(&format!("{padding} zero bytes were added")), "{said}");
    judge(&image, "vhd", &raw);
    let other = dir.path().join("other.vhd");
    let (_, report) = json(&["convert", "-f", "raw", "-O", "vhd", text(&raw), text(&other)]);
    assert_eq!(report["padding_bytes"], padding, "{report}");
    let whole = dir.path().join("whole.vhd");
    let said = good(&["convert", "-O", "vhd", text(&image), text(&whole)]);
    assert!(!said.contains("zero bytes"), "{said}");
    let created = dir.path().join("created.vhd");
    good(&["create", "-O", "vhd", "--size", "1048577B", text(&created)]);
    assert_eq!(std::fs::metadata(&created).unwrap().len(), (2 << 20) + 512);
}

#[test]
fn snapshots_of_esxi_are_read_and_never_written() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, base) = (dir.path().join("disk.raw"), dir.path().join("base.vmdk"));
    let mut disk = content();
    disk.resize(6 << 20, 0);
    std::fs::write(&raw, &disk).unwrap();
    good(&["convert", "-f", "raw", "-O", "vmfs", text(&raw), text(&base)]);
    let (_, info) = json(&["info", text(&base)]);
    let id = info["content_id"].as_str().unwrap().to_owned();
    let sectors = disk.len() as u64 / 512;
    let grains = vec![
        (3, esxi::Grain::Data(vec![0xab; 4096])),
        (20, esxi::Grain::Zero),
        (1500, esxi::Grain::Data(vec![0xcd; 4096])),
    ];
    let cowd = esxi::cowd(sectors as u32, 1, &[(7, vec![0x77; 512]), (9000, vec![0x99; 512])]);
    for (kind, word, extent, changes) in [
        (
            "vmfsSparse",
            "VMFSSPARSE",
            cowd,
            [(7 * 512, 512, 0x77), (9000 * 512, 512, 0x99)].to_vec(),
        ),
        (
            "seSparse",
            "SESPARSE",
            esxi::sesparse(sectors, &grains),
            [(3 * 4096, 4096, 0xab), (20 * 4096, 4096, 0), (1500 * 4096, 4096, 0xcd)].to_vec(),
        ),
    ] {
        let mut model = disk.clone();
        for (at, length, byte) in changes {
            model[at..at + length].fill(byte);
        }
        let oracle = dir.path().join(format!("{kind}.raw"));
        std::fs::write(&oracle, &model).unwrap();
        let (delta, data) = (format!("{kind}.vmdk"), format!("{kind}-delta.vmdk"));
        let line = format!("RW {sectors} {word} \"{data}\"");
        std::fs::write(dir.path().join(&data), &extent).unwrap();
        let delta = dir.path().join(delta);
        let descriptor = esxi::descriptor(kind, &line, Some((id.as_str(), "base.vmdk")));
        std::fs::write(&delta, descriptor).unwrap();
        // An independent reader agrees on what the fixture says.
        backhaul_tests::compare(&oracle, &delta).unwrap();
        let (_, info) = json(&["info", text(&delta)]);
        assert_eq!((info["kind"].as_str(), &info["parent"]["kind"]), (Some(kind), &"vmfs".into()));
        let (_, map) = json(&["map", text(&delta)]);
        assert!(map["totals"]["data_bytes"].as_u64() > Some(1_000_000), "{map}");
        good(&["check", "--deep", text(&delta)]);
        good(&["compare", "-F", "raw", text(&delta), text(&oracle)]);
        for to in KINDS {
            let folder = dir.path().join(format!("{kind}-{to}"));
            std::fs::create_dir(&folder).unwrap();
            let target = image_path(&folder, to);
            good(&["convert", "-f", kind, "-O", to, text(&delta), text(&target)]);
            judge(&target, to, &oracle);
        }
        let made = backhaul(&["create", "-O", kind, "--size", "1MiB", text(&dir.path().join("x"))]);
        assert!(said(&made).contains("only read here"), "{}", said(&made));

        // A header that names its directory at a wrong place is mended.
        let mut damaged = extent.clone();
        let field = if kind == "seSparse" { 128 } else { 20 };
        damaged[field..field + 4].copy_from_slice(&77_777_u32.to_le_bytes());
        std::fs::write(dir.path().join(&data), &damaged).unwrap();
        let refused = backhaul(&["repair", text(&delta)]);
        assert!(String::from_utf8_lossy(&refused.stdout).contains("grain directory"));
        assert_eq!(std::fs::read(dir.path().join(&data)).unwrap(), damaged);
        let (code, answer) = json(&["repair", "--yes", text(&delta)]);
        assert_eq!((code, &answer["clean"]), (Some(0), &true.into()), "{answer}");
        assert!(std::fs::read(dir.path().join(&data)).unwrap() == extent);
    }
}

/// A disk of 62 TiB with many runs, in 256 MiB of address space: the map is not held in memory.
#[test]
fn a_map_takes_no_memory_that_grows() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("large.vmdk");
    good(&["create", "-O", "monolithicSparse", "--size", "62TiB", text(&image)]);
    let mut commands = String::new();
    for number in 0..2000_u64 {
        commands += &format!("write -q -P 1 {} 512\n", number * 33_000_000_000 / 512 * 512);
    }
    let script = dir.path().join("script");
    std::fs::write(&script, commands).unwrap();
    let written = Command::new("qemu-io")
        .args(["-t", "unsafe", "-f", "vmdk", text(&image)])
        .stdin(std::fs::File::open(&script).unwrap())
        .output()
        .expect("qemu-io is missing: install the Debian package qemu-utils");
    assert!(written.status.success(), "{}", said(&written));
    let program = backhaul_tests::programs().join("backhaul");
    let output = Command::new("prlimit")
        .arg("--as=268435456")
        .arg(program)
        .args(["image", "map", "--json", text(&image)])
        .output()
        .expect("prlimit is missing: install the Debian package util-linux");
    assert!(output.status.success(), "{}", said(&output));
    let map: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(map["runs"].as_array().unwrap().len() as u64, map["totals"]["runs"]);
    assert_eq!(map["totals"]["data_bytes"], 2000 * 65_536);
    assert_eq!(map["runs"][2]["state"], "data", "{}", map["runs"][2]);
}
