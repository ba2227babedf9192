//! What an operator would use instead, over an emulated link. Each returns payload bytes a second.

use std::fs::File;
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use backhaul_lab::link::{Link, LinkSpec};

use crate::Span;
use crate::peer::Peer;
use crate::transfer::Transfer;

/// Headers of a TCP segment with timestamps, and of IPv4.
const TCP_HEADER_BYTES: u64 = 52;
/// Headers of a datagram, and of IPv4.
const UDP_HEADER_BYTES: u16 = 28;
/// What iperf3's UDP offers, against the rate of the link: a little more than it can carry.
const UDP_OFFER: f64 = 1.05;
const IPERF3_PORT: u16 = 5201;

/// A server of iperf3 at site B, ready.
pub fn iperf3_server(link: &Link) -> anyhow::Result<Peer> {
    let mut server = Peer::start(link.site_b().command_in("iperf3").arg("-s"))?;
    wait_for_port(&mut server, link, IPERF3_PORT)?;
    Ok(server)
}

/// A client of iperf3 at site A.
pub fn iperf3_client(link: &Link, seconds: u64) -> Command {
    let mut command = link.site_a().command_in("iperf3");
    command.args(["-c", &link.site_b().address().to_string(), "-t", &seconds.to_string()]);
    command
}

/// One TCP flow under the kernel's `congestion`, as iperf3's server counted it.
pub fn iperf3_tcp(spec: &LinkSpec, congestion: &str, span: &Span) -> anyhow::Result<f64> {
    let link = Link::start(spec.clone())?;
    let _server = iperf3_server(&link)?;
    let mut client = iperf3_client(&link, span.measure.as_secs());
    client.args(["-C", congestion, "-O", &span.settle.as_secs().to_string()]);
    Ok(iperf3_report(&mut client, "sum_received")?.0)
}

/// UDP without any control, as iperf3's server counted it: what the instrument lets through. Also
/// the share of the datagrams that did not arrive.
pub fn iperf3_udp(link: &Link, span: &Span) -> anyhow::Result<(f64, f64)> {
    let _server = iperf3_server(link)?;
    let mut client = iperf3_client(link, span.measure.as_secs());
    let offer = (link.spec().up.rate.0 as f64 * UDP_OFFER) as u64;
    let payload = link.spec().mtu_bytes - UDP_HEADER_BYTES;
    client.args(["-u", "-b", &offer.to_string(), "-l", &payload.to_string()]);
    client.args(["-O", &span.settle.as_secs().to_string()]);
    iperf3_report(&mut client, "sum_received")
}

fn iperf3_report(client: &mut Command, sum: &str) -> anyhow::Result<(f64, f64)> {
    let output = client
        .arg("--json")
        .output()
        .context("iperf3 is missing: install the Debian package iperf3")?;
    let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let sum = &report["end"][sum];
    let bits = sum["bits_per_second"].as_f64();
    let bits = bits.with_context(|| format!("iperf3 said {report}"))?;
    Ok((bits / 8.0, sum["lost_percent"].as_f64().unwrap_or(0.0) / 100.0))
}

/// A transport with nothing behind it; `kind` is one of the example `transfer`'s. One that dies on
/// this link, as quinn's BBR does on some, counts as nothing.
pub fn bare(dir: &Path, spec: &LinkSpec, kind: &str, span: &Span) -> anyhow::Result<f64> {
    let link = Link::start(spec.clone())?;
    match Transfer::start(kind, Some(&link), dir)?.measure(span) {
        Ok(transferred) => Ok(transferred.bytes_per_second),
        Err(error) => {
            eprintln!("  {kind} did not live through it: {error:#}");
            Ok(0.0)
        }
    }
}

/// rsync's own protocol, without encryption and compression.
pub fn rsync(dir: &Path, disk: &Path, spec: &LinkSpec, span: &Span) -> anyhow::Result<f64> {
    let link = Link::start(spec.clone())?;
    delivered(&link, begin("rsync", dir, disk, &link)?, span)
}

/// A daemon of rsync at site B that puts `copy.raw` into `dir`, and the address of that file.
pub fn rsync_daemon(dir: &Path, link: &Link) -> anyhow::Result<(Peer, String)> {
    let configuration = dir.join("rsyncd.conf");
    let into = dir.display();
    std::fs::write(
        &configuration,
        format!("use chroot = no\n[disks]\npath = {into}\nread only = no\nuid = 0\ngid = 0\n"),
    )?;
    let mut server = Peer::start(
        link.site_b()
            .command_in("rsync")
            .args(["--daemon", "--no-detach", "--config"])
            .arg(&configuration),
    )?;
    wait_for_port(&mut server, link, 873)?;
    Ok((server, format!("rsync://{}/disks/copy.raw", link.site_b().address())))
}

