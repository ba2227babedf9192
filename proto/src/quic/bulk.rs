//! What batches may take of the transport: as much as the path is measured to carry, no more.
//!
//! What the transport holds can neither be compressed anew nor taken back when the link goes, so it
//! gets what keeps the path full and the rest waits in the session.

use std::sync::{Mutex, PoisonError};

use tokio::sync::{Semaphore, SemaphorePermit};

/// What batches leave free of the transport's window. quinn gives the window to whoever writes first,
/// whatever the priority: batches that fill it would keep a control message out of the transport
/// until they are acknowledged, ten seconds on a slow line.
const CONTROL_RESERVE_BYTES: u64 = 2 << 20;

/// The window is counted out in pieces of this size.
const UNIT_BYTES: u64 = 4 << 10;

/// A batch keeps its place until its last byte is acknowledged. Of the congestion window, which is
/// the path's bandwidth × delay, one is on its way, one is being repaired, one waits for the repair
/// of a repair, and one is next.
const CONGESTION_WINDOWS: u64 = 4;

/// On top of those: a few batches, so that small windows are not eaten up by the end of one.
const BATCHES_BYTES: u64 = 8 << 20;

/// Counts out places for batches.
#[derive(Debug)]
pub(super) struct Bulk {
    free: Semaphore,
    /// Units that are free or taken.
    granted: Mutex<u32>,
    most: u32,
}

impl Bulk {
    /// `window_bytes` is what the transport holds at most of data that the peer has not
    /// acknowledged: the bound on memory, whatever is measured.
    pub(super) fn new(window_bytes: u32) -> Self {
        let most_bytes = u64::from(window_bytes).saturating_sub(CONTROL_RESERVE_BYTES);
        let most = (most_bytes / UNIT_BYTES).max(1) as u32;
        let granted = units(0, most);
        Self { free: Semaphore::new(granted as usize), granted: Mutex::new(granted), most }
    }

    /// Waits for room for so many bytes; it is given back when the place is dropped.
    pub(super) async fn place(&self, bytes: usize) -> Option<SemaphorePermit<'_>> {
        // What is larger than everything takes everything.
        let units = (bytes as u64).div_ceil(UNIT_BYTES).min(u64::from(units(0, self.most)));
        // Never closed, so this cannot fail.
        self.free.acquire_many(units as u32).await.ok()
    }

    /// The congestion window is this large now.
    pub(super) fn follow(&self, congestion_window_bytes: u64) {
        let wanted = units(congestion_window_bytes, self.most);
        let mut granted = self.granted.lock().unwrap_or_else(PoisonError::into_inner);
        if wanted > *granted {
            self.free.add_permits((wanted - *granted) as usize);
            *granted = wanted;
        } else {
            // What is taken is given back first, and goes the next time.
            *granted -= self.free.forget_permits((*granted - wanted) as usize) as u32;
        }
    }
}

/// The largest congestion window of which batches get all that they can use, in bytes, where the
/// transport holds `window_bytes`.
pub(super) fn filled_bytes(window_bytes: u32) -> u64 {
    let most_bytes = u64::from(window_bytes).saturating_sub(CONTROL_RESERVE_BYTES);
    most_bytes.saturating_sub(BATCHES_BYTES) / CONGESTION_WINDOWS
}

/// What is granted at a congestion window.
fn units(congestion_window_bytes: u64, most: u32) -> u32 {
    let wanted = congestion_window_bytes.saturating_mul(CONGESTION_WINDOWS);
    let wanted = wanted.saturating_add(BATCHES_BYTES) / UNIT_BYTES;
    wanted.min(u64::from(most)) as u32
}

#[cfg(test)]
mod tests {
    use super::{
        BATCHES_BYTES, Bulk, CONGESTION_WINDOWS, CONTROL_RESERVE_BYTES, UNIT_BYTES, filled_bytes,
        units,
    };

    const WINDOW_BYTES: u32 = 48 << 20;

    fn free_bytes(bulk: &Bulk) -> u64 {
        bulk.free.available_permits() as u64 * UNIT_BYTES
    }

    #[test]
    fn it_follows_the_congestion_window_up_to_the_bound() {
        let bulk = Bulk::new(WINDOW_BYTES);
        assert_eq!(free_bytes(&bulk), BATCHES_BYTES);
        bulk.follow(3 << 20);
        assert_eq!(free_bytes(&bulk), BATCHES_BYTES + CONGESTION_WINDOWS * (3 << 20));
        bulk.follow(u64::MAX);
        assert_eq!(free_bytes(&bulk), u64::from(WINDOW_BYTES) - CONTROL_RESERVE_BYTES);
        bulk.follow(0);
        assert_eq!(free_bytes(&bulk), BATCHES_BYTES);
    }

    /// A probe would blame the line for what the window keeps from it, or the other way round.
    #[test]
    fn a_path_is_filled_up_to_the_window_at_which_the_bound_begins_to_cut() {
        let filled = filled_bytes(WINDOW_BYTES);
        let most = (u64::from(WINDOW_BYTES) - CONTROL_RESERVE_BYTES) / UNIT_BYTES;
        assert_eq!(u64::from(units(filled, u32::MAX)), most);
        assert!(u64::from(units(filled + UNIT_BYTES, u32::MAX)) > most);
        // What `TransportOptions` says in words.
        let fifth = u64::from(WINDOW_BYTES) / 5;
        assert!((fifth * 9 / 10..=fifth).contains(&filled), "{filled}");
        assert_eq!(filled_bytes(1 << 20), 0);
    }

    #[tokio::test]
    async fn what_is_taken_when_it_shrinks_is_not_given_out_again() {
        let bulk = Bulk::new(WINDOW_BYTES);
        bulk.follow(4 << 20);
        let taken = bulk.place(20 << 20).await;
        bulk.follow(0);
        drop(taken);
        bulk.follow(0);
        assert_eq!(free_bytes(&bulk), BATCHES_BYTES);
    }

    #[tokio::test]
    async fn a_batch_that_is_larger_than_a_tiny_window_is_let_through_alone() {
        let bulk = Bulk::new(1 << 20);
        let place = bulk.place(2 << 20).await;
        assert!(place.is_some());
        assert_eq!(free_bytes(&bulk), 0);
    }
}
