//! How long a recovery point takes while another machine's data fill the line.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use backhaul_api::Client;
use backhaul_lab::link::LinkSpec;
use backhaul_lab::rig::{MACHINE, Rig, RigSpec};
use tokio::task::JoinSet;

use crate::Span;
use crate::links::LINKS;
use crate::peer::START_TIME_MAX;
use crate::pipeline;
use crate::record::Record;
use crate::sample::Sample;

/// The machine that is tagged.
const QUIET: &str = "quiet";
const QUIET_BYTES: u64 = 16 << 20;

/// How often it is, whether or not the points before are there.
const PERIOD: Duration = Duration::from_millis(50);

/// Measures the links whose names contain `only`, `runs` times each, over `transport`; prints a table.
pub async fn run(
    dir: &Path,
    runs: usize,
    span: &Span,
    only: &str,
    transport: &str,
) -> anyhow::Result<()> {
    println!(
        "| link | a point on the idle line, median | on the full one | 99th percentile | goal | it was full to |"
    );
    println!("| --- | --- | --- | --- | --- | --- |");
    for (name, spec, _) in LINKS.iter().filter(|(name, ..)| name.contains(only)) {
        let mut spec: LinkSpec = spec.parse()?;
        let [mut idle, mut median, mut worst, mut filled]: [Sample; 4] = Default::default();
        for run in 0..runs {
            // Every run loses other packets.
            spec.seed = 1 + run as u64;
            let ([alone, full], share) =
                measure(dir, &spec, span, transport).await.context(*name)?;
            idle.push(percentile(&alone, 0.5));
            median.push(percentile(&full, 0.5));
            worst.push(percentile(&full, 0.99));
            filled.push(share * 100.0);
        }
        let round_trip = (spec.up.delay + spec.down.delay).as_secs_f64() * 1e3;
        let goal = round_trip * 1.5 + 5.0;
        println!(
            "| {name} | {idle:.1} ms | {median:.1} ms | {worst:.1} ms | {goal:.0} ms | {filled:.1} % |"
        );
    }
    Ok(())
}

fn percentile(sorted: &[f64], share: f64) -> f64 {
    let index = (sorted.len() as f64 * share) as usize;
    sorted.get(index.min(sorted.len().saturating_sub(1))).copied().unwrap_or(f64::NAN)
}

/// Milliseconds of each point, sorted: while the other machine has nothing to send, and while it has; and what
/// share of its rate the line then delivered.
async fn measure(
    dir: &Path,
    spec: &LinkSpec,
    span: &Span,
    transport: &str,
) -> anyhow::Result<([Vec<f64>; 2], f64)> {
    let bytes = spec.up.rate.0 / 8 * (span.settle + span.measure).as_secs() * 5 / 4;
    let noise = pipeline::noise(dir, bytes)?;
    let (mut both, mut share) = ([Vec::new(), Vec::new()], 0.0);
    for (times, loaded) in both.iter_mut().zip([false, true]) {
        let folder = tempfile::tempdir_in(dir)?;
        let [small, quiet] = ["small.raw", "quiet.raw"].map(|name| folder.path().join(name));
        for disk in [&small, &quiet] {
            File::create(disk)?.set_len(QUIET_BYTES)?;
        }
        let mut rig_spec = RigSpec::new(folder.path(), if loaded { &noise } else { &small })?;
        rig_spec.link = Some(spec.clone());
        rig_spec.transport = transport.into();
        rig_spec.others = vec![(QUIET.into(), quiet)];
        let mut rig = Rig::prepare(rig_spec)?;
        rig.start_target()?;
        rig.start_agent()?;
        let begun = |machine: &backhaul_api::Machine| machine.connected;
        rig.wait("a connection", START_TIME_MAX, begun).await?;
        // The load is to be steady; nothing tells when it is.
        tokio::time::sleep(span.settle).await;
        let (line, whole) = (pipeline::link(&rig)?, |_: &Record| false);
        let (all, seen) = tokio::join!(
            points(rig.client(), span.measure),
            Record::of(line, span.measure, span.measure, whole)
        );
        *times = all?;
        share = seen.whole().delivered_bits_per_second() / spec.up.rate.0 as f64;
        if loaded {
            let machine = rig.client().machine(MACHINE).await?;
            ensure!(machine.dirty_bytes > 0, "the disk was too small for this link");
        }
    }
    Ok((both, share))
}

/// Tags the quiet machine for so long.
async fn points(client: &Client, time: Duration) -> anyhow::Result<Vec<f64>> {
    let (began, mut period) = (Instant::now(), tokio::time::interval(PERIOD));
    let mut tags = JoinSet::new();
    while began.elapsed() < time {
        period.tick().await;
        let client = client.clone();
        tags.spawn(async move {
            let asked = Instant::now();
            client.tag(QUIET).await.map(|_| asked.elapsed().as_secs_f64() * 1e3)
        });
    }
    let mut times = Vec::new();
    while let Some(tagged) = tags.join_next().await {
        times.push(tagged??);
    }
    times.sort_by(f64::total_cmp);
    Ok(times)
}
