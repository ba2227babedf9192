//! Conversion: one image's disk into a new image of any kind.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io,
    num::NonZeroUsize,
    path::{Path, PathBuf},
};

use serde::Serialize;

use crate::{
    bulk::aligned,
    create::{CreateOptions, create_as, extent_files},
    error::{ErrorKind, ImageError, Result},
    folder::{Folder, staged_name},
    image::{MapDisk, ReadDisk, WriteDisk},
    kind::Kind,
    open::{OpenOptions, open_disk},
    ops::pipeline::{self, Chunk, all_chunks, data_chunks, threads_or_all},
    report::{Finding, Progress, advance},
    storage::Store,
    stream::{Deflater, GRAIN_BYTES, StreamWriter},
};

/// How to convert.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConvertOptions {
    /// The new image. A `size_bytes` of 0 means the source's size, padded as the kind needs it
    /// ([`Kind::padded_bytes`]); it cannot be smaller.
    pub create: CreateOptions,
    /// For streamOptimized: 1 is fast, 9 is small. Default: 6, as every other writer.
    pub deflate_level: u32,
    /// Threads that read, look for zeros, and compress. Default: one for each core.
    pub threads: Option<NonZeroUsize>,
    /// The image is on stable storage when the conversion is done. Default: yes. Without, a power
    /// cut in the next minute may leave an image that looks whole and is not.
    pub durable: bool,
}

impl ConvertOptions {
    /// The defaults for a new image of this kind.
    pub const fn new(kind: Kind) -> Self {
        Self { create: CreateOptions::new(kind, 0), deflate_level: 6, threads: None, durable: true }
    }
}

/// What was converted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ConvertReport {
    /// The new image.
    pub path: PathBuf,
    /// Its kind.
    pub kind: Kind,
    /// Bytes of its disk.
    pub size_bytes: u64,
    /// Bytes that were written because they are not zeros.
    pub written_bytes: u64,
    /// Zeros at the end that the source does not have.
    pub padding_bytes: u64,
    /// What to know before the image is taken elsewhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub caution: Option<&'static str>,
    /// Damage of the source that could be worked around, at most [`FINDINGS_MAX`](crate::FINDINGS_MAX)
    /// for each of its extents: a [`Severity::Loss`](crate::Severity::Loss) among them says that some
    /// grains may have got another one's content.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub findings: Vec<Finding>,
}

/// Copies `source`'s disk into a new image at `target`, which appears when it is whole, and durable unless
/// the options say otherwise.
/// Zeros are not stored where the kind can leave them out.
///
/// # Errors
/// As [`create`](crate::create()), and what reading and writing meet. What was made is removed.
pub fn convert(
    source: &dyn MapDisk,
    target: &Path,
    options: &ConvertOptions,
    progress: &mut dyn Progress,
) -> Result<ConvertReport> {
    let mut create = options.create.clone();
    if create.size_bytes == 0 {
        create.size_bytes = create.kind.padded_bytes(source.size_bytes());
    }
    if create.size_bytes < source.size_bytes() {
        let sentence = format!(
            "a disk of {} bytes does not fit into one of {}; make the new one as large as the old at \
             least",
            source.size_bytes(),
            create.size_bytes
        );
        return Err(ImageError::new(ErrorKind::Invalid, target, sentence));
    }
    if create.parent.is_some() {
        let sentence = "a conversion makes a whole disk; create a delta without one";
        return Err(ImageError::new(ErrorKind::Invalid, target, sentence));
    }
    source.survey(&mut |_: u64, _: u64| progress.advance(0, create.size_bytes))?;
    let job = Job { source, options, threads: threads_or_all(options.threads), create: &create };
    let written_bytes = match create.kind {
        Kind::StreamOptimized => job.stream(target, progress)?,
        _ => job.copy(target, progress)?,
    };
    let (path, size_bytes) = (target.to_owned(), create.size_bytes);
    let padding_bytes = size_bytes - source.size_bytes();
    let caution = create.kind.caution(size_bytes);
    Ok(ConvertReport {
        path,
        kind: create.kind,
        size_bytes,
        written_bytes,
        padding_bytes,
        caution,
        findings: source.findings(),
    })
}

