//! Listening and connecting over both transports.

use std::io;
use std::net::SocketAddr;
use std::str::FromStr;
use std::time::Duration;

use crate::id::PeerName;
use crate::identity::Identity;
use crate::link::Connection;
use crate::quic::{self, AcceptError, BindError, ConnectError, TransportOptions};
use crate::tcp;

/// How long QUIC may stay without any answer before TCP is tried. Two lost first packets are sent
/// again within it.
const QUIC_ANSWER_TIME_MAX: Duration = Duration::from_secs(4);

/// Which transports may be used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum TransportChoice {
    /// QUIC, and TCP when nothing answers over UDP.
    #[default]
    Auto,
    /// QUIC only.
    Quic,
    /// TCP only.
    Tcp,
}

impl FromStr for TransportChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "quic" => Ok(Self::Quic),
            "tcp" => Ok(Self::Tcp),
            _ => Err(format!("`{text}` is no transport; it must be \"auto\", \"quic\" or \"tcp\"")),
        }
    }
}

/// How to connect.
#[derive(Debug, Clone)]
pub struct ConnectOptions {
    /// Which transports may be used.
    pub choice: TransportChoice,
    /// The name that the target's certificate must have; any target of the site when absent.
    pub expected: Option<PeerName>,
    /// Knobs of QUIC.
    pub transport: TransportOptions,
}

/// Connects an agent to the target at `address` (`host:port`; the same port for UDP and TCP).
///
/// # Errors
///
/// Those of QUIC, unless TCP alone was asked for: when neither answers, both are named.
pub async fn connect(
    address: &str,
    identity: &Identity,
    options: &ConnectOptions,
) -> Result<Connection, ConnectError> {
    let over_tcp = || tcp::connect(address, identity, options.expected.clone());
    if options.choice == TransportChoice::Tcp {
        return over_tcp().await.map(Connection::Tcp);
    }
    let quic = quic::connect(address, identity, options.expected.clone(), &options.transport);
    let failure = match options.choice {
        TransportChoice::Quic => return quic.await.map(Connection::Quic),
        _ => match tokio::time::timeout(QUIC_ANSWER_TIME_MAX, quic).await {
            Ok(Ok(connection)) => return Ok(Connection::Quic(connection)),
            Ok(Err(error)) => Some(error),
            Err(_) => None,
        },
    };
    // Only silence speaks for a firewall; whoever answered over UDP said what is wrong.
    match failure {
        None | Some(ConnectError::NoAnswer { .. }) => {}
        Some(error) => return Err(error),
    }
    match over_tcp().await {
        Ok(connection) => {
            tracing::warn!(
                "nothing answers over UDP: TCP is used, which is slower on long links; let UDP to the target's port pass the VPN and every firewall"
            );
            Ok(Connection::Tcp(connection))
        }
        Err(error @ (ConnectError::NoAnswer { .. } | ConnectError::Local(_))) => {
            Err(failure.unwrap_or(error))
        }
        Err(error) => Err(error),
    }
}

/// A target's sockets.
#[derive(Debug)]
pub struct Listener {
    quic: quic::Listener,
    tcp: Option<tcp::Listener>,
}

/// An agent that knocked.
#[derive(Debug)]
pub enum Handshake {
    /// Over QUIC, where the handshake is still to be done.
    Quic(Box<quic::Handshake>),
    /// Over TCP, where it is done.
    Tcp(tcp::Connection),
}

impl Listener {
    /// Listens on a UDP address, and with `with_tcp` on the same port of TCP.
    pub async fn bind(
        address: SocketAddr,
        identity: &Identity,
        options: &TransportOptions,
        with_tcp: bool,
    ) -> Result<Self, BindError> {
        let quic = quic::Listener::bind(address, identity, options)?;
        let bound = quic.local_address().map_err(|source| BindError::Bind { address, source })?;
        let tcp = if with_tcp { Some(tcp::Listener::bind(bound, identity).await?) } else { None };
        Ok(Self { quic, tcp })
    }

    /// The address that was bound.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.quic.local_address()
    }

    /// The next agent that knocks; `None` when the listener was closed. The handshake is the
    /// caller's to await, so that a slow one holds up nobody.
    pub async fn accept(&self) -> Option<Handshake> {
        let over_tcp = async {
            match &self.tcp {
                Some(listener) => listener.accept().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            quic = self.quic.accept() => Some(Handshake::Quic(Box::new(quic?))),
            tcp = over_tcp => Some(Handshake::Tcp(tcp?)),
        }
    }
}

impl Handshake {
    /// Finishes the handshake, and checks that the peer is an agent of this site.
    pub async fn finish(self) -> Result<Connection, AcceptError> {
        match self {
            Self::Quic(handshake) => handshake.finish().await.map(Connection::Quic),
            Self::Tcp(connection) => Ok(Connection::Tcp(connection)),
        }
    }
}
