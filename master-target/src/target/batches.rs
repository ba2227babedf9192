//! Batches on their way to the journal, and what the workers say of them.

use std::sync::Arc;
use std::time::Instant;

use backhaul_proto::batch::{BatchHeader, RecordKind};
use backhaul_proto::id::{BatchSeq, Generation, MachineName};
use backhaul_proto::message::{Ack, HashRequest, Resend, target_message};
use backhaul_proto::session::{Delivery, Rejected};
use tokio::sync::OwnedSemaphorePermit;

use super::{Event, Target};
use crate::batch_buffer::IncomingBatch;
use crate::hashing;
use crate::link::LinkEvent;
use crate::machine::{LinkId, Machine, Marker, Save, Saved};
use crate::machine_state::{Consistency, StateError};
use crate::receive::{FoldedBatch, Unresolved};
use crate::worker::{Command, Report};

impl Target {
    pub(super) fn handle_batch(
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
        machine.referenced_bytes += u64::from(header.referenced_bytes());
        let name = machine.config.name.clone();
        if !machine.failover.takes_batches() {
            return Ok(());
        }
        let Some(open) = &mut machine.open else { return Ok(()) };
        match open.receiver.handle_batch(delivery(header), batch) {
            Ok(()) => {}
            Err(Rejected::Duplicate(batch)) => {
                machine.repeated_batches += u64::from(open.receiver.is_acknowledged(batch));
                tracing::debug!(machine = %name, %batch, "a batch came twice");
                return Ok(());
            }
            // Late batches of the generation before a restart; the session they came on is over.
            Err(Rejected::Generation { .. }) => return Ok(()),
            Err(error) => return Err(error.to_string()),
        }
        loop {
            let Some(machine) = self.machines.get_mut(&name) else { return Ok(()) };
            prepare_delivery(machine)?;
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
            deliver(machine, delivery.batch, batch);
        }
    }

    /// Has the references of a batch resolved, beside the owner loop.
    pub(super) fn handle_folded(
        &mut self,
        id: LinkId,
        header: BatchHeader,
        batch: FoldedBatch,
        place: OwnedSemaphorePermit,
    ) {
        let Some(machine) = self.machine_on(id, header.machine.0.into()) else { return };
        let Some(open) = &machine.open else { return };
        let disks = open.disks.clone();
        let (resolvers, events) = (Arc::clone(&self.resolvers), self.events.clone());
        tokio::spawn(async move {
            let _place = place;
            let Ok(_turn) = resolvers.acquire_owned().await else { return };
            let resolved = tokio::task::spawn_blocking(move || batch.resolve(&disks)).await;
            let event = match resolved {
                Ok(Ok(batch)) => LinkEvent::Batch(header, batch),
                Ok(Err(reason)) => LinkEvent::Unresolved(header, reason),
                Err(_) => return,
            };
            let _ = events.send(Event::Link(id, event));
        });
    }

    /// Asks for a batch without references.
    pub(super) fn handle_unresolved(
        &mut self,
        id: LinkId,
        header: &BatchHeader,
        reason: &Unresolved,
    ) -> Result<(), String> {
        let Some(machine) = self.machine_on(id, header.machine.0.into()) else {
            return Ok(());
        };
        machine.received.0 += u64::from(header.wire_bytes);
        let name = machine.config.name.clone();
        if !machine.failover.takes_batches() {
            return Ok(());
        }
        let Some(open) = &mut machine.open else { return Ok(()) };
        match open.receiver.handle_unresolved(&delivery(header)) {
            Ok(()) => {}
            Err(Rejected::Duplicate(batch)) => {
                machine.repeated_batches += u64::from(open.receiver.is_acknowledged(batch));
                return Ok(());
            }
            Err(Rejected::Generation { .. }) => return Ok(()),
            Err(error) => return Err(error.to_string()),
        }
        let batch = header.batch;
        // There may be hundreds within a second after a reconnect; the agent's metrics count them.
        tracing::debug!(machine = %name, %batch, %reason, "a batch is asked for again without references");
        if let Some(link) = self.links.get(&id) {
            link.up.control(target_message::Kind::Resend(Resend {
                machine: header.machine.0.into(),
                generation: header.generation.0,
                batch: batch.0,
            }));
        }
        Ok(())
    }

