//! A server with exports in a folder of its own, and running other people's programs against it.

use std::ffi::OsStr;
use std::fs::File;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use backhaul_nbd::{Client, Export, Exports, FileExport, Listener, Server, ServerOptions};
use tempfile::TempDir;
use tokio::process::Command;

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;

/// No test waits longer than this for anything.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A running server on a Unix socket and on a TCP port of the loopback.
pub struct Site {
    dir: TempDir,
    pub exports: Exports,
    pub server: Server,
    tcp: SocketAddr,
}

impl Site {
    pub async fn new() -> Self {
        Self::with(ServerOptions::default()).await
    }

    pub async fn with(options: ServerOptions) -> Self {
        let dir = TempDir::new().unwrap();
        let exports = Exports::default();
        let unix = Listener::unix(&dir.path().join("socket")).unwrap();
        let tcp = Listener::tcp(([127, 0, 0, 1], 0).into()).await.unwrap();
        let address = tcp.tcp_address().unwrap();
        let server = Server::start(vec![unix, tcp], exports.clone(), options);
        Self { dir, exports, server, tcp: address }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn socket(&self) -> PathBuf {
        self.path("socket")
    }

    /// Makes a sparse file and exports it under its name.
    pub fn file(&self, name: &str, size_bytes: u64) -> PathBuf {
        let path = self.path(name);
        File::create(&path).unwrap().set_len(size_bytes).unwrap();
        self.exports.insert(name, Arc::new(FileExport::open(&path, false).unwrap()));
        path
    }

    pub fn export(&self, name: &str, export: Arc<impl Export>) {
        self.exports.insert(name, export);
    }

    pub fn uri(&self, name: &str) -> String {
        uri(&self.socket(), name)
    }

    pub fn tcp_uri(&self, name: &str) -> String {
        format!("nbd://{}/{name}", self.tcp)
    }

    pub async fn client(&self, name: &str) -> Client {
        Client::unix(&self.socket(), name).await.unwrap()
    }

    pub async fn tcp_client(&self, name: &str) -> Client {
        Client::tcp(self.tcp, name).await.unwrap()
    }
}

pub fn uri(socket: &Path, name: &str) -> String {
    format!("nbd+unix:///{name}?socket={}", socket.display())
}

/// Runs `program` of the Debian package `package` to its end.
pub async fn run<A: AsRef<OsStr>>(package: &str, program: &str, args: &[A]) -> Output {
    let running = Command::new(program).args(args).stdin(Stdio::null()).kill_on_drop(true).output();
    match tokio::time::timeout(PATIENCE, running).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) if error.kind() == ErrorKind::NotFound => {
            panic!("this test needs `{program}`: apt-get install {package}")
        }
        Ok(Err(error)) => panic!("{program}: {error}"),
        Err(_) => panic!("{program} did not end within {PATIENCE:?}"),
    }
}

/// Like [`run`], but the program must succeed. Gives back what it printed.
pub async fn tool<A: AsRef<OsStr>>(package: &str, program: &str, args: &[A]) -> String {
    let output = run(package, program, args).await;
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program}: {}\n{printed}{errors}", output.status);
    printed
}

/// Bytes that depend on `seed` alone and do not compress.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random(seed);
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        out.extend_from_slice(&random.next().to_le_bytes());
    }
    out.truncate(len);
    out
}

/// A small generator (splitmix64), so that a failing seed can be run again.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}
