//! The three TCP connections of a session, as one.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex as SyncMutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::sync::{Mutex, OwnedMutexGuard, watch};
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;
use tokio_rustls::TlsStream;

use crate::batch::{BatchHeader, HEADER_BYTES};
use crate::id::PeerName;
use crate::link::{
    LinkStats, PathStats, StreamError, Turn, Turns, Unsent, ip_header_bytes, wait_until,
};
use crate::message::split_frame;
use crate::session::{Release, Weight};
use crate::tcp::endpoint::PACKET_BYTES_MAX;
use crate::tcp::fitness::Fitness;
use crate::tcp::{GOODBYE, Way, kernel};

/// A peer that says nothing on the control connection for this long is gone: agents send a
/// heartbeat every second, and targets answer each.
const SILENCE_MAX: Duration = Duration::from_secs(10);

/// How often the kernel is asked how a connection within a LAN does.
const FITNESS_PERIOD: Duration = Duration::from_secs(1);

/// How often it is looked whether the peer answers, and how long a knock may take, unless the path is longer.
const KNOCK_PERIOD: Duration = Duration::from_millis(250);

/// Retransmission timeouts in a row after which a path counts as dark. The kernel's next ones come at intervals
/// that double, so a path that is back after six seconds would stay idle for another six.
const DARK_TIMEOUTS: u8 = 3;

/// After a goodbye the other connections stay for so long: whoever finds one of them ended first would
/// take that for the reason.
const GOODBYE_LEAD: Duration = Duration::from_millis(200);

/// How often it is looked whether the peer has taken a goodbye.
const LEFT_PERIOD: Duration = Duration::from_millis(10);

/// How long a goodbye may take before the sockets are dropped without it.
const GOODBYE_TIME_MAX: Duration = Duration::from_secs(1);

/// Longest reason that is sent or read, in bytes.
const REASON_BYTES_MAX: usize = 1024;

/// What of a batch is written in one go, in bytes: a megabyte may stay in the kernel's way for seconds, and
/// would count as unsent all the time.
const WRITE_BYTES: usize = 64 << 10;

/// Header of TCP, and the option that every segment of a connection has once both ends know it.
const TCP_BYTES: u64 = 20;
const TIMESTAMPS_BYTES: u64 = 12;

/// A TLS record, and what it adds: head 5, kind 1, seal 16.
const RECORD_CONTENT_BYTES: u64 = 16 << 10;
const RECORD_HEAD_BYTES: u64 = 22;

/// TLS over TCP. rustls reads 4 KiB at a time; the buffer spares it most of the system calls.
pub(super) type Stream = TlsStream<BufReader<TcpStream>>;
type Writer = Arc<Mutex<WriteHalf<Stream>>>;

/// An authenticated session over TCP. Clones share it.
#[derive(Debug, Clone)]
pub struct Connection(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    peer: PeerName,
    remote_address: SocketAddr,
    /// Why the session ended, once it has.
    ended: watch::Sender<Option<String>>,
    control: Writer,
    /// Heavy batches wait for theirs; light ones only for the batch that is being written.
    turns: Arc<Turns>,
    batches_out: Mutex<WriteHalf<Stream>>,
    /// Their sockets, to ask the kernel about.
    control_socket: Option<OwnedFd>,
    batches_socket: Option<OwnedFd>,
    sync_socket: Option<OwnedFd>,
    way: Way,
    batches_in: Arc<Mutex<ReadHalf<Stream>>>,
    /// Halves that nobody has taken yet.
    control_in: SyncMutex<Option<ReadHalf<Stream>>>,
    sync: SyncMutex<Option<(WriteHalf<Stream>, ReadHalf<Stream>)>>,
    unsent: Unsent,
    /// What tells the peer why the session ended, of whoever ended it here.
    goodbye: SyncMutex<Option<JoinHandle<()>>>,
    sent_bytes: AtomicU64,
    received_bytes: AtomicU64,
}

