//! Listening and connecting over TCP.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex as SyncMutex, PoisonError};
use std::time::{Duration, Instant};

use rustls::pki_types::{CertificateDer, ServerName};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Mutex, Semaphore, mpsc};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use crate::id::PeerName;
use crate::identity::{Identity, Role, certificate_reason, holder};
use crate::link::{CONTROL_STREAM, SYNC_STREAM};
use crate::quic::{BindError, ConnectError};
use crate::tcp::connection::Stream;
use crate::tcp::{BATCHES, Connection, MAGIC, PREFACE_BYTES, WHOLE, kernel};

/// Longest that a connection, its TLS handshake and its preface may take.
const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(8);

/// What is read from the kernel at a time.
const READ_BYTES: usize = 64 << 10;

/// Handshakes under way at a time; more wait in the kernel's backlog.
const HANDSHAKES_MAX: usize = 64;

/// Sessions of which not all three connections are there yet. Further ones are refused.
const PENDING_MAX: usize = 64;

/// Sessions that are whole and not accepted yet.
const READY_MAX: usize = 16;

type Session = [u8; 16];

fn preface(kind: u8, session: Session) -> [u8; PREFACE_BYTES] {
    let mut bytes = [0; PREFACE_BYTES];
    bytes[..4].copy_from_slice(MAGIC);
    bytes[4] = kind;
    bytes[8..].copy_from_slice(&session);
    bytes
}

/// Segments that fit into IPv6's least MTU, and so into that of every VPN, in both directions. The
/// kernel's own way to find a path's MTU hangs on ICMP, which firewalls drop, and then a connection
/// passes its handshake and nothing larger. Where the line is fast, the network card cuts segments.
const SEGMENT_BYTES_MAX: u32 = 1220;

/// A segment with the headers of IPv4 and TCP: no packet is larger, whatever the path would take.
pub(super) const PACKET_BYTES_MAX: u32 = SEGMENT_BYTES_MAX + 40;

/// Idle connections are kept alive this often: firewalls forget them.
const KEEPALIVE_PERIOD: Duration = Duration::from_secs(30);

/// The best of the kernel's controllers for a line that loses packets; without it the kernel's
/// default stays, and long links stay empty.
const FAR_CONTROLLER: &str = "bbr";

/// Within a LAN, where BBR overflows the small queues of switches again and again.
const LAN_CONTROLLER: &str = "cubic";

/// What may wait in the kernel on a long path, in bytes, besides what is in flight: nothing passes it any
/// more, and by itself the kernel takes megabytes, a second's worth of a slow line.
const FAR_UNSENT_BYTES_MAX: u32 = 256 << 10;

/// Where a session's path leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Anywhere.
    Far,
    /// Into the same LAN.
    Lan,
}

/// A TCP socket as an agent's are, before it connects. What it says of segments binds both ends.
fn socket(address: SocketAddr, way: Way) -> io::Result<TcpSocket> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    SockRef::from(&socket).set_tcp_mss(SEGMENT_BYTES_MAX)?;
    control_congestion(&socket, way);
    Ok(socket)
}

/// Asks the kernel for the controller of such a way; without it the kernel's choice stays. An agent asks before its socket
/// connects: where the default is BBR, a connection that began with it is paced for as long as it lives, whoever controls
/// it later, and timers for every 64 KiB cost a first sync within a LAN a fifth of its speed. It asks again afterwards: a
/// route may name a controller of its own (`congctl`), which connecting takes.
fn control_congestion(socket: impl AsFd, way: Way) {
    let controller = match way {
        Way::Far => FAR_CONTROLLER,
        Way::Lan => LAN_CONTROLLER,
    };
    if let Err(error) = rustix::net::sockopt::set_tcp_congestion(socket, controller) {
        tracing::debug!(
            "the kernel does not give {controller} for TCP ({error}); `modprobe tcp_{controller}` may help"
        );
    }
}

fn tune(stream: &TcpStream, way: Way) {
    control_congestion(stream, way);
    let _ = stream.set_nodelay(true);
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE_PERIOD).with_interval(KEEPALIVE_PERIOD);
    let _ = SockRef::from(stream).set_tcp_keepalive(&keepalive);
    // An old kernel takes what it likes.
    if way == Way::Far {
        let _ = kernel::set_unsent_bytes_max(stream.as_fd(), FAR_UNSENT_BYTES_MAX);
    }
}

/// How often a handshake is measured, while it may only be a busy host that makes it long: up to so many
/// times what is near.
const NEAR_ATTEMPTS: usize = 4;
const NEAR_BUSY: u32 = 10;

