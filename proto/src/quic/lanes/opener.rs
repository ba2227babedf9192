//! Opening lanes, at an agent.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use quinn::ConnectionError;

use crate::quic::lanes::count::{Connections, LaneCount};
use crate::quic::lanes::{Lane, Lanes, TAKEN, ticket};
use crate::quic::load::of_driver;

/// How long a lane may take to stand.
const OPEN_TIME_MAX: Duration = Duration::from_secs(5);

/// When one could not be opened, the link does well enough with what it has for so long.
const RETRY_AFTER: Duration = Duration::from_secs(60);

/// What the handshake of a lane ends with at a target that knows none: TLS's `no_application_protocol`,
/// RFC 7301, section 3.2, as RFC 9001, section 4.8, carries it.
const NO_LANES: u64 = 0x100 + 120;

/// Why a lane was not opened.
enum NotOpened {
    /// The target does not know lanes.
    Unknown,
    /// Something that may pass.
    Otherwise(String),
}

/// What an agent needs to open lanes, and knows of the need for them.
#[derive(Debug)]
pub(in crate::quic) struct Opener {
    endpoint: quinn::Endpoint,
    config: quinn::ClientConfig,
    count: Mutex<LaneCount>,
    /// What the target's busiest driver takes of a core, in percent.
    peer_load_percent: AtomicU32,
    /// Connections that the agent's cores are worth.
    pub(super) most: usize,
    /// Connections that the target's cores are worth.
    peer_most: AtomicUsize,
    /// One is being opened, or could not be.
    pub(super) occupied: Arc<AtomicBool>,
}

impl Opener {
    /// `config` is that of lanes; the agent's cores are worth `most` connections.
    pub(in crate::quic) fn new(
        endpoint: quinn::Endpoint,
        config: quinn::ClientConfig,
        connections: Connections,
        most: usize,
    ) -> Self {
        Self {
            endpoint,
            config,
            most,
            count: Mutex::new(LaneCount::new(connections)),
            peer_load_percent: AtomicU32::new(0),
            peer_most: AtomicUsize::new(1),
            occupied: Arc::default(),
        }
    }

    /// Waits until no connection of the agent's socket has anything left to say.
    pub(in crate::quic) async fn wait_idle(&self) {
        self.endpoint.wait_idle().await;
    }

    /// The target says what its busiest driver takes, and how many connections its cores are worth.
    pub(in crate::quic) fn handle_peer(&self, load_percent: u32, most: u32) {
        self.peer_load_percent.store(load_percent, Ordering::Relaxed);
        self.peer_most.store(most.max(1) as usize, Ordering::Relaxed);
    }

    /// Opens one more connection to `address` when the link wants one. Once a second.
    pub(in crate::quic) fn handle_second(
        &self,
        now: Instant,
        lanes: &Arc<Lanes>,
        address: SocketAddr,
    ) {
        let most = self.most.min(self.peer_most.load(Ordering::Relaxed));
        let peer = f64::from(self.peer_load_percent.load(Ordering::Relaxed)) / 100.0;
        let busiest = lanes.busiest(now).max(peer);
        let standing = lanes.lock().len();
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = count.handle_second(busiest, most, standing);
        lanes.in_use.store(wanted, Ordering::Relaxed);
        if standing >= wanted || lanes.is_capped() || self.occupied.swap(true, Ordering::Relaxed) {
            return;
        }
        let (endpoint, config) = (self.endpoint.clone(), self.config.clone());
        let (lanes, occupied) = (Arc::downgrade(lanes), Arc::clone(&self.occupied));
        tokio::spawn(async move {
            let opening = open(&endpoint, config, address, &lanes);
            let opened = match tokio::time::timeout(OPEN_TIME_MAX, opening).await {
                Ok(opened) => opened,
                Err(_) => Err(NotOpened::Otherwise("the target does not answer".into())),
            };
            match opened {
                Ok(()) => {
                    tracing::debug!(connections = standing + 1, "the link has one more connection");
                }
                Err(NotOpened::Unknown) => {
                    tracing::info!(
                        "the target is older than further connections; the link keeps its one"
                    );
                    return;
                }
                Err(NotOpened::Otherwise(reason)) => {
                    tracing::debug!(%reason, "the link gets no further connection for now");
                    // The link may be gone before this is over, and its socket with it.
                    drop(endpoint);
                    tokio::time::sleep(RETRY_AFTER).await;
                }
            }
            occupied.store(false, Ordering::Relaxed);
        });
    }
}

async fn open(
    endpoint: &quinn::Endpoint,
    config: quinn::ClientConfig,
    address: SocketAddr,
    lanes: &Weak<Lanes>,
) -> Result<(), NotOpened> {
    let broken = |error: &dyn std::fmt::Display| NotOpened::Otherwise(error.to_string());
    let (begun, load) = of_driver(|| endpoint.connect_with(config, address, "backhaul"));
    let lane = begun.map_err(|error| broken(&error))?;
    let lane = lane.await.map_err(|error| match &error {
        ConnectionError::ConnectionClosed(close) if u64::from(close.error_code) == NO_LANES => {
            NotOpened::Unknown
        }
        _ => broken(&error),
    })?;
    let lanes = lanes.upgrade().ok_or_else(|| broken(&"the link is gone"))?;
    let ticket = ticket(&lanes.lock()[0].connection);
    let ticket = ticket.ok_or_else(|| broken(&"the link has no ticket"))?;
    let (mut showing, mut answer) = lane.open_bi().await.map_err(|error| broken(&error))?;
    showing.write_all(&ticket).await.map_err(|error| broken(&error))?;
    let mut taken = [0];
    answer.read_exact(&mut taken).await.map_err(|error| broken(&error))?;
    if taken != [TAKEN] || !lanes.add(Lane::new(lane.clone(), load)) {
        return Err(broken(&"the lane was not taken"));
    }
    lanes.bind(lane);
    Ok(())
}
