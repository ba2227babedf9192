//! Bytes from clients that mean harm: no panic, no hang, no memory beyond the bounds.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use backhaul_nbd::protocol::*;
use backhaul_nbd::{Client, ServerOptions};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::common::{KIB, MIB, PATIENCE, Site};
use crate::memory::{Measured, Memory};
use crate::raw::{Message, Raw, info, meta, option_bytes, request_bytes};

const CASES: u32 = 300;

/// Runs `case` with inputs of `strategy` against a server with the export `disk`, which must serve
/// an honest client afterwards.
fn survives<S: Strategy>(strategy: S, case: impl AsyncFn(&Site, S::Value)) {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let site = runtime.block_on(Site::new());
    let mut disk = Memory::new(MIB);
    disk.turns = 3;
    site.export("disk", Arc::new(disk));
    let mut runner = TestRunner::new(Config { cases: CASES, ..Config::default() });
    let outcome = runner.run(&strategy, |input| {
        runtime.block_on(async {
            tokio::time::timeout(PATIENCE, case(&site, input)).await.expect("the server hangs");
        });
        Ok(())
    });
    outcome.unwrap();
    runtime.block_on(async {
        let client = site.client("disk").await;
        assert_eq!(client.read(0, 4096).await.unwrap().len(), 4096);
        tokio::time::timeout(PATIENCE, site.server.stopped()).await.expect("a request is stuck");
    });
}

/// Sends everything while it takes whatever comes, until the server hangs up.
async fn exchange(stream: UnixStream, bytes: Vec<u8>) -> Vec<u8> {
    let (mut reader, mut writer) = stream.into_split();
    let sending = async move {
        // The server may well close before it has read everything.
        let _ = writer.write_all(&bytes).await;
        let _ = writer.shutdown().await;
    };
    let receiving = async move {
        let mut received = Vec::new();
        let _ = reader.read_to_end(&mut received).await;
        received
    };
    tokio::join!(sending, receiving).1
}

#[test]
fn noise_instead_of_a_handshake() {
    survives(vec(any::<u8>(), 0..600), async |site, bytes| {
        exchange(UnixStream::connect(site.socket()).await.unwrap(), bytes).await;
    });
}

/// Options that are nearly right: right names, wrong lengths, wrong contents, cut short.
fn options() -> impl Strategy<Value = Vec<u8>> {
    let data = prop_oneof![
        vec(any::<u8>(), 0..40),
        Just(info("disk", &[INFO_NAME, INFO_BLOCK_SIZE])),
        Just(meta("disk", &[BASE_ALLOCATION])),
        (any::<u32>(), vec(any::<u8>(), 0..20)).prop_map(|(len, tail)| [
            &len.to_be_bytes()[..],
            &tail
        ]
        .concat()),
    ];
    let option = (0u32..12, data, prop_oneof![9 => Just(0u32), 1 => any::<u32>()]);
    let option = option.prop_map(|(option, data, lie)| {
        let mut bytes = option_bytes(option, &data);
        let len = (data.len() as u32).wrapping_add(lie);
        bytes[12..16].copy_from_slice(&len.to_be_bytes());
        bytes
    });
    (vec(option, 0..12), 0usize..20).prop_map(|(options, cut)| {
        let mut bytes = [&3u32.to_be_bytes()[..], &options.concat()].concat();
        bytes.truncate(bytes.len().saturating_sub(cut));
        bytes
    })
}

#[test]
fn options_that_lie() {
    survives(options(), async |site, bytes| {
        exchange(UnixStream::connect(site.socket()).await.unwrap(), bytes).await;
    });
}

#[derive(Debug, Clone)]
struct Wild {
    flags: u16,
    command: u16,
    offset: u64,
    len: u32,
    payload_cut: usize,
}

fn wild() -> impl Strategy<Value = Wild> {
    let flags = prop_oneof![4 => Just(0u16), 2 => 0u16..32, 1 => any::<u16>()];
    let command = prop_oneof![6 => 0u16..8, 1 => any::<u16>()];
    let offset = prop_oneof![4 => 0..MIB, 1 => MIB - 5..MIB + 5, 1 => any::<u64>()];
    let len = prop_oneof![4 => 0u32..200_000, 1 => any::<u32>()];
    let cut = prop_oneof![20 => Just(0usize), 1 => 1usize..200_000];
    (flags, command, offset, len, cut).prop_map(|(flags, command, offset, len, payload_cut)| Wild {
        flags,
        command,
        offset,
        len,
        payload_cut,
    })
}

#[test]
fn every_reply_to_wild_requests_is_well_formed_and_was_asked_for() {
    let strategy = (any::<bool>(), vec(wild(), 1..40), vec(any::<u8>(), 0..30));
    survives(strategy, async |site, (extended, requests, noise)| {
        let mut raw = Raw::chosen(&site.socket(), "disk", extended).await;
        let mut bytes = Vec::new();
        let mut whole = HashSet::new();
        let mut intact = true;
        for (cookie, request) in requests.iter().enumerate() {
            let Wild { flags, command, offset, len, payload_cut } = *request;
            bytes.extend(request_bytes(flags, command, cookie as u64, offset, len));
            raw.expect(command, cookie as u64, len);
            if command == CMD_WRITE {
                // Never gigabytes: such a payload just ends early.
                let sent = (len as usize).min(MIB as usize).saturating_sub(payload_cut);
                bytes.resize(bytes.len() + sent, 0x5a);
                intact &= sent == len as usize;
            }
            intact &= command != CMD_DISC;
            if intact {
                whole.insert(cookie as u64);
            }
            if !intact {
                break;
            }
        }
        bytes.extend(&noise);
        let received = {
            let (mut reader, mut writer) = raw.stream.split();
            let sending = async {
                let _ = writer.write_all(&bytes).await;
                let _ = writer.shutdown().await;
            };
            let mut received = Vec::new();
            let receiving = reader.read_to_end(&mut received);
            let _ = tokio::join!(sending, receiving);
            received
        };
        let answered = replies(&mut raw, received).await;
        let asked: HashSet<u64> = (0..requests.len() as u64).collect();
        assert!(answered.is_subset(&asked));
        // Noise after the requests may drop the connection before the last replies are out.
        if noise.is_empty() {
            assert!(answered.is_superset(&whole), "{whole:?} were asked, {answered:?} answered");
        }
    });
}

