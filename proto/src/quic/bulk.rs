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

/// Of that, what light batches take: more of them wait like others. Those in control messages are
/// not counted.
const LIGHT_RESERVE_BYTES: u64 = 1 << 20;

/// Streams that heavy batches leave to light ones: thousands of tiny ones fit into the window, and the peer lets
/// some hundreds be open.
const LIGHT_STREAMS: u32 = 32;

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
    light: Semaphore,
    heavy_streams: Semaphore,
    grant: Mutex<Grant>,
    most: u32,
}

/// How many units there are.
#[derive(Debug)]
struct Grant {
    /// Units that are free or taken.
    granted: u32,
    /// Units that there should be: fewer, until as many were given back.
    wanted: u32,
}

/// What a batch was given, which comes back when this is dropped.
#[derive(Debug)]
pub(super) struct Permit<'a> {
    bulk: &'a Bulk,
    of_semaphore: SemaphorePermit<'a>,
    _stream: SemaphorePermit<'a>,
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        let mut grant = self.bulk.grant.lock().unwrap_or_else(PoisonError::into_inner);
        // Of what is too much nothing may come back: whoever waits for a place would have it at once, and
        // a line that has become slow kept what a fast one was granted.
        let surplus = grant.granted.saturating_sub(grant.wanted);
        let gone = self.of_semaphore.num_permits().min(surplus as usize);
        if let Some(gone) = self.of_semaphore.split(gone) {
            gone.forget();
        }
        grant.granted -= gone as u32;
    }
}

impl Bulk {
    /// `window_bytes` is what the transport holds at most of data that the peer has not
    /// acknowledged: the bound on memory, whatever is measured. So many `streams` may be open.
    pub(super) fn new(window_bytes: u32, streams: u32) -> Self {
        let most_bytes = u64::from(window_bytes).saturating_sub(CONTROL_RESERVE_BYTES);
        let most = (most_bytes / UNIT_BYTES).max(1) as u32;
        let granted = units(0, most);
        let grant = Mutex::new(Grant { granted, wanted: granted });
        let light = Semaphore::new((LIGHT_RESERVE_BYTES / UNIT_BYTES) as usize);
        let heavy_streams = Semaphore::new(streams.saturating_sub(LIGHT_STREAMS).max(1) as usize);
        Self { free: Semaphore::new(granted as usize), light, heavy_streams, grant, most }
    }

    /// Waits for room for so many bytes; it is given back when the place is dropped.
    pub(super) async fn place(&self, bytes: usize) -> Option<Permit<'_>> {
        // What is larger than everything takes everything.
        let units = (bytes as u64).div_ceil(UNIT_BYTES).min(u64::from(units(0, self.most)));
        // Never closed, so this cannot fail.
        let stream = self.heavy_streams.acquire().await.ok()?;
        let permit = self.free.acquire_many(units as u32).await.ok()?;
        Some(Permit { bulk: self, of_semaphore: permit, _stream: stream })
    }

    /// Room for so many bytes of a light batch, which waits for no other; `None` while there is none.
    pub(super) fn light_place(&self, bytes: usize) -> Option<SemaphorePermit<'_>> {
        let units = (bytes as u64).div_ceil(UNIT_BYTES).min(u64::from(u32::MAX));
        self.light.try_acquire_many(units as u32).ok()
    }

    /// The congestion window is this large now. What is taken beyond that goes as it is given back.
    pub(super) fn follow(&self, congestion_window_bytes: u64) {
        let mut grant = self.grant.lock().unwrap_or_else(PoisonError::into_inner);
        grant.wanted = units(congestion_window_bytes, self.most);
        if grant.wanted > grant.granted {
            self.free.add_permits((grant.wanted - grant.granted) as usize);
            grant.granted = grant.wanted;
        } else {
            let surplus = grant.granted - grant.wanted;
            grant.granted -= self.free.forget_permits(surplus as usize) as u32;
        }
    }
}

