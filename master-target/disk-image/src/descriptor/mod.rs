//! VMDK descriptors: read with distrust, changed with care, composed from scratch.
//!
//! A descriptor is a small text: a header (`key=value`), extent lines, and the disk data base
//! (`ddb.key = "value"`). `FORMATS.md` has the table of lines.

mod compose;
mod encoding;
mod extent;
mod text;

pub(crate) use compose::{Composition, compose};
pub(crate) use encoding::{file_names, shown};
pub use extent::{ExtentAccess, ExtentLine};
pub use text::{DescriptorText, Entry};

use crate::identity::{ContentId, DiskUuid};

/// Bytes of the largest descriptor that is read.
///
/// A descriptor of one extent has less than 2 KiB; one of 62 TiB in extents of 2 GiB has 32,000
/// lines, which are about 2 MiB.
pub const DESCRIPTOR_BYTES_MAX: usize = 4 << 20;

/// A descriptor whose header and extent lines make sense.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    text: DescriptorText,
    content_id: ContentId,
    parent_content_id: ContentId,
    create_type: String,
    extents: Vec<ExtentLine>,
}

impl Descriptor {
    /// Whether a file that begins with these bytes claims to be a descriptor.
    ///
    /// VMware and qemu take a file whose first line that is no comment is `version=`; a leading
    /// `# Disk DescriptorFile` counts as well, so that a damaged descriptor is reported as one and
    /// not taken for a tiny raw disk.
    pub fn is_claimed_by(start: &[u8]) -> bool {
        let start = start.strip_prefix(UTF8_MARK).unwrap_or(start);
        for line in start.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii) {
            match line {
                [] => {}
                [b'#', comment @ ..] => {
                    if comment.trim_ascii().eq_ignore_ascii_case(b"disk descriptorfile") {
                        return true;
                    }
                }
                _ => return line.get(..8).is_some_and(|key| key.eq_ignore_ascii_case(b"version=")),
            }
        }
        false
    }

    /// Reads a descriptor.
    ///
    /// # Errors
    /// It is too large, lacks or repeats a line it needs, or a line makes no sense.
    pub fn parse(bytes: &[u8]) -> Result<Self, DescriptorError> {
        let text = DescriptorText::new(bytes)?;
        let version = required(&text, "version")?;
        if !matches!(version.value, b"1" | b"2" | b"3" | b"4") {
            return Err(version.bad("a version from 1 to 4"));
        }
        let content_id = required(&text, "CID")?.content_id()?;
        let parent_content_id = match single(&text, "parentCID")? {
            Some(field) => field.content_id()?,
            None => ContentId::NO_PARENT,
        };
        let create_type = required(&text, "createType")?;
        if !create_type.value.iter().all(u8::is_ascii_alphanumeric) {
            return Err(create_type.bad("the name of a kind"));
        }
        let create_type = String::from_utf8_lossy(create_type.value).into_owned();
        let extents = text
            .lines()
            .filter(|(_, line)| extent::is_extent_line(line))
            .map(|(number, line)| ExtentLine::parse(number, line))
            .collect::<Result<_, _>>()?;
        Ok(Self { content_id, parent_content_id, create_type, extents, text })
    }

    /// The text, as read but for what was set since.
    pub fn text(&self) -> &DescriptorText {
        &self.text
    }

    /// `CID`
    pub fn content_id(&self) -> ContentId {
        self.content_id
    }

    /// `parentCID`; [`ContentId::NO_PARENT`] where the line is absent.
    pub fn parent_content_id(&self) -> ContentId {
        self.parent_content_id
    }

    /// `createType`
    pub fn create_type(&self) -> &str {
        &self.create_type
    }

    /// The extent lines, in order.
    pub fn extents(&self) -> &[ExtentLine] {
        &self.extents
    }

    /// `encoding`
    pub fn encoding(&self) -> Option<&[u8]> {
        self.text.get("encoding")
    }

    /// `ddb.uuid`; none where it is absent or not one.
    pub fn uuid(&self) -> Option<DiskUuid> {
        str::from_utf8(self.text.get("ddb.uuid")?).ok()?.parse().ok()
    }

    /// Sets `CID`, and `ddb.longContentID` where the descriptor has it.
    pub(crate) fn set_content_id(&mut self, id: ContentId, long_content_id: &str) {
        self.content_id = id;
        self.text.set("CID", &id.to_string());
        self.text.set("ddb.longContentID", long_content_id);
    }
}

