//! The one error of the crate: a small kind to match on, where it happened, and why.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use rustix::io::Errno;

use crate::fix::Fix;

/// What to do about an [`ImageError`]. The sentence beside it is for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ErrorKind {
    /// The system refused or failed; the source says how.
    Io,
    /// A file is in the way, and nothing is overwritten.
    Exists,
    /// What the caller asked for cannot be: a size, a name, an option.
    Invalid,
    /// The image says something that no sound image says.
    Damaged,
    /// The image is sound, but of a kind or with a feature that is not supported here.
    Unsupported,
    /// The image is of another kind than the caller named.
    WrongKind,
    /// The image, or its kind, cannot be written.
    ReadOnly,
    /// The range leaves the disk.
    OutOfRange,
    /// Another program, or another image of this one, has the file open.
    Busy,
    /// An earlier flush failed, so nothing more is written until the image is opened again.
    Latched,
    /// The descriptor leads out of its folder.
    Outside,
    /// The chain of parents is broken: a content id that does not match, a loop, too many links.
    Chain,
    /// The format's own limit is reached.
    Full,
    /// The caller asked an operation to stop.
    Cancelled,
}

/// Why an image cannot be made or used.
#[derive(Debug)]
pub struct ImageError {
    kind: ErrorKind,
    path: PathBuf,
    offset: Option<u64>,
    sentence: String,
    source: Option<io::Error>,
    /// What to do about the source, where the sentence does not say it.
    advice: Option<&'static str>,
    mend: Option<Box<Fix>>,
}

impl ImageError {
    /// An error about the file at `path`; the sentence names what is wrong and the mend.
    pub fn new(kind: ErrorKind, path: &Path, sentence: impl Into<String>) -> Self {
        Self {
            kind,
            path: path.to_owned(),
            offset: None,
            sentence: sentence.into(),
            source: None,
            advice: None,
            mend: None,
        }
    }

    /// An operation of the system that failed: `action` completes "cannot …".
    pub fn io(action: &str, path: &Path, source: io::Error) -> Self {
        let (kind, sentence) = match source.kind() {
            io::ErrorKind::AlreadyExists => (
                ErrorKind::Exists,
                "exists already and is not overwritten; move it away, or choose another name"
                    .to_owned(),
            ),
            _ => (ErrorKind::Io, format!("cannot {action} it")),
        };
        let (path, advice) = (path.to_owned(), advice_on(&source));
        Self { kind, path, offset: None, sentence, source: Some(source), advice, mend: None }
    }

    /// The same, at a byte of the file.
    #[must_use]
    pub fn at(mut self, offset: u64) -> Self {
        self.offset = Some(offset);
        self
    }

    /// The same, with another sentence, which names the mend.
    #[must_use]
    pub(crate) fn because(mut self, sentence: impl Into<String>) -> Self {
        (self.sentence, self.advice) = (sentence.into(), None);
        self
    }

    /// The same, about `to` where it is about `from` or a file in it: for what was made under a name
    /// that nobody gave it.
    #[must_use]
    pub fn moved(mut self, from: &Path, to: &Path) -> Self {
        match self.path.strip_prefix(from) {
            Ok(rest) if rest.as_os_str().is_empty() => self.path = to.to_owned(),
            Ok(rest) => self.path = to.join(rest),
            Err(_) => {}
        }
        self
    }

    /// What the system said, where it is to blame.
    pub(crate) fn errno(&self) -> Option<Errno> {
        self.source.as_ref().and_then(Errno::from_io_error)
    }

    /// The same, with what a repair would do about it.
    #[must_use]
    pub(crate) fn mended_by(mut self, fix: Fix) -> Self {
        self.mend = Some(Box::new(fix));
        self
    }

    /// What a repair would do about it.
    pub(crate) fn mend(&self) -> Option<&Fix> {
        self.mend.as_deref()
    }

    /// What kind of error it is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The byte of that file, where one is to blame.
    pub fn offset(&self) -> Option<u64> {
        self.offset
    }

    /// What is wrong, without the place.
    pub fn sentence(&self) -> &str {
        &self.sentence
    }
}

impl fmt::Display for ImageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())?;
        if let Some(offset) = self.offset {
            write!(f, " at byte {offset}")?;
        }
        write!(f, ": {}", self.sentence)?;
        match &self.source {
            Some(source) if self.kind == ErrorKind::Io => {
                write!(f, ": {source}")?;
                self.advice.map_or(Ok(()), |advice| write!(f, "; {advice}"))
            }
            _ => Ok(()),
        }
    }
}

/// What to do about an error of the system.
fn advice_on(source: &io::Error) -> Option<&'static str> {
    Some(match source.kind() {
        io::ErrorKind::StorageFull => "free some space, or choose another file system",
        io::ErrorKind::QuotaExceeded => "free some space, or have the quota raised",
        io::ErrorKind::PermissionDenied => {
            "change the permissions, or run this as a user who has them"
        }
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => "check the path",
        io::ErrorKind::FileTooLarge => {
            "the file system takes no file of this size; choose another one, or a kind of small \
             files such as twoGbMaxExtentSparse"
        }
        io::ErrorKind::InvalidFilename => "choose a shorter name",
        io::ErrorKind::ReadOnlyFilesystem => "mount it writable, or choose another one",
        _ => match Errno::from_io_error(source)? {
            Errno::MFILE | Errno::NFILE => "raise the limit of open files (ulimit -n)",
            Errno::IO => "check the storage under it",
            _ => return None,
        },
    })
}

impl std::error::Error for ImageError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| source as _)
    }
}

/// What nearly every function of this crate returns.
pub type Result<T, E = ImageError> = std::result::Result<T, E>;

#[cfg(test)]
mod tests {
    use super::*;

    /// Errors of the system were told as it says them, and about hidden files that nobody named.
    #[test]
    fn what_the_system_says_comes_with_a_mend_and_under_the_name_that_was_given() {
        let (hidden, given) = (Path::new("d/.x.vmdk.0123.new"), Path::new("d/x.vmdk"));
        for (errno, mend) in [
            (Errno::NOSPC, "free some space"),
            (Errno::DQUOT, "quota"),
            (Errno::ACCESS, "permissions"),
            (Errno::NOENT, "check the path"),
            (Errno::FBIG, "twoGbMaxExtentSparse"),
            (Errno::NAMETOOLONG, "shorter name"),
            (Errno::ROFS, "mount it writable"),
            (Errno::MFILE, "ulimit -n"),
            (Errno::IO, "check the storage"),
        ] {
            let error = ImageError::io("write", hidden, errno.into()).moved(hidden, given);
            let said = error.to_string();
            assert!(said.starts_with("d/x.vmdk: cannot write it: "), "{said}");
            assert!(said.contains(mend), "{said}");
        }
        let path = |from: &str| {
            let error = ImageError::new(ErrorKind::Invalid, Path::new("d/s/x.vmdk"), "");
            error.moved(Path::new(from), Path::new("d")).path().to_owned()
        };
        assert_eq!((path("d/s"), path("d/other")), ("d/x.vmdk".into(), "d/s/x.vmdk".into()));
    }
}
