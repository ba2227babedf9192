//! Messages on the control stream and on the sync stream.
//!
//! They must be able to grow for years, so they are protobuf (`prost`), each framed by its length
//! as a little-endian `u32`. Field numbers are the format: they are never reused. Batches do not
//! travel here; they have streams of their own.

use bytes::{Buf, Bytes, BytesMut};
use prost::Message;
use thiserror::Error;

use crate::limits::FRAME_BYTES_MAX;

/// What an agent says on the control stream. The first message is always a [`Hello`].
#[derive(Clone, PartialEq, Message)]
pub struct AgentMessage {
    /// The one thing it says.
    #[prost(oneof = "agent_message::Kind", tags = "1, 2, 3, 4, 5, 6, 7")]
    pub kind: Option<agent_message::Kind>,
}

/// Variants of [`AgentMessage`].
pub mod agent_message {
    /// What an agent can say.
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Kind {
        /// Opens the session.
        #[prost(message, tag = "1")]
        Hello(super::Hello),
        /// How far the capture is; sent every second and whenever the mode changes.
        #[prost(message, tag = "2")]
        Progress(super::Progress),
        /// How a job ended.
        #[prost(message, tag = "3")]
        JobReply(super::JobReply),
        /// Liveness.
        #[prost(message, tag = "4")]
        Heartbeat(super::Heartbeat),
        /// How the link looks from the sending side; sent every second.
        #[prost(message, tag = "5")]
        Link(super::LinkReport),
        /// Opens a probe of the link instead of a session, and goes on with it.
        #[prost(message, tag = "6")]
        Probe(super::ProbeRequest),
        /// A batch as it travels on a stream of its own, of at most
        /// [`crate::link::Transport::control_batch_bytes_max`] bytes and without references. From version 3 on.
        #[prost(bytes = "bytes", tag = "7")]
        Batch(bytes::Bytes),
    }
}

/// What a target says on the control stream. The first message is a [`Welcome`] or a [`Refusal`].
#[derive(Clone, PartialEq, Message)]
pub struct TargetMessage {
    /// The one thing it says.
    #[prost(oneof = "target_message::Kind", tags = "1, 2, 3, 4, 5, 6, 7, 8")]
    pub kind: Option<target_message::Kind>,
}

/// Variants of [`TargetMessage`].
pub mod target_message {
    /// What a target can say.
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Kind {
        /// Accepts the session.
        #[prost(message, tag = "1")]
        Welcome(super::Welcome),
        /// Refuses the session, and closes it.
        #[prost(message, tag = "2")]
        Refused(super::Refusal),
        /// Batches are durable.
        #[prost(message, tag = "3")]
        Ack(super::Ack),
        /// Asks for something to be done.
        #[prost(message, tag = "4")]
        Job(super::Job),
        /// Liveness: answers an agent's heartbeat.
        #[prost(message, tag = "5")]
        Heartbeat(super::Heartbeat),
        /// A machine's standing changed after the welcome (a cancel resumes it, say).
        #[prost(message, tag = "6")]
        Machine(super::MachineWelcome),
        /// Answers a probe.
        #[prost(message, tag = "7")]
        Probe(super::ProbeReply),
        /// Asks for a batch again, without references. From version 2 on.
        #[prost(message, tag = "8")]
        Resend(super::Resend),
    }
}

/// Opens a session: who speaks, which versions, which machines.
#[derive(Clone, PartialEq, Message)]
pub struct Hello {
    /// Oldest protocol version the agent speaks.
    #[prost(uint32, tag = "1")]
    pub version_min: u32,
    /// Newest protocol version the agent speaks.
    #[prost(uint32, tag = "2")]
    pub version_max: u32,
    /// The agent's software version, for people.
    #[prost(string, tag = "3")]
    pub software: String,
    /// Its machines; a machine's place in this list is its index on this connection.
    #[prost(message, repeated, tag = "4")]
    pub machines: Vec<MachineHello>,
    /// Machines of its configuration that were removed by a commit, in case that the reply to that
    /// job was lost.
    #[prost(string, repeated, tag = "5")]
    pub ended_machines: Vec<String>,
}

