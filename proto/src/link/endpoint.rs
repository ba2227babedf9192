//! Listening and connecting over both transports.

use std::io;
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::id::PeerName;
use crate::identity::Identity;
use crate::link::Connection;
use crate::quic::{self, AcceptError, BindError, ConnectError, SocketFacts, TransportOptions};
use crate::tcp::{self, Way};

/// A handshake that is not answered is tried again by QUIC after 0.5, 1.5 and 3.5 s, too late for a
/// link that is back after a blackout. So another one is begun this often, as long as nothing answers,
/// and together they knock every half second: of the two seconds in which throughput is to be back, the
/// handshake and finding the rate take the rest.
const ATTEMPT_PERIOD: Duration = Duration::from_secs(1);

/// How long QUIC may stay without any answer before TCP is tried as well.
const QUIC_ANSWER_TIME_MAX: Duration = Duration::from_secs(4);

/// When TCP answers first, QUIC is given so long to catch up: both are blind during a blackout.
const QUIC_LATE_TIME_MAX: Duration = Duration::from_millis(1500);

/// So long where UDP was silent the last time, and QUIC had the same start.
const QUIC_LATE_TIME_MAX_SILENT: Duration = Duration::from_millis(300);

/// TCP's handshakes are begun this often: the kernel tries each again after 1, 3 and 7 s only.
const TCP_ATTEMPT_PERIOD: Duration = Duration::from_millis(500);

/// A path with a round trip up to this is one within a LAN: there the processors are the limit before
/// the line is, and TCP takes less of them.
const LAN_RTT_MAX: Duration = Duration::from_millis(1);

/// The measure of that is there before QUIC has answered, or is waited for so long.
const LAN_LATE_TIME_MAX: Duration = Duration::from_millis(20);

/// How long TCP may take to connect within a LAN.
const LAN_CONNECT_TIME_MAX: Duration = Duration::from_secs(1);

/// How long an attempt to connect may take in all; the agent begins the next one soon after.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(9);

/// Which transports may be used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum TransportChoice {
    /// QUIC, and TCP when nothing answers over UDP, or within a LAN.
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
    /// Whether [`TransportChoice::Auto`] takes TCP within a LAN, where it is the faster one. Not for
    /// links with a ceiling, which QUIC keeps packet by packet.
    pub lan_over_tcp: bool,
    /// Whether [`TransportChoice::Auto`] ended with TCP the last time, as nothing answered over UDP: then
    /// TCP is tried from the beginning. QUIC is still tried with it, and preferred.
    pub udp_silent: bool,
}

