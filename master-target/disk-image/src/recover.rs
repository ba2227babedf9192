//! Streams: tables, directory and footer made anew from the markers where the writer was interrupted,
//! a damaged header from the footer.

use std::{fs::File, path::Path, sync::Arc};

use crate::{
    error::{ErrorKind, ImageError, Result},
    fix::{Action, Fix},
    image::SECTOR_BYTES,
    report::{Progress, advance},
    sparse::{
        header::{DIRECTORY_AT_END, FLAG_MARKERS, Header},
        inflate::{Inflated, MARKER_BYTES, compressed_bytes_max, split_marker},
        read_descriptor, read_header,
    },
    storage::Store,
    stream::{MARKER_DIRECTORY, MARKER_FOOTER, MARKER_TABLE, marker},
};

/// Grains that are put together again, 256 MiB of memory: a stream of 1 TiB of data. No export that
/// large was ever interrupted and worth keeping.
const GRAINS_MAX: usize = 16 << 20;

/// The fixes that give a stream its end, where that is what `error` is about; else none.
pub(crate) fn plan_footer(
    path: &Path,
    error: &ImageError,
    progress: &mut dyn Progress,
) -> Result<Vec<Fix>> {
    let file = File::open(path).map_err(|source| ImageError::io("open", path, source))?;
    let store = Arc::new(Store::new(path, Box::new(file)));
    let header = read_header(&store, 0);
    if let Some(footer) = last_footer(&store)?
        && header.as_ref().is_ok_and(|header| !is_of_one_stream(header, &footer))
            | header.as_ref().is_err_and(|error| error.kind() == ErrorKind::Damaged)
    {
        if is_borne_out(&store, &footer) {
            return Ok(vec![header_from(&footer, path)]);
        }
        let by_header = header.ok().map(|header| Header {
            directory_sector: footer.directory_sector,
            unclean: footer.unclean,
            ..header
        });
        let by_header = by_header.filter(|header| is_borne_out(&store, header));
        return match by_header {
            Some(header) => Ok(vec![footer_from(&header, path, store.length()?)]),
            None => Ok(Vec::new()),
        };
    }
    let Ok(header) = header else { return Ok(Vec::new()) };
    // The end is there, so something else is wrong, and to cut the stream would mend nothing.
    if let Some(footer) = last_footer(&store)?
        && footer.directory_sector.saturating_mul(SECTOR_BYTES) < store.length()?
    {
        return Ok(Vec::new());
    }
    if header.directory_sector != DIRECTORY_AT_END
        || !header.has(FLAG_MARKERS)
        || error.path() != store.path && error.path().file_name() != path.file_name()
    {
        return Ok(Vec::new());
    }
    let Scan { grains, end, ended } = scan(&store, &header, progress)?;
    // Without a grain there is nothing that an end would make readable.
    if grains.is_empty() && !ended {
        return Ok(Vec::new());
    }
    let lost_bytes = if ended { 0 } else { lost_bytes_max(&header, &grains) };
    let what_is_lost = match lost_bytes {
        0 => "no grain is missing".to_owned(),
        _ => format!(
            "what came after byte {} of the file is missing: at most {lost_bytes} bytes of the disk, \
             which will read as zeros",
            end * SECTOR_BYTES
        ),
    };
    let sentence = format!(
        "write the stream's tables and footer anew behind its {} whole grains; {what_is_lost}",
        grains.len()
    );
    let bytes = tail(&header, grains, end);
    let length = end * SECTOR_BYTES + bytes.len() as u64;
    let actions = vec![
        Action::SetLength(end * SECTOR_BYTES),
        Action::Write { offset: end * SECTOR_BYTES, bytes: bytes.into() },
        Action::SetLength(length),
    ];
    Ok(vec![Fix { path: path.to_owned(), sentence, lost_bytes, freed_bytes: 0, actions }])
}

/// The footer of a stream that ends as it should, whatever its header says.
pub(crate) fn last_footer(store: &Store) -> Result<Option<Header>> {
    let Some(at) = store.length()?.checked_sub(2 * SECTOR_BYTES) else { return Ok(None) };
    let footer = read_header(store, at).ok();
    Ok(footer
        .filter(|footer| footer.has(FLAG_MARKERS) && footer.directory_sector != DIRECTORY_AT_END))
}

fn is_of_one_stream(header: &Header, footer: &Header) -> bool {
    Header { directory_sector: header.directory_sector, unclean: header.unclean, ..*footer }
        == *header
}

/// Whether what the stream holds is as this header says: the length of its directory, the size of its first
/// grain, and the capacity that its descriptor gives.
fn is_borne_out(store: &Store, header: &Header) -> bool {
    let sector_at = |sector: u64| {
        let mut bytes = [0; SECTOR_BYTES as usize];
        store.read(&mut bytes, sector.checked_mul(SECTOR_BYTES)?).ok().map(|()| bytes)
    };
    let directory_sectors = (header.directory_entries() * 4).div_ceil(SECTOR_BYTES);
    let before = header.directory_sector.checked_sub(1).and_then(sector_at);
    if before != Some(marker(directory_sectors, MARKER_DIRECTORY)) {
        return false;
    }
    if let Ok(Some(descriptor)) = read_descriptor(store, header) {
        let sectors: u64 = descriptor.extents().iter().map(|line| line.sectors).sum();
        if sectors != header.capacity_sectors {
            return false;
        }
    }
    let place = header.overhead_sectors.max(1);
    let Some(bytes) = sector_at(place) else { return false };
    let mut start = [0; MARKER_BYTES as usize];
    start.copy_from_slice(&bytes[..MARKER_BYTES as usize]);
    let (first, size) = split_marker(&start);
    if size == 0 {
        // There is no grain.
        return u64::from(bytes[12]) == u64::from(MARKER_DIRECTORY);
    }
    let grain = first / header.grain_sectors;
    first.is_multiple_of(header.grain_sectors)
        && first < header.capacity_sectors
        && u32::try_from(place)
            .is_ok_and(|place| Inflated::new(*header).inflate(store, place, grain).is_ok())
}