/// What is granted at a congestion window.
fn units(congestion_window_bytes: u64, most: u32) -> u32 {
    let wanted = congestion_window_bytes.saturating_mul(CONGESTION_WINDOWS);
    let wanted = wanted.saturating_add(BATCHES_BYTES) / UNIT_BYTES;
    wanted.min(u64::from(most)) as u32
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Waker};

    use super::{
        BATCHES_BYTES, Bulk, CONGESTION_WINDOWS, CONTROL_RESERVE_BYTES, LIGHT_RESERVE_BYTES,
        LIGHT_STREAMS, UNIT_BYTES, units,
    };

    const WINDOW_BYTES: u32 = 48 << 20;
    const STREAMS: u32 = 256;

    /// The largest congestion window of which batches get all that they can use, in bytes, where the
    /// transport holds `window_bytes`.
    fn filled_bytes(window_bytes: u32) -> u64 {
        let most_bytes = u64::from(window_bytes).saturating_sub(CONTROL_RESERVE_BYTES);
        most_bytes.saturating_sub(BATCHES_BYTES) / CONGESTION_WINDOWS
    }

    fn free_bytes(bulk: &Bulk) -> u64 {
        bulk.free.available_permits() as u64 * UNIT_BYTES
    }

    #[test]
    fn it_follows_the_congestion_window_up_to_the_bound() {
        let bulk = Bulk::new(WINDOW_BYTES, STREAMS);
        assert_eq!(free_bytes(&bulk), BATCHES_BYTES);
        bulk.follow(3 << 20);
        assert_eq!(free_bytes(&bulk), BATCHES_BYTES + CONGESTION_WINDOWS * (3 << 20));
        bulk.follow(u64::MAX);
        assert_eq!(free_bytes(&bulk), u64::from(WINDOW_BYTES) - CONTROL_RESERVE_BYTES);
        bulk.follow(0);
        assert_eq!(free_bytes(&bulk), BATCHES_BYTES);
    }

    /// What an operator who sizes `link_window` is told.
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
        let bulk = Bulk::new(WINDOW_BYTES, STREAMS);
        bulk.follow(4 << 20);
        let taken = bulk.place(20 << 20).await;
        bulk.follow(0);
        drop(taken);
        assert_eq!(free_bytes(&bulk), BATCHES_BYTES);
    }

    /// A line of 500 Mbit/s that fell to 10 kept 46 MiB in the transport, forty seconds of it: what came
    /// back went to whoever waited, before it could be taken away.
    #[tokio::test]
    async fn what_comes_back_goes_before_those_that_wait() {
        let bulk = Bulk::new(WINDOW_BYTES, STREAMS);
        bulk.follow(u64::MAX);
        let all = u64::from(WINDOW_BYTES) - CONTROL_RESERVE_BYTES;
        let batch = 2 << 20;
        let mut taken = Vec::new();
        while bulk.free.available_permits() as u64 * UNIT_BYTES >= batch {
            taken.push(bulk.place(batch as usize).await);
        }
        let mut waiting = pin!(bulk.place(batch as usize));
        let mut context = Context::from_waker(Waker::noop());
        assert!(waiting.as_mut().poll(&mut context).is_pending());
        bulk.follow(0);
        // Places are given to who waits only once no more is taken than is wanted.
        let mut given_back = 0;
        while waiting.as_mut().poll(&mut context).is_pending() {
            drop(taken.pop());
            given_back += batch;
        }
        assert!(given_back > all - BATCHES_BYTES, "{given_back}");
        assert!(taken.len() as u64 * batch < BATCHES_BYTES, "{}", taken.len());
    }

    /// A point of a quiet machine waited for seconds, behind all that another machine's sync had handed over.
    #[tokio::test]
    async fn light_batches_wait_for_no_others_and_have_a_bound() {
        let bulk = Bulk::new(WINDOW_BYTES, STREAMS);
        let _all = bulk.place(BATCHES_BYTES as usize).await;
        let mut heavy = pin!(bulk.place(1));
        assert!(heavy.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        let light: Vec<_> = std::iter::from_fn(|| bulk.light_place(64 << 10)).collect();
        assert_eq!(light.len() as u64, LIGHT_RESERVE_BYTES / (64 << 10));
        assert_eq!(free_bytes(&bulk), 0);
        drop(light);
        assert!(bulk.light_place(LIGHT_RESERVE_BYTES as usize).is_some());
    }

    /// A light batch had a place in the window, and waited for one of the streams that tiny heavy ones had taken.
    #[tokio::test]
    async fn heavy_batches_leave_streams_to_light_ones() {
        let bulk = Bulk::new(WINDOW_BYTES, STREAMS);
        let mut taken = Vec::new();
        while bulk.heavy_streams.available_permits() > 0 {
            taken.push(bulk.place(1).await);
        }
        assert_eq!(taken.len() as u32, STREAMS - LIGHT_STREAMS);
        assert!(free_bytes(&bulk) > 0);
        let mut next = pin!(bulk.place(1));
        assert!(next.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        taken.pop();
        assert!(next.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready());
    }

    #[tokio::test]
    async fn a_batch_that_is_larger_than_a_tiny_window_is_let_through_alone() {
        let bulk = Bulk::new(1 << 20, STREAMS);
        let place = bulk.place(2 << 20).await;
        assert!(place.is_some());
        assert_eq!(free_bytes(&bulk), 0);
    }
}
