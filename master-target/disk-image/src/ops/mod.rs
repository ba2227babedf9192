//! What is done with whole images: information, map, check, convert, compare, repair.

mod compare;
mod convert;
mod pipeline;
mod repair;

use std::path::Path;

pub use compare::{CompareReport, compare};
pub use convert::{ConvertOptions, ConvertReport, convert, overwrite};
pub use repair::{RepairOutcome, RepairPlan, apply_repair, plan_repair};
use serde::Serialize;

pub use crate::fix::Leaks;
use crate::{
    error::Result,
    image::{Deep, MapDisk, Run, RunState},
    open::{OpenOptions, open},
    report::{CheckReport, ImageInfo, Progress},
};

/// What there is to know about the image at `path` without reading its disk.
///
/// # Errors
/// It cannot be opened.
pub fn info(path: &Path, options: &OpenOptions) -> Result<ImageInfo> {
    open(path, options)?.info()
}

/// Checks the image at `path` and its parents.
///
/// # Errors
/// It cannot be opened, the file system fails, or `progress` stops it. Damage is told in the
/// report.
pub fn check(
    path: &Path,
    options: &OpenOptions,
    deep: Deep,
    progress: &mut dyn Progress,
) -> Result<CheckReport> {
    open(path, options)?.check(deep, progress)
}

/// How much of a disk is stored in which way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct MapTotals {
    /// Bytes of runs with data.
    pub data_bytes: u64,
    /// Bytes that the format says are zeros.
    pub zero_bytes: u64,
    /// Bytes that no link of the chain stores.
    pub unallocated_bytes: u64,
    /// Runs.
    pub runs: u64,
}

/// Walks the runs of a disk, in order: calls `each` for every one, and sums them up. `each` ends
/// the walk early by returning `false`.
///
/// # Errors
/// The image is damaged, or the file system fails.
pub fn map(image: &dyn MapDisk, each: &mut dyn FnMut(Run) -> bool) -> Result<MapTotals> {
    let mut totals = MapTotals::default();
    for run in image.extents(0, image.size_bytes()) {
        let run = run?;
        totals.runs += 1;
        match run.state {
            RunState::Data => totals.data_bytes += run.length,
            RunState::Zero => totals.zero_bytes += run.length,
            RunState::Unallocated => totals.unallocated_bytes += run.length,
        }
        if !each(run) {
            break;
        }
    }
    Ok(totals)
}
