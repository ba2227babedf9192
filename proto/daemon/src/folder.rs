//! Folders that hold a daemon's state: one daemon at a time, and files that are replaced whole.

use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use thiserror::Error;

/// A folder that belongs to this process for as long as this value lives.
#[derive(Debug)]
pub struct FolderLock(#[expect(dead_code, reason = "held for its lock")] File);

/// Why a folder cannot be used.
#[derive(Debug, Error)]
pub enum FolderError {
    /// It cannot be made or written.
    #[error("folder {dir} cannot be used: {source}", dir = dir.display())]
    Io {
        /// The folder.
        dir: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another process holds it.
    #[error(
        "folder {dir} is used by another process; stop that one, or give this one a folder of its own", dir = dir.display()
    )]
    Taken {
        /// The folder.
        dir: PathBuf,
    },
}

impl FolderLock {
    /// Makes the folder if it is missing, and takes it. The lock is the kernel's (`flock` on the
    /// file `lock`), so a process that was killed leaves nothing behind that must be removed.
    pub fn take(dir: &Path) -> Result<Self, FolderError> {
        let failed = |source| FolderError::Io { dir: dir.to_owned(), source };
        fs::create_dir_all(dir).map_err(failed)?;
        let options = File::options().create(true).write(true).truncate(false).to_owned();
        let file = options.open(dir.join("lock")).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => Ok(Self(file)),
            Err(TryLockError::WouldBlock) => Err(FolderError::Taken { dir: dir.to_owned() }),
            Err(TryLockError::Error(source)) => Err(failed(source)),
        }
    }
}

/// Replaces the file at `path` on stable storage, making its folder if that is missing: after a
/// crash it is the old one or the new one, never a part of either.
pub fn replace_file(path: &Path, content: &[u8]) -> io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(dir)?;
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let mut file = File::create(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::{FolderError, FolderLock, replace_file};

    #[test]
    fn a_folder_has_one_owner_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("state");
        let first = FolderLock::take(&folder).unwrap();
        assert!(matches!(FolderLock::take(&folder), Err(FolderError::Taken { .. })));
        drop(first);
        FolderLock::take(&folder).unwrap();
    }

    #[test]
    fn a_file_is_replaced_whole_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/state.json");
        for content in [&b"first, and longer"[..], b"second"] {
            replace_file(&path, content).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), content);
        }
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }
}
