//! Two real endpoints with something bad between them.

mod site;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use backhaul_proto::identity::Role;
use backhaul_proto::link::{ConnectOptions, Connection, Listener, TransportChoice, connect, probe};
use backhaul_proto::message::{
    AgentMessage, Heartbeat, TargetMessage, agent_message, target_message,
};
use backhaul_proto::quic::{Congestion, TransportOptions};

use rustls_pki_types::PrivatePkcs8KeyDer;
use tokio::task::JoinSet;

use site::relay::{self, Ill, Way};
use site::{batch_of, identity, site};

/// Both ends of a QUIC link with this between them.
async fn pair(
    transport: TransportOptions,
    delay: Duration,
    ill: impl Ill,
) -> (tempfile::TempDir, Listener, Connection, Connection) {
    let dir = site();
    let target = identity(dir.path(), "t1", Role::Target);
    let agent = identity(dir.path(), "a1", Role::Agent);
    let any = "127.0.0.1:0".parse().unwrap();
    let listener = Listener::bind(any, &target, &transport, false).await.unwrap();
    let through = relay::start(listener.local_address().unwrap(), delay, ill).await;
    let (choice, expected) = (TransportChoice::Quic, None);
    let options =
        ConnectOptions { choice, expected, transport, lan_over_tcp: false, udp_silent: false };
    let accepting = async { listener.accept().await.unwrap().finish().await.unwrap().unwrap() };
    let (ours, theirs) = tokio::join!(connect(&through, &agent, &options), accepting);
    (dir, listener, ours.unwrap(), theirs)
}

/// Takes so many batches, checks what is in them and that each comes once. They are read side by
/// side, as a target does: all of them share one window.
async fn take_batches(connection: &Connection, batches: u64) {
    let mut reading = JoinSet::new();
    for _ in 0..batches {
        let mut stream = connection.accept_batch().await.unwrap();
        reading.spawn(async move {
            let header = stream.read_header().await.unwrap();
            let mut body = vec![0; header.wire_bytes as usize];
            stream.read_exact(&mut body).await.unwrap();
            stream.read_end().await.unwrap();
            assert!(body[header.table_bytes()..].iter().all(|byte| *byte == header.batch.0 as u8));
            header.batch.0
        });
    }
    let mut seen = reading.join_all().await;
    seen.sort_unstable();
    assert_eq!(seen, Vec::from_iter(1..=batches));
}

/// Every question loses its packet. The copy, a moment behind it, is answered; without copies each
/// would take a round trip and a probe timeout more.
#[tokio::test(flavor = "multi_thread")]
async fn a_question_whose_packet_is_lost_is_answered_all_the_same() {
    const QUESTIONS: u64 = 20;
    let one_way = Duration::from_millis(60);
    let lose_next = Arc::new(AtomicBool::new(false));
    let losing = Arc::clone(&lose_next);
    let ill = move |way, packet| match way {
        Way::ToTarget if losing.swap(false, Ordering::Relaxed) => vec![],
        _ => vec![packet],
    };
    let (_dir, _listener, agent, target) = pair(TransportOptions::default(), one_way, ill).await;
    let (mut ask, mut answered) = agent.open_control().await.unwrap();
    let answering = tokio::spawn(async move {
        let (mut answer, mut asked) = target.accept_control().await.unwrap();
        while let Ok(Some(AgentMessage { kind: Some(agent_message::Kind::Heartbeat(question)) })) =
            asked.recv::<AgentMessage>().await
        {
            let kind = Some(target_message::Kind::Heartbeat(question));
            answer.send(&TargetMessage { kind }).await.unwrap();
        }
    });
    let mut prompt = 0;
    for nonce in 0..QUESTIONS {
        let asked = Instant::now();
        lose_next.store(true, Ordering::Relaxed);
        let kind =
            Some(agent_message::Kind::Heartbeat(Heartbeat { nonce, ..Heartbeat::default() }));
        ask.send(&AgentMessage { kind }).await.unwrap();
        let answer = answered.recv::<TargetMessage>().await.unwrap().unwrap();
        assert_eq!(
            answer.kind,
            Some(target_message::Kind::Heartbeat(Heartbeat { nonce, ..Heartbeat::default() }))
        );
        prompt += u64::from(asked.elapsed() < 3 * one_way);
    }
    let lost = agent.stats().lost_packets;
    assert!(lost > QUESTIONS / 2, "only {lost} packets were lost");
    // The machine may be busy with something else now and then.
    assert!(prompt > QUESTIONS * 3 / 4, "only {prompt} of {QUESTIONS} were answered in time");
    agent.close("done");
    answering.await.unwrap();
}

/// Packets that are held back for a moment.
type Held = Vec<Vec<u8>>;

