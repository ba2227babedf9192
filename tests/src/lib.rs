//! Scenarios with real processes: what they share.
//!
//! A [`Scenario`] is a pair of daemons, one machine and a guest that writes. The judge of every
//! scenario is `qemu-img compare` of the protected disk and the VMDK.

pub mod image_command;
pub mod metrics;
pub mod store_disk;
pub mod whole_guest;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use backhaul_api::{Consistency, FailoverRequest, Link, Machine, Stage};
use backhaul_lab::random::Random;
use backhaul_lab::rig::{MACHINE, Rig, RigSpec};
use backhaul_lab::workload::WorkloadSpec;
use backhaul_lab::writer::Written;
use backhaul_nbd::ClientError;
use tokio::task::JoinHandle;

/// Longest that any step may take on a slow machine.
pub const STEP_TIME_MAX: Duration = Duration::from_secs(120);

/// A running guest.
pub type Guest = JoinHandle<Result<Written, ClientError>>;

/// Two daemons, a machine with one disk, and where they live.
pub struct Scenario {
    /// The daemons.
    pub rig: Rig,
    /// The protected disk.
    pub protected: PathBuf,
    /// Removed at the end.
    pub folder: tempfile::TempDir,
    size_bytes: u64,
}

impl Scenario {
    /// Prepares a scenario with an empty disk of this size; starts nothing. `adjust` may change
    /// what is set up.
    pub fn prepare(size_bytes: u64, adjust: impl FnOnce(&mut RigSpec)) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let protected = folder.path().join("protected.raw");
        std::fs::File::create(&protected)?.set_len(size_bytes)?;
        let mut spec = RigSpec::new(folder.path(), &protected)?;
        // What a VPN gets; by itself it would be TCP over loopback.
        spec.transport = "quic".into();
        adjust(&mut spec);
        Ok(Self { rig: Rig::prepare(spec)?, protected, folder, size_bytes })
    }

    /// The same with a disk of noise, which nothing compresses: what a line has to carry is known.
    pub fn prepare_noise(
        size_bytes: u64,
        seed: u64,
        adjust: impl FnOnce(&mut RigSpec),
    ) -> anyhow::Result<Self> {
        let scenario = Self::prepare(size_bytes, adjust)?;
        let mut noise = vec![0; size_bytes as usize];
        Random::new(seed).fill(&mut noise);
        std::fs::write(&scenario.protected, noise)?;
        Ok(scenario)
    }

    /// Starts both daemons.
    pub fn start(&mut self) -> anyhow::Result<()> {
        self.rig.start_target()?;
        self.rig.start_agent()
    }

    /// Starts a guest that writes all over the disk, at most `rate_bytes` a second, until it is
    /// shut down or the export goes away.
    pub async fn start_guest(&mut self, seed: u64, rate_bytes: u64) -> anyhow::Result<Guest> {
        let client = self.rig.connect(0).await?;
        let workload = WorkloadSpec {
            ranges: std::iter::once(0..self.size_bytes).collect(),
            rate_bytes_per_second: Some(rate_bytes),
            flush_every: 16,
            seed,
        };
        Ok(self.rig.start_guest(client, workload, None)?)
    }

    /// Starts the agent again after its end, and waits until it is connected: until then the target
    /// may take the old connection for a live one, and the machine for consistent.
    pub async fn restart_agent(&mut self) -> anyhow::Result<()> {
        self.rig.start_agent()?;
        self.rig.wait_log("agent", " connected target=").await
    }

    /// Waits until the machine is consistent, has a point, and is replicated by the agent that runs
    /// now: after a restart of it the disks stay consistent for a moment, until its comparison
    /// begins, and only an RPO younger than the agent tells that the comparison is over.
    pub async fn wait_consistent(&mut self) -> anyhow::Result<Machine> {
        let began = Instant::now();
        let age = self.rig.agent_age();
        self.rig
            .wait("a consistent machine", STEP_TIME_MAX, |machine| {
                let age_seconds = (age + began.elapsed()).as_secs_f64();
                machine.connected
                    && machine.consistency == Consistency::Consistent
                    && !machine.points.is_empty()
                    && machine.rpo_seconds.is_some_and(|rpo_seconds| rpo_seconds < age_seconds)
            })
            .await
    }

    /// Waits until the target that runs now has received so many bytes.
    pub async fn wait_received(&mut self, bytes: u64) -> anyhow::Result<()> {
        let enough = |machine: &Machine| machine.received_plain_bytes >= bytes;
        self.rig.wait("more batches", STEP_TIME_MAX, enough).await?;
        Ok(())
    }

    /// What `backhaul link probe` finds in so long each way, from the process server's end of the emulated line.
    pub fn probe(&self, time: &str) -> serde_json::Value {
        let site = self.rig.link().unwrap().site_a();
        let output = site
            .command_in(programs().join("backhaul"))
            .args(["link", "probe", "--time", time, "--json", "--config"])
            .arg(self.folder.path().join("agent.toml"))
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Waits until the agent's link is as `wanted` says.
    pub async fn wait_link(&self, what: &str, wanted: impl Fn(&Link) -> bool) -> Link {
        let (began, mut looks) = (Instant::now(), tokio::time::interval(Duration::from_millis(50)));
        loop {
            looks.tick().await;
            // The target may not be up yet.
            match self.rig.client().links().await.map(|links| links.into_iter().next()) {
                Ok(Some(link)) if wanted(&link) => return link,
                last => assert!(began.elapsed() < STEP_TIME_MAX, "{what} did not happen: {last:?}"),
            }
        }
    }

    /// Fails over to the latest point.
    pub async fn fail_over(&mut self) -> anyhow::Result<Machine> {
        let request = FailoverRequest {
            to: "latest".into(),
            without_shutdown: false,
            drain_timeout_seconds: 60.0,
        };
        self.rig.client().failover(MACHINE, &request).await?;
        let done = self
            .rig
            .wait("the failover", STEP_TIME_MAX, |machine| {
                machine.stage == Stage::FailedOver || !machine.failure.is_empty()
            })
            .await?;
        ensure!(done.stage == Stage::FailedOver, "{}", done.failure);
        Ok(done)
    }

    /// Fails unless the protected disk and its image are equal, as qemu-img sees them.
    pub fn compare(&self) -> anyhow::Result<()> {
        compare(&self.protected, &self.rig.image(0))
    }
}

/// Fails unless `raw` and `image`, a VMDK unless its name ends in `.raw`, are equal, as qemu-img
/// sees them.
pub fn compare(raw: &Path, image: &Path) -> anyhow::Result<()> {
    let format =
        if image.extension().is_some_and(|ending| ending == "raw") { "raw" } else { "vmdk" };
    let output = Command::new("qemu-img")
        .args(["compare", "-f", "raw", "-F", format])
        .args([raw, image])
        .output()
        .context("qemu-img is missing: install the Debian package qemu-utils")?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "qemu-img compare: {}", said.trim());
    Ok(())
}

/// Whether this is root; tests that mount or make namespaces say that they were skipped otherwise.
pub fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("skipped: this needs root");
    }
    root
}

/// The folder of the programs under test.
///
/// # Panics
///
/// When the test does not run from where cargo builds it.
pub fn programs() -> PathBuf {
    let test = std::env::current_exe().expect("a test has a path");
    test.ancestors().nth(2).expect("tests run from deps/").to_owned()
}
