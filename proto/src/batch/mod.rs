//! A batch: a run of records in a machine's write order, and its bytes.
//!
//! ```text
//! header (128) | body, plain or compressed
//!                plain body = record table (16 each) | data of the data records, in order
//! ```
//!
//! A body may also travel folded, with references in place of data that the target holds elsewhere.
//!
//! The header is covered by its own hash and holds the hash of the *plain* body, so that a batch
//! can be checked on arrival, in the journal and before it is applied, by the same code.

mod compress;
mod fold;
mod header;
mod record;
mod seal;

pub use compress::{Compression, Compressor};
pub use fold::{FoldedBody, REFERENCE_BYTES, Reference};
pub use header::{BatchHeader, BatchKind, Codec, Folded, HEADER_BYTES, HeaderError};
pub use record::{BodyError, RECORD_BYTES, Record, RecordKind, check_body, decode_table};
pub use seal::{EncodedBatch, PlainBatch};
