//! Writing streamOptimized: grains in order, each compressed, tables after the grains that they
//! name, the directory and the footer last. Nothing is written twice but the header's neighbours.

use flate2::{Compress, Compression, FlushCompress, Status};

use crate::{
    create::{CreateOptions, describe},
    error::{ErrorKind, ImageError, Result},
    image::SECTOR_BYTES,
    sparse::{
        create::DESCRIPTOR_SECTORS,
        header::{
            DIRECTORY_AT_END, ENTRIES_PER_TABLE, FLAG_COMPRESSED, FLAG_LINE_ENDS, FLAG_MARKERS,
            GRAIN_SECTORS, Header,
        },
        inflate::MARKER_BYTES,
    },
    storage::Store,
};

/// Bytes of an uncompressed grain.
pub(crate) const GRAIN_BYTES: usize = (GRAIN_SECTORS * SECTOR_BYTES) as usize;

/// Bytes that are gathered before they are written.
const BUFFER_BYTES: usize = 1 << 20;

/// Kinds of marker (the second word of a marker whose data length is zero).
pub(crate) const MARKER_TABLE: u32 = 1;
pub(crate) const MARKER_DIRECTORY: u32 = 2;
pub(crate) const MARKER_FOOTER: u32 = 3;

/// Writes one stream.
pub(crate) struct StreamWriter<'a> {
    store: &'a Store,
    header: Header,
    buffer: Vec<u8>,
    /// Where in the file the buffer begins.
    buffer_at: u64,
    directory: Vec<u32>,
    /// The table being filled, and its number.
    table: Vec<u32>,
    index: usize,
    next_grain: u64,
}

impl<'a> StreamWriter<'a> {
    /// Writes header and descriptor. `name` is what the descriptor calls its extent.
    pub(crate) fn start(store: &'a Store, name: &str, options: &CreateOptions) -> Result<Self> {
        let capacity_sectors = options.size_bytes / SECTOR_BYTES;
        let header = Header {
            version: 3,
            flags: FLAG_LINE_ENDS | FLAG_COMPRESSED | FLAG_MARKERS,
            capacity_sectors,
            grain_sectors: GRAIN_SECTORS,
            descriptor_sector: 1,
            descriptor_sectors: DESCRIPTOR_SECTORS,
            entries_per_table: ENTRIES_PER_TABLE,
            redundant_sector: 0,
            directory_sector: DIRECTORY_AT_END,
            overhead_sectors: GRAIN_SECTORS,
            unclean: false,
            compression: 1,
        };
        let extents = vec![(capacity_sectors, name.to_owned())];
        let text = describe(&store.path, options, extents, None)?;
        if text.len() as u64 > DESCRIPTOR_SECTORS * SECTOR_BYTES {
            let sentence = "its descriptor would be too long; choose a shorter name";
            return Err(ImageError::new(ErrorKind::Invalid, &store.path, sentence));
        }
        let mut buffer = header.encode().to_vec();
        buffer.extend_from_slice(text.as_bytes());
        buffer.resize(GRAIN_BYTES, 0);
        Ok(Self {
            store,
            buffer,
            buffer_at: 0,
            directory: vec![0; header.directory_entries() as usize],
            table: Vec::new(),
            index: 0,
            next_grain: 0,
            header,
        })
    }

    /// Appends grain number `grain`, which must be higher than all before it.
    pub(crate) fn append(&mut self, grain: u64, compressed: &[u8]) -> Result<()> {
        debug_assert!(grain >= self.next_grain);
        self.next_grain = grain + 1;
        let per_table = u64::from(ENTRIES_PER_TABLE);
        let index = (grain / per_table) as usize;
        if index != self.index {
            self.end_table()?;
            self.index = index;
        }
        let sector = self.here()?;
        self.table.resize(ENTRIES_PER_TABLE as usize, 0);
        self.table[(grain % per_table) as usize] = sector;
        self.buffer.extend_from_slice(&(grain * GRAIN_SECTORS).to_le_bytes());
        self.buffer.extend_from_slice(&(compressed.len() as u32).to_le_bytes());
        self.buffer.extend_from_slice(compressed);
        self.pad();
        self.write_full()
    }

