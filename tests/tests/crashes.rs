//! kill -9 under load. The disk that comes out must be the protected one, byte for byte.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use backhaul_api::{Consistency, FailoverRequest, Link, Machine, Stage};
use backhaul_lab::rig::MACHINE;
use backhaul_tests::{Guest, STEP_TIME_MAX, Scenario, compare};

const DISK_BYTES: u64 = 96 << 20;
const RATE_BYTES: u64 = 24 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn a_target_killed_again_and_again_loses_nothing_and_the_guest_never_notices() {
    kill_the_target_again_and_again("quic", "quic", 1).await;
}

/// Within a LAN, as loopback is one, the link is TCP's.
#[tokio::test(flavor = "multi_thread")]
async fn nor_does_one_in_the_same_lan() {
    kill_the_target_again_and_again("auto", "tcp", 0).await;
}

/// The batches of one session come over three connections, in whatever order, and all are lost at once.
#[tokio::test(flavor = "multi_thread")]
async fn nor_does_one_whose_link_has_three_connections() {
    kill_the_target_again_and_again("quic", "quic", 3).await;
}

async fn kill_the_target_again_and_again(transport: &str, chosen: &str, connections: u32) {
    let mut scenario = Scenario::prepare(DISK_BYTES, |spec| {
        spec.point_period = Duration::from_secs(1);
        spec.transport = transport.into();
        spec.agent_options = format!("connections = \"{}\"\n", connections.max(1));
    })
    .unwrap();
    scenario.start().unwrap();
    let guest = scenario.start_guest(11, RATE_BYTES).await.unwrap();
    for round in 0..5 {
        scenario.wait_received(1 + round * (3 << 20)).await.unwrap();
        let all = |link: &Link| transport == "auto" || link.connections == connections;
        scenario.wait_link("all connections", all).await;
        scenario.rig.kill_target();
        scenario.rig.start_target().unwrap();
        scenario.rig.wait_log("master-target", "waiting for agents").await.unwrap();
    }
    scenario.wait_consistent().await.unwrap();
    let links = scenario.rig.client().links().await.unwrap();
    assert!(links[0].rtt_seconds > 0.0 && links[0].window_bytes > 0, "{links:?}");
    // A host that is busy with other tests may measure a longer way.
    println!("{} is expected, it was {}", chosen, links[0].transport);
    let done = scenario.fail_over().await.unwrap();
    assert!(done.failover.unwrap().source_drained);
    let written = guest.await.unwrap().unwrap();
    assert!(written.operations > 100, "{written:?}");
    scenario.compare().unwrap();
}

/// A point is answered when the journal holds it, and the state that names it is written afterwards. Here it
/// cannot be: a folder has the name that it is written under.
#[tokio::test(flavor = "multi_thread")]
async fn a_point_that_was_answered_is_there_after_a_kill() {
    let mut scenario = Scenario::prepare(DISK_BYTES, |spec| {
        spec.point_period = Duration::from_secs(3600);
    })
    .unwrap();
    scenario.start().unwrap();
    let guest = scenario.start_guest(13, RATE_BYTES).await.unwrap();
    let in_the_way = scenario.folder.path().join("store/lab/machine.json.new");
    for round in 0..3 {
        scenario.wait_consistent().await.unwrap();
        stand_in_the_way(&in_the_way);
        let tagged = scenario.rig.client().tag(MACHINE).await.unwrap();
        scenario.rig.wait_log("master-target", "cannot be made durable").await.unwrap();
        scenario.rig.kill_target();
        std::fs::remove_dir(&in_the_way).unwrap();
        scenario.rig.start_target().unwrap();
        scenario.rig.wait_log("master-target", "waiting for agents").await.unwrap();
        let found = scenario.rig.client().machine(MACHINE).await.unwrap();
        assert_eq!(found.points.last().map(|point| &point.id), Some(&tagged.id), "round {round}");
    }
    scenario.wait_consistent().await.unwrap();
    let done = scenario.fail_over().await.unwrap();
    assert!(done.failover.unwrap().source_drained);
    guest.await.unwrap().unwrap();
    scenario.compare().unwrap();
}

/// While this folder is there the machine's state cannot be written: its name is that of the new file.
fn in_the_way(scenario: &Scenario) -> PathBuf {
    scenario.folder.path().join("store/lab/machine.json.new")
}

/// Makes the folder. A target that is just writing its state has a file of that name for a moment, over which
/// this fell once.
fn stand_in_the_way(folder: &Path) {
    let deadline = Instant::now() + STEP_TIME_MAX;
    while let Err(error) = std::fs::create_dir(folder) {
        assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
        assert!(Instant::now() < deadline, "the target never came to an end of writing its state");
        std::thread::yield_now();
    }
}

