//! Judges of a failed-over image that share no code and no hash with the pipeline.
//!
//! | judge | asks |
//! | --- | --- |
//! | [`Judge::QemuImg`] | does QEMU read the same bytes through the VMDK descriptor? |
//! | [`Judge::Bytes`] | is the flat extent the same file, byte for byte? (without qemu-img) |
//! | [`Judge::FileSystem`] | does `e2fsck` find the file system clean? |
//! | [`Judge::Files`] | has each file the hash that it had when the disk was made? |

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::disk::{DiskContent, LabDisk, LabFile, folder_of};
use crate::tool::{Tool, ToolError, said};
use crate::workload::Stamp;

/// What the judges found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verification {
    /// The bytes were compared and are the same, and no judge found a fault.
    pub verified: bool,
    /// Each judge, also those that could not be asked.
    pub judgements: Vec<Judgement>,
}

/// What one judge said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Judgement {
    /// Who.
    pub judge: Judge,
    /// The outcome.
    pub outcome: Outcome,
    /// In a sentence: what was compared, what differs, or why nobody was asked.
    pub detail: String,
}

/// Who judges.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Judge {
    /// `qemu-img compare` of the descriptor and the protected disk.
    QemuImg,
    /// Our own plain comparison of the flat extent and the protected disk.
    Bytes,
    /// `e2fsck -fn` on the flat extent.
    FileSystem,
    /// The files' content, read from the flat extent by `debugfs`.
    Files,
}

/// How a judgement ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Nothing to complain about.
    Passed,
    /// A fault, or the judge could not finish.
    Failed,
    /// Not asked; says nothing either way.
    NotRun,
}

/// Judges the VMDK `descriptor` against `protected`, the protected disk as it was at failover,
/// of which `disk` says what it holds. Only reads both.
pub fn verify(protected: &Path, descriptor: &Path, disk: &LabDisk) -> Verification {
    let mut judgements = Vec::new();
    let mut note = |judge, finding: Result<String, Finding>| {
        let (outcome, detail) = match finding {
            Ok(detail) => (Outcome::Passed, detail),
            Err(Finding::Fault(detail)) => (Outcome::Failed, detail),
            Err(Finding::NotRun(detail)) => (Outcome::NotRun, detail),
        };
        judgements.push(Judgement { judge, outcome, detail });
    };
    let flat = flat_extent(descriptor);
    let qemu = compare_with_qemu(protected, descriptor);
    let bytes = match (&qemu, &flat) {
        (Err(Finding::NotRun(_)), Ok(flat)) => compare_bytes(protected, flat),
        (Err(Finding::NotRun(_)), Err(fault)) => Err(Finding::Fault(fault.clone())),
        _ => Err(Finding::NotRun("qemu-img has compared the bytes".to_owned())),
    };
    note(Judge::QemuImg, qemu);
    note(Judge::Bytes, bytes);
    match (&disk.content, flat) {
        (DiskContent::Copy, _) => {
            let reason = "the workload may write anywhere in a copied disk";
            note(Judge::FileSystem, Err(Finding::NotRun(reason.to_owned())));
            note(Judge::Files, Err(Finding::NotRun(reason.to_owned())));
        }
        (DiskContent::Ext4 { files }, Ok(flat)) => {
            note(Judge::FileSystem, check_file_system(&flat));
            note(Judge::Files, check_files(&flat, files));
        }
        (DiskContent::Ext4 { .. }, Err(fault)) => {
            note(Judge::FileSystem, Err(Finding::Fault(fault)));
        }
    }
    let compared = judgements.iter().any(|judgement| {
        matches!(judgement.judge, Judge::QemuImg | Judge::Bytes)
            && judgement.outcome == Outcome::Passed
    });
    let fault = judgements.iter().any(|judgement| judgement.outcome == Outcome::Failed);
    Verification { verified: compared && !fault, judgements }
}

