//! The session core, without sockets, files or clocks: time is an argument.
//!
//! An agent holds one [`Sender`] a machine, a target one [`Receiver`]. They outlive connections:
//! a connection that ends is told to both, and the next one resumes at the exact place.
//! [`BatchLimit`] holds batches back to a ceiling, in bytes that [`LinkCost`] measures, and says by a
//! [`Release`] when they leave; [`Backoff`] spaces out the attempts, [`Watermark`] turns progress into RPO.

mod backoff;
mod batch_limit;
mod link_cost;
mod receiver;
mod release;
mod sender;
mod watermark;

pub use backoff::Backoff;
pub use batch_limit::BatchLimit;
pub use link_cost::LinkCost;
pub use receiver::{Delivery, Receiver, ReceiverConfig, Rejected};
pub use release::{Due, Release};
pub use sender::{AckError, Released, Sender, Unfolded, Weight};
pub use watermark::Watermark;

#[cfg(test)]
mod virtual_link;
#[cfg(test)]
mod virtual_references;
