//! The agent's half: batches wait here, in order, until the target has them on stable storage.

use std::collections::VecDeque;

use thiserror::Error;

use crate::batch::{BodyError, EncodedBatch, Reference};
use crate::id::{BatchSeq, Generation};
use crate::limits::{LIGHT_BYTES_MAX, REORDER_BATCHES_MAX};

/// Batches of one machine that are not acknowledged yet.
///
/// It holds what was pushed and bounds nothing itself: the capture stops pushing (and falls back to
/// its dirty map) when [`Sender::held_bytes`] reaches its configured queue size.
#[derive(Debug)]
pub struct Sender {
    generation: Generation,
    /// Every batch up to here is durable at the target.
    acked: BatchSeq,
    /// Batches after `acked`, without a gap.
    held: VecDeque<EncodedBatch>,
    held_bytes: u64,
    /// What of those will have travelled.
    held_wire_bytes: u64,
    link: Link,
}

/// Whether there is a target to send to.
#[derive(Debug)]
enum Link {
    /// Waiting for a connection to resume on.
    Down,
    /// Sending.
    Up {
        /// How many of `held` are under way on this connection.
        sent: usize,
        /// Bytes of those.
        sent_bytes: u64,
        /// Bytes that may be under way.
        window_bytes: u64,
    },
}

/// Whether a batch waits its turn among those of all machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weight {
    /// Its machine has next to nothing under way: it goes before what others have. A point of a quiet
    /// machine would wait for seconds behind the sync of another.
    Light,
    /// It waits its turn.
    Heavy,
}

/// What an acknowledgement freed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Released {
    /// Number of batches.
    pub batches: usize,
    /// Bytes of memory.
    pub bytes: u64,
    /// What they cost on the wire.
    pub wire_bytes: u64,
}

/// A batch that lost its references.
#[derive(Debug, Clone)]
pub struct Unfolded {
    /// The batch, to be sent now: it counts as under way already.
    pub batch: EncodedBatch,
    /// Bytes of memory it held before.
    pub before_bytes: u64,
    /// Bytes of memory it holds now.
    pub after_bytes: u64,
    /// What it referred to, which the target does not hold.
    pub references: Vec<Reference>,
}

/// Why an acknowledgement, or a resumption, makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum AckError {
    /// Acknowledges what was never made.
    #[error("the target acknowledged batch {claimed}, but the newest batch is {newest}")]
    Future {
        /// What the target said.
        claimed: BatchSeq,
        /// What there is.
        newest: BatchSeq,
    },
    /// The target holds less than it had acknowledged.
    #[error("the target has only batch {durable} on stable storage, but had acknowledged {acked}")]
    Lost {
        /// What the target has now.
        durable: BatchSeq,
        /// What it said it had.
        acked: BatchSeq,
    },
}

impl Sender {
    /// A sender for a new generation, with nothing in it.
    pub fn new(generation: Generation) -> Self {
        Self {
            generation,
            acked: BatchSeq(0),
            held: VecDeque::new(),
            held_bytes: 0,
            held_wire_bytes: 0,
            link: Link::Down,
        }
    }

    /// The generation whose batches it holds.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// The last batch that the target acknowledged.
    pub fn acked(&self) -> BatchSeq {
        self.acked
    }

    /// The last batch that was pushed.
    pub fn newest(&self) -> BatchSeq {
        BatchSeq(self.acked.0 + self.held.len() as u64)
    }

    /// Bytes of memory of all batches that are not acknowledged.
    pub fn held_bytes(&self) -> u64 {
        self.held_bytes
    }

    /// What the batches that are not acknowledged cost on the wire.
    pub fn held_wire_bytes(&self) -> u64 {
        self.held_wire_bytes
    }

    /// What the batches cost on the wire that the target has, or is being sent, and has not acknowledged.
    pub fn under_way_bytes(&self) -> u64 {
        let Link::Up { sent, .. } = self.link else { return 0 };
        self.held.iter().take(sent).map(|batch| batch.wire_bytes() as u64).sum()
    }

    /// The capture time (microseconds since 1970 UTC) of the oldest batch not acknowledged.
    pub fn oldest_captured_at_us(&self) -> Option<u64> {
        self.held.front().map(|batch| batch.header.captured_at_us)
    }

    /// Takes the next batch of the order.
    ///
    /// # Panics
    ///
    /// When it is not the next one: that is a bug in the capture, and to go on would break the
    /// prefix invariant.
    pub fn push(&mut self, batch: EncodedBatch) {
        assert_eq!(batch.header.generation, self.generation, "a batch of another generation");
        assert_eq!(batch.header.batch, self.newest().next(), "a batch out of order");
        self.held_bytes += batch.held_bytes() as u64;
        self.held_wire_bytes += batch.wire_bytes() as u64;
        self.held.push_back(batch);
    }

