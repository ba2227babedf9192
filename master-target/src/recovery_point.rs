//! Recovery points: places in a machine's write order that its disks can be brought to.

use std::fmt;
use std::str::FromStr;

use backhaul_proto::id::{BatchSeq, Generation, PointId};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A crash-consistent point: the state of all disks after the last write of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveryPoint {
    /// The agent's clock at the marker, in microseconds since 1970 UTC; also its identifier.
    pub id_us: u64,
    /// The generation that the batch belongs to.
    pub generation: u64,
    /// The batch whose last record it is.
    pub batch: u64,
}

impl RecoveryPoint {
    /// A point at the end of `batch`.
    pub fn new(id: PointId, generation: Generation, batch: BatchSeq) -> Self {
        Self { id_us: id.0, generation: generation.0, batch: batch.0 }
    }

    /// Its identifier.
    pub fn id(&self) -> PointId {
        PointId(self.id_us)
    }

    /// The batch that ends with it.
    pub fn batch(&self) -> BatchSeq {
        BatchSeq(self.batch)
    }
}

/// The identifier of a point as people read and type it: its time in RFC 3339, to the microsecond.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PointText(pub PointId);

/// A text is not the identifier of a point.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("`{0}` is not a recovery point; give `latest`, or an identifier from `backhaul points`")]
pub struct PointTextError(String);

impl fmt::Display for PointText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = i64::try_from(self.0.0).ok().and_then(|us| Timestamp::from_microsecond(us).ok());
        match time {
            Some(time) => write!(f, "{time:.6}"),
            None => write!(f, "{}us", self.0.0),
        }
    }
}

impl FromStr for PointText {
    type Err = PointTextError;
    fn from_str(text: &str) -> Result<Self, PointTextError> {
        let time =
            text.parse::<Timestamp>().ok().and_then(|t| u64::try_from(t.as_microsecond()).ok());
        time.map(|us| Self(PointId(us))).ok_or_else(|| PointTextError(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use backhaul_proto::id::PointId;

    use super::PointText;

    #[test]
    fn identifiers_come_back_to_the_microsecond() {
        let id = PointText(PointId(1_795_000_000_123_456));
        assert_eq!(id.to_string(), "2026-11-18T11:06:40.123456Z");
        assert_eq!(id.to_string().parse::<PointText>().unwrap(), id);
        assert!("latest".parse::<PointText>().is_err());
    }
}
