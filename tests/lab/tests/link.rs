//! The real link: namespaces, devices and forwarders. Needs root and /dev/net/tun.

use std::io::{BufRead, BufReader};
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use backhaul_lab::link::{Link, is_available};

/// `None`, with the reason printed, on a machine that cannot have a link.
fn start(spec: &str) -> Option<Link> {
    if let Err(missing) = is_available() {
        println!("skipped: {missing}");
        return None;
    }
    Some(Link::start(spec.parse().unwrap()).unwrap())
}

/// A socket at each end, connected to each other, with a time limit on reads.
fn sockets(link: &Link) -> (UdpSocket, UdpSocket) {
    let bind = |site: &backhaul_lab::link::Site| {
        let socket = site.run_inside(|| UdpSocket::bind((site.address(), 7000))).unwrap().unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        socket
    };
    let (a, b) = (bind(link.site_a()), bind(link.site_b()));
    a.connect((link.site_b().address(), 7000)).unwrap();
    b.connect((link.site_a().address(), 7000)).unwrap();
    (a, b)
}

#[test]
fn packets_cross_in_both_directions_after_the_delay() {
    let Some(link) = start("100mbit,30ms,down.delay=10ms") else { return };
    let (a, b) = sockets(&link);
    let mut buffer = [0; 100];
    let began = Instant::now();
    a.send(b"ping").unwrap();
    assert_eq!(b.recv(&mut buffer).unwrap(), 4);
    assert!(began.elapsed() >= Duration::from_millis(30), "{:?}", began.elapsed());
    b.send(b"pong!").unwrap();
    assert_eq!(a.recv(&mut buffer).unwrap(), 5);
    assert!(began.elapsed() >= Duration::from_millis(40), "{:?}", began.elapsed());
    assert_eq!(&buffer[..5], b"pong!");
    let stats = link.stats();
    assert_eq!((stats.up.delivered_packets, stats.down.delivered_packets), (1, 1));
    // 4 bytes and the headers of IPv4 and UDP: nothing else is on the line.
    assert_eq!(stats.up.delivered_bytes, 32);
    assert!(link.is_running());
}

/// `UDP_SEGMENT` or `UDP_GRO` of udp(7).
fn set_udp_option(socket: &UdpSocket, name: libc::c_int, value: libc::c_int) {
    let size = size_of_val(&value) as libc::socklen_t;
    // SAFETY: the kernel reads `size` bytes of `value`, which lives until the call returns.
    let result = unsafe {
        let value = (&raw const value).cast();
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_UDP, name, value, size)
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn datagrams_of_one_call_are_single_packets_on_the_line() {
    let Some(link) = start("1gbit,1ms") else { return };
    let (a, b) = sockets(&link);
    set_udp_option(&a, libc::UDP_SEGMENT, 1000);
    let sent: Vec<u8> = (0..9500_usize).map(|at| (at / 7) as u8).collect();
    let mut buffer = [0; 65_536];
    a.send(&sent).unwrap();
    let mut received = Vec::<u8>::new();
    for len_bytes in [[1000; 9].as_slice(), &[500]].concat() {
        assert_eq!(b.recv(&mut buffer).unwrap(), len_bytes);
        received.extend(&buffer[..len_bytes]);
    }
    assert_eq!(received, sent);
    assert_eq!(link.stats().up.delivered_packets, 10);
    assert_eq!(link.stats().up.delivered_bytes, 9500 + 10 * 28);

    if !link.joins() {
        println!("skipped: the device of this kernel takes one datagram at a time");
        return;
    }
    // Who asks for it gets several at once; how many depends on what arrives together.
    set_udp_option(&b, libc::UDP_GRO, 1);
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        assert!(Instant::now() < deadline, "nothing ever came together");
        a.send(&sent).unwrap();
        let (mut received, mut calls) = (Vec::<u8>::new(), 0);
        while received.len() < sent.len() {
            let len_bytes = b.recv(&mut buffer).unwrap();
            received.extend(&buffer[..len_bytes]);
            calls += 1;
        }
        assert_eq!(received, sent);
        if calls < 10 {
            break;
        }
    }
}

