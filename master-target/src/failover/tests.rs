//! Random scripts with a crash after every step, and the paths that people take.

use std::time::{Duration, Instant};

use backhaul_proto::id::{BatchSeq, Generation, JobId, PointId};
use backhaul_proto::message::JobKind;
use proptest::prelude::*;

use super::{Action, Facts, Failover, Goal, Plan, Stage};
use crate::recovery_point::RecoveryPoint;

fn point(batch: u64) -> RecoveryPoint {
    RecoveryPoint::new(PointId(batch * 1000), Generation(1), BatchSeq(batch))
}

fn facts() -> Facts {
    Facts {
        connected: true,
        consistent: true,
        sync_percent: None,
        point: Some(point(5)),
        newest_point_us: point(5).id_us,
        damaged: false,
        durable: BatchSeq(5),
        rpo: Some(Duration::from_secs(3)),
        now_us: 1_000_000,
    }
}

fn plan() -> Plan {
    Plan { without_shutdown: false, drain_timeout_seconds: 60.0, requested_at_us: 0, to: None }
}

fn takes(machine: &Failover, batch: u64) -> bool {
    machine.takes_point(Generation(point(batch).generation), BatchSeq(batch))
}

fn machine() -> Failover {
    Failover::new("web01", Stage::Replicating, String::new())
}

#[test]
fn drained_failover_then_commit() {
    let (now, facts) = (Instant::now(), facts());
    let mut machine = machine();
    let actions = machine.handle_failover(now, &facts, None, plan()).unwrap();
    let job = JobId(1_000_000);
    assert_eq!(actions, [Action::Persist, Action::SendJob(job, JobKind::Shutdown)]);
    let final_point = point(9);
    let actions = machine.handle_job_reply(&facts, job, Ok(Some(final_point)));
    assert_eq!(actions, [Action::Persist], "batch 9 is not durable yet");
    let later = Facts { durable: BatchSeq(9), ..facts };
    let goal = Goal::Point { point: final_point, drained: true, loss_seconds: 0.0 };
    let actions = machine.handle_durable(&later, 1);
    assert_eq!(actions, [Action::Persist, Action::Announce, Action::Prepare(goal)]);
    machine.handle_prepared(&later, Ok(final_point));
    let Stage::FailedOver(outcome) = machine.stage() else { panic!() };
    assert!(outcome.drained && outcome.loss_seconds == 0.0);
    let actions = machine.handle_commit(&facts, false).unwrap();
    assert_eq!(actions[1], Action::SendJob(job, JobKind::Remove));
    let actions = machine.handle_job_reply(&facts, job, Ok(None));
    assert_eq!(actions, [Action::Persist, Action::EndProtection, Action::Announce]);
    let refusal = machine.handle_failover(now, &facts, None, plan()).unwrap_err();
    assert_eq!(refusal.code, "wrong-direction");
}

#[test]
fn an_agent_that_is_away_or_dies_costs_data_and_says_how_much() {
    let now = Instant::now();
    let mut machine = machine();
    let away = Facts { connected: false, ..facts() };
    let actions = machine.handle_failover(now, &away, None, plan()).unwrap();
    assert_eq!(actions[2], Action::Prepare(Goal::JournalEnd { loss_seconds: 3.0 }));

    let mut machine = self::machine();
    machine.handle_failover(now, &facts(), None, plan()).unwrap();
    assert!(machine.handle_timeout(now + Duration::from_secs(59), &facts()).is_empty());
    let actions = machine.handle_timeout(now + Duration::from_secs(60), &facts());
    assert_eq!(actions[2], Action::Prepare(Goal::JournalEnd { loss_seconds: 3.0 }));
}

#[test]
fn refusals_say_why_and_what_to_do() {
    let now = Instant::now();
    let mut machine = machine();
    let syncing = Facts { consistent: false, sync_percent: Some(42), ..facts() };
    let refused = machine.handle_failover(now, &syncing, None, plan()).unwrap_err();
    assert!(refused.sentence.contains("its sync is at 42 %"), "{}", refused.sentence);
    let never = Facts { consistent: false, point: None, ..facts() };
    let refused = machine.handle_failover(now, &never, None, plan()).unwrap_err();
    assert_eq!(refused.code, "no-recovery-point");
    let refused = machine.handle_failover(now, &facts(), Some(PointId(1)), plan()).unwrap_err();
    assert_eq!(refused.code, "unknown-point");
    assert_eq!(machine.handle_cancel(&facts()).unwrap_err().code, "not-failed-over");
    assert_eq!(machine.handle_commit(&facts(), false).unwrap_err().code, "not-failed-over");
}

