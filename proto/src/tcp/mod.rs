//! TCP with TLS 1.3, for sites whose firewall passes no UDP, and for paths within a LAN, where the
//! processors are the limit and the kernel makes the packets for less.
//!
//! A session is three TCP connections to the target's port, so that control never waits behind
//! batches: control, sync, and one for batches, which follow one another as they are (their headers
//! say how long they are). Each begins with a preface inside TLS:
//!
//! | offset | size | field |
//! | --- | --- | --- |
//! | 0 | 4 | `BHT1` |
//! | 4 | 1 | 1 control, 2 sync, 3 batches |
//! | 5 | 3 | 0 |
//! | 8 | 16 | the session: random, the same on all three |
//!
//! The target answers one byte 1 on the control connection when it has all three. Whoever closes
//! sends `ff ff ff ff` there in place of a frame's length, then a `u16` length and the reason.

mod connection;
mod endpoint;
mod fitness;
mod kernel;

pub use connection::{BatchStream, Connection, ReceiveHalf, SendHalf};
pub use endpoint::{Listener, Way, connect, is_near};

/// In place of a frame's length: the reason of a close follows.
pub(crate) const GOODBYE: [u8; 4] = [0xff; 4];

/// What a preface begins with.
const MAGIC: &[u8; 4] = b"BHT1";
/// Length of a preface.
const PREFACE_BYTES: usize = 24;
/// Kind of the connection for batches.
const BATCHES: u8 = 3;
/// What the target answers when a session is whole.
const WHOLE: u8 = 1;
