//! What people and programs are told of a link, so that they find what is wrong with it: status, probe
//! and metrics.

use std::net::UdpSocket;
use std::process::Command;

use backhaul_api::Link;
use backhaul_lab::steal::{SHARE_MAX, Stolen};
use backhaul_tests::metrics::{METRICS, Metrics, metrics_address, scrape, wait_metrics};
use backhaul_tests::store_disk::StoreDisk;
use backhaul_tests::{STEP_TIME_MAX, Scenario, is_root, programs};
use tokio::sync::Mutex;

/// A probe floods, and another one beside would take its processors.
static ONE_FLOOD_AT_A_TIME: Mutex<()> = Mutex::const_new(());

/// How often a verdict that a busy host may turn is asked for.
const ATTEMPTS: usize = 3;

/// What `backhaul` prints, with these arguments, for people.
fn backhaul(scenario: &Scenario, arguments: &[&str]) -> String {
    let output = Command::new(programs().join("backhaul"))
        .arg("--socket")
        .arg(scenario.folder.path().join("api.sock"))
        .args(arguments)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The cells of a line of a printed table, after what is left of it.
fn cells(line: &str) -> impl Iterator<Item = &str> {
    line.split(['│', '┆']).map(str::trim)
}

/// Fails when something is printed whose meaning nobody can look up.
fn assert_explained<'a>(names: impl IntoIterator<Item = &'a str>) {
    let page = include_str!("../../docs/DIAGNOSIS.md");
    for name in names {
        assert!(page.contains(&format!("`{name}`")), "{name} is not in DIAGNOSIS.md");
    }
}

/// What the printed tables have under `head` in the row that begins with `row`.
fn cell<'a>(text: &'a str, head: &str, row: &str) -> &'a str {
    let mut lines = text.lines().skip_while(|line| !cells(line).any(|cell| cell == head));
    let heads = lines.next().unwrap_or_else(|| panic!("there is no `{head}` in\n{text}"));
    let place = cells(heads).position(|cell| cell == head).unwrap();
    let mut rows =
        lines.filter(|line| cells(line).nth(1).is_some_and(|cell| cell.starts_with(row)));
    let found = rows.next().unwrap_or_else(|| panic!("there is no row of `{row}` in\n{text}"));
    cells(found).nth(place).unwrap()
}

/// The number that a cell begins with.
fn number(cell: &str) -> f64 {
    cell.split_whitespace().next().unwrap().parse().unwrap()
}

