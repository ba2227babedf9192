//! Putting a new image in the place of an old one, with all files of both.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use backhaul_disk_image::ops::ConvertReport;
use backhaul_disk_image::{DiskImage, ErrorKind, ImageInfo, OpenOptions, open};

/// Makes an image with `make` in a folder beside `target`, and puts it in the place of what is at
/// `target` only when it is whole: whatever fails before that leaves the old image as it was.
///
/// The old descriptor goes first and the new one comes last, so that a crash in between leaves no
/// image that opens and is wrong: the new one is whole in the hidden folder then.
pub(super) fn replace(
    source: &dyn DiskImage,
    target: &Path,
    make: impl FnOnce(&Path) -> anyhow::Result<ConvertReport>,
) -> anyhow::Result<ConvertReport> {
    let Ok(metadata) = target.symlink_metadata() else { return make(target) };
    let shown = target.display();
    ensure!(metadata.is_file(), "{shown}: only a file can be replaced; choose another name");
    let target = target.canonicalize().with_context(|| shown.to_string())?;
    let (Some(folder), Some(name)) = (target.parent(), target.file_name()) else {
        bail!("{shown}: only a file can be replaced; choose another name");
    };
    let read: BTreeSet<_> = chain_files(&source.info()?).into_iter().collect();
    let in_use = || format!("{shown} holds what is to be converted; choose another name");
    ensure!(!read.contains(&target), in_use());
    let old = Old::open(&target)?;
    ensure!(old.files.is_disjoint(&read), in_use());
    let staging = tempfile::Builder::new().prefix(".backhaul-").tempdir_in(folder)?;
    let staged = staging.path().join(name);
    let report = make(&staged)?;
    let mut moves: Vec<(PathBuf, PathBuf)> = Vec::new();
    for entry in fs::read_dir(staging.path())? {
        let from = entry?.path();
        let to = folder.join(from.file_name().unwrap_or_default());
        ensure!(
            old.files.contains(&to) || to.symlink_metadata().is_err(),
            "{} is in the way and no file of {shown}; move it away",
            to.display()
        );
        moves.push((from, to));
    }
    moves.sort_by_key(|(from, _)| *from == staged);
    if let Err(error) = exchange(&target, &old.files, &moves, folder) {
        let kept = staging.keep();
        bail!("{shown} cannot be replaced: {error}; the new image is in {}", kept.display());
    }
    Ok(ConvertReport { path: target, ..report })
}

fn exchange(
    target: &Path,
    old: &BTreeSet<PathBuf>,
    moves: &[(PathBuf, PathBuf)],
    folder: &Path,
) -> io::Result<()> {
    let sync = || File::open(folder)?.sync_all();
    if moves.len() == 1 && old.len() == 1 {
        fs::rename(&moves[0].0, &moves[0].1)?;
        return sync();
    }
    fs::remove_file(target)?;
    sync()?;
    for file in old.iter().filter(|file| *file != target) {
        fs::remove_file(file)?;
    }
    for (from, to) in moves {
        fs::rename(from, to)?;
    }
    sync()
}

/// What is replaced.
struct Old {
    files: BTreeSet<PathBuf>,
    /// Locks them. What no longer opens is one file: which others belonged to it, nobody knows.
    _image: Option<Box<dyn DiskImage>>,
}

impl Old {
    fn open(target: &Path) -> anyhow::Result<Self> {
        let image = match open(target, &OpenOptions::writable()) {
            Err(error) if error.kind() == ErrorKind::Busy => return Err(error.into()),
            Err(_) => open(target, &OpenOptions::read_only()).ok(),
            opened => opened.ok(),
        };
        let mut files = BTreeSet::from([target.to_owned()]);
        if let Some(image) = &image {
            files.extend(link_files(&image.info()?));
        }
        Ok(Self { files, _image: image })
    }
}

fn link_files(info: &ImageInfo) -> impl Iterator<Item = PathBuf> + '_ {
    info.extents.iter().filter_map(|extent| extent.path.clone())
}

/// Every file that a disk is read from.
fn chain_files(info: &ImageInfo) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut next = Some(info);
    while let Some(info) = next {
        files.push(info.path.clone());
        files.extend(link_files(info));
        next = info.parent.as_deref();
    }
    files
}