impl Shared {
    /// The first reason counts: whether this is it.
    fn end(&self, reason: &str) -> bool {
        self.ended.send_if_modified(|ended| {
            let first = ended.is_none();
            ended.get_or_insert_with(|| reason.to_owned());
            first
        })
    }

    /// The peer has closed the control connection, too.
    fn control_is_closed(&self) -> bool {
        let socket = self.control_socket.as_ref();
        let info = socket.and_then(|socket| kernel::info(socket.as_fd()));
        info.is_none_or(|info| info.is_closed)
    }

    /// What the kernel still has is not sent: it comes again on the next connection.
    fn abandon(&self) {
        for socket in [&self.sync_socket, &self.batches_socket].into_iter().flatten() {
            let _ = SockRef::from(socket).set_linger(Some(Duration::ZERO));
        }
    }

    async fn ended(&self) -> String {
        let mut ended = self.ended.subscribe();
        let reason = ended.wait_for(Option::is_some).await;
        // Fails only without a sender, which is in `self`.
        reason.ok().and_then(|reason| reason.clone()).unwrap_or_default()
    }

    /// Does `work`, unless the session ends first; its failure ends the session.
    async fn during<T>(
        &self,
        work: impl Future<Output = std::io::Result<T>>,
    ) -> Result<T, StreamError> {
        tokio::select! {
            biased;
            reason = self.ended() => Err(StreamError::Connection(reason)),
            done = work => done.map_err(|error| {
                let reason = explain(&error);
                self.end(&reason);
                StreamError::Connection(reason)
            }),
        }
    }
}

/// A process that was killed says no goodbye; rustls has a page of its own about that, which tells
/// an operator nothing.
fn explain(error: &std::io::Error) -> String {
    match error.kind() {
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
            "the other end is gone without a goodbye: it was killed, or its host is down".into()
        }
        _ => error.to_string(),
    }
}

/// What of a stream of TLS is content, when its records are full.
fn content_bytes(stream_bytes: u64) -> u64 {
    let records = stream_bytes.div_ceil(RECORD_CONTENT_BYTES + RECORD_HEAD_BYTES);
    stream_bytes.saturating_sub(records * RECORD_HEAD_BYTES)
}

impl Connection {
    pub(super) fn new(
        peer: PeerName,
        remote_address: SocketAddr,
        [control, sync, batches]: [Stream; 3],
        way: Way,
    ) -> Self {
        let socket = |stream: &Stream| stream.get_ref().0.get_ref().as_fd().try_clone_to_owned();
        let [control_socket, sync_socket, batches_socket] =
            [&control, &sync, &batches].map(|stream| socket(stream).ok());
        let (control_in, control_out) = tokio::io::split(control);
        let (sync_in, sync_out) = tokio::io::split(sync);
        let (batches_in, batches_out) = tokio::io::split(batches);
        Self(Arc::new(Shared {
            peer,
            remote_address,
            ended: watch::Sender::new(None),
            control: Arc::new(Mutex::new(control_out)),
            turns: Arc::default(),
            batches_out: Mutex::new(batches_out),
            control_socket,
            batches_socket,
            sync_socket,
            way,
            batches_in: Arc::new(Mutex::new(batches_in)),
            control_in: SyncMutex::new(Some(control_in)),
            sync: SyncMutex::new(Some((sync_out, sync_in))),
            unsent: Unsent::default(),
            goodbye: SyncMutex::default(),
            sent_bytes: AtomicU64::new(0),
            received_bytes: AtomicU64::new(0),
        }))
    }

    pub(crate) fn peer(&self) -> &PeerName {
        &self.0.peer
    }

    pub(crate) fn remote_address(&self) -> SocketAddr {
        self.0.remote_address
    }

    pub(crate) fn take_control(&self) -> Result<(SendHalf, ReceiveHalf), StreamError> {
        let half = self.0.control_in.lock().unwrap_or_else(PoisonError::into_inner).take();
        let half = half.ok_or_else(|| StreamError::Stream("it was opened before".into()))?;
        let shared = Arc::clone(&self.0);
        let send = SendHalf { writer: Arc::clone(&shared.control), shared: Arc::clone(&shared) };
        Ok((
            send,
            ReceiveHalf { half, buffer: BytesMut::new(), shared, silence_max: Some(SILENCE_MAX) },
        ))
    }

