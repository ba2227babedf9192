//! Turning records and their data into the bytes that travel.

use bytes::Bytes;

use crate::batch::{BatchHeader, BatchKind, Codec, HEADER_BYTES, RECORD_BYTES, Record, RecordKind};
use crate::id::{BatchSeq, DiskIndex, Generation, MachineIndex, WriteSeq};

/// A batch whose place in the order is settled and whose body is not hashed or compressed yet.
/// Cheap to make while the order is locked; [`PlainBatch::encode`] is the expensive half.
#[derive(Debug, Clone)]
pub struct PlainBatch {
    /// How the target stores it.
    pub kind: BatchKind,
    /// The generation it belongs to.
    pub generation: Generation,
    /// Its place in the generation.
    pub batch: BatchSeq,
    /// The place of its first record in the write order.
    pub first_write: WriteSeq,
    /// The agent's wall clock at the newest record, in microseconds since 1970 UTC.
    pub captured_at_us: u64,
    /// Its records, at least one.
    pub records: Vec<Record>,
    /// The data of the data records, in their order; buffers are shared with the capture, not copied.
    pub data: Vec<Bytes>,
    /// Sum of the lengths in `data`.
    pub data_bytes: usize,
}

/// Whether, and how hard, to compress a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Send it as it is: the processor is the bottleneck.
    Off,
    /// zstd at this level: the link is the bottleneck.
    Zstd(i32),
}

/// A batch ready to travel. Clones share the bytes.
#[derive(Debug, Clone)]
pub struct EncodedBatch {
    /// The header; [`BatchHeader::machine`] is filled in per connection by [`EncodedBatch::chunks`].
    pub header: BatchHeader,
    body: Vec<Bytes>,
}

impl PlainBatch {
    /// The batch that holds one write and nothing else: `data` at `offset_bytes` of the first disk,
    /// as the write of the batch's own number. For probes and tests.
    pub fn of_one_write(
        generation: Generation,
        batch: BatchSeq,
        offset_bytes: u64,
        data: Bytes,
    ) -> Self {
        let kind = RecordKind::Data { offset_bytes, len_bytes: data.len() as u32 };
        Self {
            kind: BatchKind::Ordered,
            generation,
            batch,
            first_write: WriteSeq(batch.0),
            captured_at_us: 0,
            records: vec![Record { disk: DiskIndex(0), kind }],
            data_bytes: data.len(),
            data: vec![data],
        }
    }

    /// Hashes the body and compresses it when that makes it at least an eighth smaller. At the
    /// slower levels a sample is tried first: noise costs next to nothing.
    ///
    /// `compressor` is reused between calls, because making one costs as much as a small batch.
    /// Copies nothing when it does not compress; compressing gathers the body once.
    pub fn encode(
        self,
        compression: Compression,
        compressor: &mut zstd::bulk::Compressor<'_>,
    ) -> EncodedBatch {
        let mut table = Vec::with_capacity(self.records.len() * RECORD_BYTES);
        for record in &self.records {
            table.extend_from_slice(&record.encode());
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(&table);
        for chunk in &self.data {
            hasher.update(chunk);
        }
        let plain_bytes = table.len() + self.data_bytes;
        let compressed = match compression {
            Compression::Off => None,
            Compression::Zstd(level) => {
                compress(&table, &self.data, plain_bytes, level, compressor)
            }
        };
        let (codec, body) = match compressed {
            Some(body) => (Codec::Zstd, vec![Bytes::from(body)]),
            None => {
                let mut body = Vec::with_capacity(1 + self.data.len());
                body.push(Bytes::from(table));
                body.extend(self.data);
                (Codec::Plain, body)
            }
        };
        let header = BatchHeader {
            machine: MachineIndex(0),
            kind: self.kind,
            codec,
            generation: self.generation,
            batch: self.batch,
            first_write: self.first_write,
            records: self.records.len() as u32,
            captured_at_us: self.captured_at_us,
            plain_bytes: plain_bytes as u32,
            wire_bytes: body.iter().map(Bytes::len).sum::<usize>() as u32,
            body_hash: *hasher.finalize().as_bytes(),
        };
        EncodedBatch { header, body }
    }
}

/// The compressed body, or `None` when it saves less than an eighth: then the target would spend
/// time on decompression for next to no bytes.
fn compress(
    table: &[u8],
    data: &[Bytes],
    plain_bytes: usize,
    level: i32,
    compressor: &mut zstd::bulk::Compressor<'_>,
) -> Option<Vec<u8>> {
    if level >= SAMPLED_LEVEL_MIN
        && plain_bytes >= SAMPLED_BYTES_MIN
        && !is_compressible(data, compressor)
    {
        return None;
    }
    let mut plain = Vec::with_capacity(plain_bytes);
    plain.extend_from_slice(table);
    for chunk in data {
        plain.extend_from_slice(chunk);
    }
    compressor.set_compression_level(level).ok()?;
    let body = compressor.compress(&plain).ok()?;
    (body.len() <= plain_bytes - plain_bytes / 8).then_some(body)
}

/// Whether a few pieces from all over the data become smaller at all.
fn is_compressible(data: &[Bytes], compressor: &mut zstd::bulk::Compressor<'_>) -> bool {
    let data_bytes: usize = data.iter().map(Bytes::len).sum();
    let stride = (data_bytes / SAMPLES).max(SAMPLE_BYTES);
    let mut sample = Vec::with_capacity(SAMPLES * SAMPLE_BYTES);
    let (mut start, mut next) = (0, 0);
    for chunk in data {
        let end = start + chunk.len();
        while next < end {
            let from = next - start;
            sample.extend_from_slice(&chunk[from..chunk.len().min(from + SAMPLE_BYTES)]);
            next += stride;
        }
        start = end;
    }
    let compressed =
        compressor.set_compression_level(1).and_then(|()| compressor.compress(&sample));
    // Less than for the whole body: what is alike may lie further apart than a piece is long.
    compressed.is_ok_and(|body| body.len() <= sample.len() - sample.len() / 32)
}

impl EncodedBatch {
    /// Header and body as they travel to the machine at `machine` of a connection's hello.
    pub fn chunks(&self, machine: MachineIndex) -> Vec<Bytes> {
        let header = BatchHeader { machine, ..self.header.clone() };
        let mut chunks = Vec::with_capacity(1 + self.body.len());
        chunks.push(Bytes::copy_from_slice(&header.encode()));
        chunks.extend(self.body.iter().cloned());
        chunks
    }

