//! What the failover state machine decides, done.

use std::sync::Arc;
use std::time::Instant;

use backhaul_api::Failure;
use backhaul_proto::id::{BatchSeq, Generation, JobId, MachineIndex, MachineName, PointId};
use backhaul_proto::message::{Job, JobKind, JobReply, Standing, target_message};

use super::sessions::{standing, welcome};
use super::{Event, Tag, Target, printable};
use crate::failover::{Action, Goal, Stage};
use crate::machine::{LinkId, now_us, point_view};
use crate::machine_state::{Consistency, ImageMark};
use crate::recovery_point::{PointText, RecoveryPoint};
use crate::worker::Command;

impl Target {
    /// Does what was decided, after whatever of earlier decisions is left to be done.
    pub(super) fn carry_out(&mut self, name: &MachineName, actions: Vec<Action>) {
        let Some(machine) = self.machines.get_mut(name) else { return };
        let mut unfinished = std::mem::take(&mut machine.unfinished);
        unfinished.extend(actions);
        let mut actions = unfinished.into_iter();
        while let Some(action) = actions.next() {
            let Some(machine) = self.machines.get_mut(name) else { return };
            match action {
                // What is not durable must not be acted on; it is tried again on the next tick.
                Action::Persist => {
                    if !self.persist(name) {
                        let Some(machine) = self.machines.get_mut(name) else { return };
                        machine.unfinished = vec![Action::Persist];
                        return machine.unfinished.extend(actions);
                    }
                }
                Action::SendJob(job, kind) if machine.failover.wants(job) => {
                    let link = machine.link;
                    self.send_job(link, job, kind);
                }
                // Overtaken while it waited: a shutdown that was cancelled must not be asked for.
                Action::SendJob(..) => {}
                Action::Prepare(goal) => {
                    let through = match goal {
                        Goal::Point { point, .. } => {
                            Some((Generation(point.generation), point.batch()))
                        }
                        Goal::JournalEnd { .. } => None,
                    };
                    let Some(failover) = machine.failover.preparing() else { continue };
                    // They may have failed, and been mended since.
                    if let Err(sentence) = self.open(name) {
                        let sentence = format!("its disks are not open: {sentence}");
                        self.handle_prepared(name, failover, Err(sentence));
                        continue;
                    }
                    let machine = self.machines.get(name);
                    if let Some(open) = machine.and_then(|machine| machine.open.as_ref()) {
                        open.worker.send(Command::Prepare { failover, through });
                    }
                }
                Action::Announce => self.announce(name),
                Action::Resume { was_ready } => self.resume(name, was_ready),
                Action::EndProtection => self.end_protection(name),
            }
        }
    }

    pub(super) fn send_job(&self, link: Option<(LinkId, MachineIndex)>, job: JobId, kind: JobKind) {
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
        let ended = matches!(machine.failover.stage(), Stage::Committed(_));
        let message = if ended {
            welcome(index, Standing::Ended)
        } else {
            // The agent may have come with a new generation while the machine was failed over.
            standing(machine, index, machine.agent_generation, BatchSeq(0))
        };
        // What is refused here is tried again when the agent is back.
        if let Some(refusal) = &message.refusal {
            let sentence = refusal.sentence.clone();
            return self.drop_link(id, &sentence);
        }
        if let Some(link) = self.links.get(&id) {
            link.up.control(target_message::Kind::Machine(message));
        }
    }

    /// After a cancel: unless somebody wrote to the disks, replication goes on where it was.
    pub(super) fn resume(&mut self, name: &MachineName, was_ready: bool) {
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

    pub(super) fn handle_prepared(
        &mut self,
        name: &MachineName,
        failover: u64,
        result: Result<BatchSeq, String>,
    ) {
        let Some(machine) = self.machines.get_mut(name) else { return };
        let Stage::Preparing { goal, .. } = *machine.failover.stage() else {
            return;
        };
        if machine.failover.preparing() != Some(failover) {
            return;
        }
        let batch = match (result, &machine.open) {
            (Ok(batch), Some(_)) => batch,
            (Ok(_), None) => return,
            (Err(sentence), _) => return self.handle_ready(name, failover, Err(sentence)),
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
            let _ = events.send(Event::Ready(name, failover, marks.map(|marks| (point, marks))));
        });
    }

    pub(super) fn handle_ready(
        &mut self,
        name: &MachineName,
        failover: u64,
        result: Result<(RecoveryPoint, Vec<ImageMark>), String>,
    ) {
        let Some(machine) = self.machines.get_mut(name) else { return };
        // A cancel has overtaken it, and the disks may have gone on since.
        if machine.failover.preparing() != Some(failover) {
            return;
        }
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

    pub(super) fn handle_job_reply(&mut self, id: LinkId, reply: &JobReply) {
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

    pub(super) fn answer_tags(&mut self, name: &MachineName, durable: BatchSeq) {
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
}
