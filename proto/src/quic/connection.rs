//! A connection between an agent and a target, and the streams on it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use quinn::{RecvStream, SendStream};
use tokio::sync::{Mutex, mpsc};
use tokio::time::MissedTickBehavior;

use crate::id::PeerName;
use crate::link::{
    CONTROL_STREAM, LinkStats, SYNC_STREAM, StreamError, Turn, Turns, Unsent, ip_header_bytes,
    wait_until,
};
use crate::quic::SocketFacts;
use crate::quic::bulk::Bulk;
use crate::quic::congestion::{self, CongestionStats};
use crate::quic::lanes::{Lanes, Opener, UPKEEPS_PER_SECOND};
use crate::quic::streams::{BatchStream, ReceiveHalf, SendHalf, ended};
use crate::quic::transport::BATCH_STREAMS_MAX;
use crate::session::{Release, Weight};

/// Control goes before everything, hashes before batches, light batches before the others, which have none
/// above 0.
const CONTROL_PRIORITY: i32 = 3;
const SYNC_PRIORITY: i32 = 2;
const LIGHT_PRIORITY: i32 = 1;

/// How long an agent that ends waits for its link's end to be sent: three probe timeouts of most paths.
const END_TIME_MAX: Duration = Duration::from_secs(1);

/// How often a link is looked after.
const UPKEEP_PERIOD: Duration = Duration::from_millis(1000 / UPKEEPS_PER_SECOND as u64);

/// What QUIC takes of a datagram of batches: flags 1, connection id 8, packet number 2, seal 16, and the
/// head of a stream frame, 9 with the offsets and stream numbers of a session that lasts.
const QUIC_PACKET_BYTES: u64 = 36;

/// Header of UDP.
const UDP_BYTES: u64 = 8;

/// Headers of IP and UDP around a datagram to `peer`, in bytes.
pub(super) fn datagram_header_bytes(peer: SocketAddr) -> u64 {
    ip_header_bytes(peer) + UDP_BYTES
}

/// An authenticated connection. Clones share it.
#[derive(Debug, Clone)]
pub struct Connection {
    /// The first connection, for everything but some of the batches.
    quinn: quinn::Connection,
    peer: PeerName,
    socket: SocketFacts,
    /// It and those beside it.
    pub(super) lanes: Arc<Lanes>,
    /// What batches may take of the transport's window.
    bulk: Arc<Bulk>,
    unsent: Arc<Unsent>,
    /// Heavy batches wait for theirs.
    turns: Arc<Turns>,
    /// Batches sent so far.
    batches: Arc<AtomicU32>,
    /// Opens more connections (agents).
    pub(super) opener: Option<Arc<Opener>>,
    /// Batches of the other connections (targets).
    lane_batches: Option<Arc<Mutex<mpsc::Receiver<RecvStream>>>>,
}

impl Connection {
    /// `window_bytes` is what the transport holds of data that the peer has not acknowledged.
    pub(super) fn new(
        quinn: quinn::Connection,
        peer: PeerName,
        socket: SocketFacts,
        window_bytes: u32,
        lanes: Arc<Lanes>,
    ) -> Self {
        Self {
            quinn,
            peer,
            socket,
            lanes,
            bulk: Arc::new(Bulk::new(window_bytes, BATCH_STREAMS_MAX)),
            unsent: Arc::default(),
            turns: Arc::default(),
            batches: Arc::default(),
            opener: None,
            lane_batches: None,
        }
    }

    /// The same, of an agent, which can open more.
    pub(super) fn with_opener(self, opener: Opener) -> Self {
        Self { opener: Some(Arc::new(opener)), ..self }
    }

    /// The same, of a target, where others may bring `batches`.
    pub(super) fn with_lanes_coming(self, batches: mpsc::Receiver<RecvStream>) -> Self {
        Self { lane_batches: Some(Arc::new(Mutex::new(batches))), ..self }
    }

    /// The name in the peer's certificate.
    pub fn peer(&self) -> &PeerName {
        &self.peer
    }

    /// The peer's address at present.
    pub fn remote_address(&self) -> SocketAddr {
        self.quinn.remote_address()
    }

    /// Opens the control stream (agents).
    pub async fn open_control(&self) -> Result<(SendHalf, ReceiveHalf), StreamError> {
        self.open(CONTROL_STREAM, CONTROL_PRIORITY).await
    }

    /// Opens the sync stream (agents).
    pub async fn open_sync(&self) -> Result<(SendHalf, ReceiveHalf), StreamError> {
        self.open(SYNC_STREAM, SYNC_PRIORITY).await
    }

    /// Takes the control stream (targets). It is the first that an agent opens.
    pub async fn accept_control(&self) -> Result<(SendHalf, ReceiveHalf), StreamError> {
        self.accept(CONTROL_STREAM, CONTROL_PRIORITY).await
    }

