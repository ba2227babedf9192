//! The numbers of the header that divide the disk - the capacity, the size of a grain, the entries of a
//! table, the overhead - held against the directories. They have no copy; but where the tables stand, and
//! how many the directories name, follows from them, so that a number that is wrong shows, and in most
//! cases which one would be right.

use crate::{
    error::{ErrorKind, ImageError, Result},
    image::SECTOR_BYTES,
    sparse::{
        create::copy_sectors,
        header::{
            ENTRIES_PER_TABLE, FLAG_MARKERS, FLAG_REDUNDANT, GRAIN_SECTORS, GRAIN_SECTORS_MAX,
            GRAIN_SECTORS_MIN, Header,
        },
        pointers::{
            self, CAPACITY_OFFSET, COMPRESSION_OFFSET, Cure, ENTRIES_OFFSET, GRAIN_OFFSET, Misled,
            OVERHEAD_OFFSET,
        },
        tables::words,
    },
    storage::Store,
};

/// Sectors of a directory that are read to tell it, and its last one: 4096 entries.
const SECTORS_SEEN_MAX: u64 = 32;

/// Puts right in `header`, not in the file, what the file itself and the descriptor's `line_sectors`
/// contradict; returns what that is. The numbers of `header` may be anything.
///
/// # Errors
/// A number is contradicted, and nothing tells the right one.
pub(crate) fn correct(
    store: &Store,
    header: &mut Header,
    line_sectors: u64,
) -> Result<Vec<Misled>> {
    let found = *header;
    if found.has(FLAG_MARKERS) {
        // Of a stream, the footer is the other copy.
        header.judge_numbers(&store.path)?;
        header.judge_overhead(&store.path)?;
        return Ok(Vec::new());
    }
    let mut misled = Vec::new();
    *header = choose(store, &found, line_sectors)?;
    let mut differ = |offset, found: u64, right: u64| {
        if found != right {
            misled.push(Misled { offset, found, right, cure: Cure::Header });
        }
    };
    let entries = [found, *header].map(|header| u64::from(header.entries_per_table));
    differ(ENTRIES_OFFSET, entries[0], entries[1]);
    differ(GRAIN_OFFSET, found.grain_sectors, header.grain_sectors);
    if !found.is_compressed() {
        differ(COMPRESSION_OFFSET, u64::from(found.compression), 0);
        header.compression = 0;
    }
    let (capacity, right) = (found.capacity_sectors, header.capacity_sectors);
    // VirtualBox gives the header whole grains, and the descriptor the size of the disk.
    let is_rounded = capacity == right.next_multiple_of(header.grain_sectors);
    let cure = if is_rounded { Cure::NotNeeded } else { Cure::Header };
    let (right, cure) = match line_sectors == 0 || right == line_sectors {
        true => (right, cure),
        false => (line_sectors, Cure::Unknown),
    };
    if capacity != right {
        misled.push(Misled { offset: CAPACITY_OFFSET, found: capacity, right, cure });
    }
    misled.extend(pointers::correct(store, header));
    misled.extend(correct_overhead(store, header));
    header.judge_overhead(&store.path)?;
    Ok(misled)
}

/// The header with the capacity, the grains and the tables that the directories bear out. Of the two numbers
/// besides the capacity, one is wrong at most; where both are, nothing is derived.
fn choose(store: &Store, found: &Header, line_sectors: u64) -> Result<Header> {
    let by_line = match line_sectors {
        0 => *found,
        _ => Header { capacity_sectors: line_sectors, ..*found },
    };
    // Tables of other numbers of entries exist on paper only. Those of 511 stand as those of 512 do.
    let known = Header { entries_per_table: ENTRIES_PER_TABLE, ..by_line };
    let refuse = |field: &str, number: u64, usual: u64, offset: u64| {
        let sentence = format!(
            "its header says that {field} {number}; its grain directories and the overhead bear out \
             neither that nor {usual}, which is usual; restore the image, or correct the header"
        );
        Err(ImageError::new(ErrorKind::Damaged, &store.path, sentence).at(offset))
    };
    let refuse_grain =
        || refuse("the sectors of a grain are", found.grain_sectors, GRAIN_SECTORS, GRAIN_OFFSET);
    let is_by_line = is_exact(store, &by_line);
    let is_apart =
        |header: &Header| with_pointers(store, header).is_some_and(|right| stands_apart(&right));
    if is_exact(store, &known) && !(is_by_line && is_apart(&by_line) && !is_apart(&known)) {
        return as_the_overhead_says(store, known).map_or_else(refuse_grain, Ok);
    }
    if is_by_line {
        return Ok(by_line);
    }
    // The descriptor is what is wrong, and no reason to look for other grains.
    if is_exact(store, found) {
        return Ok(*found);
    }
    if let Some(right) = other_grains(store, &by_line) {
        return Ok(right);
    }
    found.judge_numbers(&store.path)?;
    let (entries, usual) = (found.entries_per_table, u64::from(ENTRIES_PER_TABLE));
    if entries != ENTRIES_PER_TABLE {
        let field = "the entries of a grain table are";
        return refuse(field, entries.into(), usual, ENTRIES_OFFSET);
    }
    let is_likely = |header: &Header| {
        let header = with_pointers(store, header);
        header.is_some_and(|header| {
            let is_apart = !header.has(FLAG_REDUNDANT) || stands_apart(&header);
            is_apart && pointers::names_a_directory(store, &header)
        })
    };
    if found.grain_sectors != GRAIN_SECTORS && !is_likely(found) && !is_likely(&by_line) {
        return refuse_grain();
    }
    let is_embedded = found.descriptor_sectors > 0;
    let is_line_right = by_line.judge_numbers(&store.path).is_ok()
        && (by_line.grains() == found.grains()
            || found.has(FLAG_REDUNDANT) && stands_apart(&by_line)
            // To go through what the descriptor does not use is work for nothing in any case.
            || !is_embedded && found.capacity_sectors > line_sectors);
    Ok(if is_line_right { by_line } else { *found })
}

