//! A site with throw-away keys, and both ends of a link in it.

// Each test program uses a part of this.
#![allow(dead_code)]

pub(crate) mod relay;

use std::path::Path;
use std::sync::Arc;

use backhaul_proto::batch::{Compression, Compressor, PlainBatch};
use backhaul_proto::id::{BatchSeq, Generation, MachineIndex};
use backhaul_proto::identity::{Identity, IdentityFiles, Role, create_ca, issue};
use backhaul_proto::link::{ConnectOptions, Connection, Listener, TransportChoice, connect};
use backhaul_proto::quic::TransportOptions;
use bytes::Bytes;

pub(crate) fn files(dir: &Path, name: &str) -> IdentityFiles {
    IdentityFiles {
        ca: dir.join("ca.pem"),
        cert: dir.join(format!("{name}.pem")),
        key: dir.join(format!("{name}.key")),
    }
}

/// A site: a CA, a target `t1` and an agent `a1`.
pub(crate) fn site() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    create_ca(dir.path()).unwrap();
    issue(dir.path(), Role::Target, &"t1".parse().unwrap(), 10).unwrap();
    issue(dir.path(), Role::Agent, &"a1".parse().unwrap(), 10).unwrap();
    dir
}

pub(crate) fn identity(dir: &Path, name: &str, role: Role) -> Arc<Identity> {
    Arc::new(Identity::load(&files(dir, name), role).unwrap())
}

pub(crate) async fn listener(dir: &Path) -> (Listener, String) {
    let target = identity(dir, "t1", Role::Target);
    let options = TransportOptions::default();
    let any = "127.0.0.1:0".parse().unwrap();
    // The port that UDP is given may be somebody's over TCP, with other tests beside this one.
    let mut tries_left = 10;
    let listener = loop {
        match Listener::bind(any, &target, &options, true).await {
            Ok(listener) => break listener,
            Err(error) if tries_left == 0 => panic!("{error}"),
            Err(_) => tries_left -= 1,
        }
    };
    let address = listener.local_address().unwrap().to_string();
    (listener, address)
}

pub(crate) fn options(choice: TransportChoice, expected: Option<&str>) -> ConnectOptions {
    let expected = expected.map(|name| name.parse().unwrap());
    let transport = TransportOptions::default();
    ConnectOptions { choice, expected, transport, lan_over_tcp: false, udp_silent: false }
}

pub(crate) async fn pair(
    dir: &Path,
    choice: TransportChoice,
) -> (Listener, Connection, Connection) {
    let (listener, address) = listener(dir).await;
    let agent = identity(dir, "a1", Role::Agent);
    let options = options(choice, Some("t1"));
    let accepting = async { listener.accept().await.unwrap().finish().await.unwrap().unwrap() };
    let (ours, theirs) = tokio::join!(connect(&address, &agent, &options), accepting);
    (listener, ours.unwrap(), theirs)
}

pub(crate) fn batch(seq: u64) -> Vec<Bytes> {
    batch_of(seq, 1 + (seq as usize * 977) % 40_000)
}

/// A batch with so many bytes of data, each of which says which one it is.
pub(crate) fn batch_of(seq: u64, bytes: usize) -> Vec<Bytes> {
    let data = Bytes::from(vec![seq as u8; bytes]);
    let plain = PlainBatch::of_one_write(Generation(1), BatchSeq(seq), 0, data);
    plain.encode(Compression::Off, &mut Compressor::default()).chunks(MachineIndex(0))
}
