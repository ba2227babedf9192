//! The master target's REST interface: its types, and a client for its Unix socket.
//!
//! | request | answer |
//! | --- | --- |
//! | `GET /v1/status` | [`Status`] |
//! | `GET /v1/links` | a list of [`Link`] |
//! | `GET /v1/machines` | a list of [`Machine`] |
//! | `GET /v1/machines/{name}` | [`Machine`] |
//! | `GET /v1/machines/{name}/points` | a list of [`Point`] |
//! | `POST /v1/machines/{name}/points` | [`Point`], once it is on stable storage |
//! | `POST /v1/machines/{name}/failover` with [`FailoverRequest`] | [`Machine`]; it goes on by itself |
//! | `POST /v1/machines/{name}/cancel` | [`Machine`]; it goes on by itself |
//! | `POST /v1/machines/{name}/commit` with [`CommitRequest`] | [`Machine`]; it goes on by itself |
//!
//! Whatever fails answers with a [`Failure`]. Long steps are watched with `GET`: they belong to the
//! target, so a client that goes away interrupts nothing.

mod client;

use serde::{Deserialize, Serialize};

pub use client::{Client, ClientError};

/// The target as a whole.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Its name.
    pub target: String,
    /// Its software version.
    pub version: String,
    /// Where agents connect.
    pub listen: String,
    /// Seconds since it started.
    pub uptime_seconds: u64,
    /// Agents that are connected.
    pub agents: Vec<String>,
    /// Number of machines configured.
    pub machines: usize,
    /// Number of machines whose disks are a prefix of their writes.
    pub machines_consistent: usize,
}

/// The link to a connected agent, from the sending side unless a name says otherwise. Counters are
/// those of the present connection.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Link {
    /// The agent.
    pub agent: String,
    /// Where it connects from.
    pub address: String,
    /// Seconds since it did.
    pub connected_seconds: u64,
    /// `quic` or `tcp`.
    pub transport: String,
    /// How the sending rate is found.
    pub congestion: String,
    /// Where the congestion controller stands; empty over TCP.
    pub state: String,
    /// The rate that it takes the path for; over TCP that of the kernel's last measure.
    pub path_bytes_per_second: Option<u64>,
    /// The smallest round-trip time of late, in seconds; 0 when none was measured.
    pub min_rtt_seconds: f64,
    /// Smoothed round-trip time, in seconds.
    pub rtt_seconds: f64,
    /// Bytes a second acknowledged as durable, lately.
    pub acked_bytes_per_second: u64,
    /// The ceiling at present.
    pub ceiling_bytes_per_second: Option<u64>,
    /// Level of zstd at present; 0 while compressing does not pay.
    #[serde(default)]
    pub compression_level: u32,
    /// Bytes of data that travelled as references.
    #[serde(default)]
    pub referenced_bytes: u64,
    /// QUIC connections that carry its batches; 0 over TCP.
    #[serde(default)]
    pub connections: u32,
    /// Bytes that may be in flight.
    pub window_bytes: u64,
    /// The path's MTU: over QUIC as a UDP payload, over TCP with all headers.
    pub mtu_bytes: u32,
    /// Bytes sent, the transport's headers included.
    pub sent_bytes: u64,
    /// Packets sent.
    pub sent_packets: u64,
    /// Packets declared lost.
    pub lost_packets: u64,
    /// Bytes in them, which were sent again.
    pub retransmitted_bytes: u64,
    /// Times that an MTU black hole was found.
    pub mtu_black_holes: u64,
    /// Receive buffer granted to the agent's socket.
    pub agent_receive_buffer_bytes: u64,
    /// Send buffer granted to the agent's socket.
    pub agent_send_buffer_bytes: u64,
    /// Datagrams that the agent's kernel dropped for want of room.
    pub agent_dropped_datagrams: u64,
    /// Receive buffer granted to the target's socket.
    pub target_receive_buffer_bytes: u64,
    /// Send buffer granted to the target's socket.
    #[serde(default)]
    pub target_send_buffer_bytes: u64,
    /// Datagrams that the target's kernel dropped for want of room, of all agents together.
    pub target_dropped_datagrams: u64,
}

