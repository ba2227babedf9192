//! Workloads, peers and reports.
//!
//! `cargo run --release -p backhaul-benches -- --help` lists what can be measured. Each benchmark
//! runs Backhaul and its peers in turn, several times, and prints medians, spreads and ratios.

use std::time::Duration;

pub mod barriers;
pub mod ceiling;
pub mod clean;
pub mod control;
pub mod dark;
pub mod files;
pub mod first_sync;
pub mod guest_writes;
pub mod images;
pub mod instrument;
pub mod links;
pub mod loopback;
pub mod peer;
pub mod pipeline;
pub mod plot;
pub mod record;
pub mod rivals;
pub mod sample;
pub mod sharing;
pub mod startup;
pub mod transfer;

/// How long something that goes on is measured.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    /// What is left out at the beginning.
    pub settle: Duration,
    /// What is measured after that.
    pub measure: Duration,
}

impl Span {
    /// Both.
    pub fn whole(&self) -> Duration {
        self.settle + self.measure
    }
}
