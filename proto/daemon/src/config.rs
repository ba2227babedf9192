//! Reading a TOML configuration whole: every mistake is found in one go, with file, line and mend.
//!
//! A daemon describes what it expects by asking a [`Table`] for its keys. What is missing, of the
//! wrong type, out of bounds or unknown is collected, and [`load`] returns a configuration only when
//! there is nothing to complain of.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt;
use std::ops::{Range, RangeInclusive};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// One mistake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// The file.
    pub file: PathBuf,
    /// Line, from 1; 0 when it concerns the file as a whole.
    pub line: usize,
    /// Column, from 1.
    pub column: usize,
    /// What is wrong and what to do.
    pub sentence: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.file.display())?;
        if self.line > 0 {
            write!(f, "{}:{}:", self.line, self.column)?;
        }
        write!(f, " {}", self.sentence)
    }
}

/// All mistakes of a file, one a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigErrors(pub Vec<ConfigError>);

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            write!(f, "{}{error}", if index > 0 { "\n" } else { "" })?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

/// Reads `file` and hands its top table to `read`, which returns the configuration, or `None` after
/// the document was told why not.
pub fn load<T>(file: &Path, read: impl FnOnce(&Table<'_>) -> Option<T>) -> Result<T, ConfigErrors> {
    match std::fs::read_to_string(file) {
        Ok(text) => parse(file, &text, read),
        Err(error) => {
            let sentence = format!("the configuration cannot be read: {error}");
            let file = file.to_owned();
            Err(ConfigErrors(vec![ConfigError { file, line: 0, column: 0, sentence }]))
        }
    }
}

/// [`load`] for a text that is in memory; `file` is only for the messages.
pub fn parse<T>(
    file: &Path,
    text: &str,
    read: impl FnOnce(&Table<'_>) -> Option<T>,
) -> Result<T, ConfigErrors> {
    let document = Document { file, text, errors: RefCell::default() };
    let (root, syntax) = DeTable::parse_recoverable(text);
    for error in syntax {
        let span = error.span().unwrap_or(0..0);
        document.report(span, error.message().to_owned());
    }
    // What could not be parsed is not missing: the rest is judged when the file is TOML.
    if !document.errors.borrow().is_empty() {
        return Err(ConfigErrors(document.errors.into_inner()));
    }
    let value = Table::new(&document, root.get_ref(), root.span(), String::new()).read(read);
    let errors = document.errors.into_inner();
    match value {
        Some(value) if errors.is_empty() => Ok(value),
        _ => Err(ConfigErrors(errors)),
    }
}

/// The file being read.
#[derive(Debug)]
struct Document<'d> {
    file: &'d Path,
    text: &'d str,
    errors: RefCell<Vec<ConfigError>>,
}

impl Document<'_> {
    fn report(&self, span: Range<usize>, sentence: String) {
        let before = &self.text[..span.start.min(self.text.len())];
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().map_or(0, |tail| tail.chars().count()) + 1;
        let error = ConfigError { file: self.file.to_owned(), line, column, sentence };
        let mut errors = self.errors.borrow_mut();
        errors.push(error);
        errors.sort_by_key(|error| (error.line, error.column));
    }
}

/// A table of the file.
#[derive(Debug)]
pub struct Table<'d> {
    document: &'d Document<'d>,
    table: &'d DeTable<'d>,
    span: Range<usize>,
    /// Its name with dots, for messages; empty for the top.
    path: String,
    asked: RefCell<BTreeSet<String>>,
}

/// A value that a configuration can hold.
pub trait FromValue: Sized {
    /// What it is called in messages, with an example.
    const EXPECTED: &'static str;
    /// Converts it; `Err` with a sentence when the type is right and the content is not.
    fn from_value(value: &DeValue<'_>) -> Option<Result<Self, String>>;
}

/// A size in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", bytesize::ByteSize(self.0).display().iec())
    }
}

/// A value that can be out of bounds, as a person would write the bound.
pub trait Bound {
    /// The value in words.
    fn in_words(&self) -> String;
}

impl Bound for Size {
    fn in_words(&self) -> String {
        self.to_string()
    }
}

impl Bound for Duration {
    fn in_words(&self) -> String {
        format!("{self:?}")
    }
}

impl FromValue for String {
    const EXPECTED: &'static str = "a text in quotes";
    fn from_value(value: &DeValue<'_>) -> Option<Result<Self, String>> {
        value.as_str().map(|text| Ok(text.to_owned()))
    }
}

impl FromValue for PathBuf {
    const EXPECTED: &'static str = "a path in quotes";
    fn from_value(value: &DeValue<'_>) -> Option<Result<Self, String>> {
        let text = value.as_str()?;
        Some(if text.is_empty() { Err("a path is empty".into()) } else { Ok(text.into()) })
    }
}