/// A dashboard would show nothing, or nonsense, where an operator looks for the cause of a slow link;
/// or there is a metric whose meaning nobody can look up.
#[tokio::test(flavor = "multi_thread")]
async fn both_daemons_tell_prometheus_how_things_stand() {
    let mut scenario = Scenario::prepare(16 << 20, |spec| {
        spec.agent_options = METRICS.into();
        spec.target_options = METRICS.into();
    })
    .unwrap();
    scenario.start().unwrap();
    let guest = scenario.start_guest(90, 8 << 20).await.unwrap();
    scenario.wait_consistent().await.unwrap();
    let address = metrics_address(&mut scenario, "agent").await;
    let busy = |metrics: &Metrics| {
        metrics["backhaul_agent_link_sent_bytes"] > 4e6
            && metrics["backhaul_agent_link_acked_bytes_per_second"] > 0.0
    };
    let agent = wait_metrics(address, "much that was sent", busy).await;
    let address = metrics_address(&mut scenario, "master-target").await;
    let consistent =
        |metrics: &Metrics| metrics["backhaul_target_consistent{machine=\"lab\"}"] == 1.0;
    let target = wait_metrics(address, "a consistent machine", consistent).await;
    let reported = |link: &Link| link.agent_send_buffer_bytes > 0;
    let link = scenario.wait_link("the agent's report", reported).await;

    let sent_bytes = agent["backhaul_agent_link_sent_bytes"];
    let sent_packets = agent["backhaul_agent_link_sent_packets"];
    let exactly = |value: u64| value as f64..=value as f64;
    let likely = [
        (&agent, "backhaul_agent_session_up", exactly(1)),
        (&agent, "backhaul_agent_queue_bytes{machine=\"lab\"}", 0.0..=64e6),
        (&agent, "backhaul_agent_link_rtt_seconds", 1e-6..=5.0),
        (&agent, "backhaul_agent_link_window_bytes", 1200.0..=1e9),
        (&agent, "backhaul_agent_link_path_bytes_per_second", 1e5..=1e11),
        (&agent, "backhaul_agent_link_acked_bytes_per_second", 1.0..=1e10),
        (&agent, "backhaul_agent_link_sent_packets", sent_bytes / 6500.0..=sent_bytes / 20.0),
        (&agent, "backhaul_agent_link_lost_packets", 0.0..=sent_packets / 10.0),
        (&agent, "backhaul_agent_link_retransmitted_bytes", 0.0..=sent_bytes / 10.0),
        (&agent, "backhaul_agent_link_mtu_bytes", 1200.0..=6500.0),
        (&agent, "backhaul_agent_link_connections", exactly(1)),
        (
            &agent,
            "backhaul_agent_socket_receive_buffer_bytes",
            exactly(link.agent_receive_buffer_bytes),
        ),
        (&agent, "backhaul_agent_socket_send_buffer_bytes", exactly(link.agent_send_buffer_bytes)),
        (&agent, "backhaul_agent_socket_dropped_datagrams", 0.0..=sent_packets),
        (&agent, "backhaul_agent_acknowledged_seconds_count{machine=\"lab\"}", 1.0..=1e4),
        (&agent, "backhaul_agent_acknowledged_seconds_sum{machine=\"lab\"}", 1e-4..=1e4),
        (&target, "backhaul_target_agents", exactly(1)),
        (&target, "backhaul_target_rpo_seconds{machine=\"lab\"}", 0.0..=120.0),
        (&target, "backhaul_target_repeated_batches{machine=\"lab\"}", exactly(0)),
        (
            &target,
            "backhaul_target_socket_receive_buffer_bytes",
            exactly(link.target_receive_buffer_bytes),
        ),
        (
            &target,
            "backhaul_target_socket_send_buffer_bytes",
            exactly(link.target_send_buffer_bytes),
        ),
        (&target, "backhaul_target_socket_dropped_datagrams", 0.0..=sent_packets),
    ];
    for (metrics, name, likely) in likely {
        let told = metrics.get(name).unwrap_or_else(|| panic!("no {name} in {metrics:?}"));
        assert!(likely.contains(told), "{name} is {told}, not of {likely:?}: {metrics:?}");
    }
    for buffer_bytes in [link.agent_send_buffer_bytes, link.target_receive_buffer_bytes] {
        assert!((64 << 10..1 << 30).contains(&buffer_bytes), "{link:?}");
    }

    let page = include_str!("../../docs/CONFIGURATION.md");
    let (_, of_agent) = page.split_once("prefix `backhaul_agent_`").unwrap();
    let (of_agent, of_target) = of_agent.split_once("prefix `backhaul_target_`").unwrap();
    for (metrics, prefix, listed) in
        [(&agent, "backhaul_agent_", of_agent), (&target, "backhaul_target_", of_target)]
    {
        for name in metrics.keys() {
            let short = name.strip_prefix(prefix).unwrap().split('{').next().unwrap();
            let of_histogram = ["_bucket", "_sum", "_count"].map(|part| short.strip_suffix(part));
            let short = of_histogram.into_iter().flatten().next().unwrap_or(short);
            assert!(listed.contains(&format!("`{short}`")), "{name} is not in CONFIGURATION.md");
        }
    }
    scenario.fail_over().await.unwrap();
    guest.await.unwrap().unwrap();
}

