//! Putting a new image in its place, where nothing is or an old one, with all files of both.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use backhaul_disk_image::ops::ConvertReport;
use backhaul_disk_image::{
    CreateOptions, DiskImage, ErrorKind, ImageError, ImageInfo, OpenOptions, check_new, open,
};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::staging::{self, NEW_FILES, OLD_FILES, Staging};

/// Makes an image with `make` in a hidden folder beside `target`, where nothing may be, and gives it
/// its place when it is whole: whatever cuts it short, the next run knows what was left, and removes
/// it.
pub(super) fn make_new<T>(
    target: &Path,
    options: &CreateOptions,
    make: impl FnOnce(&Path) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let given = target.parent().unwrap_or(Path::new(""));
    let folder = if given.as_os_str().is_empty() { Path::new(".") } else { given }.canonicalize();
    if let (Ok(folder), Some(name), Err(_)) =
        (&folder, target.file_name(), target.symlink_metadata())
        // A file in its place is told below.
        && folder.is_dir()
    {
        staging::clear_new(folder, name)
            .map_err(|error| ImageError::io("clear what a killed run left of", target, error))?;
    }
    check_new(target, options)?;
    let folder = folder.with_context(|| given.display().to_string())?;
    let name = target.file_name().unwrap_or_default();
    let staging = stage(&folder, name)?;
    let made = make(&staging.path().join(name)).map_err(|error| named(error, &staging, given))?;
    publish(&folder, staging.path(), name, &mut || Ok(()))?;
    Ok(made)
}

fn stage(folder: &Path, name: &OsStr) -> Result<Staging, ImageError> {
    // Only the kind: its sentence would name the hidden folder.
    let refused = |error: io::Error| ImageError::io("write in", folder, error.kind().into());
    Staging::make(folder, name).map_err(refused)
}

/// An error about a file in the hidden folder, as one about the file that it was to be.
fn named(error: anyhow::Error, staging: &Staging, folder: &Path) -> anyhow::Error {
    match error.downcast::<ImageError>() {
        Ok(error) => error.moved(staging.path(), folder).into(),
        Err(error) => error,
    }
}

/// Moves the files of a new image from its hidden folder to their places, the descriptor last; `step`
/// is called before everything that changes a file, and ends it by an error.
fn publish(
    folder: &Path,
    staging: &Path,
    name: &OsStr,
    step: &mut dyn FnMut() -> io::Result<()>,
) -> Result<(), ImageError> {
    let failed = |error| ImageError::io("create", &folder.join(name), error);
    let files = fs::read_dir(staging).and_then(|entries| {
        entries.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<Vec<_>>>()
    });
    let mut files = files.map_err(failed)?;
    files.sort_by_key(|file| file.file_name() == Some(name));
    let sync = || File::open(folder)?.sync_all();
    let prepared = step().and_then(|()| staging::note(staging, NEW_FILES, &files));
    prepared.map_err(failed)?;
    let mut placed = Vec::new();
    for file in &files {
        let place = folder.join(file.file_name().unwrap_or_default());
        let is_last = place.file_name() == Some(name);
        let moved = step()
            .and_then(|()| if is_last { sync() } else { Ok(()) })
            .and_then(|()| rename_new(file, &place));
        if let Err(error) = moved {
            // Ours, and of no use without the rest. After a kill the next run does this.
            for place in &placed {
                let _ = fs::remove_file(place);
            }
            return Err(ImageError::io("create", &place, error));
        }
        placed.push(place);
    }
    sync().map_err(failed)
}

/// Gives a file another name, which no file has.
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // File systems such as NFS know no flags, but a link never replaces a file.
        Err(Errno::INVAL | Errno::NOSYS) => {
            fs::hard_link(from, to)?;
            fs::remove_file(from)
        }
        result => Ok(result?),
    }
}

