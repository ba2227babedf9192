//! Listening and connecting.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use quinn::crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig};
use quinn::{ConnectionError, Endpoint, VarInt};
use rustls::pki_types::CertificateDer;
use thiserror::Error;

use crate::id::PeerName;
use crate::identity::{Identity, IdentityError, Role, certificate_reason, holder};
use crate::quic::congestion::Siblings;
use crate::quic::connection::datagram_header_bytes;
use crate::quic::lanes::{LANE_ALPN, Lane, Lanes, Opener, Registry};
use crate::quic::load::{MeasuredRuntime, of_driver};
use crate::quic::socket::{self, SocketFacts};
use crate::quic::{
    Congestion, Connection, Connections, RateLimit, TransportOptions, connections_here,
};

/// Why a listener could not be opened.
#[derive(Debug, Error)]
pub enum BindError {
    /// The address is taken, or not ours.
    #[error("address {address} cannot be listened on: {source}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The identity does not work.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The TLS library lacks a cipher that QUIC needs.
    #[error("TLS cannot be set up for QUIC: {0}")]
    Tls(String),
}

/// Why a connection could not be made.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// The name has no address.
    #[error("the target's address `{address}` cannot be resolved: {source}")]
    Resolve {
        /// What was configured.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// Nobody answers.
    #[error(
        "target {address} does not answer; check that it runs, and that UDP (or at least TCP) to this port passes the VPN and every firewall"
    )]
    NoAnswer {
        /// Its address.
        address: SocketAddr,
    },
    /// Its certificate is not accepted here, or ours not there.
    #[error("target {address} and this agent do not trust each other: {reason}")]
    Certificate {
        /// Its address.
        address: SocketAddr,
        /// Whose certificate, and why.
        reason: String,
    },
    /// It speaks something else.
    #[error("{address} does not speak Backhaul: {reason}")]
    Protocol {
        /// Its address.
        address: SocketAddr,
        /// What happened.
        reason: String,
    },
    /// This end could not begin.
    #[error("no connection can be begun: {0}")]
    Local(String),
}

/// Why an incoming connection came to nothing.
#[derive(Debug, Error)]
pub enum AcceptError {
    /// The handshake failed.
    #[error("a connection from {address} failed: {reason}")]
    Handshake {
        /// Where it came from.
        address: SocketAddr,
        /// Why.
        reason: String,
    },
    /// Its certificate is not an agent's.
    #[error("a connection from {address} was refused: its certificate is not an agent's")]
    NotAnAgent {
        /// Where it came from.
        address: SocketAddr,
    },
}

/// A target's socket.
#[derive(Debug)]
pub struct Listener {
    endpoint: Endpoint,
    facts: SocketFacts,
    window_bytes: u32,
    links: Arc<Registry>,
}

impl Listener {
    /// Listens for agents on a UDP address.
    pub fn bind(
        address: SocketAddr,
        identity: &Identity,
        options: &TransportOptions,
    ) -> Result<Self, BindError> {
        let mut tls = identity.server_config()?;
        tls.alpn_protocols.push(LANE_ALPN.to_vec());
        Self::bind_with(address, identity, tls, options)
    }

    pub(super) fn bind_with(
        address: SocketAddr,
        identity: &Identity,
        tls: rustls::ServerConfig,
        options: &TransportOptions,
    ) -> Result<Self, BindError> {
        let tls =
            QuicServerConfig::try_from(tls).map_err(|error| BindError::Tls(error.to_string()))?;
        let mut config = quinn::ServerConfig::with_crypto(Arc::new(tls));
        config.transport_config(Arc::new(options.to_quinn_target()));
        let bind = |source| BindError::Bind { address, source };
        let socket = socket::open(address, options.socket_buffer_bytes).map_err(bind)?;
        let facts = socket::facts(&socket).map_err(bind)?;
        let endpoint = Endpoint::new(
            TransportOptions::endpoint_config(identity.reset_secret()),
            Some(config),
            socket,
            Arc::new(MeasuredRuntime),
        )
        .map_err(bind)?;
        let (window_bytes, links) = (options.window_bytes, Arc::default());
        Ok(Self { endpoint, facts, window_bytes, links })
    }

