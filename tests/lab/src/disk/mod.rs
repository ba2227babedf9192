//! The disk that the lab protects: a real ext4 file system full of real files, or a copy of a
//! disk of the user's.
//!
//! The file system is made without root and without a mount: the files are laid out in a folder
//! and `mkfs.ext4 -d` builds the image from it. One of them, `scratch.bin`, is there to be
//! overwritten: a raw block workload that stays inside its blocks changes the disk as a guest
//! would and leaves the file system clean, so that a file system check and every other file's
//! hash can judge the failed-over image.

mod content;

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use crate::tool::{Tool, ToolError};

/// A disk to protect, and what is known about it.
#[derive(Clone, Debug)]
pub struct LabDisk {
    /// The image, a flat file.
    pub path: PathBuf,
    /// Its size, a multiple of 512.
    pub size_bytes: u64,
    /// Where a workload may write; ascending and apart.
    pub writable_ranges: Vec<Range<u64>>,
    /// What is in it.
    pub content: DiskContent,
}

/// What a [`LabDisk`] holds.
#[derive(Clone, Debug)]
pub enum DiskContent {
    /// An ext4 file system that stays clean under writes to the writable ranges, with these files.
    Ext4 {
        /// Every file but `scratch.bin`.
        files: Vec<LabFile>,
    },
    /// A copy of somebody's disk. Its writable range is the whole disk: the workload destroys
    /// what the copy holds, and only the comparison of bytes can judge it.
    Copy,
}

/// A file in the disk whose content must survive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabFile {
    /// Path inside the file system, without a leading slash.
    pub path: String,
    /// Its length.
    pub len_bytes: u64,
    /// The hash of its content when the disk was made.
    pub blake3: blake3::Hash,
}

/// What kind of ext4 disk to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    /// Size of the disk, a multiple of 4096.
    pub size_bytes: u64,
    /// About how much of it ordinary files take.
    pub files_bytes: u64,
    /// How much of it the workload may overwrite.
    pub scratch_bytes: u64,
    /// Decides the generated content. (Half of the content is copied from this machine's /usr,
    /// so two machines make different disks.)
    pub seed: u64,
}

impl DiskSpec {
    /// A disk of which half is filled with files and a quarter is for the workload.
    pub fn with_size(size_bytes: u64) -> Self {
        Self { size_bytes, files_bytes: size_bytes / 2, scratch_bytes: size_bytes / 4, seed: 1 }
    }

    fn check(&self) -> Result<(), DiskError> {
        let needed = self
            .files_bytes
            .checked_add(self.scratch_bytes)
            .and_then(|content| content.checked_add(content / 16 + self.size_bytes / 16))
            .and_then(|content| content.checked_add(METADATA_BYTES))
            .unwrap_or(u64::MAX);
        if self.scratch_bytes < BLOCK_BYTES || needed > self.size_bytes {
            return Err(DiskError::TooSmall { size_bytes: self.size_bytes, needed_bytes: needed });
        }
        if !self.size_bytes.is_multiple_of(BLOCK_BYTES) {
            return Err(DiskError::Unaligned {
                size_bytes: self.size_bytes,
                unit_bytes: BLOCK_BYTES,
            });
        }
        Ok(())
    }
}

