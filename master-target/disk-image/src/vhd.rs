//! The footer of a fixed VHD. `FORMATS.md` has the table of its bytes.

use std::{
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use crate::{
    error::{ErrorKind, ImageError, Result},
    fix::{Action, Fix},
    identity::DiskUuid,
    image::{DISK_BYTES_MAX, SECTOR_BYTES},
};

/// The first bytes of every footer, and of a dynamic VHD's header copy.
pub(crate) const COOKIE: &[u8; 8] = b"conectix";

pub(crate) const FOOTER_BYTES: u64 = 512;

/// Bytes of the largest disk that Azure takes as a VHD.
pub(crate) const SIZE_BYTES_MAX: u64 = 32 << 40;

/// Bytes of the largest disk that Hyper-V and qemu open as a VHD.
const COMMON_BYTES_MAX: u64 = 2040 << 30;

/// What there is to know about a VHD of this size before it is taken elsewhere.
pub(crate) fn caution(size_bytes: u64) -> Option<&'static str> {
    let sentence = "Azure takes a VHD of this size, but Hyper-V and qemu open at most 2,040 GiB; for \
                    them, choose another kind";
    (size_bytes > COMMON_BYTES_MAX).then_some(sentence)
}

/// What a footer says that matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Footer {
    pub(crate) size_bytes: u64,
    pub(crate) uuid: DiskUuid,
}

/// Reads the footer that stands at byte `at` of a file.
pub(crate) fn parse(bytes: &[u8; 512], path: &Path, at: u64) -> Result<Footer> {
    let fail = |kind, sentence: String| Err(ImageError::new(kind, path, sentence).at(at));
    let u32_at =
        |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    if &bytes[..8] != COOKIE {
        return fail(ErrorKind::Damaged, "this is no VHD footer".into());
    }
    match u32_at(60) {
        2 => {}
        kind @ (3 | 4) => {
            let name = if kind == 3 { "dynamic" } else { "differencing" };
            let sentence = format!("a {name} VHD is not supported; convert it to a fixed one");
            return fail(ErrorKind::Unsupported, sentence);
        }
        other => {
            return fail(ErrorKind::Damaged, format!("its VHD footer gives disk type {other}"));
        }
    }
    let mend = |sentence: String| {
        let error = ImageError::new(ErrorKind::Damaged, path, sentence).at(at);
        Err(error.mended_by(Fix {
            path: path.to_owned(),
            sentence: format!("write a new VHD footer for the {at} bytes before it"),
            lost_bytes: 0,
            freed_bytes: 0,
            actions: vec![Action::Write { offset: at, bytes: mended(bytes, at).into() }],
        }))
    };
    if u32_at(64) != checksum(bytes) {
        return mend("the checksum of its VHD footer is wrong; repair the image".into());
    }
    let mut size = [0; 8];
    size.copy_from_slice(&bytes[48..56]);
    let size_bytes = u64::from_be_bytes(size);
    if size_bytes != at || size_bytes == 0 || size_bytes > DISK_BYTES_MAX {
        let sentence = format!(
            "its VHD footer gives a size of {size_bytes} bytes, but stands at byte {at}: the file was \
             cut or enlarged, or the footer is wrong; copy it again from its source, or repair it, \
             which takes the {at} bytes for the disk"
        );
        return mend(sentence);
    }
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&bytes[68..84]);
    Ok(Footer { size_bytes, uuid: DiskUuid(uuid) })
}

/// The footer of a new disk.
pub(crate) fn compose(size_bytes: u64, uuid: DiskUuid) -> [u8; 512] {
    let (cylinders, heads, sectors) = geometry(size_bytes / SECTOR_BYTES);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let mut bytes = [0; 512];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0, COOKIE);
    put(8, &2_u32.to_be_bytes());
    put(12, &0x0001_0000_u32.to_be_bytes());
    put(16, &u64::MAX.to_be_bytes());
    put(24, &(now.saturating_sub(EPOCH_SECONDS) as u32).to_be_bytes());
    // Readers decide by this name whether the size or the geometry counts: Hyper-V's means size.
    put(28, b"win ");
    put(32, &0x000a_0000_u32.to_be_bytes());
    put(36, b"Wi2k");
    put(40, &size_bytes.to_be_bytes());
    put(48, &size_bytes.to_be_bytes());
    put(56, &cylinders.to_be_bytes());
    put(58, &[heads, sectors]);
    put(60, &2_u32.to_be_bytes());
    put(68, &uuid.0);
    let sum = checksum(&bytes);
    bytes[64..68].copy_from_slice(&sum.to_be_bytes());
    bytes
}

/// A sound footer for a disk of `size_bytes`, with the identity of a damaged one.
fn mended(bytes: &[u8; 512], size_bytes: u64) -> [u8; 512] {
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&bytes[68..84]);
    compose(size_bytes, DiskUuid(uuid))
}

/// One's complement of the sum of all bytes but the checksum's own.
fn checksum(bytes: &[u8; 512]) -> u32 {
    let counted = bytes.iter().enumerate().filter(|(at, _)| !(64..68).contains(at));
    !counted.map(|(_, byte)| u32::from(*byte)).sum::<u32>()
}

/// Cylinders, heads and sectors by the algorithm of the specification's appendix.
fn geometry(disk_sectors: u64) -> (u16, u8, u8) {
    let total = disk_sectors.min(65_535 * 16 * 255);
    let (mut sectors, mut heads, mut tracks);
    if total >= 65_535 * 16 * 63 {
        (sectors, heads) = (255, 16);
        tracks = total / sectors;
    } else {
        sectors = 17;
        tracks = total / sectors;
        heads = tracks.div_ceil(1024).max(4);
        if tracks >= heads * 1024 || heads > 16 {
            (sectors, heads) = (31, 16);
            tracks = total / sectors;
        }
        if tracks >= heads * 1024 {
            (sectors, heads) = (63, 16);
            tracks = total / sectors;
        }
    }
    ((tracks / heads) as u16, heads as u8, sectors as u8)
}

/// 2000-01-01 00:00:00 UTC, where a VHD's clock begins.
const EPOCH_SECONDS: u64 = 946_684_800;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn footers_round_trip_and_every_changed_byte_is_seen() {
        let footer = compose(4 << 20, DiskUuid([7; 16]));
        let parsed = parse(&footer, Path::new("x"), 4 << 20).unwrap();
        assert_eq!(parsed, Footer { size_bytes: 4 << 20, uuid: DiskUuid([7; 16]) });
        for at in 0..512 {
            let mut changed = footer;
            changed[at] ^= 1;
            assert!(parse(&changed, Path::new("x"), 4 << 20).is_err(), "byte {at}");
        }
        assert!(parse(&footer, Path::new("x"), 8 << 20).is_err());
    }

    #[test]
    fn geometry_follows_the_specification() {
        assert_eq!(geometry(2048 * 10), (301, 4, 17));
        assert_eq!(geometry((1 << 30) / 512), (2080, 16, 63));
        assert_eq!(geometry(u64::MAX), (65_535, 16, 255));
    }
}
