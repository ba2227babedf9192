//! One agent's connection, pumped into the owner loop.

use std::path::Path;
use std::sync::Arc;

use backhaul_proto::batch::BatchHeader;
use backhaul_proto::link::{BatchStream, Connection, Places, StreamError};
use backhaul_proto::message::{
    AgentMessage, Code, HashReply, HashRequest, Hello, Refusal, TargetMessage, agent_message,
    target_message,
};
use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::batch_buffer::IncomingBatch;
use crate::machine::LinkId;
use crate::probe;
use crate::receive::{FoldedBatch, ReceiveError, Received, Unresolved, read_batch};

/// How long an agent may take to say hello.
const HELLO_TIME_MAX: std::time::Duration = std::time::Duration::from_secs(10);

/// How long an agent may take to read why it is refused.
const REFUSAL_TIME_MAX: std::time::Duration = std::time::Duration::from_secs(5);

/// Batches of one connection that are read at a time. A whole window of small ones may be open;
/// more than these wait in the transport, whose windows bound them.
const READING_MAX: usize = 256;

/// Memory for the batches of one connection that are being read, in KiB: an agent may announce batches
/// of the largest size and send none of them. More wait in the transport, too.
const READING_KIB_MAX: usize = 64 << 10;

/// Questions of one connection that are not answered yet. Beyond it the connection is closed: an agent
/// asks for some dozens at a time.
const QUESTIONS_MAX: usize = 1024;

/// Connections that one identity may hold: its session, one that is about to replace it, and probes.
/// More are closed with a sentence, so that one agent's certificate cannot take the target's memory.
pub const CONNECTIONS_PER_AGENT_MAX: usize = 8;

/// What a link tells the owner loop.
pub enum LinkEvent {
    /// An agent said hello.
    Hello(LinkUp, Hello),
    /// An agent said something else.
    Message(agent_message::Kind),
    /// An agent asks what a disk holds. It keeps its place among the questions until it is answered.
    Question(HashRequest, OwnedSemaphorePermit),
    /// A batch came in whole and sound.
    Batch(BatchHeader, IncomingBatch),
    /// A batch came in whose references are to be resolved. It keeps its place among those that are
    /// read until then.
    Folded(BatchHeader, FoldedBatch, OwnedSemaphorePermit),
    /// They cannot be.
    Unresolved(BatchHeader, Unresolved),
    /// The connection is gone.
    Down(String),
}

/// A live connection, as the owner loop uses it. The channels hold what the agent's transport has
/// no room for: acknowledgements, at most one a machine and group, and answers to its questions, at
/// most `QUESTIONS_MAX`.
#[derive(Debug, Clone)]
pub struct LinkUp {
    /// The connection.
    pub connection: Connection,
    control: mpsc::UnboundedSender<TargetMessage>,
    sync: mpsc::UnboundedSender<(HashReply, OwnedSemaphorePermit)>,
}

impl LinkUp {
    /// Sends a control message.
    pub fn control(&self, kind: target_message::Kind) {
        let _ = self.control.send(TargetMessage { kind: Some(kind) });
    }

    /// Answers a question, and gives back its place once the answer is sent.
    pub fn answer(&self, reply: HashReply, place: OwnedSemaphorePermit) {
        let _ = self.sync.send((reply, place));
    }

    /// Refuses the session in words, then closes it.
    pub fn refuse(&self, code: Code, sentence: &str) {
        let refusal = Refusal { code: code.into(), sentence: sentence.to_owned() };
        self.control(target_message::Kind::Refused(refusal));
    }
}

/// Runs a connection until it ends.
pub async fn run(
    id: LinkId,
    connection: Connection,
    places: &Arc<Places>,
    store: &Path,
    events: mpsc::UnboundedSender<(LinkId, LinkEvent)>,
) {
    let Some(_place) = places.take(connection.peer()) else {
        let reason = format!(
            "agent {} has {CONNECTIONS_PER_AGENT_MAX} connections here already; stop what else uses its identity",
            connection.peer()
        );
        tracing::warn!("{reason}");
        return connection.close(&reason);
    };
    let reason = match converse(id, &connection, store, &events).await {
        Ok(()) => "the agent ended the session".to_owned(),
        Err(error) => error.to_string(),
    };
    // If it was closed before, that reason says more.
    connection.close(&reason);
    let _ = events.send((id, LinkEvent::Down(connection.closed().await)));
}

