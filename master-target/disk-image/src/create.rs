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
    report::{Progress, Silent, advance},
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
    create_with(path, options, &mut Silent)
}

/// Creates an image as [`create`] does. `progress` hears of the bytes of the disk that have their
/// extents, of which a disk in many files has thousands, and may stop it.
///
/// # Errors
/// As [`create`], or `progress` stops it. What was made is removed.
pub fn create_with(
    path: &Path,
    options: &CreateOptions,
    progress: &mut dyn Progress,
) -> Result<()> {
    let name = path.file_name().ok_or_else(|| bad_name(path))?.to_owned();
    create_as(path, &name, options, progress)
}

/// Looks, without making anything, whether [`create`] could make this image: for a caller who makes
/// it elsewhere first. Only that is seen here which does not need a try.
///
/// # Errors
/// A file of one of its names exists, its folder does not, or the kind, the size or the name cannot
/// be.
pub fn check_new(path: &Path, options: &CreateOptions) -> Result<()> {
    let name = path.file_name().ok_or_else(|| bad_name(path))?;
    vacant_folder(path, name, options).map(|_| ())
}

/// The folder of a new image, in which none of its files exists.
fn vacant_folder(path: &Path, name: &OsStr, options: &CreateOptions) -> Result<Folder> {
    if !options.kind.is_creatable() {
        let sentence = format!("{} images are only read here; choose another kind", options.kind);
        return Err(ImageError::new(ErrorKind::Unsupported, path, sentence));
    }
    check_size(path, options)?;
    let folder = Folder::of_new(path)?;
    let exists =
        |path: &Path| ImageError::io("create", path, io::Error::from(io::ErrorKind::AlreadyExists));
    if path.symlink_metadata().is_ok() {
        return Err(exists(path));
    }
    for extent in extent_files(name, path, options)? {
        let extent = folder.path_of(extent);
        if extent.symlink_metadata().is_ok() {
            return Err(exists(&extent));
        }
    }
    Ok(folder)
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
pub(crate) fn create_as(
    path: &Path,
    name: &OsStr,
    options: &CreateOptions,
    progress: &mut dyn Progress,
) -> Result<()> {
    let parent = open_parent(options)?;
    let file_name = path.file_name().ok_or_else(|| bad_name(path))?;
    // Asked first so that nothing is made in vain: publishing refuses to overwrite by itself.
    let folder = vacant_folder(path, name, options)?;
    let target = Target { folder: &folder, file_name, path };
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
            let name = text_name(name, path)?;
            target.publish(file_name, |store| StreamWriter::start(store, &name, &options)?.finish())
        }
        Kind::MonolithicSparse => {
            let sectors = size_bytes / SECTOR_BYTES;
            let extent = (sectors, text_name(name, path)?);
            let text = describe(path, options, vec![extent], parent.as_deref())?;
            let header = layout(sectors, true, options.zeroed_grains);
            target.publish(file_name, |store| write_empty(store, &header, &text))
        }
        Kind::MonolithicFlat
        | Kind::TwoGbMaxExtentFlat
        | Kind::Vmfs
        | Kind::TwoGbMaxExtentSparse
        | Kind::VmfsSparse
        | Kind::SeSparse => target.create_described(name, options, parent.as_deref(), progress),
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
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let extents = extent_names(name, self.path, options)?;
        let text = describe(self.path, options, extents.clone(), parent)?;
        let mut made: Vec<OsString> = Vec::new();
        let mut make = || {
            let mut done = 0;
            for (sectors, extent) in &extents {
                let extent = OsString::from(extent);
                self.publish(&extent, |store| fill_extent(store, *sectors, options))?;
                made.push(extent);
                done += sectors * SECTOR_BYTES;
                advance(progress, self.path, done, options.size_bytes)?;
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
    let name = text_name(name, path)?;
    let stem = stem(&name);
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

/// The names of the files beside the descriptor; none where all is in one file.
pub(crate) fn extent_files(
    name: &OsStr,
    path: &Path,
    options: &CreateOptions,
) -> Result<Vec<String>> {
    match options.kind {
        Kind::MonolithicFlat
        | Kind::TwoGbMaxExtentFlat
        | Kind::Vmfs
        | Kind::TwoGbMaxExtentSparse => {
            let extents = extent_names(name, path, options)?;
            Ok(extents.into_iter().map(|(_, name)| name).collect())
        }
        _ => Ok(Vec::new()),
    }
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
        let (has, delta) = (parent.size_bytes(), options.size_bytes);
        return fail(format!(
            "it has {has} bytes, more than the {delta} of its delta; make the delta of {has} bytes at \
             least"
        ));
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
    let text = text_name(place.as_os_str(), parent.path())?;
    if place.as_os_str() != text.as_str() {
        let sentence = "a delta cannot name a parent with a double quote in its path: a VMDK \
                        descriptor has no way to write one; rename the parent or its folder";
        return Err(ImageError::new(ErrorKind::Invalid, parent.path(), sentence));
    }
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
    if options.kind == Kind::FixedVhd && size_bytes > vhd::SIZE_BYTES_MAX {
        let sentence = format!(
            "a VHD of {size_bytes} bytes is taken by nobody: Azure's bound is 32 TiB; choose another \
             kind"
        );
        return Err(ImageError::new(ErrorKind::Invalid, path, sentence));
    }
    Ok(())
}

/// The name as every reader of a descriptor understands it. A double quote ends a name there and
/// nothing can be written for one, so a low line takes its place.
fn text_name(name: &OsStr, path: &Path) -> Result<String> {
    name.to_str()
        .filter(|text| !text.contains(char::is_control))
        .map(|text| text.replace('"', "_"))
        .ok_or_else(|| bad_name(path))
}

fn bad_name(path: &Path) -> ImageError {
    let sentence = "the name cannot stand in a VMDK descriptor; choose one in UTF-8 without control \
                    characters";
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
        let text = |name: &str| text_name(OsStr::new(name), Path::new(name));
        assert_eq!(text("it's \"a\".vmdk").unwrap(), "it's _a_.vmdk");
        assert!(text("a\nb.vmdk").is_err());
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