#[test]
fn a_hook_that_fails_changes_nothing_and_can_be_tried_again() {
    let now = Instant::now();
    let mut machine = machine();
    machine.handle_failover(now, &facts(), None, plan()).unwrap();
    let failed = Err("the shutdown hook `vm-off` failed".to_owned());
    machine.handle_job_reply(&facts(), JobId(1_000_000), failed);
    assert_eq!(machine.stage(), &Stage::Replicating);
    assert!(machine.failure().contains("vm-off"));
    assert!(machine.handle_failover(now, &facts(), None, plan()).is_ok());
}

#[test]
fn a_named_point_shuts_the_source_down_too_and_stays_where_it_is() {
    let (now, facts) = (Instant::now(), facts());
    let mut machine = machine();
    let actions = machine.handle_failover(now, &facts, Some(point(5).id()), plan()).unwrap();
    let job = JobId(1_000_000);
    assert_eq!(actions[1], Action::SendJob(job, JobKind::Shutdown));
    assert!(!takes(&machine, 9), "the final point must not take the place of the chosen one");
    let actions = machine.handle_job_reply(&facts, job, Ok(Some(point(9))));
    let Action::Prepare(Goal::Point { point: chosen, drained, loss_seconds }) = actions[2] else {
        panic!("{actions:?}")
    };
    assert_eq!((chosen, drained), (point(5), false));
    assert!(loss_seconds > 0.9, "{loss_seconds}");
}

/// The journal may be full while the source shuts down. A point that was named is kept, whatever it takes; so is
/// one that was failed over to, as a cancel may be taken back.
#[test]
fn a_point_that_a_failover_goes_to_is_not_given_up() {
    let (now, facts) = (Instant::now(), facts());
    let mut machine = machine();
    assert!(machine.may_give_up_point());
    machine.handle_failover(now, &facts, None, plan()).unwrap();
    assert!(machine.may_give_up_point(), "it goes to the newest state");
    let mut machine = self::machine();
    machine.handle_failover(now, &facts, Some(point(5).id()), plan()).unwrap();
    assert!(!machine.may_give_up_point());
    machine.handle_job_reply(&facts, JobId(1_000_000), Ok(Some(point(9))));
    machine.handle_prepared(&facts, Ok(point(5)));
    machine.handle_cancel(&facts).unwrap();
    assert!(matches!(machine.stage(), Stage::Cancelling { .. }) && !machine.may_give_up_point());
    let mut machine = self::machine();
    machine.handle_failover(now, &facts, None, plan()).unwrap();
    machine.handle_cancel(&facts).unwrap();
    assert!(machine.may_give_up_point(), "nothing can be gone back to");
}

/// A point that came between the source's answer and the final point was not taken, and after a restart it was: over
/// disks that might have been past it.
#[test]
fn points_up_to_the_final_one_are_taken_while_it_is_on_its_way() {
    let facts = facts();
    let mut machine = machine();
    machine.handle_failover(Instant::now(), &facts, None, plan()).unwrap();
    machine.handle_job_reply(&facts, JobId(1_000_000), Ok(Some(point(99))));
    assert!(matches!(machine.stage(), Stage::Draining { .. }));
    assert!(takes(&machine, 8) && takes(&machine, 99) && !takes(&machine, 100));
    assert!(!machine.takes_point(Generation(9), BatchSeq(8)), "another generation's");
    machine.handle_cancel(&facts).unwrap();
    assert!(takes(&machine, 100), "nothing can be gone back to");
}

