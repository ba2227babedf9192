//! `backhaul-agent`: the daemon of a process server.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, ensure};
use backhaul_agent::agent::Agent;
use backhaul_agent::capture::Device;
use backhaul_agent::config::Config;
use backhaul_agent::link;
use backhaul_agent::metrics::Metrics;
use backhaul_agent::progress::{AboveBars, ProgressView};
use backhaul_daemon::folder::FolderLock;
use backhaul_daemon::logging::LogFormat;
use backhaul_daemon::runtimes::Runtimes;
use backhaul_daemon::{complaint, lifecycle, logging, metrics};
use backhaul_nbd::{Exports, Listener, Server, ServerOptions};
use backhaul_proto::identity::{Identity, Role};
use clap::{CommandFactory, Parser, Subcommand};
use indicatif::MultiProgress;
use tokio::runtime::Handle;

#[derive(Parser)]
#[command(
    version,
    about = "Captures the writes of protected machines and streams them to the master target"
)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Serve the protected disks and replicate them
    Run {
        /// The configuration
        #[arg(long, default_value = "/etc/backhaul/agent.toml")]
        config: PathBuf,
        /// Log as JSON, one object a line
        #[arg(long)]
        log_json: bool,
        /// What to log: `info`, `debug`, or a filter as RUST_LOG takes it
        #[arg(long, default_value = "info")]
        log: String,
    },
    /// Read the configuration and say everything that is wrong with it
    Check {
        /// The configuration
        #[arg(long, default_value = "/etc/backhaul/agent.toml")]
        config: PathBuf,
    },
    /// Print completions for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page
    Man,
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().verb {
        Verb::Run { config, log_json, log } => {
            let (bars, format) = (MultiProgress::new(), LogFormat::of(log_json));
            let above_bars = AboveBars(bars.clone());
            logging::start(format, &log, move || above_bars.clone());
            run(&config, ProgressView::new(bars))
        }
        Verb::Check { config } => check(&config),
        Verb::Completions { shell } => {
            let mut command = Arguments::command();
            clap_complete::generate(shell, &mut command, "backhaul-agent", &mut std::io::stdout());
            Ok(())
        }
        Verb::Man => clap_mangen::Man::new(Arguments::command())
            .render(&mut std::io::stdout())
            .map_err(Into::into),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", complaint::sentence(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn check(path: &std::path::Path) -> anyhow::Result<()> {
    let config = Config::load(path)?;
    let mut wrong: Vec<_> = config.identity.unreadable().iter().map(ToString::to_string).collect();
    if wrong.is_empty() {
        let identity = Identity::load(&config.identity, Role::Agent);
        wrong.extend(identity.err().map(|error| error.to_string()));
    }
    for disk in config.machines.iter().flat_map(|machine| &machine.disks) {
        wrong.extend(Device::open(&disk.path).err().map(|error| error.to_string()));
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    println!("{} is good: {} machine(s)", path.display(), config.machines.len());
    Ok(())
}

fn run(path: &std::path::Path, progress: ProgressView) -> anyhow::Result<()> {
    let config = Config::load(path)?;
    let identity = Identity::load(&config.identity, Role::Agent)?;
    let runtimes = Runtimes::start()?;
    let links = runtimes.link.handle().clone();
    runtimes.main.block_on(serve(path, config, identity, progress, links))
}

async fn serve(
    path: &std::path::Path,
    config: Config,
    identity: Identity,
    progress: ProgressView,
    links: Handle,
) -> anyhow::Result<()> {
    // A second agent on this state would replicate the same machines.
    let _state = FolderLock::take(&config.state_dir)?;
    let registry = prometheus::Registry::new();
    let agent = Agent::new(path, config.clone(), Metrics::new(&registry)?, progress)?;
    if let Some(address) = config.metrics {
        let bound = metrics::serve(address, registry)
            .await
            .with_context(|| format!("metrics cannot be served on {address}"))?;
        tracing::info!(address = %bound, "metrics");
    }
    let exports = Exports::default();
    for (name, export) in agent.exports() {
        exports.insert(&name, Arc::new(export));
    }
    let mut listeners = Vec::new();
    if let Some(path) = &config.nbd_unix {
        let listener = Listener::unix(path)
            .with_context(|| format!("NBD cannot be served on {}", path.display()))?;
        listeners.push(listener);
    }
    if let Some(address) = config.nbd_tcp {
        let listener = Listener::tcp(address)
            .await
            .with_context(|| format!("NBD cannot be served on {address}"))?;
        listeners.push(listener);
    }
    let server = Server::start(listeners, exports, ServerOptions::default());
    links.spawn(link::run(config, identity, agent.ceiling(), agent.link_events()));
    lifecycle::notify_ready();
    agent.run(lifecycle::asked_to_stop()).await;
    server.stopped().await;
    Ok(())
}
