//! Folded batches over a link that loses connections, reorders and delays, between two ends of
//! which both restart, while the disks that they refer to change: in the end the image is the model.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::batch::{
    BatchHeader, BatchKind, Codec, Compression, Compressor, EncodedBatch, FoldedBody, HEADER_BYTES,
    PlainBatch, Record, RecordKind, Reference, check_body,
};
use crate::id::{BatchSeq, DiskIndex, Generation, MachineIndex, WriteSeq};
use crate::session::{Delivery, Receiver, ReceiverConfig, Rejected, Sender};

const BLOCK: usize = 4096;
const BLOCKS: usize = 64;
const DISKS: usize = 2;
/// Few contents, so that most of what is written is somewhere else too.
const CONTENTS: u64 = 12;

type Disks = Vec<Vec<u8>>;

/// A batch with its data, resolved.
struct Whole {
    header: BatchHeader,
    records: Vec<Record>,
    data: Vec<u8>,
}

enum ToAgent {
    Ack(BatchSeq),
    Resend(BatchSeq),
}

struct World {
    now: Instant,
    seed: u64,
    count: u64,
    generation: Generation,
    /// What the guest wrote.
    model: Disks,
    /// What the target holds, as far as it is applied.
    image: Disks,
    sender: Sender,
    receiver: Receiver<Whole>,
    next_batch: BatchSeq,
    /// Batches that this end believes the target to hold: contents and places of acknowledged ones.
    believed: BTreeMap<u64, (BatchSeq, usize, usize)>,
    to_target: BTreeMap<(Instant, u64), Vec<u8>>,
    to_agent: BTreeMap<(Instant, u64), ToAgent>,
    to_disk: BTreeMap<(Instant, u64), Whole>,
    folded: u64,
    resent: u64,
}

fn receiver(generation: Generation, durable: BatchSeq) -> Receiver<Whole> {
    let config = ReceiverConfig { window_bytes: 400_000, ..ReceiverConfig::default() };
    Receiver::new(config, generation, durable, WriteSeq(durable.0))
}

fn content(of: u64) -> Vec<u8> {
    let mut block = vec![0; BLOCK];
    blake3::Hasher::new().update(&of.to_le_bytes()).finalize_xof().fill(&mut block);
    block
}

impl World {
    fn new(seed: u64) -> Self {
        let disks = vec![vec![0; BLOCKS * BLOCK]; DISKS];
        Self {
            now: Instant::now(),
            seed: seed * 2 + 1,
            count: 0,
            generation: Generation(1),
            model: disks.clone(),
            image: disks,
            sender: Sender::new(Generation(1)),
            receiver: receiver(Generation(1), BatchSeq(0)),
            next_batch: BatchSeq(1),
            believed: BTreeMap::new(),
            to_target: BTreeMap::new(),
            to_agent: BTreeMap::new(),
            to_disk: BTreeMap::new(),
            folded: 0,
            resent: 0,
        }
    }

    fn random(&mut self, below: u64) -> u64 {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        self.seed % below
    }

    fn later(&mut self, from_ms: u64, spread_ms: u64) -> (Instant, u64) {
        self.count += 1;
        let delay = Duration::from_millis(from_ms + self.random(spread_ms));
        (self.now + delay, self.count)
    }

    /// The guest writes a run of blocks; what is believed of any of them becomes a reference, right
    /// or, since nothing here forgets what is overwritten, wrong.
    fn write(&mut self) {
        let disk = self.random(DISKS as u64) as usize;
        let blocks = 1 + self.random(6) as usize;
        let at = self.random((BLOCKS - blocks) as u64) as usize;
        let (batch, mut data, mut references) = (self.next_batch, Vec::new(), Vec::new());
        for index in 0..blocks {
            let of = self.random(CONTENTS);
            if let Some(&(since, disk, block)) = self.believed.get(&of)
                && since <= self.sender.acked()
            {
                references.push(Reference {
                    at_bytes: (index * BLOCK) as u32,
                    len_bytes: BLOCK as u32,
                    disk: DiskIndex(disk as u16),
                    offset_bytes: (block * BLOCK) as u64,
                });
            } else {
                self.believed.insert(of, (batch, disk, at + index));
            }
            data.extend(content(of));
        }
        self.model[disk][at * BLOCK..][..data.len()].copy_from_slice(&data);
        let kind =
            RecordKind::Data { offset_bytes: (at * BLOCK) as u64, len_bytes: data.len() as u32 };
        let level = [Compression::Off, Compression::Zstd(1)][self.random(2) as usize];
        self.folded += u64::from(!references.is_empty());
        let encoded = PlainBatch {
            kind: BatchKind::Ordered,
            generation: self.generation,
            batch,
            first_write: WriteSeq(batch.0),
            captured_at_us: 1,
            records: vec![Record { disk: DiskIndex(disk as u16), kind }],
            data_bytes: data.len(),
            data: vec![Bytes::from(data)],
        }
        .encode_folded(references, level, &mut Compressor::default());
        self.sender.push(encoded);
        self.next_batch = batch.next();
    }

