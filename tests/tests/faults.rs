//! What fails underneath the daemons: disks that are full or unreadable, peers that send nonsense.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use backhaul_api::{Consistency, Machine};
use backhaul_lab::rig::MACHINE;
use backhaul_nbd::{
    BlockSize, Errno, Export, Exports, FileExport, IoFuture, Listener, Run, Server, ServerOptions,
    ZeroOptions,
};
use backhaul_tests::{STEP_TIME_MAX, Scenario, is_root};
use bytes::Bytes;

const DISK_BYTES: u64 = 64 << 20;

/// A small file system in memory, unmounted at the end.
struct SmallDisk<'a>(&'a Path);

impl<'a> SmallDisk<'a> {
    fn mount(at: &'a Path, mib: u32) -> Self {
        std::fs::create_dir_all(at).unwrap();
        let size = format!("size={mib}m");
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(at));
        Self(at)
    }

    fn grow(&self, mib: u32) {
        let size = format!("remount,size={mib}m");
        run(Command::new("mount").args(["-o", &size]).arg(self.0));
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        run(Command::new("umount").arg("-l").arg(self.0));
    }
}

fn run(command: &mut Command) {
    let status = command.status().unwrap();
    assert!(status.success(), "{command:?}: {status}");
}

fn noise(len: usize, seed: u32) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    (0..len).map(|_| next()).collect()
}

/// The target's disk fills up in the middle of a sync, then of replication. The sentence names the
/// file and what is missing; room given, everything goes on by itself and nothing is lost.
async fn room_runs_out(full: &str) {
    if !is_root() {
        return;
    }
    let mut scenario = Scenario::prepare(DISK_BYTES, |_| {}).unwrap();
    let place = scenario.folder.path().join(full);
    let small = SmallDisk::mount(&place, 24);
    let disk = std::fs::File::options().write(true).open(&scenario.protected).unwrap();
    disk.write_all_at(&noise(40 << 20, 5), 0).unwrap();
    scenario.start().unwrap();
    let guest = scenario.start_guest(51, 4 << 20).await.unwrap();
    let complains = |machine: &Machine| machine.trouble.contains("has no space for");
    let machine = scenario.rig.wait("a full disk", STEP_TIME_MAX, complains).await.unwrap();
    assert!(machine.trouble.contains(place.to_str().unwrap()), "{}", machine.trouble);
    small.grow(400);
    let done = scenario.wait_consistent().await.unwrap();
    assert_eq!(done.trouble, "", "what is over is not complained of");
    scenario.fail_over().await.unwrap();
    guest.await.unwrap().unwrap();
    scenario.compare().unwrap();
    drop(scenario);
    drop(small);
}

#[tokio::test(flavor = "multi_thread")]
async fn room_for_the_image_runs_out() {
    room_runs_out("images").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn room_for_the_journal_runs_out() {
    room_runs_out("store").await;
}

/// A disk with a sector that cannot be read while `bad` is set.
struct Failing {
    disk: FileExport,
    bad: Arc<AtomicBool>,
}

const BAD_OFFSET_BYTES: u64 = 20 << 20;

impl Export for Failing {
    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }
    fn description(&self) -> String {
        "a disk with a bad sector".into()
    }
    fn block_size(&self) -> BlockSize {
        self.disk.block_size()
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read(&self, offset_bytes: u64, len_bytes: u32) -> IoFuture<'_, Bytes> {
        let end = offset_bytes + u64::from(len_bytes);
        let hit = offset_bytes <= BAD_OFFSET_BYTES && BAD_OFFSET_BYTES < end;
        if hit && self.bad.load(Ordering::Relaxed) {
            return Box::pin(std::future::ready(Err(Errno::EIO)));
        }
        self.disk.read(offset_bytes, len_bytes)
    }
    fn write(&self, offset_bytes: u64, data: Bytes, fua: bool) -> IoFuture<'_, ()> {
        self.disk.write(offset_bytes, data, fua)
    }
    fn write_zeroes(&self, offset: u64, len: u32, options: ZeroOptions) -> IoFuture<'_, ()> {
        self.disk.write_zeroes(offset, len, options)
    }
    fn trim(&self, offset_bytes: u64, len_bytes: u32, fua: bool) -> IoFuture<'_, ()> {
        self.disk.trim(offset_bytes, len_bytes, fua)
    }
    fn flush(&self) -> IoFuture<'_, ()> {
        self.disk.flush()
    }
    fn runs(&self, offset_bytes: u64, len_bytes: u32) -> IoFuture<'_, Vec<Run>> {
        self.disk.runs(offset_bytes, len_bytes)
    }
}

