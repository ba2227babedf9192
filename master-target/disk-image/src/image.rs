//! What every disk image can do, whatever its kind.

use std::{fmt, fs::File, path::Path};

use crate::{
    error::Result,
    identity::{ContentId, DiskUuid},
    kind::Kind,
    report::{CheckReport, Finding, ImageInfo, Progress},
};

/// Bytes of a sector: the unit in which VMware's formats count.
pub const SECTOR_BYTES: u64 = 512;

/// Bytes of the largest disk: 62 TiB, the vSphere maximum for a virtual disk.
pub const DISK_BYTES_MAX: u64 = 62 << 40;

/// Reading a disk. Of this and the other capabilities:
///
/// All calls block. Offsets and lengths are bytes from the start of the disk and need no
/// alignment; a range that leaves the disk is refused and nothing of it is done. Calls may run
/// in parallel; two writes that overlap are not ordered.
pub trait ReadDisk: Send + Sync {
    /// Bytes of the disk the guest sees.
    fn size_bytes(&self) -> u64;

    /// Fills `buf` from `offset`, through the chain of parents.
    ///
    /// # Errors
    /// The range leaves the disk, the image is damaged there, or the file system fails.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;
}

/// Telling what is stored, so that a reader passes over holes.
pub trait MapDisk: ReadDisk {
    /// What is stored in a range, in order and without gaps, through the chain of parents.
    ///
    /// Looks as it goes and holds no list, so the cost is the caller's pace, and a write made
    /// meanwhile may or may not show. Neighbours of one state come as one run.
    fn extents(&self, offset: u64, length: u64) -> Runs<'_>;

    /// Looks at the metadata of the whole chain, for a caller who is to read all of the disk: from then
    /// on, grains that share a place in the file, of which one has lost its content, cannot be read.
    /// Who reads parts without it meets the other damage, but not that. Takes as long as reading the
    /// tables does, 64 MiB for each TiB that is stored, and a bit of memory for each grain.
    ///
    /// # Errors
    /// The file system fails, or `progress` stops it. Damage is no error here.
    fn survey(&self, _progress: &mut dyn Progress) -> Result<()> {
        Ok(())
    }

    /// What was met so far, in the whole chain, of damage that could be worked around: at most
    /// [`FINDINGS_MAX`](crate::FINDINGS_MAX) for each extent.
    fn findings(&self) -> Vec<Finding> {
        Vec::new()
    }
}

/// Changing a disk, and making the changes durable.
pub trait WriteDisk: ReadDisk {
    /// Writes all of `buf` at `offset`. Durable after the next [`flush`](Self::flush).
    ///
    /// The first change after opening renews the content id, so that a delta on the old content is
    /// not taken for one on the new.
    ///
    /// # Errors
    /// The image or its kind is read only, it is latched, the range leaves the disk, the format is
    /// full, or the file system fails.
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()>;

    /// Makes the range read as zeros, without storing them where the format can say so. Durable
    /// after the next [`flush`](Self::flush).
    ///
    /// # Errors
    /// As [`write_at`](Self::write_at).
    fn write_zeroes_at(&self, offset: u64, length: u64) -> Result<()>;

    /// Says that the range is no longer needed, and frees it where the format can say so.
    ///
    /// This is advice: afterwards a range reads as zeros or as before. A caller that needs zeros
    /// uses [`write_zeroes_at`](Self::write_zeroes_at).
    ///
    /// # Errors
    /// As [`write_at`](Self::write_at).
    fn trim(&self, offset: u64, length: u64) -> Result<()>;

    /// Puts every write that returned before this call on stable storage, data before the tables
    /// that name it.
    ///
    /// A failed flush latches the image: the kernel forgets which pages it could not write, so a
    /// later flush that succeeds would prove nothing. Every further change is then refused until
    /// the image is opened again.
    ///
    /// # Errors
    /// The image is latched, or the file system fails.
    fn flush(&self) -> Result<()>;
}

/// A disk image that is open: a disk with a file, a kind and an identity. An operation asks for the
/// capabilities that it uses; this is what [`open`](crate::open()) hands out.
pub trait DiskImage: MapDisk + WriteDisk + fmt::Debug {
    /// The kind the image was opened as.
    fn kind(&self) -> Kind;

    /// The image's own path: the descriptor, where there is one.
    fn path(&self) -> &Path;

    /// The single file region that holds the whole disk, where the kind has one.
    fn flat(&self) -> Option<FlatExtent<'_>>;

    /// The content id; none for a kind without one.
    fn content_id(&self) -> Option<ContentId>;

    /// Gives the content a new id, durably; `ddb.longContentID` follows where there is one. Does
    /// nothing to an image that stores none.
    ///
    /// # Errors
    /// The image is read only or latched, the id is reserved, or the file system fails.
    fn set_content_id(&self, id: ContentId) -> Result<()>;

    /// The disk's UUID; none where the image has none.
    fn uuid(&self) -> Option<DiskUuid>;

    /// What there is to know without reading the disk.
    ///
    /// # Errors
    /// The file system fails.
    fn info(&self) -> Result<ImageInfo>;

    /// Looks at all metadata (and, with `deep`, at everything that carries its own check).
    ///
    /// # Errors
    /// The file system fails. Damage is no error: it is what the report is for.
    fn check(&self, deep: Deep, progress: &mut dyn Progress) -> Result<CheckReport>;
}

/// How far a check goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Deep {
    /// Metadata only.
    No,
    /// Compressed grains are inflated as well.
    Yes,
}

/// The runs of [`MapDisk::extents`].
pub type Runs<'a> = Box<dyn Iterator<Item = Result<Run>> + Send + 'a>;

/// Part of a disk that is stored in one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Run {
    /// First byte, from the start of the disk.
    pub offset: u64,
    /// Bytes; never 0.
    pub length: u64,
    /// How it is stored.
    pub state: RunState,
}

/// How a part of a disk is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// Bytes are stored; they may still all be zero.
    Data,
    /// The format says that it reads as zeros.
    Zero,
    /// Nothing is stored in any link of the chain: it reads as zeros.
    Unallocated,
}

/// A whole disk as one region of one file, for an engine that does its own I/O.
///
/// The image keeps the file open and locked as long as it lives. An engine that writes here must
/// latch its own failed syncs and renew the content id: the image does not see its writes.
#[derive(Debug, Clone, Copy)]
pub struct FlatExtent<'a> {
    /// The file's path, for messages.
    pub path: &'a Path,
    /// The open file; writable if the image is. Its cursor means nothing: use offsets.
    pub file: &'a File,
    /// Where in the file the disk begins, in bytes.
    pub base_offset_bytes: u64,
    /// Bytes of the disk.
    pub length_bytes: u64,
}
