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
use backhaul_lab::link::{Link, LinkSpec, Site};

use crate::peer::Peer;
use crate::sample::Sample;
use crate::{links, pipeline, rivals};

/// The link of the goal.
pub const LINK: &str = "200mbit,40ms,0.5%";
/// Longest that a run may take.
const RUN_TIME_MAX: Duration = Duration::from_secs(3600);
/// How often a peer is asked whether it is done, which takes a minute and more.
const POLL: Duration = Duration::from_millis(20);
/// The part that may be overwritten, which nobody does here.
const SCRATCH_BYTES: u64 = 4096;

const OURS: &str = "backhaul";
/// Who is measured.
pub const CONTENDERS: [&str; 4] = [OURS, "nbdcopy-tls", "rsync-zstd", "qemu-img"];

/// What to measure.
#[derive(Debug)]
pub struct Files {
    /// Size of the disk, half of which is files.
    pub size_bytes: u64,
    /// The link.
    pub link: LinkSpec,
    /// The kernel's congestion control for what goes over TCP; that of this machine without it.
    pub tcp: Option<String>,
    /// Who is measured; all of them when empty.
    pub contenders: Vec<String>,
    /// After how many times Backhaul's own time a peer is cut off, if Backhaul is measured.
    pub give_up: Option<f64>,
}

/// What one run of a contender took.
#[derive(Clone, Copy, Debug)]
struct Taken {
    seconds: f64,
    wire_bytes: u64,
    /// Whether it was cut off: `seconds` is a bound from below then.
    cut_off: bool,
}

/// Runs each in turn, `runs` times; prints a table.
pub async fn run(dir: &Path, runs: usize, what: &Files) -> anyhow::Result<()> {
    let disk = dir.join(format!("files-{}.raw", what.size_bytes >> 20));
    if !disk.exists() {
        eprintln!("making a disk of {} MiB, half of it files", what.size_bytes >> 20);
        let (size_bytes, files_bytes) = (what.size_bytes, what.size_bytes / 2);
        let spec = DiskSpec { size_bytes, files_bytes, scratch_bytes: SCRATCH_BYTES, seed: 1 };
        make_disk(&disk, &spec)?;
    }
    println!("{}\n", Content::of(&disk)?);
    let contenders: Vec<&str> = if what.contenders.is_empty() {
        CONTENDERS.to_vec()
    } else {
        what.contenders.iter().map(String::as_str).collect()
    };
    let mut samples = vec![<[Sample; 2]>::default(); contenders.len()];
    let mut cut_off = vec![false; contenders.len()];
    for _ in 0..runs {
        let mut time_max = RUN_TIME_MAX;
        for (index, contender) in contenders.iter().enumerate() {
            let folder = tempfile::tempdir_in(dir)?;
            let taken = measure(folder.path(), &disk, what, contender, time_max)
                .await
                .with_context(|| (*contender).to_owned())?;
            eprintln!(
                "{contender}: {:.1} s, {} MiB on the wire{}",
                taken.seconds,
                taken.wire_bytes >> 20,
                if taken.cut_off { ", cut off" } else { "" },
            );
            if let (OURS, Some(times)) = (*contender, what.give_up) {
                time_max = Duration::from_secs_f64(taken.seconds * times);
            }
            let [seconds, sent] = &mut samples[index];
            seconds.push(taken.seconds);
            sent.push((taken.wire_bytes >> 20) as f64);
            cut_off[index] |= taken.cut_off;
        }
    }
    let best = contenders
        .iter()
        .zip(&samples)
        .zip(&cut_off)
        .filter(|((name, _), _)| **name != OURS)
        .map(|((_, [seconds, _]), cut_off)| (seconds.median(), *cut_off))
        .min_by(|(one, _), (other, _)| one.total_cmp(other));
    let (best, best_cut_off) = best.unwrap_or((f64::INFINITY, false));
    println!(
        "| {} MiB with {} MiB of files over {}, TCP with {} | seconds until durable | against the best peer (goal ≤ 0.33) | MiB on the wire |",
        what.size_bytes >> 20,
        what.size_bytes >> 21,
        links::name(&what.link),
        what.tcp.as_deref().unwrap_or("this machine's default")
    );
    println!("| --- | --- | --- | --- |");
    for ((contender, [seconds, sent]), cut_off) in contenders.iter().zip(&samples).zip(cut_off) {
        let ratio = seconds.median() / best;
        let (at_least, at_most) = match (cut_off, best_cut_off) {
            (true, _) => ("cut off after ", "at least "),
            (false, true) => ("", "at most "),
            (false, false) => ("", ""),
        };
        println!("| {contender} | {at_least}{seconds:.1} | {at_most}{ratio:.2} | {sent:.0} |");
    }
    Ok(())
}

