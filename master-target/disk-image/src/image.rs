//! Opening images.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::create::{content_id, failed, replace_file};
use crate::descriptor::{DESCRIPTOR_BYTES_MAX, Descriptor, Extent, ExtentKind, stays_inside};
use crate::{ImageError, Kind, SECTOR_BYTES};

/// How to open an image.
#[derive(Debug, Clone, Copy, Default)]
pub struct OpenOptions {
    /// For writing; a second writer is refused.
    pub writable: bool,
    /// The kind it must be; any when absent.
    pub kind: Option<Kind>,
    /// Follow an extent's path out of the descriptor's folder.
    pub allow_outside: bool,
}

/// An image whose disk is one run of bytes in one file.
#[derive(Debug)]
pub struct FlatImage {
    kind: Kind,
    path: PathBuf,
    extent_path: PathBuf,
    file: File,
    base_offset_bytes: u64,
    size_bytes: u64,
}

/// Opens an image.
pub fn open(path: &Path, options: &OpenOptions) -> Result<FlatImage, ImageError> {
    let found = read_descriptor(path)?;
    let image = match found {
        None => open_raw(path, options)?,
        Some(descriptor) => open_flat(path, &descriptor, options)?,
    };
    if let Some(expected) = options.kind.filter(|expected| *expected != image.kind) {
        let (found, expected) = (image.kind.to_string(), expected.to_string());
        return Err(ImageError::Kind { path: path.to_owned(), found, expected });
    }
    if options.writable && flock(&image.file, FlockOperation::NonBlockingLockExclusive).is_err() {
        return Err(ImageError::Busy { path: image.extent_path });
    }
    Ok(image)
}

/// The descriptor at `path`, or `None` when the file does not start like one.
fn read_descriptor(path: &Path) -> Result<Option<Descriptor>, ImageError> {
    let file = File::open(path).map_err(failed("open", path))?;
    let mut head = Vec::new();
    (&file).take(512).read_to_end(&mut head).map_err(failed("read", path))?;
    if Descriptor::parse(&head).is_err() {
        return Ok(None);
    }
    let mut text = head;
    (&file).take(DESCRIPTOR_BYTES_MAX).read_to_end(&mut text).map_err(failed("read", path))?;
    if text.len() as u64 > DESCRIPTOR_BYTES_MAX {
        return Err(wrong(path, "the descriptor is larger than 4 MiB".into()));
    }
    Descriptor::parse(&text).map(Some).map_err(|sentence| wrong(path, sentence))
}

fn wrong(path: &Path, sentence: String) -> ImageError {
    ImageError::Descriptor { path: path.to_owned(), sentence }
}

fn open_file(path: &Path, writable: bool) -> Result<File, ImageError> {
    File::options().read(true).write(writable).open(path).map_err(failed("open", path))
}

fn open_raw(path: &Path, options: &OpenOptions) -> Result<FlatImage, ImageError> {
    use std::io::{Seek, SeekFrom};
    let mut file = open_file(path, options.writable)?;
    // Seeking also tells the size of a block device.
    let size_bytes = file.seek(SeekFrom::End(0)).map_err(failed("measure", path))?;
    let (path, extent_path) = (path.to_owned(), path.to_owned());
    Ok(FlatImage { kind: Kind::Raw, path, extent_path, file, base_offset_bytes: 0, size_bytes })
}

fn open_flat(
    path: &Path,
    descriptor: &Descriptor,
    options: &OpenOptions,
) -> Result<FlatImage, ImageError> {
    let create_type = descriptor.get("createType").unwrap_or_default();
    let known = [Kind::MonolithicFlat, Kind::Vmfs];
    let kind = known.into_iter().find(|kind| kind.create_type() == Some(create_type.as_str()));
    let Some(kind) = kind else {
        let found = create_type.chars().take(64).collect();
        let expected = "raw, monolithicFlat or vmfs".into();
        return Err(ImageError::Kind { path: path.to_owned(), found, expected });
    };
    let extents = descriptor.extents().map_err(|sentence| wrong(path, sentence))?;
    let [extent] = &extents[..] else {
        let sentence = format!("a {kind} disk has one extent, this one names {}", extents.len());
        return Err(wrong(path, sentence));
    };
    let wanted = if kind == Kind::Vmfs { ExtentKind::Vmfs } else { ExtentKind::Flat };
    if extent.kind != wanted {
        return Err(wrong(
            path,
            format!("a {kind} disk cannot have an extent of kind {:?}", extent.kind),
        ));
    }
    if !options.allow_outside && !stays_inside(&extent.file) {
        let file = extent.file.display();
        return Err(wrong(
            path,
            format!("its extent `{file}` leaves the descriptor's folder, which is not followed"),
        ));
    }
    let Extent { sectors, offset_sectors, file: name, .. } = extent;
    let extent_path = path.with_file_name(name);
    let file = open_file(&extent_path, options.writable)?;
    let (size_bytes, base_offset_bytes) = (sectors * SECTOR_BYTES, offset_sectors * SECTOR_BYTES);
    let expected_bytes = size_bytes.saturating_add(base_offset_bytes);
    let found_bytes = file.metadata().map_err(failed("measure", &extent_path))?.len();
    if found_bytes < expected_bytes {
        return Err(ImageError::ExtentSize { path: extent_path, found_bytes, expected_bytes });
    }
    Ok(FlatImage { kind, path: path.to_owned(), extent_path, file, base_offset_bytes, size_bytes })
}

impl FlatImage {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Size of the disk.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The image's own path: the descriptor, for a VMDK.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file that holds the disk's bytes.
    pub fn extent_path(&self) -> &Path {
        &self.extent_path
    }

    /// That file, open.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where the disk starts in it.
    pub fn base_offset_bytes(&self) -> u64 {
        self.base_offset_bytes
    }

    /// The content id, which changes when the content does; `None` for raw.
    pub fn content_id(&self) -> Result<Option<u32>, ImageError> {
        Ok(read_descriptor(&self.path)?.and_then(|descriptor| descriptor.content_id()))
    }

    /// Gives the disk a new content id, durably: whatever was layered on the old content must not
    /// be layered on this one. Does nothing for raw, which has none.
    pub fn renew_content_id(&self) -> Result<(), ImageError> {
        let Some(mut descriptor) = read_descriptor(&self.path)? else { return Ok(()) };
        let old = descriptor.content_id();
        let mut id = content_id(&random());
        if Some(id) == old {
            id ^= 1;
        }
        descriptor.set("CID", &format!("{id:08x}"));
        if let Some(long) = descriptor.get("ddb.longContentID").filter(|long| long.len() == 32) {
            descriptor.set(
                "ddb.longContentID",
                &format!(" \"{}{id:08x}\"", long.get(..24).unwrap_or_default()),
            );
        }
        replace_file(&self.path, &descriptor.bytes())
    }
}

/// Random bytes from the kernel.
pub(crate) fn random() -> [u8; 32] {
    let mut bytes = [0; 32];
    let read = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    if read.is_err() {
        // Without /dev the clock must do: these bytes name things, they protect nothing.
        let now = std::time::SystemTime::now();
        let nanos = now.duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_nanos());
        bytes[..16].copy_from_slice(&nanos.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    }
    bytes
}
