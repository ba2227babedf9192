//! The whole story, as operators live it.

use std::path::Path;
use std::process::Command;

use backhaul_api::{ClientError, CommitRequest, FailoverRequest, Stage};
use backhaul_lab::failback::{Failback, run};
use backhaul_lab::rig::MACHINE;
use backhaul_lab::workload::WorkloadSpec;
use backhaul_tests::{STEP_TIME_MAX, Scenario, compare, is_root};

fn story(dir: &Path, link: Option<&str>) -> Failback {
    Failback {
        dir: dir.to_owned(),
        disk: None,
        size_bytes: 128 << 20,
        seconds: 2,
        link: link.map(|link| link.parse().unwrap()),
        seed: 3,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lab_verifies_a_real_disk() {
    let dir = tempfile::tempdir().unwrap();
    let report = run(story(dir.path(), None), |_| {}).await.unwrap();
    assert!(report.verified, "{report:?}");
    assert_eq!(report.data_loss_seconds, 0.0);
    assert!(report.agent_memory_bytes_max <= 256 << 20, "{report:?}");
    assert!(report.target_memory_bytes_max <= 512 << 20, "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lab_verifies_over_a_long_link_that_loses_packets() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let report = run(story(dir.path(), Some("200mbit,20ms,0.5%")), |_| {}).await.unwrap();
    assert!(report.verified, "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_resumes_without_a_copy_and_a_commit_keeps_the_disk() {
    let mut scenario = Scenario::prepare(64 << 20, |_| {}).unwrap();
    scenario.start().unwrap();
    let guest = scenario.start_guest(1, 8 << 20).await.unwrap();
    scenario.wait_consistent().await.unwrap();
    let first = scenario.fail_over().await.unwrap();
    guest.await.unwrap().unwrap();
    scenario.compare().unwrap();
    let before = first.received_plain_bytes;

    scenario.rig.client().cancel(MACHINE).await.unwrap();
    let replicates = |machine: &backhaul_api::Machine| machine.stage == Stage::Replicating;
    scenario.rig.wait("the cancel", STEP_TIME_MAX, replicates).await.unwrap();
    std::fs::remove_file(scenario.rig.guest_off()).unwrap();
    let guest = scenario.start_guest(2, 4 << 20).await.unwrap();
    scenario.wait_received(before + (1 << 20)).await.unwrap();
    let second = scenario.fail_over().await.unwrap();
    let written = guest.await.unwrap().unwrap();
    scenario.compare().unwrap();
    let sent = second.received_plain_bytes - before;
    assert!(sent < written.bytes + (4 << 20), "{sent} bytes for {} written", written.bytes);

    scenario.rig.client().commit(MACHINE, &CommitRequest::default()).await.unwrap();
    let committed = |machine: &backhaul_api::Machine| machine.stage == Stage::Committed;
    scenario.rig.wait("the commit", STEP_TIME_MAX, committed).await.unwrap();
    assert!(scenario.rig.guest_removed().exists());
    scenario.compare().unwrap();
    let again = FailoverRequest {
        to: "latest".into(),
        without_shutdown: false,
        drain_timeout_seconds: 1.0,
    };
    let refused = scenario.rig.client().failover(MACHINE, &again).await.unwrap_err();
    let ClientError::Refused(failure) = refused else { panic!("{refused}") };
    assert_eq!(failure.code, "wrong-direction");
    // What was decided outlives the processes.
    scenario.rig.stop();
    scenario.rig.start_target().unwrap();
    scenario.rig.wait("the restart", STEP_TIME_MAX, committed).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_image_is_the_seed_and_little_is_sent() {
    let mut scenario = Scenario::prepare(64 << 20, |_| {}).unwrap();
    let noise: Vec<u8> =
        (0..64u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    std::fs::write(&scenario.protected, &noise).unwrap();
    scenario.start().unwrap();
    scenario.wait_consistent().await.unwrap();
    scenario.rig.kill_agent();
    // Somebody changes 1 MiB while nobody looks.
    use std::os::unix::fs::FileExt;
    let disk = std::fs::File::options().write(true).open(&scenario.protected).unwrap();
    disk.write_all_at(&vec![7; 1 << 20], 20 << 20).unwrap();
    let before = scenario.rig.client().machine(MACHINE).await.unwrap().received_plain_bytes;
    scenario.restart_agent().await.unwrap();
    scenario.wait_received(before + (1 << 20)).await.unwrap();
    let after = scenario.wait_consistent().await.unwrap();
    let sent = after.received_plain_bytes - before;
    assert!(sent < 2 << 20, "{sent} bytes were sent for 1 MiB that changed");
    scenario.fail_over().await.unwrap();
    scenario.compare().unwrap();
}

/// A file system that a kernel mounted through the export: nbdfuse shows it as a file, a loop
/// device as a disk.
#[tokio::test(flavor = "multi_thread")]
async fn real_files_written_by_a_kernel_come_home() {
    if !is_root() {
        return;
    }
    let mut scenario = Scenario::prepare(96 << 20, |_| {}).unwrap();
    scenario.start().unwrap();
    scenario.rig.connect(0).await.unwrap();
    let dir = scenario.folder.path().to_owned();
    let socket = scenario.rig.nbd_socket();
    let uri = format!("nbd+unix:///{}?socket={}", scenario.rig.export(0), socket.display());
    let run = |script: &str| {
        let output = Command::new("sh").args(["-ec", script]).current_dir(&dir).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{script}: {said}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    run("mkdir -p fuse mnt; : > fuse/disk");
    let mut fuse = Command::new("nbdfuse")
        .args([dir.join("fuse/disk").as_os_str(), uri.as_ref()])
        .spawn()
        .expect("nbdfuse is missing: install the Debian package libnbd-bin");
    run("for i in $(seq 100); do test -s fuse/disk && exit 0; sleep 0.1; done; exit 1");
    run("mkfs.ext4 -q fuse/disk && mount -o loop fuse/disk mnt");
    let files =
        "cp -r /usr/share/common-licenses /usr/lib/os-release mnt/ && cp /bin/bash mnt/ && sync";
    run(files);
    scenario.wait_consistent().await.unwrap();
    run("rm mnt/bash && cp /bin/tar mnt/ && truncate -s 3M mnt/sparse && sync");
    let expected = run("cd mnt && find . -type f -print0 | sort -z | xargs -0 sha256sum");
    run("umount mnt; umount fuse/disk");
    let _ = fuse.wait();
    scenario.fail_over().await.unwrap();
    scenario.compare().unwrap();

    let flat = scenario.rig.image(0).with_file_name("lab-disk0-flat.vmdk");
    run(&format!("e2fsck -fn {}", flat.display()));
    run(&format!("mount -o loop,ro {} mnt", flat.display()));
    let found = run("cd mnt && find . -type f -print0 | sort -z | xargs -0 sha256sum");
    run("umount mnt");
    assert_eq!(found, expected);
    assert!(expected.lines().count() > 5);
    compare(&scenario.protected, &scenario.rig.image(0)).unwrap();
}

/// Somebody boots the machine, it writes to its disk, and the operator cancels: what was written
/// here must not stay under what comes from the source.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_after_the_disks_were_used_compares_them_with_the_source() {
    use std::os::unix::fs::FileExt;
    let mut scenario = Scenario::prepare(32 << 20, |_| {}).unwrap();
    scenario.start().unwrap();
    let guest = scenario.start_guest(41, 8 << 20).await.unwrap();
    let point = scenario.wait_consistent().await.unwrap().points[0].id.clone();
    let wrong = FailoverRequest {
        to: "2001-01-01T00:00:00.000000Z".into(),
        without_shutdown: false,
        drain_timeout_seconds: 30.0,
    };
    let refused = scenario.rig.client().failover(MACHINE, &wrong).await.unwrap_err();
    assert!(refused.to_string().contains("does not keep that recovery point"), "{refused}");
    let request = FailoverRequest { to: point.clone(), ..wrong };
    scenario.rig.client().failover(MACHINE, &request).await.unwrap();
    let failed_over = |machine: &backhaul_api::Machine| machine.stage == Stage::FailedOver;
    let done = scenario.rig.wait("the failover", STEP_TIME_MAX, failed_over).await.unwrap();
    assert_eq!(done.failover.unwrap().point.id, point);

    let flat = scenario.rig.image(0).with_file_name("lab-disk0-flat.vmdk");
    let flat = std::fs::File::options().write(true).open(flat).unwrap();
    flat.write_all_at(&[0xee; 8192], 5 << 20).unwrap();
    scenario.rig.client().cancel(MACHINE).await.unwrap();
    scenario.rig.wait_log("master-target", "were written to since the failover").await.unwrap();
    scenario.rig.wait_log("agent", "new generation").await.unwrap();
    let replicates = |machine: &backhaul_api::Machine| machine.stage == Stage::Replicating;
    scenario.rig.wait("the cancel", STEP_TIME_MAX, replicates).await.unwrap();
    scenario.wait_consistent().await.unwrap();
    scenario.fail_over().await.unwrap();
    guest.await.unwrap().unwrap();
    scenario.compare().unwrap();
}

/// Two disks of one machine, of sizes that are no multiple of anything, in every kind of image:
/// the writes of both are one order, and both images are equal to their disks.
async fn a_machine_with_two_disks_comes_home_as(kind: &str) {
    let folder = tempfile::tempdir().unwrap();
    let second = folder.path().join("second.raw");
    std::fs::File::create(&second).unwrap().set_len((9 << 20) + 512).unwrap();
    let mut scenario = Scenario::prepare((24 << 20) + 1536, |spec| {
        spec.disks.push(second.clone());
        spec.kind = kind.into();
    })
    .unwrap();
    scenario.start().unwrap();
    let first = scenario.start_guest(61, 4 << 20).await.unwrap();
    let client = scenario.rig.connect(1).await.unwrap();
    let workload = WorkloadSpec {
        ranges: std::iter::once(0..9 << 20).collect(),
        rate_bytes_per_second: Some(4 << 20),
        flush_every: 8,
        seed: 62,
    };
    let other = scenario.rig.start_guest(client, workload, Some(400)).unwrap();
    other.await.unwrap().unwrap();
    std::fs::write(scenario.folder.path().join("guest-running"), "").unwrap();
    scenario.wait_consistent().await.unwrap();
    scenario.rig.kill_target();
    scenario.rig.start_target().unwrap();
    let back = |machine: &backhaul_api::Machine| machine.connected;
    scenario.rig.wait("the agent's return", STEP_TIME_MAX, back).await.unwrap();
    let done = scenario.fail_over().await.unwrap();
    first.await.unwrap().unwrap();
    assert_eq!(done.disks.len(), 2);
    scenario.compare().unwrap();
    compare(&second, &scenario.rig.image(1)).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_with_two_disks_comes_home_as_esxi_images() {
    a_machine_with_two_disks_comes_home_as("vmfs").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_with_two_disks_comes_home_as_monolithic_flat_images() {
    a_machine_with_two_disks_comes_home_as("monolithicFlat").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_with_two_disks_comes_home_as_raw_images() {
    a_machine_with_two_disks_comes_home_as("raw").await;
}

/// A rehearsal: the source is left running, the disks stand at one moment of it, and after the
/// cancel replication goes on where it was.
#[tokio::test(flavor = "multi_thread")]
async fn a_failover_without_shutdown_leaves_the_source_running() {
    let mut scenario = Scenario::prepare(32 << 20, |_| {}).unwrap();
    scenario.start().unwrap();
    let guest = scenario.start_guest(71, 8 << 20).await.unwrap();
    scenario.wait_consistent().await.unwrap();
    let request = FailoverRequest {
        to: "latest".into(),
        without_shutdown: true,
        drain_timeout_seconds: 30.0,
    };
    scenario.rig.client().failover(MACHINE, &request).await.unwrap();
    let failed_over = |machine: &backhaul_api::Machine| machine.stage == Stage::FailedOver;
    let done = scenario.rig.wait("the failover", STEP_TIME_MAX, failed_over).await.unwrap();
    let outcome = done.failover.unwrap();
    assert!(!outcome.source_drained, "{outcome:?}");
    assert!(!scenario.rig.guest_off().exists(), "the machine was not shut down");
    assert!(!guest.is_finished(), "and still writes");
    let before = done.received_plain_bytes;
    scenario.rig.client().cancel(MACHINE).await.unwrap();
    let replicates = |machine: &backhaul_api::Machine| machine.stage == Stage::Replicating;
    scenario.rig.wait("the cancel", STEP_TIME_MAX, replicates).await.unwrap();
    scenario.wait_received(before + (4 << 20)).await.unwrap();
    scenario.wait_consistent().await.unwrap();
    let second = scenario.fail_over().await.unwrap();
    let written = guest.await.unwrap().unwrap();
    scenario.compare().unwrap();
    let sent = second.received_plain_bytes;
    assert!(sent < written.bytes + (48 << 20), "{sent} sent for {} written", written.bytes);
}

/// The agent's host burnt down: a commit that needs it is refused and says how to go on.
#[tokio::test(flavor = "multi_thread")]
async fn a_commit_without_removal_needs_no_agent() {
    let mut scenario = Scenario::prepare(16 << 20, |_| {}).unwrap();
    scenario.start().unwrap();
    scenario.wait_consistent().await.unwrap();
    scenario.fail_over().await.unwrap();
    scenario.rig.kill_agent();
    let away = |machine: &backhaul_api::Machine| !machine.connected;
    scenario.rig.wait("the agent's absence", STEP_TIME_MAX, away).await.unwrap();
    let client = scenario.rig.client().clone();
    let refused = client.commit(MACHINE, &CommitRequest::default()).await.unwrap_err();
    assert!(refused.to_string().contains("--without-removal"), "{refused}");
    client.commit(MACHINE, &CommitRequest { without_removal: true }).await.unwrap();
    let committed = |machine: &backhaul_api::Machine| machine.stage == Stage::Committed;
    scenario.rig.wait("the commit", STEP_TIME_MAX, committed).await.unwrap();
    assert!(!scenario.rig.guest_removed().exists());
    scenario.compare().unwrap();
    // The agent that comes back learns that protection has ended.
    scenario.rig.start_agent().unwrap();
    scenario.rig.wait_log("agent", "protection has ended").await.unwrap();
}

/// A shutdown hook that is slower than the operator's patience. The machine is failed over with
/// data loss, and must not go on writing what a commit would lose; the cancel that follows ends the
/// hook, which once raised the fence long afterwards, over a machine that replicated again.
#[tokio::test(flavor = "multi_thread")]
async fn a_hook_that_is_overtaken_neither_leaves_the_source_open_nor_fences_it_later() {
    let mut scenario = Scenario::prepare(32 << 20, |_| {}).unwrap();
    let slow = |text: String| {
        let hook = text.lines().find(|line| line.starts_with("shutdown_hook")).unwrap().to_owned();
        text.replace(&hook, "shutdown_hook = [\"sleep\", \"3\"]")
    };
    scenario.rig.edit_configuration("agent", slow).unwrap();
    scenario.start().unwrap();
    scenario.wait_consistent().await.unwrap();
    let client = scenario.rig.connect(0).await.unwrap();
    client.write(0, vec![1; 4096].into(), false).await.unwrap();
    let request = FailoverRequest {
        to: "latest".into(),
        without_shutdown: false,
        drain_timeout_seconds: 0.5,
    };
    scenario.rig.client().failover(MACHINE, &request).await.unwrap();
    let failed_over = |machine: &backhaul_api::Machine| machine.stage == Stage::FailedOver;
    let done = scenario.rig.wait("the failover", STEP_TIME_MAX, failed_over).await.unwrap();
    assert!(!done.failover.unwrap().source_drained);
    scenario.rig.wait_log("agent", "its writes are refused from now on").await.unwrap();
    let mut refused = false;
    for _ in 0..100 {
        refused = client.write(4096, vec![2; 4096].into(), false).await.is_err();
        if refused {
            break;
        }
    }
    assert!(refused, "a failed-over machine still writes");

    scenario.rig.client().cancel(MACHINE).await.unwrap();
    let replicates = |machine: &backhaul_api::Machine| machine.stage == Stage::Replicating;
    scenario.rig.wait("the cancel", STEP_TIME_MAX, replicates).await.unwrap();
    let workload = WorkloadSpec {
        ranges: std::iter::once(0..32 << 20).collect(),
        rate_bytes_per_second: Some(1 << 20),
        flush_every: 8,
        seed: 93,
    };
    // For longer than the hook would have taken.
    let client = scenario.rig.connect(0).await.unwrap();
    let guest = scenario.rig.start_guest(client, workload, Some(250)).unwrap();
    guest.await.unwrap().unwrap();
    let done = scenario.fail_over().await.unwrap();
    assert!(done.failover.unwrap().source_drained);
    scenario.compare().unwrap();
}