async fn measure(
    dir: &Path,
    disk: &Path,
    what: &Files,
    contender: &str,
    time_max: Duration,
) -> anyhow::Result<Taken> {
    if contender == OURS {
        return backhaul(dir, disk, &what.link).await;
    }
    let link = Link::start(what.link.clone())?;
    if let Some(tcp) = &what.tcp {
        for site in [link.site_a(), link.site_b()] {
            choose_tcp(site, tcp)
                .with_context(|| format!("the congestion control \"{tcp}\" cannot be chosen"))?;
        }
    }
    let (_server, mut command) = match contender {
        "nbdcopy-tls" => nbdcopy(dir, disk, &link),
        "rsync-zstd" => rsync(dir, disk, &link),
        "qemu-img" => qemu_img(dir, disk, &link),
        other => anyhow::bail!("no contender is called {other}; there are {CONTENDERS:?}"),
    }?;
    timed(&link, &mut command, time_max)
}

/// The kernel's congestion control for what leaves a site. It goes with the route: a namespace's own
/// default may only be one of those that are open to everybody.
fn choose_tcp(site: &Site, tcp: &str) -> anyhow::Result<()> {
    let routes = site.command_in("ip").args(["-4", "route", "show"]).output()?;
    for route in String::from_utf8(routes.stdout)?.lines() {
        let mut replace = site.command_in("ip");
        replace.args(["route", "replace"]).args(route.split_whitespace()).args(["congctl", tcp]);
        let replaced = replace.output()?;
        ensure!(replaced.status.success(), "{}", String::from_utf8_lossy(&replaced.stderr).trim());
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
        let mib = |blocks: u64| (blocks * Self::BLOCK_BYTES as u64) >> 20;
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

async fn backhaul(dir: &Path, disk: &Path, spec: &LinkSpec) -> anyhow::Result<Taken> {
    let mut rig = pipeline::prepare(dir, disk, spec, String::new()).await?;
    let began = Instant::now();
    rig.start_agent()?;
    let done = |machine: &Machine| {
        machine.consistency == Consistency::Consistent && !machine.points.is_empty()
    };
    rig.wait("the sync", RUN_TIME_MAX, done).await?;
    let seconds = began.elapsed().as_secs_f64();
    let wire_bytes = pipeline::link(&rig)?.stats().up.entered_bytes;
    rig.stop();
    Ok(Taken { seconds, wire_bytes, cut_off: false })
}

/// The time of a command at site A, and what it sent; one that takes longer than `time_max` is ended.
fn timed(link: &Link, command: &mut Command, time_max: Duration) -> anyhow::Result<Taken> {
    let began = Instant::now();
    let mut child = command.spawn().with_context(|| format!("{command:?} cannot be started"))?;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if began.elapsed() > time_max {
            child.kill()?;
            child.wait()?;
            break None;
        }
        // A foreign process tells nobody how long it still takes: it can only be asked again.
        std::thread::sleep(POLL);
    };
    let seconds = began.elapsed().as_secs_f64();
    if let Some(status) = status {
        ensure!(status.success(), "{command:?}: {status}");
    }
    Ok(Taken { seconds, wire_bytes: link.stats().up.entered_bytes, cut_off: status.is_none() })
}

fn nbdcopy(dir: &Path, disk: &Path, link: &Link) -> anyhow::Result<(Peer, Command)> {
    let (server, uri) = rivals::nbdkit_tls(dir, disk, link)?;
    let mut command = link.site_a().command_in("nbdcopy");
    // The copy is all zeroes already: it need not write those.
    command.args(["--flush", "--destination-is-zero"]).arg(disk).arg(uri);
    Ok((server, command))
}

fn rsync(dir: &Path, disk: &Path, link: &Link) -> anyhow::Result<(Peer, Command)> {
    let (server, to) = rivals::rsync_daemon(dir, link)?;
    let mut command = link.site_a().command_in("rsync");
    command.args(["--whole-file", "--sparse", "--fsync", "-z", "--zc=zstd"]).arg(disk).arg(to);
    Ok((server, command))
}

fn qemu_img(dir: &Path, disk: &Path, link: &Link) -> anyhow::Result<(Peer, Command)> {
    let server = rivals::nbdkit(dir, disk, link, &[])?;
    let uri = format!("nbd://{}", link.site_b().address());
    let mut command = link.site_a().command_in("qemu-img");
    // As many requests at a time as it has, in any order, and a flush at the end.
    command.args(["convert", "-n", "--target-is-zero", "-W", "-m", "16", "-t", "writeback"]);
    command.args(["-f", "raw", "-O", "raw"]).arg(disk).arg(uri);
    Ok((server, command))
}
