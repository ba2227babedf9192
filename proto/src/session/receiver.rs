//! The target's half: puts batches back into order, and says which are durable.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::id::{BatchSeq, Generation, WriteSeq};
use crate::limits::REORDER_BATCHES_MAX;

/// Bounds of a [`Receiver`].
#[derive(Debug, Clone)]
pub struct ReceiverConfig {
    /// Bytes of batches that may be under way or waiting for stable storage (default 32 MiB). It
    /// bounds the memory a machine takes at the target; below bandwidth × delay it limits the rate.
    pub window_bytes: u64,
    /// Longest time an acknowledgement is held back so that one covers several batches (default
    /// 5 ms): longer saves messages, and costs the agent memory.
    pub ack_delay: Duration,
}

impl Default for ReceiverConfig {
    fn default() -> Self {
        Self { window_bytes: 32 << 20, ack_delay: Duration::from_millis(5) }
    }
}

/// Where a batch stands in the order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delivery {
    /// The generation it claims.
    pub generation: Generation,
    /// Its place.
    pub batch: BatchSeq,
    /// The place of its first record.
    pub first_write: WriteSeq,
    /// The place of its last record.
    pub last_write: WriteSeq,
    /// What it counts against the window.
    pub wire_bytes: u64,
}

/// Why a batch was not taken.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Rejected {
    /// It is here already. Harmless; after a cancel there may be some, of which the agent was not told.
    #[error("batch {0} was received before")]
    Duplicate(BatchSeq),
    /// It belongs to another generation than the one that was agreed.
    #[error("a batch of generation {found} came in generation {expected}")]
    Generation {
        /// The batch's.
        found: Generation,
        /// The one agreed in the welcome.
        expected: Generation,
    },
    /// So far ahead of the gap that the agent must be ignoring the window.
    #[error("batch {batch} is too far ahead of batch {expected}, which is still missing")]
    TooFarAhead {
        /// What came.
        batch: BatchSeq,
        /// What is missing.
        expected: BatchSeq,
    },
    /// It was asked for without references, and came with some again.
    #[error("batch {0} has references that cannot be resolved, though it was asked for without")]
    Unresolved(BatchSeq),
    /// Its records do not follow those of the batch before it.
    #[error("batch {batch} starts at write {found}, but write {expected} comes next")]
    WriteGap {
        /// The batch.
        batch: BatchSeq,
        /// Its first write.
        found: WriteSeq,
        /// What had to come.
        expected: WriteSeq,
    },
}

/// One machine's batches on their way to the journal. `T` is whatever carries the content.
#[derive(Debug)]
pub struct Receiver<T> {
    config: ReceiverConfig,
    generation: Generation,
    /// Every batch up to here was handed out by [`Receiver::poll_deliver`].
    delivered: BatchSeq,
    delivered_write: WriteSeq,
    /// Every batch up to here is on stable storage.
    durable: BatchSeq,
    /// The agent was told that every batch up to here is.
    told: BatchSeq,
    /// Batches that came before the one that is missing.
    waiting: BTreeMap<BatchSeq, (Delivery, T)>,
    /// Batches after `delivered` that were asked for without references on this connection; as
    /// many as `waiting` may hold.
    asked: BTreeSet<BatchSeq>,
    ack: AckState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AckState {
    /// The agent knows everything.
    Idle,
    /// An acknowledgement goes out at this time.
    Due(Instant),
}

impl<T> Receiver<T> {
    /// A receiver that continues `generation` after what recovery found durable.
    pub fn new(
        config: ReceiverConfig,
        generation: Generation,
        durable: BatchSeq,
        durable_write: WriteSeq,
    ) -> Self {
        Self {
            config,
            generation,
            delivered: durable,
            delivered_write: durable_write,
            durable,
            told: durable,
            waiting: BTreeMap::new(),
            asked: BTreeSet::new(),
            ack: AckState::Idle,
        }
    }

    /// The generation it takes batches of.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Every batch up to here is on stable storage.
    pub fn durable(&self) -> BatchSeq {
        self.durable
    }

    /// Whether an acknowledgement told the agent, or recovery found, that a batch is on stable storage: it is sent no
    /// more.
    pub fn is_acknowledged(&self, batch: BatchSeq) -> bool {
        batch <= self.told
    }

    /// The window to announce: what [`Receiver::durable`] plus this many bytes may be under way.
    pub fn window_bytes(&self) -> u64 {
        self.config.window_bytes
    }

    /// A connection ended. Batches that wait behind a gap are dropped: the agent sends them again,
    /// and holding them would leave two copies in flight.
    pub fn handle_disconnected(&mut self) {
        self.waiting.clear();
        self.asked.clear();
        self.ack = AckState::Idle;
    }

    /// The last batch that need not be sent again on a new connection: those that were delivered
    /// but are not durable yet will be, unless this process ends first.
    pub fn received(&self) -> BatchSeq {
        self.delivered
    }

    /// A verified batch came in, in any order.
    pub fn handle_batch(&mut self, delivery: Delivery, content: T) -> Result<(), Rejected> {
        self.check(&delivery)?;
        self.waiting.insert(delivery.batch, (delivery, content));
        Ok(())
    }

