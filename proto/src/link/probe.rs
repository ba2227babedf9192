//! What both ends of a probe do: send noise for a while, and count what comes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::task::JoinSet;

use crate::batch::{Compression, Compressor, PlainBatch};
use crate::id::{BatchSeq, Generation, MachineIndex};
use crate::link::{BatchStream, Connection, StreamError, Transport};

/// Data of one batch of noise, in bytes.
const NOISE_BYTES: usize = 256 << 10;

/// What is taken of a batch in one piece, in bytes.
const DRAIN_BYTES: usize = 16 << 10;

/// Under way at first, and always on top of what the way carries.
const AHEAD_BYTES_MIN: f64 = (2 << 20) as f64;

/// Under way at most: what the widest window holds.
const AHEAD_BYTES_MAX: f64 = (1 << 30) as f64;

/// So much of what the way carries is under way: no round trip leaves it idle, and when the time is
/// over the rest is through soon.
const AHEAD_SECONDS: f64 = 0.5;

/// And over QUIC so many congestion windows, as many as the transport itself would take: a flood that has less
/// ready is what limits, and the rate of a long line would never be found. Over TCP the kernel has it ready.
const AHEAD_WINDOWS: f64 = 4.0;

/// A batch of noise as it travels. It is a batch like any other, so that it passes the same way.
fn noise() -> Vec<Bytes> {
    let mut data = vec![0; NOISE_BYTES];
    // Keyed hashing as a generator: nothing on the way can compress it.
    blake3::Hasher::new().update(b"backhaul probe").finalize_xof().fill(&mut data);
    let batch = PlainBatch::of_one_write(Generation(1), BatchSeq(1), 0, data.into());
    let mut compressor = Compressor::default();
    batch.encode(Compression::Off, &mut compressor).chunks(MachineIndex(0))
}

/// Sends noise as fast as the connection takes it, for so long.
pub async fn flood(connection: &Connection, time: Duration) -> Result<(), StreamError> {
    let (began, chunks) = (Instant::now(), noise());
    let mut sending = JoinSet::new();
    let mut sent_bytes = 0.0;
    while began.elapsed() < time {
        let rate = sent_bytes / began.elapsed().as_secs_f64().max(1e-3);
        let windows_bytes = match connection.transport() {
            Transport::Quic => AHEAD_WINDOWS * connection.stats().congestion_window_bytes as f64,
            Transport::Tcp => 0.0,
        };
        let way_bytes = windows_bytes.max(rate * AHEAD_SECONDS);
        let ahead_bytes = (AHEAD_BYTES_MIN + way_bytes).min(AHEAD_BYTES_MAX);
        while ((sending.len() * NOISE_BYTES) as f64) < ahead_bytes {
            let (connection, chunks) = (connection.clone(), chunks.clone());
            sending.spawn(async move { connection.send_batch(chunks).await });
        }
        let rest = time.saturating_sub(began.elapsed());
        if let Ok(Some(Ok(sent))) = tokio::time::timeout(rest, sending.join_next()).await {
            sent?;
            sent_bytes += NOISE_BYTES as f64;
        }
    }
    // Over TCP a batch that is cut off would end the session.
    while let Some(sent) = sending.join_next().await {
        if let Ok(sent) = sent {
            sent?;
        }
    }
    Ok(())
}

/// Takes batches and throws them away, counting their bytes as they come, until the connection ends.
/// They are read side by side: all of them share one window, and the one that is waited for may be
/// the one that has none of it.
pub async fn drain(connection: &Connection, received: Arc<AtomicU64>) -> Result<(), StreamError> {
    let mut reading = JoinSet::new();
    loop {
        let stream = connection.accept_batch().await?;
        reading.spawn(drain_one(stream, Arc::clone(&received)));
        while let Some(read) = reading.try_join_next() {
            if let Ok(read) = read {
                read?;
            }
        }
    }
}

async fn drain_one(mut stream: BatchStream, received: Arc<AtomicU64>) -> Result<(), StreamError> {
    let header = stream.read_header().await?;
    let mut buffer = vec![0; DRAIN_BYTES];
    let mut left = header.wire_bytes as usize;
    while left > 0 {
        let part = left.min(buffer.len());
        stream.read_exact(&mut buffer[..part]).await?;
        received.fetch_add(part as u64, Ordering::Relaxed);
        left -= part;
    }
    stream.read_end().await
}