/// Whether a handshake of TCP with `address` (`host:port`) takes `rtt_max` at most. That is the
/// kernel's measure, whatever this process is busy with.
pub async fn is_near(address: &str, rtt_max: Duration) -> bool {
    for _ in 0..NEAR_ATTEMPTS {
        let Ok(stream) = TcpStream::connect(address).await else { return false };
        let rtt = kernel::info(stream.as_fd()).map_or(Duration::ZERO, |info| info.rtt);
        // A first segment that was lost leaves no measure.
        if !rtt.is_zero() && rtt <= rtt_max {
            return true;
        }
        if rtt > NEAR_BUSY * rtt_max {
            return false;
        }
    }
    false
}

/// Connects an agent to the target at `address` (`host:port`), of the given name or of any.
pub async fn connect(
    address: &str,
    identity: &Identity,
    expected: Option<PeerName>,
    way: Way,
) -> Result<Connection, ConnectError> {
    let resolve = |source| ConnectError::Resolve { address: address.to_owned(), source };
    let address = tokio::net::lookup_host(address)
        .await
        .map_err(resolve)?
        .next()
        .ok_or_else(|| resolve(io::ErrorKind::NotFound.into()))?;
    let config = identity.client_config(expected);
    let config = config.map_err(|error| ConnectError::Local(error.to_string()))?;
    let connector = TlsConnector::from(Arc::new(config));
    let mut session = Session::default();
    rustls::crypto::aws_lc_rs::default_provider()
        .secure_random
        .fill(&mut session)
        .map_err(|_| ConnectError::Local("the system has no random numbers".into()))?;
    let work = async {
        let open = |kind| open(&connector, address, preface(kind, session), way);
        let (mut control, sync, batches) =
            tokio::try_join!(open(CONTROL_STREAM), open(SYNC_STREAM), open(BATCHES))?;
        // Under TLS 1.3 a client is done before the server has looked at its certificate.
        let mut whole = [0];
        control.read_exact(&mut whole).await?;
        let (_, tls) = control.get_ref();
        let name = tls.peer_certificates().and_then(|chain| holder(chain.first()?));
        let Some((_, name)) = name else {
            return Err(io::Error::other("it showed no certificate"));
        };
        Ok(Connection::new(name, address, [control, sync, batches], way))
    };
    match tokio::time::timeout(HANDSHAKE_TIME_MAX, work).await {
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(error)) => Err(explain(address, error)),
        Err(_) => Err(ConnectError::NoAnswer { address }),
    }
}

async fn open(
    connector: &TlsConnector,
    address: SocketAddr,
    preface: [u8; PREFACE_BYTES],
    way: Way,
) -> io::Result<Stream> {
    let stream = socket(address, way)?.connect(address).await?;
    tune(&stream, way);
    let name = ServerName::try_from("backhaul").map_err(io::Error::other)?;
    let stream = BufReader::with_capacity(READ_BYTES, stream);
    let mut stream = connector.connect(name, stream).await?;
    stream.write_all(&preface).await?;
    stream.flush().await?;
    Ok(TlsStream::Client(stream))
}

fn explain(address: SocketAddr, error: io::Error) -> ConnectError {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match (tls, error.kind()) {
        (Some(rustls::Error::PeerIncompatible(_) | rustls::Error::InvalidMessage(_)), _) => {
            ConnectError::Protocol { address, reason: error.to_string() }
        }
        (Some(tls), _) => {
            let reason = certificate_reason(&tls.to_string());
            ConnectError::Certificate { address, reason }
        }
        (
            None,
            io::ErrorKind::ConnectionRefused
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
            | io::ErrorKind::TimedOut,
        ) => ConnectError::NoAnswer { address },
        (None, _) => ConnectError::Protocol { address, reason: error.to_string() },
    }
}

/// A target's TCP socket.
#[derive(Debug)]
pub struct Listener {
    ready: Mutex<mpsc::Receiver<Connection>>,
    accepting: tokio::task::JoinHandle<()>,
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// What has come of a session so far.
struct Pending {
    since: Instant,
    streams: [Option<Stream>; 3],
}

type Pendings = Arc<SyncMutex<HashMap<(PeerName, Session), Pending>>>;

impl Listener {
    /// Listens for agents on a TCP address.
    pub async fn bind(address: SocketAddr, identity: &Identity) -> Result<Self, BindError> {
        let acceptor = TlsAcceptor::from(Arc::new(identity.server_config()?));
        let listener = TcpListener::bind(address).await;
        let listener = listener.map_err(|source| BindError::Bind { address, source })?;
        let (sender, ready) = mpsc::channel(READY_MAX);
        let accepting = tokio::spawn(accept_all(listener, acceptor, sender));
        Ok(Self { ready: Mutex::new(ready), accepting })
    }

