//! The hidden folder in which an image is made before it gets its place, and what is left of one whose
//! process was killed.

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
pub(super) const OLD_FILES: &str = ".old";

/// The file in the folder that tells which files of a new image were made there: after a cut some may
/// have their place already, and belong to no image.
pub(super) const NEW_FILES: &str = ".made";

/// Random letters that end a folder's name.
const LETTERS: usize = 6;

/// The folder, locked as long as its process lives.
pub(super) struct Staging {
    folder: TempDir,
    _lock: File,
}

impl Staging {
    /// A folder beside `name`, in which that is made anew.
    pub(super) fn make(beside: &Path, name: &OsStr) -> io::Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix(&prefix(name))
            .rand_bytes(LETTERS)
            .tempdir_in(beside)?;
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

/// Notes durably, in the hidden folder, files that have, or are to have, a name in its parent. The
/// number of each file is noted too: whatever has the name later is not deleted for it.
pub(super) fn note<'a>(
    staging: &Path,
    list: &str,
    files: impl IntoIterator<Item = &'a PathBuf>,
) -> io::Result<()> {
    let mut text = Vec::new();
    for path in files {
        let Some(name) = path.file_name() else { continue };
        text.extend(format!("{} ", path.symlink_metadata()?.ino()).bytes());
        text.extend(name.as_bytes());
        text.push(0);
    }
    let path = staging.join(list);
    fs::write(&path, text)?;
    File::open(path)?.sync_all()?;
    File::open(staging)?.sync_all()
}

/// The files that [`note`] noted in a list and that are there.
fn noted(staging: &Path, list: &str) -> Vec<PathBuf> {
    let (text, parent) = (fs::read(staging.join(list)).unwrap_or_default(), staging.parent());
    let entries = text.split(|byte| *byte == 0).filter_map(|entry| {
        let blank = entry.iter().position(|byte| *byte == b' ')?;
        let number: u64 = std::str::from_utf8(&entry[..blank]).ok()?.parse().ok()?;
        let name = OsString::from_vec(entry[blank + 1..].to_vec());
        // A path would lead to files that nobody noted.
        let path = parent.filter(|_| !name.as_bytes().contains(&b'/'))?.join(name);
        (path.symlink_metadata().ok()?.ino() == number).then_some(path)
    });
    entries.collect()
}

/// Removes what replacements of `name` have left that were killed: their old files, the names that
/// they gave early, and their folders. `used` are the files of the image that stands there now: what
/// it needs stays, its folder too.
pub(super) fn clear(beside: &Path, name: &OsStr, used: &BTreeSet<PathBuf>) -> io::Result<()> {
    for staging in left(beside, name)? {
        let Some(_lock) = abandoned(&staging) else { continue };
        let mut ours = noted(&staging, OLD_FILES);
        ours.extend(noted(&staging, NEW_FILES));
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

/// Removes what was left of making `name` by processes that were killed, where nothing of that name
/// stands: their folders, and what they gave its place early. The folder of a replacement stays: the
/// image that it made may have got another name since, and need it.
pub(super) fn clear_new(beside: &Path, name: &OsStr) -> io::Result<()> {
    for staging in left(beside, name)? {
        let Some(_lock) = abandoned(&staging) else { continue };
        if staging.join(OLD_FILES).symlink_metadata().is_ok() {
            continue;
        }
        for file in noted(&staging, NEW_FILES) {
            fs::remove_file(file)?;
        }
        fs::remove_dir_all(&staging)?;
    }
    Ok(())
}

/// The folders in which `name` was made, or is.
fn left(beside: &Path, name: &OsStr) -> io::Result<Vec<PathBuf>> {
    let prefix = prefix(name);
    let mut folders = Vec::new();
    for entry in fs::read_dir(beside)? {
        let entry = entry?;
        let called = entry.file_name();
        // A longer end belongs to a name that begins with this one.
        let letters = called.as_bytes().strip_prefix(prefix.as_bytes());
        let is_one = letters.is_some_and(|letters| letters.len() == LETTERS);
        if is_one && entry.file_type()?.is_dir() {
            folders.push(entry.path());
        }
    }
    Ok(folders)
}

/// Takes the lock of a folder whose process has ended.
fn abandoned(staging: &Path) -> Option<File> {
    let folder = File::open(staging).ok()?;
    folder.try_lock().ok()?;
    Some(folder)
}
