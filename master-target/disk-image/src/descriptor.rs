//! The text descriptor of a VMDK. Its bytes are hostile: everything is bounded and checked.

use std::path::{Component, Path, PathBuf};

/// Largest descriptor that is read. Real ones are under 2 KiB, a disk split in 2 GiB extents at
/// 62 TiB needs about 2 MiB.
pub const DESCRIPTOR_BYTES_MAX: u64 = 4 << 20;

/// A descriptor, line by line: what is not understood is kept when it is written again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    lines: Vec<Vec<u8>>,
}

/// One extent line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extent {
    /// Size in sectors.
    pub sectors: u64,
    /// What kind of file it is.
    pub kind: ExtentKind,
    /// The file, relative to the descriptor's folder, as it is named there.
    pub file: PathBuf,
    /// Where the extent starts in the file, in sectors.
    pub offset_sectors: u64,
}

/// The kind of an extent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExtentKind {
    /// Flat bytes.
    Flat,
    /// Flat bytes on VMFS.
    Vmfs,
    /// Any other, by its name.
    Other(String),
}

impl Descriptor {
    /// Takes a text apart. `Err` with a sentence when it is no descriptor.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let head = &bytes[..bytes.len().min(512)];
        let marked = head
            .split(|byte| *byte == b'\n')
            .any(|line| line.trim_ascii().eq_ignore_ascii_case(b"# Disk DescriptorFile"));
        if !marked {
            return Err("this is not a VMDK descriptor: `# Disk DescriptorFile` is missing".into());
        }
        let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        Ok(Self {
            lines: text.split_inclusive(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect(),
        })
    }

    /// Makes a descriptor of these lines.
    pub fn from_text(text: &str) -> Self {
        let lines = text.split_inclusive('\n').map(|line| line.as_bytes().to_vec()).collect();
        Self { lines }
    }

    /// The text, as it was read but for what was set.
    pub fn bytes(&self) -> Vec<u8> {
        self.lines.concat()
    }

    /// The value of `key`, without quotes. Keys are compared without regard to case, as VMware does.
    pub fn get(&self, key: &str) -> Option<String> {
        let line = self.lines.iter().find(|line| is_key(line, key))?;
        let value = line.iter().position(|byte| *byte == b'=').map(|at| &line[at + 1..])?;
        let value = value.trim_ascii();
        let value = value.strip_prefix(b"\"").and_then(|v| v.strip_suffix(b"\"")).unwrap_or(value);
        Some(self.text(value))
    }

    /// Sets `key` in its line, or in a new one at the end, keeping the line's ending.
    pub fn set(&mut self, key: &str, value: &str) {
        let ending: &[u8] =
            if self.lines.iter().any(|line| line.ends_with(b"\r\n")) { b"\r\n" } else { b"\n" };
        if let Some(line) = self.lines.iter_mut().find(|line| is_key(line, key)) {
            let at = line.iter().position(|byte| *byte == b'=').unwrap_or(line.len());
            let ended = line.ends_with(b"\n");
            line.truncate(at);
            line.extend_from_slice(b"=");
            line.extend_from_slice(value.as_bytes());
            if ended {
                line.extend_from_slice(ending);
            }
            return;
        }
        if let Some(last) = self.lines.last_mut().filter(|last| !last.ends_with(b"\n")) {
            last.extend_from_slice(ending);
        }
        let mut line = format!("{key}={value}").into_bytes();
        line.extend_from_slice(ending);
        self.lines.push(line);
    }

    /// The content id.
    pub fn content_id(&self) -> Option<u32> {
        u32::from_str_radix(&self.get("CID")?, 16).ok()
    }

    /// The extents, in order. `Err` with a sentence that names the line.
    pub fn extents(&self) -> Result<Vec<Extent>, String> {
        let mut extents = Vec::new();
        for (index, line) in self.lines.iter().enumerate() {
            let line = self.text(line.trim_ascii());
            let access = line.split_ascii_whitespace().next().unwrap_or_default();
            if !["RW", "RDONLY", "NOACCESS"].contains(&access) {
                continue;
            }
            let extent = parse_extent(&line)
                .map_err(|sentence| format!("line {}: {sentence}", index + 1))?;
            extents.push(extent);
        }
        Ok(extents)
    }

