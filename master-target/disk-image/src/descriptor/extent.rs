//! Extent lines: where a disk's sectors are.

use std::fmt;

use super::DescriptorError;
use crate::image::{DISK_BYTES_MAX, SECTOR_BYTES};

/// One line such as `RW 16777216 VMFS "disk-flat.vmdk"`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtentLine {
    /// Line number, from 1.
    pub line: usize,
    /// What may be done to it.
    pub access: ExtentAccess,
    /// Its length, sectors of 512 bytes; from 1 to 62 TiB.
    pub sectors: u64,
    /// `FLAT`, `VMFS`, `SPARSE` and so on, as written.
    pub extent_type: String,
    /// The file's name, in the descriptor's own bytes; none for `ZERO`.
    pub name: Vec<u8>,
    /// Where in its file it begins, sectors of 512 bytes; 0 where the line does not say.
    pub offset_sectors: u64,
}

/// What an extent line lets a program do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExtentAccess {
    /// `RW`
    ReadWrite,
    /// `RDONLY`
    ReadOnly,
    /// `NOACCESS`
    None,
}

impl fmt::Display for ExtentAccess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ReadWrite => "RW",
            Self::ReadOnly => "RDONLY",
            Self::None => "NOACCESS",
        })
    }
}

impl ExtentLine {
    pub(super) fn parse(line: usize, text: &[u8]) -> Result<Self, DescriptorError> {
        let fail = |problem| DescriptorError::Extent { line, problem };
        let (access, rest) = word(text);
        let access = access_of(access).ok_or(fail("it does not begin with an access"))?;
        let (sectors, rest) = word(rest);
        let sectors = number(sectors).ok_or(fail("its second word is no number of sectors"))?;
        if sectors == 0 || sectors > DISK_BYTES_MAX / SECTOR_BYTES {
            return Err(fail("its length is not between 1 sector and 62 TiB"));
        }
        let (extent_type, rest) = word(rest);
        if extent_type.is_empty() || !extent_type.iter().all(u8::is_ascii_alphanumeric) {
            return Err(fail("its third word is no extent type"));
        }
        let (name, rest) = quoted(rest).ok_or(fail("its file name does not stand in quotes"))?;
        // A partition's identity may follow the offset; it changes nothing here.
        let offset_sectors = match word(rest).0 {
            b"" => 0,
            offset => number(offset).ok_or(fail("what follows its file name is no offset"))?,
        };
        if offset_sectors > i64::MAX as u64 / SECTOR_BYTES - sectors {
            return Err(fail("its offset lies beyond any file"));
        }
        Ok(Self {
            line,
            access,
            sectors,
            extent_type: String::from_utf8_lossy(extent_type).into_owned(),
            name: name.to_vec(),
            offset_sectors,
        })
    }
}

pub(super) fn is_extent_line(text: &[u8]) -> bool {
    let (access, rest) = word(text);
    access_of(access).is_some() && !rest.is_empty()
}

fn access_of(word: &[u8]) -> Option<ExtentAccess> {
    [ExtentAccess::ReadWrite, ExtentAccess::ReadOnly, ExtentAccess::None]
        .into_iter()
        .find(|access| word.eq_ignore_ascii_case(access.to_string().as_bytes()))
}

fn word(text: &[u8]) -> (&[u8], &[u8]) {
    let text = text.trim_ascii_start();
    let end = text.iter().position(u8::is_ascii_whitespace).unwrap_or(text.len());
    text.split_at(end)
}

/// A name from the first quote to the *last* one of the line: the format has no escape, so a
/// quote inside can only be told so.
fn quoted(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let text = text.trim_ascii_start();
    if text.is_empty() {
        return Some((b"", b""));
    }
    let inner = text.strip_prefix(b"\"")?;
    let end = inner.iter().rposition(|byte| *byte == b'"')?;
    Some((&inner[..end], &inner[end + 1..]))
}

/// Decimal digits only: no sign, no blanks, no overflow.
fn number(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_every_form_are_read() {
        type Case = (&'static [u8], u64, &'static str, &'static [u8], u64);
        let cases: [Case; 6] = [
            (b"RW 1 FLAT \"a.vmdk\" 0", 1, "FLAT", b"a.vmdk", 0),
            (b"rw  20\tVMFS \"a b.vmdk\"", 20, "VMFS", b"a b.vmdk", 0),
            (b"RDONLY 3 FLAT \"it's \"so\".vmdk\" 63", 3, "FLAT", b"it's \"so\".vmdk", 63),
            (b"RW 5 ZERO", 5, "ZERO", b"", 0),
            (b"RW 5 FLAT \"\xe9.vmdk\" 7", 5, "FLAT", b"\xe9.vmdk", 7),
            (b"RW 133143986176 VMFS \"x\"", 133_143_986_176, "VMFS", b"x", 0),
        ];
        for (text, sectors, extent_type, name, offset_sectors) in cases {
            assert!(is_extent_line(text));
            let extent = ExtentLine::parse(1, text).expect("a good line");
            assert_eq!(
                (extent.sectors, &*extent.extent_type, &*extent.name, extent.offset_sectors),
                (sectors, extent_type, name, offset_sectors)
            );
        }
    }

    #[test]
    fn hostile_lines_are_refused() {
        let cases: [&[u8]; 13] = [
            b"RW",
            b"RW 0 FLAT \"a\" 0",
            b"RW -1 FLAT \"a\" 0",
            b"RW +1 FLAT \"a\" 0",
            b"RW 99999999999999999999999 FLAT \"a\" 0",
            b"RW 133143986177 FLAT \"a\" 0",
            b"RW 18446744073709551615 FLAT \"a\" 0",
            b"RW 1 FLAT \"a\" 18446744073709551615",
            b"RW 1 FLAT \"a\" -1",
            b"RW 1 FLAT \"a",
            b"RW 1 FLAT a.vmdk 0",
            b"RW 1 \"a\"",
            b"RW one FLAT \"a\" 0",
        ];
        for text in cases {
            let error = ExtentLine::parse(7, text).expect_err("a bad line");
            assert!(error.to_string().contains("line 7"), "{error}");
        }
    }
}
