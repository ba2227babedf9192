//! TUN devices: where packets of a namespace come out as bytes.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

/// Makes the TUN device `name` in the network namespace of the calling thread.
///
/// Each read gives one whole IP packet, or several of one flow as one, and each write takes as much, after a
/// header that says which ([`super::offload`]). Reads and writes do not block. The device vanishes with the file.
///
/// Returns whether several may be written as one: that takes Linux 6.2.
///
/// # Errors
/// What the kernel says: `EPERM` without `CAP_NET_ADMIN`, `EBUSY` when the name is taken.
pub(super) fn open(name: &str) -> io::Result<(File, bool)> {
    let file =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(DEVICE)?;
    // SAFETY: `ifreq` is plain data (bytes, integers and a union of those); all zeroes is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "device name is too long"));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`; `request` is one, alive and not shared.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let joins = announce(&file, libc::TUN_F_CSUM | libc::TUN_F_USO4 | libc::TUN_F_USO6).is_ok();
    if !joins {
        announce(&file, libc::TUN_F_CSUM)?;
    }
    Ok((file, joins))
}

/// Says what the reader of the device does itself.
fn announce(file: &File, features: libc::c_uint) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes a number, not a pointer.
    let result = unsafe {
        libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(features))
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The driver's control device.
pub(super) const DEVICE: &str = "/dev/net/tun";