    /// Takes the sync stream (targets). It is the second that an agent opens.
    pub async fn accept_sync(&self) -> Result<(SendHalf, ReceiveHalf), StreamError> {
        self.accept(SYNC_STREAM, SYNC_PRIORITY).await
    }

    async fn open(&self, kind: u8, priority: i32) -> Result<(SendHalf, ReceiveHalf), StreamError> {
        let (mut send, recv) = self.quinn.open_bi().await.map_err(ended)?;
        let _ = send.set_priority(priority);
        send.write_all(&[kind]).await.map_err(|error| StreamError::Stream(error.to_string()))?;
        Ok(self.halves(kind, send, recv))
    }

    async fn accept(
        &self,
        expected: u8,
        priority: i32,
    ) -> Result<(SendHalf, ReceiveHalf), StreamError> {
        let (send, mut recv) = self.quinn.accept_bi().await.map_err(ended)?;
        let _ = send.set_priority(priority);
        let mut kind = [0];
        recv.read_exact(&mut kind).await.map_err(|error| StreamError::Stream(error.to_string()))?;
        if kind[0] != expected {
            return Err(StreamError::Kind { found: kind[0], expected });
        }
        Ok(self.halves(expected, send, recv))
    }

    fn halves(&self, kind: u8, send: SendStream, recv: RecvStream) -> (SendHalf, ReceiveHalf) {
        match kind {
            CONTROL_STREAM => {
                (SendHalf::copied(send, &self.quinn), ReceiveHalf::copied(recv, &self.quinn))
            }
            _ => (SendHalf::plain(send), ReceiveHalf::plain(recv)),
        }
    }

    /// Sends a batch on a stream of its own; returns when the peer's transport has all of it. The
    /// chunks are not copied: quinn keeps them until they are acknowledged.
    pub async fn send_batch(&self, chunks: Vec<Bytes>) -> Result<(), StreamError> {
        let (release, turn) = (Release::at_once(Instant::now()), self.turns.take());
        self.release_batch(chunks, release, Weight::Heavy, turn).await
    }

    pub(crate) fn turns(&self) -> &Arc<Turns> {
        &self.turns
    }

    /// The same, with each byte when it is due; light ones before the others, which wait for their turn.
    pub(crate) async fn release_batch(
        &self,
        chunks: Vec<Bytes>,
        release: Release,
        weight: Weight,
        turn: Turn,
    ) -> Result<(), StreamError> {
        let broken = |error: String| StreamError::Stream(error);
        let bytes: usize = chunks.iter().map(Bytes::len).sum();
        let _unsent = self.unsent.batch(bytes as u64);
        self.bulk.follow(self.lanes.congestion_windows(Instant::now()));
        // One that leaves slowly would keep its place from those that wait for nothing.
        let is_light = weight == Weight::Light && release.is_at_once();
        let light_place = is_light.then(|| self.bulk.light_place(bytes)).flatten();
        let (priority, turn, _heavy_place) = match light_place {
            Some(_) => {
                drop(turn);
                (LIGHT_PRIORITY, None, None)
            }
            None => {
                turn.come().await;
                (self.next_priority(), Some(turn), self.bulk.place(bytes).await)
            }
        };
        let lane = self.lanes.pick(bytes as u64);
        let mut stream = lane.connection.open_uni().await.map_err(ended)?;
        drop(turn);
        let _ = stream.set_priority(priority);
        for (due, mut piece) in release.pieces(chunks) {
            // It may be due in seconds, and nothing is to stay until then of a link that has ended.
            tokio::select! {
                biased;
                () = wait_until(due) => {}
                error = lane.connection.closed() => return Err(ended(error)),
            }
            stream.write_all_chunks(&mut piece).await.map_err(|error| broken(error.to_string()))?;
        }
        stream.finish().map_err(|error| broken(error.to_string()))?;
        let acknowledged = stream.stopped().await;
        self.bulk.follow(self.lanes.congestion_windows(Instant::now()));
        acknowledged.map(drop).map_err(|error| broken(error.to_string()))
    }

    /// Batches go in their order, below control and hashes, and so do the parts of them that were
    /// lost: at one priority for all, what has to be sent again would wait behind every newer batch
    /// that the transport holds already, seconds on a slow line, and the target cannot acknowledge
    /// past it.
    fn next_priority(&self) -> i32 {
        let sent = self.batches.fetch_add(1, Ordering::Relaxed);
        // Once in two thousand million batches a few of them are in the wrong order.
        -((sent % i32::MAX as u32) as i32)
    }

    /// The next batch stream that the peer opens, on whichever connection. Cancel safe.
    pub async fn accept_batch(&self) -> Result<BatchStream, StreamError> {
        let of_lanes = async {
            match &self.lane_batches {
                Some(batches) => batches.lock().await.recv().await,
                None => None,
            }
        };
        tokio::select! {
            stream = self.quinn.accept_uni() => Ok(BatchStream::new(stream.map_err(ended)?)),
            Some(stream) = of_lanes => Ok(BatchStream::new(stream)),
        }
    }

