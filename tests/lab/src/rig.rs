//! Both daemons as real processes with throw-away keys, and what can be done to them.

use std::fs::{self, File};
use std::io;
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use backhaul_api::{Client, ClientError, Machine};
use tokio::task::JoinHandle;

use crate::link::{Link, LinkSpec};
use crate::port::LoopbackPort;
use crate::workload::WorkloadSpec;
use crate::writer::{Until, Written, write};

/// The name of the lab's first machine, mostly its only one.
pub const MACHINE: &str = "lab";

/// How often the target is asked how things stand while something is waited for.
const POLL: Duration = Duration::from_millis(50);

/// What to set up.
#[derive(Debug, Clone)]
pub struct RigSpec {
    /// Where everything is put; it exists.
    pub dir: PathBuf,
    /// Where the three programs are.
    pub programs: PathBuf,
    /// The protected disks, in order. Their names are `disk0`, `disk1` and so on.
    pub disks: Vec<PathBuf>,
    /// More machines of the same agent, each a name and its one disk, `disk0`.
    pub others: Vec<(String, PathBuf)>,
    /// How often a point is set.
    pub point_period: Duration,
    /// The link between the two, if it is not loopback.
    pub link: Option<LinkSpec>,
    /// What carries it: `auto`, `quic` or `tcp`.
    pub transport: String,
    /// The kind of image: `vmfs`, `monolithicFlat` or `raw`.
    pub kind: String,
    /// More lines for the top of the agent's configuration.
    pub agent_options: String,
    /// More lines for the top of the target's configuration.
    pub target_options: String,
    /// What the daemons log: a filter as `--log` takes it.
    pub log: String,
}

impl RigSpec {
    /// The plainest rig for one disk: loopback, ESXi images, points every five minutes.
    pub fn new(dir: &Path, disk: &Path) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("this program's own path is not known")?;
        let programs = programs_beside(&program)?;
        Ok(Self {
            dir: dir.to_owned(),
            programs,
            disks: vec![disk.to_owned()],
            others: Vec::new(),
            point_period: Duration::from_secs(300),
            link: None,
            transport: "auto".into(),
            kind: "vmfs".into(),
            agent_options: String::new(),
            target_options: String::new(),
            log: "info".into(),
        })
    }
}

/// The folder that holds the daemons, next to `program` or above it (tests run from `deps/`).
fn programs_beside(program: &Path) -> anyhow::Result<PathBuf> {
    for folder in program.ancestors().skip(1).take(3) {
        if ["backhaul-agent", "backhaul-master-target"]
            .iter()
            .all(|name| folder.join(name).exists())
        {
            return Ok(folder.to_owned());
        }
    }
    bail!(
        "backhaul-agent and backhaul-master-target are not beside {}; build them with `cargo build --release`",
        program.display()
    )
}

/// A running pair of daemons. Dropping it kills them.
#[derive(Debug)]
pub struct Rig {
    spec: RigSpec,
    link: Option<Link>,
    /// Where the target listens if there is no link.
    port: LoopbackPort,
    target: Option<Daemon>,
    agent: Option<Daemon>,
    client: Client,
}

/// A daemon that was started.
#[derive(Debug)]
struct Daemon {
    child: Child,
    /// Where its log began: those that ran before wrote to the same file.
    log_from: usize,
    since: Instant,
}

impl Rig {
    /// Makes keys and configurations. Starts nothing but the link.
    pub fn prepare(spec: RigSpec) -> anyhow::Result<Self> {
        let link = spec.link.clone().map(Link::start).transpose()?;
        let rig = Self {
            client: Client::new(&spec.dir.join("api.sock")),
            spec,
            link,
            port: LoopbackPort::take()?,
            target: None,
            agent: None,
        };
        rig.make_keys()?;
        rig.write_configurations()?;
        Ok(rig)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.spec.dir.join(name)
    }

