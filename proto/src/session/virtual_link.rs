//! Two real endpoints over a link that loses connections, reorders and delays; nothing sleeps.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::batch::{
    BatchKind, Compression, Compressor, EncodedBatch, PlainBatch, Record, RecordKind,
};
use crate::id::{BatchSeq, DiskIndex, Generation, WriteSeq};
use crate::limits::LIGHT_BYTES_MAX;
use crate::session::{AckError, Delivery, Receiver, ReceiverConfig, Rejected, Sender, Weight};

fn batch(seq: u64) -> EncodedBatch {
    let mut compressor = Compressor::default();
    let data = Bytes::from(vec![seq as u8; 512 + (seq % 7) as usize * 512]);
    PlainBatch {
        kind: BatchKind::Ordered,
        generation: Generation(1),
        batch: BatchSeq(seq),
        first_write: WriteSeq(seq),
        captured_at_us: seq,
        records: vec![Record {
            disk: DiskIndex(0),
            kind: RecordKind::Data { offset_bytes: seq * 512, len_bytes: data.len() as u32 },
        }],
        data_bytes: data.len(),
        data: vec![data],
    }
    .encode(Compression::Off, &mut compressor)
}

fn delivery(batch: &EncodedBatch) -> Delivery {
    Delivery {
        generation: batch.header.generation,
        batch: batch.header.batch,
        first_write: batch.header.first_write,
        last_write: batch.header.last_write(),
        wire_bytes: batch.wire_bytes() as u64,
    }
}

/// What travels, and when it arrives. A key's second half keeps equal times apart.
struct World {
    now: Instant,
    seed: u64,
    count: u64,
    sender: Sender,
    receiver: Receiver<BatchSeq>,
    /// The last batch that was sent on this connection, or that the target had in hand before it.
    sent: BatchSeq,
    to_target: BTreeMap<(Instant, u64), EncodedBatch>,
    to_agent: BTreeMap<(Instant, u64), BatchSeq>,
    to_disk: BTreeMap<(Instant, u64), BatchSeq>,
    journal: Vec<BatchSeq>,
}

