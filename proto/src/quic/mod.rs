//! QUIC: the only user of quinn.
//!
//! An agent opens one connection. On it: a control stream (bidirectional, before everything else),
//! a sync stream (bidirectional), and one unidirectional stream for each batch, unless lanes carry
//! some of those. `SPEC.md` has the rules. Nothing in here knows what the messages mean.

mod arrival;
mod bulk;
mod congestion;
mod connection;
mod copies;
mod endpoint;
mod lanes;
mod load;
mod socket;
mod streams;
mod transport;

pub use congestion::{CongestionStats, PathMemory, RateLimit};
pub use connection::Connection;
pub use endpoint::{AcceptError, BindError, ConnectError, Handshake, Listener, connect};
pub use lanes::{CONNECTIONS_MAX, Connections, connections_here};
pub use socket::SocketFacts;
pub use streams::{BatchStream, ReceiveHalf, SendHalf};
pub use transport::{Congestion, TransportOptions, WINDOW_BYTES};
