//! The process-server side of Backhaul: it captures the writes of protected machines and streams
//! them to the master target.
//!
//! ```text
//! guest ─NBD→ capture ─→ batch ─→ session (proto) ─→ link ══ QUIC ══ target
//!              ↑ dirty map                │ acks, windows
//!              └──── sync ←───────────────┘ hashes
//! ```
//!
//! [`agent`] is the owner loop. [`capture`] and [`batch`] hold the pure cores that it drives.

pub mod agent;
pub mod batch;
pub mod capture;
pub mod config;
pub mod dedupe;
pub mod hook;
pub mod job;
pub mod link;
pub mod metrics;
pub mod probe;
pub mod progress;
pub mod state;
pub mod sync;