impl World {
    fn new(seed: u64) -> Self {
        let config = ReceiverConfig { window_bytes: 20_000, ..ReceiverConfig::default() };
        Self {
            now: Instant::now(),
            seed: seed * 2 + 1,
            count: 0,
            sender: Sender::new(Generation(1)),
            receiver: Receiver::new(config, Generation(1), BatchSeq(0), WriteSeq(0)),
            sent: BatchSeq(0),
            to_target: BTreeMap::new(),
            to_agent: BTreeMap::new(),
            to_disk: BTreeMap::new(),
            journal: Vec::new(),
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

    fn connect(&mut self) {
        let window = self.receiver.window_bytes();
        let (durable, received) = (self.receiver.durable(), self.receiver.received());
        self.sender.handle_connected(durable, received, window).unwrap();
        self.sent = received;
    }

    fn disconnect(&mut self) {
        self.to_target.clear();
        self.to_agent.clear();
        self.sender.handle_disconnected();
        self.receiver.handle_disconnected();
    }

    /// The target's process dies: what was not durable is gone.
    fn restart_target(&mut self) {
        self.disconnect();
        self.to_disk.clear();
        let durable = self.receiver.durable();
        self.journal.truncate(durable.0 as usize);
        let config = ReceiverConfig { window_bytes: 20_000, ..ReceiverConfig::default() };
        self.receiver = Receiver::new(config, Generation(1), durable, WriteSeq(durable.0));
    }

    fn step(&mut self) {
        self.now += Duration::from_millis(1);
        while let Some(batch) = self.sender.poll_transmit() {
            // What the target has, acknowledged or in hand, is never sent again.
            let seq = batch.header.batch;
            let known = self.sender.acked().max(self.sent);
            assert!(seq > known, "batch {seq} was sent though the target had {known}");
            self.sent = seq;
            let key = self.later(20, 30);
            self.to_target.insert(key, batch);
        }
        while let Some(entry) = self.to_target.first_entry() {
            if entry.key().0 > self.now {
                break;
            }
            let batch = entry.remove();
            match self.receiver.handle_batch(delivery(&batch), batch.header.batch) {
                Ok(()) | Err(Rejected::Duplicate(_)) => {}
                Err(other) => panic!("{other}"),
            }
        }
        while let Some((_, seq)) = self.receiver.poll_deliver().unwrap() {
            self.journal.push(seq);
            let key = self.later(3, 1);
            self.to_disk.insert(key, seq);
        }
        while let Some(entry) = self.to_disk.first_entry() {
            if entry.key().0 > self.now {
                break;
            }
            let seq = entry.remove();
            self.receiver.handle_durable(self.now, seq);
        }
        if let Some(durable) = self.receiver.poll_ack(self.now) {
            let key = self.later(20, 1);
            self.to_agent.insert(key, durable);
        }
        while let Some(entry) = self.to_agent.first_entry() {
            if entry.key().0 > self.now {
                break;
            }
            let durable = entry.remove();
            let window = self.receiver.window_bytes();
            self.sender.handle_ack(durable, window).unwrap();
        }
    }
}

/// Found by this test: the welcome once carried only the last batch *in hand*, the agent took it for
/// an acknowledgement and forgot batches that a target killed a moment later had never made durable.
#[test]
fn every_batch_arrives_once_and_in_order_whatever_the_link_does() {
    for seed in 0..200 {
        let mut world = World::new(seed);
        let mut next = 1;
        world.connect();
        for tick in 0..20_000 {
            if next <= 300 && world.random(4) == 0 {
                world.sender.push(batch(next));
                next += 1;
            }
            match world.random(400) {
                0 => {
                    world.disconnect();
                    world.connect();
                }
                1 => {
                    world.restart_target();
                    world.connect();
                }
                _ => {}
            }
            world.step();
            if next == 301 && world.sender.held_bytes() == 0 {
                break;
            }
            assert!(tick < 19_999, "seed {seed}: stalled at {:?}", world.sender.acked());
        }
        let expected: Vec<_> = (1..=300).map(BatchSeq).collect();
        assert_eq!(world.journal, expected, "seed {seed}");
    }
}

#[test]
fn the_window_bounds_what_is_under_way() {
    let mut world = World::new(1);
    for seq in 1..=100 {
        world.sender.push(batch(seq));
    }
    world.connect();
    let mut under_way = 0;
    while let Some(batch) = world.sender.poll_transmit() {
        under_way += batch.window_bytes();
    }
    assert!(under_way <= 20_000 && under_way > 15_000, "{under_way}");
}

#[test]
fn a_batch_larger_than_the_window_still_goes() {
    let mut sender = Sender::new(Generation(1));
    sender.push(batch(1));
    sender.push(batch(2));
    sender.handle_connected(BatchSeq(0), BatchSeq(0), 1).unwrap();
    assert_eq!(sender.under_way_bytes(), 0);
    let first = sender.poll_transmit().unwrap();
    assert_eq!(first.header.batch, BatchSeq(1));
    assert_eq!(sender.under_way_bytes(), first.wire_bytes() as u64, "and not the second");
    assert!(sender.poll_transmit().is_none());
    sender.handle_ack(BatchSeq(1), 1).unwrap();
    assert_eq!(sender.under_way_bytes(), 0);
    assert_eq!(sender.poll_transmit().unwrap().header.batch, BatchSeq(2));
    sender.handle_disconnected();
    assert_eq!(sender.under_way_bytes(), 0, "it is sent again");
}

#[test]
fn a_batch_is_light_while_its_machine_has_little_under_way() {
    let mut sender = Sender::new(Generation(1));
    let mut bytes = 0;
    for seq in 1..=200 {
        sender.push(batch(seq));
    }
    sender.handle_connected(BatchSeq(0), BatchSeq(0), u64::MAX).unwrap();
    assert_eq!(sender.peek_transmit().unwrap().header.batch, BatchSeq(1));
    let mut newest = BatchSeq(0);
    while let Some(batch) = sender.poll_transmit() {
        bytes += batch.window_bytes();
        newest = batch.header.batch;
        let light = sender.weight() == Weight::Light;
        assert_eq!(light, bytes <= LIGHT_BYTES_MAX, "{bytes} bytes under way");
    }
    assert!(bytes > LIGHT_BYTES_MAX, "all {newest} were light");
    sender.handle_ack(newest, u64::MAX).unwrap();
    sender.push(batch(201));
    sender.poll_transmit().unwrap();
    assert_eq!(sender.weight(), Weight::Light, "once they were acknowledged");
}

#[test]
fn a_target_that_lost_what_it_acknowledged_is_found_out() {
    let mut sender = Sender::new(Generation(1));
    sender.push(batch(1));
    sender.push(batch(2));
    sender.handle_connected(BatchSeq(0), BatchSeq(0), 1 << 20).unwrap();
    sender.handle_ack(BatchSeq(2), 1 << 20).unwrap();
    sender.handle_disconnected();
    assert_eq!(
        sender.handle_connected(BatchSeq(1), BatchSeq(1), 1 << 20),
        Err(AckError::Lost { durable: BatchSeq(1), acked: BatchSeq(2) })
    );
    assert_eq!(
        sender.handle_ack(BatchSeq(3), 1 << 20),
        Err(AckError::Future { claimed: BatchSeq(3), newest: BatchSeq(2) })
    );
}

#[test]
fn a_gap_in_the_write_order_is_refused() {
    let config = ReceiverConfig::default();
    let mut receiver = Receiver::new(config, Generation(1), BatchSeq(4), WriteSeq(10));
    let mut delivery = Delivery {
        generation: Generation(1),
        batch: BatchSeq(5),
        first_write: WriteSeq(12),
        last_write: WriteSeq(12),
        wire_bytes: 1,
    };
    receiver.handle_batch(delivery, ()).unwrap();
    assert!(matches!(receiver.poll_deliver(), Err(Rejected::WriteGap { .. })));
    delivery.generation = Generation(2);
    assert!(matches!(receiver.handle_batch(delivery, ()), Err(Rejected::Generation { .. })));
    delivery.generation = Generation(1);
    delivery.batch = BatchSeq(4 + 513);
    assert!(matches!(receiver.handle_batch(delivery, ()), Err(Rejected::TooFarAhead { .. })));
}
