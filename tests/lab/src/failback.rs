//! The whole story on one machine: protect, sync, write, tag, fail over, verify, commit.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use backhaul_api::{CommitRequest, Consistency, FailoverRequest, Stage};
use serde::Serialize;

use crate::disk::{DiskSpec, LabDisk, copy_disk, make_disk};
use crate::link::LinkSpec;
use crate::rig::{MACHINE, Rig, RigSpec};
use crate::verify::{Judgement, verify};
use crate::workload::WorkloadSpec;

/// What a workload writes a second at most: a busy server, and well within what a site-to-site
/// link of 200 Mbit/s carries.
const WRITE_BYTES_PER_SECOND: u64 = 10 << 20;

/// How often the RPO is looked at.
const SAMPLE: Duration = Duration::from_millis(200);

/// Longest that any step may take on a slow machine with a slow link.
const STEP_TIME_MAX: Duration = Duration::from_secs(1800);

/// What to run.
#[derive(Debug, Clone)]
pub struct Failback {
    /// Where everything is put; it exists and is empty.
    pub dir: PathBuf,
    /// A disk whose copy is protected, or none: an ext4 disk is made.
    pub disk: Option<PathBuf>,
    /// Size of the disk that is made.
    pub size_bytes: u64,
    /// How long the guest writes after the first sync.
    pub seconds: u64,
    /// The link, if it is not loopback.
    pub link: Option<LinkSpec>,
    /// Decides the disk's content and the writes.
    pub seed: u64,
}

/// What came of it: the lab's one JSON object.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The VMDK equals the protected disk, byte for byte, as judged by others.
    pub verified: bool,
    /// Size of the disk.
    pub disk_bytes: u64,
    /// Bytes of batches that travelled.
    pub wire_bytes: u64,
    /// The same, uncompressed.
    pub plain_bytes: u64,
    /// From the agent's start to a consistent machine.
    pub initial_sync_seconds: f64,
    /// The largest RPO seen while the machine was replicating.
    pub rpo_seconds_max: f64,
    /// From the request to disks that are ready, the shutdown hook included.
    pub failover_seconds: f64,
    /// Seconds of writes lost.
    pub data_loss_seconds: f64,
    /// Points tagged by hand.
    pub points_tagged: u64,
    /// Writes, zeroes, trims and flushes of the guest.
    pub operations: u64,
    /// Bytes that they changed.
    pub written_bytes: u64,
    /// The longest that the guest waited for an answer.
    pub write_seconds_max: f64,
    /// Most memory that the agent held.
    pub agent_memory_bytes_max: u64,
    /// Most memory that the target held.
    pub target_memory_bytes_max: u64,
    /// Decides the disk's content and the writes.
    pub seed: u64,
    /// The protected disk, as it was at failover.
    pub protected: PathBuf,
    /// The VMDK's descriptor.
    pub image: PathBuf,
    /// What each judge said.
    pub judgements: Vec<Judgement>,
}

/// What the lab tells while it runs.
#[derive(Debug, Clone)]
pub enum Step {
    /// Something begins that takes a while.
    Begin(String),
    /// The sync stands at so many bytes of so many.
    Sync(u64, u64),
    /// It is done, and this is what it came to.
    Done(String),
}

