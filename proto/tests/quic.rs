//! Two real endpoints on loopback: who is let in, and that what is sent arrives.

use std::path::Path;
use std::time::Duration;

use backhaul_proto::batch::{BatchKind, Compression, PlainBatch, Record, RecordKind};
use backhaul_proto::id::{BatchSeq, DiskIndex, Generation, MachineIndex, WriteSeq};
use backhaul_proto::message::{AgentMessage, Heartbeat, agent_message};
use backhaul_proto::quic::{
    AcceptError, Congestion, ConnectError, Connection, Identity, IdentityError, IdentityFiles,
    Listener, Role, TransportOptions, connect, create_ca, issue,
};
use bytes::Bytes;

fn files(dir: &Path, name: &str) -> IdentityFiles {
    IdentityFiles {
        ca: dir.join("ca.pem"),
        cert: dir.join(format!("{name}.pem")),
        key: dir.join(format!("{name}.key")),
    }
}

/// A site: a CA, a target `t1` and an agent `a1`.
fn site() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    create_ca(dir.path()).unwrap();
    issue(dir.path(), Role::Target, &"t1".parse().unwrap(), 10).unwrap();
    issue(dir.path(), Role::Agent, &"a1".parse().unwrap(), 10).unwrap();
    dir
}

fn identity(dir: &Path, name: &str, role: Role) -> Identity {
    Identity::load(&files(dir, name), role).unwrap()
}

fn listener(dir: &Path) -> (Listener, String) {
    let target = identity(dir, "t1", Role::Target);
    let options = TransportOptions::default();
    let listener = Listener::bind("127.0.0.1:0".parse().unwrap(), &target, &options).unwrap();
    let address = listener.local_address().unwrap().to_string();
    (listener, address)
}

async fn pair(dir: &Path, options: &TransportOptions) -> (Listener, Connection, Connection) {
    let (listener, address) = listener(dir);
    let agent = identity(dir, "a1", Role::Agent);
    let expected = Some("t1".parse().unwrap());
    let accepting = async { listener.accept().await.unwrap().finish().await.unwrap() };
    let (ours, theirs) = tokio::join!(connect(&address, &agent, expected, options), accepting);
    (listener, ours.unwrap(), theirs)
}

fn batch(seq: u64) -> Vec<Bytes> {
    let data = Bytes::from(vec![seq as u8; 1 + (seq as usize * 977) % 40_000]);
    let kind = RecordKind::Data { offset_bytes: 0, len_bytes: data.len() as u32 };
    let plain = PlainBatch {
        kind: BatchKind::Ordered,
        generation: Generation(1),
        batch: BatchSeq(seq),
        first_write: WriteSeq(seq),
        captured_at_us: 0,
        records: vec![Record { disk: DiskIndex(0), kind }],
        data_bytes: data.len(),
        data: vec![data],
    };
    let mut compressor = zstd::bulk::Compressor::default();
    plain.encode(Compression::Off, &mut compressor).chunks(MachineIndex(0))
}

#[tokio::test(flavor = "multi_thread")]
async fn both_ends_know_each_other_and_two_thousand_batches_arrive() {
    let dir = site();
    let (_listener, agent, target) = pair(dir.path(), &TransportOptions::default()).await;
    assert_eq!((agent.peer().as_str(), target.peer().as_str()), ("t1", "a1"));
    let sending = async {
        for seq in 1..=2000 {
            agent.send_batch(batch(seq)).await.unwrap();
        }
    };
    let receiving = async {
        let mut seen = vec![false; 2001];
        for _ in 0..2000 {
            let mut stream = target.accept_batch().await.unwrap();
            let header = stream.read_header().await.unwrap();
            let mut body = vec![0; header.wire_bytes as usize];
            stream.read_exact(&mut body).await.unwrap();
            stream.read_end().await.unwrap();
            let seq = header.batch.0 as usize;
            assert!(body[header.table_bytes()..].iter().all(|byte| *byte == seq as u8));
            assert!(!std::mem::replace(&mut seen[seq], true), "batch {seq} came twice");
        }
    };
    tokio::join!(sending, receiving);
}