/// Gathers packets to the target until there are `gathered` of them, then lets go of what `released`
/// makes of them; before and after, packets pass. Larger ones than 1,280 bytes never do.
fn gather(
    after: usize,
    gathered: usize,
    done: Arc<AtomicBool>,
    mut released: impl FnMut(Held) -> Held + Send + 'static,
) -> impl Ill {
    let (mut seen, mut held) = (0, Vec::new());
    move |way, packet: Vec<u8>| {
        if packet.len() > 1280 {
            return vec![];
        }
        seen += usize::from(way == Way::ToTarget);
        if way == Way::ToAgent || seen < after || done.load(Ordering::Relaxed) {
            return vec![packet];
        }
        held.push(packet);
        if held.len() < gathered {
            return vec![];
        }
        done.store(true, Ordering::Relaxed);
        released(std::mem::take(&mut held))
    }
}

/// Packets under way at a time, of which every second is missing. One stream that held all of them
/// would have three thousand gaps, and a peer that counts more than 1,024 in a stream gives the
/// connection up. Ours, whose window is 2 MiB, has not even 1,000.
const GATHERED: usize = 6000;

/// Packets that pass before that.
const PASSED_FIRST: usize = 2000;

/// One way.
const DELAY: Duration = Duration::from_millis(40);

fn every_second(held: Held) -> Held {
    held.into_iter().step_by(2).collect()
}

/// Of every hundred, the even ones first, backwards.
fn mixed(held: Held) -> Held {
    held.chunks(100).flat_map(|some| in_the_wrong_order(some.to_vec())).collect()
}

fn in_the_wrong_order(held: Held) -> Held {
    let (even, odd): (Vec<_>, Vec<_>) =
        held.into_iter().enumerate().partition(|(place, _)| place % 2 == 0);
    even.into_iter().rev().chain(odd).map(|(_, packet)| packet).collect()
}

