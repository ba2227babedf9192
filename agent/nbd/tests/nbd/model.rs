//! Random requests of many connections, against a plain array.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use backhaul_nbd::{Client, Errno, ZeroOptions};
use tokio::task::JoinSet;

use crate::common::{KIB, MIB, PATIENCE, Random, Site, noise};
use crate::memory::Memory;

/// What a worker owns of the disk: it is cut into slots, and requests that are under way together
/// go to different slots, so that the outcome is known.
pub const STRIPE_BYTES: u64 = 512 * KIB;
const SLOTS: u64 = 16;
const SLOT_BYTES: u64 = STRIPE_BYTES / SLOTS;

/// Works on one stripe from `base`; gives back what it must contain.
pub async fn work(client: Client, base: u64, seed: u64, rounds: usize, trims: bool) -> Vec<u8> {
    let mut random = Random(seed);
    let mut model = vec![0; STRIPE_BYTES as usize];
    for _ in 0..rounds {
        let mut requests = JoinSet::new();
        for slot in 0..SLOTS {
            let start = slot * SLOT_BYTES + random.below(SLOT_BYTES / 2);
            let len = 1 + random.below(SLOT_BYTES / 2);
            let range = start as usize..(start + len) as usize;
            let (at, len, fua) = (base + start, len as u32, random.below(8) == 0);
            let client = client.clone();
            match random.below(if trims { 7 } else { 6 }) {
                0..=2 => {
                    let data = noise(random.next(), len as usize);
                    model[range].copy_from_slice(&data);
                    requests
                        .spawn(async move { client.write(at, data.into(), fua).await.unwrap() });
                }
                3 => {
                    let no_hole = random.below(2) == 0;
                    model[range].fill(0);
                    let options = ZeroOptions { fua, no_hole, fast: false };
                    requests.spawn(async move {
                        client.write_zeroes(at, len, options).await.unwrap();
                    });
                }
                4 => {
                    let expected = model[range].to_vec();
                    requests.spawn(async move {
                        let data = client.read(at, len).await.unwrap();
                        assert!(data == expected, "read {len} at {at}");
                    });
                }
                5 => {
                    let expected = model[range].to_vec();
                    requests.spawn(async move { check_status(&client, at, &expected).await });
                }
                _ => {
                    model[range].fill(0);
                    requests.spawn(async move { client.trim(at, len, fua).await.unwrap() });
                }
            }
        }
        requests.join_all().await;
    }
    client.flush().await.unwrap();
    let data = client.read(base, STRIPE_BYTES as u32).await.unwrap();
    assert!(data == model, "the stripe at {base}, seed {seed}");
    model
}

/// What is said to be a hole must read as zeroes.
async fn check_status(client: &Client, at: u64, expected: &[u8]) {
    let runs = client.block_status(at, expected.len() as u32).await.unwrap();
    let mut rest = expected;
    for run in runs {
        let len = rest.len().min(run.len_bytes as usize);
        assert!(len > 0, "a run that is empty, or beyond the request");
        let (here, behind) = rest.split_at(len);
        assert!(!run.hole || here.iter().all(|byte| *byte == 0), "a hole with data");
        rest = behind;
    }
}

async fn many_connections(site: &Site, rounds: usize) -> Vec<u8> {
    let seed = 0x5eed;
    let mut workers = JoinSet::new();
    for worker in 0..8u64 {
        // Neighbours share a connection; half of them is on TCP.
        let client = match worker % 4 {
            0 | 1 => site.client("disk").await,
            _ => site.tcp_client("disk").await,
        };
        for half in 0..2 {
            let place = worker * 2 + half;
            let (client, base) = (client.clone(), place * STRIPE_BYTES);
            workers.spawn(
                async move { (place, work(client, base, seed + place, rounds, true).await) },
            );
        }
    }
    let done = tokio::time::timeout(PATIENCE, workers.join_all()).await;
    let mut stripes = done.expect("a request was never answered");
    stripes.sort_by_key(|(place, _)| *place);
    stripes.into_iter().flat_map(|(_, stripe)| stripe).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_in_memory_equals_the_model() {
    let site = Site::new().await;
    let mut disk = Memory::new(8 * MIB);
    disk.turns = 5;
    let disk = Arc::new(disk);
    site.export("disk", Arc::clone(&disk));
    let model = many_connections(&site, 40).await;
    assert!(*disk.data.lock().unwrap() == model);
    assert!(disk.fua.load(Ordering::SeqCst) > 0);
    assert_eq!(disk.flushes.load(Ordering::SeqCst), 16);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_equals_the_model() {
    let site = Site::new().await;
    let file = site.file("disk", 8 * MIB);
    let model = many_connections(&site, 15).await;
    assert!(std::fs::read(file).unwrap() == model);
}

#[tokio::test]
async fn the_client_tells_what_the_server_said() {
    let site = Site::new().await;
    site.export("disk", Arc::new(Memory::new(MIB)));
    let client = site.client("disk").await;
    assert!(!client.read_only());
    let error = client.read(MIB, 512).await.unwrap_err();
    assert_eq!(error.errno(), Some(Errno::EINVAL));
    assert!(error.to_string().contains("beyond the end"), "{error}");
    let fast = ZeroOptions { fast: true, ..ZeroOptions::default() };
    let error = client.write_zeroes(0, 512, fast).await.unwrap_err();
    assert_eq!(error.errno(), Some(Errno::ENOTSUP));
    let long = vec![0; (32 << 20) + 1].into();
    assert!(client.write(0, long, false).await.unwrap_err().to_string().contains("32 MiB"));
    client.disconnect().await;
}