/// Copies `source`'s disk over what is at `device`: a block device, which stays where it is and as large
/// as it is. Of a larger one, what lies behind the source's end is left as it was. `options` say
/// nothing about the image here; it is durable at the end unless they say otherwise.
///
/// Whoever calls this has made sure that nothing else uses the device, and that `source` is not on it.
///
/// # Errors
/// The device cannot be opened, is smaller than the disk, or fails; or reading does. From the first
/// byte on, what was there is lost.
pub fn overwrite(
    source: &dyn MapDisk,
    device: &Path,
    options: &ConvertOptions,
    progress: &mut dyn Progress,
) -> Result<ConvertReport> {
    let target = open_disk(device, &OpenOptions::writable().of_kind(Kind::Raw), 1)?;
    let (total, room) = (source.size_bytes(), target.size_bytes());
    if room < total {
        let sentence =
            format!("a disk of {total} bytes does not fit into its {room}; choose a larger one");
        return Err(ImageError::new(ErrorKind::Invalid, device, sentence));
    }
    source.survey(&mut |_: u64, _: u64| progress.advance(0, total))?;
    target.fill_in_bulk(options.durable);
    let work = |chunk: Chunk, bytes: &mut Vec<u8>| {
        if chunk.data {
            let bytes = aligned(bytes, chunk.length as usize);
            source.read_at(bytes, chunk.offset)?;
            if !is_zero(bytes) {
                return target.write_at(bytes, chunk.offset).map(|()| chunk.length);
            }
        }
        // What the device holds here is somebody's old data.
        target.write_zeroes_at(chunk.offset, chunk.length).map(|()| 0)
    };
    let mut written_bytes = 0;
    let take = |chunk: Chunk, bytes: u64| {
        written_bytes += bytes;
        advance(progress, device, chunk.end(), total)
    };
    pipeline::run(device, all_chunks(source), threads_or_all(options.threads), work, take)?;
    target.flush()?;
    Ok(ConvertReport {
        path: device.to_owned(),
        kind: Kind::Raw,
        size_bytes: total,
        written_bytes,
        padding_bytes: 0,
        caution: None,
        findings: source.findings(),
    })
}

struct Job<'a> {
    source: &'a dyn MapDisk,
    options: &'a ConvertOptions,
    create: &'a CreateOptions,
    threads: usize,
}

impl Job<'_> {
    /// Makes the image under a hidden name, fills it, and renames it.
    fn copy(&self, target: &Path, progress: &mut dyn Progress) -> Result<u64> {
        let (folder, name) = self.place_of(target)?;
        let fail = |source| ImageError::io("create", target, source);
        let staged = staged_name(&name).map_err(fail)?;
        let staged_path = folder.path_of(&staged);
        let extents = extent_files(&name, target, self.create)?;
        let named = |error: ImageError| error.moved(&staged_path, target);
        let total = self.create.size_bytes;
        let mut still = |_: u64, _: u64| progress.advance(0, total);
        create_as(&staged_path, &name, self.create, &mut still).map_err(named)?;
        let filled = self.fill(&staged_path, progress).map_err(named).and_then(|written| {
            folder.rename_new(&staged, &name).map_err(fail)?;
            Ok(written)
        });
        filled.inspect_err(|_| {
            // All of it is ours, and it is of no use.
            for file in extents.iter().map(OsStr::new).chain([&*staged]) {
                let _ = folder.remove(file);
            }
        })
    }

    fn fill(&self, path: &Path, progress: &mut dyn Progress) -> Result<u64> {
        let image = open_disk(path, &OpenOptions::writable().of_kind(self.create.kind), 1)?;
        image.fill_in_bulk(self.options.durable);
        // Smaller than a grain, zeros save nothing; a flat file can leave out pages.
        let block = match self.create.kind {
            Kind::MonolithicSparse | Kind::TwoGbMaxExtentSparse => GRAIN_BYTES,
            _ => 4096,
        };
        let (total, mut written) = (self.source.size_bytes(), 0);
        let work = |chunk: Chunk, bytes: &mut Vec<u8>| {
            let bytes = aligned(bytes, chunk.length as usize);
            self.source.read_at(bytes, chunk.offset)?;
            write_data(&image, bytes, chunk.offset, block)
        };
        let take = |chunk: Chunk, bytes: u64| {
            written += bytes;
            advance(progress, path, chunk.end(), total)
        };
        pipeline::run(path, data_chunks(self.source), self.threads, work, take)?;
        image.flush()?;
        advance(progress, path, total, total)?;
        Ok(written)
    }

    fn stream(&self, target: &Path, progress: &mut dyn Progress) -> Result<u64> {
        let (folder, name) = self.place_of(target)?;
        let text = name.to_str().unwrap_or("disk.vmdk").replace(['"', '\n', '\r'], "_");
        let (mut failed, mut written) = (None, 0);
        let published = folder.publish_new(&name, |file: &File| {
            let store = Store::new(target, Box::new(file.try_clone()?));
            match self.write_stream(&store, &text, progress) {
                Ok(bytes) => written = bytes,
                Err(error) => {
                    failed = Some(error);
                    return Err(io::Error::other("filling failed"));
                }
            }
            Ok(())
        });
        match (published, failed) {
            (_, Some(error)) => Err(error),
            (Err(source), None) => Err(ImageError::io("create", target, source)),
            (Ok(()), None) => Ok(written),
        }
    }

    fn write_stream(&self, store: &Store, name: &str, progress: &mut dyn Progress) -> Result<u64> {
        let mut writer = StreamWriter::start(store, name, self.create)?;
        let total = self.source.size_bytes();
        let mut written = 0;
        let work = |chunk: Chunk, bytes: &mut Vec<u8>| self.deflate(chunk, bytes);
        let take = |chunk: Chunk, grains: Vec<(u64, Vec<u8>)>| {
            for (grain, compressed) in &grains {
                writer.append(*grain, compressed)?;
                written += GRAIN_BYTES as u64;
            }
            advance(progress, &store.path, chunk.end(), total)
        };
        let chunks = whole_grains(data_chunks(self.source), total);
        pipeline::run(&store.path, chunks, self.threads, work, take)?;
        writer.finish()?;
        advance(progress, &store.path, total, total)?;
        Ok(written)
    }

    fn place_of(&self, target: &Path) -> Result<(Folder, OsString)> {
        let fail = |source| ImageError::io("create", target, source);
        let name = target.file_name().ok_or_else(|| {
            ImageError::new(ErrorKind::Invalid, target, "it is not the name of a file")
        })?;
        let folder = Folder::of_new(target)?.made_durable(self.options.durable);
        if folder.path_of(name).symlink_metadata().is_ok() {
            return Err(fail(io::Error::from(io::ErrorKind::AlreadyExists)));
        }
        Ok((folder, name.to_owned()))
    }

    /// The grains of a chunk that are not zeros, compressed.
    fn deflate(&self, chunk: Chunk, bytes: &mut Vec<u8>) -> Result<Vec<(u64, Vec<u8>)>> {
        bytes.clear();
        bytes.resize((chunk.length as usize).next_multiple_of(GRAIN_BYTES), 0);
        self.source.read_at(&mut bytes[..chunk.length as usize], chunk.offset)?;
        let mut deflater = Deflater::new(self.options.deflate_level);
        let first = chunk.offset / GRAIN_BYTES as u64;
        let grains = (first..).zip(bytes.chunks_exact(GRAIN_BYTES));
        let stored = grains.filter(|(_, grain)| !is_zero(grain));
        Ok(stored.map(|(number, grain)| (number, deflater.deflate(grain))).collect())
    }
}