/// A guest that flushes more than the queue holds while it shuts down forces a sync, and the
/// deadline once made a half-synced disk "ready", which could be committed.
#[test]
fn no_deadline_makes_a_mixture_ready() {
    let now = Instant::now();
    let mut machine = machine();
    machine.handle_failover(now, &facts(), None, plan()).unwrap();
    let syncing = Facts { consistent: false, ..facts() };
    let late = now + Duration::from_secs(61);
    assert_eq!(machine.handle_timeout(late, &syncing), [Action::Persist]);
    assert!(matches!(machine.stage(), Stage::ShuttingDown { .. }));
    assert!(machine.failure().contains("a mixture"), "{}", machine.failure());
    assert!(machine.handle_timeout(late, &syncing).is_empty(), "it waits before it looks again");
    let later = late + Duration::from_secs(6);
    assert!(machine.handle_timeout(later, &facts()).len() == 3, "and goes on when it is over");
    machine.handle_prepared(&syncing, Ok(point(5)));
    assert!(matches!(machine.stage(), Stage::Preparing { .. }), "{:?}", machine.stage());
    machine.handle_prepared(&facts(), Ok(point(5)));
    let refused = machine.handle_commit(&syncing, true).unwrap_err();
    assert_eq!(refused.code, "not-consistent");
}

/// The agent was killed while its last writes were on the way: the batch number of the final point
/// then means another batch, of the new generation.
#[test]
fn an_agent_that_is_restarted_while_draining_sets_the_final_point_again() {
    let now = Instant::now();
    let mut machine = machine();
    machine.handle_failover(now, &facts(), None, plan()).unwrap();
    let job = JobId(1_000_000);
    machine.handle_job_reply(&facts(), job, Ok(Some(point(9))));
    let later = Facts { durable: BatchSeq(9), ..facts() };
    assert!(machine.handle_durable(&later, 2).is_empty(), "batch 9 of generation 2 is another");
    let actions = machine.resume(now, true, 2);
    assert_eq!(actions, [Action::Persist, Action::SendJob(job, JobKind::Shutdown)]);
    let second = RecoveryPoint::new(PointId(12_000), Generation(2), BatchSeq(4));
    let actions = machine.handle_job_reply(&later, job, Ok(Some(second)));
    let goal = Goal::Point { point: second, drained: true, loss_seconds: 0.0 };
    assert_eq!(actions.last(), Some(&Action::Prepare(goal)));
}

/// A cancel waits for the agent. When that never comes back, the disks that were ready still are.
#[test]
fn a_cancel_without_an_agent_can_be_taken_back() {
    let now = Instant::now();
    let away = Facts { connected: false, ..facts() };
    let mut machine = machine();
    machine.handle_failover(now, &away, None, plan()).unwrap();
    machine.handle_prepared(&away, Ok(point(5)));
    machine.handle_cancel(&away).unwrap();
    let actions = machine.handle_failover(now, &away, None, plan()).unwrap();
    assert_eq!(actions, [Action::Persist, Action::Announce]);
    assert!(machine.handle_commit(&away, true).is_ok());
    // With the agent there, a repeated cancel asks again.
    let mut machine = self::machine();
    machine.handle_failover(now, &away, None, plan()).unwrap();
    machine.handle_cancel(&facts()).unwrap();
    let actions = machine.handle_cancel(&facts()).unwrap();
    assert_eq!(actions[1], Action::SendJob(JobId(1_000_000), JobKind::Unfence));
}

#[test]
fn what_is_lost_is_never_called_nothing_without_knowing() {
    let now = Instant::now();
    let mut machine = machine();
    let restarted = Facts { connected: false, rpo: None, ..facts() };
    let actions = machine.handle_failover(now, &restarted, None, plan()).unwrap();
    let Action::Prepare(Goal::JournalEnd { loss_seconds }) = actions[2] else { panic!() };
    assert!(loss_seconds > 0.9, "since the newest point: {loss_seconds}");
}

/// The journal's end was damaged and the source gone: a failover said that nothing was lost, with
/// megabytes missing that had been acknowledged.
#[test]
fn damage_without_a_source_is_no_point_to_fail_over_to() {
    let now = Instant::now();
    let away = Facts { connected: false, rpo: None, point: None, ..facts() };
    let damaged = Facts { damaged: true, ..away };
    let refusal = machine().handle_failover(now, &damaged, None, plan()).unwrap_err();
    assert_eq!(refusal.code, "no-recovery-point");
    assert!(refusal.sentence.contains("start the agent"), "{}", refusal.sentence);
    // The source can say: with it, what is missing is made good first.
    let back = Facts { connected: true, ..damaged };
    assert!(machine().handle_failover(now, &back, None, plan()).is_ok());
    // A point that was given up to a full journal still bounds what is lost.
    let actions = machine().handle_failover(now, &away, None, plan()).unwrap();
    let Action::Prepare(Goal::JournalEnd { loss_seconds }) = actions[2] else { panic!() };
    assert!(loss_seconds > 0.9, "{loss_seconds}");
}

