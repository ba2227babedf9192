//! What both Backhaul daemons need from their host.
//!
//! * [`config`]: TOML files, validated whole, every error with its file and line.
//! * [`logging`]: `tracing` to standard error.
//! * [`metrics`]: a Prometheus endpoint.
//! * [`lifecycle`]: signals, and telling the service manager.

pub mod config;
pub mod lifecycle;
pub mod logging;
pub mod metrics;