/// A target that reads no batches must not keep a control message from arriving.
#[tokio::test(flavor = "multi_thread")]
async fn control_passes_bulk_that_nobody_reads() {
    let dir = site();
    let options = TransportOptions { congestion: Congestion::Cubic, ..Default::default() };
    let (_listener, agent, target) = pair(dir.path(), &options).await;
    let (mut control, _) = agent.open_control().await.unwrap();
    let (_, mut heard) = {
        let kind = Some(agent_message::Kind::Heartbeat(Heartbeat { nonce: 1 }));
        control.send(&AgentMessage { kind }).await.unwrap();
        target.accept_control().await.unwrap()
    };
    heard.recv::<AgentMessage>().await.unwrap().unwrap();
    let bulk = agent.clone();
    let flood = tokio::spawn(async move {
        for seq in 1..=10_000 {
            if bulk.send_batch(batch(seq)).await.is_err() {
                break;
            }
        }
    });
    for nonce in 2..50 {
        let kind = Some(agent_message::Kind::Heartbeat(Heartbeat { nonce }));
        control.send(&AgentMessage { kind }).await.unwrap();
        let waited = tokio::time::timeout(Duration::from_secs(5), heard.recv::<AgentMessage>());
        let Some(AgentMessage { kind: Some(agent_message::Kind::Heartbeat(heartbeat)) }) =
            waited.await.expect("control is stuck behind bulk").unwrap()
        else {
            panic!()
        };
        assert_eq!(heartbeat.nonce, nonce);
    }
    assert!(!flood.is_finished(), "the windows must have stopped the bulk");
    agent.close("done");
    flood.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn another_sites_identity_and_another_targets_name_are_refused() {
    let (here, there) = (site(), site());
    let options = TransportOptions::default();
    let (listener, address) = listener(here.path());
    let accepting = tokio::spawn(async move {
        let mut failures = Vec::new();
        while let Some(handshake) = listener.accept().await {
            match handshake.finish().await {
                Ok(connection) => drop(connection.closed().await),
                Err(error) => failures.push(error),
            }
            if failures.len() == 2 {
                break;
            }
        }
        failures
    });
    let stranger = identity(there.path(), "a1", Role::Agent);
    let error = connect(&address, &stranger, None, &options).await.unwrap_err();
    assert!(matches!(error, ConnectError::Certificate { .. }), "{error}");
    let agent = identity(here.path(), "a1", Role::Agent);
    let other = Some("t2".parse().unwrap());
    let error = connect(&address, &agent, other, &options).await.unwrap_err();
    assert!(error.to_string().contains("it is target `t1`, but `t2` is expected"), "{error}");
    let failures = accepting.await.unwrap();
    assert!(failures.iter().all(|error| matches!(error, AcceptError::Handshake { .. })));
}

#[test]
fn an_identity_is_checked_before_it_is_used() {
    let (here, there) = (site(), site());
    let load = |files: &IdentityFiles, role| Identity::load(files, role).err().unwrap();
    let error = load(&files(here.path(), "a1"), Role::Target);
    assert!(error.to_string().contains("is the certificate of agent `a1`"), "{error}");
    let mixed = IdentityFiles { key: there.path().join("a1.key"), ..files(here.path(), "a1") };
    assert!(matches!(load(&mixed, Role::Agent), IdentityError::Refused { .. }));
    let missing = load(&files(here.path(), "nobody"), Role::Agent);
    assert!(missing.to_string().contains("nobody.pem cannot be read"), "{missing}");
    let swapped = IdentityFiles { cert: here.path().join("a1.key"), ..files(here.path(), "a1") };
    assert!(matches!(load(&swapped, Role::Agent), IdentityError::Pem { .. }));
    let twice = issue(here.path(), Role::Agent, &"a1".parse().unwrap(), 10).unwrap_err();
    assert!(twice.to_string().contains("exists already"), "{twice}");
}
