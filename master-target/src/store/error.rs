//! Why a store refuses.

use std::path::PathBuf;

use backhaul_proto::id::{BatchSeq, DiskIndex, Generation, WriteSeq};
use thiserror::Error;

use crate::journal::{Damage, JournalError};
use crate::storage::StorageError;

/// A batch's generation, sequence number and first write.
pub type OrderPlace = (Generation, BatchSeq, WriteSeq);

/// Why a store refuses.
#[derive(Debug, Error)]
pub enum StoreError {
    /// A file system is full. Nothing acknowledged is lost, and the call may be repeated.
    #[error(
        "`{}` has no space for {needed_bytes} more bytes: free some on its file system; nothing \
         acknowledged is lost, and replication goes on by itself then", path.display()
    )]
    Full {
        /// The file that could not grow.
        path: PathBuf,
        /// What it needed.
        needed_bytes: u64,
        /// What the system said.
        source: StorageError,
    },
    /// A file operation failed; the store is latched.
    #[error("{0}; nothing more is written for this machine until its store is opened again")]
    Io(#[source] StorageError),
    /// An earlier operation failed.
    #[error("writes are refused until the store is opened again, because earlier: {reason}")]
    Latched {
        /// The first failure.
        reason: String,
    },
    /// No generation was begun.
    #[error("no generation was begun: the agent and the target have to agree on one first")]
    NoGeneration,
    /// A generation that is under way cannot begin again.
    #[error("generation {generation} is under way and cannot begin again")]
    GenerationReused {
        /// Which.
        generation: Generation,
    },
    /// Acknowledged data is gone; only a new generation helps.
    #[error("{}", damage.sentence)]
    Lost {
        /// What and where.
        damage: Damage,
    },
    /// A batch does not continue the order.
    #[error(
        "batch {} of generation {} with write {} came where batch {} of generation {} with write \
         {} is next", found.1, found.0, found.2, expected.1, expected.0, expected.2
    )]
    Order {
        /// What came.
        found: OrderPlace,
        /// What had to come.
        expected: OrderPlace,
    },
    /// A record lies outside its disk, or names a disk that the machine does not have.
    #[error(
        "batch {batch} writes disk {disk} up to byte {end_bytes}, but the disk has {size_bytes} \
         bytes at the target: the disk changed its size, so enlarge its image or protect it anew"
    )]
    Bounds {
        /// The batch.
        batch: BatchSeq,
        /// The disk.
        disk: DiskIndex,
        /// The first byte behind the record.
        end_bytes: u64,
        /// The disk's size; 0 for a disk that there is not.
        size_bytes: u64,
    },
    /// A read lies outside its disk.
    #[error("disk {disk} has {size_bytes} bytes; it cannot be read up to byte {end_bytes}")]
    ReadBounds {
        /// The disk.
        disk: DiskIndex,
        /// The first byte behind the read.
        end_bytes: u64,
        /// The disk's size; 0 for a disk that there is not.
        size_bytes: u64,
    },
    /// An image file is too small for its disk.
    #[error(
        "image `{}` has {found_bytes} bytes, but its disk needs {expected_bytes}: restore the file \
         or protect the machine anew", path.display()
    )]
    ImageSize {
        /// The file.
        path: PathBuf,
        /// What it has.
        found_bytes: u64,
        /// What it needs.
        expected_bytes: u64,
    },
    /// A record that was durable cannot be read back; the store is latched, and opening it again
    /// decides what is lost.
    #[error(
        "batch {batch} cannot be read back from `{}` at byte {offset_bytes}: the journal is damaged",
        path.display()
    )]
    JournalDamaged {
        /// The segment.
        path: PathBuf,
        /// Where the record starts.
        offset_bytes: u64,
        /// The batch.
        batch: BatchSeq,
    },
}

impl StoreError {
    /// After this error nothing is known about what was written.
    pub(crate) fn latches(&self) -> bool {
        matches!(self, Self::Io(_) | Self::JournalDamaged { .. })
    }
}

impl From<JournalError> for StoreError {
    fn from(error: JournalError) -> Self {
        match error {
            JournalError::Full { needed_bytes, source } => {
                Self::Full { path: source.path.clone(), needed_bytes, source }
            }
            JournalError::Io(source) => Self::Io(source),
        }
    }
}

impl From<StorageError> for StoreError {
    fn from(source: StorageError) -> Self {
        Self::Io(source)
    }
}
