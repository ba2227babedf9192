//! Who is connected, and with which machines.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use backhaul_proto::id::{BatchSeq, Generation, MachineIndex, MachineName, PeerName, PointId};
use backhaul_proto::limits::{DISKS_MAX, MACHINES_MAX};
use backhaul_proto::message::{
    Code, Heartbeat, Hello, LinkReport, MachineHello, MachineWelcome, Progress, Refusal, Standing,
    Welcome, agent_message, target_message,
};
use backhaul_proto::quic::connections_here;
use backhaul_proto::session::{Receiver, ReceiverConfig};
use backhaul_proto::version::{VERSION_MAX, VERSION_MIN, Version, negotiate};

use super::{Link, Target, printable};
use crate::failover::Stage;
use crate::link::LinkUp;
use crate::machine::{LinkId, Machine, now_us};
use crate::machine_state::{Consistency, DiskState};
use crate::recovery_point::RecoveryPoint;
use crate::worker::Command;

/// An agent that has said nothing for so long no longer keeps others from its machines. A live one
/// sends a heartbeat each second.
const HEARD_TIME_MAX: Duration = Duration::from_secs(3);

/// Who wants a machine.
struct Caller {
    id: LinkId,
    agent: PeerName,
    host: IpAddr,
}

impl Caller {
    fn new(id: LinkId, up: &LinkUp) -> Self {
        let (agent, address) = (up.connection.peer().clone(), up.connection.remote_address());
        Self { id, agent, host: address.ip().to_canonical() }
    }
}

impl Target {
    pub(super) fn handle_hello(&mut self, id: LinkId, up: LinkUp, hello: &Hello) {
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
        let caller = Caller::new(id, &up);
        let mut machines = Vec::new();
        let mut welcomes = Vec::new();
        let mut waiting = BTreeMap::new();
        for (index, hello) in hello.machines.iter().enumerate() {
            let index = MachineIndex(index as u16);
            let (name, welcome) = match self.attach(&caller, index, hello) {
                Ok((name, welcome)) => (Some(name), welcome),
                Err((code, sentence)) => {
                    tracing::error!(%agent, machine = hello.name, "{sentence}");
                    if code != Code::Rival {
                        self.note_refusal(&agent, &hello.name, &sentence);
                    }
                    if is_passing(code) {
                        waiting.insert(index, hello.clone());
                    }
                    (None, refused(index, code, sentence))
                }
            };
            machines.push(name);
            welcomes.push(welcome);
        }
        let full = welcomes.iter().find_map(|welcome: &MachineWelcome| {
            let refusal = welcome.refusal.as_ref()?;
            let known = waiting.contains_key(&MachineIndex(welcome.machine as u16));
            (refusal.code() == Code::Storage && !known).then(|| refusal.sentence.clone())
        });
        up.control(target_message::Kind::Welcome(Welcome {
            version: version.0,
            software: env!("CARGO_PKG_VERSION").into(),
            machines: welcomes,
        }));
        let names: Vec<_> = machines.iter().flatten().cloned().collect();
        self.links.insert(
            id,
            Link {
                up,
                agent,
                machines,
                waiting,
                since: Instant::now(),
                heard: Instant::now(),
                report: LinkReport::default(),
            },
        );
        if let Some(sentence) = full {
            // The state could not be made durable; the agent comes again, and it is tried again.
            return self.drop_link(id, &sentence);
        }
        self.note_ended(id, &hello.ended_machines);
        for name in names {
            let now = Instant::now();
            if let Some(machine) = self.machines.get_mut(&name) {
                let actions = machine.failover.resume(now, true, machine.state.generation);
                self.carry_out(&name, actions);
            }
        }
    }

    /// An agent that removed a machine and was restarted before its reply arrived says so now.
    fn note_ended(&mut self, id: LinkId, names: &[String]) {
        let Some(agent) = self.links.get(&id).map(|link| link.agent.clone()) else { return };
        for name in names.iter().filter_map(|name| name.parse::<MachineName>().ok()) {
            let Some(machine) = self.machines.get_mut(&name) else { continue };
            if machine.config.agent != agent {
                continue;
            }
            let facts = machine.facts(Instant::now());
            let actions = machine.failover.handle_ended(&facts);
            self.carry_out(&name, actions);
        }
    }

