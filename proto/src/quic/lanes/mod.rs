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

use quinn::{ConnectionError, VarInt};

use crate::quic::congestion;
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

/// A link that is closed on purpose has all its connections closed, and the reason comes with the first
/// one: so long it may come after the others.
const CLOSE_GRACE: Duration = Duration::from_secs(1);

/// Connections of a link that this machine's cores are worth.
pub fn connections_here() -> usize {
    count::most_for(std::thread::available_parallelism().map_or(1, usize::from))
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
    pub(super) fn new(first: quinn::Connection, load: Arc<Load>) -> Self {
        let lane = Lane { connection: first, load, pending_bytes: Arc::default() };
        Self { lanes: Mutex::new(vec![lane]), in_use: AtomicUsize::new(1), closing: Arc::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Lane>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connections in use.
    pub(super) fn in_use(&self) -> usize {
        self.in_use.load(Ordering::Relaxed).clamp(1, self.lock().len())
    }

    /// Uses so many connections from now on, as far as there are.
    fn make_use_of(&self, count: usize) {
        self.in_use.store(count.max(1), Ordering::Relaxed);
    }

    /// The connection that has the least to do, of those in use; the first one `alone`.
    pub(super) fn pick(&self, bytes: u64, alone: bool) -> Picked {
        let lanes = self.lock();
        let usable =
            if alone { 1 } else { self.in_use.load(Ordering::Relaxed).clamp(1, lanes.len()) };
        let least =
            lanes[..usable].iter().min_by_key(|lane| lane.pending_bytes.load(Ordering::Relaxed));
        // A link has its first connection from the beginning.
        let lane = least.unwrap_or(&lanes[0]);
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
        let usable = self.in_use.load(Ordering::Relaxed).clamp(1, lanes.len());
        lanes[..usable].iter().map(|lane| lane.connection.stats().path.cwnd).sum()
    }

    /// The largest share of the time since this was called before for which the driver of a
    /// connection was at work, from 0 to 1.
    pub(super) fn busiest(&self, now: Instant) -> f64 {
        self.lock().iter().map(|lane| lane.load.share(now)).fold(0.0, f64::max)
    }

    /// Lets a few packets of every connection out.
    pub(super) fn knock(&self) {
        self.each(congestion::knock);
    }

    /// Takes a connection in, and shares `window_bytes` of receive window, if given, out among all.
    /// `false` when the link has as many as it may, or is closed.
    fn add(
        &self,
        connection: quinn::Connection,
        load: Arc<Load>,
        window_bytes: Option<u32>,
    ) -> bool {
        let mut lanes = self.lock();
        if lanes.len() >= CONNECTIONS_MAX || self.closing.get().is_some() {
            return false;
        }
        let first = lanes[0].connection.clone();
        tokio::spawn(bind(connection.clone(), first, Arc::clone(&self.closing)));
        lanes.push(Lane { connection, load, pending_bytes: Arc::default() });
        if let Some(window_bytes) = window_bytes {
            let share = VarInt::from_u32(window_bytes / lanes.len() as u32);
            lanes.iter().for_each(|lane| lane.connection.set_receive_window(share));
        }
        true
    }

    /// Closes every connection. The first reason counts.
    pub(super) fn close(&self, reason: &str) {
        let _ = self.closing.set(reason.to_owned());
        self.each(|connection| connection.close(VarInt::from_u32(0), reason.as_bytes()));
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
async fn bind(lane: quinn::Connection, first: quinn::Connection, closing: Arc<OnceLock<String>>) {
    let error = tokio::select! {
        error = lane.closed() => error,
        _ = first.closed() => return lane.close(VarInt::from_u32(0), b""),
    };
    let on_purpose =
        matches!(error, ConnectionError::LocallyClosed | ConnectionError::ApplicationClosed(_));
    if on_purpose && tokio::time::timeout(CLOSE_GRACE, first.closed()).await.is_ok() {
        return;
    }
    let reason = closing.get_or_init(|| format!("one of the link's connections was lost: {error}"));
    first.close(VarInt::from_u32(0), reason.as_bytes());
}