    /// The address that was bound.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// The socket that every agent's datagrams come to.
    pub fn socket(&self) -> SocketFacts {
        self.facts
    }

    /// The next agent that knocks; `None` when the listener was closed. The handshake is the
    /// caller's to await, so that a slow one holds up nobody.
    pub async fn accept(&self) -> Option<Handshake> {
        Some(Handshake {
            incoming: self.endpoint.accept().await?,
            facts: self.facts,
            window_bytes: self.window_bytes,
            links: Arc::clone(&self.links),
        })
    }

    /// Forgets which links stand, so that no lane finds its own.
    #[cfg(test)]
    pub(super) fn forget_links(&self) {
        self.links.forget();
    }

    /// Ends every connection and stops listening.
    pub async fn close(&self, reason: &str) {
        self.endpoint.close(VarInt::from_u32(0), reason.as_bytes());
        self.endpoint.wait_idle().await;
    }
}

/// An agent that knocked.
#[derive(Debug)]
pub struct Handshake {
    incoming: quinn::Incoming,
    facts: SocketFacts,
    window_bytes: u32,
    links: Arc<Registry>,
}

impl Handshake {
    /// Finishes the handshake, and checks that the peer is an agent of this site. `None` for a
    /// connection that joined a link which stands already.
    pub async fn finish(self) -> Result<Option<Connection>, AcceptError> {
        let address = self.incoming.remote_address();
        let failed =
            |error: ConnectionError| AcceptError::Handshake { address, reason: error.to_string() };
        let (begun, load) = of_driver(|| self.incoming.accept());
        let connection = begun.map_err(failed)?.await.map_err(failed)?;
        let Some((Role::Agent, name)) = peer(&connection) else {
            connection.close(VarInt::from_u32(1), b"your certificate is not an agent's");
            return Err(AcceptError::NotAnAgent { address });
        };
        if is_lane(&connection) {
            let joined = self.links.join(connection.clone(), &name, load).await;
            return joined.map(|()| None).map_err(|reason| {
                connection.close(VarInt::from_u32(0), reason.as_bytes());
                AcceptError::Handshake { address, reason: reason.into() }
            });
        }
        connection.set_receive_window(VarInt::from_u32(self.window_bytes));
        let (ceiling, window_bytes) = (RateLimit::default(), self.window_bytes);
        let first = Lane::new(connection.clone(), load);
        let lanes = Arc::new(Lanes::new(first, Siblings::default(), ceiling, window_bytes));
        let batches = self.links.open(&connection, &name, &lanes);
        let connection = Connection::new(connection, name, self.facts, self.window_bytes, lanes);
        Ok(Some(connection.with_lanes_coming(batches)))
    }
}

/// Whether an agent opened it beside its first one.
fn is_lane(connection: &quinn::Connection) -> bool {
    let data = connection.handshake_data().and_then(|data| data.downcast::<HandshakeData>().ok());
    data.is_some_and(|data| data.protocol.as_deref() == Some(LANE_ALPN))
}

fn peer(connection: &quinn::Connection) -> Option<(Role, PeerName)> {
    let chain = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    holder(chain.first()?)
}

