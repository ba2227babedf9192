//! Probing the link: can the target be reached, how far away is it, and what does the way carry?

mod limit;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use backhaul_daemon::lifecycle::cpu_time;
use backhaul_proto::identity::{Identity, Role};
use backhaul_proto::link::{
    ConnectOptions, Connection, FrameReceiver, FrameSender, Transport, TransportChoice, connect,
    probe,
};
use backhaul_proto::message::{
    AgentMessage, ProbeReply, ProbeRequest, TargetMessage, agent_message, target_message,
};
use backhaul_proto::quic::{Connections, TransportOptions};
use serde::Serialize;

use crate::capture::now_us;
use crate::config::Config;

pub use limit::Limit;
use limit::Measured;

/// Pings for the round-trip time and the clocks.
const PINGS: u64 = 20;

/// The first part of a flood finds the rate, and is not counted.
const SETTLE_SHARE: u32 = 4;

/// How often the target is asked what has come in, whether or not it has answered before: a probe of
/// ten seconds asks some 370 times, so that a 99th percentile means something.
const ASK_PERIOD: Duration = Duration::from_millis(20);

/// What was found.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The target's address as configured.
    pub target: String,
    /// The name in its certificate.
    pub name: String,
    /// Each transport, tried by itself.
    pub reach: Vec<Reach>,
    /// What the figures below were measured over.
    pub transport: String,
    /// Smallest and median round-trip time of a small message, in seconds.
    pub rtt_seconds: (f64, f64),
    /// How far the target's clock is ahead of this one, in seconds, exact to half the round-trip
    /// time.
    pub clock_skew_seconds: f64,
    /// The path's MTU: over QUIC as a UDP payload, over TCP with all headers.
    pub mtu_bytes: u16,
    /// Share of packets lost on the way up, while it was flooded.
    pub lost_share: f64,
    /// Payload bytes a second to the target.
    pub up_bytes_per_second: f64,
    /// Payload bytes a second from the target.
    pub down_bytes_per_second: f64,
    /// Bytes a second that the target's store takes durably.
    pub disk_bytes_per_second: u64,
    /// Median and 99th percentile of the round-trip time of a small message while the way up was
    /// flooded, in seconds.
    pub loaded_rtt_seconds: (f64, f64),
    /// What keeps the rate to the target from being higher.
    pub limit: Limit,
}

/// A transport, tried by itself.
#[derive(Debug, Clone, Serialize)]
pub struct Reach {
    /// `quic` or `tcp`.
    pub transport: String,
    /// How long the handshake took, in seconds; absent when it failed.
    pub seconds: Option<f64>,
    /// Why it failed; empty when it did not.
    pub failure: String,
}

/// Probes the link of an agent's configuration, for `time` in each direction. `tell` is told what
/// begins.
///
/// # Errors
///
/// When the target is reached over no transport, or the link breaks meanwhile.
pub async fn run(config: &Config, time: Duration, tell: impl Fn(&str)) -> anyhow::Result<Report> {
    let identity = Arc::new(Identity::load(&config.identity, Role::Agent)?);
    let transport =
        TransportOptions { connections: Connections::Auto, ..config.transport_options() };
    let mut reach = Vec::new();
    let mut found: Option<Connection> = None;
    let mut first_failure = None;
    for (choice, transport_name) in
        [(TransportChoice::Quic, Transport::Quic), (TransportChoice::Tcp, Transport::Tcp)]
    {
        tell(&format!("reaching the target over {transport_name}"));
        let expected = config.target_name.clone();
        let transport = transport.clone();
        let options =
            ConnectOptions { choice, expected, transport, lan_over_tcp: false, udp_silent: false };
        let began = Instant::now();
        let (seconds, failure) = match connect(&config.target, &identity, &options).await {
            Ok(connection) => {
                match &found {
                    None => found = Some(connection),
                    Some(_) => connection.close("the probe needs one connection"),
                }
                (Some(began.elapsed().as_secs_f64()), String::new())
            }
            Err(error) => {
                let sentence = error.to_string();
                first_failure.get_or_insert(error);
                (None, sentence)
            }
        };
        reach.push(Reach { transport: transport_name.to_string(), seconds, failure });
    }
    let Some(connection) = found else {
        match first_failure {
            Some(error) => return Err(error.into()),
            None => bail!("no transport was tried"),
        }
    };
    let mut prober = Prober::new(&connection).await?;
    tell("measuring the round-trip time");
    let (rtts, skew_seconds) = prober.ping().await?;
    tell("measuring the target's store");
    let disk = prober.ask(ProbeRequest { disk: true, ..ProbeRequest::default() }).await?;
    ensure!(disk.disk_failure.is_empty(), "the target's store: {}", disk.disk_failure);
    tell("measuring the way to the target");
    let up = prober.up(&connection, time).await?;
    tell("measuring the way back");
    let down_bytes_per_second = prober.down(&connection, time).await?;
    connection.close("the probe is over");
    let disk_bytes_per_second = disk.disk_bytes_per_second;
    let limit = Limit::of(&Measured {
        up_bytes_per_second: up.bytes_per_second,
        starved_share: up.starved_share,
        disk_bytes_per_second,
        dropped_datagrams: up.dropped_datagrams,
        cpu_percent: up.cpu_percent,
    });
    Ok(Report {
        target: config.target.clone(),
        name: connection.peer().to_string(),
        reach,
        transport: connection.transport().to_string(),
        rtt_seconds: (rtts[0], rtts[rtts.len() / 2]),
        clock_skew_seconds: skew_seconds,
        mtu_bytes: up.mtu_bytes,
        lost_share: up.lost_share,
        up_bytes_per_second: up.bytes_per_second,
        down_bytes_per_second,
        disk_bytes_per_second,
        loaded_rtt_seconds: up.rtt_seconds,
        limit,
    })
}

