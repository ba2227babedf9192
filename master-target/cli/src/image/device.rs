//! Writing a disk over a block device.

use std::fs::File;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, anyhow, ensure};
use backhaul_disk_image::ops::{self, ConvertOptions, ConvertReport};
use backhaul_disk_image::{DiskImage, ErrorKind, ImageError, Kind, Progress};
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::replace::chain_files;

/// Whether `path` leads to a block device.
pub(super) fn is_device(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.file_type().is_block_device())
}

/// Writes `source`'s disk over `device`, which is neither in use nor a part of what is read.
pub(super) fn overwrite(
    source: &dyn DiskImage,
    device: &Path,
    options: &ConvertOptions,
    force: bool,
    progress: &mut dyn Progress,
) -> anyhow::Result<ConvertReport> {
    let shown = device.display();
    let kind = options.create.kind;
    ensure!(kind == Kind::Raw, "{shown} is a block device: it takes `-O raw`, not {kind}");
    ensure!(
        force,
        "{shown} is a block device: all that is on it would be overwritten; if it is the right one, run this with --force"
    );
    let canonical = device.canonicalize().with_context(|| shown.to_string())?;
    ensure!(
        !chain_files(&source.info()?).contains(&canonical),
        "{shown} holds what is to be converted; choose another device"
    );
    // Held to the end: the kernel lets nobody mount the device meanwhile.
    let _held = hold(&canonical)?;
    ops::overwrite(source, &canonical, options, progress).map_err(|error| match error.kind() {
        ErrorKind::Cancelled => anyhow!("interrupted: {shown} holds a part of the new disk"),
        ErrorKind::Invalid => error.into(),
        _ => anyhow::Error::from(error).context(format!("{shown} holds a part of the new disk")),
    })
}

/// Opens a block device that neither a mount nor a volume manager uses (`O_EXCL`, open(2)).
fn hold(device: &Path) -> anyhow::Result<File> {
    let exclusive = OFlags::EXCL.bits() as i32;
    let file = File::options().read(true).write(true).custom_flags(exclusive).open(device);
    file.map_err(|error| match Errno::from_io_error(&error) {
        Some(Errno::BUSY) => anyhow!(
            "{} is in use: it, or a part of it, is mounted or belongs to RAID, LVM or another program; free it first",
            device.display()
        ),
        _ => ImageError::io("open", device, error).into(),
    })
}
