//! Peers that run beside a measurement.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

/// Longest wait for a peer that starts.
pub const START_TIME_MAX: Duration = Duration::from_secs(30);

/// How often it is asked whether it is up; nothing is measured yet.
const POLL: Duration = Duration::from_millis(5);

/// A process that ends with its handle.
#[derive(Debug)]
pub struct Peer(Child);

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Peer {
    /// Starts a peer; what it says is not kept.
    pub fn start(command: &mut Command) -> anyhow::Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Self(command.spawn().with_context(|| format!("{command:?} cannot be started"))?))
    }

    /// Starts a server, and waits until it answers on its Unix socket.
    pub fn serving(command: &mut Command, socket: &Path) -> anyhow::Result<Self> {
        let mut peer = Self::start(command)?;
        peer.wait_until(|| UnixStream::connect(socket).is_ok())?;
        Ok(peer)
    }

    /// Waits until it is as `ready` says.
    pub fn wait_until(&mut self, mut ready: impl FnMut() -> bool) -> anyhow::Result<()> {
        let began = Instant::now();
        while !ready() {
            ensure!(self.is_running()?, "a peer ended before it was ready");
            ensure!(began.elapsed() < START_TIME_MAX, "a peer did not become ready");
            // A foreign process tells nobody when it is ready: it can only be asked again.
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Whether it has not ended by itself.
    pub fn is_running(&mut self) -> anyhow::Result<bool> {
        Ok(self.0.try_wait()?.is_none())
    }
}