#[test]
fn tcp_is_counted_apart() {
    let Some(link) = start("100mbit,1ms") else { return };
    let (a, b) = sockets(&link);
    a.send(b"ping").unwrap();
    assert_eq!(b.recv(&mut [0; 100]).unwrap(), 4);
    assert_eq!(link.stats().up_tcp_bytes, 0);
    let bind = || std::net::TcpListener::bind((link.site_b().address(), 7001)).unwrap();
    let listener = link.site_b().run_inside(bind).unwrap();
    let connect = || std::net::TcpStream::connect(listener.local_addr().unwrap());
    let stream = link.site_a().run_inside(connect).unwrap().unwrap();
    drop((stream, listener.accept().unwrap()));
    // At least the handshake's two packets of 40 bytes and more, of which the second is counted a moment after it was
    // delivered, once too late for this test; not the datagram of 32.
    let began = Instant::now();
    let stats = loop {
        let stats = link.stats();
        if stats.up_tcp_bytes >= 80 {
            break stats;
        }
        assert!(began.elapsed() < Duration::from_secs(10), "{stats:?}");
        std::thread::yield_now();
    };
    assert!(stats.up_tcp_bytes <= stats.up.delivered_bytes - 32, "{stats:?}");
}

#[test]
fn a_blackout_and_a_new_spec_take_effect_while_it_runs() {
    let Some(mut link) = start("100mbit,1ms") else { return };
    let (a, b) = sockets(&link);
    let mut buffer = [0; 2000];
    link.blackout(true);
    a.send(b"lost").unwrap();
    while link.stats().up.dropped_by_blackout == 0 {
        std::thread::yield_now();
    }
    link.blackout(false);
    a.send(b"kept").unwrap();
    let len = b.recv(&mut buffer).unwrap();
    assert_eq!(&buffer[..len], b"kept");

    // 1300 bytes fit into 1420 but not into 600: the kernel then sends fragments.
    link.set_spec("100mbit,20ms,mtu=600".parse().unwrap()).unwrap();
    let before = link.stats().up.delivered_packets;
    let began = Instant::now();
    a.send(&[7; 1300]).unwrap();
    assert_eq!(b.recv(&mut buffer).unwrap(), 1300);
    assert!(began.elapsed() >= Duration::from_millis(20));
    assert_eq!(link.stats().up.delivered_packets - before, 3);
}

/// A socket that is bound to no address goes on from the new one; one that is bound to the old one does
/// not.
#[test]
fn a_site_that_was_moved_has_one_address_which_is_new() {
    let Some(link) = start("100mbit,1ms") else { return };
    let (bound, b) = sockets(&link);
    let unbound = link.site_a().run_inside(|| UdpSocket::bind("0.0.0.0:7001")).unwrap().unwrap();
    let b_address = b.local_addr().unwrap();
    let b = link.site_b().run_inside(|| UdpSocket::bind("0.0.0.0:7002")).unwrap().unwrap();
    b.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let to = (b_address.ip(), 7002);
    let mut buffer = [0; 100];
    unbound.send_to(b"before", to).unwrap();
    assert_eq!(b.recv_from(&mut buffer).unwrap().1, (link.site_a().address(), 7001).into());
    let new = link.move_site_a().unwrap();
    assert_ne!(new, link.site_a().address());
    unbound.send_to(b"after", to).unwrap();
    assert_eq!(b.recv_from(&mut buffer).unwrap().1, (new, 7001).into());
    b.send_to(b"back", (new, 7001)).unwrap();
    unbound.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    assert_eq!(unbound.recv(&mut buffer).unwrap(), 4);
    assert!(bound.send(b"lost").is_err());
}

#[test]
fn namespaces_vanish_with_the_link_and_with_a_killed_process() {
    let Some(link) = start("100mbit") else { return };
    let exists = |name: &str| std::path::Path::new("/run/netns").join(name).exists();
    let names = [link.site_a().name().to_owned(), link.site_b().name().to_owned()];
    assert!(names.iter().all(|name| exists(name)));
    drop(link);
    assert!(!names.iter().any(|name| exists(name)));

    let example = example_link();
    // `cat` waits for its input, which nobody writes.
    let mut child = Command::new(example)
        .args(["100mbit", "a", "cat"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let names: Vec<String> = (0..2)
        .map(|_| lines.next().unwrap().unwrap().split(' ').next().unwrap().to_owned())
        .collect();
    assert!(names.iter().all(|name| exists(name)));
    child.kill().unwrap();
    child.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while names.iter().any(|name| exists(name)) {
        assert!(Instant::now() < deadline, "{names:?} outlived their process");
        std::thread::yield_now();
    }
}

/// Cargo builds the examples along with the tests, next to them, unless told to build one target.
fn example_link() -> std::path::PathBuf {
    let mut path = std::env::current_exe().unwrap();
    path.pop();
    path.pop();
    path.push("examples/link");
    assert!(path.exists(), "run `cargo build -p backhaul-lab --example link` first");
    path
}
