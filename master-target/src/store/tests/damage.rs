//! Bytes rot, files vanish, files are cut: what is used, what is refused, what is said.

use backhaul_proto::batch::{BatchKind, RecordKind};
use backhaul_proto::id::{BatchSeq, DiskIndex, Generation};

use super::world::{DIR, DISK_BYTES, World};
use crate::batch_buffer::tests::Write;
use crate::batch_buffer::tests::{plain, receive};
use crate::store::{MachineStore, StoreError};
use backhaul_proto::batch::{Compression, Record};

/// A store with `batches` durable batches of one 700-byte write each, one group each: every record
/// takes two pages, header and table in the first one.
fn filled(batches: u64, segment_pages: u64) -> World {
    let mut world = World::new(7);
    world.options.journal.segment_bytes = segment_pages * 4096;
    world.options.journal.free_segments_max = 0;
    world.generation = 1;
    let (mut store, _) = world.open().unwrap();
    store.begin_generation(Generation(1)).unwrap();
    for i in 0..batches {
        append_one(&mut world, &mut store, i);
    }
    world
}

fn append_one(world: &mut World, store: &mut MachineStore, i: u64) {
    let content = vec![i as u8 + 1; 700];
    let write = Write::Data { disk: 0, offset_bytes: i * 700, content };
    let batch = world.send_writes(BatchKind::Ordered, vec![write]);
    store.append(&mut vec![batch]).unwrap();
}

fn segments(world: &World) -> Vec<String> {
    let names = world.disk.files().into_iter().map(|p| p.display().to_string());
    names.filter(|name| name.starts_with(DIR) && name.ends_with(".segment")).collect()
}

fn change(world: &World, path: &str, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = world.disk.read_file(path).unwrap();
    change(&mut bytes);
    world.disk.write_file(path, &bytes);
}

/// A damaged journal: everything before is used, nothing after, and a new generation mends it.
fn assert_lost(world: &mut World, lost_from: u64, file: &str) {
    for _ in 0..2 {
        let (mut store, recovered) = world.open().unwrap();
        let damage = recovered.damage.unwrap();
        assert_eq!(damage.lost_from, BatchSeq(lost_from), "{}", damage.sentence);
        assert!(damage.sentence.contains(file), "{} / {file}", damage.sentence);
        assert_eq!(recovered.durable, BatchSeq(lost_from - 1));
        assert!(damage.known_image || !recovered.consistent);
        world.sent.truncate(lost_from as usize - 1);
        let next = world.send(BatchKind::Ordered);
        let error = store.append(&mut vec![next]).unwrap_err();
        if recovered.generation.is_some() {
            assert!(matches!(error, StoreError::Lost { .. }), "{error}");
        }
        world.sent.pop();
        // A checkpoint must not make it forget the loss.
        store.checkpoint().unwrap();
    }
    let (mut store, recovered) = world.open().unwrap();
    store.begin_generation(Generation(9)).unwrap();
    if recovered.damage.is_some_and(|d| d.known_image) {
        world.assert_images(&world.disks_at(recovered.durable), "before the damage");
    }
    assert!(
        world.disk.files().iter().any(|path| path.display().to_string().contains("/damaged-")),
        "{:?}",
        world.disk.files()
    );
    world.base = [vec![None; DISK_BYTES], vec![None; DISK_BYTES]];
    world.sent.clear();
    world.generation = 9;
    append_one(world, &mut store, 0);
    drop(store);
    let (_, recovered) = world.open().unwrap();
    assert_eq!(recovered.damage, None);
    assert_eq!(recovered.durable, BatchSeq(1));
}

/// Regions of the two pages of a record: frame, header, table, data; then what nothing covers.
const REGIONS: [(usize, usize); 4] = [(0, 64), (64, 192), (192, 208), (4096, 4796)];

