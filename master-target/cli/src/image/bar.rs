//! How far a long operation is: a bar on a terminal, a line now and then elsewhere, nothing for
//! programs.

use std::cell::Cell;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use backhaul_disk_image::Progress;
use bytesize::ByteSize;
use indicatif::{ProgressBar, ProgressStyle};

use super::interrupt;
use crate::show::Output;

/// How often a log hears of progress; what takes less says nothing.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

pub(super) struct Bar {
    bar: Option<ProgressBar>,
    quiet: bool,
    what: &'static str,
    said: Cell<Instant>,
}

impl Bar {
    pub(super) fn new(output: &Output, what: &'static str) -> Self {
        let terminal = std::io::stderr().is_terminal() && !output.is_json();
        let bar = terminal.then(|| {
            let bar = ProgressBar::new(0);
            let template = "{prefix} [{bar:30.cyan/blue}] {percent:>3}% \
                {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}, {eta} left";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            bar.set_prefix(what);
            bar
        });
        Self { bar, quiet: output.is_json(), what, said: Cell::new(Instant::now()) }
    }

    pub(super) fn advance(&self) -> impl Progress + '_ {
        |done_bytes, total_bytes| {
            self.show(done_bytes, total_bytes);
            !interrupt::came()
        }
    }

    fn show(&self, done_bytes: u64, total_bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(total_bytes);
            bar.set_position(done_bytes);
        } else if !self.quiet && self.said.get().elapsed() >= LINE_INTERVAL {
            self.said.set(Instant::now());
            let size = |bytes| ByteSize(bytes).display().iec();
            eprintln!("{}: {} of {}", self.what, size(done_bytes), size(total_bytes));
        }
    }

    pub(super) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Bar {
    /// An error's sentence starts on a line of its own.
    fn drop(&mut self) {
        self.finish();
    }
}
