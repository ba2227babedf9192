//! Running an operator's hook.

use std::process::Stdio;
use std::time::Duration;

use backhaul_proto::id::MachineName;
use tokio::io::AsyncReadExt;
use tokio::process::{ChildStderr, Command};

/// Of what a hook prints on standard error, this much is kept for the message.
const STDERR_BYTES_MAX: u64 = 1024;

/// How long what it said is waited for after its end.
const STDERR_TIME_MAX: Duration = Duration::from_millis(200);

/// Runs `hook` (program and arguments) for `machine`, whose name it finds in `BACKHAUL_MACHINE`.
/// An empty hook succeeds.
///
/// # Errors
///
/// A sentence that names the hook and says how it failed.
pub async fn run(
    what: &str,
    hook: &[String],
    machine: &MachineName,
    limit: Duration,
) -> Result<(), String> {
    let Some((program, arguments)) = hook.split_first() else { return Ok(()) };
    let started = Command::new(program)
        .args(arguments)
        .env("BACKHAUL_MACHINE", machine.as_str())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn();
    let mut child = started
        .map_err(|error| format!("the {what} hook `{program}` cannot be started: {error}"))?;
    let stderr = child.stderr.take();
    let finished = tokio::time::timeout(limit, async {
        let said = tokio::spawn(read_stderr(stderr));
        let status = child.wait().await;
        // A child that the hook left behind may keep its standard error open for ever.
        let said = tokio::time::timeout(STDERR_TIME_MAX, said).await;
        (status, said.ok().and_then(Result::ok).unwrap_or_default())
    })
    .await;
    match finished {
        Err(_) => {
            Err(format!("the {what} hook `{program}` ran longer than {limit:?} and was ended"))
        }
        Ok((Err(error), _)) => Err(format!("the {what} hook `{program}` was lost: {error}")),
        Ok((Ok(status), _)) if status.success() => Ok(()),
        Ok((Ok(status), said)) => {
            let said = String::from_utf8_lossy(&said);
            let said = said.trim();
            let colon = if said.is_empty() { "" } else { ": " };
            Err(format!("the {what} hook `{program}` failed ({status}){colon}{said}"))
        }
    }
}

/// The beginning of what a hook says; the rest is drained, so that it is not blocked.
async fn read_stderr(stderr: Option<ChildStderr>) -> Vec<u8> {
    let mut said = Vec::new();
    if let Some(mut stderr) = stderr {
        let _ = (&mut stderr).take(STDERR_BYTES_MAX).read_to_end(&mut said).await;
        tokio::spawn(async move { tokio::io::copy(&mut stderr, &mut tokio::io::sink()).await });
    }
    said
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::run;

    async fn shell(script: &str) -> Result<(), String> {
        let hook = ["sh", "-c", script].map(str::to_owned);
        run("shutdown", &hook, &"web01".parse().unwrap(), Duration::from_millis(500)).await
    }

    #[tokio::test]
    async fn success_failure_and_time_are_told_apart() {
        assert_eq!(shell("test $BACKHAUL_MACHINE = web01").await, Ok(()));
        let failed = shell("echo no such vm >&2; exit 3").await.unwrap_err();
        assert_eq!(failed, "the shutdown hook `sh` failed (exit status: 3): no such vm");
        assert!(shell("sleep 60").await.unwrap_err().contains("ran longer than"));
        let hook = ["/nonexistent/hook".to_owned()];
        let error = run("removal", &hook, &"web01".parse().unwrap(), Duration::from_secs(1)).await;
        assert!(error.unwrap_err().contains("cannot be started"));
    }
}
