//! The header of a hosted sparse extent. `FORMATS.md` has the table of its bytes.

use std::path::Path;

use crate::{
    descriptor::DESCRIPTOR_BYTES_MAX,
    error::{ErrorKind, ImageError, Result},
    image::{DISK_BYTES_MAX, SECTOR_BYTES},
};

/// `KDMV`, the first bytes of the file.
pub(crate) const MAGIC: &[u8; 4] = b"KDMV";

/// The directory is named by the footer at the end of the file.
pub(crate) const DIRECTORY_AT_END: u64 = u64::MAX;

/// Grain tables of VMware's products have this many entries.
pub(crate) const ENTRIES_PER_TABLE: u32 = 512;

/// Sectors of a grain in VMware's products: 64 KiB.
pub(crate) const GRAIN_SECTORS: u64 = 128;

/// Smallest grain that is read, 4 KiB: VMware allows no smaller one, and a check needs a bit of
/// memory for each grain that the file could hold.
pub(crate) const GRAIN_SECTORS_MIN: u64 = 8;

/// Largest grain that is read: a partial write of a new grain, and every compressed grain, needs
/// that much memory. VMware's largest is 64 KiB, qemu's default the same.
pub(crate) const GRAIN_SECTORS_MAX: u64 = (8 << 20) / SECTOR_BYTES;

/// Most entries of a grain table that is read; VMware has 512.
pub(crate) const ENTRIES_PER_TABLE_MAX: u32 = 4096;

/// Most entries of a grain directory that is read, 16 MiB of memory; 62 TiB in grains of 64 KiB
/// need 2,031,616.
pub(crate) const DIRECTORY_ENTRIES_MAX: u64 = 4 << 20;

pub(crate) const FLAG_LINE_ENDS: u32 = 1;
pub(crate) const FLAG_REDUNDANT: u32 = 1 << 1;
pub(crate) const FLAG_ZEROED_GRAINS: u32 = 1 << 2;
pub(crate) const FLAG_COMPRESSED: u32 = 1 << 16;
pub(crate) const FLAG_MARKERS: u32 = 1 << 17;

/// The byte that a writer sets while it works.
pub(crate) const UNCLEAN_OFFSET: u64 = 72;

/// A header whose numbers make sense together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) version: u32,
    pub(crate) flags: u32,
    pub(crate) capacity_sectors: u64,
    pub(crate) grain_sectors: u64,
    pub(crate) descriptor_sector: u64,
    pub(crate) descriptor_sectors: u64,
    pub(crate) entries_per_table: u32,
    pub(crate) redundant_sector: u64,
    pub(crate) directory_sector: u64,
    pub(crate) overhead_sectors: u64,
    pub(crate) unclean: bool,
    pub(crate) compression: u16,
}

impl Header {
    pub(crate) fn parse(bytes: &[u8; 512], path: &Path, at: u64) -> Result<Self> {
        let header = Self::parse_fields(bytes, path, at)?;
        header
            .judge_numbers(path)
            .and_then(|()| header.judge_overhead(path))
            .map_err(|error| error.at(at))?;
        Ok(header)
    }

    /// A header whose capacity, grains, tables and overhead may be anything: the file shows, perhaps, what
    /// they should be.
    pub(crate) fn parse_fields(bytes: &[u8; 512], path: &Path, at: u64) -> Result<Self> {
        let u32_at = |at: usize| u32::from_le_bytes(array(bytes, at));
        let u64_at = |at: usize| u64::from_le_bytes(array(bytes, at));
        let header = Self {
            version: u32_at(4),
            flags: u32_at(8),
            capacity_sectors: u64_at(12),
            grain_sectors: u64_at(20),
            descriptor_sector: u64_at(28),
            descriptor_sectors: u64_at(36),
            entries_per_table: u32_at(44),
            redundant_sector: u64_at(48),
            directory_sector: u64_at(56),
            overhead_sectors: u64_at(64),
            unclean: bytes[72] != 0,
            compression: u16::from_le_bytes(array(bytes, 77)),
        };
        let line_ends = &bytes[73..77];
        let damaged = |sentence: &str| ImageError::new(ErrorKind::Damaged, path, sentence).at(at);
        if &bytes[..4] != MAGIC {
            return Err(damaged("this is no sparse extent: it does not begin with KDMV"));
        }
        if header.flags & FLAG_LINE_ENDS != 0 && line_ends != b"\n \r\n" {
            return Err(damaged(
                "its line ends were changed, as a transfer in text mode does; \
                 copy it again from its source in binary mode",
            ));
        }
        let unsupported =
            |sentence: &str| ImageError::new(ErrorKind::Unsupported, path, sentence).at(at);
        if !(1..=3).contains(&header.version) {
            return Err(unsupported(
                "its header has a version other than 1, 2 and 3; convert it with \
                 the product that wrote it",
            ));
        }
        if header.descriptor_sectors > DESCRIPTOR_BYTES_MAX as u64 / SECTOR_BYTES {
            return Err(damaged("its header gives a descriptor of more than 4 MiB"));
        }
        if header.is_compressed() && header.compression != 1 {
            return Err(unsupported("its grains are compressed by an unknown algorithm"));
        }
        Ok(header)
    }