async fn converse(
    id: LinkId,
    connection: &Connection,
    store: &Path,
    events: &mpsc::UnboundedSender<(LinkId, LinkEvent)>,
) -> Result<(), StreamError> {
    let greeting = async {
        let (control_out, mut control_in) = connection.accept_control().await?;
        let sync = connection.accept_sync().await?;
        let hello = control_in.recv::<AgentMessage>().await?;
        Ok::<_, StreamError>((control_out, control_in, sync, hello))
    };
    let late = |_| StreamError::Stream("the agent did not say hello".into());
    let greeted = tokio::time::timeout(HELLO_TIME_MAX, greeting).await.map_err(late)??;
    let (mut control_out, mut control_in, (mut sync_out, mut sync_in), hello) = greeted;
    let hello = match hello.and_then(|message| message.kind) {
        Some(agent_message::Kind::Hello(hello)) => hello,
        Some(agent_message::Kind::Probe(first)) => {
            tracing::info!(agent = %connection.peer(), "the link is probed");
            return probe::serve(connection, store, first, &mut control_out, &mut control_in).await;
        }
        _ => return Err(StreamError::Stream("the agent's first message is not a hello".into())),
    };
    let (control, mut control_queue) = mpsc::unbounded_channel::<TargetMessage>();
    let (sync, mut sync_queue) = mpsc::unbounded_channel();
    let link = LinkUp { connection: connection.clone(), control, sync };
    let _ = events.send((id, LinkEvent::Hello(link, hello)));

    let controls = async {
        while let Some(message) = control_queue.recv().await {
            control_out.send(&message).await?;
            if let Some(target_message::Kind::Refused(refusal)) = message.kind {
                // Closing at once could overtake what the agent has not read yet. The agent closes
                // when it has; if it does not, the reason of the close says the same.
                let _ = tokio::time::timeout(REFUSAL_TIME_MAX, connection.closed()).await;
                return Err(StreamError::Stream(refusal.sentence));
            }
        }
        Ok::<_, StreamError>(())
    };
    let answers = async {
        while let Some((reply, _place)) = sync_queue.recv().await {
            sync_out.send(&reply).await?;
        }
        // The owner loop let go of the link; a refusal may still be on its way.
        std::future::pending().await
    };
    let messages = async {
        while let Some(message) = control_in.recv::<AgentMessage>().await? {
            let event = match message.kind {
                Some(agent_message::Kind::Batch(bytes)) => control_batch(connection, bytes).await?,
                Some(kind) => LinkEvent::Message(kind),
                None => continue,
            };
            let _ = events.send((id, event));
        }
        Ok::<_, StreamError>(())
    };
    let questions = async {
        let places = Arc::new(Semaphore::new(QUESTIONS_MAX));
        while let Some(request) = sync_in.recv::<HashRequest>().await? {
            let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
                let sentence = format!("the agent asked {QUESTIONS_MAX} questions at a time");
                return Err(StreamError::Stream(sentence));
            };
            let _ = events.send((id, LinkEvent::Question(request, place)));
        }
        Ok::<_, StreamError>(())
    };
    tokio::select! {
        ended = controls => ended,
        ended = answers => ended,
        ended = messages => ended,
        ended = questions => ended,
        ended = batches(id, connection, events) => ended,
    }
}

/// A batch that came in a control message. What is read there waits for no memory that others hold.
async fn control_batch(connection: &Connection, bytes: Bytes) -> Result<LinkEvent, StreamError> {
    let (bytes_len, bytes_max) = (bytes.len(), connection.transport().control_batch_bytes_max());
    let read = if bytes_len <= bytes_max {
        let own_memory_kib = Semaphore::new(READING_KIB_MAX);
        read_batch(&mut BatchStream::Message(bytes), &own_memory_kib).await
    } else {
        let sentence = format!(
            "a batch of {bytes_len} bytes came in a control message; the most allowed is {bytes_max}"
        );
        Err(StreamError::Stream(sentence).into())
    };
    let sentence = match read {
        Ok((header, Received::Whole(batch))) => return Ok(LinkEvent::Batch(header, batch)),
        Ok((header, Received::Folded(_))) => {
            format!("batch {} came with references in a control message", header.batch)
        }
        Err(error) => error.to_string(),
    };
    tracing::warn!(agent = %connection.peer(), "a batch was not taken: {sentence}");
    Err(StreamError::Stream(sentence))
}

/// Reads batches, several at a time, in whatever order they come in.
async fn batches(
    id: LinkId,
    connection: &Connection,
    events: &mpsc::UnboundedSender<(LinkId, LinkEvent)>,
) -> Result<(), StreamError> {
    let places = Arc::new(Semaphore::new(READING_MAX));
    let memory_kib = Arc::new(Semaphore::new(READING_KIB_MAX));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return Ok(()) };
        let mut stream = connection.accept_batch().await?;
        let (events, connection) = (events.clone(), connection.clone());
        let memory_kib = Arc::clone(&memory_kib);
        tokio::spawn(async move {
            match read_batch(&mut stream, &memory_kib).await {
                Ok((header, Received::Whole(batch))) => {
                    let _ = events.send((id, LinkEvent::Batch(header, batch)));
                }
                Ok((header, Received::Folded(batch))) => {
                    let _ = events.send((id, LinkEvent::Folded(header, batch, place)));
                }
                // The connection's own end says why.
                Err(ReceiveError::Stream(StreamError::Connection(_))) => {}
                Err(error) => {
                    tracing::warn!(agent = %connection.peer(), %error, "a batch was not taken");
                    connection.close(&error.to_string());
                }
            }
        });
    }
}
