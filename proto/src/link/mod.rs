//! A connection between an agent and a target, over whichever transport the site lets through.
//!
//! QUIC is the first choice: it fills long, lossy links, and control never waits behind data. Where
//! a firewall passes no UDP, and within a LAN, TCP with TLS 1.3 carries the same session. Nothing above this module
//! knows the difference, except to tell people which one it is.

mod endpoint;
mod frames;
mod places;
pub mod probe;
mod turns;
mod unsent;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes};
use thiserror::Error;

use crate::batch::{BatchHeader, HEADER_BYTES, HeaderError};
use crate::id::PeerName;
use crate::limits::{CONTROL_BATCH_BYTES_MAX, CONTROL_BATCH_BYTES_MAX_TCP};
use crate::message::FrameError;
use crate::quic::{CongestionStats, SocketFacts};
use crate::session::{Due, Weight};
use crate::{quic, tcp};

pub use endpoint::{ConnectOptions, Handshake, Listener, TransportChoice, connect};
pub use frames::{FrameReceiver, FrameSender};
pub use places::{Place, Places};
pub(crate) use turns::{Turn, Turns};
pub(crate) use unsent::Unsent;

/// First byte of the control stream.
pub(crate) const CONTROL_STREAM: u8 = 1;
/// First byte of the sync stream.
pub(crate) const SYNC_STREAM: u8 = 2;

/// Why a stream ended.
#[derive(Debug, Error)]
pub enum StreamError {
    /// The connection is gone, for the reason given.
    #[error("the connection ended: {0}")]
    Connection(String),
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

/// Header of IP of a packet to `peer`, in bytes. A socket of both families has an IPv4 peer under an IPv6
/// address.
pub(crate) fn ip_header_bytes(peer: SocketAddr) -> u64 {
    match peer.ip().to_canonical() {
        IpAddr::V4(_) => 20,
        IpAddr::V6(_) => 40,
    }
}

/// Waits until `due`. What is due already does not wait for the next tick of a timer, a millisecond.
pub(crate) async fn wait_until(due: Instant) {
    if due > Instant::now() {
        tokio::time::sleep_until(due.into()).await;
    }
}

/// What carries a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// QUIC over UDP.
    Quic,
    /// TLS 1.3 over TCP.
    Tcp,
}

impl Transport {
    /// Most bytes of a batch that travels in a control message, header included.
    pub fn control_batch_bytes_max(self) -> usize {
        match self {
            Self::Quic => CONTROL_BATCH_BYTES_MAX,
            Self::Tcp => CONTROL_BATCH_BYTES_MAX_TCP,
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Quic => "quic",
            Self::Tcp => "tcp",
        })
    }
}

/// What the transport knows of the link. Over TCP it is what the kernel
/// says of the connection for batches; what it does not say is 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LinkStats {
    /// Smoothed round-trip time.
    pub rtt: Duration,
    /// Bytes that may be in flight.
    pub congestion_window_bytes: u64,
    /// The path's MTU: over QUIC as a UDP payload, over TCP with all headers.
    pub mtu_bytes: u16,
    /// Bytes sent, headers of QUIC included.
    pub sent_bytes: u64,
    /// Bytes received.
    pub received_bytes: u64,
    /// Packets declared lost.
    pub lost_packets: u64,
    /// Bytes in those, sent again.
    pub lost_bytes: u64,
    /// Times that an MTU black hole was found.
    pub mtu_black_holes: u64,
    /// The socket under it.
    pub socket: SocketFacts,
    /// Packets sent.
    pub sent_packets: u64,
    /// Bytes of IP packets with batches and messages that the link was given, what was sent again
    /// included. Over TCP those of the connection for batches.
    pub link_bytes: u64,
    /// Bytes of content in those, each once. Headers are known to a few bytes a packet.
    pub content_bytes: u64,
    /// QUIC connections that carry its batches; 0 over TCP, which has one.
    pub connections: u32,
}

/// What whoever sends takes the path for: our congestion controller over QUIC, the kernel over TCP.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PathStats {
    /// Where the congestion controller stands, `probe_bw_cruise` say; empty over TCP.
    pub state: &'static str,
    /// Its rate in bytes a second, over TCP of the last measure; 0 when none was made.
    pub bytes_per_second: u64,
    /// Its smallest round-trip time of late; 0 when none was measured.
    pub min_rtt: Duration,
}

/// An authenticated connection. Clones share it.
#[derive(Debug, Clone)]
pub enum Connection {
    /// Over QUIC.
    Quic(quic::Connection),
    /// Over TCP.
    Tcp(tcp::Connection),
}

impl Connection {
    /// What carries it.
    pub fn transport(&self) -> Transport {
        match self {
            Self::Quic(_) => Transport::Quic,
            Self::Tcp(_) => Transport::Tcp,
        }
    }

    /// The name in the peer's certificate.
    pub fn peer(&self) -> &PeerName {
        match self {
            Self::Quic(connection) => connection.peer(),
            Self::Tcp(connection) => connection.peer(),
        }
    }

