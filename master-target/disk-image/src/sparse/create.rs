//! New sparse extents.

use std::path::Path;

use crate::{
    error::{ErrorKind, ImageError, Result},
    image::SECTOR_BYTES,
    sparse::header::{
        ENTRIES_PER_TABLE, FLAG_LINE_ENDS, FLAG_REDUNDANT, FLAG_ZEROED_GRAINS, GRAIN_SECTORS,
        Header,
    },
    storage::Store,
};

/// Sectors that an embedded descriptor gets, as VMware's products give it.
pub(crate) const DESCRIPTOR_SECTORS: u64 = 20;

/// Where everything of a new extent goes.
pub(crate) fn layout(capacity_sectors: u64, has_descriptor: bool, zeroed_grains: bool) -> Header {
    let descriptor_sectors = if has_descriptor { DESCRIPTOR_SECTORS } else { 0 };
    let mut header = Header {
        version: if zeroed_grains { 2 } else { 1 },
        flags: FLAG_LINE_ENDS | FLAG_REDUNDANT | if zeroed_grains { FLAG_ZEROED_GRAINS } else { 0 },
        capacity_sectors,
        grain_sectors: GRAIN_SECTORS,
        descriptor_sector: if has_descriptor { 1 } else { 0 },
        descriptor_sectors,
        entries_per_table: ENTRIES_PER_TABLE,
        redundant_sector: 1 + descriptor_sectors,
        directory_sector: 0,
        overhead_sectors: 0,
        unclean: false,
        compression: 0,
    };
    let copy = copy_sectors(&header);
    header.directory_sector = header.redundant_sector + copy;
    header.overhead_sectors = (header.directory_sector + copy).next_multiple_of(GRAIN_SECTORS);
    header
}

/// Sectors of a directory and its tables.
pub(super) fn copy_sectors(header: &Header) -> u64 {
    let entries = header.directory_entries();
    (entries * 4).div_ceil(SECTOR_BYTES) + entries * header.table_sectors()
}

/// Fills an empty file: header, descriptor, both directories, both sets of tables (holes). Not
/// synced: the caller publishes the file.
pub(crate) fn write_empty(store: &Store, header: &Header, descriptor: &str) -> Result<()> {
    let room = header.descriptor_sectors * SECTOR_BYTES;
    if descriptor.len() as u64 > room {
        let sentence = format!(
            "its descriptor would have more than the {room} bytes kept for it; \
                                choose shorter names"
        );
        return Err(ImageError::new(ErrorKind::Invalid, &store.path, sentence));
    }
    store.set_length(header.overhead_sectors * SECTOR_BYTES)?;
    store.write(descriptor.as_bytes(), header.descriptor_sector * SECTOR_BYTES)?;
    for start in [header.redundant_sector, header.directory_sector] {
        write_directory(store, header, start)?;
    }
    store.write(&header.encode(), 0)
}

/// A directory whose tables follow it in order.
fn write_directory(store: &Store, header: &Header, start: u64) -> Result<()> {
    let entries = header.directory_entries();
    let tables = start + (entries * 4).div_ceil(SECTOR_BYTES);
    let last = tables + entries * header.table_sectors();
    if u32::try_from(last).is_err() {
        return Err(too_large(&store.path));
    }
    let bytes: Vec<u8> = (0..entries)
        .flat_map(|index| ((tables + index * header.table_sectors()) as u32).to_le_bytes())
        .collect();
    store.write(&bytes, start * SECTOR_BYTES)
}

fn too_large(path: &Path) -> ImageError {
    let sentence = "the disk is too large for one sparse extent; choose a flat kind";
    ImageError::new(ErrorKind::Invalid, path, sentence)
}
