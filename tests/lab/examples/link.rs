//! Holds an emulated link open and runs a command at one of its ends:
//! `link 200mbit,40ms,0.5% a ping -c 3 10.213.0.2`. The other site is reached as
//! `ip netns exec NAME`, with the name that is printed. Afterwards the counters are printed.

use std::process::ExitCode;

use anyhow::{Context, bail};
use backhaul_lab::link::Link;

fn main() -> anyhow::Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [spec, end, program, rest @ ..] = arguments.as_slice() else {
        bail!("usage: link SPEC a|b PROGRAM [ARGUMENT ...]");
    };
    let link = Link::start(spec.parse()?)?;
    for site in [link.site_a(), link.site_b()] {
        eprintln!("{} {}", site.name(), site.address());
    }
    let site = match end.as_str() {
        "a" => link.site_a(),
        "b" => link.site_b(),
        other => bail!("\"{other}\" is not an end of the link: a or b"),
    };
    let status = site
        .command_in(program)
        .args(rest)
        .env("SITE_A", link.site_a().name())
        .env("SITE_B", link.site_b().name())
        .status()
        .with_context(|| format!("{program} could not be started"))?;
    eprintln!("{}", serde_json::to_string_pretty(&link.stats())?);
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