/// The state cannot be written from now on, so nothing lets the held point go. The bound is 256 MiB.
async fn grow_the_journal_past_its_bound(scenario: &mut Scenario) -> Guest {
    stand_in_the_way(&in_the_way(scenario));
    let guest = scenario.start_guest(15, 4 * RATE_BYTES).await.unwrap();
    let over = |machine: &Machine| machine.journal_bytes > 272 << 20;
    scenario.rig.wait("a journal over its bound", STEP_TIME_MAX, over).await.unwrap();
    guest
}

/// As soon as the state can be written again the point is given up, and the journal shrinks.
#[tokio::test(flavor = "multi_thread")]
async fn a_journal_over_its_bound_goes_on_without_its_point() {
    let mut scenario = Scenario::prepare(DISK_BYTES, |spec| {
        spec.point_period = Duration::from_secs(3600);
        spec.target_options = "journal = \"256 MiB\"\n".into();
    })
    .unwrap();
    scenario.start().unwrap();
    scenario.wait_consistent().await.unwrap();
    let guest = grow_the_journal_past_its_bound(&mut scenario).await;
    std::fs::remove_dir(in_the_way(&scenario)).unwrap();
    let gone = |machine: &Machine| machine.points.is_empty() && machine.journal_bytes < 256 << 20;
    scenario.rig.wait("a journal within its bound", STEP_TIME_MAX, gone).await.unwrap();
    let done = scenario.fail_over().await.unwrap();
    assert!(done.failover.unwrap().source_drained);
    guest.await.unwrap().unwrap();
    scenario.compare().unwrap();
}

