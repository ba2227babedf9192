//! Files such as a real machine has: programs and data of this machine, text, packed media, and
//! images full of zeroes.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use super::{DiskError, LabFile, io_error};
use crate::random::Random;

/// Fills `folder` with about `budget_bytes` of files and says what they are.
///
/// Half is copied from this machine, the rest is generated: a fifth of all text, a fifth that
/// does not compress, a tenth with long runs of zeroes. What /usr lacks is generated as well.
pub(super) fn fill_folder(
    folder: &Path,
    budget_bytes: u64,
    seed: u64,
) -> Result<Vec<LabFile>, DiskError> {
    let mut random = Random::new(seed);
    let mut filler = Filler { folder, files: Vec::new() };
    let copied = filler.copy_real(budget_bytes / 2, &mut random)?;
    let rest = budget_bytes - copied.min(budget_bytes);
    filler.generate("text", rest * 2 / 5, 1 << 20, &mut random, write_text)?;
    filler.generate("packed", rest * 2 / 5, 8 << 20, &mut random, write_packed)?;
    filler.generate("zeroes", rest / 5, 8 << 20, &mut random, write_zeroes)?;
    Ok(filler.files)
}

struct Filler<'a> {
    folder: &'a Path,
    files: Vec<LabFile>,
}

type WriteContent = fn(&mut BufWriter<File>, u64, &mut Random) -> io::Result<()>;

impl Filler<'_> {
    fn copy_real(&mut self, budget_bytes: u64, random: &mut Random) -> Result<u64, DiskError> {
        let mut candidates = Vec::new();
        // On a large disk only the larger files are taken, on a small one no few files fill it.
        let sizes = budget_bytes / REAL_FILES / 4..=(budget_bytes / 32).max(1 << 20);
        for root in ["/usr/lib", "/usr/share"] {
            list_files(Path::new(root), &sizes, &mut candidates);
        }
        candidates.sort();
        let mut copied_bytes = 0;
        let files_before = self.files.len() as u64;
        while copied_bytes < budget_bytes
            && self.files.len() as u64 - files_before < REAL_FILES
            && !candidates.is_empty()
        {
            let index = random.below(candidates.len() as u64) as usize;
            let (source, len_bytes) = candidates.swap_remove(index);
            if copied_bytes + len_bytes > budget_bytes {
                continue;
            }
            let path = format!("real{}", source.display());
            let target = self.prepare(&path)?;
            // A file that may not be read, or that an upgrade just removed, is not worth an error.
            if fs::copy(&source, &target).is_err() {
                let _ = fs::remove_file(&target);
                continue;
            }
            copied_bytes += self.record(path, &target)?;
        }
        Ok(copied_bytes)
    }

    /// Files of 4 KiB to `len_max_bytes`, most of them small, until the budget is used.
    fn generate(
        &mut self,
        kind: &str,
        budget_bytes: u64,
        len_max_bytes: u64,
        random: &mut Random,
        write: WriteContent,
    ) -> Result<(), DiskError> {
        let mut left_bytes = budget_bytes;
        for number in 0.. {
            if left_bytes < 4096 {
                return Ok(());
            }
            // The smaller of two draws: a file system holds more small files than large ones.
            let draw = random.below(len_max_bytes).min(random.below(len_max_bytes));
            let len_bytes = draw.max(4096).min(left_bytes);
            let path = format!("{kind}/{:03}/{number:05}.dat", number / 100);
            let target = self.prepare(&path)?;
            File::create(&target)
                .and_then(|file| {
                    let mut file = BufWriter::with_capacity(1 << 18, file);
                    write(&mut file, len_bytes, random)?;
                    file.flush()
                })
                .map_err(|source| io_error(&target, source))?;
            left_bytes -= self.record(path, &target)?.min(left_bytes);
        }
        Ok(())
    }

    fn prepare(&self, path: &str) -> Result<PathBuf, DiskError> {
        let path = Path::new(path);
        // One by one: the folder that all of it is in may be gone, because the lab was interrupted,
        // and must not be made again.
        let mut folder = self.folder.to_path_buf();
        for part in path.parent().into_iter().flat_map(Path::components) {
            folder.push(part);
            match fs::create_dir(&folder) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(io_error(&folder, error));
                }
                _ => {}
            }
        }
        Ok(self.folder.join(path))
    }

    fn record(&mut self, path: String, target: &Path) -> Result<u64, DiskError> {
        let mut hasher = blake3::Hasher::new();
        File::open(target)
            .and_then(|file| hasher.update_reader(file).map(|_| ()))
            .map_err(|source| io_error(target, source))?;
        let len_bytes = hasher.count();
        self.files.push(LabFile { path, len_bytes, blake3: hasher.finalize() });
        Ok(len_bytes)
    }
}

