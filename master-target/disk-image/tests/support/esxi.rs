//! Snapshots of ESXi, built from the published layout: no open tool writes them.
#![allow(dead_code, missing_docs, unreachable_pub)]

/// A grain of a snapshot.
#[derive(Clone)]
pub enum Grain {
    Data(Vec<u8>),
    Zero,
    Unmapped,
}

fn put32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn put64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

/// A COWD extent of grains of `grain_sectors`.
pub fn cowd(sectors: u32, grain_sectors: u32, grains: &[(u32, Vec<u8>)]) -> Vec<u8> {
    let tables = sectors.div_ceil(grain_sectors * 4096);
    let mut bytes = vec![0; 2048];
    bytes[..4].copy_from_slice(b"COWD");
    put32(&mut bytes, 4, 1);
    put32(&mut bytes, 8, 3);
    put32(&mut bytes, 12, sectors);
    put32(&mut bytes, 16, grain_sectors);
    put32(&mut bytes, 20, 4);
    put32(&mut bytes, 24, tables);
    bytes.resize(2048 + (tables as usize * 4).next_multiple_of(512), 0);
    for (grain, data) in grains {
        let entry_at = 2048 + (grain / 4096) as usize * 4;
        if bytes[entry_at..entry_at + 4] == [0; 4] {
            let sector = (bytes.len() / 512) as u32;
            put32(&mut bytes, entry_at, sector);
            bytes.resize(bytes.len() + 4096 * 4, 0);
        }
        let table =
            u32::from_le_bytes(bytes[entry_at..entry_at + 4].try_into().unwrap()) as usize * 512;
        let sector = (bytes.len() / 512) as u32;
        put32(&mut bytes, table + (grain % 4096) as usize * 4, sector);
        bytes.extend_from_slice(data);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
    }
    let free = (bytes.len() / 512) as u32;
    put32(&mut bytes, 28, free);
    bytes
}

/// A seSparse extent.
pub fn sesparse(sectors: u64, grains: &[(u64, Grain)]) -> Vec<u8> {
    let tables_total = sectors.div_ceil(8 * 4096);
    let directory_sectors = (tables_total * 8).div_ceil(512);
    let (directory, volatile) = (4, 1);
    let tables = directory + directory_sectors;
    let grains_at = tables + tables_total * 64;
    let mut bytes = vec![0; grains_at as usize * 512];
    put64(&mut bytes, 0, 0xcafe_babe);
    put64(&mut bytes, 8, 0x2_0000_0001);
    put64(&mut bytes, 16, sectors);
    put64(&mut bytes, 24, 8);
    put64(&mut bytes, 32, 64);
    for (at, value) in [
        (80, volatile),
        (88, 1),
        (96, 2),
        (104, 1),
        (112, 3),
        (120, 1),
        (128, directory),
        (136, directory_sectors),
        (144, tables),
        (152, tables_total * 64),
        (160, grains_at),
        (176, grains_at),
        (192, grains_at),
        (200, 8 * grains.len() as u64),
    ] {
        put64(&mut bytes, at, value);
    }
    put64(&mut bytes, 512, 0xcafe_cafe);
    let mut allocated = 0_u64;
    for (grain, content) in grains {
        let index = grain / 4096;
        put64(&mut bytes, (directory * 512 + index * 8) as usize, 0x1000_0000_0000_0000 | index);
        let entry = match content {
            Grain::Unmapped => 0x1000_0000_0000_0000,
            Grain::Zero => 0x2000_0000_0000_0000,
            Grain::Data(data) => {
                let number = allocated;
                allocated += 1;
                bytes.extend_from_slice(data);
                assert_eq!(data.len(), 4096);
                0x3000_0000_0000_0000 | (number & 0xfff) << 48 | number >> 12
            }
        };
        put64(&mut bytes, ((tables + index * 64) * 512 + grain % 4096 * 8) as usize, entry);
    }
    bytes
}

pub fn descriptor(create_type: &str, extents: &str, parent: Option<(&str, &str)>) -> String {
    let (parent_id, hint) = match parent {
        Some((id, path)) => (id, format!("parentFileNameHint=\"{path}\"\n")),
        None => ("ffffffff", String::new()),
    };
    format!(
        "# Disk DescriptorFile\nversion=1\nencoding=\"UTF-8\"\nCID=0badcafe\nparentCID={parent_id}\n\
         isNativeSnapshot=\"no\"\ncreateType=\"{create_type}\"\n{hint}# Extent description\n{extents}\n\
         # The Disk Data Base\n#DDB\n\nddb.adapterType = \"lsilogic\"\n"
    )
}
