//! The language both ends of Backhaul speak.
//!
//! | module | holds | depends on |
//! | --- | --- | --- |
//! | [`id`], [`limits`], [`version`] | names, numbers and their bounds | nothing |
//! | [`batch`] | the unit of replication and its bytes | ids |
//! | [`message`] | control and sync-stream messages | ids |
//! | [`session`] | the pure session core; time is an argument | batch, message |
//! | [`identity`] | who speaks: certificates of the site's own CA | ids |
//! | [`quic`], [`tcp`] | the two transports; the only users of quinn and of TLS over TCP | identity, batch |
//! | [`link`] | a connection over either | all of the above |
//!
//! `SPEC.md` beside this crate has the byte tables and the version history.

pub mod batch;
pub mod id;
pub mod identity;
pub mod limits;
pub mod link;
pub mod message;
pub mod quic;
pub mod session;
pub mod tcp;
pub mod version;