/// Connects an agent to the target at `address` (`host:port`; the same port for UDP and TCP).
///
/// # Errors
///
/// Those of QUIC, unless TCP alone was asked for: when neither answers, both are named.
pub async fn connect(
    address: &str,
    identity: &Arc<Identity>,
    options: &ConnectOptions,
) -> Result<Connection, ConnectError> {
    let deadline = tokio::time::sleep(CONNECT_TIME_MAX);
    tokio::pin!(deadline);
    let mut attempts = JoinSet::new();
    let mut begin_quic = tokio::time::interval(ATTEMPT_PERIOD);
    let with_quic = options.choice != TransportChoice::Tcp;
    let with_tcp = options.choice != TransportChoice::Quic;
    // QUIC's turn: whoever answers over UDP within this needs no TCP.
    let is_quics_turn = with_quic && !options.udp_silent;
    let tcp_after = if is_quics_turn { QUIC_ANSWER_TIME_MAX } else { Duration::ZERO };
    let mut begin_tcp = tokio::time::interval_at(Instant::now() + tcp_after, TCP_ATTEMPT_PERIOD);
    let lan = options.choice == TransportChoice::Auto && options.lan_over_tcp;
    // Measured beside QUIC's handshake, which takes longer: nobody waits for it.
    let mut measuring_near = JoinSet::new();
    if lan {
        let address = address.to_owned();
        measuring_near.spawn(async move { tcp::is_near(&address, LAN_RTT_MAX).await });
    }
    // Over TCP, when it answered before QUIC.
    let mut second_best: Option<Connection> = None;
    let mut silence = None;
    loop {
        tokio::select! {
            _ = begin_quic.tick(), if with_quic && second_best.is_none() => {
                let (address, identity) = (address.to_owned(), Arc::clone(identity));
                let options = options.clone();
                attempts.spawn(async move {
                    quic::connect(&address, &identity, options.expected, &options.transport)
                        .await
                        .map(Connection::Quic)
                });
            }
            _ = begin_tcp.tick(), if with_tcp && second_best.is_none() => {
                let (address, identity) = (address.to_owned(), Arc::clone(identity));
                let expected = options.expected.clone();
                attempts.spawn(async move {
                    tcp::connect(&address, &identity, expected, Way::Far).await.map(Connection::Tcp)
                });
            }
            Some(ended) = attempts.join_next() => match ended {
                Ok(Ok(Connection::Tcp(_))) if with_quic && second_best.is_some() => {}
                Ok(Ok(connection @ Connection::Tcp(_))) if with_quic => {
                    second_best = Some(connection);
                    let late =
                        if is_quics_turn { QUIC_LATE_TIME_MAX } else { QUIC_LATE_TIME_MAX_SILENT };
                    deadline.as_mut().reset(Instant::now() + late);
                }
                Ok(Ok(connection)) => {
                    let near = tokio::time::timeout(LAN_LATE_TIME_MAX, measuring_near.join_next());
                    return Ok(match near.await {
                        Ok(Some(Ok(true))) => faster(connection, address, identity).await,
                        _ => connection,
                    });
                }
                // Only silence speaks for a firewall or a blackout; whoever answered said what is
                // wrong.
                Ok(Err(error @ ConnectError::NoAnswer { .. })) => {
                    silence = Some(error);
                    if !with_quic {
                        break;
                    }
                }
                Ok(Err(error)) => return Err(error),
                Err(_) => {}
            },
            () = &mut deadline => break,
        }
    }
    if let Some(connection) = second_best {
        tracing::warn!(
            "nothing answers over UDP: TCP is used, which is slower on long links; let UDP to the target's port pass the VPN and every firewall"
        );
        return Ok(connection);
    }
    match silence {
        Some(error) => Err(error),
        None => {
            let found = tokio::net::lookup_host(address).await.ok();
            Err(match found.and_then(|mut found| found.next()) {
                Some(address) => ConnectError::NoAnswer { address },
                None => ConnectError::Resolve {
                    address: address.to_owned(),
                    source: io::ErrorKind::NotFound.into(),
                },
            })
        }
    }
}

/// Within a LAN, a TCP session with the same target in place of the one over QUIC.
async fn faster(connection: Connection, address: &str, identity: &Identity) -> Connection {
    let expected = Some(connection.peer().clone());
    let attempt = tcp::connect(address, identity, expected, Way::Lan);
    match tokio::time::timeout(LAN_CONNECT_TIME_MAX, attempt).await {
        Ok(Ok(over_tcp)) => {
            connection.close("the path is within a LAN, where TCP is the faster one");
            Connection::Tcp(over_tcp)
        }
        Ok(Err(error)) => {
            tracing::debug!(%error, "no TCP within this LAN");
            connection
        }
        Err(_) => connection,
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

    /// The UDP socket that every agent's datagrams come to.
    pub fn socket(&self) -> SocketFacts {
        self.quic.socket()
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
    /// Finishes the handshake, and checks that the peer is an agent of this site. `None` for a
    /// connection that joined a link which stands already.
    pub async fn finish(self) -> Result<Option<Connection>, AcceptError> {
        match self {
            Self::Quic(handshake) => Ok(handshake.finish().await?.map(Connection::Quic)),
            Self::Tcp(connection) => Ok(Some(Connection::Tcp(connection))),
        }
    }
}
