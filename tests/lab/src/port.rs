//! A port of the loopback interface that stays ours while daemons come and go.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as LocalAddr, UnixDatagram};

use anyhow::bail;

/// The lowest port that is given out.
const LOWEST: u16 = 16_384;

/// A port for TCP and UDP. It lies below those that the kernel gives to sockets which ask for any,
/// so none of them can take it between the stop of a daemon and its next start; other rigs of this
/// machine keep off it until this is dropped.
#[derive(Debug)]
pub struct LoopbackPort {
    port: u16,
    _reserved: UnixDatagram,
}

impl LoopbackPort {
    /// Takes a free port.
    ///
    /// # Errors
    /// There is none.
    pub fn take() -> anyhow::Result<Self> {
        let ports = LOWEST..lowest_of_the_kernel()?.max(LOWEST + 1);
        // Processes begin at different places: those that start together would get in each other's way.
        let begin = std::process::id() as usize % ports.len();
        let in_turn = ports.clone().skip(begin).chain(ports.clone().take(begin));
        for port in in_turn {
            // A name in the abstract namespace is gone with the process, however that ends.
            let name = LocalAddr::from_abstract_name(format!("backhaul-lab-port-{port}"))?;
            let Ok(reserved) = UnixDatagram::bind_addr(&name) else { continue };
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
            if TcpListener::bind(address).is_ok() && UdpSocket::bind(address).is_ok() {
                return Ok(Self { port, _reserved: reserved });
            }
        }
        bail!("no port from {} to {} of 127.0.0.1 is free", ports.start, ports.end - 1)
    }

    /// Where to listen.
    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }
}

/// The lowest port that the kernel gives to a socket which asks for any.
fn lowest_of_the_kernel() -> io::Result<u16> {
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")?;
    let lowest = range.split_whitespace().next().and_then(|word| word.parse().ok());
    lowest.ok_or_else(|| io::Error::other("the kernel's range of ports cannot be read"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A target that was killed could not listen again: another test's socket had been given its
    /// port, which was an ephemeral one.
    #[test]
    fn a_port_is_nobody_elses_and_never_one_of_the_kernels() {
        let ports: Vec<_> = (0..20).map(|_| LoopbackPort::take().unwrap()).collect();
        let lowest = lowest_of_the_kernel().unwrap();
        for (index, port) in ports.iter().enumerate() {
            assert!(port.port < lowest, "{port:?}");
            assert!(ports[..index].iter().all(|other| other.port != port.port), "{ports:?}");
        }
    }
}
