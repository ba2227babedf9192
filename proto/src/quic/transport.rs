//! What the transport is tuned by.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use quinn::{IdleTimeout, MtuDiscoveryConfig, VarInt};

use crate::quic::Connections;
use crate::quic::congestion::{Limited, Method, PathMemory, RateLimit, Siblings};
use crate::quic::lanes::lane_window_bytes;

/// Packets that quinn hands to the system at a time (its `MAX_TRANSMIT_SEGMENTS`).
const SEGMENTS_MAX: usize = 10;

/// Most that one UDP send can carry: 65,535 bytes less the headers of IPv4 and UDP.
const UDP_SEND_BYTES_MAX: usize = 65_507;

/// Largest UDP payload that path-MTU discovery tries. Of one that is larger, as many as quinn sends at
/// a time exceed what one UDP send can carry: the packets would vanish.
const UDP_PAYLOAD_BYTES_MAX: u16 = 6500;
const _: () = assert!(SEGMENTS_MAX * UDP_PAYLOAD_BYTES_MAX as usize <= UDP_SEND_BYTES_MAX);

/// Receive window of a stream: a batch, whatever its size, hardly waits for it.
const STREAM_WINDOW_BYTES: u32 = 2 << 20;

/// Gaps in one stream at which the peer gives the connection up (quinn's `MAX_CHUNKS`).
const STREAM_GAPS_MAX: u32 = 1024;

/// The least that a full packet carries of a stream: QUIC's smallest MTU, 1,200 bytes, less the headers
/// of packet and frame and the cipher's tag.
const STREAM_BYTES_OF_PACKET_MIN: u32 = 1200 - 70;

// Were every second packet missing, a stream would have half as many gaps as its window has packets.
const _: () = assert!(STREAM_WINDOW_BYTES / STREAM_BYTES_OF_PACKET_MIN / 2 < STREAM_GAPS_MAX);

/// What an agent's socket takes. Only control and hashes come back; and quinn receives into two thousand
/// times as much: with nine handshakes under way after a blackout, larger ones held 120 MiB.
const UDP_PAYLOAD_BYTES_MAX_AGENT: u16 = 1500;

/// Batch streams that a peer may have open at a time on a connection.
pub(super) const BATCH_STREAMS_MAX: u32 = 256;

/// What a round trip is taken for before one was measured: a handshake is tried again after three times
/// as long. quinn's default is twice this.
const INITIAL_RTT: Duration = Duration::from_millis(167);

/// Copies of control frames that wait to leave, or to be read, in bytes; older ones give way. The
/// stream has them all, so this only has to reach a moment.
const COPIES_BYTES: usize = 64 << 10;

/// What may be under way in each direction, in bytes, when nothing else is said.
pub const WINDOW_BYTES: u32 = 48 << 20;

/// Receive window of a lane at an agent, which needs none.
const LANE_WINDOW_BYTES: u32 = 4 << 10;

/// How the sending rate is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Congestion {
    /// From the measured delivery rate and round-trip time; random loss does not slow it down.
    Auto,
    /// quinn's Cubic: for links shared with traffic that must not be pushed aside.
    Cubic,
    /// This many bits a second, for a line whose rate is bought and known.
    Fixed {
        /// The rate.
        bits_per_second: u64,
    },
}

impl fmt::Display for Congestion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cubic => f.write_str("cubic"),
            Self::Fixed { bits_per_second } => {
                write!(f, "fixed {} Mbit/s", *bits_per_second as f64 / 1e6)
            }
        }
    }
}

/// Knobs of the transport.
#[derive(Debug, Clone)]
pub struct TransportOptions {
    /// How the sending rate is found (default [`Congestion::Auto`]).
    pub congestion: Congestion,
    /// A ceiling on what is sent, changed through any clone while connections run (default: none).
    /// It holds for each connection that is made with these options.
    pub rate_limit: RateLimit,
    /// How many connections an agent's link is given (default [`Connections::Auto`]). A link with a
    /// ceiling, or with another [`Congestion`] than [`Congestion::Auto`], uses one, whatever this says.
    pub connections: Connections,
    /// Most bytes that may be under way in each direction (default [`WINDOW_BYTES`]), a bound on memory:
    /// batches take of it what the path is measured to carry. A target whose link has all its lanes may
    /// hold 15/8 of it. A link whose bandwidth × delay is more than a
    /// fifth of it may not be filled.
    pub window_bytes: u32,
    /// A peer that says nothing for this long is gone (default 10 s): shorter notices a dead link
    /// earlier, longer survives a VPN's re-keying.
    pub idle_timeout: Duration,
    /// Socket buffer that is asked for, in bytes (default 8 MiB). Too small, and bursts are dropped
    /// before this program sees them.
    pub socket_buffer_bytes: usize,
    /// What connections that were made with these options, one after the other, learned of their path:
    /// a link that is back after a dark begins at half of the rate it had. Clones share it, so each
    /// link wants options of its own.
    pub memory: PathMemory,
}

impl Default for TransportOptions {
    fn default() -> Self {
        Self {
            congestion: Congestion::Auto,
            rate_limit: RateLimit::default(),
            connections: Connections::Auto,
            window_bytes: WINDOW_BYTES,
            idle_timeout: Duration::from_secs(10),
            socket_buffer_bytes: 8 << 20,
            memory: PathMemory::default(),
        }
    }
}