/// What the way up came to.
struct Up {
    bytes_per_second: f64,
    rtt_seconds: (f64, f64),
    lost_share: f64,
    starved_share: f64,
    mtu_bytes: u16,
    dropped_datagrams: u64,
    cpu_percent: u64,
}

/// A question and its answer.
#[derive(Debug, Clone, Copy)]
struct Ping {
    rtt_seconds: f64,
    /// How far the answer's clock is ahead of this one, if it took as long there as back.
    skew_seconds: f64,
}

impl Ping {
    /// `sent_us` is this end's clock, in microseconds since 1970 UTC, when the question was sent; the
    /// reply was here `rtt` later.
    fn of(sent_us: u64, rtt: Duration, reply: &ProbeReply) -> Self {
        let rtt_seconds = rtt.as_secs_f64();
        let ahead_seconds = (reply.now_us as f64 - sent_us as f64) / 1e6;
        Self { rtt_seconds, skew_seconds: ahead_seconds - rtt_seconds / 2.0 }
    }

    /// Round-trip times in order, and the clock's skew as the shortest has it: in the others, one of
    /// the ways took longer.
    fn judge(mut pings: Vec<Self>) -> (Vec<f64>, f64) {
        pings.sort_by(|a, b| a.rtt_seconds.total_cmp(&b.rtt_seconds));
        let skew_seconds = pings.first().map_or(0.0, |ping| ping.skew_seconds);
        (pings.into_iter().map(|ping| ping.rtt_seconds).collect(), skew_seconds)
    }
}

/// The figure that this share of the sorted ones does not exceed.
fn share(sorted: &[f64], share: f64) -> f64 {
    let index = (sorted.len() as f64 * share) as usize;
    sorted.get(index.min(sorted.len().saturating_sub(1))).copied().unwrap_or_default()
}

/// The control stream of a probe.
struct Prober {
    sender: FrameSender,
    receiver: FrameReceiver,
    _sync: (FrameSender, FrameReceiver),
    asked: u64,
    answered: u64,
}

impl Prober {
    async fn new(connection: &Connection) -> anyhow::Result<Self> {
        let (sender, receiver) = connection.open_control().await?;
        let sync = connection.open_sync().await?;
        Ok(Self { sender, receiver, _sync: sync, asked: 0, answered: 0 })
    }

    async fn ask(&mut self, request: ProbeRequest) -> anyhow::Result<ProbeReply> {
        self.send(request).await?;
        self.reply().await
    }

    async fn send(&mut self, request: ProbeRequest) -> anyhow::Result<()> {
        self.asked += 1;
        let request = ProbeRequest { nonce: self.asked, ..request };
        let kind = Some(agent_message::Kind::Probe(request));
        Ok(self.sender.send(&AgentMessage { kind }).await?)
    }

    /// The answer to the oldest question that has none. Cancel safe.
    async fn reply(&mut self) -> anyhow::Result<ProbeReply> {
        let message = self.receiver.recv::<TargetMessage>().await?;
        self.answered += 1;
        match message.context("the target ended the probe")?.kind {
            Some(target_message::Kind::Probe(reply)) if reply.nonce == self.answered => Ok(reply),
            _ => bail!("the target does not know probes; update it"),
        }
    }

    /// Round-trip times in order, and the clock's skew at the shortest.
    async fn ping(&mut self) -> anyhow::Result<(Vec<f64>, f64)> {
        let mut pings = Vec::new();
        for _ in 0..PINGS {
            let (began, sent_us) = (Instant::now(), now_us());
            let reply = self.ask(ProbeRequest::default()).await?;
            pings.push(Ping::of(sent_us, began.elapsed(), &reply));
        }
        Ok(Ping::judge(pings))
    }

