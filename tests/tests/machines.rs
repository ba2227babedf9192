//! Several machines of one agent: what one of them has to send holds up no other.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use backhaul_api::{Consistency, FailoverRequest, Link, Machine, Stage};
use backhaul_lab::random::Random;
use backhaul_lab::rig::MACHINE;
use backhaul_tests::{STEP_TIME_MAX, Scenario, compare, is_root};

/// The other machine, beside the one that is synced.
const OTHER: &str = "other";

/// A machine with a disk of noise, and another one, over `line`.
fn prepare(
    noise_bytes: u64,
    other_bytes: usize,
    line: &str,
    transport: &str,
) -> (Scenario, PathBuf) {
    let mut disk = PathBuf::new();
    let scenario = Scenario::prepare_noise(noise_bytes, 93, |spec| {
        spec.link = Some(line.parse().unwrap());
        spec.transport = transport.into();
        disk = spec.dir.join("other.raw");
        spec.others = vec![(OTHER.into(), disk.clone())];
    })
    .unwrap();
    std::fs::write(&disk, vec![0; other_bytes]).unwrap();
    (scenario, disk)
}

/// Waits until the other machine is as `wanted` says.
async fn wait_other(scenario: &Scenario, wanted: impl Fn(&Machine) -> bool) -> Machine {
    let (began, mut looks) = (Instant::now(), tokio::time::interval(Duration::from_millis(50)));
    loop {
        looks.tick().await;
        let last = scenario.rig.client().machine(OTHER).await;
        match last {
            Ok(machine) if wanted(&machine) => return machine,
            last => assert!(began.elapsed() < STEP_TIME_MAX, "{last:?}"),
        }
    }
}

/// A point of a machine with next to nothing to send waited behind all that another machine's sync had
/// handed to the transport: three seconds and more over this line, over TCP as over QUIC. Then it waited for
/// the rest of the batch that quinn had begun, as all of control did, and over TCP for the megabyte that was being
/// written: most of half a second.
async fn a_quiet_machine_passes(transport: &str) {
    if !is_root() {
        return;
    }
    const POINTS: usize = 100;
    // A round trip of 100 ms, what the line's queue holds, and what a busy host and a debug build add. The goal,
    // one and a half round trips and 5 ms for 99 of 100, is what `benches barriers` measures.
    const TIME_MAX: Duration = Duration::from_millis(300);
    const WRITE_BYTES: usize = 12 << 10;
    let (mut scenario, disk) = prepare(192 << 20, 16 << 20, "20mbit,50ms", transport);
    scenario.start().unwrap();
    let busy = |machine: &Machine| machine.received_plain_bytes > 8 << 20;
    scenario.rig.wait("the sync", STEP_TIME_MAX, busy).await.unwrap();
    wait_other(&scenario, |machine| machine.consistency == Consistency::Consistent).await;
    let export = format!("{OTHER}-disk0");
    let guest = backhaul_nbd::Client::unix(&scenario.rig.nbd_socket(), &export).await.unwrap();
    let client = scenario.rig.client();
    let (mut random, mut times) = (Random::new(5), Vec::new());
    for point in 0..POINTS {
        let mut data = vec![0; WRITE_BYTES];
        random.fill(&mut data);
        guest.write((point * 2 * WRITE_BYTES) as u64, data.into(), false).await.unwrap();
        let began = Instant::now();
        client.tag(OTHER).await.unwrap();
        times.push(began.elapsed());
    }
    let machine = client.machine(MACHINE).await.unwrap();
    assert!(machine.dirty_bytes > 0, "the sync was over: {machine:?}");
    times.sort();
    println!("over {transport}: median {:?}, {:?}", times[POINTS / 2], &times[POINTS - 5..]);
    // Over TCP what a lost packet holds up comes a round trip later or more.
    let most = if transport == "quic" { POINTS * 95 / 100 } else { POINTS / 2 };
    assert!(times[most] < TIME_MAX, "{times:?}");

    drop(guest);
    let request = FailoverRequest {
        to: "latest".into(),
        without_shutdown: false,
        drain_timeout_seconds: 60.0,
    };
    client.failover(OTHER, &request).await.unwrap();
    wait_other(&scenario, |machine| machine.stage == Stage::FailedOver).await;
    compare_image(&scenario, &disk);
}