    /// A connection is up. The target has everything up to `durable` on stable storage, and
    /// everything up to `received` in hand: what comes after `received` is sent again, what lies
    /// between the two stays held, because a target that restarts now would ask for it.
    pub fn handle_connected(
        &mut self,
        durable: BatchSeq,
        received: BatchSeq,
        window_bytes: u64,
    ) -> Result<Released, AckError> {
        if durable < self.acked {
            return Err(AckError::Lost { durable, acked: self.acked });
        }
        let claimed = received.max(durable);
        if claimed > self.newest() {
            return Err(AckError::Future { claimed, newest: self.newest() });
        }
        let sent = (claimed.0 - self.acked.0) as usize;
        let sent_bytes = self.held.iter().take(sent).map(EncodedBatch::window_bytes).sum();
        self.link = Link::Up { sent, sent_bytes, window_bytes };
        self.handle_ack(durable, window_bytes)
    }

    /// The connection is gone; batches under way may or may not have arrived.
    pub fn handle_disconnected(&mut self) {
        self.link = Link::Down;
    }

    /// Everything up to `durable` is on stable storage; `window_bytes` more may be under way.
    /// An acknowledgement older than one already seen changes only the window.
    pub fn handle_ack(
        &mut self,
        durable: BatchSeq,
        new_window_bytes: u64,
    ) -> Result<Released, AckError> {
        if durable > self.newest() {
            return Err(AckError::Future { claimed: durable, newest: self.newest() });
        }
        let mut released = Released::default();
        while self.acked < durable {
            let Some(batch) = self.held.pop_front() else {
                break;
            };
            let bytes = batch.held_bytes() as u64;
            self.acked = batch.header.batch;
            self.held_bytes -= bytes;
            self.held_wire_bytes -= batch.wire_bytes() as u64;
            released.batches += 1;
            released.bytes += bytes;
            released.wire_bytes += batch.wire_bytes() as u64;
            if let Link::Up { sent, sent_bytes, .. } = &mut self.link
                && *sent > 0
            {
                *sent -= 1;
                *sent_bytes -= batch.window_bytes();
            }
        }
        if let Link::Up { window_bytes, .. } = &mut self.link {
            *window_bytes = new_window_bytes;
        }
        Ok(released)
    }

    /// The target could not resolve the references of a batch, and asks for it without. `None` when
    /// it was acknowledged meanwhile, was not sent on this connection, or has no references.
    ///
    /// # Errors
    ///
    /// When the batch was damaged in memory.
    pub fn handle_resend(&mut self, batch: BatchSeq) -> Result<Option<Unfolded>, BodyError> {
        let Link::Up { sent, .. } = self.link else { return Ok(None) };
        if batch <= self.acked || batch.0 - self.acked.0 > sent as u64 {
            return Ok(None);
        }
        self.unfold((batch.0 - self.acked.0 - 1) as usize)
    }

    /// The target speaks a version without references: everything held loses them. Returns the
    /// bytes of memory before and after.
    ///
    /// # Errors
    ///
    /// When a batch was damaged in memory.
    pub fn unfold_all(&mut self) -> Result<(u64, u64), BodyError> {
        let before = self.held_bytes;
        for index in 0..self.held.len() {
            self.unfold(index)?;
        }
        Ok((before, self.held_bytes))
    }

    fn unfold(&mut self, index: usize) -> Result<Option<Unfolded>, BodyError> {
        let Some(held) = self.held.get_mut(index).filter(|held| !held.references().is_empty())
        else {
            return Ok(None);
        };
        let unfolded = Unfolded {
            batch: held.unfold()?,
            before_bytes: held.held_bytes() as u64,
            after_bytes: 0,
            references: held.references().to_vec(),
        };
        let after_bytes = unfolded.batch.held_bytes() as u64;
        self.held_wire_bytes -= held.wire_bytes() as u64;
        self.held_wire_bytes += unfolded.batch.wire_bytes() as u64;
        *held = unfolded.batch.clone();
        self.held_bytes = self.held_bytes - unfolded.before_bytes + after_bytes;
        Ok(Some(Unfolded { after_bytes, ..unfolded }))
    }

    /// The next batch to send, if the window has room for it. One batch may always be under way,
    /// so that a window smaller than a batch does not stop the stream for ever; and never more than
    /// the target is ready to put back into order.
    pub fn poll_transmit(&mut self) -> Option<EncodedBatch> {
        let (batch, bytes) =
            self.peek_transmit().map(|batch| (batch.clone(), batch.window_bytes()))?;
        if let Link::Up { sent, sent_bytes, .. } = &mut self.link {
            *sent += 1;
            *sent_bytes += bytes;
        }
        Some(batch)
    }

    /// What [`Sender::poll_transmit`] returns next.
    pub fn peek_transmit(&self) -> Option<&EncodedBatch> {
        let Link::Up { sent, sent_bytes, window_bytes } = &self.link else {
            return None;
        };
        let batch = self.held.get(*sent)?;
        let bytes = batch.window_bytes();
        if *sent >= REORDER_BATCHES_MAX || *sent > 0 && *sent_bytes + bytes > *window_bytes {
            return None;
        }
        Some(batch)
    }

    /// What the batch that was sent last is, beside those of other machines.
    pub fn weight(&self) -> Weight {
        match self.link {
            Link::Up { sent_bytes, .. } if sent_bytes <= LIGHT_BYTES_MAX => Weight::Light,
            _ => Weight::Heavy,
        }
    }
}
