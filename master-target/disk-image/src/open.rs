//! Opening: what a file is, whether it can be trusted, who else has it.

use std::{
    ffi::OsStr,
    fs::{File, Metadata},
    io::{self, Read},
    os::unix::fs::{FileExt, FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, atomic::AtomicBool},
};

use rustix::{
    io::Errno,
    process::{Resource, getrlimit},
};

use crate::{
    delta::DeltaExtent,
    descriptor::{DESCRIPTOR_BYTES_MAX, Descriptor, ExtentAccess, ExtentLine, file_names, shown},
    disk::{DescriptorHome, Disk, Place, Placed},
    error::{ErrorKind, ImageError, Result},
    extent::{Extent, FlatRegion, ZeroRegion},
    fix::{Action, Fix},
    folder::{Folder, Locks},
    identity::ContentId,
    image::{DISK_BYTES_MAX, DiskImage, SECTOR_BYTES},
    kind::Kind,
    recover::last_footer,
    sparse::{self, SparseExtent},
    storage::{Storage, Store},
    vhd,
};

/// Most links of a chain. VMware allows 32 snapshots of a disk; the disk itself is one more.
pub const CHAIN_LINKS_MAX: usize = 33;

/// How to open. [`OpenOptions::read_only`] and [`OpenOptions::writable`] have the defaults.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OpenOptions {
    /// For writing. A writer is alone; readers share. Parents are always opened for reading.
    pub writable: bool,
    /// The kind it must be. Default: none, the file is probed.
    ///
    /// Name [`Kind::Raw`] for every disk that is known to be raw: a guest writes the first
    /// sectors of a raw disk itself and could write a descriptor there.
    pub kind: Option<Kind>,
    /// Follow an extent's or a parent's path out of the descriptor's folder. Default: no. Say yes
    /// only for a descriptor whose author may read and write every file this process may.
    pub allow_outside: bool,
    /// Open for reading while somebody else writes. Default: no. What is read may then change
    /// from read to read. Means nothing for a writer.
    pub shared: bool,
}

impl OpenOptions {
    /// For reading.
    pub const fn read_only() -> Self {
        Self { writable: false, kind: None, allow_outside: false, shared: false }
    }

    /// For reading and writing.
    pub const fn writable() -> Self {
        Self { writable: true, ..Self::read_only() }
    }

    /// The same, of one kind only.
    pub const fn of_kind(self, kind: Kind) -> Self {
        Self { kind: Some(kind), ..self }
    }
}

/// Opens the image at `path`: a raw file or block device, a VHD, a VMDK's descriptor, a sparse
/// VMDK. A delta opens with its parents, as one disk.
///
/// The files that hold the data are locked until the image is dropped; see
/// [`OpenOptions::shared`]. The lock is advice that other programs may not ask for.
///
/// # Errors
/// See [`ErrorKind`].
pub fn open(path: &Path, options: &OpenOptions) -> Result<Box<dyn DiskImage>> {
    Ok(Box::new(open_disk(path, options, 1)?))
}

/// Opens an image that is one file over any storage: raw, VHD, monolithicSparse, streamOptimized,
/// a COWD or seSparse extent by itself. `path` is only a name for messages. A delta whose parent
/// would have to be found is refused.
///
/// # Errors
/// As [`open`].
pub fn open_storage(
    path: &Path,
    storage: Box<dyn Storage>,
    options: &OpenOptions,
) -> Result<Box<dyn DiskImage>> {
    let store = Arc::new(Store::new(path, storage));
    let mut start = [0; 512];
    let length = store.length()?;
    let filled = length.min(512) as usize;
    store.read(&mut start[..filled], 0)?;
    let start = match options.kind {
        Some(Kind::Raw) => Start::Data,
        _ => match Start::of(&start[..filled]) {
            Start::Descriptor => {
                let sentence = "a descriptor names other files; open it by its path";
                return Err(ImageError::new(ErrorKind::Invalid, path, sentence));
            }
            start => start,
        },
    };
    let disk = open_single(store, start, options, None, 1)?;
    judge_kind(&disk, options)?;
    Ok(Box::new(disk))
}

