//! New images: sparse, durable, never over an existing file.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io,
    path::{Path, PathBuf},
};

use crate::{
    descriptor::{Composition, compose},
    error::{ErrorKind, ImageError, Result},
    folder::Folder,
    geometry::AdapterType,
    identity::{ContentId, DiskUuid, long_content_id},
    image::{DISK_BYTES_MAX, DiskImage, SECTOR_BYTES},
    kind::Kind,
    open::{OpenOptions, open},
    sparse::create::{layout, write_empty},
    storage::{Storage, Store},
    stream::StreamWriter,
    vhd,
};

/// Sectors of an extent of a disk that is split: 2047 MiB, as VMware's products split it, so that
/// a full sparse extent with its tables stays a file under 2 GiB.
const SPLIT_SECTORS: u64 = 2047 << 11;

/// What to create. [`CreateOptions::new`] has the defaults; change fields as needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateOptions {
    /// The kind of image.
    pub kind: Kind,
    /// Bytes of the disk: a multiple of 512, at most [`DISK_BYTES_MAX`].
    pub size_bytes: u64,
    /// The adapter that the descriptor names; decides the geometry too. Default: lsilogic, which
    /// is right for everything but IDE and very old guests.
    pub adapter: AdapterType,
    /// For a `vmfs` disk: thin (a hole, and `ddb.thinProvisioned`) or thick (space reserved).
    /// Default: thin.
    pub thin: bool,
    /// The disk's UUID. Default: a fresh one. Set it where the disk must keep its identity.
    pub uuid: Option<DiskUuid>,
    /// The first content id. Default: a random one.
    pub content_id: Option<ContentId>,
    /// The virtual hardware version that the descriptor names. Default: 10 (ESXi 5.5), the first
    /// with disks of 62 TiB; a host refuses a disk that names a newer version than it knows.
    pub hardware_version: u32,
    /// Makes a delta on this image: of a hosted sparse kind, and of at least the parent's size.
    /// In the new image's folder, or opened with [`OpenOptions::allow_outside`] later.
    pub parent: Option<PathBuf>,
    /// Sparse kinds: version 2 of the format, whose tables can say that a grain is zeros. A delta
    /// can then be trimmed. Default: no, which products that only know version 1 can read.
    pub zeroed_grains: bool,
}

impl CreateOptions {
    /// The defaults for a disk of `size_bytes` bytes.
    pub const fn new(kind: Kind, size_bytes: u64) -> Self {
        Self {
            kind,
            size_bytes,
            adapter: AdapterType::LsiLogic,
            thin: true,
            uuid: None,
            content_id: None,
            hardware_version: 10,
            parent: None,
            zeroed_grains: false,
        }
    }
}

/// Creates an image that reads as zeros (or as its parent) and takes no space yet.
///
/// For a VMDK with a descriptor of its own, `path` is that (`NAME.vmdk`), and the data goes to
/// files beside it. When this returns, all are durable. The extents become durable before the
/// descriptor that names them appears, and each file appears complete or not at all: a crash leaves
/// at most extents without a descriptor, or a hidden file `.NAME….new`, never an image that opens
/// and is wrong.
///
/// # Errors
/// A file of either name exists, the size or the name cannot be, the parent cannot be opened, or
/// the file system refuses (as ext4 does above 16 TiB).
pub fn create(path: &Path, options: &CreateOptions) -> Result<()> {
    let name = path.file_name().ok_or_else(|| bad_name(path))?.to_owned();
    create_as(path, &name, options)
}

/// Creates a monolithicSparse image over any storage, which must be empty. `path` is only a name.
///
/// # Errors
/// As [`create`].
pub fn create_storage(
    path: &Path,
    storage: Box<dyn Storage>,
    options: &CreateOptions,
) -> Result<()> {
    if options.kind != Kind::MonolithicSparse || options.parent.is_some() {
        let sentence = "over a storage, only a monolithicSparse image without parent is made";
        return Err(ImageError::new(ErrorKind::Invalid, path, sentence));
    }
    check_size(path, options)?;
    let name = path.file_name().unwrap_or(OsStr::new("disk.vmdk"));
    let (stem, text) =
        (name.to_string_lossy().into_owned(), |extents| describe(path, options, extents, None));
    let sectors = options.size_bytes / SECTOR_BYTES;
    let store = Store::new(path, storage);
    let header = layout(sectors, true, options.zeroed_grains);
    write_empty(&store, &header, &text(vec![(sectors, stem)])?)?;
    store.sync()
}

