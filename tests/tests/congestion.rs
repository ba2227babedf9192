//! A congestion control that was chosen instead of the usual one.

use std::time::Instant;

use backhaul_api::Machine;
use backhaul_tests::{STEP_TIME_MAX, Scenario, is_root};

/// A machine of so many bytes that nothing compresses, over `line`, whose agent was told to use `congestion`
/// and says so.
async fn begin(bytes: u64, line: &str, congestion: &str) -> Scenario {
    let over = |spec: &mut backhaul_lab::rig::RigSpec| {
        spec.link = Some(line.parse().unwrap());
        spec.transport = "quic".into();
    };
    let mut scenario = Scenario::prepare_noise(bytes, 92, over).unwrap();
    let choose = |text: String| format!("congestion = \"{congestion}\"\n{text}");
    scenario.rig.edit_configuration("agent", choose).unwrap();
    scenario.start().unwrap();
    let begun = |machine: &Machine| machine.received_plain_bytes > 0;
    scenario.rig.wait("the first batch", STEP_TIME_MAX, begun).await.unwrap();
    // The agent tells of its link every second.
    let deadline = Instant::now() + STEP_TIME_MAX;
    loop {
        let links = scenario.rig.client().links().await.unwrap();
        let [link] = links.as_slice() else { panic!("{links:?}") };
        if !link.congestion.is_empty() {
            assert_eq!(link.congestion, congestion);
            return scenario;
        }
        assert!(Instant::now() < deadline, "{link:?}");
    }
}

/// A rate that was bought is used, not more, and no loss takes it away: Cubic would have 2 Mbit/s here
/// (1.22 × 1,420 bytes ÷ 40 ms ÷ √3 %).
#[tokio::test(flavor = "multi_thread")]
async fn a_rate_that_is_fixed_is_kept_over_a_line_that_loses() {
    const MBIT: f64 = 24.0;
    if !is_root() {
        return;
    }
    let mut scenario = begin(32 << 20, "60mbit,20ms,3%", "fixed 24 Mbit/s").await;
    let sent = |scenario: &Scenario| scenario.rig.link().unwrap().stats().up.entered_bytes;
    let (since, before) = (Instant::now(), sent(&scenario));
    let first = scenario.rig.client().machine("lab").await.unwrap();
    let enough =
        |machine: &Machine| machine.received_plain_bytes > first.received_plain_bytes + (16 << 20);
    scenario.rig.wait("16 MiB more", STEP_TIME_MAX, enough).await.unwrap();
    let (took, bytes) = (since.elapsed().as_secs_f64(), sent(&scenario) - before);
    let mbit = bytes as f64 * 8e-6 / took;
    println!("{mbit:.1} of {MBIT} Mbit/s over {took:.1} s");
    // Its window has a margin of 5 %, and two packets.
    assert!(mbit < MBIT * 1.08, "{mbit} Mbit/s");
    // A busy host takes more than any line; what Cubic would have is far below.
    assert!(mbit > MBIT * 0.6, "{mbit} Mbit/s");
    scenario.wait_consistent().await.unwrap();
    scenario.fail_over().await.unwrap();
    scenario.compare().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn cubic_brings_a_machine_home() {
    if !is_root() {
        return;
    }
    let mut scenario = begin(8 << 20, "40mbit,10ms", "cubic").await;
    scenario.wait_consistent().await.unwrap();
    scenario.fail_over().await.unwrap();
    scenario.compare().unwrap();
}
