//! Logs: `tracing` to standard error, where the service manager picks them up.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Plain,
    /// One JSON object a line.
    Json,
}

impl LogFormat {
    /// JSON if so wished.
    pub fn of(json: bool) -> Self {
        if json { Self::Json } else { Self::Plain }
    }
}

/// Starts logging to `writer`, which leads to standard error. `filter` is what `RUST_LOG` would say (`info`, `backhaul_agent=debug`); the
/// variable wins when it is set.
pub fn start<W>(format: LogFormat, filter: &str, writer: W)
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let filter = EnvFilter::try_from_default_env()
        .or_else(|_| EnvFilter::try_new(filter))
        .unwrap_or_else(|_| EnvFilter::new("info"));
    let subscriber =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer).with_target(false);
    match format {
        LogFormat::Plain => {
            use std::io::IsTerminal;
            subscriber.with_ansi(std::io::stderr().is_terminal()).init();
        }
        LogFormat::Json => subscriber.json().init(),
    }
}
