//! Any sequence of operations on any writable kind, against a vector of bytes.

use std::path::Path;

use backhaul_disk_image::{
    CreateOptions, Deep, DiskImage, Kind, OpenOptions, RunState, Silent, create, open,
};
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Step {
    Write { at: usize, length: usize, byte: u8 },
    Zero { at: usize, length: usize },
    Trim { at: usize, length: usize },
    Flush,
    Reopen,
}

fn step(size: usize) -> impl Strategy<Value = Step> {
    let range = (0..size, prop_oneof![1..2000_usize, 1..300_000_usize]);
    let range = range.prop_map(move |(at, length)| (at, length.min(size - at)));
    prop_oneof![
        4 => (range.clone(), 1..=255_u8)
            .prop_map(|((at, length), byte)| Step::Write { at, length, byte }),
        2 => range.clone().prop_map(|(at, length)| Step::Zero { at, length }),
        1 => range.prop_map(|(at, length)| Step::Trim { at, length }),
        1 => Just(Step::Flush),
        1 => Just(Step::Reopen),
    ]
}

fn judge(image: &dyn DiskImage, model: &[u8]) {
    let mut found = vec![1; model.len()];
    image.read_at(&mut found, 0).unwrap();
    assert!(
        found == model,
        "first difference at {:?}",
        found.iter().zip(model).position(|(a, b)| a != b)
    );
    let mut next = 0;
    for run in image.extents(0, image.size_bytes()) {
        let run = run.unwrap();
        assert_eq!(run.offset, next);
        next += run.length;
        if run.state != RunState::Data {
            let range = run.offset as usize..(run.offset + run.length) as usize;
            assert!(model[range].iter().all(|byte| *byte == 0), "{run:?} is not zeros");
        }
    }
    assert_eq!(next, image.size_bytes());
}

fn play(path: &Path, model: &mut [u8], steps: &[Step]) {
    let reopen = || open(path, &OpenOptions::writable()).unwrap();
    let mut image = Some(reopen());
    for step in steps {
        let disk = image.as_deref().unwrap();
        match *step {
            Step::Write { at, length, byte } => {
                model[at..at + length].fill(byte);
                disk.write_at(&model[at..at + length], at as u64).unwrap();
            }
            Step::Zero { at, length } => {
                model[at..at + length].fill(0);
                disk.write_zeroes_at(at as u64, length as u64).unwrap();
            }
            Step::Trim { at, length } => {
                disk.trim(at as u64, length as u64).unwrap();
                let mut found = vec![0; length];
                disk.read_at(&mut found, at as u64).unwrap();
                for (old, new) in model[at..at + length].iter_mut().zip(found) {
                    assert!(new == *old || new == 0);
                    *old = new;
                }
            }
            Step::Flush => disk.flush().unwrap(),
            Step::Reopen => {
                judge(disk, model);
                drop(image.take());
                image = Some(reopen());
            }
        }
    }
    let disk = image.as_deref().unwrap();
    judge(disk, model);
    let report = disk.check(Deep::Yes, &mut Silent).unwrap();
    assert_eq!((report.losses, report.redundancies), (0, 0), "{:?}", report.findings);
}

const SIZE: usize = 1_300_000 / 512 * 512;

fn kind() -> impl Strategy<Value = Kind> {
    prop::sample::select(vec![
        Kind::MonolithicFlat,
        Kind::TwoGbMaxExtentFlat,
        Kind::Vmfs,
        Kind::MonolithicSparse,
        Kind::TwoGbMaxExtentSparse,
        Kind::FixedVhd,
    ])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_disk_is_a_vector_of_bytes(
        kind in kind(),
        zeroed_grains: bool,
        steps in prop::collection::vec(step(SIZE), 1..40),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.vmdk");
        create(&path, &CreateOptions { zeroed_grains, ..CreateOptions::new(kind, SIZE as u64) }).unwrap();
        play(&path, &mut vec![0; SIZE], &steps);
    }

    #[test]
    fn a_delta_and_its_parent_are_one_disk(
        zeroed_grains: bool,
        smaller in 0..700_usize,
        split: bool,
        below in prop::collection::vec(step(SIZE / 2), 1..10),
        above in prop::collection::vec(step(SIZE), 1..30),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (parent, child) = (dir.path().join("parent.vmdk"), dir.path().join("child.vmdk"));
        let parent_size = SIZE - smaller * 512;
        create(&parent, &CreateOptions::new(Kind::Vmfs, parent_size as u64)).unwrap();
        let mut model = vec![0; SIZE];
        play(&parent, &mut model[..parent_size], &below);
        let kind = if split { Kind::TwoGbMaxExtentSparse } else { Kind::MonolithicSparse };
        let options = CreateOptions {
            zeroed_grains,
            parent: Some(parent.clone()),
            ..CreateOptions::new(kind, SIZE as u64)
        };
        create(&child, &options).unwrap();
        play(&child, &mut model, &above);
    }
}
