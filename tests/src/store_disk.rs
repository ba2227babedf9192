//! A disk for the target's store that stands still, or is slow, when a test says so.

use std::cell::OnceCell;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where the kernel is told how fast a block device may be written, of every process (cgroups v1).
const WRITE_RATES: &str = "/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device";

/// A file system of its own for the target's store, which can be made to stand still. It goes on, and is
/// unmounted, however the test ends: whoever waits for it cannot even be killed. It is in memory, so that
/// no real disk's load is measured.
pub struct StoreDisk {
    at: PathBuf,
    memory: PathBuf,
    /// The device that was slowed, as the kernel numbers it.
    slowed: OnceCell<String>,
}

impl StoreDisk {
    /// Mounts one of a gigabyte at `at`; `None`, with a word why, where the kernel has no loop devices.
    ///
    /// # Panics
    ///
    /// When it cannot be made: tests that use it need root.
    pub fn mount(at: &Path) -> Option<Self> {
        if !Path::new("/dev/loop-control").exists() {
            println!("skipped: this kernel has no loop devices");
            return None;
        }
        let disk = Self {
            at: at.to_owned(),
            memory: at.with_extension("memory"),
            slowed: OnceCell::new(),
        };
        std::fs::create_dir_all(&disk.memory).unwrap();
        std::fs::create_dir_all(at).unwrap();
        run(Command::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(&disk.memory));
        let file = disk.memory.join("ext4");
        std::fs::File::create(&file).unwrap().set_len(1 << 30).unwrap();
        run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&file));
        run(Command::new("mount").args(["-o", "loop"]).arg(&file).arg(at));
        Some(disk)
    }

    /// Nothing is written from now on; whoever writes waits.
    pub fn freeze(&self) {
        run(Command::new("fsfreeze").arg("-f").arg(&self.at));
    }

    /// It goes on.
    pub fn thaw(&self) {
        run(Command::new("fsfreeze").arg("-u").arg(&self.at));
    }

    /// It takes so many bytes a second from now on, to be said once; false, with a word why, where the kernel cannot do that.
    pub fn slow(&self, bytes_per_second: u64) -> bool {
        if !Path::new(WRITE_RATES).exists() {
            println!("skipped: this kernel has no {WRITE_RATES}");
            return false;
        }
        let mut findmnt = Command::new("findmnt");
        let found = findmnt.args(["-no", "MAJ:MIN"]).arg(&self.at).output().unwrap();
        let device = String::from_utf8(found.stdout).unwrap().trim().to_owned();
        std::fs::write(WRITE_RATES, format!("{device} {bytes_per_second}")).unwrap();
        self.slowed.set(device).unwrap();
        true
    }
}

impl Drop for StoreDisk {
    fn drop(&mut self) {
        // Refused where nothing is frozen.
        let _ = Command::new("fsfreeze").arg("-u").arg(&self.at).output();
        // The device's next user would be as slow.
        if let Some(device) = self.slowed.get() {
            let _ = std::fs::write(WRITE_RATES, format!("{device} 0"));
        }
        let unmounted = Command::new("umount").arg("-l").args([&self.at, &self.memory]).status();
        let is_unmounted = unmounted.is_ok_and(|status| status.success());
        assert!(is_unmounted || std::thread::panicking(), "{} is mounted", self.at.display());
    }
}

fn run(command: &mut Command) {
    let status = command.status().unwrap();
    assert!(status.success(), "{command:?}: {status}");
}