    fn connect(&mut self) {
        let window = self.receiver.window_bytes();
        let (durable, received) = (self.receiver.durable(), self.receiver.received());
        self.sender.handle_connected(durable, received, window).unwrap();
        // Now and then the target is one that knows no references.
        if self.random(8) == 0 {
            let held = self.sender.held_bytes();
            assert_eq!(self.sender.unfold_all().unwrap(), (held, self.sender.held_bytes()));
        }
    }

    fn disconnect(&mut self) {
        self.to_target.clear();
        self.to_agent.clear();
        self.sender.handle_disconnected();
        self.receiver.handle_disconnected();
    }

    /// The target's process dies: what was not durable is gone, the image is as far as it was.
    fn restart_target(&mut self) {
        self.disconnect();
        self.to_disk.clear();
        self.receiver = receiver(self.generation, self.receiver.durable());
    }

    /// The agent's process dies: a new generation begins with a sync, which sends everything.
    fn restart_agent(&mut self) {
        self.disconnect();
        self.to_disk.clear();
        self.generation = Generation(self.generation.0 + 1);
        self.receiver = receiver(self.generation, BatchSeq(0));
        self.sender = Sender::new(self.generation);
        self.next_batch = BatchSeq(1);
        self.believed.clear();
        self.image.clone_from(&self.model);
    }

    fn send(&mut self, batch: &EncodedBatch) {
        let key = self.later(20, 30);
        self.to_target.insert(key, batch.chunks(MachineIndex(0)).concat());
    }

    fn receive(&mut self, wire: &[u8]) {
        let header = BatchHeader::decode(wire[..HEADER_BYTES].try_into().unwrap()).unwrap();
        let mut packed = wire[HEADER_BYTES..].to_vec();
        if header.codec == Codec::Zstd {
            packed = zstd::bulk::decompress(&packed, header.packed_bytes() as usize).unwrap();
        }
        let folded = FoldedBody::decode(&header, &packed).unwrap();
        let mut data = vec![0; header.data_bytes()];
        let image = &self.image;
        let read = |one: &Reference, into: &mut [u8]| {
            let source = &image[usize::from(one.disk.0)][one.offset_bytes as usize..];
            into.copy_from_slice(&source[..into.len()]);
            Ok::<_, ()>(())
        };
        folded.unfold(&mut data, read).unwrap();
        let delivery = Delivery {
            generation: header.generation,
            batch: header.batch,
            first_write: header.first_write,
            last_write: header.last_write(),
            wire_bytes: header.wire_bytes.into(),
        };
        let taken = match check_body(&header, folded.table, &data) {
            Ok(records) => {
                let batch = header.batch;
                let whole = Whole { header, records, data };
                self.receiver.handle_batch(delivery, whole).map(|()| batch)
            }
            Err(_) => {
                assert!(header.folded.is_some(), "nothing is damaged here");
                self.receiver.handle_unresolved(&delivery).map(|()| {
                    let key = self.later(20, 1);
                    self.to_agent.insert(key, ToAgent::Resend(header.batch));
                    header.batch
                })
            }
        };
        assert!(matches!(taken, Ok(_) | Err(Rejected::Duplicate(_))), "{taken:?}");
    }

