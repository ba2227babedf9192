//! Memory that O_DIRECT accepts.

use std::sync::{Mutex, PoisonError};

/// Alignment and size unit of everything the journal writes: at least the block size of any disk.
pub const PAGE_BYTES: usize = 4096;

/// Pages that are kept for the next buffers, at most 32 MiB: a group of batches and a half.
const SPARE_PAGES_MAX: usize = (32 << 20) / PAGE_BYTES;

/// Smaller buffers are made anew.
const SPARE_PAGES_MIN: usize = 16;

#[derive(Clone, Copy)]
#[repr(C, align(4096))]
struct Page([u8; PAGE_BYTES]);

/// Page-aligned bytes; a whole number of pages.
pub struct AlignedBuf {
    pages: Vec<Page>,
    /// Of `pages`; the others are left from a larger buffer before.
    used: usize,
}

/// What dropped buffers leave for new ones. Memory that comes from the system is filled with zeroes
/// by it and again here, which takes a twelfth of the target's time when batches stream in.
struct Spare {
    buffers: Vec<Vec<Page>>,
    pages: usize,
}

static SPARE: Mutex<Spare> = Mutex::new(Spare { buffers: Vec::new(), pages: 0 });

impl Spare {
    /// A buffer of at least so many pages that are set, and of a quarter more at most.
    fn take(&mut self, wanted: usize) -> Option<Vec<Page>> {
        let fits = |buffer: &Vec<Page>| (wanted..=wanted + wanted / 4).contains(&buffer.len());
        let index = self.buffers.iter().rposition(fits)?;
        let buffer = self.buffers.swap_remove(index);
        self.pages -= buffer.len();
        Some(buffer)
    }

    fn give(&mut self, buffer: Vec<Page>) {
        if buffer.len() < SPARE_PAGES_MIN {
            return;
        }
        while self.pages + buffer.len() > SPARE_PAGES_MAX && !self.buffers.is_empty() {
            self.pages -= self.buffers.remove(0).len();
        }
        if self.pages + buffer.len() <= SPARE_PAGES_MAX {
            self.pages += buffer.len();
            self.buffers.push(buffer);
        }
    }
}

impl AlignedBuf {
    /// At least `len_bytes` zeroes, rounded up to whole pages.
    pub fn zeroed(len_bytes: usize) -> Self {
        let used = len_bytes.div_ceil(PAGE_BYTES);
        Self { pages: vec![Page([0; PAGE_BYTES]); used], used }
    }

    /// At least `len_bytes`, rounded up to whole pages, of whatever an earlier buffer held: for those
    /// who set every byte.
    pub fn stale(len_bytes: usize) -> Self {
        let used = len_bytes.div_ceil(PAGE_BYTES);
        match SPARE.lock().unwrap_or_else(PoisonError::into_inner).take(used) {
            Some(pages) => Self { pages, used },
            None => Self::zeroed(len_bytes),
        }
    }

    /// Bytes of memory it holds.
    pub fn memory_bytes(&self) -> usize {
        self.pages.len() * PAGE_BYTES
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        let pages = std::mem::take(&mut self.pages);
        SPARE.lock().unwrap_or_else(PoisonError::into_inner).give(pages);
    }
}

impl std::ops::Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let pages = &self.pages[..self.used];
        // SAFETY: a `Page` is exactly PAGE_BYTES initialised bytes without padding, and the borrow
        // of `self` covers the slice.
        unsafe { std::slice::from_raw_parts(pages.as_ptr().cast(), size_of_val(pages)) }
    }
}

impl std::ops::DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        let pages = &mut self.pages[..self.used];
        // SAFETY: a `Page` is exactly PAGE_BYTES initialised bytes without padding, any byte
        // values are valid in it, and the borrow of `self` covers the slice.
        unsafe { std::slice::from_raw_parts_mut(pages.as_mut_ptr().cast(), size_of_val(pages)) }
    }
}

impl std::fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::{PAGE_BYTES, Page, SPARE_PAGES_MAX, Spare};

    fn pages(count: usize) -> Vec<Page> {
        vec![Page([7; PAGE_BYTES]); count]
    }

    #[test]
    fn spare_buffers_are_bounded_and_fit() {
        let mut spare = Spare { buffers: Vec::new(), pages: 0 };
        spare.give(pages(SPARE_PAGES_MAX + 1));
        spare.give(pages(1));
        assert_eq!(spare.pages, 0, "too large, and too small to be worth it");
        for _ in 0..SPARE_PAGES_MAX / 100 + 5 {
            spare.give(pages(100));
        }
        assert!(spare.pages <= SPARE_PAGES_MAX && spare.pages > SPARE_PAGES_MAX - 100);
        assert!(spare.take(101).is_none(), "too small");
        assert!(spare.take(79).is_none(), "more than a quarter too large");
        assert_eq!(spare.take(90).map(|buffer| buffer.len()), Some(100));
        let held: usize = spare.buffers.iter().map(Vec::len).sum();
        assert_eq!(spare.pages, held);
    }
}
