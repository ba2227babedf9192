//! A link that loses nothing by itself: what a sender loses and delays by its own queue.

use std::path::Path;

use backhaul_lab::link::{Link, LinkSpec, Probability};

use crate::record::{Change, Record};
use crate::sample::Sample;
use crate::transfer::Transfer;
use crate::{Span, links, pipeline};

/// The first is the whole pipeline, the others are bare transports.
const CONTENDERS: [&str; 3] = ["backhaul", "quinn-bbr", "noq-bbr3"];

/// Measures every contender on the links of the report whose names contain `only`, without their
/// loss, `runs` times each; prints a table.
pub async fn run(dir: &Path, runs: usize, span: &Span, only: &str) -> anyhow::Result<()> {
    println!(
        "| clean link | sender | dropped by the queue (goal ≤ 1 %) | with the start | standing queue (goal ≤ 15 ms) | line filled |"
    );
    println!("| --- | --- | --- | --- | --- | --- |");
    for (name, spec, _) in links::LINKS.iter().filter(|(name, ..)| name.contains(only)) {
        let name = name.rsplit_once(", ").map_or(*name, |(clean, _)| clean);
        let mut spec: LinkSpec = spec.parse()?;
        spec.up.loss = Probability::ZERO;
        spec.down.loss = Probability::ZERO;
        let mut samples = vec![<[Sample; 4]>::default(); CONTENDERS.len()];
        for _ in 0..runs {
            for (contender, samples) in CONTENDERS.iter().zip(&mut samples) {
                let [settled, whole] = measure(dir, &spec, contender, span).await?;
                let filled = settled.delivered_bits_per_second() / spec.up.rate.0 as f64;
                let figures = [
                    settled.queue_dropped * 100.0,
                    whole.queue_dropped * 100.0,
                    settled.queue_seconds * 1e3,
                    filled * 100.0,
                ];
                eprintln!("{name}: {contender}: {figures:.2?}");
                for (sample, figure) in samples.iter_mut().zip(figures) {
                    sample.push(figure);
                }
            }
        }
        for (contender, [dropped, with_start, queue, filled]) in CONTENDERS.iter().zip(&samples) {
            println!(
                "| {name} | {contender} | {dropped:.2} % | {with_start:.2} % | {queue:.1} ms | {filled:.1} % |"
            );
        }
    }
    Ok(())
}

/// What the link saw after the settling, and from the first packet on.
async fn measure(
    dir: &Path,
    spec: &LinkSpec,
    contender: &str,
    span: &Span,
) -> anyhow::Result<[Change; 2]> {
    let folder = tempfile::tempdir_in(dir)?;
    if contender == "backhaul" {
        let seconds = span.whole().as_secs() + 3;
        let disk = pipeline::noise(dir, spec.up.rate.0 / 8 * seconds)?;
        let mut rig = pipeline::prepare(folder.path(), &disk, spec, String::new()).await?;
        rig.start_agent()?;
        let changes = watch(pipeline::link(&rig)?, span).await?;
        pipeline::ensure_busy(&rig).await?;
        return Ok(changes);
    }
    let link = Link::start(spec.clone())?;
    let transfer = Transfer::start(contender, Some(&link), folder.path())?;
    let changes = watch(&link, span).await;
    drop(transfer);
    changes
}

async fn watch(link: &Link, span: &Span) -> anyhow::Result<[Change; 2]> {
    let record = Record::of(link, GRAIN, span.whole(), |_| false).await;
    let settled = record.last(span.measure.as_secs_f64() - GRAIN.as_secs_f64());
    Ok([settled.unwrap_or_default(), record.whole()])
}

const GRAIN: std::time::Duration = std::time::Duration::from_millis(100);
