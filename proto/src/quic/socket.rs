//! The UDP socket under an endpoint.

use std::io;
use std::net::{SocketAddr, UdpSocket};

use rustix::net::sockopt::{set_socket_recv_buffer_size_force, set_socket_send_buffer_size};
use socket2::{Domain, Protocol, Socket, Type};

/// What the system granted, and where to look for what it dropped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SocketFacts {
    /// What may have arrived and not been read yet, in bytes; more is dropped.
    pub receive_bytes: usize,
    /// What may have been handed over and not left, in bytes.
    pub send_bytes: usize,
    /// The local port.
    pub port: u16,
}

impl SocketFacts {
    /// Datagrams that the kernel dropped because the receive buffer was full, from
    /// `/proc/net/udp` (proc_net_udp(5), column `drops`); 0 when that cannot be read.
    pub fn dropped_datagrams(&self) -> u64 {
        let tables = ["/proc/self/net/udp", "/proc/self/net/udp6"];
        let texts = tables.iter().filter_map(|table| std::fs::read_to_string(table).ok());
        texts.map(|text| drops(&text, self.port)).sum()
    }
}

/// The drops of all sockets on `port` in one of the kernel's tables.
fn drops(table: &str, port: u16) -> u64 {
    let local = format!(":{port:04X}");
    table
        .lines()
        .skip(1)
        .filter(|line| line.split_whitespace().nth(1).is_some_and(|word| word.ends_with(&local)))
        .filter_map(|line| line.split_whitespace().last()?.parse::<u64>().ok())
        .sum()
}

/// Opens a socket with buffers as large as the system grants.
pub(crate) fn open(address: SocketAddr, buffer_bytes: usize) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    // The forced variant needs a privilege that daemons usually have; the plain one is capped.
    if set_socket_recv_buffer_size_force(&socket, buffer_bytes).is_err() {
        socket.set_recv_buffer_size(buffer_bytes)?;
    }
    set_socket_send_buffer_size(&socket, buffer_bytes)?;
    let granted = socket.recv_buffer_size()?;
    if granted < buffer_bytes {
        tracing::warn!(
            granted,
            wanted = buffer_bytes,
            "the UDP receive buffer is smaller than asked for; raise net.core.rmem_max"
        );
    }
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// What the system granted to `socket`.
pub(crate) fn facts(socket: &UdpSocket) -> io::Result<SocketFacts> {
    let view = socket2::SockRef::from(socket);
    Ok(SocketFacts {
        receive_bytes: view.recv_buffer_size()?,
        send_bytes: view.send_buffer_size()?,
        port: socket.local_addr()?.port(),
    })
}

#[cfg(test)]
mod tests {
    use super::{drops, facts, open};

    #[test]
    fn the_kernels_table_is_read_by_port() {
        let table = "   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops\n\
            10: 0100007F:1151 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 4242 2 0000000000000000 17\n\
            11: 00000000:0044 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 4243 2 0000000000000000 5\n";
        assert_eq!(drops(table, 4433), 17);
        assert_eq!(drops(table, 68), 5);
        assert_eq!(drops(table, 1), 0);
    }

    #[test]
    fn a_socket_that_nobody_reads_drops_and_says_so() {
        let socket = open("127.0.0.1:0".parse().unwrap(), 4096).unwrap();
        let facts = facts(&socket).unwrap();
        assert_eq!(facts.dropped_datagrams(), 0);
        let sender = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        for _ in 0..64 {
            sender.send_to(&[0; 1000], socket.local_addr().unwrap()).unwrap();
        }
        assert!(facts.dropped_datagrams() > 10, "{facts:?}");
    }
}
