//! What an image can be.

use std::fmt;
use std::str::FromStr;

use crate::ImageError;

/// The kind of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The bytes of the disk, nothing else.
    Raw,
    /// A descriptor and one `FLAT` extent: VMware Workstation's preallocated disk.
    MonolithicFlat,
    /// A descriptor and one `VMFS` extent named `NAME-flat.vmdk`: what ESXi boots from.
    Vmfs,
}

impl Kind {
    /// The `createType` of its descriptor; none for raw.
    pub fn create_type(self) -> Option<&'static str> {
        match self {
            Self::Raw => None,
            Self::MonolithicFlat => Some("monolithicFlat"),
            Self::Vmfs => Some("vmfs"),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.create_type().unwrap_or("raw"))
    }
}

impl FromStr for Kind {
    type Err = ImageError;
    fn from_str(text: &str) -> Result<Self, ImageError> {
        [Self::Raw, Self::MonolithicFlat, Self::Vmfs]
            .into_iter()
            .find(|kind| kind.to_string().eq_ignore_ascii_case(text))
            .ok_or_else(|| ImageError::UnknownKind { text: text.chars().take(80).collect() })
    }
}

/// The controller that a descriptor asks for (`ddb.adapterType`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum AdapterType {
    /// IDE.
    Ide,
    /// BusLogic SCSI.
    BusLogic,
    /// LSI Logic SCSI: also what paravirtual and SAS controllers are written as.
    #[default]
    LsiLogic,
}

impl fmt::Display for AdapterType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ide => "ide",
            Self::BusLogic => "buslogic",
            Self::LsiLogic => "lsilogic",
        })
    }
}

impl FromStr for AdapterType {
    type Err = ImageError;
    fn from_str(text: &str) -> Result<Self, ImageError> {
        [Self::Ide, Self::BusLogic, Self::LsiLogic]
            .into_iter()
            .find(|adapter| adapter.to_string() == text)
            .ok_or_else(|| ImageError::UnknownAdapter { text: text.chars().take(80).collect() })
    }
}