pub(crate) fn open_disk(path: &Path, options: &OpenOptions, link: usize) -> Result<Disk> {
    let found = Found::look_up(path)?;
    // What is on a device is a guest's, so only a name from outside makes it anything but raw.
    let kind = match options.kind {
        None if !found.metadata.is_file() => Some(Kind::Raw),
        kind => kind,
    };
    let options = &OpenOptions { kind, ..*options };
    let start = match options.kind {
        Some(Kind::Raw) => Start::Data,
        _ => found.probe()?,
    };
    let disk = match start {
        Start::Descriptor => open_described(found, options, link)?,
        start => {
            let file = found.reopen(options.writable)?;
            let mut locks = Locks::default();
            take_lock(&file, &found.path, options, &mut locks)?;
            let store = Arc::new(Store::new(&found.path, Box::new(file)));
            let mut disk = open_single(store, start, options, Some(&found.folder), link)?;
            disk.locks = locks;
            disk
        }
    };
    judge_kind(&disk, options)?;
    Ok(disk)
}

fn judge_kind(disk: &Disk, options: &OpenOptions) -> Result<()> {
    match options.kind {
        Some(asked) if asked != disk.kind => {
            let sentence = format!("this is a {} image, but {asked} is needed", disk.kind);
            Err(ImageError::new(ErrorKind::WrongKind, &disk.path, sentence))
        }
        _ => Ok(()),
    }
}

/// What a file's first bytes say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    Descriptor,
    Sparse,
    Delta(Kind),
    Foreign(&'static str),
    Data,
}

impl Start {
    fn of(bytes: &[u8]) -> Self {
        if bytes.starts_with(sparse::header::MAGIC) {
            return Self::Sparse;
        }
        if bytes.starts_with(b"COWD") {
            return Self::Delta(Kind::VmfsSparse);
        }
        if bytes.starts_with(b"\xbe\xba\xfe\xca\0\0\0\0") {
            return Self::Delta(Kind::SeSparse);
        }
        if let Some((_, name)) = FOREIGN.iter().find(|(magic, _)| bytes.starts_with(magic)) {
            return Self::Foreign(name);
        }
        if Descriptor::is_claimed_by(bytes) { Self::Descriptor } else { Self::Data }
    }
}

/// The file that the caller named, open for reading.
struct Found {
    /// Without symbolic links, so that extents are looked for beside the descriptor itself.
    path: PathBuf,
    folder: Folder,
    file: File,
    metadata: Metadata,
}

impl Found {
    fn look_up(path: &Path) -> Result<Self> {
        let fail = |source| ImageError::io("open", path, source);
        let path = path.canonicalize().map_err(fail)?;
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(not_a_file(&path));
        };
        let folder = Folder::open(parent).map_err(fail)?;
        let file = folder.open_file(Path::new(name), false, false).map_err(fail)?;
        let metadata = file_metadata(&file, &path)?;
        Ok(Self { folder, file, metadata, path })
    }

    fn name(&self) -> &OsStr {
        self.path.file_name().unwrap_or_default()
    }

    fn reopen(&self, writable: bool) -> Result<File> {
        let file = self.folder.open_file(Path::new(self.name()), writable, false);
        file.map_err(|source| ImageError::io("open", &self.path, source))
    }

    fn probe(&self) -> Result<Start> {
        let mut bytes = [0; 512];
        let filled = match FileExt::read_at(&self.file, &mut bytes, 0) {
            Ok(filled) => filled,
            Err(source) => return Err(ImageError::io("read", &self.path, source)),
        };
        Ok(Start::of(&bytes[..filled]))
    }
}

