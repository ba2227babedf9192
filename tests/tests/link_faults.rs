//! What becomes of a link: it goes dark, flaps, loses, reorders and duplicates; its far end stops
//! reading, or cannot write its journal. Every time throughput is back within two seconds of the link
//! (most of it on a line of 200 ms, which still grows then), memory stays within its bound, nothing is
//! sent again that was acknowledged, and nobody restarts anything.

use std::time::Duration;

use backhaul_lab::rig::{MACHINE, RigSpec};
use backhaul_tests::store_disk::StoreDisk;
use backhaul_tests::{Guest, Scenario, is_root};
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep_until};

/// Rates are measured here, and another test beside would be in them.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

/// Throughput that is back is at least this share of what it was.
const BACK: f64 = 0.8;

/// What the guest writes a second, in bytes, beside a sync.
const GUEST_RATE_BYTES: u64 = 1 << 20;

/// Markers, and what goes with the content in batches, in bytes.
const MARKERS_BYTES: u64 = 1 << 20;

/// Batches that had arrived when a connection ended, behind one that had not: they come again. In
/// bytes; the target's window is four times as large.
const BEHIND_A_GAP_BYTES: u64 = 8 << 20;

/// Over TCP none arrives before its time. But they are checked side by side, and one may have been done with
/// before the one in front of it.
const CHECKED_EARLY_BYTES: u64 = 2 << 20;

/// A machine at the near end of `line` whose first sync the line is the limit of: no compression
/// shortens its content.
fn prepare(line: &str, content_mib: u64, seed: u64, adjust: impl FnOnce(&mut RigSpec)) -> Scenario {
    Scenario::prepare_noise(content_mib << 20, seed, |spec| {
        spec.link = Some(line.parse().unwrap());
        adjust(spec);
    })
    .unwrap()
}

/// Bytes of batches that the target has received.
async fn received(scenario: &Scenario) -> u64 {
    scenario.rig.client().machine(MACHINE).await.unwrap().received_plain_bytes
}

/// Bytes a second that leave the far end of the line, in the second that begins at `from`. Batches
/// are too coarse for so short a time; that what arrives is of use, [`end`] sees.
async fn rate_from(scenario: &Scenario, from: Instant) -> f64 {
    let arrived = || scenario.rig.link().unwrap().stats().up.delivered_bytes;
    // The second is what is measured, not a wait for something to happen.
    sleep_until(from).await;
    let (began, before) = (Instant::now(), arrived());
    sleep_until(began + Duration::from_secs(1)).await;
    (arrived() - before) as f64 / began.elapsed().as_secs_f64()
}

/// Waits until the sync is under way. Returns its rate on the line.
async fn wait_flowing(scenario: &mut Scenario) -> f64 {
    scenario.wait_received(8 << 20).await.unwrap();
    rate_from(scenario, Instant::now()).await
}

/// The line is dark for so long, which is the input of a test, not a wait for something to happen.
async fn darken(scenario: &Scenario, seconds: u64) {
    let light = Instant::now() + Duration::from_secs(seconds);
    scenario.rig.link().unwrap().blackout(true);
    sleep_until(light).await;
    scenario.rig.link().unwrap().blackout(false);
}

/// Asserts that the rate is `earlier` again in the second that ends two seconds after `since`.
async fn assert_back(what: &str, scenario: &Scenario, since: Instant, earlier: f64) {
    let first = rate_from(scenario, since).await;
    let second = rate_from(scenario, since + Duration::from_secs(1)).await;
    println!("{what}: {:.2} and {:.2} of the rate before", first / earlier, second / earlier);
    assert!(second >= BACK * earlier, "{what}: {second} bytes a second where {earlier} were");
}

