//! Messages on a stream, whatever carries it.

use prost::Message;

use crate::link::StreamError;
use crate::message::{decode, frame};
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
pub struct FrameReceiver(ReceiveHalf);

#[derive(Debug)]
enum ReceiveHalf {
    Quic(quic::ReceiveHalf),
    Tcp(tcp::ReceiveHalf),
}

pub(crate) fn over_quic(
    (send, receive): (quic::SendHalf, quic::ReceiveHalf),
) -> (FrameSender, FrameReceiver) {
    (FrameSender(SendHalf::Quic(send)), FrameReceiver(ReceiveHalf::Quic(receive)))
}

pub(crate) fn over_tcp(
    (send, receive): (tcp::SendHalf, tcp::ReceiveHalf),
) -> (FrameSender, FrameReceiver) {
    (FrameSender(SendHalf::Tcp(send)), FrameReceiver(ReceiveHalf::Tcp(receive)))
}

impl FrameSender {
    /// Sends one message.
    pub async fn send(&mut self, message: &impl Message) -> Result<(), StreamError> {
        let frame = frame(message);
        match &mut self.0 {
            SendHalf::Quic(half) => half.write_frame(frame).await,
            SendHalf::Tcp(half) => half.write_frame(&frame).await,
        }
    }
}

impl FrameReceiver {
    /// The next message; `None` when the peer finished the stream. Cancel safe.
    pub async fn recv<M: Message + Default>(&mut self) -> Result<Option<M>, StreamError> {
        let content = match &mut self.0 {
            ReceiveHalf::Quic(half) => half.read_frame().await?,
            ReceiveHalf::Tcp(half) => half.read_frame().await?,
        };
        Ok(content.as_deref().map(decode).transpose()?)
    }
}