impl FromValue for bool {
    const EXPECTED: &'static str = "true or false";
    fn from_value(value: &DeValue<'_>) -> Option<Result<Self, String>> {
        value.as_bool().map(Ok)
    }
}

impl FromValue for u64 {
    const EXPECTED: &'static str = "a whole number";
    fn from_value(value: &DeValue<'_>) -> Option<Result<Self, String>> {
        let integer = value.as_integer()?;
        let number = u64::from_str_radix(integer.as_str(), integer.radix());
        Some(number.map_err(|_| format!("`{}` is not a whole number", integer.as_str())))
    }
}

impl FromValue for Size {
    const EXPECTED: &'static str = "a size such as \"64 MiB\"";
    fn from_value(value: &DeValue<'_>) -> Option<Result<Self, String>> {
        let text = value.as_str()?;
        let size = bytesize::ByteSize::from_str(text).map(|size| Self(size.0));
        Some(size.map_err(|_| format!("`{text}` is not a size such as \"64 MiB\"")))
    }
}

impl FromValue for Duration {
    const EXPECTED: &'static str = "a time such as \"5 min\"";
    fn from_value(value: &DeValue<'_>) -> Option<Result<Self, String>> {
        let text = value.as_str()?;
        let span = text.parse::<jiff::SignedDuration>().ok();
        let time = span.and_then(|span| Self::try_from(span).ok());
        Some(time.ok_or_else(|| format!("`{text}` is not a time such as \"5 min\"")))
    }
}

impl<T: FromValue> FromValue for Vec<T> {
    const EXPECTED: &'static str = "a list in brackets";
    fn from_value(value: &DeValue<'_>) -> Option<Result<Self, String>> {
        let array = value.as_array()?;
        array.iter().map(|item| T::from_value(item.get_ref())).collect()
    }
}

impl<'d> Table<'d> {
    fn new(
        document: &'d Document<'d>,
        table: &'d DeTable<'d>,
        span: Range<usize>,
        path: String,
    ) -> Self {
        Self { document, table, span, path, asked: RefCell::default() }
    }