/// The footer, from the header in front.
fn footer_from(header: &Header, path: &Path, length: u64) -> Fix {
    Fix {
        path: path.to_owned(),
        sentence: "write the stream's damaged footer anew, from its header".into(),
        lost_bytes: 0,
        freed_bytes: 0,
        actions: vec![Action::Write {
            offset: length - 2 * SECTOR_BYTES,
            bytes: header.encode().as_slice().into(),
        }],
    }
}

/// A stream has its header twice: in front without the directory's place, and at its end with it.
fn header_from(footer: &Header, path: &Path) -> Fix {
    let header = Header { directory_sector: DIRECTORY_AT_END, unclean: false, ..*footer };
    Fix {
        path: path.to_owned(),
        sentence: "write the stream's damaged header anew, from its footer".into(),
        lost_bytes: 0,
        freed_bytes: 0,
        actions: vec![Action::Write { offset: 0, bytes: header.encode().as_slice().into() }],
    }
}

/// Most bytes of the disk that the missing end can have held: a grain of zeros is not stored, so
/// nobody knows how many it did.
fn lost_bytes_max(header: &Header, grains: &[(u64, u32)]) -> u64 {
    let in_order = grains.is_sorted_by_key(|(number, _)| *number);
    let held = match grains.last() {
        // A writer that goes through the disk in order had decided about all before its last grain.
        Some((last, _)) if in_order => last + 1,
        _ => grains.len() as u64,
    };
    header.capacity_bytes().saturating_sub(held * header.grain_bytes())
}

/// What a stream's markers tell.
struct Scan {
    /// Numbers and sectors of the whole grains.
    grains: Vec<(u64, u32)>,
    /// The first sector behind the last of them.
    end: u64,
    /// The directory's marker is there, so no grain came after these.
    ended: bool,
}

fn scan(store: &Store, header: &Header, progress: &mut dyn Progress) -> Result<Scan> {
    let length = store.length()?;
    let mut sector = header.overhead_sectors.max(1);
    let mut grains = Vec::new();
    let (mut end, mut ended) = (sector, false);
    loop {
        let at = sector.saturating_mul(SECTOR_BYTES);
        if at.saturating_add(SECTOR_BYTES) > length {
            break;
        }
        let mut bytes = [0; 16];
        store.read(&mut bytes, at)?;
        let mut start = [0; MARKER_BYTES as usize];
        start.copy_from_slice(&bytes[..MARKER_BYTES as usize]);
        let (first, size) = split_marker(&start);
        let sectors = if size > 0 {
            let sound = first % header.grain_sectors == 0
                && first < header.capacity_sectors
                && u64::from(size) <= compressed_bytes_max(header.grain_bytes())
                && at + MARKER_BYTES + u64::from(size) <= length;
            let place = u32::try_from(sector).ok().filter(|_| sound);
            let Some(place) = place else { break };
            if grains.len() >= GRAINS_MAX {
                let sentence = "the stream has too many grains to be put together again";
                return Err(ImageError::new(ErrorKind::Unsupported, &store.path, sentence));
            }
            grains.push((first / header.grain_sectors, place));
            (MARKER_BYTES + u64::from(size)).div_ceil(SECTOR_BYTES)
        } else {
            let kind = u32::from_le_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]);
            ended |= kind == MARKER_DIRECTORY;
            match kind {
                MARKER_TABLE | MARKER_DIRECTORY if first < header.capacity_sectors => 1 + first,
                // The footer, the end, or something else: what follows is written anew.
                _ => break,
            }
        };
        sector += sectors;
        end = if size > 0 { sector } else { end };
        if grains.len().is_multiple_of(4096) {
            advance(progress, &store.path, at.min(length), length)?;
        }
    }
    Ok(Scan { grains, end, ended })
}

/// Tables, directory, footer and end, from sector `end` on.
fn tail(header: &Header, mut grains: Vec<(u64, u32)>, end: u64) -> Vec<u8> {
    let per_table = u64::from(header.entries_per_table);
    let table_sectors = header.table_sectors();
    let mut directory = vec![0_u32; header.directory_entries() as usize];
    let mut bytes = Vec::new();
    let here = |bytes: &Vec<u8>| end + bytes.len() as u64 / SECTOR_BYTES;
    grains.sort_unstable();
    for table in grains.chunk_by(|one, other| one.0 / per_table == other.0 / per_table) {
        let mut entries = vec![0_u32; (table_sectors * SECTOR_BYTES / 4) as usize];
        for (grain, sector) in table {
            entries[(grain % per_table) as usize] = *sector;
        }
        bytes.extend_from_slice(&marker(table_sectors, MARKER_TABLE));
        directory[(table[0].0 / per_table) as usize] = here(&bytes) as u32;
        bytes.extend(entries.into_iter().flat_map(u32::to_le_bytes));
    }
    let sectors = (directory.len() as u64 * 4).div_ceil(SECTOR_BYTES);
    bytes.extend_from_slice(&marker(sectors, MARKER_DIRECTORY));
    let directory_sector = here(&bytes);
    bytes.extend(directory.into_iter().flat_map(u32::to_le_bytes));
    bytes.resize(bytes.len().next_multiple_of(SECTOR_BYTES as usize), 0);
    bytes.extend_from_slice(&marker(1, MARKER_FOOTER));
    bytes.extend_from_slice(&Header { directory_sector, ..*header }.encode());
    bytes.extend_from_slice(&marker(0, 0));
    bytes
}
