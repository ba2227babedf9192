//! The example `transfer` at both ends of a link or of loopback: a transport with nothing behind it.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use backhaul_lab::link::Link;
use backhaul_lab::port::LoopbackPort;

use crate::Span;
use crate::peer::START_TIME_MAX;

/// What a transfer came to.
#[derive(Debug, Clone, Copy)]
pub struct Transferred {
    /// Payload that arrived, in bytes a second.
    pub bytes_per_second: f64,
    /// Processor time of both ends for each byte, in seconds.
    pub cpu_seconds_per_byte: f64,
}

/// Both ends. They are killed when this is dropped.
#[derive(Debug)]
pub struct Transfer {
    ends: [Child; 2],
    _port: LoopbackPort,
    lines: Receiver<(Duration, u64)>,
}

impl Drop for Transfer {
    fn drop(&mut self) {
        for end in &mut self.ends {
            let _ = end.kill();
            let _ = end.wait();
        }
    }
}

impl Transfer {
    /// Starts both ends of `kind`: over the link from site A to site B, or over loopback. Keys are
    /// put into `dir`.
    pub fn start(kind: &str, link: Option<&Link>, dir: &Path) -> anyhow::Result<Self> {
        let program = program()?;
        let command = |sends: bool| match link {
            Some(link) if sends => link.site_a().command_in(&program),
            Some(link) => link.site_b().command_in(&program),
            None => Command::new(&program),
        };
        let port = LoopbackPort::take()?;
        let address: SocketAddr = match link {
            Some(link) => (link.site_b().address(), 4433).into(),
            None => port.address(),
        };
        let start = |sends: bool, stdout: Stdio| {
            let end = if sends { "send" } else { "receive" };
            let mut command = command(sends);
            command.args([end, kind, &address.to_string()]).arg(dir).stdin(Stdio::null());
            command.stdout(stdout).stderr(Stdio::inherit());
            command.spawn().with_context(|| format!("{} cannot be started", program.display()))
        };
        let mut receiver = start(false, Stdio::piped())?;
        let output = receiver.stdout.take().context("a pipe was asked for")?;
        let mut lines = BufReader::new(output).lines().map_while(Result::ok);
        if lines.next().as_deref() != Some("ready") {
            let _ = receiver.kill();
            let _ = receiver.wait();
            bail!("the receiver of {kind} ended before it was ready");
        }
        let (tell, told) = channel();
        std::thread::spawn(move || {
            for line in lines {
                let words = line.split_once(' ');
                let Some((micros, bytes)) = words else { return };
                let (Ok(micros), Ok(bytes)) = (micros.parse(), bytes.parse()) else { return };
                if tell.send((Duration::from_micros(micros), bytes)).is_err() {
                    return;
                }
            }
        });
        let sender = match start(true, Stdio::null()) {
            Ok(sender) => sender,
            Err(error) => {
                let _ = receiver.kill();
                let _ = receiver.wait();
                return Err(error);
            }
        };
        // The sender first: it is the one to be stopped first.
        Ok(Self { ends: [sender, receiver], _port: port, lines: told })
    }

    /// Waits until it has run for `span.settle`, and measures for `span.measure` from then on.
    pub fn measure(&mut self, span: &Span) -> anyhow::Result<Transferred> {
        let first = self.wait_for(Duration::ZERO)?;
        let before = self.wait_for(first.0 + span.settle)?;
        let cpu_before = self.cpu_seconds()?;
        let after = self.wait_for(before.0 + span.measure)?;
        let cpu = self.cpu_seconds()? - cpu_before;
        for end in &mut self.ends {
            ensure!(end.try_wait()?.is_none(), "an end of the transfer ended by itself");
        }
        let bytes = (after.1 - before.1) as f64;
        let seconds = (after.0 - before.0).as_secs_f64();
        Ok(Transferred {
            bytes_per_second: bytes / seconds,
            cpu_seconds_per_byte: cpu / bytes.max(1.0),
        })
    }

    fn wait_for(&mut self, at: Duration) -> anyhow::Result<(Duration, u64)> {
        // A connection that died says nothing more.
        let until = Instant::now() + at + START_TIME_MAX;
        loop {
            match self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(line) if line.0 >= at => return Ok(line),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => bail!("nothing arrives"),
                Err(RecvTimeoutError::Disconnected) => bail!("the receiver ended"),
            }
        }
    }

    fn cpu_seconds(&self) -> anyhow::Result<f64> {
        self.ends.iter().map(|end| cpu_seconds(end.id())).sum()
    }
}

/// Processor time that a process has used, its own and the kernel's for it (proc_pid_stat(5), fields
/// 14 and 15). What the kernel does in interrupts is charged to whoever runs then, mostly the sender.
fn cpu_seconds(process: u32) -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
    // The second field is the name, which may hold anything, in brackets.
    let (_, rest) = stat.rsplit_once(')').context("/proc has another form")?;
    let ticks: u64 = rest.split_whitespace().skip(11).take(2).flat_map(str::parse::<u64>).sum();
    Ok(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

fn program() -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe()?.with_file_name("examples").join("transfer");
    ensure!(
        program.exists(),
        "{} is missing; build it with `cargo build --release -p backhaul-benches --examples`",
        program.display()
    );
    Ok(program)
}
