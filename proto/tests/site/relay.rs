//! Something bad between the two ends, on loopback.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::time::{Instant, sleep_until};

/// Which way a packet goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    ToTarget,
    ToAgent,
}

/// What becomes of a packet: those that are returned go on, now, instead of it.
pub(crate) trait Ill: FnMut(Way, Vec<u8>) -> Vec<Vec<u8>> + Send + 'static {}
impl<T: FnMut(Way, Vec<u8>) -> Vec<Vec<u8>> + Send + 'static> Ill for T {}

/// Relays between one agent and the target at `target`, `delay` each way, through `ill`; returns
/// the address that the agent connects to.
pub(crate) async fn start(target: SocketAddr, delay: Duration, ill: impl Ill) -> String {
    start_moving(target, delay, Arc::default(), ill).await
}

/// The same; once `moved` is set the target sees the agent at another address, and what it still sends
/// to the first one is lost.
pub(crate) async fn start_moving(
    target: SocketAddr,
    delay: Duration,
    moved: Arc<AtomicBool>,
    mut ill: impl Ill,
) -> String {
    let (front, before, after) = (socket().await, socket().await, socket().await);
    before.connect(target).await.unwrap();
    after.connect(target).await.unwrap();
    let address = front.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        let (mut to_target, mut to_agent) = (vec![0; 65_536], vec![0; 65_536]);
        let mut agent = None;
        let mut under_way: VecDeque<(Instant, Way, Vec<u8>)> = VecDeque::new();
        loop {
            let back = if moved.load(Ordering::Relaxed) { &after } else { &before };
            let next = under_way.front().map_or_else(Instant::now, |(at, ..)| *at);
            let (way, packet) = tokio::select! {
                Ok((len, from)) = front.recv_from(&mut to_target) => {
                    agent = Some(from);
                    (Way::ToTarget, to_target[..len].to_vec())
                }
                Ok(len) = back.recv(&mut to_agent) => (Way::ToAgent, to_agent[..len].to_vec()),
                () = sleep_until(next), if !under_way.is_empty() => {
                    while let Some((_, way, packet)) =
                        under_way.pop_front_if(|(at, ..)| *at <= Instant::now())
                    {
                        let _ = match (way, agent) {
                            (Way::ToTarget, _) => back.send(&packet).await,
                            (Way::ToAgent, Some(agent)) => front.send_to(&packet, agent).await,
                            (Way::ToAgent, None) => Ok(0),
                        };
                    }
                    continue;
                }
            };
            let due = Instant::now() + delay;
            under_way.extend(ill(way, packet).into_iter().map(|packet| (due, way, packet)));
        }
    });
    address
}

/// A socket that loses nothing by itself.
pub(crate) async fn socket() -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let view = socket2::SockRef::from(&socket);
    view.set_recv_buffer_size(32 << 20).unwrap();
    rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, 32 << 20).ok();
    socket
}
