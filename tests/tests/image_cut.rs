//! `backhaul image` cut short: by Ctrl-C, by a kill, by damage in the middle.
//!
//! `convert --force` makes the new image in a hidden folder. A process that was killed left that
//! folder, gigabytes that nobody saw, and after some cuts the next `--force` refused because of files
//! that it had made itself.

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use backhaul_lab::random::Random;
use backhaul_tests::image_command::{good, said, text};

fn command(words: &[&str]) -> Command {
    let mut command = Command::new(backhaul_tests::programs().join("backhaul"));
    command.arg("image").args(words).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn names(dir: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// A disk that takes seconds to compress: words, of which no two sentences are the same.
fn slow_disk(path: &Path) {
    let mut disk = vec![0; 96 << 20];
    Random::new(7).fill(&mut disk);
    for byte in &mut disk {
        *byte = b'a' + *byte % 16;
    }
    std::fs::write(path, disk).unwrap();
}

/// Starts to replace `image` by a stream, and returns when that is being made.
fn replacing(raw: &Path, image: &Path) -> Child {
    let words =
        ["convert", "--force", "--deflate-level", "9", "-f", "raw", "-O", "streamOptimized"];
    let mut child = command(&[&words[..], &[text(raw), text(image)]].concat()).spawn().unwrap();
    let dir = image.parent().unwrap();
    let staged =
        |name: &String| name.starts_with(".backhaul-") && !names(&dir.join(name)).is_empty();
    while !names(dir).iter().any(staged) {
        assert_eq!(child.try_wait().unwrap(), None, "it ended before it could be cut");
        std::thread::yield_now();
    }
    child
}

fn kill(child: &Child, signal: &str) {
    let pid = child.id().to_string();
    assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
}

#[test]
fn what_was_half_made_goes_at_once_or_with_the_next_run() {
    let dir = tempfile::tempdir().unwrap();
    let sources = tempfile::tempdir().unwrap();
    let (raw, image) = (sources.path().join("disk.raw"), dir.path().join("db 1.vmdk"));
    slow_disk(&raw);
    good(&["convert", "-f", "raw", "-O", "vmfs", text(&raw), text(&image)]);
    let before = names(dir.path());
    for signal in ["-INT", "-TERM", "-HUP"] {
        let child = replacing(&raw, &image);
        kill(&child, signal);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", said(&output));
        assert!(said(&output).contains("interrupted"), "{}", said(&output));
        assert_eq!(names(dir.path()), before, "{signal}");
    }

    let child = replacing(&raw, &image);
    kill(&child, "-KILL");
    assert_eq!(child.wait_with_output().unwrap().status.signal(), Some(9));
    assert_ne!(names(dir.path()), before, "nobody was there to remove the folder");
    backhaul_tests::compare(&raw, &image).unwrap();
    // A folder in which somebody works stays.
    let busy = dir.path().join(".backhaul-db 1.vmdk-busy");
    std::fs::create_dir(&busy).unwrap();
    let lock = std::fs::File::open(&busy).unwrap();
    lock.try_lock().unwrap();
    let split = ["convert", "--force", "-f", "raw", "-O", "twoGbMaxExtentSparse"];
    good(&[&split[..], &[text(&raw), text(&image)]].concat());
    assert_eq!(
        names(dir.path()),
        [".backhaul-db 1.vmdk-busy", "db 1-s001.vmdk", "db 1.vmdk"].map(String::from).into()
    );
    backhaul_tests::compare(&raw, &image).unwrap();
}

/// A map that failed in the middle was one JSON document that had no end, and another with the error.
#[test]
fn a_map_that_fails_in_the_middle_is_one_document() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, image) = (dir.path().join("disk.raw"), dir.path().join("disk.vmdk"));
    let mut disk = vec![0; 64 << 20];
    disk[5 << 20..6 << 20].fill(1);
    disk[40 << 20..41 << 20].fill(2);
    std::fs::write(&raw, disk).unwrap();
    good(&["convert", "-f", "raw", "-O", "monolithicSparse", text(&raw), text(&image)]);
    let mut bytes = std::fs::read(&image).unwrap();
    // Of both directories the second table: its entries lead nowhere.
    for field in [48, 56] {
        let word =
            |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let directory = word(&bytes, field) as usize * 512;
        let table = word(&bytes, directory + 4) as usize * 512;
        bytes[table..table + 2048].fill(0xfe);
    }
    std::fs::write(&image, bytes).unwrap();
    let output = command(&["map", "--json", text(&image)]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    let map: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(map["runs"][1]["state"], "data", "{map}");
    assert_eq!(
        (&map["totals"], &map["error"]["code"]),
        (&serde_json::Value::Null, &"failed".into())
    );
    assert!(map["error"]["sentence"].as_str().unwrap().contains("disk.vmdk"), "{map}");
    assert_eq!(said(&output), "");
}

/// The first convert into a folder, cut by a kill, left a hidden file and an extent; the next run
/// refused because of the extent, and nobody saw the file.
#[test]
fn a_first_convert_that_was_killed_is_made_by_the_next_run() {
    let (dir, sources) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (raw, image) = (sources.path().join("disk.raw"), dir.path().join("db 1.vmdk"));
    slow_disk(&raw);
    let child = replacing(&raw, &image);
    kill(&child, "-KILL");
    assert_eq!(child.wait_with_output().unwrap().status.signal(), Some(9));
    assert_eq!(names(dir.path()).len(), 1, "nobody was there to remove the folder");
    good(&["convert", "-f", "raw", "-O", "vmfs", text(&raw), text(&image)]);
    assert_eq!(names(dir.path()), ["db 1-flat.vmdk", "db 1.vmdk"].map(String::from).into());
    backhaul_tests::compare(&raw, &image).unwrap();
}

/// A disk of 62 TiB in small files is 31,745 of them: Ctrl-C ended the process at once and left
/// what it had made.
#[test]
fn a_creation_that_is_interrupted_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("large.vmdk");
    let words = ["create", "-O", "twoGbMaxExtentSparse", "--size", "62TiB", text(&image)];
    let mut child = command(&words).spawn().unwrap();
    while names(dir.path()).iter().all(|name| names(&dir.path().join(name)).is_empty()) {
        assert_eq!(child.try_wait().unwrap(), None, "it ended before it could be cut");
        std::thread::yield_now();
    }
    kill(&child, "-INT");
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("interrupted"), "{}", said(&output));
    assert_eq!(names(dir.path()), BTreeSet::new());
}

/// The first frame of the bar said that 100 % of 0 bytes were done.
#[test]
fn a_bar_begins_with_what_there_is_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, image) = (dir.path().join("disk.raw"), dir.path().join("disk.vmdk"));
    slow_disk(&raw);
    let line = format!(
        "{} image convert -f raw -O streamOptimized '{}' '{}'",
        text(&backhaul_tests::programs().join("backhaul")),
        text(&raw),
        text(&image)
    );
    let output = Command::new("script").args(["-qec", &line, "/dev/null"]).output();
    let output = output.expect("script is missing: install the Debian package bsdutils");
    let shown = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && shown.contains("converting ["), "{shown}");
    assert!(!shown.contains("0 B/0 B"), "{shown}");
}
