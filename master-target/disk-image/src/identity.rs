//! The identities a descriptor carries: content ID and disk UUID.

use std::{fmt, io, str::FromStr};

use rustix::rand::{GetRandomFlags, getrandom};

/// A VMDK content ID: changes with the content, so that a delta knows its parent.
///
/// Printed as the eight hexadecimal digits of a descriptor's `CID` line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ContentId(pub u32);

impl ContentId {
    /// The `parentCID` of a disk that has no parent.
    pub const NO_PARENT: Self = Self(0xffff_ffff);

    /// What VMware writes for a disk whose content was never written.
    pub const NEVER_WRITTEN: Self = Self(0xffff_fffe);

    /// A fresh ID that is not reserved.
    ///
    /// # Errors
    /// The kernel's random source fails.
    pub fn random() -> io::Result<Self> {
        loop {
            let id = Self(u32::from_ne_bytes(random_bytes()?));
            if !id.is_reserved() {
                return Ok(id);
            }
        }
    }

    /// Whether the value has a meaning of its own, and so names no content.
    pub const fn is_reserved(self) -> bool {
        self.0 == Self::NO_PARENT.0 || self.0 == Self::NEVER_WRITTEN.0
    }
}

impl fmt::Display for ContentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

/// A fresh `ddb.longContentID`: 24 random hexadecimal digits, then the content ID's eight, as
/// ESXi composes it.
pub(crate) fn long_content_id(id: ContentId) -> io::Result<String> {
    let mut text = String::with_capacity(32);
    for byte in random_bytes::<12>()? {
        text.push_str(&format!("{byte:02x}"));
    }
    text.push_str(&id.to_string());
    Ok(text)
}

/// A virtual disk's `ddb.uuid`.
///
/// Printed as VMware does: sixteen bytes in hexadecimal, separated by blanks, a dash in the
/// middle. Read with any mix of blanks and dashes, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DiskUuid(pub [u8; 16]);

impl DiskUuid {
    /// A fresh UUID that begins as those of ESXi do (`60 00 c2 9x`): a SCSI NAA identifier of
    /// type 6 under VMware's IEEE number 00:0c:29, which the guest sees as the disk's serial.
    ///
    /// # Errors
    /// The kernel's random source fails.
    pub fn random() -> io::Result<Self> {
        let mut bytes: [u8; 16] = random_bytes()?;
        bytes[..3].copy_from_slice(&[0x60, 0x00, 0xc2]);
        bytes[3] = 0x90 | (bytes[3] & 0x0f);
        Ok(Self(bytes))
    }
}

impl fmt::Display for DiskUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            match index {
                0 => {}
                8 => f.write_str("-")?,
                _ => f.write_str(" ")?,
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl FromStr for DiskUuid {
    type Err = InvalidUuid;

    fn from_str(text: &str) -> Result<Self, InvalidUuid> {
        let mut bytes = [0; 16];
        let mut digits = 0;
        for char in text.chars().filter(|char| !matches!(char, ' ' | '-')) {
            let value = char.to_digit(16).ok_or(InvalidUuid)? as u8;
            let byte = bytes.get_mut(digits / 2).ok_or(InvalidUuid)?;
            *byte = *byte << 4 | value;
            digits += 1;
        }
        if digits == 32 { Ok(Self(bytes)) } else { Err(InvalidUuid) }
    }
}

/// A text that is no [`DiskUuid`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a disk UUID is 32 hexadecimal digits, with blanks or dashes between them as you like")]
pub struct InvalidUuid;

pub(crate) fn random_bytes<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        match getrandom(&mut bytes[filled..], GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuid_reads_what_esxi_writes() {
        let text = "60 00 C2 9c 17 ba 20 95-ec f4 28 8c 7b d7 d9 e5";
        let uuid: DiskUuid = text.parse().expect("a UUID");
        assert_eq!(uuid.0[..4], [0x60, 0x00, 0xc2, 0x9c]);
        assert_eq!(uuid.to_string(), text.to_lowercase());
        assert_eq!("6000c29c-17ba-2095-ecf4-288c7bd7d9e5".parse(), Ok(uuid));
        for bad in ["", "60", "60 00 C2 9c 17 ba 20 95-ec f4 28 8c 7b d7 d9 e5 00", "é"] {
            assert_eq!(bad.parse::<DiskUuid>(), Err(InvalidUuid), "{bad}");
        }
    }

    #[test]
    fn fresh_identities_have_their_form() {
        let id = ContentId::random().expect("random");
        assert!(!id.is_reserved());
        let long = long_content_id(id).expect("random");
        assert_eq!(long.len(), 32);
        assert!(long.ends_with(&id.to_string()));
        let uuid = DiskUuid::random().expect("random");
        assert!(uuid.to_string().starts_with("60 00 c2 9"));
        assert_ne!(uuid, DiskUuid::random().expect("random"));
    }
}
