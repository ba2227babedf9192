//! File names in the encodings that descriptors come in.

use std::{ffi::OsString, os::unix::ffi::OsStringExt};

/// The file names that `name` may mean, likeliest first.
///
/// The `encoding` line says how the descriptor was written, but not how the files were named when
/// somebody copied them here: a tool may have translated the name to UTF-8 or kept its bytes. So
/// both are tried.
pub(crate) fn file_names(name: &[u8], encoding: Option<&[u8]>) -> Vec<OsString> {
    let as_is = OsString::from_vec(name.to_vec());
    if name.is_ascii() {
        return vec![as_is];
    }
    let declared_1252 = encoding.is_some_and(|encoding| {
        ["windows-1252", "cp1252", "iso-8859-1"]
            .iter()
            .any(|known| encoding.eq_ignore_ascii_case(known.as_bytes()))
    });
    // A descriptor without the line is older than the line: UTF-8, or the Western code page.
    let undeclared_1252 = encoding.is_none() && str::from_utf8(name).is_err();
    if declared_1252 || undeclared_1252 {
        vec![OsString::from(windows_1252(name)), as_is]
    } else {
        vec![as_is]
    }
}

/// The name as text for a message.
pub(crate) fn shown(name: &[u8], encoding: Option<&[u8]>) -> String {
    file_names(name, encoding).remove(0).to_string_lossy().into_owned()
}

/// Windows code page 1252. Bytes without a character become C1 controls, as WHATWG's table has
/// it, so that nothing is lost.
fn windows_1252(bytes: &[u8]) -> String {
    bytes
        .iter()
        .map(|byte| match byte {
            0x80..=0x9f => CODE_PAGE_1252_HIGH[usize::from(byte - 0x80)],
            _ => char::from(*byte),
        })
        .collect()
}

/// Characters 0x80 to 0x9f; all others are those of Latin-1.
#[rustfmt::skip]
const CODE_PAGE_1252_HIGH: [char; 32] = [
    '€', '\u{81}', '‚', 'ƒ', '„', '…', '†', '‡', 'ˆ', '‰', 'Š', '‹', 'Œ', '\u{8d}', 'Ž', '\u{8f}',
    '\u{90}', '‘', '’', '“', '”', '•', '–', '—', '˜', '™', 'š', '›', 'œ', '\u{9d}', 'ž', 'Ÿ',
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_tried_in_its_encoding_then_as_it_is() {
        let western = b"B\xfcro\x80.vmdk";
        let raw = OsString::from_vec(western.to_vec());
        for encoding in [None, Some(b"windows-1252".as_slice()), Some(b"Windows-1252")] {
            assert_eq!(file_names(western, encoding), [OsString::from("Büro€.vmdk"), raw.clone()]);
        }
        assert_eq!(file_names(western, Some(b"UTF-8")), [raw]);
        let utf8 = "Büro.vmdk";
        assert_eq!(file_names(utf8.as_bytes(), None), [utf8]);
        assert_eq!(file_names(utf8.as_bytes(), Some(b"UTF-8")), [utf8]);
        assert_eq!(file_names(utf8.as_bytes(), Some(b"windows-1252")), ["BÃ¼ro.vmdk", utf8]);
    }
}
