//! What recovery decides from what it found: one pure, total table. `JOURNAL.md` has it in words.

/// What the checkpoint file says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CheckpointFact {
    Absent,
    Damaged,
    Good,
}

/// The segment in which the checkpoint says the journal goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StartFact {
    /// It is there, or the checkpoint names none.
    Found,
    Missing,
    /// Its header is not valid.
    Damaged,
}

/// What stands where the first record that is not valid should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EndFact {
    /// No valid frame.
    Blank,
    /// A valid frame, and behind it something else than the record.
    Torn,
    /// The medium cannot read it.
    Unreadable,
}

/// All that the decision depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) checkpoint: CheckpointFact,
    pub(crate) segments: SegmentsFact,
    pub(crate) start: StartFact,
    pub(crate) end: EndFact,
    pub(crate) proof: ProofFact,
}

/// Whether there is any segment file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SegmentsFact {
    None,
    Some,
}

/// Whether something was written after the first missing batch had been synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ProofFact {
    None,
    Found,
}

/// The outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// A machine that was never protected here.
    Fresh,
    /// Every record that was written is there.
    Intact,
    /// The journal ends before a record that was never acknowledged.
    TornTail,
    /// Acknowledged data is gone.
    Lost(Cause),
}

/// Why acknowledged data is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    CheckpointMissing,
    CheckpointDamaged,
    StartMissing,
    StartDamaged,
    Unreadable,
    Records,
}

/// The decision table.
pub(crate) fn decide(facts: Facts) -> Verdict {
    match (facts.checkpoint, facts.segments) {
        (CheckpointFact::Absent, SegmentsFact::None) => return Verdict::Fresh,
        (CheckpointFact::Absent, SegmentsFact::Some) => {
            return Verdict::Lost(Cause::CheckpointMissing);
        }
        (CheckpointFact::Damaged, _) => return Verdict::Lost(Cause::CheckpointDamaged),
        (CheckpointFact::Good, _) => {}
    }
    match (facts.start, facts.end, facts.proof) {
        (StartFact::Missing, _, _) => Verdict::Lost(Cause::StartMissing),
        (StartFact::Damaged, _, _) => Verdict::Lost(Cause::StartDamaged),
        (StartFact::Found, EndFact::Unreadable, _) => Verdict::Lost(Cause::Unreadable),
        (StartFact::Found, _, ProofFact::Found) => Verdict::Lost(Cause::Records),
        (StartFact::Found, EndFact::Torn, ProofFact::None) => Verdict::TornTail,
        (StartFact::Found, EndFact::Blank, ProofFact::None) => Verdict::Intact,
    }
}

#[cfg(test)]
mod tests {
    use super::{
        Cause, CheckpointFact, EndFact, Facts, ProofFact, SegmentsFact, StartFact, Verdict, decide,
    };

    /// Every combination of facts, against the table as `JOURNAL.md` prints it.
    #[test]
    fn every_row_of_the_document() {
        let document = include_str!("../../JOURNAL.md");
        let table = document.split("| checkpoint | segments | start | end | proof | outcome |");
        let rows: Vec<Vec<&str>> = table
            .last()
            .unwrap()
            .lines()
            .skip(2)
            .take_while(|line| line.starts_with('|'))
            .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
            .collect();
        assert_eq!(rows.len(), 9);
        let mut used = vec![0; rows.len()];
        let checkpoints = [
            ("absent", CheckpointFact::Absent),
            ("damaged", CheckpointFact::Damaged),
            ("good", CheckpointFact::Good),
        ];
        let starts = [
            ("found", StartFact::Found),
            ("missing", StartFact::Missing),
            ("damaged", StartFact::Damaged),
        ];
        let ends = [
            ("blank", EndFact::Blank),
            ("torn", EndFact::Torn),
            ("unreadable", EndFact::Unreadable),
        ];
        for (checkpoint_word, checkpoint) in checkpoints {
            for (segments_word, segments) in
                [("none", SegmentsFact::None), ("some", SegmentsFact::Some)]
            {
                for (start_word, start) in starts {
                    for (end_word, end) in ends {
                        for (proof_word, proof) in
                            [("no", ProofFact::None), ("yes", ProofFact::Found)]
                        {
                            let words =
                                [checkpoint_word, segments_word, start_word, end_word, proof_word];
                            let fits = |row: &Vec<&str>| {
                                words.iter().zip(row).all(|(word, cell)| {
                                    cell.is_empty() || cell.split(", ").any(|c| c == *word)
                                })
                            };
                            let row = rows.iter().position(fits).expect("the table is total");
                            used[row] += 1;
                            let facts = Facts { checkpoint, segments, start, end, proof };
                            let outcome = rows[row][5];
                            let verdict = decide(facts);
                            assert!(outcome.starts_with(word(verdict)), "{facts:?}: {outcome}");
                        }
                    }
                }
            }
        }
        assert!(used.iter().all(|n| *n > 0), "a row that nothing reaches: {used:?}");
    }

    fn word(verdict: Verdict) -> &'static str {
        match verdict {
            Verdict::Fresh => "fresh",
            Verdict::Intact => "intact",
            Verdict::TornTail => "torn tail",
            Verdict::Lost(Cause::CheckpointMissing) => "lost: the checkpoint is missing",
            Verdict::Lost(Cause::CheckpointDamaged) => "lost: no valid slot",
            Verdict::Lost(Cause::StartMissing) => "lost: the segment that the checkpoint names",
            Verdict::Lost(Cause::StartDamaged) => "lost: its header",
            Verdict::Lost(Cause::Unreadable) => "lost: the medium",
            Verdict::Lost(Cause::Records) => "lost",
        }
    }
}