/// Makes an ext4 disk at `path`, replacing what is there. Needs as much space again beside it
/// while it works.
///
/// # Errors
/// When e2fsprogs is missing, the sizes do not fit, or the file system is out of space.
pub fn make_disk(path: &Path, spec: &DiskSpec) -> Result<LabDisk, DiskError> {
    spec.check()?;
    let staging = tempfile::Builder::new()
        .prefix(".lab-disk-")
        .tempdir_in(folder_of(path))
        .map_err(|source| DiskError::Io { path: folder_of(path).to_owned(), source })?;
    let files = content::fill_folder(staging.path(), spec.files_bytes, spec.seed)?;
    write_scratch(&staging.path().join(SCRATCH), spec.scratch_bytes)?;

    let image = create(path)?;
    image.set_len(spec.size_bytes).map_err(|source| io_error(path, source))?;
    Tool::MKFS_EXT4.run(&[
        "-q".as_ref(),
        "-F".as_ref(),
        "-b".as_ref(),
        "4096".as_ref(),
        // Twice as many inodes as usual: /usr is full of small files.
        "-i".as_ref(),
        "8192".as_ref(),
        "-m".as_ref(),
        "0".as_ref(),
        // Keeps the image sparse where nothing is.
        "-E".as_ref(),
        "lazy_itable_init=1,lazy_journal_init=1".as_ref(),
        "-d".as_ref(),
        staging.path().as_os_str(),
        path.as_os_str(),
    ])?;
    let writable_ranges = scratch_ranges(path, spec)?;
    let content = DiskContent::Ext4 { files };
    Ok(LabDisk { path: path.to_owned(), size_bytes: spec.size_bytes, writable_ranges, content })
}

/// Copies the disk `source` (a flat image or a block device) to `path`, replacing what is there
/// and leaving holes where it is zero.
///
/// The whole copy is writable: a workload overwrites whatever it holds. `source` is only read.
///
/// # Errors
/// When either cannot be read or written, or `source` is not a whole number of sectors.
pub fn copy_disk(source: &Path, path: &Path) -> Result<LabDisk, DiskError> {
    let from = File::open(source).map_err(|error| io_error(source, error))?;
    let size_bytes =
        seek(&from, SeekFrom::End(0)).map_err(|error| io_error(source, error.into()))?;
    if size_bytes == 0 || !size_bytes.is_multiple_of(SECTOR_BYTES) {
        return Err(DiskError::Unaligned { size_bytes, unit_bytes: SECTOR_BYTES });
    }
    let to = create(path)?;
    to.set_len(size_bytes).map_err(|error| io_error(path, error))?;
    let mut buffer = vec![0; COPY_BYTES];
    let mut at = 0;
    while let Some(data) = next_data(&from, at, size_bytes) {
        for start in data.clone().step_by(COPY_BYTES) {
            let chunk = &mut buffer[..(data.end - start).min(COPY_BYTES as u64) as usize];
            from.read_exact_at(chunk, start).map_err(|error| io_error(source, error))?;
            for (index, piece) in chunk.chunks(HOLE_BYTES).enumerate() {
                if piece.iter().any(|byte| *byte != 0) {
                    to.write_all_at(piece, start + (index * HOLE_BYTES) as u64)
                        .map_err(|error| io_error(path, error))?;
                }
            }
        }
        at = data.end;
    }
    let writable_ranges = std::iter::once(0..size_bytes).collect();
    Ok(LabDisk { path: path.to_owned(), size_bytes, writable_ranges, content: DiskContent::Copy })
}

/// Why a disk could not be made or copied.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The content does not fit.
    #[error(
        "a disk of {size_bytes} bytes is too small for its content, which needs {needed_bytes}: \
         make it larger or its content smaller"
    )]
    TooSmall {
        /// What was asked for.
        size_bytes: u64,
        /// What would do.
        needed_bytes: u64,
    },
    /// The size is not a multiple of its unit.
    #[error("a disk of {size_bytes} bytes is not a positive multiple of {unit_bytes} bytes")]
    Unaligned {
        /// The size.
        size_bytes: u64,
        /// The unit.
        unit_bytes: u64,
    },
    /// A file could not be read or written.
    #[error("{path} could not be read or written")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// An outside program is missing or failed.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// debugfs did not list the blocks of the scratch file as expected.
    #[error("debugfs gave no usable block list for /{SCRATCH}: {said}")]
    Extents {
        /// What it said.
        said: String,
    },
}