    pub(super) fn handle_report(&mut self, name: &MachineName, report: Report) {
        let now = Instant::now();
        let Some(machine) = self.machines.get_mut(name) else { return };
        match report {
            Report::Durable { generation, batch, bytes } => {
                let Some(open) = &mut machine.open else { return };
                open.pending_bytes = open.pending_bytes.saturating_sub(bytes);
                if generation != open.receiver.generation() {
                    return;
                }
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
            Report::Applied(generation, batch) => {
                let Some(open) = &mut machine.open else { return };
                if generation != open.receiver.generation() {
                    return;
                }
                open.applied = open.applied.max(batch);
                let questions = std::mem::take(&mut machine.questions);
                for (link, request, asking) in questions {
                    self.handle_question(link, request, asking);
                }
            }
            Report::Begun(generation) => {
                tracing::info!(machine = %name, %generation, "a generation began");
                let Some(open) = &mut machine.open else { return };
                open.begun = generation == open.receiver.generation();
                let questions = std::mem::take(&mut machine.questions);
                for (link, request, asking) in questions {
                    self.handle_question(link, request, asking);
                }
            }
            Report::OverBound(generation, point) => {
                let save = machine.give_up(generation, point);
                self.save(name, save);
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
                machine.marks.clear();
                let (link, failover) = (machine.link, machine.failover.preparing());
                if let Some((link, _)) = link {
                    self.drop_link(link, &sentence);
                }
                if let Some(failover) = failover {
                    self.handle_prepared(name, failover, Err(sentence));
                }
            }
            Report::Prepared(failover, result) => self.handle_prepared(name, failover, result),
        }
    }

    /// Markers up to `durable` count now.
    fn note_marks(&mut self, name: &MachineName, durable: BatchSeq) {
        let Some(machine) = self.machines.get_mut(name) else { return };
        let generation = Generation(machine.state.generation);
        let (mut points, mut others) = (false, false);
        while let Some(marker) = machine.marks.pop_front_if(|marker| marker.batch <= durable) {
            machine.note(generation, &marker);
            match marker.kind {
                RecordKind::Point(_) => points = true,
                _ => others = true,
            }
            if marker.kind == RecordKind::SyncDone {
                let time = machine.sync_times.0.take().map(|began| began.elapsed());
                machine.sync_times.1 = time;
                tracing::info!(machine = %name, seconds = time.map(|t| t.as_secs_f64()), "synced: the machine is consistent");
            }
        }
        if others {
            self.persist(name);
        } else if points {
            let save = machine.save();
            self.save(name, save);
        }
    }

    /// Has a machine's state made durable, which takes three writes to a disk. Nobody waits for it: the markers
    /// that are new in it are in the journal until then.
    pub(super) fn save(&self, name: &MachineName, save: Option<Save>) {
        let Some(save) = save else { return };
        let (events, name) = (self.events.clone(), name.clone());
        tokio::task::spawn_blocking(move || {
            let _ = events.send(Event::Saved(name, save.run()));
        });
    }

    pub(super) fn handle_saved(&mut self, name: &MachineName, saved: Saved) {
        let Some(machine) = self.machines.get_mut(name) else { return };
        match machine.handle_saved(saved) {
            Some(result) => {
                self.handle_persisted(name, result);
            }
            None => {
                let next = machine.next_save();
                self.save(name, next);
            }
        }
    }

    /// Tries again what could not be made durable.
    pub(super) fn save_again(&mut self) {
        let mut saves = Vec::new();
        for (name, machine) in &mut self.machines {
            saves.extend(machine.next_save().map(|save| (name.clone(), save)));
        }
        for (name, save) in saves {
            self.save(&name, Some(save));
        }
    }

    pub(super) fn persist(&mut self, name: &MachineName) -> bool {
        let Some(machine) = self.machines.get_mut(name) else { return false };
        let result = machine.persist();
        self.handle_persisted(name, result)
    }

    fn handle_persisted(&mut self, name: &MachineName, result: Result<(), StateError>) -> bool {
        let Some(machine) = self.machines.get_mut(name) else { return false };
        match result {
            Ok(()) => {
                if std::mem::take(&mut machine.persist_failed) {
                    machine.trouble.clear();
                }
                true
            }
            Err(error) => {
                if !std::mem::replace(&mut machine.persist_failed, true) {
                    tracing::error!(machine = %name, %error, "its state cannot be made durable");
                }
                machine.trouble = error.to_string();
                false
            }
        }
    }

    pub(super) fn next_ack(&self) -> Option<Instant> {
        let open = self.machines.values().filter_map(|machine| machine.open.as_ref());
        open.filter_map(|open| open.receiver.poll_timeout()).min()
    }

    pub(super) fn send_acks(&mut self) {
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
                    applied_batch: open.applied.0,
                }));
            }
        }
    }

    pub(super) fn handle_question(
        &mut self,
        id: LinkId,
        request: HashRequest,
        asking: OwnedSemaphorePermit,
    ) {
        let Some(machine) = self.machine_on(id, request.machine) else { return };
        let Some(open) = &machine.open else { return };
        if !open.begun || open.applied.0 < request.after_batch {
            return machine.questions.push((id, request, asking));
        }
        let Some(disk) = open.disks.get(request.disk as usize).cloned() else { return };
        let Some(link) = self.links.get(&id).map(|link| link.up.clone()) else { return };
        let hashers = Arc::clone(&self.hashers);
        tokio::spawn(async move {
            let Ok(_place) = hashers.acquire_owned().await else { return };
            let answer = tokio::task::spawn_blocking(move || hashing::answer(&disk, &request));
            if let Ok(reply) = answer.await {
                link.answer(reply, asking);
            }
        });
    }
}

