//! Every bound of the protocol, with its reason. What exceeds one is refused, never truncated.

/// Most bytes of data one record carries. Larger guest writes are split: a disk promises atomicity
/// for a sector at most, so a split write is no new failure case for the guest.
pub const RECORD_DATA_BYTES_MAX: u32 = 1 << 20;

/// Batch size the agent aims for. Large enough to amortise a stream, a hash and a journal record;
/// small enough that one QUIC stream never holds the 1,024 gaps that kill a connection.
pub const BATCH_DATA_BYTES_TARGET: u32 = 1 << 20;

/// Most plain bytes (record table plus data) of a batch: a full target plus one last record.
pub const BATCH_PLAIN_BYTES_MAX: u32 = RECORD_TABLE_BYTES_MAX + 2 * (1 << 20);

/// Most records in a batch.
pub const BATCH_RECORDS_MAX: u32 = 4096;

/// Most references of a batch. A reference of fewer bytes than a body has on average for each costs
/// the target more in reading than it saves on the wire.
pub const REFERENCES_MAX: u32 = 512;

/// Most bytes a record table takes.
pub const RECORD_TABLE_BYTES_MAX: u32 = BATCH_RECORDS_MAX * crate::batch::RECORD_BYTES as u32;

/// Most bytes of one framed message on a control or sync stream. The largest is a hash reply of
/// [`HASH_REGIONS_MAX`] regions or a hello of [`MACHINES_MAX`] machines with all their disks.
pub const FRAME_BYTES_MAX: u32 = 1 << 20;

/// Most machines one agent may protect over one connection.
pub const MACHINES_MAX: usize = 64;

/// Most disks of one machine (what a VMware machine can have is 60).
pub const DISKS_MAX: usize = 64;

/// Largest protected disk: 62 TiB, the largest VMDK.
pub const DISK_BYTES_MAX: u64 = 62 << 40;

/// Bytes covered by one leaf hash of a sync.
pub const LEAF_BYTES: u32 = 64 << 10;

/// Bytes covered by one root hash of a sync: 64 leaves.
pub const REGION_BYTES: u32 = 4 << 20;

/// Most regions one hash request may name.
pub const HASH_REGIONS_MAX: u32 = 64;

/// What a machine may have under way, as the window counts it, with the batch that is sent next, for that
/// batch to be a light one, which goes ahead of other machines': a few writes and the marker of a point.
/// All machines together have four megabytes of light batches under way at most.
pub const LIGHT_BYTES_MAX: u64 = 64 << 10;

/// Most bytes of a batch that travels in a control message over QUIC, header included: so small a frame has
/// copies, and a lost packet does not hold it up.
pub const CONTROL_BATCH_BYTES_MAX: usize = 900;

/// The same over TCP, where control is a connection of its own and a batch would wait for the megabyte that is
/// being written on the other one: what a connection that was idle sends in its first round trip.
pub const CONTROL_BATCH_BYTES_MAX_TCP: usize = 14 << 10;

/// Granularity at which the agent tracks dirty blocks.
pub const BLOCK_BYTES: u32 = 4096;

/// Most batches of one machine that may wait for a gap before them at the target. Beyond it the
/// target stops reading batch streams, and QUIC flow control stops the agent.
pub const REORDER_BATCHES_MAX: usize = 512;

/// Longest name of a machine, disk, agent or export, in bytes.
pub const NAME_BYTES_MAX: usize = 63;

/// Longest sentence carried in a refusal or a failure, in bytes.
pub const SENTENCE_BYTES_MAX: usize = 2048;

/// Longest that one direction of a link is probed.
pub const PROBE_TIME_MAX: std::time::Duration = std::time::Duration::from_secs(60);
