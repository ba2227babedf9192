//! `backhaul image`: the disk-image library at work on files, without a target.

mod bar;
mod device;
mod interrupt;
mod replace;
mod show;
mod staging;

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, anyhow, bail, ensure};
use backhaul_disk_image::ops::{self, ConvertOptions, ConvertReport, Leaks, RepairPlan};
use backhaul_disk_image::{
    CreateOptions, Deep, ErrorKind, ImageError, OpenOptions, Run, create_with, open,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;

use self::bar::Bar;
use self::show::counted;
use crate::arguments::{ConvertArguments, ImageInput, ImageVerb};
use crate::print::say;
use crate::show::Output;

/// Damage was found.
const EXIT_DAMAGED: u8 = 3;
/// Two disks differ, as cmp and qemu-img have it.
const EXIT_DIFFERENT: u8 = 1;
/// Two disks could not be compared.
const EXIT_NOT_COMPARED: u8 = 2;

/// Does what was asked for; errors have exit code 1.
pub(crate) fn run(verb: &ImageVerb, output: &Output) -> anyhow::Result<ExitCode> {
    raise_open_files();
    match verb {
        ImageVerb::Info { input } => output.image_info(&ops::info(&input.image, &input.options())?),
        ImageVerb::Check { input, deep } => return check(input, *deep, output),
        ImageVerb::Map { input } => return map(input, output),
        ImageVerb::Convert(arguments) => convert(arguments, output)?,
        ImageVerb::Compare { one, other, from, other_from, allow_outside } => {
            let options = |kind| {
                let allow_outside = *allow_outside;
                OpenOptions { kind, allow_outside, ..OpenOptions::read_only() }
            };
            let sides = [(one, options(*from)), (other, options(*other_from))];
            return Ok(compare(sides, output).unwrap_or_else(|error| {
                output.failure("failed", &crate::sentence(&error));
                ExitCode::from(EXIT_NOT_COMPARED)
            }));
        }
        ImageVerb::Create { to, output: target, size, adapter, parent, thick } => {
            let size_bytes = match (size, parent) {
                (Some(size), _) => size.as_u64(),
                (None, Some(parent)) => ops::info(parent, &PARENT)?.size_bytes,
                (None, None) => bail!("a new image needs a size, such as --size 40GiB"),
            };
            let mut options = CreateOptions::new(*to, to.padded_bytes(size_bytes));
            options.adapter = *adapter;
            options.parent.clone_from(parent);
            options.thin = !thick;
            interrupt::watch();
            let bar = Bar::new(output, "creating");
            let make = |path: &Path| Ok(create_with(path, &options, &mut bar.advance())?);
            // A delta is one file, and names its parent from where it is made.
            let made = match parent {
                Some(_) => make(target),
                None => replace::make_new(target, &options, make),
            };
            made.map_err(|error| interrupt::told(error, target))?;
            bar.finish();
            // A parent elsewhere was named by whoever asks.
            output.image_info(&ops::info(target, &PARENT.of_kind(*to))?);
        }
        ImageVerb::Repair { input, yes, free_leaks } => {
            let leaks = if *free_leaks { Leaks::Free } else { Leaks::Keep };
            return repair(input, *yes, leaks, output);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Lets this process open as many files as it may: an image in small files has thousands.
fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    // Without it the usual limit holds, and what meets it says so.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

/// How an image is opened that the command line itself names as a parent.
const PARENT: OpenOptions = OpenOptions { allow_outside: true, ..OpenOptions::read_only() };

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
    let report = match ops::check(&input.image, &input.options(), deep, &mut bar.advance()) {
        // So much is damaged that it cannot be opened; that is what a check is asked for.
        Err(error) if error.kind() == ErrorKind::Damaged => {
            output.failure("failed", &error.to_string());
            return Ok(ExitCode::from(EXIT_DAMAGED));
        }
        report => report?,
    };
    bar.finish();
    output.checked(&report);
    Ok(if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::from(EXIT_DAMAGED) })
}

fn map(input: &ImageInput, output: &Output) -> anyhow::Result<ExitCode> {
    let image = open(&input.image, &input.options())?;
    if output.is_json() {
        return output.map_json(&*image);
    }
    let mut runs: Vec<Run> = Vec::new();
    let totals = ops::map(&*image, &mut |run| {
        if runs.len() < show::ROWS_MAX {
            runs.push(run);
        }
        true
    })?;
    output.mapped(&runs, &totals);
    Ok(ExitCode::SUCCESS)
}

fn convert(arguments: &ConvertArguments, output: &Output) -> anyhow::Result<()> {
    let source = open(&arguments.input.image, &arguments.input.options())?;
    let mut options = ConvertOptions::new(arguments.to);
    options.create.adapter = arguments.adapter;
    options.create.size_bytes = arguments.to.padded_bytes(source.size_bytes());
    options.create.thin = !arguments.thick;
    options.deflate_level = arguments.deflate_level;
    options.durable = !arguments.no_sync;
    interrupt::watch();
    let bar = Bar::new(output, "converting");
    let make = |target: &Path| Ok(ops::convert(&*source, target, &options, &mut bar.advance())?);
    let output_path = &arguments.output;
    if device::is_device(output_path) {
        let progress = &mut bar.advance();
        let report = device::overwrite(&*source, output_path, &options, arguments.force, progress)?;
        bar.finish();
        output.converted(&report);
        return Ok(());
    }
    let report = match arguments.force {
        true => replace::replace(&*source, output_path, &options.create, make),
        false => replace::make_new(output_path, &options.create, make)
            .map_err(|error| told_of_force(error, output_path)),
    };
    let report = report.map_err(|error| interrupt::told(error, output_path))?;
    bar.finish();
    output.converted(&ConvertReport { path: output_path.clone(), ..report });
    Ok(())
}

fn told_of_force(error: anyhow::Error, target: &Path) -> anyhow::Error {
    let exists = |error: &ImageError| error.kind() == ErrorKind::Exists;
    // An extent that lies there without its descriptor is named by the error itself.
    if !error.downcast_ref().is_some_and(exists) || target.symlink_metadata().is_err() {
        return error;
    }
    let sentence =
        "exists already and is not overwritten; choose another name, or replace it with --force";
    anyhow!("{}: {sentence}", target.display())
}

fn compare(sides: [(&PathBuf, OpenOptions); 2], output: &Output) -> anyhow::Result<ExitCode> {
    let [(one, options), (other, other_options)] = sides;
    let (left, right) = (open(one, &options)?, open(other, &other_options)?);
    let bar = Bar::new(output, "comparing");
    let report = ops::compare(&*left, &*right, None, &mut bar.advance())?;
    bar.finish();
    output.compared(&report);
    Ok(if report.same_content { ExitCode::SUCCESS } else { ExitCode::from(EXIT_DIFFERENT) })
}

/// A repair may uncover what another one has to mend, so plans are made until one is empty.
fn repair(
    input: &ImageInput,
    yes: bool,
    leaks: Leaks,
    output: &Output,
) -> anyhow::Result<ExitCode> {
    let (mut applied, mut freed_bytes) = (0, 0);
    let mut last: Option<RepairPlan> = None;
    loop {
        let bar = Bar::new(output, "examining");
        let plan = ops::plan_repair(&input.image, &input.options(), leaks, &mut bar.advance())?;
        bar.finish();
        if plan.fixes.is_empty() {
            return Ok(repaired(&plan, applied, freed_bytes, output));
        }
        ensure!(
            last.as_ref().is_none_or(|last| last.fixes != plan.fixes),
            "{}: {} applied and the same damage is found again; check the storage",
            input.image.display(),
            counted(applied as u64, "fix was", "fixes were")
        );
        if output.is_json() && !yes {
            output.json(&json!({ "applied": applied, "clean": false, "plan": plan }));
            return Ok(ExitCode::from(EXIT_DAMAGED));
        }
        if !output.is_json() {
            output.plan(&plan);
        }
        let untouched = || format!("{} was not touched", input.image.display());
        if !yes {
            ensure!(
                std::io::stdin().is_terminal(),
                "{}: run this with --yes to apply the plan",
                untouched()
            );
            ensure!(asked().with_context(untouched)?, untouched());
        }
        let bar = Bar::new(output, "repairing");
        applied += ops::apply_repair(&plan, &mut bar.advance())?.applied;
        bar.finish();
        freed_bytes += plan.freed_bytes;
        last = Some(plan);
    }
}

/// Says how a repair ended.
fn repaired(plan: &RepairPlan, applied: usize, freed_bytes: u64, output: &Output) -> ExitCode {
    let fixes = counted(applied as u64, "fix", "fixes");
    let clean = plan.report.as_ref().is_some_and(|report| report.is_clean());
    let leaked_alone = plan
        .report
        .as_ref()
        .filter(|report| report.losses == 0 && report.redundancies == 0 && report.leaked_bytes > 0);
    if output.is_json() {
        output.json(&json!({
            "applied": applied, "clean": clean, "freed_bytes": freed_bytes, "plan": plan
        }));
    } else if clean {
        say!("{fixes} applied; the image is clean");
    } else if let Some(report) = leaked_alone {
        say!(
            "{fixes} applied; {} bytes of the file belong to no grain, which --free-leaks \
             gives back",
            report.leaked_bytes
        );
    } else {
        say!("{fixes} applied; what is left cannot be repaired:");
        if let Some(report) = &plan.report {
            output.checked(report);
        }
    }
    if freed_bytes > 0 && !output.is_json() {
        say!("what was given back may have held {freed_bytes} bytes of the disk");
    }
    if clean { ExitCode::SUCCESS } else { ExitCode::from(EXIT_DAMAGED) }
}

fn asked() -> std::io::Result<bool> {
    let mut terminal = std::io::stderr();
    write!(terminal, "Apply this plan? A copy of the image first is wise. [y/N] ")?;
    terminal.flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
