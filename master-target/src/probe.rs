//! The target's half of a probe of the link.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use backhaul_daemon::lifecycle::cpu_time;
use backhaul_proto::limits::PROBE_TIME_MAX;
use backhaul_proto::link::{Connection, FrameReceiver, FrameSender, StreamError, probe};
use backhaul_proto::message::{
    AgentMessage, ProbeReply, ProbeRequest, TargetMessage, agent_message, target_message,
};

use crate::machine::now_us;

/// What is written to measure the store, in bytes, and in pieces of this size.
const DISK_BYTES: usize = 64 << 20;
const DISK_PIECE_BYTES: usize = 1 << 20;

/// Serves a probe whose first request has come, until the agent ends it.
pub async fn serve(
    connection: &Connection,
    store: &Path,
    first: ProbeRequest,
    sender: &mut FrameSender,
    receiver: &mut FrameReceiver,
) -> Result<(), StreamError> {
    let received = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&received);
    let answers = async {
        let mut request = first;
        let mut measured = (Instant::now(), cpu_time());
        loop {
            if request.download_ms > 0 {
                let time = Duration::from_millis(request.download_ms).min(PROBE_TIME_MAX);
                let connection = connection.clone();
                tokio::spawn(async move { probe::flood(&connection, time).await });
            }
            let mut reply = ProbeReply { nonce: request.nonce, ..ProbeReply::default() };
            if request.disk {
                match measure_disk(store.to_owned()).await {
                    Ok(rate) => reply.disk_bytes_per_second = rate,
                    Err(error) => reply.disk_failure = error.to_string(),
                }
            }
            let (now, cpu) = (Instant::now(), cpu_time());
            let wall = now.duration_since(measured.0).as_secs_f64().max(1e-6);
            reply.cpu_percent = ((cpu - measured.1).as_secs_f64() / wall * 100.0) as u64;
            measured = (now, cpu);
            let socket = connection.stats().socket;
            reply.receive_buffer_bytes = socket.receive_bytes as u64;
            reply.dropped_datagrams = socket.dropped_datagrams();
            reply.received_bytes = received.load(Ordering::Relaxed);
            reply.now_us = now_us();
            let kind = Some(target_message::Kind::Probe(reply));
            sender.send(&TargetMessage { kind }).await?;
            request = match receiver.recv::<AgentMessage>().await? {
                None => return Ok(()),
                Some(AgentMessage { kind: Some(agent_message::Kind::Probe(request)) }) => request,
                Some(_) => {
                    return Err(StreamError::Stream("a probe holds nothing but probes".into()));
                }
            };
        }
    };
    tokio::select! {
        ended = answers => ended,
        ended = probe::drain(connection, counted) => ended,
    }
}

/// Bytes a second that the store takes and syncs, by a file that is removed again.
async fn measure_disk(store: PathBuf) -> std::io::Result<u64> {
    let work = move || {
        let mut file = tempfile_in(&store)?;
        let piece = vec![0x5a; DISK_PIECE_BYTES];
        let began = Instant::now();
        for _ in 0..DISK_BYTES / DISK_PIECE_BYTES {
            file.write_all(&piece)?;
        }
        file.sync_all()?;
        Ok((DISK_BYTES as f64 / began.elapsed().as_secs_f64()) as u64)
    };
    tokio::task::spawn_blocking(work).await.map_err(std::io::Error::other)?
}

/// A file without a name: nothing is left behind, whatever happens.
fn tempfile_in(dir: &Path) -> std::io::Result<std::fs::File> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR)?.into())
}
