//! The owner loop: one task owns every machine; connections, workers and the API send it events.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use backhaul_api::{
    CommitRequest, FailoverRequest, Failure, Machine as MachineView, Point, Status,
};
use backhaul_proto::batch::{BatchHeader, RecordKind};
use backhaul_proto::id::{
    BatchSeq, Generation, JobId, MachineIndex, MachineName, PeerName, PointId,
};
use backhaul_proto::limits::{DISKS_MAX, MACHINES_MAX};
use backhaul_proto::message::{
    Ack, Code, HashRequest, Heartbeat, Hello, Job, JobKind, JobReply, MachineHello, MachineWelcome,
    Progress, Refusal as WireRefusal, Standing, Welcome, agent_message, target_message,
};
use backhaul_proto::session::{Delivery, Receiver, ReceiverConfig, Rejected};
use backhaul_proto::version::{VERSION_MAX, VERSION_MIN, Version, negotiate};
use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::batch_buffer::IncomingBatch;
use crate::config::Config;
use crate::failover::{Action, Goal, Plan};
use crate::hashing;
use crate::link::{LinkEvent, LinkUp};
use crate::machine::{LinkId, Machine, now_us, point_view};
use crate::machine_state::{Consistency, DiskState, ImageMark};
use crate::metrics::Metrics;
use crate::recovery_point::{PointText, RecoveryPoint};
use crate::worker::{Command, Report};

/// Questions of an agent that may wait for batches to be applied; an agent keeps fewer open.
const QUESTIONS_MAX: usize = 1024;

/// How often deadlines are looked at and metrics are refreshed.
const TICK: Duration = Duration::from_millis(250);

/// What the API asks. Each answer goes to who asked.
pub enum ApiRequest {
    /// The target as a whole.
    Status(oneshot::Sender<Status>),
    /// Every machine.
    Machines(oneshot::Sender<Vec<MachineView>>),
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
    /// New content ids were written after the disks were brought to a point, or not.
    Ready(MachineName, Result<(RecoveryPoint, Vec<ImageMark>), String>),
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
}

