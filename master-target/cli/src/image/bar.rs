//! How far a long operation is: a bar on a terminal, a line now and then elsewhere, nothing for
//! programs.

use std::cell::{Cell, OnceCell};
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
    terminal: bool,
    /// Made when something is known to show: a bar without a length is drawn as a full one.
    bar: OnceCell<ProgressBar>,
    quiet: bool,
    what: &'static str,
    said: Cell<Instant>,
}

impl Bar {
    pub(super) fn new(output: &Output, what: &'static str) -> Self {
        let terminal = std::io::stderr().is_terminal() && !output.is_json();
        let (bar, said) = (OnceCell::new(), Cell::new(Instant::now()));
        Self { terminal, bar, quiet: output.is_json(), what, said }
    }

    pub(super) fn advance(&self) -> impl Progress + '_ {
        |done_bytes, total_bytes| {
            self.show(done_bytes, total_bytes);
            !interrupt::came()
        }
    }

    fn show(&self, done_bytes: u64, total_bytes: u64) {
        if self.terminal {
            let bar = self.bar.get_or_init(|| drawn(self.what, total_bytes));
            bar.set_length(total_bytes);
            bar.set_position(done_bytes);
        } else if !self.quiet && self.said.get().elapsed() >= LINE_INTERVAL {
            self.said.set(Instant::now());
            let size = |bytes| ByteSize(bytes).display().iec();
            eprintln!("{}: {} of {}", self.what, size(done_bytes), size(total_bytes));
        }
    }

    pub(super) fn finish(&self) {
        if let Some(bar) = self.bar.get() {
            bar.finish_and_clear();
        }
    }
}

fn drawn(what: &'static str, total_bytes: u64) -> ProgressBar {
    let template = "{prefix} [{bar:30.cyan/blue}] {percent:>3}% \
        {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}, {eta} left";
    let style = ProgressStyle::with_template(template);
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(total_bytes).with_style(style).with_prefix(what)
}

impl Drop for Bar {
    /// An error's sentence starts on a line of its own.
    fn drop(&mut self) {
        self.finish();
    }
}
