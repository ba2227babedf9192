//! Listening, and the table of exports.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, watch};

use crate::{Export, handshake, transmission};

/// Bounds of a server.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// Connections at a time (default 256); the next one waits to be accepted.
    pub connections_max: usize,
    /// Requests of one connection that may be under way (default 128); then it is not read from.
    pub requests_max: usize,
    /// Bytes of those requests (default 64 MiB); then it is not read from. One request is always
    /// let through, so the true bound is this plus one payload.
    pub request_bytes_max: usize,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self { connections_max: 256, requests_max: 128, request_bytes_max: 64 << 20 }
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

/// A running server. Dropping it, or [`Server::stop`], ends it.
pub struct Server {
    stop: watch::Sender<bool>,
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

impl Server {
    /// Serves `exports` to whoever connects to `listeners`.
    pub fn start(listeners: Vec<Listener>, exports: Exports, options: ServerOptions) -> Self {
        let (stop, stopped) = watch::channel(false);
        let places = Arc::new(Semaphore::new(options.connections_max));
        for listener in listeners {
            let accepting = accept_all(
                listener,
                exports.clone(),
                options.clone(),
                Arc::clone(&places),
                stopped.clone(),
            );
            tokio::spawn(accepting);
        }
        Self { stop }
    }

    /// Stops accepting and drops every connection. What clients were not answered did not happen,
    /// as far as they know; what they were answered did.
    pub fn stop(&self) {
        let _ = self.stop.send(true);
    }

    /// Waits until every listener and connection is gone.
    pub async fn stopped(&self) {
        self.stop();
        self.stop.closed().await;
    }
}

async fn accept_all(
    listener: Listener,
    exports: Exports,
    options: ServerOptions,
    places: Arc<Semaphore>,
    mut stopped: watch::Receiver<bool>,
) {
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = accept(&listener) => accepted,
            _ = stopped.wait_for(|stop| *stop) => return,
        };
        let stream = match accepted {
            Ok(stream) => stream,
            Err(error) => {
                // Out of descriptors, usually. Trying again at once would spin.
                tracing::warn!(%error, "an NBD connection could not be accepted");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        let (exports, options, mut stopped) = (exports.clone(), options.clone(), stopped.clone());
        tokio::spawn(async move {
            let _place = place;
            tokio::select! {
                () = serve(stream, &exports, &options) => {}
                _ = stopped.wait_for(|stop| *stop) => {}
            }
        });
    }
}

async fn accept(listener: &Listener) -> io::Result<Box<dyn Stream>> {
    match listener {
        Listener::Unix(listener, _) => Ok(Box::new(listener.accept().await?.0)),
        Listener::Tcp(listener) => {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            Ok(Box::new(stream))
        }
    }
}

async fn serve(mut stream: Box<dyn Stream>, exports: &Exports, options: &ServerOptions) {
    let chosen = match handshake::negotiate(&mut stream, exports).await {
        Ok(Some(chosen)) => chosen,
        Ok(None) => return,
        Err(error) => return tracing::debug!(%error, "an NBD handshake ended early"),
    };
    let name = chosen.name.clone();
    tracing::info!(export = name, "an NBD client connected");
    match transmission::serve(stream, chosen, options).await {
        Ok(()) => tracing::info!(export = name, "an NBD client disconnected"),
        Err(error) => tracing::warn!(export = name, %error, "an NBD client was dropped"),
    }
}
