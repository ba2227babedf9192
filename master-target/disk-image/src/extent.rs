//! The parts a disk is made of.

use crate::{
    error::{ErrorKind, ImageError, Result},
    fix::Sink,
    image::{Deep, FlatExtent, ReadDisk, RunState},
    report::{ExtentInfo, Finding, Progress},
    storage::Store,
};

/// One extent of a disk. Offsets are bytes from the extent's start; the disk has checked that the
/// range lies within it.
pub(crate) trait Extent: Send + Sync {
    /// What is stored at `offset`, and for how many bytes that holds: at least 1, at most `limit`.
    /// `Unallocated` is what the parent, if any, answers for.
    fn status(&self, offset: u64, limit: u64) -> Result<(RunState, u64)>;

    /// Fills `buf`, asking `backing` for what is not stored here.
    fn read(&self, buf: &mut [u8], offset: u64, backing: Backing<'_>) -> Result<()>;

    fn write(&self, buf: &[u8], offset: u64, backing: Backing<'_>) -> Result<()>;

    /// Makes the range read as zeros.
    fn zero(&self, offset: u64, length: u64, backing: Backing<'_>) -> Result<()>;

    /// Frees the range where the format can; it reads as zeros or as before.
    fn trim(&self, offset: u64, length: u64, backing: Backing<'_>) -> Result<()>;

    fn flush(&self) -> Result<()>;

    /// Ends a writer's work; called after a flush that succeeded.
    fn close(&self) -> Result<()> {
        Ok(())
    }

    fn info(&self) -> Result<ExtentInfo>;

    /// Its file; none for an extent of zeros.
    fn store(&self) -> Option<&Store>;

    /// Damage met so far that could be worked around.
    fn findings(&self) -> Vec<Finding> {
        Vec::new()
    }

    /// Looks at the metadata as a whole, so that what is read is judged as a check judges it.
    fn survey(&self, _progress: &mut dyn Progress) -> Result<()> {
        Ok(())
    }

    /// Looks at all metadata; with [`Deep::Yes`] at everything that carries its own check.
    fn check(&self, deep: Deep, sink: &mut Sink<'_>, progress: &mut dyn Progress) -> Result<()>;

    fn flat(&self) -> Option<FlatExtent<'_>> {
        None
    }
}

/// What lies under an extent: the parent's bytes, or zeros.
#[derive(Clone, Copy)]
pub(crate) struct Backing<'a> {
    pub(crate) parent: Option<&'a dyn ReadDisk>,
    /// Where in the disk the extent begins, bytes.
    pub(crate) start: u64,
}

impl Backing<'_> {
    pub(crate) fn is_zero(&self) -> bool {
        self.parent.is_none()
    }

    /// Fills `buf` from `offset` of the extent. A parent may be smaller than its child; beyond it
    /// are zeros.
    pub(crate) fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let Some(parent) = self.parent else {
            buf.fill(0);
            return Ok(());
        };
        let at = self.start + offset;
        let there = parent.size_bytes().saturating_sub(at).min(buf.len() as u64) as usize;
        let (inside, beyond) = buf.split_at_mut(there);
        beyond.fill(0);
        if inside.is_empty() { Ok(()) } else { parent.read_at(inside, at) }
    }
}

/// A run of bytes in a file: `FLAT`, `VMFS`, a raw disk, the disk of a fixed VHD.
pub(crate) struct FlatRegion {
    pub(crate) store: Store,
    pub(crate) base_offset_bytes: u64,
    pub(crate) length_bytes: u64,
    /// What to call it in an [`ExtentInfo`].
    pub(crate) format: &'static str,
}

impl Extent for FlatRegion {
    fn status(&self, offset: u64, limit: u64) -> Result<(RunState, u64)> {
        let at = self.base_offset_bytes + offset;
        let (stored, end) = self.store.stored_run(at, at + limit)?;
        // A flat extent stands alone: a hole in it is zeros, not a window to a parent.
        Ok((if stored { RunState::Data } else { RunState::Unallocated }, end - at))
    }

    fn read(&self, buf: &mut [u8], offset: u64, _: Backing<'_>) -> Result<()> {
        self.store.read(buf, self.base_offset_bytes + offset)
    }

    fn write(&self, buf: &[u8], offset: u64, _: Backing<'_>) -> Result<()> {
        self.store.write(buf, self.base_offset_bytes + offset)
    }

    fn zero(&self, offset: u64, length: u64, _: Backing<'_>) -> Result<()> {
        self.store.zero(self.base_offset_bytes + offset, length)
    }

    fn trim(&self, offset: u64, length: u64, _: Backing<'_>) -> Result<()> {
        self.store.free(self.base_offset_bytes + offset, length)
    }

    fn flush(&self) -> Result<()> {
        self.store.sync()
    }

    fn info(&self) -> Result<ExtentInfo> {
        Ok(ExtentInfo {
            path: Some(self.store.path.clone()),
            format: self.format,
            length_bytes: self.length_bytes,
            offset_bytes: self.base_offset_bytes,
            file_bytes: self.store.length()?,
            grain_bytes: None,
            version: None,
            compressed: false,
            unclean: false,
        })
    }

    fn store(&self) -> Option<&Store> {
        Some(&self.store)
    }

    fn check(&self, _: Deep, _: &mut Sink<'_>, _: &mut dyn Progress) -> Result<()> {
        // Its one number, the length, was checked when it was opened.
        Ok(())
    }

    fn flat(&self) -> Option<FlatExtent<'_>> {
        Some(FlatExtent {
            path: &self.store.path,
            file: self.store.file()?,
            base_offset_bytes: self.base_offset_bytes,
            length_bytes: self.length_bytes,
        })
    }
}

/// `ZERO`: sectors that have no file.
pub(crate) struct ZeroRegion {
    pub(crate) length_bytes: u64,
    /// The descriptor, to report a write by.
    pub(crate) path: std::path::PathBuf,
}

impl ZeroRegion {
    fn refused(&self) -> ImageError {
        let sentence = "the range lies in a ZERO extent, which cannot be written; \
                        convert the image to another kind";
        ImageError::new(ErrorKind::ReadOnly, &self.path, sentence)
    }
}

impl Extent for ZeroRegion {
    fn status(&self, _: u64, limit: u64) -> Result<(RunState, u64)> {
        Ok((RunState::Zero, limit))
    }

    fn read(&self, buf: &mut [u8], _: u64, _: Backing<'_>) -> Result<()> {
        buf.fill(0);
        Ok(())
    }

    fn write(&self, _: &[u8], _: u64, _: Backing<'_>) -> Result<()> {
        Err(self.refused())
    }

    fn zero(&self, _: u64, _: u64, _: Backing<'_>) -> Result<()> {
        Ok(())
    }

    fn trim(&self, _: u64, _: u64, _: Backing<'_>) -> Result<()> {
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn info(&self) -> Result<ExtentInfo> {
        Ok(ExtentInfo {
            path: None,
            format: "ZERO",
            length_bytes: self.length_bytes,
            offset_bytes: 0,
            file_bytes: 0,
            grain_bytes: None,
            version: None,
            compressed: false,
            unclean: false,
        })
    }

    fn store(&self) -> Option<&Store> {
        None
    }

    fn check(&self, _: Deep, _: &mut Sink<'_>, _: &mut dyn Progress) -> Result<()> {
        Ok(())
    }
}
