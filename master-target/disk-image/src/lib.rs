//! Disk images: raw, fixed VHD and every VMDK, created, opened, read, written, checked, repaired
//! and converted.
//!
//! ```no_run
//! use backhaul_disk_image::{CreateOptions, Kind, OpenOptions, create, open};
//! use std::path::Path;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let path = Path::new("/srv/images/db1.vmdk");
//! create(path, &CreateOptions::new(Kind::Vmfs, 8 << 30))?;
//! let image = open(path, &OpenOptions::writable())?;
//! image.write_at(b"boot", 0)?;
//! image.flush()?;
//! # Ok(()) }
//! ```
//!
//! [`open`] probes the file and hands out one [`DiskImage`] whatever the kind: [`ReadDisk`],
//! [`MapDisk`] and [`WriteDisk`] are what can be done with its disk. Nothing here needs
//! an async runtime: every call blocks, and all of them take `&self`, so a caller spreads work
//! over threads as it likes. A flat image also gives its file away ([`DiskImage::flat`]), for an
//! engine that submits its own I/O.
//!
//! The bytes of an image come from outside and are treated as hostile: every number is checked,
//! memory is bounded by constants (the largest: 16 MiB for a grain directory and 64 MiB to judge two of
//! which no table is where tables regularly are, 31 MiB for one of seSparse, 4 MiB for a descriptor, a
//! bit for every grain of the file while it is checked or read whole, and up to six where its copies
//! differ), and an extent outside the descriptor's folder is refused unless asked for. `FORMATS.md`
//! describes every kind, with the published source of each field.

mod bulk;
mod create;
mod delta;
pub mod descriptor;
mod disk;
mod error;
mod extent;
mod fix;
mod folder;
mod geometry;
mod identity;
mod image;
mod kind;
mod open;
pub mod ops;
mod recover;
mod report;
mod sparse;
pub mod storage;
mod stream;
mod vhd;

pub use create::{CreateOptions, check_new, create, create_storage, create_with};
pub use disk::FlatImage;
pub use error::{ErrorKind, ImageError, Result};
pub use fix::{FIXES_MAX, Fix};
pub use geometry::{AdapterType, Geometry, UnknownAdapterType};
pub use identity::{ContentId, DiskUuid, InvalidUuid};
pub use image::{
    DISK_BYTES_MAX, Deep, DiskImage, FlatExtent, MapDisk, ReadDisk, Run, RunState, Runs,
    SECTOR_BYTES, WriteDisk,
};
pub use kind::{Kind, UnknownKind};
pub use open::{CHAIN_LINKS_MAX, OpenOptions, open, open_storage};
pub use report::{
    CheckReport, ExtentInfo, FINDINGS_MAX, Finding, ImageInfo, Progress, Severity, Silent,
};
