//! What is wrong is said in one sentence that names it, and costs nothing.

use std::process::Command;
use std::time::Duration;

use backhaul_api::{ClientError, FailoverRequest, Machine};
use backhaul_lab::rig::MACHINE;
use backhaul_tests::{STEP_TIME_MAX, Scenario};

const DISK_BYTES: u64 = 16 << 20;

fn latest() -> FailoverRequest {
    FailoverRequest { to: "latest".into(), without_shutdown: false, drain_timeout_seconds: 1.0 }
}

fn code(error: ClientError) -> String {
    match error {
        ClientError::Refused(failure) => failure.code,
        other => panic!("{other}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn failover_needs_a_known_machine_a_point_and_the_right_direction() {
    let mut scenario = Scenario::prepare(DISK_BYTES, |_| {}).unwrap();
    scenario.rig.start_target().unwrap();
    scenario.rig.wait("the target", STEP_TIME_MAX, |_| true).await.unwrap();
    let client = scenario.rig.client().clone();
    let refused = client.failover("nobody", &latest()).await.unwrap_err();
    assert!(refused.to_string().contains("there is no machine `nobody` here"), "{refused}");
    assert_eq!(code(client.failover(MACHINE, &latest()).await.unwrap_err()), "no-recovery-point");
    assert_eq!(code(client.cancel(MACHINE).await.unwrap_err()), "not-failed-over");
    assert_eq!(code(client.tag(MACHINE).await.unwrap_err()), "agent-away");
    let bad = FailoverRequest { to: "yesterday".into(), ..latest() };
    assert_eq!(code(client.failover(MACHINE, &bad).await.unwrap_err()), "unknown-point");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_of_another_site_is_refused_in_words() {
    let mut scenario = Scenario::prepare(DISK_BYTES, |_| {}).unwrap();
    let mut other = Scenario::prepare(DISK_BYTES, |_| {}).unwrap();
    for name in ["ca.pem", "lab-agent.pem", "lab-agent.key"] {
        let stolen = scenario.folder.path().join("agent-pki");
        std::fs::create_dir_all(&stolen).unwrap();
        std::fs::copy(other.folder.path().join("pki").join(name), stolen.join(name)).unwrap();
    }
    let path = scenario.folder.path().join("agent.toml");
    let text = std::fs::read_to_string(&path).unwrap().replace("/pki/", "/agent-pki/");
    std::fs::write(&path, text).unwrap();
    scenario.start().unwrap();
    scenario.rig.wait_log("agent", "do not trust each other").await.unwrap();
    // rustls called it "invalid peer certificate: UnknownIssuer", which names no file and no mend.
    let mend = "was not issued by the CA in";
    scenario.rig.wait_log("agent", mend).await.unwrap();
    let log = std::fs::read_to_string(scenario.folder.path().join("agent.log")).unwrap();
    assert!(log.contains("agent-pki/ca.pem") && !log.contains("unexpected error"), "{log}");
    other.rig.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_of_another_agent_is_not_touched() {
    let mut scenario = Scenario::prepare(DISK_BYTES, |_| {}).unwrap();
    let path = scenario.folder.path().join("master-target.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let text = text.replace("agent = \"lab-agent\"", "agent = \"other-agent\"");
    std::fs::write(&path, text).unwrap();
    scenario.start().unwrap();
    let sentence = "machine lab is enrolled to agent other-agent, not to lab-agent";
    scenario.rig.wait_log("agent", sentence).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_the_target_does_not_know_is_named() {
    let mut scenario = Scenario::prepare(DISK_BYTES, |_| {}).unwrap();
    let path = scenario.folder.path().join("agent.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("name = \"lab\"", "name = \"web01\"")).unwrap();
    scenario.start().unwrap();
    scenario.rig.wait_log("agent", "this target knows no machine `web01`").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_changed_its_size_is_refused_with_both_sizes() {
    let mut scenario = Scenario::prepare(DISK_BYTES, |_| {}).unwrap();
    scenario.start().unwrap();
    scenario.wait_consistent().await.unwrap();
    scenario.rig.kill_agent();
    let disk = std::fs::File::options().write(true).open(&scenario.protected).unwrap();
    disk.set_len(DISK_BYTES * 2).unwrap();
    scenario.rig.start_agent().unwrap();
    let sentence = "changed its size from 16777216 to 33554432 bytes";
    scenario.rig.wait_log("agent", sentence).await.unwrap();
    // The disks that were there are still a prefix, and can be failed over to. The sentence was only
    // in the logs, where nobody looked who asked how the machine is.
    let told = |machine: &Machine| !machine.connected && machine.trouble.contains(sentence);
    scenario.rig.wait("the complaint", Duration::from_secs(60), told).await.unwrap();
    assert!(!scenario.fail_over().await.unwrap().failover.unwrap().source_drained);
}

/// What the configuration names was looked at one thing after the other, and only the first that is
/// missing was said.
#[test]
fn everything_that_a_configuration_names_and_is_missing_is_shown_at_once() {
    let scenario = Scenario::prepare(DISK_BYTES, |_| {}).unwrap();
    let folder = scenario.folder.path();
    std::fs::remove_file(&scenario.protected).unwrap();
    std::fs::remove_file(folder.join("pki/lab-agent.key")).unwrap();
    let output = Command::new(backhaul_tests::programs().join("backhaul-agent"))
        .args(["check", "--config"])
        .arg(folder.join("agent.toml"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(said.contains("lab-agent.key"), "{said}");
    assert!(said.contains("protected.raw"), "{said}");
}

#[test]
fn every_mistake_of_a_configuration_is_shown_at_once() {
    let scenario = Scenario::prepare(DISK_BYTES, |_| {}).unwrap();
    let path = scenario.folder.path().join("agent.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let text = text.replace("target = ", "tarket = ").replace("[nbd]", "[nbd]\ntcp = \"here\"");
    std::fs::write(&path, text).unwrap();
    let output = Command::new(backhaul_tests::programs().join("backhaul-agent"))
        .args(["check", "--config"])
        .arg(&path)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(said.contains("`target` is missing"), "{said}");
    assert!(said.contains("did you mean `target`?"), "{said}");
    assert!(said.contains("`nbd.tcp`"), "{said}");
}
