//! Header, footer and descriptor, read from a sparse file.

use crate::{
    descriptor::Descriptor,
    error::{ErrorKind, ImageError, Result},
    image::SECTOR_BYTES,
    sparse::header::{DIRECTORY_AT_END, Header},
    storage::Store,
};

/// The header at byte `at`.
pub(crate) fn read_header(store: &Store, at: u64) -> Result<Header> {
    let mut bytes = [0; 512];
    store.read(&mut bytes, at)?;
    Header::parse(&bytes, &store.path, at)
}

/// The header in front, whose numbers are still to be held against the file.
pub(crate) fn read_fields(store: &Store) -> Result<Header> {
    let mut bytes = [0; 512];
    store.read(&mut bytes, 0)?;
    Header::parse_fields(&bytes, &store.path, 0)
}

/// The header that stands at the end of the file, between its marker and the end of the stream.
pub(crate) fn read_footer(store: &Store, header: &Header) -> Result<Header> {
    let length = store.length()?;
    let missing = |at: u64| {
        let sentence = "the stream ends without its footer, so its writer was interrupted; \
                        export the disk again, or repair the image";
        ImageError::new(ErrorKind::Damaged, &store.path, sentence).at(at)
    };
    let at = length.checked_sub(2 * SECTOR_BYTES).ok_or_else(|| missing(0))?;
    // Some writers pad the file, so the footer is looked for in the last sectors.
    let lowest = at.saturating_sub(FOOTER_SEARCH_SECTORS * SECTOR_BYTES).max(SECTOR_BYTES);
    let mut place = at - at % SECTOR_BYTES;
    while place >= lowest {
        if let Ok(footer) = read_header(store, place)
            && footer.directory_sector != DIRECTORY_AT_END
            && footer.capacity_sectors == header.capacity_sectors
            && footer.grain_sectors == header.grain_sectors
        {
            return Ok(footer);
        }
        place -= SECTOR_BYTES;
    }
    Err(missing(at))
}

/// Sectors before the end in which a footer is looked for: transfers pad to 64 KiB at most.
const FOOTER_SEARCH_SECTORS: u64 = 128;

/// The descriptor in a sparse file; none where the header names none or it is empty.
pub(crate) fn read_descriptor(store: &Store, header: &Header) -> Result<Option<Descriptor>> {
    if header.descriptor_sector == 0 || header.descriptor_sectors == 0 {
        return Ok(None);
    }
    let at = header.descriptor_sector.saturating_mul(SECTOR_BYTES);
    // The header's bound keeps this at 4 MiB.
    let bytes = store.read_vec(at, (header.descriptor_sectors * SECTOR_BYTES) as usize)?;
    if bytes.first() == Some(&0) {
        return Ok(None);
    }
    let parsed = Descriptor::parse(&bytes).map_err(|error| {
        ImageError::new(ErrorKind::Damaged, &store.path, error.to_string()).at(at)
    })?;
    Ok(Some(parsed))
}