    async fn up(&mut self, connection: &Connection, time: Duration) -> anyhow::Result<Up> {
        let flooding = connection.clone();
        let flood = tokio::spawn(async move { probe::flood(&flooding, time).await });
        // The rate is found in this time, and measured after it.
        tokio::time::sleep(time / SETTLE_SHARE).await;
        let before = self.ask(ProbeRequest::default()).await?;
        let (began, stats, cpu) = (Instant::now(), connection.stats(), cpu_time());
        let window = connection.congestion();
        let (mut rtts, mut last, mut last_at) = (Vec::new(), before.clone(), began);
        let mut target_cpu = Vec::new();
        let measured = time - time / SETTLE_SHARE;
        let (mut period, mut asked) = (tokio::time::interval(ASK_PERIOD), VecDeque::new());
        while began.elapsed() < measured {
            tokio::select! {
                _ = period.tick() => {
                    asked.push_back(Instant::now());
                    self.send(ProbeRequest::default()).await?;
                }
                reply = self.reply() => {
                    (last, last_at) = (reply?, Instant::now());
                    let asked_at = asked.pop_front().unwrap_or(began);
                    rtts.push(last_at.duration_since(asked_at).as_secs_f64());
                    target_cpu.push(last.cpu_percent);
                }
            }
        }
        let seconds = last_at.duration_since(began).as_secs_f64().max(1e-3);
        let after = connection.stats();
        let starved_share = match (window, connection.congestion()) {
            (Some(before), Some(after)) => {
                // A lane that went away meanwhile took its counts with it.
                let acked = after.acked_bytes.saturating_sub(before.acked_bytes).max(1);
                let starved = after.starved_bytes.saturating_sub(before.starved_bytes);
                starved.min(acked) as f64 / acked as f64
            }
            _ => 0.0,
        };
        let own_cpu = ((cpu_time() - cpu).as_secs_f64() / seconds * 100.0) as u64;
        while self.answered < self.asked {
            self.reply().await?;
        }
        flood.await??;
        rtts.sort_by(f64::total_cmp);
        target_cpu.sort_unstable();
        let packets = after.sent_packets.saturating_sub(stats.sent_packets).max(1);
        Ok(Up {
            bytes_per_second: last.received_bytes.saturating_sub(before.received_bytes) as f64
                / seconds,
            rtt_seconds: (share(&rtts, 0.5), share(&rtts, 0.99)),
            lost_share: after.lost_packets.saturating_sub(stats.lost_packets) as f64
                / packets as f64,
            starved_share,
            mtu_bytes: after.mtu_bytes,
            dropped_datagrams: last.dropped_datagrams.saturating_sub(before.dropped_datagrams),
            cpu_percent: target_cpu
                .get(target_cpu.len() / 2)
                .copied()
                .unwrap_or_default()
                .max(own_cpu),
        })
    }

    async fn down(&mut self, connection: &Connection, time: Duration) -> anyhow::Result<f64> {
        let received = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&received);
        let measure = async {
            let download_ms = time.as_millis() as u64;
            self.ask(ProbeRequest { download_ms, ..ProbeRequest::default() }).await?;
            // As on the way up: found first, then measured for the rest of the time.
            tokio::time::sleep(time / SETTLE_SHARE).await;
            let (began, before) = (Instant::now(), received.load(Ordering::Relaxed));
            // A rate is bytes over a time: this is that time.
            tokio::time::sleep(time - time / SETTLE_SHARE).await;
            let bytes = received.load(Ordering::Relaxed) - before;
            anyhow::Ok(bytes as f64 / began.elapsed().as_secs_f64())
        };
        tokio::select! {
            rate = measure => rate,
            ended = probe::drain(connection, counted) => {
                ended?;
                bail!("the target ended the probe")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use backhaul_proto::message::ProbeReply;

    use super::Ping;

    /// 2026-11-27, in microseconds.
    const NOW_US: u64 = 1_795_737_600_000_000;

    /// Both ends of every other test share a clock, on which an answer that is always 0 would pass.
    #[test]
    fn a_clock_that_is_ahead_or_behind_is_said_to_be() {
        for (skew_seconds, skew_us) in [(7.0, 7_000_000), (-7.0, -7_000_000), (0.0, 0)] {
            // The target reads its clock when half of the 80 ms are over.
            let ping = |rtt_ms: u64, target_us: i64| {
                let now_us = NOW_US.saturating_add_signed(skew_us + target_us);
                let reply = ProbeReply { now_us, ..ProbeReply::default() };
                Ping::of(NOW_US, Duration::from_millis(rtt_ms), &reply)
            };
            // Those that took longer, there or back, would say something else.
            let pings = vec![ping(480, 440_000), ping(80, 40_000), ping(980, 40_000)];
            let (rtts, found_seconds) = Ping::judge(pings);
            assert_eq!(rtts, [0.08, 0.48, 0.98]);
            assert!((found_seconds - skew_seconds).abs() < 1e-6, "{found_seconds}");
        }
    }
}
