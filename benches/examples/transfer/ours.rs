//! The link of `backhaul-proto` without a session, capture, journal or disk.

use std::net::SocketAddr;
use std::path::Path;

use backhaul_proto::batch::{Compression, Compressor, PlainBatch};
use backhaul_proto::id::{BatchSeq, Generation, MachineIndex};
use backhaul_proto::identity::{Identity, IdentityFiles, Role, create_ca, issue};
use backhaul_proto::quic::{BatchStream, Connections, Listener, TransportOptions, connect};

use crate::count::Count;
use crate::{CHUNK_BYTES, Failure, noise, ready};

/// Batches under way at the same time: more than the longest line holds.
const AT_ONCE: u32 = 128;

fn identity(keys: &Path, name: &str, role: Role) -> Result<Identity, Failure> {
    let files = IdentityFiles {
        ca: keys.join("ca.pem"),
        cert: keys.join(format!("{name}.pem")),
        key: keys.join(format!("{name}.key")),
    };
    Ok(Identity::load(&files, role)?)
}

pub(crate) async fn receive(address: SocketAddr, keys: &Path) -> Result<(), Failure> {
    create_ca(keys)?;
    issue(keys, Role::Target, &"t1".parse()?, 2)?;
    issue(keys, Role::Agent, &"a1".parse()?, 2)?;
    let target = identity(keys, "t1", Role::Target)?;
    let listener = Listener::bind(address, &target, &TransportOptions::default())?;
    let count = ready();
    let connection = listener.accept().await.ok_or("the endpoint is closed")?.finish().await?;
    let connection = connection.ok_or("a lane came first")?;
    tokio::spawn(async move {
        while let Some(lane) = listener.accept().await {
            let _ = lane.finish().await;
        }
    });
    while let Ok(stream) = connection.accept_batch().await {
        tokio::spawn(read(stream, count.clone()));
    }
    Ok(())
}

async fn read(mut stream: BatchStream, count: Count) -> Result<(), Failure> {
    let header = stream.read_header().await?;
    let mut body = vec![0; header.wire_bytes as usize];
    // In parts, so that the count is smooth.
    for part in body.chunks_mut(CHUNK_BYTES / 16) {
        stream.read_exact(part).await?;
        count.add(part.len());
    }
    Ok(stream.read_end().await?)
}

pub(crate) async fn send(
    address: SocketAddr,
    keys: &Path,
    connections: usize,
) -> Result<(), Failure> {
    let agent = identity(keys, "a1", Role::Agent)?;
    let connections = Connections::Exactly(connections);
    let options = TransportOptions { connections, ..TransportOptions::default() };
    let connection = connect(&address.to_string(), &agent, Some("t1".parse()?), &options).await?;
    // The same batch again and again: what its making costs is not the transport's.
    let plain = PlainBatch::of_one_write(Generation(1), BatchSeq(1), 0, noise()?);
    let mut compressor = Compressor::default();
    let batch = plain.encode(Compression::Off, &mut compressor).chunks(MachineIndex(0));
    let link = connection.clone();
    tokio::spawn(async move { link.look_after().await });
    for _ in 0..AT_ONCE {
        let (connection, batch) = (connection.clone(), batch.clone());
        tokio::spawn(async move { while connection.send_batch(batch.clone()).await.is_ok() {} });
    }
    Err(connection.closed().await.into())
}