/// One machine in a [`Hello`].
#[derive(Clone, PartialEq, Message)]
pub struct MachineHello {
    /// Its name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// The generation its batches belong to.
    #[prost(uint64, tag = "2")]
    pub generation: u64,
    /// Its disks, in the order of their indices.
    #[prost(message, repeated, tag = "3")]
    pub disks: Vec<DiskHello>,
    /// The last batch of this generation that the agent holds an acknowledgement for. A target that
    /// recovered less has lost acknowledged data, and says so.
    #[prost(uint64, tag = "4")]
    pub acked_batch: u64,
}

/// One disk in a [`MachineHello`].
#[derive(Clone, PartialEq, Message)]
pub struct DiskHello {
    /// Its name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its size in bytes.
    #[prost(uint64, tag = "2")]
    pub size_bytes: u64,
}

/// Accepts a session.
#[derive(Clone, PartialEq, Message)]
pub struct Welcome {
    /// The version both will speak.
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// The target's software version, for people.
    #[prost(string, tag = "2")]
    pub software: String,
    /// One answer for each machine of the hello, in its order.
    #[prost(message, repeated, tag = "3")]
    pub machines: Vec<MachineWelcome>,
}

/// How a machine stands with the target.
#[derive(Clone, PartialEq, Message)]
pub struct MachineWelcome {
    /// Its index on this connection.
    #[prost(uint32, tag = "1")]
    pub machine: u32,
    /// What the agent may do with it.
    #[prost(enumeration = "Standing", tag = "2")]
    pub standing: i32,
    /// The last batch of the agent's generation that is durable here; 0 for none. The agent forgets
    /// those up to it.
    #[prost(uint64, tag = "3")]
    pub durable_batch: u64,
    /// Bytes of batches (as [`crate::batch::EncodedBatch::window_bytes`] counts them) after
    /// `durable_batch` that may be under way before the first acknowledgement.
    #[prost(uint64, tag = "4")]
    pub window_bytes: u64,
    /// How often the agent sets a crash-consistent point, in milliseconds.
    #[prost(uint64, tag = "5")]
    pub point_period_ms: u64,
    /// Why, when the standing is [`Standing::Refused`].
    #[prost(message, optional, tag = "6")]
    pub refusal: Option<Refusal>,
    /// The last batch in hand, durable or not: the agent sends those after it, and keeps those
    /// after `durable_batch`, since a target that restarts will ask for them.
    #[prost(uint64, tag = "7")]
    pub received_batch: u64,
    /// The newest recovery point that the target knows of, whatever its generation: points of this
    /// machine come after it, even when the agent's clock went back.
    #[prost(uint64, tag = "8")]
    pub newest_point: u64,
    /// With [`Standing::FailedOver`]: the machine must take no more writes, whatever became of its
    /// shutdown hook. Not set for a rehearsal.
    #[prost(bool, tag = "9")]
    pub fence: bool,
}

/// What an agent may do with a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Standing {
    /// Never sent.
    Unknown = 0,
    /// Replicate: continue this generation after `durable_batch`.
    Replicate = 1,
    /// The generation cannot go on (the target holds less than was acknowledged, or the image was
    /// written by somebody else): begin a new generation with a sync, and say hello again.
    Restart = 2,
    /// Failed over, waiting for commit or cancel: send nothing, keep the machine fenced if it is.
    FailedOver = 3,
    /// Committed: protection has ended.
    Ended = 4,
    /// Refused, for the reason given; the other machines go on.
    Refused = 5,
}

/// A refusal or a failure: a stable code for programs, a sentence for people.
#[derive(Clone, PartialEq, Message)]
pub struct Refusal {
    /// What it is about.
    #[prost(enumeration = "Code", tag = "1")]
    pub code: i32,
    /// What is wrong and what to do, at most [`crate::limits::SENTENCE_BYTES_MAX`] bytes.
    #[prost(string, tag = "2")]
    pub sentence: String,
}

/// Stable codes of refusals and failures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Code {
    /// Anything without a code of its own.
    Other = 0,
    /// No common protocol version.
    Version = 1,
    /// No such machine at the target.
    UnknownMachine = 2,
    /// The machine is enrolled to another identity.
    NotEnrolled = 3,
    /// Disks differ in number, name or size from what the target holds.
    DiskMismatch = 4,
    /// The target has no room or cannot reach an image.
    Storage = 5,
    /// The message was not understood, or came at the wrong moment.
    Protocol = 6,
    /// A hook failed.
    Hook = 7,
    /// Not possible while a sync is under way.
    Syncing = 8,
    /// Another agent with the same identity replicates the machine.
    Rival = 9,
}

