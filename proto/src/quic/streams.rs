//! The streams of a connection.

use std::future::pending;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use quinn::{ReadError, ReadExactError, RecvStream, SendStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use crate::batch::{BatchHeader, HEADER_BYTES};
use crate::link::StreamError;
use crate::message::split_frame;
use crate::quic::copies::{COPIES_BYTES_MAX, Incoming, Outgoing};

/// How long after its frame a copy is sent: on a line that is full the packet with the frame has
/// left by then, and what is lost in bunches is mostly over.
const COPY_DELAY: Duration = Duration::from_millis(3);

/// Copies that wait for their moment: twenty thousand frames a second would fill it. A frame
/// that finds no room has no copy.
const COPIES_WAITING_MAX: usize = 64;

/// Most that is read from a stream in one piece, in bytes.
const READ_BYTES_MAX: usize = 64 << 10;

pub(super) fn ended(error: quinn::ConnectionError) -> StreamError {
    StreamError::Connection(error.to_string())
}

/// The sending half of a stream of frames.
#[derive(Debug)]
pub struct SendHalf {
    stream: SendStream,
    /// Frames sent so far.
    sent: u64,
    copies: Option<mpsc::Sender<Copied>>,
}

/// A frame that is to be sent once more.
#[derive(Debug)]
struct Copied {
    place: u64,
    frame: Bytes,
    sent_at: Instant,
}

impl SendHalf {
    /// Every frame goes on the stream only.
    pub(super) fn plain(stream: SendStream) -> Self {
        Self { stream, sent: 0, copies: None }
    }

    /// Small frames are sent once more as datagrams, when the peer takes those.
    pub(super) fn copied(stream: SendStream, connection: &quinn::Connection) -> Self {
        let copies = connection.max_datagram_size().map(|_| {
            let (sender, waiting) = mpsc::channel(COPIES_WAITING_MAX);
            tokio::spawn(send_copies(connection.clone(), waiting));
            sender
        });
        Self { copies, ..Self::plain(stream) }
    }

    pub(crate) async fn write_frame(&mut self, frame: Bytes) -> Result<(), StreamError> {
        let place = self.sent;
        self.sent += 1;
        let written = self.stream.write_chunk(frame.clone()).await;
        written.map_err(|error| StreamError::Stream(error.to_string()))?;
        if let Some(copies) = &self.copies
            && frame.len() <= COPIES_BYTES_MAX
        {
            let _ = copies.try_send(Copied { place, frame, sent_at: Instant::now() });
        }
        Ok(())
    }
}

/// Sends copies until the sending half or the connection is gone.
async fn send_copies(connection: quinn::Connection, mut waiting: mpsc::Receiver<Copied>) {
    let mut outgoing = Outgoing::default();
    while let Some(Copied { place, frame, sent_at }) = waiting.recv().await {
        sleep_until(sent_at + COPY_DELAY).await;
        outgoing.handle_sent(place, frame);
        if let Some(datagram) = outgoing.poll_datagram()
            && connection.send_datagram(datagram).is_err()
        {
            return;
        }
    }
}

/// The receiving half of a stream of frames.
#[derive(Debug)]
pub struct ReceiveHalf {
    stream: RecvStream,
    buffer: BytesMut,
    incoming: Incoming,
    /// Where copies come from.
    datagrams: Option<quinn::Connection>,
}

impl ReceiveHalf {
    /// Frames come on the stream only.
    pub(super) fn plain(stream: RecvStream) -> Self {
        let (buffer, incoming) = (BytesMut::new(), Incoming::default());
        Self { stream, buffer, incoming, datagrams: None }
    }

    /// Frames come as datagrams, too.
    pub(super) fn copied(stream: RecvStream, connection: &quinn::Connection) -> Self {
        Self { datagrams: Some(connection.clone()), ..Self::plain(stream) }
    }

    /// The next frame's content; `None` when the peer finished the stream. Cancel safe.
    pub(crate) async fn read_frame(&mut self) -> Result<Option<Bytes>, StreamError> {
        loop {
            if let Some(content) = self.incoming.poll_copy() {
                return Ok(Some(content));
            }
            if let Some(content) = split_frame(&mut self.buffer)? {
                match self.incoming.handle_frame(content) {
                    Some(content) => return Ok(Some(content)),
                    None => continue,
                }
            }
            let datagram = async {
                match &self.datagrams {
                    Some(connection) => connection.read_datagram().await,
                    None => pending().await,
                }
            };
            tokio::select! {
                // What came before the end of a connection is still on the stream.
                biased;
                chunk = self.stream.read_chunk(READ_BYTES_MAX, true) => match chunk {
                    Ok(Some(chunk)) => self.buffer.extend_from_slice(&chunk.bytes),
                    Ok(None) if self.buffer.is_empty() => return Ok(None),
                    Ok(None) => return Err(StreamError::Stream("it ended inside a message".into())),
                    Err(error) => return Err(StreamError::Stream(error.to_string())),
                },
                datagram = datagram => self.incoming.handle_datagram(datagram.map_err(ended)?),
            }
        }
    }
}

/// A batch on its way in.
#[derive(Debug)]
pub struct BatchStream(RecvStream);

impl BatchStream {
    pub(super) fn new(stream: RecvStream) -> Self {
        Self(stream)
    }

    /// Reads the header, which comes first.
    pub async fn read_header(&mut self) -> Result<BatchHeader, StreamError> {
        let mut bytes = [0; HEADER_BYTES];
        self.read_exact(&mut bytes).await?;
        Ok(BatchHeader::decode(&bytes)?)
    }

    /// Fills `buf`: the one copy between the datagram and the buffer that is journalled.
    pub async fn read_exact(&mut self, buf: &mut [u8]) -> Result<(), StreamError> {
        self.0.read_exact(buf).await.map_err(|error| match error {
            ReadExactError::ReadError(ReadError::ConnectionLost(error)) => ended(error),
            error => StreamError::Stream(error.to_string()),
        })
    }

    /// Checks that nothing follows.
    pub async fn read_end(&mut self) -> Result<(), StreamError> {
        let mut more = [0];
        match self.0.read(&mut more).await {
            Ok(None) => Ok(()),
            Ok(Some(_)) => Err(StreamError::Stream("more bytes follow a batch".into())),
            Err(ReadError::ConnectionLost(error)) => Err(ended(error)),
            Err(error) => Err(StreamError::Stream(error.to_string())),
        }
    }
}
