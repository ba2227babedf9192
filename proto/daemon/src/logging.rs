//! Logs: `tracing` to standard error, where the service manager picks them up.

use tracing_subscriber::EnvFilter;

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Plain,
    /// One JSON object a line.
    Json,
}

/// Starts logging. `filter` is what `RUST_LOG` would say (`info`, `backhaul_agent=debug`); the
/// variable wins when it is set.
pub fn start(format: LogFormat, filter: &str) {
    let filter = EnvFilter::try_from_default_env()
        .or_else(|_| EnvFilter::try_new(filter))
        .unwrap_or_else(|_| EnvFilter::new("info"));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false);
    match format {
        LogFormat::Plain => {
            use std::io::IsTerminal;
            subscriber.with_ansi(std::io::stderr().is_terminal()).init();
        }
        LogFormat::Json => subscriber.json().init(),
    }
}
