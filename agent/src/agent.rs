//! The owner loop: one task owns every machine's session; everything else sends it events.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use backhaul_daemon::bandwidth::Rate;
use backhaul_daemon::lifecycle;
use backhaul_proto::batch::EncodedBatch;
use backhaul_proto::id::{BatchSeq, DiskIndex, Generation, MachineIndex, MachineName, PointId};
use backhaul_proto::message::{
    Ack, DiskHello, HashReply, HashRequest, Heartbeat, Hello, Job, JobKind, JobReply, LinkReport,
    MachineHello, MachineWelcome, Progress, Standing, agent_message, target_message,
};
use backhaul_proto::quic::RateLimit;
use backhaul_proto::session::{BatchLimit, Sender};
use backhaul_proto::version::{VERSION_MAX, VERSION_MIN};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use crate::batch::{EncodePool, Encoded};
use crate::capture::{
    CapturedDisk, Device, Fence, MachineCapture, Mode, Order, OrderOptions, now_us,
};
use crate::config::{Config, MachineConfig};
use crate::job::{self, JobContext};
use crate::link::{LinkEvent, LinkUp};
use crate::metrics::Metrics;
use crate::progress::{ProgressView, SyncStanding};
use crate::state::{MachineState, Protection};
use crate::sync::{self, SyncHandle, SyncInput, SyncOutput};

/// How often progress is reported, points are looked at and metrics are refreshed.
const TICK: Duration = Duration::from_millis(250);

/// Below this rate, in bytes a second, the link is what limits and compressing pays; a core
/// compresses about four times as fast.
const SLOW_LINK_BYTES_PER_SECOND: f64 = 150e6;

/// Less than this under way says nothing about the link.
const LINK_BACKLOG_BYTES: u64 = 2 << 20;

/// How long a stopping agent waits for the target to acknowledge what it holds.
const DRAIN_TIME_MAX: Duration = Duration::from_secs(10);

/// What happens to the agent.
enum Event {
    Link(LinkEvent),
    Sync(SyncOutput),
    Encoded(usize, Encoded),
    JobDone(usize, JobReply),
}

/// One machine, as the owner loop holds it.
struct Machine {
    config: MachineConfig,
    capture: Arc<MachineCapture>,
    sender: Sender,
    /// Its ceiling at present.
    limit: BatchLimit,
    /// Encoded batches that wait for one before them.
    encoded: BTreeMap<BatchSeq, Encoded>,
    sync: SyncHandle,
    /// Its index on the present connection, while it may replicate.
    replicating: Option<MachineIndex>,
    point_period: Option<Duration>,
    next_point: Instant,
    running_job: Option<(u64, AbortHandle)>,
    /// Held while the machine's state file is replaced.
    state_lock: Arc<tokio::sync::Mutex<()>>,
    last_reply: Option<JobReply>,
    sync_sent_bytes: u64,
    trouble: String,
}

/// The agent.
pub struct Agent {
    config_path: PathBuf,
    config: Config,
    machines: Vec<Machine>,
    /// Machines of the configuration whose protection has ended.
    ended: Vec<MachineName>,
    pool: EncodePool,
    link: Option<LinkUp>,
    /// Why there is no link, to log a reason only when it changes.
    down_reason: String,
    events: mpsc::UnboundedSender<Event>,
    inbox: mpsc::UnboundedReceiver<Event>,
    metrics: Metrics,
    progress: ProgressView,
    acked_wire_bytes: u64,
    rate_since: (Instant, u64),
    acked_bytes_per_second: f64,
    /// The ceiling of all machines together, as QUIC keeps it.
    ceiling: RateLimit,
    /// The same, batch by batch.
    link_limit: BatchLimit,
    first_to_send: usize,
    /// How long the last heartbeat took there and back, in microseconds.
    heartbeat_us: u64,
    last_progress: Instant,
}

