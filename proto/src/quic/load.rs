//! How much of a core the driver of a connection takes.
//!
//! quinn runs a connection as one task, its driver, which encrypts, decrypts and keeps the books. A
//! task runs on one core at a time, so a driver that is never idle is as fast as it gets.

use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::net::UdpSocket;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use quinn::{AsyncTimer, AsyncUdpSocket, Runtime, TokioRuntime};

use crate::quic::arrival::{TimelySocket, begin_turn};

/// A share of less time than this says little: a single poll may fill it.
const ASKED_PERIOD_MIN: Duration = Duration::from_millis(500);

/// The time that one driver was at work.
#[derive(Debug)]
pub(super) struct Load {
    busy_nanos: AtomicU64,
    asked: Mutex<Asked>,
}

/// When somebody asked for the last time, what it was then, and what he was told.
#[derive(Debug)]
struct Asked {
    at: Instant,
    busy_nanos: u64,
    share: f64,
}

impl Default for Load {
    fn default() -> Self {
        let asked = Asked { at: Instant::now(), busy_nanos: 0, share: 0.0 };
        Self { busy_nanos: AtomicU64::new(0), asked: Mutex::new(asked) }
    }
}

impl Load {
    /// The share of the time since this was called before, from 0 to 1, that the driver was at work.
    /// Whoever asks too soon is told the same again.
    pub(super) fn share(&self, now: Instant) -> f64 {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let passed = now.saturating_duration_since(asked.at);
        if passed < ASKED_PERIOD_MIN {
            return asked.share;
        }
        let busy_nanos = self.busy_nanos.load(Ordering::Relaxed);
        let busy = (busy_nanos - asked.busy_nanos) as f64 / passed.as_nanos() as f64;
        *asked = Asked { at: now, busy_nanos, share: busy.min(1.0) };
        asked.share
    }
}

thread_local! {
    /// The load of the driver that this thread spawned last.
    static SPAWNED: RefCell<Option<Arc<Load>>> = const { RefCell::new(None) };
}

/// Begins a connection, and returns the load of its driver: quinn spawns it meanwhile, on this thread.
pub(super) fn of_driver<T>(begin: impl FnOnce() -> T) -> (T, Arc<Load>) {
    SPAWNED.take();
    let begun = begin();
    (begun, SPAWNED.take().unwrap_or_default())
}

/// tokio, with a clock on every driver.
#[derive(Debug)]
pub(super) struct MeasuredRuntime;

impl Runtime for MeasuredRuntime {
    fn new_timer(&self, until: Instant) -> Pin<Box<dyn AsyncTimer>> {
        TokioRuntime.new_timer(until)
    }

    fn spawn(&self, driver: Pin<Box<dyn Future<Output = ()> + Send>>) {
        let load = Arc::new(Load::default());
        SPAWNED.set(Some(Arc::clone(&load)));
        TokioRuntime.spawn(Box::pin(Measured { driver, load }));
    }

    fn wrap_udp_socket(&self, socket: UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        Ok(Arc::new(TimelySocket::new(TokioRuntime.wrap_udp_socket(socket)?)))
    }
}

struct Measured {
    driver: Pin<Box<dyn Future<Output = ()> + Send>>,
    load: Arc<Load>,
}

impl Future for Measured {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        // The wall's clock, which is read without a call into the kernel: what another process took
        // meanwhile counts too, and a core that is shared is no less a limit.
        let began = Instant::now();
        begin_turn(began);
        let polled = self.driver.as_mut().poll(context);
        let nanos = began.elapsed().as_nanos() as u64;
        self.load.busy_nanos.fetch_add(nanos, Ordering::Relaxed);
        polled
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::Ordering;
    use std::time::{Duration, Instant};

    use quinn::Runtime;

    use super::{Load, MeasuredRuntime, of_driver};

    #[test]
    fn a_share_is_of_the_time_since_it_was_asked_for() {
        let load = Load::default();
        let start = load.asked.lock().unwrap().at;
        load.busy_nanos.fetch_add(250_000_000, Ordering::Relaxed);
        assert_eq!(load.share(start + Duration::from_secs(1)), 0.25);
        assert_eq!(load.share(start + Duration::from_secs(2)), 0.0);
        load.busy_nanos.fetch_add(9_000_000_000, Ordering::Relaxed);
        assert_eq!(load.share(start + Duration::from_millis(2100)), 0.0, "too soon");
        assert_eq!(load.share(start + Duration::from_secs(3)), 1.0);
    }

    #[tokio::test]
    async fn a_driver_that_works_is_seen_to_and_by_its_own_connection_only() {
        let (done, ended) = tokio::sync::oneshot::channel();
        let ((), busy) = of_driver(|| {
            MeasuredRuntime.spawn(Box::pin(async {
                let began = Instant::now();
                while began.elapsed() < Duration::from_millis(5) {}
                let _ = done.send(());
            }));
        });
        let ((), other) = of_driver(|| ());
        ended.await.unwrap();
        tokio::task::yield_now().await;
        assert!(!Arc::ptr_eq(&busy, &other));
        assert!(busy.busy_nanos.load(Ordering::Relaxed) >= 5_000_000);
        assert_eq!(other.busy_nanos.load(Ordering::Relaxed), 0);
    }
}
