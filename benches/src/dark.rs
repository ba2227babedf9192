//! How soon a link that was dark is full again: the whole pipeline, by what the emulated link delivers.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use backhaul_lab::link::LinkSpec;

use crate::links::LINKS;
use crate::pipeline;
use crate::sample::Sample;
use crate::startup::{WANTED, until_filled};

/// The sync is under way for so long before.
const SETTLE: Duration = Duration::from_secs(5);
const GOAL_SECONDS: f64 = 2.0;

/// Measures the links whose names contain `only`, `runs` times each, after `dark`; prints a table.
pub async fn run(dir: &Path, runs: usize, only: &str, dark: Duration) -> anyhow::Result<()> {
    let seconds = dark.as_secs();
    println!(
        "| link | seconds from its return, after {seconds} of dark, until it delivers {WANTED:.1} of its rate over a round trip (goal {GOAL_SECONDS}) |"
    );
    println!("| --- | --- |");
    for (name, spec, _) in LINKS.iter().filter(|(name, ..)| name.contains(only)) {
        let mut spec: LinkSpec = spec.parse()?;
        let mut sample = Sample::default();
        for run in 0..runs {
            // Every run loses other packets.
            spec.seed = 1 + run as u64;
            let folder = tempfile::tempdir_in(dir)?;
            sample.push(measure(dir, folder.path(), &spec, dark).await.context(*name)?);
            eprintln!("{name}: {sample}");
        }
        println!("| {name} | {sample} |");
    }
    Ok(())
}

/// Seconds; those of the limit when it was not reached.
async fn measure(
    dir: &Path,
    folder: &Path,
    spec: &LinkSpec,
    dark: Duration,
) -> anyhow::Result<f64> {
    let bytes = spec.up.rate.0 / 8 * (2 * SETTLE.as_secs() + 5);
    let disk = pipeline::noise(dir, bytes)?;
    let mut rig = pipeline::prepare(folder, &disk, spec, String::new()).await?;
    pipeline::begin(&mut rig).await?;
    // The rate is found meanwhile, for the next connection to know; nothing tells when it is.
    tokio::time::sleep(SETTLE).await;
    pipeline::link(&rig)?.blackout(true);
    // The length of the dark is what the measurement is of.
    tokio::time::sleep(dark).await;
    pipeline::link(&rig)?.blackout(false);
    let record = until_filled(pipeline::link(&rig)?, spec).await;
    pipeline::ensure_busy(&rig).await?;
    Ok(record.whole().seconds)
}
