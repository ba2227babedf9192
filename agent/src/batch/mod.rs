//! From captured changes to the bytes that travel: a pure builder, then an ordered pool of encoders.

mod builder;
mod elide;
mod encoder;
mod level;

pub use builder::{Builder, RECORD_MEMORY_BYTES, held_bytes};
pub use elide::elide_zeroes;
pub(crate) use elide::{alone, is_zero};
pub use encoder::{CompressionChoice, EncodePool, Encoded};
pub use level::{Backlog, LevelControl, Sample, Step};
