//! A ceiling on the rate, and its change while data flow: the whole pipeline on a faster link.

use std::path::Path;
use std::time::Duration;

use backhaul_lab::link::LinkSpec;

use crate::record::{Change, Record};
use crate::sample::Sample;
use crate::{Span, pipeline};

const LINK: &str = "200mbit,20ms,0.1%";
/// The ceilings, one after the other, in Mbit/s.
const CEILINGS: [u64; 3] = [50, 80, 20];
/// What the goal is over.
const WINDOW_SECONDS: f64 = 10.0;
/// A new ceiling holds when a second of traffic is this close to it.
const NEAR: f64 = 0.05;
/// How long a new ceiling may take before the windows begin.
const SETTLE: Duration = Duration::from_secs(3);
const GRAIN: Duration = Duration::from_millis(50);

/// Whose ceiling it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Whose {
    /// All machines' together.
    Link,
    /// One machine's.
    Machine,
}

/// Measures it, `runs` times; prints a table. Windows are counted for `span.measure` under each
/// ceiling, at least one. `transport` is `quic` or `tcp`.
pub async fn run(
    dir: &Path,
    runs: usize,
    span: &Span,
    whose: Whose,
    transport: &str,
) -> anyhow::Result<()> {
    let windows = (span.measure.as_secs_f64() / WINDOW_SECONDS).ceil().max(1.0);
    let measure = Duration::from_secs_f64(windows * WINDOW_SECONDS + 0.2);
    let mut errors = vec![Sample::default(); CEILINGS.len()];
    let mut delays = vec![Sample::default(); CEILINGS.len()];
    for _ in 0..runs {
        let spec: LinkSpec = LINK.parse()?;
        let folder = tempfile::tempdir_in(dir)?;
        let seconds = (SETTLE + measure).as_secs() + 2;
        let bytes = CEILINGS.iter().map(|mbit| mbit * 125_000 * seconds).sum::<u64>();
        let disk = pipeline::noise(dir, bytes * 5 / 4)?;
        let option = |mbit: u64| format!("limit = \"{mbit} Mbit/s\"");
        let first = option(CEILINGS[0]);
        let of_link = if whose == Whose::Link { first.as_str() } else { "" };
        let mut rig =
            pipeline::prepare_over(folder.path(), &disk, &spec, transport, of_link.into()).await?;
        if whose == Whose::Machine {
            let edit = |text: String| text.replace("[[machine]]", &format!("[[machine]]\n{first}"));
            rig.edit_configuration("agent", edit)?;
        }
        pipeline::begin(&mut rig).await?;
        let mut before = CEILINGS[0];
        for (index, mbit) in CEILINGS.into_iter().enumerate() {
            if mbit != before {
                let edit = |text: String| text.replace(&option(before), &option(mbit));
                rig.edit_configuration("agent", edit)?;
                rig.reload_agent();
                before = mbit;
            }
            let link = pipeline::link(&rig)?;
            let rate = mbit as f64 * 1e6;
            let mut held = None;
            let settling = Record::of(link, GRAIN, SETTLE, |record| {
                let last = record.last(1.0).map(|last| error(&last, rate).abs());
                if held.is_none() && last.is_some_and(|error| error < NEAR) {
                    held = Some(record.whole().seconds);
                }
                false
            });
            settling.await;
            delays[index].push(held.unwrap_or(f64::INFINITY));
            let record = Record::of(link, GRAIN, measure, |_| false).await;
            for window in record.windows(WINDOW_SECONDS) {
                let error = error(&window, rate) * 100.0;
                eprintln!("{mbit} Mbit/s: {error:+.2} %");
                errors[index].push(error);
            }
        }
        pipeline::ensure_busy(&rig).await?;
    }
    println!(
        "| ceiling of the {}, over {transport}, on {LINK} | error over each 10 s (goal ± 3 %) | a second within 5 % after |",
        if whose == Whose::Link { "link" } else { "machine" }
    );
    println!("| --- | --- | --- |");
    for ((mbit, error), delay) in CEILINGS.iter().zip(&errors).zip(&delays) {
        println!("| {mbit} Mbit/s | {error:.2} % | {delay:.1} s |");
    }
    Ok(())
}

/// How far what was sent is from the ceiling, as a share of it.
fn error(change: &Change, bits_per_second: f64) -> f64 {
    change.entered_bits_per_second() / bits_per_second - 1.0
}