    /// Writes the last table, the directory and the footer. The caller syncs.
    pub(crate) fn finish(mut self) -> Result<()> {
        self.end_table()?;
        let sectors = (self.directory.len() as u64 * 4).div_ceil(SECTOR_BYTES);
        self.marker(sectors, MARKER_DIRECTORY);
        let directory_sector = u64::from(self.here()?);
        let bytes: Vec<u8> = self.directory.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        self.buffer.extend_from_slice(&bytes);
        self.pad();
        self.marker(1, MARKER_FOOTER);
        let footer = Header { directory_sector, ..self.header };
        self.buffer.extend_from_slice(&footer.encode());
        // The end of the stream is a marker of zeros.
        self.marker(0, 0);
        self.store.write(&self.buffer, self.buffer_at)
    }

    fn end_table(&mut self) -> Result<()> {
        if self.table.is_empty() {
            return Ok(());
        }
        self.marker(u64::from(ENTRIES_PER_TABLE) * 4 / SECTOR_BYTES, MARKER_TABLE);
        self.directory[self.index] = self.here()?;
        let bytes: Vec<u8> = self.table.drain(..).flat_map(u32::to_le_bytes).collect();
        self.buffer.extend_from_slice(&bytes);
        self.write_full()
    }

    fn marker(&mut self, sectors: u64, kind: u32) {
        self.buffer.extend_from_slice(&marker(sectors, kind));
    }

    /// The sector that the next byte belongs to.
    fn here(&self) -> Result<u32> {
        let sector = (self.buffer_at + self.buffer.len() as u64) / SECTOR_BYTES;
        u32::try_from(sector).map_err(|_| {
            let sentence = "the compressed disk needs more than the 2 TiB that its tables can name; \
                            choose another kind";
            ImageError::new(ErrorKind::Full, &self.store.path, sentence)
        })
    }

    fn pad(&mut self) {
        self.buffer.resize(self.buffer.len().next_multiple_of(SECTOR_BYTES as usize), 0);
    }

    fn write_full(&mut self) -> Result<()> {
        if self.buffer.len() >= BUFFER_BYTES {
            self.store.write(&self.buffer, self.buffer_at)?;
            self.buffer_at += self.buffer.len() as u64;
            self.buffer.clear();
        }
        Ok(())
    }
}

/// A marker that is not a grain's.
pub(crate) fn marker(sectors: u64, kind: u32) -> [u8; 512] {
    let mut bytes = [0; 512];
    bytes[..8].copy_from_slice(&sectors.to_le_bytes());
    bytes[MARKER_BYTES as usize..16].copy_from_slice(&kind.to_le_bytes());
    bytes
}

/// Compresses grains; reuses its memory.
pub(crate) struct Deflater {
    compress: Compress,
}

impl Deflater {
    pub(crate) fn new(level: u32) -> Self {
        Self { compress: Compress::new(Compression::new(level.clamp(1, 9)), true) }
    }

    /// Never much larger than the grain: what does not get smaller is stored.
    pub(crate) fn deflate(&mut self, grain: &[u8]) -> Vec<u8> {
        self.compress.reset();
        let bytes = deflate_with(&mut self.compress, grain);
        // The fastest level makes noise an eighth larger, which readers need not expect.
        if bytes.len() <= grain.len() {
            return bytes;
        }
        deflate_with(&mut Compress::new(Compression::none(), true), grain)
    }
}

fn deflate_with(compress: &mut Compress, grain: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(grain.len() + grain.len() / 8 + 1024);
    loop {
        let taken = compress.total_in() as usize;
        let status = compress.compress_vec(&grain[taken..], &mut bytes, FlushCompress::Finish);
        if matches!(status, Ok(Status::StreamEnd)) {
            return bytes;
        }
        bytes.reserve(grain.len() / 8 + 1024);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sparse::inflate::inflate;

    #[test]
    fn every_level_can_be_inflated_and_noise_hardly_grows() {
        let mut state = 88_172_645_463_325_252_u64;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .take(GRAIN_BYTES)
        .collect();
        let text: Vec<u8> = b"abcdefgh".repeat(GRAIN_BYTES / 8);
        for level in 1..=9 {
            let mut deflater = Deflater::new(level);
            for grain in [&noise, &text, &noise, &vec![0; GRAIN_BYTES]] {
                let bytes = deflater.deflate(grain);
                assert!(bytes.len() <= GRAIN_BYTES + 64, "level {level}: {}", bytes.len());
                assert!(&inflate(&bytes, GRAIN_BYTES, GRAIN_BYTES).unwrap() == grain);
            }
        }
    }
}