    pub(crate) fn take_sync(&self) -> Result<(SendHalf, ReceiveHalf), StreamError> {
        let halves = self.0.sync.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (writer, half) =
            halves.ok_or_else(|| StreamError::Stream("it was opened before".into()))?;
        let shared = Arc::clone(&self.0);
        let send = SendHalf { writer: Arc::new(Mutex::new(writer)), shared: Arc::clone(&shared) };
        Ok((send, ReceiveHalf { half, buffer: BytesMut::new(), shared, silence_max: None }))
    }

    pub(crate) fn turns(&self) -> &Arc<Turns> {
        &self.0.turns
    }

    /// Batches are sent whole, one after the other, heavy ones when it is their turn, each byte when it is due.
    pub(crate) async fn release_batch(
        &self,
        chunks: Vec<Bytes>,
        release: Release,
        weight: Weight,
        turn: Turn,
    ) -> Result<(), StreamError> {
        let bytes: usize = chunks.iter().map(Bytes::len).sum();
        let mut unsent = self.0.unsent.batch(bytes as u64);
        let is_heavy = weight == Weight::Heavy;
        if is_heavy {
            turn.come().await;
        }
        let mut writer = self.0.batches_out.lock().await;
        // The heavy one behind a light one does not pass it on the way to the writer.
        let _turn = is_heavy.then_some(turn);
        let work = async {
            for (due, piece) in release.pieces(chunks) {
                wait_until(due).await;
                for part in piece.iter().flat_map(|chunk| chunk.chunks(WRITE_BYTES)) {
                    writer.write_all(part).await?;
                    unsent.handle_left(part.len() as u64);
                }
                writer.flush().await?;
            }
            Ok(())
        };
        self.0.during(work).await?;
        self.0.sent_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Waits until the batch before was read to its end, and the next one has begun.
    pub(crate) async fn accept_batch(&self) -> Result<BatchStream, StreamError> {
        let mut half = Arc::clone(&self.0.batches_in).lock_owned().await;
        let mut header = [0; HEADER_BYTES];
        self.0.during(half.read_exact(&mut header)).await?;
        self.0.received_bytes.fetch_add(HEADER_BYTES as u64, Ordering::Relaxed);
        Ok(BatchStream { half: Some(half), header, shared: Arc::clone(&self.0) })
    }

    /// Bytes of batches that wait here and in the kernel.
    pub(crate) fn unsent_bytes(&self) -> u64 {
        self.0.unsent.bytes() + self.info().unsent_bytes
    }

    /// What the kernel knows of the connection for batches.
    fn info(&self) -> kernel::Info {
        let socket = self.0.batches_socket.as_ref();
        socket.and_then(|socket| kernel::info(socket.as_fd())).unwrap_or_default()
    }

    pub(crate) fn path(&self) -> PathStats {
        let info = self.info();
        PathStats {
            state: "",
            bytes_per_second: info.delivered_bytes_per_second,
            min_rtt: info.min_rtt,
        }
    }

    pub(crate) fn stats(&self) -> LinkStats {
        let info = self.info();
        LinkStats {
            rtt: info.rtt,
            congestion_window_bytes: info.window_bytes,
            mtu_bytes: info.path_mtu_bytes.min(PACKET_BYTES_MAX) as u16,
            sent_bytes: self.0.sent_bytes.load(Ordering::Relaxed),
            received_bytes: self.0.received_bytes.load(Ordering::Relaxed),
            lost_packets: info.repeated_segments,
            lost_bytes: info.repeated_bytes,
            sent_packets: info.sent_segments,
            link_bytes: info.sent_bytes + info.sent_segments * self.header_bytes(info),
            content_bytes: content_bytes(info.sent_bytes.saturating_sub(info.repeated_bytes)),
            ..LinkStats::default()
        }
    }

    /// Headers of a segment.
    fn header_bytes(&self, info: kernel::Info) -> u64 {
        let options = if info.has_timestamps { TIMESTAMPS_BYTES } else { 0 };
        ip_header_bytes(self.0.remote_address) + TCP_BYTES + options
    }

    /// Ends the session here at once, and tells the peer why if that can be done in time.
    pub(crate) fn close(&self, reason: &str) {
        // Whoever finds the session ended finds the task, too.
        let mut goodbye = self.0.goodbye.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.0.end(reason) {
            return;
        }
        let shared = Arc::clone(&self.0);
        let end = reason.floor_char_boundary(REASON_BYTES_MAX);
        let mut message = GOODBYE.to_vec();
        message.extend_from_slice(&(end as u16).to_le_bytes());
        message.extend_from_slice(&reason.as_bytes()[..end]);
        *goodbye = Some(tokio::spawn(async move {
            let say = async {
                let mut writer = shared.control.lock().await;
                writer.write_all(&message).await?;
                writer.shutdown().await?;
                tokio::time::sleep(GOODBYE_LEAD).await;
                Ok::<_, std::io::Error>(())
            };
            // A peer that cannot be told finds its sockets closed.
            let _ = tokio::time::timeout(GOODBYE_TIME_MAX, say).await;
        }));
    }

    /// Waits until the peer has taken the goodbye of whoever closed, and closed in its turn; [`GOODBYE_TIME_MAX`] at
    /// most. A socket that is closed before, with anything unread, is reset, and what was under way is lost with it.
    pub(crate) async fn left(&self) {
        let goodbye = self.0.goodbye.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(goodbye) = goodbye else { return };
        let taken = async {
            let _ = goodbye.await;
            // Nobody reads any more, so nothing tells when the peer closes: the kernel can only be asked.
            while !self.0.control_is_closed() {
                tokio::time::sleep(LEFT_PERIOD).await;
            }
        };
        let _ = tokio::time::timeout(GOODBYE_TIME_MAX, taken).await;
    }

    /// Whether it was chosen because the target is near.
    pub(crate) fn is_within_lan(&self) -> bool {
        self.0.way == Way::Lan
    }

    /// Waits until TCP is not the right one any more within this LAN, and says why.
    pub(crate) async fn unfit(&self) -> String {
        let mut period = tokio::time::interval(FITNESS_PERIOD);
        let mut judges = [&self.0.batches_socket, &self.0.sync_socket]
            .map(|socket| (socket.as_ref(), Fitness::default()));
        loop {
            period.tick().await;
            for (socket, fitness) in &mut judges {
                let info = socket.and_then(|socket| kernel::info(socket.as_fd()));
                if let Some(why) = info.and_then(|info| fitness.handle_info(info)) {
                    return why;
                }
            }
        }
    }

    /// Looks after an agent's connection; never returns. While the path is dark it knocks with handshakes, and
    /// ends the session once one is answered and the kernel's own retransmissions are not: the next session
    /// is there sooner. Within a LAN a silence is judged as [`Connection::unfit`] does.
    pub(crate) async fn look_after(&self) {
        if self.is_within_lan() {
            return std::future::pending().await;
        }
        let mut period = tokio::time::interval(KNOCK_PERIOD);
        period.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            period.tick().await;
            if !self.is_dark() {
                continue;
            }
            let round_trip = self.info().rtt;
            let knock = TcpStream::connect(self.0.remote_address);
            let answered = tokio::time::timeout(KNOCK_PERIOD.max(2 * round_trip), knock).await;
            if !matches!(answered, Ok(Ok(_))) {
                continue;
            }
            // What the kernel sent again since the path is back is answered by then.
            tokio::time::sleep(round_trip).await;
            if self.is_dark() {
                self.0.abandon();
                self.close("the link was dark, and is back");
            }
        }
    }

