//! The owner loop: one task owns every machine; connections, workers and the API send it events.
//!
//! What it does with them is in `sessions` (who is connected), `batches` (data and questions),
//! `failovers` (what a failover decides) and `requests` (what operators ask for).

mod batches;
mod failovers;
mod requests;
mod sessions;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use backhaul_api::{
    CommitRequest, FailoverRequest, Failure, Link as LinkView, Machine as MachineView, Point,
    Status,
};
use backhaul_daemon::lifecycle;
use backhaul_proto::id::{BatchSeq, JobId, MachineIndex, MachineName, PeerName, PointId};
use backhaul_proto::message::{LinkReport, MachineHello};
use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::config::Config;
use crate::failover::Stage;
use crate::link::{LinkEvent, LinkUp};
use crate::machine::{LinkId, Machine, Saved, now_us};
use crate::machine_state::ImageMark;
use crate::metrics::Metrics;
use crate::recovery_point::RecoveryPoint;
use crate::worker::Report;

/// How often machines that an agent could not have at first are tried again.
const OPEN_PERIOD: Duration = Duration::from_secs(2);

/// Batches whose references are resolved at a time: as deep as a disk likes its queue.
const RESOLVING_MAX: usize = 16;

/// How often deadlines are looked at and metrics are refreshed.
const TICK: Duration = Duration::from_millis(250);

/// What the API asks. Each answer goes to who asked.
pub enum ApiRequest {
    /// The target as a whole.
    Status(oneshot::Sender<Status>),
    /// Every machine.
    Machines(oneshot::Sender<Vec<MachineView>>),
    /// Every connected agent's link.
    Links(oneshot::Sender<Vec<LinkView>>),
    /// Something of one machine.
    Machine(String, MachineRequest),
}

type Answer<T> = oneshot::Sender<Result<T, Failure>>;

/// What the API asks of one machine.
pub enum MachineRequest {
    /// How it stands.
    Show(Answer<MachineView>),
    /// Set a point now.
    Tag(Answer<Point>),
    /// Fail it over.
    Failover(FailoverRequest, Answer<MachineView>),
    /// Undo that.
    Cancel(Answer<MachineView>),
    /// Make it final.
    Commit(CommitRequest, Answer<MachineView>),
}

/// What happens to the target.
enum Event {
    Link(LinkId, LinkEvent),
    Worker(MachineName, Report),
    /// New content ids were written after the disks were brought to a point for this failover, or
    /// not.
    Ready(MachineName, u64, Result<(RecoveryPoint, Vec<ImageMark>), String>),
    /// A machine's state was made durable beside the loop, or not.
    Saved(MachineName, Saved),
    Api(ApiRequest),
}

/// A point that was asked for.
struct Tag {
    machine: MachineName,
    answer: Answer<Point>,
    /// Set once the agent made it: it is answered when the batch is on stable storage.
    made: Option<(BatchSeq, PointId)>,
}

/// The connection of an agent.
struct Link {
    up: LinkUp,
    agent: PeerName,
    /// Its machines, by index.
    machines: Vec<Option<MachineName>>,
    /// What it said of machines that it cannot have at present: their disks cannot be opened, or
    /// another agent has them.
    waiting: BTreeMap<MachineIndex, MachineHello>,
    since: Instant,
    /// When it last said something.
    heard: Instant,
    /// What it last said of the link.
    report: LinkReport,
}

/// The master target.
pub struct Target {
    config: Config,
    started: Instant,
    machines: BTreeMap<MachineName, Machine>,
    links: HashMap<LinkId, Link>,
    tags: HashMap<JobId, Tag>,
    last_job: u64,
    last_opening: Instant,
    hashers: Arc<Semaphore>,
    /// Batches whose references are being resolved.
    resolvers: Arc<Semaphore>,
    events: mpsc::UnboundedSender<Event>,
    inbox: mpsc::UnboundedReceiver<Event>,
    metrics: Metrics,
}

impl Target {
    /// Reads every machine's state, and opens those that were replicated before.
    pub fn new(config: Config, metrics: Metrics) -> anyhow::Result<Self> {
        let (events, inbox) = mpsc::unbounded_channel();
        let hashers = std::thread::available_parallelism().map_or(2, usize::from);
        let mut target = Self {
            started: Instant::now(),
            machines: BTreeMap::new(),
            links: HashMap::new(),
            tags: HashMap::new(),
            last_job: now_us(),
            last_opening: Instant::now(),
            hashers: Arc::new(Semaphore::new(hashers)),
            resolvers: Arc::new(Semaphore::new(RESOLVING_MAX)),
            events,
            inbox,
            metrics,
            config,
        };
        for config in target.config.machines.clone() {
            let name = config.name.clone();
            let machine = Machine::load(config, &target.config.store)?;
            target.machines.insert(name.clone(), machine);
            target.recover(&name);
        }
        Ok(target)
    }

    /// Opens a machine that was here before, and does what its stage asks for.
    fn recover(&mut self, name: &MachineName) {
        let Some(machine) = self.machines.get_mut(name) else { return };
        if machine.state.disks.is_empty() {
            return;
        }
        if !matches!(machine.failover.stage(), Stage::Committed(_))
            && let Err(sentence) = self.open(name)
        {
            tracing::error!(machine = %name, "{sentence}");
        }
        if let Some(machine) = self.machines.get(name) {
            let actions = machine.failover.resume_local();
            self.carry_out(name, actions);
        }
    }

