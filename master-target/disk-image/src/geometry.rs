//! Cylinders, heads and sectors, which old boot code still asks for.

use crate::{AdapterType, SECTOR_BYTES};

/// A disk's geometry, as `ddb.geometry.*` carries it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Cylinders.
    pub cylinders: u64,
    /// Heads.
    pub heads: u64,
    /// Sectors a track.
    pub sectors: u64,
}

impl Geometry {
    /// The geometry that VMware gives a disk of this size on this controller: 255 × 63 for SCSI
    /// disks from 1 GiB on, 64 × 32 below (VMware knowledge base 1026254); 16 × 63 for IDE, with at
    /// most 16,383 cylinders (ATA-5, annex C).
    pub fn of(size_bytes: u64, adapter: AdapterType) -> Self {
        let total = size_bytes / SECTOR_BYTES;
        let (heads, sectors, most) = match adapter {
            AdapterType::Ide => (16, 63, 16_383),
            _ if size_bytes >= 1 << 30 => (255, 63, u64::MAX),
            _ => (64, 32, u64::MAX),
        };
        let cylinders = (total / (heads * sectors)).clamp(1, most);
        Self { cylinders, heads, sectors }
    }
}

#[cfg(test)]
mod tests {
    use super::Geometry;
    use crate::AdapterType;

    #[test]
    fn matches_what_vmware_writes() {
        let g = |c, h, s| Geometry { cylinders: c, heads: h, sectors: s };
        assert_eq!(Geometry::of(8 << 30, AdapterType::LsiLogic), g(1044, 255, 63));
        assert_eq!(Geometry::of(512 << 20, AdapterType::LsiLogic), g(512, 64, 32));
        assert_eq!(Geometry::of(8 << 30, AdapterType::Ide), g(16383, 16, 63));
        assert_eq!(Geometry::of(512, AdapterType::BusLogic), g(1, 64, 32));
    }
}