    /// The peer's address at present.
    pub fn remote_address(&self) -> SocketAddr {
        match self {
            Self::Quic(connection) => connection.remote_address(),
            Self::Tcp(connection) => connection.remote_address(),
        }
    }

    /// Opens the control stream (agents). It is the first that an agent opens.
    pub async fn open_control(&self) -> Result<(FrameSender, FrameReceiver), StreamError> {
        match self {
            Self::Quic(connection) => Ok(frames::over_quic(connection.open_control().await?)),
            Self::Tcp(connection) => Ok(frames::over_tcp(connection.take_control()?)),
        }
    }

    /// Opens the sync stream (agents). It is the second that an agent opens.
    pub async fn open_sync(&self) -> Result<(FrameSender, FrameReceiver), StreamError> {
        match self {
            Self::Quic(connection) => Ok(frames::over_quic(connection.open_sync().await?)),
            Self::Tcp(connection) => Ok(frames::over_tcp(connection.take_sync()?)),
        }
    }

    /// Takes the control stream (targets).
    pub async fn accept_control(&self) -> Result<(FrameSender, FrameReceiver), StreamError> {
        match self {
            Self::Quic(connection) => Ok(frames::over_quic(connection.accept_control().await?)),
            Self::Tcp(connection) => Ok(frames::over_tcp(connection.take_control()?)),
        }
    }

    /// Takes the sync stream (targets).
    pub async fn accept_sync(&self) -> Result<(FrameSender, FrameReceiver), StreamError> {
        match self {
            Self::Quic(connection) => Ok(frames::over_quic(connection.accept_sync().await?)),
            Self::Tcp(connection) => Ok(frames::over_tcp(connection.take_sync()?)),
        }
    }

    /// Sends a batch; returns when the transport has no more to do with it: over QUIC when the peer
    /// has all of it, over TCP when the kernel has. The chunks are not copied.
    pub fn send_batch(
        &self,
        chunks: Vec<Bytes>,
    ) -> impl Future<Output = Result<(), StreamError>> + Send + use<> {
        self.release_batch(chunks, Due::at_once(Instant::now()), Weight::Heavy)
    }

    /// The same, with each byte when it is due; light ones before heavy ones, and heavy ones begin in the order of
    /// the calls, whenever each is polled. Over TCP, where no other batch passes one that leaves slowly, only
    /// the link's ceiling makes it do so.
    pub fn release_batch(
        &self,
        chunks: Vec<Bytes>,
        due: Due,
        weight: Weight,
    ) -> impl Future<Output = Result<(), StreamError>> + Send + use<> {
        let (connection, turn) = (self.clone(), self.turns().take());
        async move {
            match connection {
                Self::Quic(quic) => quic.release_batch(chunks, due.longer(), weight, turn).await,
                Self::Tcp(tcp) => tcp.release_batch(chunks, due.link, weight, turn).await,
            }
        }
    }

    fn turns(&self) -> &Arc<Turns> {
        match self {
            Self::Quic(connection) => connection.turns(),
            Self::Tcp(connection) => connection.turns(),
        }
    }

    /// The next batch that the peer sends.
    pub async fn accept_batch(&self) -> Result<BatchStream, StreamError> {
        Ok(match self {
            Self::Quic(connection) => BatchStream::Quic(connection.accept_batch().await?),
            Self::Tcp(connection) => BatchStream::Tcp(connection.accept_batch().await?),
        })
    }

    /// What the transport knows of the link.
    pub fn stats(&self) -> LinkStats {
        match self {
            Self::Quic(connection) => connection.stats(),
            Self::Tcp(connection) => connection.stats(),
        }
    }

    /// Bytes of batches that were handed over and have not left: over QUIC those of batches that the
    /// peer's transport does not have whole, over TCP what the kernel has not sent.
    pub fn unsent_bytes(&self) -> u64 {
        match self {
            Self::Quic(connection) => connection.unsent_bytes(),
            Self::Tcp(connection) => connection.unsent_bytes(),
        }
    }

    /// Whether the transport keeps a ceiling of so many bytes a second by itself, packet by packet: over
    /// QUIC, unless the path is so short that a few packets under way exceed it.
    pub fn keeps_ceiling(&self, bytes_per_second: u64) -> bool {
        match self {
            Self::Quic(connection) => connection.keeps_ceiling(bytes_per_second),
            Self::Tcp(_) => false,
        }
    }

    /// What the congestion controller knows of the path; `None` over TCP.
    pub fn congestion(&self) -> Option<CongestionStats> {
        match self {
            Self::Quic(connection) => connection.congestion(),
            Self::Tcp(_) => None,
        }
    }

