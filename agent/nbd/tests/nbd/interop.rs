//! Our client against somebody else's server.

use std::fs::File;
use std::path::Path;

use backhaul_nbd::{Client, ClientError, Errno};
use bytes::Bytes;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::common::{MIB, PATIENCE, tool, uri};
use crate::model::{STRIPE_BYTES, work};

/// `qemu-nbd` with export `disk`, until dropped.
struct QemuNbd {
    dir: TempDir,
}

impl QemuNbd {
    async fn new(size_bytes: u64, more: &[&str]) -> Self {
        let dir = TempDir::new().unwrap();
        let path = |name| dir.path().join(name).display().to_string();
        File::create(dir.path().join("disk")).unwrap().set_len(size_bytes).unwrap();
        let (socket, pid, disk) = (path("socket"), path("pid"), path("disk"));
        let mut args = vec!["--fork", "--persistent", "--shared=8", "--format=raw", "-x", "disk"];
        args.extend(["--discard=unmap", "-k", &socket, "--pid-file", &pid]);
        args.extend(more);
        args.push(&disk);
        // It returns once it listens.
        tool("qemu-utils", "qemu-nbd", &args).await;
        Self { dir }
    }

    async fn client(&self) -> Client {
        Client::unix(&self.dir.path().join("socket"), "disk").await.unwrap()
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }
}

impl Drop for QemuNbd {
    fn drop(&mut self) {
        let pid = std::fs::read_to_string(self.path("pid")).unwrap_or_default();
        if let Some(pid) = pid.trim().parse().ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::TERM);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_nbd_keeps_what_our_client_writes() {
    let qemu = QemuNbd::new(8 * STRIPE_BYTES, &[]).await;
    let mut workers = tokio::task::JoinSet::new();
    for place in 0..8u64 {
        let client = qemu.client().await;
        // Without trims: what qemu-nbd makes of those is its own affair.
        workers.spawn(async move {
            (place, work(client, place * STRIPE_BYTES, place, 10, false).await)
        });
    }
    let done = tokio::time::timeout(PATIENCE, workers.join_all()).await;
    let mut stripes = done.expect("qemu-nbd never answered");
    stripes.sort_by_key(|(place, _)| *place);
    let model = stripes.into_iter().flat_map(|(_, stripe)| stripe).collect::<Vec<_>>();
    std::fs::write(qemu.path("model"), model).unwrap();
    compare(&qemu.path("model"), &uri(&qemu.path("socket"), "disk")).await;
}

async fn compare(file: &Path, uri: &str) {
    let file = file.display().to_string();
    tool("qemu-utils", "qemu-img", &["compare", "-f", "raw", "-F", "raw", &file, uri]).await;
}

#[tokio::test]
async fn qemu_nbd_tells_holes_and_errors() {
    let qemu = QemuNbd::new(4 * MIB, &[]).await;
    let client = qemu.client().await;
    assert_eq!(client.size_bytes(), 4 * MIB);
    client.write(MIB, Bytes::from(vec![1; MIB as usize]), true).await.unwrap();
    let runs = client.block_status(0, 4 << 20).await.unwrap();
    let runs: Vec<_> = runs.iter().map(|run| (run.len_bytes, run.hole)).collect();
    assert_eq!(runs, [(MIB, true), (MIB, false), (2 * MIB, true)]);
    // qemu-nbd answers this with hole chunks.
    let data = client.read(0, 4 << 20).await.unwrap();
    assert!(data.iter().enumerate().all(|(at, byte)| *byte == u8::from(at >> 20 == 1)));
    client.trim(MIB, 1 << 20, true).await.unwrap();
    assert_eq!(client.read(4 * MIB, 512).await.unwrap_err().errno(), Some(Errno::EINVAL));
    client.flush().await.unwrap();
    let absent = Client::unix(&qemu.path("socket"), "absent").await;
    assert!(matches!(absent, Err(ClientError::Refused { .. })));
    client.disconnect().await;
}

#[tokio::test]
async fn a_read_only_qemu_nbd_refuses_writes() {
    let qemu = QemuNbd::new(MIB, &["--read-only"]).await;
    let client = qemu.client().await;
    assert!(client.read_only());
    let error = client.write(0, Bytes::from_static(&[1; 512]), false).await.unwrap_err();
    // proto.md asks for EPERM; qemu-nbd 10 says EINVAL, and why.
    assert!(matches!(error.errno(), Some(Errno::EPERM | Errno::EINVAL)), "{error}");
    assert!(error.to_string().contains("read-only"), "{error}");
}