/// A journal over its bound gives the newest point up, not the machine.
#[test]
fn a_consistent_machine_without_a_point_fails_over_to_the_end_of_its_journal() {
    let now = Instant::now();
    let mut machine = machine();
    let without = Facts { connected: false, point: None, ..facts() };
    let actions = machine.handle_failover(now, &without, None, plan()).unwrap();
    assert_eq!(actions[2], Action::Prepare(Goal::JournalEnd { loss_seconds: 3.0 }));
}

/// An operator whose command line was interrupted asks again. The worker then brought the disks to
/// the end of the journal a second time, after they had been called ready at an earlier one.
#[test]
fn asking_again_brings_the_disks_to_the_point_once() {
    let now = Instant::now();
    let away = Facts { connected: false, ..facts() };
    let mut machine = machine();
    machine.handle_failover(now, &away, None, plan()).unwrap();
    assert_eq!(machine.handle_failover(now, &away, None, plan()), Ok(Vec::new()));
    machine.handle_prepared(&away, Err("the disk failed".into()));
    let goal = Goal::JournalEnd { loss_seconds: 3.0 };
    let actions = machine.handle_failover(now, &away, None, plan()).unwrap();
    assert_eq!(actions, [Action::Persist, Action::Prepare(goal)], "what failed is tried anew");
}

/// A source that was left running sets a point every second, too. One of them came while the final
/// point was on its way to stable storage, the disks were held at it, and the final point was "gone
/// past" for every attempt.
#[test]
fn points_after_the_final_one_do_not_take_its_place() {
    let now = Instant::now();
    let mut machine = machine();
    let rehearsal = Plan { without_shutdown: true, ..plan() };
    machine.handle_failover(now, &facts(), None, rehearsal).unwrap();
    assert!(takes(&machine, 9) && machine.takes_batches());
    machine.handle_job_reply(&facts(), JobId(1_000_000), Ok(Some(point(9))));
    assert!(!takes(&machine, 10) && machine.takes_batches());
    machine.handle_durable(&Facts { durable: BatchSeq(9), ..facts() }, 1);
    assert!(!machine.takes_batches(), "what comes now must not move the disks");
}

/// The store was full when a shutdown was asked for, and had room again when the cancel was: the
/// shutdown went out after the cancel, and nobody waited for either.
#[test]
fn a_job_that_was_overtaken_is_not_wanted_any_more() {
    let now = Instant::now();
    let mut machine = machine();
    machine.handle_failover(now, &facts(), None, plan()).unwrap();
    let (shutdown, unfence) = (JobId(1_000_000), JobId(1_000_001));
    assert!(machine.wants(shutdown));
    machine.handle_cancel(&Facts { now_us: unfence.0, ..facts() }).unwrap();
    assert!(machine.wants(unfence) && !machine.wants(shutdown));
}

/// The disks of a failover that was cancelled take their time; what is said of them then counts for
/// nothing in the next one.
#[test]
fn a_failover_is_told_from_the_one_before_it() {
    let now = Instant::now();
    let away = Facts { connected: false, ..facts() };
    let mut machine = machine();
    machine.handle_failover(now, &away, None, Plan { requested_at_us: 7, ..plan() }).unwrap();
    assert_eq!(machine.preparing(), Some(7));
    machine.handle_cancel(&facts()).unwrap();
    assert_eq!(machine.preparing(), None);
    machine.handle_job_reply(&facts(), JobId(1_000_000), Ok(None));
    machine.handle_failover(now, &away, None, Plan { requested_at_us: 8, ..plan() }).unwrap();
    assert_eq!(machine.preparing(), Some(8));
}

