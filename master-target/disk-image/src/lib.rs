//! Disk images: raw and flat VMDK, created, opened and kept honest.
//!
//! `FORMATS.md` beside this crate has the lines and fields of each kind, with their sources. The
//! crate has no async runtime and depends on nothing else of Backhaul.

mod create;
mod descriptor;
mod error;
mod geometry;
mod image;
mod kind;

pub use create::{CreateOptions, create};
pub use descriptor::{DESCRIPTOR_BYTES_MAX, Descriptor, Extent, ExtentKind};
pub use error::ImageError;
pub use geometry::Geometry;
pub use image::{FlatImage, OpenOptions, open};
pub use kind::{AdapterType, Kind};

/// Bytes of a sector, the unit of every number in a descriptor.
pub const SECTOR_BYTES: u64 = 512;

/// Largest virtual disk: 62 TiB, as VMware documents for VMFS.
pub const DISK_BYTES_MAX: u64 = 62 << 40;
