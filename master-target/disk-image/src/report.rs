//! What operations tell: information, findings, progress.

use std::path::PathBuf;

use serde::Serialize;

use crate::{
    error::{ErrorKind, ImageError, Result},
    kind::Kind,
};

/// What there is to know about an image without reading the disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ImageInfo {
    /// The kind.
    pub kind: Kind,
    /// The image's own path.
    pub path: PathBuf,
    /// Bytes of the disk the guest sees.
    pub size_bytes: u64,
    /// Bytes that all files of this link take up on their file system.
    pub stored_bytes: u64,
    /// `createType` as the descriptor has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub create_type: Option<String>,
    /// `CID`, eight hexadecimal digits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content_id: Option<String>,
    /// `parentCID`, where there is a parent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent_content_id: Option<String>,
    /// The disk's UUID.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// `ddb.adapterType`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<String>,
    /// `ddb.virtualHWVersion`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hardware_version: Option<String>,
    /// `ddb.thinProvisioned` is 1.
    pub thin: bool,
    /// The files of this link, in the order of the disk.
    pub extents: Vec<ExtentInfo>,
    /// Metadata that was damaged in one copy and is read from the other, as far as met yet, and what
    /// to know before the image is taken elsewhere.
    pub findings: Vec<Finding>,
    /// The next link of the chain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent: Option<Box<ImageInfo>>,
}

/// One extent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ExtentInfo {
    /// Its file; none for an extent of zeros.
    pub path: Option<PathBuf>,
    /// `FLAT`, `SPARSE` and so on.
    pub format: &'static str,
    /// Bytes of the disk that it holds.
    pub length_bytes: u64,
    /// Where in its file the disk's bytes begin, for a flat one.
    pub offset_bytes: u64,
    /// Length of the file.
    pub file_bytes: u64,
    /// Bytes of a grain, for a sparse one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grain_bytes: Option<u64>,
    /// Version of the sparse header.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<u32>,
    /// Its grains are compressed.
    pub compressed: bool,
    /// It was not closed by its last writer.
    pub unclean: bool,
}

/// How bad a [`Finding`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Harmless, and told for completeness.
    Note,
    /// Space that nothing uses.
    Leak,
    /// One copy of the metadata is wrong, the other is right: every byte can still be read.
    Redundancy,
    /// Some bytes of the disk cannot be read, or belong to two places.
    Loss,
}

/// Something that a check found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// The file.
    pub path: PathBuf,
    /// The byte of the file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// One sentence.
    pub sentence: String,
}

/// Most findings that are kept; the rest is counted. A disk with more than this is gone.
pub const FINDINGS_MAX: usize = 1000;

/// The result of a check.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct CheckReport {
    /// What was found, at most [`FINDINGS_MAX`].
    pub findings: Vec<Finding>,
    /// Findings of severity [`Severity::Loss`], all of them.
    pub losses: u64,
    /// Findings of severity [`Severity::Redundancy`], all of them.
    pub redundancies: u64,
    /// Bytes of grains that nothing refers to.
    pub leaked_bytes: u64,
    /// Grains that are allocated.
    pub grains_allocated: u64,
    /// Grains of the whole disk, over all extents of this link.
    pub grains_total: u64,
}

impl CheckReport {
    /// Whether nothing worse than a note was found.
    pub fn is_clean(&self) -> bool {
        self.losses == 0 && self.redundancies == 0 && self.leaked_bytes == 0
    }

    /// Whether every byte of the disk can be read.
    pub fn is_readable(&self) -> bool {
        self.losses == 0
    }

    pub(crate) fn add(&mut self, finding: Finding) {
        match finding.severity {
            Severity::Loss => self.losses += 1,
            Severity::Redundancy => self.redundancies += 1,
            Severity::Leak | Severity::Note => {}
        }
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(finding);
        }
    }
}

/// Hears how far a long operation is, and may stop it.
pub trait Progress {
    /// `done` of `total` bytes (of the disk, or of metadata) are done. `false` stops the operation
    /// with [`ErrorKind::Cancelled`].
    fn advance(&mut self, done_bytes: u64, total_bytes: u64) -> bool;
}

impl<F: FnMut(u64, u64) -> bool> Progress for F {
    fn advance(&mut self, done_bytes: u64, total_bytes: u64) -> bool {
        self(done_bytes, total_bytes)
    }
}

/// A [`Progress`] for callers who do not care.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn advance(&mut self, _done_bytes: u64, _total_bytes: u64) -> bool {
        true
    }
}

pub(crate) fn advance(
    progress: &mut dyn Progress,
    path: &std::path::Path,
    done_bytes: u64,
    total_bytes: u64,
) -> Result<()> {
    if progress.advance(done_bytes, total_bytes) {
        return Ok(());
    }
    Err(ImageError::new(ErrorKind::Cancelled, path, "the operation was stopped by its caller"))
}
