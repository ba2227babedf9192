//! Listening, and the table of exports.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::{Export, handshake, transmission};

/// Bounds of a server.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// Connections at a time (default 128: two for each disk of the largest machine); the next one
    /// waits to be accepted.
    pub connections_max: usize,
    /// Requests of one connection that may be under way (default 128); then it is not read from.
    pub requests_max: usize,
    /// Bytes of those requests and of replies not yet written (default 64 MiB: two of the largest
    /// requests); then it is not read from. One request is always let through.
    pub request_bytes_max: usize,
    /// The same for all connections together (default 96 MiB, never under one largest request);
    /// then they are not read from until others are answered. Each connection has 256 KiB for
    /// requests and a receive buffer of 256 KiB beside it, so that one that reads no replies
    /// cannot stop another.
    pub memory_bytes_max: usize,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            connections_max: 128,
            requests_max: 128,
            request_bytes_max: 64 << 20,
            memory_bytes_max: 96 << 20,
        }
    }
}

/// The exports on offer, by name. They can be added and taken away while clients are connected;
/// a client keeps the one it chose.
#[derive(Clone, Default)]
pub struct Exports(Arc<RwLock<BTreeMap<String, Arc<dyn Export>>>>);

impl Exports {
    /// Offers `export` as `name`, in place of what had that name.
    pub fn insert(&self, name: &str, export: Arc<dyn Export>) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), export);
    }

    /// Offers `name` no longer.
    pub fn remove(&self, name: &str) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(name);
    }

    /// The names on offer.
    pub fn names(&self) -> Vec<String> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }

    /// The export called `name`. The empty name stands for the only export there is, if it is alone
    /// (proto.md calls it the default export).
    pub(crate) fn get(&self, name: &str) -> Option<(String, Arc<dyn Export>)> {
        let exports = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let (name, export) = match name {
            "" if exports.len() == 1 => exports.iter().next()?,
            _ => exports.get_key_value(name)?,
        };
        Some((name.clone(), Arc::clone(export)))
    }
}

/// A socket that clients connect to.
pub enum Listener {
    /// A Unix socket; its file is removed when the server ends.
    Unix(UnixListener, PathBuf),
    /// A TCP socket. NBD here has no encryption: bind it to an address that only the guest reaches.
    Tcp(TcpListener),
}

impl Listener {
    /// Listens on a Unix socket. A socket file that nobody answers on any more is replaced.
    pub fn unix(path: &Path) -> io::Result<Self> {
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        Ok(Self::Unix(UnixListener::bind(path)?, path.to_owned()))
    }

    /// Listens on a TCP address.
    pub async fn tcp(address: SocketAddr) -> io::Result<Self> {
        Ok(Self::Tcp(TcpListener::bind(address).await?))
    }

