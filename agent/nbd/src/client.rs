//! An NBD client, for workloads, tests and benchmarks.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{BufMut, Bytes, BytesMut};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, ToSocketAddrs, UnixStream};
use tokio::sync::{mpsc, oneshot};

use crate::Errno;
use crate::handshake::invalid;
use crate::protocol::{
    CMD_DISC, CMD_FLAG_FUA, CMD_FLAG_NO_HOLE, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE,
    CMD_WRITE_ZEROES, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, IHAVEOPT, INFO_EXPORT, NBDMAGIC, OPT_GO,
    OPTION_BYTES_MAX, OPTION_REPLY_MAGIC, PAYLOAD_BYTES_MAX, REP_ACK, REP_INFO, REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
};

/// Requests that may wait to be written; then callers wait.
const QUEUE_MAX: usize = 256;

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
    #[error("the NBD server answered {0}")]
    Errno(Errno),
    /// The connection ended before the answer came.
    #[error("the NBD connection ended before the request was answered")]
    Closed,
}

type Answer = Result<Bytes, Errno>;
type Waiting = Arc<Mutex<HashMap<u64, (u32, oneshot::Sender<Answer>)>>>;

/// A connection to one export. Clones share it; requests of all clones are under way together.
#[derive(Debug, Clone)]
pub struct Client {
    size_bytes: u64,
    requests: mpsc::Sender<(Request, oneshot::Sender<Answer>)>,
}

#[derive(Debug)]
struct Request {
    flags: u16,
    command: u16,
    offset_bytes: u64,
    len_bytes: u32,
    payload: Bytes,
}

impl Client {
    /// Connects to `export` on a Unix socket.
    pub async fn unix(socket: &Path, export: &str) -> Result<Self, ClientError> {
        Self::start(UnixStream::connect(socket).await?, export).await
    }

    /// Connects to `export` on a TCP address.
    pub async fn tcp(address: impl ToSocketAddrs, export: &str) -> Result<Self, ClientError> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Self::start(stream, export).await
    }

    async fn start<S>(mut stream: S, export: &str) -> Result<Self, ClientError>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let size_bytes = choose(&mut stream, export).await?;
        let (reader, writer) = tokio::io::split(stream);
        let (requests, queue) = mpsc::channel(QUEUE_MAX);
        let waiting = Waiting::default();
        let reading = Arc::clone(&waiting);
        tokio::spawn(async move {
            let _ = read_replies(reader, &reading).await;
            reading.lock().unwrap_or_else(PoisonError::into_inner).clear();
        });
        tokio::spawn(async move {
            let _ = write_requests(writer, queue, &waiting).await;
            waiting.lock().unwrap_or_else(PoisonError::into_inner).clear();
        });
        Ok(Self { size_bytes, requests })
    }

    /// The export's size.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    async fn request(&self, request: Request) -> Result<Bytes, ClientError> {
        let (answer, answered) = oneshot::channel();
        self.requests.send((request, answer)).await.map_err(|_| ClientError::Closed)?;
        answered.await.map_err(|_| ClientError::Closed)?.map_err(ClientError::Errno)
    }

    /// Reads `len_bytes` from `offset_bytes`.
    pub async fn read(&self, offset_bytes: u64, len_bytes: u32) -> Result<Bytes, ClientError> {
        let payload = Bytes::new();
        let command = CMD_READ;
        self.request(Request { flags: 0, command, offset_bytes, len_bytes, payload }).await
    }

    /// Writes `data` at `offset_bytes`; durable when answered with `fua`.
    pub async fn write(
        &self,
        offset_bytes: u64,
        data: Bytes,
        fua: bool,
    ) -> Result<(), ClientError> {
        let (flags, len_bytes) = (if fua { CMD_FLAG_FUA } else { 0 }, data.len() as u32);
        let command = CMD_WRITE;
        self.request(Request { flags, command, offset_bytes, len_bytes, payload: data }).await?;
        Ok(())
    }

    /// Zeroes a range, keeping it allocated with `no_hole`.
    pub async fn write_zeroes(
        &self,
        offset_bytes: u64,
        len_bytes: u32,
        no_hole: bool,
    ) -> Result<(), ClientError> {
        let flags = if no_hole { CMD_FLAG_NO_HOLE } else { 0 };
        let (command, payload) = (CMD_WRITE_ZEROES, Bytes::new());
        self.request(Request { flags, command, offset_bytes, len_bytes, payload }).await?;
        Ok(())
    }

    /// Says that a range is not needed any more.
    pub async fn trim(&self, offset_bytes: u64, len_bytes: u32) -> Result<(), ClientError> {
        let (command, payload) = (CMD_TRIM, Bytes::new());
        self.request(Request { flags: 0, command, offset_bytes, len_bytes, payload }).await?;
        Ok(())
    }

    /// Returns once everything answered before is on stable storage.
    pub async fn flush(&self) -> Result<(), ClientError> {
        let (command, payload) = (CMD_FLUSH, Bytes::new());
        let request = Request { flags: 0, command, offset_bytes: 0, len_bytes: 0, payload };
        self.request(request).await?;
        Ok(())
    }
}

