//! How much of a long, lossy link is filled with payload: the whole pipeline (capture, TLS, journal,
//! apply) against what an operator would use instead, over the emulated link.
//!
//! Everything sends incompressible data. The first seconds are left out. Backhaul is measured by what
//! its target has received of the disk; iperf3 by what its server counted; bare quinn and noq by what
//! their receiver counted; rsync and nbdcopy, which report nothing meanwhile, by the bytes that the
//! link delivered, less the 52 bytes of IP and TCP headers of each packet.

use std::path::Path;

use anyhow::Context;
use backhaul_lab::link::{Link, LinkSpec};
use backhaul_lab::steal::Stolen;

use crate::sample::Sample;
use crate::{Span, pipeline, plot, rivals};

/// The links of the table: name, specification (one-way delay), goal as a share of the rate.
pub const LINKS: [(&str, &str, f64); 5] = [
    ("500 Mbit/s, 40 ms, 0.1 %", "500mbit,20ms,0.1%", 0.90),
    ("500 Mbit/s, 100 ms, 1 %", "500mbit,50ms,1%", 0.88),
    ("200 Mbit/s, 80 ms, 0.5 %", "200mbit,40ms,0.5%", 0.90),
    ("50 Mbit/s, 200 ms, 2 %", "50mbit,100ms,2%", 0.85),
    ("1 Gbit/s, 40 ms, 0.1 %", "1gbit,20ms,0.1%", 0.90),
];

/// Who is measured.
pub const CONTENDERS: [&str; 10] = [
    "backhaul",
    "quinn-cubic",
    "bare-quinn-cubic",
    "bare-quinn-bbr",
    "bare-noq-bbr3",
    "iperf3-cubic",
    "iperf3-bbr",
    "iperf3-udp",
    "rsync",
    "nbdcopy-tls",
];

/// Runs the contenders on the links whose names contain `only`, and prints a table and a chart of
/// each link.
pub async fn run(
    dir: &Path,
    runs: usize,
    span: &Span,
    only: &str,
    contenders: &[String],
) -> anyhow::Result<()> {
    let contenders: Vec<&str> = if contenders.is_empty() {
        CONTENDERS.to_vec()
    } else {
        contenders.iter().map(String::as_str).collect()
    };
    println!("| link | {} |", contenders.join(" | "));
    println!("| --- |{}", " --- |".repeat(contenders.len()));
    let mut charts = String::new();
    for (name, spec, goal) in LINKS.iter().filter(|(name, ..)| name.contains(only)) {
        let spec: LinkSpec = spec.parse()?;
        let rate_bytes = spec.up.rate.0 / 8;
        // More than the link carries meanwhile: what the transport holds at the end must not be the last.
        let disk = pipeline::noise(dir, rate_bytes * (span.whole().as_secs() + 5) * 13 / 10)?;
        let mut samples = vec![Sample::default(); contenders.len()];
        for _ in 0..runs {
            for (contender, sample) in contenders.iter().zip(&mut samples) {
                let stolen = Stolen::from_now();
                let rate = measure(dir, &disk, &spec, contender, span).await;
                let rate = rate.with_context(|| format!("{contender} on {name}"))?;
                let share = rate / rate_bytes as f64;
                let taken = stolen.share() * 100.0;
                eprintln!(
                    "{name}: {contender}: {:.1} % (the hypervisor took {taken:.0} % of the processors)",
                    share * 100.0
                );
                sample.push(share * 100.0);
            }
        }
        let cells: Vec<_> = samples.iter().map(|sample| format!("{sample:.1} %")).collect();
        println!("| {name} (goal {:.0} %) | {} |", goal * 100.0, cells.join(" | "));
        let title = format!("{name} loss: share of the line filled with payload");
        let medians: Vec<_> = samples.iter().map(Sample::median).collect();
        charts += &plot::bars(&title, "percent", 100.0, &contenders, &medians);
        charts += "\n";
    }
    println!("\n{charts}");
    Ok(())
}

/// A link in words: rate, round trip, loss towards site B.
pub fn name(spec: &LinkSpec) -> String {
    let (rate, round_trip) = (spec.up.rate.0 as f64 * 1e-6, spec.up.delay + spec.down.delay);
    format!("{rate} Mbit/s, {} ms, {}", round_trip.as_millis(), spec.up.loss)
}

async fn measure(
    dir: &Path,
    disk: &Path,
    spec: &LinkSpec,
    contender: &str,
    span: &Span,
) -> anyhow::Result<f64> {
    let folder = tempfile::tempdir_in(dir)?;
    let dir = folder.path();
    match contender {
        "backhaul" => pipeline::bytes_per_second(dir, disk, spec, "auto", span).await,
        "quinn-cubic" => pipeline::bytes_per_second(dir, disk, spec, "cubic", span).await,
        "iperf3-cubic" => rivals::iperf3_tcp(spec, "cubic", span),
        "iperf3-bbr" => rivals::iperf3_tcp(spec, "bbr", span),
        "iperf3-udp" => Ok(rivals::iperf3_udp(&Link::start(spec.clone())?, span)?.0),
        "rsync" => rivals::rsync(dir, disk, spec, span),
        "nbdcopy-tls" => rivals::nbdcopy(dir, disk, spec, span),
        other => match other.strip_prefix("bare-") {
            Some(kind) => rivals::bare(dir, spec, kind, span),
            None => anyhow::bail!("no contender is called {other}; there are {CONTENDERS:?}"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::name;

    #[test]
    fn a_link_is_named_as_in_the_reports() {
        assert_eq!(name(&"200mbit,40ms,0.5%".parse().unwrap()), "200 Mbit/s, 80 ms, 0.5%");
    }
}
