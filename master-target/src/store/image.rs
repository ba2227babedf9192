//! The files that hold the machine's disks.

use backhaul_proto::batch::RecordKind;
use backhaul_proto::id::DiskIndex;

use crate::apply::{Content, Extent, plan};
use crate::batch_buffer::BatchView;
use crate::storage::{FileId, Op, OpenMode, Storage, StorageError};
use crate::store::{ImageFile, StoreError};

struct Image {
    place: ImageFile,
    file: FileId,
    /// Written since the last sync.
    dirty: bool,
}

/// The images of a machine's disks, in the order of the disks.
pub(super) struct Images {
    images: Vec<Image>,
}

impl Images {
    pub(super) fn open(
        storage: &mut dyn Storage,
        files: Vec<ImageFile>,
    ) -> Result<Self, StoreError> {
        let mut images = Vec::with_capacity(files.len());
        for place in files {
            let file = storage.open(&place.path, OpenMode::ReadWrite)?;
            let found_bytes = storage.len_bytes(file)?;
            let expected_bytes = place.base_offset_bytes.saturating_add(place.size_bytes);
            if found_bytes < expected_bytes {
                return Err(StoreError::ImageSize {
                    path: place.path,
                    found_bytes,
                    expected_bytes,
                });
            }
            // What a killed predecessor wrote may still be in the page cache only.
            images.push(Image { place, file, dirty: true });
        }
        Ok(Self { images })
    }

    pub(super) fn close(&mut self, storage: &mut dyn Storage) {
        for image in self.images.drain(..) {
            storage.close(image.file);
        }
    }

    /// Checks that every record of a batch lies inside its disk.
    pub(super) fn check(&self, batch: &BatchView<'_>) -> Result<(), StoreError> {
        for record in batch.records {
            let (RecordKind::Data { offset_bytes, len_bytes }
            | RecordKind::Zero { offset_bytes, len_bytes, .. }) = record.kind
            else {
                continue;
            };
            let size_bytes = self.size_bytes(record.disk);
            let end_bytes = offset_bytes.saturating_add(len_bytes.into());
            if end_bytes > size_bytes {
                let (batch, disk) = (batch.header.batch, record.disk);
                return Err(StoreError::Bounds { batch, disk, end_bytes, size_bytes });
            }
        }
        Ok(())
    }

    fn size_bytes(&self, disk: DiskIndex) -> u64 {
        self.images.get(usize::from(disk.0)).map_or(0, |image| image.place.size_bytes)
    }

    /// Writes what a run of batches leaves behind, all at once.
    pub(super) fn write(
        &mut self,
        storage: &mut dyn Storage,
        batches: &[BatchView<'_>],
    ) -> Result<(), StoreError> {
        let extents = self.plan(batches)?;
        let mut ops = self.ops(&extents, batches);
        storage.run(&mut ops).map_err(|error| full_or_io(error, batches))
    }

    fn plan(&mut self, batches: &[BatchView<'_>]) -> Result<Vec<Extent>, StoreError> {
        for batch in batches {
            self.check(batch)?;
        }
        let extents = plan(batches);
        for extent in &extents {
            self.images[usize::from(extent.disk.0)].dirty = true;
        }
        Ok(extents)
    }

    fn ops<'a>(&self, extents: &[Extent], batches: &[BatchView<'a>]) -> Vec<Op<'a>> {
        let op = |extent: &Extent| {
            let image = &self.images[usize::from(extent.disk.0)];
            let file = image.file;
            let offset_bytes = image.place.base_offset_bytes + extent.offset_bytes;
            match &extent.content {
                Content::Data { batch, range } => {
                    Op::Write { file, offset_bytes, buf: &batches[*batch].data[range.clone()] }
                }
                Content::Zero { len_bytes, may_unmap } => {
                    Op::Zero { file, offset_bytes, len_bytes: *len_bytes, may_unmap: *may_unmap }
                }
            }
        };
        extents.iter().map(op).collect()
    }

    /// Makes all images durable.
    pub(super) fn sync(&mut self, storage: &mut dyn Storage) -> Result<(), StoreError> {
        let dirty = self.images.iter().filter(|image| image.dirty);
        let mut ops: Vec<_> = dirty.map(|image| Op::Sync { file: image.file }).collect();
        storage.run(&mut ops)?;
        for image in &mut self.images {
            image.dirty = false;
        }
        Ok(())
    }

    pub(super) fn read(
        &self,
        storage: &mut dyn Storage,
        disk: DiskIndex,
        offset_bytes: u64,
        buf: &mut [u8],
    ) -> Result<(), StoreError> {
        let end_bytes = offset_bytes.saturating_add(buf.len() as u64);
        let size_bytes = self.size_bytes(disk);
        let image = self.images.get(usize::from(disk.0)).filter(|_| end_bytes <= size_bytes);
        let Some(image) = image else {
            return Err(StoreError::ReadBounds { disk, end_bytes, size_bytes });
        };
        let offset_bytes = image.place.base_offset_bytes + offset_bytes;
        Ok(storage.run(&mut [Op::Read { file: image.file, offset_bytes, buf }])?)
    }
}

/// A write that found no space changed nothing that counts: the journal still has the batch.
fn full_or_io(source: StorageError, batches: &[BatchView<'_>]) -> StoreError {
    if source.is_full() {
        let needed_bytes = batches.iter().map(|batch| batch.data.len() as u64).sum();
        StoreError::Full { path: source.path.clone(), needed_bytes, source }
    } else {
        StoreError::Io(source)
    }
}