async fn survives(released: impl FnMut(Held) -> Held + Send + 'static) {
    const BATCHES: u64 = 12;
    let done = Arc::new(AtomicBool::new(false));
    let ill = gather(PASSED_FIRST, GATHERED, Arc::clone(&done), released);
    // Wide enough for all of them, whatever happens to them.
    let congestion = Congestion::Fixed { bits_per_second: 1_600_000_000 };
    let transport = TransportOptions { congestion, ..TransportOptions::default() };
    let (_dir, _listener, agent, target) = pair(transport, DELAY, ill).await;
    let sending: Vec<_> = (1..=BATCHES)
        .map(|seq| {
            let agent = agent.clone();
            tokio::spawn(async move { agent.send_batch(batch_of(seq, 2 << 20)).await })
        })
        .collect();
    take_batches(&target, BATCHES).await;
    for sent in sending {
        sent.await.unwrap().unwrap();
    }
    assert!(done.load(Ordering::Relaxed), "fewer packets were under way than meant");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_that_loses_every_second_of_thousands_of_packets_is_survived() {
    survives(every_second).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_that_brings_thousands_of_packets_in_the_wrong_order_is_survived() {
    survives(in_the_wrong_order).await;
}

/// As IPsec and ECMP do, only much more so.
#[tokio::test(flavor = "multi_thread")]
async fn a_link_that_mixes_each_hundred_of_thousands_of_packets_is_survived() {
    survives(mixed).await;
}

/// Both ends of a connection of plain quinn, with this between them, and a window for each stream that
/// holds everything that is gathered.
async fn bare_pair(
    receiver: std::net::UdpSocket,
    ill: impl Ill,
) -> (quinn::Connection, quinn::Connection) {
    const WINDOW_BYTES: u32 = 16 << 20;
    const NAME: &str = "bare";
    let mut congestion = quinn::congestion::CubicConfig::default();
    congestion.initial_window(WINDOW_BYTES.into());
    let mut transport = quinn::TransportConfig::default();
    transport
        .stream_receive_window(WINDOW_BYTES.into())
        .send_window(WINDOW_BYTES.into())
        .congestion_controller_factory(Arc::new(congestion));
    let transport = Arc::new(transport);

    let issued = rcgen::generate_simple_self_signed([NAME.to_owned()]).unwrap();
    let certificate = issued.cert.der().clone();
    let key = PrivatePkcs8KeyDer::from(issued.signing_key.serialize_der()).into();
    let mut server = quinn::ServerConfig::with_single_cert(vec![certificate.clone()], key).unwrap();
    server.transport_config(Arc::clone(&transport));
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate).unwrap();
    let mut client = quinn::ClientConfig::with_root_certificates(Arc::new(roots)).unwrap();
    client.transport_config(transport);

    let (knobs, runtime) = (quinn::EndpointConfig::default(), Arc::new(quinn::TokioRuntime));
    let target = quinn::Endpoint::new(knobs, Some(server), receiver, runtime).unwrap();
    let through = relay::start(target.local_addr().unwrap(), DELAY, ill).await;
    let agent = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let connecting = agent.connect_with(client, through.parse().unwrap(), NAME).unwrap();
    let accepting = async { target.accept().await.unwrap().await.unwrap() };
    let (ours, theirs) = tokio::join!(connecting, accepting);
    (ours.unwrap(), theirs)
}

/// What the first of the tests above would be worth nothing without: a stream of plain quinn whose
/// window holds all that is under way does not survive the same. (The second makes no gaps: what comes
/// later than 128 others counts as a duplicate, and is lost.)
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_with_a_wide_window_dies_of_every_second_packet_lost() {
    /// What the kernel takes for a packet of this size, with its own book-keeping.
    const PACKET_MEMORY_BYTES: usize = 2304;
    let receiver = relay::socket().await.into_std().unwrap();
    let granted = socket2::SockRef::from(&receiver).recv_buffer_size().unwrap();
    if granted < GATHERED * PACKET_MEMORY_BYTES {
        println!("skipped: this needs root, or a net.core.rmem_max of 8 MiB");
        return;
    }
    let done = Arc::new(AtomicBool::new(false));
    let ill = gather(PASSED_FIRST, GATHERED, Arc::clone(&done), every_second);
    let (agent, target) = bare_pair(receiver, ill).await;
    let sending = async {
        let mut stream = agent.open_uni().await.unwrap();
        stream.write_all(&vec![7; 24 << 20]).await.unwrap_err();
    };
    let receiving = async {
        let mut stream = target.accept_uni().await.unwrap();
        while let Ok(Some(_)) = stream.read_chunk(usize::MAX, true).await {}
        target.closed().await.to_string()
    };
    let both = async { tokio::join!(sending, receiving) };
    let both = tokio::time::timeout(Duration::from_secs(60), both).await;
    let ((), reason) = both.expect("it went on as if nothing had happened");
    assert!(done.load(Ordering::Relaxed), "fewer packets were under way than meant");
    assert!(reason.contains("too many gaps in stream buffer"), "{reason}");
}

/// A target that stops reading: what is under way stays within the window, and when it reads again
/// everything is there, sent once.
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_stops_reading_holds_a_window_and_no_more() {
    const WINDOW_BYTES: u32 = 8 << 20;
    const BATCHES: u64 = 64;
    const BATCH_BYTES: usize = 1 << 20;
    /// With nothing else in it a packet that keeps the connection alive is smaller.
    const KEEP_ALIVE_BYTES_MAX: usize = 60;
    let to_target = Arc::new(AtomicUsize::new(0));
    let (counted, (keeps_alive, mut kept_alive)) =
        (Arc::clone(&to_target), tokio::sync::mpsc::unbounded_channel());
    let ill = move |way, packet: Vec<u8>| {
        if way == Way::ToTarget {
            let before = counted.fetch_add(packet.len(), Ordering::Relaxed);
            if before > WINDOW_BYTES as usize && packet.len() < KEEP_ALIVE_BYTES_MAX {
                let _ = keeps_alive.send(());
            }
        }
        vec![packet]
    };
    let transport = TransportOptions {
        window_bytes: WINDOW_BYTES,
        idle_timeout: Duration::from_secs(2),
        ..TransportOptions::default()
    };
    let (_dir, _listener, agent, target) = pair(transport, Duration::ZERO, ill).await;
    let sending: Vec<_> = (1..=BATCHES)
        .map(|seq| {
            let agent = agent.clone();
            tokio::spawn(async move { agent.send_batch(batch_of(seq, BATCH_BYTES)).await })
        })
        .collect();
    // The agent has nothing better to say any more.
    for _ in 0..3 {
        kept_alive.recv().await.unwrap();
    }
    assert!(to_target.load(Ordering::Relaxed) < WINDOW_BYTES as usize * 11 / 10);

    take_batches(&target, BATCHES).await;
    for sent in sending {
        sent.await.unwrap().unwrap();
    }
    let (all, sent) = (BATCHES as usize * BATCH_BYTES, to_target.load(Ordering::Relaxed));
    assert!(sent < all * 23 / 20, "{sent} bytes were sent for {all}");
}

/// A probe judged by arithmetic, and blamed the window on lines that a wider one made no faster. What was
/// acknowledged while nothing more might be sent tells which of the two it is.
#[tokio::test(flavor = "multi_thread")]
async fn a_window_that_is_too_small_is_told_from_a_line_that_is_full() {
    const ONE_WAY: Duration = Duration::from_millis(100);
    const FLOOD: Duration = Duration::from_secs(2);
    let narrow = TransportOptions { window_bytes: 4 << 20, ..TransportOptions::default() };
    let congestion = Congestion::Fixed { bits_per_second: 16_000_000 };
    let slow_line = TransportOptions { congestion, ..TransportOptions::default() };
    for (transport, is_starved) in [(narrow, true), (slow_line, false)] {
        let healthy = |_, packet| vec![packet];
        let (_dir, _listener, agent, target) = pair(transport, ONE_WAY, healthy).await;
        let received = Arc::default();
        let drained = tokio::spawn(async move { probe::drain(&target, received).await });
        probe::flood(&agent, FLOOD).await.unwrap();
        drained.abort();
        let congestion = agent.congestion().unwrap();
        let starved_share = congestion.starved_bytes as f64 / congestion.acked_bytes as f64;
        println!("{starved_share:.2} of {} bytes", congestion.acked_bytes);
        assert!(congestion.acked_bytes > 2 << 20);
        assert_eq!(starved_share > 0.2, is_starved, "{starved_share}");
    }
}
