//! Making images.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::image::random;
use crate::{AdapterType, DISK_BYTES_MAX, Geometry, ImageError, Kind, SECTOR_BYTES};

/// What to make.
#[derive(Debug, Clone)]
pub struct CreateOptions {
    /// The kind.
    pub kind: Kind,
    /// Size of the disk, a multiple of 512.
    pub size_bytes: u64,
    /// The controller that a VMDK asks for.
    pub adapter: AdapterType,
}

pub(crate) fn failed<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> ImageError + 'a {
    move |source| match source.kind() {
        io::ErrorKind::AlreadyExists => ImageError::Exists { path: path.to_owned() },
        _ => ImageError::Io { action, path: path.to_owned(), source },
    }
}

/// The flat extent that belongs to a descriptor: `NAME.vmdk` has `NAME-flat.vmdk`.
fn flat_path(descriptor: &Path) -> PathBuf {
    let mut name = descriptor.file_stem().unwrap_or_default().to_owned();
    name.push("-flat.vmdk");
    descriptor.with_file_name(name)
}

/// Makes a sparse image that reads as zeroes. The extent is on stable storage before the
/// descriptor that names it; nothing is overwritten.
pub fn create(path: &Path, options: &CreateOptions) -> Result<(), ImageError> {
    let size_bytes = options.size_bytes;
    if size_bytes == 0 || !size_bytes.is_multiple_of(SECTOR_BYTES) || size_bytes > DISK_BYTES_MAX {
        return Err(ImageError::Size { size_bytes });
    }
    let Some(create_type) = options.kind.create_type() else {
        make_sparse(path, size_bytes)?;
        return sync_folder(path);
    };
    if path.exists() {
        return Err(ImageError::Exists { path: path.to_owned() });
    }
    let flat = flat_path(path);
    make_sparse(&flat, size_bytes)?;
    let text = describe(options, create_type, &flat);
    replace_file(path, text.as_bytes())
}

fn make_sparse(path: &Path, size_bytes: u64) -> Result<(), ImageError> {
    let file = File::create_new(path).map_err(failed("create", path))?;
    file.set_len(size_bytes).map_err(failed("enlarge", path))?;
    file.sync_all().map_err(failed("sync", path))
}

fn describe(options: &CreateOptions, create_type: &str, flat: &Path) -> String {
    let sectors = options.size_bytes / SECTOR_BYTES;
    let geometry = Geometry::of(options.size_bytes, options.adapter);
    let name = flat.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let (extent, thin) = match options.kind {
        Kind::Vmfs => (format!("RW {sectors} VMFS \"{name}\""), "ddb.thinProvisioned = \"1\"\n"),
        _ => (format!("RW {sectors} FLAT \"{name}\" 0"), ""),
    };
    let bytes: [u8; 32] = random();
    let cid = content_id(&bytes);
    let long_id: String = bytes[4..16].iter().map(|byte| format!("{byte:02x}")).collect();
    // VMware starts its disk UUIDs with 60 00 C2 (its IEEE company id, in NAA form).
    let uuid: Vec<String> = [0x60, 0x00, 0xc2, 0x9b]
        .iter()
        .chain(&bytes[16..28])
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let Geometry { cylinders, heads, sectors: track } = geometry;
    let (uuid_head, uuid_tail) = (uuid[..8].join(" "), uuid[8..].join(" "));
    format!(
        "# Disk DescriptorFile\nversion=1\nencoding=\"UTF-8\"\nCID={cid:08x}\n\
         parentCID=ffffffff\ncreateType=\"{create_type}\"\n\n\
         # Extent description\n{extent}\n\n\
         # The Disk Data Base\n#DDB\n\n\
         ddb.adapterType = \"{adapter}\"\n\
         ddb.geometry.cylinders = \"{cylinders}\"\n\
         ddb.geometry.heads = \"{heads}\"\n\
         ddb.geometry.sectors = \"{track}\"\n\
         ddb.longContentID = \"{long_id}{cid:08x}\"\n{thin}\
         ddb.uuid = \"{uuid_head}-{uuid_tail}\"\n\
         ddb.virtualHWVersion = \"14\"\n",
        adapter = options.adapter,
    )
}

/// A content id from random bytes: 0xfffffffe and 0xffffffff have meanings of their own.
pub(crate) fn content_id(bytes: &[u8; 32]) -> u32 {
    let id = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    id.min(0xffff_fffd)
}

/// Replaces a file so that after a crash it is the old one or the new one.
pub(crate) fn replace_file(path: &Path, content: &[u8]) -> Result<(), ImageError> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let temporary = path.with_file_name(name);
    let mut file = File::create(&temporary).map_err(failed("create", &temporary))?;
    file.write_all(content).map_err(failed("write", &temporary))?;
    file.sync_all().map_err(failed("sync", &temporary))?;
    fs::rename(&temporary, path).map_err(failed("replace", path))?;
    sync_folder(path)
}

fn sync_folder(path: &Path) -> Result<(), ImageError> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed("sync", folder))
}
