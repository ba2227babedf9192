//! Signals, and telling the service manager.

use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};

/// Returns when the process is asked to end (SIGTERM or SIGINT).
pub async fn asked_to_stop() {
    let (Ok(mut term), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        // Without handlers the default action ends the process, which is also a way to stop.
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = interrupt.recv() => {}
    }
}

/// Being asked to read the configuration again (SIGHUP).
#[derive(Debug)]
pub struct Reload(Option<tokio::signal::unix::Signal>);

impl Reload {
    /// Takes the signal over, whose default is to end the process.
    pub fn new() -> Self {
        Self(signal(SignalKind::hangup()).ok())
    }

    /// Returns each time when asked. Cancel safe.
    pub async fn asked(&mut self) {
        match &mut self.0 {
            Some(signal) => drop(signal.recv().await),
            None => std::future::pending().await,
        }
    }
}

impl Default for Reload {
    fn default() -> Self {
        Self::new()
    }
}

/// Returns at a moment, or never.
pub async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// The processor time that this process has used, by all threads, in user mode and in the kernel.
pub fn cpu_time() -> Duration {
    let clock = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(clock.tv_sec.max(0) as u64, clock.tv_nsec.clamp(0, 999_999_999) as u32)
}

/// Tells systemd that the daemon is ready, when it runs under systemd (sd_notify(3)).
pub fn notify_ready() {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let sent = UnixDatagram::unbound().and_then(|socket| socket.send_to(b"READY=1", &path));
    if let Err(error) = sent {
        tracing::warn!(%error, "the service manager could not be told that this is ready");
    }
}
