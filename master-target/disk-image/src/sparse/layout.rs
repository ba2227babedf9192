//! Where the grain tables stand: what the two directories say, and whether that can be right.
//!
//! Every known writer puts the tables behind their directory, in order: the regular places. A repair, or
//! a writer that makes tables as it needs them, gives some another place. Nothing is read here.

use std::ops::Range;

use crate::{
    image::SECTOR_BYTES,
    sparse::{bits::Bits, create::copy_sectors, header::Header, tables::MISSING},
};

/// What the directories tell by themselves.
#[derive(Debug)]
pub(crate) struct Layout {
    header: Header,
    /// Sectors of the directory of each copy.
    directories: [u64; 2],
    /// Entries of each copy's directory that cannot be right: they lead out of the file, into other
    /// metadata, or to a table of another name.
    strayed: [Bits; 2],
    /// Whether the regular places of a copy belong to its tables alone.
    is_free: [bool; 2],
}

impl Layout {
    pub(crate) fn of(
        header: &Header,
        directory_sector: u64,
        copies: [&[u32]; 2],
        file_sectors: u64,
    ) -> Self {
        let tables = copies[0].len().max(copies[1].len()) as u64;
        let mut layout = Self {
            header: *header,
            directories: [directory_sector, header.redundant_sector],
            strayed: [Bits::below(tables), Bits::below(tables)],
            is_free: [false; 2],
        };
        layout.judge(copies, file_sectors);
        layout
    }

    /// Where the table at `index` stands in a file whose tables follow their directory in order.
    pub(crate) fn regular_place(&self, copy: usize, index: usize) -> u64 {
        let sectors = (self.header.directory_entries() * 4).div_ceil(SECTOR_BYTES);
        let first = self.directories[copy].saturating_add(sectors);
        first.saturating_add(index as u64 * self.header.table_sectors())
    }

    pub(crate) fn is_strayed(&self, copy: usize, index: usize) -> bool {
        self.strayed[copy].has(index as u64)
    }

    pub(crate) fn has_strayed(&self, copy: usize) -> bool {
        !self.strayed[copy].is_empty()
    }

    /// The regular place of a table, if nothing else can be there.
    pub(crate) fn free_place(&self, copy: usize, index: usize) -> Option<u32> {
        let place = self.regular_place(copy, index);
        u32::try_from(place).ok().filter(|_| self.is_free[copy])
    }

    fn judge(&mut self, copies: [&[u32]; 2], file_sectors: u64) {
        let header = self.header;
        let table_sectors = header.table_sectors();
        let count = if copies[1].is_empty() { 1 } else { 2 };
        let directory_sectors = (header.directory_entries() * 4).div_ceil(SECTOR_BYTES);
        let (mut regular, mut irregular) = (0_u64, Vec::new());
        for (copy, directory) in copies.into_iter().enumerate() {
            for (index, place) in directory.iter().enumerate() {
                let sector = u64::from(*place);
                if *place == MISSING {
                    continue;
                }
                if sector == self.regular_place(copy, index) {
                    regular += 1;
                } else if sector + table_sectors > file_sectors {
                    self.strayed[copy].put(index as u64);
                } else {
                    irregular.push(pack(*place, index, copy));
                }
            }
        }
        // Both copies are of one writer: what is true of most tables is its way.
        let is_regular = irregular.len() as u64 <= regular;
        let region = |copy: usize| {
            let start = self.directories[copy];
            let sectors = if is_regular { copy_sectors(&header) } else { directory_sectors };
            start..start.saturating_add(sectors)
        };
        let descriptor_end = header.descriptor_sector.saturating_add(header.descriptor_sectors);
        let descriptor = header.descriptor_sector..descriptor_end;
        let regions = [region(0), region(1)];
        let others = [0..1, descriptor.clone(), regions[0].clone(), regions[1].clone()];
        let others = &others[..2 + count];
        irregular.retain(|packed| {
            let (place, index, copy) = unpack(*packed);
            let table = place..place + table_sectors;
            let strayed = others.iter().any(|other| overlap(&table, other));
            if strayed {
                self.strayed[copy].put(index);
            }
            !strayed
        });
        irregular.sort_unstable();
        for pair in irregular.windows(2) {
            let [(first, index, copy), (second, other, other_copy)] =
                [unpack(pair[0]), unpack(pair[1])];
            if second < first + table_sectors {
                // Both directories name one table: it stays the first copy's, and the other gets a
                // place of its own.
                if index != other || copy == other_copy || copy == 1 {
                    self.strayed[copy].put(index);
                }
                if index != other || copy == other_copy || other_copy == 1 {
                    self.strayed[other_copy].put(other);
                }
            }
        }
        let end = header.overhead_sectors.min(file_sectors);
        self.is_free = [0, 1].map(|copy| {
            let this = &regions[copy];
            is_regular
                && copy < count
                && this.start > 0
                && this.end <= end
                && !overlap(this, &descriptor)
                && (count == 1 || !overlap(this, &regions[1 - copy]))
        });
    }
}

