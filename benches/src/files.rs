//! An image with real files over a long, lossy link: the whole first sync, from its start until it is
//! durable at the other end.
//!
//! Backhaul is encrypted, hash-checked and journalled at the end. nbdcopy is encrypted; rsync and
//! qemu-img are not. All of them flush what they wrote.

use std::collections::HashSet;
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::Read;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use backhaul_api::{Consistency, Machine};
use backhaul_lab::disk::{DiskSpec, make_disk};
use backhaul_lab::link::{Link, LinkSpec};

use crate::sample::Sample;
use crate::{links, pipeline, rivals};

/// The link of the goal.
pub const LINK: &str = "200mbit,40ms,0.5%";
/// Longest that a run may take.
const RUN_TIME_MAX: Duration = Duration::from_secs(3600);
/// The part that may be overwritten, which nobody does here.
const SCRATCH_BYTES: u64 = 4096;

/// Who is measured; the first is ours.
const CONTENDERS: [&str; 4] =
    ["backhaul", "nbdcopy over TLS", "rsync -z --zc=zstd", "qemu-img convert"];

/// Runs each in turn, `runs` times; prints a table.
pub async fn run(dir: &Path, runs: usize, size_bytes: u64, spec: &LinkSpec) -> anyhow::Result<()> {
    let disk = dir.join(format!("files-{}.raw", size_bytes >> 20));
    if !disk.exists() {
        eprintln!("making a disk of {} MiB, half of it files", size_bytes >> 20);
        let files_bytes = size_bytes / 2;
        make_disk(
            &disk,
            &DiskSpec { size_bytes, files_bytes, scratch_bytes: SCRATCH_BYTES, seed: 1 },
        )?;
    }
    let content = Content::of(&disk)?;
    let mut samples = vec![Sample::default(); CONTENDERS.len()];
    let mut wire = vec![Sample::default(); CONTENDERS.len()];
    for _ in 0..runs {
        for (index, contender) in CONTENDERS.iter().enumerate() {
            let folder = tempfile::tempdir_in(dir)?;
            let (seconds, bytes) = match index {
                0 => backhaul(folder.path(), &disk, spec).await,
                1 => nbdcopy(folder.path(), &disk, spec),
                2 => rsync(folder.path(), &disk, spec),
                _ => qemu_img(folder.path(), &disk, spec),
            }
            .with_context(|| contender.to_string())?;
            eprintln!("{contender}: {seconds:.1} s, {} MiB on the wire", bytes >> 20);
            samples[index].push(seconds);
            wire[index].push((bytes >> 20) as f64);
        }
    }
    let best = samples[1..].iter().map(Sample::median).fold(f64::INFINITY, f64::min);
    println!("{content}\n");
    println!(
        "| {} MiB with {} MiB of files over {} | seconds until durable | against the best peer (goal ≤ 0.33) | MiB on the wire |",
        size_bytes >> 20,
        size_bytes >> 21,
        links::name(spec)
    );
    println!("| --- | --- | --- | --- |");
    for ((contender, sample), wire) in CONTENDERS.iter().zip(&samples).zip(&wire) {
        println!("| {contender} | {sample:.1} | {:.2} | {wire:.0} |", sample.median() / best);
    }
    Ok(())
}

/// How much of a disk is worth sending.
#[derive(Debug, Default)]
struct Content {
    blocks: u64,
    zero: u64,
    repeated: u64,
}

impl Content {
    const BLOCK_BYTES: usize = 4096;

    fn of(disk: &Path) -> anyhow::Result<Self> {
        let mut content = Self::default();
        let hasher = RandomState::new();
        // 64 bits of a keyed hash: a few million blocks collide once in a million runs.
        let mut seen = HashSet::new();
        let mut file = File::open(disk)?;
        let mut chunk = vec![0; 1 << 20];
        loop {
            let length = file.read(&mut chunk)?;
            if length == 0 {
                return Ok(content);
            }
            for block in chunk[..length].chunks(Self::BLOCK_BYTES) {
                content.blocks += 1;
                if block.iter().all(|byte| *byte == 0) {
                    content.zero += 1;
                } else if !seen.insert(hasher.hash_one(block)) {
                    content.repeated += 1;
                }
            }
        }
    }
}

impl std::fmt::Display for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mib = |blocks: u64| blocks * Self::BLOCK_BYTES as u64 >> 20;
        write!(
            f,
            "Of the disk's {} MiB, {} MiB are zeroes, and of the other {} MiB, {} MiB ({:.1} %) are blocks of 4 KiB that stand elsewhere on it too.",
            mib(self.blocks),
            mib(self.zero),
            mib(self.blocks - self.zero),
            mib(self.repeated),
            self.repeated as f64 / (self.blocks - self.zero).max(1) as f64 * 100.0,
        )
    }
}

async fn backhaul(dir: &Path, disk: &Path, spec: &LinkSpec) -> anyhow::Result<(f64, u64)> {
    let mut rig = pipeline::prepare(dir, disk, spec, String::new()).await?;
    let began = Instant::now();
    rig.start_agent()?;
    let done = |machine: &Machine| {
        machine.consistency == Consistency::Consistent && !machine.points.is_empty()
    };
    rig.wait("the sync", RUN_TIME_MAX, done).await?;
    let seconds = began.elapsed().as_secs_f64();
    let bytes = pipeline::link(&rig)?.stats().up.entered_bytes;
    rig.stop();
    Ok((seconds, bytes))
}

/// The time of a command at site A, and what it sent.
fn timed(link: &Link, command: &mut Command) -> anyhow::Result<(f64, u64)> {
    let began = Instant::now();
    let status = command.status().with_context(|| format!("{command:?} cannot be started"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok((began.elapsed().as_secs_f64(), link.stats().up.entered_bytes))
}

fn nbdcopy(dir: &Path, disk: &Path, spec: &LinkSpec) -> anyhow::Result<(f64, u64)> {
    let link = Link::start(spec.clone())?;
    let (_server, uri) = rivals::nbdkit_tls(dir, disk, &link)?;
    // The copy is all zeroes already: it need not write those.
    let options = ["--flush", "--destination-is-zero"];
    timed(&link, link.site_a().command_in("nbdcopy").args(options).arg(disk).arg(uri))
}

fn rsync(dir: &Path, disk: &Path, spec: &LinkSpec) -> anyhow::Result<(f64, u64)> {
    let link = Link::start(spec.clone())?;
    let (_server, to) = rivals::rsync_daemon(dir, &link)?;
    let options = ["--whole-file", "--sparse", "--fsync", "-z", "--zc=zstd"];
    timed(&link, link.site_a().command_in("rsync").args(options).arg(disk).arg(to))
}

fn qemu_img(dir: &Path, disk: &Path, spec: &LinkSpec) -> anyhow::Result<(f64, u64)> {
    let link = Link::start(spec.clone())?;
    let _server = rivals::nbdkit(dir, disk, &link, &[])?;
    let uri = format!("nbd://{}", link.site_b().address());
    // As many requests at a time as it has, in any order, and a flush at the end.
    let options = ["convert", "-n", "--target-is-zero", "-W", "-m", "16", "-t", "writeback"];
    let formats = ["-f", "raw", "-O", "raw"];
    let mut command = link.site_a().command_in("qemu-img");
    timed(&link, command.args(options).args(formats).arg(disk).arg(uri))
}
