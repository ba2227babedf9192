//! Failover, cancel and commit of one machine, as a pure state machine.
//!
//! | stage | waits for | then |
//! | --- | --- | --- |
//! | `Replicating` | a request | `ShuttingDown`, or `Preparing` when the agent is away |
//! | `ShuttingDown` | the agent: hook run, fence up, final point set | `Draining`, or `Preparing` when a point was named; hook failed: `Replicating`; deadline: `Preparing` |
//! | `Draining` | the final point on stable storage | `Preparing`; deadline: `Preparing` with what is there; the agent was restarted: `ShuttingDown` |
//! | `Preparing` | the disks at the point, durable, with a new content id | `FailedOver`; failed: asked again on request |
//! | `FailedOver` | commit or cancel | `Removing` or `Cancelling` |
//! | `Cancelling` | the agent: fence down | `Replicating` |
//! | `Removing` | the agent: removal hook run | `Committed`; hook failed: `FailedOver` |
//! | `Committed` | nothing | |
//!
//! No deadline makes disks ready that are a mixture: until a sync is over it is waited for.
//!
//! A cancel is taken in every stage before `Removing`. Every change of stage is made durable
//! ([`Action::Persist`]) before the actions after it are carried out, so a target that stops
//! anywhere finds its place again; [`Failover::resume`] says what it must ask for anew. Jobs keep
//! their numbers, so an agent that did one already only answers again.

use std::time::{Duration, Instant};

use backhaul_proto::id::{BatchSeq, Generation, JobId, PointId};
use backhaul_proto::message::JobKind;
use serde::{Deserialize, Serialize};

use crate::recovery_point::RecoveryPoint;

/// How often a failover that waits for a sync looks again after its deadline.
const MIXTURE_PERIOD: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests;

/// The durable part of the state.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "stage", rename_all = "kebab-case")]
pub enum Stage {
    /// Changes arrive.
    #[default]
    Replicating,
    /// The agent was asked to shut the machine down and set the final point.
    ShuttingDown {
        /// The job's number.
        job: u64,
        /// How it was asked for.
        plan: Plan,
    },
    /// The final point is on its way.
    Draining {
        /// The job that set it.
        job: u64,
        /// How it was asked for.
        plan: Plan,
        /// The final point.
        point_us: u64,
        /// The batch that ends with it.
        batch: u64,
        /// The generation of both.
        generation: u64,
    },
    /// The disks are brought to the point.
    Preparing {
        /// How it was asked for.
        plan: Plan,
        /// Where to.
        goal: Goal,
    },
    /// The disks are ready.
    FailedOver(Outcome),
    /// The agent was asked to lift the fence.
    Cancelling {
        /// The job's number.
        job: u64,
        /// The disks were ready, so somebody may have written to them.
        was_ready: bool,
        /// What the failover came to, if it was over: until the agent has answered, it can be gone
        /// back to.
        #[serde(default)]
        outcome: Option<Outcome>,
    },
    /// The agent was asked to remove the machine.
    Removing {
        /// The job's number.
        job: u64,
        /// What the failover came to.
        outcome: Outcome,
    },
    /// The machine lives here.
    Committed(Outcome),
}

/// How a failover was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Leave the source running.
    pub without_shutdown: bool,
    /// How long to wait for the source.
    pub drain_timeout_seconds: f64,
    /// When it was asked for, in microseconds since 1970 UTC, to say how long it took.
    pub requested_at_us: u64,
    /// The point that was named; none for the newest state.
    #[serde(default)]
    pub to: Option<RecoveryPoint>,
}

impl Plan {
    /// Where the disks are brought when the source is not waited for any longer.
    fn goal_without_source(&self, facts: &Facts) -> Goal {
        match self.to {
            Some(point) => {
                let loss_seconds = facts.now_us.saturating_sub(point.id_us) as f64 / 1e6;
                Goal::Point { point, drained: false, loss_seconds }
            }
            None => Goal::JournalEnd { loss_seconds: facts.loss_seconds() },
        }
    }
}

/// Where the disks are brought to.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "goal", rename_all = "kebab-case")]
pub enum Goal {
    /// A point that was set.
    Point {
        /// The point.
        point: RecoveryPoint,
        /// It is the final one, set after the source was shut down: nothing is lost.
        drained: bool,
        /// Seconds of writes that are lost otherwise.
        loss_seconds: f64,
    },
    /// Everything that is on stable storage here: the source could not be drained.
    JournalEnd {
        /// Seconds of writes that are lost.
        loss_seconds: f64,
    },
}

