//! An open image of any kind: its extents, its descriptor, its parent.

use std::{
    ffi::OsString,
    fmt,
    fs::File,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::{
    descriptor::{Descriptor, shown},
    error::{ErrorKind, ImageError, Result},
    extent::{Backing, Extent},
    fix::Sink,
    folder::{Folder, Locks},
    identity::{ContentId, DiskUuid, long_content_id},
    image::{
        Deep, DiskImage, FlatExtent, MapDisk, ReadDisk, Run, RunState, Runs, SECTOR_BYTES,
        WriteDisk,
    },
    kind::Kind,
    report::{CheckReport, Finding, ImageInfo, Progress, Severity},
    storage::Store,
};

/// An open image.
pub(crate) struct Disk {
    pub(crate) kind: Kind,
    pub(crate) path: PathBuf,
    pub(crate) size_bytes: u64,
    /// In order, without gaps, from byte 0 on.
    pub(crate) extents: Vec<Placed>,
    pub(crate) parent: Option<Box<dyn DiskImage>>,
    pub(crate) descriptor: Option<DescriptorHome>,
    /// A UUID that is not in a descriptor.
    pub(crate) own_uuid: Option<DiskUuid>,
    pub(crate) writable: bool,
    /// Set by a failed sync, never cleared.
    pub(crate) latched: AtomicBool,
    /// The content id was renewed since opening.
    pub(crate) renewed: Mutex<bool>,
    /// Locked files, held as long as the image is open.
    pub(crate) locks: Locks,
}

/// An extent and where in the disk it begins.
pub(crate) struct Placed {
    pub(crate) start: u64,
    pub(crate) length: u64,
    pub(crate) extent: Box<dyn Extent>,
}

/// A descriptor and where it is written.
pub(crate) struct DescriptorHome {
    pub(crate) content: Mutex<Descriptor>,
    pub(crate) place: Place,
}

/// Where a descriptor lives.
pub(crate) enum Place {
    /// A file of its own.
    File { folder: Folder, name: OsString },
    /// Sectors of the image's file, from that byte on.
    Embedded { store: Arc<Store>, offset: u64 },
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk")
            .field("kind", &self.kind)
            .field("path", &self.path)
            .field("size_bytes", &self.size_bytes)
            .field("writable", &self.writable)
            .finish_non_exhaustive()
    }
}

impl DescriptorHome {
    pub(crate) fn content(&self) -> MutexGuard<'_, Descriptor> {
        // The content is replaced whole, so a panic elsewhere cannot have left half of it.
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores a changed descriptor, durably. In place, only sectors that differ are written: a new
    /// content id mostly has the length of the old, so that one sector changes.
    fn store(&self, path: &Path, old: &Descriptor, new: &Descriptor) -> Result<()> {
        let bytes = new.text().as_bytes();
        match &self.place {
            Place::File { folder, name } => folder
                .open_file(Path::new(name), false, true)
                .and_then(|file| folder.replace(name, &file, bytes))
                .map_err(|source| ImageError::io("replace", path, source)),
            Place::Embedded { store, offset } => {
                let sector = SECTOR_BYTES as usize;
                let before = old.text().as_bytes();
                // A short content id grows to eight digits: padding makes room, or the text would
                // run into the tables behind it.
                let (bytes, beyond) = bytes.split_at(before.len().min(bytes.len()));
                if beyond.iter().any(|byte| *byte != 0) {
                    let sentence = "its descriptor has no room for a new content id";
                    return Err(ImageError::new(ErrorKind::Full, path, sentence));
                }
                for (index, chunk) in bytes.chunks(sector).enumerate() {
                    let at = index * sector;
                    if before.get(at..at + chunk.len()) != Some(chunk) {
                        store.write(chunk, offset + at as u64)?;
                    }
                }
                store.sync()
            }
        }
    }
}

impl Disk {
    fn check_range(&self, offset: u64, length: u64) -> Result<()> {
        match offset.checked_add(length) {
            Some(end) if end <= self.size_bytes => Ok(()),
            _ => {
                let size = self.size_bytes;
                let sentence = format!("{length} bytes at {offset} leave the disk of {size} bytes");
                Err(ImageError::new(ErrorKind::OutOfRange, &self.path, sentence))
            }
        }
    }

    fn refuse_latched(&self) -> Result<()> {
        if !self.latched.load(Ordering::SeqCst) {
            return Ok(());
        }
        let sentence = "an earlier flush failed, so what the file holds is unknown; \
                        check its storage and open it again";
        Err(ImageError::new(ErrorKind::Latched, &self.path, sentence))
    }