    fn is_dark(&self) -> bool {
        let sockets = [&self.0.control_socket, &self.0.sync_socket, &self.0.batches_socket];
        let infos = sockets.into_iter().flatten().filter_map(|socket| kernel::info(socket.as_fd()));
        infos.map(|info| info.timeouts).max().unwrap_or(0) >= DARK_TIMEOUTS
    }

    pub(crate) async fn closed(&self) -> String {
        self.0.ended().await
    }
}

/// The sending half of the control or the sync connection.
#[derive(Debug)]
pub struct SendHalf {
    writer: Writer,
    shared: Arc<Shared>,
}

impl SendHalf {
    pub(crate) async fn write_frame(&mut self, bytes: &[u8]) -> Result<(), StreamError> {
        let mut writer = self.writer.lock().await;
        let work = async {
            writer.write_all(bytes).await?;
            writer.flush().await
        };
        self.shared.during(work).await
    }
}

/// The receiving half of the control or the sync connection.
#[derive(Debug)]
pub struct ReceiveHalf {
    half: ReadHalf<Stream>,
    buffer: BytesMut,
    shared: Arc<Shared>,
    silence_max: Option<Duration>,
}

impl ReceiveHalf {
    /// The next frame's content; `None` when the peer ended the connection. Cancel safe.
    pub(crate) async fn read_frame(&mut self) -> Result<Option<Bytes>, StreamError> {
        loop {
            if self.buffer.starts_with(&GOODBYE) {
                return Err(self.read_goodbye().await);
            }
            if let Some(content) = split_frame(&mut self.buffer)? {
                return Ok(Some(content));
            }
            if self.read().await? == 0 {
                return match self.buffer.is_empty() {
                    true => Ok(None),
                    false => Err(StreamError::Stream("it ended inside a message".into())),
                };
            }
        }
    }

