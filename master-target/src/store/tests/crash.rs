//! Power fails, or an operation does, at any operation of a random life of a store. Then it is
//! opened again and must hold everything acknowledged, exactly.

use backhaul_proto::batch::BatchKind;
use backhaul_proto::id::{BatchSeq, Generation};

use super::world::World;
use crate::store::{MachineStore, StoreError};

/// What happens at one operation of the disk.
#[derive(Debug, Clone, Copy)]
enum Trouble {
    None,
    PowerFails,
    Fails(i32),
}

/// Random work until it is done or fails. `Err` says that the store is of no use any more.
fn work(world: &mut World, store: &mut MachineStore, rounds: u64) -> Result<(), StoreError> {
    for _ in 0..rounds {
        match world.rng.below(16) {
            0..6 => {
                append(world, store, |_| BatchKind::Ordered)?;
            }
            6..8 => {
                append(world, store, |n| match n % 3 {
                    0 => BatchKind::Ordered,
                    _ => BatchKind::Sync,
                })?;
            }
            8..12 => {
                let behind = store.durable().durable.0 - store.applied().through.0;
                let limit = store.applied().through.0 + world.rng.below(behind + 1);
                let budget_bytes = 1 + world.rng.below(20_000);
                again_if_full(|| store.apply(BatchSeq(limit), budget_bytes))?;
                let applied = store.applied().through;
                assert!(applied.0 <= limit.max(applied.0));
                world.assert_images(&world.disks_at(applied), "after apply");
            }
            12 | 13 => {
                store.checkpoint()?;
            }
            14 => again_if_full(|| store.prepare())?,
            _ => {
                // Batches that were not made durable stay behind in the old generation.
                let before = store.durable().durable;
                let base = world.disks_at(before);
                again_if_full(|| store.begin_generation(Generation(world.generation + 1)))?;
                world.base = base;
                world.generation += 1;
                world.sent.clear();
                world.acknowledged = 0;
            }
        }
    }
    Ok(())
}

fn append(
    world: &mut World,
    store: &mut MachineStore,
    kind: impl Fn(u64) -> BatchKind,
) -> Result<(), StoreError> {
    let count = 1 + world.rng.below(4);
    let salt = world.rng.draw() % 1000;
    let mut group: Vec<_> = (0..count).map(|i| world.send(kind(salt + i))).collect();
    let result = again_if_full(|| store.append(&mut group));
    world.acknowledged = store.durable().durable.0;
    assert_eq!(world.acknowledged + group.len() as u64, world.sent.len() as u64);
    result?;
    assert!(group.is_empty());
    Ok(())
}

/// What the owner does when a disk is full: the same again later.
fn again_if_full<T>(mut call: impl FnMut() -> Result<T, StoreError>) -> Result<T, StoreError> {
    match call() {
        Err(StoreError::Full { .. }) => call(),
        other => other,
    }
}

/// Opens after a failure and checks everything that was promised.
///
/// Without a seed only the process died. What recovery then says is durable must survive the power
/// failing later, although it was found in a cache.
fn reopen_and_check(world: &mut World, crash_seed: Option<u64>, what: &str) -> MachineStore {
    match crash_seed {
        Some(seed) => world.disk.crash(seed),
        None => world.disk.restart(),
    }
    let (mut store, recovered) = world.open().unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_eq!(recovered.damage, None, "{what}");
    if recovered.generation == Some(Generation(world.generation + 1)) {
        world.base = world.disks_at(BatchSeq(world.acknowledged));
        world.generation += 1;
        world.sent.clear();
        world.acknowledged = 0;
    }
    if recovered.generation.is_none() && world.generation == 1 && world.acknowledged == 0 {
        store.begin_generation(Generation(1)).unwrap();
    } else {
        assert_eq!(recovered.generation, Some(Generation(world.generation)), "{what}");
    }
    let durable = recovered.durable;
    assert!(durable.0 >= world.acknowledged, "{what}: {durable} < {}", world.acknowledged);
    assert!(durable.0 <= world.sent.len() as u64, "{what}: more than was sent");
    assert!(recovered.applied <= durable, "{what}");

    // A sync batch that did not become durable may be on the image in part.
    let lost = world.sent.split_off(durable.0 as usize);
    let lost = lost.into_iter().filter(|sent| sent.kind == BatchKind::Sync);
    world.forget(lost.flat_map(|sent| sent.writes).collect());
    let expected = world.disks_at(durable);
    world.acknowledged = durable.0;
    store.apply(durable, u64::MAX).unwrap_or_else(|e| panic!("{what}: {e}"));
    world.assert_images(&expected, what);
    store
}