/// nbdcopy to nbdkit with TLS.
pub fn nbdcopy(dir: &Path, disk: &Path, spec: &LinkSpec, span: &Span) -> anyhow::Result<f64> {
    let link = Link::start(spec.clone())?;
    delivered(&link, begin("nbdcopy-tls", dir, disk, &link)?, span)
}

/// nbdkit with TLS at site B over an empty `copy.raw` of the disk's size in `dir`, and its address.
pub fn nbdkit_tls(dir: &Path, disk: &Path, link: &Link) -> anyhow::Result<(Peer, String)> {
    let keys = dir.join("keys.psk");
    std::fs::write(&keys, format!("lab:{}\n", "5a".repeat(32)))?;
    let options = ["--tls=require".to_owned(), format!("--tls-psk={}", keys.display())];
    let server = nbdkit(dir, disk, link, &options)?;
    let address = link.site_b().address();
    Ok((server, format!("nbds://lab@{address}/?tls-psk-file={}", keys.display())))
}

/// nbdkit at site B over an empty `copy.raw` of the disk's size in `dir`.
pub fn nbdkit(dir: &Path, disk: &Path, link: &Link, options: &[String]) -> anyhow::Result<Peer> {
    let copy = dir.join("copy.raw");
    File::create(&copy)?.set_len(std::fs::metadata(disk)?.len())?;
    let mut command = link.site_b().command_in("nbdkit");
    let mut server = Peer::start(command.arg("-f").args(options).arg("file").arg(&copy))?;
    wait_for_port(&mut server, link, 10809)?;
    Ok(server)
}

/// Waits until a peer listens on a TCP port of site B.
pub fn wait_for_port(peer: &mut Peer, link: &Link, port: u16) -> anyhow::Result<()> {
    let address = link.site_b().address();
    let connect = || TcpStream::connect((address, port)).is_ok();
    peer.wait_until(|| link.site_b().run_inside(connect).unwrap_or(false))
}

/// A transfer that has just been started; it ends when this is dropped.
#[derive(Debug)]
pub enum Running {
    /// A client and a server.
    Peers([Peer; 2]),
    /// A transport with nothing behind it.
    Bare(Transfer),
}

/// Starts a contender of the links' table, by its name there, to be watched on the link.
pub fn begin(contender: &str, dir: &Path, disk: &Path, link: &Link) -> anyhow::Result<Running> {
    if let Some(kind) = contender.strip_prefix("bare-") {
        return Ok(Running::Bare(Transfer::start(kind, Some(link), dir)?));
    }
    let site = link.site_a();
    let (server, mut client) = if let Some(congestion) = contender.strip_prefix("iperf3-") {
        let mut client = iperf3_client(link, 3600);
        client.args(["-C", congestion]);
        (iperf3_server(link)?, client)
    } else if contender == "rsync" {
        let (server, to) = rsync_daemon(dir, link)?;
        let mut client = site.command_in("rsync");
        client.args(["--whole-file", "--inplace"]).arg(disk).arg(to);
        (server, client)
    } else {
        ensure!(contender == "nbdcopy-tls", "no peer is called {contender}");
        let (server, uri) = nbdkit_tls(dir, disk, link)?;
        let mut client = site.command_in("nbdcopy");
        client.arg(disk).arg(uri);
        (server, client)
    };
    Ok(Running::Peers([Peer::start(&mut client)?, server]))
}

/// What the link delivers of payload while a transfer runs.
fn delivered(link: &Link, mut running: Running, span: &Span) -> anyhow::Result<f64> {
    // The first seconds are not counted; the second wait is the measurement itself.
    std::thread::sleep(span.settle);
    let before = link.stats().up;
    std::thread::sleep(span.measure);
    let after = link.stats().up;
    if let Running::Peers([sender, _]) = &mut running {
        ensure!(sender.is_running()?, "the sender ended before it was measured");
    }
    let packets = after.delivered_packets - before.delivered_packets;
    let bytes = after.delivered_bytes - before.delivered_bytes;
    Ok(bytes.saturating_sub(packets * TCP_HEADER_BYTES) as f64 / span.measure.as_secs_f64())
}