/// Opens an image whose bytes are all in one file.
fn open_single(
    store: Arc<Store>,
    start: Start,
    options: &OpenOptions,
    folder: Option<&Folder>,
    link: usize,
) -> Result<Disk> {
    match start {
        Start::Sparse => open_sparse(store, options, folder, link),
        Start::Delta(kind) => {
            refuse_delta_writes(&store.path, kind, options)?;
            let extent = DeltaExtent::open(store.clone(), kind)?;
            let length = extent.length_bytes();
            Ok(plain_disk(kind, &store.path, length, Box::new(extent), options))
        }
        Start::Foreign(name) => {
            let sentence = format!(
                "this is a {name} image, which is not supported; convert it with the product that \
                 wrote it (or, if it is a raw disk that only looks so, open it as raw: -f raw)"
            );
            Err(ImageError::new(ErrorKind::Unsupported, &store.path, sentence))
        }
        Start::Data | Start::Descriptor => open_raw_or_vhd(store, options),
    }
}

fn open_raw_or_vhd(store: Arc<Store>, options: &OpenOptions) -> Result<Disk> {
    let length = store.length()?;
    let path = store.path.clone();
    let store = own(store)?;
    let probed = options.kind != Some(Kind::Raw);
    if probed && length > vhd::FOOTER_BYTES && length.is_multiple_of(SECTOR_BYTES) {
        let mut footer = [0; 512];
        let at = length - vhd::FOOTER_BYTES;
        store.read(&mut footer, at)?;
        if footer.starts_with(vhd::COOKIE) {
            let footer = vhd::parse(&footer, &path, at)?;
            let region =
                FlatRegion { store, base_offset_bytes: 0, length_bytes: at, format: "VHD" };
            let kind = Kind::FixedVhd;
            let mut disk = plain_disk(kind, &path, footer.size_bytes, Box::new(region), options);
            disk.own_uuid = Some(footer.uuid);
            return Ok(disk);
        }
    }
    if probed {
        refuse_headless(&store)?;
    }
    if length == 0 || !length.is_multiple_of(SECTOR_BYTES) {
        let sentence = format!(
            "the file has {length} bytes, but a disk is one or more whole sectors of 512 bytes; \
             repair its size with truncate --size"
        );
        return Err(ImageError::new(ErrorKind::Damaged, &path, sentence));
    }
    let region = FlatRegion { store, base_offset_bytes: 0, length_bytes: length, format: "RAW" };
    Ok(plain_disk(Kind::Raw, &path, length, Box::new(region), options))
}

/// Refuses a VMDK that lost its first sector and a VHD that lost its last, which would be raw disks full of
/// nonsense, or with some at the end.
fn refuse_headless(store: &Store) -> Result<()> {
    let damaged = |sentence| Err(ImageError::new(ErrorKind::Damaged, &store.path, sentence).at(0));
    if last_footer(store)?.is_some() {
        return damaged(
            "its first sector is damaged, but it ends as a streamOptimized VMDK does; repair the \
             image, which writes its header anew from its end (or, if it is a raw disk that only \
             looks so, open it as raw: -f raw)",
        );
    }
    let is_named = |ending: &str| {
        store.path.extension().is_some_and(|found| found.eq_ignore_ascii_case(ending))
    };
    if is_named("vhd") {
        let end = store.length()?.saturating_sub(vhd::FOOTER_BYTES);
        let sentence = "it has the name of a VHD but does not end as one: its footer is gone, and what is \
                        before it may be cut off; restore it from its source, or, if it holds a disk's \
                        bare data, open it as raw (-f raw)";
        return Err(ImageError::new(ErrorKind::Damaged, &store.path, sentence).at(end));
    }
    if is_named("vmdk") {
        return damaged(
            "it has the name of a VMDK but does not begin as one; if it holds a disk's bare data, \
             open the descriptor that names it, or open it as raw (-f raw); else its first sector is \
             damaged, so restore it from its source",
        );
    }
    Ok(())
}

fn own(store: Arc<Store>) -> Result<Store> {
    let path = store.path.clone();
    Arc::into_inner(store)
        .ok_or_else(|| ImageError::new(ErrorKind::Busy, &path, "the file is in use"))
}

fn plain_disk(
    kind: Kind,
    path: &Path,
    size_bytes: u64,
    extent: Box<dyn Extent>,
    options: &OpenOptions,
) -> Disk {
    Disk {
        kind,
        path: path.to_owned(),
        size_bytes,
        extents: vec![Placed { start: 0, length: size_bytes, extent }],
        parent: None,
        descriptor: None,
        own_uuid: None,
        writable: options.writable,
        latched: AtomicBool::new(false),
        renewed: Mutex::new(false),
        locks: Locks::default(),
    }
}

