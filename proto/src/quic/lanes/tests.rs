//! Who may join a link, and what becomes of one that loses a connection.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use quinn::VarInt;

use super::{LANE_ALPN, Opener};
use crate::identity::{Identity, IdentityFiles, Role, create_ca, issue};
use crate::quic::endpoint::lane_config;
use crate::quic::{AcceptError, Connection, Connections, Listener, TransportOptions, connect};

/// A site with a target `t1` and two agents.
fn site() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    create_ca(dir.path()).unwrap();
    issue(dir.path(), Role::Target, &"t1".parse().unwrap(), 10).unwrap();
    issue(dir.path(), Role::Agent, &"a1".parse().unwrap(), 10).unwrap();
    issue(dir.path(), Role::Agent, &"a2".parse().unwrap(), 10).unwrap();
    dir
}

fn identity(dir: &Path, name: &str, role: Role) -> Identity {
    let ca = dir.join("ca.pem");
    let (cert, key) = (dir.join(format!("{name}.pem")), dir.join(format!("{name}.key")));
    Identity::load(&IdentityFiles { ca, cert, key }, role).unwrap()
}

struct Link {
    dir: tempfile::TempDir,
    listener: Listener,
    options: TransportOptions,
    agent: Connection,
    target: Connection,
}

impl Link {
    async fn of(connections: Connections) -> Self {
        let dir = site();
        let options = TransportOptions { connections, ..TransportOptions::default() };
        let any = "127.0.0.1:0".parse().unwrap();
        let target = identity(dir.path(), "t1", Role::Target);
        let listener = Listener::bind(any, &target, &options).unwrap();
        let address = listener.local_address().unwrap().to_string();
        let agent = identity(dir.path(), "a1", Role::Agent);
        let accepting = async { listener.accept().await.unwrap().finish().await.unwrap().unwrap() };
        let connecting = async { connect(&address, &agent, None, &options).await.unwrap() };
        let (agent, target) = tokio::join!(connecting, accepting);
        Self { dir, listener, options, agent, target }
    }

    /// The same with a lane of its own.
    async fn with_lane() -> Self {
        let link = Self::of(Connections::Exactly(2)).await;
        let opener = link.agent.opener.as_ref().unwrap();
        let address = link.listener.local_address().unwrap();
        opener.handle_second(Instant::now(), &link.agent.lanes, address);
        assert!(link.listener.accept().await.unwrap().finish().await.unwrap().is_none());
        assert_eq!(link.target.lanes.lock().len(), 2);
        // The agent has its own side of it when it sent the ticket, which has been read.
        while link.agent.lanes.in_use() < 2 {
            tokio::task::yield_now().await;
        }
        link
    }

    /// Knocks as agent `name` with a lane that shows `ticket`; how that ends at both ends.
    async fn show(&self, name: &str, ticket: &[u8]) -> (AcceptError, String) {
        let agent = identity(self.dir.path(), name, Role::Agent);
        let config = lane_config(&agent, None, &self.options).unwrap();
        let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = self.listener.local_address().unwrap();
        let showing = async {
            let lane = endpoint.connect_with(config, address, "backhaul").unwrap().await.unwrap();
            let mut stream = lane.open_uni().await.unwrap();
            stream.write_all(ticket).await.unwrap();
            stream.finish().unwrap();
            lane.closed().await.to_string()
        };
        let accepting = async { self.listener.accept().await.unwrap().finish().await };
        let (closed, finished) = tokio::join!(showing, accepting);
        (finished.map(|_| ()).unwrap_err(), closed)
    }

