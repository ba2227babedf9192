//! How much of a long, lossy link is filled with payload: the whole pipeline (capture, TLS, journal,
//! apply) against what an operator would use instead, over the emulated link.
//!
//! Everything sends the same incompressible disk. The first seconds are left out. Backhaul is
//! measured by what its target has received of the disk; iperf3 by what its server counted; rsync
//! and nbdcopy, which report nothing meanwhile, by the bytes that the link delivered, less the
//! 52 bytes of IP and TCP headers of each packet.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use backhaul_lab::link::{DirectionStats, Link, LinkSpec};
use backhaul_lab::rig::{Rig, RigSpec};

use crate::peer::{Peer, START_TIME_MAX};
use crate::sample::Sample;

/// What is left out at the beginning.
const SETTLE: Duration = Duration::from_secs(5);
/// How long is measured after that.
const MEASURE: Duration = Duration::from_secs(15);
/// Headers of a TCP segment with timestamps, and of IPv4.
const TCP_HEADER_BYTES: u64 = 52;

/// The links of the table: name, specification (one-way delay), goal as a share of the rate.
pub const LINKS: [(&str, &str, f64); 5] = [
    ("500 Mbit/s, 40 ms, 0.1 %", "500mbit,20ms,0.1%", 0.90),
    ("500 Mbit/s, 100 ms, 1 %", "500mbit,50ms,1%", 0.88),
    ("200 Mbit/s, 80 ms, 0.5 %", "200mbit,40ms,0.5%", 0.90),
    ("50 Mbit/s, 200 ms, 2 %", "50mbit,100ms,2%", 0.85),
    ("1 Gbit/s, 40 ms, 0.1 %", "1gbit,20ms,0.1%", 0.90),
];

/// Who is measured.
pub const CONTENDERS: [&str; 6] =
    ["backhaul", "quinn-cubic", "iperf3-cubic", "iperf3-bbr", "rsync", "nbdcopy-tls"];

/// Runs the contenders on the links whose names contain `only`, and prints a table.
pub async fn run(dir: &Path, runs: usize, only: &str, contenders: &[String]) -> anyhow::Result<()> {
    let contenders: Vec<&str> = if contenders.is_empty() {
        CONTENDERS.to_vec()
    } else {
        contenders.iter().map(String::as_str).collect()
    };
    println!("| link | {} |", contenders.join(" | "));
    println!("| --- |{}", " --- |".repeat(contenders.len()));
    for (name, spec, goal) in LINKS.iter().filter(|(name, ..)| name.contains(only)) {
        let spec: LinkSpec = spec.parse()?;
        let rate_bytes = spec.up.rate.0 / 8;
        let disk = noise(dir, rate_bytes * (SETTLE + MEASURE).as_secs() * 13 / 10)?;
        let mut samples = vec![Sample::default(); contenders.len()];
        for _ in 0..runs {
            for (contender, sample) in contenders.iter().zip(&mut samples) {
                let bytes = measure(dir, &disk, &spec, contender).await;
                let bytes = bytes.with_context(|| format!("{contender} on {name}"))?;
                let share = bytes as f64 / MEASURE.as_secs_f64() / rate_bytes as f64;
                eprintln!("{name}: {contender}: {:.1} %", share * 100.0);
                sample.push(share * 100.0);
            }
        }
        let cells: Vec<_> = samples.iter().map(|sample| format!("{sample} %")).collect();
        println!("| {name} (goal {:.0} %) | {} |", goal * 100.0, cells.join(" | "));
    }
    Ok(())
}

async fn measure(dir: &Path, disk: &Path, spec: &LinkSpec, contender: &str) -> anyhow::Result<u64> {
    let folder = tempfile::tempdir_in(dir)?;
    match contender {
        "backhaul" => backhaul(folder.path(), disk, spec, "auto").await,
        "quinn-cubic" => backhaul(folder.path(), disk, spec, "cubic").await,
        "iperf3-cubic" => iperf3(spec, "cubic"),
        "iperf3-bbr" => iperf3(spec, "bbr"),
        "rsync" => rsync(folder.path(), disk, spec),
        "nbdcopy-tls" => nbdcopy(folder.path(), disk, spec),
        other => anyhow::bail!("no contender is called {other}; there are {CONTENDERS:?}"),
    }
}