/// What a failover came to.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// The point that the disks are at.
    pub point: RecoveryPoint,
    /// Whether the source was drained.
    pub drained: bool,
    /// Seconds of writes that are lost.
    pub loss_seconds: f64,
    /// From the request to disks that are ready.
    pub seconds: f64,
    /// The source was left running on purpose.
    #[serde(default)]
    pub rehearsal: bool,
}

/// Why a request is refused. The code is stable, the sentence says what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// For programs.
    pub code: &'static str,
    /// For people.
    pub sentence: String,
}

/// What must be done, in this order.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Make the stage durable before anything that follows.
    Persist,
    /// Ask the agent.
    SendJob(JobId, JobKind),
    /// Bring the disks to the goal, make them durable, give them a new content id.
    Prepare(Goal),
    /// Tell the agent how the machine stands now.
    Announce,
    /// Go on replicating; when the disks were ready, check first that nobody wrote to them.
    Resume {
        /// The disks were ready.
        was_ready: bool,
    },
    /// The machine was committed: the journal may go.
    EndProtection,
}

/// What a decision depends on.
#[derive(Debug, Clone, Copy)]
pub struct Facts {
    /// The agent is connected and serves the machine.
    pub connected: bool,
    /// The disks are a prefix of the machine's writes.
    pub consistent: bool,
    /// How much of a sync is done, in percent, when one is under way.
    pub sync_percent: Option<u64>,
    /// The newest point.
    pub point: Option<RecoveryPoint>,
    /// When the newest point was set that there ever was, in microseconds since 1970 UTC; 0 for none.
    pub newest_point_us: u64,
    /// Acknowledged batches were lost to damage, and not made good since.
    pub damaged: bool,
    /// The last batch on stable storage.
    pub durable: BatchSeq,
    /// How much would be lost now.
    pub rpo: Option<Duration>,
    /// The wall clock, in microseconds since 1970 UTC.
    pub now_us: u64,
}

impl Facts {
    /// At most so much is lost. After a restart without the agent the newest point is all that is
    /// known to be here, or, when the journal was too full to keep it, to have been.
    fn loss_seconds(&self) -> f64 {
        let known_us = self.point.map_or(self.newest_point_us, |point| point.id_us);
        let since_point = self.now_us.saturating_sub(known_us) as f64 / 1e6;
        self.rpo.map_or(since_point, |rpo| rpo.as_secs_f64())
    }

    /// Whether nobody here can say how much would be lost.
    fn loss_is_unknown(&self) -> bool {
        let no_bound = self.damaged || self.newest_point_us == 0;
        !self.connected && self.point.is_none() && self.rpo.is_none() && no_bound
    }
}

/// The state machine of one machine.
#[derive(Debug)]
pub struct Failover {
    machine: String,
    stage: Stage,
    failure: String,
    /// When the present wait for the source ends. Not durable: a restart waits anew.
    deadline: Option<Instant>,
}

impl Failover {
    /// Continues where the durable state left off.
    pub fn new(machine: &str, stage: Stage, failure: String) -> Self {
        Self { machine: machine.to_owned(), stage, failure, deadline: None }
    }

    /// The durable part.
    pub fn stage(&self) -> &Stage {
        &self.stage
    }

    /// Why the last request did not work; empty when it did.
    pub fn failure(&self) -> &str {
        &self.failure
    }

    /// Whether batches may come in and be applied.
    pub fn is_replicating(&self) -> bool {
        matches!(
            self.stage,
            Stage::Replicating | Stage::ShuttingDown { .. } | Stage::Draining { .. }
        )
    }

    /// Whether batches that come in are kept. Not once the disks are brought to where they stay:
    /// whatever the agent sent before it heard of that, it sends again after a cancel.
    pub fn takes_batches(&self) -> bool {
        self.is_replicating() || matches!(self.stage, Stage::Cancelling { .. })
    }

