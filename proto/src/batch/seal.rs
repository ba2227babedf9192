//! Turning records and their data into the bytes that travel.

use bytes::Bytes;

use crate::batch::{
    BatchHeader, BatchKind, BodyError, Codec, Compression, Compressor, Folded, FoldedBody,
    HEADER_BYTES, RECORD_BYTES, REFERENCE_BYTES, Record, RecordKind, Reference,
};
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

/// A batch ready to travel. Clones share the bytes.
#[derive(Debug, Clone)]
pub struct EncodedBatch {
    /// The header; [`BatchHeader::machine`] is filled in per connection by [`EncodedBatch::chunks`].
    pub header: BatchHeader,
    body: Vec<Bytes>,
    fold: Option<Fold>,
    ends_with_point: bool,
}

/// What a folded batch needs to be sent without references.
#[derive(Debug, Clone)]
struct Fold {
    references: Vec<Reference>,
    /// What they stand for, one after the other.
    data: Bytes,
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

    /// Hashes the body and compresses it when that makes it at least an eighth smaller. A
    /// sample of a large one is tried first: noise costs next to nothing.
    ///
    /// `compressor` is reused between calls, because making one costs as much as a small batch.
    /// Copies nothing when it does not compress, unless the data is in tiny pieces; compressing
    /// gathers the body once, and copies what has become of it.
    pub fn encode(self, compression: Compression, compressor: &mut Compressor) -> EncodedBatch {
        self.encode_folded(Vec::new(), compression, compressor)
    }