/// Cumulative acknowledgement of one machine's batches.
#[derive(Clone, PartialEq, Message)]
pub struct Ack {
    /// The machine's index on this connection.
    #[prost(uint32, tag = "1")]
    pub machine: u32,
    /// Every batch up to this one is on stable storage.
    #[prost(uint64, tag = "2")]
    pub durable_batch: u64,
    /// Bytes of batches after `durable_batch` that may be under way. Replaces the window before it.
    #[prost(uint64, tag = "3")]
    pub window_bytes: u64,
    /// Every batch up to this one is on the images, where references find it. 0 where the target does not say.
    #[prost(uint64, tag = "4")]
    pub applied_batch: u64,
}

/// Asks for a batch whose references could not be resolved again, without them.
#[derive(Clone, PartialEq, Message)]
pub struct Resend {
    /// The machine's index on this connection.
    #[prost(uint32, tag = "1")]
    pub machine: u32,
    /// The batch's generation.
    #[prost(uint64, tag = "2")]
    pub generation: u64,
    /// The batch.
    #[prost(uint64, tag = "3")]
    pub batch: u64,
}

/// How far a machine's capture is.
#[derive(Clone, PartialEq, Message)]
pub struct Progress {
    /// The machine's index on this connection.
    #[prost(uint32, tag = "1")]
    pub machine: u32,
    /// Every write that finished before this message was sent is in this batch or an earlier one,
    /// when `dirty_bytes` is 0.
    #[prost(uint64, tag = "2")]
    pub newest_batch: u64,
    /// Bytes of batches not acknowledged yet.
    #[prost(uint64, tag = "3")]
    pub queued_bytes: u64,
    /// Bytes of the disks that are in no batch yet. More than 0 means not consistent.
    #[prost(uint64, tag = "4")]
    pub dirty_bytes: u64,
    /// Bytes the present sync has to look at, 0 when none is under way.
    #[prost(uint64, tag = "5")]
    pub sync_total_bytes: u64,
    /// Bytes of those that it has dealt with.
    #[prost(uint64, tag = "6")]
    pub sync_done_bytes: u64,
    /// Bytes of those that had to be sent.
    #[prost(uint64, tag = "7")]
    pub sync_sent_bytes: u64,
    /// Something that needs a person (an unreadable sector, say); empty when nothing does.
    #[prost(string, tag = "8")]
    pub trouble: String,
}

/// Liveness, and the round-trip time as the application sees it.
#[derive(Clone, PartialEq, Message)]
pub struct Heartbeat {
    /// Returned as it came.
    #[prost(uint64, tag = "1")]
    pub nonce: u64,
    /// What the target's busiest driver of this link took of a core of late, in percent.
    #[prost(uint32, tag = "2")]
    pub load_percent: u32,
    /// Connections that the target's cores are worth; 0 says that it takes one.
    #[prost(uint32, tag = "3")]
    pub connections_max: u32,
}

