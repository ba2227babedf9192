//! A connection between an agent and a target, and the streams on it.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use prost::Message;
use quinn::{RecvStream, SendStream, VarInt};
use thiserror::Error;

use crate::batch::{BatchHeader, HEADER_BYTES, HeaderError};
use crate::id::PeerName;
use crate::message::{FrameError, decode, frame, frame_len};
use crate::quic::congestion::{self, CongestionStats};

/// First byte of the control stream.
const CONTROL_STREAM: u8 = 1;
/// First byte of the sync stream.
const SYNC_STREAM: u8 = 2;

/// Control goes before everything, hashes before batches.
const CONTROL_PRIORITY: i32 = 2;
const SYNC_PRIORITY: i32 = 1;

/// Why a stream ended.
#[derive(Debug, Error)]
pub enum StreamError {
    /// The connection is gone.
    #[error("the connection ended: {0}")]
    Connection(#[from] quinn::ConnectionError),
    /// The peer ended or reset the stream, or it broke.
    #[error("the stream ended: {0}")]
    Stream(String),
    /// The stream is not the one that had to come.
    #[error("the peer opened a stream of kind {found} where {expected} had to come")]
    Kind {
        /// What came.
        found: u8,
        /// What had to.
        expected: u8,
    },
    /// A frame is not a message.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A batch's header is not one.
    #[error(transparent)]
    Header(#[from] HeaderError),
}

/// An authenticated connection. Clones share it.
#[derive(Debug, Clone)]
pub struct Connection {
    quinn: quinn::Connection,
    peer: PeerName,
}

/// What the transport knows of the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkStats {
    /// Smoothed round-trip time.
    pub rtt: Duration,
    /// Bytes that may be in flight.
    pub congestion_window_bytes: u64,
    /// The path's MTU, as a UDP payload.
    pub mtu_bytes: u16,
    /// UDP bytes sent, headers of QUIC included.
    pub sent_bytes: u64,
    /// UDP bytes received.
    pub received_bytes: u64,
    /// Packets declared lost.
    pub lost_packets: u64,
    /// Packets sent.
    pub sent_packets: u64,
}

impl Connection {
    pub(crate) fn new(quinn: quinn::Connection, peer: PeerName) -> Self {
        Self { quinn, peer }
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
    pub async fn open_control(&self) -> Result<(FrameSender, FrameReceiver), StreamError> {
        self.open(CONTROL_STREAM, CONTROL_PRIORITY).await
    }

    /// Opens the sync stream (agents).
    pub async fn open_sync(&self) -> Result<(FrameSender, FrameReceiver), StreamError> {
        self.open(SYNC_STREAM, SYNC_PRIORITY).await
    }

    /// Takes the control stream (targets). It is the first that an agent opens.
    pub async fn accept_control(&self) -> Result<(FrameSender, FrameReceiver), StreamError> {
        self.accept(CONTROL_STREAM, CONTROL_PRIORITY).await
    }

    /// Takes the sync stream (targets). It is the second that an agent opens.
    pub async fn accept_sync(&self) -> Result<(FrameSender, FrameReceiver), StreamError> {
        self.accept(SYNC_STREAM, SYNC_PRIORITY).await
    }

    async fn open(
        &self,
        kind: u8,
        priority: i32,
    ) -> Result<(FrameSender, FrameReceiver), StreamError> {
        let (mut send, recv) = self.quinn.open_bi().await?;
        let _ = send.set_priority(priority);
        send.write_all(&[kind]).await.map_err(|error| StreamError::Stream(error.to_string()))?;
        Ok((FrameSender(send), FrameReceiver { recv, buffer: BytesMut::new() }))
    }

    async fn accept(
        &self,
        expected: u8,
        priority: i32,
    ) -> Result<(FrameSender, FrameReceiver), StreamError> {
        let (send, mut recv) = self.quinn.accept_bi().await?;
        let _ = send.set_priority(priority);
        let mut kind = [0];
        recv.read_exact(&mut kind).await.map_err(|error| StreamError::Stream(error.to_string()))?;
        if kind[0] != expected {
            return Err(StreamError::Kind { found: kind[0], expected });
        }
        Ok((FrameSender(send), FrameReceiver { recv, buffer: BytesMut::new() }))
    }

    /// Sends a batch on a stream of its own; returns when the transport has taken all of it. The
    /// chunks are not copied: quinn keeps them until they are acknowledged.
    pub async fn send_batch(&self, mut chunks: Vec<Bytes>) -> Result<(), StreamError> {
        let broken = |error: String| StreamError::Stream(error);
        let mut stream = self.quinn.open_uni().await?;
        stream.write_all_chunks(&mut chunks).await.map_err(|error| broken(error.to_string()))?;
        stream.finish().map_err(|error| broken(error.to_string()))
    }

    /// The next batch stream that the peer opens.
    pub async fn accept_batch(&self) -> Result<BatchStream, StreamError> {
        Ok(BatchStream(self.quinn.accept_uni().await?))
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
            sent_packets: stats.path.sent_packets,
        }
    }

