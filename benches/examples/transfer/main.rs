//! A sender and a receiver with nothing behind the transport: bytes that nothing compresses, as fast
//! as they go. `backhaul-benches` runs it at both ends of an emulated link, and over loopback.
//!
//! ```text
//! transfer receive KIND 10.213.0.2:4433 KEYS
//! transfer send    KIND 10.213.0.2:4433 KEYS
//! ```
//!
//! `KEYS` is a folder; the receiver makes throw-away keys in it and then prints `ready`. From the
//! first byte on it prints a line every [`count::PERIOD`]: microseconds since then, and bytes so far.

mod bare;
mod count;
mod ours;
mod tls;

use std::net::SocketAddr;
use std::path::Path;

use count::Count;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// What is written at a time, and on a stream of its own: the size of a full batch.
const CHUNK_BYTES: usize = 256 << 10;

const USAGE: &str = "usage: transfer receive|send KIND ADDRESS KEYS, where KIND is ours, ours-two, tls, \
    quinn-cubic, quinn-bbr, quinn-default, noq-cubic, noq-bbr3 or noq-default";

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let [end, kind, address, keys] = arguments.as_slice() else { return Err(USAGE.into()) };
    let (address, keys): (SocketAddr, _) = (address.parse()?, Path::new(keys));
    let (family, method) = kind.split_once('-').unwrap_or((kind, ""));
    match (*end, family) {
        ("receive", "ours") => ours::receive(address, keys).await,
        ("send", "ours") => ours::send(address, keys, if method == "two" { 2 } else { 1 }).await,
        ("receive", "tls") => tls::receive(address, keys).await,
        ("send", "tls") => tls::send(address, keys).await,
        ("receive", "quinn") => bare::quinn::receive(address, keys, method).await,
        ("send", "quinn") => bare::quinn::send(address, keys, method).await,
        ("receive", "noq") => bare::noq::receive(address, keys, method).await,
        ("send", "noq") => bare::noq::send(address, keys, method).await,
        _ => Err(USAGE.into()),
    }
}

/// Bytes that nothing compresses.
fn noise() -> Result<bytes::Bytes, Failure> {
    let mut noise = vec![0; CHUNK_BYTES];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut noise)?;
    Ok(noise.into())
}

/// Says that the sender may come.
fn ready() -> Count {
    println!("ready");
    Count::default()
}
