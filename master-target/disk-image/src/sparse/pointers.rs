//! The header's two pointers to the grain directories: the header has no copy, but every known
//! writer puts what they name at places that follow from each other.

use crate::{
    image::SECTOR_BYTES,
    sparse::{
        create::copy_sectors,
        header::{FLAG_MARKERS, FLAG_REDUNDANT, Header},
        tables::{MISSING, words},
    },
    storage::Store,
};

/// Entries that are looked at to tell a directory: 16 KiB are read for each of few places.
const ENTRIES_SEEN_MAX: u64 = 4096;

/// Where the header keeps the pointers.
const REDUNDANT_OFFSET: u64 = 48;
const PRIMARY_OFFSET: u64 = 56;

/// A pointer of the header that leads to no directory, while one stands where it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Misled {
    /// Byte of the file where the pointer is.
    pub(crate) offset: u64,
    /// The sector that it names.
    pub(crate) found: u64,
    /// The sector that it should name.
    pub(crate) right: u64,
}

impl Misled {
    pub(crate) fn sentence(&self) -> String {
        let which = if self.offset == REDUNDANT_OFFSET { "redundant" } else { "primary" };
        format!(
            "the header says that the {which} grain directory is at sector {}, where none is, but \
             it is at sector {}",
            self.found, self.right
        )
    }
}

/// The pointers that are wrong beyond doubt; they are put right in `header`, not in the file.
pub(crate) fn correct(store: &Store, header: &mut Header) -> Vec<Misled> {
    let mut misled = Vec::new();
    if header.has(FLAG_MARKERS) {
        // A stream's directory is found by its footer.
        return misled;
    }
    let copy = copy_sectors(header);
    let first = (header.descriptor_sector.saturating_add(header.descriptor_sectors)).max(1);
    let (redundant, primary) = (header.redundant_sector, header.directory_sector);
    let right_place = |found: u64, places: &[Option<u64>]| {
        if is_directory(store, header, found) {
            return None;
        }
        let mut places = places.iter().flatten().copied();
        places.find(|place| *place != found && is_directory(store, header, *place))
    };
    let behind = first.checked_add(copy);
    let (places, right_redundant) = match header.has(FLAG_REDUNDANT) {
        true => {
            let places = [primary.checked_sub(copy), Some(first)];
            ([redundant.checked_add(copy), behind], right_place(redundant, &places))
        }
        false => ([Some(first), behind], None),
    };
    let right_primary = right_place(primary, &places);
    if let Some(right) = right_redundant.filter(|right| *right != primary) {
        misled.push(Misled { offset: REDUNDANT_OFFSET, found: redundant, right });
        header.redundant_sector = right;
    }
    if let Some(right) = right_primary.filter(|right| *right != header.redundant_sector) {
        misled.push(Misled { offset: PRIMARY_OFFSET, found: primary, right });
        header.directory_sector = right;
    }
    misled
}

/// Whether a directory stands there whose tables follow it in order, as far as it names any; some
/// may have been given another place by a repair. Grains, texts and zeros do not look like that.
fn is_directory(store: &Store, header: &Header, sector: u64) -> bool {
    let entries = header.directory_entries();
    let tables = sector.checked_add((entries * 4).div_ceil(SECTOR_BYTES));
    let (Some(at), Some(tables)) = (sector.checked_mul(SECTOR_BYTES), tables) else { return false };
    let length = (entries.min(ENTRIES_SEEN_MAX) * 4) as usize;
    if sector == 0 || store.length().is_ok_and(|file| at.saturating_add(length as u64) > file) {
        return false;
    }
    let Ok(bytes) = store.read_vec(at, length) else { return false };
    let (mut named, mut regular) = (0_u64, 0_u64);
    for (index, entry) in (0..).zip(words(&bytes)).filter(|(_, entry)| *entry != MISSING) {
        named += 1;
        regular +=
            u64::from(tables.checked_add(index * header.table_sectors()) == Some(u64::from(entry)));
    }
    regular > 0 && regular * 2 >= named
}
