//! Memory that O_DIRECT accepts.

/// Alignment and size unit of everything the journal writes: at least the block size of any disk.
pub const PAGE_BYTES: usize = 4096;

#[derive(Clone, Copy)]
#[repr(C, align(4096))]
struct Page([u8; PAGE_BYTES]);

/// Zeroed, page-aligned bytes; a whole number of pages.
pub struct AlignedBuf {
    pages: Vec<Page>,
}

impl AlignedBuf {
    /// At least `len_bytes` zeroes, rounded up to whole pages.
    pub fn zeroed(len_bytes: usize) -> Self {
        Self { pages: vec![Page([0; PAGE_BYTES]); len_bytes.div_ceil(PAGE_BYTES)] }
    }
}

impl std::ops::Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let len_bytes = self.pages.len() * PAGE_BYTES;
        // SAFETY: a `Page` is exactly PAGE_BYTES initialised bytes without padding, and the borrow
        // of `self` covers the slice.
        unsafe { std::slice::from_raw_parts(self.pages.as_ptr().cast(), len_bytes) }
    }
}

impl std::ops::DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        let len_bytes = self.pages.len() * PAGE_BYTES;
        // SAFETY: a `Page` is exactly PAGE_BYTES initialised bytes without padding, any byte
        // values are valid in it, and the borrow of `self` covers the slice.
        unsafe { std::slice::from_raw_parts_mut(self.pages.as_mut_ptr().cast(), len_bytes) }
    }
}

impl std::fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len())
    }
}
