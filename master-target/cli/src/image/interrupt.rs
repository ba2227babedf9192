//! Ctrl-C while an image is made: what is half made is removed first.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::anyhow;
use backhaul_disk_image::{ErrorKind, ImageError};
use tokio::signal::unix::{SignalKind, signal};

/// A signal has come; operations look at it as they report their progress.
static CAME: AtomicBool = AtomicBool::new(false);

/// What a shell says of a process that SIGINT ended.
const EXIT_INTERRUPTED: i32 = 130;

/// When another signal is a second one: `timeout`, for one, sends each to the process and to its
/// group.
const SECOND_AFTER: Duration = Duration::from_secs(1);

/// From now on the first SIGINT or SIGTERM only asks for an end; the second is one.
pub(super) fn watch() {
    tokio::spawn(async {
        if heard().await.is_ok() {
            CAME.store(true, Ordering::SeqCst);
            tokio::time::sleep(SECOND_AFTER).await;
            if heard().await.is_ok() {
                std::process::exit(EXIT_INTERRUPTED);
            }
        }
    });
}

async fn heard() -> std::io::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    // A session over ssh that ended.
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
        _ = hangup.recv() => {}
    }
    Ok(())
}

pub(super) fn came() -> bool {
    CAME.load(Ordering::SeqCst)
}

/// An error of making `target`, which may be the end that was asked for.
pub(super) fn told(error: anyhow::Error, target: &Path) -> anyhow::Error {
    let cancelled = |error: &ImageError| error.kind() == ErrorKind::Cancelled;
    if error.downcast_ref().is_some_and(cancelled) {
        let shown = target.display();
        // What is replaced keeps its place until the new image is whole.
        return match target.symlink_metadata() {
            Ok(_) => anyhow!("interrupted: {shown} was not replaced and is as it was"),
            Err(_) => anyhow!("interrupted: {shown} was not made, and nothing is left of it"),
        };
    }
    error
}