/// One life with trouble at `step`; returns the number of steps it took.
fn life(seed: u64, trouble: Trouble, step: u64) -> u64 {
    let what = format!("seed {seed}, {trouble:?} at step {step}");
    let mut world = World::new(seed);
    match trouble {
        Trouble::None => {}
        Trouble::PowerFails => world.disk.crash_at(step),
        Trouble::Fails(errno) => world.disk.fail_at(step, errno),
    }
    world.generation = 1;
    let result = world.open().and_then(|(mut store, _)| {
        again_if_full(|| store.begin_generation(Generation(1)))?;
        let result = work(&mut world, &mut store, 24);
        if result.is_err() {
            assert_latched(&mut world, &mut store);
        }
        result
    });
    let steps = world.disk.steps();
    assert!(result.is_ok() || !matches!(trouble, Trouble::None), "{what}: {result:?}");

    let crash_seed = seed.wrapping_mul(31) + step;
    let power_failed = !crash_seed.is_multiple_of(3);
    let mut store = reopen_and_check(&mut world, power_failed.then_some(crash_seed), &what);
    // Power fails during recovery too, and recovery finds the same again.
    drop(store);
    let inner = world.disk.steps() + 1 + world.rng.below(12);
    world.disk.crash_at(inner);
    drop(world.open());
    store = reopen_and_check(&mut world, Some(seed ^ step), &what);

    work(&mut world, &mut store, 12).unwrap_or_else(|e| panic!("{what}: {e}"));
    let durable = store.durable().durable;
    store.apply(durable, u64::MAX).unwrap();
    let expected = world.disks_at(durable);
    world.assert_images(&expected, &what);
    store.close().unwrap();
    steps
}

fn assert_latched(world: &mut World, store: &mut MachineStore) {
    let mut group = vec![world.send(BatchKind::Ordered)];
    world.sent.pop();
    assert!(matches!(store.append(&mut group), Err(StoreError::Latched { .. })));
    assert!(matches!(store.checkpoint(), Err(StoreError::Latched { .. })));
    assert!(matches!(store.apply(BatchSeq(u64::MAX), 1), Err(StoreError::Latched { .. })));
}

#[test]
fn a_quiet_life_is_exact() {
    for seed in 0..60 {
        life(seed, Trouble::None, 0);
    }
}

#[test]
fn power_fails_at_every_operation() {
    for seed in 1000..1002 {
        let steps = life(seed, Trouble::None, 0);
        for step in 1..=steps {
            life(seed, Trouble::PowerFails, step);
        }
    }
}

#[test]
fn power_fails_anywhere_in_many_lives() {
    for seed in 2000..2300 {
        life(seed, Trouble::PowerFails, 1 + seed.wrapping_mul(0x9e37_79b9) % 400);
    }
}

/// A segment that was freed by a new generation is overwritten by its next use. If its old name
/// came back after that, it would look like a damaged segment of the new generation.
#[test]
fn power_fails_while_a_freed_segment_is_reused() {
    for seed in 0..40 {
        for step in 1..12 {
            let what = format!("seed {seed}, power fails {step} steps into the reuse");
            let (mut world, mut store) = World::begun(seed);
            world.options.journal.free_segments_max = 2;
            drop(store);
            store = world.open().unwrap().0;
            append(&mut world, &mut store, |_| BatchKind::Ordered).unwrap();
            let base = world.disks_at(store.durable().durable);
            store.begin_generation(Generation(2)).unwrap();
            world.base = base;
            world.generation = 2;
            world.sent.clear();
            world.acknowledged = 0;
            world.disk.crash_at(world.disk.steps() + step);
            // Whether it fails depends on the step.
            let _ = append(&mut world, &mut store, |_| BatchKind::Ordered);
            drop(store);
            reopen_and_check(&mut world, Some(seed * 100 + step), &what);
        }
    }
}

#[test]
fn any_operation_fails() {
    for errno in [libc::EIO, libc::ENOSPC] {
        for seed in 3000..3001 {
            let steps = life(seed, Trouble::None, 0);
            for step in 1..=steps {
                life(seed, Trouble::Fails(errno), step);
            }
        }
    }
}