    /// What the congestion controller knows of the path. This copies the controller: ask once a
    /// second, not once a packet.
    pub fn congestion(&self) -> Option<CongestionStats> {
        congestion::stats(&self.quinn)
    }

    /// Closes the connection, telling the peer why.
    pub fn close(&self, reason: &str) {
        self.quinn.close(VarInt::from_u32(0), reason.as_bytes());
    }

    /// Waits until the connection has ended, and says why.
    pub async fn closed(&self) -> String {
        match self.quinn.closed().await {
            quinn::ConnectionError::ApplicationClosed(close) if !close.reason.is_empty() => {
                String::from_utf8_lossy(&close.reason).into_owned()
            }
            quinn::ConnectionError::TimedOut => "the link fell silent".into(),
            quinn::ConnectionError::LocallyClosed => "it was closed here".into(),
            other => other.to_string(),
        }
    }
}

/// The sending half of a stream of messages.
#[derive(Debug)]
pub struct FrameSender(SendStream);

impl FrameSender {
    /// Sends one message.
    pub async fn send(&mut self, message: &impl Message) -> Result<(), StreamError> {
        let bytes = frame(message);
        self.0.write_chunk(bytes).await.map_err(|error| StreamError::Stream(error.to_string()))
    }

    /// Says that nothing more will come, and waits until the peer has everything.
    pub async fn finish(&mut self) {
        let _ = self.0.finish();
        let _ = self.0.stopped().await;
    }
}

/// The receiving half of a stream of messages.
#[derive(Debug)]
pub struct FrameReceiver {
    recv: RecvStream,
    buffer: BytesMut,
}

impl FrameReceiver {
    /// The next message; `None` when the peer finished the stream. Cancel safe.
    pub async fn recv<M: Message + Default>(&mut self) -> Result<Option<M>, StreamError> {
        loop {
            if let Some(prefix) = self.buffer.first_chunk::<4>() {
                let len = frame_len(*prefix)?;
                if self.buffer.len() >= 4 + len {
                    let content = self.buffer.split_to(4 + len);
                    return Ok(Some(decode(&content[4..])?));
                }
            }
            match self.recv.read_chunk(64 << 10, true).await {
                Ok(Some(chunk)) => self.buffer.extend_from_slice(&chunk.bytes),
                Ok(None) if self.buffer.is_empty() => return Ok(None),
                Ok(None) => return Err(StreamError::Stream("it ended inside a message".into())),
                Err(error) => return Err(StreamError::Stream(error.to_string())),
            }
        }
    }
}

/// A batch on its way in.
#[derive(Debug)]
pub struct BatchStream(RecvStream);

impl BatchStream {
    /// Reads the header, which comes first.
    pub async fn read_header(&mut self) -> Result<BatchHeader, StreamError> {
        let mut bytes = [0; HEADER_BYTES];
        self.read_exact(&mut bytes).await?;
        Ok(BatchHeader::decode(&bytes)?)
    }

    /// Fills `buf`: the one copy between the datagram and the buffer that is journalled.
    pub async fn read_exact(&mut self, buf: &mut [u8]) -> Result<(), StreamError> {
        self.0.read_exact(buf).await.map_err(|error| StreamError::Stream(error.to_string()))
    }

    /// Checks that nothing follows.
    pub async fn read_end(&mut self) -> Result<(), StreamError> {
        let mut more = [0];
        match self.0.read(&mut more).await {
            Ok(None) => Ok(()),
            Ok(Some(_)) => Err(StreamError::Stream("more bytes follow a batch".into())),
            Err(error) => Err(StreamError::Stream(error.to_string())),
        }
    }
}