    /// Whether a point that comes in with this batch becomes the newest one, up to which the disks are
    /// brought. Not while a failover goes to one that was named, nor after the final one: a source
    /// that was left running sets others.
    pub fn takes_point(&self, generation: Generation, batch: BatchSeq) -> bool {
        match &self.stage {
            Stage::Replicating | Stage::Cancelling { outcome: None, .. } => true,
            Stage::ShuttingDown { plan, .. } => plan.to.is_none(),
            Stage::Draining { plan, batch: last, generation: drained, .. } => {
                plan.to.is_none() && generation.0 == *drained && batch.0 <= *last
            }
            _ => false,
        }
    }

    /// Whether the newest point may be given up when the journal is full: not while the disks are brought to it
    /// because it was named, nor where a failover may be gone back to.
    pub fn may_give_up_point(&self) -> bool {
        match &self.stage {
            Stage::Replicating | Stage::Cancelling { outcome: None, .. } => true,
            Stage::ShuttingDown { plan, .. } | Stage::Draining { plan, .. } => plan.to.is_none(),
            _ => false,
        }
    }

    /// Where the disks are brought, past every point that is not that. From then on those cannot be restored, also
    /// if this is cancelled.
    pub fn goal(&self) -> Option<&Goal> {
        match &self.stage {
            Stage::Preparing { goal, .. } => Some(goal),
            _ => None,
        }
    }

    /// Whether an agent is still to be asked for `job`: a later decision may have overtaken it.
    pub fn wants(&self, asked: JobId) -> bool {
        match &self.stage {
            Stage::ShuttingDown { job, .. }
            | Stage::Cancelling { job, .. }
            | Stage::Removing { job, .. } => *job == asked.0,
            _ => false,
        }
    }

    /// Which failover brings the disks to its point at present, by when it was asked for: what a
    /// worker says of an earlier one counts no more.
    pub fn preparing(&self) -> Option<u64> {
        match &self.stage {
            Stage::Preparing { plan, .. } => Some(plan.requested_at_us),
            _ => None,
        }
    }

    /// What must be asked for anew after a restart of the target, or when the agent connects.
    /// `generation` is the one that the agent continues.
    pub fn resume(&mut self, now: Instant, connected: bool, generation: u64) -> Vec<Action> {
        match &self.stage {
            Stage::ShuttingDown { job, plan } => {
                let (job, kind) = (JobId(*job), shutdown_kind(plan));
                let deadline = now + Duration::from_secs_f64(plan.drain_timeout_seconds);
                self.deadline.get_or_insert(deadline);
                if connected { vec![Action::SendJob(job, kind)] } else { Vec::new() }
            }
            Stage::Draining { job, plan, generation: drained, .. } => {
                let (job, plan, drained) = (*job, *plan, *drained);
                let deadline = now + Duration::from_secs_f64(plan.drain_timeout_seconds);
                self.deadline.get_or_insert(deadline);
                if !connected || drained == generation {
                    return Vec::new();
                }
                // The agent was restarted, and the final point with it: a batch of that number in
                // the new generation is another one.
                self.stage = Stage::ShuttingDown { job, plan };
                vec![Action::Persist, Action::SendJob(JobId(job), shutdown_kind(&plan))]
            }
            Stage::Cancelling { job, .. } if connected => {
                vec![Action::SendJob(JobId(*job), JobKind::Unfence)]
            }
            Stage::Removing { job, .. } if connected => {
                vec![Action::SendJob(JobId(*job), JobKind::Remove)]
            }
            _ => Vec::new(),
        }
    }

    /// What a restarted target must do again without anybody's help.
    pub fn resume_local(&self) -> Vec<Action> {
        match &self.stage {
            // An older version may not have given up what that goes past.
            Stage::Preparing { goal, .. } => vec![Action::Persist, Action::Prepare(*goal)],
            Stage::Committed(_) => vec![Action::EndProtection],
            _ => Vec::new(),
        }
    }

    fn refuse<T>(&self, code: &'static str, sentence: &str) -> Result<T, Refusal> {
        let sentence = format!("machine {} {sentence}", self.machine);
        Err(Refusal { code, sentence })
    }

