//! The link: its ceilings, its status, and TCP where UDP does not pass.

use std::time::Instant;

use backhaul_api::{Consistency, Link, Machine};
use backhaul_lab::random::Random;
use backhaul_lab::rig::RigSpec;
use backhaul_lab::workload::WorkloadSpec;
use backhaul_tests::{STEP_TIME_MAX, Scenario, is_root};

/// A ceiling holds from the first batch on, and is changed while the machine replicates, over the
/// same connection.
#[tokio::test(flavor = "multi_thread")]
async fn a_machines_ceiling_holds_and_is_lifted_without_a_reconnect() {
    const RATE_BYTES: u64 = 2_000_000;
    let mut scenario = Scenario::prepare_noise(24 << 20, 81, |_| {}).unwrap();
    let limited = |text: String| {
        text.replace(
            "[[machine]]\n",
            "[[machine]]\nlimit = [\"16 Mbit/s daily 00:00-24:00 UTC\"]\n",
        )
    };
    scenario.rig.edit_configuration("agent", limited).unwrap();
    scenario.start().unwrap();
    let begun = |machine: &Machine| machine.received_plain_bytes > 0;
    let first = scenario.rig.wait("the first batch", STEP_TIME_MAX, begun).await.unwrap();
    let since = Instant::now();
    let enough = |machine: &Machine| {
        machine.received_plain_bytes > first.received_plain_bytes + 3 * RATE_BYTES
    };
    let later = scenario.rig.wait("three seconds' worth", STEP_TIME_MAX, enough).await.unwrap();
    let bytes = later.received_plain_bytes - first.received_plain_bytes;
    // A batch that was under way at the beginning counts as well.
    let least = (bytes - (2 << 20)) as f64 / RATE_BYTES as f64;
    let took = since.elapsed().as_secs_f64();
    assert!(took > least, "{bytes} bytes in {took} s are more than 16 Mbit/s");
    assert_eq!(later.consistency, Consistency::Syncing);

    let lifted = |text: String| text.replace("[\"16 Mbit/s daily 00:00-24:00 UTC\"]", "[]");
    scenario.rig.edit_configuration("agent", lifted).unwrap();
    scenario.rig.reload_agent();
    scenario.rig.wait_log("agent", "the limits were read again").await.unwrap();
    let whole = scenario.wait_consistent().await.unwrap();
    let left = whole.received_plain_bytes - later.received_plain_bytes;
    assert!(left > 4 << 20, "the ceiling was not there to be lifted: only {left} bytes were left");
    let log = std::fs::read_to_string(scenario.folder.path().join("agent.log")).unwrap();
    assert_eq!(log.matches("connected target=").count(), 1, "{log}");
    scenario.fail_over().await.unwrap();
    scenario.compare().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_of_a_link_tells_what_its_transport_knows() {
    let mut scenario = Scenario::prepare(16 << 20, |_| {}).unwrap();
    scenario.start().unwrap();
    let guest = scenario.start_guest(82, 8 << 20).await.unwrap();
    scenario.wait_consistent().await.unwrap();
    scenario.wait_received(24 << 20).await.unwrap();
    let links = scenario.rig.client().links().await.unwrap();
    let [link] = links.as_slice() else { panic!("{links:?}") };
    assert_eq!((link.agent.as_str(), link.transport.as_str()), ("lab-agent", "quic"), "{link:?}");
    assert_eq!(link.congestion, "auto");
    assert!(link.sent_bytes > 1 << 20 && link.rtt_seconds > 0.0, "{link:?}");
    assert!(link.mtu_bytes >= 1200 && link.window_bytes > 0, "{link:?}");
    assert!(link.target_receive_buffer_bytes > 0 && link.agent_receive_buffer_bytes > 0);
    assert_eq!((link.target_dropped_datagrams, link.ceiling_bytes_per_second), (0, None));
    let table = std::process::Command::new(backhaul_tests::programs().join("backhaul"))
        .arg("--socket")
        .arg(scenario.folder.path().join("api.sock"))
        .args(["link", "status"])
        .output()
        .unwrap();
    let table = String::from_utf8_lossy(&table.stdout);
    assert!(table.contains("lab-agent") && table.contains("quic, auto"), "{table}");
    assert!(table.contains("lab-agent: ") && table.contains(" went as references"), "{table}");
    scenario.fail_over().await.unwrap();
    guest.await.unwrap().unwrap();
}

/// A firewall that passes TCP only: the agent finds out by itself, says so, and the whole story
/// works, a killed target in the middle of it included.
#[tokio::test(flavor = "multi_thread")]
async fn where_udp_does_not_pass_tcp_brings_the_machine_home() {
    let auto = |spec: &mut RigSpec| spec.transport = "auto".into();
    let mut scenario = Scenario::prepare(48 << 20, auto).unwrap();
    let wall = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let through = wall.local_addr().unwrap().to_string();
    let mut behind = String::new();
    let edit = |text: String| {
        behind = text.split('"').nth(1).unwrap().to_owned();
        text.replacen(&behind, &through, 1)
    };
    scenario.rig.edit_configuration("agent", edit).unwrap();
    tokio::spawn(async move {
        while let Ok((mut here, _)) = wall.accept().await {
            let Ok(mut there) = tokio::net::TcpStream::connect(&behind).await else { continue };
            tokio::spawn(async move { tokio::io::copy_bidirectional(&mut here, &mut there).await });
        }
    });
    scenario.start().unwrap();
    let guest = scenario.start_guest(83, 8 << 20).await.unwrap();
    scenario.rig.wait_log("agent", "nothing answers over UDP: TCP is used").await.unwrap();
    scenario.wait_consistent().await.unwrap();
    scenario.rig.kill_target();
    scenario.rig.start_target().unwrap();
    scenario.wait_received(4 << 20).await.unwrap();
    scenario.wait_consistent().await.unwrap();
    let links = scenario.rig.client().links().await.unwrap();
    assert_eq!(links[0].transport, "tcp", "{links:?}");
    let done = scenario.fail_over().await.unwrap();
    assert_eq!(done.repeated_batches, 0);
    assert!(done.failover.unwrap().source_drained);
    guest.await.unwrap().unwrap();
    scenario.compare().unwrap();
}

/// Whether the agent found the target near. A host that is busy with other tests measures a longer way
/// now and then, and QUIC is right then.
async fn took_tcp(scenario: &mut Scenario) -> bool {
    scenario.rig.wait_log("agent", "connected target=").await.unwrap();
    let log = std::fs::read_to_string(scenario.folder.path().join("agent.log")).unwrap();
    let took = log.contains("transport=tcp");
    if !took {
        println!("skipped: this host was too busy for its own loopback to count as near");
    }
    took
}

/// A cable goes bad in a LAN in which TCP was chosen; then QUIC carries the machine home.
#[tokio::test(flavor = "multi_thread")]
async fn a_lan_that_begins_to_lose_packets_is_none_for_tcp() {
    if !is_root() {
        return;
    }
    let mut scenario = Scenario::prepare(128 << 20, |spec| {
        spec.link = Some("100mbit,0ms".parse().unwrap());
        spec.transport = "auto".into();
    })
    .unwrap();
    scenario.start().unwrap();
    let guest = scenario.start_guest(85, 8 << 20).await.unwrap();
    scenario.wait_received(8 << 20).await.unwrap();
    if !took_tcp(&mut scenario).await {
        return;
    }
    scenario.rig.set_link("100mbit,0ms,3%".parse().unwrap()).unwrap();
    for end in ["agent", "master-target"] {
        scenario.rig.wait_log(end, "QUIC is used instead").await.unwrap();
    }
    scenario.rig.wait_log("agent", "transport=quic").await.unwrap();
    scenario.wait_consistent().await.unwrap();
    scenario.fail_over().await.unwrap();
    guest.await.unwrap().unwrap();
    scenario.compare().unwrap();
}

/// Both hosts send jumbo frames, and the switch between them drops those without a word. TCP passed its
/// handshake there, and nothing after it: the sync stood still for good while heartbeats went on.
#[tokio::test(flavor = "multi_thread")]
async fn a_lan_whose_switch_drops_jumbo_frames_stops_nobody() {
    if !is_root() {
        return;
    }
    let mut scenario = Scenario::prepare(64 << 20, |spec| {
        spec.link = Some("500mbit,0ms,0%,mtu=9000,blackhole=1500".parse().unwrap());
        spec.transport = "auto".into();
    })
    .unwrap();
    scenario.start().unwrap();
    if !took_tcp(&mut scenario).await {
        return;
    }
    let guest = scenario.start_guest(86, 8 << 20).await.unwrap();
    scenario.wait_consistent().await.unwrap();
    scenario.fail_over().await.unwrap();
    guest.await.unwrap().unwrap();
    scenario.compare().unwrap();
}

/// A ceiling is kept packet by packet over QUIC only, which an agent with one takes within a LAN too. One that
/// comes later ended TCP's session for that; it is kept batch by batch.
#[tokio::test(flavor = "multi_thread")]
async fn a_ceiling_ends_no_session_within_a_lan_and_begins_the_next_over_quic() {
    let auto = |spec: &mut RigSpec| spec.transport = "auto".into();
    let mut scenario = Scenario::prepare(16 << 20, auto).unwrap();
    scenario.start().unwrap();
    scenario.wait_consistent().await.unwrap();
    if !took_tcp(&mut scenario).await {
        return;
    }
    let limited = |text: String| format!("limit = [\"200 Mbit/s daily 00:00-24:00 UTC\"]\n{text}");
    scenario.rig.edit_configuration("agent", limited).unwrap();
    scenario.rig.reload_agent();
    let has_ceiling = |link: &Link| link.ceiling_bytes_per_second.is_some();
    let link = scenario.wait_link("the ceiling", has_ceiling).await;
    assert_eq!(link.transport, "tcp");
    let log = std::fs::read_to_string(scenario.folder.path().join("agent.log")).unwrap();
    assert_eq!(log.matches("connected target=").count(), 1, "{log}");
    scenario.rig.stop_agent();
    scenario.restart_agent().await.unwrap();
    scenario.rig.wait_log("agent", "transport=quic").await.unwrap();
    let guest = scenario.start_guest(87, 8 << 20).await.unwrap();
    scenario.wait_received(20 << 20).await.unwrap();
    scenario.fail_over().await.unwrap();
    guest.await.unwrap().unwrap();
    scenario.compare().unwrap();
}

/// How often a goal that chance or a busy host may miss is tried for.
const ATTEMPTS: usize = 3;

/// The probe finds out what the emulated link is like, while a machine replicates over it.
#[tokio::test(flavor = "multi_thread")]
async fn a_probe_tells_what_the_line_is_like() {
    if !is_root() {
        return;
    }
    let mut scenario = Scenario::prepare(16 << 20, |spec| {
        spec.link = Some("40mbit,40ms,1%".parse().unwrap());
    })
    .unwrap();
    scenario.start().unwrap();
    scenario.wait_consistent().await.unwrap();
    let mut report = scenario.probe("3s");
    assert_eq!(report["reach"][0]["transport"], "quic", "{report}");
    for reach in report["reach"].as_array().unwrap() {
        assert!(reach["seconds"].as_f64().unwrap() >= 0.08, "{report}");
    }
    let number = |name: &str| report[name].as_f64().unwrap();
    let least = report["rtt_seconds"][0].as_f64().unwrap();
    assert!((0.08..0.1).contains(&least), "{report}");
    // Both ends share a clock here; half a round trip is what can be told.
    assert!(number("clock_skew_seconds").abs() < 0.05, "{report}");
    assert!((1200.0..1420.0).contains(&number("mtu_bytes")), "{report}");
    for way in ["up_bytes_per_second", "down_bytes_per_second"] {
        // In three seconds, what was under way at either end of them counts.
        assert!((1e6..6e6).contains(&number(way)), "{way}: {report}");
    }
    assert!((0.001..0.1).contains(&number("lost_share")), "{report}");
    assert_eq!(report["limit"], "link", "{report}");
    // Control does not wait behind what fills the line: the goal of benches/REPORT.md. One time in fifty a frame is lost
    // with its copy, and those behind it wait a round trip; and this host may be busy with other tests.
    let goal = 1.5 * least + 0.005;
    let is_met = |report: &serde_json::Value| {
        let [median, worst] =
            [0, 1].map(|place| report["loaded_rtt_seconds"][place].as_f64().unwrap());
        println!("under load {median:.3} s, 99 of 100 below {worst:.3} s; goal {goal:.3} s");
        worst < goal
    };
    for _ in 1..ATTEMPTS {
        if is_met(&report) {
            break;
        }
        report = scenario.probe("3s");
    }
    assert!(is_met(&report), "{report}");
    scenario.fail_over().await.unwrap();
    scenario.compare().unwrap();
}

/// The worst line that anybody would still use: it loses, reorders and duplicates, and goes away
/// every other moment.
#[tokio::test(flavor = "multi_thread")]
async fn a_line_that_flaps_reorders_and_duplicates_brings_the_machine_home() {
    if !is_root() {
        return;
    }
    let mut scenario = Scenario::prepare(32 << 20, |spec| {
        let line = "100mbit,10ms,5%,reorder=20%,reorder_by=5ms,duplicate=2%,jitter=3ms";
        spec.link = Some(line.parse().unwrap());
    })
    .unwrap();
    scenario.start().unwrap();
    let guest = scenario.start_guest(85, 1 << 20).await.unwrap();
    let mut turns = tokio::time::interval(std::time::Duration::from_secs(1));
    for turn in 0..12 {
        turns.tick().await;
        scenario.rig.link().unwrap().blackout(turn % 2 == 1);
    }
    scenario.rig.link().unwrap().blackout(false);
    scenario.wait_consistent().await.unwrap();
    let (agent, target) = scenario.rig.memory_bytes_max();
    assert!(agent <= 256 << 20 && target <= 512 << 20, "{agent} {target}");
    let done = scenario.fail_over().await.unwrap();
    assert_eq!(done.repeated_batches, 0);
    let written = guest.await.unwrap().unwrap();
    assert!(written.longest.as_secs() < 5, "the guest waited {:?}", written.longest);
    scenario.compare().unwrap();
}

/// Batches that were on their way saw the end first, and the target said that a stream had ended. And on a busy host
/// the agent's process ended before its last packet was sent: the target heard nothing for ten seconds.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_stopped_under_load_is_said_to_be() {
    for (transport, connections, seen) in [("quic", "1", 1), ("quic", "3", 3), ("tcp", "1", 0)] {
        let mut scenario = Scenario::prepare(96 << 20, |spec| {
            spec.transport = transport.into();
            spec.agent_options = format!("connections = \"{connections}\"\n");
        })
        .unwrap();
        scenario.start().unwrap();
        let guest = scenario.start_guest(86, 48 << 20).await.unwrap();
        let all = |link: &Link| link.transport == transport && link.connections == seen;
        scenario.wait_link("all connections", all).await;
        scenario.wait_received(8 << 20).await.unwrap();
        scenario.rig.stop_agent();
        let _ = guest.await.unwrap();
        scenario.rig.wait_log("master-target", "the agent was stopped").await.unwrap();
    }
}