impl Agent {
    /// Opens every machine's disks and starts their workers. Machines whose protection has ended
    /// are left out.
    pub fn new(
        config_path: &Path,
        config: Config,
        metrics: Metrics,
        progress: ProgressView,
    ) -> anyhow::Result<Self> {
        let threads = std::thread::available_parallelism().map_or(2, usize::from);
        let pool = EncodePool::new(threads, config.compression)?;
        let (events, inbox) = mpsc::unbounded_channel();
        let mut agent = Self {
            config_path: config_path.to_owned(),
            machines: Vec::new(),
            ended: Vec::new(),
            pool,
            link: None,
            down_reason: String::new(),
            events,
            inbox,
            metrics,
            progress,
            acked_wire_bytes: 0,
            rate_since: (Instant::now(), 0),
            acked_bytes_per_second: 0.0,
            ceiling: RateLimit::default(),
            link_limit: BatchLimit::unlimited(),
            first_to_send: 0,
            heartbeat_us: 0,
            last_progress: Instant::now(),
            config,
        };
        for machine in agent.config.machines.clone() {
            agent.add_machine(machine)?;
        }
        Ok(agent)
    }

    fn add_machine(&mut self, config: MachineConfig) -> anyhow::Result<()> {
        let state = MachineState::load(&self.config.state_dir, &config.name)?;
        if state.protection == Protection::Ended {
            let file = self.config.state_dir.join(format!("{}.json", config.name));
            tracing::warn!(
                machine = %config.name,
                "protection ended with its commit; to protect it again, remove {}",
                file.display()
            );
            self.ended.push(config.name);
            return Ok(());
        }
        let mut disks = Vec::new();
        for (index, disk) in config.disks.iter().enumerate() {
            disks.push(Arc::new(CapturedDisk {
                index: DiskIndex(index as u16),
                name: disk.name.clone(),
                device: Device::open(&disk.path)?,
                ranges: Arc::default(),
            }));
        }
        let generation = new_generation(Generation(0));
        let order =
            Order::new(self.order_options(), generation, &disk_sizes(&disks), PointId(0), now_us());
        let fence = match state.protection {
            Protection::Fenced => Fence::Up,
            _ => Fence::Down,
        };
        let capture = MachineCapture::new(config.name.clone(), disks, order, fence);
        let (sync_events, mut sync_inbox) = mpsc::unbounded_channel();
        let runtime = tokio::runtime::Handle::current();
        let sync = sync::start(Arc::clone(&capture), sync_events, runtime)?;
        let events = self.events.clone();
        tokio::spawn(async move {
            while let Some(output) = sync_inbox.recv().await {
                let _ = events.send(Event::Sync(output));
            }
        });
        let index = self.machines.len();
        let sealing =
            seal_batches(Arc::clone(&capture), self.pool.clone(), self.config.batch_delay, {
                let events = self.events.clone();
                move |encoded| drop(events.send(Event::Encoded(index, encoded)))
            });
        tokio::spawn(sealing);
        self.machines.push(Machine {
            sender: Sender::new(generation),
            limit: BatchLimit::unlimited(),
            encoded: BTreeMap::new(),
            sync,
            replicating: None,
            point_period: None,
            next_point: Instant::now(),
            running_job: None,
            state_lock: Arc::default(),
            last_reply: None,
            sync_sent_bytes: 0,
            trouble: String::new(),
            config,
            capture,
        });
        Ok(())
    }

    fn order_options(&self) -> OrderOptions {
        let share = self.config.machines.len().max(1) as u64;
        OrderOptions { queue_bytes_max: (self.config.queue_bytes / share).max(2 << 20) }
    }

    /// What each export is called, and what stands behind it.
    pub fn exports(&self) -> Vec<(String, crate::capture::DiskExport)> {
        let mut exports = Vec::new();
        for machine in &self.machines {
            for (index, disk) in machine.config.disks.iter().enumerate() {
                let index = DiskIndex(index as u16);
                let export = crate::capture::DiskExport::new(Arc::clone(&machine.capture), index);
                exports.push((disk.export.clone(), export));
            }
        }
        exports
    }

