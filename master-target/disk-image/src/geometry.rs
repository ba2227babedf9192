//! The disk geometry a descriptor names for the guest's firmware.

use std::{fmt, str::FromStr};

/// The adapter a descriptor names in `ddb.adapterType`.
///
/// These four are all there are: a disk behind LSI Logic SAS, paravirtual SCSI, SATA or NVMe
/// carries `lsilogic`, and the virtual machine's own configuration names the controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum AdapterType {
    /// `ide`
    Ide,
    /// `buslogic`
    BusLogic,
    /// `lsilogic`: also for SAS, paravirtual SCSI, SATA and NVMe.
    #[default]
    LsiLogic,
    /// `legacyESX`
    LegacyEsx,
}

impl AdapterType {
    /// Every adapter type.
    pub const ALL: [Self; 4] = [Self::Ide, Self::BusLogic, Self::LsiLogic, Self::LegacyEsx];

    /// The name as in a descriptor.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ide => "ide",
            Self::BusLogic => "buslogic",
            Self::LsiLogic => "lsilogic",
            Self::LegacyEsx => "legacyESX",
        }
    }
}

impl fmt::Display for AdapterType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for AdapterType {
    type Err = UnknownAdapterType;

    fn from_str(name: &str) -> Result<Self, UnknownAdapterType> {
        Self::ALL
            .into_iter()
            .find(|adapter| adapter.name().eq_ignore_ascii_case(name))
            .ok_or_else(|| UnknownAdapterType(name.to_owned()))
    }
}

/// A name that is no [`AdapterType`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no adapter type of a VMDK; use ide, buslogic, legacyESX or lsilogic \
     (lsilogic also for SAS, paravirtual SCSI, SATA and NVMe)"
)]
pub struct UnknownAdapterType(pub String);

/// Cylinders, heads and sectors, as `ddb.geometry.*`.
///
/// Firmware that still counts so must find the same numbers after a failback, or an old boot
/// loader reads the wrong sector. The size of the disk does not come from here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Geometry {
    /// Whole cylinders; what is left of the disk beyond them is not counted.
    pub cylinders: u64,
    /// Heads.
    pub heads: u64,
    /// Sectors of a track.
    pub sectors: u64,
}

impl Geometry {
    /// The geometry VMware gives a disk of `disk_sectors` sectors of 512 bytes.
    ///
    /// IDE is always 16 × 63 and stops at the 16,383 cylinders of the ATA standard. SCSI follows
    /// the BusLogic rule of VMware's GSX Server 3 Virtual Machine Guide ("Configuring Dual-Boot
    /// Systems and Virtual Machines"): 64 × 32 to 1 GiB, 128 × 32 to 2 GiB, 255 × 63 above, and
    /// has no upper bound. `legacyESX` is 255 × 63 at any size, as qemu's `block/vmdk.c` has it.
    pub fn of(adapter: AdapterType, disk_sectors: u64) -> Self {
        const GIB_SECTORS: u64 = 2 << 20;
        const TWO_GIB_SECTORS: u64 = 2 * GIB_SECTORS;
        let (heads, sectors) = match adapter {
            AdapterType::Ide => (16, 63),
            AdapterType::LegacyEsx => (255, 63),
            AdapterType::BusLogic | AdapterType::LsiLogic => {
                if disk_sectors <= GIB_SECTORS {
                    (64, 32)
                } else if disk_sectors <= TWO_GIB_SECTORS {
                    (128, 32)
                } else {
                    (255, 63)
                }
            }
        };
        let cylinders_max = if adapter == AdapterType::Ide { 16_383 } else { u64::MAX };
        // A disk smaller than a cylinder still has one: zero cylinders is no geometry at all.
        let cylinders = (disk_sectors / (heads * sectors)).clamp(1, cylinders_max);
        Self { cylinders, heads, sectors }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sectors and geometry as found in descriptors that VMware products wrote.
    #[test]
    fn geometry_is_what_vmware_writes() {
        let cases = [
            (AdapterType::Ide, 16_777_216, (16_383, 16, 63)),
            (AdapterType::Ide, 27_648_000, (16_383, 16, 63)),
            (AdapterType::LsiLogic, 192_780, (94, 64, 32)),
            (AdapterType::LsiLogic, 83_886_080, (5_221, 255, 63)),
            (AdapterType::LsiLogic, 3_565_176_930, (221_922, 255, 63)),
            (AdapterType::LsiLogic, 14_540_800, (905, 255, 63)),
        ];
        for (adapter, disk_sectors, (cylinders, heads, sectors)) in cases {
            assert_eq!(
                Geometry::of(adapter, disk_sectors),
                Geometry { cylinders, heads, sectors },
                "{adapter} {disk_sectors}"
            );
        }
    }

    #[test]
    fn geometry_changes_at_one_and_two_gib() {
        let heads = |sectors| Geometry::of(AdapterType::BusLogic, sectors).heads;
        assert_eq!([heads(2 << 20), heads((2 << 20) + 1)], [64, 128]);
        assert_eq!([heads(4 << 20), heads((4 << 20) + 1)], [128, 255]);
    }

    #[test]
    fn one_sector_has_a_cylinder_and_no_disk_has_more_sectors_than_it_has() {
        for adapter in AdapterType::ALL {
            assert_eq!(Geometry::of(adapter, 1).cylinders, 1);
            for disk_sectors in [20_000, 2 << 20, 1 << 33, crate::DISK_BYTES_MAX / 512] {
                let g = Geometry::of(adapter, disk_sectors);
                assert!(g.cylinders * g.heads * g.sectors <= disk_sectors);
            }
        }
    }

    #[test]
    fn adapter_names_round_trip() {
        for adapter in AdapterType::ALL {
            assert_eq!(adapter.to_string().parse(), Ok(adapter));
        }
        assert_eq!("legacyesx".parse(), Ok(AdapterType::LegacyEsx));
        assert!("pvscsi".parse::<AdapterType>().is_err());
    }
}