/// Headers of IPv4 and UDP.
const HEADER_BYTES: u32 = 28;

/// What VPNs leave of a packet: larger ones vanish in them without a word.
#[tokio::test(flavor = "multi_thread")]
async fn the_mtu_of_a_tunnel_is_found() {
    if !is_root() {
        return;
    }
    for tunnel_bytes in [1420, 1380, 1300] {
        let mut scenario = Scenario::prepare(16 << 20, |spec| {
            let line = format!("200mbit,2ms,mtu=1500,blackhole={tunnel_bytes}");
            spec.link = Some(line.parse().unwrap());
        })
        .unwrap();
        scenario.start().unwrap();
        let guest = scenario.start_guest(86, 2 << 20).await.unwrap();
        scenario.wait_consistent().await.unwrap();
        let most = tunnel_bytes - HEADER_BYTES;
        // The search ends when less than 20 bytes are at stake.
        let found = |link: &Link| (most - 20..=most).contains(&link.mtu_bytes);
        let link = scenario.wait_link("the MTU's discovery", found).await;
        assert_eq!(link.mtu_black_holes, 0, "{link:?}");
        scenario.fail_over().await.unwrap();
        guest.await.unwrap().unwrap();
        scenario.compare().unwrap();
    }
}

/// The route changes in the middle of a transfer, and the new one takes smaller packets only.
#[tokio::test(flavor = "multi_thread")]
async fn a_path_whose_mtu_shrinks_goes_on_and_says_so() {
    if !is_root() {
        return;
    }
    let mut scenario = Scenario::prepare(32 << 20, |spec| {
        spec.link = Some("200mbit,5ms,mtu=1420".parse().unwrap());
    })
    .unwrap();
    scenario.start().unwrap();
    let guest = scenario.start_guest(87, 4 << 20).await.unwrap();
    let wide = |link: &Link| link.mtu_bytes > 1300;
    scenario.wait_link("the MTU's discovery", wide).await;
    scenario.rig.set_link("200mbit,5ms,mtu=1420,blackhole=1300".parse().unwrap()).unwrap();
    let narrow = |link: &Link| link.mtu_black_holes > 0 && link.mtu_bytes <= 1300 - HEADER_BYTES;
    let link = scenario.wait_link("the black hole's discovery", narrow).await;
    let sent_bytes = link.sent_bytes + (4 << 20);
    scenario.wait_link("more data", |link| link.sent_bytes > sent_bytes).await;
    scenario.wait_consistent().await.unwrap();
    let log = std::fs::read_to_string(scenario.folder.path().join("agent.log")).unwrap();
    assert_eq!(log.matches("connected target=").count(), 1, "{log}");
    scenario.fail_over().await.unwrap();
    let written = guest.await.unwrap().unwrap();
    assert!(written.longest.as_secs() < 5, "the guest waited {:?}", written.longest);
    scenario.compare().unwrap();
}

