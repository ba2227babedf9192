//! 4 KiB random writes through the agent's export, while they are replicated, against `qemu-nbd` on
//! a file of the same kind; `fio` is the guest.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use backhaul_api::Consistency;
use backhaul_lab::rig::{Rig, RigSpec};

use crate::peer::Peer;
use crate::sample::Sample;

const DISK_BYTES: u64 = 1 << 30;
const SECONDS: u32 = 5;

/// Runs it, `runs` times each, in `dir`; prints a table.
pub async fn run(dir: &Path, runs: usize) -> anyhow::Result<()> {
    println!(
        "| 4 KiB random writes | backhaul-agent, IOPS | qemu-nbd, IOPS | ratio | 99 % latency, µs |"
    );
    println!("| --- | --- | --- | --- | --- |");
    for depth in [1, 32] {
        let (mut ours, mut peer) = (Sample::default(), Sample::default());
        let (mut our_latency, mut peer_latency) = (Sample::default(), Sample::default());
        for _ in 0..runs {
            let (iops, latency) = agent(dir, depth).await?;
            ours.push(iops);
            our_latency.push(latency);
            let (iops, latency) = qemu_nbd(dir, depth)?;
            peer.push(iops);
            peer_latency.push(latency);
        }
        println!(
            "| depth {depth} | {ours} | {peer} | {:.2} | {our_latency} against {peer_latency} |",
            ours.median() / peer.median()
        );
    }
    Ok(())
}

fn make_disk(path: &Path) -> anyhow::Result<()> {
    std::fs::write(path, vec![1; DISK_BYTES as usize])?;
    rustix::fs::sync();
    Ok(())
}

async fn agent(dir: &Path, depth: u32) -> anyhow::Result<(f64, f64)> {
    let folder = tempfile::tempdir_in(dir)?;
    let disk = folder.path().join("disk.raw");
    make_disk(&disk)?;
    let mut rig = Rig::prepare(RigSpec::new(folder.path(), &disk)?)?;
    rig.start_target()?;
    rig.start_agent()?;
    rig.connect(0).await?;
    let ready = |machine: &backhaul_api::Machine| machine.consistency == Consistency::Consistent;
    rig.wait("the sync", Duration::from_secs(120), ready).await?;
    let uri = format!("nbd+unix:///{}?socket={}", rig.export(0), rig.nbd_socket().display());
    fio(&uri, depth)
}

fn qemu_nbd(dir: &Path, depth: u32) -> anyhow::Result<(f64, f64)> {
    let folder = tempfile::tempdir_in(dir)?;
    let (disk, socket) = (folder.path().join("disk.raw"), folder.path().join("q.sock"));
    make_disk(&disk)?;
    let _server = Peer::serving(
        Command::new("qemu-nbd")
            .args(["-f", "raw", "-t", "-x", "disk", "-k"])
            .args([&socket, &disk]),
        &socket,
    )?;
    fio(&format!("nbd+unix:///disk?socket={}", socket.display()), depth)
}

/// IOPS, and the latency in microseconds that 99 of 100 writes stay under.
fn fio(uri: &str, depth: u32) -> anyhow::Result<(f64, f64)> {
    let output = Command::new("fio")
        .args(["--name=guest", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--time_based"])
        .args(["--output-format=json", "--randrepeat=1"])
        .args([format!("--uri={uri}"), format!("--iodepth={depth}")])
        .args([format!("--runtime={SECONDS}"), format!("--size={DISK_BYTES}")])
        .output()
        .context("fio is missing: install the Debian package fio")?;
    ensure!(output.status.success(), "fio: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout);
    let start = text.find('{').context("fio printed no JSON")?;
    let value: serde_json::Value = serde_json::from_str(&text[start..])?;
    let write = &value["jobs"][0]["write"];
    let iops = write["iops"].as_f64().context("fio printed no IOPS")?;
    let latency = write["clat_ns"]["percentile"]["99.000000"].as_f64().unwrap_or(0.0);
    Ok((iops, latency / 1000.0))
}
