//! Peers that are not what they should be: of another version, or broken.

use std::path::Path;
use std::sync::Arc;

use backhaul_api::Machine;
use backhaul_proto::batch::{Compression, Compressor, PlainBatch, Reference};
use backhaul_proto::id::{BatchSeq, DiskIndex, Generation, MachineIndex};
use backhaul_proto::identity::{Identity, IdentityFiles, Role};
use backhaul_proto::link::{
    ConnectOptions, Connection, FrameReceiver, FrameSender, Listener, TransportChoice, connect,
};
use backhaul_proto::message::{
    AgentMessage, Code, DiskHello, HashRequest, Hello, MachineHello, Refusal, Standing,
    TargetMessage, agent_message, target_message,
};
use backhaul_proto::quic::TransportOptions;
use backhaul_proto::version::{VERSION_MAX, VERSION_MIN};
use backhaul_tests::{STEP_TIME_MAX, Scenario};
use bytes::Bytes;

const DISK_BYTES: u64 = 16 << 20;

fn identity(scenario: &Scenario, name: &str, role: Role) -> Identity {
    let pki = scenario.folder.path().join("pki");
    let files = IdentityFiles {
        ca: pki.join("ca.pem"),
        cert: pki.join(format!("{name}.pem")),
        key: pki.join(format!("{name}.key")),
    };
    Identity::load(&files, role).unwrap()
}

fn setting(configuration: &Path, name: &str) -> String {
    let text = std::fs::read_to_string(configuration).unwrap();
    let line = text.lines().find(|line| line.starts_with(&format!("{name} ="))).unwrap();
    line.split('"').nth(1).unwrap().to_owned()
}

/// An agent of this test's own making.
struct FakeAgent {
    connection: Connection,
    sender: FrameSender,
    receiver: FrameReceiver,
    sync: (FrameSender, FrameReceiver),
}

impl FakeAgent {
    async fn connect(scenario: &Scenario) -> Self {
        let address = setting(&scenario.folder.path().join("agent.toml"), "target");
        let identity = Arc::new(identity(scenario, "lab-agent", Role::Agent));
        let options = ConnectOptions {
            choice: TransportChoice::Quic,
            expected: Some("lab-target".parse().unwrap()),
            transport: TransportOptions::default(),
            lan_over_tcp: false,
            udp_silent: false,
        };
        let connection = connect(&address, &identity, &options).await.unwrap();
        let (sender, receiver) = connection.open_control().await.unwrap();
        let sync = connection.open_sync().await.unwrap();
        Self { connection, sender, receiver, sync }
    }

    async fn hello(&mut self, versions: (u32, u32)) -> target_message::Kind {
        let disk = DiskHello { name: "disk0".into(), size_bytes: DISK_BYTES };
        let machine =
            MachineHello { name: "lab".into(), generation: 7, disks: vec![disk], acked_batch: 0 };
        let hello = Hello {
            version_min: versions.0,
            version_max: versions.1,
            software: "9.9".into(),
            machines: vec![machine],
            ended_machines: Vec::new(),
        };
        let kind = Some(agent_message::Kind::Hello(hello));
        self.sender.send(&AgentMessage { kind }).await.unwrap();
        self.receiver.recv::<TargetMessage>().await.unwrap().unwrap().kind.unwrap()
    }
}

/// One batch of one write, as it travels.
fn batch(seq: u64, fill: u8) -> Vec<u8> {
    let data = Bytes::from(vec![fill; 4096]);
    let plain = PlainBatch::of_one_write(Generation(7), BatchSeq(seq), 4096 * seq, data);
    let mut compressor = Compressor::default();
    plain.encode(Compression::Off, &mut compressor).chunks(MachineIndex(0)).concat()
}

