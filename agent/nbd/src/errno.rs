//! The errors a reply can carry.

use std::fmt;
use std::io;

/// An error number of the protocol (proto.md, "Error values").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub u32);

impl Errno {
    /// Operation not permitted: the export is read-only.
    pub const EPERM: Self = Self(1);
    /// Input/output error.
    pub const EIO: Self = Self(5);
    /// Cannot allocate memory.
    pub const ENOMEM: Self = Self(12);
    /// Invalid argument.
    pub const EINVAL: Self = Self(22);
    /// No space left.
    pub const ENOSPC: Self = Self(28);
    /// Larger than the server takes.
    pub const EOVERFLOW: Self = Self(75);
    /// Operation not supported.
    pub const ENOTSUP: Self = Self(95);
    /// The export is being shut down.
    pub const ESHUTDOWN: Self = Self(108);
}

impl From<io::Error> for Errno {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(28 | 122) => Self::ENOSPC, // ENOSPC, EDQUOT
            Some(12) => Self::ENOMEM,
            Some(95) => Self::ENOTSUP,
            Some(1 | 13 | 30) => Self::EPERM, // EPERM, EACCES, EROFS
            _ => Self::EIO,
        }
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match *self {
            Self::EPERM => "EPERM",
            Self::EIO => "EIO",
            Self::ENOMEM => "ENOMEM",
            Self::EINVAL => "EINVAL",
            Self::ENOSPC => "ENOSPC",
            Self::EOVERFLOW => "EOVERFLOW",
            Self::ENOTSUP => "ENOTSUP",
            Self::ESHUTDOWN => "ESHUTDOWN",
            Self(other) => return write!(f, "errno {other}"),
        };
        f.write_str(name)
    }
}
