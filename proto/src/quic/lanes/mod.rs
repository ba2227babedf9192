//! The connections of a link: the first, which carries everything, and lanes beside it, which carry
//! batches.
//!
//! One driver runs a connection, so one core bounds it. Where that is what limits a link, its agent
//! opens further connections from the same socket and shares its batches out among them. Batches
//! carry their place and may come in any order, so nothing above this module knows.
//!
//! A lane shows that it belongs to a link by a secret that only the two ends of the first connection
//! can compute: TLS exporters, RFC 8446, section 7.5. When one connection of a link is lost, the
//! link is, and the session resumes on the next one: there is no rule for half a link.

mod count;
mod opener;
mod registry;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use quinn::VarInt;

use crate::quic::congestion::{self, CongestionStats, RateLimit};
use crate::quic::load::Load;

pub use count::{CONNECTIONS_MAX, Connections};
pub(super) use opener::Opener;
pub(super) use registry::Registry;

/// The TLS application protocol name of a lane. A target that does not know it fails the handshake,
/// and the link keeps its one connection.
pub(super) const LANE_ALPN: &[u8] = b"backhaul-lane";

/// Label of the secret that a lane shows.
const TICKET_LABEL: &[u8] = b"EXPORTER-backhaul-lane";

/// Bytes of that secret.
const TICKET_BYTES: usize = 32;

/// What a target answers to a ticket that it takes.
const TAKEN: u8 = 1;

/// What is wrong with a link, or why it was closed, comes with its first connection, and so long it may
/// come after the others.
const FIRST_GRACE: Duration = Duration::from_secs(1);

/// A datagram that nobody reads.
const KNOCK: &[u8] = &[0];

/// Connections of a link that this machine's cores are worth.
pub fn connections_here() -> usize {
    static CORES: OnceLock<usize> = OnceLock::new();
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    count::most_for(*CORES.get_or_init(cores))
}

/// Receive window of a lane at a target whose links have `window_bytes`. Their first connections keep all of
/// that: whatever becomes of the lanes, they can carry everything.
pub(super) fn lane_window_bytes(window_bytes: u32) -> u32 {
    window_bytes / CONNECTIONS_MAX as u32
}

type Ticket = [u8; TICKET_BYTES];

/// What a lane of the link with this first connection has to show.
fn ticket(first: &quinn::Connection) -> Option<Ticket> {
    let mut ticket = [0; TICKET_BYTES];
    first.export_keying_material(&mut ticket, TICKET_LABEL, b"").ok()?;
    Some(ticket)
}

/// One connection of a link.
#[derive(Debug)]
struct Lane {
    connection: quinn::Connection,
    load: Arc<Load>,
    /// Bytes of batches that were given to it and are not acknowledged.
    pending_bytes: Arc<AtomicU64>,
}

/// The connections of a link, at either end.
#[derive(Debug)]
pub(super) struct Lanes {
    /// The first connection is the first of these. At most [`CONNECTIONS_MAX`].
    lanes: Mutex<Vec<Lane>>,
    /// How many of them are used; batches go to the first ones.
    in_use: AtomicUsize,
    /// The ceiling of an agent's link. Each connection keeps it for itself, so one alone is used under it.
    ceiling: RateLimit,
    /// What may be under way on each lane.
    lane_window_bytes: u64,
    /// Why the link was closed here, if it was.
    closing: Arc<OnceLock<String>>,
}

/// A connection to send a batch on, which has it among its own until this is dropped.
pub(super) struct Picked {
    pub(super) connection: quinn::Connection,
    pending_bytes: Arc<AtomicU64>,
    bytes: u64,
}