/// The sync ends, the machine is failed over. Asserts what is promised whatever happened: memory is
/// bounded, the guest never waited, no batch came again that was acknowledged (of others `again_bytes` may), and the
/// image is the disk.
async fn end(what: &str, scenario: &mut Scenario, guest: Option<Guest>, again_bytes: u64) {
    scenario.wait_consistent().await.unwrap();
    let done = scenario.fail_over().await.unwrap();
    let (agent, target) = scenario.rig.memory_bytes_max();
    let mut content = std::fs::metadata(&scenario.protected).unwrap().len();
    if let Some(guest) = guest {
        let written = guest.await.unwrap().unwrap();
        assert!(written.longest.as_secs() < 5, "{what}: the guest waited {:?}", written.longest);
        content += written.bytes;
    }
    let (came, mib) = (done.received_plain_bytes, |bytes: u64| bytes >> 20);
    let on_the_line = scenario.rig.link().unwrap().stats().up.delivered_bytes;
    println!(
        "{what}: {} MiB came for {} MiB, {} MiB on the line; memory {} MiB and {} MiB",
        mib(came),
        mib(content),
        mib(on_the_line),
        mib(agent),
        mib(target)
    );
    assert!(agent <= 256 << 20 && target <= 512 << 20, "{what}: {agent} {target}");
    assert!(came <= content + MARKERS_BYTES + again_bytes, "{what}: {came} came for {content}");
    assert_eq!(done.repeated_batches, 0, "{what}: what was acknowledged came again");
    scenario.compare().unwrap();
}

/// How often the agent has connected.
fn connections(scenario: &Scenario) -> usize {
    let log = std::fs::read_to_string(scenario.folder.path().join("agent.log")).unwrap();
    log.matches("connected target=").count()
}

/// The link is dark for three times as long as the transport waits, in the middle of a sync. The guest
/// notices nothing; when the link is back so is the stream, with what was not acknowledged, over QUIC
/// again.
#[tokio::test(flavor = "multi_thread")]
async fn after_half_a_minute_of_dark_a_sync_goes_on_where_it_was() {
    if !is_root() {
        return;
    }
    let _alone = ONE_AT_A_TIME.lock().await;
    let auto = |spec: &mut RigSpec| spec.transport = "auto".into();
    let mut scenario = prepare("100mbit,10ms", 80, 84, auto);
    scenario.start().unwrap();
    let guest = scenario.start_guest(84, GUEST_RATE_BYTES).await.unwrap();
    let earlier = wait_flowing(&mut scenario).await;
    darken(&scenario, 30).await;
    assert_back("30 s of dark", &scenario, Instant::now(), earlier).await;
    let links = scenario.rig.client().links().await.unwrap();
    assert_eq!(links[0].transport, "quic", "both were blind, and QUIC is the better one");
    end("30 s of dark", &mut scenario, Some(guest), BEHIND_A_GAP_BYTES).await;
    assert_eq!(connections(&scenario), 2);
}

/// The same on a line of 200 ms, on which two seconds are ten round trips: the new connection begins with
/// half of the rate that the old one had found, and has all of it after 1.4 s. When it began anew, the
/// second that ends after two brought a fifth of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_line_is_as_fast_as_before_soon_after_half_a_minute_of_dark() {
    /// Of the rate before, over a second in the first half of which it still grows.
    const BACK_LEAST: f64 = 0.6;
    /// A packet of the handshake that is lost, one in fifty, costs half a second. A second dark tells such a chance
    /// from a fault. (CI fell here once, and its figure was not kept; six runs after that had 0.79 to 0.86.)
    const DARKS: usize = 2;
    if !is_root() {
        return;
    }
    let _alone = ONE_AT_A_TIME.lock().await;
    let mut scenario = prepare("50mbit,100ms,loss=2%", 96, 90, |_| {});
    scenario.start().unwrap();
    scenario.wait_received(8 << 20).await.unwrap();
    let earlier = rate_from(&scenario, Instant::now()).await;
    let (mut back, mut darks) = (0.0, 0);
    while back < BACK_LEAST && darks < DARKS {
        darken(&scenario, 30).await;
        back = rate_from(&scenario, Instant::now() + Duration::from_secs(1)).await / earlier;
        darks += 1;
        println!("30 s of dark, 200 ms: {back:.2} of the rate before in the second second");
    }
    assert!(back >= BACK_LEAST, "{back} of the rate before in the second second");
    scenario.rig.set_link("200mbit,10ms".parse().unwrap()).unwrap();
    end("30 s of dark, 200 ms", &mut scenario, None, BEHIND_A_GAP_BYTES).await;
    assert_eq!(connections(&scenario), 1 + darks);
}

