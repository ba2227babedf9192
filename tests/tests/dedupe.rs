//! Data that the target holds elsewhere travels as a reference: what that saves, and that no
//! reference, however wrong, changes what arrives.

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use backhaul_api::Machine;
use backhaul_lab::random::Random;
use backhaul_lab::rig::MACHINE;
use backhaul_proto::batch::{BatchKind, Compression, Compressor, PlainBatch, Reference};
use backhaul_proto::id::{BatchSeq, DiskIndex, Generation, MachineIndex};
use backhaul_proto::identity::{Identity, IdentityFiles, Role};
use backhaul_proto::link::{
    ConnectOptions, Connection, FrameReceiver, FrameSender, Listener, TransportChoice, connect,
};
use backhaul_proto::message::{
    Ack, AgentMessage, DiskHello, HashReply, HashRequest, Hello, MachineHello, MachineWelcome,
    Standing, TargetMessage, Welcome, agent_message, target_message,
};
use backhaul_proto::quic::TransportOptions;
use backhaul_proto::version::{VERSION_1, VERSION_2, VERSION_MAX, Version};
use backhaul_tests::metrics::{METRICS, metrics_address, scrape};
use backhaul_tests::{STEP_TIME_MAX, Scenario, compare};
use bytes::Bytes;

const MIB: usize = 1 << 20;

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    Random::new(seed).fill(&mut out);
    out
}

fn write(disk: &Path, offset: usize, data: &[u8]) {
    let disk = std::fs::File::options().write(true).open(disk).unwrap();
    disk.write_all_at(data, offset as u64).unwrap();
}

/// A link slow enough to be the bottleneck, without root.
fn slow(text: String, rate: &str) -> String {
    text.replacen("state_dir", &format!("limit = [\"{rate} daily 00:00-24:00 UTC\"]\nstate_dir"), 1)
}

/// A disk whose second half repeats its first half crosses the link with about half of its bytes.
/// The same disk without an index crosses it with all of them.
#[tokio::test(flavor = "multi_thread")]
async fn what_repeats_crosses_the_link_once() {
    const HALF: usize = 64 * MIB;
    let content = noise(91, HALF);
    let mut wire = Vec::new();
    for (index, transport) in [("32 MiB", "quic"), ("32 MiB", "tcp"), ("0 B", "quic")] {
        let mut scenario = Scenario::prepare(2 * HALF as u64, |spec| {
            spec.agent_options = format!("reference_index = \"{index}\"");
            spec.transport = transport.into();
        })
        .unwrap();
        write(&scenario.protected, 0, &content);
        write(&scenario.protected, HALF, &content);
        scenario.rig.edit_configuration("agent", |text| slow(text, "160 Mbit/s")).unwrap();
        scenario.start().unwrap();
        let synced = scenario.wait_consistent().await.unwrap();
        assert!(synced.received_plain_bytes >= 2 * HALF as u64, "{synced:?}");
        if index == "0 B" {
            assert_eq!(synced.referenced_bytes, 0);
        } else {
            assert!(synced.referenced_bytes > HALF as u64 * 9 / 10, "{synced:?}");
        }
        wire.push(synced.received_wire_bytes);
        scenario.fail_over().await.unwrap();
        scenario.compare().unwrap();
        println!("index {index}, {transport}: {} on the wire", synced.received_wire_bytes);
    }
    for with_index in &wire[..2] {
        assert!(*with_index < wire[2] * 55 / 100, "{wire:?}");
    }
}

/// A disk that is a copy of another one of its machine, neither of which repeats anything of itself:
/// the first one crosses the link, and hardly anything of the second.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_a_copy_of_another_hardly_crosses_the_link() {
    const BYTES: usize = 64 * MIB;
    let copy = tempfile::NamedTempFile::new().unwrap();
    let mut scenario = Scenario::prepare(BYTES as u64, |spec| {
        spec.disks.push(copy.path().to_owned());
    })
    .unwrap();
    let content = noise(98, BYTES);
    write(&scenario.protected, 0, &content);
    write(copy.path(), 0, &content);
    scenario.rig.edit_configuration("agent", |text| slow(text, "160 Mbit/s")).unwrap();
    scenario.start().unwrap();
    let synced = scenario.wait_consistent().await.unwrap();
    println!(
        "{} bytes of {BYTES} went as references, {} crossed the link",
        synced.referenced_bytes, synced.received_wire_bytes
    );
    assert!(synced.referenced_bytes > BYTES as u64 * 9 / 10, "{synced:?}");
    assert!(synced.received_wire_bytes < BYTES as u64 * 11 / 10, "{synced:?}");
    scenario.fail_over().await.unwrap();
    scenario.compare().unwrap();
    compare(copy.path(), &scenario.rig.image(1)).unwrap();
}

