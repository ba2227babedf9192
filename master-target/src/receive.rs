//! Batches on their way in: read, decompressed and checked, before the owner loop sees them.

use std::cell::RefCell;

use backhaul_proto::batch::{BatchHeader, BodyError, Codec};
use backhaul_proto::link::{BatchStream, StreamError};
use thiserror::Error;

use crate::batch_buffer::{BatchBuffer, IncomingBatch};

/// Why a batch was not taken. The connection is dropped: the agent sends again what is missing.
#[derive(Debug, Error)]
pub enum ReceiveError {
    /// The stream broke or held something else.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The content is not what was sent.
    #[error("batch {batch}: {source}")]
    Body {
        /// Its number.
        batch: u64,
        /// What is wrong with it.
        source: BodyError,
    },
}

/// Reads one batch whole, checks its content against its hash, and returns it with its header as
/// it travelled. The only copies of the data: out of the datagrams, and out of the decompressor.
pub async fn read_batch(
    stream: &mut BatchStream,
) -> Result<(BatchHeader, IncomingBatch), ReceiveError> {
    let header = stream.read_header().await?;
    let broken = |source| ReceiveError::Body { batch: header.batch.0, source };
    let mut buffer = BatchBuffer::new(&header);
    match header.codec {
        Codec::Plain => {
            stream.read_exact(buffer.table_mut()).await?;
            stream.read_exact(buffer.data_mut()).await?;
        }
        Codec::Zstd => {
            let mut wire = vec![0; header.wire_bytes as usize];
            stream.read_exact(&mut wire).await?;
            decompress(&wire, buffer.plain_mut()).map_err(broken)?;
            buffer.settle_plain();
        }
    }
    stream.read_end().await?;
    let batch = buffer.verify().map_err(broken)?;
    Ok((header, batch))
}

thread_local! {
    static DECOMPRESSOR: RefCell<zstd::bulk::Decompressor<'static>> = RefCell::default();
}

fn decompress(wire: &[u8], plain: &mut [u8]) -> Result<(), BodyError> {
    let expected_bytes = plain.len();
    let done = DECOMPRESSOR.with_borrow_mut(|zstd| zstd.decompress_to_buffer(wire, plain));
    match done {
        Ok(found_bytes) if found_bytes == expected_bytes => Ok(()),
        Ok(found_bytes) => Err(BodyError::Length { expected_bytes, found_bytes }),
        Err(_) => Err(BodyError::Compression),
    }
}
