//! Files in the folder of an image: found beneath it, published whole, locked.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io,
    os::unix::fs::{MetadataExt, fchown},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{
        AtFlags, FlockOperation, Mode, OFlags, RenameFlags, ResolveFlags, fcntl_getfl, fcntl_setfl,
        flock, linkat, openat, openat2, renameat, renameat_with, unlinkat,
    },
    io::Errno,
};

use crate::{
    error::{ImageError, Result},
    identity::random_bytes,
};

/// The folder that an image is in, open.
#[derive(Debug)]
pub(crate) struct Folder {
    file: File,
    path: PathBuf,
    /// What appears in it is on stable storage first.
    durable: bool,
}

impl Folder {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        // The parent of a bare file name is the empty path.
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let path = path.canonicalize()?;
        if !path.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        Ok(Self { file: File::open(&path)?, path, durable: true })
    }

    /// The folder in which `file` is to be made.
    pub(crate) fn of_new(file: &Path) -> Result<Self> {
        let path = file.parent().unwrap_or(Path::new(""));
        Self::open(path).map_err(|source| {
            let kind = source.kind();
            let error = ImageError::io("open", path, source);
            match kind {
                io::ErrorKind::NotFound => {
                    error.because("the folder does not exist; make it, or correct the path")
                }
                io::ErrorKind::NotADirectory => error.because(
                    "it, or a part of it, is a file, where a folder must be; correct the path",
                ),
                _ => error,
            }
        })
    }

    /// Lets files appear that a power cut may still take away, where `durable` is not.
    pub(crate) fn made_durable(self, durable: bool) -> Self {
        Self { durable, ..self }
    }

    pub(crate) fn path_of(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// Opens a file of this folder. Never waits for the other end of a FIFO.
    ///
    /// With `beneath`, the kernel itself refuses every way out of the folder (absolute names,
    /// `..`, symbolic links) with `EXDEV`, so that nobody can swap a link in between a check and
    /// the open.
    pub(crate) fn open_file(&self, name: &Path, writable: bool, beneath: bool) -> io::Result<File> {
        let access = if writable { OFlags::RDWR } else { OFlags::RDONLY };
        let flags = access | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let open = || match beneath {
            true => openat2(&self.file, name, flags, Mode::empty(), resolve),
            false => openat(&self.file, name, flags, Mode::empty()),
        };
        // A rename elsewhere in the tree can make the kernel unsure about `..` and answer EAGAIN.
        let mut result = open();
        for _ in 0..RESOLVE_RETRIES {
            match result {
                Err(Errno::AGAIN | Errno::INTR) => result = open(),
                _ => break,
            }
        }
        let file = File::from(result?);
        // Only the open must not wait. Left on, io_uring would answer EAGAIN to an engine that
        // uses this file, where it should wait for the disk.
        fcntl_setfl(&file, fcntl_getfl(&file)? - OFlags::NONBLOCK)?;
        Ok(file)
    }

    /// Makes a file appear under its name complete and durable, or not at all.
    ///
    /// An existing file is an error (`AlreadyExists`).
    pub(crate) fn publish_new(
        &self,
        name: &OsStr,
        fill: impl FnOnce(&File) -> io::Result<()>,
    ) -> io::Result<()> {
        self.publish(name, fill, |staged| self.rename_to_new(staged, name))
    }

    /// Gives a file that is durable another name, durably; an existing file of that name is an
    /// error (`AlreadyExists`).
    pub(crate) fn rename_new(&self, old: &OsStr, name: &OsStr) -> io::Result<()> {
        self.rename_to_new(old, name)?;
        self.sync(&self.file)
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        if self.durable { file.sync_all() } else { Ok(()) }
    }

    fn rename_to_new(&self, old: &OsStr, name: &OsStr) -> rustix::io::Result<()> {
        match renameat_with(&self.file, old, &self.file, name, RenameFlags::NOREPLACE) {
            // File systems such as NFS know no flags, but a link never replaces a file.
            Err(Errno::INVAL | Errno::NOSYS) => {
                linkat(&self.file, old, &self.file, name, AtFlags::empty())?;
                unlinkat(&self.file, old, AtFlags::empty())
            }
            result => result,
        }
    }

    /// Replaces a file by new content, with the owner and the permissions of `old`: after a crash
    /// either the old content is there or the new.
    pub(crate) fn replace(&self, name: &OsStr, old: &File, content: &[u8]) -> io::Result<()> {
        let fill = |file: &File| {
            let metadata = old.metadata()?;
            // Only root may give a file away; a process that may write both may go on without.
            match fchown(file, Some(metadata.uid()), Some(metadata.gid())) {
                Err(error) if error.kind() != io::ErrorKind::PermissionDenied => return Err(error),
                _ => {}
            }
            file.set_permissions(metadata.permissions())?;
            io::Write::write_all(&mut &*file, content)
        };
        self.publish(name, fill, |staged| renameat(&self.file, staged, &self.file, name))
    }

    pub(crate) fn remove(&self, name: &OsStr) -> io::Result<()> {
        Ok(unlinkat(&self.file, name, AtFlags::empty())?)
    }

    fn publish(
        &self,
        name: &OsStr,
        fill: impl FnOnce(&File) -> io::Result<()>,
        appear: impl FnOnce(&OsStr) -> rustix::io::Result<()>,
    ) -> io::Result<()> {
        let staged = staged_name(name)?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = File::from(openat(&self.file, &staged, flags, Mode::from_raw_mode(0o666))?);
        let result = fill(&file)
            .and_then(|()| self.sync(&file))
            .and_then(|()| Ok(appear(&staged)?))
            .and_then(|()| self.sync(&self.file));
        if result.is_err() {
            // Gone already where the failure came after the rename.
            let _ = self.remove(&staged);
        }
        result
    }
}

/// A hidden name beside `name`; random, so that two processes never fill one staged file.
pub(crate) fn staged_name(name: &OsStr) -> io::Result<OsString> {
    let mut staged = OsString::from(".");
    staged.push(name);
    staged.push(format!(".{:08x}.new", u32::from_ne_bytes(random_bytes()?)));
    Ok(staged)
}

/// Locked files; dropping this unlocks them.
#[derive(Debug, Default)]
pub(crate) struct Locks(Vec<File>);

impl Locks {
    /// Locks a file and keeps it locked.
    pub(crate) fn take(&mut self, file: &File, writable: bool) -> io::Result<()> {
        lock(file, writable)?;
        self.0.push(file.try_clone()?);
        Ok(())
    }
}

impl Drop for Locks {
    fn drop(&mut self) {
        for file in &self.0 {
            // Closing is not enough: a process that another thread starts has copies of all files
            // until it runs its program, and the lock lives as long as the last copy.
            let _ = flock(file, FlockOperation::Unlock);
        }
    }
}

/// Locks a file without waiting: exclusively for a writer, shared for a reader.
///
/// The lock is `flock`'s: it belongs to the open file, so it also keeps two images of one process
/// apart, and it ends with the process, however that ends. Programs that do not ask, such as
/// qemu, are not kept away by it.
fn lock(file: &File, writable: bool) -> io::Result<()> {
    let operation = match writable {
        true => FlockOperation::NonBlockingLockExclusive,
        false => FlockOperation::NonBlockingLockShared,
    };
    Ok(flock(file, operation)?)
}

/// More than one rename storm ever needs; a bound so that a hostile one cannot hold us.
const RESOLVE_RETRIES: u32 = 16;
