//! First sync of a disk with real files over loopback, encrypted and durable, against `nbdcopy`
//! into a `qemu-nbd` VMDK and `qemu-img convert`, which are neither.

use std::fs::File;
use std::io;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use backhaul_api::Consistency;
use backhaul_lab::disk::{DiskSpec, make_disk};
use backhaul_lab::rig::{Rig, RigSpec};

use crate::peer::Peer;
use crate::sample::Sample;

/// What a guest's writes would use of the disk; the rest is files and nothing.
const SCRATCH_BYTES: u64 = 64 << 20;

/// How qemu-nbd writes: past the page cache, which is its fastest way here, or as it does by itself.
const PAST_THE_CACHE: &[&str] = &["--cache=none", "--aio=native"];
const BY_ITSELF: &[&str] = &[];

/// Longest that a run may take.
const RUN_TIME_MAX: Duration = Duration::from_secs(600);

/// Runs it, `runs` times each, in `dir`, ours over `transport`; prints a table.
pub async fn run(dir: &Path, size_bytes: u64, runs: usize, transport: &str) -> anyhow::Result<()> {
    let disk = dir.join("files.raw");
    if !disk.exists() {
        eprintln!("making a disk of {} GiB", size_bytes >> 30);
        let (files_bytes, scratch_bytes) = (size_bytes / 2, SCRATCH_BYTES);
        make_disk(&disk, &DiskSpec { size_bytes, files_bytes, scratch_bytes, seed: 1 })?;
    }
    // All contenders find it in the page cache: whoever came first had to read it from the disk, and took twice as long.
    let mut file = File::open(&disk)?;
    file.sync_all()?;
    io::copy(&mut file, &mut io::sink())?;
    let (mut ours, mut nbdcopy, mut cached, mut convert) = Default::default();
    let (mut agent_max, mut target_max) = (0, 0);
    for _ in 0..runs {
        let (seconds, agent, target) = backhaul(dir, &disk, transport).await?;
        push(&mut ours, "backhaul", seconds);
        (agent_max, target_max) = (agent_max.max(agent), target_max.max(target));
        push(&mut nbdcopy, "nbdcopy", into_qemu_nbd(dir, &disk, PAST_THE_CACHE)?);
        let name = "nbdcopy, qemu-nbd by itself";
        push(&mut cached, name, into_qemu_nbd(dir, &disk, BY_ITSELF)?);
        push(&mut convert, "qemu-img convert", qemu_convert(dir, &disk)?);
    }
    println!(
        "| first sync of {} GiB | seconds, median (range) | against nbdcopy |",
        size_bytes >> 30
    );
    println!("| --- | --- | --- |");
    for (name, sample) in [
        ("backhaul", &ours),
        ("nbdcopy, qemu-nbd past the page cache", &nbdcopy),
        ("nbdcopy, qemu-nbd by itself", &cached),
        ("qemu-img convert", &convert),
    ] {
        println!("| {name} | {sample} | {:.2} |", sample.median() / nbdcopy.median());
    }
    println!("\nmemory at most: agent {} MiB, target {} MiB", agent_max >> 20, target_max >> 20);
    Ok(())
}

fn push(sample: &mut Sample, name: &str, seconds: f64) {
    eprintln!("{name}: {seconds:.2} s");
    sample.push(seconds);
}

async fn backhaul(dir: &Path, disk: &Path, transport: &str) -> anyhow::Result<(f64, u64, u64)> {
    let folder = tempfile::tempdir_in(dir)?;
    let mut spec = RigSpec::new(folder.path(), disk)?;
    spec.transport = transport.into();
    let mut rig = Rig::prepare(spec)?;
    rig.start_target()?;
    rig.wait("the target", RUN_TIME_MAX, |_| true).await?;
    let began = Instant::now();
    rig.start_agent()?;
    rig.wait("the sync", RUN_TIME_MAX, |machine| {
        machine.consistency == Consistency::Consistent && !machine.points.is_empty()
    })
    .await?;
    let seconds = began.elapsed().as_secs_f64();
    let (agent, target) = rig.memory_bytes_max();
    rig.stop();
    Ok((seconds, agent, target))
}

fn command(line: &mut Command) -> anyhow::Result<()> {
    let status = line.status().with_context(|| format!("{line:?} cannot be started"))?;
    ensure!(status.success(), "{line:?}: {status}");
    Ok(())
}

fn into_qemu_nbd(dir: &Path, disk: &Path, way: &[&str]) -> anyhow::Result<f64> {
    let folder = tempfile::tempdir_in(dir)?;
    let image = folder.path().join("image.vmdk");
    let size = std::fs::metadata(disk)?.len().to_string();
    let options = ["create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat"];
    command(Command::new("qemu-img").args(options).arg(&image).arg(size))?;
    let socket = folder.path().join("nbd.sock");
    let _server = Peer::serving(
        Command::new("qemu-nbd")
            .args(way)
            .args(["-f", "vmdk", "-t", "-e", "8", "-k"])
            .args([&socket, &image]),
        &socket,
    )?;
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let began = Instant::now();
    command(Command::new("nbdcopy").arg(disk).arg(uri))?;
    Ok(began.elapsed().as_secs_f64())
}

fn qemu_convert(dir: &Path, disk: &Path) -> anyhow::Result<f64> {
    let folder = tempfile::tempdir_in(dir)?;
    let options = ["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=monolithicFlat"];
    let began = Instant::now();
    command(Command::new("qemu-img").args(options).arg(disk).arg(folder.path().join("c.vmdk")))?;
    Ok(began.elapsed().as_secs_f64())
}
