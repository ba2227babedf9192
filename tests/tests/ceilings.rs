//! Ceilings, as the link sees them: what enters it within ten seconds, headers and repetitions included.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use backhaul_api::{Link as LinkView, Machine};
use backhaul_lab::link::{Link, LinkStats};
use backhaul_lab::steal::{SHARE_MAX, Stolen};
use backhaul_tests::{STEP_TIME_MAX, Scenario, is_root};

/// What a ceiling is kept within.
const ERROR_MAX: f64 = 0.03;

/// What a new ceiling, and the transport that is told of it, may take before it is measured.
const SETTLE: Duration = Duration::from_secs(2);

/// How often a rate outside its bounds is measured again, where the host may be why. Every machine here has more to send than all attempts let through.
const ATTEMPTS: usize = 3;

/// How often the link is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// What the link saw for so long, in bits a second; or until it saw `enough` of them in a second.
struct Seen(Vec<(Instant, LinkStats)>);

impl Seen {
    async fn of(link: &Link, time: Duration, enough: impl Fn(&Self) -> bool) -> Self {
        let (began, mut looks) = (Instant::now(), tokio::time::interval(LOOK));
        let mut seen = Self(Vec::new());
        loop {
            looks.tick().await;
            seen.0.push((Instant::now(), link.stats()));
            if began.elapsed() >= time || enough(&seen) {
                return seen;
            }
        }
    }

    /// What entered since the look before `time` ago, or since the first one, in bits a second.
    fn bits_per_second(&self, time: Duration) -> f64 {
        let Some((end, after)) = self.0.last() else { return 0.0 };
        let from = self.0.iter().rev().find(|(at, _)| *end - *at >= time).unwrap_or(&self.0[0]);
        let bytes = after.up.entered_bytes - from.1.up.entered_bytes;
        bytes as f64 * 8.0 / (*end - from.0).as_secs_f64().max(1e-3)
    }
}

/// Fails unless what enters the link within `seconds`, after a moment to settle, is `mbit` ± 3 %.
async fn assert_holds(scenario: &Scenario, what: &str, mbit: f64, seconds: u64) {
    let link = scenario.rig.link().unwrap();
    let window = Duration::from_secs(seconds);
    let mut rate = 0.0;
    for _ in 0..ATTEMPTS {
        Seen::of(link, SETTLE, |_| false).await;
        let stolen = Stolen::from_now();
        rate = Seen::of(link, window, |_| false).await.bits_per_second(window) / 1e6;
        println!("{what}: {rate:.2} Mbit/s of {mbit}, {:+.2} %", (rate / mbit - 1.0) * 100.0);
        if is_settled(rate, mbit, stolen) {
            break;
        }
    }
    assert!(is_within(rate, mbit), "{what}: {rate} Mbit/s instead of {mbit}");
}

fn is_within(rate: f64, mbit: f64) -> bool {
    (rate / mbit - 1.0).abs() <= ERROR_MAX
}

/// Whether to measure again would tell nothing new. Too little may be this host's doing, whose disk or
/// neighbour stood still for a third of a second (7.75 of 8 Mbit/s, once), and is never made good; so
/// may too much, but only where processors were taken away.
fn is_settled(rate: f64, mbit: f64, stolen: Stolen) -> bool {
    is_within(rate, mbit) || (rate > mbit && !was_taken_away(stolen))
}

/// Whether the processors were not ours for a part of the time: a process that does not run sends nothing,
/// and no ceiling makes up for that.
fn was_taken_away(stolen: Stolen) -> bool {
    let share = stolen.share();
    if share > SHARE_MAX {
        println!("the hypervisor took {:.0} % of the processors meanwhile", share * 100.0);
    }
    share > SHARE_MAX
}