/// Creates an image at `path` whose extents are named as if it were called `name`: so that it can
/// be filled under a hidden name and appear when it is whole.
pub(crate) fn create_as(path: &Path, name: &OsStr, options: &CreateOptions) -> Result<()> {
    let parent = open_parent(options)?;
    check_size(path, options)?;
    let file_name = path.file_name().ok_or_else(|| bad_name(path))?;
    let folder_path = path.parent().unwrap_or(Path::new(""));
    let folder =
        Folder::open(folder_path).map_err(|source| ImageError::io("open", folder_path, source))?;
    let target = Target { folder: &folder, file_name, path };
    // Asked first for the better message only: publishing refuses to overwrite by itself.
    if folder.path_of(file_name).symlink_metadata().is_ok() {
        let exists = io::Error::from(io::ErrorKind::AlreadyExists);
        return Err(ImageError::io("create", path, exists));
    }
    let size_bytes = options.size_bytes;
    match options.kind {
        Kind::Raw => target.publish(file_name, |store| store.set_length(size_bytes)),
        Kind::FixedVhd => {
            let uuid = uuid_of(path, options)?;
            target.publish(file_name, |store| {
                store.write(&vhd::compose(size_bytes, uuid), size_bytes)
            })
        }
        Kind::StreamOptimized => {
            let options = CreateOptions { uuid: Some(uuid_of(path, options)?), ..options.clone() };
            let name = text_name(name, path)?.to_owned();
            target.publish(file_name, |store| StreamWriter::start(store, &name, &options)?.finish())
        }
        Kind::MonolithicSparse => {
            let sectors = size_bytes / SECTOR_BYTES;
            let extent = (sectors, text_name(name, path)?.to_owned());
            let text = describe(path, options, vec![extent], parent.as_deref())?;
            let header = layout(sectors, true, options.zeroed_grains);
            target.publish(file_name, |store| write_empty(store, &header, &text))
        }
        Kind::MonolithicFlat
        | Kind::TwoGbMaxExtentFlat
        | Kind::Vmfs
        | Kind::TwoGbMaxExtentSparse => target.create_described(name, options, parent.as_deref()),
        kind @ (Kind::VmfsSparse | Kind::SeSparse) => {
            let sentence = format!("{kind} images are only read here; choose another kind");
            Err(ImageError::new(ErrorKind::Unsupported, path, sentence))
        }
    }
}

/// Where an image is made.
struct Target<'a> {
    folder: &'a Folder,
    file_name: &'a OsStr,
    path: &'a Path,
}

impl Target<'_> {
    /// Makes a file appear under its name filled and durable, or not at all.
    fn publish(&self, name: &OsStr, fill: impl FnOnce(&Store) -> Result<()>) -> Result<()> {
        let path = self.folder.path_of(name);
        let mut failed = None;
        let published = self.folder.publish_new(name, |file: &File| {
            let store = Store::new(&path, Box::new(file.try_clone()?));
            fill(&store).map_err(|error| {
                failed = Some(error);
                io::Error::other("filling failed")
            })
        });
        match (published, failed) {
            (_, Some(error)) => Err(error),
            (Err(source), None) => Err(ImageError::io("create", &path, source)),
            (Ok(()), None) => Ok(()),
        }
    }

    fn create_described(
        &self,
        name: &OsStr,
        options: &CreateOptions,
        parent: Option<&dyn DiskImage>,
    ) -> Result<()> {
        let extents = extent_names(name, self.path, options)?;
        let text = describe(self.path, options, extents.clone(), parent)?;
        let mut made: Vec<OsString> = Vec::new();
        let mut make = || {
            for (sectors, extent) in &extents {
                let extent = OsString::from(extent);
                self.publish(&extent, |store| fill_extent(store, *sectors, options))?;
                made.push(extent);
            }
            self.publish(self.file_name, |store| store.write(text.as_bytes(), 0))
        };
        let result = make();
        if result.is_err() {
            for extent in &made {
                // They are ours, they are empty, and without them the call can be made again.
                let _ = self.folder.remove(extent);
            }
        }
        result
    }
}

fn fill_extent(store: &Store, sectors: u64, options: &CreateOptions) -> Result<()> {
    if options.kind == Kind::TwoGbMaxExtentSparse {
        return write_empty(store, &layout(sectors, false, options.zeroed_grains), "");
    }
    store.set_length(sectors * SECTOR_BYTES)?;
    if options.kind == Kind::Vmfs && !options.thin {
        store.reserve(0, sectors * SECTOR_BYTES)?;
    }
    Ok(())
}

/// The extents of a disk with a descriptor of its own: their sectors and names.
fn extent_names(name: &OsStr, path: &Path, options: &CreateOptions) -> Result<Vec<(u64, String)>> {
    let stem = stem(text_name(name, path)?);
    let sectors = options.size_bytes / SECTOR_BYTES;
    let letter = match options.kind {
        Kind::TwoGbMaxExtentFlat => 'f',
        Kind::TwoGbMaxExtentSparse => 's',
        _ => return Ok(vec![(sectors, format!("{stem}-flat.vmdk"))]),
    };
    let count = sectors.div_ceil(SPLIT_SECTORS);
    let part = |index: u64| {
        let length = (sectors - index * SPLIT_SECTORS).min(SPLIT_SECTORS);
        (length, format!("{stem}-{letter}{:03}.vmdk", index + 1))
    };
    Ok((0..count).map(part).collect())
}