    /// A batch came in whose references cannot be resolved. When this succeeds the agent is to be
    /// asked for it without.
    pub fn handle_unresolved(&mut self, delivery: &Delivery) -> Result<(), Rejected> {
        self.check(delivery)?;
        if self.asked.insert(delivery.batch) {
            Ok(())
        } else {
            Err(Rejected::Unresolved(delivery.batch))
        }
    }

    fn check(&self, delivery: &Delivery) -> Result<(), Rejected> {
        let Delivery { batch, generation, .. } = *delivery;
        if generation != self.generation {
            return Err(Rejected::Generation { found: generation, expected: self.generation });
        }
        if batch <= self.delivered || self.waiting.contains_key(&batch) {
            return Err(Rejected::Duplicate(batch));
        }
        if batch.0 - self.delivered.0 > REORDER_BATCHES_MAX as u64 {
            return Err(Rejected::TooFarAhead { batch, expected: self.delivered.next() });
        }
        Ok(())
    }

    /// What [`Receiver::poll_deliver`] would return next, if its records continue the order.
    pub fn peek(&self) -> Option<&T> {
        let (batch, (_, content)) = self.waiting.first_key_value()?;
        (*batch == self.delivered.next()).then_some(content)
    }

    /// The next batch of the order, once it is here.
    ///
    /// # Errors
    ///
    /// [`Rejected::WriteGap`] when its records do not continue the order; nothing later can be
    /// delivered then, and the connection must be dropped.
    pub fn poll_deliver(&mut self) -> Result<Option<(Delivery, T)>, Rejected> {
        let Some(entry) = self.waiting.first_entry() else {
            return Ok(None);
        };
        if *entry.key() != self.delivered.next() {
            return Ok(None);
        }
        let delivery = entry.get().0;
        let expected = WriteSeq(self.delivered_write.0 + 1);
        if delivery.first_write != expected {
            return Err(Rejected::WriteGap {
                batch: delivery.batch,
                found: delivery.first_write,
                expected,
            });
        }
        self.delivered = delivery.batch;
        self.delivered_write = delivery.last_write;
        self.asked.remove(&delivery.batch);
        Ok(Some(entry.remove()))
    }

    /// Every delivered batch up to `durable` is on stable storage.
    pub fn handle_durable(&mut self, now: Instant, durable: BatchSeq) {
        debug_assert!(durable <= self.delivered);
        if durable > self.durable {
            self.durable = durable;
            if self.ack == AckState::Idle {
                self.ack = AckState::Due(now + self.config.ack_delay);
            }
        }
    }

    /// The acknowledgement to send now, if one is due. With nothing more on the way it goes at once.
    pub fn poll_ack(&mut self, now: Instant) -> Option<BatchSeq> {
        let AckState::Due(at) = self.ack else {
            return None;
        };
        let nothing_to_wait_for = self.durable == self.delivered && self.waiting.is_empty();
        if now < at && !nothing_to_wait_for {
            return None;
        }
        self.ack = AckState::Idle;
        self.told = self.durable;
        Some(self.durable)
    }

    /// When [`Receiver::poll_ack`] wants to be called again at the latest.
    pub fn poll_timeout(&self) -> Option<Instant> {
        match self.ack {
            AckState::Idle => None,
            AckState::Due(at) => Some(at),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::{Delivery, Receiver, ReceiverConfig};
    use crate::id::{BatchSeq, Generation, WriteSeq};

    fn delivery(batch: u64) -> Delivery {
        let (generation, write) = (Generation(1), WriteSeq(batch));
        let batch = BatchSeq(batch);
        Delivery { generation, batch, first_write: write, last_write: write, wire_bytes: 1 }
    }

    #[test]
    fn a_batch_is_acknowledged_once_its_agent_was_told() {
        let (now, config) = (Instant::now(), ReceiverConfig::default());
        let mut receiver = Receiver::new(config, Generation(1), BatchSeq(4), WriteSeq(4));
        let acknowledged =
            |receiver: &Receiver<()>| [4, 5].map(|batch| receiver.is_acknowledged(BatchSeq(batch)));
        assert_eq!(acknowledged(&receiver), [true, false]);
        receiver.handle_batch(delivery(5), ()).unwrap();
        receiver.poll_deliver().unwrap().unwrap();
        receiver.handle_durable(now, BatchSeq(5));
        assert_eq!(acknowledged(&receiver), [true, false]);
        assert_eq!(receiver.poll_ack(now), Some(BatchSeq(5)));
        assert_eq!(acknowledged(&receiver), [true, true]);
    }

    /// The state that has to be durable before a batch could not be written, because the store was
    /// full. The batch had been taken out by then: it counted as received, was never sent again,
    /// and the journal stumbled over the one after it.
    #[test]
    fn a_batch_that_was_only_looked_at_is_asked_for_again() {
        let config = ReceiverConfig::default();
        let mut receiver = Receiver::new(config, Generation(1), BatchSeq(0), WriteSeq(0));
        receiver.handle_batch(delivery(2), "second").unwrap();
        assert_eq!(receiver.peek(), None);
        receiver.handle_batch(delivery(1), "first").unwrap();
        assert_eq!(receiver.peek(), Some(&"first"));
        receiver.handle_disconnected();
        assert_eq!((receiver.received(), receiver.peek()), (BatchSeq(0), None));
        receiver.handle_batch(delivery(1), "first").unwrap();
        assert_eq!(receiver.poll_deliver().unwrap(), Some((delivery(1), "first")));
        assert_eq!(receiver.received(), BatchSeq(1));
    }
}