    /// The ceiling of the link, for its transport to keep.
    pub fn ceiling(&self) -> RateLimit {
        self.ceiling.clone()
    }

    /// Where the link sends its events.
    pub fn link_events(&self) -> mpsc::UnboundedSender<LinkEvent> {
        let (sender, mut inbox) = mpsc::unbounded_channel();
        let events = self.events.clone();
        tokio::spawn(async move {
            while let Some(event) = inbox.recv().await {
                let _ = events.send(Event::Link(event));
            }
        });
        sender
    }

    /// Runs until `stop` is ready, then waits for what is under way, within a bound.
    pub async fn run(mut self, stop: impl Future<Output = ()>) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        tokio::pin!(stop);
        let mut stopping = None;
        let mut reload = lifecycle::Reload::new();
        loop {
            let limited = self.next_transmit();
            tokio::select! {
                event = self.inbox.recv() => {
                    let Some(event) = event else { return };
                    self.apply(event);
                }
                _ = tick.tick() => self.upkeep(),
                () = lifecycle::sleep_until(limited), if limited.is_some() => {
                    self.transmit_all();
                }
                () = reload.asked() => self.reload(),
                () = &mut stop, if stopping.is_none() => {
                    tracing::info!("stopping: waiting for the target to have everything");
                    stopping = Some(Instant::now());
                }
            }
            if let Some(since) = stopping {
                let drained = self.machines.iter().all(|machine| {
                    machine.replicating.is_none() || machine.capture.order().queued_bytes() == 0
                });
                if drained || since.elapsed() > DRAIN_TIME_MAX {
                    if let Some(link) = &self.link {
                        link.connection.close("the agent was stopped");
                    }
                    return;
                }
            }
        }
    }

    /// Reads the configuration again for what may change while the agent runs: the ceilings.
    fn reload(&mut self) {
        let config = match Config::load(&self.config_path) {
            Ok(config) => config,
            Err(errors) => return tracing::error!("the old configuration stays: {errors}"),
        };
        self.config.limit = config.limit;
        for machine in &mut self.machines {
            let new = config.machines.iter().find(|new| new.name == machine.config.name);
            if let Some(new) = new {
                machine.config.limit = new.limit.clone();
            }
        }
        tracing::info!("the limits were read again; other changes need a restart");
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Encoded(index, encoded) => self.handle_encoded(index, encoded),
            Event::Sync(output) => self.handle_sync(output),
            Event::JobDone(index, reply) => self.handle_job_done(index, reply),
            Event::Link(LinkEvent::Greeting(reply)) => {
                let _ = reply.send(self.hello());
            }
            Event::Link(LinkEvent::Connected { link, welcome }) => {
                tracing::info!(
                    target = %link.connection.peer(),
                    address = %link.connection.remote_address(),
                    transport = %link.connection.transport(),
                    "connected"
                );
                self.down_reason.clear();
                self.link = Some(link);
                for machine in &welcome.machines {
                    self.handle_standing(machine);
                }
            }
            Event::Link(LinkEvent::Message(message)) => self.handle_message(message),
            Event::Link(LinkEvent::Answer(reply)) => self.handle_answer(reply),
            Event::Link(LinkEvent::Down(reason)) => self.handle_down(reason),
        }
    }

    fn hello(&self) -> Hello {
        let machines = self.machines.iter().map(|machine| MachineHello {
            name: machine.config.name.to_string(),
            generation: machine.sender.generation().0,
            disks: machine
                .capture
                .disks()
                .iter()
                .map(|disk| DiskHello {
                    name: disk.name.to_string(),
                    // The size it has now: a disk that was resized is refused in words.
                    size_bytes: disk
                        .device
                        .current_size_bytes()
                        .unwrap_or(disk.device.size_bytes()),
                })
                .collect(),
            acked_batch: machine.sender.acked().0,
        });
        Hello {
            version_min: VERSION_MIN.0,
            version_max: VERSION_MAX.0,
            software: env!("CARGO_PKG_VERSION").into(),
            machines: machines.collect(),
            ended_machines: self.ended.iter().map(ToString::to_string).collect(),
        }
    }

    fn handle_standing(&mut self, welcome: &MachineWelcome) {
        let Some(machine) = self.machines.get_mut(welcome.machine as usize) else { return };
        let name = machine.config.name.clone();
        machine.trouble.clear();
        machine.capture.order().raise_last_point(PointId(welcome.newest_point));
        match welcome.standing() {
            Standing::Replicate => {
                let period = Duration::from_millis(welcome.point_period_ms);
                machine.point_period = (!period.is_zero()).then_some(period);
                machine.next_point = Instant::now() + period;
                let resumed = machine.sender.handle_connected(
                    BatchSeq(welcome.durable_batch),
                    BatchSeq(welcome.received_batch),
                    welcome.window_bytes,
                );
                match resumed {
                    Ok(released) => {
                        machine.capture.order().handle_resized(released.bytes, 0);
                        machine.replicating = Some(MachineIndex(welcome.machine as u16));
                        machine.sync.send(SyncInput::Connected);
                        self.transmit(welcome.machine as usize);
                    }
                    Err(error) => {
                        tracing::error!(machine = %name, %error, "everything is compared anew");
                        self.restart(welcome.machine as usize);
                    }
                }
            }
            Standing::Restart => {
                tracing::warn!(machine = %name, "the target asks for a new generation");
                self.restart(welcome.machine as usize);
            }
            Standing::FailedOver => {
                tracing::info!(machine = %name, "failed over; waiting for commit or cancel");
                machine.sender.handle_disconnected();
                machine.replicating = None;
                machine.sync.send(SyncInput::Disconnected);
                if welcome.fence && !machine.capture.is_fenced() {
                    tracing::warn!(machine = %name, "it was failed over without having been shut down; its writes are refused from now on");
                    let context = self.job_context(welcome.machine as usize);
                    tokio::spawn(job::fence(context));
                }
            }
            Standing::Ended => {
                machine.replicating = None;
                machine.trouble = "protection has ended: the machine was committed".into();
                tracing::warn!(machine = %name, "protection has ended: the machine was committed");
            }
            Standing::Refused | Standing::Unknown => {
                machine.replicating = None;
                let sentence = welcome.refusal.as_ref().map(|refusal| refusal.sentence.clone());
                machine.trouble = sentence.unwrap_or_else(|| "the target refuses it".into());
                tracing::error!(machine = %name, "the target refuses it: {}", machine.trouble);
            }
        }
    }

    /// Begins a new generation of a machine, and the session anew.
    fn restart(&mut self, index: usize) {
        let options = self.order_options();
        let machine = &mut self.machines[index];
        let generation = new_generation(machine.sender.generation());
        let sizes = disk_sizes(machine.capture.disks());
        machine.capture.with_order(|order| {
            let last_point = order.last_point();
            *order = Order::new(options, generation, &sizes, last_point, now_us());
        });
        machine.sender = Sender::new(generation);
        machine.encoded.clear();
        machine.replicating = None;
        machine.sync_sent_bytes = 0;
        machine.sync.send(SyncInput::Disconnected);
        if let Some(link) = &self.link {
            link.connection.close("a machine begins a new generation");
        }
    }

    fn handle_down(&mut self, reason: String) {
        self.link = None;
        for machine in &mut self.machines {
            machine.sender.handle_disconnected();
            machine.replicating = None;
            machine.sync.send(SyncInput::Disconnected);
        }
        if reason != self.down_reason {
            tracing::warn!(%reason, "no connection to the target; trying again for as long as it takes");
            self.down_reason = reason;
        }
    }

    fn handle_encoded(&mut self, index: usize, encoded: Encoded) {
        let machine = &mut self.machines[index];
        if encoded.batch.header.generation != machine.sender.generation() {
            return;
        }
        machine.encoded.insert(encoded.batch.header.batch, encoded);
        while let Some(entry) = machine.encoded.first_entry() {
            if *entry.key() != machine.sender.newest().next() {
                break;
            }
            let Encoded { batch, plain_held_bytes } = entry.remove();
            let wire_bytes = batch.wire_bytes() as u64;
            machine.capture.order().handle_resized(plain_held_bytes, wire_bytes);
            machine.sender.push(batch);
        }
        self.transmit(index);
    }

    fn transmit(&mut self, index: usize) {
        let (Some(link), machine) = (&self.link, &mut self.machines[index]) else { return };
        let Some(on_wire) = machine.replicating else { return };
        let now = Instant::now();
        while self.link_limit.poll_ready(now).is_ok()
            && machine.limit.poll_ready(now).is_ok()
            && let Some(batch) = machine.sender.poll_transmit()
        {
            machine.limit.handle_sent(now, batch.wire_bytes() as u64);
            self.link_limit.handle_sent(now, batch.wire_bytes() as u64);
            self.metrics.sent(machine.config.name.as_str(), &batch);
            tokio::spawn(send(link.connection.clone(), batch, on_wire));
        }
    }

    /// Each machine in turn is the first under the common ceiling.
    fn transmit_all(&mut self) {
        let count = self.machines.len();
        self.first_to_send = (self.first_to_send + 1) % count.max(1);
        for step in 0..count {
            self.transmit((self.first_to_send + step) % count);
        }
    }

    /// When a machine that a ceiling holds back may send again.
    fn next_transmit(&self) -> Option<Instant> {
        let now = Instant::now();
        let link = self.link_limit.poll_ready(now).err();
        let replicating = self.machines.iter().filter(|machine| machine.replicating.is_some());
        replicating
            .filter(|machine| machine.sender.held_bytes() > 0)
            .filter_map(|machine| machine.limit.poll_ready(now).err().max(link))
            .min()
    }

    fn handle_message(&mut self, message: target_message::Kind) {
        match message {
            target_message::Kind::Ack(ack) => self.handle_ack(&ack),
            target_message::Kind::Job(job) => self.handle_job(job),
            target_message::Kind::Machine(welcome) => self.handle_standing(&welcome),
            target_message::Kind::Heartbeat(Heartbeat { nonce }) => {
                self.heartbeat_us = now_us().saturating_sub(nonce);
            }
            target_message::Kind::Welcome(_)
            | target_message::Kind::Refused(_)
            | target_message::Kind::Probe(_) => {
                self.drop_link("the target greeted twice");
            }
        }
    }

    fn drop_link(&self, reason: &str) {
        if let Some(link) = &self.link {
            link.connection.close(reason);
        }
    }

    fn handle_ack(&mut self, ack: &Ack) {
        let Some(machine) = self.machines.get_mut(ack.machine as usize) else { return };
        if machine.replicating.is_none() {
            return;
        }
        match machine.sender.handle_ack(BatchSeq(ack.durable_batch), ack.window_bytes) {
            Ok(released) => {
                self.acked_wire_bytes += released.bytes;
                let mut order = machine.capture.order();
                order.handle_resized(released.bytes, 0);
                let wake = order.mode() != Mode::Ordered && order.has_room_for_sync();
                drop(order);
                if wake {
                    machine.sync.send(SyncInput::Wake);
                }
                self.transmit(ack.machine as usize);
            }
            Err(error) => {
                let reason = error.to_string();
                self.drop_link(&reason);
            }
        }
    }

    fn handle_job(&mut self, job: Job) {
        let index = job.machine as usize;
        let Some(machine) = self.machines.get_mut(index) else { return };
        if let Some(reply) = machine.last_reply.as_ref().filter(|reply| reply.job == job.job) {
            let reply = JobReply { machine: job.machine, ..reply.clone() };
            return self.say(agent_message::Kind::JobReply(reply));
        }
        match &machine.running_job {
            Some((running, _)) if *running == job.job => return,
            // What was asked before counts no more: a shutdown that a cancel has overtaken must
            // not raise the fence afterwards. Its hook ends with it.
            Some((_, running)) => running.abort(),
            None => {}
        }
        if job.kind() == JobKind::Resync {
            let reply = JobReply { job: job.job, machine: job.machine, ..JobReply::default() };
            machine.last_reply = Some(reply.clone());
            self.say(agent_message::Kind::JobReply(reply));
            return self.restart(index);
        }
        let job_number = job.job;
        tracing::info!(machine = %machine.config.name, job = job.job, kind = ?job.kind(), "a job began");
        let context = self.job_context(index);
        let events = self.events.clone();
        let running = tokio::spawn(async move {
            let reply = job::execute(context, job).await;
            let _ = events.send(Event::JobDone(index, reply));
        });
        self.machines[index].running_job = Some((job_number, running.abort_handle()));
    }

    fn job_context(&self, index: usize) -> JobContext {
        let machine = &self.machines[index];
        JobContext {
            capture: Arc::clone(&machine.capture),
            config: machine.config.clone(),
            state_dir: self.config.state_dir.clone(),
            state_lock: Arc::clone(&machine.state_lock),
        }
    }

    fn handle_job_done(&mut self, index: usize, reply: JobReply) {
        let machine = &mut self.machines[index];
        // The last words of a job that was overtaken.
        if machine.running_job.as_ref().is_none_or(|(running, _)| *running != reply.job) {
            return;
        }
        machine.running_job = None;
        match &reply.failure {
            None => {
                tracing::info!(machine = %machine.config.name, job = reply.job, "the job is done")
            }
            Some(failure) => {
                tracing::error!(machine = %machine.config.name, job = reply.job, "{}", failure.sentence);
            }
        }
        machine.last_reply = Some(reply.clone());
        let reply = JobReply { machine: index as u32, ..reply };
        self.say(agent_message::Kind::JobReply(reply));
    }

    fn say(&self, message: agent_message::Kind) {
        if let Some(link) = &self.link {
            link.control(message);
        }
    }

    fn handle_sync(&mut self, output: SyncOutput) {
        let of = |name| self.machines.iter().position(|machine| machine.config.name == name);
        match output {
            SyncOutput::Ask { machine, question, after } => {
                let Some(index) = of(machine) else { return };
                let on_wire = self.machines[index].replicating;
                if let (Some(link), Some(on_wire)) = (&self.link, on_wire) {
                    link.ask(HashRequest {
                        request: tag_request(index, question.request),
                        machine: on_wire.0.into(),
                        disk: question.first.disk.0.into(),
                        first_region: question.first.region,
                        regions: question.regions,
                        leaves: question.leaves,
                        after_batch: after.0,
                    });
                }
            }
            SyncOutput::Sent { machine, bytes } => {
                let Some(index) = of(machine) else { return };
                self.machines[index].sync_sent_bytes += bytes;
            }
            SyncOutput::Trouble { machine, sentence } => {
                let Some(index) = of(machine) else { return };
                self.machines[index].trouble = sentence;
            }
            SyncOutput::Finished { machine } => {
                let Some(index) = of(machine) else { return };
                let machine = &mut self.machines[index];
                let sent_bytes = std::mem::take(&mut machine.sync_sent_bytes);
                machine.next_point = Instant::now() + machine.point_period.unwrap_or_default();
                tracing::info!(machine = %machine.config.name, sent_bytes, "the sync is over: every block is in the stream");
                self.report_progress();
            }
        }
    }

    fn handle_answer(&mut self, reply: HashReply) {
        let (index, request) = untag_request(reply.request);
        let Some(machine) = self.machines.get_mut(index) else { return };
        if let Some(failure) = &reply.failure {
            machine.trouble.clone_from(&failure.sentence);
            tracing::error!(machine = %machine.config.name, "{}", failure.sentence);
        }
        // An answer without hashes makes the sync send the region unseen, which is always right.
        machine.sync.send(SyncInput::Answer(HashReply { request, ..reply }));
    }

    /// What is done on every tick.
    fn upkeep(&mut self) {
        let now = Instant::now();
        let ceiling = self.config.limit.now().map(Rate::bytes_per_second);
        self.ceiling.set(ceiling);
        // QUIC keeps the ceiling packet by packet. Over TCP, and on paths so short that a window
        // of a few packets already exceeds it, it is counted out in batches.
        self.link_limit.set(ceiling);
        for machine in &mut self.machines {
            let ceiling = machine.config.limit.now();
            machine.limit.set(ceiling.map(Rate::bytes_per_second));
            let Some(period) = machine.point_period else { continue };
            if machine.replicating.is_some() && now >= machine.next_point {
                machine.next_point = now + period;
                if !machine.capture.is_fenced() {
                    machine.capture.with_order(|order| order.set_point(now_us()));
                }
            }
            let mode = machine.capture.order().mode();
            if mode != Mode::Ordered {
                machine.sync.send(SyncInput::Wake);
            }
        }
        // A ceiling that was lifted leaves no timer behind that would go on sending.
        self.transmit_all();
        let (since, bytes) = self.rate_since;
        let seconds = now.duration_since(since).as_secs_f64();
        if seconds >= 0.2 {
            let rate = (self.acked_wire_bytes - bytes) as f64 / seconds;
            self.rate_since = (now, self.acked_wire_bytes);
            // Over about a second, so that a person can read it.
            self.acked_bytes_per_second += (rate - self.acked_bytes_per_second) * seconds.min(1.0);
            // What waits for the link, and what waits for the encoders: the larger is the bottleneck.
            let for_link: u64 = self.machines.iter().map(|m| m.sender.held_bytes()).sum();
            let queued: u64 = self.machines.iter().map(|m| m.capture.order().queued_bytes()).sum();
            let link_limits =
                for_link > LINK_BACKLOG_BYTES && for_link > queued - for_link.min(queued);
            self.pool.set_link_limited(link_limits && rate < SLOW_LINK_BYTES_PER_SECOND);
        }
        if now.duration_since(self.last_progress) >= Duration::from_secs(1) {
            self.report_progress();
            self.say(agent_message::Kind::Heartbeat(Heartbeat { nonce: now_us() }));
            self.report_link();
        }
        self.metrics.link(self.link.as_ref().map(|link| link.connection.stats()));
        for machine in &self.machines {
            let order = machine.capture.order();
            let total_bytes = match order.mode() {
                Mode::Ordered => 0,
                Mode::Syncing { total_bytes, .. } => total_bytes,
            };
            let (queued, dirty) = (order.queued_bytes(), order.dirty_bytes());
            drop(order);
            let name = machine.config.name.as_str();
            self.metrics.machine(name, machine.replicating.is_some(), queued, dirty, total_bytes);
            let standing = SyncStanding {
                total_bytes,
                dirty_bytes: dirty,
                sent_bytes: machine.sync_sent_bytes,
                replicating: machine.replicating.is_some(),
            };
            self.progress.update(name, standing);
        }
    }

    fn report_link(&self) {
        let Some(link) = &self.link else { return };
        let stats = link.connection.stats();
        let path = link.connection.congestion();
        let min_rtt = path.and_then(|path| path.min_rtt).unwrap_or_default();
        self.say(agent_message::Kind::Link(LinkReport {
            congestion: self.config.congestion.to_string(),
            rtt_us: if stats.rtt.is_zero() {
                self.heartbeat_us
            } else {
                stats.rtt.as_micros() as u64
            },
            window_bytes: stats.congestion_window_bytes,
            acked_bytes_per_second: self.acked_bytes_per_second as u64,
            ceiling_bytes_per_second: self.config.limit.now().map_or(0, Rate::bytes_per_second),
            mtu_bytes: stats.mtu_bytes.into(),
            sent_bytes: stats.sent_bytes,
            sent_packets: stats.sent_packets,
            lost_packets: stats.lost_packets,
            lost_bytes: stats.lost_bytes,
            mtu_black_holes: stats.mtu_black_holes,
            receive_buffer_bytes: stats.socket.receive_bytes as u64,
            send_buffer_bytes: stats.socket.send_bytes as u64,
            dropped_datagrams: stats.socket.dropped_datagrams(),
            state: path.map(|path| path.state.to_owned()).unwrap_or_default(),
            path_bytes_per_second: path.map_or(0, |path| path.bandwidth_bytes_per_second),
            min_rtt_us: min_rtt.as_micros() as u64,
        }));
    }

    fn report_progress(&mut self) {
        self.last_progress = Instant::now();
        for (index, machine) in self.machines.iter().enumerate() {
            if machine.replicating.is_none() {
                continue;
            }
            let order = machine.capture.order();
            let total = match order.mode() {
                Mode::Ordered => 0,
                Mode::Syncing { total_bytes, .. } => total_bytes,
            };
            let progress = Progress {
                machine: index as u32,
                newest_batch: order.newest_with_open().0,
                queued_bytes: order.queued_bytes(),
                dirty_bytes: order.dirty_bytes(),
                sync_total_bytes: total,
                sync_done_bytes: total.saturating_sub(order.dirty_bytes()),
                sync_sent_bytes: machine.sync_sent_bytes,
                trouble: machine.trouble.clone(),
            };
            drop(order);
            self.say(agent_message::Kind::Progress(progress));
        }
    }
}