/// Status and metrics would call a line clean that loses packets, or say that it carries something else
/// than it does: nobody would look for what is wrong where it is.
#[tokio::test(flavor = "multi_thread")]
async fn the_status_of_a_lossy_line_says_what_it_carries_and_what_it_loses() {
    const DISK_BYTES: u64 = 48 << 20;
    const RATE_BYTES: f64 = 5e6;
    if !is_root() {
        return;
    }
    let mut scenario = Scenario::prepare_noise(DISK_BYTES, 91, |spec| {
        spec.link = Some("40mbit,15ms,1%".parse().unwrap());
        spec.agent_options = METRICS.into();
    })
    .unwrap();
    scenario.start().unwrap();
    scenario.wait_received(1).await.unwrap();
    // The rate is found by then, and the sync has more before it than it has behind it.
    let link =
        scenario.wait_link("some seconds of a sync", |link| link.sent_bytes > 20_000_000).await;
    let table = backhaul(&scenario, &["link", "status"]);
    println!("{table}");
    let address = metrics_address(&mut scenario, "agent").await;
    let site = scenario.rig.link().unwrap().site_a();
    let metrics = site.run_inside(|| scrape(address)).unwrap();

    let path = link.path_bytes_per_second.unwrap() as f64 / RATE_BYTES;
    assert!((0.8..1.2).contains(&path), "{link:?}");
    let lost = |lost: f64, sent: f64, again_bytes: f64| {
        assert!((0.003..0.05).contains(&(lost / sent)), "{lost} of {sent}");
        assert!((100.0..1420.0).contains(&(again_bytes / lost)), "{again_bytes} for {lost}");
    };
    lost(link.lost_packets as f64, link.sent_packets as f64, link.retransmitted_bytes as f64);
    let metric = |name: &str| metrics[&format!("backhaul_agent_link_{name}")];
    lost(metric("lost_packets"), metric("sent_packets"), metric("retransmitted_bytes"));
    let path = metric("path_bytes_per_second") / RATE_BYTES;
    assert!((0.8..1.2).contains(&path), "{metrics:?}");
    // The line's 30 ms and a queue, and what fills it meanwhile.
    for rtt in [link.rtt_seconds, metric("rtt_seconds")] {
        assert!((0.03..0.08).contains(&rtt), "{rtt} s: {link:?}");
    }
    for window in [link.window_bytes as f64, metric("window_bytes")] {
        let share = window / (RATE_BYTES * 0.03);
        assert!((0.4..4.0).contains(&share), "{window} bytes: {link:?}");
    }
    for first in ["agent", "UDP socket of"] {
        let heads = table.lines().find(|line| cells(line).nth(1) == Some(first)).unwrap();
        assert_explained(cells(heads).filter(|head| !head.is_empty()));
    }
    let of_agent = |head: &str| cell(&table, head, "lab-agent");
    assert!((32.0..48.0).contains(&number(of_agent("path"))), "{table}");
    let lost = of_agent("lost (sent again)");
    assert!((0.3..5.0).contains(&number(lost)) && lost.ends_with("iB)"), "{table}");
    for head in ["receive buffer", "send buffer"] {
        for socket in ["this target", "lab-agent"] {
            assert!(cell(&table, head, socket).ends_with("iB"), "{table}");
        }
    }
}