/// The master target.
pub struct Target {
    config: Config,
    started: Instant,
    machines: BTreeMap<MachineName, Machine>,
    links: HashMap<LinkId, Link>,
    tags: HashMap<JobId, Tag>,
    last_job: u64,
    hashers: Arc<Semaphore>,
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
            hashers: Arc::new(Semaphore::new(hashers)),
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
        if !matches!(machine.failover.stage(), crate::failover::Stage::Committed(_))
            && let Err(sentence) = self.open(name)
        {
            tracing::error!(machine = %name, "{sentence}");
            return;
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
        let (events, worker_of) = (self.events.clone(), name.clone());
        let report = move |report| drop(events.send(Event::Worker(worker_of.clone(), report)));
        let opened = machine.open(window_bytes, journal_bytes_max, report);
        opened.map_err(|error| {
            machine.trouble = error.to_string();
            machine.trouble.clone()
        })
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
                () = sleep_until(acks), if acks.is_some() => self.send_acks(),
                () = &mut stop => break,
            }
        }
        tracing::info!("stopping: making everything durable");
        for machine in self.machines.into_values() {
            if let Some(open) = machine.open {
                let _ = tokio::task::spawn_blocking(move || open.worker.close()).await;
            }
        }
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Link(id, LinkEvent::Hello(up, hello)) => self.handle_hello(id, up, &hello),
            Event::Link(id, LinkEvent::Message(message)) => self.handle_message(id, message),
            Event::Link(id, LinkEvent::Question(request)) => self.handle_question(id, request),
            Event::Link(id, LinkEvent::Batch(header, batch)) => {
                if let Err(reason) = self.handle_batch(id, &header, batch) {
                    self.drop_link(id, &reason);
                }
            }
            Event::Link(id, LinkEvent::Down(reason)) => self.handle_down(id, &reason),
            Event::Worker(name, report) => self.handle_report(&name, report),
            Event::Ready(name, result) => self.handle_ready(&name, result),
            Event::Api(request) => self.handle_api(request),
        }
    }

    // Sessions

    fn handle_hello(&mut self, id: LinkId, up: LinkUp, hello: &Hello) {
        let agent = up.connection.peer().clone();
        let theirs = (Version(hello.version_min), Version(hello.version_max));
        let Some(version) = negotiate((VERSION_MIN, VERSION_MAX), theirs) else {
            let sentence = format!(
                "agent {agent} ({}) speaks protocol versions {} to {}, this target ({}) {VERSION_MIN} to {VERSION_MAX}; update the older of the two",
                hello.software,
                theirs.0,
                theirs.1,
                env!("CARGO_PKG_VERSION")
            );
            tracing::error!("{sentence}");
            return up.refuse(Code::Version, &sentence);
        };
        if hello.machines.len() > MACHINES_MAX {
            return up.refuse(Code::Protocol, "a hello names more than 64 machines");
        }
        tracing::info!(%agent, address = %up.connection.remote_address(), %version, "an agent connected");
        let mut machines = Vec::new();
        let mut welcomes = Vec::new();
        for (index, hello) in hello.machines.iter().enumerate() {
            let index = MachineIndex(index as u16);
            let (name, welcome) = match self.attach(id, index, &agent, hello) {
                Ok((name, welcome)) => (Some(name), welcome),
                Err((code, sentence)) => {
                    tracing::error!(%agent, machine = hello.name, "{sentence}");
                    (None, refused(index, code, sentence))
                }
            };
            machines.push(name);
            welcomes.push(welcome);
        }
        up.control(target_message::Kind::Welcome(Welcome {
            version: version.0,
            software: env!("CARGO_PKG_VERSION").into(),
            machines: welcomes,
        }));
        let names: Vec<_> = machines.iter().flatten().cloned().collect();
        self.links.insert(id, Link { up, agent, machines });
        for name in names {
            let now = Instant::now();
            if let Some(machine) = self.machines.get_mut(&name) {
                let actions = machine.failover.resume(now, true);
                self.carry_out(&name, actions);
            }
        }
    }

    /// Ties a machine to a connection, if everything about it is right.
    fn attach(
        &mut self,
        id: LinkId,
        index: MachineIndex,
        agent: &PeerName,
        hello: &MachineHello,
    ) -> Result<(MachineName, MachineWelcome), (Code, String)> {
        let known = hello.name.parse::<MachineName>().ok();
        let known = known.and_then(|name| self.machines.get_mut(&name));
        let Some(machine) = known else {
            let names: Vec<_> = self.machines.keys().map(ToString::to_string).collect();
            let sentence = format!(
                "this target knows no machine `{}`; add it to the target's configuration, or correct the agent's (known here: {})",
                printable(&hello.name),
                names.join(", ")
            );
            return Err((Code::UnknownMachine, sentence));
        };
        let name = machine.config.name.clone();
        if machine.config.agent != *agent {
            let sentence = format!(
                "machine {name} is enrolled to agent {}, not to {agent}; change `agent` in the target's configuration if that is meant",
                machine.config.agent
            );
            return Err((Code::NotEnrolled, sentence));
        }
        if let crate::failover::Stage::Committed(_) = machine.failover.stage() {
            return Ok((name, welcome(index, Standing::Ended)));
        }
        check_disks(machine, hello)?;
        if machine.open.is_none() {
            self.open(&name).map_err(|sentence| (Code::Storage, sentence))?;
        }
        if let Some((old, _)) = self.machines.get(&name).and_then(|machine| machine.link)
            && old != id
        {
            self.drop_link(old, "a newer connection replicates its machine");
        }
        let Some(machine) = self.machines.get_mut(&name) else {
            return Err((Code::Other, "the machine is gone".into()));
        };
        machine.link = Some((id, index));
        machine.questions.clear();
        let generation = Generation(hello.generation);
        let welcome = standing(machine, index, generation, BatchSeq(hello.acked_batch));
        Ok((name, welcome))
    }

    fn drop_link(&mut self, id: LinkId, reason: &str) {
        if let Some(link) = self.links.get(&id) {
            tracing::warn!(agent = %link.agent, reason, "a connection is dropped");
            link.up.connection.close(reason);
        }
        self.forget_link(id);
    }

    fn handle_down(&mut self, id: LinkId, reason: &str) {
        if let Some(link) = self.links.get(&id) {
            tracing::warn!(agent = %link.agent, reason, "an agent is gone");
        }
        self.forget_link(id);
    }

    fn forget_link(&mut self, id: LinkId) {
        self.links.remove(&id);
        for machine in self.machines.values_mut() {
            if machine.link.is_some_and(|(link, _)| link == id) {
                machine.link = None;
                machine.questions.clear();
                if let Some(open) = &mut machine.open {
                    open.receiver.handle_disconnected();
                }
            }
        }
    }

    fn machine_on(&mut self, id: LinkId, index: u32) -> Option<&mut Machine> {
        let name = self.links.get(&id)?.machines.get(index as usize)?.clone()?;
        self.machines
            .get_mut(&name)
            .filter(|machine| machine.link.is_some_and(|(link, _)| link == id))
    }

    fn handle_message(&mut self, id: LinkId, message: agent_message::Kind) {
        match message {
            agent_message::Kind::Hello(_) => self.drop_link(id, "the agent said hello twice"),
            agent_message::Kind::Heartbeat(Heartbeat { nonce }) => {
                if let Some(link) = self.links.get(&id) {
                    link.up.control(target_message::Kind::Heartbeat(Heartbeat { nonce }));
                }
            }
            agent_message::Kind::Progress(progress) => self.handle_progress(id, progress),
            agent_message::Kind::JobReply(reply) => self.handle_job_reply(id, &reply),
        }
    }

    fn handle_progress(&mut self, id: LinkId, mut progress: Progress) {
        let Some(machine) = self.machine_on(id, progress.machine) else { return };
        progress.trouble = printable(&progress.trouble);
        if progress.dirty_bytes == 0
            && let Some(open) = &machine.open
        {
            let (newest, durable) = (BatchSeq(progress.newest_batch), open.receiver.durable());
            machine.watermark.handle_progress(Instant::now(), newest, durable);
        }
        machine.progress = Some(progress);
    }

    // Batches

    fn handle_batch(
        &mut self,
        id: LinkId,
        header: &BatchHeader,
        batch: IncomingBatch,
    ) -> Result<(), String> {
        let window_bytes = self.window_bytes();
        let Some(machine) = self.machine_on(id, header.machine.0.into()) else {
            return Ok(());
        };
        machine.received.0 += u64::from(header.wire_bytes);
        machine.received.1 += u64::from(header.plain_bytes);
        let name = machine.config.name.clone();
        let Some(open) = &mut machine.open else { return Ok(()) };
        let delivery = Delivery {
            generation: header.generation,
            batch: header.batch,
            first_write: header.first_write,
            last_write: header.last_write(),
            wire_bytes: header.wire_bytes.into(),
        };
        match open.receiver.handle_batch(delivery, batch) {
            Ok(()) => {}
            Err(Rejected::Duplicate(batch)) => {
                tracing::debug!(machine = %name, %batch, "a batch came twice");
                return Ok(());
            }
            // Late batches of the generation before a restart; the session they came on is over.
            Err(Rejected::Generation { .. }) => return Ok(()),
            Err(error) => return Err(error.to_string()),
        }
        loop {
            let Some(machine) = self.machines.get_mut(&name) else { return Ok(()) };
            let Some(open) = &mut machine.open else { return Ok(()) };
            let Some((delivery, batch)) =
                open.receiver.poll_deliver().map_err(|error| error.to_string())?
            else {
                return Ok(());
            };
            open.pending_bytes += batch.memory_bytes() as u64;
            if open.pending_bytes > 4 * window_bytes {
                return Err(format!("the agent ignores the window of {window_bytes} bytes"));
            }
            deliver(machine, delivery.batch, batch)?;
        }
    }

    fn handle_report(&mut self, name: &MachineName, report: Report) {
        let now = Instant::now();
        let Some(machine) = self.machines.get_mut(name) else { return };
        match report {
            Report::Durable { batch, bytes } => {
                let Some(open) = &mut machine.open else { return };
                open.pending_bytes = open.pending_bytes.saturating_sub(bytes);
                open.receiver.handle_durable(now, batch);
                machine.watermark.handle_durable(batch);
                self.note_marks(name, batch);
                self.answer_tags(name, batch);
                self.send_acks();
                let Some(machine) = self.machines.get_mut(name) else { return };
                let facts = machine.facts(now);
                let actions = machine.failover.handle_durable(&facts, machine.state.generation);
                self.carry_out(name, actions);
            }
            Report::Applied(batch) => {
                let Some(open) = &mut machine.open else { return };
                open.applied = open.applied.max(batch);
                let questions = std::mem::take(&mut machine.questions);
                for (link, request) in questions {
                    self.handle_question(link, request);
                }
            }
            Report::Begun(generation) => {
                tracing::info!(machine = %name, %generation, "a generation began");
            }
            Report::HoldReleased => {
                machine.state.point = None;
                tracing::warn!(machine = %name, "the journal is full: the newest point was given up, replication goes on");
                self.persist(name);
            }
            Report::Usage(usage) => {
                if let Some(open) = &mut machine.open {
                    open.usage = Some(usage);
                }
            }
            Report::Trouble(sentence) => {
                if !sentence.is_empty() {
                    tracing::error!(machine = %name, "{sentence}");
                }
                machine.trouble = sentence;
            }
            Report::Failed(sentence) => {
                tracing::error!(machine = %name, "{sentence}");
                machine.trouble = sentence.clone();
                machine.open = None;
                if let Some((link, _)) = machine.link {
                    self.drop_link(link, &sentence);
                }
            }
            Report::Prepared(result) => self.handle_prepared(name, result),
        }
    }

    /// Markers up to `durable` count now.
    fn note_marks(&mut self, name: &MachineName, durable: BatchSeq) {
        let Some(machine) = self.machines.get_mut(name) else { return };
        let generation = Generation(machine.state.generation);
        let mut changed = false;
        while let Some((batch, kind)) = machine.marks.front().copied() {
            if batch > durable {
                break;
            }
            machine.marks.pop_front();
            machine.note(generation, batch, kind);
            changed = true;
            if kind == RecordKind::SyncDone {
                let time = machine.sync_times.0.take().map(|began| began.elapsed());
                machine.sync_times.1 = time;
                tracing::info!(machine = %name, seconds = time.map(|t| t.as_secs_f64()), "synced: the machine is consistent");
            }
        }
        if changed {
            self.persist(name);
        }
    }

    fn persist(&mut self, name: &MachineName) -> bool {
        let Some(machine) = self.machines.get_mut(name) else { return false };
        match machine.persist() {
            Ok(()) => true,
            Err(error) => {
                tracing::error!(machine = %name, %error, "its state cannot be made durable");
                machine.trouble = error.to_string();
                false
            }
        }
    }

    fn next_ack(&self) -> Option<Instant> {
        let open = self.machines.values().filter_map(|machine| machine.open.as_ref());
        open.filter_map(|open| open.receiver.poll_timeout()).min()
    }

    fn send_acks(&mut self) {
        let now = Instant::now();
        for machine in self.machines.values_mut() {
            let Some(open) = &mut machine.open else { continue };
            let Some(durable) = open.receiver.poll_ack(now) else { continue };
            let Some((id, index)) = machine.link else { continue };
            if let Some(link) = self.links.get(&id) {
                link.up.control(target_message::Kind::Ack(Ack {
                    machine: index.0.into(),
                    durable_batch: durable.0,
                    window_bytes: open.receiver.window_bytes(),
                }));
            }
        }
    }

    // Hashes

    fn handle_question(&mut self, id: LinkId, request: HashRequest) {
        let Some(machine) = self.machine_on(id, request.machine) else { return };
        let Some(open) = &machine.open else { return };
        if open.applied.0 < request.after_batch {
            if machine.questions.len() < QUESTIONS_MAX {
                machine.questions.push((id, request));
            } else {
                self.drop_link(id, "the agent asks without end");
            }
            return;
        }
        let Some(disk) = open.disks.get(request.disk as usize).cloned() else { return };
        let Some(link) = self.links.get(&id).map(|link| link.up.clone()) else { return };
        let hashers = Arc::clone(&self.hashers);
        tokio::spawn(async move {
            let Ok(_place) = hashers.acquire_owned().await else { return };
            let answer = tokio::task::spawn_blocking(move || hashing::answer(&disk, &request));
            if let Ok(reply) = answer.await {
                link.answer(reply);
            }
        });
    }

    // Failover

    fn carry_out(&mut self, name: &MachineName, actions: Vec<Action>) {
        for action in actions {
            let Some(machine) = self.machines.get_mut(name) else { return };
            match action {
                // What is not durable must not be acted on; it is tried again on request.
                Action::Persist => {
                    if !self.persist(name) {
                        return;
                    }
                }
                Action::SendJob(job, kind) => {
                    let link = machine.link;
                    self.send_job(link, job, kind);
                }
                Action::Prepare(goal) => {
                    let through = match goal {
                        Goal::Point { point, .. } => Some(point.batch()),
                        Goal::JournalEnd { .. } => None,
                    };
                    match &machine.open {
                        Some(open) => open.worker.send(Command::Prepare(through)),
                        None => {
                            let sentence = format!("its disks are not open: {}", machine.trouble);
                            self.handle_prepared(name, Err(sentence));
                        }
                    }
                }
                Action::Announce => self.announce(name),
                Action::Resume { was_ready } => self.resume(name, was_ready),
                Action::EndProtection => self.end_protection(name),
            }
        }
    }

    fn send_job(&self, link: Option<(LinkId, MachineIndex)>, job: JobId, kind: JobKind) {
        let Some((id, index)) = link else { return };
        if let Some(link) = self.links.get(&id) {
            let job = Job { job: job.0, machine: index.0.into(), kind: kind.into() };
            link.up.control(target_message::Kind::Job(job));
        }
    }

    /// Tells the agent how the machine stands.
    fn announce(&mut self, name: &MachineName) {
        let Some(machine) = self.machines.get_mut(name) else { return };
        let Some((id, index)) = machine.link else { return };
        let ended = matches!(machine.failover.stage(), crate::failover::Stage::Committed(_));
        let message = if ended {
            welcome(index, Standing::Ended)
        } else {
            let generation =
                machine.open.as_ref().map_or(Generation(0), |open| open.receiver.generation());
            standing(machine, index, generation, BatchSeq(0))
        };
        if let Some(link) = self.links.get(&id) {
            link.up.control(target_message::Kind::Machine(message));
        }
    }

    /// After a cancel: unless somebody wrote to the disks, replication goes on where it was.
    fn resume(&mut self, name: &MachineName, was_ready: bool) {
        let Some(machine) = self.machines.get_mut(name) else { return };
        let Some(open) = &mut machine.open else { return };
        let touched = was_ready
            && ImageMark::of_all(&open.images).ok().as_ref() != Some(&machine.state.ready);
        if touched && !machine.state.ready.is_empty() {
            tracing::warn!(machine = %name, "its disks were written to since the failover: they are compared with the source");
            open.damaged = true;
            machine.state.consistency = Consistency::Syncing;
            machine.state.point = None;
        }
        machine.state.ready.clear();
        let hold = machine.hold();
        if let Some(open) = &machine.open {
            open.worker.send(Command::Hold(hold));
        }
        self.persist(name);
    }

    fn end_protection(&mut self, name: &MachineName) {
        let Some(machine) = self.machines.get_mut(name) else { return };
        let open = machine.open.take();
        let journal = machine.dir.join("journal");
        tokio::task::spawn_blocking(move || {
            if let Some(open) = open {
                open.worker.close();
            }
            match std::fs::remove_dir_all(&journal) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    tracing::warn!(%error, "{} cannot be removed; it is not needed any more", journal.display());
                }
                _ => {}
            }
        });
    }

    fn handle_prepared(&mut self, name: &MachineName, result: Result<BatchSeq, String>) {
        let Some(machine) = self.machines.get_mut(name) else { return };
        let crate::failover::Stage::Preparing { goal, .. } = *machine.failover.stage() else {
            return;
        };
        let batch = match (result, &machine.open) {
            (Ok(batch), Some(_)) => batch,
            (Ok(_), None) => return,
            (Err(sentence), _) => return self.handle_ready(name, Err(sentence)),
        };
        let point = match goal {
            Goal::Point { point, .. } => point,
            // The place where the journal ends becomes a point of its own.
            Goal::JournalEnd { .. } => {
                let id = PointId(now_us().max(machine.state.newest_point_us + 1));
                RecoveryPoint::new(id, Generation(machine.state.generation), batch)
            }
        };
        let Some(open) = &machine.open else { return };
        let (images, events, name) = (Arc::clone(&open.images), self.events.clone(), name.clone());
        tokio::task::spawn_blocking(move || {
            let renewed = images.iter().try_for_each(|image| image.renew_content_id());
            let marks = renewed
                .map_err(|error| error.to_string())
                .and_then(|()| ImageMark::of_all(&images).map_err(|error| error.to_string()));
            let _ = events.send(Event::Ready(name, marks.map(|marks| (point, marks))));
        });
    }

    fn handle_ready(
        &mut self,
        name: &MachineName,
        result: Result<(RecoveryPoint, Vec<ImageMark>), String>,
    ) {
        let Some(machine) = self.machines.get_mut(name) else { return };
        let result = result.map(|(point, marks)| {
            machine.state.ready = marks;
            machine.state.point = Some(point);
            machine.state.newest_point_us = machine.state.newest_point_us.max(point.id_us);
            point
        });
        match &result {
            Ok(point) => {
                tracing::info!(machine = %name, point = %PointText(point.id()), "failed over: the disks are ready")
            }
            Err(sentence) => tracing::error!(machine = %name, "{sentence}"),
        }
        let facts = machine.facts(Instant::now());
        let actions = machine.failover.handle_prepared(&facts, result);
        self.carry_out(name, actions);
    }

    fn handle_job_reply(&mut self, id: LinkId, reply: &JobReply) {
        let job = JobId(reply.job);
        let failure = reply.failure.as_ref().map(|failure| printable(&failure.sentence));
        if let Some(tag) = self.tags.get_mut(&job) {
            match failure {
                Some(sentence) => {
                    if let Some(tag) = self.tags.remove(&job) {
                        let code = "tag-failed".into();
                        let _ = tag.answer.send(Err(Failure { code, sentence }));
                    }
                }
                None => {
                    tag.made = Some((BatchSeq(reply.point_batch), PointId(reply.point)));
                    let name = tag.machine.clone();
                    let open = self.machines.get(&name).and_then(|machine| machine.open.as_ref());
                    let durable = open.map(|open| open.receiver.durable());
                    self.answer_tags(&name, durable.unwrap_or_default());
                }
            }
            return;
        }
        let Some(machine) = self.machine_on(id, reply.machine) else { return };
        let name = machine.config.name.clone();
        let generation = Generation(machine.state.generation);
        let point = (reply.point_batch > 0).then(|| {
            RecoveryPoint::new(PointId(reply.point), generation, BatchSeq(reply.point_batch))
        });
        let result = match failure {
            Some(sentence) => Err(sentence),
            None => Ok(point),
        };
        let facts = machine.facts(Instant::now());
        let actions = machine.failover.handle_job_reply(&facts, job, result);
        self.carry_out(&name, actions);
    }

    fn answer_tags(&mut self, name: &MachineName, durable: BatchSeq) {
        let done: Vec<JobId> = self
            .tags
            .iter()
            .filter(|(_, tag)| tag.machine == *name)
            .filter(|(_, tag)| tag.made.is_some_and(|(batch, _)| batch <= durable))
            .map(|(job, _)| *job)
            .collect();
        for job in done {
            if let Some(Tag { answer, made: Some((_, point)), .. }) = self.tags.remove(&job) {
                let _ = answer.send(Ok(point_view(point)));
            }
        }
    }

    // Upkeep

    fn upkeep(&mut self) {
        let now = Instant::now();
        let names: Vec<_> = self.machines.keys().cloned().collect();
        for name in names {
            let Some(machine) = self.machines.get_mut(&name) else { continue };
            let facts = machine.facts(now);
            let actions = machine.failover.handle_timeout(now, &facts);
            self.carry_out(&name, actions);
        }
        self.tags.retain(|_, tag| !tag.answer.is_closed());
        for machine in self.machines.values() {
            self.metrics.machine(&machine.view(now));
        }
        self.metrics.agents(self.links.len());
    }

    // API

    fn handle_api(&mut self, request: ApiRequest) {
        let now = Instant::now();
        match request {
            ApiRequest::Status(answer) => drop(answer.send(self.status())),
            ApiRequest::Machines(answer) => {
                let views = self.machines.values().map(|machine| machine.view(now)).collect();
                let _ = answer.send(views);
            }
            ApiRequest::Machine(name, request) => {
                let known = name.parse::<MachineName>().ok();
                match known.filter(|name| self.machines.contains_key(name)) {
                    Some(name) => self.handle_machine_request(&name, request),
                    None => self.refuse_unknown(&name, request),
                }
            }
        }
    }

    fn status(&self) -> Status {
        let consistent = |machine: &&Machine| machine.state.consistency == Consistency::Consistent;
        let mut agents: Vec<_> = self.links.values().map(|link| link.agent.to_string()).collect();
        agents.sort();
        Status {
            target: self.metrics.target_name().to_owned(),
            version: env!("CARGO_PKG_VERSION").into(),
            listen: self.config.listen.to_string(),
            uptime_seconds: self.started.elapsed().as_secs(),
            agents,
            machines: self.machines.len(),
            machines_consistent: self.machines.values().filter(consistent).count(),
        }
    }

    fn refuse_unknown(&self, name: &str, request: MachineRequest) {
        let names: Vec<_> = self.machines.keys().map(ToString::to_string).collect();
        let failure = Failure {
            code: "unknown-machine".into(),
            sentence: format!(
                "there is no machine `{}` here; the target's configuration has: {}",
                printable(name),
                names.join(", ")
            ),
        };
        match request {
            MachineRequest::Tag(answer) => drop(answer.send(Err(failure))),
            MachineRequest::Show(answer)
            | MachineRequest::Failover(_, answer)
            | MachineRequest::Cancel(answer)
            | MachineRequest::Commit(_, answer) => drop(answer.send(Err(failure))),
        }
    }

    fn handle_machine_request(&mut self, name: &MachineName, request: MachineRequest) {
        let now = Instant::now();
        let Some(machine) = self.machines.get_mut(name) else { return };
        let facts = machine.facts(now);
        let (decision, answer) = match request {
            MachineRequest::Show(answer) => return drop(answer.send(Ok(machine.view(now)))),
            MachineRequest::Tag(answer) => return self.tag(name, answer),
            MachineRequest::Cancel(answer) => (machine.failover.handle_cancel(&facts), answer),
            MachineRequest::Commit(request, answer) => {
                (machine.failover.handle_commit(&facts, request.without_removal), answer)
            }
            MachineRequest::Failover(request, answer) => {
                let to = match request.to.as_str() {
                    "latest" => None,
                    text => match text.parse::<PointText>() {
                        Ok(point) => Some(point.0),
                        Err(error) => {
                            let (code, sentence) = ("unknown-point".into(), error.to_string());
                            return drop(answer.send(Err(Failure { code, sentence })));
                        }
                    },
                };
                let plan = Plan {
                    without_shutdown: request.without_shutdown,
                    drain_timeout_seconds: request.drain_timeout_seconds.clamp(0.0, 86_400.0),
                    requested_at_us: facts.now_us,
                    to: None,
                };
                (machine.failover.handle_failover(now, &facts, to, plan), answer)
            }
        };
        match decision {
            Ok(actions) => {
                self.carry_out(name, actions);
                if let Some(machine) = self.machines.get(name) {
                    let _ = answer.send(Ok(machine.view(now)));
                }
            }
            Err(refusal) => {
                let code = refusal.code.to_owned();
                let _ = answer.send(Err(Failure { code, sentence: refusal.sentence }));
            }
        }
    }

    fn tag(&mut self, name: &MachineName, answer: Answer<Point>) {
        let Some(machine) = self.machines.get(name) else { return };
        let link = machine.link;
        let consistent = machine.state.consistency == Consistency::Consistent;
        let refusal = if link.is_none() {
            Some((
                "agent-away",
                format!(
                    "machine {name} has no agent connected, so no point can be set; start its agent"
                ),
            ))
        } else if !machine.failover.is_replicating() {
            Some((
                "failed-over",
                format!(
                    "machine {name} is failed over, so no point can be set; cancel or commit first"
                ),
            ))
        } else if !consistent {
            Some((
                "not-consistent",
                format!(
                    "machine {name} is being synced, so there is no consistent state to tag yet; try again when the sync is over"
                ),
            ))
        } else {
            None
        };
        if let Some((code, sentence)) = refusal {
            return drop(answer.send(Err(Failure { code: code.into(), sentence })));
        }
        self.last_job = now_us().max(self.last_job + 1);
        let job = JobId(self.last_job);
        self.tags.insert(job, Tag { machine: name.clone(), answer, made: None });
        self.send_job(link, job, JobKind::Tag);
    }
}

