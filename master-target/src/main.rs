//! `backhaul-master-target`: the daemon of an on-premises master target.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, ensure};
use backhaul_daemon::folder::FolderLock;
use backhaul_daemon::logging::LogFormat;
use backhaul_daemon::runtimes::Runtimes;
use backhaul_daemon::{complaint, lifecycle, logging, metrics};
use backhaul_master_target::config::Config;
use backhaul_master_target::machine::LinkId;
use backhaul_master_target::metrics::Metrics;
use backhaul_master_target::target::Target;
use backhaul_master_target::{api, link};
use backhaul_proto::id::PeerName;
use backhaul_proto::identity::{Identity, Role, create_ca, issue};
use backhaul_proto::link::{Listener, Places};
use backhaul_proto::quic::TransportOptions;
use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use tokio::runtime::Handle;

#[derive(Parser)]
#[command(
    version,
    about = "Journals the writes of protected machines and keeps their VMDKs ready to boot"
)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Receive, journal and apply
    Run {
        /// The configuration
        #[arg(long, default_value = "/etc/backhaul/master-target.toml")]
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
        #[arg(long, default_value = "/etc/backhaul/master-target.toml")]
        config: PathBuf,
    },
    /// Make the site's CA, and issue identities
    #[command(subcommand)]
    Pki(Pki),
    /// Print completions for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page
    Man,
}

#[derive(Subcommand)]
enum Pki {
    /// Make `ca.pem` and `ca.key`
    Init {
        /// The folder
        dir: PathBuf,
    },
    /// Issue `NAME.pem` and `NAME.key`
    Issue {
        /// The folder that `pki init` filled
        dir: PathBuf,
        /// What the holder may be
        role: RoleArgument,
        /// Its name: for an agent, what `agent` says in the target's configuration
        name: PeerName,
        /// How long the certificate is valid
        #[arg(long, default_value_t = 825)]
        days: u32,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum RoleArgument {
    Agent,
    Target,
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().verb {
        Verb::Run { config, log_json, log } => {
            logging::start(LogFormat::of(log_json), &log, std::io::stderr);
            run(&config)
        }
        Verb::Check { config } => check(&config),
        Verb::Pki(Pki::Init { dir }) => create_ca(&dir).map_err(Into::into),
        Verb::Pki(Pki::Issue { dir, role, name, days }) => {
            let role = match role {
                RoleArgument::Agent => Role::Agent,
                RoleArgument::Target => Role::Target,
            };
            issue(&dir, role, &name, days).map_err(Into::into)
        }
        Verb::Completions { shell } => {
            let mut command = Arguments::command();
            let name = "backhaul-master-target";
            clap_complete::generate(shell, &mut command, name, &mut std::io::stdout());
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

fn check(path: &Path) -> anyhow::Result<()> {
    let config = Config::load(path)?;
    let wrong: Vec<_> = config.identity.unreadable().iter().map(ToString::to_string).collect();
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Identity::load(&config.identity, Role::Target)?;
    println!("{} is good: {} machine(s)", path.display(), config.machines.len());
    Ok(())
}

fn run(path: &Path) -> anyhow::Result<()> {
    let config = Config::load(path)?;
    let identity = Identity::load(&config.identity, Role::Target)?;
    let runtimes = Runtimes::start()?;
    let links = runtimes.link.handle().clone();
    runtimes.main.block_on(serve(config, Arc::new(identity), links))
}

async fn serve(config: Config, identity: Arc<Identity>, links: Handle) -> anyhow::Result<()> {
    // Before anything is bound: a second target on this store must not take the first one's socket.
    let _store = FolderLock::take(&config.store)?;
    let store_dir = config.store.clone();
    let api_socket = api::bind(&config.api_socket)
        .with_context(|| format!("the API cannot be served on {}", config.api_socket.display()))?;
    let window_bytes = config.link_window_bytes;
    let options = TransportOptions { window_bytes, ..TransportOptions::default() };
    let (address, with_tcp, holder) = (config.listen, config.tcp, Arc::clone(&identity));
    let binding = async move { Listener::bind(address, &holder, &options, with_tcp).await };
    // Whoever binds a socket also serves it.
    let listener = links.spawn(binding).await??;
    let registry = prometheus::Registry::new();
    let counters = Metrics::new(&registry, identity.name().as_str(), listener.socket())?;
    if let Some(address) = config.metrics {
        let bound = metrics::serve(address, registry)
            .await
            .with_context(|| format!("metrics cannot be served on {address}"))?;
        tracing::info!(address = %bound, "metrics");
    }
    let target = tokio::task::block_in_place(|| Target::new(config, counters))?;
    tracing::info!(address = %listener.local_address()?, name = %identity.name(), "waiting for agents");

    let events = target.link_events();
    let store: Arc<Path> = store_dir.into();
    let accepting = async move {
        let mut next = 0;
        let places = Arc::new(Places::new(link::CONNECTIONS_PER_AGENT_MAX));
        while let Some(handshake) = listener.accept().await {
            next += 1;
            let (id, events, store) = (LinkId(next), events.clone(), Arc::clone(&store));
            let places = Arc::clone(&places);
            tokio::spawn(async move {
                match handshake.finish().await {
                    Ok(Some(connection)) => {
                        link::run(id, connection, &places, &store, events).await
                    }
                    Ok(None) => {}
                    Err(error) => tracing::warn!("{error}"),
                }
            });
        }
    };
    let accepting = links.spawn(accepting);
    let serving = tokio::spawn(api::serve(api_socket, target.api_requests()));
    lifecycle::notify_ready();
    target.run(lifecycle::asked_to_stop()).await;
    accepting.abort();
    serving.abort();
    Ok(())
}
