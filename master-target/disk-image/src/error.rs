//! The one error of the crate: a small kind to match on, where it happened, and why.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

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
        let path = path.to_owned();
        Self { kind, path, offset: None, sentence, source: Some(source), mend: None }
    }

    /// The same, at a byte of the file.
    #[must_use]
    pub fn at(mut self, offset: u64) -> Self {
        self.offset = Some(offset);
        self
    }

    /// The same, with another sentence.
    #[must_use]
    pub(crate) fn because(mut self, sentence: String) -> Self {
        self.sentence = sentence;
        self
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
            Some(source) if self.kind == ErrorKind::Io => write!(f, ": {source}"),
            _ => Ok(()),
        }
    }
}

impl std::error::Error for ImageError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| source as _)
    }
}

/// What nearly every function of this crate returns.
pub type Result<T, E = ImageError> = std::result::Result<T, E>;