/// Requests of different machines share one stream; the machine travels in the upper bits.
fn tag_request(index: usize, request: u64) -> u64 {
    (index as u64) << 48 | request
}

fn untag_request(tagged: u64) -> (usize, u64) {
    ((tagged >> 48) as usize, tagged & ((1 << 48) - 1))
}

fn disk_sizes(disks: &[Arc<CapturedDisk>]) -> Vec<u64> {
    disks.iter().map(|disk| disk.device.size_bytes()).collect()
}

/// A generation after `last`: the clock makes it unique over restarts of the agent.
fn new_generation(last: Generation) -> Generation {
    Generation(now_us().max(last.0 + 1))
}

async fn send(
    connection: backhaul_proto::link::Connection,
    batch: EncodedBatch,
    machine: MachineIndex,
) {
    // When this fails the connection has failed, and the batch is sent again on the next one.
    let _ = connection.send_batch(batch.chunks(machine)).await;
}

/// Seals a machine's batches as they fill, or after the delay, and has them encoded.
async fn seal_batches(
    capture: Arc<MachineCapture>,
    pool: EncodePool,
    delay: Duration,
    done: impl Fn(Encoded) + Clone + Send + Sync + 'static,
) {
    let submit = |seal_open: bool| {
        let batches = capture.order().take_sealed(seal_open);
        for batch in batches {
            pool.submit(batch, done.clone());
        }
    };
    loop {
        submit(false);
        if capture.order().has_open_batch() {
            let deadline = tokio::time::sleep(delay);
            tokio::pin!(deadline);
            loop {
                tokio::select! {
                    () = &mut deadline => break submit(true),
                    () = capture.changed() => submit(false),
                }
            }
        }
        capture.changed().await;
    }
}