    /// What the transport knows of the link.
    pub fn stats(&self) -> LinkStats {
        let first = self.quinn.stats();
        let mut stats = LinkStats {
            rtt: first.path.rtt,
            congestion_window_bytes: self.lanes.congestion_windows(Instant::now()),
            mtu_bytes: first.path.current_mtu,
            socket: self.socket,
            connections: self.lanes.in_use() as u32,
            ..LinkStats::default()
        };
        let header_bytes = datagram_header_bytes(self.remote_address());
        self.lanes.each(|connection| {
            let one = connection.stats();
            let (datagrams, lost) = (one.udp_tx.datagrams, one.path.lost_packets);
            stats.link_bytes += one.udp_tx.bytes + datagrams * header_bytes;
            let sealed_bytes = one.udp_tx.bytes.saturating_sub(one.path.lost_bytes);
            let heads_bytes = datagrams.saturating_sub(lost) * QUIC_PACKET_BYTES;
            stats.content_bytes += sealed_bytes.saturating_sub(heads_bytes);
            stats.sent_bytes += one.udp_tx.bytes;
            stats.received_bytes += one.udp_rx.bytes;
            stats.sent_packets += one.path.sent_packets;
            stats.lost_packets += one.path.lost_packets;
            stats.lost_bytes += one.path.lost_bytes;
            stats.mtu_black_holes += one.path.black_holes_detected;
        });
        stats
    }

    /// Bytes of batches that the peer's transport does not have whole.
    pub(crate) fn unsent_bytes(&self) -> u64 {
        self.unsent.bytes()
    }

    /// Whether a ceiling of so many bytes a second is kept packet by packet.
    pub(crate) fn keeps_ceiling(&self, bytes_per_second: u64) -> bool {
        let path = self.quinn.stats().path;
        congestion::keeps_ceiling(bytes_per_second, path.rtt, path.current_mtu)
    }

    /// What the congestion controllers know of the path. This copies them: ask once a second, not once
    /// a packet.
    pub fn congestion(&self) -> Option<CongestionStats> {
        self.lanes.congestion()
    }

    /// Looks after an agent's link four times a second; never returns.
    ///
    /// It knocks for as long as the peer is silent. In a blackout the window is full of what was lost,
    /// and the transport's own probes come at intervals that double: a link that is back after five
    /// seconds would stay idle for another five, and one that is there every other second would be missed
    /// again and again. So every knock lets a few packets out. Each connection is knocked at by itself: the
    /// first one heard does not wake the others.
    ///
    /// And it opens more connections while one core is what limits the link.
    pub async fn look_after(&self) {
        let mut period = tokio::time::interval(UPKEEP_PERIOD);
        // After a pause of this process nothing can have been heard between ticks that come at once.
        period.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut upkeeps = 0;
        loop {
            let now = period.tick().await;
            let is_heard = self.lanes.look_after();
            upkeeps = (upkeeps + 1) % UPKEEPS_PER_SECOND;
            if let Some(opener) = self.opener.as_ref().filter(|_| is_heard && upkeeps == 0) {
                opener.handle_second(now.into_std(), &self.lanes, self.remote_address());
            }
        }
    }

    /// What the busiest driver of this link took of a core since this was called before, in percent.
    pub fn load_percent(&self) -> u32 {
        (self.lanes.busiest(Instant::now()) * 100.0) as u32
    }

    /// The target says what its busiest driver takes of a core, and how many connections its cores
    /// are worth.
    pub fn handle_peer_load(&self, percent: u32, connections_max: u32) {
        if let Some(opener) = &self.opener {
            opener.handle_peer(percent, connections_max);
        }
    }

    /// Closes the link, telling the peer why. The first reason counts.
    pub fn close(&self, reason: &str) {
        self.lanes.close(reason);
    }

    /// Waits until the end of an agent's link, which was closed, has left the socket; [`END_TIME_MAX`] at most.
    pub(crate) async fn left(&self) {
        if let Some(opener) = &self.opener {
            // Whoever does not hear of it takes the link for silent in the end.
            let _ = tokio::time::timeout(END_TIME_MAX, opener.wait_idle()).await;
        }
    }

    /// Waits until the connection has ended, and says why.
    pub async fn closed(&self) -> String {
        match self.quinn.closed().await {
            quinn::ConnectionError::ApplicationClosed(close) if !close.reason.is_empty() => {
                String::from_utf8_lossy(&close.reason).into_owned()
            }
            quinn::ConnectionError::TimedOut => "the link fell silent".into(),
            quinn::ConnectionError::LocallyClosed => {
                self.lanes.closed_here().unwrap_or_else(|| "it was closed here".into())
            }
            other => other.to_string(),
        }
    }
}