    /// Tries again what an agent could not have when it said hello: neither a datastore that is
    /// mounted late nor another agent that is gone asks for a restart.
    pub(super) fn open_waiting(&mut self) {
        let waiting: Vec<_> = self
            .links
            .iter()
            .flat_map(|(id, link)| {
                let waiting = link.waiting.iter();
                waiting.map(|(index, hello)| (Caller::new(*id, &link.up), *index, hello.clone()))
            })
            .collect();
        for (caller, index, hello) in waiting {
            let attached = self.attach(&caller, index, &hello);
            let Some(link) = self.links.get_mut(&caller.id) else { continue };
            let (name, message) = match attached {
                Ok((name, welcome)) => (Some(name), welcome),
                Err((code, _)) if is_passing(code) => continue,
                Err((code, sentence)) => (None, refused(index, code, sentence)),
            };
            link.waiting.remove(&index);
            link.up.control(target_message::Kind::Machine(message));
            let Some(name) = name else { continue };
            tracing::info!(machine = %name, "its agent can have it now");
            if let Some(place) = link.machines.get_mut(usize::from(index.0)) {
                *place = Some(name.clone());
            }
            if let Some(machine) = self.machines.get_mut(&name) {
                let generation = machine.state.generation;
                let actions = machine.failover.resume(Instant::now(), true, generation);
                self.carry_out(&name, actions);
            }
        }
    }

    /// Ties a machine to a connection, if everything about it is right.
    fn attach(
        &mut self,
        caller: &Caller,
        index: MachineIndex,
        hello: &MachineHello,
    ) -> Result<(MachineName, MachineWelcome), (Code, String)> {
        let Caller { id, agent, .. } = caller;
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
        if let Stage::Committed(_) = machine.failover.stage() {
            return Ok((name, welcome(index, Standing::Ended)));
        }
        if let Some((old, _)) = machine.link
            && old != *id
        {
            self.check_rival(&name, caller, old)?;
        }
        let Some(machine) = self.machines.get_mut(&name) else {
            return Err((Code::Other, "the machine is gone".into()));
        };
        check_disks(machine, hello)?;
        if machine.open.is_none() {
            self.open(&name).map_err(|sentence| (Code::Storage, sentence))?;
        }
        if let Some((old, _)) = self.machines.get(&name).and_then(|machine| machine.link)
            && old != *id
        {
            let reason = format!(
                "a newer connection of agent {agent} replicates machine {name}; if this is said again and again, two agents run with one identity: stop one of them"
            );
            self.drop_link(old, &reason);
        }
        let Some(machine) = self.machines.get_mut(&name) else {
            return Err((Code::Other, "the machine is gone".into()));
        };
        machine.link = Some((*id, index));
        machine.refusal.clear();
        machine.questions.clear();
        let generation = Generation(hello.generation);
        machine.agent_generation = generation;
        let welcome = standing(machine, index, generation, BatchSeq(hello.acked_batch));
        Ok((name, welcome))
    }

    /// An operator who looks at the machine sees why its own agent may not have it.
    fn note_refusal(&mut self, agent: &PeerName, name: &str, sentence: &str) {
        let Ok(name) = name.parse::<MachineName>() else { return };
        if let Some(machine) = self.machines.get_mut(&name)
            && machine.config.agent == *agent
        {
            sentence.clone_into(&mut machine.refusal);
        }
    }

    /// A newer connection of an agent takes its machines along, unless it comes from another host
    /// while the older one is alive: two agents would take them from each other without end.
    fn check_rival(
        &self,
        name: &MachineName,
        caller: &Caller,
        old: LinkId,
    ) -> Result<(), (Code, String)> {
        let Some(old) = self.links.get(&old) else { return Ok(()) };
        let address = old.up.connection.remote_address();
        if caller.host == address.ip().to_canonical() || old.heard.elapsed() > HEARD_TIME_MAX {
            return Ok(());
        }
        let sentence = format!(
            "machine {name} is replicated by another agent with the identity {}, at {address}; stop one of the two, or issue an identity of its own to each",
            caller.agent
        );
        Err((Code::Rival, sentence))
    }

