//! The sync: brings dirty blocks back into the stream.
//!
//! ```text
//! plan (pure): which regions, which hashes to ask for ⇄ worker (thread): reads, compares, emits
//! ```
//!
//! When a generation begins, what the target holds is unknown: an old VMDK of the machine, half of
//! an earlier sync, or nothing. The worker asks for the root hash of each region of 4 MiB; where it
//! differs, for the hashes of its 64 KiB leaves; and sends the dirty blocks of those that differ.
//! After an overflow the dirty blocks are known to differ and are sent without asking.
//!
//! Each region is read with its range locked, and takes its place in the machine's order before
//! the lock is released, so a write of the guest is wholly before it or wholly after it.

mod plan;
mod region;
mod worker;

pub use plan::{Known, Plan, Question, RegionRef};
pub use worker::{SyncHandle, SyncInput, SyncOutput, start};
