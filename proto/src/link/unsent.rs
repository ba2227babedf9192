//! What was handed over to a transport and has not left.

use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of batches that a transport was given and has not let go of.
#[derive(Debug, Default)]
pub(crate) struct Unsent(AtomicU64);

/// Of one batch; what is left of it counts no more when this is dropped.
#[derive(Debug)]
pub(crate) struct UnsentBatch<'a> {
    all: &'a Unsent,
    bytes: u64,
}

impl Unsent {
    /// A batch of so many bytes is handed over.
    pub(crate) fn batch(&self, bytes: u64) -> UnsentBatch<'_> {
        self.0.fetch_add(bytes, Ordering::Relaxed);
        UnsentBatch { all: self, bytes }
    }

    /// Of all batches.
    pub(crate) fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl UnsentBatch<'_> {
    /// So many bytes more have left.
    pub(crate) fn handle_left(&mut self, bytes: u64) {
        let left = bytes.min(self.bytes);
        self.bytes -= left;
        self.all.0.fetch_sub(left, Ordering::Relaxed);
    }
}

impl Drop for UnsentBatch<'_> {
    fn drop(&mut self) {
        self.handle_left(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::Unsent;

    #[test]
    fn a_batch_counts_until_it_has_left_or_is_given_up() {
        let unsent = Unsent::default();
        let mut first = unsent.batch(1000);
        let second = unsent.batch(50);
        first.handle_left(400);
        assert_eq!(unsent.bytes(), 650);
        first.handle_left(4000);
        assert_eq!(unsent.bytes(), 50, "no more than it had");
        drop((first, second));
        assert_eq!(unsent.bytes(), 0);
    }
}