/// A machine with so many bytes that nothing compresses, over `line`, whose first batch has arrived.
async fn begin(
    bytes: u64,
    line: &str,
    transport: &str,
    edit: impl FnOnce(String) -> String,
) -> Scenario {
    let mut scenario = Scenario::prepare_noise(bytes, 91, |spec| {
        spec.link = Some(line.parse().unwrap());
        spec.transport = transport.into();
    })
    .unwrap();
    scenario.rig.edit_configuration("agent", edit).unwrap();
    scenario.start().unwrap();
    let begun = |machine: &Machine| machine.received_plain_bytes > 0;
    scenario.rig.wait("the first batch", STEP_TIME_MAX, begun).await.unwrap();
    scenario
}

/// Fails unless there was more to send all the time, over one connection.
async fn assert_busy_and_connected_once(scenario: &Scenario) {
    let machine = scenario.rig.client().machine("lab").await.unwrap();
    assert!(machine.dirty_bytes > 0, "there was nothing left to hold back: {machine:?}");
    let log = std::fs::read_to_string(scenario.folder.path().join("agent.log")).unwrap();
    assert_eq!(log.matches("connected target=").count(), 1, "{log}");
}

fn of_link(text: String, limit: &str) -> String {
    format!("limit = \"{limit}\"\n{text}")
}

fn of_machine(text: String, limit: &str) -> String {
    text.replace("[[machine]]\n", &format!("[[machine]]\nlimit = \"{limit}\"\n"))
}

/// A ceiling of a machine was tested from above only, and counted no headers: 5 % more than was asked
/// for was sent, and more over a line that loses packets. And a ceiling that comes while large batches
/// wait was kept in steps of a whole one.
#[tokio::test(flavor = "multi_thread")]
async fn a_machines_ceiling_is_what_the_link_sees_over_quic() {
    if !is_root() {
        return;
    }
    let limited = |text| of_machine(text, "20 Mbit/s");
    let scenario = begin(192 << 20, "60mbit,10ms,1%", "quic", limited).await;
    assert_holds(&scenario, "a machine, over QUIC", 20.0, 10).await;
    let lower = |text: String| text.replace("20 Mbit/s", "8 Mbit/s");
    scenario.rig.edit_configuration("agent", lower).unwrap();
    scenario.rig.reload_agent();
    assert_holds(&scenario, "a machine, lowered, over QUIC", 8.0, 10).await;
    assert_busy_and_connected_once(&scenario).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machines_ceiling_is_what_the_link_sees_over_tcp() {
    if !is_root() {
        return;
    }
    let limited = |text| of_machine(text, "8 Mbit/s");
    let scenario = begin(64 << 20, "60mbit,10ms,0.1%", "tcp", limited).await;
    assert_holds(&scenario, "a machine, over TCP", 8.0, 10).await;
    assert_busy_and_connected_once(&scenario).await;
}

/// Over TCP nothing in the transport keeps the link's ceiling: the agent does, batch by batch.
///
/// Rates that were right (+0.21, +0.26 and -0.28 %) were measured again and again on a host that had six to
/// twenty-six percent of its processors taken away, until the machine of 96 MiB had nothing left to send.
#[tokio::test(flavor = "multi_thread")]
async fn the_links_ceiling_is_what_the_link_sees_over_tcp() {
    if !is_root() {
        return;
    }
    let limited = |text| of_link(text, "20 Mbit/s");
    let scenario = begin(128 << 20, "60mbit,10ms,0.1%", "tcp", limited).await;
    assert_holds(&scenario, "the link, over TCP", 20.0, 10).await;
    assert_busy_and_connected_once(&scenario).await;
}

/// Within a LAN the smallest window is more than a low ceiling allows: QUIC does not keep it, and it was
/// exceeded by a tenth.
#[tokio::test(flavor = "multi_thread")]
async fn the_links_ceiling_is_what_the_link_sees_over_quic_within_a_lan() {
    if !is_root() {
        return;
    }
    let limited = |text| of_link(text, "8 Mbit/s");
    let scenario = begin(64 << 20, "500mbit,0ms", "quic", limited).await;
    assert_holds(&scenario, "the link, over QUIC within a LAN", 8.0, 10).await;
    assert_busy_and_connected_once(&scenario).await;
}

/// Only the machine's ceiling was ever changed in a whole pipeline. The link's is kept in another place:
/// it goes up, down and away while data flow, over the same connection.
#[tokio::test(flavor = "multi_thread")]
async fn the_links_ceiling_changes_live_and_is_lifted_without_a_reconnect() {
    if !is_root() {
        return;
    }
    const LINE_MBIT: f64 = 40.0;
    let limited = |text| of_link(text, "8 Mbit/s");
    let scenario = begin(224 << 20, "40mbit,10ms,0.1%", "quic", limited).await;
    assert_holds(&scenario, "the link", 8.0, 10).await;
    for (before, after) in [(8, 20), (20, 5)] {
        let change =
            |text: String| text.replace(&format!("{before} Mbit/s"), &format!("{after} Mbit/s"));
        scenario.rig.edit_configuration("agent", change).unwrap();
        scenario.rig.reload_agent();
        assert_holds(&scenario, "the link, changed", after.into(), 10).await;
    }
    let lift = |text: String| text.replace("limit = \"5 Mbit/s\"\n", "");
    scenario.rig.edit_configuration("agent", lift).unwrap();
    scenario.rig.reload_agent();
    let second = Duration::from_secs(1);
    let full =
        |seen: &Seen| seen.0.len() > 20 && seen.bits_per_second(second) > 0.8 * LINE_MBIT * 1e6;
    let link = scenario.rig.link().unwrap();
    let began = Instant::now();
    let seen = Seen::of(link, Duration::from_secs(15), full).await;
    println!("lifted: the line is full after {:.1} s", began.elapsed().as_secs_f64());
    assert!(
        full(&seen),
        "only {} bit/s after the ceiling was lifted",
        seen.bits_per_second(second)
    );
    assert_busy_and_connected_once(&scenario).await;
}

/// Seconds of the day, in UTC.
fn second_of_day() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() % 86_400
}

