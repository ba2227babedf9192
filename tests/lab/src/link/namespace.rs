//! The network namespaces that play the two sites, and their removal however the lab ends.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::site_link::LinkError;

/// One end of the link: a network namespace with an address on the line.
#[derive(Clone, Debug)]
pub struct Site {
    name: String,
    address: Ipv4Addr,
    namespace: Arc<File>,
}

impl Site {
    /// The namespace's name, as `ip netns` lists it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// This site's address on the line, as it was at the start.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// A command that runs inside this site. Its process id is the program's own.
    pub fn command_in(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        let namespace = Arc::clone(&self.namespace);
        // SAFETY: the closure makes one system call on a descriptor that it keeps open, and
        // neither allocates nor takes a lock, as is required between fork and exec.
        unsafe { command.pre_exec(move || enter(namespace.as_fd())) };
        command
    }

    /// Runs `work` on a thread inside this site. A socket made there stays there.
    ///
    /// # Errors
    /// When the thread may not enter the namespace.
    pub fn run_inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                enter(self.namespace.as_fd())?;
                Ok(work())
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

/// Two namespaces that vanish with this value, and with this process however it ends.
#[derive(Debug)]
pub(super) struct SitePair {
    pub(super) a: Site,
    pub(super) b: Site,
    guard: Child,
}

impl SitePair {
    /// Makes both, with `lo` up and IPv6 off (its neighbour discovery would be counted as
    /// traffic of the line).
    pub(super) fn create() -> Result<Self, LinkError> {
        remove_stale();
        let number = CREATED.fetch_add(1, Ordering::Relaxed);
        let names =
            ["a", "b"].map(|end| format!("{NAME_PREFIX}{}-{number}-{end}", std::process::id()));
        // The guard comes first: a failure half-way is cleaned up by it as well.
        let mut guard = start_guard(&names)?;
        let made = make_site(&names[0], ADDRESS_A)
            .and_then(|a| make_site(&names[1], ADDRESS_B).map(|b| (a, b)));
        match made {
            Ok((a, b)) => Ok(Self { a, b, guard }),
            Err(error) => {
                release(&mut guard);
                Err(error)
            }
        }
    }
}

impl Drop for SitePair {
    fn drop(&mut self) {
        release(&mut self.guard);
    }
}

/// Runs `ip` with these arguments.
pub(super) fn ip(arguments: &[&str]) -> Result<(), LinkError> {
    let command = || format!("ip {}", arguments.join(" "));
    let output = Command::new("ip")
        .args(arguments)
        .output()
        .map_err(|source| LinkError::Start { command: command(), source })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(LinkError::Command { command: command(), said })
}

fn make_site(name: &str, address: Ipv4Addr) -> Result<Site, LinkError> {
    ip(&["netns", "add", name])?;
    ip(&["-n", name, "link", "set", "lo", "up"])?;
    let path = Path::new(NAMESPACES).join(name);
    let namespace =
        File::open(&path).map_err(|source| LinkError::Open { path: path.clone(), source })?;
    let site = Site { name: name.to_owned(), address, namespace: Arc::new(namespace) };
    site.run_inside(|| {
        // A kernel without IPv6 has no such switch and needs none.
        let _ = std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1");
    })
    .map_err(|source| LinkError::Open { path, source })?;
    Ok(site)
}

/// A shell that removes the namespaces when its input ends: on drop, on a signal, and when this
/// process is killed, for which no code of ours could run. Its own process group keeps Ctrl-C
/// from ending it first.
fn start_guard(names: &[String; 2]) -> Result<Child, LinkError> {
    Command::new("sh")
        .args(["-c", GUARD_SCRIPT, "backhaul-lab-guard"])
        .args(names)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .map_err(|source| LinkError::Start { command: "sh".to_owned(), source })
}

fn release(guard: &mut Child) {
    drop(guard.stdin.take());
    // Nothing can be done about a failure; the next lab sweeps what is left.
    let _ = guard.wait();
}

/// Removes the namespaces of labs that no longer run, such as after a power cut of the guard.
fn remove_stale() {
    let Ok(entries) = std::fs::read_dir(NAMESPACES) else { return };
    for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        let pid = name.strip_prefix(NAME_PREFIX).and_then(|rest| rest.split('-').next());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            // Another lab may be sweeping the same one.
            let _ = ip(&["netns", "delete", &name]);
        }
    }
}

fn enter(namespace: BorrowedFd<'_>) -> io::Result<()> {
    Ok(move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network))?)
}

/// Pairs made by this process, for unique names.
static CREATED: AtomicU32 = AtomicU32::new(0);

const NAMESPACES: &str = "/run/netns";
const NAME_PREFIX: &str = "backhaul-lab-";
const GUARD_SCRIPT: &str =
    r#"trap '' INT TERM HUP; read -r _; for name; do ip netns delete "$name"; done"#;
/// Only ever inside namespaces of ours, so they cannot collide with the host's.
pub(super) const ADDRESS_A: Ipv4Addr = Ipv4Addr::new(10, 213, 0, 1);
pub(super) const ADDRESS_A_LATER: Ipv4Addr = Ipv4Addr::new(10, 213, 1, 1);
pub(super) const ADDRESS_B: Ipv4Addr = Ipv4Addr::new(10, 213, 0, 2);
