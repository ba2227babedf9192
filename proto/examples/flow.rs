//! One QUIC flow as Backhaul makes them, to try a congestion controller on a real or emulated
//! link:
//!
//! ```text
//! flow receive 10.213.0.2:4433 KEYS
//! flow send    10.213.0.2:4433 KEYS 20 auto [LIMIT-MBIT]
//! ```
//!
//! `KEYS` is a folder; the receiver makes throw-away keys in it. Every second the sender prints
//! what its controller knows, and the receiver what arrived.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use backhaul_proto::batch::{Compression, Compressor, PlainBatch};
use backhaul_proto::id::{BatchSeq, Generation, MachineIndex};
use backhaul_proto::identity::{Identity, IdentityFiles, Role, create_ca, issue};
use backhaul_proto::quic::{Congestion, Listener, TransportOptions, connect};
use bytes::Bytes;

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

async fn receive(address: &str, keys: &Path) -> Result<(), Failure> {
    create_ca(keys)?;
    issue(keys, Role::Target, &"t1".parse()?, 2)?;
    issue(keys, Role::Agent, &"a1".parse()?, 2)?;
    let target = identity(keys, "t1", Role::Target)?;
    let listener = Listener::bind(address.parse()?, &target, &TransportOptions::default())?;
    let connection = listener.accept().await.ok_or("the endpoint is closed")?.finish().await?;
    let (arrived, begun) = (Arc::new(AtomicU64::new(0)), Instant::now());
    let counted = Arc::clone(&arrived);
    tokio::spawn(async move {
        let mut before = 0;
        loop {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let now = counted.load(Ordering::Relaxed);
            let seconds = begun.elapsed().as_secs();
            println!("  {seconds:3} s: {:7.1} Mbit/s arrived", (now - before) as f64 * 8e-6);
            before = now;
        }
    });
    while let Ok(mut stream) = connection.accept_batch().await {
        let arrived = Arc::clone(&arrived);
        tokio::spawn(async move {
            let header = stream.read_header().await?;
            let mut body = vec![0; 16 << 10];
            let mut left = header.wire_bytes as usize;
            while left > 0 {
                let part = left.min(body.len());
                stream.read_exact(&mut body[..part]).await?;
                arrived.fetch_add(part as u64, Ordering::Relaxed);
                left -= part;
            }
            stream.read_end().await
        });
    }
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
    tokio::time::sleep(Duration::from_millis(200)).await;
    Ok(())
}
