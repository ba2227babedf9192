//! When a datagram came.
//!
//! quinn reads its clock, then its socket, and takes the one for the time at which came what the other has. A
//! driver that lost its processor in between finds packets that came milliseconds after its clock says: the
//! round trip seems shorter than the path is, and what was delivered seems to have taken less time. A path of
//! 20.4 ms was taken for one of 15.7, for twenty seconds, with every packet of it in a queue. So what is read
//! too long after a driver's turn began waits for its next turn, which begins with another look at the clock.

use std::cell::Cell;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};

/// A turn reads for some 50 µs (`RECV_TIME_BOUND`); ten times as much is no error that a path shows.
const TURN_MAX: Duration = Duration::from_micros(500);

thread_local! {
    /// The turn of the driver that this thread runs.
    static TURN: Cell<Option<Turn>> = const { Cell::new(None) };
}

#[derive(Debug, Clone, Copy)]
struct Turn {
    began: Instant,
    /// It has read from a socket, or was given what was kept.
    has_read: bool,
}

impl Turn {
    fn is_late(&self) -> bool {
        self.began.elapsed() > TURN_MAX
    }
}

/// A driver's turn begins on this thread.
pub(super) fn begin_turn(now: Instant) {
    TURN.set(Some(Turn { began: now, has_read: false }));
}

/// A socket that gives a turn nothing which came after its clock was read.
#[derive(Debug)]
pub(super) struct TimelySocket {
    inner: Arc<dyn AsyncUdpSocket>,
    /// What was read too late, at most one call's.
    held: Mutex<Vec<(RecvMeta, Vec<u8>)>>,
}

impl TimelySocket {
    pub(super) fn new(inner: Arc<dyn AsyncUdpSocket>) -> Self {
        Self { inner, held: Mutex::default() }
    }
}

