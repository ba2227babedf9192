//! The receive buffer of a connection, and the requests in it.

use std::io;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::Request;
use crate::handshake::invalid;
use crate::protocol::{PAYLOAD_BYTES_MAX, REQUEST_BYTES, REQUEST_MAGIC};

/// Receive buffer that is asked for at a time. The payload of a write is a slice of it, so this is
/// also what one small write can keep in memory: an export that keeps payloads for long and cares
/// must copy them. Writes that follow one another share a buffer, so in a steady stream of them
/// nearly all that is pinned is payload.
pub(super) const CHUNK_BYTES: usize = 256 << 10;

/// Received bytes that are not a started request yet.
#[derive(Default)]
pub(super) struct Input {
    buf: BytesMut,
    /// Payload of a refused write that is still to be thrown away.
    skip_bytes: usize,
}

impl Input {
    /// The header of the next request, if it is here.
    pub(super) fn head(&self) -> io::Result<Option<Request>> {
        let Some(mut head) = self.buf.get(..REQUEST_BYTES) else { return Ok(None) };
        if head.get_u32() != REQUEST_MAGIC {
            return Err(invalid("a request does not start with its magic number"));
        }
        Ok(Some(Request {
            flags: head.get_u16(),
            command: head.get_u16(),
            cookie: head.get_u64(),
            offset_bytes: head.get_u64(),
            len_bytes: head.get_u32(),
        }))
    }

    /// Takes out the request at the head; its payload is cut out of the buffer, not copied.
    /// `None`: the payload is not all here, and there is now room for it.
    pub(super) fn take(&mut self, request: &Request) -> Option<Bytes> {
        let whole = REQUEST_BYTES + request.payload_bytes();
        if self.buf.len() < whole {
            self.reserve(whole - self.buf.len());
            return None;
        }
        self.buf.advance(REQUEST_BYTES);
        Some(self.buf.split_to(request.payload_bytes()).freeze())
    }

    /// Drops the request at the head; its payload is thrown away as it comes in.
    pub(super) fn skip(&mut self, request: &Request) {
        self.skip_bytes = REQUEST_BYTES + request.payload_bytes();
        self.drop_skipped();
    }

    /// Receives something. 0: the client closed its side. Can be cancelled.
    pub(super) async fn fill<R: AsyncRead + Unpin>(&mut self, reader: &mut R) -> io::Result<usize> {
        if self.buf.capacity() - self.buf.len() < REQUEST_BYTES {
            self.reserve(CHUNK_BYTES);
        }
        let read = reader.read_buf(&mut self.buf).await?;
        self.drop_skipped();
        Ok(read)
    }

    fn drop_skipped(&mut self) {
        let here = self.skip_bytes.min(self.buf.len());
        self.buf.advance(here);
        self.skip_bytes -= here;
    }

    /// Makes room for `missing` more bytes, at most one payload.
    fn reserve(&mut self, missing: usize) {
        let missing = missing.min(PAYLOAD_BYTES_MAX as usize);
        if self.buf.capacity() - self.buf.len() >= missing || self.buf.try_reclaim(missing) {
            return;
        }
        // Not `BytesMut::reserve`: that may double a large buffer.
        let mut larger = BytesMut::with_capacity((self.buf.len() + missing).max(CHUNK_BYTES));
        larger.extend_from_slice(&self.buf);
        self.buf = larger;
    }
}
