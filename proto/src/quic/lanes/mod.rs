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

use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use quinn::VarInt;

use crate::quic::congestion::{self, CongestionStats, RateLimit, Siblings, window_gauge};
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

/// How old a congestion window may be that batches are counted out by. A connection says its own when its
/// driver lets it, and that is busy where there are lanes.
const WINDOWS_PERIOD: Duration = Duration::from_millis(5);

/// A link is looked after so many times a second. A connection that has batches under way is silent when
/// nothing came since the last time: those are acknowledged all the time. Without any it may be for so many
/// of those times: heartbeats, which are answered, come once a second.
pub(super) const UPKEEPS_PER_SECOND: u32 = 4;

/// A datagram that nobody reads.
const KNOCK: &[u8] = &[0];

/// Connections of each of so many links that this machine's cores are worth.
pub fn connections_here(links: usize) -> usize {
    static CORES: OnceLock<usize> = OnceLock::new();
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    count::most_for(CORES.get_or_init(cores) / links.max(1))
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

/// One connection of a link. Clones share it.
#[derive(Debug, Clone)]
pub(super) struct Lane {
    connection: quinn::Connection,
    load: Arc<Load>,
    /// Bytes of batches that were given to it and are not acknowledged.
    pending_bytes: Arc<AtomicU64>,
    /// Its congestion window, a while ago.
    window_bytes: Arc<AtomicU64>,
    /// Where its congestion controller keeps that.
    gauge: Arc<Mutex<Arc<AtomicU64>>>,
    /// Datagrams that had come when it was looked after last.
    heard: Arc<AtomicU64>,
    /// How many times in a row none had.
    silent: Arc<AtomicU32>,
}

impl Lane {
    /// A connection and the load of its driver.
    pub(super) fn new(connection: quinn::Connection, load: Arc<Load>) -> Self {
        let gauge = Arc::new(Mutex::new(window_gauge(&connection).unwrap_or_default()));
        let (pending_bytes, window_bytes, heard, silent) = Default::default();
        let lane = Self { connection, load, pending_bytes, window_bytes, gauge, heard, silent };
        lane.look();
        lane
    }

    /// Reads its congestion window.
    fn look(&self) {
        let mut gauge = self.gauge.lock().unwrap_or_else(PoisonError::into_inner);
        // Nobody else has it: a path to another address has a controller of its own.
        if Arc::strong_count(&gauge) == 1 {
            *gauge = window_gauge(&self.connection).unwrap_or_default();
        }
        self.window_bytes.store(gauge.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    fn pending_bytes(&self) -> u64 {
        self.pending_bytes.load(Ordering::Relaxed)
    }

    fn window_bytes(&self) -> u64 {
        self.window_bytes.load(Ordering::Relaxed)
    }

    /// How long `bytes` more would take it, in round trips. One that has nothing to do is given something,
    /// however little it is known to carry: how else would it learn?
    fn round_trips(&self, bytes: u64) -> f64 {
        match self.pending_bytes() {
            0 => 0.0,
            pending => (pending + bytes) as f64 / self.window_bytes().max(1) as f64,
        }
    }

    /// How many times in a row nothing had come since this was asked before.
    fn listen(&self) -> u32 {
        let heard = self.connection.stats().udp_rx.datagrams;
        let is_silent = self.heard.swap(heard, Ordering::Relaxed) == heard;
        let silent =
            if is_silent { self.silent.load(Ordering::Relaxed).saturating_add(1) } else { 0 };
        self.silent.store(silent, Ordering::Relaxed);
        silent
    }
}

/// The connections of a link, at either end.
#[derive(Debug)]
pub(super) struct Lanes {
    /// The first connection is the first of these. At most [`CONNECTIONS_MAX`].
    lanes: Mutex<Vec<Lane>>,
    /// How many of them are used; batches go to the first ones.
    in_use: AtomicUsize,
    /// What their congestion controllers are told of that.
    siblings: Siblings,
    /// When the congestion windows were looked at.
    looked_at: Mutex<Option<Instant>>,
    /// The ceiling of an agent's link. Each connection keeps it for itself, so one alone is used under it.
    ceiling: RateLimit,
    /// What batches may have under way on each lane.
    lane_bytes_max: u64,
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
        first: Lane,
        siblings: Siblings,
        ceiling: RateLimit,
        window_bytes: u32,
    ) -> Self {
        Self {
            lanes: Mutex::new(vec![first]),
            in_use: AtomicUsize::new(1),
            siblings,
            looked_at: Mutex::default(),
            ceiling,
            // The target announces room when an eighth of a window was read, and reads late at times.
            lane_bytes_max: u64::from(lane_window_bytes(window_bytes)) / 4 * 3,
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

    /// All connections. What takes time is asked of them outside of the lock, which every batch needs.
    fn all(&self) -> Vec<Lane> {
        self.lock().clone()
    }

    /// The connection that is done with `bytes` more the soonest, of those in use.
    pub(super) fn pick(&self, bytes: u64) -> Picked {
        let lanes = self.lock();
        let (first, others) = (&lanes[0], &self.usable(&lanes)[1..]);
        // What waits for a window would come after batches that were sent later.
        let has_room = |lane: &&Lane| lane.pending_bytes() + bytes <= self.lane_bytes_max;
        let time = |lane: &Lane| lane.round_trips(bytes);
        let soonest =
            others.iter().filter(has_room).min_by(|one, other| time(one).total_cmp(&time(other)));
        let lane = soonest.filter(|lane| time(lane) < time(first)).unwrap_or(first);
        lane.pending_bytes.fetch_add(bytes, Ordering::Relaxed);
        let (connection, pending_bytes) =
            (lane.connection.clone(), Arc::clone(&lane.pending_bytes));
        Picked { connection, pending_bytes, bytes }
    }

    /// Calls for every connection.
    pub(super) fn each(&self, mut each: impl FnMut(&quinn::Connection)) {
        self.all().iter().for_each(|lane| each(&lane.connection));
    }

    /// What all connections in use may have in flight, in bytes, as of [`WINDOWS_PERIOD`] ago at most.
    pub(super) fn congestion_windows(&self, now: Instant) -> u64 {
        if self.take_turn_to_look(now) {
            for lane in self.all() {
                lane.look();
            }
        }
        let lanes = self.lock();
        self.usable(&lanes).iter().map(Lane::window_bytes).sum()
    }

    fn take_turn_to_look(&self, now: Instant) -> bool {
        let mut looked_at = self.looked_at.lock().unwrap_or_else(PoisonError::into_inner);
        let is_known =
            looked_at.is_some_and(|at| now.saturating_duration_since(at) < WINDOWS_PERIOD);
        if !is_known {
            *looked_at = Some(now);
        }
        !is_known
    }

    /// What the congestion controllers know: the first one's state, and the sums of those in use.
    pub(super) fn congestion(&self) -> Option<CongestionStats> {
        let lanes = self.all();
        let mut known = self.usable(&lanes).iter().map(|lane| congestion::stats(&lane.connection));
        let mut sum = known.next()??;
        for one in known.flatten() {
            sum.bandwidth_bytes_per_second += one.bandwidth_bytes_per_second;
            sum.window_bytes += one.window_bytes;
            sum.lost_bytes += one.lost_bytes;
            sum.acked_bytes += one.acked_bytes;
            sum.starved_bytes += one.starved_bytes;
        }
        Some(sum)
    }

    /// The largest share of the time since this was called before for which the driver of a
    /// connection was at work, from 0 to 1.
    pub(super) fn busiest(&self, now: Instant) -> f64 {
        self.lock().iter().map(|lane| lane.load.share(now)).fold(0.0, f64::max)
    }

    /// Lets a few packets out of every connection that is silent, [`UPKEEPS_PER_SECOND`] times a second.
    /// Whether anything came on any within the last second.
    pub(super) fn look_after(&self) -> bool {
        self.siblings.set(self.in_use());
        let lanes = self.all();
        let silent: Vec<_> = lanes.iter().map(Lane::listen).collect();
        let is_heard = silent.iter().any(|times| *times < UPKEEPS_PER_SECOND);
        for (index, (lane, times)) in lanes.iter().zip(silent).enumerate() {
            let patience = if lane.pending_bytes() > 0 { 1 } else { UPKEEPS_PER_SECOND };
            // A lane that waits for nothing may be silent for longer, when the link is not.
            let may_be = index > 0 && patience > 1 && is_heard;
            let knocks = times > 0 && times % patience == 0 && !may_be;
            if knocks {
                congestion::knock(&lane.connection);
            }
            // It wakes the connection, which may have nothing else to send, until it is answered.
            if knocks || congestion::is_knocking(&lane.connection) {
                let _ = lane.connection.send_datagram(Bytes::from_static(KNOCK));
            }
        }
        is_heard
    }

    /// Takes a connection in. `false` when the link has as many as it may, or is closed.
    fn add(&self, lane: Lane) -> bool {
        let mut lanes = self.lock();
        if lanes.len() >= CONNECTIONS_MAX || self.closing.get().is_some() {
            return false;
        }
        lanes.push(lane);
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