/// Ordinary files below `folder` of these sizes, with names that need no quoting in a debugfs
/// request. Folders that cannot be read are passed over.
fn list_files(folder: &Path, sizes: &RangeInclusive<u64>, files: &mut Vec<(PathBuf, u64)>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let Ok(metadata) = entry.metadata() else { continue };
        let path = entry.path();
        if metadata.is_dir() {
            list_files(&path, sizes, files);
        } else if metadata.is_file()
            && metadata.len() > 0
            && sizes.contains(&metadata.len())
            && path.to_str().is_some_and(is_plain)
        {
            files.push((path, metadata.len()));
        }
    }
}

fn is_plain(path: &str) -> bool {
    path.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"/._-+@".contains(&byte))
}

fn write_text(file: &mut BufWriter<File>, len_bytes: u64, random: &mut Random) -> io::Result<()> {
    let mut written = 0;
    let mut line = String::new();
    while written < len_bytes {
        line.clear();
        line.push_str(&format!("2026-11-{:02}T", 1 + random.below(30)));
        line.push_str(&format!("{:02}:{:02}", random.below(24), random.below(60)));
        for _ in 0..4 + random.below(12) {
            line.push(' ');
            line.push_str(WORDS[random.below(WORDS.len() as u64) as usize]);
        }
        line.push_str(&format!(" id={}\n", random.below(1_000_000)));
        let bytes = &line.as_bytes()[..line.len().min((len_bytes - written) as usize)];
        file.write_all(bytes)?;
        written += bytes.len() as u64;
    }
    Ok(())
}

fn write_packed(file: &mut BufWriter<File>, len_bytes: u64, random: &mut Random) -> io::Result<()> {
    let mut chunk = [0; 4096];
    for start in (0..len_bytes).step_by(chunk.len()) {
        random.fill(&mut chunk);
        file.write_all(&chunk[..(len_bytes - start).min(4096) as usize])?;
    }
    Ok(())
}

/// Like an image or a database: islands of data in runs of zeroes of up to 1 MiB.
fn write_zeroes(file: &mut BufWriter<File>, len_bytes: u64, random: &mut Random) -> io::Result<()> {
    let mut written = 0;
    while written < len_bytes {
        let zeroes = (4096 + random.below(1 << 20)).min(len_bytes - written);
        io::copy(&mut io::Read::take(io::repeat(0), zeroes), file)?;
        written += zeroes;
        let data = (512 + random.below(64 << 10)).min(len_bytes - written);
        write_packed(file, data, random)?;
        written += data;
    }
    Ok(())
}

/// Files copied from this machine, at most: mkfs and debugfs take over a millisecond for each.
const REAL_FILES: u64 = 2000;
const WORDS: [&str; 24] = [
    "accepted",
    "backup",
    "block",
    "connection",
    "copied",
    "daemon",
    "disk",
    "error",
    "file",
    "guest",
    "host",
    "journal",
    "kernel",
    "link",
    "machine",
    "network",
    "opened",
    "process",
    "query",
    "request",
    "server",
    "session",
    "user",
    "written",
];