/// Hands a batch of the order to the worker, and takes note of its markers.
fn deliver(machine: &mut Machine, batch: BatchSeq, content: IncomingBatch) -> Result<(), String> {
    let markers: Vec<RecordKind> = content
        .records()
        .iter()
        .map(|record| record.kind)
        .filter(|kind| !matches!(kind, RecordKind::Data { .. } | RecordKind::Zero { .. }))
        .collect();
    let mut hold = None;
    for kind in &markers {
        match kind {
            RecordKind::SyncStart => {
                machine.sync_times.0 = Some(Instant::now());
                // Durable before the sync writes to the disks: from then on they are a mixture.
                machine.state.consistency = Consistency::Syncing;
                machine.state.point = None;
                machine.persist().map_err(|error| error.to_string())?;
                hold = Some(None);
            }
            RecordKind::Point(_) if machine.failover.takes_points() => hold = Some(Some(batch)),
            _ => {}
        }
    }
    let Some(open) = &mut machine.open else { return Ok(()) };
    if hold == Some(None) {
        open.worker.send(Command::Hold(None));
    }
    open.worker.send(Command::Append(content));
    if let Some(Some(point)) = hold {
        open.worker.send(Command::Hold(Some(point)));
    }
    machine.marks.extend(markers.into_iter().map(|kind| (batch, kind)));
    Ok(())
}

