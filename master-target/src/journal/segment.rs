//! The header of a segment, and the names of a journal's files.

use backhaul_proto::id::{BatchSeq, Generation, MachineName, WriteSeq};

use crate::storage::{AlignedBuf, PAGE_BYTES};

/// Where the first record of a segment starts.
pub(crate) const SEGMENT_HEADER_BYTES: u64 = PAGE_BYTES as u64;

const MAGIC: [u8; 8] = *b"BHJSEG1\0";
const VERSION: u32 = 1;
const HASHED_BYTES: usize = 96;

/// The place of a segment in a journal; a later segment has a higher one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub(crate) struct SegmentNumber(pub(crate) u64);

/// A machine, as the journal's files name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MachineTag([u8; 16]);

/// What the frames of a segment are hashed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SegmentKey([u8; 32]);

/// The header of a segment. `JOURNAL.md` has the byte table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SegmentHeader {
    pub(crate) number: SegmentNumber,
    pub(crate) generation: Generation,
    pub(crate) first_batch: BatchSeq,
    pub(crate) first_write: WriteSeq,
    pub(crate) durable: BatchSeq,
    pub(crate) segment_bytes: u64,
    pub(crate) machine: MachineTag,
    pub(crate) nonce: [u8; 16],
}

impl MachineTag {
    pub(crate) fn of(name: &MachineName) -> Self {
        let hash = blake3::hash(name.as_str().as_bytes());
        let mut tag = [0; 16];
        tag.copy_from_slice(&hash.as_bytes()[..16]);
        Self(tag)
    }

    pub(crate) fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    pub(crate) fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }
}

impl SegmentKey {
    pub(crate) fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl SegmentNumber {
    pub(crate) fn file_name(self) -> String {
        format!("{:016x}.segment", self.0)
    }

    pub(crate) fn free_name(self) -> String {
        format!("free-{:016x}", self.0)
    }

    /// The number in the name of a segment in use.
    pub(crate) fn parse(name: &str) -> Option<Self> {
        Self::hex(name.strip_suffix(".segment")?)
    }

    /// The number in the name of a free segment.
    pub(crate) fn parse_free(name: &str) -> Option<Self> {
        Self::hex(name.strip_prefix("free-")?)
    }

    fn hex(text: &str) -> Option<Self> {
        let plain = text.len() == 16 && text.bytes().all(|c| c.is_ascii_hexdigit());
        if plain { u64::from_str_radix(text, 16).ok().map(Self) } else { None }
    }
}

impl SegmentHeader {
    /// The header page, and the key that follows from it.
    pub(crate) fn encode(&self) -> (AlignedBuf, SegmentKey) {
        let mut page = AlignedBuf::zeroed(PAGE_BYTES);
        page[..8].copy_from_slice(&MAGIC);
        page[8..12].copy_from_slice(&VERSION.to_le_bytes());
        let numbers = [
            self.number.0,
            self.generation.0,
            self.first_batch.0,
            self.first_write.0,
            self.durable.0,
            self.segment_bytes,
        ];
        for (i, number) in numbers.into_iter().enumerate() {
            page[16 + 8 * i..24 + 8 * i].copy_from_slice(&number.to_le_bytes());
        }
        page[64..80].copy_from_slice(self.machine.as_bytes());
        page[80..96].copy_from_slice(&self.nonce);
        let key = *blake3::hash(&page[..HASHED_BYTES]).as_bytes();
        page[HASHED_BYTES..HASHED_BYTES + 32].copy_from_slice(&key);
        (page, SegmentKey(key))
    }

    /// The header in a page, if it is one of this machine and version.
    pub(crate) fn decode(page: &[u8], machine: MachineTag) -> Option<(Self, SegmentKey)> {
        let page = page.get(..PAGE_BYTES)?;
        let key = *blake3::hash(&page[..HASHED_BYTES]).as_bytes();
        let u64_at = |at: usize| Some(u64::from_le_bytes(page[at..at + 8].try_into().ok()?));
        let header = Self {
            number: SegmentNumber(u64_at(16)?),
            generation: Generation(u64_at(24)?),
            first_batch: BatchSeq(u64_at(32)?),
            first_write: WriteSeq(u64_at(40)?),
            durable: BatchSeq(u64_at(48)?),
            segment_bytes: u64_at(56)?,
            machine: MachineTag::from_bytes(page[64..80].try_into().ok()?),
            nonce: page[80..96].try_into().ok()?,
        };
        let valid = page[..8] == MAGIC
            && page[8..12] == VERSION.to_le_bytes()
            && page[HASHED_BYTES..HASHED_BYTES + 32] == key
            && header.machine == machine;
        valid.then_some((header, SegmentKey(key)))
    }
}

#[cfg(test)]
mod tests {
    use backhaul_proto::id::{BatchSeq, Generation, WriteSeq};

    use super::{MachineTag, SegmentHeader, SegmentNumber};

    fn sample() -> SegmentHeader {
        SegmentHeader {
            number: SegmentNumber(0x1122),
            generation: Generation(3),
            first_batch: BatchSeq(4),
            first_write: WriteSeq(5),
            durable: BatchSeq(2),
            segment_bytes: 64 << 20,
            machine: MachineTag::of(&"web01".parse().unwrap()),
            nonce: [7; 16],
        }
    }

    /// The bytes are frozen: a journal written today must be read by every later version.
    #[test]
    fn bytes_are_frozen() {
        let (page, _) = sample().encode();
        let hex: String = page[..64].iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, FROZEN);
    }

    const FROZEN: &str = "42484a53454731000100000000000000221100000000000003000000000000000400000000000000050000000000000002000000000000000000000400000000";

    #[test]
    fn every_flipped_bit_is_found() {
        let header = sample();
        let (good, key) = header.encode();
        assert_eq!(SegmentHeader::decode(&good, header.machine), Some((header.clone(), key)));
        for bit in 0..128 * 8 {
            let mut bad = good.to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(SegmentHeader::decode(&bad, header.machine), None, "bit {bit}");
        }
        let other = MachineTag::of(&"web02".parse().unwrap());
        assert_eq!(SegmentHeader::decode(&good, other), None);
    }

    #[test]
    fn names_are_read_back() {
        let number = SegmentNumber(255);
        assert_eq!(SegmentNumber::parse(&number.file_name()), Some(number));
        assert_eq!(SegmentNumber::parse_free(&number.free_name()), Some(number));
        for name in ["damaged-00000000000000ff.segment", "+0000000000000ff.segment", "x.segment"] {
            assert_eq!(SegmentNumber::parse(name), None, "{name}");
        }
    }
}