impl Drop for Picked {
    fn drop(&mut self) {
        self.pending_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Lanes {
    /// `window_bytes` is the receive window of links.
    pub(super) fn new(
        first: quinn::Connection,
        load: Arc<Load>,
        ceiling: RateLimit,
        window_bytes: u32,
    ) -> Self {
        let lane = Lane { connection: first, load, pending_bytes: Arc::default() };
        Self {
            lanes: Mutex::new(vec![lane]),
            in_use: AtomicUsize::new(1),
            ceiling,
            lane_window_bytes: lane_window_bytes(window_bytes).into(),
            closing: Arc::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Lane>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn usable<'a>(&self, lanes: &'a [Lane]) -> &'a [Lane] {
        let count = if self.is_capped() { 1 } else { self.in_use.load(Ordering::Relaxed) };
        &lanes[..count.clamp(1, lanes.len())]
    }

    /// Whether a ceiling keeps the link to its first connection.
    fn is_capped(&self) -> bool {
        self.ceiling.get().is_some()
    }

    /// The connections in use.
    pub(super) fn in_use(&self) -> usize {
        self.usable(&self.lock()).len()
    }

    /// The connection that has the least to do, of those in use.
    pub(super) fn pick(&self, bytes: u64) -> Picked {
        let lanes = self.lock();
        let (first, others) = (&lanes[0], &self.usable(&lanes)[1..]);
        let pending = |lane: &Lane| lane.pending_bytes.load(Ordering::Relaxed);
        // What waits for a window would come after batches that were sent later.
        let has_room = |lane: &&Lane| pending(lane) + bytes <= self.lane_window_bytes;
        let least = others.iter().filter(has_room).min_by_key(|lane| pending(lane));
        let lane = least.filter(|lane| pending(lane) < pending(first)).unwrap_or(first);
        lane.pending_bytes.fetch_add(bytes, Ordering::Relaxed);
        let (connection, pending_bytes) =
            (lane.connection.clone(), Arc::clone(&lane.pending_bytes));
        Picked { connection, pending_bytes, bytes }
    }

    /// Calls for every connection.
    pub(super) fn each(&self, mut each: impl FnMut(&quinn::Connection)) {
        self.lock().iter().for_each(|lane| each(&lane.connection));
    }

    /// What all connections in use may have in flight, in bytes.
    pub(super) fn congestion_windows(&self) -> u64 {
        let lanes = self.lock();
        self.usable(&lanes).iter().map(|lane| lane.connection.stats().path.cwnd).sum()
    }

    /// What the congestion controllers know: the first one's state, and the sums of those in use.
    pub(super) fn congestion(&self) -> Option<CongestionStats> {
        let lanes = self.lock();
        let mut known = self.usable(&lanes).iter().map(|lane| congestion::stats(&lane.connection));
        let mut sum = known.next()??;
        for one in known.flatten() {
            sum.bandwidth_bytes_per_second += one.bandwidth_bytes_per_second;
            sum.window_bytes += one.window_bytes;
            sum.lost_bytes += one.lost_bytes;
        }
        Some(sum)
    }

    /// The largest share of the time since this was called before for which the driver of a
    /// connection was at work, from 0 to 1.
    pub(super) fn busiest(&self, now: Instant) -> f64 {
        self.lock().iter().map(|lane| lane.load.share(now)).fold(0.0, f64::max)
    }

    /// Lets a few packets of every connection out.
    pub(super) fn knock(&self) {
        let lanes = self.lock();
        lanes.iter().for_each(|lane| congestion::knock(&lane.connection));
        for lane in &lanes[1..] {
            // The first connection has heartbeats to send; a lane may have nothing.
            let _ = lane.connection.send_datagram(Bytes::from_static(KNOCK));
        }
    }

    /// Takes a connection in. `false` when the link has as many as it may, or is closed.
    fn add(&self, connection: quinn::Connection, load: Arc<Load>) -> bool {
        let mut lanes = self.lock();
        if lanes.len() >= CONNECTIONS_MAX || self.closing.get().is_some() {
            return false;
        }
        lanes.push(Lane { connection, load, pending_bytes: Arc::default() });
        true
    }

    /// Forgets a connection that never carried anything.
    fn remove(&self, connection: &quinn::Connection) {
        self.lock().retain(|lane| lane.connection.stable_id() != connection.stable_id());
    }

    /// From now on the link is lost when this lane is.
    fn bind(&self, lane: quinn::Connection) {
        let first = self.lock()[0].connection.clone();
        tokio::spawn(end_with(lane, first, Arc::clone(&self.closing)));
    }

    /// Closes every connection. The first reason counts, and what was closed before keeps its own.
    pub(super) fn close(&self, reason: &str) {
        let lanes = self.lock();
        let is_open = |lane: &&Lane| lane.connection.close_reason().is_none();
        if is_open(&&lanes[0]) {
            let _ = self.closing.set(reason.to_owned());
        }
        for lane in lanes.iter().filter(is_open) {
            lane.connection.close(VarInt::from_u32(0), reason.as_bytes());
        }
    }

    /// Why the link was closed here, if it was.
    pub(super) fn closed_here(&self) -> Option<String> {
        self.closing.get().cloned()
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        // Those who watch over them hold handles still.
        let lanes = self.lanes.get_mut().unwrap_or_else(PoisonError::into_inner);
        lanes[1..].iter().for_each(|lane| lane.connection.close(VarInt::from_u32(0), b""));
    }
}

/// Ends the link when a lane of it is lost.
async fn end_with(
    lane: quinn::Connection,
    first: quinn::Connection,
    closing: Arc<OnceLock<String>>,
) {
    let error = tokio::select! {
        error = lane.closed() => error,
        _ = first.closed() => return lane.close(VarInt::from_u32(0), b""),
    };
    if tokio::time::timeout(FIRST_GRACE, first.closed()).await.is_ok() {
        return;
    }
    let reason = closing.get_or_init(|| format!("one of the link's connections was lost: {error}"));
    first.close(VarInt::from_u32(0), reason.as_bytes());
}