    /// Text in the descriptor's encoding: UTF-8, or else windows-1252, as its byte values.
    fn text(&self, bytes: &[u8]) -> String {
        match str::from_utf8(bytes) {
            Ok(text) => text.to_owned(),
            Err(_) => bytes.iter().map(|byte| char::from(*byte)).collect(),
        }
    }
}

fn is_key(line: &[u8], key: &str) -> bool {
    let Some(at) = line.iter().position(|byte| *byte == b'=') else { return false };
    line[..at].trim_ascii().eq_ignore_ascii_case(key.as_bytes())
}

fn parse_extent(line: &str) -> Result<Extent, String> {
    let mut words = line.splitn(4, char::is_whitespace).skip(1);
    let sectors = words
        .next()
        .and_then(|word| word.parse::<u64>().ok())
        .filter(|sectors| *sectors > 0 && *sectors <= crate::DISK_BYTES_MAX / crate::SECTOR_BYTES)
        .ok_or("an extent's size is not a number of sectors up to 62 TiB")?;
    let kind = match words.next().unwrap_or_default() {
        "FLAT" => ExtentKind::Flat,
        "VMFS" => ExtentKind::Vmfs,
        other => ExtentKind::Other(other.chars().take(32).collect()),
    };
    let rest = words.next().unwrap_or_default().trim();
    let rest = rest.strip_prefix('"').ok_or("an extent's file name must stand in quotes")?;
    let end = rest.rfind('"').ok_or("an extent's file name lacks its closing quote")?;
    let (file, after) = (&rest[..end], rest[end + 1..].trim());
    let offset_sectors = match after {
        "" => 0,
        number => number
            .split_ascii_whitespace()
            .next()
            .and_then(|word| word.parse::<u64>().ok())
            .filter(|offset| *offset <= u64::MAX / crate::SECTOR_BYTES / 2)
            .ok_or("an extent's offset is not a number of sectors")?,
    };
    Ok(Extent { sectors, kind, file: PathBuf::from(file), offset_sectors })
}

/// Whether a file named in a descriptor stays in the descriptor's folder.
pub(crate) fn stays_inside(file: &Path) -> bool {
    let mut parts = file.components();
    matches!(parts.next(), Some(Component::Normal(_)))
        && parts.all(|part| matches!(part, Component::Normal(_)))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::{Descriptor, ExtentKind, stays_inside};

    const TEXT: &str = "# Disk DescriptorFile\r\nversion=1\r\nCID=fffffffe\r\n# mine\r\nRW 8 VMFS \"my \"disk\"-flat.vmdk\"\r\nddb.strange = \"1\"";

    #[test]
    fn what_is_not_understood_is_kept() {
        let mut descriptor = Descriptor::parse(TEXT.as_bytes()).unwrap();
        assert_eq!(descriptor.bytes(), TEXT.as_bytes());
        descriptor.set("cid", "12345678");
        descriptor.set("ddb.new", "\"2\"");
        let text = String::from_utf8(descriptor.bytes()).unwrap();
        assert!(text.contains("\r\nCID=12345678\r\n# mine\r\n"), "{text}");
        assert!(text.ends_with("ddb.strange = \"1\"\r\nddb.new=\"2\"\r\n"), "{text}");
        let extents = descriptor.extents().unwrap();
        assert_eq!((extents[0].sectors, &extents[0].kind), (8, &ExtentKind::Vmfs));
        assert_eq!(extents[0].file, Path::new("my \"disk\"-flat.vmdk"));
    }

    #[test]
    fn paths_that_leave_the_folder_are_told() {
        for bad in ["/etc/passwd", "../x", "a/../../x", "", ".", "./x"] {
            assert!(!stays_inside(Path::new(bad)), "{bad}");
        }
        assert!(stays_inside(Path::new("a b/x.vmdk")));
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".*", bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut all = b"# Disk DescriptorFile\n".to_vec();
            all.extend_from_slice(text.as_bytes());
            all.extend_from_slice(b"\nRW ");
            all.extend_from_slice(&bytes);
            let descriptor = Descriptor::parse(&all).unwrap();
            let _ = (descriptor.extents(), descriptor.content_id(), descriptor.get("RW"));
        }
    }
}