    fn refuse_change(&self) -> Result<()> {
        if !self.writable {
            let sentence = "the image is open read only; open it writable to change it";
            return Err(ImageError::new(ErrorKind::ReadOnly, &self.path, sentence));
        }
        self.refuse_latched()
    }

    /// Before the first change: whatever was layered on the old content must not fit the new.
    fn prepare_change(&self) -> Result<()> {
        self.refuse_change()?;
        let mut renewed = self.renewed.lock().unwrap_or_else(PoisonError::into_inner);
        if !*renewed {
            if self.descriptor.is_some() {
                let id = ContentId::random().map_err(|source| {
                    ImageError::io("draw a content id for", &self.path, source)
                })?;
                self.store_content_id(id)?;
            }
            *renewed = true;
        }
        Ok(())
    }

    fn store_content_id(&self, id: ContentId) -> Result<()> {
        let Some(home) = &self.descriptor else { return Ok(()) };
        let mut content = home.content();
        let mut changed = content.clone();
        let long = long_content_id(id)
            .map_err(|source| ImageError::io("draw a content id for", &self.path, source))?;
        changed.set_content_id(id, &long);
        home.store(&self.path, &content, &changed)?;
        *content = changed;
        Ok(())
    }

    /// Calls `each` for every part of a range: the extent, the offset in it, the part's place in
    /// the range, and what lies under it.
    fn parts(
        &self,
        offset: u64,
        length: u64,
        mut each: impl FnMut(&dyn Extent, u64, std::ops::Range<usize>, Backing<'_>) -> Result<()>,
    ) -> Result<()> {
        let end = offset + length;
        let mut at = offset;
        let mut index = self.extents.partition_point(|placed| placed.start + placed.length <= at);
        while at < end {
            let Some(placed) = self.extents.get(index) else { break };
            let until = end.min(placed.start + placed.length);
            let parent = self.parent.as_deref().map(|parent| parent as &dyn ReadDisk);
            let backing = Backing { parent, start: placed.start };
            let range = (at - offset) as usize..(until - offset) as usize;
            each(placed.extent.as_ref(), at - placed.start, range, backing)?;
            at = until;
            index += 1;
        }
        Ok(())
    }

    /// The state at `offset`, through the chain, and how far it holds.
    fn status(&self, offset: u64, end: u64) -> Result<(RunState, u64)> {
        let index = self.extents.partition_point(|placed| placed.start + placed.length <= offset);
        let Some(placed) = self.extents.get(index) else {
            return Ok((RunState::Unallocated, end - offset));
        };
        let limit = end.min(placed.start + placed.length) - offset;
        let (state, length) = placed.extent.status(offset - placed.start, limit)?;
        let Some(parent) = self.parent.as_deref().filter(|_| state == RunState::Unallocated) else {
            return Ok((state, length));
        };
        let there = parent.size_bytes().saturating_sub(offset).min(length);
        if there == 0 {
            return Ok((RunState::Unallocated, length));
        }
        match parent.extents(offset, there).next() {
            Some(run) => run.map(|run| (run.state, run.length)),
            None => Ok((RunState::Unallocated, length)),
        }
    }

    /// Checks this link of the chain.
    pub(crate) fn examine(
        &self,
        deep: Deep,
        sink: &mut Sink<'_>,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let total = self.size_bytes;
        for placed in &self.extents {
            let mut part = |done: u64, _: u64| progress.advance(placed.start + done, total);
            placed.extent.check(deep, sink, &mut part)?;
        }
        Ok(())
    }

    /// Fills a new image, which nothing is layered on: it keeps its content id, and its files are
    /// written in bulk.
    pub(crate) fn fill_in_bulk(&self, durable: bool) {
        *self.renewed.lock().unwrap_or_else(PoisonError::into_inner) = true;
        for store in self.extents.iter().filter_map(|placed| placed.extent.store()) {
            store.write_in_bulk(durable);
        }
    }

    fn latching(&self, result: Result<()>) -> Result<()> {
        if result.is_err() {
            self.latched.store(true, Ordering::SeqCst);
        }
        result
    }
}

impl ReadDisk for Disk {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.check_range(offset, buf.len() as u64)?;
        self.parts(offset, buf.len() as u64, |extent, at, range, backing| {
            extent.read(&mut buf[range], at, backing)
        })
    }
}

