//! Signals, and telling the service manager.

use std::os::unix::net::UnixDatagram;

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

/// Tells systemd that the daemon is ready, when it runs under systemd (sd_notify(3)).
pub fn notify_ready() {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let sent = UnixDatagram::unbound().and_then(|socket| socket.send_to(b"READY=1", &path));
    if let Err(error) = sent {
        tracing::warn!(%error, "the service manager could not be told that this is ready");
    }
}