/// The target hangs, for less and for more time than the transport waits: the guest goes on, memory
/// stays bounded, and when the target is back so is the stream, with what was not acknowledged only.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_hangs_is_gone_on_with_when_it_is_back() {
    const GUEST_RATE_BYTES: u64 = 24 << 20;
    for (seed, connection_survives) in [(88, true), (89, false)] {
        let mut scenario = Scenario::prepare(64 << 20, |_| {}).unwrap();
        scenario.start().unwrap();
        let ready = scenario.wait_consistent().await.unwrap();
        let client = scenario.rig.connect(0).await.unwrap();
        let workload = WorkloadSpec {
            ranges: std::iter::once(0..64 << 20).collect(),
            rate_bytes_per_second: Some(GUEST_RATE_BYTES),
            flush_every: 16,
            seed,
        };
        scenario.rig.freeze_target();
        let guest = scenario.rig.start_guest(client, workload, Some(1500)).unwrap();
        // All of it while nobody is there.
        let written = guest.await.unwrap().unwrap();
        assert!(written.longest.as_secs() < 5, "the guest waited {:?}", written.longest);
        if !connection_survives {
            scenario.rig.wait_log("agent", "no connection to the target").await.unwrap();
        }
        scenario.rig.thaw_target();
        let back = Instant::now();
        scenario.wait_received(ready.received_plain_bytes + 1).await.unwrap();
        println!("data came {:.1} s after the target was back", back.elapsed().as_secs_f64());
        assert!(back.elapsed().as_secs() < 2, "{:?}", back.elapsed());
        scenario.wait_consistent().await.unwrap();
        let (agent, target) = scenario.rig.memory_bytes_max();
        assert!(agent <= 256 << 20 && target <= 512 << 20, "{agent} {target}");
        let done = scenario.fail_over().await.unwrap();
        // Zeroes travel without data: the guest wrote more than came.
        let (came, most) = (done.received_plain_bytes, ready.received_plain_bytes + written.bytes);
        assert!(came < most + (1 << 20), "{came} bytes came where {most} were enough");
        assert_eq!(done.repeated_batches, 0);
        let log = std::fs::read_to_string(scenario.folder.path().join("agent.log")).unwrap();
        let connections = log.matches("connected target=").count();
        assert_eq!(connections == 1, connection_survives, "{log}");
        scenario.compare().unwrap();
    }
}

