//! An NBD client, for workloads, tests and benchmarks.

mod handshake;
mod replies;

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{BufMut, Bytes, BytesMut};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, ToSocketAddrs, UnixStream};
use tokio::sync::{mpsc, oneshot, watch};

use crate::protocol::{
    CMD_BLOCK_STATUS, CMD_DISC, CMD_FLAG_FAST_ZERO, CMD_FLAG_FUA, CMD_FLAG_NO_HOLE, CMD_FLUSH,
    CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, PAYLOAD_BYTES_MAX, REQUEST_MAGIC,
    TRANSMIT_READ_ONLY,
};
use crate::{Errno, Run, ZeroOptions};

/// Requests that may wait to be written; then callers wait.
const QUEUE_MAX: usize = 256;

/// Payload up to this length is gathered with others; longer ones are written as they are.
const GATHER_BYTES_MAX: usize = 64 << 10;

/// Gathered requests are written once they are this long.
const WRITE_BATCH_BYTES: usize = 256 << 10;

/// Why a request failed.
#[derive(Debug, Error)]
pub enum ClientError {
    /// The connection broke, or could not be made.
    #[error("the NBD connection failed: {0}")]
    Io(#[from] io::Error),
    /// The server refused the export.
    #[error("the NBD server refused export `{name}`: {text}")]
    Refused {
        /// The export asked for.
        name: String,
        /// What the server said.
        text: String,
    },
    /// The server answered with an error.
    #[error("the NBD server answered {errno}: {text}")]
    Failed {
        /// The error number.
        errno: Errno,
        /// What the server said, or nothing.
        text: String,
    },
    /// More than one request can carry.
    #[error("{len_bytes} bytes are too many for one NBD request; send at most 32 MiB")]
    TooLong {
        /// The length asked for.
        len_bytes: u64,
    },
    /// The server does not offer what was asked for.
    #[error("the NBD server does not offer {what}")]
    NotOffered {
        /// What is missing.
        what: &'static str,
    },
    /// The connection ended before the answer came.
    #[error("the NBD connection ended before the request was answered")]
    Closed,
}

impl ClientError {
    /// The error number, if the server answered with one.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Failed { errno, .. } => Some(*errno),
            _ => None,
        }
    }
}

/// A connection to one export. Clones share it; requests of all clones are under way together.
#[derive(Debug, Clone)]
pub struct Client {
    chosen: Chosen,
    requests: mpsc::Sender<(Request, Asker)>,
    /// Closed when the connection is.
    ended: watch::Receiver<()>,
}

impl Client {
    /// Connects to `export` on a Unix socket.
    pub async fn unix(socket: &Path, export: &str) -> Result<Self, ClientError> {
        Self::over(UnixStream::connect(socket).await?, export).await
    }

    /// Connects to `export` on a TCP address.
    pub async fn tcp(address: impl ToSocketAddrs, export: &str) -> Result<Self, ClientError> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Self::over(stream, export).await
    }

    /// Chooses `export` on a stream that is connected to a server.
    pub async fn over<S>(mut stream: S, export: &str) -> Result<Self, ClientError>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let chosen = handshake::choose(&mut stream, export).await?;
        let (reader, writer) = tokio::io::split(stream);
        let (requests, queue) = mpsc::channel(QUEUE_MAX);
        let (alive, ended) = watch::channel(());
        let waiting = Arc::new(Waiting(Mutex::new(Some(HashMap::new()))));
        let reading = Arc::clone(&waiting);
        tokio::spawn(async move {
            if let Err(error) = replies::read(reader, &reading, chosen.allocation).await {
                tracing::debug!(%error, "an NBD connection ended");
            }
            reading.close();
            drop(alive);
        });
        tokio::spawn(async move {
            if let Err(error) = write_requests(writer, queue, &waiting).await {
                tracing::debug!(%error, "an NBD connection ended");
                waiting.close();
            }
        });
        Ok(Self { chosen, requests, ended })
    }

    /// The export's size.
    pub fn size_bytes(&self) -> u64 {
        self.chosen.size_bytes
    }

    /// Whether the server refuses writes.
    pub fn read_only(&self) -> bool {
        self.chosen.flags & TRANSMIT_READ_ONLY != 0
    }

    /// Reads `len_bytes` from `offset_bytes`, at most 32 MiB.
    pub async fn read(&self, offset_bytes: u64, len_bytes: u32) -> Result<Bytes, ClientError> {
        if len_bytes > PAYLOAD_BYTES_MAX {
            return Err(ClientError::TooLong { len_bytes: len_bytes.into() });
        }
        match self.ask(CMD_READ, 0, offset_bytes, len_bytes, Bytes::new()).await? {
            Answer::Data(data) => Ok(data),
            Answer::Done | Answer::Runs(_) => Err(ClientError::Closed),
        }
    }

    /// Writes `data`, at most 32 MiB, at `offset_bytes`; durable when answered with `fua`.
    pub async fn write(
        &self,
        offset_bytes: u64,
        data: Bytes,
        fua: bool,
    ) -> Result<(), ClientError> {
        if data.len() > PAYLOAD_BYTES_MAX as usize {
            return Err(ClientError::TooLong { len_bytes: data.len() as u64 });
        }
        let len_bytes = data.len() as u32;
        self.ask(CMD_WRITE, fua_flag(fua), offset_bytes, len_bytes, data).await?;
        Ok(())
    }

    /// Makes a range read as zeroes.
    pub async fn write_zeroes(
        &self,
        offset_bytes: u64,
        len_bytes: u32,
        options: ZeroOptions,
    ) -> Result<(), ClientError> {
        let mut flags = fua_flag(options.fua);
        if options.no_hole {
            flags |= CMD_FLAG_NO_HOLE;
        }
        if options.fast {
            flags |= CMD_FLAG_FAST_ZERO;
        }
        self.ask(CMD_WRITE_ZEROES, flags, offset_bytes, len_bytes, Bytes::new()).await?;
        Ok(())
    }

    /// Says that a range is not needed any more.
    pub async fn trim(
        &self,
        offset_bytes: u64,
        len_bytes: u32,
        fua: bool,
    ) -> Result<(), ClientError> {
        self.ask(CMD_TRIM, fua_flag(fua), offset_bytes, len_bytes, Bytes::new()).await?;
        Ok(())
    }

    /// Returns once everything answered before is on stable storage.
    pub async fn flush(&self) -> Result<(), ClientError> {
        self.ask(CMD_FLUSH, 0, 0, 0, Bytes::new()).await?;
        Ok(())
    }

    /// The runs of `base:allocation` from `offset_bytes` on, at least one; the server may end them
    /// before `len_bytes`.
    pub async fn block_status(
        &self,
        offset_bytes: u64,
        len_bytes: u32,
    ) -> Result<Vec<Run>, ClientError> {
        if self.chosen.allocation.is_none() {
            return Err(ClientError::NotOffered { what: "block status (base:allocation)" });
        }
        match self.ask(CMD_BLOCK_STATUS, 0, offset_bytes, len_bytes, Bytes::new()).await? {
            Answer::Runs(runs) => Ok(runs),
            Answer::Done | Answer::Data(_) => Err(ClientError::Closed),
        }
    }

    /// Says good-bye, once every clone is dropped or disconnected, and waits until the server has
    /// closed the connection. Dropping the last clone says good-bye too, without the wait.
    pub async fn disconnect(self) {
        let Self { requests, mut ended, .. } = self;
        drop(requests);
        while ended.changed().await.is_ok() {}
    }

    async fn ask(
        &self,
        command: u16,
        flags: u16,
        offset_bytes: u64,
        len_bytes: u32,
        payload: Bytes,
    ) -> Result<Answer, ClientError> {
        let (asker, answered) = oneshot::channel();
        let request = Request { flags, command, offset_bytes, len_bytes, payload };
        self.requests.send((request, asker)).await.map_err(|_| ClientError::Closed)?;
        answered.await.map_err(|_| ClientError::Closed)?
    }
}

