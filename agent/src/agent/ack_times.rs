//! How long batches are on their way until the target has them on stable storage.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use backhaul_proto::id::BatchSeq;

/// When the batches of one machine were sent that are not acknowledged yet: as many as the target's window lets
/// be under way.
#[derive(Debug, Default)]
pub(super) struct AckTimes {
    sent: VecDeque<(BatchSeq, Instant)>,
}

impl AckTimes {
    /// A batch was handed to the link, where a ceiling may hold it yet. They come in their order.
    pub(super) fn handle_sent(&mut self, now: Instant, batch: BatchSeq) {
        self.sent.push_back((batch, now));
    }

    /// Everything up to `durable` is acknowledged. What took how long, in order.
    pub(super) fn handle_acked(
        &mut self,
        now: Instant,
        durable: BatchSeq,
    ) -> impl Iterator<Item = (BatchSeq, Duration)> {
        let acked = self.sent.partition_point(|(batch, _)| *batch <= durable);
        self.sent.drain(..acked).map(move |(batch, sent)| (batch, now.duration_since(sent)))
    }

    /// The connection is gone, or the generation, or a session resumes: what was under way counts no more.
    pub(super) fn handle_disconnected(&mut self) {
        self.sent.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use backhaul_proto::id::BatchSeq;

    use super::AckTimes;

    #[test]
    fn a_batch_counts_from_its_last_sending_to_its_first_acknowledgement() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut times = AckTimes::default();
        times.handle_sent(at(0), BatchSeq(6));
        times.handle_disconnected();
        // The target has batch 6, which was not acknowledged, and what follows is sent again.
        for (ms, batch) in [(10, 7), (20, 8), (30, 9)] {
            times.handle_sent(at(ms), BatchSeq(batch));
        }
        let mut acked = |ms, batch| -> Vec<_> {
            let acked = times.handle_acked(at(ms), BatchSeq(batch));
            acked.map(|(batch, time)| (batch.0, time.as_millis())).collect()
        };
        assert_eq!(acked(50, 6), []);
        assert_eq!(acked(100, 8), [(7, 90), (8, 80)]);
        assert_eq!(acked(100, 8), []);
        assert_eq!(acked(130, 99), [(9, 100)]);
    }
}