/// Widens chunks to whole grains, and leaves out what the chunk before had already: runs of data
/// may begin and end within a grain.
fn whole_grains(
    chunks: impl Iterator<Item = Result<Chunk>> + Send,
    size_bytes: u64,
) -> impl Iterator<Item = Result<Chunk>> + Send {
    let mut done = 0;
    chunks.filter_map(move |chunk| {
        let chunk = match chunk {
            Ok(chunk) => chunk,
            Err(error) => return Some(Err(error)),
        };
        let grain = GRAIN_BYTES as u64;
        let start = (chunk.offset - chunk.offset % grain).max(done);
        let end = chunk.end().next_multiple_of(grain).min(size_bytes);
        done = done.max(end);
        (start < end).then_some(Ok(Chunk { offset: start, length: end - start, ..chunk }))
    })
}

/// Writes the blocks of `bytes` that are not zeros, neighbours together. Blocks are aligned in the
/// disk. Returns the bytes written.
fn write_data(image: &dyn WriteDisk, bytes: &[u8], offset: u64, block: usize) -> Result<u64> {
    let (mut at, mut written) = (0, 0);
    let step = |at: usize| {
        let within = ((offset + at as u64) % block as u64) as usize;
        (at + block - within).min(bytes.len())
    };
    while at < bytes.len() {
        let (start, mut end) = (at, step(at));
        at = end;
        if is_zero(&bytes[start..end]) {
            continue;
        }
        while end < bytes.len() && !is_zero(&bytes[end..step(end)]) {
            end = step(end);
        }
        image.write_at(&bytes[start..end], offset + start as u64)?;
        written += (end - start) as u64;
        at = end;
    }
    Ok(written)
}

/// Whether all bytes are zero.
fn is_zero(bytes: &[u8]) -> bool {
    // Arrays of a fixed size, which the compiler makes vectors of.
    let (blocks, tail) = bytes.as_chunks::<64>();
    tail.iter().all(|byte| *byte == 0)
        && blocks.iter().all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
}