/// Two disks that are alike, a guest that writes over both halves of what is referred to while the
/// sync goes on, a target that is killed and an agent that is: in the end every byte is right.
#[tokio::test(flavor = "multi_thread")]
async fn references_survive_writes_restarts_and_several_disks() {
    const BYTES: usize = 48 * MIB;
    let second = tempfile::NamedTempFile::new().unwrap();
    second.as_file().set_len(BYTES as u64).unwrap();
    let mut scenario = Scenario::prepare(BYTES as u64, |spec| {
        spec.disks.push(second.path().to_owned());
    })
    .unwrap();
    let content = [noise(92, BYTES / 2), noise(92, BYTES / 2)].concat();
    write(&scenario.protected, 0, &content);
    write(second.path(), 0, &content[..BYTES - 5 * MIB]);
    write(second.path(), BYTES - 5 * MIB, &content[..5 * MIB]);
    scenario.rig.edit_configuration("agent", |text| slow(text, "80 Mbit/s")).unwrap();
    scenario.start().unwrap();
    let guest = scenario.start_guest(93, 2 << 20).await.unwrap();
    let referred = |machine: &Machine| machine.referenced_bytes > 4 << 20;
    scenario.rig.wait("references", STEP_TIME_MAX, referred).await.unwrap();
    scenario.rig.kill_target();
    scenario.rig.start_target().unwrap();
    scenario.rig.wait("more references", STEP_TIME_MAX, referred).await.unwrap();
    scenario.rig.kill_agent();
    // The guest's disk went away under it.
    guest.await.unwrap().unwrap_err();
    scenario.restart_agent().await.unwrap();
    let guest = scenario.start_guest(96, 2 << 20).await.unwrap();
    scenario.wait_consistent().await.unwrap();
    scenario.fail_over().await.unwrap();
    guest.await.unwrap().unwrap();
    scenario.compare().unwrap();
    compare(second.path(), &scenario.rig.image(1)).unwrap();
}

/// Batches that the agent sent again without references.
async fn asked_again(scenario: &mut Scenario) -> f64 {
    let metrics = scrape(metrics_address(scenario, "agent").await);
    let again = metrics.get("backhaul_agent_resent_batches_total{machine=\"lab\"}");
    again.copied().unwrap_or_default()
}

/// What a guest wrote and then copied crossed the link twice: only what a sync had sent was known.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_guest_wrote_and_copies_crosses_the_link_once() {
    const PIECES: usize = 16;
    const DISK: usize = 4 * PIECES * MIB;
    let mut scenario =
        Scenario::prepare(DISK as u64, |spec| spec.agent_options = METRICS.into()).unwrap();
    // The sync makes the line the bottleneck.
    write(&scenario.protected, 0, &noise(99, PIECES * MIB));
    scenario.rig.edit_configuration("agent", |text| slow(text, "80 Mbit/s")).unwrap();
    scenario.start().unwrap();
    scenario.wait_consistent().await.unwrap();
    let guest = scenario.rig.connect(0).await.unwrap();
    let file = Bytes::from(noise(100, PIECES * MIB));
    let [original, early, copy] = [1, 2, 3].map(|part| (part * PIECES * MIB) as u64);
    guest.write(original, file.clone(), false).await.unwrap();
    scenario.wait_received((2 * PIECES * MIB) as u64).await.unwrap();
    // It is in the journal and not on the image.
    guest.write(early, file.slice(..MIB), false).await.unwrap();
    scenario.rig.client().tag(MACHINE).await.unwrap();
    let before = scenario.rig.client().machine(MACHINE).await.unwrap();
    assert_eq!(before.referenced_bytes, 0);
    // The agent hears with the next point that one is on the image.
    for piece in 0..PIECES {
        let at = piece * MIB;
        guest.write(copy + at as u64, file.slice(at..at + MIB), false).await.unwrap();
        scenario.rig.client().tag(MACHINE).await.unwrap();
    }
    let after = scenario.rig.client().machine(MACHINE).await.unwrap();
    let wire_bytes = after.received_wire_bytes - before.received_wire_bytes;
    println!("{} of {PIECES} MiB as references, {wire_bytes} bytes", after.referenced_bytes >> 20);
    assert!(after.referenced_bytes >= (PIECES * MIB) as u64 / 2, "{after:?}");
    assert!(wire_bytes + after.referenced_bytes < (PIECES * MIB) as u64 * 11 / 10, "{after:?}");
    assert_eq!(asked_again(&mut scenario).await, 0.0);
    guest.disconnect().await;
    scenario.fail_over().await.unwrap();
    scenario.compare().unwrap();
}

