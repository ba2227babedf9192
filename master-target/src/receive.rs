//! Batches on their way in: read, decompressed and checked, before the owner loop sees them.
//!
//! A folded batch is checked in two steps. Which images it refers to only the owner loop knows, so
//! what is read here is a [`FoldedBatch`], and becomes an [`IncomingBatch`] once its references are
//! resolved and the whole is what the agent hashed.

use std::cell::RefCell;
use std::io;
use std::sync::Arc;

use backhaul_proto::batch::{BatchHeader, BodyError, Codec, FoldedBody, Reference};
use backhaul_proto::id::DiskIndex;
use backhaul_proto::link::{BatchStream, StreamError};
use thiserror::Error;
use tokio::sync::Semaphore;

use crate::batch_buffer::{BatchBuffer, IncomingBatch};
use crate::hashing::ReadableDisk;

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

/// Why references do not lead to what the agent meant. It is asked for the batch without them.
#[derive(Debug, Error)]
pub enum Unresolved {
    /// The disk has no such place, or there is no such disk.
    #[error("a reference to disk {disk} at byte {offset_bytes} lies outside the machine's disks")]
    Outside {
        /// The disk.
        disk: DiskIndex,
        /// Where.
        offset_bytes: u64,
    },
    /// The image cannot be read there.
    #[error("a reference to disk {disk} cannot be read at byte {offset_bytes}: {source}")]
    Read {
        /// The disk.
        disk: DiskIndex,
        /// Where.
        offset_bytes: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The images hold something else there: after a connection is lost the agent knows less of what
    /// is here than it thinks, so this is nothing to worry about.
    #[error("the images hold something else where its references lead")]
    Content(#[from] BodyError),
}

/// A batch as it came in.
pub enum Received {
    /// Whole and checked.
    Whole(IncomingBatch),
    /// With references, which are well-formed and nothing more.
    Folded(FoldedBatch),
}

/// A batch with references. It takes less memory than the plain batch, as which it counts against the
/// window.
pub struct FoldedBatch {
    header: BatchHeader,
    packed: Vec<u8>,
}

impl FoldedBatch {
    /// Reads what the references name, and checks that the whole is what the agent sent. Blocks.
    pub fn resolve(&self, disks: &[Arc<ReadableDisk>]) -> Result<IncomingBatch, Unresolved> {
        let mut buffer = BatchBuffer::new(&self.header);
        let folded = FoldedBody::decode(&self.header, &self.packed)?;
        buffer.table_mut().copy_from_slice(folded.table);
        folded.unfold(buffer.data_mut(), |reference, into| read(disks, reference, into))?;
        Ok(buffer.verify()?)
    }
}

fn read(
    disks: &[Arc<ReadableDisk>],
    reference: &Reference,
    into: &mut [u8],
) -> Result<(), Unresolved> {
    let Reference { disk, offset_bytes, .. } = *reference;
    let end_bytes = offset_bytes.saturating_add(into.len() as u64);
    let Some(image) = disks.get(usize::from(disk.0)).filter(|image| end_bytes <= image.size_bytes)
    else {
        return Err(Unresolved::Outside { disk, offset_bytes });
    };
    image.read(offset_bytes, into).map_err(|source| Unresolved::Read { disk, offset_bytes, source })
}

/// Reads one batch whole and returns it with its header as it travelled. The content of one without
/// references is checked against its hash. The only copies of the data: out of the datagrams, and
/// out of the decompressor. It waits for its part of `memory_kib`, and gives that back when it is read.
pub async fn read_batch(
    stream: &mut BatchStream,
    memory_kib: &Semaphore,
) -> Result<(BatchHeader, Received), ReceiveError> {
    let header = stream.read_header().await?;
    let kib = (header.plain_bytes + header.wire_bytes).div_ceil(1024);
    // Never closed, so this cannot fail.
    let _memory = memory_kib.acquire_many(kib).await;
    let broken = |source| ReceiveError::Body { batch: header.batch.0, source };
    if header.folded.is_some() {
        let packed = read_packed(stream, &header).await?;
        stream.read_end().await?;
        FoldedBody::decode(&header, &packed).map_err(broken)?;
        let folded = FoldedBatch { header: header.clone(), packed };
        return Ok((header, Received::Folded(folded)));
    }
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
    Ok((header, Received::Whole(batch)))
}

/// The body of a folded batch before zstd.
async fn read_packed(
    stream: &mut BatchStream,
    header: &BatchHeader,
) -> Result<Vec<u8>, ReceiveError> {
    let mut wire = vec![0; header.wire_bytes as usize];
    stream.read_exact(&mut wire).await?;
    if header.codec == Codec::Plain {
        return Ok(wire);
    }
    let mut packed = vec![0; header.packed_bytes() as usize];
    let broken = |source| ReceiveError::Body { batch: header.batch.0, source };
    decompress(&wire, &mut packed).map_err(broken)?;
    Ok(packed)
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    use backhaul_proto::batch::{
        BatchHeader, Compression, Compressor, EncodedBatch, HEADER_BYTES, PlainBatch, Reference,
    };
    use backhaul_proto::id::{BatchSeq, DiskIndex, Generation, MachineIndex};
    use bytes::Bytes;

    use super::{FoldedBatch, Unresolved};
    use crate::hashing::ReadableDisk;

    const DISK_BYTES: u64 = 1 << 20;

    /// Two disks behind a header of 512 bytes each, and what they hold.
    fn disks(folder: &std::path::Path) -> Vec<(Arc<ReadableDisk>, Vec<u8>)> {
        let make = |index: u64| {
            let mut content = vec![0; DISK_BYTES as usize];
            blake3::Hasher::new().update(&index.to_le_bytes()).finalize_xof().fill(&mut content);
            let path = folder.join(format!("disk{index}"));
            let mut options = std::fs::File::options();
            let file = options.read(true).write(true).create(true).truncate(true).open(&path);
            let file = file.unwrap();
            file.write_all_at(&content, 512).unwrap();
            let (base_offset_bytes, size_bytes) = (512, DISK_BYTES);
            (Arc::new(ReadableDisk { file, path, base_offset_bytes, size_bytes }), content)
        };
        (0..2).map(make).collect()
    }

    fn folded(data: &[u8], references: Vec<Reference>) -> (EncodedBatch, FoldedBatch) {
        let (generation, batch) = (Generation(1), BatchSeq(1));
        let data = Bytes::copy_from_slice(data);
        let mut compressor = Compressor::default();
        let encoded = PlainBatch::of_one_write(generation, batch, 8192, data).encode_folded(
            references,
            Compression::Off,
            &mut compressor,
        );
        let wire = encoded.chunks(MachineIndex(0)).concat();
        let header = BatchHeader::decode(wire[..HEADER_BYTES].try_into().unwrap()).unwrap();
        (encoded, FoldedBatch { header, packed: wire[HEADER_BYTES..].to_vec() })
    }

    fn reference(at_bytes: u32, len_bytes: u32, disk: u16, offset_bytes: u64) -> Reference {
        Reference { at_bytes, len_bytes, disk: DiskIndex(disk), offset_bytes }
    }

    #[test]
    fn a_reference_becomes_the_data_that_it_stands_for() {
        let folder = tempfile::tempdir().unwrap();
        let (disks, content): (Vec<_>, Vec<_>) = disks(folder.path()).into_iter().unzip();
        let end = DISK_BYTES as usize;
        let data = [&content[1][4096..36864], b"between", &content[0][end - 8192..]].concat();
        let references =
            vec![reference(0, 32768, 1, 4096), reference(32775, 8192, 0, DISK_BYTES - 8192)];
        let (encoded, folded) = folded(&data, references);
        assert!(encoded.wire_bytes() < 512, "{}", encoded.wire_bytes());
        let batch = folded.resolve(&disks).unwrap();
        assert!(batch.data() == data);
        assert_eq!(batch.header().folded, None, "the journal knows nothing of references");
    }

    /// What a hostile agent, or an index that went stale, can name.
    #[test]
    fn what_does_not_lead_to_the_content_is_not_resolved() {
        let folder = tempfile::tempdir().unwrap();
        let (disks, content): (Vec<_>, Vec<_>) = disks(folder.path()).into_iter().unzip();
        let data = &content[0][..16384];
        let unresolved = |one: Reference| folded(data, vec![one]).1.resolve(&disks).unwrap_err();
        let outside = [
            reference(0, 16384, 2, 0),
            reference(0, 16384, u16::MAX, 0),
            reference(0, 16384, 0, DISK_BYTES - 16383),
            reference(0, 16384, 0, DISK_BYTES),
            reference(0, 16384, 0, (62 << 40) - 16384),
        ];
        for one in outside {
            let error = unresolved(one);
            assert!(matches!(error, Unresolved::Outside { .. }), "{one:?}: {error}");
        }
        // Elsewhere, on the other disk, and where the batch itself will be written.
        for one in
            [reference(0, 16384, 0, 1), reference(0, 16384, 1, 0), reference(0, 16384, 0, 8192)]
        {
            let error = unresolved(one);
            assert!(matches!(error, Unresolved::Content(_)), "{one:?}: {error}");
        }
        disks[0].file.set_len(4096).unwrap();
        assert!(matches!(unresolved(reference(0, 16384, 0, 0)), Unresolved::Read { .. }));
    }
}