    pub(super) fn drop_link(&mut self, id: LinkId, reason: &str) {
        if let Some(link) = self.links.get(&id) {
            tracing::warn!(agent = %link.agent, reason, "a connection is dropped");
            link.up.connection.close(reason);
        }
        self.forget_link(id);
    }

    pub(super) fn handle_down(&mut self, id: LinkId, reason: &str) {
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

    pub(super) fn machine_on(&mut self, id: LinkId, index: u32) -> Option<&mut Machine> {
        let name = self.links.get(&id)?.machines.get(index as usize)?.clone()?;
        self.machines
            .get_mut(&name)
            .filter(|machine| machine.link.is_some_and(|(link, _)| link == id))
    }

    pub(super) fn handle_message(&mut self, id: LinkId, message: agent_message::Kind) {
        match message {
            agent_message::Kind::Hello(_) => self.drop_link(id, "the agent said hello twice"),
            agent_message::Kind::Probe(_) => self.drop_link(id, "the agent probes in a session"),
            // They are read beside the owner loop, which hears of them as of any other batch.
            agent_message::Kind::Batch(_) => {}
            agent_message::Kind::Heartbeat(Heartbeat { nonce, .. }) => {
                // What the cores are worth is worth it to all links together.
                let connections_max = connections_here(self.links.len()) as u32;
                if let Some(link) = self.links.get(&id) {
                    link.up.control(target_message::Kind::Heartbeat(Heartbeat {
                        nonce,
                        load_percent: link.up.connection.load_percent(),
                        connections_max,
                    }));
                }
            }
            agent_message::Kind::Progress(progress) => self.handle_progress(id, progress),
            agent_message::Kind::JobReply(reply) => self.handle_job_reply(id, &reply),
            agent_message::Kind::Link(mut report) => {
                report.congestion = printable(&report.congestion);
                report.state = printable(&report.state);
                if let Some(link) = self.links.get_mut(&id) {
                    link.report = report;
                }
            }
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

pub(super) fn welcome(index: MachineIndex, standing: Standing) -> MachineWelcome {
    MachineWelcome {
        machine: index.0.into(),
        standing: standing.into(),
        ..MachineWelcome::default()
    }
}

/// Whether a refusal may pass by itself.
fn is_passing(code: Code) -> bool {
    matches!(code, Code::Storage | Code::Rival)
}

fn refused(index: MachineIndex, code: Code, sentence: String) -> MachineWelcome {
    let refusal = Some(Refusal { code: code.into(), sentence });
    MachineWelcome { refusal, ..welcome(index, Standing::Refused) }
}

/// How a machine stands with an agent that continues `generation` and holds acknowledgements up to
/// `acked`. Begins the generation when it is a new one.
pub(super) fn standing(
    machine: &mut Machine,
    index: MachineIndex,
    generation: Generation,
    acked: BatchSeq,
) -> MachineWelcome {
    let name = machine.config.name.clone();
    if !machine.failover.is_replicating() {
        let fence = machine.failover.must_fence();
        return MachineWelcome { fence, ..welcome(index, Standing::FailedOver) };
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
        // All of the generation before is applied, past its newest point, and the journal forgets its markers.
        if (machine.give_up_points(None) || machine.is_unsaved())
            && let Err(error) = machine.persist()
        {
            return refused(index, Code::Storage, error.to_string());
        }
        let Some(open) = &mut machine.open else { return welcome(index, Standing::Restart) };
        let config = ReceiverConfig {
            window_bytes: open.receiver.window_bytes(),
            ..ReceiverConfig::default()
        };
        open.receiver = Receiver::new(config, generation, BatchSeq(0), Default::default());
        open.worker.send(Command::Begin(generation));
        open.damaged = false;
        open.applied = BatchSeq(0);
        open.begun = false;
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