/// A guest writes the same places again and again, some blocks of them unchanged, and now and then a point brings
/// it all to the image. The unchanged blocks were found at their own places, where the protected disk has what the
/// image does not have yet: every other such write was asked for again.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_over_in_place_is_never_asked_for_again() {
    const ROUNDS: u64 = 8;
    const AREAS: usize = 6;
    let mut scenario =
        Scenario::prepare(64 * MIB as u64, |spec| spec.agent_options = METRICS.into()).unwrap();
    write(&scenario.protected, 0, &noise(101, 16 * MIB));
    scenario.rig.edit_configuration("agent", |text| slow(text, "80 Mbit/s")).unwrap();
    scenario.start().unwrap();
    scenario.wait_consistent().await.unwrap();
    let guest = scenario.rig.connect(0).await.unwrap();
    let mut areas: Vec<_> = (0..AREAS as u64).map(|area| noise(102 + area, MIB)).collect();
    for round in 0..ROUNDS {
        for (area, content) in areas.iter_mut().enumerate() {
            // Of every eight blocks the first four are new; on every other round those of two rounds before.
            for (run, blocks) in content.chunks_mut(8 * 4096).enumerate() {
                let seed = (round % 2) << 32 | (area << 16 | run) as u64;
                blocks[..4 * 4096].copy_from_slice(&noise(seed, 4 * 4096));
            }
            let at = (16 * MIB + 2 * area * MIB) as u64;
            guest.write(at, Bytes::copy_from_slice(content), false).await.unwrap();
        }
        scenario.rig.client().tag(MACHINE).await.unwrap();
    }
    assert_eq!(asked_again(&mut scenario).await, 0.0);
    guest.disconnect().await;
    scenario.fail_over().await.unwrap();
    scenario.compare().unwrap();
}

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

/// Where the agent looks for its target.
fn address(scenario: &Scenario) -> String {
    let text = std::fs::read_to_string(scenario.folder.path().join("agent.toml")).unwrap();
    text.split('"').nth(1).unwrap().to_owned()
}

/// An agent of this test's own making.
struct FakeAgent {
    connection: Connection,
    sender: FrameSender,
    receiver: FrameReceiver,
    _sync: (FrameSender, FrameReceiver),
}

impl FakeAgent {
    async fn connect(scenario: &Scenario) -> Self {
        let identity = Arc::new(identity(scenario, "lab-agent", Role::Agent));
        let options = ConnectOptions {
            choice: TransportChoice::Quic,
            expected: Some("lab-target".parse().unwrap()),
            transport: TransportOptions::default(),
            lan_over_tcp: false,
            udp_silent: false,
        };
        let connection = connect(&address(scenario), &identity, &options).await.unwrap();
        let (sender, receiver) = connection.open_control().await.unwrap();
        let sync = connection.open_sync().await.unwrap();
        Self { connection, sender, receiver, _sync: sync }
    }

    async fn hear(&mut self) -> target_message::Kind {
        self.receiver.recv::<TargetMessage>().await.unwrap().unwrap().kind.unwrap()
    }

    async fn hello(&mut self) -> MachineWelcome {
        let disk = DiskHello { name: "disk0".into(), size_bytes: DISK_BYTES };
        let machine =
            MachineHello { name: "lab".into(), generation: 7, disks: vec![disk], acked_batch: 0 };
        let hello = Hello {
            version_min: VERSION_1.0,
            version_max: VERSION_2.0,
            software: "9.9".into(),
            machines: vec![machine],
            ended_machines: Vec::new(),
        };
        let kind = Some(agent_message::Kind::Hello(hello));
        self.sender.send(&AgentMessage { kind }).await.unwrap();
        match self.hear().await {
            target_message::Kind::Welcome(welcome) => {
                assert_eq!(welcome.version, VERSION_2.0);
                welcome.machines[0].clone()
            }
            other => panic!("{other:?}"),
        }
    }