/// The target hangs for a moment, and its socket's buffer runs over. Whoever looks for what slows the
/// link would find a lossy line, and not the kernel setting that mends it.
#[tokio::test(flavor = "multi_thread")]
async fn datagrams_that_found_no_room_at_the_target_are_counted_where_people_look() {
    let mut scenario =
        Scenario::prepare(16 << 20, |spec| spec.target_options = METRICS.into()).unwrap();
    scenario.start().unwrap();
    scenario.wait_consistent().await.unwrap();
    let address = scenario.rig.client().status().await.unwrap().listen;
    let metrics = metrics_address(&mut scenario, "master-target").await;
    let connected = |link: &Link| link.target_receive_buffer_bytes > 0;
    let link = scenario.wait_link("the connection", connected).await;
    assert_eq!(cell(&backhaul(&scenario, &["link", "status"]), "dropped", "this target"), "0");
    // Of no connection: they are thrown away when they are read.
    let (socket, datagram) = (UdpSocket::bind("127.0.0.1:0").unwrap(), [0; 1200]);
    scenario.rig.freeze_target();
    for _ in 0..2 * link.target_receive_buffer_bytes / datagram.len() as u64 {
        socket.send_to(&datagram, &address).unwrap();
    }
    scenario.rig.thaw_target();
    let dropped = |link: &Link| link.target_dropped_datagrams > 100;
    let link = scenario.wait_link("the count of what was dropped", dropped).await;
    let least = link.target_dropped_datagrams as f64;
    let table = backhaul(&scenario, &["link", "status"]);
    assert!(number(cell(&table, "dropped", "this target")) >= least, "{table}");
    assert_eq!(cell(&table, "dropped", "lab-agent"), "0");
    let counted = |metrics: &Metrics| metrics["backhaul_target_socket_dropped_datagrams"] >= least;
    wait_metrics(metrics, "the metric of what was dropped", counted).await;
}

/// What a probe of one second each way prints.
fn probe(scenario: &Scenario) -> String {
    let config = scenario.folder.path().join("agent.toml");
    let config = config.to_str().unwrap();
    backhaul(scenario, &["link", "probe", "--time", "1s", "--config", config])
}

/// What a line of a probe's says after its name.
fn said<'a>(report: &'a str, name: &str) -> &'a str {
    let line = report.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("there is no line of `{name}` in\n{report}")).trim()
}

/// Whoever sets up a firewall is told which of the two ports does not pass, and the rest is measured
/// over the other one all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_probe_names_the_port_that_nothing_answers_on() {
    let _alone = ONE_FLOOD_AT_A_TIME.lock().await;
    let mut scenario =
        Scenario::prepare(16 << 20, |spec| spec.target_options = "tcp = false".into()).unwrap();
    scenario.rig.start_target().unwrap();
    scenario.rig.wait("the target", STEP_TIME_MAX, |_| true).await.unwrap();
    let address = scenario.rig.client().status().await.unwrap().listen;
    let report = probe(&scenario);
    assert_explained(report.lines().map(|line| line[..12].trim()));
    assert!(said(&report, "quic").starts_with("reached in "), "{report}");
    let failure = format!("target {address} does not answer; check that it runs, and that UDP");
    assert!(said(&report, "tcp").starts_with(&failure), "{report}");
    assert!(said(&report, "MTU").ends_with(" bytes of UDP payload"), "{report}");
    assert!(number(said(&report, "up")) > 1.0 && number(said(&report, "down")) > 1.0, "{report}");
}

/// The same where it is UDP that does not pass; then the MTU is the kernel's, which has another
/// meaning.
#[tokio::test(flavor = "multi_thread")]
async fn a_probe_goes_over_tcp_where_udp_does_not_pass() {
    let _alone = ONE_FLOOD_AT_A_TIME.lock().await;
    let mut scenario = Scenario::prepare(16 << 20, |_| {}).unwrap();
    scenario.rig.start_target().unwrap();
    scenario.rig.wait("the target", STEP_TIME_MAX, |_| true).await.unwrap();
    let behind = scenario.rig.client().status().await.unwrap().listen;
    let wall = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let through = wall.local_addr().unwrap().to_string();
    let edit = |text: String| text.replacen(&behind, &through, 1);
    scenario.rig.edit_configuration("agent", edit).unwrap();
    tokio::spawn(async move {
        while let Ok((mut here, _)) = wall.accept().await {
            let Ok(mut there) = tokio::net::TcpStream::connect(&behind).await else { continue };
            tokio::spawn(async move { tokio::io::copy_bidirectional(&mut here, &mut there).await });
        }
    });
    let report = probe(&scenario);
    let failure = format!("target {through} does not answer; check that it runs, and that UDP");
    assert!(said(&report, "quic").starts_with(&failure), "{report}");
    assert!(said(&report, "tcp").starts_with("reached in "), "{report}");
    assert!(said(&report, "MTU").ends_with(" bytes with all headers"), "{report}");
    assert!(number(said(&report, "up")) > 1.0 && number(said(&report, "down")) > 1.0, "{report}");
}

