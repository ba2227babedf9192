//! The kinds of disk image.

use std::{fmt, str::FromStr};

use crate::vhd;

/// The kind of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The disk's bytes and nothing else, in a file or a block device.
    Raw,
    /// A descriptor and one `FLAT` extent: hosted VMware products.
    MonolithicFlat,
    /// A descriptor and `FLAT` extents of at most 2 GiB.
    TwoGbMaxExtentFlat,
    /// A descriptor and `VMFS` extents, thick or thin: ESXi.
    Vmfs,
    /// One file that grows: header, descriptor, grain tables, grains.
    MonolithicSparse,
    /// A descriptor and `SPARSE` extents of at most 2 GiB.
    TwoGbMaxExtentSparse,
    /// One file of compressed grains, written once from start to end: the disks of OVF.
    StreamOptimized,
    /// A snapshot of ESXi in COWD extents; read only.
    VmfsSparse,
    /// A snapshot of ESXi in seSparse extents; read only.
    SeSparse,
    /// The disk's bytes and a footer of 512 bytes: what Azure takes.
    FixedVhd,
}

impl Kind {
    /// Every kind, in the order to name them to a person.
    pub const ALL: [Self; 10] = [
        Self::Raw,
        Self::MonolithicFlat,
        Self::TwoGbMaxExtentFlat,
        Self::Vmfs,
        Self::MonolithicSparse,
        Self::TwoGbMaxExtentSparse,
        Self::StreamOptimized,
        Self::VmfsSparse,
        Self::SeSparse,
        Self::FixedVhd,
    ];

    /// The kind's name, which for a VMDK is its `createType`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::MonolithicFlat => "monolithicFlat",
            Self::TwoGbMaxExtentFlat => "twoGbMaxExtentFlat",
            Self::Vmfs => "vmfs",
            Self::MonolithicSparse => "monolithicSparse",
            Self::TwoGbMaxExtentSparse => "twoGbMaxExtentSparse",
            Self::StreamOptimized => "streamOptimized",
            Self::VmfsSparse => "vmfsSparse",
            Self::SeSparse => "seSparse",
            Self::FixedVhd => "vhd",
        }
    }

    /// Whether the disk is one run of bytes in one file, so that an engine can do its own I/O.
    pub const fn is_flat(self) -> bool {
        matches!(self, Self::Raw | Self::MonolithicFlat | Self::Vmfs | Self::FixedVhd)
    }

    /// Whether this crate makes images of the kind.
    pub const fn is_creatable(self) -> bool {
        !matches!(self, Self::VmfsSparse | Self::SeSparse)
    }

    /// Whether an image of the kind can be written in place.
    pub const fn is_writable(self) -> bool {
        self.is_creatable() && !matches!(self, Self::StreamOptimized)
    }

    /// Bytes of a disk of this kind that others take: Azure refuses a VHD that is not a whole number
    /// of MiB, every other kind is taken as it is. Zeros at the end make up the difference.
    pub const fn padded_bytes(self, size_bytes: u64) -> u64 {
        match self {
            Self::FixedVhd => match size_bytes.checked_next_multiple_of(1 << 20) {
                Some(padded) => padded,
                None => size_bytes,
            },
            _ => size_bytes,
        }
    }

    /// What to know about an image of this kind and size before it is taken elsewhere: Hyper-V and
    /// qemu open a VHD of at most 2,040 GiB.
    pub fn caution(self, size_bytes: u64) -> Option<&'static str> {
        match self {
            Self::FixedVhd => vhd::caution(size_bytes),
            _ => None,
        }
    }

    /// The kind that a `createType` stands for. ESXi's names for how a flat disk was first
    /// allocated all mean a `vmfs` disk.
    pub(crate) fn of_create_type(name: &str) -> Option<Self> {
        let is = |other: &str| name.eq_ignore_ascii_case(other);
        if ["vmfsThin", "vmfsPreallocated", "vmfsEagerZeroedThick"].into_iter().any(is) {
            return Some(Self::Vmfs);
        }
        Self::ALL
            .into_iter()
            .filter(|kind| !matches!(kind, Self::Raw | Self::FixedVhd))
            .find(|kind| is(kind.name()))
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Kind {
    type Err = UnknownKind;

    fn from_str(name: &str) -> Result<Self, UnknownKind> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.name().eq_ignore_ascii_case(name))
            .ok_or_else(|| UnknownKind(name.chars().take(80).collect()))
    }
}

impl serde::Serialize for Kind {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// A name that is no [`Kind`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a kind of image; known are raw, monolithicFlat, twoGbMaxExtentFlat, vmfs, \
     monolithicSparse, twoGbMaxExtentSparse, streamOptimized, vmfsSparse, seSparse and vhd"
)]
pub struct UnknownKind(pub String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kind_names_round_trip() {
        for kind in Kind::ALL {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        assert_eq!("VMFS".parse(), Ok(Kind::Vmfs));
        assert_eq!("qcow2".parse::<Kind>(), Err(UnknownKind("qcow2".into())));
        assert_eq!(Kind::of_create_type("vmfsThin"), Some(Kind::Vmfs));
        assert_eq!(Kind::of_create_type("raw"), None);
    }
}