/// Where a batch stands in the order.
fn delivery(header: &BatchHeader) -> Delivery {
    Delivery {
        generation: header.generation,
        batch: header.batch,
        first_write: header.first_write,
        last_write: header.last_write(),
        wire_bytes: header.wire_bytes.into(),
    }
}

/// Makes durable what must be so before the next batch goes to the worker. While it cannot be, the
/// batch is not delivered: the receiver must not count as here what the journal never gets.
fn prepare_delivery(machine: &mut Machine) -> Result<(), String> {
    let Some(batch) = machine.open.as_ref().and_then(|open| open.receiver.peek()) else {
        return Ok(());
    };
    if !batch.records().iter().any(|record| record.kind == RecordKind::SyncStart) {
        return Ok(());
    }
    // Before the sync writes to the disks: from then on they are a mixture.
    machine.state.consistency = Consistency::Syncing;
    machine.state.point = None;
    machine.persist().map_err(|error| error.to_string())
}

/// Hands a batch of the order to the worker, and takes note of its markers.
fn deliver(machine: &mut Machine, batch: BatchSeq, content: IncomingBatch) {
    let markers: Vec<RecordKind> = content
        .records()
        .iter()
        .map(|record| record.kind)
        .filter(|kind| !matches!(kind, RecordKind::Data { .. } | RecordKind::Zero { .. }))
        .collect();
    let generation = Generation(machine.state.generation);
    let takes_points = machine.failover.takes_point(generation, batch);
    let mut hold = None;
    for kind in &markers {
        match kind {
            RecordKind::SyncStart => {
                machine.sync_times.0 = Some(Instant::now());
                hold = Some(None);
            }
            RecordKind::Point(_) if takes_points => hold = Some(Some(batch)),
            // The disks may go past it. The next write of the state says so, before any stage in which it would count.
            RecordKind::Point(id) => {
                machine.state.given_up_us = machine.state.given_up_us.max(id.0);
            }
            _ => {}
        }
    }
    let Some(open) = &mut machine.open else { return };
    if hold == Some(None) {
        open.worker.send(Command::Hold(None));
    }
    open.worker.send(Command::Append(content));
    if let Some(Some(point)) = hold {
        open.worker.send(Command::Hold(Some(point)));
    }
    let marker = |kind| Marker { batch, kind, counts: takes_points };
    machine.marks.extend(markers.into_iter().map(marker));
}
