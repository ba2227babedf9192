//! Keeps overlapping operations on one disk apart, in the order in which they came.
//!
//! The order on the protected disk and the order in the stream must be the same. Writes that do not
//! overlap may finish in any order; writes that do are granted one after the other, and so is the
//! sync's read of a region. First come, first granted: a hot block cannot starve the sync.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// The ranges of one disk that are in use or waited for.
#[derive(Debug, Default)]
pub struct RangeLock {
    table: Mutex<Table>,
    released: Notify,
}

#[derive(Debug, Default)]
struct Table {
    next: u64,
    /// In order of arrival. Bounded by the requests the NBD server keeps in flight, plus the sync.
    entries: Vec<Entry>,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    ticket: u64,
    start: u64,
    end: u64,
}

impl Table {
    /// Whether nothing before `ticket` overlaps it.
    fn is_granted(&self, ticket: u64, start: u64, end: u64) -> bool {
        self.entries
            .iter()
            .take_while(|other| other.ticket != ticket)
            .all(|other| other.end <= start || end <= other.start)
    }
}

/// A granted range; dropping it lets the next one in.
#[derive(Debug)]
pub struct RangeGuard {
    lock: Arc<RangeLock>,
    ticket: u64,
}

impl RangeLock {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a place in the table, and says whether it is granted already.
    fn enter(&self, start: u64, end: u64) -> (u64, bool) {
        let mut table = self.table();
        let ticket = table.next;
        table.next += 1;
        table.entries.push(Entry { ticket, start, end });
        (ticket, table.is_granted(ticket, start, end))
    }

    /// Waits until no earlier operation overlaps `[offset_bytes, offset_bytes + len_bytes)`.
    ///
    /// Ready at once when nothing overlaps. Cancel safe: a dropped wait gives up its place.
    pub async fn acquire(self: &Arc<Self>, offset_bytes: u64, len_bytes: u64) -> RangeGuard {
        let (start, end) = (offset_bytes, offset_bytes.saturating_add(len_bytes));
        let (ticket, granted) = self.enter(start, end);
        let guard = RangeGuard { lock: Arc::clone(self), ticket };
        if granted {
            return guard;
        }
        loop {
            let released = self.released.notified();
            tokio::pin!(released);
            released.as_mut().enable();
            if self.table().is_granted(ticket, start, end) {
                return guard;
            }
            released.await;
        }
    }

    /// Waits until every operation that came before has finished.
    pub async fn quiesce(self: &Arc<Self>) {
        drop(self.acquire(0, u64::MAX).await);
    }
}

impl Drop for RangeGuard {
    fn drop(&mut self) {
        let mut table = self.lock.table();
        table.entries.retain(|entry| entry.ticket != self.ticket);
        let waiters = !table.entries.is_empty();
        drop(table);
        if waiters {
            self.lock.released.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::RangeLock;

    fn is_pending<F: Future>(future: std::pin::Pin<&mut F>) -> bool {
        let waker = std::task::Waker::noop();
        future.poll(&mut std::task::Context::from_waker(waker)).is_pending()
    }

    #[tokio::test]
    async fn overlapping_ranges_wait_in_order_of_arrival() {
        let lock = Arc::new(RangeLock::default());
        let first = lock.acquire(0, 100).await;
        let mut second = Box::pin(lock.acquire(50, 100));
        assert!(is_pending(second.as_mut()));
        let mut third = Box::pin(lock.acquire(140, 10));
        assert!(is_pending(third.as_mut()), "behind the second, though the first is no hindrance");
        let apart = lock.acquire(200, 10).await;
        drop(first);
        let second = second.await;
        assert!(is_pending(third.as_mut()));
        drop(second);
        third.await;
        drop(apart);
    }

    #[tokio::test]
    async fn a_wait_that_is_dropped_gives_up_its_place() {
        let lock = Arc::new(RangeLock::default());
        let first = lock.acquire(0, 10).await;
        let mut second = Box::pin(lock.acquire(0, 100));
        assert!(is_pending(second.as_mut()));
        drop(second);
        lock.acquire(50, 10).await;
        drop(first);
        lock.quiesce().await;
    }
}