/// Where a firewall passes TCP only, each new connection waited for UDP first, 5.5 s.
#[tokio::test(flavor = "multi_thread")]
async fn where_udp_does_not_pass_a_dark_line_is_back_as_soon() {
    if !is_root() {
        return;
    }
    let _alone = ONE_AT_A_TIME.lock().await;
    let auto = |spec: &mut RigSpec| spec.transport = "auto".into();
    let mut scenario = prepare("100mbit,10ms", 160, 91, auto);
    let firewall = ["rule", "add", "pref", "100", "ipproto", "udp", "blackhole"];
    let mut ip = scenario.rig.link().unwrap().site_a().command_in("ip");
    assert!(ip.args(firewall).status().unwrap().success());
    scenario.start().unwrap();
    scenario.rig.wait_log("agent", "nothing answers over UDP").await.unwrap();
    let earlier = wait_flowing(&mut scenario).await;
    darken(&scenario, 12).await;
    assert_back("12 s of dark over TCP", &scenario, Instant::now(), earlier).await;
    assert_eq!(connections(&scenario), 2);
    let links = scenario.rig.client().links().await.unwrap();
    assert_eq!(links[0].transport, "tcp");
    end("dark over TCP", &mut scenario, None, CHECKED_EARLY_BYTES).await;
}

/// Shorter than what ends a session. Over TCP the kernel sends again at intervals that double: a line that was
/// back after six seconds stayed idle for as long again.
#[tokio::test(flavor = "multi_thread")]
async fn a_short_dark_over_tcp_is_noticed_to_be_over() {
    if !is_root() {
        return;
    }
    let _alone = ONE_AT_A_TIME.lock().await;
    let over_tcp = |spec: &mut RigSpec| spec.transport = "tcp".into();
    let mut scenario = prepare("100mbit,10ms", 160, 92, over_tcp);
    scenario.start().unwrap();
    let earlier = wait_flowing(&mut scenario).await;
    // The kernel's packets come after 3.3, 6.8 and 13.9 seconds, about.
    for seconds in [4, 8] {
        darken(&scenario, seconds).await;
        let what = format!("{seconds} s of dark over TCP");
        assert_back(&what, &scenario, Instant::now(), earlier).await;
    }
    assert!(connections(&scenario) <= 3);
    end("short darks over TCP", &mut scenario, None, 2 * CHECKED_EARLY_BYTES).await;
}

/// A link that is there every other second, for a minute: it is used while it is there, over the same
/// connection.
#[tokio::test(flavor = "multi_thread")]
async fn a_link_that_flaps_for_a_minute_is_used_while_it_is_up() {
    const LINE_BYTES: f64 = 40e6 / 8.0;
    /// Of what the line can carry while it is up. Each time what was under way is lost, and the path has
    /// to be found again.
    const SHARE_LEAST: f64 = 0.4;
    if !is_root() {
        return;
    }
    let _alone = ONE_AT_A_TIME.lock().await;
    // More than the line carries in this time, so that there is always something to send.
    let mut scenario = prepare("40mbit,20ms", 160, 85, |_| {});
    scenario.start().unwrap();
    let earlier = wait_flowing(&mut scenario).await;
    let before = received(&scenario).await;
    let mut turns = tokio::time::interval(Duration::from_secs(1));
    for dark in [true, false].into_iter().cycle().take(60) {
        turns.tick().await;
        scenario.rig.link().unwrap().blackout(dark);
    }
    assert_back("flapping", &scenario, Instant::now(), earlier).await;
    let after = received(&scenario).await;
    // What came in the two seconds since the last dark is not a part of it, as far as the line carries.
    let share = ((after - before) as f64 - 2.0 * LINE_BYTES) / (29.0 * LINE_BYTES);
    println!("flapping: {share:.2} of what the link offered");
    assert!(share >= SHARE_LEAST, "{share} of what the link offered was used");
    // The rest is no part of the test.
    scenario.rig.set_link("200mbit,20ms".parse().unwrap()).unwrap();
    end("flapping", &mut scenario, None, 0).await;
    assert_eq!(connections(&scenario), 1);
}