/// A sparse file with its descriptor in it.
fn open_sparse(
    store: Arc<Store>,
    options: &OpenOptions,
    folder: Option<&Folder>,
    link: usize,
) -> Result<Disk> {
    let path = store.path.clone();
    let header = sparse::read_fields(&store)?;
    let Some(descriptor) = sparse::read_descriptor(&store, &header)? else {
        let sentence = "this is one extent of a disk in several files; open the descriptor that \
                        names it";
        return Err(ImageError::new(ErrorKind::Invalid, &path, sentence));
    };
    let kind = match Kind::of_create_type(descriptor.create_type()) {
        Some(kind @ (Kind::MonolithicSparse | Kind::StreamOptimized)) => kind,
        _ => {
            let found = descriptor.create_type();
            let sentence = format!("a file with sparse extents inside cannot be of type {found}");
            return Err(ImageError::new(ErrorKind::Unsupported, &path, sentence));
        }
    };
    let line_sectors = descriptor.extents().iter().map(|line| line.sectors).sum();
    let extent = SparseExtent::open(store.clone(), line_sectors, options.writable)?;
    let size_bytes = extent.header().capacity_bytes();
    let parent = open_parent(&path, folder, &descriptor, options, link)?;
    let mut disk = plain_disk(kind, &path, size_bytes, Box::new(extent), options);
    disk.parent = parent;
    let offset = header.descriptor_sector * SECTOR_BYTES;
    disk.descriptor = Some(DescriptorHome {
        content: Mutex::new(descriptor),
        place: Place::Embedded { store, offset },
    });
    Ok(disk)
}

/// A disk whose descriptor is a file of its own.
fn open_described(found: Found, options: &OpenOptions, link: usize) -> Result<Disk> {
    let bytes = read_descriptor(&found.file, &found.path)?;
    let descriptor = Descriptor::parse(&bytes)
        .map_err(|error| ImageError::new(ErrorKind::Damaged, &found.path, error.to_string()))?;
    let kind = Kind::of_create_type(descriptor.create_type()).ok_or_else(|| {
        let sentence = format!(
            "a VMDK of type {} is not supported; convert it with the product that wrote it",
            descriptor.create_type()
        );
        ImageError::new(ErrorKind::Unsupported, &found.path, sentence)
    })?;
    refuse_delta_writes(&found.path, kind, options)?;
    let has_parent = descriptor.parent_content_id() != ContentId::NO_PARENT;
    if has_parent && (kind.is_flat() || kind == Kind::TwoGbMaxExtentFlat) {
        let sentence = format!("a {kind} disk stores everything and cannot have a parent");
        return Err(ImageError::new(ErrorKind::Damaged, &found.path, sentence));
    }
    let mut extents: Vec<Placed> = Vec::new();
    let (mut start, mut locks) = (0_u64, Locks::default());
    for line in descriptor.extents() {
        let length = line.sectors * SECTOR_BYTES;
        let extent = open_extent(&found, &descriptor, kind, line, options, &mut locks)
            .map_err(|error| told_of_limit(error, &found.path, descriptor.extents().len()))?;
        extents.push(Placed { start, length, extent });
        start = start.saturating_add(length);
    }
    if start == 0 || start > DISK_BYTES_MAX {
        let sentence = format!("its extents make a disk of {start} bytes, not of up to 62 TiB");
        return Err(ImageError::new(ErrorKind::Damaged, &found.path, sentence));
    }
    // A writer that closed just now may have replaced the descriptor after it was read here.
    if !options.shared && read_descriptor(&found.reopen(false)?, &found.path)? != bytes {
        return Err(busy(&found.path));
    }
    let parent = open_parent(&found.path, Some(&found.folder), &descriptor, options, link)?;
    Ok(Disk {
        kind,
        size_bytes: start,
        extents,
        parent,
        own_uuid: None,
        writable: options.writable,
        latched: AtomicBool::new(false),
        renewed: Mutex::new(false),
        locks,
        descriptor: Some(DescriptorHome {
            content: Mutex::new(descriptor),
            place: Place::File { name: found.name().to_owned(), folder: found.folder },
        }),
        path: found.path,
    })
}