    /// The next session that is whole. Cancel safe.
    pub async fn accept(&self) -> Option<Connection> {
        self.ready.lock().await.recv().await
    }
}

async fn accept_all(listener: TcpListener, acceptor: TlsAcceptor, ready: mpsc::Sender<Connection>) {
    let places = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    let pendings = Pendings::default();
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let (stream, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a TCP connection could not be taken");
                // Out of descriptors, most likely: those that end make room.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (acceptor, ready, pendings) = (acceptor.clone(), ready.clone(), Arc::clone(&pendings));
        tokio::spawn(async move {
            let work = take(stream, &acceptor, address, &pendings);
            match tokio::time::timeout(HANDSHAKE_TIME_MAX, work).await {
                Ok(Ok(Some(connection))) => drop(ready.send(connection).await),
                Ok(Ok(None)) => {
                    drop(place);
                    // The others of its session may never come.
                    tokio::time::sleep(HANDSHAKE_TIME_MAX).await;
                    forget_late(&mut pendings.lock().unwrap_or_else(PoisonError::into_inner));
                    return;
                }
                // Whoever only measured the way has no more to say.
                Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    tracing::debug!("a TCP connection from {address} ended before it began");
                }
                Ok(Err(error)) => {
                    tracing::warn!("a TCP connection from {address} was refused: {error}");
                }
                Err(_) => tracing::warn!("a TCP connection from {address} never spoke"),
            }
            drop(place);
        });
    }
}

/// Takes one connection; returns the session when it was the last of the three.
async fn take(
    stream: TcpStream,
    acceptor: &TlsAcceptor,
    address: SocketAddr,
    pendings: &Pendings,
) -> io::Result<Option<Connection>> {
    // What a target sends is small; the agent knows which way it is.
    tune(&stream, Way::Far);
    let stream = BufReader::with_capacity(READ_BYTES, stream);
    let mut stream = TlsStream::Server(acceptor.accept(stream).await?);
    let mut bytes = [0; PREFACE_BYTES];
    stream.read_exact(&mut bytes).await?;
    let (_, tls) = stream.get_ref();
    let chain: Option<&[CertificateDer<'_>]> = tls.peer_certificates();
    let Some((Role::Agent, name)) = chain.and_then(|chain| holder(chain.first()?)) else {
        return Err(io::Error::other("its certificate is not an agent's"));
    };
    let index = match bytes[4] {
        CONTROL_STREAM => 0,
        SYNC_STREAM => 1,
        BATCHES => 2,
        _ => usize::MAX,
    };
    if bytes[..4] != *MAGIC || index == usize::MAX {
        return Err(io::Error::other("it does not begin as a Backhaul connection does"));
    }
    let mut session = Session::default();
    session.copy_from_slice(&bytes[8..]);
    let Some([mut control, sync, batches]) =
        join(pendings, (name.clone(), session), index, stream)?
    else {
        return Ok(None);
    };
    control.write_all(&[WHOLE]).await?;
    control.flush().await?;
    Ok(Some(Connection::new(name, address, [control, sync, batches], Way::Far)))
}

/// Lets go of sessions whose connections do not come.
fn forget_late(pendings: &mut HashMap<(PeerName, Session), Pending>) {
    pendings.retain(|_, pending| pending.since.elapsed() < HANDSHAKE_TIME_MAX);
}

/// Puts a connection to the others of its session; returns them when all are there.
fn join(
    pendings: &Pendings,
    key: (PeerName, Session),
    index: usize,
    stream: Stream,
) -> io::Result<Option<[Stream; 3]>> {
    let mut pendings = pendings.lock().unwrap_or_else(PoisonError::into_inner);
    forget_late(&mut pendings);
    if pendings.len() >= PENDING_MAX && !pendings.contains_key(&key) {
        return Err(io::Error::other("too many sessions are being opened"));
    }
    let pending = pendings
        .entry(key.clone())
        .or_insert_with(|| Pending { since: Instant::now(), streams: [None, None, None] });
    if pending.streams[index].replace(stream).is_some() {
        pendings.remove(&key);
        return Err(io::Error::other("a session has the same connection twice"));
    }
    if pending.streams.iter().any(Option::is_none) {
        return Ok(None);
    }
    let whole = pendings.remove(&key).map(|pending| pending.streams);
    Ok(match whole {
        Some([Some(control), Some(sync), Some(batches)]) => Some([control, sync, batches]),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::{Way, socket};

    /// Cubic was asked for once the connection was there. On a host whose default is BBR it had begun with that, and
    /// went on being paced: a first sync over loopback took 5.0 s instead of 4.1.
    #[test]
    fn the_controller_is_chosen_before_the_connection_begins() {
        // Where the kernel gives no other controller than its default, this proves nothing.
        let given = "/proc/sys/net/ipv4/tcp_allowed_congestion_control";
        let given = std::fs::read_to_string(given).unwrap_or_default();
        for (way, controller) in [(Way::Lan, "cubic"), (Way::Far, "bbr")] {
            let socket = socket("127.0.0.1:1".parse().unwrap(), way).unwrap();
            let chosen = rustix::net::sockopt::tcp_congestion(&socket).unwrap();
            let is_given = given.split_whitespace().any(|name| name == controller);
            assert!(chosen == controller || !is_given, "{chosen}");
        }
    }
}