/// `nbdfuse`, so that a disk of ours is a file to the agent. Unmounted at the end.
struct Fuse {
    child: Child,
    at: std::path::PathBuf,
}

impl Drop for Fuse {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.at).status();
        let _ = self.child.wait();
    }
}

/// The first sync meets a sector that the source cannot read: it is named, everything else is
/// sent, the machine is not called consistent; when it can be read again the sync ends.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_sector_that_cannot_be_read_is_named_and_tried_again() {
    if !is_root() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let under = folder.path().join("under.raw");
    std::fs::write(&under, noise(DISK_BYTES as usize, 9)).unwrap();
    let bad = Arc::new(AtomicBool::new(true));
    let disk = FileExport::open(&under, false).unwrap();
    let exports = Exports::default();
    exports.insert("bad", Arc::new(Failing { disk, bad: Arc::clone(&bad) }));
    let socket = folder.path().join("bad.sock");
    let listener = Listener::unix(&socket).unwrap();
    let _server = Server::start(vec![listener], exports, ServerOptions::default());
    let at = folder.path().join("fuse");
    std::fs::create_dir(&at).unwrap();
    let file = at.join("disk");
    let child = Command::new("nbdfuse")
        .arg(&file)
        .arg(format!("nbd+unix:///bad?socket={}", socket.display()))
        .spawn()
        .expect("nbdfuse is missing: install the Debian package libnbd-bin");
    let fuse = Fuse { child, at };
    let wait = "for i in $(seq 100); do test -s \"$0\" && exit 0; sleep 0.1; done; exit 1";
    run(Command::new("sh").args(["-c", wait]).arg(&file));

    let mut scenario =
        Scenario::prepare(DISK_BYTES, |spec| spec.disks = vec![file.clone()]).unwrap();
    scenario.start().unwrap();
    let complains = |machine: &Machine| machine.trouble.contains("cannot be read");
    let machine = scenario.rig.wait("the bad sector", STEP_TIME_MAX, complains).await.unwrap();
    assert!(machine.trouble.contains(file.to_str().unwrap()), "{}", machine.trouble);
    assert!(machine.points.is_empty(), "{machine:?}");
    bad.store(false, Ordering::Relaxed);
    let done = scenario.wait_consistent().await.unwrap();
    assert_eq!(done.trouble, "");
    scenario.fail_over().await.unwrap();
    backhaul_tests::compare(&under, &scenario.rig.image(0)).unwrap();
    drop(scenario);
    drop(fuse);
}

/// Two targets on one store would both write the disks.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_daemon_on_the_same_folder_is_refused_and_the_first_goes_on() {
    let mut scenario = Scenario::prepare(DISK_BYTES, |_| {}).unwrap();
    scenario.start().unwrap();
    scenario.wait_consistent().await.unwrap();
    for (program, configuration, folder) in [
        ("backhaul-master-target", "master-target.toml", "store"),
        ("backhaul-agent", "agent.toml", "agent"),
    ] {
        let output = Command::new(backhaul_tests::programs().join(program))
            .args(["run", "--config"])
            .arg(scenario.folder.path().join(configuration))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{program}");
        let sentence = format!("/{folder} is used by another process");
        assert!(said.contains(&sentence), "{program}: {said}");
    }
    scenario.rig.client().tag(MACHINE).await.unwrap();
    scenario.fail_over().await.unwrap();
    scenario.compare().unwrap();
}

/// The datastore is mounted after the daemons: the machine was refused once and never looked at
/// again, until the agent was restarted.
#[tokio::test(flavor = "multi_thread")]
async fn a_datastore_that_is_mounted_late_needs_no_restart() {
    let mut scenario = Scenario::prepare(DISK_BYTES, |_| {}).unwrap();
    let images = scenario.folder.path().join("images");
    std::fs::remove_dir(&images).unwrap();
    scenario.start().unwrap();
    let complains = |machine: &Machine| machine.trouble.contains("mount its datastore");
    let machine = scenario.rig.wait("the complaint", STEP_TIME_MAX, complains).await.unwrap();
    assert!(machine.trouble.contains(images.to_str().unwrap()), "{}", machine.trouble);
    std::fs::create_dir(&images).unwrap();
    let done = scenario.wait_consistent().await.unwrap();
    assert_eq!(done.trouble, "");
    scenario.fail_over().await.unwrap();
    scenario.compare().unwrap();
}