impl AsyncUdpSocket for TimelySocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.inner).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.inner.try_send(transmit)
    }

    fn poll_recv(
        &self,
        context: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        metas: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let turn = TURN.get();
        let had_read = turn.is_some_and(|turn| turn.has_read);
        TURN.set(turn.map(|turn| Turn { has_read: true, ..turn }));
        let is_late = || turn.is_some_and(|turn| turn.is_late());
        if held.is_empty() {
            // Whatever a turn is late for, its first call reads: so there is always progress.
            if had_read && is_late() {
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
            let polled = self.inner.poll_recv(context, buffers, metas);
            let Poll::Ready(Ok(count)) = polled else { return polled };
            if !is_late() {
                return polled;
            }
            let read = metas.iter().zip(buffers.iter()).take(count);
            held.extend(read.map(|(meta, buffer)| (*meta, buffer[..meta.len].to_vec())));
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        // An endpoint has one set of buffers, so what came out of it fits into it.
        let count = held.len().min(metas.len());
        for ((meta, bytes), (to, buffer)) in held.drain(..).zip(metas.iter_mut().zip(buffers)) {
            let len = bytes.len().min(buffer.len());
            buffer[..len].copy_from_slice(&bytes[..len]);
            *to = RecvMeta { len, ..meta };
        }
        Poll::Ready(Ok(count))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, IoSliceMut};
    use std::net::SocketAddr;
    use std::pin::Pin;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Context, Poll, Wake, Waker};
    use std::time::{Duration, Instant};

    use quinn::udp::{RecvMeta, Transmit};
    use quinn::{AsyncUdpSocket, UdpPoller};

    use super::{TURN_MAX, TimelySocket, begin_turn};

    const ADDRESS: SocketAddr =
        SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 1);

    /// Three datagrams a call, two of them in one buffer, that take their time; each byte is the call's number.
    #[derive(Debug)]
    struct Slow {
        takes: Duration,
        calls: AtomicUsize,
    }

    impl AsyncUdpSocket for Slow {
        fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
            unreachable!("nobody sends")
        }

        fn try_send(&self, _: &Transmit<'_>) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }

        fn poll_recv(
            &self,
            _: &mut Context<'_>,
            buffers: &mut [IoSliceMut<'_>],
            metas: &mut [RecvMeta],
        ) -> Poll<io::Result<usize>> {
            spin(self.takes);
            let call = self.calls.fetch_add(1, Ordering::Relaxed) as u8;
            for (index, len, stride) in [(0, 5, 4), (1, 3, 3)] {
                buffers[index][..len].fill(call);
                metas[index] = RecvMeta { addr: ADDRESS, len, stride, ecn: None, dst_ip: None };
            }
            Poll::Ready(Ok(2))
        }

        fn local_addr(&self) -> io::Result<SocketAddr> {
            Ok(ADDRESS)
        }
    }

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn slow(takes: Duration) -> (TimelySocket, Arc<Slow>) {
        let slow = Arc::new(Slow { takes, calls: AtomicUsize::new(0) });
        (TimelySocket::new(Arc::clone(&slow) as Arc<dyn AsyncUdpSocket>), slow)
    }

    fn spin(time: Duration) {
        let began = Instant::now();
        while began.elapsed() < time {}
    }

    /// The size of a buffer's datagrams, and its bytes.
    type Read = Vec<(usize, Vec<u8>)>;

    /// Calls a socket. Returns what it gave, and how often the driver was woken.
    fn receive(socket: &TimelySocket) -> (Option<Read>, usize) {
        let woken = Arc::<Woken>::default();
        let waker = Waker::from(Arc::clone(&woken));
        let (mut first, mut second) = ([0xff; 8], [0xff; 8]);
        let mut buffers = [IoSliceMut::new(&mut first), IoSliceMut::new(&mut second)];
        let mut metas = [RecvMeta::default(); 2];
        let polled = socket.poll_recv(&mut Context::from_waker(&waker), &mut buffers, &mut metas);
        let datagrams = match polled {
            Poll::Ready(count) => {
                let read = metas.iter().zip(&buffers).take(count.unwrap());
                let bytes = |meta: &RecvMeta, buffer: &[u8]| buffer[..meta.len].to_vec();
                Some(read.map(|(meta, buffer)| (meta.stride, bytes(meta, buffer))).collect())
            }
            Poll::Pending => None,
        };
        (datagrams, woken.0.load(Ordering::Relaxed))
    }

    #[test]
    fn what_is_read_late_in_a_turn_comes_in_the_next() {
        let (socket, _) = slow(2 * TURN_MAX);
        for call in 0..3 {
            begin_turn(Instant::now());
            assert_eq!(receive(&socket), (None, 1), "the driver would never ask again");
            begin_turn(Instant::now());
            assert_eq!(receive(&socket), (Some(vec![(4, vec![call; 5]), (3, vec![call; 3])]), 0));
        }
    }

    /// It would have to be kept, and copied for that.
    #[test]
    fn a_turn_that_is_late_reads_once_at_most() {
        let (socket, slow) = slow(2 * TURN_MAX);
        begin_turn(Instant::now());
        assert_eq!(receive(&socket).0, None);
        begin_turn(Instant::now());
        assert!(receive(&socket).0.is_some());
        spin(2 * TURN_MAX);
        assert_eq!(receive(&socket), (None, 1), "it had what was kept");
        assert_eq!(slow.calls.load(Ordering::Relaxed), 1);
        let (socket, fast) = self::slow(Duration::ZERO);
        begin_turn(Instant::now());
        let read = receive(&socket).0;
        spin(2 * TURN_MAX);
        assert_eq!(receive(&socket).1, usize::from(read.is_some()));
        assert_eq!(fast.calls.load(Ordering::Relaxed), 1, "a late turn read again");
    }

    #[test]
    fn what_is_read_in_time_comes_at_once() {
        let (socket, _) = slow(Duration::ZERO);
        // A processor that is taken away right here makes one of these late.
        let at_once = (0..100).filter(|_| {
            begin_turn(Instant::now());
            receive(&socket).0.is_some()
        });
        assert!(at_once.count() > 50);
    }
}