/// The first byte at which two files differ; `None` when they are the same, length included.
///
/// # Errors
/// When either cannot be read.
pub fn first_difference(left: &Path, right: &Path) -> io::Result<Option<Difference>> {
    let (mut left, mut right) = (File::open(left)?, File::open(right)?);
    let (mut left_chunk, mut right_chunk) = (vec![0; CHUNK_BYTES], vec![0; CHUNK_BYTES]);
    let mut at_bytes = 0;
    loop {
        let left_len = read_full(&mut left, &mut left_chunk)?;
        let right_len = read_full(&mut right, &mut right_chunk)?;
        let (left_bytes, right_bytes) = (&left_chunk[..left_len], &right_chunk[..right_len]);
        if left_bytes != right_bytes {
            let same = left_bytes.iter().zip(right_bytes).take_while(|(a, b)| a == b).count();
            let sector = |bytes: &[u8]| Stamp::read(bytes.get(same / 512 * 512..)?);
            return Ok(Some(Difference {
                at_bytes: at_bytes + same as u64,
                left: sector(left_bytes),
                right: sector(right_bytes),
                length: same == left_len || same == right_len,
            }));
        }
        if left_len == 0 {
            return Ok(None);
        }
        at_bytes += left_len as u64;
    }
}

/// Where two disks part, and which operations of the workload wrote either side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Offset of the first byte that differs.
    pub at_bytes: u64,
    /// What the first disk's sector there says about itself.
    pub left: Option<Stamp>,
    /// What the second's says.
    pub right: Option<Stamp>,
    /// One of them ends there.
    pub length: bool,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.length {
            return write!(f, "one ends at byte {}, the other goes on", self.at_bytes);
        }
        let origin = |stamp: Option<Stamp>| match stamp {
            Some(stamp) => format!("operation {} for {}", stamp.number, stamp.offset_bytes),
            None => "no operation of the workload".to_owned(),
        };
        write!(
            f,
            "byte {} differs: written by {} and by {}",
            self.at_bytes,
            origin(self.left),
            origin(self.right)
        )
    }
}

enum Finding {
    Fault(String),
    NotRun(String),
}

impl From<ToolError> for Finding {
    fn from(error: ToolError) -> Self {
        match error {
            ToolError::Missing { .. } => Self::NotRun(error.to_string()),
            _ => Self::Fault(error.to_string()),
        }
    }
}

fn compare_with_qemu(protected: &Path, descriptor: &Path) -> Result<String, Finding> {
    let arguments = [
        "compare".as_ref(),
        "-f".as_ref(),
        "raw".as_ref(),
        "-F".as_ref(),
        "vmdk".as_ref(),
        protected.as_os_str(),
        descriptor.as_os_str(),
    ];
    let output = Tool::QEMU_IMG.output(&arguments)?;
    let said = said(&output);
    // Different sizes count as equal for qemu-img when the rest is zero; not for us.
    if output.status.success() && !said.contains("size mismatch") {
        return Ok(said);
    }
    Err(Finding::Fault(said))
}

fn compare_bytes(protected: &Path, flat: &Path) -> Result<String, Finding> {
    match first_difference(protected, flat) {
        Ok(None) => Ok(format!("{} equals the protected disk", flat.display())),
        Ok(Some(difference)) => Err(Finding::Fault(difference.to_string())),
        Err(error) => Err(Finding::Fault(format!("the disks could not be read: {error}"))),
    }
}

fn check_file_system(flat: &Path) -> Result<String, Finding> {
    let output = Tool::E2FSCK.output(&["-fn".as_ref(), flat.as_os_str()])?;
    let said = said(&output);
    if output.status.code() == Some(0) { Ok(said) } else { Err(Finding::Fault(said)) }
}

fn check_files(flat: &Path, files: &[LabFile]) -> Result<String, Finding> {
    let fault = |error: io::Error| Finding::Fault(format!("files could not be read: {error}"));
    let folder = tempfile::Builder::new()
        .prefix(".lab-files-")
        .tempdir_in(folder_of(flat))
        .map_err(fault)?;
    let mut rest = files;
    while !rest.is_empty() {
        let (batch, after) = rest.split_at(batch_len(rest));
        check_batch(flat, batch, folder.path())?;
        rest = after;
    }
    Ok(format!("{} files are as they were", files.len()))
}

/// Starting debugfs once a file would take minutes, and reading all files at once would need the
/// space of all of them.
fn batch_len(files: &[LabFile]) -> usize {
    let mut bytes = 0;
    let fits = files.iter().take(BATCH_FILES).take_while(|file| {
        bytes += file.len_bytes;
        bytes <= BATCH_BYTES
    });
    fits.count().max(1)
}

