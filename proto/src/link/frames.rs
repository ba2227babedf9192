//! Messages on a stream, whatever carries it.

use bytes::BytesMut;
use prost::Message;

use crate::link::StreamError;
use crate::message::{decode, frame, frame_len};
use crate::{quic, tcp};

/// The sending half of a stream of messages.
#[derive(Debug)]
pub struct FrameSender(SendHalf);

#[derive(Debug)]
enum SendHalf {
    Quic(quic::SendHalf),
    Tcp(tcp::SendHalf),
}

/// The receiving half of a stream of messages.
#[derive(Debug)]
pub struct FrameReceiver {
    half: ReceiveHalf,
    buffer: BytesMut,
}

#[derive(Debug)]
enum ReceiveHalf {
    Quic(quic::ReceiveHalf),
    Tcp(tcp::ReceiveHalf),
}

pub(crate) fn over_quic(
    (send, receive): (quic::SendHalf, quic::ReceiveHalf),
) -> (FrameSender, FrameReceiver) {
    let half = ReceiveHalf::Quic(receive);
    (FrameSender(SendHalf::Quic(send)), FrameReceiver { half, buffer: BytesMut::new() })
}

pub(crate) fn over_tcp(
    (send, receive): (tcp::SendHalf, tcp::ReceiveHalf),
) -> (FrameSender, FrameReceiver) {
    let half = ReceiveHalf::Tcp(receive);
    (FrameSender(SendHalf::Tcp(send)), FrameReceiver { half, buffer: BytesMut::new() })
}

impl FrameSender {
    /// Sends one message.
    pub async fn send(&mut self, message: &impl Message) -> Result<(), StreamError> {
        let bytes = frame(message);
        match &mut self.0 {
            SendHalf::Quic(half) => half.write(bytes).await,
            SendHalf::Tcp(half) => half.write(&bytes).await,
        }
    }
}

impl FrameReceiver {
    /// The next message; `None` when the peer finished the stream. Cancel safe.
    pub async fn recv<M: Message + Default>(&mut self) -> Result<Option<M>, StreamError> {
        loop {
            if let Some(prefix) = self.buffer.first_chunk::<4>() {
                if let ReceiveHalf::Tcp(half) = &mut self.half
                    && *prefix == tcp::GOODBYE
                {
                    return Err(half.read_goodbye(&mut self.buffer).await);
                }
                let len = frame_len(*prefix)?;
                if self.buffer.len() >= 4 + len {
                    let content = self.buffer.split_to(4 + len);
                    return Ok(Some(decode(&content[4..])?));
                }
            }
            let read = match &mut self.half {
                ReceiveHalf::Quic(half) => half.read(&mut self.buffer).await?,
                ReceiveHalf::Tcp(half) => half.read(&mut self.buffer).await?,
            };
            if read == 0 {
                return match self.buffer.is_empty() {
                    true => Ok(None),
                    false => Err(StreamError::Stream("it ended inside a message".into())),
                };
            }
        }
    }
}