    async fn send(&self, seq: u64, data: &[u8], references: Vec<Reference>) {
        let at = seq * MIB as u64;
        let data = Bytes::copy_from_slice(data);
        let mut plain = PlainBatch::of_one_write(Generation(7), BatchSeq(seq), at, data);
        plain.kind = BatchKind::Sync;
        let mut compressor = Compressor::default();
        let batch = plain.encode_folded(references, Compression::Off, &mut compressor);
        // It fails when the target closes meanwhile, which the caller hears of anyway.
        let _ = self.connection.send_batch(batch.chunks(MachineIndex(0))).await;
    }

    async fn acked(&mut self, batch: u64) {
        match self.hear().await {
            target_message::Kind::Ack(ack) => assert_eq!(ack.durable_batch, batch),
            other => panic!("{other:?}"),
        }
    }

    async fn asked_again(&mut self, batch: u64) {
        match self.hear().await {
            target_message::Kind::Resend(resend) => {
                assert_eq!((resend.machine, resend.generation, resend.batch), (0, 7, batch));
            }
            other => panic!("{other:?}"),
        }
    }
}

fn reference(len_bytes: usize, disk: u16, offset_bytes: u64) -> Vec<Reference> {
    let len_bytes = len_bytes as u32;
    vec![Reference { at_bytes: 0, len_bytes, disk: DiskIndex(disk), offset_bytes }]
}

/// Wrong content, outside the disk, no such disk, to itself: the target asks for the batch without
/// references, takes it then, and knows nothing else of it. An agent that does not listen is cut off.
#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_reference_costs_a_resend_and_nothing_else() {
    let mut scenario = Scenario::prepare(DISK_BYTES, |_| {}).unwrap();
    scenario.rig.start_target().unwrap();
    scenario.rig.wait("the target", STEP_TIME_MAX, |_| true).await.unwrap();
    let mut agent = FakeAgent::connect(&scenario).await;
    agent.hello().await;
    let data = noise(94, MIB / 2);
    let len = data.len();
    agent.send(1, &data, Vec::new()).await;
    agent.acked(1).await;
    agent.send(2, &data, reference(len, 0, MIB as u64)).await;
    agent.acked(2).await;
    let wrong = [
        reference(len, 0, MIB as u64 + 512),
        reference(len, 0, 5 * MIB as u64),
        reference(len, 0, DISK_BYTES - len as u64 + 1),
        reference(len, 9, 0),
        reference(len, 0, (62 << 40) - len as u64),
    ];
    for (seq, wrong) in (3..).zip(wrong) {
        agent.send(seq, &data, wrong).await;
        agent.asked_again(seq).await;
        agent.send(seq, &data, Vec::new()).await;
        agent.acked(seq).await;
    }
    let last = |machine: &Machine| machine.referenced_bytes > 0;
    let machine = scenario.rig.wait("the numbers", STEP_TIME_MAX, last).await.unwrap();
    assert!(machine.referenced_bytes < len as u64, "only one was a reference: {machine:?}");

    agent.send(8, &data, reference(len, 0, 9 * MIB as u64)).await;
    agent.asked_again(8).await;
    agent.send(8, &data, reference(len, 0, 9 * MIB as u64)).await;
    let reason = agent.connection.closed().await;
    assert!(reason.contains("though it was asked for without"), "{reason}");

    // After a reconnect it is begun anew; and what is there is what was sent.
    let mut agent = FakeAgent::connect(&scenario).await;
    assert_eq!(agent.hello().await.durable_batch, 7);
    agent.send(8, &data, reference(len, 0, MIB as u64)).await;
    agent.acked(8).await;
    scenario.rig.stop();
    let mut expected = vec![0; DISK_BYTES as usize];
    for seq in 1..=8 {
        expected[seq * MIB..seq * MIB + len].copy_from_slice(&data);
    }
    write(&scenario.protected, 0, &expected);
    scenario.compare().unwrap();
}

async fn fake_target(scenario: &Scenario) -> Listener {
    let identity = identity(scenario, "lab-target", Role::Target);
    let address = address(scenario).parse().unwrap();
    Listener::bind(address, &identity, &TransportOptions::default(), false).await.unwrap()
}

