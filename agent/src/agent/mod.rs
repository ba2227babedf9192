//! The owner loop: one task owns every machine's session; everything else sends it events.
//!
//! What it does with them is in `sessions` (what the target says), `batches` (data and the sync's
//! questions), `ceilings` (what may be sent), `jobs` (what the target asks for) and `upkeep` (what every
//! tick brings).

mod ack_times;
mod batches;
mod ceilings;
mod jobs;
mod sessions;
mod upkeep;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use backhaul_daemon::bandwidth::Timestamp;
use backhaul_daemon::lifecycle;
use backhaul_proto::batch::PlainBatch;
use backhaul_proto::id::{BatchSeq, DiskIndex, Generation, MachineIndex, MachineName, PointId};
use backhaul_proto::message::JobReply;
use backhaul_proto::quic::RateLimit;
use backhaul_proto::session::{BatchLimit, Sender};
use backhaul_proto::version::Version;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use crate::agent::ack_times::AckTimes;
use crate::agent::ceilings::LinkCeiling;
use crate::batch::{EncodePool, Encoded};
use crate::capture::{CapturedDisk, Device, Fence, MachineCapture, Order, OrderOptions, now_us};
use crate::config::{Config, MachineConfig};
use crate::dedupe::Dedupe;
use crate::link::{LinkEvent, LinkUp};
use crate::metrics::Metrics;
use crate::progress::ProgressView;
use crate::state::{MachineState, Protection};
use crate::sync::{self, SyncHandle, SyncOutput};

/// How often progress is reported, points are looked at and metrics are refreshed.
const TICK: Duration = Duration::from_millis(250);

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
    ack_times: AckTimes,
    /// What the target holds of its content.
    dedupe: Arc<Dedupe>,
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
    /// The target that was connected last knows what references are.
    references: bool,
    /// The target that was connected last takes batches in control messages.
    control_batches: bool,
    /// Bytes that travelled as references on this connection.
    referenced_bytes: u64,
    /// Why there is no link, to log a reason only when it changes.
    down_reason: String,
    events: mpsc::UnboundedSender<Event>,
    inbox: mpsc::UnboundedReceiver<Event>,
    metrics: Metrics,
    progress: ProgressView,
    acked_wire_bytes: u64,
    rate_since: (Instant, u64),
    acked_bytes_per_second: f64,
    /// The ceiling of all machines together.
    ceiling: LinkCeiling,
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
        let pool = EncodePool::new(threads, config.compression, config.queue_bytes)?;
        let (events, inbox) = mpsc::unbounded_channel();
        let mut agent = Self {
            config_path: config_path.to_owned(),
            machines: Vec::new(),
            ended: Vec::new(),
            pool,
            link: None,
            references: false,
            control_batches: false,
            referenced_bytes: 0,
            down_reason: String::new(),
            events,
            inbox,
            metrics,
            progress,
            acked_wire_bytes: 0,
            rate_since: (Instant::now(), 0),
            acked_bytes_per_second: 0.0,
            ceiling: LinkCeiling::default(),
            first_to_send: 0,
            heartbeat_us: 0,
            last_progress: Instant::now(),
            config,
        };
        for machine in agent.config.machines.clone() {
            agent.add_machine(machine)?;
        }
        // The first connection already depends on it.
        agent.apply_ceilings(Timestamp::now());
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
            let device = Device::open(&disk.path)?;
            device.lock()?;
            disks.push(Arc::new(CapturedDisk {
                index: DiskIndex(index as u16),
                name: disk.name.clone(),
                device,
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
        let share = self.config.machines.len().max(1) as u64;
        let index_bytes = self.config.reference_index_bytes / share;
        let dedupe = Arc::new(Dedupe::new(index_bytes, generation, disks.clone()));
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
        let (pool, events) = (self.pool.clone(), self.events.clone());
        let to_encode = Arc::clone(&dedupe);
        let submit = move |batch| {
            let events = events.clone();
            pool.submit(batch, Arc::clone(&to_encode), move |encoded| {
                let _ = events.send(Event::Encoded(index, encoded));
            });
        };
        tokio::spawn(seal_batches(Arc::clone(&capture), self.config.batch_delay, submit));
        self.machines.push(Machine {
            sender: Sender::new(generation),
            ack_times: AckTimes::default(),
            dedupe,
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
        self.ceiling.transport()
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
                    self.forgive_debts();
                }
            }
            if let Some(since) = stopping {
                let drained = self.machines.iter().all(|machine| {
                    machine.replicating.is_none() || machine.capture.order().queued_bytes() == 0
                });
                if drained || since.elapsed() > DRAIN_TIME_MAX {
                    // Whoever holds the link connects no more.
                    self.inbox.close();
                    if let Some(link) = &self.link {
                        link.connection.end("the agent was stopped").await;
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
                // Before a sync reads ahead: over TCP a ceiling wants smaller batches.
                self.apply_ceilings(Timestamp::now());
                self.handle_version(Version(welcome.version));
                for machine in &welcome.machines {
                    self.handle_standing(machine);
                }
            }
            Event::Link(LinkEvent::Message(message)) => self.handle_message(message),
            Event::Link(LinkEvent::Answer(reply)) => self.handle_answer(reply),
            Event::Link(LinkEvent::Down(reason)) => self.handle_down(reason),
        }
    }
}

fn disk_sizes(disks: &[Arc<CapturedDisk>]) -> Vec<u64> {
    disks.iter().map(|disk| disk.device.size_bytes()).collect()
}

/// A generation after `last`: the clock makes it unique over restarts of the agent.
fn new_generation(last: Generation) -> Generation {
    Generation(now_us().max(last.0 + 1))
}

/// Seals a machine's batches as they fill, or after the delay, and has them encoded.
async fn seal_batches(
    capture: Arc<MachineCapture>,
    delay: Duration,
    encode: impl Fn(PlainBatch) + Send + Sync + 'static,
) {
    let submit = |seal_open: bool| {
        let batches = capture.order().take_sealed(seal_open);
        batches.into_iter().for_each(&encode);
    };
    loop {
        submit(false);
        if capture.order().has_open_batch() {
            // Others may join the batch until then; a write never waits longer to be sealed.
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
