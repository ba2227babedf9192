//! Reading records back, for recovery and for applying what is no longer in memory.

use std::ops::Range;
use std::path::Path;

use backhaul_proto::batch::{BatchHeader, BatchKind, Record, check_body};
use backhaul_proto::id::{BatchSeq, Generation, WriteSeq};

use crate::batch_buffer::{TABLE_OFFSET_BYTES, data_offset_bytes, record_bytes};
use crate::journal::frame::{self, Frame};
use crate::journal::segment::{SegmentKey, SegmentNumber};
use crate::storage::{AlignedBuf, FileId, Op, OpenMode, PAGE_BYTES, Storage, StorageError};

/// Where the order stands: what the next record must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Order {
    pub(crate) generation: Generation,
    pub(crate) batch: BatchSeq,
    pub(crate) write: WriteSeq,
}

impl Order {
    /// What must follow a batch with this header.
    pub(crate) fn after(header: &BatchHeader) -> Self {
        Self {
            generation: header.generation,
            batch: header.batch.next(),
            write: WriteSeq(header.last_write().0 + 1),
        }
    }

    fn is_next(&self, header: &BatchHeader) -> bool {
        header.generation == self.generation
            && header.batch == self.batch
            && header.first_write == self.write
    }
}

/// A valid record in a [`Reader`]'s window.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) header: BatchHeader,
    /// Empty for a sync batch, whose table is not kept.
    pub(crate) records: Vec<Record>,
    data: Range<usize>,
    /// Where the next record starts in the same segment.
    pub(crate) end_bytes: u64,
}

/// What stands at a place of a segment.
#[derive(Debug)]
pub(crate) enum Parsed {
    Record(Loaded),
    /// The window does not reach that far: load one that starts here.
    OutOfWindow,
    Blank,
    Torn,
    Unreadable,
}

/// A segment being read, and a window of it in memory.
#[derive(Debug)]
pub(crate) struct Reader {
    file: FileId,
    number: SegmentNumber,
    key: SegmentKey,
    file_bytes: u64,
    window: AlignedBuf,
    window_at: u64,
    window_bytes: usize,
    /// The medium refused what follows the window.
    unreadable: bool,
}

impl Reader {
    /// Opens a segment.
    pub(crate) fn open(
        storage: &mut dyn Storage,
        dir: &Path,
        number: SegmentNumber,
        key: SegmentKey,
    ) -> Result<Self, StorageError> {
        let file = storage.open(&dir.join(number.file_name()), OpenMode::Read)?;
        let file_bytes = storage.len_bytes(file)?;
        Ok(Self {
            file,
            number,
            key,
            file_bytes,
            window: AlignedBuf::zeroed(WINDOW_BYTES.min(file_bytes as usize)),
            window_at: 0,
            window_bytes: 0,
            unreadable: false,
        })
    }

    /// Closes the segment.
    pub(crate) fn close(self, storage: &mut dyn Storage) {
        storage.close(self.file);
    }

    /// The segment's number.
    pub(crate) fn number(&self) -> SegmentNumber {
        self.number
    }

    /// Bytes of the segment's file.
    pub(crate) fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// Reads a window that starts at `offset_bytes`, as long as the medium gives.
    pub(crate) fn load(&mut self, storage: &mut dyn Storage, offset_bytes: u64) {
        let left_bytes = self.file_bytes.saturating_sub(offset_bytes);
        let want_bytes = left_bytes.min(self.window.len() as u64) as usize;
        self.window_at = offset_bytes;
        self.window_bytes = want_bytes;
        self.unreadable = false;
        let file = self.file;
        let buf = &mut self.window[..want_bytes];
        if storage.run(&mut [Op::Read { file, offset_bytes, buf }]).is_ok() {
            return;
        }
        // One bad sector must not hide the good records before it.
        for start in (0..want_bytes).step_by(PAGE_BYTES) {
            let buf = &mut self.window[start..want_bytes.min(start + PAGE_BYTES)];
            let offset_bytes = offset_bytes + start as u64;
            if storage.run(&mut [Op::Read { file, offset_bytes, buf }]).is_err() {
                self.window_bytes = start;
                self.unreadable = true;
                return;
            }
        }
    }