#[test]
fn a_flipped_bit_in_the_tail_ends_the_journal_before_it() {
    for (start, end) in REGIONS {
        for at in [start, start + 9, end - 1] {
            let mut world = filled(3, 64);
            let segment = segments(&world).pop().unwrap();
            change(&world, &segment, |bytes| bytes[4096 + 2 * 8192 + at] ^= 0x10);
            let (mut store, recovered) = world.open().unwrap();
            assert_eq!(recovered.damage, None);
            assert_eq!(recovered.durable, BatchSeq(2), "byte {at}");
            if at >= 192 {
                let sentence = recovered.torn_tail.unwrap();
                assert!(
                    sentence.contains(&segment) && sentence.contains("byte 20480"),
                    "{sentence}"
                );
            }
            // The batch comes again.
            world.sent.truncate(2);
            append_one(&mut world, &mut store, 7);
            store.apply(BatchSeq(3), u64::MAX).unwrap();
            world.assert_images(&world.disks_at(BatchSeq(3)), "sent again");
            drop(store);
            assert_eq!(world.open().unwrap().1.durable, BatchSeq(3));
        }
    }
}

#[test]
fn a_flipped_bit_in_the_padding_is_harmless() {
    for at in [208, 4095, 4796, 8191] {
        let world = filled(3, 64);
        let segment = segments(&world).pop().unwrap();
        change(&world, &segment, |bytes| bytes[4096 + 2 * 8192 + at] ^= 0x10);
        assert_eq!(world.open().unwrap().1.durable, BatchSeq(3));
    }
}

#[test]
fn a_flipped_bit_in_the_middle_loses_what_follows() {
    for (start, end) in REGIONS {
        for at in [start, end - 1] {
            let mut world = filled(5, 64);
            let segment = segments(&world).pop().unwrap();
            change(&world, &segment, |bytes| bytes[4096 + 2 * 8192 + at] ^= 0x10);
            assert_lost(&mut world, 3, &segment);
        }
    }
}

#[test]
fn a_damaged_segment_header_loses_its_segment() {
    // Segments of two records each.
    for (victim, lost_from) in [(0, 1), (1, 3), (2, 5)] {
        for at in [0, 8, 30, 90, 127] {
            let mut world = filled(6, 5);
            let names = segments(&world);
            assert_eq!(names.len(), 3);
            change(&world, &names[victim], |bytes| bytes[at] ^= 1);
            assert_lost(&mut world, lost_from, DIR);
        }
    }
}

#[test]
fn a_missing_segment_in_the_middle_loses_what_follows() {
    let mut world = filled(6, 5);
    let names = segments(&world);
    world.disk.remove_file(&names[1]);
    assert_lost(&mut world, 3, &names[0]);
}

#[test]
fn the_segment_that_the_checkpoint_names_is_missing() {
    let mut world = filled(6, 5);
    let (mut store, _) = world.open().unwrap();
    store.apply(BatchSeq(3), u64::MAX).unwrap();
    store.checkpoint().unwrap();
    drop(store);
    let names = segments(&world);
    assert_eq!(names.len(), 2, "the first one was freed");
    world.disk.remove_file(&names[0]);
    assert_lost(&mut world, 4, &names[0]);
}

#[test]
fn one_checkpoint_slot_is_enough_and_none_is_not() {
    let checkpoint = format!("{DIR}/checkpoint");
    for slot in 0..2 {
        let world = filled(3, 64);
        let (mut store, _) = world.open().unwrap();
        store.apply(BatchSeq(2), u64::MAX).unwrap();
        store.checkpoint().unwrap();
        drop(store);
        change(&world, &checkpoint, |bytes| bytes[slot * 4096 + 40] ^= 1);
        let (mut store, recovered) = world.open().unwrap();
        assert_eq!((recovered.damage, recovered.durable), (None, BatchSeq(3)));
        store.apply(BatchSeq(3), u64::MAX).unwrap();
        world.assert_images(&world.disks_at(BatchSeq(3)), "from the older checkpoint");
    }
    let mut world = filled(3, 64);
    change(&world, &checkpoint, |bytes| bytes.iter_mut().for_each(|b| *b ^= 1));
    assert_lost(&mut world, 1, "checkpoint");
    let mut world = filled(3, 64);
    world.disk.remove_file(&checkpoint);
    assert_lost(&mut world, 1, "checkpoint");
}

