//! Who may join a link, and what becomes of one that loses a connection.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use quinn::VarInt;

use super::{CONNECTIONS_MAX, LANE_ALPN, Lanes, Opener, Ticket};
use crate::identity::{Identity, IdentityFiles, Role, create_ca, issue};
use crate::quic::congestion::Siblings;
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

impl Connection {
    /// What a lane of this link has to show.
    fn ticket(&self) -> Ticket {
        super::ticket(&self.lanes.lock()[0].connection).unwrap()
    }

    /// Waits until the lanes are as wanted.
    async fn soon(&self, what: &str, wanted: impl Fn(&Lanes) -> bool) {
        let looking = async {
            while !wanted(&self.lanes) {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), looking).await.expect(what);
    }
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
        link.agent.soon("the target's answer", |lanes| lanes.in_use() == 2).await;
        link
    }

    /// Knocks as agent `name` with a lane that shows `ticket`; the lane, and how that ends at the target.
    async fn show(
        &self,
        name: &str,
        ticket: &[u8],
    ) -> (quinn::Connection, Result<Option<Connection>, AcceptError>) {
        let agent = identity(self.dir.path(), name, Role::Agent);
        let config = lane_config(&agent, None, &self.options, Siblings::default(), 28).unwrap();
        let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = self.listener.local_address().unwrap();
        let showing = async {
            let lane = endpoint.connect_with(config, address, "backhaul").unwrap().await.unwrap();
            let (mut stream, _answer) = lane.open_bi().await.unwrap();
            stream.write_all(ticket).await.unwrap();
            stream.finish().unwrap();
            lane
        };
        let accepting = async { self.listener.accept().await.unwrap().finish().await };
        tokio::join!(showing, accepting)
    }

    /// A batch that goes on the lane, since the first connection has something to do.
    async fn assert_a_batch_passes_on_the_lane(&self) {
        let before = self.agent.lanes.lock()[1].connection.stats().udp_tx.bytes;
        let busy = self.agent.lanes.pick(1000);
        self.assert_a_batch_passes().await;
        drop(busy);
        assert!(self.agent.lanes.lock()[1].connection.stats().udp_tx.bytes >= before + 10_000);
    }

    async fn assert_a_batch_passes(&self) {
        let sending = self.agent.send_batch(vec![Bytes::from_static(&[7; 10_000])]);
        let receiving = async {
            let mut stream = self.target.accept_batch().await.unwrap();
            let mut body = [0; 10_000];
            stream.read_exact(&mut body).await.unwrap();
            stream.read_end().await.unwrap();
            assert_eq!(body, [7; 10_000]);
        };
        tokio::join!(async { sending.await.unwrap() }, receiving);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_without_the_links_ticket_is_refused_and_harms_nobody() {
    let link = Link::of(Connections::Auto).await;
    let ticket = link.agent.ticket();
    let cases: [(&str, &[u8], &str); 3] = [
        ("a1", &[0; 32], "the ticket of no link of its agent"),
        ("a1", &ticket[..31], "showed no ticket"),
        ("a2", &ticket, "the ticket of no link of its agent"),
    ];
    for (name, ticket, expected) in cases {
        let (lane, finished) = link.show(name, ticket).await;
        let (error, closed) = (finished.map(drop).unwrap_err(), lane.closed().await.to_string());
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
    link.assert_a_batch_passes_on_the_lane().await;
    link.agent.lanes.lock()[1].connection.close(VarInt::from_u32(9), b"a test");
    for end in [&link.agent, &link.target] {
        let reason = end.closed().await;
        assert!(reason.contains("one of the link's connections was lost"), "{reason}");
    }
}

/// The agent took a lane for its own once it had sent the ticket. One that the target then refused took the
/// link with it, and so did the one of the next link.
#[tokio::test(flavor = "multi_thread")]
async fn a_lane_that_is_refused_leaves_its_link_alone() {
    let link = Link::of(Connections::Exactly(2)).await;
    link.listener.forget_links();
    let opener = link.agent.opener.as_ref().unwrap();
    let address = link.listener.local_address().unwrap();
    opener.handle_second(Instant::now(), &link.agent.lanes, address);
    assert!(link.listener.accept().await.unwrap().finish().await.is_err());
    link.assert_a_batch_passes().await;
    assert_eq!((link.agent.lanes.in_use(), link.target.lanes.in_use()), (1, 1));
}

/// An agent that died, or did not wait for the answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_lane_that_goes_before_it_carried_a_batch_leaves_its_link_alone() {
    let link = Link::of(Connections::Auto).await;
    let (lane, finished) = link.show("a1", &link.agent.ticket()).await;
    assert!(finished.unwrap().is_none());
    assert_eq!(link.target.lanes.lock().len(), 2);
    lane.close(VarInt::from_u32(0), b"");
    link.target.soon("the end of the lane", |lanes| lanes.lock().len() == 1).await;
    link.assert_a_batch_passes().await;
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

#[tokio::test(flavor = "multi_thread")]
async fn the_connection_with_the_least_to_do_is_next_and_none_gets_more_than_its_window() {
    let link = Link::with_lane().await;
    let lanes = &link.agent.lanes;
    let ids = [0, 1].map(|at| lanes.lock()[at].connection.stable_id());
    let picked = |bytes| {
        let picked = lanes.pick(bytes);
        let id = picked.connection.stable_id();
        (picked, id)
    };
    let (first, id) = picked(1000);
    assert_eq!(id, ids[0]);
    let (second, id) = picked(2000);
    assert_eq!(id, ids[1]);
    let (third, id) = picked(8 << 20);
    assert_eq!(id, ids[0]);
    let (fourth, id) = picked(7 << 20);
    assert_eq!(id, ids[0], "a lane takes 4.5 MiB, and what waits for its window would be late");
    drop((first, second, third, fourth));
    assert!(lanes.lock().iter().all(|lane| lane.pending_bytes.load(Ordering::Relaxed) == 0));
    link.assert_a_batch_passes_on_the_lane().await;
}

/// One that had just begun got as many bytes as the others, through a window of a few packets: what they
/// brought waited for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_carries_little_is_given_little() {
    let link = Link::with_lane().await;
    let lanes = &link.agent.lanes;
    let set_window = |at: usize, bytes| {
        lanes.lock()[at].window_bytes.store(bytes, Ordering::Relaxed);
    };
    set_window(0, 1_000_000);
    set_window(1, 100_000);
    let picked: Vec<_> = (0..30).map(|_| lanes.pick(100_000)).collect();
    let pending = |at: usize| lanes.lock()[at].pending_bytes() / 100_000;
    assert_eq!((pending(0), pending(1)), (28, 2));
    drop(picked);
}

/// An agent's certificate could open seven lanes beside each of its eight connections, and each takes
/// memory.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_has_lanes_for_two_links_at_most() {
    let link = Link::of(Connections::Auto).await;
    let agent = identity(link.dir.path(), "a1", Role::Agent);
    let address = link.listener.local_address().unwrap();
    let mut firsts = Vec::new();
    for _ in 0..2 {
        let accepting =
            async { link.listener.accept().await.unwrap().finish().await.unwrap().unwrap() };
        let name = address.to_string();
        let connecting = async { connect(&name, &agent, None, &link.options).await.unwrap() };
        firsts.push(tokio::join!(connecting, accepting));
    }
    let mut held = Vec::new();
    let ends = [&link.agent, &firsts[0].0, &firsts[1].0];
    for at in 0..2 * (CONNECTIONS_MAX - 1) + 1 {
        let ticket = ends[at / (CONNECTIONS_MAX - 1)].ticket();
        let (lane, finished) = link.show("a1", &ticket).await;
        held.push(lane);
        if at < 2 * (CONNECTIONS_MAX - 1) {
            assert!(finished.unwrap().is_none());
        } else {
            let error = finished.map(drop).unwrap_err().to_string();
            assert!(error.contains("an agent has too many lanes"), "{error}");
        }
    }
}

/// A ceiling is kept packet by packet, by each connection for itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_link_with_a_ceiling_sends_on_its_first_connection_alone() {
    let link = Link::with_lane().await;
    link.options.rate_limit.set(Some(1 << 30));
    let first = link.agent.lanes.lock()[0].connection.stable_id();
    let picked: Vec<_> = (0..3).map(|_| link.agent.lanes.pick(1000)).collect();
    assert!(picked.iter().all(|lane| lane.connection.stable_id() == first));
    drop(picked);
    assert_eq!(link.agent.stats().connections, 1);
    let stats = crate::quic::congestion::stats(&link.agent.lanes.lock()[0].connection);
    let cwnd = stats.unwrap().window_bytes;
    let later = Instant::now() + Duration::from_secs(1);
    assert_eq!(link.agent.lanes.congestion_windows(later), cwnd);
    link.options.rate_limit.set(None);
    assert_eq!(link.agent.stats().connections, 2);
    link.assert_a_batch_passes_on_the_lane().await;
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
    let link = Link { dir, listener, options, agent, target };
    link.assert_a_batch_passes().await;
    assert_eq!(link.agent.lanes.lock().len(), 1);
    assert!(opener.occupied.load(Ordering::Relaxed), "it is not asked again at once");
}