/// Makes an image with `make` in a hidden folder beside `target`, and puts it in the place of what is
/// at `target` only when it is whole: whatever fails before that leaves the old image as it was.
/// Whenever it is cut short, what is at `target` opens, and is the old image or the new one.
pub(super) fn replace(
    source: &dyn DiskImage,
    target: &Path,
    options: &CreateOptions,
    make: impl FnOnce(&Path) -> anyhow::Result<ConvertReport>,
) -> anyhow::Result<ConvertReport> {
    let Ok(metadata) = target.symlink_metadata() else { return make_new(target, options, make) };
    let shown = target.display();
    ensure!(metadata.is_file(), "{shown}: only a file can be replaced; choose another name");
    let target = target.canonicalize().with_context(|| shown.to_string())?;
    let (Some(folder), Some(name)) = (target.parent(), target.file_name()) else {
        bail!("{shown}: only a file can be replaced; choose another name");
    };
    let read: BTreeSet<_> = chain_files(&source.info()?).into_iter().collect();
    let in_use = || format!("{shown} holds what is to be converted; choose another name");
    ensure!(!read.contains(&target), in_use());
    let is_linked = |file: &&PathBuf| {
        let found = file.metadata();
        found.is_ok_and(|found| (found.dev(), found.ino()) == (metadata.dev(), metadata.ino()))
    };
    if let Some(file) = read.iter().find(is_linked) {
        bail!(
            "{shown} and {} are two names of one file, which holds what is to be converted; choose another \
             name",
            file.display()
        );
    }
    let old = Old::open(&target)?;
    ensure!(old.files.is_disjoint(&read), in_use());
    if old.image.is_some() {
        staging::clear(folder, name, &old.files)?;
    }
    let staging = stage(folder, name)?;
    let report =
        make(&staging.path().join(name)).map_err(|error| named(error, &staging, folder))?;
    let mut extents = Vec::new();
    for entry in fs::read_dir(staging.path())? {
        let file = entry?.file_name();
        let to = folder.join(&file);
        ensure!(
            old.files.contains(&to) || to.symlink_metadata().is_err(),
            "{} is in the way and no file of {shown}; move it away",
            to.display()
        );
        extents.extend((file != name).then_some(file));
    }
    let exchange = Exchange { folder, staging: staging.path(), name, extents, old: &old.files };
    if let Err(error) = exchange.run(&mut || Ok(())) {
        let same = target.metadata().is_ok_and(|now| now.ino() == metadata.ino());
        ensure!(!same, "{shown} cannot be replaced and is as it was: {error}");
        let kept = staging.path().display().to_string();
        staging.keep();
        bail!(
            "{shown} was not replaced to the end: {error}; run this again, and until then do not \
             remove {kept}"
        );
    }
    Ok(ConvertReport { path: target, ..report })
}

/// An old image, the new one in its hidden folder, and where they are to be exchanged.
struct Exchange<'a> {
    folder: &'a Path,
    staging: &'a Path,
    /// The descriptor, or the only file.
    name: &'a OsStr,
    /// The new image's other files.
    extents: Vec<OsString>,
    old: &'a BTreeSet<PathBuf>,
}

