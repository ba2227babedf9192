//! Showing a sync: a bar on a terminal, a line now and then elsewhere.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, HumanDuration, MultiProgress, ProgressBar, ProgressStyle};

/// How often a line is written when there is no terminal.
const LINE_PERIOD: Duration = Duration::from_secs(5);

const TEMPLATE: &str = "{prefix:12} [{bar:30.cyan/blue}] {percent:>3}% {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta} left, {msg}";

/// The syncs under way, as a person sees them.
pub struct ProgressView {
    bars: MultiProgress,
    shown: BTreeMap<String, Shown>,
    terminal: bool,
}

struct Shown {
    bar: ProgressBar,
    began: Instant,
    last_line: Instant,
}

impl ProgressView {
    /// A view on standard error.
    pub fn new() -> Self {
        let terminal = std::io::stderr().is_terminal();
        Self { bars: MultiProgress::new(), shown: BTreeMap::new(), terminal }
    }

    /// How a machine's sync stands; a total of 0 means that none is under way.
    pub fn update(&mut self, machine: &str, total_bytes: u64, dirty_bytes: u64, sent_bytes: u64) {
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
            Shown { bar, began: now, last_line: now }
        });
        shown.bar.set_length(total_bytes);
        shown.bar.set_position(done_bytes);
        shown.bar.set_message(format!("{} sent", HumanBytes(sent_bytes)));
        if !self.terminal && now.duration_since(shown.last_line) >= LINE_PERIOD {
            shown.last_line = now;
            let seconds = now.duration_since(shown.began).as_secs_f64();
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

impl Default for ProgressView {
    fn default() -> Self {
        Self::new()
    }
}