/// What a probe of so long each way found.
fn measured(scenario: &Scenario, time: &str) -> serde_json::Value {
    let config = scenario.folder.path().join("agent.toml");
    let config = config.to_str().unwrap();
    let report =
        backhaul(scenario, &["--json", "link", "probe", "--time", time, "--config", config]);
    serde_json::from_str(&report).unwrap()
}

/// Each verdict was made of figures in a table only. Between two ends on one host nothing but their processors
/// is the limit; whoever is told so need not buy a line.
#[tokio::test(flavor = "multi_thread")]
async fn a_probe_whose_limit_is_a_processor_says_so() {
    let _alone = ONE_FLOOD_AT_A_TIME.lock().await;
    let mut scenario = Scenario::prepare(16 << 20, |_| {}).unwrap();
    scenario.rig.start_target().unwrap();
    scenario.rig.wait("the target", STEP_TIME_MAX, |_| true).await.unwrap();
    assert_says(|| measured(&scenario, "2s"), "cpu");
}

/// Fails unless one of some probes says that this is the limit. Beside other tests, or where the hypervisor takes
/// processors away, a process may get less of a core than it would take: once none of three said `cpu`.
fn assert_says(probe: impl Fn() -> serde_json::Value, limit: &str) {
    let stolen = Stolen::from_now();
    let mut report = serde_json::Value::Null;
    for _ in 0..ATTEMPTS {
        report = probe();
        if report["limit"] == limit {
            return;
        }
    }
    assert!(stolen.share() > SHARE_MAX, "{report}");
    println!("skipped: the hypervisor took {:.0} % of the processors", stolen.share() * 100.0);
}

/// Nor would a faster line help where the store is the slower of the two.
#[tokio::test(flavor = "multi_thread")]
async fn a_probe_whose_limit_is_the_store_says_so() {
    const STORE_BYTES: u64 = 5_000_000;
    if !is_root() {
        return;
    }
    let _alone = ONE_FLOOD_AT_A_TIME.lock().await;
    let mut scenario = Scenario::prepare(16 << 20, |spec| {
        spec.link = Some("100mbit,5ms".parse().unwrap());
    })
    .unwrap();
    // Dropped before the scenario, which would wait for the target.
    let Some(disk) = StoreDisk::mount(&scenario.folder.path().join("store")) else { return };
    scenario.rig.start_target().unwrap();
    scenario.rig.wait("the target", STEP_TIME_MAX, |_| true).await.unwrap();
    if !disk.slow(STORE_BYTES) {
        return;
    }
    let report = scenario.probe("2s");
    assert_eq!(report["limit"], "disk", "{report}");
    let found = report["disk_bytes_per_second"].as_f64().unwrap() / STORE_BYTES as f64;
    assert!((0.7..1.3).contains(&found), "{report}");
}

/// A path that holds more than the least window: 20 MB under way would fill it.
#[tokio::test(flavor = "multi_thread")]
async fn a_probe_whose_limit_is_the_window_says_so() {
    if !is_root() {
        return;
    }
    let _alone = ONE_FLOOD_AT_A_TIME.lock().await;
    let mut scenario = Scenario::prepare(16 << 20, |spec| {
        spec.link = Some("200mbit,400ms".parse().unwrap());
        spec.agent_options = "link_window = \"16 MiB\"\n".into();
        spec.target_options = spec.agent_options.clone();
    })
    .unwrap();
    scenario.rig.start_target().unwrap();
    scenario.rig.wait("the target", STEP_TIME_MAX, |_| true).await.unwrap();
    assert_says(|| scenario.probe("10s"), "window");
}