    async fn read(&mut self) -> Result<usize, StreamError> {
        let read = self.shared.during(self.half.read_buf(&mut self.buffer));
        let read = match self.silence_max {
            None => read.await?,
            Some(most) => match tokio::time::timeout(most, read).await {
                Ok(read) => read?,
                Err(_) => {
                    self.shared.end("the link fell silent");
                    return Err(StreamError::Connection("the link fell silent".into()));
                }
            },
        };
        if read == 0 {
            self.shared.end("the peer ended it");
        }
        Ok(read)
    }

    /// Reads the rest of a goodbye, of which the buffer holds the beginning, and ends the session.
    async fn read_goodbye(&mut self) -> StreamError {
        let buffer = &mut self.buffer;
        let wanted = |buffer: &BytesMut| match buffer.get(4..6) {
            Some(len) => {
                6 + usize::from(u16::from_le_bytes([len[0], len[1]])).min(REASON_BYTES_MAX)
            }
            None => 6,
        };
        while buffer.len() < wanted(buffer) {
            match self.half.read_buf(buffer).await {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
        }
        let end = buffer.len().min(wanted(buffer));
        let reason = String::from_utf8_lossy(buffer.get(6..end).unwrap_or_default()).into_owned();
        self.shared.end(&reason);
        StreamError::Connection(reason)
    }
}

/// A batch on its way in. Until it is read to its end no other one is.
#[derive(Debug)]
pub struct BatchStream {
    half: Option<OwnedMutexGuard<ReadHalf<Stream>>>,
    header: [u8; HEADER_BYTES],
    shared: Arc<Shared>,
}

impl BatchStream {
    pub(crate) fn read_header(&mut self) -> Result<BatchHeader, StreamError> {
        Ok(BatchHeader::decode(&self.header)?)
    }

    pub(crate) async fn read_exact(&mut self, buf: &mut [u8]) -> Result<(), StreamError> {
        let Some(half) = &mut self.half else {
            return Err(StreamError::Stream("the batch was read to its end before".into()));
        };
        self.shared.during(half.read_exact(buf)).await?;
        self.shared.received_bytes.fetch_add(buf.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    pub(crate) fn read_end(&mut self) {
        self.half = None;
    }
}

impl Drop for BatchStream {
    fn drop(&mut self) {
        // What follows is the rest of a batch, in which nobody can find the next one.
        if self.half.is_some() {
            self.shared.end("a batch was not read to its end");
        }
    }
}
