//! A machine, its agent and a model of its disks.

use std::path::{Path, PathBuf};

use backhaul_proto::batch::{BatchKind, Compression, Record, RecordKind};
use backhaul_proto::id::{BatchSeq, DiskIndex, Generation, PointId};

use crate::batch_buffer::IncomingBatch;
use crate::batch_buffer::tests::{Write, plain, receive};
use crate::journal::JournalOptions;
use crate::storage::sim::{SimDisk, SimRng};
use crate::store::{ImageFile, MachineStore, Recovered, StoreError, StoreOptions};

pub(super) const DISK_BYTES: usize = 24 << 10;
pub(super) const DIR: &str = "/machine";
const IMAGES: [&str; 2] = ["/disks/a", "/disks/b"];
/// Where the first disk starts in its file.
const BASE_BYTES: u64 = 1024;

/// A batch that was sent.
#[derive(Debug, Clone)]
pub(super) struct Sent {
    pub(super) kind: BatchKind,
    pub(super) writes: Vec<Write>,
    /// Where the disks are unknown after it.
    forgotten: Vec<Write>,
}

/// The disks; `None` where a sync batch that was never acknowledged may have written.
pub(super) type Disks = [Vec<Option<u8>>; 2];

/// The agent's side and the truth.
pub(super) struct World {
    pub(super) disk: SimDisk,
    pub(super) rng: SimRng,
    pub(super) generation: u64,
    /// The disks before the first batch of the generation.
    pub(super) base: Disks,
    /// Every batch of the generation, from 1.
    pub(super) sent: Vec<Sent>,
    pub(super) acknowledged: u64,
    pub(super) options: StoreOptions,
}

fn apply_to(disks: &mut Disks, writes: &[Write], value: impl Fn(u8) -> Option<u8>) {
    for write in writes {
        match write {
            Write::Data { disk, offset_bytes, content } => {
                for (i, byte) in content.iter().enumerate() {
                    disks[usize::from(*disk)][*offset_bytes as usize + i] = value(*byte);
                }
            }
            Write::Other(Record {
                disk,
                kind: RecordKind::Zero { offset_bytes, len_bytes, .. },
            }) => {
                let at = *offset_bytes as usize;
                disks[usize::from(disk.0)][at..at + *len_bytes as usize].fill(value(0));
            }
            Write::Other(_) => {}
        }
    }
}

impl World {
    pub(super) fn new(seed: u64) -> Self {
        let disk = SimDisk::new(seed);
        let mut rng = SimRng::new(seed ^ 0xb4c4);
        disk.write_file(IMAGES[0], &vec![0xaa; DISK_BYTES + BASE_BYTES as usize]);
        disk.write_file(IMAGES[1], &vec![0xaa; DISK_BYTES]);
        let options = StoreOptions {
            journal: JournalOptions {
                segment_bytes: 4096 * (8 + rng.below(12)),
                free_segments_max: rng.below(3) as usize,
            },
            cache_bytes_max: (rng.below(3) * (24 << 10)) as usize,
        };
        Self {
            disk,
            rng,
            generation: 0,
            base: [vec![Some(0xaa); DISK_BYTES], vec![Some(0xaa); DISK_BYTES]],
            sent: Vec::new(),
            acknowledged: 0,
            options,
        }
    }

    pub(super) fn open(&self) -> Result<(MachineStore, Recovered), StoreError> {
        let image = |(i, path): (usize, &&str)| ImageFile {
            path: PathBuf::from(path),
            base_offset_bytes: if i == 0 { BASE_BYTES } else { 0 },
            size_bytes: DISK_BYTES as u64,
        };
        MachineStore::open(
            Box::new(self.disk.storage()),
            Path::new(DIR),
            &"web01".parse().unwrap(),
            IMAGES.iter().enumerate().map(image).collect(),
            self.options.clone(),
        )
    }

    /// A new world with a store that has begun generation 1.
    pub(super) fn begun(seed: u64) -> (Self, MachineStore) {
        let mut world = Self::new(seed);
        let (mut store, recovered) = world.open().unwrap();
        assert_eq!(recovered.generation, None);
        world.generation = 1;
        store.begin_generation(Generation(1)).unwrap();
        (world, store)
    }

    pub(super) fn random_writes(&mut self, kind: BatchKind) -> Vec<Write> {
        let count = 1 + self.rng.below(4);
        (0..count)
            .map(|_| {
                let disk = self.rng.below(2) as u16;
                let unit = if self.rng.below(4) == 0 { 1 } else { 512 };
                let len = (unit * (1 + self.rng.below(9))) as usize;
                let room = (DISK_BYTES - len) as u64 / unit + 1;
                let offset_bytes = self.rng.below(room) * unit;
                let fill = self.rng.draw() as u8;
                match (self.rng.below(8), kind) {
                    (0, BatchKind::Ordered) => Write::Other(Record {
                        disk: DiskIndex(0),
                        kind: RecordKind::Point(PointId(self.rng.draw())),
                    }),
                    (1 | 2, _) => Write::Other(Record {
                        disk: DiskIndex(disk),
                        kind: RecordKind::Zero {
                            offset_bytes,
                            len_bytes: len as u32,
                            may_unmap: fill.is_multiple_of(2),
                        },
                    }),
                    _ => Write::Data {
                        disk,
                        offset_bytes,
                        content: (0..len).map(|i| fill.wrapping_add(i as u8)).collect(),
                    },
                }
            })
            .collect()
    }

    /// The next batch of the order, sent.
    pub(super) fn send(&mut self, kind: BatchKind) -> IncomingBatch {
        let writes = self.random_writes(kind);
        self.send_writes(kind, writes)
    }

    pub(super) fn send_writes(&mut self, kind: BatchKind, writes: Vec<Write>) -> IncomingBatch {
        let first_write = 1 + self.sent.iter().map(|s| s.writes.len() as u64).sum::<u64>();
        let batch = self.sent.len() as u64 + 1;
        let incoming =
            receive(plain(kind, self.generation, batch, first_write, &writes), Compression::Off);
        self.sent.push(Sent { kind, writes, forgotten: Vec::new() });
        incoming
    }

    /// The disks after the first `batches` of the generation.
    pub(super) fn disks_at(&self, batches: BatchSeq) -> Disks {
        let mut disks = self.base.clone();
        for sent in &self.sent[..batches.0 as usize] {
            apply_to(&mut disks, &sent.writes, Some);
            apply_to(&mut disks, &sent.forgotten, |_| None);
        }
        disks
    }

    /// After the last batch, nothing is known of the places of these writes.
    pub(super) fn forget(&mut self, writes: Vec<Write>) {
        match self.sent.last_mut() {
            Some(last) => last.forgotten.extend(writes),
            None => apply_to(&mut self.base, &writes, |_| None),
        }
    }

    /// The images must hold exactly the given state, and nothing outside the disks was touched.
    pub(super) fn assert_images(&self, expected: &Disks, what: &str) {
        for (i, path) in IMAGES.iter().enumerate() {
            let file = self.disk.read_file(path).unwrap();
            let (before, found) = file.split_at(if i == 0 { BASE_BYTES as usize } else { 0 });
            assert!(before.iter().all(|b| *b == 0xaa), "{what}: before the disk {path}");
            for (at, (found, expected)) in found.iter().zip(&expected[i]).enumerate() {
                if let Some(expected) = expected {
                    assert_eq!(found, expected, "{what}: disk {path} at byte {at}");
                }
            }
        }
    }
}