    async fn assert_a_batch_passes(&self) {
        let sending = self.agent.send_batch(vec![Bytes::from_static(&[7; 100])]);
        let receiving = async {
            let mut stream = self.target.accept_batch().await.unwrap();
            let mut body = [0; 100];
            stream.read_exact(&mut body).await.unwrap();
            stream.read_end().await.unwrap();
            assert_eq!(body, [7; 100]);
        };
        tokio::join!(async { sending.await.unwrap() }, receiving);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_without_the_links_ticket_is_refused_and_harms_nobody() {
    let link = Link::of(Connections::Auto).await;
    let ticket = super::ticket(&link.agent.lanes.lock()[0].connection).unwrap();
    let cases: [(&str, &[u8], &str); 3] = [
        ("a1", &[0; 32], "the ticket of no link of its agent"),
        ("a1", &ticket[..31], "showed no ticket"),
        ("a2", &ticket, "the ticket of no link of its agent"),
    ];
    for (name, ticket, expected) in cases {
        let (error, closed) = link.show(name, ticket).await;
        assert!(error.to_string().contains(expected), "{error}");
        assert!(closed.contains(expected), "{closed}");
    }
    link.assert_a_batch_passes().await;
    assert_eq!(link.target.lanes.lock().len(), 1);
}

/// Two cores, as many test machines have, are worth one connection; so the agent is told of more.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_whose_driver_is_busy_for_three_seconds_gets_a_lane() {
    let mut link = Link::of(Connections::Auto).await;
    let address = link.listener.local_address().unwrap();
    let opener = link.agent.opener.take().unwrap();
    let mut opener = Arc::into_inner(opener).unwrap();
    opener.most = 4;
    let mut now = Instant::now();
    let mut after = |opener: &Opener, seconds, percent, most| {
        opener.handle_peer(percent, most);
        for _ in 0..seconds {
            now += Duration::from_secs(1);
            opener.handle_second(now, &link.agent.lanes, address);
        }
        opener.occupied.load(Ordering::Relaxed)
    };
    assert!(!after(&opener, 2, 95, 4), "too early");
    assert!(!after(&opener, 1, 60, 4), "it had a rest");
    assert!(!after(&opener, 9, 95, 1), "its cores are worth one");
    assert!(after(&opener, 3, 95, 4));
    assert!(link.listener.accept().await.unwrap().finish().await.unwrap().is_none());
    assert_eq!(link.target.lanes.lock().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_that_loses_a_lane_is_lost_and_says_why() {
    let link = Link::with_lane().await;
    link.assert_a_batch_passes().await;
    link.agent.lanes.lock()[1].connection.close(VarInt::from_u32(9), b"a test");
    for end in [&link.agent, &link.target] {
        let reason = end.closed().await;
        assert!(reason.contains("one of the link's connections was lost"), "{reason}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_that_is_closed_closes_its_lanes_and_keeps_its_reason() {
    let link = Link::with_lane().await;
    let lanes = [&link.agent, &link.target].map(|end| end.lanes.lock()[1].connection.clone());
    link.target.close("the test is over");
    assert_eq!(link.agent.closed().await, "the test is over");
    assert_eq!(link.target.closed().await, "the test is over");
    for lane in lanes {
        lane.closed().await;
    }
}

/// A ceiling is kept packet by packet, by each connection for itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_link_with_a_ceiling_sends_on_its_first_connection_alone() {
    let link = Link::with_lane().await;
    link.options.rate_limit.set(Some(1 << 30));
    let first = link.agent.lanes.lock()[0].connection.stable_id();
    let picked: Vec<_> = (0..3).map(|_| link.agent.lanes.pick(1000, true)).collect();
    assert!(picked.iter().all(|lane| lane.connection.stable_id() == first));
    let before = link.agent.lanes.lock()[1].connection.stats().frame_tx.stream;
    for _ in 0..20 {
        link.assert_a_batch_passes().await;
    }
    assert_eq!(link.agent.lanes.lock()[1].connection.stats().frame_tx.stream, before);
    drop(picked);
    assert!(
        link.agent.lanes.lock().iter().all(|lane| lane.pending_bytes.load(Ordering::Relaxed) == 0)
    );
    let other = link.agent.lanes.pick(1000, true);
    let next = link.agent.lanes.pick(1000, false);
    assert_ne!(next.connection.stable_id(), other.connection.stable_id(), "the idle one is next");
}

/// A target from before lanes.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_takes_no_lanes_keeps_its_link() {
    let dir = site();
    let options =
        TransportOptions { connections: Connections::Exactly(2), ..TransportOptions::default() };
    let any = "127.0.0.1:0".parse().unwrap();
    let target = identity(dir.path(), "t1", Role::Target);
    let mut tls = target.server_config().unwrap();
    tls.alpn_protocols.retain(|name| name != LANE_ALPN);
    let listener = Listener::bind_with(any, &target, tls, &options).unwrap();
    let address = listener.local_address().unwrap();
    let agent = identity(dir.path(), "a1", Role::Agent);
    let accepting = async { listener.accept().await.unwrap().finish().await.unwrap().unwrap() };
    let name = address.to_string();
    let connecting = async { connect(&name, &agent, None, &options).await.unwrap() };
    let (agent, target) = tokio::join!(connecting, accepting);
    let opener = Arc::clone(agent.opener.as_ref().unwrap());
    opener.handle_second(Instant::now(), &agent.lanes, address);
    assert!(listener.accept().await.unwrap().finish().await.is_err());
    opener.handle_second(Instant::now(), &agent.lanes, address);
    let dir_of = Link { dir, listener, options, agent, target };
    dir_of.assert_a_batch_passes().await;
    assert_eq!(dir_of.agent.lanes.lock().len(), 1);
}
