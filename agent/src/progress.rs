//! Showing a sync: a bar on a terminal, a line now and then elsewhere.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, HumanDuration, MultiProgress, ProgressBar, ProgressStyle};

/// How often a line is written when there is no terminal.
const LINE_PERIOD: Duration = Duration::from_secs(5);

const TEMPLATE: &str =
    "{prefix:12} [{bar:30.cyan/blue}] {percent:>3}% {binary_bytes}/{binary_total_bytes} {msg}";

/// The syncs under way, as a person sees them.
pub struct ProgressView {
    bars: MultiProgress,
    shown: BTreeMap<String, Shown>,
    terminal: bool,
}

struct Shown {
    bar: ProgressBar,
    /// Since when the target takes batches; the time before says nothing about the rate.
    began: Option<Instant>,
    last_line: Instant,
}

/// How a machine's sync stands.
#[derive(Debug, Clone, Copy)]
pub struct SyncStanding {
    /// Bytes to compare; 0 when no sync is under way.
    pub total_bytes: u64,
    /// Of these, bytes that are neither found equal nor in the stream yet.
    pub dirty_bytes: u64,
    /// Bytes that differed and went into the stream.
    pub sent_bytes: u64,
    /// Whether the target takes the machine's batches at present.
    pub replicating: bool,
}

/// Standard error below the bars: what is written here goes above them.
#[derive(Debug, Clone)]
pub struct AboveBars(pub MultiProgress);

impl Write for AboveBars {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.suspend(|| io::stderr().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

impl ProgressView {
    /// A view on standard error, drawn with `bars`.
    pub fn new(bars: MultiProgress) -> Self {
        let terminal = io::stderr().is_terminal();
        Self { bars, shown: BTreeMap::new(), terminal }
    }

    /// Shows how a machine's sync stands.
    pub fn update(&mut self, machine: &str, standing: SyncStanding) {
        let SyncStanding { total_bytes, dirty_bytes, sent_bytes, replicating } = standing;
        if total_bytes == 0 {
            if let Some(shown) = self.shown.remove(machine) {
                shown.bar.finish_and_clear();
            }
            return;
        }
        let done_bytes = total_bytes.saturating_sub(dirty_bytes);
        let now = Instant::now();
        let shown = self.shown.entry(machine.to_owned()).or_insert_with(|| {
            let bar = if self.terminal {
                self.bars.add(ProgressBar::new(total_bytes))
            } else {
                ProgressBar::hidden()
            };
            if let Ok(style) = ProgressStyle::with_template(TEMPLATE) {
                bar.set_style(style);
            }
            bar.set_prefix(machine.to_owned());
            Shown { bar, began: None, last_line: now }
        });
        if !replicating {
            shown.began = None;
        } else if shown.began.is_none() {
            shown.began = Some(now);
            shown.bar.reset_eta();
        }
        shown.bar.set_length(total_bytes);
        shown.bar.set_position(done_bytes);
        shown.bar.set_message(if replicating {
            let rate = HumanBytes(shown.bar.per_sec() as u64);
            let left = HumanDuration(shown.bar.eta());
            format!("{rate}/s, {left:#} left, {} sent", HumanBytes(sent_bytes))
        } else {
            "waiting for the target".into()
        });
        if let Some(began) = shown.began
            && !self.terminal
            && now.duration_since(shown.last_line) >= LINE_PERIOD
        {
            shown.last_line = now;
            let seconds = now.duration_since(began).as_secs_f64();
            let rate = done_bytes as f64 / seconds;
            let left = if rate > 0.0 {
                let time = Duration::from_secs_f64((dirty_bytes as f64 / rate).min(1e9));
                format!("about {} left", HumanDuration(time))
            } else {
                "time left unknown".into()
            };
            tracing::info!(
                machine,
                "sync {}% ({} of {}, {}/s, {} sent), {left}",
                done_bytes * 100 / total_bytes,
                HumanBytes(done_bytes),
                HumanBytes(total_bytes),
                HumanBytes(rate as u64),
                HumanBytes(sent_bytes),
            );
        }
    }
}
