//! The text of a descriptor, kept byte for byte.

use std::ops::Range;

use super::{DESCRIPTOR_BYTES_MAX, DescriptorError, UTF8_MARK};

/// A descriptor's bytes, and where its lines and values are in them.
///
/// Only values are ever replaced, in place: comments, unknown lines, order, blanks and line ends
/// stay as whoever wrote them left them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DescriptorText {
    bytes: Vec<u8>,
}

/// A `key = "value"` line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry<'a> {
    /// Line number, from 1.
    pub line: usize,
    /// The key, without blanks around it.
    pub key: &'a [u8],
    /// The value, without quotes and the blanks around them.
    pub value: &'a [u8],
    value_range: Range<usize>,
}

impl Entry<'_> {
    pub(super) fn is(&self, key: &str) -> bool {
        self.key.eq_ignore_ascii_case(key.as_bytes())
    }
}

impl DescriptorText {
    /// Takes any bytes up to the bound.
    ///
    /// # Errors
    /// There are more than [`DESCRIPTOR_BYTES_MAX`] bytes.
    pub fn new(bytes: &[u8]) -> Result<Self, DescriptorError> {
        if bytes.len() > DESCRIPTOR_BYTES_MAX {
            return Err(DescriptorError::TooLarge);
        }
        Ok(Self { bytes: bytes.to_vec() })
    }

    /// All bytes, as taken but for values set since.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The lines with their numbers from 1, without line ends and the blanks around them.
    ///
    /// The text stops at the first NUL: qemu pads a descriptor that it rewrites with NULs.
    pub fn lines(&self) -> impl Iterator<Item = (usize, &[u8])> {
        self.ranges().map(|(line, range)| (line, &self.bytes[range]))
    }

    /// The `key = value` lines, in order.
    pub fn entries(&self) -> impl Iterator<Item = Entry<'_>> {
        self.ranges().filter_map(|(line, range)| self.entry(line, range))
    }

    /// The first value of a key; keys do not tell capitals from small letters.
    pub fn get(&self, key: &str) -> Option<&[u8]> {
        self.find(key).map(|entry| entry.value)
    }

    /// The first entry of a key.
    pub fn find(&self, key: &str) -> Option<Entry<'_>> {
        self.entries().find(|entry| entry.is(key))
    }

    /// Replaces the first value of a key, and says whether the key is there.
    pub(crate) fn set(&mut self, key: &str, value: &str) -> bool {
        let Some(range) = self.find(key).map(|entry| entry.value_range) else {
            return false;
        };
        self.bytes.splice(range, value.bytes());
        true
    }

    fn entry(&self, line: usize, range: Range<usize>) -> Option<Entry<'_>> {
        let text = &self.bytes[range.clone()];
        if text.first() == Some(&b'#') || super::extent::is_extent_line(text) {
            return None;
        }
        let equals = text.iter().position(|byte| *byte == b'=')?;
        let key = text[..equals].trim_ascii();
        let value_range =
            unquoted(&self.bytes, trimmed(&self.bytes, range.start + equals + 1..range.end));
        Some(Entry { line, key, value: &self.bytes[value_range.clone()], value_range })
    }

    fn ranges(&self) -> impl Iterator<Item = (usize, Range<usize>)> {
        let end = self.bytes.iter().position(|byte| *byte == 0).unwrap_or(self.bytes.len());
        let mut start = if self.bytes[..end].starts_with(UTF8_MARK) { UTF8_MARK.len() } else { 0 };
        self.bytes[start..end].split_inclusive(|byte| *byte == b'\n').enumerate().map(
            move |(index, line)| {
                let range = start..start + line.len();
                start = range.end;
                (index + 1, trimmed(&self.bytes, range))
            },
        )
    }
}

fn trimmed(bytes: &[u8], range: Range<usize>) -> Range<usize> {
    let text = &bytes[range.clone()];
    let start = range.start + (text.len() - text.trim_ascii_start().len());
    start..start + text.trim_ascii().len()
}

fn unquoted(bytes: &[u8], range: Range<usize>) -> Range<usize> {
    match &bytes[range.clone()] {
        [b'"', .., b'"'] => range.start + 1..range.end - 1,
        _ => range,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(bytes: &[u8]) -> DescriptorText {
        DescriptorText::new(bytes).expect("small")
    }

    #[test]
    fn set_changes_the_value_and_nothing_else() {
        let before = b"\xef\xbb\xbf# x\r\n  cid = \"1\" \r\nfoo\r\n#CID=3\nCID=2\n\0\0CID=4";
        let mut t = text(before);
        assert!(t.set("CID", "abcdef"));
        assert_eq!(
            t.as_bytes(),
            b"\xef\xbb\xbf# x\r\n  cid = \"abcdef\" \r\nfoo\r\n#CID=3\nCID=2\n\0\0CID=4"
        );
        assert!(!t.set("ddb.longContentID", "1"));
    }

    #[test]
    fn entries_skip_comments_extents_and_padding() {
        let t = text(b"# a=1\nRW 1 FLAT \"a=b\" 0\nb = \"2\"\nc=\"\nd=\n=5\n\0e=6");
        let entries: Vec<_> =
            t.entries().map(|entry| (entry.line, entry.key, entry.value)).collect();
        assert_eq!(
            entries,
            [
                (3, b"b".as_slice(), b"2".as_slice()),
                (4, b"c", b"\""),
                (5, b"d", b""),
                (6, b"", b"5"),
            ]
        );
    }
}