    /// An operator asks for a failover, to the newest state or to the point `to`.
    pub fn handle_failover(
        &mut self,
        now: Instant,
        facts: &Facts,
        to: Option<PointId>,
        plan: Plan,
    ) -> Result<Vec<Action>, Refusal> {
        match &self.stage {
            Stage::Replicating => {}
            Stage::FailedOver(_) => {
                return self.refuse(
                    "failed-over",
                    "is failed over already; commit it, or cancel and fail over again",
                );
            }
            Stage::Committed(_) | Stage::Removing { .. } => {
                return self.refuse(
                    "wrong-direction",
                    "runs on-premises already, so there is nothing to fail over from Azure; re-protect it first",
                );
            }
            // Asking again for what is under way is not a mistake, and a failed step is tried anew.
            Stage::Preparing { goal, .. } if !self.failure.is_empty() => {
                let goal = *goal;
                self.failure.clear();
                return Ok(vec![Action::Persist, Action::Prepare(goal)]);
            }
            Stage::Preparing { .. } | Stage::ShuttingDown { .. } | Stage::Draining { .. } => {
                return Ok(Vec::new());
            }
            // The source does not come back, so the cancel is taken back: the disks are as they were.
            Stage::Cancelling { outcome: Some(outcome), .. } if !facts.connected => {
                self.failure.clear();
                self.stage = Stage::FailedOver(*outcome);
                return Ok(vec![Action::Persist, Action::Announce]);
            }
            Stage::Cancelling { .. } => {
                return self.refuse(
                    "cancelling",
                    "has a cancel under way; wait until it replicates again",
                );
            }
        }
        if !facts.consistent {
            return match facts.sync_percent {
                Some(percent) => self.refuse(
                    "not-consistent",
                    &format!("has no recovery point: its sync is at {percent} %; fail over when it is done"),
                ),
                None => self.refuse(
                    "no-recovery-point",
                    "has no recovery point: its first sync has not finished, or was interrupted; start its agent and let the sync finish",
                ),
            };
        }
        if facts.loss_is_unknown() {
            return self.refuse(
                "no-recovery-point",
                "has no recovery point, and its agent is away, so how much would be lost is not known; start the agent and let it make good what is missing",
            );
        }
        let newest = facts.point;
        match to {
            Some(id) if newest.is_none_or(|newest| id != newest.id()) => {
                self.refuse(
                    "unknown-point",
                    "does not keep that recovery point; `backhaul points` lists those that it can be failed over to",
                )
            }
            _ if facts.connected && !(to.is_some() && plan.without_shutdown) => {
                self.failure.clear();
                let plan = Plan { to: to.and(newest), ..plan };
                let job = facts.now_us;
                self.deadline = Some(now + Duration::from_secs_f64(plan.drain_timeout_seconds));
                self.stage = Stage::ShuttingDown { job, plan };
                Ok(vec![Action::Persist, Action::SendJob(JobId(job), shutdown_kind(&plan))])
            }
            _ => {
                self.failure.clear();
                let plan = Plan { to: to.and(newest), ..plan };
                Ok(self.prepare(plan, plan.goal_without_source(facts)))
            }
        }
    }

    fn prepare(&mut self, plan: Plan, goal: Goal) -> Vec<Action> {
        self.deadline = None;
        self.stage = Stage::Preparing { plan, goal };
        vec![Action::Persist, Action::Announce, Action::Prepare(goal)]
    }

    /// An operator asks to undo a failover.
    pub fn handle_cancel(&mut self, facts: &Facts) -> Result<Vec<Action>, Refusal> {
        let (was_ready, outcome) = match &self.stage {
            Stage::Replicating => {
                return self.refuse(
                    "not-failed-over",
                    "is not failed over, so there is nothing to cancel",
                );
            }
            Stage::Removing { .. } | Stage::Committed(_) => {
                return self.refuse(
                    "committed",
                    "was committed, which cannot be undone; re-protect it to replicate again",
                );
            }
            // Asked again: the job may have failed, or its answer been lost.
            Stage::Cancelling { job, .. } => {
                self.failure.clear();
                let again = Action::SendJob(JobId(*job), JobKind::Unfence);
                return Ok(if facts.connected { vec![Action::Persist, again] } else { Vec::new() });
            }
            Stage::FailedOver(outcome) => (true, Some(*outcome)),
            Stage::Preparing { .. } => (true, None),
            Stage::ShuttingDown { .. } | Stage::Draining { .. } => (false, None),
        };
        self.failure.clear();
        self.deadline = None;
        let job = facts.now_us;
        self.stage = Stage::Cancelling { job, was_ready, outcome };
        let mut actions = vec![Action::Persist];
        if facts.connected {
            actions.push(Action::SendJob(JobId(job), JobKind::Unfence));
        }
        Ok(actions)
    }