/// The agent removed the machine, and was restarted before its answer had arrived.
#[test]
fn a_commit_ends_when_the_agent_says_that_it_is_done() {
    let now = Instant::now();
    let away = Facts { connected: false, ..facts() };
    let mut machine = machine();
    machine.handle_failover(now, &away, None, plan()).unwrap();
    machine.handle_prepared(&away, Ok(point(5)));
    assert!(machine.handle_ended(&facts()).is_empty(), "nobody asked for it");
    machine.handle_commit(&facts(), false).unwrap();
    machine.handle_ended(&facts());
    assert!(matches!(machine.stage(), Stage::Committed(_)));
}

#[derive(Debug, Clone)]
enum Step {
    Failover(bool),
    Cancel,
    Commit(bool),
    Reply(bool),
    Durable,
    Prepared(bool),
    Timeout,
    Connect(bool),
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        any::<bool>().prop_map(Step::Failover),
        Just(Step::Cancel),
        any::<bool>().prop_map(Step::Commit),
        any::<bool>().prop_map(Step::Reply),
        Just(Step::Durable),
        any::<bool>().prop_map(Step::Prepared),
        Just(Step::Timeout),
        any::<bool>().prop_map(Step::Connect),
        Just(Step::Restart),
    ]
}

proptest! {
    /// Whatever is asked in whatever order, with restarts anywhere: protection ends only after a
    /// failover that was committed, nothing is done before its stage is durable, and from every
    /// stage a person gets to `Committed` or back to `Replicating`.
    #[test]
    fn scripts_keep_the_order_and_never_get_stuck(steps in prop::collection::vec(step(), 1..40)) {
        let mut now = Instant::now();
        let mut facts = facts();
        let mut machine = machine();
        let mut durable_stage = Stage::Replicating;
        let mut was_failed_over = false;
        let mut job = None;
        let finish = [Step::Connect(true), Step::Restart, Step::Reply(true), Step::Timeout,
            Step::Prepared(true), Step::Cancel, Step::Reply(true)];
        for step in steps.into_iter().chain(finish) {
            facts.now_us += 1;
            now += Duration::from_secs(1);
            let actions = match step {
                Step::Failover(without_shutdown) => {
                    let plan = Plan { without_shutdown, ..plan() };
                    machine.handle_failover(now, &facts, None, plan).unwrap_or_default()
                }
                Step::Cancel => machine.handle_cancel(&facts).unwrap_or_default(),
                Step::Commit(without) => machine.handle_commit(&facts, without).unwrap_or_default(),
                Step::Reply(good) => match job {
                    Some(job) if good => machine.handle_job_reply(&facts, job, Ok(Some(point(9)))),
                    Some(job) => machine.handle_job_reply(&facts, job, Err("no".into())),
                    None => Vec::new(),
                },
                Step::Durable => {
                    facts.durable = BatchSeq(9);
                    machine.handle_durable(&facts, 1)
                }
                Step::Prepared(good) => {
                    let result = if good { Ok(point(9)) } else { Err("full".into()) };
                    machine.handle_prepared(&facts, result)
                }
                Step::Timeout => machine.handle_timeout(now + Duration::from_secs(3600), &facts),
                Step::Connect(connected) => {
                    facts.connected = connected;
                    machine.resume(now, connected, 1)
                }
                Step::Restart => {
                    machine = Failover::new("web01", durable_stage.clone(), String::new());
                    let mut actions = machine.resume_local();
                    actions.extend(machine.resume(now, facts.connected, 1));
                    actions
                }
            };
            let mut persisted = *machine.stage() == durable_stage;
            for action in actions {
                match action {
                    Action::Persist => {
                        durable_stage = machine.stage().clone();
                        persisted = true;
                    }
                    Action::SendJob(asked, kind) => {
                        prop_assert!(persisted);
                        prop_assert!(kind != JobKind::Remove || was_failed_over);
                        job = Some(asked);
                    }
                    Action::EndProtection => {
                        prop_assert!(persisted && was_failed_over);
                    }
                    Action::Prepare(_) | Action::Announce | Action::Resume { .. } => {
                        prop_assert!(persisted);
                    }
                }
            }
            prop_assert!(persisted, "{:?} is not durable", machine.stage());
            was_failed_over |= matches!(machine.stage(), Stage::FailedOver(_));
        }
        let settled = matches!(machine.stage(), Stage::Replicating | Stage::Committed(_));
        prop_assert!(settled, "stuck in {:?}", machine.stage());
    }
}