/// The link as the agent's transport sees it. Counters are those of the present connection.
#[derive(Clone, PartialEq, Message)]
pub struct LinkReport {
    /// How the sending rate is found: `auto`, `cubic`, `fixed 200 Mbit/s`.
    #[prost(string, tag = "2")]
    pub congestion: String,
    /// Smoothed round-trip time, in microseconds.
    #[prost(uint64, tag = "3")]
    pub rtt_us: u64,
    /// Bytes that may be in flight.
    #[prost(uint64, tag = "4")]
    pub window_bytes: u64,
    /// Bytes a second acknowledged as durable, over the last moments.
    #[prost(uint64, tag = "5")]
    pub acked_bytes_per_second: u64,
    /// The ceiling at present; 0 for none.
    #[prost(uint64, tag = "6")]
    pub ceiling_bytes_per_second: u64,
    /// The path's MTU, as a UDP payload.
    #[prost(uint32, tag = "7")]
    pub mtu_bytes: u32,
    /// Bytes sent, the transport's headers included.
    #[prost(uint64, tag = "8")]
    pub sent_bytes: u64,
    /// Packets sent.
    #[prost(uint64, tag = "9")]
    pub sent_packets: u64,
    /// Packets declared lost.
    #[prost(uint64, tag = "10")]
    pub lost_packets: u64,
    /// Bytes in them, which were sent again.
    #[prost(uint64, tag = "11")]
    pub lost_bytes: u64,
    /// Times that an MTU black hole was found.
    #[prost(uint64, tag = "12")]
    pub mtu_black_holes: u64,
    /// Receive buffer that the system granted to the socket.
    #[prost(uint64, tag = "13")]
    pub receive_buffer_bytes: u64,
    /// Send buffer that the system granted.
    #[prost(uint64, tag = "14")]
    pub send_buffer_bytes: u64,
    /// Datagrams that the agent's kernel dropped because nobody read them in time.
    #[prost(uint64, tag = "15")]
    pub dropped_datagrams: u64,
    /// Where the congestion controller stands, `probe_bw_cruise` say; empty over TCP.
    #[prost(string, tag = "16")]
    pub state: String,
    /// The rate that it takes the path for, in bytes a second; 0 when it makes no estimate. Over TCP the
    /// rate of the kernel's last measure.
    #[prost(uint64, tag = "17")]
    pub path_bytes_per_second: u64,
    /// The smallest round-trip time of late, in microseconds; 0 when none was measured.
    #[prost(uint64, tag = "18")]
    pub min_rtt_us: u64,
    /// Level of zstd at present; 0 while compressing does not pay.
    #[prost(uint32, tag = "19")]
    pub compression_level: u32,
    /// Bytes of data that travelled as references on this connection, of all machines.
    #[prost(uint64, tag = "20")]
    pub referenced_bytes: u64,
    /// QUIC connections that carry its batches; 0 over TCP, which has one.
    #[prost(uint32, tag = "21")]
    pub connections: u32,
}

/// One step of a probe. Batches that come in meanwhile are counted and thrown away.
#[derive(Clone, PartialEq, Message)]
pub struct ProbeRequest {
    /// Returned as it came.
    #[prost(uint64, tag = "1")]
    pub nonce: u64,
    /// For so long the target sends batches of noise, from now on; at most
    /// [`crate::limits::PROBE_TIME_MAX`].
    #[prost(uint64, tag = "2")]
    pub download_ms: u64,
    /// The target measures how fast its store takes and syncs data.
    #[prost(bool, tag = "3")]
    pub disk: bool,
}

/// The answer to a [`ProbeRequest`].
#[derive(Clone, PartialEq, Message)]
pub struct ProbeReply {
    /// The request's.
    #[prost(uint64, tag = "1")]
    pub nonce: u64,
    /// The target's clock, in microseconds since 1970 UTC.
    #[prost(uint64, tag = "2")]
    pub now_us: u64,
    /// Bytes of batches that came in so far.
    #[prost(uint64, tag = "3")]
    pub received_bytes: u64,
    /// Bytes a second that the store takes durably; 0 when it was not asked for.
    #[prost(uint64, tag = "4")]
    pub disk_bytes_per_second: u64,
    /// Why that could not be measured.
    #[prost(string, tag = "5")]
    pub disk_failure: String,
    /// Receive buffer granted to the target's socket, in bytes.
    #[prost(uint64, tag = "6")]
    pub receive_buffer_bytes: u64,
    /// Datagrams that the target's kernel dropped for want of room.
    #[prost(uint64, tag = "7")]
    pub dropped_datagrams: u64,
    /// Share of one core that the target's process used since the last reply, in percent.
    #[prost(uint64, tag = "8")]
    pub cpu_percent: u64,
}

/// Something the target asks the agent to do to a machine.
#[derive(Clone, PartialEq, Message)]
pub struct Job {
    /// Doing the same id again returns the first result.
    #[prost(uint64, tag = "1")]
    pub job: u64,
    /// The machine's index on this connection.
    #[prost(uint32, tag = "2")]
    pub machine: u32,
    /// What to do.
    #[prost(enumeration = "JobKind", tag = "3")]
    pub kind: i32,
}

/// What a [`Job`] asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum JobKind {
    /// Never sent.
    Unknown = 0,
    /// Set a crash-consistent point now.
    Tag = 1,
    /// Failover: run the shutdown hook, fence the exports, set the final point.
    Shutdown = 2,
    /// Failover of a machine that must keep running (a rehearsal): set the final point only.
    FinalPoint = 3,
    /// Cancel: lift the fence.
    Unfence = 4,
    /// Commit: run the removal hook, end protection.
    Remove = 5,
    /// Begin a new generation: compare everything with the target.
    Resync = 6,
}