/// What lines do to packets, one after the other: lost ones, ones that come late and ones that come twice
/// each look like congestion to somebody who knows no better.
#[tokio::test(flavor = "multi_thread")]
async fn an_ill_line_is_filled() {
    const LINE: &str = "100mbit,10ms";
    const LINE_BYTES: f64 = 100e6 / 8.0;
    const MEASURED: Duration = Duration::from_secs(3);
    if !is_root() {
        return;
    }
    let _alone = ONE_AT_A_TIME.lock().await;
    let ills = [
        ("loss=5%", 0.8),
        // What is later than 24 packets or an eighth of a round trip, QUIC takes for lost: of these
        // few are, of those nearly all, and each of them is sent twice.
        ("reorder=20%,reorder_by=2ms", 0.8),
        ("reorder=20%,reorder_by=5ms", 0.6),
        ("duplicate=5%", 0.8),
    ];
    for (seed, (ill, least)) in (86..).zip(ills) {
        let mut scenario = prepare(&format!("{LINE},{ill}"), 96, seed, |_| {});
        scenario.start().unwrap();
        scenario.wait_received(8 << 20).await.unwrap();
        let before = received(&scenario).await;
        let began = Instant::now();
        // The time is what is measured, not a wait for something to happen.
        sleep_until(began + MEASURED).await;
        let after = received(&scenario).await;
        let share = (after - before) as f64 / began.elapsed().as_secs_f64() / LINE_BYTES;
        println!("{ill}: {share:.2} of the line is content");
        assert!(share >= least, "{ill}: {share} of the line is content");
        scenario.rig.set_link(LINE.parse().unwrap()).unwrap();
        assert_back(&format!("after {ill}"), &scenario, Instant::now(), LINE_BYTES).await;
        end(ill, &mut scenario, None, 0).await;
        assert_eq!(connections(&scenario), 1, "{ill}");
    }
}

/// The target reads nothing for less and for more time than the transport waits, while there is more to
/// send than the line can carry.
async fn a_target_stops_reading(transport: &str) {
    if !is_root() {
        return;
    }
    let _alone = ONE_AT_A_TIME.lock().await;
    let mut scenario = prepare("100mbit,10ms", 160, 90, |spec| spec.transport = transport.into());
    scenario.start().unwrap();
    let guest = scenario.start_guest(90, GUEST_RATE_BYTES).await.unwrap();
    let earlier = wait_flowing(&mut scenario).await;
    for (seconds, connected) in [(4, 1), (12, 2)] {
        scenario.rig.freeze_target();
        // The length of the silence is the input of this test, not a wait for something to happen.
        sleep_until(Instant::now() + Duration::from_secs(seconds)).await;
        scenario.rig.thaw_target();
        let what = format!("{seconds} s without reading over {transport}");
        assert_back(&what, &scenario, Instant::now(), earlier).await;
        assert_eq!(connections(&scenario), connected, "{what}");
    }
    // The rest is no part of the test.
    scenario.rig.set_link("1gbit,10ms".parse().unwrap()).unwrap();
    end("without reading", &mut scenario, Some(guest), BEHIND_A_GAP_BYTES).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_stops_reading_is_gone_on_with() {
    a_target_stops_reading("quic").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_stops_reading_is_gone_on_with_over_tcp() {
    a_target_stops_reading("tcp").await;
}

/// The store's disk answers nothing for longer than the transport waits, while keep-alives flow: nobody is
/// cut off, the window is what waits, and when the disk is back so is the stream.
async fn a_journal_stalls(transport: &str) {
    if !is_root() {
        return;
    }
    let _alone = ONE_AT_A_TIME.lock().await;
    // Of these 64 are the window, which fills while the disk stands still.
    let mut scenario = prepare("100mbit,10ms", 192, 91, |spec| spec.transport = transport.into());
    // Dropped before the scenario, which would wait for the target.
    let Some(disk) = StoreDisk::mount(&scenario.folder.path().join("store")) else { return };
    scenario.start().unwrap();
    let guest = scenario.start_guest(91, GUEST_RATE_BYTES).await.unwrap();
    let earlier = wait_flowing(&mut scenario).await;
    disk.freeze();
    let frozen = Instant::now();
    let still = rate_from(&scenario, frozen + Duration::from_secs(10)).await;
    assert!(still < earlier / 10.0, "nothing waits for the journal: {still} of {earlier}");
    let answer = scenario.rig.client().machine(MACHINE);
    let answer = tokio::time::timeout(Duration::from_secs(1), answer).await;
    assert!(answer.expect("only the journal stalls").unwrap().connected);
    sleep_until(frozen + Duration::from_secs(12)).await;
    disk.thaw();
    assert_back("a stalled journal", &scenario, Instant::now(), earlier).await;
    // The rest is no part of the test.
    scenario.rig.set_link("1gbit,10ms".parse().unwrap()).unwrap();
    end("a stalled journal", &mut scenario, Some(guest), 0).await;
    assert_eq!(connections(&scenario), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_journal_that_stalls_is_gone_on_with() {
    a_journal_stalls("quic").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_journal_that_stalls_is_gone_on_with_over_tcp() {
    a_journal_stalls("tcp").await;
}
