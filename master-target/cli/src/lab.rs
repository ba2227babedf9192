//! `backhaul lab`: the whole story on this machine.

use std::cell::Cell;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, ensure};
use backhaul_daemon::lifecycle;
use backhaul_lab::failback::{Failback, Report, Step, run as failback};

use crate::arguments::LabArguments;
use crate::print::say;
use crate::show::Output;
use crate::steps::StepView;

pub(crate) async fn run(arguments: &LabArguments, output: &Output) -> anyhow::Result<ExitCode> {
    // Kept until the end of this function, then removed with everything in it.
    let temporary;
    let dir: PathBuf = match &arguments.keep {
        Some(dir) => {
            std::fs::create_dir_all(dir)
                .with_context(|| format!("{} cannot be made", dir.display()))?;
            let empty = std::fs::read_dir(dir)?.next().is_none();
            ensure!(empty, "{} is not empty; name a folder that is empty or absent", dir.display());
            std::fs::canonicalize(dir)?
        }
        None => {
            temporary = TemporaryFolder::make()?;
            temporary.0.path().to_owned()
        }
    };
    let story = Failback {
        dir,
        disk: arguments.disk.clone(),
        size_bytes: arguments.size.as_u64() / 4096 * 4096,
        seconds: arguments.seconds,
        link: arguments.link.clone(),
        seed: arguments.seed,
    };
    let view = StepView::new(output);
    let last_percent = Cell::new(101);
    let story = failback(story, |step| match step {
        Step::Begin(what) => view.show(&what),
        Step::Done(what) => view.say(&format!("  ✓ {what}")),
        Step::Sync(done, total) => {
            let percent = done * 100 / total.max(1);
            if percent / 10 != last_percent.replace(percent) / 10 {
                view.show(&format!("first sync: {percent} %"));
            }
        }
    });
    let report = tokio::select! {
        // First, so that the signals are waited for before anything is there to be removed.
        biased;
        () = lifecycle::asked_to_stop() => None,
        report = story => Some(report),
    };
    view.finish();
    let report = report.context("the lab was interrupted; its daemons are stopped")??;
    if output.is_json() {
        output.json(&report);
    } else {
        summary(&report, arguments.keep.is_some());
    }
    Ok(if report.verified { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// How often the removal of the folder is tried.
const REMOVALS_MAX: usize = 1000;

/// A folder in the place that TMPDIR names, removed with everything in it.
struct TemporaryFolder(tempfile::TempDir);

impl TemporaryFolder {
    fn make() -> anyhow::Result<Self> {
        tempfile::Builder::new()
            .prefix("backhaul-lab-")
            .tempdir()
            .map(Self)
            .context("no folder for the lab can be made; name one with --keep")
    }
}

impl Drop for TemporaryFolder {
    fn drop(&mut self) {
        // The thread that makes the disk cannot be interrupted, and may add files to a folder that
        // is being emptied; to one that is gone it cannot.
        for _ in 0..REMOVALS_MAX {
            match std::fs::remove_dir_all(self.0.path()) {
                Err(error) if error.kind() == std::io::ErrorKind::DirectoryNotEmpty => {}
                _ => return,
            }
        }
    }
}

fn summary(report: &Report, kept: bool) {
    say!("");
    say!(
        "{}",
        if report.verified {
            "VERIFIED: the VMDK equals the protected disk, byte for byte"
        } else {
            "NOT VERIFIED"
        }
    );
    say!("  first sync   {:.1} s", report.initial_sync_seconds);
    say!("  RPO          at most {:.2} s", report.rpo_seconds_max);
    say!(
        "  failover     {:.2} s, data loss {:.1} s",
        report.failover_seconds,
        report.data_loss_seconds
    );
    say!(
        "  the guest    {} operations, longest wait {:.0} ms",
        report.operations,
        report.write_seconds_max * 1000.0
    );
    say!(
        "  memory       agent {} MiB, target {} MiB",
        report.agent_memory_bytes_max >> 20,
        report.target_memory_bytes_max >> 20
    );
    if kept {
        say!("  protected    {}", report.protected.display());
        say!("  image        {}", report.image.display());
    }
}