impl Exchange<'_> {
    /// Exchanges them; `step` is called before everything that changes a file, and ends it by an
    /// error.
    ///
    /// New extents may have the names of old ones, so the new descriptor first comes with the
    /// extents where they were made, as one rename. Only then do the old ones go and the new ones
    /// get their names, as links, and last the descriptor that names them there.
    fn run(&self, step: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
        let (target, staged) = (self.folder.join(self.name), self.staging.join(self.name));
        let sync = || File::open(self.folder)?.sync_all();
        step()?;
        let here = self.old.iter().filter(|path| path.parent() == Some(self.folder));
        staging::note(self.staging, OLD_FILES, here)?;
        if !self.extents.is_empty() {
            let interim = self.staging.join(".interim");
            self.write_interim(&staged, &interim)?;
            File::open(self.staging)?.sync_all()?;
            step()?;
            fs::rename(&interim, &target)?;
            sync()?;
            self.remove_old(step)?;
            for extent in &self.extents {
                step()?;
                fs::hard_link(self.staging.join(extent), self.folder.join(extent))?;
            }
            sync()?;
        }
        step()?;
        fs::rename(&staged, &target)?;
        sync()?;
        if self.extents.is_empty() {
            self.remove_old(step)?;
        }
        step()?;
        fs::remove_dir_all(self.staging)?;
        step()?;
        let new = self.extents.iter().map(|extent| self.folder.join(extent));
        staging::clear(self.folder, self.name, &new.chain([target]).collect())?;
        sync()
    }

    /// The new descriptor, with its extents in the hidden folder.
    fn write_interim(&self, staged: &Path, interim: &Path) -> io::Result<()> {
        let text = fs::read_to_string(staged)?;
        let hidden = self.staging.file_name().unwrap_or_default().to_string_lossy();
        let moved = text.split_inclusive('\n').map(|line| match line.starts_with("RW ") {
            true => line.replacen('"', &format!("\"{hidden}/"), 1),
            false => line.to_owned(),
        });
        fs::write(interim, moved.collect::<String>())?;
        File::open(interim)?.sync_all()
    }

    /// Removes the old image's files but the one at the target.
    fn remove_old(&self, step: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
        for file in self.old.iter().filter(|file| **file != self.folder.join(self.name)) {
            step()?;
            fs::remove_file(file)?;
        }
        Ok(())
    }
}

/// What is replaced.
struct Old {
    files: BTreeSet<PathBuf>,
    /// Locks them. What no longer opens is one file: which others belonged to it, nobody knows.
    image: Option<Box<dyn DiskImage>>,
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
        Ok(Self { files, image })
    }
}

fn link_files(info: &ImageInfo) -> impl Iterator<Item = PathBuf> + '_ {
    info.extents.iter().filter_map(|extent| extent.path.clone())
}