/// Why a text is no descriptor.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DescriptorError {
    /// More bytes than any descriptor has.
    #[error(
        "it begins as a VMDK descriptor but has more than {DESCRIPTOR_BYTES_MAX} bytes; \
         if it is a raw disk, open it as raw"
    )]
    TooLarge,
    /// A line that every descriptor has is absent.
    #[error("its descriptor has no {key} line; restore it from a copy or write the line")]
    Missing {
        /// The key.
        key: &'static str,
    },
    /// A line of which there may be one is there twice, and readers disagree which one counts.
    #[error("line {line} of its descriptor gives {key} a second time; remove one of the two")]
    Repeated {
        /// Line number of the second, from 1.
        line: usize,
        /// The key.
        key: &'static str,
    },
    /// A value makes no sense.
    #[error(
        "line {line} of its descriptor gives {key} the value {value:?}, which is not {expected}; correct it"
    )]
    Value {
        /// Line number, from 1.
        line: usize,
        /// The key.
        key: &'static str,
        /// The start of the value.
        value: String,
        /// What it should be.
        expected: &'static str,
    },
    /// An extent line makes no sense.
    #[error("line {line} of its descriptor is no extent line: {problem}; correct it")]
    Extent {
        /// Line number, from 1.
        line: usize,
        /// What is wrong.
        problem: &'static str,
    },
}

/// A header line, with the name to report it by.
struct Field<'a> {
    key: &'static str,
    line: usize,
    value: &'a [u8],
}

impl Field<'_> {
    fn bad(&self, expected: &'static str) -> DescriptorError {
        // A message that repeats kilobytes of a hostile value helps nobody.
        let start = &self.value[..self.value.len().min(40)];
        DescriptorError::Value {
            line: self.line,
            key: self.key,
            value: String::from_utf8_lossy(start).into_owned(),
            expected,
        }
    }

    fn content_id(&self) -> Result<ContentId, DescriptorError> {
        let digits = Some(self.value)
            .filter(|digits| (1..=8).contains(&digits.len()))
            .filter(|digits| digits.iter().all(u8::is_ascii_hexdigit))
            .and_then(|digits| str::from_utf8(digits).ok())
            .and_then(|digits| u32::from_str_radix(digits, 16).ok());
        digits.map(ContentId).ok_or_else(|| self.bad("one to eight hexadecimal digits"))
    }
}

fn required<'a>(text: &'a DescriptorText, key: &'static str) -> Result<Field<'a>, DescriptorError> {
    single(text, key)?.ok_or(DescriptorError::Missing { key })
}

fn single<'a>(
    text: &'a DescriptorText,
    key: &'static str,
) -> Result<Option<Field<'a>>, DescriptorError> {
    let mut found = None;
    for entry in text.entries().filter(|entry| entry.is(key)) {
        if found.is_some() {
            return Err(DescriptorError::Repeated { line: entry.line, key });
        }
        found = Some(Field { key, line: entry.line, value: entry.value });
    }
    Ok(found)
}

/// Some editors begin a text with it.
const UTF8_MARK: &[u8] = b"\xef\xbb\xbf";

#[cfg(test)]
mod tests {
    use super::*;

