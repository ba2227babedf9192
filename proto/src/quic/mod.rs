//! QUIC: the only user of quinn and rustls.
//!
//! An agent opens one connection. On it: a control stream (bidirectional, before everything else),
//! a sync stream (bidirectional), and one unidirectional stream for each batch. `SPEC.md` has the
//! rules. Nothing in here knows what the messages mean.

mod congestion;
mod connection;
mod endpoint;
mod identity;
mod pki;
mod transport;

pub use congestion::{CongestionStats, RateLimit};
pub use connection::{BatchStream, Connection, FrameReceiver, FrameSender, LinkStats, StreamError};
pub use endpoint::{AcceptError, BindError, ConnectError, Handshake, Listener, connect};
pub use identity::{Identity, IdentityError, IdentityFiles, Role};
pub use pki::{PkiError, create_ca, issue};
pub use transport::{Congestion, TransportOptions};