/// Says of an image with more extents than this process may open files what it needs.
fn told_of_limit(error: ImageError, path: &Path, extents: usize) -> ImageError {
    if error.errno() != Some(Errno::MFILE) {
        return error;
    }
    let limit =
        getrlimit(Resource::Nofile).current.map_or("".to_owned(), |most| format!(" {most}"));
    let sentence = format!(
        "it has {extents} extents, each of which takes two of the{limit} files that this process may \
         have open; raise the limit with `ulimit -n {}`, or choose a kind of one file",
        extents * 2 + SPARE_FILES
    );
    ImageError::new(ErrorKind::Io, path, sentence)
}

/// Files that a process has open beside those of an image.
const SPARE_FILES: usize = 100;

fn refuse_delta_writes(path: &Path, kind: Kind, options: &OpenOptions) -> Result<()> {
    if !options.writable || kind.is_writable() || kind == Kind::StreamOptimized {
        return Ok(());
    }
    let sentence = format!(
        "a {kind} snapshot is only read, never written, here; convert it to another kind, or \
         consolidate the snapshot on its host"
    );
    Err(ImageError::new(ErrorKind::ReadOnly, path, sentence))
}

fn open_extent(
    found: &Found,
    descriptor: &Descriptor,
    kind: Kind,
    line: &ExtentLine,
    options: &OpenOptions,
    locks: &mut Locks,
) -> Result<Box<dyn Extent>> {
    let wrong = |kind, sentence: String| {
        let sentence = format!("line {}: {sentence}", line.line);
        Err(ImageError::new(kind, &found.path, sentence))
    };
    let length_bytes = line.sectors * SECTOR_BYTES;
    let is = |name: &str| line.extent_type.eq_ignore_ascii_case(name);
    let flat = is("FLAT") || is("VMFS");
    let fits = match kind {
        Kind::MonolithicFlat | Kind::TwoGbMaxExtentFlat | Kind::Vmfs => flat || is("ZERO"),
        Kind::MonolithicSparse | Kind::TwoGbMaxExtentSparse | Kind::StreamOptimized => {
            is("SPARSE") || is("ZERO")
        }
        Kind::VmfsSparse => is("VMFSSPARSE"),
        Kind::SeSparse => is("SESPARSE"),
        Kind::Raw | Kind::FixedVhd => false,
    };
    if !fits {
        let sentence = format!("a {kind} disk cannot have an extent of type {}", line.extent_type);
        return wrong(ErrorKind::Unsupported, sentence);
    }
    if is("ZERO") {
        return Ok(Box::new(ZeroRegion { length_bytes, path: found.path.clone() }));
    }
    let allowed = match line.access {
        ExtentAccess::ReadWrite => true,
        ExtentAccess::ReadOnly => !options.writable,
        ExtentAccess::None => false,
    };
    if !allowed {
        let sentence = format!(
            "the extent has the access {}; open the image read only, or change it to RW",
            line.access
        );
        return wrong(ErrorKind::ReadOnly, sentence);
    }
    let (path, file) = find_extent(found, descriptor, line, options)?;
    let metadata = file_metadata(&file, &path)?;
    if (metadata.dev(), metadata.ino()) == (found.metadata.dev(), found.metadata.ino()) {
        let sentence = "it names the descriptor itself as the extent; name the data file";
        return wrong(ErrorKind::Damaged, sentence.into());
    }
    take_lock(&file, &path, options, locks)?;
    let store = Store::new(&path, Box::new(file));
    if flat {
        return open_flat_extent(store, line, metadata.is_file());
    }
    let store = Arc::new(store);
    let (extent, capacity): (Box<dyn Extent>, u64) = if is("SPARSE") {
        let extent = SparseExtent::open(store.clone(), line.sectors, options.writable)?;
        let capacity = extent.header().capacity_bytes();
        (Box::new(extent), capacity)
    } else {
        let extent = DeltaExtent::open(store.clone(), kind)?;
        let capacity = extent.length_bytes();
        (Box::new(extent), capacity)
    };
    if capacity < length_bytes {
        let sentence = format!(
            "the extent holds {capacity} bytes of the disk, but line {} of its descriptor says \
             {length_bytes}",
            line.line
        );
        return Err(ImageError::new(ErrorKind::Damaged, &path, sentence));
    }
    Ok(extent)
}