    /// Encodes with references in place of the data that they stand for, which is kept aside; as
    /// [`PlainBatch::encode`] does when there are none. References are in the order of their places
    /// in the data, lie inside it, and do not overlap.
    pub fn encode_folded(
        self,
        references: Vec<Reference>,
        compression: Compression,
        compressor: &mut Compressor,
    ) -> EncodedBatch {
        let mut head = Vec::with_capacity(
            self.records.len() * RECORD_BYTES + references.len() * REFERENCE_BYTES,
        );
        for record in &self.records {
            head.extend_from_slice(&record.encode());
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(&head);
        for chunk in &self.data {
            hasher.update(chunk);
        }
        let plain_bytes = head.len() + self.data_bytes;
        let (data, fold) = if references.is_empty() {
            (self.data, None)
        } else {
            for reference in &references {
                head.extend_from_slice(&reference.encode());
            }
            let (rest, referenced) = split(&self.data, &references);
            (rest, Some(Fold { references, data: referenced.into() }))
        };
        let packed_bytes = head.len() + data.iter().map(Bytes::len).sum::<usize>();
        let (codec, body) = compressor.pack(head, data, compression);
        let header = BatchHeader {
            machine: MachineIndex(0),
            kind: self.kind,
            codec,
            folded: fold.as_ref().map(|fold| Folded {
                references: fold.references.len() as u32,
                bytes: packed_bytes as u32,
            }),
            generation: self.generation,
            batch: self.batch,
            first_write: self.first_write,
            records: self.records.len() as u32,
            captured_at_us: self.captured_at_us,
            plain_bytes: plain_bytes as u32,
            wire_bytes: body.iter().map(Bytes::len).sum::<usize>() as u32,
            body_hash: *hasher.finalize().as_bytes(),
        };
        let last = self.records.last().map(|record| record.kind);
        let ends_with_point = matches!(last, Some(RecordKind::Point(_)));
        EncodedBatch { header, body, fold, ends_with_point }
    }
}

/// The data outside the references, shared, and the data inside, copied: a slice would keep the
/// whole of the buffer it is a part of. So what is outside is copied too when it is the smaller part.
fn split(data: &[Bytes], references: &[Reference]) -> (Vec<Bytes>, Vec<u8>) {
    let mut rest = Vec::with_capacity(data.len() + references.len());
    let mut inside =
        Vec::with_capacity(references.iter().map(|one| one.len_bytes as usize).sum::<usize>());
    let mut ranges = references.iter().map(Reference::range).peekable();
    let mut start = 0;
    for chunk in data {
        let end = start + chunk.len();
        let mut at = start;
        while at < end {
            while ranges.next_if(|range| range.end <= at).is_some() {}
            let range = ranges.peek().cloned().unwrap_or(end..end);
            let stop = if range.start <= at { range.end } else { range.start }.min(end);
            let piece = at - start..stop - start;
            if range.start <= at && !range.is_empty() {
                inside.extend_from_slice(&chunk[piece]);
            } else {
                rest.push(chunk.slice(piece));
            }
            at = stop;
        }
        start = end;
    }
    if rest.iter().map(Bytes::len).sum::<usize>() < inside.len() {
        rest = vec![rest.concat().into()];
    }
    (rest, inside)
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

    /// What the batch costs on the wire.
    pub fn wire_bytes(&self) -> usize {
        HEADER_BYTES + self.header.wire_bytes as usize
    }

    /// Bytes of memory the batch holds: what travels, with a handle for each piece of it, and what
    /// its references stand for.
    pub fn held_bytes(&self) -> usize {
        let fold = self.fold.as_ref();
        self.wire_bytes()
            + self.body.len() * size_of::<Bytes>()
            + fold.map_or(0, |fold| fold.data.len() + fold.references.len() * REFERENCE_BYTES)
    }

    /// Whether its last record is the marker of a recovery point.
    pub fn ends_with_point(&self) -> bool {
        self.ends_with_point
    }

    /// Its references, when it is folded.
    pub fn references(&self) -> &[Reference] {
        self.fold.as_ref().map_or(&[], |fold| &fold.references)
    }

    /// The same batch without references, for a target that cannot resolve them.
    ///
    /// # Errors
    ///
    /// When the batch was damaged in memory.
    pub fn unfold(&self) -> Result<Self, BodyError> {
        let Some(fold) = &self.fold else { return Ok(self.clone()) };
        let mut packed = self.body.concat();
        if self.header.codec == Codec::Zstd {
            let packed_bytes = self.header.packed_bytes() as usize;
            packed = zstd::bulk::decompress(&packed, packed_bytes)
                .map_err(|_| BodyError::Compression)?;
        }
        let folded = FoldedBody::decode(&self.header, &packed)?;
        let mut data = vec![0; self.header.data_bytes()];
        let mut aside = &fold.data[..];
        folded.unfold(&mut data, |_, into| {
            let bytes = aside.split_off(..into.len()).ok_or(BodyError::Compression)?;
            into.copy_from_slice(bytes);
            Ok(())
        })?;
        // Fast, and small enough: this is rare.
        let compression = match self.header.codec {
            Codec::Plain => Compression::Off,
            Codec::Zstd => Compression::Zstd(1),
        };
        let (head, data) = (folded.table.to_vec(), vec![Bytes::from(data)]);
        let (codec, body) = Compressor::default().pack(head, data, compression);
        let wire_bytes = body.iter().map(Bytes::len).sum::<usize>() as u32;
        let header = BatchHeader { codec, wire_bytes, folded: None, ..self.header.clone() };
        Ok(Self { header, body, fold: None, ends_with_point: self.ends_with_point })
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use proptest::prelude::*;

    use super::{EncodedBatch, PlainBatch};
    use crate::batch::{
        BatchHeader, BatchKind, BodyError, Codec, Compression, Compressor, FoldedBody,
        HEADER_BYTES, Record, RecordKind, Reference, check_body,
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
            Codec::Zstd => zstd::bulk::decompress(body, header.packed_bytes() as usize).unwrap(),
        };
        (header, plain)
    }

    fn reference(at_bytes: u32, len_bytes: u32) -> Reference {
        Reference { at_bytes, len_bytes, disk: DiskIndex(3), offset_bytes: u64::from(at_bytes) }
    }

    proptest! {
        /// However the data is cut into records, wherever references lie in it, and whatever zstd
        /// makes of it: what is unfolded, at either end, is what was there.
        #[test]
        fn a_folded_batch_comes_back(
            cuts in prop::collection::vec(1usize..5000, 1..12),
            folds in prop::collection::vec((0u32..3000, 1u32..3000), 1..8),
            level in prop::sample::select(vec![0, 1, 9]),
            noise in any::<bool>(),
        ) {
            let total: usize = cuts.iter().sum();
            let mut content = vec![7; total];
            if noise {
                blake3::Hasher::new().finalize_xof().fill(&mut content);
            }
            let mut data = Vec::new();
            let mut at = 0;
            for cut in cuts {
                data.push(Bytes::copy_from_slice(&content[at..at + cut]));
                at += cut;
            }
            let mut references = Vec::new();
            let mut at = 0;
            for (skip, len) in folds {
                let start = at + skip;
                if (start + len) as usize > total {
                    break;
                }
                references.push(reference(start, len));
                at = start + len;
            }
            let plain = sample(data);
            let table: Vec<u8> = plain.records.iter().flat_map(Record::encode).collect();
            let mut compressor = Compressor::default();
            let compression = if level == 0 { Compression::Off } else { Compression::Zstd(level) };
            let saved: u32 = references.iter().map(|one| one.len_bytes).sum();
            // A fold that saves nothing is not allowed, and is not made.
            prop_assume!(references.is_empty() || saved as usize > references.len() * 24);
            let encoded = plain.encode_folded(references.clone(), compression, &mut compressor);
            prop_assert_eq!(encoded.references(), &references[..]);
            let (header, packed) = split(&encoded);
            let mut unfolded = vec![1; header.data_bytes()];
            let body = FoldedBody::decode(&header, &packed).unwrap();
            body.unfold(&mut unfolded, |one, into| {
                into.copy_from_slice(&content[one.range()]);
                Ok::<_, ()>(())
            }).unwrap();
            prop_assert!(check_body(&header, body.table, &unfolded).is_ok());
            prop_assert!(unfolded == content);
            let again = encoded.unfold().unwrap();
            prop_assert_eq!(again.header.folded, None);
            let (header, body) = split(&again);
            prop_assert!(check_body(&header, &body[..table.len()], &body[table.len()..]).is_ok());
        }
    }

    /// What a hostile agent can put into references.
    #[test]
    fn malformed_references_are_refused() {
        let mut compressor = Compressor::default();
        let references = vec![reference(100, 1000), reference(2000, 500)];
        let encoded = sample(vec![Bytes::from(vec![1; 5000])]).encode_folded(
            references,
            Compression::Off,
            &mut compressor,
        );
        let (header, good) = split(&encoded);
        assert!(FoldedBody::decode(&header, &good).is_ok());
        let table = header.table_bytes();
        let refused = |what: &str, change: &dyn Fn(&mut [u8])| {
            let mut bad = good.clone();
            change(&mut bad[table..]);
            assert!(FoldedBody::decode(&header, &bad).is_err(), "{what}");
        };
        refused("empty", &|body| body[4..8].fill(0));
        refused("backwards", &|body| body[24..28].fill(0));
        refused("overlapping", &|body| body[24..28].copy_from_slice(&1099u32.to_le_bytes()));
        refused("outside the data", &|body| body[24..28].fill(0xff));
        refused("longer than the data", &|body| body[28..32].fill(0xff));
        refused("a length that does not add up", &|body| body[28] ^= 1);
        refused("reserved bytes", &|body| body[12] = 1);
        refused("past every disk", &|body| body[16..24].fill(0xff));
        assert!(FoldedBody::decode(&header, &good[..good.len() - 1]).is_err(), "cut");
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

    /// Noise is told by a sample; a body of which only a part is noise is not.
    #[test]
    fn a_sample_decides() {
        let mut compressor = Compressor::default();
        let mut noise = vec![0; 1 << 20];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        let mut half = noise.clone();
        half[..1 << 19].fill(7);
        let chunks = |content: &[u8]| content.chunks(70_000).map(Bytes::copy_from_slice).collect();
        for level in [1, 9] {
            for (content, codec) in [(&noise, Codec::Plain), (&half, Codec::Zstd)] {
                let compression = Compression::Zstd(level);
                let encoded = sample(chunks(content)).encode(compression, &mut compressor);
                assert_eq!(encoded.header.codec, codec);
                let (header, plain) = split(&encoded);
                assert!(plain[header.table_bytes()..] == content[..]);
            }
        }
    }

    /// Of each write only what followed the place of a piece was looked at, eight times 512 bytes of a megabyte: what is
    /// alike in other writes was not seen.
    #[test]
    fn a_sample_reaches_over_small_writes() {
        let mut compressor = Compressor::default();
        let mut noise = vec![0; 512];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        let writes = vec![Bytes::from(noise); 2048];
        let encoded = sample(writes).encode(Compression::Zstd(1), &mut compressor);
        assert_eq!(encoded.header.codec, Codec::Zstd);
        assert!(encoded.wire_bytes() < 64 << 10, "{}", encoded.wire_bytes());
    }

    /// A batch of two thousand 512-byte writes was two thousand pieces for the transport, each of
    /// which held its part of the buffer that the writes had come in.
    #[test]
    fn tiny_pieces_are_gathered_and_large_ones_shared() {
        let mut compressor = Compressor::default();
        let buffer = Bytes::from((0..=255).cycle().take(1 << 20).collect::<Vec<u8>>());
        let pieces = |len: usize| (0..64).map(|i| buffer.slice(i * 8192..i * 8192 + len)).collect();
        let tiny = sample(pieces(512)).encode(Compression::Off, &mut compressor);
        assert_eq!(tiny.chunks(MachineIndex(0)).len(), 2, "the header and the body");
        assert!(tiny.held_bytes() < 64 * (512 + 64) + 256, "{}", tiny.held_bytes());
        let (header, plain) = split(&tiny);
        let (table, data) = plain.split_at(header.table_bytes());
        assert!(check_body(&header, table, data).is_ok());
        let large = sample(pieces(4096)).encode(Compression::Off, &mut compressor);
        let chunks = large.chunks(MachineIndex(0));
        assert_eq!(chunks.len(), 2 + 64);
        assert!(chunks[2..].iter().all(|piece| buffer.as_ptr_range().contains(&piece.as_ptr())));
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
