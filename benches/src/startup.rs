//! From idle to most of the rate: the whole pipeline, by what the emulated link delivers.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;
use backhaul_api::{Consistency, Machine};
use backhaul_lab::link::{Link, LinkSpec};
use backhaul_lab::random::Random;

use crate::peer::START_TIME_MAX;
use crate::record::{Change, Record};
use crate::sample::Sample;
use crate::{links::LINKS, pipeline, plot, rivals};

/// What has to be reached, as a share of the rate of the link.
pub(crate) const WANTED: f64 = 0.8;
/// How often the link's counters are read.
const GRAIN: Duration = Duration::from_millis(2);
/// A start that takes longer than so many round trips is given up.
const ROUND_TRIPS_MAX: f64 = 150.0;
/// How long the link is idle before the guest begins to write: longer than ten round trips, and than
/// the congestion controller's memory of a queue.
const IDLE: Duration = Duration::from_secs(6);
/// The guest's writes: of this size, so many at a time.
const WRITE_BYTES: u32 = 1 << 20;
const WRITERS: u64 = 8;
const GOAL_ROUND_TRIPS: f64 = 15.0;
const PEERS: [&str; 7] = [
    "bare-quinn-cubic",
    "bare-quinn-bbr",
    "bare-noq-bbr3",
    "iperf3-cubic",
    "iperf3-bbr",
    "rsync",
    "nbdcopy-tls",
];

/// Measures the links whose names contain `only`, `runs` times each; prints a table.
pub async fn run(dir: &Path, runs: usize, only: &str) -> anyhow::Result<()> {
    println!(
        "| link | first sync: round trips from the agent's first packet to {WANTED:.1} of the rate | guest's writes on an idle link: from the first write (goal {GOAL_ROUND_TRIPS}) | dropped by the queue meanwhile |"
    );
    println!("| --- | --- | --- | --- |");
    let (mut charts, mut peers) = (String::new(), Vec::new());
    for (name, spec, _) in LINKS.iter().filter(|(name, ..)| name.contains(only)) {
        let mut spec: LinkSpec = spec.parse()?;
        let (mut first, mut idle, mut dropped): (Sample, Sample, Sample) = Default::default();
        for run in 0..runs {
            // Which of the first packets are lost decides much; every run loses others.
            spec.seed = 1 + run as u64;
            let folder = tempfile::tempdir_in(dir)?;
            first.push(first_sync(dir, folder.path(), &spec).await.context("the first sync")?);
            let folder = tempfile::tempdir_in(dir)?;
            let record = from_idle(folder.path(), &spec).await.context("the guest's writes")?;
            idle.push(record.whole().seconds / round_trip(&spec));
            dropped.push(record.whole().queue_dropped * 100.0);
            charts = [charts, chart(name, &record, &spec)].concat();
            eprintln!("{name}: {first:.1}; {idle:.1}");
        }
        println!("| {name} | {first:.1} | {idle:.1} | {dropped:.2} % |");
        peers.push((*name, of_peers(dir, &mut spec, runs).await.context(*name)?));
    }
    println!("\n| link, round trips from the first packet | {} |", PEERS.join(" | "));
    println!("| --- |{}", " --- |".repeat(PEERS.len()));
    for (name, samples) in peers {
        let cells: Vec<_> = samples.iter().map(|sample| format!("{sample:.1}")).collect();
        println!("| {name} | {} |", cells.join(" | "));
    }
    println!("\n{charts}");
    Ok(())
}

/// Each peer's round trips from its first packet on; [`ROUND_TRIPS_MAX`] for one that never gets there.
async fn of_peers(dir: &Path, spec: &mut LinkSpec, runs: usize) -> anyhow::Result<Vec<Sample>> {
    let bytes = spec.up.rate.0 as f64 / 8.0 * round_trip(spec) * ROUND_TRIPS_MAX;
    let disk = pipeline::noise(dir, bytes.min((1 << 30) as f64) as u64)?;
    let mut samples = vec![Sample::default(); PEERS.len()];
    for run in 0..runs {
        spec.seed = 1 + run as u64;
        for (peer, sample) in PEERS.iter().zip(&mut samples) {
            let folder = tempfile::tempdir_in(dir)?;
            let link = Link::start(spec.clone())?;
            // Its client takes a moment to load, in which nothing is sent.
            let _running = rivals::begin(peer, folder.path(), &disk, &link)?;
            let record = until_filled(&link, spec).await;
            let began = record.first_packet_seconds().context("nothing was sent")?;
            sample.push((record.whole().seconds - began) / round_trip(spec));
            eprintln!("  {peer}: {sample:.1}");
        }
    }
    Ok(samples)
}

