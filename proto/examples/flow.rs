//! One QUIC flow as Backhaul makes them, to try a congestion controller on a real or emulated
//! link:
//!
//! ```text
//! flow receive 10.213.0.2:4433 KEYS
//! flow send    10.213.0.2:4433 KEYS 20 auto [LIMIT-MBIT]
//! flow compare 10.213.0.2:4433 KEYS 20 quic|tcp CONNECTIONS
//! ```
//!
//! `KEYS` is a folder; the receiver makes throw-away keys in it. Every second the sender prints
//! what its controller knows, and the receiver what arrived. `compare` sends over so many
//! connections of a transport at a time, and prints what they came to and what a core did for it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use backhaul_proto::batch::{Compression, Compressor, PlainBatch};
use backhaul_proto::id::{BatchSeq, Generation, MachineIndex};
use backhaul_proto::identity::{Identity, IdentityFiles, Role, create_ca, issue};
use backhaul_proto::link::{self, ConnectOptions, TransportChoice, probe};
use backhaul_proto::quic::{Congestion, TransportOptions, connect};
use bytes::Bytes;
use tokio::task::JoinSet;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Payload of a batch.
const BATCH_BYTES: usize = 256 << 10;
/// Batches that are written at the same time, so that the link never waits for the next.
const BATCHES_AT_ONCE: u64 = 32;

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["receive", address, keys] => receive(address, Path::new(keys)).await,
        ["send", address, keys, seconds, method, limit @ ..] => {
            let congestion = match *method {
                "cubic" => Congestion::Cubic,
                "auto" => Congestion::Auto,
                mbit => Congestion::Fixed { bits_per_second: mbit.parse::<u64>()? * 1_000_000 },
            };
            let options = TransportOptions { congestion, ..Default::default() };
            if let Some(mbit) = limit.first() {
                options.rate_limit.set(Some(mbit.parse::<u64>()? * 125_000));
            }
            let seconds = Duration::from_secs(seconds.parse()?);
            send(address, Path::new(keys), &options, seconds).await
        }
        ["compare", address, keys, seconds, transport, connections] => {
            let seconds = Duration::from_secs(seconds.parse()?);
            let (choice, connections) = (transport.parse()?, connections.parse()?);
            compare(address, Path::new(keys), seconds, choice, connections).await
        }
        _ => Err("usage: flow receive ADDRESS KEYS | flow send ADDRESS KEYS SECONDS METHOD".into()),
    }
}

fn identity(keys: &Path, name: &str, role: Role) -> Result<Identity, Failure> {
    let files = IdentityFiles {
        ca: keys.join("ca.pem"),
        cert: keys.join(format!("{name}.pem")),
        key: keys.join(format!("{name}.key")),
    };
    Ok(Identity::load(&files, role)?)
}

/// Takes what comes over any number of connections, until it is killed.
async fn receive(address: &str, keys: &Path) -> Result<(), Failure> {
    create_ca(keys)?;
    issue(keys, Role::Target, &"t1".parse()?, 2)?;
    issue(keys, Role::Agent, &"a1".parse()?, 2)?;
    let target = identity(keys, "t1", Role::Target)?;
    let options = TransportOptions::default();
    let listener = link::Listener::bind(address.parse()?, &target, &options, true).await?;
    let arrived = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&arrived);
    tokio::spawn(async move {
        let (mut before, mut cpu_before) = (0, cpu_seconds());
        for second in 1.. {
            // A line for each second.
            tokio::time::sleep(Duration::from_secs(1)).await;
            let (now, cpu) = (counted.load(Ordering::Relaxed), cpu_seconds());
            if now > before {
                let mbit = (now - before) as f64 * 8e-6;
                let percent = (cpu - cpu_before) * 100.0;
                println!("  {second:3} s: {mbit:7.1} Mbit/s arrived, {percent:.0} % of a core");
            }
            (before, cpu_before) = (now, cpu);
        }
    });
    while let Some(handshake) = listener.accept().await {
        let arrived = Arc::clone(&arrived);
        tokio::spawn(async move {
            if let Ok(Some(connection)) = handshake.finish().await {
                let _ = probe::drain(&connection, arrived).await;
            }
        });
    }
    Ok(())
}

