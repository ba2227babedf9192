//! Watching a failover, cancel or commit until it is done. The work is the target's: whoever
//! interrupts this interrupts nothing.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use anyhow::bail;
use backhaul_api::{Client, Machine, Stage};
use indicatif::{ProgressBar, ProgressStyle};

use crate::show::{Output, stage};

/// How often the target is asked.
const POLL: Duration = Duration::from_millis(100);

/// How long a cancel is watched whose agent is away.
const AGENT_PATIENCE: Duration = Duration::from_secs(20);

/// Shows each step until the machine is in one of `ends`, or says why it is not.
pub(crate) async fn watch(
    client: &Client,
    name: &str,
    output: &Output,
    ends: &[Stage],
) -> anyhow::Result<Machine> {
    let view = StepView::new(output);
    let mut shown = String::new();
    let mut away: Option<Instant> = None;
    loop {
        let machine = client.machine(name).await?;
        if ends.contains(&machine.stage) && machine.failure.is_empty() {
            view.finish();
            return Ok(machine);
        }
        if !machine.failure.is_empty() {
            view.finish();
            bail!("{}", machine.failure);
        }
        if matches!(machine.stage, Stage::Replicating | Stage::FailedOver | Stage::Committed) {
            view.finish();
            bail!(
                "machine {name} is {} now: somebody asked for something else meanwhile",
                stage(&machine)
            );
        }
        let waits_for_agent = !machine.connected && machine.stage == Stage::Cancelling;
        away = waits_for_agent.then(|| away.unwrap_or_else(Instant::now));
        if away.is_some_and(|since| since.elapsed() > AGENT_PATIENCE) {
            view.finish();
            bail!(
                "the cancel of machine {name} waits for agent {}, which is not connected; it is done by itself when the agent is back, and a failover takes it back",
                machine.agent
            );
        }
        let step = if waits_for_agent {
            format!("{} (waiting for agent {} to connect)", machine.step, machine.agent)
        } else if machine.trouble.is_empty() {
            machine.step.clone()
        } else {
            format!("{} ({})", machine.step, machine.trouble)
        };
        if step != shown {
            view.show(&step);
            shown = step;
        }
        // The API is asked, it does not call: this is how often a person sees a step.
        tokio::time::sleep(POLL).await;
    }
}

/// A line that turns on a terminal; a line a step elsewhere; nothing for programs.
pub(crate) struct StepView {
    bar: Option<ProgressBar>,
    quiet: bool,
}

impl StepView {
    pub(crate) fn new(output: &Output) -> Self {
        let terminal = std::io::stderr().is_terminal() && !output.is_json();
        let bar = terminal.then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner:.cyan} {msg}") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        Self { bar, quiet: output.is_json() }
    }

    pub(crate) fn show(&self, step: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(step.to_owned()),
            None if self.quiet => {}
            None => eprintln!("{step}"),
        }
    }

    /// Something that stays on the screen.
    pub(crate) fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            None if self.quiet => {}
            None => eprintln!("{line}"),
        }
    }

    pub(crate) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
