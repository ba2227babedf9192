//! Steps of a failover that are interrupted, or that get company.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use backhaul_api::{ClientError, CommitRequest, FailoverRequest, Machine, Stage};
use backhaul_lab::rig::MACHINE;
use backhaul_tests::{STEP_TIME_MAX, Scenario, programs};
use rustix::process::{Pid, Signal, kill_process};

const DISK_BYTES: u64 = 32 << 20;

/// A tag was a job like those of a failover, and a job ends the one before it: a tag that came
/// while the shutdown hook ran killed the hook, the failover waited for it until its deadline, and
/// went on as if the source were lost. Of two tags at a time, one was never answered.
#[tokio::test(flavor = "multi_thread")]
async fn tags_end_neither_each_other_nor_a_failover() {
    let mut scenario = Scenario::prepare(DISK_BYTES, |_| {}).unwrap();
    scenario.start().unwrap();
    let guest = scenario.start_guest(11, 4 << 20).await.unwrap();
    scenario.wait_consistent().await.unwrap();
    let client = scenario.rig.client().clone();
    let mut tags = tokio::task::JoinSet::new();
    for _ in 0..32 {
        let client = client.clone();
        tags.spawn(async move { client.tag(MACHINE).await });
    }
    let tagged = tokio::time::timeout(STEP_TIME_MAX, tags.join_all()).await.unwrap();
    assert!(tagged.iter().all(Result::is_ok), "{tagged:?}");
    guest.abort();
    let _ = guest.await;

    // The hook returns when this file is gone.
    let running = scenario.folder.path().join("guest-running");
    std::fs::write(&running, "").unwrap();
    let request = FailoverRequest {
        to: "latest".into(),
        without_shutdown: false,
        drain_timeout_seconds: 60.0,
    };
    client.failover(MACHINE, &request).await.unwrap();
    let off = scenario.rig.guest_off();
    scenario.rig.wait("the hook", STEP_TIME_MAX, |_| off.exists()).await.unwrap();
    let refused = client.tag(MACHINE).await.unwrap_err();
    let ClientError::Refused(failure) = refused else { panic!("{refused}") };
    assert_eq!(failure.code, "failed-over");
    std::fs::remove_file(&running).unwrap();
    let failed_over = |machine: &Machine| machine.stage == Stage::FailedOver;
    let done = scenario.rig.wait("the failover", STEP_TIME_MAX, failed_over).await.unwrap();
    assert!(done.failover.unwrap().source_drained);
    scenario.compare().unwrap();
}

/// The target was killed in the middle of a cancel: its new stage was durable, and whether somebody
/// had written to the disks was not looked at yet. Nobody did so afterwards, and what had been
/// written here stayed under what came from the source.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_is_killed_in_a_cancel_still_looks_at_the_disks() {
    let mut scenario = Scenario::prepare(DISK_BYTES, |_| {}).unwrap();
    scenario.start().unwrap();
    let guest = scenario.start_guest(12, 8 << 20).await.unwrap();
    scenario.wait_consistent().await.unwrap();
    scenario.fail_over().await.unwrap();
    guest.await.unwrap().unwrap();
    let state = scenario.folder.path().join("store").join(MACHINE).join("machine.json");
    let failed_over = std::fs::read_to_string(&state).unwrap();
    scenario.rig.client().cancel(MACHINE).await.unwrap();
    let replicates = |machine: &Machine| machine.stage == Stage::Replicating;
    scenario.rig.wait("the cancel", STEP_TIME_MAX, replicates).await.unwrap();
    scenario.rig.kill_target();

    // What the kill would have left behind.
    let mut half: serde_json::Value = serde_json::from_str(&failed_over).unwrap();
    assert!(!half["ready"].as_array().unwrap().is_empty());
    half["stage"] = serde_json::json!({ "stage": "replicating" });
    std::fs::write(&state, half.to_string()).unwrap();
    let flat = scenario.rig.image(0).with_file_name("lab-disk0-flat.vmdk");
    let flat = std::fs::File::options().write(true).open(flat).unwrap();
    flat.write_all_at(&[0xee; 8192], 5 << 20).unwrap();

    scenario.rig.start_target().unwrap();
    scenario.rig.wait_log("master-target", "were written to since the failover").await.unwrap();
    scenario.rig.wait_log("agent", "new generation").await.unwrap();
    scenario.wait_consistent().await.unwrap();
    scenario.fail_over().await.unwrap();
    scenario.compare().unwrap();
}

/// The agent is killed while the removal hook runs, and comes back: the hook runs again, and the
/// commit ends without anybody's help.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_killed_in_a_commit_removes_the_machine_when_it_is_back() {
    let mut scenario = Scenario::prepare(DISK_BYTES, |_| {}).unwrap();
    let folder = scenario.folder.path().to_owned();
    let (runs, hold) = (folder.join("removal-runs"), folder.join("removal-hold"));
    std::fs::write(&hold, "").unwrap();
    let slow = |text: String| {
        let hook = text.lines().find(|line| line.starts_with("removal_hook")).unwrap().to_owned();
        let script = format!(
            "echo >> {}; while test -e {}; do sleep 0.02; done; touch {}",
            runs.display(),
            hold.display(),
            folder.join("guest-removed").display()
        );
        text.replace(&hook, &format!("removal_hook = [\"sh\", \"-c\", \"{script}\"]"))
    };
    scenario.rig.edit_configuration("agent", slow).unwrap();
    scenario.start().unwrap();
    scenario.wait_consistent().await.unwrap();
    scenario.fail_over().await.unwrap();
    let client = scenario.rig.client().clone();
    client.commit(MACHINE, &CommitRequest::default()).await.unwrap();
    let times = || std::fs::read_to_string(&runs).map_or(0, |text| text.lines().count());
    scenario.rig.wait("the hook", STEP_TIME_MAX, |_| times() == 1).await.unwrap();
    scenario.rig.kill_agent();
    let away = |machine: &Machine| !machine.connected;
    let left = scenario.rig.wait("the agent's absence", STEP_TIME_MAX, away).await.unwrap();
    assert_eq!(left.stage, Stage::Committing);
    std::fs::remove_file(&hold).unwrap();
    scenario.rig.start_agent().unwrap();
    let committed = |machine: &Machine| machine.stage == Stage::Committed;
    scenario.rig.wait("the commit", STEP_TIME_MAX, committed).await.unwrap();
    assert_eq!(times(), 2, "the hook ran again");
    assert!(scenario.rig.guest_removed().exists());
    scenario.compare().unwrap();
}

/// Control-C while the lab makes its disk. The thread that does so went on, and put files into the
/// folder while it was emptied: it stayed.
#[test]
fn a_lab_that_is_interrupted_leaves_nothing_behind() {
    let place = tempfile::tempdir().unwrap();
    let mut lab = Command::new(programs().join("backhaul"))
        .args(["lab", "--seconds", "600"])
        .env("TMPDIR", place.path())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    while entries(place.path()) < 200 {
        assert_eq!(lab.try_wait().unwrap(), None, "it ended before it was interrupted");
        std::thread::yield_now();
    }
    kill_process(Pid::from_child(&lab), Signal::INT).unwrap();
    assert!(!lab.wait().unwrap().success());
    assert_eq!(entries(place.path()), 0);
}

/// Files and folders below a folder; none below a file.
fn entries(folder: &Path) -> usize {
    let here = std::fs::read_dir(folder).into_iter().flatten().flatten();
    here.map(|entry| 1 + entries(&entry.path())).sum()
}
