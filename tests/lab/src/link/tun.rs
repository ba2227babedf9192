//! TUN devices: where packets of a namespace come out as bytes.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

/// Makes the TUN device `name` in the network namespace of the calling thread.
///
/// Each read gives one whole IP packet and each write takes one, without a header of the
/// driver's (`IFF_NO_PI`). Reads and writes do not block. The device vanishes with the file.
///
/// # Errors
/// What the kernel says: `EPERM` without `CAP_NET_ADMIN`, `EBUSY` when the name is taken.
pub(super) fn open(name: &str) -> io::Result<File> {
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
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`; `request` is one, alive and not shared.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

/// The driver's control device.
pub(super) const DEVICE: &str = "/dev/net/tun";