/// A machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Its name.
    pub name: String,
    /// The agent it is enrolled to.
    pub agent: String,
    /// Whether that agent is connected and replicates it.
    pub connected: bool,
    /// Whether its disks here are a prefix of its writes.
    pub consistency: Consistency,
    /// Where it stands between replication and commit.
    pub stage: Stage,
    /// What the present step waits for, in words; empty when there is nothing to say.
    pub step: String,
    /// Why the last failover, cancel or commit did not work; empty when it did.
    pub failure: String,
    /// Something that needs a person; empty when nothing does.
    pub trouble: String,
    /// How much would be lost if the source vanished now, in seconds; none before the first sync.
    pub rpo_seconds: Option<f64>,
    /// Bytes that the agent holds and this target has not acknowledged.
    pub lag_bytes: u64,
    /// Bytes of the disks that are in no batch; more than 0 while syncing.
    pub dirty_bytes: u64,
    /// The sync under way.
    pub sync: Option<Sync>,
    /// Bytes of the journal.
    pub journal_bytes: u64,
    /// Bytes received since the target started, as they travelled.
    pub received_wire_bytes: u64,
    /// Bytes received since the target started, uncompressed.
    pub received_plain_bytes: u64,
    /// Bytes of them that travelled as references to what the images held already.
    #[serde(default)]
    pub referenced_bytes: u64,
    /// Batches that came though they had been acknowledged as durable. None does, but for what a cancel finds on its
    /// way.
    #[serde(default)]
    pub repeated_batches: u64,
    /// Seconds the last finished sync took, from its first batch to consistency.
    pub last_sync_seconds: Option<f64>,
    /// Its recovery points, newest last.
    pub points: Vec<Point>,
    /// The point it was failed over to, and what that cost.
    pub failover: Option<FailoverResult>,
    /// Its disks.
    pub disks: Vec<Disk>,
}

/// Whether a machine's disks can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Consistency {
    /// Nothing was received yet.
    Empty,
    /// A sync is under way or was interrupted; the disks are a mixture.
    Syncing,
    /// The disks are a prefix of the machine's writes.
    Consistent,
}

/// Where a machine stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Changes arrive.
    Replicating,
    /// A failover is under way.
    FailingOver,
    /// The disks are at the chosen point; start the machine, check it, then commit or cancel.
    FailedOver,
    /// A failover is being undone.
    Cancelling,
    /// A commit is under way.
    Committing,
    /// The machine lives here; protection has ended.
    Committed,
}

/// A sync.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sync {
    /// Bytes to look at.
    pub total_bytes: u64,
    /// Bytes dealt with.
    pub done_bytes: u64,
    /// Bytes that had to be sent.
    pub sent_bytes: u64,
}

/// A recovery point that can be failed over to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Point {
    /// What `--to` takes: its time, in microseconds.
    pub id: String,
    /// `crash-consistent`.
    pub kind: String,
}

/// What a failover came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FailoverResult {
    /// The point that the disks are at.
    pub point: Point,
    /// Whether the source was drained, so that nothing is lost.
    pub source_drained: bool,
    /// Seconds of writes that are lost; 0 when the source was drained.
    pub data_loss_seconds: f64,
    /// Seconds from the request to disks that are ready.
    pub seconds: f64,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Its name.
    pub name: String,
    /// Its image: the descriptor, for a VMDK.
    pub image: String,
    /// The image's kind.
    pub kind: String,
    /// Its size in bytes; 0 before the agent told it.
    pub size_bytes: u64,
}

/// How to fail over.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FailoverRequest {
    /// `latest`, or the id of a point.
    pub to: String,
    /// Leave the source running: a rehearsal.
    #[serde(default)]
    pub without_shutdown: bool,
    /// How long to wait for the source to shut down and drain before going on without it.
    pub drain_timeout_seconds: f64,
}

/// How to commit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CommitRequest {
    /// Do not run the removal hook: the agent is gone for good.
    #[serde(default)]
    pub without_removal: bool,
}

/// Why a request was refused or failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// For programs: `unknown-machine`, `not-consistent`, `wrong-direction` and so on.
    pub code: String,
    /// For people: what is wrong and what to do.
    pub sentence: String,
}
