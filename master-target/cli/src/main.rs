//! `backhaul`: the operator's command line, a client of the master target's API.

mod arguments;
mod image;
mod lab;
mod print;
mod show;
mod steps;

use std::process::ExitCode;
use std::time::Duration;

use backhaul_api::{Client, ClientError, CommitRequest, FailoverRequest, Stage};
use backhaul_daemon::runtimes::pool;
use backhaul_disk_image::{ErrorKind, ImageError};
use backhaul_proto::limits::PROBE_TIME_MAX;
use clap::{CommandFactory, Parser};

use crate::arguments::{Arguments, LinkVerb, Verb};
use crate::show::Output;

/// Shorter says nothing about a long link.
const PROBE_TIME_MIN: Duration = Duration::from_secs(1);

/// The target refused, or what was asked for failed.
const EXIT_FAILED: u8 = 1;
/// The target cannot be reached or does not answer. (2 is clap's, for arguments that make no sense.)
const EXIT_UNREACHABLE: u8 = 3;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let output = Output::new(arguments.json);
    let runtime = match pool("backhaul") {
        Ok(runtime) => runtime,
        Err(error) => return fail(&output, &error.into()),
    };
    let outcome = runtime.block_on(run(&arguments, &output));
    // Threads that an interrupted command left at work end with the process.
    runtime.shutdown_background();
    match outcome {
        Ok(code) => code,
        Err(error) => fail(&output, &error),
    }
}

fn fail(output: &Output, error: &anyhow::Error) -> ExitCode {
    let client_error = error.downcast_ref::<ClientError>();
    let code = match client_error {
        Some(ClientError::Refused(failure)) => failure.code.as_str(),
        Some(ClientError::Unreachable { .. } | ClientError::Silent { .. }) => "unreachable",
        _ => "failed",
    };
    let sentence = client_error.map_or_else(|| sentence(error), ToString::to_string);
    output.failure(code, &sentence);
    match client_error {
        Some(ClientError::Unreachable { .. } | ClientError::Silent { .. }) => {
            ExitCode::from(EXIT_UNREACHABLE)
        }
        _ => ExitCode::from(EXIT_FAILED),
    }
}

/// What went wrong, said once: the sentence of a client's or an image's error ends with its source.
fn sentence(error: &anyhow::Error) -> String {
    match error.downcast_ref::<ImageError>() {
        Some(error) if error.kind() == ErrorKind::Outside => {
            format!("{error} (--allow-outside)")
        }
        Some(error) => error.to_string(),
        None => format!("{error:#}"),
    }
}

async fn run(arguments: &Arguments, output: &Output) -> anyhow::Result<ExitCode> {
    let client = Client::new(&arguments.socket);
    match &arguments.verb {
        Verb::Status => output.status(&client.status().await?),
        Verb::Machines => output.machines(&client.machines().await?),
        Verb::Points { machine } => output.points(&client.points(machine).await?),
        Verb::Tag { machine } => output.point(machine, &client.tag(machine).await?),
        Verb::Failover { machine, to, without_shutdown, drain_timeout } => {
            let request = FailoverRequest {
                to: to.clone(),
                without_shutdown: *without_shutdown,
                drain_timeout_seconds: drain_timeout.as_secs_f64(),
            };
            client.failover(machine, &request).await?;
            let done = steps::watch(&client, machine, output, &[Stage::FailedOver]).await?;
            output.failed_over(&done);
        }
        Verb::Cancel { machine } => {
            client.cancel(machine).await?;
            let done = steps::watch(&client, machine, output, &[Stage::Replicating]).await?;
            output.cancelled(&done);
        }
        Verb::Commit { machine, without_removal } => {
            let request = CommitRequest { without_removal: *without_removal };
            client.commit(machine, &request).await?;
            let done = steps::watch(&client, machine, output, &[Stage::Committed]).await?;
            output.committed(&done);
        }
        Verb::Link(LinkVerb::Status) => output.links(&client.links().await?),
        Verb::Link(LinkVerb::Probe { config, time }) => {
            let config = backhaul_agent::config::Config::load(config)?;
            let time = (*time).clamp(PROBE_TIME_MIN, PROBE_TIME_MAX);
            let spinner = output.spinner();
            let report = backhaul_agent::probe::run(&config, time, |step| {
                spinner.set_message(step.to_owned());
            });
            let report = report.await?;
            spinner.finish_and_clear();
            output.probe(&report);
        }
        Verb::Image(verb) => return image::run(verb, output),
        Verb::Lab(lab) => return lab::run(lab, output).await,
        Verb::Completions { shell } => {
            let mut command = Arguments::command();
            clap_complete::generate(*shell, &mut command, "backhaul", &mut std::io::stdout());
        }
        Verb::Man => clap_mangen::Man::new(Arguments::command()).render(&mut std::io::stdout())?,
    }
    Ok(ExitCode::SUCCESS)
}
