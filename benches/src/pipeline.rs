//! The whole pipeline (capture, TLS, journal, apply) over an emulated link.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, ensure};
use backhaul_api::Machine;
use backhaul_lab::link::{Link, LinkSpec};
use backhaul_lab::rig::{MACHINE, Rig, RigSpec};

use crate::Span;
use crate::peer::START_TIME_MAX;
use crate::record::Record;

/// What must have arrived before a transfer counts as begun: more than the talk before it.
const BEGUN_BYTES: u64 = 1 << 20;

/// A file of at least so many bytes that nothing compresses; made once. It is on the disk when this returns: the
/// kernel wrote it there in the middle of the first measurement, whose journal waited for a second.
pub fn noise(dir: &Path, bytes: u64) -> anyhow::Result<PathBuf> {
    let bytes = bytes.next_multiple_of(1 << 20);
    let path = dir.join(format!("noise-{}.raw", bytes >> 20));
    if !path.exists() {
        let mut source = File::open("/dev/urandom")?.take(bytes);
        let mut file = File::create(&path)?;
        std::io::copy(&mut source, &mut file)?;
        file.sync_all()?;
    }
    Ok(path)
}

/// Both daemons at the ends of a link, the target running and the agent not.
pub async fn prepare(
    dir: &Path,
    disk: &Path,
    link: &LinkSpec,
    agent_options: String,
) -> anyhow::Result<Rig> {
    prepare_over(dir, disk, link, "auto", agent_options).await
}

/// The same, over a transport: `auto`, `quic` or `tcp`.
pub async fn prepare_over(
    dir: &Path,
    disk: &Path,
    link: &LinkSpec,
    transport: &str,
    agent_options: String,
) -> anyhow::Result<Rig> {
    let mut spec = RigSpec::new(dir, disk)?;
    spec.transport = transport.into();
    spec.link = Some(link.clone());
    spec.agent_options = agent_options;
    let mut rig = Rig::prepare(spec)?;
    rig.start_target()?;
    rig.wait("the target", START_TIME_MAX, |_| true).await?;
    Ok(rig)
}

/// Starts the agent, and waits until the sync has begun.
pub async fn begin(rig: &mut Rig) -> anyhow::Result<()> {
    rig.start_agent()?;
    let begun = |machine: &Machine| machine.received_plain_bytes > BEGUN_BYTES;
    rig.wait("the first batches", START_TIME_MAX, begun).await?;
    Ok(())
}

/// The link of a rig that was made with one.
pub fn link(rig: &Rig) -> anyhow::Result<&Link> {
    rig.link().context("the rig has no link")
}

/// Fails when the disk came to its end, so that the last part of a measurement was idle.
pub async fn ensure_busy(rig: &Rig) -> anyhow::Result<()> {
    let machine = rig.client().machine(MACHINE).await?;
    ensure!(machine.dirty_bytes > 0, "the disk was too small for this link");
    Ok(())
}

/// What the target received of a disk in a second, in bytes.
pub async fn bytes_per_second(
    dir: &Path,
    disk: &Path,
    spec: &LinkSpec,
    congestion: &str,
    span: &Span,
) -> anyhow::Result<f64> {
    let mut rig = prepare(dir, disk, spec, format!("congestion = \"{congestion}\"")).await?;
    begin(&mut rig).await?;
    // The first seconds of a transfer are not part of the measurement.
    tokio::time::sleep(span.settle).await;
    let began = Instant::now();
    let before = rig.client().machine(MACHINE).await?.received_plain_bytes;
    let record = Record::of(link(&rig)?, span.measure, span.measure, |_| false).await;
    let after = rig.client().machine(MACHINE).await?.received_plain_bytes;
    let seconds = began.elapsed().as_secs_f64();
    ensure_busy(&rig).await?;
    let seen = record.whole();
    eprintln!(
        "  the link: {:.1} % of its rate delivered, {:.2} % of the packets dropped by its queue, which held {:.1} ms",
        seen.delivered_bits_per_second() / spec.up.rate.0 as f64 * 100.0,
        seen.queue_dropped * 100.0,
        seen.queue_seconds * 1e3,
    );
    Ok((after - before) as f64 / seconds)
}