fn open_flat_extent(store: Store, line: &ExtentLine, is_file: bool) -> Result<Box<dyn Extent>> {
    // No overflow: the parser bounds the sum.
    let base_offset_bytes = line.offset_sectors * SECTOR_BYTES;
    let length_bytes = line.sectors * SECTOR_BYTES;
    let expected = base_offset_bytes + length_bytes;
    let found = store.length()?;
    // A device, and the file of several extents, may be longer than one of them.
    if found < expected {
        let what = if is_file { "file" } else { "device" };
        let sentence = format!(
            "the {what} has {found} bytes, but its descriptor needs {expected}; restore it from its \
             source, or repair the image, which makes what is missing zeros"
        );
        let error = ImageError::new(ErrorKind::Damaged, &store.path, sentence).at(found);
        return Err(match is_file {
            true => error.mended_by(Fix {
                path: store.path.clone(),
                sentence: format!(
                    "enlarge the file to {expected} bytes; what is new reads as zeros"
                ),
                lost_bytes: expected - found,
                freed_bytes: 0,
                actions: vec![Action::SetLength(expected)],
            }),
            false => error,
        });
    }
    let format = if line.extent_type.eq_ignore_ascii_case("VMFS") { "VMFS" } else { "FLAT" };
    Ok(Box::new(FlatRegion { store, base_offset_bytes, length_bytes, format }))
}