/// Takes `received` apart; gives back the cookies of finished replies, none of which comes twice.
async fn replies(raw: &mut Raw, received: Vec<u8>) -> HashSet<u64> {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    raw.stream = ours;
    let sending = async move {
        let _ = theirs.write_all(&received).await;
    };
    let receiving = async {
        let mut finished = HashSet::new();
        while let Ok(message) = raw.message().await {
            let done = match &message {
                Message::Simple { .. } => true,
                Message::Chunk { flags, .. } => flags & REPLY_FLAG_DONE != 0,
            };
            if done {
                assert!(finished.insert(message.cookie()), "answered twice: {message:?}");
            }
        }
        finished
    };
    tokio::join!(sending, receiving).1
}

#[tokio::test(flavor = "multi_thread")]
async fn pipelined_reads_hold_no_more_than_a_connection_may() {
    // Both kinds of reads: answered in place, and by a task.
    for waits in [false, true] {
        let options = ServerOptions { request_bytes_max: 8 << 20, ..ServerOptions::default() };
        let site = Site::with(options).await;
        let disk = Arc::new(Measured::new(waits));
        site.export("disk", Arc::clone(&disk));
        let mut raw = Raw::chosen(&site.socket(), "disk", false).await;
        for len in [256 * KIB, 3 * MIB, 32 * MIB] {
            disk.gauge.peak.store(0, Ordering::SeqCst);
            let count = 512 * MIB / len;
            let requests: Vec<u8> = (0..count)
                .flat_map(|cookie| request_bytes(0, CMD_READ, cookie, 0, len as u32))
                .collect();
            raw.send(&requests).await;
            for cookie in 0..count {
                raw.expect(CMD_READ, cookie, len as u32);
            }
            for _ in 0..count {
                raw.message().await.unwrap();
            }
            let peak = disk.gauge.peak.load(Ordering::SeqCst);
            assert!(peak <= (8 * MIB).max(len), "{peak} bytes for reads of {len}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_greedy_connections_share_one_budget_and_all_get_on() {
    let budget = 40 * MIB;
    let options = ServerOptions { memory_bytes_max: budget as usize, ..ServerOptions::default() };
    let site = Site::with(options).await;
    let disk = Arc::new(Measured::new(true));
    site.export("disk", Arc::clone(&disk));
    let connections = 12;
    let mut stalled = Vec::new();
    for _ in 0..2 {
        // These ask and never take the answers.
        let mut raw = Raw::chosen(&site.socket(), "disk", false).await;
        for cookie in 0..8 {
            raw.ask(0, CMD_READ, cookie, 0, 4 << 20).await;
        }
        stalled.push(raw);
    }
    let mut busy = tokio::task::JoinSet::new();
    for _ in 0..connections {
        let socket = site.socket();
        busy.spawn(async move {
            let client = Client::unix(&socket, "disk").await.unwrap();
            for _ in 0..100 {
                // Small enough to need no share of the budget, which the others may hold for ever.
                assert_eq!(client.read(0, 64 << 10).await.unwrap().len(), 64 << 10);
            }
        });
    }
    tokio::time::timeout(PATIENCE, busy.join_all()).await.expect("starved by stalled clients");
    drop(stalled);
    let mut busy = tokio::task::JoinSet::new();
    for _ in 0..connections {
        let socket = site.socket();
        busy.spawn(async move {
            let client = Client::unix(&socket, "disk").await.unwrap();
            let reads = (0..8).map(|_| client.read(0, 5 << 20));
            for read in reads {
                assert_eq!(read.await.unwrap().len(), 5 << 20);
            }
        });
    }
    tokio::time::timeout(PATIENCE, busy.join_all()).await.expect("large reads starve");
    let own = 256 * KIB * (connections + 2);
    let peak = disk.gauge.peak.load(Ordering::SeqCst);
    assert!(peak <= budget + own + 4096, "{} MiB", peak >> 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_payload_of_four_gigabytes_is_neither_kept_nor_read_to_its_end() {
    let site = Site::new().await;
    site.export("disk", Arc::new(Memory::new(MIB)));
    let mut raw = Raw::chosen(&site.socket(), "disk", false).await;
    raw.ask(0, CMD_WRITE, 1, 0, u32::MAX).await;
    assert_eq!(raw.errno(1).await, backhaul_nbd::Errno::EOVERFLOW.0);
    raw.send(&vec![0; 4 << 20]).await;
    drop(raw);
    tokio::time::timeout(PATIENCE, site.server.stopped()).await.unwrap();
}
