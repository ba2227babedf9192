//! How long control takes while data fill the line.

use std::fs::File;
use std::path::Path;

use anyhow::Context;
use backhaul_lab::link::LinkSpec;
use backhaul_lab::rig::{Rig, RigSpec};

use crate::links::LINKS;
use crate::peer::START_TIME_MAX;
use crate::sample::Sample;

/// What `backhaul link probe` says of the link, with nothing else on it: how long control takes
/// while data fill the line. The goals' links whose names contain `only`, or these `others`.
pub async fn run(dir: &Path, runs: usize, only: &str, others: &[LinkSpec]) -> anyhow::Result<()> {
    let of_goals = LINKS.iter().filter(|(name, ..)| others.is_empty() && name.contains(only));
    let of_goals = of_goals.map(|(name, spec, _)| Ok(((*name).to_owned(), spec.parse()?)));
    let others = others.iter().map(|spec| Ok((spec.to_string(), spec.clone())));
    let links: Vec<(String, LinkSpec)> = of_goals.chain(others).collect::<anyhow::Result<_>>()?;
    println!("| link | round trip | control under load, median | 99th percentile | goal |");
    println!("| --- | --- | --- | --- | --- |");
    for (name, spec) in links {
        let (mut least, mut median, mut worst): (Sample, Sample, Sample) = Default::default();
        for _ in 0..runs {
            let folder = tempfile::tempdir_in(dir)?;
            let disk = folder.path().join("empty.raw");
            File::create(&disk)?.set_len(1 << 20)?;
            let mut rig_spec = RigSpec::new(folder.path(), &disk)?;
            let program = rig_spec.programs.join("backhaul");
            rig_spec.link = Some(spec.clone());
            let mut rig = Rig::prepare(rig_spec)?;
            rig.start_target()?;
            rig.wait("the target", START_TIME_MAX, |_| true).await?;
            let site = rig.link().context("the rig has no link")?.site_a();
            let output = site
                .command_in(program)
                .args(["link", "probe", "--json", "--config"])
                .arg(folder.path().join("agent.toml"))
                .output()?;
            let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
            let ms = |value: &serde_json::Value| value.as_f64().unwrap_or(f64::NAN) * 1e3;
            least.push(ms(&report["rtt_seconds"][0]));
            median.push(ms(&report["loaded_rtt_seconds"][0]));
            worst.push(ms(&report["loaded_rtt_seconds"][1]));
        }
        let goal = least.median() * 1.5 + 5.0;
        println!("| {name} | {least} ms | {median} ms | {worst} ms | {goal:.0} ms |");
    }
    Ok(())
}
