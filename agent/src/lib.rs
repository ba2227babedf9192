//! The process-server side of Backhaul: it captures the writes of protected machines and streams
//! them to the master target.
//!
//! ```text
//! capture → batch → session (proto) → link
//!    ↑ dirty          ↓ acks
//!    sync  ←──────────┘ hashes
//! ```

pub mod batch;
pub mod capture;
pub mod sync;
