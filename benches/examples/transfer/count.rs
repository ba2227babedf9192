//! What arrived, as lines on standard output.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Fine enough for a figure over a second, and no work to speak of.
pub(crate) const PERIOD: Duration = Duration::from_millis(20);

/// Bytes that arrived. Clones share them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Count(Arc<AtomicU64>);

impl Count {
    pub(crate) fn add(&self, bytes: usize) {
        if self.0.fetch_add(bytes as u64, Ordering::Relaxed) == 0 && bytes > 0 {
            tokio::spawn(tell(self.clone()));
        }
    }
}

async fn tell(count: Count) {
    let began = Instant::now();
    let mut ticks = tokio::time::interval(PERIOD);
    loop {
        ticks.tick().await;
        let (micros, bytes) = (began.elapsed().as_micros(), count.0.load(Ordering::Relaxed));
        // Whoever reads is gone when this fails.
        if writeln!(std::io::stdout(), "{micros} {bytes}").is_err() {
            return;
        }
    }
}