/// Seconds of processor time that this process has used.
fn cpu_seconds() -> f64 {
    let clock = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    clock.tv_sec as f64 + clock.tv_nsec as f64 * 1e-9
}

async fn compare(
    address: &str,
    keys: &Path,
    time: Duration,
    choice: TransportChoice,
    connections: usize,
) -> Result<(), Failure> {
    let agent = Arc::new(identity(keys, "a1", Role::Agent)?);
    let transport = TransportOptions::default();
    let expected = Some("t1".parse()?);
    let options =
        ConnectOptions { choice, expected, transport, lan_over_tcp: false, udp_silent: false };
    let mut flows = JoinSet::new();
    let mut connected = Vec::new();
    for _ in 0..connections {
        let connection = link::connect(address, &agent, &options).await?;
        connected.push(connection.clone());
        flows.spawn(async move { probe::flood(&connection, time).await });
    }
    let (began, cpu) = (Instant::now(), cpu_seconds());
    while let Some(ended) = flows.join_next().await {
        ended??;
    }
    let seconds = began.elapsed().as_secs_f64();
    let sent: u64 = connected.iter().map(|connection| connection.stats().sent_bytes).sum();
    let busy = (cpu_seconds() - cpu) / seconds * 100.0;
    let rate = sent as f64 * 8e-6 / seconds;
    println!("{connections} over {choice:?}: {rate:.0} Mbit/s sent, {busy:.0} % of a core");
    Ok(())
}

fn batch(seq: u64, data: &Bytes) -> Vec<Bytes> {
    let plain = PlainBatch::of_one_write(Generation(1), BatchSeq(seq), 0, data.clone());
    let mut compressor = Compressor::default();
    plain.encode(Compression::Off, &mut compressor).chunks(MachineIndex(0))
}

async fn send(
    address: &str,
    keys: &Path,
    options: &TransportOptions,
    duration: Duration,
) -> Result<(), Failure> {
    let agent = identity(keys, "a1", Role::Agent)?;
    let connection = connect(address, &agent, Some("t1".parse()?), options).await?;
    let data = Bytes::from(vec![7; BATCH_BYTES]);
    for lane in 0..BATCHES_AT_ONCE {
        let (connection, data) = (connection.clone(), data.clone());
        tokio::spawn(async move {
            for round in 0.. {
                let seq = 1 + lane + round * BATCHES_AT_ONCE;
                if connection.send_batch(batch(seq, &data)).await.is_err() {
                    break;
                }
            }
        });
    }
    let mut before = connection.stats();
    for second in 1..=duration.as_secs() {
        // A line for each second.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let now = connection.stats();
        let sent = (now.sent_bytes - before.sent_bytes) as f64 * 8e-6;
        let packets = (now.sent_packets - before.sent_packets).max(1);
        let lost = (now.lost_packets - before.lost_packets) as f64 / packets as f64;
        before = now;
        let knows = connection.congestion().ok_or("not our controller")?;
        println!(
            "{second:3} s: {sent:7.1} Mbit/s sent, {:5.2} % lost, RTT {:.1} ms (min {:.1}), {} of {} Mbit/s, window {}, chance {} ppm, MTU {}",
            lost * 100.0,
            now.rtt.as_secs_f64() * 1e3,
            knows.min_rtt.unwrap_or_default().as_secs_f64() * 1e3,
            knows.state,
            knows.bandwidth_bytes_per_second / 125_000,
            knows.window_bytes,
            knows.chance_loss_ppm,
            now.mtu_bytes,
        );
    }
    connection.close("done");
    // The last packet leaves in the driver's own time, and nothing tells when.
    tokio::time::sleep(Duration::from_millis(200)).await;
    Ok(())
}
