//! Exports that come and go, connections that end, exports that misbehave.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use backhaul_nbd::{Client, ClientError, Errno, Export, FileExport, ServerOptions, ZeroOptions};
use bytes::Bytes;
use tempfile::NamedTempFile;

use crate::common::{MIB, PATIENCE, Site};
use crate::memory::{Gated, Memory, Then};

#[tokio::test]
async fn exports_come_and_go_while_clients_are_connected() {
    let site = Site::new().await;
    let refused = |error| matches!(error, Some(ClientError::Refused { name, .. }) if name == "b");
    site.export("a", Arc::new(Memory::new(MIB)));
    assert!(refused(Client::unix(&site.socket(), "b").await.err()));
    site.export("b", Arc::new(Memory::new(2 * MIB)));
    let client = site.client("b").await;
    assert_eq!(client.size_bytes(), 2 * MIB);
    site.exports.remove("b");
    assert!(refused(Client::unix(&site.socket(), "b").await.err()));
    client.write(0, Bytes::from_static(b"kept"), false).await.unwrap();
    assert_eq!(client.read(0, 4).await.unwrap(), "kept");
    // Alone again, `a` is the default export.
    assert_eq!(site.client("").await.size_bytes(), MIB);
    let tcp = site.tcp_client("a").await;
    tcp.flush().await.unwrap();
    tcp.disconnect().await;
}

#[tokio::test]
async fn a_slow_request_is_overtaken() {
    let site = Site::new().await;
    let gated = Gated::new(Then::Answer);
    site.export("disk", Arc::clone(&gated));
    let client = site.client("disk").await;
    let slow = tokio::spawn({
        let client = client.clone();
        async move { client.read(0, 4).await }
    });
    gated.wait_for(1).await;
    client.flush().await.unwrap();
    assert!(!slow.is_finished());
    gated.gate.add_permits(1);
    assert_eq!(slow.await.unwrap().unwrap(), vec![7; 4]);
}

#[tokio::test]
async fn a_connection_has_no_more_requests_under_way_than_it_may() {
    let site = Site::with(ServerOptions { requests_max: 4, ..ServerOptions::default() }).await;
    let gated = Gated::new(Then::Answer);
    site.export("disk", Arc::clone(&gated));
    let client = site.client("disk").await;
    let mut reads = tokio::task::JoinSet::new();
    for _ in 0..20 {
        let client = client.clone();
        reads.spawn(async move { client.read(0, 512).await });
    }
    gated.wait_for(4).await;
    for _ in 0..16 {
        gated.gate.add_permits(1);
        gated.wait_for(1).await;
    }
    gated.gate.add_permits(4);
    assert!(reads.join_all().await.iter().all(Result::is_ok));
    assert_eq!(gated.under_way_peak.load(Ordering::SeqCst), 4);
}

#[tokio::test]
async fn stopping_finishes_what_is_under_way() {
    let site = Site::new().await;
    let gated = Gated::new(Then::Answer);
    site.export("disk", Arc::clone(&gated));
    let idle = site.client("disk").await;
    let client = site.client("disk").await;
    let write = tokio::spawn({
        let client = client.clone();
        async move { client.write(0, Bytes::from_static(&[1; 4096]), true).await }
    });
    gated.wait_for(1).await;
    site.server.stop();
    // The idle connection ends although the busy one cannot yet.
    idle.disconnect().await;
    assert!(!write.is_finished());
    gated.gate.add_permits(1);
    write.await.unwrap().unwrap();
    assert!(matches!(client.flush().await, Err(ClientError::Closed)));
    tokio::time::timeout(PATIENCE, site.server.stopped()).await.unwrap();
    assert!(!site.socket().exists());
    assert!(Client::unix(&site.socket(), "disk").await.is_err());
}

#[tokio::test]
async fn disconnecting_everybody_lets_them_come_back() {
    let site = Site::new().await;
    let gated = Gated::new(Then::Answer);
    site.export("disk", Arc::clone(&gated));
    let client = site.client("disk").await;
    let stuck = tokio::spawn({
        let client = client.clone();
        async move { client.read(0, 4).await }
    });
    gated.wait_for(1).await;
    site.server.disconnect_all();
    assert!(matches!(stuck.await.unwrap(), Err(ClientError::Closed)));
    site.client("disk").await.flush().await.unwrap();
    // The request that nobody waits for is still one that the end of the server waits for.
    let mut stopped = std::pin::pin!(site.server.stopped());
    tokio::select! {
        biased;
        () = &mut stopped => panic!("a request is still under way"),
        () = tokio::task::yield_now() => gated.gate.add_permits(1),
    }
    tokio::time::timeout(PATIENCE, stopped).await.unwrap();
}

#[tokio::test]
async fn a_panic_in_an_export_costs_one_request_or_one_connection() {
    let site = Site::new().await;
    let late = Gated::new(Then::Panic);
    late.gate.add_permits(1);
    site.export("late", Arc::clone(&late));
    // A permit would let the future be ready at once.
    late.gate.forget_permits(1);
    let client = site.client("late").await;
    let read = tokio::spawn({
        let client = client.clone();
        async move { client.read(0, 4).await }
    });
    late.wait_for(1).await;
    late.gate.add_permits(1);
    assert_eq!(read.await.unwrap().unwrap_err().errno(), Some(Errno::EIO));
    client.flush().await.unwrap();

    site.export("at once", Gated::new(Then::PanicAtOnce));
    let client = site.client("at once").await;
    assert!(matches!(client.read(0, 4).await, Err(ClientError::Closed)));
    site.client("late").await.flush().await.unwrap();
}

#[tokio::test]
async fn after_a_failed_sync_a_file_takes_no_writes() {
    // The kernel cannot sync this one, and says that it is full when written to.
    let export = FileExport::open(Path::new("/dev/full"), false).unwrap();
    let write = || export.write(0, Bytes::from_static(b"x"), false);
    assert_eq!(write().await, Err(Errno::ENOSPC));
    assert_eq!(export.flush().await, Err(Errno::EIO));
    assert_eq!(write().await, Err(Errno::EIO));
    assert_eq!(export.write_zeroes(0, 1, ZeroOptions::default()).await, Err(Errno::EIO));
    assert_eq!(export.flush().await, Err(Errno::EIO));
}

#[tokio::test]
async fn zeroes_are_written_where_the_file_system_cannot_make_them() {
    let shm = Path::new("/dev/shm");
    if !shm.exists() {
        println!("skipped: there is no tmpfs at /dev/shm");
        return;
    }
    // A tmpfs punches holes, but has no zeroed allocated ranges.
    let file = NamedTempFile::new_in(shm).unwrap();
    std::fs::write(file.path(), vec![1; 200_000]).unwrap();
    let export = FileExport::open(file.path(), false).unwrap();
    let zero = |no_hole, fast| ZeroOptions { fua: true, no_hole, fast };
    let fast = export.write_zeroes(0, 1000, zero(true, true)).await;
    assert!(matches!(fast, Ok(()) | Err(Errno::ENOTSUP)), "{fast:?}");
    export.write_zeroes(1000, 150_000, zero(true, false)).await.unwrap();
    export.write_zeroes(160_000, 10_000, zero(false, true)).await.unwrap();
    let content = std::fs::read(file.path()).unwrap();
    let zeroed = |at: usize| {
        fast.is_ok() && at < 1000
            || (1000..151_000).contains(&at)
            || (160_000..170_000).contains(&at)
    };
    assert!(content.iter().enumerate().all(|(at, byte)| *byte == u8::from(!zeroed(at))));
}