    /// The TCP address that was bound, if it is TCP.
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        match self {
            Self::Unix(..) => None,
            Self::Tcp(listener) => listener.local_addr().ok(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// A running server. Dropping it stops it, as [`Server::stop`] does.
pub struct Server {
    signal: watch::Sender<Signal>,
}

/// What a server tells its connections.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Signal {
    /// No new connections and requests.
    pub(crate) stopping: bool,
    /// Counts the calls of [`Server::disconnect_all`]; connections accepted before one are dropped.
    disconnects: u64,
}

/// How long a client that does not take its replies can delay the end of the server.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// How long a client may take to choose an export. One that never does must not keep its place.
const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(60);

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

impl Server {
    /// Serves `exports` to whoever connects to `listeners`. Called within a tokio runtime.
    pub fn start(listeners: Vec<Listener>, exports: Exports, options: ServerOptions) -> Self {
        let (signal, signalled) = watch::channel(Signal::default());
        let service = Arc::new(Service {
            exports,
            places: Arc::new(Semaphore::new(options.connections_max)),
            memory: transmission::memory_budget(options.memory_bytes_max),
            options,
        });
        for listener in listeners {
            tokio::spawn(accept_all(listener, Arc::clone(&service), signalled.clone()));
        }
        Self { signal }
    }

    /// Stops accepting connections and requests. Requests under way are finished and answered, then
    /// the connections are closed; a client that does not take its replies is dropped after 5 s.
    pub fn stop(&self) {
        self.signal.send_modify(|signal| signal.stopping = true);
    }

    /// Drops every connection at once; new ones are accepted. What clients were not answered may or
    /// may not have happened; what they were answered did.
    pub fn disconnect_all(&self) {
        self.signal.send_modify(|signal| signal.disconnects += 1);
    }

    /// Stops, and waits until every listener, connection and request is gone.
    pub async fn stopped(&self) {
        self.stop();
        self.signal.closed().await;
    }
}

/// What all connections share.
struct Service {
    exports: Exports,
    options: ServerOptions,
    places: Arc<Semaphore>,
    memory: Arc<Semaphore>,
}

async fn accept_all(
    listener: Listener,
    service: Arc<Service>,
    mut signal: watch::Receiver<Signal>,
) {
    loop {
        let accepted = tokio::select! {
            accepted = accept(&listener, &service.places) => accepted,
            _ = signal.wait_for(|signal| signal.stopping) => return,
        };
        match accepted {
            Ok((stream, place)) => {
                let (service, signal) = (Arc::clone(&service), signal.clone());
                tokio::spawn(async move {
                    keep(stream, &service, signal).await;
                    drop(place);
                });
            }
            Err(error) => {
                // Out of descriptors, usually, and nothing tells when there are some again. Trying at
                // once would spin.
                tracing::warn!(%error, "an NBD connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn accept(
    listener: &Listener,
    places: &Arc<Semaphore>,
) -> io::Result<(Box<dyn Stream>, OwnedSemaphorePermit)> {
    let place = Arc::clone(places).acquire_owned().await.map_err(io::Error::other)?;
    let stream: Box<dyn Stream> = match listener {
        Listener::Unix(listener, _) => Box::new(listener.accept().await?.0),
        Listener::Tcp(listener) => {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            Box::new(stream)
        }
    };
    Ok((stream, place))
}

/// Serves one connection as long as the server lets it.
async fn keep(stream: Box<dyn Stream>, service: &Service, signal: watch::Receiver<Signal>) {
    let (mut dropped, mut stopped) = (signal.clone(), signal.clone());
    let disconnects = signal.borrow().disconnects;
    let overdue = async {
        let _ = stopped.wait_for(|signal| signal.stopping).await;
        // A client that takes its replies ends by itself before this; one that does not gives no sign.
        tokio::time::sleep(STOP_GRACE).await;
    };
    tokio::select! {
        () = serve(stream, service, signal) => {}
        Ok(_) = dropped.wait_for(|signal| signal.disconnects != disconnects) => {}
        () = overdue => tracing::warn!("an NBD client did not take its replies; it was dropped"),
    }
}

async fn serve(
    mut stream: Box<dyn Stream>,
    service: &Service,
    mut signal: watch::Receiver<Signal>,
) {
    let negotiate = handshake::negotiate(&mut stream, &service.exports);
    let negotiated = tokio::select! {
        negotiated = tokio::time::timeout(HANDSHAKE_TIME_MAX, negotiate) => negotiated,
        _ = signal.wait_for(|signal| signal.stopping) => return,
    };
    let chosen = match negotiated {
        Ok(Ok(Some(chosen))) => chosen,
        Ok(Ok(None)) => return,
        Ok(Err(error)) => return tracing::debug!(%error, "an NBD handshake ended early"),
        Err(_) => return tracing::warn!("an NBD client chose no export in time; it was dropped"),
    };
    let name = chosen.name.clone();
    tracing::info!(export = name, "an NBD client connected");
    let memory = Arc::clone(&service.memory);
    match transmission::serve(stream, chosen, &service.options, memory, signal).await {
        Ok(()) => tracing::info!(export = name, "an NBD client disconnected"),
        Err(error) => tracing::warn!(export = name, %error, "an NBD client was dropped"),
    }
}