/// The target once closed the connection as soon as its refusal was handed to the transport, and
/// the agent saw a lost connection instead of the sentence.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_of_a_newer_version_is_told_which_to_update() {
    let mut scenario = Scenario::prepare(DISK_BYTES, |_| {}).unwrap();
    scenario.rig.start_target().unwrap();
    scenario.rig.wait("the target", STEP_TIME_MAX, |_| true).await.unwrap();
    let mut agent = FakeAgent::connect(&scenario).await;
    let answer = agent.hello((VERSION_MAX.0 + 1, VERSION_MAX.0 + 3)).await;
    let target_message::Kind::Refused(refusal) = answer else { panic!("{answer:?}") };
    assert_eq!(refusal.code(), Code::Version);
    assert!(refusal.sentence.contains("update the older of the two"), "{}", refusal.sentence);
    // The real one is welcome on the same target.
    scenario.rig.start_agent().unwrap();
    scenario.wait_consistent().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_says_why_a_target_of_another_version_refuses_it() {
    let mut scenario = Scenario::prepare(DISK_BYTES, |_| {}).unwrap();
    let address = setting(&scenario.folder.path().join("agent.toml"), "target");
    let target = identity(&scenario, "lab-target", Role::Target);
    let options = TransportOptions::default();
    let listener =
        Listener::bind(address.parse().unwrap(), &target, &options, false).await.unwrap();
    scenario.rig.start_agent().unwrap();
    let connection = listener.accept().await.unwrap().finish().await.unwrap().unwrap();
    let (mut sender, mut receiver) = connection.accept_control().await.unwrap();
    receiver.recv::<AgentMessage>().await.unwrap().unwrap();
    let sentence = "speak version 9; update the agent".to_owned();
    let refusal = Refusal { code: Code::Version.into(), sentence };
    let kind = Some(target_message::Kind::Refused(refusal));
    sender.send(&TargetMessage { kind }).await.unwrap();
    scenario.rig.wait_log("agent", "speak version 9; update the agent").await.unwrap();
}

/// Bits flipped in a batch's data, in its table and in its header: the connection is dropped with
/// the batch's number, nothing of it reaches the journal, and what came before it stays.
#[tokio::test(flavor = "multi_thread")]
async fn a_corrupt_batch_is_named_and_not_journalled() {
    for (at, sentence) in [
        (128 + 16 + 1000, "batch 2: the batch's body is damaged: its blake3 hash does not match"),
        (128 + 3, "batch 2"),
        (0, "do not start a batch"),
    ] {
        let mut scenario = Scenario::prepare(DISK_BYTES, |_| {}).unwrap();
        scenario.rig.start_target().unwrap();
        scenario.rig.wait("the target", STEP_TIME_MAX, |_| true).await.unwrap();
        let mut agent = FakeAgent::connect(&scenario).await;
        let answer = agent.hello((VERSION_MIN.0, VERSION_MAX.0)).await;
        let target_message::Kind::Welcome(welcome) = answer else { panic!("{answer:?}") };
        assert_eq!(welcome.machines[0].standing(), Standing::Replicate);
        agent.connection.send_batch(vec![batch(1, 0x11).into()]).await.unwrap();
        let acked = agent.receiver.recv::<TargetMessage>().await.unwrap().unwrap();
        let Some(target_message::Kind::Ack(ack)) = acked.kind else { panic!("{acked:?}") };
        assert_eq!(ack.durable_batch, 1);
        let mut broken = batch(2, 0x22);
        broken[at] ^= 0x40;
        // The target may close the connection before its transport has acknowledged all of the batch.
        let _ = agent.connection.send_batch(vec![broken.into()]).await;
        let reason = agent.connection.closed().await;
        assert!(reason.contains(sentence), "{at}: {reason}");

        // The same agent comes again, and sends what was not acknowledged.
        let mut agent = FakeAgent::connect(&scenario).await;
        let answer = agent.hello((VERSION_MIN.0, VERSION_MAX.0)).await;
        let target_message::Kind::Welcome(welcome) = answer else { panic!("{answer:?}") };
        assert_eq!(welcome.machines[0].durable_batch, 1);
        agent.connection.send_batch(vec![batch(2, 0x22).into()]).await.unwrap();
        let whole = |machine: &Machine| machine.received_plain_bytes > 8192;
        scenario.rig.wait("the batch", STEP_TIME_MAX, whole).await.unwrap();
    }
}