impl MapDisk for Disk {
    fn extents(&self, offset: u64, length: u64) -> Runs<'_> {
        match self.check_range(offset, length) {
            Ok(()) => Box::new(DiskRuns { disk: self, next: offset, end: offset + length }),
            Err(error) => Box::new(std::iter::once(Err(error))),
        }
    }

    fn survey(&self, progress: &mut dyn Progress) -> Result<()> {
        for placed in &self.extents {
            placed.extent.survey(progress)?;
        }
        self.parent.as_ref().map_or(Ok(()), |parent| parent.survey(progress))
    }

    fn findings(&self) -> Vec<Finding> {
        let mut findings: Vec<_> =
            self.extents.iter().flat_map(|placed| placed.extent.findings()).collect();
        findings.extend(self.parent.iter().flat_map(|parent| parent.findings()));
        findings
    }
}

impl WriteDisk for Disk {
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.check_range(offset, buf.len() as u64)?;
        self.prepare_change()?;
        self.parts(offset, buf.len() as u64, |extent, at, range, backing| {
            extent.write(&buf[range], at, backing)
        })
    }

    fn write_zeroes_at(&self, offset: u64, length: u64) -> Result<()> {
        self.check_range(offset, length)?;
        self.prepare_change()?;
        self.parts(offset, length, |extent, at, range, backing| {
            extent.zero(at, range.len() as u64, backing)
        })
    }

    fn trim(&self, offset: u64, length: u64) -> Result<()> {
        self.check_range(offset, length)?;
        self.prepare_change()?;
        self.parts(offset, length, |extent, at, range, backing| {
            extent.trim(at, range.len() as u64, backing)
        })
    }

    fn flush(&self) -> Result<()> {
        self.refuse_latched()?;
        if !self.writable {
            return Ok(());
        }
        for placed in &self.extents {
            self.latching(placed.extent.flush())?;
        }
        // Another thread's sync may have failed meanwhile and taken the kernel's only report of
        // the error with it.
        self.refuse_latched()
    }
}

impl DiskImage for Disk {
    fn kind(&self) -> Kind {
        self.kind
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn flat(&self) -> Option<FlatExtent<'_>> {
        match &self.extents[..] {
            [placed] if self.parent.is_none() => placed.extent.flat(),
            _ => None,
        }
    }

    fn content_id(&self) -> Option<ContentId> {
        self.descriptor.as_ref().map(|home| home.content().content_id())
    }

    fn set_content_id(&self, id: ContentId) -> Result<()> {
        self.refuse_change()?;
        if id.is_reserved() {
            let sentence = format!("the content id {id} has a meaning of its own; choose another");
            return Err(ImageError::new(ErrorKind::Invalid, &self.path, sentence));
        }
        self.store_content_id(id)?;
        *self.renewed.lock().unwrap_or_else(PoisonError::into_inner) = true;
        Ok(())
    }

    fn uuid(&self) -> Option<DiskUuid> {
        let described = self.descriptor.as_ref().and_then(|home| home.content().uuid());
        described.or(self.own_uuid)
    }

    fn info(&self) -> Result<ImageInfo> {
        let mut extents = Vec::with_capacity(self.extents.len());
        let (mut findings, mut stored_bytes) = (Vec::new(), 0_u64);
        for placed in &self.extents {
            extents.push(placed.extent.info()?);
            findings.extend(placed.extent.findings());
            if let Some(store) = placed.extent.store() {
                stored_bytes = stored_bytes.saturating_add(store.stored_bytes()?);
            }
        }
        findings.extend(self.kind.caution(self.size_bytes).map(|sentence| Finding {
            severity: Severity::Note,
            path: self.path.clone(),
            offset: None,
            sentence: sentence.into(),
        }));
        let content = self.descriptor.as_ref().map(|home| home.content().clone());
        let text = |key: &str| {
            let content = content.as_ref()?;
            Some(shown(content.text().get(key)?, content.encoding()))
        };
        let parent_id = content.as_ref().map(Descriptor::parent_content_id);
        Ok(ImageInfo {
            kind: self.kind,
            path: self.path.clone(),
            size_bytes: self.size_bytes,
            stored_bytes,
            create_type: content.as_ref().map(|content| content.create_type().to_owned()),
            content_id: content.as_ref().map(|content| content.content_id().to_string()),
            parent_content_id: parent_id
                .filter(|id| *id != ContentId::NO_PARENT)
                .map(|id| id.to_string()),
            uuid: self.uuid().map(|uuid| uuid.to_string()),
            adapter: text("ddb.adapterType"),
            hardware_version: text("ddb.virtualHWVersion"),
            thin: text("ddb.thinProvisioned").is_some_and(|value| value == "1"),
            extents,
            findings,
            parent: match &self.parent {
                Some(parent) => Some(Box::new(parent.info()?)),
                None => None,
            },
        })
    }

