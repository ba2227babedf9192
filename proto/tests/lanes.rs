//! A link of several connections, over loopback.

mod site;

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use backhaul_proto::id::BatchSeq;
use backhaul_proto::identity::Role;
use backhaul_proto::link::{Connection, Listener, TransportChoice, connect};
use backhaul_proto::quic::Connections;

use site::{batch, identity, listener, options, site};

/// Both ends of a link that is given so many connections, and a listener that lets lanes join.
async fn pair(dir: &Path, count: usize) -> (Connection, Connection) {
    let (listener, address) = listener(dir).await;
    let agent = identity(dir, "a1", Role::Agent);
    let mut options = options(TransportChoice::Quic, Some("t1"));
    options.transport.connections = Connections::Exactly(count);
    let accepting = async { listener.accept().await.unwrap().finish().await.unwrap().unwrap() };
    let (ours, theirs) = tokio::join!(connect(&address, &agent, &options), accepting);
    tokio::spawn(let_join(listener));
    (ours.unwrap(), theirs)
}

async fn let_join(listener: Listener) {
    while let Some(handshake) = listener.accept().await {
        assert!(handshake.finish().await.unwrap().is_none(), "a lane is no link of its own");
    }
}

/// Sends batches until `enough` says so, and returns how many; each must arrive once.
async fn send_while(agent: &Connection, target: &Connection, enough: impl Fn(u64) -> bool) -> u64 {
    let (told, mut last) = tokio::sync::watch::channel(None);
    let sending = async {
        let mut sends = tokio::task::JoinSet::new();
        let mut sent = 0;
        while !enough(sent) {
            sent += 1;
            let agent = agent.clone();
            sends.spawn(async move { agent.send_batch(batch(sent)).await.unwrap() });
            if sends.len() >= 64 {
                sends.join_next().await;
            }
        }
        sends.join_all().await;
        told.send(Some(sent)).unwrap();
        sent
    };
    let receiving = async {
        let mut seen = BTreeSet::new();
        while last.borrow().is_none_or(|sent| (seen.len() as u64) < sent) {
            let mut stream = tokio::select! {
                stream = target.accept_batch() => stream.unwrap(),
                _ = last.changed() => continue,
            };
            let header = stream.read_header().await.unwrap();
            let mut body = vec![0; header.wire_bytes as usize];
            stream.read_exact(&mut body).await.unwrap();
            stream.read_end().await.unwrap();
            let BatchSeq(seq) = header.batch;
            assert!(body[header.table_bytes()..].iter().all(|byte| *byte == seq as u8));
            assert!(seen.insert(seq), "batch {seq} came twice");
        }
    };
    tokio::join!(sending, receiving).0
}

#[tokio::test(flavor = "multi_thread")]
async fn three_connections_carry_the_batches_of_one_link() {
    let dir = site();
    let (agent, target) = pair(dir.path(), 3).await;
    let watched = agent.clone();
    let look_after = tokio::spawn(async move { watched.look_after().await });
    let all = send_while(&agent, &target, |_| agent.stats().connections == 3);
    tokio::time::timeout(Duration::from_secs(60), all).await.expect("three connections");
    send_while(&agent, &target, |sent| sent == 2000).await;
    assert_eq!((agent.stats().connections, target.stats().connections), (3, 1), "of each sender");
    look_after.abort();
    agent.close("enough");
    assert_eq!(target.closed().await, "enough");
    assert_eq!(agent.closed().await, "enough");
}
