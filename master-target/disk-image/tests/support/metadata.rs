//! A sparse file's header, directories and tables, read and changed without the library.
#![allow(dead_code, missing_docs, unreachable_pub)]

use std::{fs::File, os::unix::fs::FileExt, path::Path};

/// A sparse file whose metadata is changed behind everybody's back.
pub struct Metadata {
    pub file: File,
    pub grain_sectors: u64,
    pub entries_per_table: usize,
    /// Sectors of the directories: the primary's, the redundant's.
    pub directories: [u64; 2],
    pub overhead: u64,
    pub tables: usize,
}

impl Metadata {
    pub fn open(path: &Path) -> Self {
        let file = File::options().read(true).write(true).open(path).unwrap();
        let mut header = [0; 512];
        file.read_exact_at(&mut header, 0).unwrap();
        let wide = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().unwrap());
        let entries_per_table = u32::from_le_bytes(header[44..48].try_into().unwrap()) as usize;
        let grain_sectors = wide(20);
        let grains = wide(12).div_ceil(grain_sectors) as usize;
        Self {
            file,
            grain_sectors,
            entries_per_table,
            directories: [wide(56), wide(48)],
            overhead: wide(64),
            tables: grains.div_ceil(entries_per_table),
        }
    }

    pub fn read(&self, at: u64, count: usize) -> Vec<u32> {
        let mut bytes = vec![0; count * 4];
        self.file.read_exact_at(&mut bytes, at).unwrap();
        bytes.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
    }

    pub fn write(&self, at: u64, words: &[u32]) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.file.write_all_at(&bytes, at).unwrap();
    }

    pub fn directory(&self, copy: usize) -> Vec<u32> {
        self.read(self.directories[copy] * 512, self.tables)
    }

    pub fn name(&self, copy: usize, table: usize, sector: u32) {
        self.write(self.directories[copy] * 512 + table as u64 * 4, &[sector]);
    }

    pub fn table_at(&self, copy: usize, table: usize) -> u64 {
        u64::from(self.directory(copy)[table]) * 512
    }

    pub fn table(&self, copy: usize, table: usize) -> Vec<u32> {
        self.read(self.table_at(copy, table), self.entries_per_table)
    }

    pub fn fill(&self, copy: usize, table: usize, entries: &[u32]) {
        self.write(self.table_at(copy, table), entries);
    }

    pub fn put(&self, copy: usize, table: usize, at: usize, entry: u32) {
        self.write(self.table_at(copy, table) + at as u64 * 4, &[entry]);
    }

    pub fn fill_all(&self, copy: usize, mut entry: impl FnMut() -> u32) {
        for table in 0..self.tables {
            let entries: Vec<u32> = (0..self.entries_per_table).map(|_| entry()).collect();
            self.fill(copy, table, &entries);
        }
    }

    pub fn fill_directory(&self, copy: usize, mut entry: impl FnMut() -> u32) {
        for table in 0..self.tables {
            self.name(copy, table, entry());
        }
    }

    /// Entries of a table that name a grain.
    pub fn named(&self, table: usize) -> Vec<usize> {
        let entries = self.table(0, table);
        (0..entries.len()).filter(|at| entries[*at] > 1).collect()
    }

    /// Entries of a table that name none.
    pub fn missing(&self, table: usize) -> usize {
        self.table(0, table).iter().position(|entry| *entry == 0).unwrap()
    }

    pub fn point(&self, copy: usize, sector: u64) {
        self.file.write_all_at(&sector.to_le_bytes(), [56, 48][copy]).unwrap();
    }
}
