//! One direction's thread: packets from one TUN device through the [`Shaper`] into the other.

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use super::offload::{self, Cut, HEADER_BYTES, Join, READ_BYTES_MAX};
use super::shaper::{Shaper, Verdict};

/// A packet and its device's header, in a buffer that is used again and again.
#[derive(Debug)]
pub(super) struct Packet {
    buffer: Box<[u8]>,
    len_bytes: usize,
}

impl Deref for Packet {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buffer[..self.len_bytes]
    }
}

/// The shaper of one direction, shared with whoever changes the line or reads its counters.
#[derive(Clone, Debug)]
pub(super) struct SharedShaper(Arc<Mutex<Shaper<Packet>>>);

impl SharedShaper {
    pub(super) fn new(shaper: Shaper<Packet>) -> Self {
        Self(Arc::new(Mutex::new(shaper)))
    }

    /// The forwarder holds the lock for one batch, well under a millisecond.
    pub(super) fn lock(&self) -> MutexGuard<'_, Shaper<Packet>> {
        // Counters and times are whole after any panic: nothing is left half-changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running direction; stops when dropped.
#[derive(Debug)]
pub(super) struct Forwarder {
    stop: Arc<OwnedFd>,
    tcp_bytes: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Forwarder {
    /// Starts forwarding from `from` to `to`, both non-blocking TUN devices. `joins`: `to` takes several
    /// datagrams at once.
    pub(super) fn start(
        name: &str,
        from: Arc<File>,
        to: Arc<File>,
        joins: bool,
        shaper: SharedShaper,
    ) -> std::io::Result<Self> {
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let until = Arc::clone(&stop);
        let tcp_bytes = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&tcp_bytes);
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            prefer_this_thread();
            let turned_at = Instant::now();
            let tcp_bytes = counted;
            let mut direction = Direction {
                from,
                to,
                joins,
                shaper,
                read: vec![0; READ_BYTES_MAX].into(),
                due: Vec::new(),
                free: Vec::new(),
                turned_at,
                tcp_bytes,
            };
            while direction.wait(&until) {
                direction.turned_at = Instant::now();
                direction.take_in();
                direction.hand_over();
            }
        })?;
        Ok(Self { stop, tcp_bytes, thread: Some(thread) })
    }

    /// Bytes of the TCP packets handed over so far.
    pub(super) fn tcp_bytes(&self) -> u64 {
        self.tcp_bytes.load(Ordering::Relaxed)
    }

    /// False after the thread has ended by itself, because a device is gone.
    pub(super) fn is_running(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        // An eventfd refuses a write only when its counter would overflow.
        let _ = rustix::io::write(&*self.stop, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Direction {
    from: Arc<File>,
    to: Arc<File>,
    joins: bool,
    shaper: SharedShaper,
    /// What was read last.
    read: Box<[u8]>,
    /// What arrives in this turn.
    due: Vec<Packet>,
    /// Buffers not in use. Grows to what the line holds at once and is then never short.
    free: Vec<Box<[u8]>>,
    turned_at: Instant,
    tcp_bytes: Arc<AtomicU64>,
}

impl Direction {
    /// Sleeps until a packet comes or is due, but at least [`TURN`] since the last turn began;
    /// false when it is time to stop.
    fn wait(&self, stop: &OwnedFd) -> bool {
        let rest = TURN.saturating_sub(self.turned_at.elapsed());
        if !rest.is_zero() && !sleep(&mut [PollFd::new(stop, PollFlags::IN)], Some(rest)) {
            return false;
        }
        let due_at = self.shaper.lock().poll_timeout();
        let left = due_at.map(|at| at.saturating_duration_since(Instant::now()));
        let fds = &mut [PollFd::new(stop, PollFlags::IN), PollFd::new(&*self.from, PollFlags::IN)];
        sleep(fds, left)
    }

    fn take_in(&mut self) {
        let mut shaper = self.shaper.lock();
        let mut packets = 0;
        while packets < TURN_PACKETS {
            // Any error but "nothing there" is a device that is going away; the wait sees that.
            let Ok(read_bytes @ 1..) = (&*self.from).read(&mut self.read) else { return };
            let now = Instant::now();
            packets += 1;
            let Some(mut cut) = Cut::new(&self.read[..read_bytes]) else { continue };
            loop {
                let mut buffer = self.free.pop().unwrap_or_else(|| vec![0; BUFFER_BYTES].into());
                let Some(len_bytes) = cut.next(&mut buffer) else {
                    self.free.push(buffer);
                    break;
                };
                packets += 1;
                let packet = Packet { buffer, len_bytes };
                let verdict = shaper.handle_packet(now, len_bytes - HEADER_BYTES, packet);
                if let Verdict::Dropped { packet, .. } = verdict {
                    self.free.push(packet.buffer);
                }
            }
        }
    }

    fn hand_over(&mut self) {
        loop {
            let mut twice = false;
            let mut shaper = self.shaper.lock();
            while self.due.len() < TURN_PACKETS
                && !twice
                && let Some(departure) = shaper.poll_departure(Instant::now())
            {
                self.due.push(departure.packet);
                twice = departure.copies > 1;
            }
            drop(shaper);
            let Some(last) = self.due.last() else { return };
            self.write_all(&self.due);
            if twice {
                self.write_all(std::slice::from_ref(last));
            }
            self.free.extend(self.due.drain(..).map(|packet| packet.buffer));
        }
    }

    fn write_all(&self, mut packets: &[Packet]) {
        while let Some(first) = packets.first() {
            let mut join = Join::default();
            let joins = |packet: &&Packet| join.takes(first, packet);
            let joined = if self.joins { packets.iter().take_while(joins).count() } else { 1 };
            let (together, rest) = packets.split_at(joined);
            packets = rest;
            if joined > 1 && self.write_joined(&join.head(first), together).is_ok() {
                continue;
            }
            for packet in together {
                // A device that is down (EIO) loses the packet, as a dead host would.
                let _ = (&*self.to).write(packet);
                if is_tcp(&packet[HEADER_BYTES..]) {
                    let len_bytes = (packet.len() - HEADER_BYTES) as u64;
                    self.tcp_bytes.fetch_add(len_bytes, Ordering::Relaxed);
                }
            }
        }
    }

    fn write_joined(&self, head: &[u8], packets: &[Packet]) -> std::io::Result<usize> {
        let payloads = packets.iter().map(|packet| offload::payload(packet));
        let parts = std::iter::once(head).chain(payloads).map(IoSlice::new);
        (&*self.to).write_vectored(&parts.collect::<Vec<_>>())
    }
}

/// Whether an IPv4 packet says that it carries TCP (RFC 791, section 3.1).
fn is_tcp(packet: &[u8]) -> bool {
    matches!(packet, [version, _, _, _, _, _, _, _, _, 6, ..] if version >> 4 == 4)
}

/// Waits for one of `fds`, the first of which says that it is time to stop; false when it does,
/// or when a device is gone.
fn sleep(fds: &mut [PollFd<'_>], limit: Option<Duration>) -> bool {
    let limit = limit.map(|limit| Timespec {
        tv_sec: limit.as_secs() as i64,
        tv_nsec: i64::from(limit.subsec_nanos()),
    });
    match poll(fds, limit.as_ref()) {
        Ok(_) => {
            let gone = PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL;
            let stopped = !fds[0].revents().is_empty();
            !stopped && !fds.iter().any(|fd| fd.revents().intersects(gone))
        }
        Err(error) => error == Errno::INTR,
    }
}

/// Asks for exact timers and to run before the programs under test, which may use every core:
/// otherwise the line's delay would depend on their load. Without the right to it, the line still
/// works, only less exactly, and [`super::DirectionStats::late_nanos_max`] shows it.
fn prefer_this_thread() {
    let parameters = libc::sched_param { sched_priority: 1 };
    // SAFETY: both calls concern the calling thread only, and read no more than `parameters`,
    // which outlives them.
    unsafe {
        libc::prctl(libc::PR_SET_TIMERSLACK, 1_usize, 0_usize, 0_usize, 0_usize);
        libc::sched_setscheduler(0, libc::SCHED_RR, &raw const parameters);
    }
}

/// Packets of one turn reach the receiver together, as from a network card that moderates its
/// interrupts: waking a sleeping receiver for each one costs more than all the rest, and 1 Gbit/s
/// would take a whole core. Costs up to this much of exactness.
const TURN: Duration = Duration::from_micros(200);
/// Packets taken in before those due are handed over: alone they take about 0.1 ms.
const TURN_PACKETS: usize = 64;
/// Holds any packet that the largest MTU of a link admits, and its header.
const BUFFER_BYTES: usize = 9216 + HEADER_BYTES;