    /// An operator asks to make a failover final.
    pub fn handle_commit(
        &mut self,
        facts: &Facts,
        without_removal: bool,
    ) -> Result<Vec<Action>, Refusal> {
        let outcome = match &self.stage {
            Stage::FailedOver(_) if !facts.consistent => {
                return self.refuse(
                    "not-consistent",
                    "has disks that are a mixture, which must not be made final; cancel, let the sync finish, and fail over again",
                );
            }
            Stage::FailedOver(outcome) => *outcome,
            Stage::Removing { outcome, .. } if without_removal => *outcome,
            Stage::Removing { .. } => return Ok(Vec::new()),
            Stage::Committed(_) => return Ok(Vec::new()),
            Stage::Replicating | Stage::Cancelling { .. } => {
                return self.refuse(
                    "not-failed-over",
                    "is not failed over; fail it over and check it before you commit",
                );
            }
            _ => {
                return self.refuse(
                    "failing-over",
                    "is still failing over; commit it when its disks are ready",
                );
            }
        };
        self.failure.clear();
        if without_removal {
            return Ok(self.commit(outcome));
        }
        if !facts.connected {
            return self.refuse(
                "agent-away",
                "cannot be removed in Azure because its agent is not connected; start the agent, or commit with --without-removal and remove the machine by hand",
            );
        }
        let job = facts.now_us;
        self.stage = Stage::Removing { job, outcome };
        Ok(vec![Action::Persist, Action::SendJob(JobId(job), JobKind::Remove)])
    }

    fn commit(&mut self, outcome: Outcome) -> Vec<Action> {
        self.stage = Stage::Committed(outcome);
        vec![Action::Persist, Action::EndProtection, Action::Announce]
    }

    /// The agent did a job, setting `point` if it sets one, or failed with a sentence.
    pub fn handle_job_reply(
        &mut self,
        facts: &Facts,
        job: JobId,
        result: Result<Option<RecoveryPoint>, String>,
    ) -> Vec<Action> {
        match (&self.stage, result) {
            (Stage::ShuttingDown { job: asked, plan }, Ok(Some(point))) if *asked == job.0 => {
                let plan = *plan;
                if plan.to.is_some() {
                    // The source is off; what it wrote after the chosen point is not wanted.
                    return self.prepare(plan, plan.goal_without_source(facts));
                }
                self.stage = Stage::Draining {
                    job: job.0,
                    plan,
                    point_us: point.id_us,
                    generation: point.generation,
                    batch: point.batch,
                };
                let mut actions = vec![Action::Persist];
                actions.extend(self.handle_durable(facts, point.generation));
                actions
            }
            (Stage::ShuttingDown { job: asked, .. }, Err(sentence)) if *asked == job.0 => {
                self.failure = format!("the failover stopped, and nothing was changed: {sentence}");
                self.deadline = None;
                self.stage = Stage::Replicating;
                vec![Action::Persist]
            }
            (Stage::Cancelling { job: asked, was_ready, .. }, Ok(_)) if *asked == job.0 => {
                let was_ready = *was_ready;
                self.stage = Stage::Replicating;
                vec![Action::Persist, Action::Resume { was_ready }, Action::Announce]
            }
            (Stage::Cancelling { job: asked, .. }, Err(sentence)) if *asked == job.0 => {
                self.failure = format!("the cancel could not lift the fence: {sentence}");
                vec![Action::Persist]
            }
            (Stage::Removing { job: asked, outcome }, Ok(_)) if *asked == job.0 => {
                let outcome = *outcome;
                self.commit(outcome)
            }
            (Stage::Removing { job: asked, outcome }, Err(sentence)) if *asked == job.0 => {
                self.failure =
                    format!("the commit stopped, and nothing was changed here: {sentence}");
                self.stage = Stage::FailedOver(*outcome);
                vec![Action::Persist]
            }
            // An answer to a job that a cancel or a deadline has overtaken.
            _ => Vec::new(),
        }
    }

