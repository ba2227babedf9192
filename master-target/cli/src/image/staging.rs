//! The hidden folder in which an image is made that is to replace another, and what is left of one
//! whose process was killed.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// The file in the folder that tells which old files were to go: after a cut they may be part of no
/// image.
const OLD_FILES: &str = ".old";

/// The folder, locked as long as its process lives.
pub(super) struct Staging {
    folder: TempDir,
    _lock: File,
}

impl Staging {
    /// A folder beside `name`, in which that is made anew.
    pub(super) fn make(beside: &Path, name: &OsStr) -> io::Result<Self> {
        let folder = tempfile::Builder::new().prefix(&prefix(name)).tempdir_in(beside)?;
        let lock = File::open(folder.path())?;
        lock.try_lock()?;
        Ok(Self { folder, _lock: lock })
    }

    pub(super) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Leaves the folder where it is, with what is in it.
    pub(super) fn keep(mut self) {
        self.folder.disable_cleanup(true);
    }
}

/// What the names of all folders begin with in which `name` was made anew.
fn prefix(name: &OsStr) -> OsString {
    let mut prefix = OsString::from(".backhaul-");
    prefix.push(name);
    prefix.push("-");
    prefix
}

/// Notes durably, in the hidden folder, which files of its parent are to go. The number of each file
/// is noted too: whatever has the name later is not deleted for it.
pub(super) fn note(staging: &Path, old: &BTreeSet<PathBuf>) -> io::Result<()> {
    let mut text = Vec::new();
    let parent = staging.parent();
    for path in old.iter().filter(|path| path.parent() == parent) {
        let Some(name) = path.file_name() else { continue };
        text.extend(format!("{} ", path.symlink_metadata()?.ino()).bytes());
        text.extend(name.as_bytes());
        text.push(0);
    }
    let path = staging.join(OLD_FILES);
    fs::write(&path, text)?;
    File::open(path)?.sync_all()?;
    File::open(staging)?.sync_all()
}

/// The files that [`note`] noted and that are still there.
fn noted(staging: &Path) -> Vec<PathBuf> {
    let (text, parent) = (fs::read(staging.join(OLD_FILES)).unwrap_or_default(), staging.parent());
    let entries = text.split(|byte| *byte == 0).filter_map(|entry| {
        let blank = entry.iter().position(|byte| *byte == b' ')?;
        let number: u64 = std::str::from_utf8(&entry[..blank]).ok()?.parse().ok()?;
        let name = OsString::from_vec(entry[blank + 1..].to_vec());
        // A path would lead to files that no replacement noted.
        let path = parent.filter(|_| !name.as_bytes().contains(&b'/'))?.join(name);
        (path.symlink_metadata().ok()?.ino() == number).then_some(path)
    });
    entries.collect()
}

/// Removes what replacements of `name` have left that were killed: their old files, the names that
/// they gave early, and their folders. `used` are the files of the image that stands there now: what
/// it needs stays, its folder too.
pub(super) fn clear(beside: &Path, name: &OsStr, used: &BTreeSet<PathBuf>) -> io::Result<()> {
    let prefix = prefix(name);
    for entry in fs::read_dir(beside)? {
        let staging = entry?.path();
        let called = staging.file_name().unwrap_or_default();
        let is_one = called.as_bytes().starts_with(prefix.as_bytes());
        if !is_one || !staging.symlink_metadata().is_ok_and(|found| found.is_dir()) {
            continue;
        }
        let Ok(folder) = File::open(&staging) else { continue };
        if folder.try_lock().is_err() {
            continue;
        }
        let mut ours = noted(&staging);
        for file in fs::read_dir(&staging)? {
            let file = file?;
            let link = beside.join(file.file_name());
            let there = link.symlink_metadata().map(|found| (found.dev(), found.ino()));
            let here = file.metadata().map(|found| (found.dev(), found.ino()));
            if there.is_ok_and(|there| here.is_ok_and(|here| here == there)) {
                ours.push(link);
            }
        }
        for file in ours.iter().filter(|file| !used.contains(*file)) {
            fs::remove_file(file)?;
        }
        if !used.iter().any(|file| file.starts_with(&staging)) {
            fs::remove_dir_all(&staging)?;
        }
    }
    Ok(())
}
