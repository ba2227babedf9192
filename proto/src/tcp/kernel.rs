//! What the kernel knows of a TCP connection (`TCP_INFO`).

use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

/// Length of what is asked for: up to `tcpi_dsack_dups`. Older kernels give less.
const INFO_BYTES: usize = 220;

/// `tcpi_state` of a closed socket (`TCP_CLOSE`). One that waits for late segments is a stand-in, and its own is this.
const STATE_CLOSED: u8 = 7;

/// The bit of `tcpi_options` (`TCPI_OPT_TIMESTAMPS`).
const OPTION_TIMESTAMPS: u8 = 1;

/// What the kernel says; 0 where it is too old to know.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Info {
    /// Both ends have closed it, or one has reset it.
    pub(super) is_closed: bool,
    /// Every segment has a timestamp.
    pub(super) has_timestamps: bool,
    /// Retransmission timeouts in a row without an answer.
    pub(super) timeouts: u8,
    /// Smoothed round-trip time.
    pub(super) rtt: Duration,
    /// The least that was seen of late (Linux 4.6).
    pub(super) min_rtt: Duration,
    /// Bytes that may be in flight.
    pub(super) window_bytes: u64,
    /// The path's MTU.
    pub(super) path_mtu_bytes: u32,
    /// Bytes that were delivered a second, when it was measured last (Linux 4.9).
    pub(super) delivered_bytes_per_second: u64,
    /// Bytes that it was given and has not sent (Linux 4.6).
    pub(super) unsent_bytes: u64,
    /// Segments sent, with those that were sent again (Linux 4.2). The kernel counts to 2^32.
    pub(super) sent_segments: u64,
    /// Segments sent again because they were lost: without those that the peer had already (Linux 4.18),
    /// as on a busy host whose answers come late.
    pub(super) repeated_segments: u64,
    /// Bytes sent, with those that were sent again (Linux 4.19).
    pub(super) sent_bytes: u64,
    /// Bytes sent again (Linux 4.19).
    pub(super) repeated_bytes: u64,
}

/// The kernel takes data from this process only while less than `bytes` wait in it to be sent
/// (`TCP_NOTSENT_LOWAT`, Linux 3.12).
pub(super) fn set_unsent_bytes_max(socket: BorrowedFd<'_>, bytes: u32) -> std::io::Result<()> {
    // SAFETY: the pointer and the length are those of `bytes`, which outlives the call.
    let failed = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_NOTSENT_LOWAT,
            (&raw const bytes).cast(),
            size_of::<u32>() as libc::socklen_t,
        )
    };
    if failed == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Asks the kernel; `None` when `socket` is not a TCP socket.
pub(super) fn info(socket: BorrowedFd<'_>) -> Option<Info> {
    let mut bytes = [0_u8; INFO_BYTES];
    let mut len = INFO_BYTES as libc::socklen_t;
    // SAFETY: the pointer and the length are those of `bytes`, which outlives the call, and the
    // kernel writes no more than `len` bytes.
    let failed = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            bytes.as_mut_ptr().cast(),
            &mut len,
        )
    };
    (failed == 0).then(|| parse(&bytes))
}

/// The fields by their offsets in `struct tcp_info` of `linux/tcp.h`, which only ever grows.
fn parse(bytes: &[u8; INFO_BYTES]) -> Info {
    let word =
        |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let micros = |at| Duration::from_micros(word(at).into());
    let long = |at: usize| {
        let mut long = [0; 8];
        long.copy_from_slice(&bytes[at..at + 8]);
        u64::from_ne_bytes(long)
    };
    Info {
        is_closed: bytes[0] == STATE_CLOSED,
        has_timestamps: bytes[5] & OPTION_TIMESTAMPS != 0,
        timeouts: bytes[2],
        rtt: micros(68),
        min_rtt: micros(148),
        window_bytes: u64::from(word(80)) * u64::from(word(16)),
        path_mtu_bytes: word(60),
        delivered_bytes_per_second: long(160),
        unsent_bytes: word(144).into(),
        sent_segments: word(136).into(),
        repeated_segments: word(100).saturating_sub(word(216)).into(),
        sent_bytes: long(200),
        repeated_bytes: long(208),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::fd::AsFd;
    use std::time::Duration;

    use super::info;

    #[test]
    fn the_kernel_tells_of_a_loopback_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut here = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut there, _) = listener.accept().unwrap();
        let reading = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            there.read_to_end(&mut bytes).unwrap();
            bytes.len()
        });
        here.write_all(&vec![7; 10 << 20]).unwrap();
        assert!(!info(here.as_fd()).unwrap().is_closed);
        here.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(reading.join().unwrap(), 10 << 20);
        // Their socket is dropped by the thread that has ended.
        assert_eq!(here.read(&mut [0]).unwrap(), 0);
        let info = info(here.as_fd()).unwrap();
        assert!(info.is_closed, "{info:?}");
        let likely = Duration::from_micros(1)..Duration::from_secs(5);
        assert!(likely.contains(&info.rtt) && info.min_rtt <= info.rtt, "{info:?}");
        // The loopback's MTU is 64 KiB, or what somebody set it to.
        assert!((1280..=65_536).contains(&info.path_mtu_bytes), "{info:?}");
        let least = (10 << 20) / u64::from(info.path_mtu_bytes);
        assert!((least..100_000).contains(&info.sent_segments), "{info:?}");
        // No loopback is slower than 100 KB or faster than a terabyte a second.
        assert!((100_000..1 << 40).contains(&info.delivered_bytes_per_second), "{info:?}");
        assert!(info.window_bytes > u64::from(info.path_mtu_bytes), "{info:?}");
        assert!(info.repeated_segments < info.sent_segments && info.timeouts == 0, "{info:?}");
        assert_eq!(info.sent_bytes - info.repeated_bytes, 10 << 20, "{info:?}");
        assert_eq!(info.unsent_bytes, 0, "{info:?}");
    }

    #[test]
    fn a_socket_that_is_none_of_tcp_has_nothing_to_tell() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        assert_eq!(info(socket.as_fd()), None);
    }
}
