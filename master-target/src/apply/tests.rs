use backhaul_proto::batch::{BatchKind, Compression, Record, RecordKind};
use backhaul_proto::id::{DiskIndex, PointId};
use proptest::prelude::*;

use super::{Content, Extent, plan};
use crate::batch_buffer::IncomingBatch;
use crate::batch_buffer::tests::{Write, plain, receive};

const DISK_BYTES: usize = 4096;

fn writes() -> impl Strategy<Value = Vec<Vec<Write>>> {
    let place = (0u16..2, 0u64..4000, 1usize..600);
    let write = (place, any::<u8>(), 0u8..6).prop_map(|((disk, offset_bytes, len), fill, what)| {
        let len = len.min(DISK_BYTES - offset_bytes as usize);
        let zero = RecordKind::Zero { offset_bytes, len_bytes: len as u32, may_unmap: what == 0 };
        match what {
            0 | 1 => Write::Other(Record { disk: DiskIndex(disk), kind: zero }),
            2 => Write::Other(Record {
                disk: DiskIndex(0),
                kind: RecordKind::Point(PointId(fill.into())),
            }),
            _ => Write::Data {
                disk,
                offset_bytes,
                content: (0..len).map(|i| fill.wrapping_add(i as u8)).collect(),
            },
        }
    });
    prop::collection::vec(prop::collection::vec(write, 1..12), 1..5)
}

fn received(batches: &[Vec<Write>]) -> Vec<IncomingBatch> {
    let make = |(i, w): (usize, &Vec<Write>)| {
        receive(plain(BatchKind::Ordered, 1, i as u64 + 1, 1, w), Compression::Off)
    };
    batches.iter().enumerate().map(make).collect()
}

/// The model: every record, one after the other.
fn in_order(batches: &[Vec<Write>], disks: &mut [Vec<u8>; 2]) {
    for write in batches.iter().flatten() {
        match write {
            Write::Data { disk, offset_bytes, content } => {
                let at = *offset_bytes as usize;
                disks[usize::from(*disk)][at..at + content.len()].copy_from_slice(content);
            }
            Write::Other(Record {
                disk,
                kind: RecordKind::Zero { offset_bytes, len_bytes, .. },
            }) => {
                let at = *offset_bytes as usize;
                disks[usize::from(disk.0)][at..at + *len_bytes as usize].fill(0);
            }
            Write::Other(_) => {}
        }
    }
}

proptest! {
    #[test]
    fn a_plan_is_disjoint_and_ends_where_the_order_ends(batches in writes()) {
        let mut expected = [vec![0xee; DISK_BYTES], vec![0xdd; DISK_BYTES]];
        let mut found = expected.clone();
        in_order(&batches, &mut expected);

        let received = received(&batches);
        let views: Vec<_> = received.iter().map(IncomingBatch::view).collect();
        let mut end = (DiskIndex(0), 0);
        for extent in plan(&views) {
            prop_assert!((extent.disk, extent.offset_bytes) >= end, "overlap");
            end = (extent.disk, extent.end_bytes());
            let disk = &mut found[usize::from(extent.disk.0)];
            let target = &mut disk[extent.offset_bytes as usize..extent.end_bytes() as usize];
            match extent.content {
                Content::Data { batch, range } => {
                    target.copy_from_slice(&views[batch].data[range]);
                }
                Content::Zero { .. } => target.fill(0),
            }
        }
        prop_assert_eq!(expected, found);
    }
}

#[test]
fn sequential_writes_of_a_batch_become_one() {
    let data = |i: u64| Write::Data { disk: 0, offset_bytes: i * 512, content: vec![1; 512] };
    let batches = received(&[(0..8).map(data).collect()]);
    let views: Vec<_> = batches.iter().map(IncomingBatch::view).collect();
    let content = Content::Data { batch: 0, range: 0..4096 };
    assert_eq!(plan(&views), [Extent { disk: DiskIndex(0), offset_bytes: 0, content }]);
}