    /// What the batch takes of the target's window: its *plain* size, because that is the memory it
    /// needs there, however small it travels.
    pub fn window_bytes(&self) -> u64 {
        HEADER_BYTES as u64 + u64::from(self.header.plain_bytes)
    }

    /// Bytes of memory the batch holds, which is also what it costs on the wire.
    pub fn wire_bytes(&self) -> usize {
        HEADER_BYTES + self.header.wire_bytes as usize
    }
}

/// From this level on zstd takes long to find out that there is nothing to find: at level 9 noise
/// goes through at 130 MB/s, at level 1 at 3 GB/s.
const SAMPLED_LEVEL_MIN: i32 = 4;
/// A smaller body is hardly larger than the sample.
const SAMPLED_BYTES_MIN: usize = 4 * SAMPLES * SAMPLE_BYTES;
const SAMPLES: usize = 8;
const SAMPLE_BYTES: usize = 4096;

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::{Compression, EncodedBatch, PlainBatch};
    use crate::batch::{
        BatchHeader, BatchKind, BodyError, Codec, HEADER_BYTES, Record, RecordKind, check_body,
    };
    use crate::id::{BatchSeq, DiskIndex, Generation, MachineIndex, PointId, WriteSeq};

    fn sample(data: Vec<Bytes>) -> PlainBatch {
        let mut records: Vec<_> = data
            .iter()
            .enumerate()
            .map(|(i, d)| Record {
                disk: DiskIndex(i as u16),
                kind: RecordKind::Data { offset_bytes: 4096, len_bytes: d.len() as u32 },
            })
            .collect();
        records.push(Record { disk: DiskIndex(0), kind: RecordKind::Point(PointId(77)) });
        PlainBatch {
            kind: BatchKind::Ordered,
            generation: Generation(5),
            batch: BatchSeq(1),
            first_write: WriteSeq(1),
            captured_at_us: 1,
            records,
            data_bytes: data.iter().map(Bytes::len).sum(),
            data,
        }
    }

    fn split(encoded: &EncodedBatch) -> (BatchHeader, Vec<u8>) {
        let wire: Vec<u8> = encoded.chunks(MachineIndex(7)).concat();
        let header = BatchHeader::decode(wire[..HEADER_BYTES].try_into().unwrap()).unwrap();
        assert_eq!(header.machine, MachineIndex(7));
        let body = &wire[HEADER_BYTES..];
        let plain = match header.codec {
            Codec::Plain => body.to_vec(),
            Codec::Zstd => zstd::bulk::decompress(body, header.plain_bytes as usize).unwrap(),
        };
        (header, plain)
    }

    #[test]
    fn compressible_and_random_bodies_come_back() {
        let mut compressor = zstd::bulk::Compressor::new(1).unwrap();
        let mut noise = vec![0; 65536];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        for (content, codec) in [(vec![7; 65536], Codec::Zstd), (noise, Codec::Plain)] {
            let batch = sample(vec![Bytes::from(content), Bytes::from_static(b"tail")]);
            let records = batch.records.clone();
            let encoded = batch.encode(Compression::Zstd(1), &mut compressor);
            assert_eq!(encoded.header.codec, codec);
            let (header, plain) = split(&encoded);
            let (table, data) = plain.split_at(header.table_bytes());
            assert_eq!(check_body(&header, table, data).unwrap(), records);
            assert!(data.ends_with(b"tail"));
        }
    }

    /// At the slow levels noise is told by a sample; a body of which only a part is noise is not.
    #[test]
    fn a_sample_decides_at_the_slow_levels() {
        let mut compressor = zstd::bulk::Compressor::new(1).unwrap();
        let mut noise = vec![0; 1 << 20];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        let mut half = noise.clone();
        half[..1 << 19].fill(7);
        let chunks = |content: &[u8]| content.chunks(70_000).map(Bytes::copy_from_slice).collect();
        for (content, codec) in [(&noise, Codec::Plain), (&half, Codec::Zstd)] {
            let encoded = sample(chunks(content)).encode(Compression::Zstd(9), &mut compressor);
            assert_eq!(encoded.header.codec, codec);
            let (header, plain) = split(&encoded);
            assert!(plain[header.table_bytes()..] == content[..]);
        }
    }

    #[test]
    fn one_changed_byte_of_the_body_is_found() {
        let mut compressor = zstd::bulk::Compressor::new(1).unwrap();
        let encoded =
            sample(vec![Bytes::from(vec![1; 5000])]).encode(Compression::Off, &mut compressor);
        let (header, mut plain) = split(&encoded);
        let last = plain.len() - 1;
        plain[last] ^= 1;
        let (table, data) = plain.split_at(header.table_bytes());
        assert_eq!(check_body(&header, table, data), Err(BodyError::Hash));
    }
}
