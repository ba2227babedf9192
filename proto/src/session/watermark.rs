//! RPO without comparing clocks.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::id::BatchSeq;

/// Most marks kept; beyond it every other one is dropped, which only makes the RPO coarser.
const MARKS_MAX: usize = 1024;

/// Turns "every write before this message is in batch n or earlier" into an RPO.
///
/// All times are the target's own: a mark holds when the message *arrived*, so the true RPO is
/// larger by the one-way delay at most, and no clock of the agent's is trusted.
#[derive(Debug, Default)]
pub struct Watermark {
    /// Messages whose batches are not all durable yet, oldest first.
    marks: VecDeque<(Instant, BatchSeq)>,
    /// Everything written before this moment is durable here.
    covered: Option<Instant>,
}

impl Watermark {
    /// Nothing is known yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The agent says that all writes until now are in batches up to `newest`.
    pub fn handle_progress(&mut self, now: Instant, newest: BatchSeq, durable: BatchSeq) {
        if self.marks.len() == MARKS_MAX {
            let mut keep = false;
            self.marks.retain(|_| {
                keep = !keep;
                keep
            });
        }
        self.marks.push_back((now, newest));
        self.handle_durable(durable);
    }

    /// Batches up to `durable` are on stable storage.
    pub fn handle_durable(&mut self, durable: BatchSeq) {
        while let Some(&(at, newest)) = self.marks.front() {
            if newest > durable {
                break;
            }
            self.covered = Some(at);
            self.marks.pop_front();
        }
    }

    /// The marks belong to a generation that ended; what was covered stays covered.
    pub fn handle_new_generation(&mut self) {
        self.marks.clear();
    }

    /// How much would be lost if the source vanished now; `None` when nothing was ever covered.
    pub fn rpo(&self, now: Instant) -> Option<Duration> {
        self.covered.map(|at| now.saturating_duration_since(at))
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::Watermark;
    use crate::id::BatchSeq;

    #[test]
    fn rpo_is_the_age_of_the_newest_covered_mark() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let mut mark = Watermark::new();
        assert_eq!(mark.rpo(at(9)), None);
        mark.handle_progress(at(1), BatchSeq(5), BatchSeq(3));
        mark.handle_progress(at(2), BatchSeq(8), BatchSeq(3));
        assert_eq!(mark.rpo(at(9)), None);
        mark.handle_durable(BatchSeq(7));
        assert_eq!(mark.rpo(at(9)), Some(Duration::from_secs(8)));
        mark.handle_durable(BatchSeq(8));
        assert_eq!(mark.rpo(at(9)), Some(Duration::from_secs(7)));
    }
}