    fn make_keys(&self) -> anyhow::Result<()> {
        let pki = self.path("pki");
        if pki.join("ca.pem").exists() {
            return Ok(());
        }
        let run = |arguments: &[&str]| {
            let program = self.spec.programs.join("backhaul-master-target");
            let output = Command::new(program).arg("pki").args(arguments).output()?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success(), "no keys could be made: {}", said.trim());
            Ok(())
        };
        let dir = pki.to_str().context("the lab's folder has a name that is not UTF-8")?;
        run(&["init", dir])?;
        run(&["issue", dir, "target", "lab-target"])?;
        run(&["issue", dir, "agent", "lab-agent"])
    }

    fn write_configurations(&self) -> anyhow::Result<()> {
        let address: SocketAddr = match &self.link {
            Some(link) => (link.site_b().address(), 4433).into(),
            None => self.port.address(),
        };
        let dir = self.spec.dir.display();
        let period = self.spec.point_period.as_millis();
        let kind = &self.spec.kind;
        let identity = |name: &str| {
            format!(
                "[identity]\nca = \"{dir}/pki/ca.pem\"\ncert = \"{dir}/pki/{name}.pem\"\nkey = \"{dir}/pki/{name}.key\"\n"
            )
        };
        let mut target = format!(
            "listen = \"{address}\"\nstore = \"{dir}/store\"\napi_socket = \"{dir}/api.sock\"\n{}\n{}\n",
            self.spec.target_options,
            identity("lab-target")
        );
        let mut agent = format!(
            "target = \"{address}\"\ntarget_name = \"lab-target\"\nstate_dir = \"{dir}/agent\"\ntransport = \"{}\"\n{}\n{}\n[nbd]\nunix = \"{dir}/nbd.sock\"\n",
            self.spec.transport,
            self.spec.agent_options,
            identity("lab-agent")
        );
        let hooks = format!(
            "shutdown_hook = [\"sh\", \"-c\", \"touch {dir}/guest-off; while test -e {dir}/guest-running; do sleep 0.02; done\"]\nremoval_hook = [\"touch\", \"{dir}/guest-removed\"]\n"
        );
        let others = self.spec.others.iter();
        let others = others.map(|(name, disk)| (name.as_str(), std::slice::from_ref(disk), ""));
        let first = (MACHINE, self.spec.disks.as_slice(), hooks.as_str());
        for (name, disks, hooks) in std::iter::once(first).chain(others) {
            target += &format!(
                "[[machine]]\nname = \"{name}\"\nagent = \"lab-agent\"\npoint_period = \"{period} ms\"\n"
            );
            agent += &format!("[[machine]]\nname = \"{name}\"\n{hooks}");
            for (index, disk) in disks.iter().enumerate() {
                let image = self.image_of(name, index);
                target += &format!(
                    "[[machine.disk]]\nname = \"disk{index}\"\nimage = \"{}\"\nkind = \"{kind}\"\n",
                    image.display()
                );
                agent += &format!(
                    "[[machine.disk]]\nname = \"disk{index}\"\npath = \"{}\"\n",
                    disk.display()
                );
            }
        }
        fs::create_dir_all(self.path("images"))?;
        fs::write(self.path("master-target.toml"), target)?;
        fs::write(self.path("agent.toml"), agent)?;
        Ok(())
    }

    /// Where the image of a disk is or will be.
    pub fn image(&self, disk: usize) -> PathBuf {
        self.image_of(MACHINE, disk)
    }

    /// The same of one of the other machines, whose disk is number 0.
    pub fn image_of(&self, machine: &str, disk: usize) -> PathBuf {
        let ending = if self.spec.kind == "raw" { "raw" } else { "vmdk" };
        self.path("images").join(format!("{machine}-disk{disk}.{ending}"))
    }

    /// The agent's NBD socket.
    pub fn nbd_socket(&self) -> PathBuf {
        self.path("nbd.sock")
    }

    /// The name of a disk's export.
    pub fn export(&self, disk: usize) -> String {
        format!("{MACHINE}-disk{disk}")
    }

    /// What the shutdown hook leaves behind: the guest is asked to go down. The hook returns when
    /// it is down.
    pub fn guest_off(&self) -> PathBuf {
        self.path("guest-off")
    }

    /// Starts a guest that writes until it is shut down, or until it has done `operations`.
    ///
    /// # Errors
    ///
    /// When the lab's folder cannot be written.
    pub fn start_guest(
        &self,
        client: backhaul_nbd::Client,
        spec: WorkloadSpec,
        operations: Option<u64>,
    ) -> io::Result<JoinHandle<Result<Written, backhaul_nbd::ClientError>>> {
        let running = self.path("guest-running");
        File::create(&running)?;
        let until = match operations {
            Some(most) => Until::Operations(most),
            None => Until::Off(self.guest_off()),
        };
        Ok(tokio::spawn(async move {
            let written = write(client, spec, until).await;
            fs::remove_file(&running)?;
            written
        }))
    }

    /// What the removal hook leaves behind.
    pub fn guest_removed(&self) -> PathBuf {
        self.path("guest-removed")
    }

    /// A client of the target's API.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The emulated link, if there is one.
    pub fn link(&self) -> Option<&Link> {
        self.link.as_ref()
    }

    /// Changes the emulated link while it runs.
    ///
    /// # Errors
    ///
    /// When there is none, or it refuses.
    pub fn set_link(&mut self, spec: LinkSpec) -> anyhow::Result<()> {
        Ok(self.link.as_mut().context("the rig has no link")?.set_spec(spec)?)
    }

    fn spawn(&self, program: &str, configuration: &str, log: &str) -> anyhow::Result<Daemon> {
        let path = self.spec.programs.join(program);
        let mut command = match &self.link {
            Some(link) if program == "backhaul-agent" => link.site_a().command_in(&path),
            Some(link) => link.site_b().command_in(&path),
            None => Command::new(&path),
        };
        // SAFETY: the closure makes one system call, and neither allocates nor takes a lock, as is
        // required between fork and exec.
        unsafe {
            command.pre_exec(|| {
                // Even a lab that is killed leaves no daemon behind.
                let signal = Some(rustix::process::Signal::KILL);
                Ok(rustix::process::set_parent_process_death_signal(signal)?)
            });
        }
        let log = File::options().create(true).append(true).open(self.path(log))?;
        let log_from = log.metadata()?.len() as usize;
        // It would go before what is asked for here.
        command.env_remove("RUST_LOG");
        let child = command
            .args(["run", "--config"])
            .arg(self.path(configuration))
            .args(["--log", &self.spec.log])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .with_context(|| format!("{} cannot be started", path.display()))?;
        Ok(Daemon { child, log_from, since: Instant::now() })
    }

    /// Starts the target.
    pub fn start_target(&mut self) -> anyhow::Result<()> {
        self.target = Some(self.spawn(
            "backhaul-master-target",
            "master-target.toml",
            "master-target.log",
        )?);
        Ok(())
    }

    /// Starts the agent.
    pub fn start_agent(&mut self) -> anyhow::Result<()> {
        self.agent = Some(self.spawn("backhaul-agent", "agent.toml", "agent.log")?);
        Ok(())
    }

    /// How long ago the agent was started; zero when none runs.
    pub fn agent_age(&self) -> Duration {
        self.agent.as_ref().map_or(Duration::ZERO, |agent| agent.since.elapsed())
    }

    /// Kills the target as a power cut would, and waits for its end.
    pub fn kill_target(&mut self) {
        kill(&mut self.target);
    }

    /// Kills the agent as a power cut would, and waits for its end.
    pub fn kill_agent(&mut self) {
        kill(&mut self.agent);
    }

    /// Asks the agent to end, and waits until it has.
    pub fn stop_agent(&mut self) {
        if let Some(Daemon { mut child, .. }) = self.agent.take() {
            signal(&child, rustix::process::Signal::TERM);
            let _ = child.wait();
        }
    }

    /// Writes the configuration of a daemon (`agent` or `master-target`) anew, as `edit` returns it.
    pub fn edit_configuration(
        &self,
        daemon: &str,
        edit: impl FnOnce(String) -> String,
    ) -> io::Result<()> {
        let path = self.path(&format!("{daemon}.toml"));
        fs::write(&path, edit(fs::read_to_string(&path)?))
    }

    /// Asks the agent to read its configuration again.
    pub fn reload_agent(&self) {
        if let Some(Daemon { child, .. }) = &self.agent {
            signal(child, rustix::process::Signal::HUP);
        }
    }

    /// Stops the target's clock, as a hung disk or hypervisor would, until [`Rig::thaw_target`].
    pub fn freeze_target(&self) {
        if let Some(Daemon { child, .. }) = &self.target {
            signal(child, rustix::process::Signal::STOP);
        }
    }

    /// Lets the target go on.
    pub fn thaw_target(&self) {
        if let Some(Daemon { child, .. }) = &self.target {
            signal(child, rustix::process::Signal::CONT);
        }
    }

    /// Asks both to stop, agent first, and waits for their ends.
    pub fn stop(&mut self) {
        for daemon in [&mut self.agent, &mut self.target] {
            if let Some(Daemon { mut child, .. }) = daemon.take() {
                signal(&child, rustix::process::Signal::TERM);
                let _ = child.wait();
            }
        }
    }

    /// The most memory that agent and target have held so far, in bytes (`VmHWM`).
    pub fn memory_bytes_max(&self) -> (u64, u64) {
        (memory_of(self.agent.as_ref()), memory_of(self.target.as_ref()))
    }

    /// Fails when a daemon that was started has ended by itself, with the end of its log.
    fn check_alive(&mut self) -> anyhow::Result<()> {
        let ended = |daemon: &mut Option<Daemon>| {
            daemon.as_mut().and_then(|daemon| daemon.child.try_wait().ok().flatten())
        };
        for (name, status) in
            [("agent", ended(&mut self.agent)), ("master-target", ended(&mut self.target))]
        {
            if let Some(status) = status {
                let log = fs::read_to_string(self.path(&format!("{name}.log"))).unwrap_or_default();
                let tail: Vec<_> = log.lines().rev().take(5).collect();
                let tail: Vec<_> = tail.into_iter().rev().collect();
                bail!("the {name} ended ({status}); it said:\n{}", tail.join("\n"));
            }
        }
        Ok(())
    }

    /// Waits until the machine is as `wanted` says, looking at it every now and then. `what` names
    /// what is waited for.
    pub async fn wait(
        &mut self,
        what: &str,
        limit: Duration,
        mut wanted: impl FnMut(&Machine) -> bool,
    ) -> anyhow::Result<Machine> {
        let start = Instant::now();
        loop {
            self.check_alive()?;
            let last = match self.client.machine(MACHINE).await {
                Ok(machine) if wanted(&machine) => return Ok(machine),
                Ok(machine) => format!("{machine:?}"),
                Err(ClientError::Refused(failure)) => bail!("{}", failure.sentence),
                Err(error) => error.to_string(),
            };
            if start.elapsed() > limit {
                bail!("{what} did not happen within {limit:?}; at the end: {last}");
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Waits until a daemon (`agent` or `master-target`) has logged `text` since it was last started.
    pub async fn wait_log(&mut self, daemon: &str, text: &str) -> anyhow::Result<()> {
        let start = Instant::now();
        let running = if daemon == "agent" { &self.agent } else { &self.target };
        let log_from = running.as_ref().map_or(0, |running| running.log_from);
        loop {
            let log = fs::read_to_string(self.path(&format!("{daemon}.log"))).unwrap_or_default();
            if log.get(log_from..).is_some_and(|log| log.contains(text)) {
                return Ok(());
            }
            self.check_alive()?;
            if start.elapsed() > Duration::from_secs(30) {
                bail!("the {daemon} never said `{text}`; its log:\n{log}");
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// The folder that everything is in.
    pub fn dir(&self) -> &Path {
        &self.spec.dir
    }

    /// Waits until the agent's NBD server answers.
    pub async fn connect(&mut self, disk: usize) -> anyhow::Result<backhaul_nbd::Client> {
        let start = Instant::now();
        loop {
            self.check_alive()?;
            match backhaul_nbd::Client::unix(&self.nbd_socket(), &self.export(disk)).await {
                Ok(client) => return Ok(client),
                Err(error) if start.elapsed() > Duration::from_secs(20) => return Err(error.into()),
                Err(_) => tokio::time::sleep(POLL).await,
            }
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.kill_agent();
        self.kill_target();
    }
}

fn signal(child: &Child, signal: rustix::process::Signal) {
    if let Some(pid) = rustix::process::Pid::from_raw(child.id() as i32) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

fn kill(daemon: &mut Option<Daemon>) {
    if let Some(Daemon { mut child, .. }) = daemon.take() {
        let _ = child.kill();
        let _ = child.wait();
    }
}

fn memory_of(daemon: Option<&Daemon>) -> u64 {
    let read = |child: &Child| -> io::Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        Ok(kib.unwrap_or(0) << 10)
    };
    daemon.and_then(|daemon| read(&daemon.child).ok()).unwrap_or(0)
}