/// The blocks of the scratch file, as byte ranges of the image.
fn scratch_ranges(image: &Path, spec: &DiskSpec) -> Result<Vec<Range<u64>>, DiskError> {
    // `dump_extents -l` lists data extents only; `blocks` would also list the extent tree's own.
    let request = format!("dump_extents -l /{SCRATCH}");
    let said = Tool::DEBUGFS.run(&["-R".as_ref(), request.as_ref(), image.as_os_str()])?;
    let ranges = parse_extents(&said).filter(|ranges| {
        let total: u64 = ranges.iter().map(|range| range.end - range.start).sum();
        total == spec.scratch_bytes.next_multiple_of(BLOCK_BYTES)
            && ranges.iter().all(|range| range.end <= spec.size_bytes)
    });
    ranges.ok_or(DiskError::Extents { said })
}

/// Reads debugfs's table, of which a line is
/// `level/ depth  entry/entries  logical - logical  physical - physical  length [flags]`.
/// `None` when a line is not so, or an extent is not written yet.
fn parse_extents(table: &str) -> Option<Vec<Range<u64>>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for line in table.lines().skip(1) {
        let numbers: Option<Vec<u64>> = line
            .split(|c: char| c.is_whitespace() || c == '/' || c == '-')
            .filter(|word| !word.is_empty())
            .map(|word| word.parse().ok())
            .collect();
        let [_, _, _, _, _, _, first, last, blocks] = numbers?.try_into().ok()?;
        let after_last = last.checked_add(1)?;
        if after_last.checked_sub(first)? != blocks {
            return None;
        }
        ranges.push(first.checked_mul(BLOCK_BYTES)?..after_last.checked_mul(BLOCK_BYTES)?);
    }
    ranges.sort_by_key(|range| range.start);
    ranges.dedup_by(|next, range| {
        let joined = range.end == next.start;
        if joined {
            range.end = next.end;
        }
        joined
    });
    Some(ranges)
}

/// Every block gets a stamp, because blocks of zeroes would become holes without a place on disk.
fn write_scratch(path: &Path, len_bytes: u64) -> Result<(), DiskError> {
    let write = || -> io::Result<()> {
        let file = File::create(path)?;
        let mut chunk = vec![0_u8; COPY_BYTES];
        for start in (0..len_bytes).step_by(COPY_BYTES) {
            for (index, block) in chunk.chunks_mut(BLOCK_BYTES as usize).enumerate() {
                let stamp = format!("scratch block at {:>16}", start + index as u64 * BLOCK_BYTES);
                block[..stamp.len()].copy_from_slice(stamp.as_bytes());
            }
            let len = (len_bytes - start).min(COPY_BYTES as u64) as usize;
            file.write_all_at(&chunk[..len], start)?;
        }
        Ok(())
    };
    write().map_err(|source| io_error(path, source))
}

/// The next stretch of `file` at or after `at` that may hold data; `None` when there is none.
fn next_data(file: &File, at: u64, size_bytes: u64) -> Option<Range<u64>> {
    if at >= size_bytes {
        return None;
    }
    match seek(file, SeekFrom::Data(at)) {
        Ok(start) => {
            let end = seek(file, SeekFrom::Hole(start)).unwrap_or(size_bytes);
            Some(start..end.min(size_bytes))
        }
        Err(Errno::NXIO) => None,
        // Block devices and some file systems do not know holes: all of it is data.
        Err(_) => Some(at..size_bytes),
    }
}

fn create(path: &Path) -> Result<File, DiskError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
        .map_err(|source| io_error(path, source))
}

pub(crate) fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn io_error(path: &Path, source: io::Error) -> DiskError {
    DiskError::Io { path: path.to_owned(), source }
}

