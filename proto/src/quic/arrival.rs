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
    /// When the turn of the driver that this thread runs began.
    static TURN: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// A driver's turn begins on this thread.
pub(super) fn begin_turn(now: Instant) {
    TURN.set(Some(now));
}

fn is_late() -> bool {
    TURN.get().is_some_and(|began| began.elapsed() > TURN_MAX)
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
        if held.is_empty() {
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

    /// Two datagrams a call, the first byte of which is the call's number, that take their time.
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
            let began = Instant::now();
            while began.elapsed() < self.takes {}
            let call = self.calls.fetch_add(1, Ordering::Relaxed) as u8;
            for (index, len) in [(0, 5), (1, 3)] {
                buffers[index][..len].fill(call);
                metas[index] =
                    RecvMeta { addr: ADDRESS, len, stride: len, ecn: None, dst_ip: None };
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

    /// Calls a socket that takes so long. Returns the datagrams, and how often the driver was woken.
    fn receive(socket: &TimelySocket) -> (Option<Vec<Vec<u8>>>, usize) {
        let woken = Arc::<Woken>::default();
        let waker = Waker::from(Arc::clone(&woken));
        let (mut first, mut second) = ([0xff; 8], [0xff; 8]);
        let mut buffers = [IoSliceMut::new(&mut first), IoSliceMut::new(&mut second)];
        let mut metas = [RecvMeta::default(); 2];
        let polled = socket.poll_recv(&mut Context::from_waker(&waker), &mut buffers, &mut metas);
        let datagrams = match polled {
            Poll::Ready(count) => {
                let read = metas.iter().zip(&buffers).take(count.unwrap());
                Some(read.map(|(meta, buffer)| buffer[..meta.len].to_vec()).collect())
            }
            Poll::Pending => None,
        };
        (datagrams, woken.0.load(Ordering::Relaxed))
    }

    #[test]
    fn what_is_read_late_in_a_turn_comes_in_the_next() {
        let slow = Slow { takes: 2 * TURN_MAX, calls: AtomicUsize::new(0) };
        let socket = TimelySocket::new(Arc::new(slow));
        for call in 0..3 {
            begin_turn(Instant::now());
            assert_eq!(receive(&socket), (None, 1), "the driver would never ask again");
            begin_turn(Instant::now());
            assert_eq!(receive(&socket), (Some(vec![vec![call; 5], vec![call; 3]]), 0));
        }
    }

    #[test]
    fn what_is_read_in_time_comes_at_once() {
        let slow = Slow { takes: Duration::ZERO, calls: AtomicUsize::new(0) };
        let socket = TimelySocket::new(Arc::new(slow));
        // A processor that is taken away right here makes one of these late.
        let at_once = (0..100).filter(|_| {
            begin_turn(Instant::now());
            receive(&socket).0.is_some()
        });
        assert!(at_once.count() > 50);
    }
}
