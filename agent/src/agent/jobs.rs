//! What the target asks of a machine, one job at a time.

use std::sync::Arc;

use backhaul_proto::message::{Job, JobKind, JobReply, agent_message};

use super::{Agent, Event};
use crate::job::{self, JobContext};

impl Agent {
    pub(super) fn handle_job(&mut self, job: Job) {
        let index = job.machine as usize;
        if index >= self.machines.len() {
            return;
        }
        // No step of a failover: it overtakes none, and two tags do not overtake each other.
        if job.kind() == JobKind::Tag {
            let reply = job::tag(&self.job_context(index), job);
            return self.say(agent_message::Kind::JobReply(reply));
        }
        let machine = &mut self.machines[index];
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
        // Whoever fails over waits for this machine's last writes.
        self.ceiling.forgive_debt();
        self.machines[index].limit.forgive_debt();
        let context = self.job_context(index);
        let events = self.events.clone();
        let running = tokio::spawn(async move {
            let reply = job::execute(context, job).await;
            let _ = events.send(Event::JobDone(index, reply));
        });
        self.machines[index].running_job = Some((job_number, running.abort_handle()));
    }

    pub(super) fn job_context(&self, index: usize) -> JobContext {
        let machine = &self.machines[index];
        JobContext {
            capture: Arc::clone(&machine.capture),
            config: machine.config.clone(),
            state_dir: self.config.state_dir.clone(),
            state_lock: Arc::clone(&machine.state_lock),
        }
    }

    pub(super) fn handle_job_done(&mut self, index: usize, reply: JobReply) {
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
}
