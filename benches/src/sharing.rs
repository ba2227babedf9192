//! A link shared with one flow of kernel TCP: the whole pipeline, or a bare transport, beside iperf3.

use std::path::Path;
use std::time::Duration;

use anyhow::ensure;
use backhaul_lab::link::{Link, LinkSpec};

use crate::peer::Peer;
use crate::record::{Change, Record};
use crate::sample::Sample;
use crate::transfer::Transfer;
use crate::{Span, links, pipeline, plot, rivals};

/// How long the first of the two has the link for itself: long enough to have filled it. The wait is
/// part of what is measured, so nothing announces its end.
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

/// What to measure.
#[derive(Debug)]
pub struct Sharing {
    /// The link that is shared.
    pub link: LinkSpec,
    /// Only rows whose name contains this.
    pub only: String,
    /// Who shares it with TCP: `backhaul`, the whole pipeline, or a kind of the example `transfer`.
    pub contenders: Vec<String>,
}

/// Measures every rival in both orders; prints a table and charts.
pub async fn run(dir: &Path, runs: usize, span: &Span, what: &Sharing) -> anyhow::Result<()> {
    println!(
        "| {}: beside TCP | sender | its share (goal 30 to 70 %) | its least in {HUNGER_SECONDS} s | TCP's least in {HUNGER_SECONDS} s | line filled |",
        links::name(&what.link)
    );
    println!("| --- | --- | --- | --- | --- | --- |");
    let mut charts = String::new();
    for rival in ["cubic", "bbr"] {
        for first in [First::Theirs, First::Ours] {
            let name = match first {
                First::Ours => format!("{rival}, which comes to a full line"),
                First::Theirs => format!("{rival}, which is there before"),
            };
            if name.contains(&what.only) {
                charts += &rows(dir, runs, span, what, &name, (rival, first)).await?;
            }
        }
    }
    println!("\n{charts}");
    Ok(())
}

/// One order of one rival: a row for each contender, and the charts.
async fn rows(
    dir: &Path,
    runs: usize,
    span: &Span,
    what: &Sharing,
    name: &str,
    (rival, first): (&str, First),
) -> anyhow::Result<String> {
    let mut samples = vec![<[Sample; 4]>::default(); what.contenders.len()];
    let mut charts = vec![String::new(); what.contenders.len()];
    for _ in 0..runs {
        for (index, contender) in what.contenders.iter().enumerate() {
            let record = measure(dir, span, &what.link, contender, rival, first).await?;
            let figures = shares(&record, span, &what.link);
            eprintln!("{name}: {contender}: {:.1} %, line {:.1} %", figures[0], figures[3]);
            for (sample, figure) in samples[index].iter_mut().zip(figures) {
                sample.push(figure);
            }
            let title = format!("Beside TCP {name}: {contender}, then TCP");
            charts[index] = chart(&title, &record.windows(STEP_SECONDS));
        }
    }
    for (contender, [ours, our_least, their_least, filled]) in what.contenders.iter().zip(&samples)
    {
        println!(
            "| {name} | {contender} | {ours:.1} % | {our_least:.1} % | {their_least:.1} % | {filled:.1} % |"
        );
    }
    Ok(charts.concat())
}

async fn measure(
    dir: &Path,
    span: &Span,
    spec: &LinkSpec,
    contender: &str,
    rival: &str,
    first: First,
) -> anyhow::Result<Record> {
    let folder = tempfile::tempdir_in(dir)?;
    // Alone it may have the whole line, and beside another nearly so.
    let seconds = (LEAD + span.whole()).as_secs() + 5;
    let start_rival = |link: &Link| {
        let mut client = rivals::iperf3_client(link, seconds + 30);
        Peer::start(client.args(["-C", rival]))
    };
    if contender == "backhaul" {
        let disk = pipeline::noise(dir, spec.up.rate.0 / 8 * seconds)?;
        let mut rig = pipeline::prepare(folder.path(), &disk, spec, String::new()).await?;
        let _server = rivals::iperf3_server(pipeline::link(&rig)?)?;
        let other = match first {
            First::Theirs => {
                let other = start_rival(pipeline::link(&rig)?)?;
                // The time itself is the condition: the other one is alone for so long.
                tokio::time::sleep(LEAD).await;
                pipeline::begin(&mut rig).await?;
                other
            }
            First::Ours => {
                pipeline::begin(&mut rig).await?;
                tokio::time::sleep(LEAD).await;
                start_rival(pipeline::link(&rig)?)?
            }
        };
        let record = watch(pipeline::link(&rig)?, span, other).await?;
        pipeline::ensure_busy(&rig).await?;
        return Ok(record);
    }
    let link = Link::start(spec.clone())?;
    let _server = rivals::iperf3_server(&link)?;
    let start_ours = || Transfer::start(contender, Some(&link), folder.path());
    let (_ours, other) = match first {
        First::Theirs => {
            let other = start_rival(&link)?;
            tokio::time::sleep(LEAD).await;
            (start_ours()?, other)
        }
        First::Ours => {
            let ours = start_ours()?;
            tokio::time::sleep(LEAD).await;
            (ours, start_rival(&link)?)
        }
    };
    watch(&link, span, other).await
}

async fn watch(link: &Link, span: &Span, mut other: Peer) -> anyhow::Result<Record> {
    let record = Record::of(link, GRAIN, span.whole(), |_| false).await;
    ensure!(other.is_running()?, "iperf3 ended before it was measured");
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

fn chart(title: &str, steps: &[Change]) -> String {
    let mbit = |bytes: u64, seconds: f64| bytes as f64 * 8e-6 / seconds;
    let theirs: Vec<_> = steps.iter().map(|step| mbit(step.tcp_bytes, step.seconds)).collect();
    let ours: Vec<_> = steps
        .iter()
        .map(|step| mbit(step.delivered_bytes - step.tcp_bytes, step.seconds))
        .collect();
    let most = ours.iter().chain(&theirs).copied().fold(0.0, f64::max);
    plot::lines(title, "seconds", "Mbit/s", most, &[ours, theirs]) + "\n"
}

const GRAIN: Duration = Duration::from_millis(100);