fn check_batch(flat: &Path, files: &[LabFile], folder: &Path) -> Result<(), Finding> {
    let fault = |error: io::Error| Finding::Fault(format!("files could not be read: {error}"));
    let requests = folder.join("requests");
    let target = |index: usize| folder.join(index.to_string());
    let script: String = files
        .iter()
        .enumerate()
        .map(|(index, file)| format!("dump \"/{}\" \"{}\"\n", file.path, target(index).display()))
        .collect();
    std::fs::write(&requests, script).map_err(fault)?;
    let output = Tool::DEBUGFS.output(&["-f".as_ref(), requests.as_os_str(), flat.as_os_str()])?;
    for (index, file) in files.iter().enumerate() {
        let mut hasher = blake3::Hasher::new();
        let read =
            File::open(target(index)).and_then(|from| hasher.update_reader(from).map(|_| ()));
        if read.is_err() {
            let said = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
            return Err(Finding::Fault(format!("/{} is not in the image: {said}", file.path)));
        }
        if hasher.finalize() != file.blake3 {
            return Err(Finding::Fault(format!("/{} has changed", file.path)));
        }
        std::fs::remove_file(target(index)).map_err(fault)?;
    }
    Ok(())
}

/// The one flat extent of a VMDK, found by reading its descriptor's text; or what is wrong.
fn flat_extent(descriptor: &Path) -> Result<PathBuf, String> {
    let mut text = Vec::new();
    File::open(descriptor)
        .and_then(|file| file.take(DESCRIPTOR_MAX_BYTES).read_to_end(&mut text))
        .map_err(|error| format!("{} could not be read: {error}", descriptor.display()))?;
    let text = String::from_utf8_lossy(&text);
    let mut extents = text.lines().filter_map(extent_name);
    match (extents.next(), extents.next()) {
        (Some(name), None) => Ok(folder_of(descriptor).join(name)),
        _ => Err(format!("{} does not name exactly one flat extent", descriptor.display())),
    }
}

/// `RW 8192 FLAT "disk-flat.vmdk" 0` or `RW 8192 VMFS "disk-flat.vmdk"`: the quoted name.
fn extent_name(line: &str) -> Option<&str> {
    let mut words = line.splitn(4, ' ');
    let is_extent = words.next() == Some("RW")
        && words.next()?.parse::<u64>().is_ok()
        && matches!(words.next(), Some("FLAT" | "VMFS"));
    let (name, offset) = words.next()?.strip_prefix('"')?.split_once('"')?;
    (is_extent && matches!(offset.trim(), "" | "0")).then_some(name)
}