/// Checks the disks that an agent names against what is configured and what was seen before, and
/// takes them over when the machine is new.
fn check_disks(machine: &mut Machine, hello: &MachineHello) -> Result<(), (Code, String)> {
    let name = &machine.config.name;
    let mismatch = |sentence: String| Err((Code::DiskMismatch, sentence));
    if hello.disks.is_empty() || hello.disks.len() > DISKS_MAX {
        return mismatch(format!("machine {name} must have 1 to {DISKS_MAX} disks"));
    }
    for disk in &machine.config.disks {
        if !hello.disks.iter().any(|there| there.name == disk.name.as_str()) {
            return mismatch(format!(
                "the target's configuration gives machine {name} a disk `{}`, which its agent does not have",
                disk.name
            ));
        }
    }
    for disk in &hello.disks {
        if !machine.config.disks.iter().any(|here| here.name.as_str() == disk.name) {
            return mismatch(format!(
                "machine {name} has a disk `{}`, which the target's configuration lacks; add it there",
                printable(&disk.name)
            ));
        }
    }
    let found: Vec<DiskState> = hello
        .disks
        .iter()
        .map(|disk| DiskState { name: disk.name.clone(), size_bytes: disk.size_bytes })
        .collect();
    if machine.state.disks.is_empty() {
        machine.state.disks = found;
        return machine.persist().map_err(|error| (Code::Storage, error.to_string()));
    }
    for (old, new) in machine.state.disks.iter().zip(&found) {
        if old.name != new.name {
            return mismatch(format!(
                "machine {name} has disk `{}` where `{}` was; restore the order of its disks in the agent's configuration",
                printable(&new.name),
                old.name
            ));
        }
        if old.size_bytes != new.size_bytes {
            return mismatch(format!(
                "disk {} of machine {name} changed its size from {} to {} bytes; restore the size, or remove its image and its folder from the target's store to protect it anew",
                old.name, old.size_bytes, new.size_bytes
            ));
        }
    }
    if machine.state.disks.len() != found.len() {
        return mismatch(format!(
            "machine {name} has {} disks, it had {}",
            found.len(),
            machine.state.disks.len()
        ));
    }
    Ok(())
}