    const ESXI: &[u8] = b"# Disk DescriptorFile\nversion=1\nencoding=\"UTF-8\"\nCID=67af3643\n\
        parentCID=ffffffff\nisNativeSnapshot=\"no\"\ncreateType=\"vmfs\"\n\n# Extent description\n\
        RW 3565176930 VMFS \"bcvm01-18-flat.vmdk\"\n\n# The Disk Data Base\n#DDB\n\n\
        ddb.adapterType = \"lsilogic\"\n\
        ddb.uuid = \"60 00 C2 9c 17 ba 20 95-ec f4 28 8c 7b d7 d9 e5\"\n\
        ddb.longContentID = \"ba63be80434b1784cf49213067af3643\"\nddb.unknown = \"kept\"\n";

    fn replaced(from: &str, to: &str) -> Vec<u8> {
        String::from_utf8_lossy(ESXI).replace(from, to).into_bytes()
    }

    #[test]
    fn esxi_descriptor_is_read() {
        let descriptor = Descriptor::parse(ESXI).expect("a descriptor");
        assert_eq!(descriptor.content_id(), ContentId(0x67af_3643));
        assert_eq!(descriptor.parent_content_id(), ContentId::NO_PARENT);
        assert_eq!(descriptor.create_type(), "vmfs");
        assert_eq!(descriptor.extents()[0].sectors, 3_565_176_930);
        assert_eq!(descriptor.extents()[0].line, 10);
        assert!(descriptor.uuid().is_some());
    }

    #[test]
    fn a_new_content_id_changes_two_values_only() {
        for text in [ESXI.to_vec(), replaced("\n", "\r\n"), replaced("\"67", "\"67"), {
            let mut padded = ESXI.to_vec();
            padded.resize(10_240, 0);
            padded
        }] {
            let mut descriptor = Descriptor::parse(&text).expect("a descriptor");
            descriptor.set_content_id(ContentId(1), "0123456789abcdef0123456700000001");
            let expected = String::from_utf8_lossy(&text)
                .replace("CID=67af3643", "CID=00000001")
                .replace("ba63be80434b1784cf49213067af3643", "0123456789abcdef0123456700000001");
            assert_eq!(descriptor.text().as_bytes(), expected.as_bytes());
            assert_eq!(Descriptor::parse(expected.as_bytes()), Ok(descriptor));
        }
    }

    #[test]
    fn bad_headers_are_named_with_their_line() {
        let cases = [
            (replaced("version=1\n", ""), "no version line"),
            (replaced("version=1", "version=9"), "line 2"),
            (replaced("CID=67af3643\np", "p"), "no CID line"),
            (replaced("67af3643", "67af36430"), "line 4"),
            (replaced("67af3643", "+7af3643"), "line 4"),
            (replaced("parentCID=ffffffff", "parentCID="), "line 5"),
            (replaced("createType=\"vmfs\"\n", ""), "no createType"),
            (replaced("\"vmfs\"", "\"vm fs\""), "line 7"),
            (replaced("# Extent description", "CID=1"), "line 9"),
            (replaced("VMFS \"", "VMFS '"), "line 10"),
        ];
        for (text, expected) in cases {
            let error = Descriptor::parse(&text).expect_err(expected).to_string();
            assert!(error.contains(expected), "{error}: {expected}");
        }
        let huge = vec![b'#'; DESCRIPTOR_BYTES_MAX + 1];
        assert_eq!(Descriptor::parse(&huge), Err(DescriptorError::TooLarge));
    }

    #[test]
    fn claims_are_told_from_data() {
        let claims: [&[u8]; 6] = [
            ESXI,
            b"# disk descriptorfile",
            b"\n\n#x\nversion=1",
            b"\xef\xbb\xbfversion=2\r\n",
            b"#\r\n# Disk DescriptorFile\r\nnonsense",
            b"VERSION=1",
        ];
        assert!(claims.iter().all(|start| Descriptor::is_claimed_by(start)));
        let others: [&[u8]; 5] =
            [b"", b"\0\0\0\0", b"KDMV\x01", b"\xeb\x63\x90", b"# a comment\nfoo"];
        assert!(!others.iter().any(|start| Descriptor::is_claimed_by(start)));
    }
}
