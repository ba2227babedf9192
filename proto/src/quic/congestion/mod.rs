//! Congestion control: how much may be in flight.
//!
//! A failback's link is long and loses packets for reasons of its own (radio, tunnels, policers).
//! Controllers that take every loss for congestion fall to nothing there. Ours models the path by
//! its delivery rate and its round-trip time, as BBR does; `README.md` in this folder has the state
//! machine, the constants and what quinn's pacer makes of a window.
//!
//! | module | holds |
//! | --- | --- |
//! | [`delivery`] | delivery rate from packets sent and acknowledged |
//! | [`filter`] | windowed maximum and minimum |
//! | [`loss`] | chance told from congestion |
//! | [`round`] | what one round trip brought |
//! | [`rival`] | the window beside somebody who yields |
//! | [`share`] | how much of a shared path is ours |
//! | [`pace`] | makes good for what the pacer forgets |
//! | [`known`] | what the connection before learned of the path |
//! | [`flow`], [`phase`] | the model: its window, its states |
//! | [`ceiling`] | a rate limit that changes live, for any controller |
//! | [`fixed`] | a line whose rate is known |
//! | [`adapter`] | all of these, as quinn calls a controller |

mod adapter;
mod ceiling;
mod delivery;
mod filter;
mod fixed;
mod flow;
mod known;
mod loss;
mod pace;
mod phase;
mod rival;
mod round;
mod share;
#[cfg(test)]
mod sim;
mod standing;

pub use adapter::CongestionStats;
pub use ceiling::RateLimit;
pub use known::PathMemory;

pub(crate) use adapter::{Limited, Method, is_knocking, knock, stats, window_gauge};
pub(crate) use ceiling::keeps_ceiling;
pub(crate) use share::Siblings;
