//! Batches that were just journalled and are still in memory: the newest ones, without a gap.

use std::collections::VecDeque;

use backhaul_proto::id::BatchSeq;

use crate::batch_buffer::IncomingBatch;
use crate::journal::Place;

/// The newest batches, up to a number of bytes. When applying falls behind further than that it
/// reads the journal; once it has caught up, it is served from here again.
#[derive(Debug)]
pub(super) struct Cache {
    batches: VecDeque<(IncomingBatch, Place)>,
    bytes: usize,
    bytes_max: usize,
}

impl Cache {
    pub(super) fn new(bytes_max: usize) -> Self {
        Self { batches: VecDeque::new(), bytes: 0, bytes_max }
    }

    /// Adds the batch after the last one, whose journal record ends at `end`.
    pub(super) fn push(&mut self, batch: IncomingBatch, end: Place) {
        self.bytes += batch.memory_bytes();
        self.batches.push_back((batch, end));
        while self.bytes > self.bytes_max {
            self.pop();
        }
    }

    pub(super) fn pop(&mut self) -> Option<(IncomingBatch, Place)> {
        let first = self.batches.pop_front();
        if let Some((batch, _)) = &first {
            self.bytes -= batch.memory_bytes();
        }
        first
    }

    pub(super) fn first(&self) -> Option<BatchSeq> {
        self.batches.front().map(|(batch, _)| batch.header().batch)
    }

    pub(super) fn starts_at(&self, batch: BatchSeq) -> bool {
        self.first() == Some(batch)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &(IncomingBatch, Place)> {
        self.batches.iter()
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn clear(&mut self) {
        self.batches.clear();
        self.bytes = 0;
    }
}
