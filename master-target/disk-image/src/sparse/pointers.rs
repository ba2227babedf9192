//! What the header says of which there is no copy, but that follows from other things; of that, the two
//! pointers to the grain directories, which every known writer puts at places that follow from each other.

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

/// Where the header keeps what may be wrong.
pub(crate) const CAPACITY_OFFSET: u64 = 12;
pub(crate) const GRAIN_OFFSET: u64 = 20;
pub(crate) const ENTRIES_OFFSET: u64 = 44;
const REDUNDANT_OFFSET: u64 = 48;
const PRIMARY_OFFSET: u64 = 56;
pub(crate) const OVERHEAD_OFFSET: u64 = 64;
pub(crate) const COMPRESSION_OFFSET: u64 = 77;

/// A field of the header that is contradicted, and what it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Misled {
    /// Byte of the file where the field is.
    pub(crate) offset: u64,
    /// What is there.
    pub(crate) found: u64,
    /// What should be there; where that is unknown, what contradicts it.
    pub(crate) right: u64,
    pub(crate) cure: Cure,
}

/// What is to be done about a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cure {
    /// The header is wrong beyond doubt.
    Header,
    /// A writer's way, which harms nobody.
    NotNeeded,
    /// Nothing tells what is right.
    Unknown,
}

impl Misled {
    pub(crate) fn sentence(&self) -> String {
        let (found, right) = (self.found, self.right);
        let which = match (self.offset, self.cure) {
            (CAPACITY_OFFSET, Cure::Unknown) => {
                return format!(
                    "the header says that the extent holds {found} sectors of the disk, but its \
                     descriptor says {right}, which the grain directories do not bear out; if the \
                     header is right, correct the descriptor"
                );
            }
            (CAPACITY_OFFSET, Cure::NotNeeded) => {
                return format!(
                    "the header says that the extent holds {found} sectors of the disk, whole grains, \
                     and its descriptor says {right}, which counts"
                );
            }
            (CAPACITY_OFFSET, Cure::Header) => {
                return format!(
                    "the header says that the extent holds {found} sectors of the disk, but its \
                     descriptor says {right}"
                );
            }
            (GRAIN_OFFSET, _) => {
                return format!(
                    "the header says that a grain has {found} sectors, but the grain directories stand \
                     as they do for {right}"
                );
            }
            (ENTRIES_OFFSET, _) => {
                return format!(
                    "the header says that a grain table has {found} entries, but the grain directories \
                     stand as they do for {right}"
                );
            }
            (OVERHEAD_OFFSET, Cure::Unknown) => {
                return format!(
                    "the header says that the grains begin at sector {found}, but the file has {right} \
                     sectors; restore its end, or correct the header"
                );
            }
            (OVERHEAD_OFFSET, _) => {
                return format!(
                    "the header says that the grains begin at sector {found}, but the tables say that \
                     they begin at {right}"
                );
            }
            (COMPRESSION_OFFSET, _) => {
                return format!(
                    "the header names a compression, {found}, but its flags say that grains are not \
                     compressed, which is {right}"
                );
            }
            (REDUNDANT_OFFSET, _) => "redundant",
            _ => "primary",
        };
        format!(
            "the header says that the {which} grain directory is at sector {found}, where it is not: it is \
             at sector {right}"
        )
    }

    /// What a repair does.
    pub(crate) fn mend(&self) -> String {
        let what = match self.offset {
            CAPACITY_OFFSET => "capacity in the header",
            GRAIN_OFFSET => "size of a grain in the header",
            ENTRIES_OFFSET => "entries of a grain table in the header",
            OVERHEAD_OFFSET => "place of the first grain in the header",
            COMPRESSION_OFFSET => "compression in the header",
            _ => "header's pointer to a grain directory",
        };
        format!("correct the {what}: {}", self.right)
    }

    /// What a repair writes at its offset: as many bytes as the field has.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let length = match self.offset {
            ENTRIES_OFFSET => 4,
            COMPRESSION_OFFSET => 2,
            _ => 8,
        };
        self.right.to_le_bytes()[..length].to_vec()
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
        misled.push(Misled {
            offset: REDUNDANT_OFFSET,
            found: redundant,
            right,
            cure: Cure::Header,
        });
        header.redundant_sector = right;
    }
    if let Some(right) = right_primary.filter(|right| *right != header.redundant_sector) {
        misled.push(Misled { offset: PRIMARY_OFFSET, found: primary, right, cure: Cure::Header });
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
        return Some(Misled { offset: PRIMARY_OFFSET, found, right, cure: Cure::Header });
    }
    let right = found.checked_sub(copy).filter(stands)?;
    header.redundant_sector = right;
    Some(Misled { offset: REDUNDANT_OFFSET, found, right, cure: Cure::Header })
}

/// Whether a pointer leads to a directory.
pub(crate) fn names_a_directory(store: &Store, header: &Header) -> bool {
    is_directory(store, header, header.directory_sector)
        || header.has(FLAG_REDUNDANT) && is_directory(store, header, header.redundant_sector)
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
