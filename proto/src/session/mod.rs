//! The session core, without sockets, files or clocks: time is an argument.
//!
//! An agent holds one [`Sender`] a machine, a target one [`Receiver`]. They outlive connections:
//! a connection that ends is told to both, and the next one resumes at the exact place.
//! [`BatchLimit`] holds batches back to a ceiling, [`Backoff`] spaces out the attempts, [`Watermark`] turns progress into RPO.

mod backoff;
mod batch_limit;
mod receiver;
mod sender;
mod watermark;

pub use backoff::Backoff;
pub use batch_limit::BatchLimit;
pub use receiver::{Delivery, Receiver, ReceiverConfig, Rejected};
pub use sender::{AckError, Released, Sender, Unfolded};
pub use watermark::Watermark;

#[cfg(test)]
mod virtual_link;
#[cfg(test)]
mod virtual_references;
