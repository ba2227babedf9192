//! Comparison of two disks.

use std::{
    num::NonZeroUsize,
    sync::atomic::{AtomicU64, Ordering},
};

use serde::Serialize;

use crate::{
    error::Result,
    image::{DiskImage, ReadDisk},
    ops::pipeline::{self, Chunk, data_chunks, threads_or_all},
    report::{Progress, advance},
};

/// How two disks differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct CompareReport {
    /// Bytes of both disks.
    pub size_bytes: [u64; 2],
    /// Every byte is the same, and where one disk is longer, it has zeros there.
    pub same_content: bool,
    /// The first byte that differs.
    pub first_difference: Option<u64>,
}

/// Compares two disks, up to the first difference. What neither stores is not read.
///
/// # Errors
/// An image is damaged, the file system fails, or `progress` stops it.
pub fn compare(
    one: &dyn DiskImage,
    other: &dyn DiskImage,
    threads: Option<NonZeroUsize>,
    progress: &mut dyn Progress,
) -> Result<CompareReport> {
    let threads = threads_or_all(threads);
    let total = one.size_bytes().max(other.size_bytes());
    for image in [one, other] {
        image.survey(&mut |_: u64, _: u64| progress.advance(0, total))?;
    }
    // The lowest difference known: nothing behind it matters any more.
    let found = AtomicU64::new(u64::MAX);
    // Data of either disk. What is data in both is compared twice, but what a cache holds is cheap.
    for (image, done_before) in [(one, 0), (other, total)] {
        let work = |chunk: Chunk, memory: &mut Vec<u8>| {
            let length = chunk.length as usize;
            memory.resize(2 * length, 0);
            let (ours, theirs) = memory.split_at_mut(length);
            read(one, chunk, ours)?;
            read(other, chunk, theirs)?;
            if let Some(at) = difference(ours, theirs) {
                found.fetch_min(chunk.offset + at as u64, Ordering::SeqCst);
            }
            Ok(())
        };
        let take = |chunk: Chunk, ()| {
            advance(progress, image.path(), (done_before + chunk.end()) / 2, total)
        };
        let matters = |chunk: &Result<Chunk>| {
            let end = found.load(Ordering::SeqCst);
            chunk.as_ref().map_or(true, |chunk| chunk.offset < end)
        };
        let chunks = data_chunks(image).take_while(matters);
        pipeline::run(image.path(), chunks, threads, work, take)?;
    }
    let found = Some(found.into_inner()).filter(|found| *found != u64::MAX);
    advance(progress, one.path(), total, total)?;
    Ok(CompareReport {
        size_bytes: [one.size_bytes(), other.size_bytes()],
        same_content: found.is_none(),
        first_difference: found,
    })
}

/// A chunk of a disk, with zeros beyond its end.
fn read(image: &dyn ReadDisk, chunk: Chunk, buf: &mut [u8]) -> Result<()> {
    let there = image.size_bytes().saturating_sub(chunk.offset).min(chunk.length) as usize;
    let (inside, beyond) = buf.split_at_mut(there);
    beyond.fill(0);
    if inside.is_empty() { Ok(()) } else { image.read_at(inside, chunk.offset) }
}

fn difference(ours: &[u8], theirs: &[u8]) -> Option<usize> {
    if ours == theirs {
        return None;
    }
    ours.iter().zip(theirs).position(|(our, their)| our != their)
}