    /// More batches of `generation` are on stable storage.
    pub fn handle_durable(&mut self, facts: &Facts, generation: u64) -> Vec<Action> {
        let Stage::Draining { plan, point_us, batch, generation: drained, .. } = &self.stage else {
            return Vec::new();
        };
        if generation != *drained || facts.durable.0 < *batch {
            return Vec::new();
        }
        let point = RecoveryPoint { id_us: *point_us, generation, batch: *batch };
        let drained = !plan.without_shutdown;
        let goal = Goal::Point { point, drained, loss_seconds: 0.0 };
        self.prepare(*plan, goal)
    }

    /// The disks are at the goal, which is `point`; or could not be brought there.
    pub fn handle_prepared(
        &mut self,
        facts: &Facts,
        result: Result<RecoveryPoint, String>,
    ) -> Vec<Action> {
        let Stage::Preparing { plan, goal } = &self.stage else { return Vec::new() };
        let mixture = "a sync has begun, and its disks are a mixture until it is over".to_owned();
        match if facts.consistent { result } else { Err(mixture) } {
            Ok(point) => {
                let (drained, loss_seconds) = match *goal {
                    Goal::Point { drained, loss_seconds, .. } => (drained, loss_seconds),
                    Goal::JournalEnd { loss_seconds } => (false, loss_seconds),
                };
                let seconds = facts.now_us.saturating_sub(plan.requested_at_us) as f64 / 1e6;
                self.failure.clear();
                let rehearsal = plan.without_shutdown;
                let outcome = Outcome { point, drained, loss_seconds, seconds, rehearsal };
                self.stage = Stage::FailedOver(outcome);
            }
            Err(sentence) => {
                self.failure = format!(
                    "the disks could not be made ready: {sentence}; mend it and fail over again, or cancel"
                );
            }
        }
        vec![Action::Persist]
    }

    /// The agent says, without having been asked, that it has removed the machine.
    pub fn handle_ended(&mut self, facts: &Facts) -> Vec<Action> {
        match &self.stage {
            Stage::Removing { job, .. } => {
                let job = JobId(*job);
                self.handle_job_reply(facts, job, Ok(None))
            }
            _ => Vec::new(),
        }
    }

    /// Whether the source must take no more writes.
    pub fn must_fence(&self) -> bool {
        match &self.stage {
            Stage::Preparing { plan, .. } => !plan.without_shutdown,
            Stage::FailedOver(outcome) => !outcome.rehearsal,
            Stage::Removing { .. } => true,
            _ => false,
        }
    }

    /// When [`Failover::handle_timeout`] wants to be called.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.deadline
    }

    /// Time passed: a source that does not answer is given up at its deadline.
    pub fn handle_timeout(&mut self, now: Instant, facts: &Facts) -> Vec<Action> {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return Vec::new();
        }
        match &self.stage {
            // Going on without the source needs disks that are a prefix of its writes.
            Stage::ShuttingDown { .. } | Stage::Draining { .. } if !facts.consistent => {
                self.deadline = Some(now + MIXTURE_PERIOD);
                let told = !self.failure.is_empty();
                self.failure = "the source has not finished its sync, and until then the disks are a mixture; the failover goes on when it has: keep its agent running, or cancel".into();
                if told { Vec::new() } else { vec![Action::Persist] }
            }
            Stage::ShuttingDown { plan, .. } | Stage::Draining { plan, .. } => {
                let plan = *plan;
                self.prepare(plan, plan.goal_without_source(facts))
            }
            _ => {
                self.deadline = None;
                Vec::new()
            }
        }
    }

    /// What the present step waits for, in words.
    pub fn step(&self) -> &'static str {
        match &self.stage {
            Stage::Replicating => "",
            Stage::ShuttingDown { plan, .. } if plan.without_shutdown => "setting the final point",
            Stage::ShuttingDown { .. } => "shutting the machine down in Azure",
            Stage::Draining { .. } => "receiving its last writes",
            Stage::Preparing { .. } => "bringing the disks to the point",
            Stage::FailedOver(_) => "waiting for commit or cancel",
            Stage::Cancelling { .. } => "lifting the fence at the agent",
            Stage::Removing { .. } => "removing the machine in Azure",
            Stage::Committed(_) => "",
        }
    }
}

fn shutdown_kind(plan: &Plan) -> JobKind {
    if plan.without_shutdown { JobKind::FinalPoint } else { JobKind::Shutdown }
}
