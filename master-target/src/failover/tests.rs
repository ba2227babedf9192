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
        durable: BatchSeq(5),
        rpo: Some(Duration::from_secs(3)),
        now_us: 1_000_000,
    }
}

fn plan() -> Plan {
    Plan { without_shutdown: false, drain_timeout_seconds: 60.0, requested_at_us: 0, to: None }
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
    assert!(!machine.takes_points(), "the final point must not take the place of the chosen one");
    let actions = machine.handle_job_reply(&facts, job, Ok(Some(point(9))));
    let Action::Prepare(Goal::Point { point: chosen, drained, loss_seconds }) = actions[2] else {
        panic!("{actions:?}")
    };
    assert_eq!((chosen, drained), (point(5), false));
    assert!(loss_seconds > 0.9, "{loss_seconds}");
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
                    machine.resume(now, connected)
                }
                Step::Restart => {
                    machine = Failover::new("web01", durable_stage.clone(), String::new());
                    let mut actions = machine.resume_local();
                    actions.extend(machine.resume(now, facts.connected));
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
