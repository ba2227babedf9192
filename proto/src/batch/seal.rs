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

/// Compresses bodies, one after the other. Its buffers are as large as the largest body it has seen:
/// what it returns holds no more memory than the bytes it says.
#[derive(Default)]
pub struct Compressor {
    zstd: zstd::bulk::Compressor<'static>,
    plain: Vec<u8>,
    compressed: Vec<u8>,
}

impl std::fmt::Debug for Compressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compressor").field("plain_bytes", &self.plain.len()).finish_non_exhaustive()
    }
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

    /// Hashes the body and compresses it when that makes it at least an eighth smaller.
    ///
    /// `compressor` is reused between calls, because making one costs as much as a small batch.
    /// Copies nothing when it does not compress; compressing gathers the body once, and copies what
    /// has become of it.
    pub fn encode(self, compression: Compression, compressor: &mut Compressor) -> EncodedBatch {
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
            Compression::Zstd(level) => compressor.compress(&table, &self.data, level),
        };
        let (codec, body) = match compressed {
            Some(body) => (Codec::Zstd, vec![body]),
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

impl Compressor {
    /// The compressed body, or `None` when it saves less than an eighth: then the target would
    /// spend time on decompression for next to no bytes.
    fn compress(&mut self, table: &[u8], data: &[Bytes], level: i32) -> Option<Bytes> {
        self.plain.clear();
        self.plain.extend_from_slice(table);
        for chunk in data {
            self.plain.extend_from_slice(chunk);
        }
        self.zstd.set_compression_level(level).ok()?;
        self.compressed.clear();
        self.compressed.reserve(zstd::zstd_safe::compress_bound(self.plain.len()));
        let len = self.zstd.compress_to_buffer(&self.plain, &mut self.compressed).ok()?;
        let worth = len <= self.plain.len() - self.plain.len() / 8;
        // Copied, because a queue full of batches would otherwise hold this buffer for each of them.
        worth.then(|| Bytes::copy_from_slice(&self.compressed[..len]))
    }
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

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::{Compression, Compressor, EncodedBatch, PlainBatch};
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
        let mut compressor = Compressor::default();
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

    #[test]
    fn one_changed_byte_of_the_body_is_found() {
        let mut compressor = Compressor::default();
        let encoded =
            sample(vec![Bytes::from(vec![1; 5000])]).encode(Compression::Off, &mut compressor);
        let (header, mut plain) = split(&encoded);
        let last = plain.len() - 1;
        plain[last] ^= 1;
        let (table, data) = plain.split_at(header.table_bytes());
        assert_eq!(check_body(&header, table, data), Err(BodyError::Hash));
    }
}
