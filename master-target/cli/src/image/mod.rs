//! `backhaul image`: the disk-image library at work on files, without a target.

mod show;

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{bail, ensure};
use backhaul_disk_image::ops::{self, ConvertOptions};
use backhaul_disk_image::{CreateOptions, Deep, OpenOptions, Progress, Run, create, open};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::arguments::{ImageInput, ImageVerb};
use crate::print::say;
use crate::show::Output;

/// Damage was found, or two disks differ.
const EXIT_DIFFERENT: u8 = 3;

/// Does what was asked for; errors have exit code 1.
pub(crate) fn run(verb: &ImageVerb, output: &Output) -> anyhow::Result<ExitCode> {
    match verb {
        ImageVerb::Info { input } => output.image_info(&ops::info(&input.image, &input.options())?),
        ImageVerb::Check { input, deep } => return check(input, *deep, output),
        ImageVerb::Map { input } => map(input, output)?,
        ImageVerb::Convert { to, input, output: target, adapter, deflate_level, thick } => {
            let source = open(&input.image, &input.options())?;
            let mut options = ConvertOptions::new(*to);
            options.create.adapter = *adapter;
            options.create.thin = !thick;
            options.deflate_level = *deflate_level;
            let bar = Bar::new(output, "converting");
            let report = ops::convert(&*source, target, &options, &mut bar.advance())?;
            bar.finish();
            output.converted(&report);
        }
        ImageVerb::Compare { one, other, allow_outside } => {
            return compare(one, other, *allow_outside, output);
        }
        ImageVerb::Create { to, output: target, size, adapter, parent, thick } => {
            let size_bytes = match (size, parent) {
                (Some(size), _) => size.as_u64(),
                (None, Some(parent)) => ops::info(parent, &OpenOptions::read_only())?.size_bytes,
                (None, None) => bail!("a new image needs a size, such as --size 40GiB"),
            };
            let mut options = CreateOptions::new(*to, size_bytes);
            options.adapter = *adapter;
            options.parent.clone_from(parent);
            options.thin = !thick;
            create(target, &options)?;
            output.image_info(&ops::info(target, &OpenOptions::read_only())?);
        }
        ImageVerb::Repair { input, yes } => return repair(input, *yes, output),
    }
    Ok(ExitCode::SUCCESS)
}

impl ImageInput {
    fn options(&self) -> OpenOptions {
        OpenOptions {
            kind: self.from,
            allow_outside: self.allow_outside,
            shared: self.shared,
            ..OpenOptions::read_only()
        }
    }
}

fn check(input: &ImageInput, deep: bool, output: &Output) -> anyhow::Result<ExitCode> {
    let deep = if deep { Deep::Yes } else { Deep::No };
    let bar = Bar::new(output, "checking");
    let report = ops::check(&input.image, &input.options(), deep, &mut bar.advance())?;
    bar.finish();
    output.checked(&report);
    Ok(if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::from(EXIT_DIFFERENT) })
}

fn map(input: &ImageInput, output: &Output) -> anyhow::Result<()> {
    let image = open(&input.image, &input.options())?;
    let mut runs: Vec<Run> = Vec::new();
    // As JSON the runs are one value, and a table needs its widths: both want all of them.
    let totals = ops::map(&*image, &mut |run| {
        runs.push(run);
        true
    })?;
    output.mapped(&runs, &totals);
    Ok(())
}

fn compare(
    one: &Path,
    other: &Path,
    allow_outside: bool,
    output: &Output,
) -> anyhow::Result<ExitCode> {
    let options = OpenOptions { allow_outside, ..OpenOptions::read_only() };
    let (left, right) = (open(one, &options)?, open(other, &options)?);
    let bar = Bar::new(output, "comparing");
    let report = ops::compare(&*left, &*right, None, &mut bar.advance())?;
    bar.finish();
    output.compared(&report);
    Ok(if report.same_content { ExitCode::SUCCESS } else { ExitCode::from(EXIT_DIFFERENT) })
}

/// A repair may uncover what another one has to mend, so plans are made until one is empty.
fn repair(input: &ImageInput, yes: bool, output: &Output) -> anyhow::Result<ExitCode> {
    let mut applied = 0;
    loop {
        let bar = Bar::new(output, "examining");
        let plan = ops::plan_repair(&input.image, &input.options(), &mut bar.advance())?;
        bar.finish();
        if plan.fixes.is_empty() {
            let clean = plan.report.as_ref().is_some_and(|report| report.is_clean());
            if output.is_json() {
                output.json(&json!({ "applied": applied, "clean": clean }));
            } else if clean {
                say!("{} fixes applied; the image is clean", applied);
            } else {
                say!("{} fixes applied; what is left cannot be repaired:", applied);
                if let Some(report) = &plan.report {
                    output.checked(report);
                }
            }
            return Ok(if clean { ExitCode::SUCCESS } else { ExitCode::from(EXIT_DIFFERENT) });
        }
        if !output.is_json() {
            output.plan(&plan);
        }
        if !yes {
            ensure!(
                std::io::stdin().is_terminal() && !output.is_json(),
                "{} was not touched: run this with --yes to apply the plan",
                input.image.display()
            );
            if !asked()? {
                bail!("{} was not touched", input.image.display());
            }
        }
        let bar = Bar::new(output, "repairing");
        applied += ops::apply_repair(&plan, &mut bar.advance())?.applied;
        bar.finish();
    }
}

fn asked() -> std::io::Result<bool> {
    print!("Apply this plan? A copy of the image first is wise. [y/N] ");
    std::io::stdout().flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

/// A progress bar on a terminal; nothing elsewhere.
struct Bar(ProgressBar);

impl Bar {
    fn new(output: &Output, what: &str) -> Self {
        let bar = if output.is_json() || !std::io::stderr().is_terminal() {
            ProgressBar::hidden()
        } else {
            ProgressBar::new(0)
        };
        let template = "{prefix} [{bar:30.cyan/blue}] {percent:>3}% {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_prefix(what.to_owned());
        Self(bar)
    }

    fn advance(&self) -> impl Progress + '_ {
        |done_bytes, total_bytes| {
            self.0.set_length(total_bytes);
            self.0.set_position(done_bytes);
            true
        }
    }

    fn finish(&self) {
        self.0.finish_and_clear();
    }
}