/// Runs the story, telling `tell` of every step. The daemons are stopped when it returns.
pub async fn run(failback: Failback, tell: impl Fn(Step)) -> anyhow::Result<Report> {
    let dir = &failback.dir;
    let protected = dir.join("protected.raw");
    tell(Step::Begin("making the protected disk".into()));
    let preparing = (failback.clone(), protected.clone());
    let disk = tokio::task::spawn_blocking(move || prepare_disk(&preparing.0, &preparing.1));
    let disk = disk.await??;
    let files = match &disk.content {
        crate::disk::DiskContent::Ext4 { files, .. } => format!("ext4 with {} files", files.len()),
        _ => "a copy of the given disk".into(),
    };
    tell(Step::Done(format!("{} ({files})", mib(disk.size_bytes))));

    tell(Step::Begin("making keys, starting both daemons".into()));
    let mut spec = RigSpec::new(dir, &protected)?;
    spec.link.clone_from(&failback.link);
    spec.point_period = Duration::from_secs(5);
    let mut rig = Rig::prepare(spec)?;
    rig.start_target()?;
    rig.wait("the target's start", Duration::from_secs(30), |_| true).await?;
    let began = Instant::now();
    rig.start_agent()?;
    let client = rig.connect(0).await?;
    tell(Step::Done("the export is up, the guest writes".into()));

    let workload = WorkloadSpec {
        ranges: disk.writable_ranges.clone(),
        rate_bytes_per_second: Some(WRITE_BYTES_PER_SECOND),
        flush_every: 32,
        seed: failback.seed,
    };
    let guest = rig.start_guest(client, workload, None)?;

    tell(Step::Begin("first sync, while the guest writes".into()));
    let synced = rig
        .wait("the first sync", STEP_TIME_MAX, |machine| {
            if let Some(sync) = &machine.sync {
                tell(Step::Sync(sync.done_bytes, sync.total_bytes));
            }
            machine.consistency == Consistency::Consistent && !machine.points.is_empty()
        })
        .await?;
    let initial_sync_seconds = began.elapsed().as_secs_f64();
    tell(Step::Done(format!(
        "{} sent as {} in {initial_sync_seconds:.1} s",
        mib(synced.received_plain_bytes),
        mib(synced.received_wire_bytes)
    )));

    tell(Step::Begin(format!("replicating for {} s", failback.seconds)));
    let (rpo_seconds_max, points_tagged) = replicate(&mut rig, failback.seconds).await?;
    tell(Step::Done(format!(
        "RPO at most {rpo_seconds_max:.2} s, {points_tagged} points tagged by hand"
    )));

    tell(Step::Begin("failing over to the latest point".into()));
    let failed_over = fail_over(&mut rig).await?;
    let outcome = failed_over.failover.clone().context("the failover has no outcome")?;
    let written = guest.await.context("the guest's task was lost")??;
    tell(Step::Done(format!(
        "at {} in {:.2} s, data loss: {}",
        outcome.point.id,
        outcome.seconds,
        if outcome.source_drained {
            "none".into()
        } else {
            format!("{:.1} s", outcome.data_loss_seconds)
        }
    )));

    tell(Step::Begin("verifying with judges that share no code with the pipeline".into()));
    let image = rig.image(0);
    let verdict = verify(&protected, &image, &disk);
    for judgement in &verdict.judgements {
        tell(Step::Done(format!(
            "{:?} {:?}: {}",
            judgement.judge, judgement.outcome, judgement.detail
        )));
    }

    tell(Step::Begin("committing".into()));
    rig.client().commit(MACHINE, &CommitRequest::default()).await?;
    rig.wait("the commit", Duration::from_secs(60), |m| m.stage == Stage::Committed).await?;
    ensure!(rig.guest_removed().exists(), "the removal hook did not run");
    tell(Step::Done("the machine lives on-premises; the VMDK is yours".into()));

    let (agent_memory_bytes_max, target_memory_bytes_max) = rig.memory_bytes_max();
    rig.stop();
    Ok(Report {
        verified: verdict.verified,
        disk_bytes: disk.size_bytes,
        wire_bytes: failed_over.received_wire_bytes,
        plain_bytes: failed_over.received_plain_bytes,
        initial_sync_seconds,
        rpo_seconds_max,
        failover_seconds: outcome.seconds,
        data_loss_seconds: outcome.data_loss_seconds,
        points_tagged,
        operations: written.operations,
        written_bytes: written.bytes,
        write_seconds_max: written.longest.as_secs_f64(),
        agent_memory_bytes_max,
        target_memory_bytes_max,
        seed: failback.seed,
        protected,
        image,
        judgements: verdict.judgements,
    })
}

fn prepare_disk(failback: &Failback, path: &Path) -> anyhow::Result<LabDisk> {
    Ok(match &failback.disk {
        Some(source) => copy_disk(source, path)?,
        None => {
            let spec = DiskSpec { seed: failback.seed, ..DiskSpec::with_size(failback.size_bytes) };
            make_disk(path, &spec)?
        }
    })
}

/// Lets the guest write, tags a point every two seconds, and watches the RPO.
async fn replicate(rig: &mut Rig, seconds: u64) -> anyhow::Result<(f64, u64)> {
    let start = Instant::now();
    let (mut rpo_max, mut tagged) = (0.0f64, 0);
    loop {
        let elapsed = start.elapsed();
        if elapsed >= Duration::from_secs(seconds) && tagged > 0 {
            return Ok((rpo_max, tagged));
        }
        if elapsed.as_secs() / 2 >= tagged {
            // While a full queue is being caught up with there is nothing to tag.
            if rig.client().tag(MACHINE).await.is_ok() {
                tagged += 1;
            } else if elapsed > Duration::from_secs(seconds) + STEP_TIME_MAX {
                rig.client().tag(MACHINE).await?;
            }
        }
        let machine = rig.client().machine(MACHINE).await?;
        rpo_max = rpo_max.max(machine.rpo_seconds.unwrap_or(0.0));
        tokio::time::sleep(SAMPLE).await;
    }
}

async fn fail_over(rig: &mut Rig) -> anyhow::Result<backhaul_api::Machine> {
    // A queue that has just overflowed is caught up with first; until then there is no point.
    rig.wait("a recovery point", STEP_TIME_MAX, |machine| !machine.points.is_empty()).await?;
    let request = FailoverRequest {
        to: "latest".into(),
        without_shutdown: false,
        drain_timeout_seconds: 300.0,
    };
    rig.client().failover(MACHINE, &request).await?;
    let done = rig
        .wait("the failover", STEP_TIME_MAX, |machine| {
            machine.stage == Stage::FailedOver || !machine.failure.is_empty()
        })
        .await?;
    ensure!(done.stage == Stage::FailedOver, "the failover failed: {}", done.failure);
    Ok(done)
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}