/// Each of two agents would see a part of the disk's writes.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_has_one_agent() {
    let mut scenario = Scenario::prepare(DISK_BYTES, |_| {}).unwrap();
    scenario.start().unwrap();
    scenario.wait_consistent().await.unwrap();
    let path = scenario.folder.path().join("agent.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let second = scenario.folder.path().join("second.toml");
    let text = text.replace("/agent\"", "/second\"").replace("nbd.sock", "second.sock");
    std::fs::write(&second, text).unwrap();
    let output = Command::new(backhaul_tests::programs().join("backhaul-agent"))
        .args(["run", "--config"])
        .arg(&second)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(said.contains("protected.raw is used by another agent"), "{said}");
}

/// A copy of the process server was started: both agents had the same identity, took the machine from
/// each other for ever, and no log said why.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_elsewhere_with_the_same_identity_is_told_until_the_first_is_gone() {
    let mut scenario = Scenario::prepare(DISK_BYTES, |_| {}).unwrap();
    let folder = scenario.folder.path().to_owned();
    // The two come from 127.0.0.1 and from ::1, as if from two hosts.
    let anywhere = |text: String| text.replace("\"127.0.0.1:", "\"[::]:");
    scenario.rig.edit_configuration("master-target", anywhere).unwrap();
    scenario.start().unwrap();
    scenario.wait_consistent().await.unwrap();
    let copy = folder.join("copy.raw");
    std::fs::copy(&scenario.protected, &copy).unwrap();
    let text = std::fs::read_to_string(folder.join("agent.toml")).unwrap();
    let text = text.replace("127.0.0.1:", "[::1]:").replace("/agent\"", "/rival\"");
    let text = text.replace("nbd.sock", "rival.sock").replace("protected.raw", "copy.raw");
    std::fs::write(folder.join("rival.toml"), text).unwrap();
    let log = folder.join("rival.log");
    let mut rival = Command::new(backhaul_tests::programs().join("backhaul-agent"))
        .args(["run", "--config"])
        .arg(folder.join("rival.toml"))
        .stderr(std::fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let told = "is replicated by another agent with the identity lab-agent";
    let reads = |_: &Machine| std::fs::read_to_string(&log).unwrap().contains(told);
    let first = scenario.rig.wait("the refusal", STEP_TIME_MAX, reads).await.unwrap();
    assert!(first.connected && first.consistency == Consistency::Consistent, "{first:?}");
    scenario.rig.kill_agent();
    scenario.rig.wait_log("master-target", "its agent can have it now").await.unwrap();
    rival.kill().unwrap();
    rival.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_shrinks_under_its_agent_is_named() {
    let mut scenario = Scenario::prepare(DISK_BYTES, |_| {}).unwrap();
    scenario.start().unwrap();
    scenario.wait_consistent().await.unwrap();
    let disk = std::fs::File::options().write(true).open(&scenario.protected).unwrap();
    disk.set_len(DISK_BYTES / 2).unwrap();
    let named = |machine: &Machine| {
        machine.trouble.contains("changed its size from 67108864 to 33554432 bytes")
    };
    scenario.rig.wait("the complaint", STEP_TIME_MAX, named).await.unwrap();
}

/// A service manager stops a target whose disk is full: it ends, and what was acknowledged is there
/// when it has room again.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_whose_disk_is_full_can_be_stopped() {
    if !is_root() {
        return;
    }
    let mut scenario = Scenario::prepare(DISK_BYTES, |_| {}).unwrap();
    let place = scenario.folder.path().join("images");
    let small = SmallDisk::mount(&place, 16);
    let disk = std::fs::File::options().write(true).open(&scenario.protected).unwrap();
    disk.write_all_at(&noise(40 << 20, 6), 0).unwrap();
    scenario.start().unwrap();
    let complains = |machine: &Machine| machine.trouble.contains("has no space for");
    scenario.rig.wait("a full disk", STEP_TIME_MAX, complains).await.unwrap();
    scenario.rig.stop();
    small.grow(400);
    scenario.start().unwrap();
    scenario.wait_consistent().await.unwrap();
    scenario.fail_over().await.unwrap();
    scenario.compare().unwrap();
    drop(scenario);
    drop(small);
}