/// Only the schedule's arithmetic was tested, and ceilings that held all day: no agent had ever run into the
/// next entry of its schedule by itself.
#[tokio::test(flavor = "multi_thread")]
async fn the_schedule_changes_the_ceiling_at_its_minute_without_being_told() {
    if !is_root() {
        return;
    }
    // So that the first rate can be measured before it, three times if need be.
    const LEAD_SECONDS: u64 = 40;
    let at = |minute: u64| format!("{:02}:{:02}", minute % 1440 / 60, minute % 60);
    let mut minute = 0;
    let scheduled = |text: String| {
        minute = (second_of_day() + LEAD_SECONDS).div_ceil(60) % 1440;
        let (boundary, opposite) = (at(minute), at(minute + 720));
        let before = format!("8 Mbit/s daily {opposite}-{boundary} UTC");
        let after = format!("20 Mbit/s daily {boundary}-{opposite} UTC");
        format!("limit = [\"{before}\", \"{after}\"]\n{text}")
    };
    let scenario = begin(224 << 20, "60mbit,10ms,0.1%", "quic", scheduled).await;
    assert_holds(&scenario, "before the minute", 8.0, 5).await;
    let lifted = |link: &LinkView| link.ceiling_bytes_per_second == Some(20_000_000 / 8);
    let link = scenario.wait_link("the first ceiling", |link| !lifted(link)).await;
    assert_eq!(link.ceiling_bytes_per_second, Some(1_000_000));
    scenario.wait_link("the minute", lifted).await;
    let late = (second_of_day() + 86_400 - minute * 60) % 86_400;
    assert!(late <= 2, "the ceiling changed {late} s after {}", at(minute));
    assert_holds(&scenario, "after the minute", 20.0, 10).await;
    assert_busy_and_connected_once(&scenario).await;
}