/// The handshake of a client that wants one export and simple replies.
async fn choose<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    export: &str,
) -> Result<u64, ClientError> {
    if stream.read_u64().await? != NBDMAGIC || stream.read_u64().await? != IHAVEOPT {
        return Err(invalid("this is not a newstyle NBD server").into());
    }
    let flags = stream.read_u16().await?;
    if flags & FLAG_FIXED_NEWSTYLE == 0 {
        return Err(invalid("the NBD server does not speak fixed newstyle").into());
    }
    let mut out = BytesMut::new();
    out.put_u32(u32::from(flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)));
    out.put_u64(IHAVEOPT);
    out.put_u32(OPT_GO);
    out.put_u32(4 + export.len() as u32 + 2);
    out.put_u32(export.len() as u32);
    out.put_slice(export.as_bytes());
    out.put_u16(0);
    stream.write_all(&out).await?;
    let mut size_bytes = None;
    loop {
        if stream.read_u64().await? != OPTION_REPLY_MAGIC || stream.read_u32().await? != OPT_GO {
            return Err(invalid("the NBD server's option reply makes no sense").into());
        }
        let kind = stream.read_u32().await?;
        let len = stream.read_u32().await?;
        if len > OPTION_BYTES_MAX {
            return Err(invalid("the NBD server's option reply is too long").into());
        }
        let mut data = vec![0; len as usize];
        stream.read_exact(&mut data).await?;
        match kind {
            REP_ACK => {
                let missing = || invalid("the NBD server did not tell the size of the export");
                return Ok(size_bytes.ok_or_else(missing)?);
            }
            REP_INFO if data.starts_with(&INFO_EXPORT.to_be_bytes()) => {
                let size = data.get(2..10).and_then(|bytes| bytes.try_into().ok());
                size_bytes = size.map(u64::from_be_bytes);
            }
            REP_INFO => {}
            _ => {
                let text = match String::from_utf8_lossy(&data) {
                    text if text.is_empty() => format!("error {kind:#x}"),
                    text => text.into_owned(),
                };
                return Err(ClientError::Refused { name: export.to_owned(), text });
            }
        }
    }
}

async fn write_requests<W: AsyncWrite + Unpin>(
    mut writer: W,
    mut queue: mpsc::Receiver<(Request, oneshot::Sender<Answer>)>,
    waiting: &Waiting,
) -> io::Result<()> {
    let mut cookie = 0;
    let mut out = BytesMut::new();
    while let Some((request, answer)) = queue.recv().await {
        let mut next = Some((request, answer));
        while let Some((request, answer)) = next.take() {
            cookie += 1;
            let expected = if request.command == CMD_READ { request.len_bytes } else { 0 };
            waiting
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(cookie, (expected, answer));
            put_request(&mut out, &request, cookie);
            out.extend_from_slice(&request.payload);
            if out.len() < 256 << 10 {
                next = queue.try_recv().ok();
            }
        }
        writer.write_all(&out.split()).await?;
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

async fn read_replies<R: AsyncRead + Unpin>(reader: R, waiting: &Waiting) -> io::Result<()> {
    let mut reader = tokio::io::BufReader::with_capacity(64 << 10, reader);
    loop {
        if reader.read_u32().await? != SIMPLE_REPLY_MAGIC {
            return Err(invalid("the NBD server's reply makes no sense"));
        }
        let errno = reader.read_u32().await?;
        let cookie = reader.read_u64().await?;
        let entry = waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&cookie);
        let Some((expected, answer)) = entry else {
            return Err(invalid("the NBD server answered what was not asked"));
        };
        if errno != 0 {
            let _ = answer.send(Err(Errno(errno)));
            continue;
        }
        let mut data = BytesMut::zeroed(expected.min(PAYLOAD_BYTES_MAX) as usize);
        reader.read_exact(&mut data).await?;
        let _ = answer.send(Ok(data.freeze()));
    }
}