fn find_extent(
    found: &Found,
    descriptor: &Descriptor,
    line: &ExtentLine,
    options: &OpenOptions,
) -> Result<(PathBuf, File)> {
    let extent = shown(&line.name, descriptor.encoding());
    for name in file_names(&line.name, descriptor.encoding()) {
        let name = Path::new(&name);
        match found.folder.open_file(name, options.writable, !options.allow_outside) {
            Ok(file) => return Ok((found.folder.path_of(name), file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
                let sentence = format!(
                    "line {}: the extent `{extent}` leaves the descriptor's folder; move it there, \
                     or allow outside extents if you trust the descriptor",
                    line.line
                );
                return Err(ImageError::new(ErrorKind::Outside, &found.path, sentence));
            }
            Err(source) => {
                return Err(ImageError::io("open", &found.folder.path_of(name), source));
            }
        }
    }
    let sentence = format!(
        "line {}: cannot open the extent `{extent}`, which does not exist; put the file back \
         beside the descriptor, or correct the line",
        line.line
    );
    let missing = io::Error::from(io::ErrorKind::NotFound);
    Err(ImageError::io("open", &found.path, missing).because(sentence))
}

/// The parent that a descriptor names, if it names one.
fn open_parent(
    path: &Path,
    folder: Option<&Folder>,
    descriptor: &Descriptor,
    options: &OpenOptions,
    link: usize,
) -> Result<Option<Box<dyn DiskImage>>> {
    let wanted = descriptor.parent_content_id();
    if wanted == ContentId::NO_PARENT {
        return Ok(None);
    }
    let broken = |sentence: String| ImageError::new(ErrorKind::Chain, path, sentence);
    if link >= CHAIN_LINKS_MAX {
        let sentence = format!(
            "the chain of parents has more than {CHAIN_LINKS_MAX} links, or runs in a circle"
        );
        return Err(broken(sentence));
    }
    let hint = descriptor.text().get("parentFileNameHint").filter(|hint| !hint.is_empty());
    let Some(hint) = hint else {
        let sentence =
            format!("it is a delta on content {wanted}, but does not say in which file that is");
        return Err(broken(sentence));
    };
    let name = shown(hint, descriptor.encoding());
    let Some(folder) = folder else {
        return Err(broken(format!("its parent `{name}` cannot be reached from here")));
    };
    let parent_path = find_parent(path, folder, hint, descriptor, options)?;
    let below = OpenOptions { writable: false, kind: None, ..*options };
    let parent = open_disk(&parent_path, &below, link + 1)?;
    match parent.content_id() {
        Some(found) if found == wanted => Ok(Some(Box::new(parent))),
        found => {
            let found = found.map_or("none".to_owned(), |id| id.to_string());
            let sentence = format!(
                "it is a delta on content {wanted}, but its parent {} has the content id {found}: \
                 the parent was changed or is another disk; restore the right one",
                parent_path.display()
            );
            Err(broken(sentence))
        }
    }
}

fn find_parent(
    path: &Path,
    folder: &Folder,
    hint: &[u8],
    descriptor: &Descriptor,
    options: &OpenOptions,
) -> Result<PathBuf> {
    let mut outside = false;
    let mut candidates = file_names(hint, descriptor.encoding());
    // Copied to another place, a chain stays together, but its absolute paths lead nowhere. The
    // content id shows whether a file of that name is the parent.
    let last = hint.rsplit(|byte| matches!(byte, b'/' | b'\\')).next().unwrap_or_default();
    if last != hint && !last.is_empty() {
        candidates.extend(file_names(last, descriptor.encoding()));
    }
    for name in &candidates {
        let name = Path::new(name);
        match folder.open_file(name, false, !options.allow_outside) {
            Ok(_) => return Ok(folder.path_of(name)),
            Err(error) if error.kind() == io::ErrorKind::CrossesDevices => outside = true,
            Err(_) => {}
        }
    }
    let name = shown(hint, descriptor.encoding());
    let (kind, sentence) = if outside {
        let sentence = format!(
            "its parent `{name}` leaves the descriptor's folder; move it there, or allow outside \
             paths if you trust the descriptor"
        );
        (ErrorKind::Outside, sentence)
    } else {
        (
            ErrorKind::Chain,
            format!("its parent `{name}` does not exist; put it back beside its delta"),
        )
    };
    Err(ImageError::new(kind, path, sentence))
}

pub(crate) fn take_lock(
    file: &File,
    path: &Path,
    options: &OpenOptions,
    locks: &mut Locks,
) -> Result<()> {
    if options.shared && !options.writable {
        return Ok(());
    }
    locks.take(file, options.writable).map_err(|source| match source.kind() {
        io::ErrorKind::WouldBlock => busy(path),
        _ => ImageError::io("lock", path, source),
    })
}

fn busy(path: &Path) -> ImageError {
    let sentence = "it is in use by another program; stop that first (a reader may ask to share)";
    ImageError::new(ErrorKind::Busy, path, sentence)
}

/// Everything a descriptor may be and one byte more, which shows that it is none.
fn read_descriptor(file: &File, path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut whole = file.take(DESCRIPTOR_BYTES_MAX as u64 + 1);
    whole.read_to_end(&mut bytes).map_err(|source| ImageError::io("read", path, source))?;
    Ok(bytes)
}

fn file_metadata(file: &File, path: &Path) -> Result<Metadata> {
    let metadata = file.metadata().map_err(|source| ImageError::io("measure", path, source))?;
    if metadata.is_file() || metadata.file_type().is_block_device() {
        Ok(metadata)
    } else {
        Err(not_a_file(path))
    }
}

fn not_a_file(path: &Path) -> ImageError {
    let sentence = "it is neither a regular file nor a block device; name a disk image";
    ImageError::new(ErrorKind::Invalid, path, sentence)
}

/// Formats that would be mistaken for a raw disk, by their first bytes: qemu's `block/` sources,
/// the VHD and VHDX specifications.
const FOREIGN: [(&[u8], &str); 4] =
    [(b"QFI\xfb", "qcow2"), (b"vhdxfile", "VHDX"), (b"conectix", "dynamic VHD"), (b"<<< ", "VDI")];