/// A clean close notes what was durable, so even the very last record is missed.
#[test]
fn a_checkpoint_proves_the_last_record() {
    let mut world = filled(3, 64);
    let (mut store, _) = world.open().unwrap();
    store.apply(BatchSeq(1), u64::MAX).unwrap();
    store.checkpoint().unwrap();
    drop(store);
    let segment = segments(&world).pop().unwrap();
    change(&world, &segment, |bytes| bytes[4096 + 2 * 8192 + 5000] ^= 0x10);
    // That byte is padding; this one is data.
    change(&world, &segment, |bytes| bytes[4096 + 2 * 8192 + 4200] ^= 0x10);
    assert_lost(&mut world, 3, &segment);
}

#[test]
fn a_journal_cut_anywhere_keeps_its_whole_records() {
    let whole = filled(4, 64).disk;
    let segment = segments(&filled(4, 64)).pop().unwrap();
    let bytes = whole.read_file(&segment).unwrap();
    let end = 4096 + 4 * 8192;
    for cut in (4096..=end).step_by(512) {
        let world = filled(4, 64);
        change(&world, &segment, |bytes| bytes.truncate(cut));
        let (mut store, recovered) = world.open().unwrap();
        assert_eq!(recovered.damage, None, "cut at {cut}");
        assert_eq!(recovered.durable.0, (cut as u64 - 4096) / 8192, "cut at {cut}");
        store.apply(recovered.durable, u64::MAX).unwrap();
        world.assert_images(&world.disks_at(recovered.durable), "cut");
    }
    assert!(bytes.len() > end);
}

#[test]
fn a_batch_outside_its_disk_is_refused_whole() {
    let (world, mut store) = World::begun(1);
    let outside = |disk, offset_bytes, len_bytes| {
        Write::Other(Record {
            disk: DiskIndex(disk),
            kind: RecordKind::Zero { offset_bytes, len_bytes, may_unmap: false },
        })
    };
    for write in [outside(0, DISK_BYTES as u64 - 1, 2), outside(2, 0, 1)] {
        let batch = receive(plain(BatchKind::Ordered, 1, 1, 1, &[write]), Compression::Off);
        let mut group = vec![batch];
        let error = store.append(&mut group).unwrap_err();
        assert!(matches!(error, StoreError::Bounds { .. }), "{error}");
        assert_eq!(group.len(), 1);
    }
    let inside = outside(1, 0, DISK_BYTES as u32);
    let gap = receive(
        plain(BatchKind::Ordered, 1, 2, 1, std::slice::from_ref(&inside)),
        Compression::Off,
    );
    assert!(matches!(store.append(&mut vec![gap]), Err(StoreError::Order { .. })));
    let good = receive(plain(BatchKind::Ordered, 1, 1, 1, &[inside]), Compression::Off);
    assert_eq!(store.append(&mut vec![good]).unwrap().durable, BatchSeq(1));
    drop(world);
}

#[test]
fn a_full_disk_is_said_and_waited_for() {
    let (mut world, mut store) = World::begun(3);
    world.disk.set_capacity_bytes(1);
    let mut group = vec![world.send(BatchKind::Ordered)];
    let error = store.append(&mut group).unwrap_err();
    assert!(matches!(error, StoreError::Full { .. }), "{error}");
    assert!(error.to_string().contains(DIR), "{error}");
    assert_eq!(group.len(), 1);
    world.disk.set_capacity_bytes(u64::MAX);
    assert_eq!(store.append(&mut group).unwrap().durable, BatchSeq(1));
}