    /// Reads the table, then complains of keys that nobody asked for.
    fn read<T>(self, read: impl FnOnce(&Table<'_>) -> Option<T>) -> Option<T> {
        let value = read(&self);
        let asked = self.asked.borrow();
        for key in self.table.keys() {
            if asked.contains(key.get_ref().as_ref()) {
                continue;
            }
            let near = asked.iter().min_by_key(|known| distance(known, key.get_ref()));
            let hint = match near {
                Some(near) if distance(near, key.get_ref()) <= 2 => {
                    format!("; did you mean `{near}`?")
                }
                _ => {
                    let known: Vec<_> = asked.iter().map(|key| format!("`{key}`")).collect();
                    format!("; known here: {}", known.join(", "))
                }
            };
            let sentence = format!("`{}` is not a known key{hint}", self.name(key.get_ref()));
            self.document.report(key.span(), sentence);
        }
        value
    }

    fn name(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    fn value(&self, key: &str) -> Option<&'d Spanned<DeValue<'d>>> {
        self.asked.borrow_mut().insert(key.to_owned());
        self.table.get(key)
    }

    /// Reports a mistake in the value of `key`, or in the table when it has none.
    pub fn report(&self, key: &str, sentence: impl Into<String>) {
        let span = self.table.get(key).map_or(self.span.clone(), Spanned::span);
        self.document.report(span, sentence.into());
    }

    /// The value of `key`, if it is there.
    pub fn optional<T: FromValue>(&self, key: &str) -> Option<T> {
        let value = self.value(key)?;
        match T::from_value(value.get_ref()) {
            Some(Ok(value)) => return Some(value),
            Some(Err(sentence)) => self.report(key, format!("`{}`: {sentence}", self.name(key))),
            None => self.report(key, format!("`{}` must be {}", self.name(key), T::EXPECTED)),
        }
        None
    }

    /// The value of `key`, which must be there.
    pub fn required<T: FromValue>(&self, key: &str) -> Option<T> {
        if self.value(key).is_none() {
            let sentence = format!("`{}` is missing; it must be {}", self.name(key), T::EXPECTED);
            self.document.report(self.span.clone(), sentence);
        }
        self.optional(key)
    }

    /// The value of `key`, or `default` when it is not there.
    pub fn or<T: FromValue>(&self, key: &str, default: T) -> Option<T> {
        if self.value(key).is_none() { Some(default) } else { self.optional(key) }
    }

    /// [`Table::or`] with bounds.
    pub fn within<T>(&self, key: &str, default: T, bounds: RangeInclusive<T>) -> Option<T>
    where
        T: FromValue + PartialOrd + Copy + Bound,
    {
        let value = self.or(key, default)?;
        if bounds.contains(&value) {
            return Some(value);
        }
        let (low, high) = (bounds.start().in_words(), bounds.end().in_words());
        self.report(key, format!("`{}` must lie between {low} and {high}", self.name(key)));
        None
    }

    /// A text that something else can parse: a name, an address, a kind.
    pub fn parsed<T>(&self, key: &str) -> Option<T>
    where
        T: FromStr,
        T::Err: fmt::Display,
    {
        let text: String = self.required(key)?;
        match text.parse() {
            Ok(value) => Some(value),
            Err(error) => {
                self.report(key, format!("`{}`: {error}", self.name(key)));
                None
            }
        }
    }

    /// [`Table::parsed`] for a key that may be missing; the outer `None` is a mistake.
    pub fn parsed_or<T>(&self, key: &str, default: Option<T>) -> Option<Option<T>>
    where
        T: FromStr,
        T::Err: fmt::Display,
    {
        if self.value(key).is_none() { Some(default) } else { self.parsed(key).map(Some) }
    }

    /// Reads a table inside this one; one that is missing is read as an empty one, so that its
    /// required keys are named.
    pub fn table<T>(&self, key: &str, read: impl FnOnce(&Table<'_>) -> Option<T>) -> Option<T> {
        let name = self.name(key);
        match self.value(key).map(|value| (value.get_ref().as_table(), value.span())) {
            Some((Some(table), span)) => Table::new(self.document, table, span, name).read(read),
            Some((None, _)) => {
                self.report(key, format!("`{name}` must be a table: `[{name}]`"));
                None
            }
            None => {
                let empty = DeTable::new();
                Table::new(self.document, &empty, self.span.clone(), name).read(read)
            }
        }
    }

    /// Reads every table of a list of tables (`[[key]]`); at least one is required.
    pub fn tables<T>(
        &self,
        key: &str,
        mut read: impl FnMut(&Table<'_>) -> Option<T>,
    ) -> Option<Vec<T>> {
        let name = self.name(key);
        let Some(array) = self.value(key).and_then(|value| value.get_ref().as_array()) else {
            self.report(key, format!("at least one `[[{name}]]` is needed"));
            return None;
        };
        let mut values = Vec::new();
        let mut whole = true;
        for item in array.iter() {
            let value = item.get_ref().as_table().and_then(|table| {
                Table::new(self.document, table, item.span(), name.clone()).read(&mut read)
            });
            match value {
                Some(value) => values.push(value),
                None => whole = false,
            }
        }
        whole.then_some(values)
    }
}

/// Edits between two keys (Levenshtein), for hints.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use super::{Size, Table, parse};

    fn read(table: &Table<'_>) -> Option<(String, Size, Duration, Vec<u64>)> {
        let name = table.required("name");
        let queue = table.within("queue", Size(1 << 20), Size(4096)..=Size(1 << 30));
        let period = table.or("period", Duration::from_secs(300));
        let sizes = table.tables("disk", |disk| disk.required("size"));
        Some((name?, queue?, period?, sizes?))
    }

    #[test]
    fn a_good_file_is_read_with_its_defaults() {
        let text = "name = \"a\"\nperiod = \"90 s\"\n[[disk]]\nsize = 1\n[[disk]]\nsize = 0x10\n";
        let value = parse(Path::new("x.toml"), text, read).unwrap();
        assert_eq!(value, ("a".into(), Size(1 << 20), Duration::from_secs(90), vec![1, 16]));
    }

    #[test]
    fn all_mistakes_are_named_at_once_with_their_places() {
        let text =
            "nane = \"a\"\nqueue = \"9 TiB\"\nperiod = 5\n[[disk]]\nsize = \"big\"\ncolour = 1\n";
        let errors = parse(Path::new("x.toml"), text, read).unwrap_err().to_string();
        let expected = "\
x.toml:1:1: `name` is missing; it must be a text in quotes
x.toml:1:1: `nane` is not a known key; did you mean `name`?
x.toml:2:9: `queue` must lie between 4.0 KiB and 1.0 GiB
x.toml:3:10: `period` must be a time such as \"5 min\"
x.toml:5:8: `disk.size` must be a whole number
x.toml:6:1: `disk.colour` is not a known key; known here: `size`";
        assert_eq!(errors, expected);
    }

    #[test]
    fn a_syntax_error_has_its_line() {
        let errors = parse(Path::new("x.toml"), "queue = \n", read).unwrap_err();
        assert_eq!((errors.0.len(), errors.0[0].line), (1, 1), "nothing else is said: {errors}");
    }
}