/// Every file that a disk is read from.
pub(super) fn chain_files(info: &ImageInfo) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut next = Some(info);
    while let Some(info) = next {
        files.push(info.path.clone());
        files.extend(link_files(info));
        next = info.parent.as_deref();
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;
    use backhaul_disk_image::ops::{ConvertOptions, convert};
    use backhaul_disk_image::{Kind, Silent};

    fn raw(path: &Path, byte: u8) -> Box<dyn DiskImage> {
        fs::write(path, vec![byte; 1 << 20]).unwrap();
        open(path, &OpenOptions::read_only().of_kind(Kind::Raw)).unwrap()
    }

    /// The byte that all of an image consists of.
    fn content(path: &Path, story: &str) -> u8 {
        let image = open(path, &OpenOptions::read_only())
            .unwrap_or_else(|error| panic!("{story}: {error}"));
        let mut bytes = vec![0; image.size_bytes() as usize];
        image.read_at(&mut bytes, 0).unwrap();
        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "{story}: a mixture");
        bytes[0]
    }

    fn info(path: &Path) -> ImageInfo {
        open(path, &OpenOptions::read_only()).unwrap().info().unwrap()
    }

    /// Replaces an image of one kind by one of another, cut at a step; says whether it came so far.
    fn cut(kinds: [Kind; 2], cut_at: usize) -> bool {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().canonicalize().unwrap();
        let (target, story) = (folder.join("d.vmdk"), format!("{kinds:?}, cut at step {cut_at}"));
        let make = |source: &dyn DiskImage, target: &Path, kind| {
            convert(source, target, &ConvertOptions::new(kind), &mut Silent).unwrap()
        };
        let elsewhere = tempfile::tempdir().unwrap();
        let sources = [1, 2].map(|byte| raw(&elsewhere.path().join(byte.to_string()), byte));
        make(&*sources[0], &target, kinds[0]);
        let staging = folder.join(".backhaul-d.vmdk-killed");
        fs::create_dir(&staging).unwrap();
        make(&*sources[1], &staging.join("d.vmdk"), kinds[1]);
        let names = fs::read_dir(&staging).unwrap().map(|entry| entry.unwrap().file_name());
        let extents = names.filter(|name| name != "d.vmdk").collect();
        let old = Old::open(&target).unwrap();
        let name = OsStr::new("d.vmdk");
        let exchange =
            Exchange { folder: &folder, staging: &staging, name, extents, old: &old.files };
        let mut steps = 0;
        let ended = exchange.run(&mut || {
            steps += 1;
            if steps == cut_at { Err(io::Error::other("cut")) } else { Ok(()) }
        });
        drop(old);
        let found = content(&target, &story);
        assert!(ended.is_err() || found == 2, "{story}");
        // The next replacement finds whatever the cut left, and leaves nothing but its image.
        let options = CreateOptions::new(kinds[1], 1 << 20);
        replace(&*sources[1], &target, &options, |path| Ok(make(&*sources[1], path, kinds[1])))
            .unwrap_or_else(|error| panic!("{story}: {error:#}"));
        assert_eq!(content(&target, &story), 2);
        let used: BTreeSet<_> = chain_files(&info(&target)).into_iter().collect();
        let there = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
        assert_eq!(there.collect::<BTreeSet<_>>(), used, "{story}");
        ended.is_err()
    }

    #[test]
    fn an_exchange_cut_at_any_step_leaves_the_old_image_or_the_new() {
        let pairs = [
            [Kind::Vmfs, Kind::Vmfs],
            [Kind::Vmfs, Kind::MonolithicSparse],
            [Kind::MonolithicSparse, Kind::TwoGbMaxExtentSparse],
            [Kind::TwoGbMaxExtentSparse, Kind::Vmfs],
            [Kind::MonolithicSparse, Kind::StreamOptimized],
        ];
        for kinds in pairs {
            let steps = (1..50).take_while(|step| cut(kinds, *step)).count();
            assert!(steps >= 2, "{kinds:?} took {steps} steps");
        }
    }

    /// A first convert that was killed left extents, and the next refused because of them.
    #[test]
    fn a_first_image_cut_at_any_step_is_there_or_made_by_the_next_run() {
        for kind in [Kind::Vmfs, Kind::TwoGbMaxExtentSparse, Kind::MonolithicSparse] {
            let cuts = (1..50).take_while(|step| cut_new(kind, *step)).count();
            assert!(cuts >= 2, "{kind} took {cuts} steps");
        }
    }

    /// Makes an image, cut at a step as by a kill, and again; says whether it came so far.
    fn cut_new(kind: Kind, cut_at: usize) -> bool {
        let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let folder = dir.path().canonicalize().unwrap();
        let (target, story) = (folder.join("d.vmdk"), format!("{kind}, cut at step {cut_at}"));
        let source = raw(&elsewhere.path().join("raw"), 3);
        let make =
            |path: &Path| Ok(convert(&*source, path, &ConvertOptions::new(kind), &mut Silent)?);
        let staging = folder.join(".backhaul-d.vmdk-killed");
        fs::create_dir(&staging).unwrap();
        make(&staging.join("d.vmdk")).unwrap();
        let mut steps = 0;
        let cut = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            publish(&folder, &staging, OsStr::new("d.vmdk"), &mut || {
                steps += 1;
                // A kill: nothing that would follow an error is done.
                if steps == cut_at { std::panic::resume_unwind(Box::new(())) } else { Ok(()) }
            })
        }));
        assert!(cut.is_err() || cut.unwrap().is_ok(), "{story}");
        let is_cut = steps == cut_at;
        if is_cut {
            assert!(target.symlink_metadata().is_err(), "{story}: the descriptor comes last");
            // Somebody else's folder, of a name that begins with this one.
            fs::create_dir(folder.join(".backhaul-d.vmdk-old.vmdk-killed")).unwrap();
            make_new(&target, &CreateOptions::new(kind, 1 << 20), make)
                .unwrap_or_else(|error| panic!("{story}: {error:#}"));
            fs::remove_dir(folder.join(".backhaul-d.vmdk-old.vmdk-killed")).unwrap();
        } else {
            fs::remove_dir_all(&staging).unwrap();
        }
        assert_eq!(content(&target, &story), 3);
        let used: BTreeSet<_> = chain_files(&info(&target)).into_iter().collect();
        let there = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
        assert_eq!(there.collect::<BTreeSet<_>>(), used, "{story}");
        is_cut
    }
}