/// Blackouts shorter than the transport's patience, while the line is full: the transport's own probes
/// come ever more rarely, so after five seconds of dark data came four seconds late. And after the target
/// had been heard first, which acknowledges what it had received before the dark, its round-trip time
/// of six seconds put the next probe off by seven.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_short_blackout_in_the_middle_of_a_sync_data_comes_at_once() {
    data_comes_at_once_after_a_short_blackout(1).await;
}

/// The first of several that was heard had woken the link, and the others waited for their own timers.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_short_blackout_every_connection_of_a_link_goes_on_at_once() {
    data_comes_at_once_after_a_short_blackout(3).await;
}

async fn data_comes_at_once_after_a_short_blackout(connections: usize) {
    if !is_root() {
        return;
    }
    let mut scenario = Scenario::prepare_noise(96 << 20, 86, |spec| {
        spec.link = Some("40mbit,20ms,0.1%".parse().unwrap());
        spec.agent_options = format!("connections = \"{connections}\"\n");
    })
    .unwrap();
    scenario.start().unwrap();
    let all = |link: &Link| link.connections as usize == connections;
    scenario.wait_link("all connections", all).await;
    scenario.wait_received(4 << 20).await.unwrap();
    for dark_seconds in [2, 6] {
        scenario.rig.link().unwrap().blackout(true);
        // The length of the dark is the input of this test, not a wait for something to happen.
        let lasted = tokio::time::Duration::from_secs(dark_seconds);
        let end = tokio::time::Instant::now() + lasted;
        tokio::time::sleep_until(end).await;
        let before = scenario.rig.client().machine("lab").await.unwrap().received_plain_bytes;
        scenario.rig.link().unwrap().blackout(false);
        let back = Instant::now();
        scenario.wait_received(before + 1).await.unwrap();
        let late = back.elapsed();
        println!("after {dark_seconds} s of dark, data came {:.2} s late", late.as_secs_f64());
        assert!(late.as_secs_f64() < 2.0, "{late:?} after {dark_seconds} s of dark");
        scenario.wait_received(before + (4 << 20)).await.unwrap();
        let took = back.elapsed().as_secs_f64();
        println!("4 MiB took {took:.2} s");
        // Two seconds until the rate is back, and at four fifths of the line's from then on.
        assert!(took < 2.0 + f64::from(4 << 20) / (0.8 * 5e6), "{took} s for 4 MiB");
    }
}