/// A directory entry in eight bytes, so that a directory without a regular place costs 64 MiB at most: its
/// place first, to sort by, then its index, which has 22 bits, and its copy.
fn pack(place: u32, index: usize, copy: usize) -> u64 {
    u64::from(place) << 32 | (index as u64) << 1 | copy as u64
}

fn unpack(packed: u64) -> (u64, u64, usize) {
    (packed >> 32, (packed & 0xffff_ffff) >> 1, (packed & 1) as usize)
}

fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sparse::create::layout;

    /// Two copies of four tables at their regular places.
    fn regular() -> (Header, [Vec<u32>; 2]) {
        let header = layout(4 * 65_536, true, false);
        let places = |start: u64| (0..4).map(|index| (start + 1 + index * 4) as u32).collect();
        (header, [header.directory_sector, header.redundant_sector].map(places))
    }

    fn judged(header: &Header, copies: &[Vec<u32>; 2]) -> Layout {
        let copies = [&copies[0], &copies[1]].map(Vec::as_slice);
        Layout::of(header, header.directory_sector, copies, 10_000)
    }

    fn strayed(layout: &Layout) -> Vec<(usize, usize)> {
        let all = [0, 1].into_iter().flat_map(|copy| (0..4).map(move |index| (copy, index)));
        all.filter(|(copy, index)| layout.is_strayed(*copy, *index)).collect()
    }

    #[test]
    fn directories_as_they_are_made_have_nothing_that_strayed() {
        let (header, copies) = regular();
        let layout = judged(&header, &copies);
        assert_eq!(strayed(&layout), []);
        assert_eq!(layout.free_place(1, 2), Some(copies[1][2]));
    }

    #[test]
    fn entries_that_lead_into_metadata_or_to_other_tables_strayed() {
        let (header, good) = regular();
        let directory = header.directory_sector as u32;
        for wrong in [1, 20, directory, good[0][0], good[0][3] + 1, good[1][1], 9_999, u32::MAX] {
            let mut copies = good.clone();
            copies[0][1] = wrong;
            assert_eq!(strayed(&judged(&header, &copies)), [(0, 1)], "{wrong}");
        }
        // Behind the overhead, a repair may have put it.
        let mut copies = good.clone();
        (copies[0][1], copies[1][1]) = (9_000, 9_004);
        assert_eq!(strayed(&judged(&header, &copies)), []);
        // One table for both copies stays the first one's; for two tables of a copy, nobody knows.
        copies[1][1] = 9_000;
        assert_eq!(strayed(&judged(&header, &copies)), [(1, 1)]);
        copies[1][1] = 9_004;
        copies[0][3] = 9_002;
        assert_eq!(strayed(&judged(&header, &copies)), [(0, 1), (0, 3), (1, 1)]);
    }

    #[test]
    fn another_writers_layout_is_taken_as_it_is() {
        let (header, _) = regular();
        let copies = [vec![100, 104, 108, 112], vec![80, 84, 88, 92]];
        let layout = judged(&header, &copies);
        assert_eq!(strayed(&layout), []);
        assert_eq!(layout.free_place(0, 0), None);
    }
}