/// The way up of one run, round trip by round trip.
fn chart(name: &str, record: &Record, spec: &LinkSpec) -> String {
    let share =
        |change: &Change| change.delivered_bits_per_second() / spec.up.rate.0 as f64 * 100.0;
    let shares = record.windows(round_trip(spec)).iter().map(share).collect();
    let title = format!("{name}: from idle, share of the rate delivered");
    plot::lines(&title, "round trips", "percent", 100.0, &[shares]) + "\n"
}

/// The round-trip time of an empty link.
pub(crate) fn round_trip(spec: &LinkSpec) -> f64 {
    (spec.up.delay + spec.down.delay).as_secs_f64()
}

/// Watches the link until it has delivered [`WANTED`] of its rate over a round trip.
pub(crate) async fn until_filled(link: &Link, spec: &LinkSpec) -> Record {
    let round_trip = round_trip(spec);
    let wanted = spec.up.rate.0 as f64 * WANTED;
    let limit = Duration::from_secs_f64(round_trip * ROUND_TRIPS_MAX);
    Record::of(link, GRAIN, limit, |record| {
        let last = record.last(round_trip);
        last.is_some_and(|last| last.delivered_bits_per_second() >= wanted)
    })
    .await
}

/// Round trips; those of the limit when it was not reached.
async fn first_sync(dir: &Path, folder: &Path, spec: &LinkSpec) -> anyhow::Result<f64> {
    let bytes = spec.up.rate.0 as f64 / 8.0 * round_trip(spec) * ROUND_TRIPS_MAX;
    let disk = pipeline::noise(dir, bytes.min((1 << 30) as f64) as u64)?;
    let mut rig = pipeline::prepare(folder, &disk, spec, String::new()).await?;
    rig.start_agent()?;
    let record = until_filled(pipeline::link(&rig)?, spec).await;
    let began = record.first_packet_seconds().context("the agent sent nothing")?;
    Ok((record.whole().seconds - began) / round_trip(spec))
}

/// A disk whose blocks the host has in its memory, as those that a guest has used before. In a virtual machine
/// that gets its own memory page by page, a write to a page that it has not yet is ten times as slow, and
/// takes the processors from both ends of the link meanwhile.
fn write_zeroes(disk: &Path, bytes: u64) -> anyhow::Result<()> {
    let mut file = std::fs::File::create(disk)?;
    std::io::copy(&mut std::io::repeat(0).take(bytes), &mut file)?;
    file.sync_all()?;
    Ok(())
}

/// What the link saw from the first write on.
async fn from_idle(folder: &Path, spec: &LinkSpec) -> anyhow::Result<Record> {
    let disk = folder.join("disk.raw");
    let bytes = spec.up.rate.0 as f64 / 8.0 * round_trip(spec) * ROUND_TRIPS_MAX;
    let writes = (bytes as u64).div_ceil(u64::from(WRITE_BYTES));
    let disk_bytes = writes * u64::from(WRITE_BYTES);
    write_zeroes(&disk, disk_bytes)?;
    let mut rig = pipeline::prepare(folder, &disk, spec, String::new()).await?;
    rig.start_agent()?;
    let ready = |machine: &Machine| machine.consistency == Consistency::Consistent;
    rig.wait("the sync", START_TIME_MAX, ready).await?;
    let client = Arc::new(rig.connect(0).await?);
    // The idle time is what is measured from.
    tokio::time::sleep(IDLE).await;
    let (next, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let writers: Vec<_> = (0..WRITERS)
        .map(|seed| {
            let (client, next, stop) = (Arc::clone(&client), Arc::clone(&next), Arc::clone(&stop));
            tokio::spawn(async move {
                let mut random = Random::new(seed);
                while !stop.load(Ordering::Relaxed) {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= writes {
                        break;
                    }
                    let mut data = vec![0; WRITE_BYTES as usize];
                    random.fill(&mut data);
                    client.write(number * u64::from(WRITE_BYTES), data.into(), false).await?;
                }
                Ok::<(), backhaul_nbd::ClientError>(())
            })
        })
        .collect();
    let record = until_filled(pipeline::link(&rig)?, spec).await;
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await??;
    }
    Ok(record)
}