/// A file of so many bytes that nothing compresses; made once.
fn noise(dir: &Path, bytes: u64) -> anyhow::Result<PathBuf> {
    let bytes = bytes.next_multiple_of(1 << 20);
    let path = dir.join(format!("noise-{}.raw", bytes >> 20));
    if !path.exists() {
        let mut source = File::open("/dev/urandom")?.take(bytes);
        std::io::copy(&mut source, &mut File::create(&path)?)?;
    }
    Ok(path)
}

async fn backhaul(
    dir: &Path,
    disk: &Path,
    link: &LinkSpec,
    congestion: &str,
) -> anyhow::Result<u64> {
    let mut spec = RigSpec::new(dir, disk)?;
    spec.link = Some(link.clone());
    spec.agent_options = format!("congestion = \"{congestion}\"");
    let mut rig = Rig::prepare(spec)?;
    rig.start_target()?;
    rig.wait("the target", START_TIME_MAX, |_| true).await?;
    rig.start_agent()?;
    let begun = |machine: &backhaul_api::Machine| machine.received_plain_bytes > 1 << 20;
    rig.wait("the first batches", START_TIME_MAX, begun).await?;
    tokio::time::sleep(SETTLE).await;
    let since = Instant::now();
    let before = rig.client().machine("lab").await?.received_plain_bytes;
    let link_before = rig.link().map(|link| link.stats().up);
    tokio::time::sleep(MEASURE.saturating_sub(since.elapsed())).await;
    let after = rig.client().machine("lab").await?;
    if let (Some(before), Some(link)) = (link_before, rig.link()) {
        tell_link(before, link.stats().up, link.spec().up.rate.0 / 8);
    }
    ensure!(after.dirty_bytes > 0, "the disk was too small for this link");
    let took = since.elapsed().as_secs_f64();
    let bytes = (after.received_plain_bytes - before) as f64;
    Ok((bytes * MEASURE.as_secs_f64() / took) as u64)
}

/// What the bottleneck saw of Backhaul meanwhile.
fn tell_link(before: DirectionStats, after: DirectionStats, rate_bytes: u64) {
    let entered = (after.entered_packets - before.entered_packets).max(1);
    let dropped = after.dropped_by_queue - before.dropped_by_queue;
    let waited = after.queue_wait_nanos_total - before.queue_wait_nanos_total;
    let delivered = after.delivered_bytes - before.delivered_bytes;
    eprintln!(
        "  the link: {:.1} % of its rate delivered, {:.2} % of the packets dropped by its queue, which held {:.1} ms",
        delivered as f64 / MEASURE.as_secs_f64() / rate_bytes as f64 * 100.0,
        dropped as f64 / entered as f64 * 100.0,
        waited as f64 / entered as f64 / 1e6,
    );
}

/// What `backhaul link probe` says of the link, with nothing else on it: how long control takes
/// while data fill the line.
pub async fn probe(dir: &Path, runs: usize, only: &str) -> anyhow::Result<()> {
    println!("| link | round trip | control under load, median | 99th percentile | goal |");
    println!("| --- | --- | --- | --- | --- |");
    for (name, spec, _) in LINKS.iter().filter(|(name, ..)| name.contains(only)) {
        let (mut least, mut median, mut worst): (Sample, Sample, Sample) = Default::default();
        for _ in 0..runs {
            let folder = tempfile::tempdir_in(dir)?;
            let disk = folder.path().join("empty.raw");
            File::create(&disk)?.set_len(1 << 20)?;
            let mut rig_spec = RigSpec::new(folder.path(), &disk)?;
            let program = rig_spec.programs.join("backhaul");
            rig_spec.link = Some(spec.parse()?);
            let mut rig = Rig::prepare(rig_spec)?;
            rig.start_target()?;
            rig.wait("the target", START_TIME_MAX, |_| true).await?;
            let site = rig.link().context("the rig has no link")?.site_a();
            let output = site
                .command_in(program)
                .args(["link", "probe", "--json", "--config"])
                .arg(folder.path().join("agent.toml"))
                .output()?;
            let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
            let ms = |value: &serde_json::Value| value.as_f64().unwrap_or(f64::NAN) * 1e3;
            least.push(ms(&report["rtt_seconds"][0]));
            median.push(ms(&report["loaded_rtt_seconds"][0]));
            worst.push(ms(&report["loaded_rtt_seconds"][1]));
        }
        let goal = least.median() * 1.5 + 5.0;
        println!("| {name} | {least} ms | {median} ms | {worst} ms | {goal:.0} ms |");
    }
    Ok(())
}

