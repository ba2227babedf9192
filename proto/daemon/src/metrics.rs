//! A Prometheus endpoint: `GET /metrics`, and `GET /healthz` for probes.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use prometheus::{Registry, TextEncoder};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Longest request head that is read: a scraper's is a few hundred bytes.
const HEAD_BYTES_MAX: usize = 8 << 10;
/// Scrapes answered at a time; the next one waits to be accepted.
const SCRAPES_MAX: usize = 8;
/// A client that takes longer is dropped.
const SCRAPE_TIME_MAX: Duration = Duration::from_secs(5);

/// Serves `registry` on `address` until the process ends. Returns the address that was bound.
pub async fn serve(address: SocketAddr, registry: Registry) -> io::Result<SocketAddr> {
    let process = prometheus::process_collector::ProcessCollector::for_self();
    // Fails only when it is registered already.
    let _ = registry.register(Box::new(process));
    let listener = TcpListener::bind(address).await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        let places = std::sync::Arc::new(tokio::sync::Semaphore::new(SCRAPES_MAX));
        loop {
            let Ok(place) = std::sync::Arc::clone(&places).acquire_owned().await else { return };
            let Ok((stream, _)) = listener.accept().await else {
                // Out of descriptors; trying again at once would spin.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            let registry = registry.clone();
            tokio::spawn(async move {
                let _place = place;
                let _ = tokio::time::timeout(SCRAPE_TIME_MAX, answer(stream, &registry)).await;
            });
        }
    });
    Ok(address)
}

async fn answer(mut stream: TcpStream, registry: &Registry) -> io::Result<()> {
    let mut head = Vec::new();
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        if head.len() >= HEAD_BYTES_MAX || stream.read_buf(&mut head).await? == 0 {
            return Ok(());
        }
    }
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let mut words = line.split(|byte| *byte == b' ');
    let (status, body) = match (words.next(), words.next()) {
        (Some(b"GET"), Some(b"/metrics")) => {
            match TextEncoder::new().encode_to_string(&registry.gather()) {
                Ok(text) => ("200 OK", text),
                Err(error) => ("500 Internal Server Error", error.to_string()),
            }
        }
        (Some(b"GET"), Some(b"/healthz")) => ("200 OK", "ok\n".into()),
        _ => ("404 Not Found", "try /metrics\n".into()),
    };
    let reply = format!(
        "HTTP/1.1 {status}\r\ncontent-type: text/plain; version=0.0.4\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(reply.as_bytes()).await?;
    stream.shutdown().await
}