fn welcome(index: MachineIndex, standing: Standing) -> MachineWelcome {
    MachineWelcome {
        machine: index.0.into(),
        standing: standing.into(),
        ..MachineWelcome::default()
    }
}

fn refused(index: MachineIndex, code: Code, sentence: String) -> MachineWelcome {
    let refusal = Some(WireRefusal { code: code.into(), sentence });
    MachineWelcome { refusal, ..welcome(index, Standing::Refused) }
}

/// How a machine stands with an agent that continues `generation` and holds acknowledgements up to
/// `acked`. Begins the generation when it is a new one.
fn standing(
    machine: &mut Machine,
    index: MachineIndex,
    generation: Generation,
    acked: BatchSeq,
) -> MachineWelcome {
    let name = machine.config.name.clone();
    if !machine.failover.is_replicating() {
        return welcome(index, Standing::FailedOver);
    }
    let newest_point = machine.state.newest_point_us;
    let point_period_ms = machine.config.point_period.as_millis() as u64;
    let Some(open) = &mut machine.open else { return welcome(index, Standing::Restart) };
    if open.receiver.generation() == generation {
        let durable = open.receiver.durable();
        if open.damaged || durable < acked {
            tracing::error!(machine = %name, %durable, %acked, "what was acknowledged is not here: everything is compared with the source");
            open.damaged = true;
            return MachineWelcome { newest_point, ..welcome(index, Standing::Restart) };
        }
    } else {
        let config = ReceiverConfig {
            window_bytes: open.receiver.window_bytes(),
            ..ReceiverConfig::default()
        };
        open.receiver = Receiver::new(config, generation, BatchSeq(0), Default::default());
        open.worker.send(Command::Begin(generation));
        open.damaged = false;
        open.applied = BatchSeq(0);
        machine.trouble.clear();
        machine.marks.clear();
        machine.watermark.handle_new_generation();
        machine.state.generation = generation.0;
        // All of the old generation is applied first: its end is the newest point until the sync
        // of the new one begins.
        if machine.state.consistency == Consistency::Consistent {
            let id = PointId(now_us().max(newest_point + 1));
            machine.state.point = Some(RecoveryPoint::new(id, generation, BatchSeq(0)));
            machine.state.newest_point_us = id.0;
        }
        if let Err(error) = machine.persist() {
            return refused(index, Code::Storage, error.to_string());
        }
    }
    let Some(open) = &machine.open else { return welcome(index, Standing::Restart) };
    MachineWelcome {
        durable_batch: open.receiver.durable().0,
        received_batch: open.receiver.received().0,
        window_bytes: open.receiver.window_bytes(),
        point_period_ms,
        newest_point: machine.state.newest_point_us,
        ..welcome(index, Standing::Replicate)
    }
}

/// A text from outside, cut and without control characters, for logs and sentences.
fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(400).collect()
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}
