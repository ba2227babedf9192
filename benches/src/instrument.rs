//! Whether the emulated link is what it says: iperf3's UDP over it without loss.

use backhaul_lab::link::Link;

use crate::sample::Sample;
use crate::{Span, rivals};

/// Rates and one-way delays of the links that are measured elsewhere.
const LINKS: [&str; 4] = ["50mbit,100ms", "200mbit,40ms", "500mbit,20ms", "1gbit,20ms"];
/// Headers of a datagram, and of IPv4: the rate is one of whole packets.
const HEADER_BYTES: f64 = 28.0;

/// Measures each link, `runs` times, and prints a table.
pub fn run(runs: usize, span: &Span) -> anyhow::Result<()> {
    println!(
        "| link without loss | UDP packets delivered, share of the rate | handed over late by more than 1 ms | at most |"
    );
    println!("| --- | --- | --- | --- |");
    for spec in LINKS {
        let (mut share, mut late, mut latest): (Sample, Sample, Sample) = Default::default();
        for _ in 0..runs {
            let link = Link::start(spec.parse()?)?;
            let (rate, _) = rivals::iperf3_udp(&link, span)?;
            let mtu = f64::from(link.spec().mtu_bytes);
            let rate_bits = rate * 8.0 * mtu / (mtu - HEADER_BYTES);
            let stats = link.stats().up;
            anyhow::ensure!(stats.dropped_by_limit == 0, "the emulation itself dropped packets");
            share.push(rate_bits / link.spec().up.rate.0 as f64 * 100.0);
            late.push(stats.late_packets as f64 / stats.delivered_packets.max(1) as f64 * 100.0);
            latest.push(stats.late_nanos_max as f64 * 1e-6);
        }
        println!("| {spec} | {share:.1} % (goal 98 to 102) | {late:.2} % | {latest:.1} ms |");
    }
    Ok(())
}