fn read_full(file: &mut File, chunk: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < chunk.len() {
        match file.read(&mut chunk[filled..]) {
            Ok(0) => break,
            Ok(len) => filled += len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

const CHUNK_BYTES: usize = 1 << 20;
/// Descriptors are a page or two; whatever is larger is not one.
const DESCRIPTOR_MAX_BYTES: u64 = 64 << 10;
const BATCH_FILES: usize = 512;
const BATCH_BYTES: u64 = 256 << 20;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::disk::{DiskSpec, make_disk};

    /// A protected disk and a VMDK of it that somebody else (QEMU) has made.
    fn protected_and_vmdk(folder: &Path) -> (LabDisk, PathBuf) {
        let spec = DiskSpec {
            size_bytes: 64 << 20,
            files_bytes: 8 << 20,
            scratch_bytes: 4 << 20,
            seed: 1,
        };
        let disk = make_disk(&folder.join("protected"), &spec).unwrap();
        let descriptor = folder.join("disk.vmdk");
        let convert = ["convert", "-O", "vmdk", "-o", "subformat=monolithicFlat"];
        let mut arguments: Vec<&std::ffi::OsStr> =
            convert.iter().map(|word| word.as_ref()).collect();
        arguments.extend([disk.path.as_os_str(), descriptor.as_os_str()]);
        Tool::QEMU_IMG.run(&arguments).unwrap();
        (disk, descriptor)
    }

    fn outcomes(verification: &Verification) -> Vec<(Judge, Outcome)> {
        verification
            .judgements
            .iter()
            .map(|judgement| (judgement.judge, judgement.outcome))
            .collect()
    }

    #[test]
    fn a_true_image_passes_and_each_kind_of_damage_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let (disk, descriptor) = protected_and_vmdk(folder.path());
        let judged = verify(&disk.path, &descriptor, &disk);
        assert!(judged.verified, "{judged:?}");
        use {Judge::*, Outcome::*};
        assert_eq!(
            outcomes(&judged),
            [(QemuImg, Passed), (Bytes, NotRun), (FileSystem, Passed), (Files, Passed)]
        );

        // qemu-img alone would let a longer disk of zeroes pass.
        let longer = File::options().write(true).open(&disk.path).unwrap();
        longer.set_len(disk.size_bytes + 512).unwrap();
        assert!(outcomes(&verify(&disk.path, &descriptor, &disk)).contains(&(QemuImg, Failed)));
        longer.set_len(disk.size_bytes).unwrap();

        // A byte in the scratch file: only a comparison can see it.
        let flat = File::options().write(true).open(folder.path().join("disk-flat.vmdk")).unwrap();
        let at = disk.writable_ranges[0].start + 700;
        flat.write_all_at(&[0xff], at).unwrap();
        let judged = verify(&disk.path, &descriptor, &disk);
        assert!(!judged.verified);
        assert_eq!(
            outcomes(&judged),
            [(QemuImg, Failed), (Bytes, NotRun), (FileSystem, Passed), (Files, Passed)]
        );
        let found = compare_bytes(&disk.path, &folder.path().join("disk-flat.vmdk"));
        assert!(matches!(found, Err(Finding::Fault(said)) if said.contains(&at.to_string())));

        // The superblock's free-block count, and a file's content.
        flat.write_all_at(&[0xff; 2], 1024 + 12).unwrap();
        let judged = verify(&disk.path, &descriptor, &disk);
        assert!(outcomes(&judged).contains(&(FileSystem, Failed)), "{judged:?}");
    }

    #[test]
    fn a_changed_or_missing_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let (mut disk, descriptor) = protected_and_vmdk(folder.path());
        let DiskContent::Ext4 { files } = &mut disk.content else { panic!("made as ext4") };
        files[3].blake3 = blake3::hash(b"something else");
        let changed = format!("/{} has changed", files[3].path);
        let judged = verify(&disk.path, &descriptor, &disk);
        assert!(!judged.verified);
        assert!(judged.judgements.iter().any(|judgement| judgement.detail == changed));

        let DiskContent::Ext4 { files } = &mut disk.content else { panic!("made as ext4") };
        files[3].path = "real/nowhere".to_owned();
        let judged = verify(&disk.path, &descriptor, &disk);
        assert!(judged.judgements[3].detail.starts_with("/real/nowhere is not in the image"));
    }

    #[test]
    fn another_length_is_a_difference() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (folder.path().join("a"), folder.path().join("b"));
        std::fs::write(&a, vec![0; 3 << 20]).unwrap();
        std::fs::write(&b, vec![0; (3 << 20) + 512]).unwrap();
        let difference = first_difference(&a, &b).unwrap().unwrap();
        assert!(difference.length && difference.at_bytes == 3 << 20, "{difference}");
        assert_eq!(first_difference(&a, &a).unwrap(), None);
    }

    #[test]
    fn extents_are_read_from_both_flat_layouts_and_nothing_else() {
        assert_eq!(extent_name("RW 8192 FLAT \"a b-flat.vmdk\" 0"), Some("a b-flat.vmdk"));
        assert_eq!(extent_name("RW 8192 VMFS \"a-flat.vmdk\""), Some("a-flat.vmdk"));
        assert_eq!(extent_name("RW 8192 FLAT \"a-flat.vmdk\" 128"), None);
        assert_eq!(extent_name("RW 8192 SPARSE \"a.vmdk\""), None);
        assert_eq!(extent_name("RW x FLAT \"a.vmdk\" 0"), None);
        assert_eq!(extent_name("# Extent description"), None);
        assert!(
            flat_extent(Path::new("/nowhere/x.vmdk")).unwrap_err().contains("could not be read")
        );
    }
}