/// The agent's host gets another address in the middle of a sync, as when a VPN is re-keyed; with
/// `dark_meanwhile` the line is cut until the agent has given its connection up. It takes so many
/// `connections`; but nothing that the target had is sent again, and the sync does not begin anew.
async fn gets_another_address(transport: &str, dark_meanwhile: bool, connections: usize) {
    if !is_root() {
        return;
    }
    const BYTES: u64 = 40 << 20;
    /// What was on its way at the move may be sent again: what of a batch had come, and what the line held.
    const UNDER_WAY_BYTES: u64 = 2 << 20;
    let mut scenario = Scenario::prepare_noise(BYTES, 90, |spec| {
        spec.link = Some("100mbit,10ms".parse().unwrap());
        spec.transport = transport.into();
    })
    .unwrap();
    scenario.start().unwrap();
    let begun = scenario.rig.wait("8 MiB", STEP_TIME_MAX, |m| m.received_plain_bytes > 8 << 20);
    let left = BYTES - begun.await.unwrap().received_plain_bytes;
    let link = scenario.rig.link().unwrap();
    let carried_before = link.stats().up.delivered_bytes;
    link.blackout(dark_meanwhile);
    let address = link.move_site_a().unwrap().to_string();
    if connections > 1 {
        scenario.rig.wait_log("agent", "no connection to the target").await.unwrap();
    }
    scenario.rig.link().unwrap().blackout(false);
    let moved = |link: &Link| link.address.split(':').next() == Some(&address);
    scenario.wait_link("the new address", moved).await;
    let done = scenario.wait_consistent().await.unwrap();
    let carried = scenario.rig.link().unwrap().stats().up.delivered_bytes - carried_before;
    println!("{transport}: {carried} bytes were carried after the move, for {left} of content");
    let most = left * 21 / 20 + UNDER_WAY_BYTES;
    assert!(carried < most, "{carried} bytes were carried where {most} were enough");
    let received = done.received_plain_bytes;
    assert!(received < BYTES + UNDER_WAY_BYTES, "{received} bytes came for {BYTES}");
    let log = std::fs::read_to_string(scenario.folder.path().join("agent.log")).unwrap();
    assert_eq!(log.matches("connected target=").count(), connections, "{log}");
    assert_eq!(log.matches("the sync is over").count(), 1, "{log}");
    assert!(!log.contains("new generation") && !log.contains("compared anew"), "{log}");
    assert_eq!(done.repeated_batches, 0);
    scenario.fail_over().await.unwrap();
    scenario.compare().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn quic_goes_on_from_another_address() {
    gets_another_address("quic", false, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn quic_that_was_given_up_resumes_from_another_address() {
    gets_another_address("quic", true, 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tcp_resumes_from_another_address() {
    gets_another_address("tcp", false, 2).await;
}

/// Words in no order, which compress and do not repeat.
fn text(seed: u64, len: usize) -> Vec<u8> {
    const WORDS: u64 = 4096;
    let mut random = Random::new(seed);
    let mut out = Vec::with_capacity(len + 16);
    while out.len() < len {
        let word = random.below(WORDS);
        out.extend_from_slice(format!("{:x} ", word.wrapping_mul(0x9e37_79b9) >> 8).as_bytes());
    }
    out.truncate(len);
    out
}

/// The slower the line, the harder the agent compresses; when the line is no bottleneck any more it
/// stops, and leaves the processors to others.
#[tokio::test(flavor = "multi_thread")]
async fn the_level_of_compression_follows_the_line() {
    const BYTES: usize = 96 << 20;
    let mut scenario = Scenario::prepare(BYTES as u64, |spec| {
        // A larger one takes all of the text, and has it encoded, before anything is known of the line.
        spec.agent_options = "queue = \"16 MiB\"".into();
    })
    .unwrap();
    std::fs::write(&scenario.protected, text(91, BYTES)).unwrap();
    let limited = |text: String| format!("limit = [\"20 Mbit/s daily 00:00-24:00 UTC\"]\n{text}");
    scenario.rig.edit_configuration("agent", limited).unwrap();
    scenario.start().unwrap();
    scenario.wait_received(1).await.unwrap();
    let link = scenario.wait_link("a high level", |link| link.compression_level >= 6).await;
    assert!(link.ceiling_bytes_per_second.is_some(), "{link:?}");
    let machine = scenario.rig.client().machine("lab").await.unwrap();
    let (plain, wire) = (machine.received_plain_bytes, machine.received_wire_bytes);
    assert!(plain > wire * 3 / 2, "{plain} bytes took {wire} on the wire");
    assert_eq!(machine.consistency, Consistency::Syncing, "there was enough to send");

    let lifted = |text: String| text.replace("[\"20 Mbit/s daily 00:00-24:00 UTC\"]", "[]");
    scenario.rig.edit_configuration("agent", lifted).unwrap();
    scenario.rig.reload_agent();
    let synced = scenario.wait_consistent().await.unwrap();
    let low = |link: &Link| link.compression_level <= 1;
    scenario.wait_link("a low level", low).await;
    let guest = scenario.start_guest(92, 2 << 20).await.unwrap();
    scenario.wait_received(synced.received_plain_bytes + (6 << 20)).await.unwrap();
    let link = scenario.wait_link("a link", |_| true).await;
    assert!(low(&link), "the line is fast, and so few writes do not fill it: {link:?}");
    scenario.fail_over().await.unwrap();
    guest.await.unwrap().unwrap();
    scenario.compare().unwrap();
}