/// The header with grains of another size, if that one alone is borne out, or the overhead says that they are
/// of the usual one.
fn other_grains(store: &Store, header: &Header) -> Option<Header> {
    let mut sizes = Vec::new();
    let mut size = GRAIN_SECTORS_MIN;
    while size <= GRAIN_SECTORS_MAX {
        let other = Header { grain_sectors: size, ..*header };
        let is_right = |right: &Header| !right.has(FLAG_REDUNDANT) || stands_apart(right);
        if size != header.grain_sectors
            && is_exact(store, &other)
            && let Some(right) = with_pointers(store, &other).filter(is_right)
        {
            sizes.push((other, right.overhead_sectors == overhead_of(&right)));
        }
        size *= 2;
    }
    let (found, is_said) = match sizes[..] {
        [one] => one,
        // Of a disk with one table only, many fit.
        _ => *sizes.iter().find(|(other, _)| other.grain_sectors == GRAIN_SECTORS)?,
    };
    let is_sure = sizes.len() == 1 && header.has(FLAG_REDUNDANT);
    (is_said || is_sure).then_some(found)
}

/// Of a disk with one table only, grains of many sizes are borne out; the overhead is a whole number of
/// them, and the next one behind the tables. `None` where it is neither these grains' nor the usual ones'.
fn as_the_overhead_says(store: &Store, header: Header) -> Option<Header> {
    let usual = Header { grain_sectors: GRAIN_SECTORS, ..header };
    if header.grain_sectors == GRAIN_SECTORS || !is_exact(store, &usual) {
        return Some(header);
    }
    let is_said = |header: &Header| {
        with_pointers(store, header)
            .is_some_and(|right| right.overhead_sectors == overhead_of(&right))
    };
    [header, usual].into_iter().find(is_said)
}

/// The overhead where the directories, and the file, contradict it.
fn correct_overhead(store: &Store, header: &mut Header) -> Option<Misled> {
    let found = header.overhead_sectors;
    let file_sectors = store.length().ok()?.div_ceil(SECTOR_BYTES);
    let is_told = match header.has(FLAG_REDUNDANT) {
        true => stands_apart(header),
        false => stands_exactly(store, header, header.directory_sector),
    };
    let end = header.directory_sector.saturating_add(copy_sectors(header));
    let right = overhead_of(header);
    if !is_told {
        let misled =
            Misled { offset: OVERHEAD_OFFSET, found, right: file_sectors, cure: Cure::Unknown };
        return (found > file_sectors).then_some(misled);
    }
    // Where the first grain is behind the tables is a writer's choice.
    if found == right || (end..=file_sectors).contains(&found) {
        return None;
    }
    header.overhead_sectors = right;
    Some(Misled { offset: OVERHEAD_OFFSET, found, right, cure: Cure::Header })
}

/// Every known writer begins with grains at the next multiple of one behind the tables.
fn overhead_of(header: &Header) -> u64 {
    let end = header.directory_sector.saturating_add(copy_sectors(header));
    end.checked_next_multiple_of(header.grain_sectors).unwrap_or(u64::MAX)
}

/// Whether the directories are as far apart as one with its tables is long.
fn stands_apart(header: &Header) -> bool {
    header.redundant_sector.checked_add(copy_sectors(header)) == Some(header.directory_sector)
}

/// The header with its pointers put right; `None` where its numbers are no header's.
fn with_pointers(store: &Store, header: &Header) -> Option<Header> {
    header.judge_numbers(&store.path).ok()?;
    let mut right = *header;
    pointers::correct(store, &mut right);
    Some(right)
}

/// Whether a directory is exactly as this header needs it.
fn is_exact(store: &Store, header: &Header) -> bool {
    with_pointers(store, header).is_some_and(|header| {
        stands_exactly(store, &header, header.directory_sector)
            || header.has(FLAG_REDUNDANT) && stands_exactly(store, &header, header.redundant_sector)
    })
}

/// Whether a directory stands there that names all of its tables, and no more, in order behind it.
fn stands_exactly(store: &Store, header: &Header, sector: u64) -> bool {
    let entries = header.directory_entries();
    let sectors = (entries * 4).div_ceil(SECTOR_BYTES);
    let Some(tables) = sector.checked_add(sectors) else { return false };
    let is_within = |file: u64| tables.checked_mul(SECTOR_BYTES).is_some_and(|end| end <= file);
    if sector == 0 || !store.length().is_ok_and(is_within) {
        return false;
    }
    let is_as_needed = |first: u64, count: u64| {
        const PER_SECTOR: u64 = SECTOR_BYTES / 4;
        let at = (sector + first) * SECTOR_BYTES;
        let Ok(bytes) = store.read_vec(at, (count * SECTOR_BYTES) as usize) else { return false };
        (first * PER_SECTOR..).zip(words(&bytes)).all(|(index, entry)| {
            let place = if index < entries { tables + index * header.table_sectors() } else { 0 };
            u64::from(entry) == place
        })
    };
    is_as_needed(0, sectors.min(SECTORS_SEEN_MAX)) && is_as_needed(sectors - 1, 1)
}
