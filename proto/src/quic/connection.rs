//! A connection between an agent and a target, and the streams on it.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use quinn::{RecvStream, SendStream, VarInt};

use crate::id::PeerName;
use crate::link::{CONTROL_STREAM, LinkStats, SYNC_STREAM, StreamError};
use crate::quic::SocketFacts;
use crate::quic::bulk::Bulk;
use crate::quic::congestion::{self, CongestionStats};
use crate::quic::streams::{BatchStream, ReceiveHalf, SendHalf, ended};

/// Control goes before everything, hashes before batches.
const CONTROL_PRIORITY: i32 = 2;
const SYNC_PRIORITY: i32 = 1;

/// How long the peer is silent before the first knock, and how long until the next: heartbeats, which
/// are answered, come as often.
const KNOCK_PERIOD: Duration = Duration::from_secs(1);

/// An authenticated connection. Clones share it.
#[derive(Debug, Clone)]
pub struct Connection {
    quinn: quinn::Connection,
    peer: PeerName,
    socket: SocketFacts,
    /// What batches may take of the transport's window.
    bulk: Arc<Bulk>,
    /// Batches sent so far.
    batches: Arc<AtomicU32>,
    /// Why it was closed here, if it was.
    closing: Arc<OnceLock<String>>,
}

impl Connection {
    /// `window_bytes` is what the transport holds of data that the peer has not acknowledged.
    pub(crate) fn new(
        quinn: quinn::Connection,
        peer: PeerName,
        socket: SocketFacts,
        window_bytes: u32,
    ) -> Self {
        let bulk = Arc::new(Bulk::new(window_bytes));
        let (batches, closing) = (Arc::default(), Arc::default());
        Self { quinn, peer, socket, bulk, batches, closing }
    }

    /// The name in the peer's certificate.
    pub fn peer(&self) -> &PeerName {
        &self.peer
    }

    /// The peer's address at present.
    pub fn remote_address(&self) -> std::net::SocketAddr {
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
    pub async fn send_batch(&self, mut chunks: Vec<Bytes>) -> Result<(), StreamError> {
        let broken = |error: String| StreamError::Stream(error);
        let bytes: usize = chunks.iter().map(Bytes::len).sum();
        self.bulk.follow(self.quinn.stats().path.cwnd);
        let _place = self.bulk.place(bytes).await;
        let mut stream = self.quinn.open_uni().await.map_err(ended)?;
        let _ = stream.set_priority(self.next_priority());
        stream.write_all_chunks(&mut chunks).await.map_err(|error| broken(error.to_string()))?;
        stream.finish().map_err(|error| broken(error.to_string()))?;
        let acknowledged = stream.stopped().await;
        self.bulk.follow(self.quinn.stats().path.cwnd);
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

    /// The next batch stream that the peer opens.
    pub async fn accept_batch(&self) -> Result<BatchStream, StreamError> {
        Ok(BatchStream::new(self.quinn.accept_uni().await.map_err(ended)?))
    }

    /// What the transport knows of the link.
    pub fn stats(&self) -> LinkStats {
        let stats = self.quinn.stats();
        LinkStats {
            rtt: stats.path.rtt,
            congestion_window_bytes: stats.path.cwnd,
            mtu_bytes: stats.path.current_mtu,
            sent_bytes: stats.udp_tx.bytes,
            received_bytes: stats.udp_rx.bytes,
            lost_packets: stats.path.lost_packets,
            lost_bytes: stats.path.lost_bytes,
            mtu_black_holes: stats.path.black_holes_detected,
            socket: self.socket,
            sent_packets: stats.path.sent_packets,
            ..LinkStats::default()
        }
    }

    /// What the congestion controller knows of the path. This copies the controller: ask once a
    /// second, not once a packet.
    pub fn congestion(&self) -> Option<CongestionStats> {
        congestion::stats(&self.quinn)
    }

    /// Knocks for as long as the peer is silent; never returns. In a blackout the window is full of
    /// what was lost, and the transport's own probes come at intervals that double: a link that is
    /// back after five seconds would stay idle for another five. So every knock lets a few packets
    /// out; with heartbeats to carry, the first acknowledgement comes within about a second.
    pub async fn knock_while_silent(&self) {
        let mut period = tokio::time::interval(KNOCK_PERIOD);
        let mut heard = 0;
        loop {
            period.tick().await;
            let now_heard = self.quinn.stats().udp_rx.datagrams;
            if now_heard == heard {
                congestion::knock(&self.quinn);
            }
            heard = now_heard;
        }
    }

    /// Closes the connection, telling the peer why. The first reason counts.
    pub fn close(&self, reason: &str) {
        let _ = self.closing.set(reason.to_owned());
        self.quinn.close(VarInt::from_u32(0), reason.as_bytes());
    }

    /// Waits until the connection has ended, and says why.
    pub async fn closed(&self) -> String {
        match self.quinn.closed().await {
            quinn::ConnectionError::ApplicationClosed(close) if !close.reason.is_empty() => {
                String::from_utf8_lossy(&close.reason).into_owned()
            }
            quinn::ConnectionError::TimedOut => "the link fell silent".into(),
            quinn::ConnectionError::LocallyClosed => {
                self.closing.get().cloned().unwrap_or_else(|| "it was closed here".into())
            }
            other => other.to_string(),
        }
    }
}