    /// What the path is taken for. Over QUIC this copies controllers: ask once a second, not once a packet.
    pub fn path(&self) -> PathStats {
        match self {
            Self::Quic(connection) => {
                connection.congestion().map_or_else(PathStats::default, |known| PathStats {
                    state: known.state,
                    bytes_per_second: known.bandwidth_bytes_per_second,
                    min_rtt: known.min_rtt.unwrap_or_default(),
                })
            }
            Self::Tcp(connection) => connection.path(),
        }
    }

    /// Closes the connection, telling the peer why. The first reason counts.
    pub fn close(&self, reason: &str) {
        match self {
            Self::Quic(connection) => connection.close(reason),
            Self::Tcp(connection) => connection.close(reason),
        }
    }

    /// Closes it in a process that is about to end: waits until the last packet has left, or over TCP until the peer
    /// has taken the reason; a second at most.
    pub async fn end(&self, reason: &str) {
        self.close(reason);
        match self {
            Self::Quic(connection) => connection.left().await,
            Self::Tcp(connection) => connection.left().await,
        }
    }

    /// Whether TCP was chosen because the target is near.
    pub fn is_within_lan(&self) -> bool {
        match self {
            Self::Quic(_) => false,
            Self::Tcp(connection) => connection.is_within_lan(),
        }
    }

    /// Waits until a TCP connection within a LAN had better be one over QUIC, and says why; never
    /// returns for others.
    pub async fn unfit(&self) -> String {
        match self {
            Self::Tcp(connection) if connection.is_within_lan() => connection.unfit().await,
            _ => std::future::pending().await,
        }
    }

    /// Looks after an agent's link, which may go dark for seconds or want more connections; never
    /// returns, runs beside the session.
    pub async fn look_after(&self) {
        match self {
            Self::Quic(connection) => connection.look_after().await,
            Self::Tcp(connection) => connection.look_after().await,
        }
    }

    /// What the busiest driver of the link took of a core since this was called before, in percent; 0
    /// over TCP.
    pub fn load_percent(&self) -> u32 {
        match self {
            Self::Quic(connection) => connection.load_percent(),
            Self::Tcp(_) => 0,
        }
    }

    /// The target says what its busiest driver takes of a core, and how many connections its cores
    /// are worth.
    pub fn handle_peer_load(&self, percent: u32, connections_max: u32) {
        match self {
            Self::Quic(connection) => connection.handle_peer_load(percent, connections_max),
            Self::Tcp(_) => {}
        }
    }

    /// Waits until the connection has ended, and says why: in the words of whoever closed it.
    pub async fn closed(&self) -> String {
        match self {
            Self::Quic(connection) => connection.closed().await,
            Self::Tcp(connection) => connection.closed().await,
        }
    }
}

/// A batch on its way in.
#[derive(Debug)]
pub enum BatchStream {
    /// On a QUIC stream of its own.
    Quic(quic::BatchStream),
    /// One after the other on the TCP connection for batches.
    Tcp(tcp::BatchStream),
    /// In a control message.
    Message(Bytes),
}

impl BatchStream {
    /// Reads the header, which comes first.
    pub async fn read_header(&mut self) -> Result<BatchHeader, StreamError> {
        match self {
            Self::Quic(stream) => stream.read_header().await,
            Self::Tcp(stream) => stream.read_header(),
            Self::Message(bytes) => {
                let header =
                    bytes.split_first_chunk().map(|(header, _)| BatchHeader::decode(header));
                let header = header.ok_or_else(too_short)??;
                bytes.advance(HEADER_BYTES);
                Ok(header)
            }
        }
    }

    /// Fills `buf`: the one copy between the datagram and the buffer that is journalled.
    pub async fn read_exact(&mut self, buf: &mut [u8]) -> Result<(), StreamError> {
        match self {
            Self::Quic(stream) => stream.read_exact(buf).await,
            Self::Tcp(stream) => stream.read_exact(buf).await,
            Self::Message(bytes) => bytes.try_copy_to_slice(buf).map_err(|_| too_short()),
        }
    }

    /// Checks that nothing follows. Over TCP the next batch does, and is let through.
    pub async fn read_end(&mut self) -> Result<(), StreamError> {
        match self {
            Self::Quic(stream) => stream.read_end().await,
            Self::Tcp(stream) => {
                stream.read_end();
                Ok(())
            }
            Self::Message(bytes) if bytes.is_empty() => Ok(()),
            Self::Message(_) => Err(StreamError::Stream("more bytes follow a batch".into())),
        }
    }
}

fn too_short() -> StreamError {
    StreamError::Stream("a control message holds less than a batch".into())
}

#[cfg(test)]
mod tests {
    use super::ip_header_bytes;

    /// The ceiling took every peer for one over IPv4, and the counters an IPv4 peer of a socket of both
    /// families for one over IPv6.
    #[test]
    fn a_mapped_address_is_one_of_ipv4() {
        for (peer, bytes) in [("10.0.0.1:1", 20), ("[::ffff:10.0.0.1]:1", 20), ("[fd00::1]:1", 40)]
        {
            assert_eq!(ip_header_bytes(peer.parse().unwrap()), bytes, "{peer}");
        }
    }
}
