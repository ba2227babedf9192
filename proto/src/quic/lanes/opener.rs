//! Opening lanes, at an agent.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::quic::lanes::count::{Connections, LaneCount};
use crate::quic::lanes::{Lanes, ticket};
use crate::quic::load::of_driver;

/// How long a lane may take to stand.
const OPEN_TIME_MAX: Duration = Duration::from_secs(5);

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
    /// One is being opened, or the target does not take any.
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
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = count.handle_second(busiest, most);
        lanes.make_use_of(wanted);
        let standing = lanes.lock().len();
        if standing >= wanted || self.occupied.swap(true, Ordering::Relaxed) {
            return;
        }
        let (endpoint, config) = (self.endpoint.clone(), self.config.clone());
        let (lanes, occupied) = (Arc::downgrade(lanes), Arc::clone(&self.occupied));
        tokio::spawn(async move {
            let opening = open(&endpoint, config, address, &lanes);
            match tokio::time::timeout(OPEN_TIME_MAX, opening).await {
                Ok(Ok(())) => {
                    tracing::debug!(connections = standing + 1, "the link has one more connection");
                    occupied.store(false, Ordering::Relaxed);
                }
                // It stays occupied: the link does well enough with what it has.
                Ok(Err(reason)) => tracing::debug!(%reason, "the link gets no further connection"),
                Err(_) => occupied.store(false, Ordering::Relaxed),
            }
        });
    }
}

async fn open(
    endpoint: &quinn::Endpoint,
    config: quinn::ClientConfig,
    address: SocketAddr,
    lanes: &Weak<Lanes>,
) -> Result<(), String> {
    let (begun, load) = of_driver(|| endpoint.connect_with(config, address, "backhaul"));
    let lane = begun.map_err(|error| error.to_string())?;
    let lane = lane.await.map_err(|error| error.to_string())?;
    let lanes = lanes.upgrade().ok_or("the link is gone")?;
    let ticket = ticket(&lanes.lock()[0].connection).ok_or("the link has no ticket")?;
    let mut stream = lane.open_uni().await.map_err(|error| error.to_string())?;
    stream.write_all(&ticket).await.map_err(|error| error.to_string())?;
    stream.finish().map_err(|error| error.to_string())?;
    // Batches that follow at once wait until the target has read the ticket.
    if lanes.add(lane, load, None) { Ok(()) } else { Err("the link is closed".into()) }
}