    fn in_window(&self, offset_bytes: u64) -> Option<&[u8]> {
        let at = usize::try_from(offset_bytes.checked_sub(self.window_at)?).ok()?;
        self.window[..self.window_bytes].get(at..)
    }

    /// What to say when the window ends before the record does.
    fn short(&self, offset_bytes: u64, otherwise: Parsed) -> Parsed {
        let window_end = self.window_at + self.window_bytes as u64;
        if self.window_at != offset_bytes && window_end < self.file_bytes {
            Parsed::OutOfWindow
        } else if self.unreadable {
            Parsed::Unreadable
        } else {
            otherwise
        }
    }

    /// The record at `offset_bytes`, if it is the one that `order` expects.
    pub(crate) fn parse(&self, offset_bytes: u64, order: &Order) -> Parsed {
        let Some(bytes) = self.in_window(offset_bytes) else {
            return if offset_bytes < self.file_bytes {
                Parsed::OutOfWindow
            } else {
                Parsed::Blank
            };
        };
        if bytes.len() < TABLE_OFFSET_BYTES {
            return self.short(offset_bytes, Parsed::Blank);
        }
        let Some(Frame { header, .. }) = frame::decode(bytes, &self.key, offset_bytes) else {
            return Parsed::Blank;
        };
        if !order.is_next(&header) {
            return Parsed::Torn;
        }
        let len_bytes = record_bytes(&header);
        let Some(bytes) = bytes.get(..len_bytes) else {
            return self.short(offset_bytes, Parsed::Torn);
        };
        let data_start = data_offset_bytes(&header);
        let (records, data) = match header.kind {
            BatchKind::Sync => (Vec::new(), 0..0),
            BatchKind::Ordered => {
                let table = &bytes[TABLE_OFFSET_BYTES..TABLE_OFFSET_BYTES + header.table_bytes()];
                let data = data_start..data_start + header.data_bytes();
                match check_body(&header, table, &bytes[data.clone()]) {
                    Ok(records) => (records, data),
                    Err(_) => return Parsed::Torn,
                }
            }
        };
        let base = (offset_bytes - self.window_at) as usize;
        Parsed::Record(Loaded {
            header,
            records,
            data: base + data.start..base + data.end,
            end_bytes: offset_bytes + len_bytes as u64,
        })
    }

    /// The data of a record of the current window.
    pub(crate) fn data(&self, loaded: &Loaded) -> &[u8] {
        &self.window[loaded.data.clone()]
    }

    /// Looks at every page from `offset_bytes` on for a valid frame that `wanted` accepts.
    pub(crate) fn any_frame(
        &mut self,
        storage: &mut dyn Storage,
        offset_bytes: u64,
        wanted: impl Fn(&Frame) -> bool,
    ) -> bool {
        let mut at = offset_bytes;
        while at < self.file_bytes {
            self.load(storage, at);
            let window = &self.window[..self.window_bytes];
            for (i, page) in window.chunks(PAGE_BYTES).enumerate() {
                let place = at + (i * PAGE_BYTES) as u64;
                if frame::decode(page, &self.key, place).is_some_and(|frame| wanted(&frame)) {
                    return true;
                }
            }
            let skipped = if self.unreadable { PAGE_BYTES } else { 0 };
            at += (self.window_bytes + skipped) as u64;
        }
        false
    }
}

/// Bytes read at once. More than the largest record (2 MiB of data and 64 KiB of table), so that
/// every record fits a window that starts at it. The tests' records are small; there the window is
/// too, so that records cross its end.
const WINDOW_BYTES: usize = if cfg!(test) { 7 * PAGE_BYTES } else { 4 << 20 };
