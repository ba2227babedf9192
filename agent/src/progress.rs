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
    /// Since when the target takes batches; what was before says nothing about the rate.
    began: Option<Began>,
    last_line: Instant,
}

/// Where a sync stood when the target began to take batches, the first time or again.
#[derive(Debug, Clone, Copy)]
struct Began {
    at: Instant,
    done_bytes: u64,
}

impl Began {
    /// Bytes a second since; nothing in the first second, over which it would be anything.
    fn rate(&self, now: Instant, done_bytes: u64) -> Option<f64> {
        let seconds = now.saturating_duration_since(self.at).as_secs_f64();
        (seconds >= 1.0).then(|| done_bytes.saturating_sub(self.done_bytes) as f64 / seconds)
    }
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
            shown.began = Some(Began { at: now, done_bytes });
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
            let rate = began.rate(now, done_bytes).filter(|rate| *rate > 0.0);
            let pace = match rate {
                Some(rate) => {
                    let time = Duration::from_secs_f64((dirty_bytes as f64 / rate).min(1e9));
                    format!("{}/s, about {} left", HumanBytes(rate as u64), HumanDuration(time))
                }
                None => "time left unknown".into(),
            };
            tracing::info!(
                machine,
                "sync {}% ({} of {}, {} sent), {pace}",
                done_bytes * 100 / total_bytes,
                HumanBytes(done_bytes),
                HumanBytes(total_bytes),
                HumanBytes(sent_bytes),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::Began;

    /// After a dark of half a minute the log said "16.00 EiB/s, about 0 seconds left": all that was done
    /// in minutes, over the instant since the link was back.
    #[test]
    fn a_rate_counts_from_when_the_target_took_batches_again() {
        let at = Instant::now();
        let began = Began { at, done_bytes: 48 << 20 };
        assert_eq!(began.rate(at + Duration::from_millis(40), 48 << 20), None);
        let rate = began.rate(at + Duration::from_secs(4), 56 << 20);
        assert_eq!(rate, Some(f64::from(2 << 20)));
    }
}