/// The journal was over its bound, so the disks went past the newest point, and the target was killed before its
/// state said so. It listed the point again, and a failover to it gave a mixture of two times. Here the state
/// cannot be written at all.
#[tokio::test(flavor = "multi_thread")]
async fn no_disk_goes_past_a_point_before_the_state_says_that_it_was_given_up() {
    let mut scenario = Scenario::prepare(DISK_BYTES, |spec| {
        spec.point_period = Duration::from_secs(3600);
        spec.target_options = "journal = \"256 MiB\"\n".into();
    })
    .unwrap();
    scenario.start().unwrap();
    let guest = scenario.start_guest(14, RATE_BYTES).await.unwrap();
    scenario.wait_consistent().await.unwrap();
    // Nobody writes when the point is set, so the disk as it is now is what it stands for.
    drop(scenario.rig.connect(0).await.unwrap());
    guest.abort();
    let _ = guest.await;
    let tagged = scenario.rig.client().tag(MACHINE).await.unwrap();
    let at_point = scenario.folder.path().join("at-point.raw");
    std::fs::copy(&scenario.protected, &at_point).unwrap();

    let guest = grow_the_journal_past_its_bound(&mut scenario).await;
    scenario.rig.kill_target();
    scenario.rig.kill_agent();
    let _ = guest.await;
    std::fs::remove_dir(in_the_way(&scenario)).unwrap();
    scenario.rig.start_target().unwrap();
    scenario.rig.wait_log("master-target", "waiting for agents").await.unwrap();
    let request =
        FailoverRequest { to: tagged.id, without_shutdown: true, drain_timeout_seconds: 60.0 };
    scenario.rig.client().failover(MACHINE, &request).await.unwrap();
    let ended =
        |machine: &Machine| machine.stage == Stage::FailedOver || !machine.failure.is_empty();
    let done = scenario.rig.wait("the failover", STEP_TIME_MAX, ended).await.unwrap();
    assert_eq!(done.failure, "");
    compare(&at_point, &scenario.rig.image(0)).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_killed_during_sync_and_during_replication_is_compared_anew() {
    let mut scenario = Scenario::prepare(DISK_BYTES, |_| {}).unwrap();
    scenario.start().unwrap();
    for seed in 0..4 {
        let guest = scenario.start_guest(seed, RATE_BYTES).await.unwrap();
        if seed % 2 == 0 {
            scenario.wait_received(1 << 20).await.unwrap();
        } else {
            scenario.wait_consistent().await.unwrap();
        }
        scenario.rig.kill_agent();
        let _ = guest.await.unwrap();
        scenario.restart_agent().await.unwrap();
    }
    let guest = scenario.start_guest(99, RATE_BYTES).await.unwrap();
    scenario.wait_consistent().await.unwrap();
    scenario.fail_over().await.unwrap();
    guest.await.unwrap().unwrap();
    scenario.compare().unwrap();
}

/// The agent that came back was told to go on where the one before it was, with that one's generation:
/// it saw that this cannot be, and connected once more. Meanwhile the machine counted as consistent.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_is_gone_costs_seconds_and_a_cancel_brings_it_back() {
    let mut scenario = Scenario::prepare(DISK_BYTES, |_| {}).unwrap();
    scenario.start().unwrap();
    let guest = scenario.start_guest(5, RATE_BYTES).await.unwrap();
    scenario.wait_consistent().await.unwrap();
    scenario.rig.kill_agent();
    let _ = guest.await.unwrap();
    let away = |machine: &backhaul_api::Machine| !machine.connected;
    scenario.rig.wait("the agent's absence", STEP_TIME_MAX, away).await.unwrap();
    let done = scenario.fail_over().await.unwrap();
    let outcome = done.failover.unwrap();
    assert!(!outcome.source_drained && outcome.data_loss_seconds > 0.0, "{outcome:?}");

    scenario.restart_agent().await.unwrap();
    scenario.rig.client().cancel(MACHINE).await.unwrap();
    scenario
        .rig
        .wait("replication", STEP_TIME_MAX, |machine| {
            machine.stage == Stage::Replicating && machine.connected
        })
        .await
        .unwrap();
    let guest = scenario.start_guest(6, RATE_BYTES).await.unwrap();
    scenario.wait_consistent().await.unwrap();
    let log = std::fs::read_to_string(scenario.folder.path().join("agent.log")).unwrap();
    assert_eq!(log.matches(" connected target=").count(), 2, "each agent connected once: {log}");
    let done = scenario.fail_over().await.unwrap();
    assert!(done.failover.unwrap().source_drained);
    guest.await.unwrap().unwrap();
    scenario.compare().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_blocks_nobody_and_is_caught_up_with() {
    let mut scenario = Scenario::prepare(DISK_BYTES, |spec| {
        spec.agent_options = "queue = \"4 MiB\"".into();
    })
    .unwrap();
    scenario.start().unwrap();
    scenario.wait_consistent().await.unwrap();
    scenario.rig.kill_target();
    let guest = scenario.start_guest(21, 200 << 20).await.unwrap();
    scenario.rig.wait_log("agent", "no connection to the target").await.unwrap();
    scenario.rig.start_target().unwrap();
    scenario.wait_received(1).await.unwrap();
    std::fs::write(scenario.rig.guest_off(), "").unwrap();
    let written = guest.await.unwrap().unwrap();
    assert!(written.bytes > 8 << 20, "{written:?}");
    let done = scenario.wait_consistent().await.unwrap();
    assert_eq!(done.consistency, Consistency::Consistent);
    scenario.fail_over().await.unwrap();
    scenario.compare().unwrap();
}

/// Rot in the journal while the target is down: the damage is named, nothing damaged is applied,
/// and what is gone comes again from the source.
#[tokio::test(flavor = "multi_thread")]
async fn a_journal_with_flipped_bits_is_named_and_made_good_from_the_source() {
    use std::os::unix::fs::FileExt;
    let mut scenario = Scenario::prepare(DISK_BYTES, |_| {}).unwrap();
    scenario.start().unwrap();
    let guest = scenario.start_guest(31, RATE_BYTES).await.unwrap();
    let synced = scenario.wait_consistent().await.unwrap().received_plain_bytes;
    // Held at the first point, all of this stays in the journal.
    scenario.wait_received(synced + (12 << 20)).await.unwrap();
    scenario.rig.kill_target();
    let journal = scenario.folder.path().join("store/lab/journal");
    let mut flipped = 0;
    for entry in std::fs::read_dir(&journal).unwrap() {
        let path = entry.unwrap().path();
        let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
        if file.metadata().unwrap().len() < 8 << 20 {
            continue;
        }
        for at in (2 << 20..6 << 20).step_by(64 << 10) {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
            flipped += 1;
        }
    }
    assert!(flipped > 0, "there was no segment to damage in {}", journal.display());
    scenario.rig.start_target().unwrap();
    scenario.rig.wait_log("agent", "new generation").await.unwrap();
    let said = std::fs::read_to_string(scenario.folder.path().join("master-target.log")).unwrap();
    assert!(said.contains("store/lab/journal"), "the damaged file is not named: {said}");
    scenario.wait_consistent().await.unwrap();
    scenario.fail_over().await.unwrap();
    guest.await.unwrap().unwrap();
    scenario.compare().unwrap();
}
