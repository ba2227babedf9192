//! The whole of an image: what it holds, and its repair.
#![allow(dead_code, missing_docs, unreachable_pub)]

use std::path::Path;

use backhaul_disk_image::{
    OpenOptions, Silent, open,
    ops::{Leaks, apply_repair, plan_repair},
};

/// Everything that a disk holds.
pub fn content(path: &Path) -> Vec<u8> {
    let opened = open(path, &OpenOptions::read_only()).unwrap();
    let mut found = vec![1; opened.size_bytes() as usize];
    opened.read_at(&mut found, 0).unwrap();
    found
}

/// Repairs as the command line does, until nothing is found; returns what it says is lost.
pub fn repair(path: &Path) -> u64 {
    repair_with(path, Leaks::Keep)
}

pub fn repair_with(path: &Path, leaks: Leaks) -> u64 {
    let mut lost = 0;
    for _ in 0..6 {
        let plan = plan_repair(path, &OpenOptions::read_only(), leaks, &mut Silent).unwrap();
        if plan.fixes.is_empty() {
            return lost;
        }
        lost += plan.lost_bytes;
        apply_repair(&plan, &mut Silent).unwrap();
    }
    panic!("{}: the repair never ends", path.display());
}