/// The file in the root of the made file system that a workload may overwrite.
pub const SCRATCH: &str = "scratch.bin";
const BLOCK_BYTES: u64 = 4096;
const SECTOR_BYTES: u64 = 512;
/// The smallest journal and group descriptors. Inode tables and a larger journal take up to 1/16
/// of the disk, and half-filled last blocks up to 1/16 of the content.
const METADATA_BYTES: u64 = 16 << 20;
const COPY_BYTES: usize = 1 << 20;
/// The smallest run of zeroes that becomes a hole in a copy.
const HOLE_BYTES: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_made_disk_is_clean_and_its_scratch_ranges_are_the_scratch_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.raw");
        let spec = DiskSpec {
            size_bytes: 96 << 20,
            files_bytes: 24 << 20,
            scratch_bytes: 20 << 20,
            seed: 3,
        };
        let disk = make_disk(&path, &spec).unwrap();
        Tool::E2FSCK.run(&["-fn".as_ref(), path.as_os_str()]).unwrap();

        // Overwrite exactly the ranges: the file must read so, and nothing else may change.
        let image = OpenOptions::new().write(true).open(&path).unwrap();
        let total: u64 = disk.writable_ranges.iter().map(|range| range.end - range.start).sum();
        assert_eq!(total, spec.scratch_bytes);
        for range in &disk.writable_ranges {
            let bytes = vec![0xa5; (range.end - range.start) as usize];
            image.write_all_at(&bytes, range.start).unwrap();
        }
        Tool::E2FSCK.run(&["-fn".as_ref(), path.as_os_str()]).unwrap();
        let out = folder.path().join("scratch");
        let request = format!("dump /{SCRATCH} {}", out.display());
        Tool::DEBUGFS.run(&["-R".as_ref(), request.as_ref(), path.as_os_str()]).unwrap();
        let scratch = std::fs::read(&out).unwrap();
        assert_eq!(scratch.len() as u64, spec.scratch_bytes);
        assert!(scratch.iter().all(|byte| *byte == 0xa5));
    }

    #[test]
    fn a_copy_has_the_same_bytes_and_keeps_holes() {
        use std::os::unix::fs::MetadataExt;

        let folder = tempfile::tempdir().unwrap();
        let (source, path) = (folder.path().join("a"), folder.path().join("b"));
        let file = File::create(&source).unwrap();
        file.set_len((64 << 20) + 512).unwrap();
        file.write_all_at(&[7; 5000], 3 << 20).unwrap();
        file.write_all_at(&[0; 1 << 20], 8 << 20).unwrap();
        file.write_all_at(&[9; 512], 64 << 20).unwrap();
        let disk = copy_disk(&source, &path).unwrap();
        assert_eq!(disk.writable_ranges.len(), 1);
        assert_eq!(disk.writable_ranges[0], 0..(64 << 20) + 512);
        assert_eq!(std::fs::read(&source).unwrap(), std::fs::read(&path).unwrap());
        assert!(std::fs::metadata(&path).unwrap().blocks() * 512 < 1 << 20);
    }

    #[test]
    fn impossible_disks_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let error = make_disk(&path, &DiskSpec::with_size(1 << 20)).unwrap_err();
        assert!(error.to_string().contains("too small"), "{error}");
        let error = make_disk(&path, &DiskSpec::with_size((256 << 20) + 1)).unwrap_err();
        assert!(error.to_string().contains("multiple of 4096"), "{error}");
        std::fs::write(folder.path().join("odd"), [1; 700]).unwrap();
        let error = copy_disk(&folder.path().join("odd"), &path).unwrap_err();
        assert!(error.to_string().contains("700 bytes"), "{error}");
    }

    #[test]
    fn block_lists_are_read_or_refused_whole() {
        let head = "Level Entries       Logical      Physical Length Flags\n";
        let list = |lines: &str| parse_extents(&format!("{head}{lines}"));
        assert_eq!(
            list(
                " 1/ 1   1/  2     0 -   9  20 -  29     10 \n 1/ 1   2/  2  10 - 10  30 - 30  1 \n"
            ),
            Some(std::iter::once(20 * 4096..31 * 4096).collect())
        );
        assert_eq!(list(" 0/ 0   1/  1     0 -   9  20 -  29     10 Uninit\n"), None);
        assert_eq!(list(" 0/ 0   1/  1     0 -   9  20 -  29     11 \n"), None);
        assert_eq!(list("nonsense\n"), None);
    }
}