    fn check(&self, deep: Deep, progress: &mut dyn Progress) -> Result<CheckReport> {
        let mut report = CheckReport::default();
        self.examine(deep, &mut Sink::of_check(&mut report), progress)?;
        if let Some(parent) = &self.parent {
            let below = parent.check(deep, progress)?;
            report.losses += below.losses;
            report.redundancies += below.redundancies;
            report.leaked_bytes = report.leaked_bytes.saturating_add(below.leaked_bytes);
            report.grains_allocated += below.grains_allocated;
            report.grains_total += below.grains_total;
            let room = crate::report::FINDINGS_MAX.saturating_sub(report.findings.len());
            report.findings.extend(below.findings.into_iter().take(room));
        }
        if self.content_id() == Some(ContentId::NO_PARENT) {
            report.add(Finding {
                severity: Severity::Note,
                path: self.path.clone(),
                offset: None,
                sentence: "its content id is the one that means no parent".into(),
            });
        }
        Ok(report)
    }
}

impl Drop for Disk {
    /// Closes what was written. Who must know that it is durable calls `flush` first: here an
    /// error has nobody to hear it, and the unclean mark stays in the file instead.
    fn drop(&mut self) {
        let changed = *self.renewed.lock().unwrap_or_else(PoisonError::into_inner);
        if changed && self.flush().is_ok() {
            for placed in &self.extents {
                let _ = placed.extent.close();
            }
        }
    }
}

/// Runs of a disk, neighbours of one state joined.
struct DiskRuns<'a> {
    disk: &'a Disk,
    next: u64,
    end: u64,
}

/// Looks that one run may take, some seconds: 62 TiB in tables of 32 MiB need half as many.
const LOOKS_MAX: u32 = 1 << 22;

impl Iterator for DiskRuns<'_> {
    type Item = Result<Run>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.next >= self.end {
            return None;
        }
        let offset = self.next;
        let mut run: Option<Run> = None;
        for _ in 0..LOOKS_MAX {
            match self.disk.status(self.next, self.end) {
                // A run never has no bytes, or this would not end.
                Ok((_, 0)) => break,
                Ok((state, length)) => match &mut run {
                    Some(run) if run.state != state => break,
                    Some(run) => run.length += length,
                    None => run = Some(Run { offset, length, state }),
                },
                Err(error) if run.is_none() => {
                    self.next = self.end;
                    return Some(Err(error));
                }
                // Told at the next call.
                Err(_) => break,
            }
            self.next = run.map_or(self.next, |run| run.offset + run.length);
            if self.next >= self.end {
                break;
            }
        }
        run.map(Ok)
    }
}

/// An image whose disk is one run of bytes in one file, for an engine that does its own I/O.
#[derive(Debug)]
pub struct FlatImage {
    image: Box<dyn DiskImage>,
}

impl FlatImage {
    /// Takes an open image.
    ///
    /// # Errors
    /// Its disk is not one run of bytes in one file ([`ErrorKind::Unsupported`]).
    pub fn new(image: Box<dyn DiskImage>) -> Result<Self> {
        if image.flat().is_some() {
            return Ok(Self { image });
        }
        let sentence = format!(
            "a {} disk is not one run of bytes in one file; convert it to vmfs, monolithicFlat or raw",
            image.kind()
        );
        Err(ImageError::new(ErrorKind::Unsupported, image.path(), sentence))
    }

    /// The image.
    pub fn image(&self) -> &dyn DiskImage {
        self.image.as_ref()
    }

    /// The file region that holds the disk.
    pub fn extent(&self) -> FlatExtent<'_> {
        // `new` has seen that there is one, and an image does not change its kind.
        self.image.flat().unwrap_or_else(|| unreachable!("an open flat image lost its extent"))
    }

    /// Size of the disk, bytes.
    pub fn size_bytes(&self) -> u64 {
        self.image.size_bytes()
    }

    /// The file that holds the disk's bytes.
    pub fn extent_path(&self) -> &Path {
        self.extent().path
    }

    /// That file, open.
    pub fn file(&self) -> &File {
        self.extent().file
    }

    /// Where the disk starts in it, bytes.
    pub fn base_offset_bytes(&self) -> u64 {
        self.extent().base_offset_bytes
    }

    /// The content id, which changes when the content does; `None` for a kind without one.
    pub fn content_id(&self) -> Option<ContentId> {
        self.image.content_id()
    }

    /// Gives the disk a new content id, durably: whatever was layered on the old content must not
    /// be layered on this one.
    ///
    /// # Errors
    /// As [`DiskImage::set_content_id`].
    pub fn renew_content_id(&self) -> Result<()> {
        let id = ContentId::random()
            .map_err(|source| ImageError::io("draw a content id for", self.image.path(), source))?;
        self.image.set_content_id(id)
    }
}