/// Takes what an agent sends and acknowledges it unseen, as a target of this version; returns how
/// many batches were folded, once `bytes` of data have come.
async fn take_as(version: Version, connection: &Connection, bytes: u64) -> usize {
    let (mut control_out, mut control_in) = connection.accept_control().await.unwrap();
    let (mut sync_out, mut sync_in) = connection.accept_sync().await.unwrap();
    let hello = control_in.recv::<AgentMessage>().await.unwrap().unwrap().kind.unwrap();
    let agent_message::Kind::Hello(hello) = hello else { panic!("{hello:?}") };
    assert_eq!((hello.version_min, hello.version_max), (VERSION_1.0, VERSION_MAX.0));
    let window_bytes = 32 << 20;
    let machine = MachineWelcome {
        standing: Standing::Replicate.into(),
        window_bytes,
        ..MachineWelcome::default()
    };
    let welcome = Welcome { version: version.0, software: "0.0".into(), machines: vec![machine] };
    let kind = Some(target_message::Kind::Welcome(welcome));
    control_out.send(&TargetMessage { kind }).await.unwrap();
    // The image is empty, whatever is asked.
    let answers = tokio::spawn(async move {
        while let Ok(Some(question)) = sync_in.recv::<HashRequest>().await {
            let hashes = vec![Bytes::new(); question.regions as usize];
            let reply = HashReply { request: question.request, hashes, failure: None };
            sync_out.send(&reply).await.unwrap();
        }
    });
    let (mut here, mut durable, mut folded, mut data_bytes) = (BTreeSet::new(), 0, 0, 0);
    while data_bytes < bytes {
        let mut stream = connection.accept_batch().await.unwrap();
        let header = stream.read_header().await.unwrap();
        stream.read_exact(&mut vec![0; header.wire_bytes as usize]).await.unwrap();
        folded += usize::from(header.folded.is_some());
        data_bytes += header.data_bytes() as u64;
        here.insert(header.batch.0);
        while here.remove(&(durable + 1)) {
            durable += 1;
        }
        let ack = Ack { machine: 0, durable_batch: durable, window_bytes, applied_batch: 0 };
        let kind = Some(target_message::Kind::Ack(ack));
        control_out.send(&TargetMessage { kind }).await.unwrap();
    }
    answers.abort();
    // Nor is a batch in a control message, which comes with version 3, missing.
    assert!(durable > 0, "the first batch is missing: {here:?}");
    folded
}

/// All versions are spoken: a target of version 1 or 2 is sent what it understands.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_of_version_1_is_sent_no_references() {
    const HALF: usize = 40 * MIB;
    let content = noise(97, HALF);
    for version in [VERSION_2, VERSION_1] {
        let mut scenario = Scenario::prepare(2 * HALF as u64, |_| {}).unwrap();
        write(&scenario.protected, 0, &content);
        write(&scenario.protected, HALF, &content);
        let listener = fake_target(&scenario).await;
        scenario.rig.edit_configuration("agent", |text| slow(text, "400 Mbit/s")).unwrap();
        scenario.rig.start_agent().unwrap();
        let connection = listener.accept().await.unwrap().finish().await.unwrap().unwrap();
        let folded = take_as(version, &connection, 2 * HALF as u64).await;
        assert_eq!(folded > 0, version == VERSION_2, "{folded}");
    }
}

/// A body that is not of the form that its header says is refused as any damaged batch is.
#[tokio::test(flavor = "multi_thread")]
async fn a_malformed_reference_ends_the_connection() {
    let mut scenario = Scenario::prepare(DISK_BYTES, |_| {}).unwrap();
    scenario.rig.start_target().unwrap();
    scenario.rig.wait("the target", STEP_TIME_MAX, |_| true).await.unwrap();
    let mut agent = FakeAgent::connect(&scenario).await;
    agent.hello().await;
    let data = Bytes::from(noise(95, MIB));
    let plain = PlainBatch::of_one_write(Generation(7), BatchSeq(1), 0, data);
    let mut compressor = Compressor::default();
    let batch = plain.encode_folded(reference(4096, 0, 0), Compression::Off, &mut compressor);
    let mut wire = batch.chunks(MachineIndex(0)).concat();
    // The reference's place in the data: now it ends behind it.
    wire[128 + 16 + 2] = 0x7f;
    let _ = agent.connection.send_batch(vec![wire.into()]).await;
    let reason = agent.connection.closed().await;
    assert!(reason.contains("batch 1: reference 0 of the batch is malformed"), "{reason}");
}
