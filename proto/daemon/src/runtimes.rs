//! The threads of a daemon.

use std::io;

use tokio::runtime::{Builder, Runtime};

/// Two pools of threads, each as many as the host has processors.
///
/// A guest's writes and a disk's syncs hold up whatever shares their threads, for milliseconds at a time.
/// A link must not wait for them: quinn's pacer keeps two milliseconds of what might have been sent, and
/// what could not be sent within them is lost to the link. An idle line of 500 Mbit/s and 100 ms stayed
/// at 20 Mbit/s for as long as a guest wrote a megabyte at a time.
#[derive(Debug)]
pub struct Runtimes {
    /// For connections to the other daemon, and all that they do by themselves.
    pub link: Runtime,
    /// For everything else.
    pub main: Runtime,
}

impl Runtimes {
    /// Starts the threads.
    ///
    /// # Errors
    ///
    /// When the host gives no more of them.
    pub fn start() -> io::Result<Self> {
        let start = |name| Builder::new_multi_thread().thread_name(name).enable_all().build();
        Ok(Self { link: start("link")?, main: start("main")? })
    }
}
