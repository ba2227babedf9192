//! How long a recovery point, and the acknowledgement of what it ends with, take while another machine's data
//! fill the line.

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

/// What the agent is to log: when batches were acknowledged, too.
const LOG: &str = "info,backhaul_agent::agent::batches=trace";

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
        "| link | a point on the idle line, median | on the full one | 99th percentile | an acknowledgement there, median | 99th percentile | goal | it was full to |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    for (name, spec, _) in LINKS.iter().filter(|(name, ..)| name.contains(only)) {
        let mut spec: LinkSpec = spec.parse()?;
        let [mut idle, mut median, mut worst, mut filled]: [Sample; 4] = Default::default();
        let [mut acked, mut acked_worst]: [Sample; 2] = Default::default();
        for run in 0..runs {
            // Every run loses other packets.
            spec.seed = 1 + run as u64;
            let [alone, full] = measure(dir, &spec, span, transport).await.context(*name)?;
            idle.push(percentile(&alone.points, 0.5));
            median.push(percentile(&full.points, 0.5));
            worst.push(percentile(&full.points, 0.99));
            acked.push(percentile(&full.acknowledgements, 0.5));
            acked_worst.push(percentile(&full.acknowledgements, 0.99));
            filled.push(full.share * 100.0);
        }
        let round_trip = (spec.up.delay + spec.down.delay).as_secs_f64() * 1e3;
        let goal = round_trip * 1.5 + 5.0;
        println!(
            "| {name} | {idle:.1} ms | {median:.1} ms | {worst:.1} ms | {acked:.1} ms | {acked_worst:.1} ms | {goal:.0} ms | {filled:.1} % |"
        );
    }
    Ok(())
}

fn percentile(sorted: &[f64], share: f64) -> f64 {
    let index = (sorted.len() as f64 * share) as usize;
    sorted.get(index.min(sorted.len().saturating_sub(1))).copied().unwrap_or(f64::NAN)
}

/// What was seen of the quiet machine.
#[derive(Default)]
struct Seen {
    /// Milliseconds of each point, from asking the target for it until it is durable, sorted.
    points: Vec<f64>,
    /// Milliseconds from the sending of each batch until the agent has its acknowledgement, sorted.
    acknowledgements: Vec<f64>,
    /// The share of its rate that the line delivered.
    share: f64,
}

/// While the other machine has nothing to send, and while it has.
async fn measure(
    dir: &Path,
    spec: &LinkSpec,
    span: &Span,
    transport: &str,
) -> anyhow::Result<[Seen; 2]> {
    let bytes = spec.up.rate.0 / 8 * (span.settle + span.measure).as_secs() * 5 / 4;
    let noise = pipeline::noise(dir, bytes)?;
    let mut both = [Seen::default(), Seen::default()];
    for (seen, loaded) in both.iter_mut().zip([false, true]) {
        let folder = tempfile::tempdir_in(dir)?;
        let [small, quiet] = ["small.raw", "quiet.raw"].map(|name| folder.path().join(name));
        for disk in [&small, &quiet] {
            File::create(disk)?.set_len(QUIET_BYTES)?;
        }
        let mut rig_spec = RigSpec::new(folder.path(), if loaded { &noise } else { &small })?;
        rig_spec.link = Some(spec.clone());
        rig_spec.transport = transport.into();
        rig_spec.others = vec![(QUIET.into(), quiet)];
        rig_spec.log = LOG.into();
        let mut rig = Rig::prepare(rig_spec)?;
        rig.start_target()?;
        rig.start_agent()?;
        let begun = |machine: &backhaul_api::Machine| machine.connected;
        rig.wait("a connection", START_TIME_MAX, begun).await?;
        // The load is to be steady; nothing tells when it is.
        tokio::time::sleep(span.settle).await;
        let (line, whole) = (pipeline::link(&rig)?, |_: &Record| false);
        let log = folder.path().join("agent.log");
        let log_from = std::fs::metadata(&log)?.len() as usize;
        let (points, record) = tokio::join!(
            points(rig.client(), span.measure),
            Record::of(line, span.measure, span.measure, whole)
        );
        let share = record.whole().delivered_bits_per_second() / spec.up.rate.0 as f64;
        let said = std::fs::read_to_string(&log)?.split_off(log_from);
        *seen = Seen { points: points?, acknowledgements: acknowledgements(&said), share };
        ensure!(!seen.acknowledgements.is_empty(), "the agent's log has no acknowledgement");
        if loaded {
            let machine = rig.client().machine(MACHINE).await?;
            ensure!(machine.dirty_bytes > 0, "the disk was too small for this link");
        }
    }
    Ok(both)
}

/// What the agent's log has of the quiet machine, in milliseconds, sorted.
fn acknowledgements(log: &str) -> Vec<f64> {
    let of_quiet = log.lines().filter(|line| line.contains(&format!("machine=\"{QUIET}\"")));
    let seconds = of_quiet.filter_map(|line| {
        let (_, rest) = line.split_once(" acknowledged ")?;
        rest.split_once("seconds=")?.1.split(' ').next()?.parse::<f64>().ok()
    });
    let mut times: Vec<_> = seconds.map(|seconds| seconds * 1e3).collect();
    times.sort_by(f64::total_cmp);
    times
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
