//! An NBD server and client: fixed newstyle, structured replies, block status, several exports.
//!
//! The server speaks the protocol as <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>
//! describes it ("proto.md" below); every constant is in [`protocol`] under the name it has there.
//! What is behind an export is an [`Export`]; [`FileExport`] is the plainest one. [`Client`] is the
//! other end, for workloads and tests.

mod client;
mod errno;
mod export;
mod file_export;
mod handshake;
pub mod protocol;
mod server;
mod transmission;

pub use client::{Client, ClientError};
pub use errno::Errno;
pub use export::{BlockSize, Export, IoFuture, Run, ZeroOptions};
pub use file_export::FileExport;
pub use server::{Exports, Listener, Server, ServerOptions};
