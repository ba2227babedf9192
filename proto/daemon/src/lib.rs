//! What both Backhaul daemons need from their host.
//!
//! * [`bandwidth`]: limits with a weekly schedule.
//! * [`complaint`]: what an error says, once.
//! * [`config`]: TOML files, validated whole, every error with its file and line.
//! * [`folder`]: state folders with one owner, and files replaced whole.
//! * [`logging`]: `tracing` to standard error.
//! * [`metrics`]: a Prometheus endpoint.
//! * [`lifecycle`]: signals, and telling the service manager.
//! * [`runtimes`]: threads, those of the link apart.

pub mod bandwidth;
pub mod complaint;
pub mod config;
pub mod folder;
pub mod lifecycle;
pub mod logging;
pub mod metrics;
pub mod runtimes;
