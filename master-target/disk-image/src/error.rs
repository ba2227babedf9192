//! Why an image cannot be made or used.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Why an image cannot be made or used.
#[derive(Debug, Error)]
pub enum ImageError {
    /// No such kind.
    #[error("`{text}` is not a kind of image; known are raw, monolithicFlat and vmfs")]
    UnknownKind {
        /// What was given.
        text: String,
    },
    /// No such controller.
    #[error("`{text}` is not an adapter type; known are ide, buslogic and lsilogic")]
    UnknownAdapter {
        /// What was given.
        text: String,
    },
    /// A size that no disk can have.
    #[error(
        "a disk cannot have {size_bytes} bytes: it needs a multiple of 512, from 512 to 62 TiB"
    )]
    Size {
        /// The size.
        size_bytes: u64,
    },
    /// A file is in the way.
    #[error("{path} exists already and is not overwritten; move it away, or choose another name", path = path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// A file operation failed.
    #[error("cannot {action} {path}: {source}", path = path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The descriptor says something it must not.
    #[error("{path}: {sentence}", path = path.display())]
    Descriptor {
        /// The descriptor.
        path: PathBuf,
        /// What is wrong, with its line.
        sentence: String,
    },
    /// The image is of a kind that was not expected, or that this library cannot open.
    #[error("{path} is a {found} image, but {expected} is needed", path = path.display())]
    Kind {
        /// The image.
        path: PathBuf,
        /// What it is.
        found: String,
        /// What was asked for.
        expected: String,
    },
    /// The extent's file is not as large as the descriptor says.
    #[error("{path} has {found_bytes} bytes, but its descriptor needs {expected_bytes}; restore the file from its source", path = path.display())]
    ExtentSize {
        /// The extent.
        path: PathBuf,
        /// Its size.
        found_bytes: u64,
        /// What the descriptor says.
        expected_bytes: u64,
    },
    /// Somebody else writes it.
    #[error("{path} is in use by another program; stop that first", path = path.display())]
    Busy {
        /// The extent.
        path: PathBuf,
    },
}