/// A batch in a control message is journalled as any other, once it is small, sound and without references.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_in_a_control_message_is_one_or_ends_the_session() {
    let of = |seq: u64, bytes: usize, references: Vec<Reference>| {
        let data = Bytes::from(vec![0x33; bytes]);
        let plain = PlainBatch::of_one_write(Generation(7), BatchSeq(seq), 4096 * seq, data);
        let batch = plain.encode_folded(references, Compression::Off, &mut Compressor::default());
        batch.chunks(MachineIndex(0)).concat()
    };
    let small = of(2, 512, Vec::new());
    let mut flipped = small.clone();
    flipped[128 + 16 + 100] ^= 1;
    let elsewhere = Reference { at_bytes: 0, len_bytes: 4096, disk: DiskIndex(0), offset_bytes: 0 };
    for (bad, sentence) in [
        (flipped, "batch 2: the batch's body is damaged: its blake3 hash does not match"),
        (small[..64].to_vec(), "a control message holds less than a batch"),
        (small[..small.len() - 1].to_vec(), "a control message holds less than a batch"),
        ([&small[..], &[0]].concat(), "more bytes follow a batch"),
        (of(2, 4096, Vec::new()), "a batch of 4240 bytes came in a control message"),
        (of(2, 4096, vec![elsewhere]), "batch 2 came with references in a control message"),
    ] {
        let mut scenario = Scenario::prepare(DISK_BYTES, |_| {}).unwrap();
        scenario.rig.start_target().unwrap();
        scenario.rig.wait("the target", STEP_TIME_MAX, |_| true).await.unwrap();
        let mut agent = FakeAgent::connect(&scenario).await;
        agent.hello((VERSION_MIN.0, VERSION_MAX.0)).await;
        let say = |bytes: Vec<u8>| {
            let kind = Some(agent_message::Kind::Batch(bytes.into()));
            AgentMessage { kind }
        };
        agent.sender.send(&say(of(1, 512, Vec::new()))).await.unwrap();
        let acked = agent.receiver.recv::<TargetMessage>().await.unwrap().unwrap();
        let Some(target_message::Kind::Ack(ack)) = acked.kind else { panic!("{acked:?}") };
        assert_eq!(ack.durable_batch, 1);
        agent.sender.send(&say(bad)).await.unwrap();
        let reason = agent.connection.closed().await;
        assert!(reason.contains(sentence), "{reason}");
    }
}

/// Every question took a task and an answer that nobody read, as many as an agent cared to send, of an
/// agent that the target trusts no further than its machines.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_asks_without_end_is_sent_away() {
    let mut scenario = Scenario::prepare(DISK_BYTES, |_| {}).unwrap();
    scenario.rig.start_target().unwrap();
    scenario.rig.wait("the target", STEP_TIME_MAX, |_| true).await.unwrap();
    let mut agent = FakeAgent::connect(&scenario).await;
    agent.hello((VERSION_MIN.0, VERSION_MAX.0)).await;
    let asking = async {
        // Of a batch that never comes, so that none of them is answered.
        let question = HashRequest { regions: 1, after_batch: u64::MAX, ..HashRequest::default() };
        while agent.sync.0.send(&question).await.is_ok() {}
    };
    let (_, reason) = tokio::join!(asking, agent.connection.closed());
    assert!(reason.contains("asked 1024 questions at a time"), "{reason}");
    // The target goes on.
    scenario.rig.start_agent().unwrap();
    scenario.wait_consistent().await.unwrap();
}