pub(crate) fn describe(
    path: &Path,
    options: &CreateOptions,
    extents: Vec<(u64, String)>,
    parent: Option<&dyn DiskImage>,
) -> Result<String> {
    let random = |source| ImageError::io("draw random identities for", path, source);
    let content_id = match options.content_id {
        Some(id) if id.is_reserved() => {
            let sentence = format!("the content id {id} has a meaning of its own; choose another");
            return Err(ImageError::new(ErrorKind::Invalid, path, sentence));
        }
        Some(id) => id,
        None => ContentId::random().map_err(random)?,
    };
    Ok(compose(&Composition {
        kind: options.kind,
        extents,
        content_id,
        long_content_id: long_content_id(content_id).map_err(random)?,
        uuid: uuid_of(path, options)?,
        adapter: options.adapter,
        hardware_version: options.hardware_version,
        thin: options.kind == Kind::Vmfs && options.thin,
        parent: parent.map(|parent| parent_hint(path, parent)).transpose()?,
    }))
}

fn open_parent(options: &CreateOptions) -> Result<Option<Box<dyn DiskImage>>> {
    let Some(path) = &options.parent else { return Ok(None) };
    let fail = |sentence: String| Err(ImageError::new(ErrorKind::Invalid, path, sentence));
    if !matches!(options.kind, Kind::MonolithicSparse | Kind::TwoGbMaxExtentSparse) {
        let kind = options.kind;
        return fail(format!("a {kind} image cannot be a delta; choose monolithicSparse"));
    }
    let parent = open(path, &OpenOptions { allow_outside: true, ..OpenOptions::read_only() })?;
    if parent.content_id().is_none() {
        return fail("it has no content id, so no delta can name it; convert it to a VMDK".into());
    }
    if parent.size_bytes() > options.size_bytes {
        return fail(format!("it is larger than a delta of {} bytes", options.size_bytes));
    }
    Ok(Some(parent))
}

/// Content id and path of a parent, relative where it lies beside its delta.
fn parent_hint(path: &Path, parent: &dyn DiskImage) -> Result<(ContentId, String)> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new(".")).canonicalize();
    let place = match (folder, parent.path().parent()) {
        (Ok(folder), Some(there)) if folder == there => {
            PathBuf::from(parent.path().file_name().unwrap_or_default())
        }
        _ => parent.path().to_owned(),
    };
    let text = text_name(place.as_os_str(), parent.path())?.to_owned();
    Ok((parent.content_id().unwrap_or(ContentId::NO_PARENT), text))
}

fn uuid_of(path: &Path, options: &CreateOptions) -> Result<DiskUuid> {
    let random = |source| ImageError::io("draw random identities for", path, source);
    options.uuid.map_or_else(DiskUuid::random, Ok).map_err(random)
}

fn check_size(path: &Path, options: &CreateOptions) -> Result<()> {
    let size_bytes = options.size_bytes;
    if size_bytes == 0 || size_bytes > DISK_BYTES_MAX || !size_bytes.is_multiple_of(SECTOR_BYTES) {
        let sentence = format!(
            "a disk cannot have {size_bytes} bytes: it needs a multiple of 512, from 512 to 62 TiB"
        );
        return Err(ImageError::new(ErrorKind::Invalid, path, sentence));
    }
    Ok(())
}

/// A name that every reader of a descriptor understands.
fn text_name<'a>(name: &'a OsStr, path: &Path) -> Result<&'a str> {
    name.to_str()
        .filter(|text| !text.contains(|char: char| char == '"' || char.is_control()))
        .ok_or_else(|| bad_name(path))
}

fn bad_name(path: &Path) -> ImageError {
    let sentence = "the name cannot stand in a VMDK descriptor; choose one in UTF-8 without double \
                    quotes and control characters";
    ImageError::new(ErrorKind::Invalid, path, sentence)
}

/// `NAME` of `NAME.vmdk`.
fn stem(name: &str) -> &str {
    match name.char_indices().rev().nth(4) {
        Some((dot, _)) if name[dot..].eq_ignore_ascii_case(".vmdk") && dot > 0 => &name[..dot],
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_are_named_after_the_descriptor() {
        let cases = [
            ("disk.vmdk", "disk"),
            ("Büro 1.VMDK", "Büro 1"),
            ("a.b.vmdk", "a.b"),
            ("disk", "disk"),
            (".vmdk", ".vmdk"),
            ("€€", "€€"),
        ];
        for (name, expected) in cases {
            assert_eq!(stem(name), expected);
        }
        for name in ["a\"b.vmdk", "a\nb.vmdk"] {
            assert!(text_name(OsStr::new(name), Path::new(name)).is_err());
        }
    }

    #[test]
    fn a_split_disk_has_all_its_sectors() {
        let options = CreateOptions::new(Kind::TwoGbMaxExtentSparse, (5 << 30) + 512);
        let names = extent_names(OsStr::new("d.vmdk"), Path::new("d.vmdk"), &options).unwrap();
        assert_eq!(names.len(), 3);
        assert_eq!(names[2].1, "d-s003.vmdk");
        let sectors: u64 = names.iter().map(|(sectors, _)| sectors).sum();
        assert_eq!(sectors * 512, options.size_bytes);
    }
}