/// How a job ended.
#[derive(Clone, PartialEq, Message)]
pub struct JobReply {
    /// The job.
    #[prost(uint64, tag = "1")]
    pub job: u64,
    /// The machine's index on this connection.
    #[prost(uint32, tag = "2")]
    pub machine: u32,
    /// Set when it failed.
    #[prost(message, optional, tag = "3")]
    pub failure: Option<Refusal>,
    /// The batch that ends with the point, for jobs that set one.
    #[prost(uint64, tag = "4")]
    pub point_batch: u64,
    /// The point, for jobs that set one.
    #[prost(uint64, tag = "5")]
    pub point: u64,
}

/// What an agent asks on the sync stream.
#[derive(Clone, PartialEq, Message)]
pub struct HashRequest {
    /// Returned in the reply.
    #[prost(uint64, tag = "1")]
    pub request: u64,
    /// The machine's index on this connection.
    #[prost(uint32, tag = "2")]
    pub machine: u32,
    /// The disk's index.
    #[prost(uint32, tag = "3")]
    pub disk: u32,
    /// First region ([`crate::limits::REGION_BYTES`]) asked for.
    #[prost(uint64, tag = "4")]
    pub first_region: u64,
    /// How many, 1 to [`crate::limits::HASH_REGIONS_MAX`].
    #[prost(uint32, tag = "5")]
    pub regions: u32,
    /// With the leaf hashes of each region (then `regions` is 1).
    #[prost(bool, tag = "6")]
    pub leaves: bool,
    /// The image must hold every batch up to this one before it is hashed.
    #[prost(uint64, tag = "7")]
    pub after_batch: u64,
}

/// The answer to a [`HashRequest`].
#[derive(Clone, PartialEq, Message)]
pub struct HashReply {
    /// The request it answers.
    #[prost(uint64, tag = "1")]
    pub request: u64,
    /// One entry for each region asked for: empty when the region reads as zeroes throughout, else
    /// the 32-byte root hash. For a request with leaves: one entry of 32 bytes for each leaf.
    #[prost(bytes = "bytes", repeated, tag = "2")]
    pub hashes: Vec<Bytes>,
    /// Set when the image could not be read.
    #[prost(message, optional, tag = "3")]
    pub failure: Option<Refusal>,
}

/// Why a frame was not a message.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum FrameError {
    /// Longer than any message may be.
    #[error("a message of {bytes} bytes was announced; the most allowed is {FRAME_BYTES_MAX}")]
    TooLong {
        /// The announced length.
        bytes: u32,
    },
    /// Not a message of the expected type.
    #[error("a message could not be understood: {0}")]
    Decode(#[from] prost::DecodeError),
}

/// A message with its length before it, as it travels.
pub fn frame(message: &impl Message) -> Bytes {
    let len = message.encoded_len();
    debug_assert!(len <= FRAME_BYTES_MAX as usize);
    let mut out = BytesMut::with_capacity(4 + len);
    out.extend_from_slice(&(len as u32).to_le_bytes());
    message.encode(&mut out).expect("a BytesMut grows as needed");
    out.freeze()
}

/// The length that a frame's first four bytes announce, checked against the bound.
pub fn frame_len(prefix: [u8; 4]) -> Result<usize, FrameError> {
    let bytes = u32::from_le_bytes(prefix);
    if bytes > FRAME_BYTES_MAX { Err(FrameError::TooLong { bytes }) } else { Ok(bytes as usize) }
}

/// Takes the first frame off `buffer` and returns its content; `None` while it is not whole.
pub fn split_frame(buffer: &mut BytesMut) -> Result<Option<Bytes>, FrameError> {
    let Some(prefix) = buffer.first_chunk::<4>() else { return Ok(None) };
    let len = frame_len(*prefix)?;
    if buffer.len() < 4 + len {
        return Ok(None);
    }
    buffer.advance(4);
    Ok(Some(buffer.split_to(len).freeze()))
}

/// Decodes the content of a frame.
pub fn decode<M: Message + Default>(content: &[u8]) -> Result<M, FrameError> {
    Ok(M::decode(content)?)
}
