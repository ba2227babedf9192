//! `backhaul image` as the tests call it, and a disk to try it on.
//!
//! Everything here panics when it does not get what it wants: the test fails there.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use backhaul_lab::random::Random;

/// No multiple of a grain.
pub const DISK_BYTES: usize = (5 << 20) + 1536;

/// Runs `backhaul image` with these words.
pub fn backhaul(words: &[&str]) -> Output {
    let program = crate::programs().join("backhaul");
    Command::new(program).arg("image").args(words).output().unwrap()
}

/// Runs it, expects success, and returns what it says.
pub fn good(words: &[&str]) -> String {
    let output = backhaul(words);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A path as a word.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Where an image of a kind is put.
pub fn image_path(dir: &Path, kind: &str) -> PathBuf {
    let ending = match kind {
        "raw" => "raw",
        "vhd" => "vhd",
        _ => "vmdk",
    };
    dir.join(format!("{kind}.{ending}"))
}

/// A disk with data, zeros that are written, and holes.
pub fn content() -> Vec<u8> {
    let mut disk = vec![0; DISK_BYTES];
    Random::new(91).fill(&mut disk[70_000..1_500_000]);
    Random::new(92).fill(&mut disk[DISK_BYTES - 700..]);
    disk
}

/// Fails unless the image holds `disk`, as somebody else reads it.
pub fn judge(image: &Path, kind: &str, raw: &Path) {
    if kind == "vhd" {
        // Zeros up to a whole MiB, as Azure wants it, and a footer; qemu-img takes zeros at the end
        // for equal.
        let length = std::fs::metadata(image).unwrap().len();
        let disk = std::fs::metadata(raw).unwrap().len().next_multiple_of(1 << 20);
        assert_eq!(length, disk + 512);
        let compared = Command::new("qemu-img")
            .args(["compare", "-f", "raw", "-F", "vpc", text(raw), text(image)])
            .output()
            .expect("qemu-img is missing: install the Debian package qemu-utils");
        return assert!(compared.status.success(), "{}", said(&compared));
    }
    crate::compare(raw, image).unwrap_or_else(|error| panic!("{kind}: {error}"));
}

/// Runs it with `--json`: exit code and answer.
pub fn json(words: &[&str]) -> (Option<i32>, serde_json::Value) {
    let output = backhaul(&[words, &["--json"]].concat());
    let said = String::from_utf8_lossy(&output.stdout);
    let value = serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}"));
    (output.status.code(), value)
}

/// What it said on stderr.
pub fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
