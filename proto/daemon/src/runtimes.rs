//! The threads of a daemon.

use std::io;

use tokio::runtime::{Builder, Runtime};

/// After so many tasks a thread that has more of them looks at its sockets and timers. With tokio's 61, packets that had
/// come waited for milliseconds, and a pacer's turn for as long (`benches/REPORT.md`, control under load).
const EVENT_INTERVAL: u32 = 4;

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
        Ok(Self { link: pool("link")?, main: pool("main")? })
    }
}

/// Starts as many threads as the host has processors, all called `name`.
///
/// # Errors
///
/// When the host gives no more of them.
pub fn pool(name: &str) -> io::Result<Runtime> {
    let mut threads = Builder::new_multi_thread();
    threads.thread_name(name).enable_all().event_interval(EVENT_INTERVAL).build()
}
