//! Workloads, peers and reports.
//!
//! `cargo run --release -p backhaul-benches -- --help` lists what can be measured. Each benchmark
//! runs Backhaul and its peers in turn, several times, and prints medians, spreads and ratios.

pub mod first_sync;
pub mod guest_writes;
pub mod images;
pub mod links;
pub mod peer;
pub mod sample;