/// A first ceiling in the middle of a sync, by `edit`. Where batches are held back for it, the first of the twenty
/// seconds that follow bring what had been handed over to the transport, at the line's rate, and the others that much less.
async fn assert_first_ceiling_holds(
    what: &str,
    line: &str,
    transport: [&str; 2],
    edit: fn(String) -> String,
) {
    if !is_root() {
        return;
    }
    let mut rate = 0.0;
    for _ in 0..ATTEMPTS {
        let Some(measured) = first_ceiling(line, transport, edit).await else { return };
        rate = measured.0;
        println!("{what}: {rate:.2} Mbit/s of 30, {:+.2} %", (rate / 30.0 - 1.0) * 100.0);
        if is_settled(rate, 30.0, measured.1) {
            break;
        }
    }
    assert!(is_within(rate, 30.0), "{what}: {rate} Mbit/s instead of 30");
}

/// Mbit/s of the twenty seconds from the first ceiling on, and when they began; `None` where a LAN was wanted
/// and this host was too busy for one.
async fn first_ceiling(
    line: &str,
    transport: [&str; 2],
    edit: fn(String) -> String,
) -> Option<(f64, Stolen)> {
    let [wanted, found] = transport;
    let scenario = begin(160 << 20, line, wanted, |text| text).await;
    let carries = || async { scenario.rig.client().links().await.unwrap()[0].transport.clone() };
    if wanted == "auto" && carries().await != found {
        println!("skipped: this host was too busy for its own link to count as near");
        return None;
    }
    let link = scenario.rig.link().unwrap();
    let second = Duration::from_secs(1);
    let full = |seen: &Seen| seen.0.len() > 20 && seen.bits_per_second(second) > 50e6;
    let before = Seen::of(link, STEP_TIME_MAX, full).await;
    assert!(full(&before), "the line was never full");
    scenario.rig.edit_configuration("agent", edit).unwrap();
    scenario.rig.reload_agent();
    let window = Duration::from_secs(20);
    let stolen = Stolen::from_now();
    let rate = Seen::of(link, window, |_| false).await.bits_per_second(window) / 1e6;
    assert_eq!(carries().await, found, "{line}");
    assert_busy_and_connected_once(&scenario).await;
    Some((rate, stolen))
}

/// What was on its way into the link when a machine's first ceiling came, 41 MB, went out on top of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_machines_first_ceiling_pays_for_what_is_under_way_over_quic() {
    let limited = |text| of_machine(text, "30 Mbit/s");
    let quic = ["quic", "quic"];
    assert_first_ceiling_holds("a machine's first, over QUIC", "60mbit,10ms", quic, limited).await;
}

/// The same over TCP, where the link's own is kept batch by batch too. What had arrived and was not
/// durable was paid for again, 4 % on a host with a slow disk.
#[tokio::test(flavor = "multi_thread")]
async fn the_links_first_ceiling_pays_for_what_is_under_way_over_tcp() {
    let limited = |text| of_link(text, "30 Mbit/s");
    let tcp = ["tcp", "tcp"];
    assert_first_ceiling_holds("the link's first, over TCP", "60mbit,10ms", tcp, limited).await;
}

/// Over QUIC the congestion controller keeps it, packet by packet, from the next one on.
#[tokio::test(flavor = "multi_thread")]
async fn the_links_first_ceiling_holds_in_the_middle_of_a_sync_over_quic() {
    let limited = |text| of_link(text, "30 Mbit/s");
    let quic = ["quic", "quic"];
    assert_first_ceiling_holds("the link's first, over QUIC", "60mbit,10ms", quic, limited).await;
}

/// Within a LAN the first ceiling ended the session, for QUIC to keep it.
#[tokio::test(flavor = "multi_thread")]
async fn the_links_first_ceiling_within_a_lan_costs_no_reconnect() {
    let limited = |text| of_link(text, "30 Mbit/s");
    let lan = ["auto", "tcp"];
    assert_first_ceiling_holds("the link's first, within a LAN", "60mbit,0ms", lan, limited).await;
}
