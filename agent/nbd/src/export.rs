//! What stands behind an export.

use std::pin::Pin;

use bytes::Bytes;

use crate::Errno;

/// The future of one request. One allocation a request, so that exports can come and go at run time.
pub type IoFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, Errno>> + Send + 'a>>;

/// Block-size constraints, as `NBD_INFO_BLOCK_SIZE` announces them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSize {
    /// Requests must be multiples of it; 1 or a power of two up to 64 KiB.
    pub minimum: u32,
    /// Requests that are multiples of it are fastest.
    pub preferred: u32,
}

/// How a range is to be zeroed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ZeroOptions {
    /// On stable storage before the reply.
    pub fua: bool,
    /// The space must stay allocated.
    pub no_hole: bool,
    /// Refuse with [`Errno::ENOTSUP`] when it would be no faster than writing.
    pub fast: bool,
}

/// A run of `base:allocation`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Its length.
    pub len_bytes: u64,
    /// Nothing is allocated, and it reads as zeroes.
    pub hole: bool,
}

/// A disk that the server offers. The server has checked every range against
/// [`Export::size_bytes`], and every request against [`Export::read_only`].
///
/// A future that is ready at once is answered without a task of its own; one that waits is moved to
/// a task, and other requests of the same connection overtake it.
pub trait Export: Send + Sync + 'static {
    /// Size in bytes.
    fn size_bytes(&self) -> u64;
    /// A line for people, sent with `NBD_INFO_DESCRIPTION`.
    fn description(&self) -> String;
    /// Block-size constraints.
    fn block_size(&self) -> BlockSize;
    /// Whether writes are refused from the start.
    fn read_only(&self) -> bool;
    /// `len_bytes` bytes from `offset_bytes`.
    fn read(&self, offset_bytes: u64, len_bytes: u32) -> IoFuture<'_, Bytes>;
    /// Writes `data`, whose buffer is handed over; on stable storage before the reply with `fua`.
    fn write(&self, offset_bytes: u64, data: Bytes, fua: bool) -> IoFuture<'_, ()>;
    /// Makes a range read as zeroes.
    fn write_zeroes(
        &self,
        offset_bytes: u64,
        len_bytes: u32,
        options: ZeroOptions,
    ) -> IoFuture<'_, ()>;
    /// The client does not need the range any more.
    fn trim(&self, offset_bytes: u64, len_bytes: u32, fua: bool) -> IoFuture<'_, ()>;
    /// Every write that was answered before is on stable storage when this is.
    fn flush(&self) -> IoFuture<'_, ()>;
    /// The runs of the range, in order, at least one; they may end early or reach beyond it.
    fn runs(&self, offset_bytes: u64, len_bytes: u32) -> IoFuture<'_, Vec<Run>>;
}