fn compare_image(scenario: &Scenario, disk: &Path) {
    compare(disk, &scenario.rig.image_of(OTHER, 0)).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quiet_machine_passes_another_ones_sync_over_quic() {
    a_quiet_machine_passes("quic").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quiet_machine_passes_another_ones_sync_over_tcp() {
    a_quiet_machine_passes("tcp").await;
}

/// A common ceiling that comes in the middle of a sync owes for what is under way, twenty seconds here. No
/// point of another machine waits for that.
#[tokio::test(flavor = "multi_thread")]
async fn a_point_passes_the_debt_of_a_first_ceiling() {
    if !is_root() {
        return;
    }
    let (mut scenario, _) = prepare(192 << 20, 16 << 20, "60mbit,10ms", "tcp");
    scenario.start().unwrap();
    let busy = |machine: &Machine| machine.received_plain_bytes > 24 << 20;
    scenario.rig.wait("the sync", STEP_TIME_MAX, busy).await.unwrap();
    wait_other(&scenario, |machine| machine.consistency == Consistency::Consistent).await;
    let limited = |text: String| format!("limit = \"4 Mbit/s\"\n{text}");
    scenario.rig.edit_configuration("agent", limited).unwrap();
    scenario.rig.reload_agent();
    let has_ceiling = |link: &Link| link.ceiling_bytes_per_second.is_some();
    scenario.wait_link("the ceiling", has_ceiling).await;
    let began = Instant::now();
    scenario.rig.client().tag(OTHER).await.unwrap();
    let took = began.elapsed();
    println!("a point took {took:?} under the debt");
    assert!(took < Duration::from_secs(2), "{took:?}");
}

/// One machine's ceiling is its own: another one has the rest of the line.
#[tokio::test(flavor = "multi_thread")]
async fn a_machines_ceiling_leaves_the_rest_to_the_others() {
    if !is_root() {
        return;
    }
    const LINE_MBIT: f64 = 40.0;
    const CEILING_MBIT: f64 = 8.0;
    /// Headers are a twentieth.
    const LIMITED_MIN: f64 = 0.92;
    const OTHER_MIN_MBIT: f64 = 0.8 * (LINE_MBIT - CEILING_MBIT);
    /// Too little of both (7.28 and 28.50 Mbit/s, once) is the host's doing and never made good; too much is
    /// not excused. Both disks have more than all attempts let through.
    const ATTEMPTS: usize = 3;
    let (mut scenario, disk) = prepare(64 << 20, 0, "40mbit,10ms", "quic");
    let mut noise = vec![0; 192 << 20];
    Random::new(94).fill(&mut noise);
    std::fs::write(&disk, noise).unwrap();
    let limited =
        |text: String| text.replacen("[[machine]]\n", "[[machine]]\nlimit = \"8 Mbit/s\"\n", 1);
    scenario.rig.edit_configuration("agent", limited).unwrap();
    scenario.start().unwrap();
    let busy = |machine: &Machine| machine.received_plain_bytes > 4 << 20;
    scenario.rig.wait("the sync", STEP_TIME_MAX, busy).await.unwrap();
    let client = scenario.rig.client();
    let received = async || {
        let [lab, other] = [MACHINE, OTHER].map(|name| client.machine(name));
        let (lab, other) = (lab.await.unwrap(), other.await.unwrap());
        assert!(lab.dirty_bytes > 0 && other.dirty_bytes > 0, "{lab:?} {other:?}");
        (Instant::now(), [lab, other].map(|machine| machine.received_plain_bytes))
    };
    let mut mbit = [0.0; 2];
    for _ in 0..ATTEMPTS {
        let before = received().await;
        // The ceiling is to hold over ten seconds.
        let mut looks = tokio::time::interval(Duration::from_secs(10));
        looks.tick().await;
        looks.tick().await;
        let after = received().await;
        let seconds = (after.0 - before.0).as_secs_f64();
        mbit = [0, 1].map(|at| (after.1[at] - before.1[at]) as f64 * 8.0 / 1e6 / seconds);
        println!("limited: {:.2} Mbit/s of data, the other {:.2}", mbit[0], mbit[1]);
        if mbit[0] >= LIMITED_MIN * CEILING_MBIT && mbit[1] >= OTHER_MIN_MBIT {
            break;
        }
    }
    assert!((LIMITED_MIN..=1.0).contains(&(mbit[0] / CEILING_MBIT)), "{mbit:?} Mbit/s");
    assert!(mbit[1] >= OTHER_MIN_MBIT, "{mbit:?} Mbit/s");
}
