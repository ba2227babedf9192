//! What the target asks of a machine: points, the steps of a failover, the end of protection.

use std::path::PathBuf;
use std::sync::Arc;

use backhaul_proto::message::{Code, Job, JobKind, JobReply, Refusal};

use crate::capture::{Fence, MachineCapture, now_us};
use crate::config::MachineConfig;
use crate::hook;
use crate::state::{MachineState, Protection};

/// What a job works on.
#[derive(Debug, Clone)]
pub struct JobContext {
    /// The machine.
    pub capture: Arc<MachineCapture>,
    /// Its configuration.
    pub config: MachineConfig,
    /// Where its state is kept.
    pub state_dir: PathBuf,
    /// Held while that is replaced, so that a job which was overtaken half-way does not have the
    /// last word.
    pub state_lock: Arc<tokio::sync::Mutex<()>>,
}

/// Does a job. Every kind can be done again: a fence that is up stays up, a hook that ran is run
/// again (hooks must bear that, as the documentation says), a new point is set after the first.
pub async fn execute(context: JobContext, job: Job) -> JobReply {
    let result = match job.kind() {
        JobKind::FinalPoint => set_point(&context),
        JobKind::Shutdown => shut_down(&context).await,
        JobKind::Unfence => protect(&context, Protection::Active, Fence::Down).await,
        JobKind::Remove => remove(&context).await,
        // A tag is done on the spot, and a resync replaces the generation, which is the owner
        // loop's; they never come here.
        JobKind::Tag | JobKind::Resync | JobKind::Unknown => Err(Refusal {
            code: Code::Protocol.into(),
            sentence: format!("the agent does not know job kind {}; update it", job.kind),
        }),
    };
    reply(job, result)
}

/// Sets a point that an operator asks for. It takes no time, and ends no job that does.
pub fn tag(context: &JobContext, job: Job) -> JobReply {
    reply(job, set_point(context))
}

fn reply(job: Job, result: JobResult) -> JobReply {
    let reply = JobReply { job: job.job, machine: job.machine, ..JobReply::default() };
    match result {
        Ok(Some((point, point_batch))) => JobReply { point, point_batch, ..reply },
        Ok(None) => reply,
        Err(refusal) => JobReply { failure: Some(refusal), ..reply },
    }
}

/// Refuses the machine's writes from now on: it was failed over without its shutdown.
pub async fn fence(context: JobContext) {
    if let Err(refusal) = protect(&context, Protection::Fenced, Fence::Up).await {
        tracing::error!(machine = %context.capture.name(), "{}", refusal.sentence);
    }
}

type JobResult = Result<Option<(u64, u64)>, Refusal>;

fn set_point(context: &JobContext) -> JobResult {
    let set = context.capture.with_order(|order| order.set_point(now_us()));
    let refusal = || Refusal {
        code: Code::Syncing.into(),
        sentence: format!(
            "machine {} is being synced, so there is no consistent state to tag yet; try again when the sync is over",
            context.capture.name()
        ),
    };
    set.map(|(point, batch)| Some((point.0, batch.0))).ok_or_else(refusal)
}

async fn shut_down(context: &JobContext) -> JobResult {
    let hook = &context.config.shutdown_hook;
    run_hook(context, "shutdown", hook).await?;
    protect(context, Protection::Fenced, Fence::Up).await?;
    // What the machine wrote while it went down may have overflowed the queue. Nothing writes any
    // more, so the sync that follows ends; the target's deadline bounds the wait.
    context.capture.ordered().await;
    set_point(context)
}

async fn remove(context: &JobContext) -> JobResult {
    run_hook(context, "removal", &context.config.removal_hook).await?;
    protect(context, Protection::Ended, Fence::Up).await
}

async fn run_hook(context: &JobContext, what: &str, hook: &[String]) -> Result<(), Refusal> {
    hook::run(what, hook, context.capture.name(), context.config.hook_timeout)
        .await
        .map_err(|sentence| Refusal { code: Code::Hook.into(), sentence })
}

/// Makes the stage durable, then acts on it, so that a restart in between acts on it too.
async fn protect(context: &JobContext, protection: Protection, fence: Fence) -> JobResult {
    let state = MachineState { protection };
    let (dir, name) = (context.state_dir.clone(), context.capture.name().clone());
    let lock = Arc::clone(&context.state_lock).lock_owned().await;
    let stored = tokio::task::spawn_blocking(move || {
        let _lock = lock;
        state.store(&dir, &name)
    });
    let stored = stored.await;
    let sentence = match stored {
        Ok(Ok(())) => {
            context.capture.set_fence(fence).await;
            return Ok(None);
        }
        Ok(Err(error)) => error.to_string(),
        Err(_) => "the agent is stopping".to_owned(),
    };
    Err(Refusal { code: Code::Storage.into(), sentence })
}