/// Connects an agent to the target at `address` (`host:port`), of the given name or of any.
pub async fn connect(
    address: &str,
    identity: &Identity,
    expected: Option<PeerName>,
    options: &TransportOptions,
) -> Result<Connection, ConnectError> {
    let local = |error: String| ConnectError::Local(error);
    let resolve = |source| ConnectError::Resolve { address: address.to_owned(), source };
    let address = tokio::net::lookup_host(address)
        .await
        .map_err(resolve)?
        .next()
        .ok_or_else(|| resolve(io::ErrorKind::NotFound.into()))?;
    let tls = identity.client_config(expected).map_err(|error| local(error.to_string()))?;
    let tls = QuicClientConfig::try_from(tls).map_err(|error| local(error.to_string()))?;
    let mut config = quinn::ClientConfig::new(Arc::new(tls));
    let siblings = Siblings::default();
    let header_bytes = datagram_header_bytes(address);
    options.memory.expect(address.ip());
    config.transport_config(Arc::new(options.to_quinn(siblings.clone(), header_bytes)));
    let any: SocketAddr = match address {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    // A socket for each attempt: after a VPN came back its old route may be gone for good.
    let no_socket = |error| local(format!("no UDP socket can be opened: {error}"));
    let socket = socket::open(any, options.socket_buffer_bytes).map_err(no_socket)?;
    let facts = socket::facts(&socket).map_err(no_socket)?;
    let endpoint = Endpoint::new(
        TransportOptions::agent_endpoint_config(identity.reset_secret()),
        None,
        socket,
        Arc::new(MeasuredRuntime),
    )
    .map_err(|error| local(error.to_string()))?;
    let (begun, load) = of_driver(|| endpoint.connect_with(config, address, "backhaul"));
    let connecting = begun.map_err(|error| local(error.to_string()))?;
    let connection = connecting.await.map_err(|error| explain(address, &error))?;
    let Some((_, name)) = peer(&connection) else {
        let reason = "it showed no certificate".into();
        return Err(ConnectError::Certificate { address, reason });
    };
    let of_lanes =
        lane_config(identity, Some(name.clone()), options, siblings.clone(), header_bytes)?;
    let connections = match options.congestion {
        Congestion::Auto => options.connections,
        _ => Connections::Exactly(1),
    };
    let opener = Opener::new(endpoint, of_lanes, connections, connections_here(1));
    let (ceiling, window_bytes) = (options.rate_limit.clone(), options.window_bytes);
    let first = Lane::new(connection.clone(), load);
    let lanes = Arc::new(Lanes::new(first, siblings, ceiling, window_bytes));
    let connection = Connection::new(connection, name, facts, options.window_bytes, lanes);
    Ok(connection.with_opener(opener))
}

/// How an agent connects a lane.
pub(super) fn lane_config(
    identity: &Identity,
    expected: Option<PeerName>,
    options: &TransportOptions,
    siblings: Siblings,
    header_bytes: u64,
) -> Result<quinn::ClientConfig, ConnectError> {
    let local = |error: String| ConnectError::Local(error);
    let mut tls = identity.client_config(expected).map_err(|error| local(error.to_string()))?;
    tls.alpn_protocols = vec![LANE_ALPN.to_vec()];
    let tls = QuicClientConfig::try_from(tls).map_err(|error| local(error.to_string()))?;
    let mut config = quinn::ClientConfig::new(Arc::new(tls));
    config.transport_config(Arc::new(options.to_quinn_lane(siblings, header_bytes)));
    Ok(config)
}

/// TLS alerts travel as QUIC error codes from 0x100 (RFC 9001, section 4.8).
fn explain(address: SocketAddr, error: &ConnectionError) -> ConnectError {
    let (code, reason) = match error {
        ConnectionError::TimedOut => return ConnectError::NoAnswer { address },
        ConnectionError::TransportError(error) => (u64::from(error.code), error.reason.clone()),
        ConnectionError::ConnectionClosed(close) => {
            let reason = String::from_utf8_lossy(&close.reason).into_owned();
            (u64::from(close.error_code), reason)
        }
        other => return ConnectError::Protocol { address, reason: other.to_string() },
    };
    let alert = code.checked_sub(0x100).filter(|alert| *alert < 0x100);
    match alert {
        // 40 is what a certificate brings that is sound, and of somebody else.
        Some(40 | 42..=49 | 51 | 80 | 113 | 116) => {
            let reason = match (reason.as_str(), alert) {
                ("", Some(48)) => "it does not know the CA of this end's certificate".into(),
                ("", _) => format!("TLS alert {}", code - 0x100),
                (reason, _) => certificate_reason(reason),
            };
            ConnectError::Certificate { address, reason }
        }
        _ => ConnectError::Protocol { address, reason },
    }
}