    fn hear(&mut self, message: &ToAgent) {
        match message {
            ToAgent::Ack(durable) => {
                let window = self.receiver.window_bytes();
                self.sender.handle_ack(*durable, window).unwrap();
            }
            ToAgent::Resend(batch) => {
                let before = self.sender.held_bytes();
                let unfolded = self.sender.handle_resend(*batch).unwrap();
                let Some(unfolded) = unfolded else { return };
                let change = (unfolded.before_bytes, unfolded.after_bytes);
                assert_eq!(self.sender.held_bytes() + change.0, before + change.1);
                assert!(self.sender.handle_resend(*batch).unwrap().is_none(), "once is enough");
                self.resent += 1;
                self.send(&unfolded.batch);
            }
        }
    }

    fn step(&mut self) {
        self.now += Duration::from_millis(1);
        while let Some(batch) = self.sender.poll_transmit() {
            self.send(&batch);
        }
        let now = self.now;
        while let Some(entry) = self.to_target.first_entry().filter(|entry| entry.key().0 <= now) {
            let wire = entry.remove();
            self.receive(&wire);
        }
        while let Some((_, whole)) = self.receiver.poll_deliver().unwrap() {
            let key = self.later(3, 1);
            self.to_disk.insert(key, whole);
        }
        while let Some(entry) = self.to_disk.first_entry().filter(|entry| entry.key().0 <= now) {
            let Whole { header, records, data } = entry.remove();
            let RecordKind::Data { offset_bytes, .. } = records[0].kind else { unreachable!() };
            let disk = usize::from(records[0].disk.0);
            self.image[disk][offset_bytes as usize..][..data.len()].copy_from_slice(&data);
            self.receiver.handle_durable(now, header.batch);
        }
        if let Some(durable) = self.receiver.poll_ack(now) {
            let key = self.later(20, 1);
            self.to_agent.insert(key, ToAgent::Ack(durable));
        }
        while let Some(entry) = self.to_agent.first_entry().filter(|entry| entry.key().0 <= now) {
            let message = entry.remove();
            self.hear(&message);
        }
    }
}

#[test]
fn the_image_is_the_model_whatever_references_say_and_whoever_restarts() {
    let (mut folded, mut resent) = (0, 0);
    for seed in 0..100 {
        let mut world = World::new(seed);
        world.connect();
        let mut written = 0;
        for tick in 0..20_000 {
            if written < 300 && world.random(4) == 0 {
                world.write();
                written += 1;
            }
            match world.random(600) {
                0 => {
                    world.disconnect();
                    world.connect();
                }
                1 => {
                    world.restart_target();
                    world.connect();
                }
                2 if world.random(4) == 0 => {
                    world.restart_agent();
                    world.connect();
                }
                _ => {}
            }
            world.step();
            if written == 300 && world.sender.held_bytes() == 0 {
                break;
            }
            assert!(tick < 19_999, "seed {seed}: stalled at {:?}", world.sender.acked());
        }
        assert_eq!(world.sender.held_wire_bytes(), 0, "seed {seed}");
        assert!(world.image == world.model, "seed {seed}");
        folded += world.folded;
        resent += world.resent;
    }
    // Both ways were gone.
    assert!(folded > 1000 && resent > 100 && folded - resent > 1000, "{folded} {resent}");
}

#[test]
fn a_batch_is_asked_for_once_on_a_connection_and_only_ahead_of_what_was_delivered() {
    let mut receiver = receiver(Generation(1), BatchSeq(4));
    let delivery = |batch| Delivery {
        generation: Generation(1),
        batch: BatchSeq(batch),
        first_write: WriteSeq(batch),
        last_write: WriteSeq(batch),
        wire_bytes: 1,
    };
    assert_eq!(receiver.handle_unresolved(&delivery(6)), Ok(()));
    let again = Err(Rejected::Unresolved(BatchSeq(6)));
    assert_eq!(receiver.handle_unresolved(&delivery(6)), again);
    assert_eq!(receiver.handle_unresolved(&delivery(4)), Err(Rejected::Duplicate(BatchSeq(4))));
    assert!(receiver.handle_unresolved(&delivery(4 + 513)).is_err());
    receiver.handle_disconnected();
    assert_eq!(receiver.handle_unresolved(&delivery(6)), Ok(()));
}
