//! What the header says of which there is no copy, but that follows from other things: the two pointers to
//! the grain directories, which every known writer puts at places that follow from each other, and the
//! capacity, which the descriptor has as well.

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

/// Where the header keeps the capacity and the pointers.
const CAPACITY_OFFSET: u64 = 12;
const REDUNDANT_OFFSET: u64 = 48;
const PRIMARY_OFFSET: u64 = 56;

/// A field of the header that is wrong beyond doubt, and what it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Misled {
    /// Byte of the file where the field is.
    pub(crate) offset: u64,
    /// What is there: a sector, or a number of them.
    pub(crate) found: u64,
    /// What should be there.
    pub(crate) right: u64,
}

impl Misled {
    pub(crate) fn sentence(&self) -> String {
        let (found, right) = (self.found, self.right);
        let which = match self.offset {
            CAPACITY_OFFSET => {
                return format!(
                    "the header says that the extent holds {found} sectors of the disk, but its \
                     descriptor says {right}"
                );
            }
            REDUNDANT_OFFSET => "redundant",
            _ => "primary",
        };
        format!(
            "the header says that the {which} grain directory is at sector {found}, where it is not: it is \
             at sector {right}"
        )
    }

    /// What a repair does.
    pub(crate) fn mend(&self) -> String {
        match self.offset {
            CAPACITY_OFFSET => format!("correct the capacity in the header: {}", self.right),
            _ => format!("correct the header's pointer to a grain directory: {}", self.right),
        }
    }
}

/// Puts the capacity in `header` right where it is not that of the descriptor, `line_sectors`, and the
/// directories stand as they do for the descriptor's; an extent that claims more than its descriptor uses
/// is work for nothing in any case.
pub(crate) fn correct_capacity(header: &mut Header, line_sectors: u64) -> Option<Misled> {
    let by_line = Header { capacity_sectors: line_sectors, ..*header };
    if line_sectors == 0 || header.has(FLAG_MARKERS) || by_line.grains() == header.grains() {
        return None;
    }
    let stands = |header: &Header| {
        header.redundant_sector.checked_add(copy_sectors(header)) == Some(header.directory_sector)
    };
    let is_right = header.has(FLAG_REDUNDANT) && stands(&by_line);
    let is_embedded = header.descriptor_sectors > 0;
    if !is_right && (is_embedded || header.capacity_sectors < line_sectors) {
        return None;
    }
    let found = std::mem::replace(&mut header.capacity_sectors, line_sectors);
    Some(Misled { offset: CAPACITY_OFFSET, found, right: line_sectors })
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
    if header.has_one_directory() && is_directory(store, header, header.directory_sector) {
        misled.extend(part(store, header, copy));
        return misled;
    }
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

/// Where both pointers name one directory, and the other one stands behind it or before it.
fn part(store: &Store, header: &mut Header, copy: u64) -> Option<Misled> {
    let found = header.directory_sector;
    let stands = |sector: &u64| is_directory(store, header, *sector);
    if let Some(right) = found.checked_add(copy).filter(stands) {
        header.directory_sector = right;
        return Some(Misled { offset: PRIMARY_OFFSET, found, right });
    }
    let right = found.checked_sub(copy).filter(stands)?;
    header.redundant_sector = right;
    Some(Misled { offset: REDUNDANT_OFFSET, found, right })
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