    /// Whether the numbers that divide the disk make sense together.
    pub(crate) fn judge_numbers(&self, path: &Path) -> Result<()> {
        let damaged =
            |sentence: &str| Err(ImageError::new(ErrorKind::Damaged, path, sentence).at(0));
        if self.capacity_sectors == 0 || self.capacity_sectors > DISK_BYTES_MAX / SECTOR_BYTES {
            return damaged("its header gives a capacity that is not between 1 sector and 62 TiB");
        }
        let sizes = GRAIN_SECTORS_MIN..=GRAIN_SECTORS_MAX;
        if !self.grain_sectors.is_power_of_two() || !sizes.contains(&self.grain_sectors) {
            return damaged(
                "its header gives a grain size that is no power of two from 4 KiB to 8 MiB",
            );
        }
        if !(1..=ENTRIES_PER_TABLE_MAX).contains(&self.entries_per_table) {
            return damaged("its header gives a grain table that has not 1 to 4096 entries");
        }
        if self.directory_entries() > DIRECTORY_ENTRIES_MAX {
            return damaged("its header needs a grain directory of more than 4194304 entries");
        }
        Ok(())
    }

    pub(crate) fn judge_overhead(&self, path: &Path) -> Result<()> {
        if self.overhead_sectors > u64::from(u32::MAX) {
            let sentence = "its header gives an overhead beyond what its tables can name";
            return Err(ImageError::new(ErrorKind::Damaged, path, sentence).at(0));
        }
        Ok(())
    }

    pub(crate) fn encode(&self) -> [u8; 512] {
        let mut bytes = [0; 512];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, MAGIC);
        put(4, &self.version.to_le_bytes());
        put(8, &self.flags.to_le_bytes());
        put(12, &self.capacity_sectors.to_le_bytes());
        put(20, &self.grain_sectors.to_le_bytes());
        put(28, &self.descriptor_sector.to_le_bytes());
        put(36, &self.descriptor_sectors.to_le_bytes());
        put(44, &self.entries_per_table.to_le_bytes());
        put(48, &self.redundant_sector.to_le_bytes());
        put(56, &self.directory_sector.to_le_bytes());
        put(64, &self.overhead_sectors.to_le_bytes());
        put(72, &[u8::from(self.unclean)]);
        put(73, b"\n \r\n");
        put(77, &self.compression.to_le_bytes());
        bytes
    }

    pub(crate) fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    /// Whether both pointers name one directory, so that there is one copy only.
    pub(crate) fn has_one_directory(&self) -> bool {
        self.has(FLAG_REDUNDANT) && self.redundant_sector == self.directory_sector
    }

    pub(crate) fn is_compressed(&self) -> bool {
        self.has(FLAG_COMPRESSED)
    }

    pub(crate) fn capacity_bytes(&self) -> u64 {
        self.capacity_sectors * SECTOR_BYTES
    }

    pub(crate) fn grain_bytes(&self) -> u64 {
        self.grain_sectors * SECTOR_BYTES
    }

    pub(crate) fn grains(&self) -> u64 {
        self.capacity_sectors.div_ceil(self.grain_sectors)
    }

    pub(crate) fn directory_entries(&self) -> u64 {
        self.grains().div_ceil(u64::from(self.entries_per_table))
    }

    pub(crate) fn table_sectors(&self) -> u64 {
        (u64::from(self.entries_per_table) * 4).div_ceil(SECTOR_BYTES)
    }
}

/// The first eight bytes of a marker.
pub(crate) fn first_eight(bytes: &[u8; 12]) -> [u8; 8] {
    let [first @ .., _, _, _, _] = *bytes;
    first
}

/// `N` bytes from `at` on; the callers' places are constants within the array.
pub(crate) fn array<const N: usize>(bytes: &[u8; 512], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Header {
        Header {
            version: 1,
            flags: FLAG_LINE_ENDS | FLAG_REDUNDANT,
            capacity_sectors: 20480,
            grain_sectors: 128,
            descriptor_sector: 1,
            descriptor_sectors: 20,
            entries_per_table: 512,
            redundant_sector: 21,
            directory_sector: 26,
            overhead_sectors: 128,
            unclean: false,
            compression: 0,
        }
    }

    #[test]
    fn headers_round_trip() {
        let parsed = Header::parse(&good().encode(), Path::new("x"), 0).unwrap();
        assert_eq!(parsed, good());
    }

    #[test]
    fn absurd_numbers_are_refused() {
        let bad: [fn(&mut Header); 9] = [
            |h| h.overhead_sectors = u64::MAX,
            |h| h.version = 4,
            |h| h.capacity_sectors = 0,
            |h| h.capacity_sectors = u64::MAX,
            |h| h.grain_sectors = 96,
            |h| h.grain_sectors = 1 << 63,
            |h| h.entries_per_table = 0,
            |h| h.descriptor_sectors = u64::MAX,
            |h| h.flags |= FLAG_COMPRESSED,
        ];
        for change in bad {
            let mut header = good();
            change(&mut header);
            assert!(Header::parse(&header.encode(), Path::new("x"), 0).is_err(), "{header:?}");
        }
    }
}
