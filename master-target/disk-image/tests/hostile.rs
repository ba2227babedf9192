//! Bytes that mean harm: no panic, no memory beyond the stated bounds, no endless loop.

#[path = "support/esxi.rs"]
mod esxi;
#[path = "../fuzz/attack.rs"]
#[allow(missing_docs, unreachable_pub, dead_code)]
mod harm;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering},
};

use backhaul_disk_image::{
    CreateOptions, Kind, OpenOptions, Silent, create, open,
    ops::{ConvertOptions, Leaks, apply_repair, convert, plan_repair},
};
use esxi::{Grain, cowd, sesparse};

/// Counts what is allocated, and the most there ever was.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is handed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::SeqCst) + layout.size();
        MOST.fetch_max(now, Ordering::SeqCst);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::SeqCst);
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What all tests of this file together may take: several run at once, each within the crate's
/// bounds, and the fixtures are small.
const MEMORY_MAX: usize = 400 << 20;

/// Opens and uses an image in every way, as the fuzz targets do; errors are fine.
fn use_it(bytes: Vec<u8>) {
    harm::image(bytes);
    assert!(MOST.load(Ordering::SeqCst) < MEMORY_MAX, "{} bytes", MOST.load(Ordering::SeqCst));
}

/// Plans a repair, applies it and opens what comes of it; errors are fine.
fn repair_it(bytes: &[u8]) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hostile.vmdk");
    std::fs::write(&path, bytes).unwrap();
    for _ in 0..3 {
        let Ok(plan) = plan_repair(&path, &OpenOptions::read_only(), Leaks::Keep, &mut Silent)
        else {
            return;
        };
        if plan.fixes.is_empty() {
            break;
        }
        let _ = apply_repair(&plan, &mut Silent);
    }
    let length = std::fs::metadata(&path).unwrap().len();
    assert!(length < 64 << 20, "the repair made a file of {length} bytes");
    use_it(std::fs::read(&path).unwrap());
}

/// Changes every byte of some ranges in several ways, and cuts the file at many places.
fn attack(good: &[u8], ranges: &[std::ops::Range<usize>]) {
    use_it(good.to_vec());
    for at in ranges.iter().cloned().flatten().filter(|at| *at < good.len()) {
        for change in [0xff, 0x80, 0x01] {
            let mut bytes = good.to_vec();
            bytes[at] ^= change;
            if change == 0xff && at % 3 == 0 {
                repair_it(&bytes);
            }
            use_it(bytes);
        }
    }
    for range in ranges {
        for at in range.clone().step_by(37).chain([range.end]).filter(|at| *at < good.len()) {
            use_it(good[..at].to_vec());
            repair_it(&good[..at]);
        }
    }
}

/// A small image of a kind, with a few grains, as bytes.
fn sample(kind: Kind) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source.vmdk");
    create(&source, &CreateOptions::new(Kind::MonolithicSparse, 1 << 20)).unwrap();
    let image = open(&source, &OpenOptions::writable()).unwrap();
    image.write_at(&[7; 3000], 100_000).unwrap();
    image.write_at(b"end", (1 << 20) - 3).unwrap();
    image.flush().unwrap();
    let target = dir.path().join("target.vmdk");
    convert(image.as_ref(), &target, &ConvertOptions::new(kind), &mut Silent).unwrap();
    std::fs::read(target).unwrap()
}

#[test]
fn sparse() {
    let good = sample(Kind::MonolithicSparse);
    // Header, the start of the descriptor, both directories, the starts of both tables.
    let tables = 21 * 512..21 * 512 + 600;
    attack(&good, &[0..80, 512..700, tables, 26 * 512..26 * 512 + 600]);
}

#[test]
fn stream() {
    let good = sample(Kind::StreamOptimized);
    let grain = 128 * 512..128 * 512 + 80;
    attack(&good, &[0..80, 512..600, grain, good.len() - 1536..good.len() - 900]);
    // The tables before the directory.
    let tables = good.len() - 1536 - 1024 - 2560..good.len() - 1536 - 1024 - 2400;
    attack(&good, std::slice::from_ref(&tables));
}

#[test]
fn vhd() {
    let good = sample(Kind::FixedVhd);
    let footer = good.len() - 512..good.len();
    attack(&good, std::slice::from_ref(&footer));
}

#[test]
fn snapshots() {
    let good = cowd(4096 * 3, 1, &[(1, vec![1; 512]), (5000, vec![2; 512])]);
    attack(&good, &[0..32, 2048..2100, 2560..2600]);
    let grains = [(0, Grain::Data(vec![1; 4096])), (1, Grain::Zero), (4097, Grain::Unmapped)];
    let good = sesparse(8 * 4096 * 2, &grains);
    attack(&good, &[0..210, 512..544, 2048..2100, 2560..2600]);
}

#[test]
fn descriptors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.vmdk");
    create(&path, &CreateOptions::new(Kind::TwoGbMaxExtentFlat, 1 << 20)).unwrap();
    let good = std::fs::read(&path).unwrap();
    for at in 0..good.len() {
        for change in [0xff, 0x80, 0x20, 0x01] {
            let mut bytes = good.clone();
            bytes[at] ^= change;
            std::fs::write(&path, &bytes).unwrap();
            if let Ok(image) = open(&path, &OpenOptions::writable()) {
                let size = image.size_bytes();
                let _ = image.write_at(&[1], size - 1);
                let _ = image.info();
            }
        }
        std::fs::write(&path, &good[..at]).unwrap();
        let _ = open(&path, &OpenOptions::read_only()).map(|image| image.info());
    }
}

#[test]
fn absurd_sizes_cost_nothing() {
    let mut good = sample(Kind::MonolithicSparse);
    for (at, value) in [
        (12, u64::MAX),
        (12, (62 << 40) / 512),
        (20, 1 << 40),
        (36, u64::MAX),
        (56, u64::MAX - 1),
        (48, u64::MAX),
    ] {
        let old: [u8; 8] = good[at..at + 8].try_into().unwrap();
        good[at..at + 8].copy_from_slice(&value.to_le_bytes());
        use_it(good.clone());
        good[at..at + 8].copy_from_slice(&old);
    }
}
