//! What the owner steers by: markers, consistency, the limit of applying.

use backhaul_proto::batch::{BatchKind, Record, RecordKind};
use backhaul_proto::id::{BatchSeq, DiskIndex, PointId, WriteSeq};

use super::world::World;
use crate::batch_buffer::tests::Write;
use crate::journal::MarkKind;

fn marker(kind: RecordKind) -> Write {
    Write::Other(Record { disk: DiskIndex(0), kind })
}

fn data(fill: u8) -> Write {
    Write::Data { disk: 1, offset_bytes: 0, content: vec![fill; 4096] }
}

#[test]
fn markers_come_back_and_the_held_point_stays_exact() {
    let (mut world, mut store) = World::begun(5);
    let mut group = Vec::new();
    for writes in [
        vec![data(1), marker(RecordKind::Point(PointId(10)))],
        vec![data(2)],
        vec![data(3), data(4), marker(RecordKind::Point(PointId(20)))],
        vec![data(5)],
    ] {
        group.push(world.send_writes(BatchKind::Ordered, writes));
    }
    store.append(&mut group).unwrap();
    for _ in 0..3 {
        assert_eq!(store.apply(BatchSeq(3), u64::MAX).unwrap().through, BatchSeq(3));
    }
    store.checkpoint().unwrap();
    drop(store);
    world.disk.crash(1);
    let (mut store, recovered) = world.open().unwrap();
    assert_eq!((recovered.applied, recovered.durable), (BatchSeq(3), BatchSeq(4)));
    assert_eq!(recovered.applied_write, WriteSeq(6));
    assert_eq!(recovered.marks, [], "they are on the image");
    world.assert_images(&world.disks_at(BatchSeq(3)), "the point");
    let mut page = [0; 4096];
    store.read_image(DiskIndex(1), 0, &mut page).unwrap();
    assert_eq!(page, [4; 4096]);
    drop(store);

    let (mut world, mut store) = World::begun(5);
    let point = vec![data(1), marker(RecordKind::Point(PointId(10)))];
    store.append(&mut vec![world.send_writes(BatchKind::Ordered, point)]).unwrap();
    drop(store);
    let (_, recovered) = world.open().unwrap();
    let found: Vec<_> = recovered.marks.iter().map(|m| (m.batch, m.write, m.kind)).collect();
    assert_eq!(found, [(BatchSeq(1), WriteSeq(2), MarkKind::Point(PointId(10)))]);
}

#[test]
fn a_sync_makes_the_image_inconsistent_until_it_is_done() {
    let (mut world, mut store) = World::begun(6);
    let steps = [
        (BatchKind::Ordered, vec![marker(RecordKind::SyncStart)], false),
        (BatchKind::Sync, vec![data(1)], false),
        (BatchKind::Ordered, vec![data(2), marker(RecordKind::SyncDone)], true),
        (BatchKind::Ordered, vec![data(3)], true),
    ];
    for (i, (kind, writes, consistent)) in steps.into_iter().enumerate() {
        store.append(&mut vec![world.send_writes(kind, writes)]).unwrap();
        drop(store);
        let (reopened, recovered) = world.open().unwrap();
        store = reopened;
        if kind == BatchKind::Sync {
            assert_eq!(recovered.applied, BatchSeq(2), "a sync batch is on the image at once");
        }
        store.apply(recovered.durable, u64::MAX).unwrap();
        assert_eq!(store.is_consistent(), consistent, "after batch {}", i + 1);
        assert_eq!(store.usage().unapplied_batches, 0);
    }
    store.close().unwrap();
    assert!(world.open().unwrap().1.consistent);
}