/// Waits until a peer listens on a TCP port of site B.
fn wait_for_port(peer: &mut Peer, link: &Link, port: u16) -> anyhow::Result<()> {
    let address = link.site_b().address();
    let connect = || std::net::TcpStream::connect((address, port)).is_ok();
    peer.wait_until(|| link.site_b().run_inside(connect).unwrap_or(false))
}

fn iperf3(spec: &LinkSpec, congestion: &str) -> anyhow::Result<u64> {
    let link = Link::start(spec.clone())?;
    let mut server = Peer::start(link.site_b().command_in("iperf3").arg("-s"))?;
    wait_for_port(&mut server, &link, 5201)?;
    let (omit, seconds) = (SETTLE.as_secs().to_string(), MEASURE.as_secs().to_string());
    let output = link
        .site_a()
        .command_in("iperf3")
        .args(["-c", &link.site_b().address().to_string(), "-C", congestion, "--json"])
        .args(["-O", &omit, "-t", &seconds])
        .output()
        .context("iperf3 is missing: install the Debian package iperf3")?;
    let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let bits = report["end"]["sum_received"]["bits_per_second"].as_f64();
    let bits = bits.with_context(|| format!("iperf3 said {report}"))?;
    Ok((bits / 8.0 * MEASURE.as_secs_f64()) as u64)
}

/// What the link delivers of payload while `sender` runs.
fn delivered(link: &Link, sender: &mut Peer) -> anyhow::Result<u64> {
    // The measurement itself: what the link delivers in this time.
    std::thread::sleep(SETTLE);
    let before = link.stats().up;
    std::thread::sleep(MEASURE);
    let after = link.stats().up;
    ensure!(sender.is_running()?, "the sender ended before it was measured");
    let packets = after.delivered_packets - before.delivered_packets;
    Ok((after.delivered_bytes - before.delivered_bytes).saturating_sub(packets * TCP_HEADER_BYTES))
}

fn rsync(dir: &Path, disk: &Path, spec: &LinkSpec) -> anyhow::Result<u64> {
    let link = Link::start(spec.clone())?;
    let configuration = dir.join("rsyncd.conf");
    let into = dir.display();
    std::fs::write(
        &configuration,
        format!("use chroot = no\n[disks]\npath = {into}\nread only = no\nuid = 0\ngid = 0\n"),
    )?;
    let mut server = Peer::start(
        link.site_b()
            .command_in("rsync")
            .args(["--daemon", "--no-detach", "--config"])
            .arg(&configuration),
    )?;
    wait_for_port(&mut server, &link, 873)?;
    let to = format!("rsync://{}/disks/copy.raw", link.site_b().address());
    let mut sender = Peer::start(
        link.site_a().command_in("rsync").args(["--whole-file", "--inplace"]).arg(disk).arg(to),
    )?;
    delivered(&link, &mut sender)
}

fn nbdcopy(dir: &Path, disk: &Path, spec: &LinkSpec) -> anyhow::Result<u64> {
    let link = Link::start(spec.clone())?;
    let keys = dir.join("keys.psk");
    std::fs::write(&keys, format!("lab:{}\n", "5a".repeat(32)))?;
    let copy = dir.join("copy.raw");
    File::create(&copy)?.set_len(std::fs::metadata(disk)?.len())?;
    let mut server = Peer::start(
        link.site_b()
            .command_in("nbdkit")
            .args(["-f", "--tls=require", &format!("--tls-psk={}", keys.display()), "file"])
            .arg(&copy),
    )?;
    wait_for_port(&mut server, &link, 10809)?;
    let uri = format!("nbds://lab@{}/?tls-psk-file={}", link.site_b().address(), keys.display());
    let mut sender = Peer::start(link.site_a().command_in("nbdcopy").arg(disk).arg(uri))?;
    delivered(&link, &mut sender)
}