    fn window_bytes(&self) -> u64 {
        let share = self.config.receive_memory_bytes / self.config.machines.len().max(1) as u64;
        share.clamp(4 << 20, 256 << 20)
    }

    fn open(&mut self, name: &MachineName) -> Result<(), String> {
        let window_bytes = self.window_bytes();
        let journal_bytes_max = self.config.journal_bytes_max;
        let Some(machine) = self.machines.get_mut(name) else { return Ok(()) };
        if machine.open.is_some() {
            return Ok(());
        }
        let (events, worker_of) = (self.events.clone(), name.clone());
        let report = move |report| drop(events.send(Event::Worker(worker_of.clone(), report)));
        machine.trouble.clear();
        let opened = machine.open(window_bytes, journal_bytes_max, report);
        opened.map_err(|error| {
            machine.trouble = error.to_string();
            machine.trouble.clone()
        })?;
        // A process that ended in the middle of a cancel has not looked at the disks.
        if *machine.failover.stage() == Stage::Replicating && !machine.state.ready.is_empty() {
            self.resume(name, true);
        }
        Ok(())
    }

    /// Where connections send their events.
    pub fn link_events(&self) -> mpsc::UnboundedSender<(LinkId, LinkEvent)> {
        let (sender, mut inbox) = mpsc::unbounded_channel();
        let events = self.events.clone();
        tokio::spawn(async move {
            while let Some((id, event)) = inbox.recv().await {
                let _ = events.send(Event::Link(id, event));
            }
        });
        sender
    }

    /// Where the API sends its requests; when more wait than fit, it waits too.
    pub fn api_requests(&self) -> mpsc::Sender<ApiRequest> {
        let (sender, mut inbox) = mpsc::channel(64);
        let events = self.events.clone();
        tokio::spawn(async move {
            while let Some(request) = inbox.recv().await {
                let _ = events.send(Event::Api(request));
            }
        });
        sender
    }

    /// Runs until `stop` is ready, then closes every store.
    pub async fn run(mut self, stop: impl Future<Output = ()>) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        tokio::pin!(stop);
        loop {
            let acks = self.next_ack();
            tokio::select! {
                event = self.inbox.recv() => match event {
                    Some(event) => self.apply(event),
                    None => break,
                },
                _ = tick.tick() => self.upkeep(),
                () = lifecycle::sleep_until(acks), if acks.is_some() => self.send_acks(),
                () = &mut stop => break,
            }
        }
        tracing::info!("stopping: making everything durable");
        for mut machine in self.machines.into_values() {
            if machine.is_unsaved()
                && let Err(error) = machine.persist()
            {
                tracing::error!(machine = %machine.config.name, %error, "its state cannot be made durable");
            }
            if let Some(open) = machine.open {
                let _ = tokio::task::spawn_blocking(move || open.worker.close()).await;
            }
        }
    }

    fn apply(&mut self, event: Event) {
        if let Event::Link(id, _) = &event
            && let Some(link) = self.links.get_mut(id)
        {
            link.heard = Instant::now();
        }
        match event {
            Event::Link(id, LinkEvent::Hello(up, hello)) => self.handle_hello(id, up, &hello),
            Event::Link(id, LinkEvent::Message(message)) => self.handle_message(id, message),
            Event::Link(id, LinkEvent::Question(request, asking)) => {
                self.handle_question(id, request, asking);
            }
            Event::Link(id, LinkEvent::Batch(header, batch)) => {
                if let Err(reason) = self.handle_batch(id, &header, batch) {
                    self.drop_link(id, &reason);
                }
            }
            Event::Link(id, LinkEvent::Folded(header, batch, place)) => {
                self.handle_folded(id, header, batch, place);
            }
            Event::Link(id, LinkEvent::Unresolved(header, reason)) => {
                if let Err(reason) = self.handle_unresolved(id, &header, &reason) {
                    self.drop_link(id, &reason);
                }
            }
            Event::Link(id, LinkEvent::Down(reason)) => self.handle_down(id, &reason),
            Event::Worker(name, report) => self.handle_report(&name, report),
            Event::Ready(name, failover, result) => self.handle_ready(&name, failover, result),
            Event::Saved(name, saved) => self.handle_saved(&name, saved),
            Event::Api(request) => self.handle_api(request),
        }
    }

    fn upkeep(&mut self) {
        let now = Instant::now();
        let names: Vec<_> = self.machines.keys().cloned().collect();
        for name in names {
            let Some(machine) = self.machines.get_mut(&name) else { continue };
            let facts = machine.facts(now);
            let actions = machine.failover.handle_timeout(now, &facts);
            self.carry_out(&name, actions);
        }
        if now.duration_since(self.last_opening) >= OPEN_PERIOD {
            self.last_opening = now;
            self.open_waiting();
            self.save_again();
        }
        self.tags.retain(|_, tag| !tag.answer.is_closed());
        for machine in self.machines.values() {
            self.metrics.machine(&machine.view(now));
        }
        self.metrics.agents(self.links.len());
        self.metrics.socket();
    }
}

/// A text from outside, cut and without control characters, for logs and sentences.
fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(400).collect()
}