fn fua_flag(fua: bool) -> u16 {
    if fua { CMD_FLAG_FUA } else { 0 }
}

/// What the handshake settled.
#[derive(Debug, Clone, Copy)]
struct Chosen {
    size_bytes: u64,
    flags: u16,
    /// The server's id for `base:allocation`.
    allocation: Option<u32>,
}

#[derive(Debug)]
struct Request {
    flags: u16,
    command: u16,
    offset_bytes: u64,
    len_bytes: u32,
    payload: Bytes,
}

#[derive(Debug)]
enum Answer {
    Done,
    Data(Bytes),
    Runs(Vec<Run>),
}

type Asker = oneshot::Sender<Result<Answer, ClientError>>;

/// A request on the wire.
#[derive(Debug)]
struct Pending {
    command: u16,
    offset_bytes: u64,
    len_bytes: u32,
    asker: Asker,
}

/// Requests that were not answered yet, by cookie; `None` once no answer can come any more.
struct Waiting(Mutex<Option<HashMap<u64, Pending>>>);

impl Waiting {
    /// Whether an answer can still come. Else the asker has been told so.
    fn insert(&self, cookie: u64, pending: Pending) -> bool {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.as_mut().map(|waiting| waiting.insert(cookie, pending)).is_some()
    }

    fn remove(&self, cookie: u64) -> Option<Pending> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).as_mut()?.remove(&cookie)
    }

    /// Tells everyone who waits, by dropping their channel.
    fn close(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

async fn write_requests<W: AsyncWrite + Unpin>(
    mut writer: W,
    mut queue: mpsc::Receiver<(Request, Asker)>,
    waiting: &Waiting,
) -> io::Result<()> {
    let mut cookie = 0;
    let mut out = BytesMut::new();
    while let Some(next) = queue.recv().await {
        let mut next = Some(next);
        while let Some((request, asker)) = next.take() {
            cookie += 1;
            let Request { command, offset_bytes, len_bytes, .. } = request;
            if !waiting.insert(cookie, Pending { command, offset_bytes, len_bytes, asker }) {
                return Ok(());
            }
            put_request(&mut out, &request, cookie);
            if request.payload.len() <= GATHER_BYTES_MAX {
                out.extend_from_slice(&request.payload);
            } else {
                writer.write_all(&out).await?;
                writer.write_all(&request.payload).await?;
                out.clear();
            }
            if out.len() < WRITE_BATCH_BYTES {
                next = queue.try_recv().ok();
            }
        }
        writer.write_all(&out).await?;
        out.clear();
    }
    let leave = Request {
        flags: 0,
        command: CMD_DISC,
        offset_bytes: 0,
        len_bytes: 0,
        payload: Bytes::new(),
    };
    put_request(&mut out, &leave, 0);
    writer.write_all(&out).await
}

fn put_request(out: &mut BytesMut, request: &Request, cookie: u64) {
    out.put_u32(REQUEST_MAGIC);
    out.put_u16(request.flags);
    out.put_u16(request.command);
    out.put_u64(cookie);
    out.put_u64(request.offset_bytes);
    out.put_u32(request.len_bytes);
}