impl TransportOptions {
    /// For the first connection of a link, to the others of which `siblings` is common; `header_bytes` are
    /// those of IP and UDP.
    pub(crate) fn to_quinn(&self, siblings: Siblings, header_bytes: u64) -> quinn::TransportConfig {
        self.to_quinn_with(siblings, header_bytes, Some(self.memory.clone()))
    }

    fn to_quinn_with(
        &self,
        siblings: Siblings,
        header_bytes: u64,
        memory: Option<PathMemory>,
    ) -> quinn::TransportConfig {
        let mut config = quinn::TransportConfig::default();
        config.stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES));
        config.receive_window(VarInt::from_u32(self.window_bytes));
        config.send_window(self.window_bytes.into());
        config.max_concurrent_uni_streams(VarInt::from_u32(BATCH_STREAMS_MAX));
        config.max_concurrent_bidi_streams(VarInt::from_u32(4));
        // IPsec and ECMP reorder; three packets, the default, would be taken for loss.
        config.packet_threshold(24);
        config.initial_rtt(INITIAL_RTT);
        let idle = IdleTimeout::try_from(self.idle_timeout)
            .unwrap_or_else(|_| IdleTimeout::from(VarInt::from_u32(10_000)));
        config.max_idle_timeout(Some(idle));
        config.keep_alive_interval(Some(self.idle_timeout / 5));
        // What is sent next is decided for every packet: without this, control waits until the batch that
        // was begun is sent whole, half a second on a slow line. Batches leave whole, one after the other,
        // by their priorities.
        config.send_fairness(true);
        config.datagram_receive_buffer_size(Some(COPIES_BYTES));
        config.datagram_send_buffer_size(COPIES_BYTES);
        let mut mtu = MtuDiscoveryConfig::default();
        mtu.upper_bound(UDP_PAYLOAD_BYTES_MAX);
        config.mtu_discovery_config(Some(mtu));
        let method = match self.congestion {
            Congestion::Auto => Method::Auto,
            Congestion::Cubic => Method::Cubic,
            Congestion::Fixed { bits_per_second } => {
                Method::Fixed { bytes_per_second: bits_per_second / 8 }
            }
        };
        let limit = self.rate_limit.clone();
        let factory = Limited { method, limit, header_bytes, siblings, memory };
        config.congestion_controller_factory(Arc::new(factory));
        config
    }

    /// For a target, which learns only after the handshake whether a connection is a lane: it begins
    /// with a lane's share of the window, and a link's first one is given all of it then.
    pub(crate) fn to_quinn_target(&self) -> quinn::TransportConfig {
        // It sends little, has nothing to share and no ceiling to count headers for; and its agents are
        // many.
        let mut config = self.to_quinn_with(Siblings::default(), 0, None);
        config.receive_window(VarInt::from_u32(lane_window_bytes(self.window_bytes)));
        config
    }

    /// For lanes of an agent, on which nothing but acknowledgements comes back. What is free beside the
    /// first connection, each has to find.
    pub(crate) fn to_quinn_lane(
        &self,
        siblings: Siblings,
        header_bytes: u64,
    ) -> quinn::TransportConfig {
        let mut config = self.to_quinn_with(siblings, header_bytes, None);
        config.receive_window(VarInt::from_u32(LANE_WINDOW_BYTES));
        config.max_concurrent_uni_streams(VarInt::from_u32(0));
        config.max_concurrent_bidi_streams(VarInt::from_u32(0));
        config
    }

    /// For an agent.
    pub(crate) fn agent_endpoint_config(secret: [u8; 32]) -> quinn::EndpointConfig {
        let mut config = Self::endpoint_config(secret);
        // Cannot fail: the bound is 65,527.
        let _ = config.max_udp_payload_size(UDP_PAYLOAD_BYTES_MAX_AGENT);
        config
    }

    /// `secret` is the endpoint's own and outlives its process: a target that was killed and is up
    /// again can then tell its agents that their connections are gone (RFC 9000, section 10.3),
    /// and they need not wait until the link has been silent for long enough.
    pub(crate) fn endpoint_config(secret: [u8; 32]) -> quinn::EndpointConfig {
        let mut config = quinn::EndpointConfig::new(Arc::new(ResetKey(secret)));
        // Connection ids must be known again too: a reset is only sent for one of ours.
        let [a, b, c, d, e, f, g, h, ..] = blake3::derive_key("backhaul 2026 quic cid", &secret);
        let key = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        config.cid_generator(move || {
            Box::new(quinn_proto::HashedConnectionIdGenerator::from_key(key))
        });
        // Cannot fail: the bound is 65,527.
        let _ = config.max_udp_payload_size(UDP_PAYLOAD_BYTES_MAX);
        config
    }
}

/// Makes the tokens of stateless resets.
struct ResetKey([u8; 32]);

impl quinn_proto::crypto::HmacKey for ResetKey {
    fn sign(&self, data: &[u8], signature_out: &mut [u8]) {
        signature_out.copy_from_slice(blake3::keyed_hash(&self.0, data).as_bytes());
    }

    fn signature_len(&self) -> usize {
        blake3::OUT_LEN
    }

    fn verify(
        &self,
        data: &[u8],
        signature: &[u8],
    ) -> Result<(), quinn_proto::crypto::CryptoError> {
        let expected = blake3::keyed_hash(&self.0, data);
        // Comparing blake3 hashes takes the same time wherever they differ.
        let found =
            <[u8; 32]>::try_from(signature).map_err(|_| quinn_proto::crypto::CryptoError)?;
        if expected == found { Ok(()) } else { Err(quinn_proto::crypto::CryptoError) }
    }
}
