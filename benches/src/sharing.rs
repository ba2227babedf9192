//! A link shared with one flow of kernel TCP: the whole pipeline beside iperf3.

use std::path::Path;
use std::time::Duration;

use anyhow::ensure;
use backhaul_lab::link::LinkSpec;
use backhaul_lab::rig::Rig;

use crate::peer::Peer;
use crate::record::{Change, Record};
use crate::sample::Sample;
use crate::{Span, links, pipeline, plot, rivals};

/// How long the first of the two has the link for itself: long enough to have filled it.
const LEAD: Duration = Duration::from_secs(5);
/// Starvation is judged over so many seconds.
const HUNGER_SECONDS: f64 = 5.0;
/// What is drawn and what a share is taken of, in seconds.
const STEP_SECONDS: f64 = 1.0;

/// Who has the link first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum First {
    Ours,
    Theirs,
}

/// Measures every rival in both orders, of which those whose names contain `only`; prints a table
/// and charts.
pub async fn run(
    dir: &Path,
    runs: usize,
    span: &Span,
    spec: &LinkSpec,
    only: &str,
) -> anyhow::Result<()> {
    println!(
        "| {}: beside TCP | our share (goal 30 to 70 %) | our least in {HUNGER_SECONDS} s | its least in {HUNGER_SECONDS} s | line filled |",
        links::name(spec)
    );
    println!("| --- | --- | --- | --- | --- |");
    let mut charts = String::new();
    for rival in ["cubic", "bbr"] {
        for first in [First::Theirs, First::Ours] {
            let name = match first {
                First::Ours => format!("{rival}, which comes to a full line"),
                First::Theirs => format!("{rival}, which is there before"),
            };
            if !name.contains(only) {
                continue;
            }
            let mut samples = <[Sample; 4]>::default();
            let mut drawn = Vec::new();
            for _ in 0..runs {
                let record = measure(dir, span, spec, rival, first).await?;
                let figures = shares(&record, span, spec);
                eprintln!("{name}: {:.1} % ours, the line {:.1} % filled", figures[0], figures[3]);
                for (sample, figure) in samples.iter_mut().zip(figures) {
                    sample.push(figure);
                }
                drawn = record.windows(STEP_SECONDS);
            }
            let [ours, our_least, their_least, filled] = &samples;
            println!(
                "| {name} | {ours:.1} % | {our_least:.1} % | {their_least:.1} % | {filled:.1} % |"
            );
            charts += &chart(&name, &drawn);
        }
    }
    println!("\n{charts}");
    Ok(())
}

async fn measure(
    dir: &Path,
    span: &Span,
    spec: &LinkSpec,
    rival: &str,
    first: First,
) -> anyhow::Result<Record> {
    let folder = tempfile::tempdir_in(dir)?;
    // Alone it may have the whole line, and beside another nearly so.
    let seconds = (LEAD + span.whole()).as_secs() + 5;
    let disk = pipeline::noise(dir, spec.up.rate.0 / 8 * seconds)?;
    let mut rig = pipeline::prepare(folder.path(), &disk, spec, String::new()).await?;
    let _server = rivals::iperf3_server(pipeline::link(&rig)?)?;
    let start_rival = |rig: &Rig| {
        let mut client = rivals::iperf3_client(pipeline::link(rig)?, seconds + 30);
        Peer::start(client.args(["-C", rival]))
    };
    let mut other = match first {
        First::Theirs => {
            let other = start_rival(&rig)?;
            tokio::time::sleep(LEAD).await;
            pipeline::begin(&mut rig).await?;
            other
        }
        First::Ours => {
            pipeline::begin(&mut rig).await?;
            tokio::time::sleep(LEAD).await;
            start_rival(&rig)?
        }
    };
    let grain = Duration::from_millis(100);
    let record = Record::of(pipeline::link(&rig)?, grain, span.whole(), |_| false).await;
    ensure!(other.is_running()?, "iperf3 ended before it was measured");
    pipeline::ensure_busy(&rig).await?;
    Ok(record)
}

/// In percent: our share after the settling, the least of it, the least of theirs, and how much of
/// the line both fill.
fn shares(record: &Record, span: &Span, spec: &LinkSpec) -> [f64; 4] {
    let steps = record.windows(STEP_SECONDS);
    let settled: Vec<_> = steps.into_iter().skip(span.settle.as_secs() as usize).collect();
    let ours = |steps: &[Change]| {
        let bytes = |of: fn(&Change) -> u64| steps.iter().map(of).sum::<u64>() as f64;
        1.0 - bytes(|step| step.tcp_bytes) / bytes(|step| step.delivered_bytes).max(1.0)
    };
    let hunger = (HUNGER_SECONDS / STEP_SECONDS) as usize;
    let least = settled.windows(hunger).map(ours).fold(1.0, f64::min);
    let most = settled.windows(hunger).map(ours).fold(0.0, f64::max);
    let bits: f64 = settled.iter().map(Change::delivered_bits_per_second).sum();
    let filled = bits / settled.len().max(1) as f64 / spec.up.rate.0 as f64;
    [ours(&settled), least, 1.0 - most, filled].map(|share| share * 100.0)
}

fn chart(name: &str, steps: &[Change]) -> String {
    let mbit = |bytes: u64, seconds: f64| bytes as f64 * 8e-6 / seconds;
    let theirs: Vec<_> = steps.iter().map(|step| mbit(step.tcp_bytes, step.seconds)).collect();
    let ours: Vec<_> = steps
        .iter()
        .map(|step| mbit(step.delivered_bytes - step.tcp_bytes, step.seconds))
        .collect();
    let most = ours.iter().chain(&theirs).copied().fold(0.0, f64::max);
    let title = format!("Beside TCP {name}: Backhaul, then TCP");
    plot::lines(&title, "seconds", "Mbit/s", most, &[ours, theirs]) + "\n"
}
