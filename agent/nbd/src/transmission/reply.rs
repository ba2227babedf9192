//! Replies: encoding, and writing many of them in one system call.

use std::io::{self, IoSlice};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::OwnedSemaphorePermit;

use super::{Outcome, Request};
use crate::handshake::ALLOCATION_CONTEXT;
use crate::protocol::{
    REPLY_FLAG_DONE, REPLY_TYPE_BLOCK_STATUS, REPLY_TYPE_ERROR, REPLY_TYPE_NONE,
    REPLY_TYPE_OFFSET_DATA, REPLY_TYPE_OFFSET_HOLE, SIMPLE_REPLY_MAGIC, STATE_HOLE, STATE_ZERO,
    STRUCTURED_REPLY_MAGIC,
};
use crate::{Errno, Run};

/// Data up to this length is copied beside its header: cheaper than one more slice for the kernel.
const COPY_BYTES_MAX: usize = 16 << 10;

/// Slices given to the kernel at a time; far more than a batch usually has.
const SLICES_MAX: usize = 64;

/// What a request came to.
pub(super) enum Answer {
    Done,
    Data(Bytes),
    Pieces(Vec<Piece>),
    Runs(Vec<Run>),
}

/// A part of a read.
pub(super) enum Piece {
    Data { offset_bytes: u64, data: Bytes },
    Hole { offset_bytes: u64, len_bytes: u32 },
}

/// Why a request failed, with a sentence for people that structured replies carry.
#[derive(Debug, Clone, Copy)]
pub(super) struct Failure {
    pub(super) errno: Errno,
    pub(super) text: &'static str,
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        let text = match errno {
            Errno::EPERM => "the export does not permit this",
            Errno::ENOMEM => "the server is out of memory",
            Errno::ENOSPC => "there is no space left behind the export",
            Errno::ENOTSUP => "the export cannot do this, or not fast",
            Errno::ESHUTDOWN => "the export is being shut down",
            _ => "the disk behind the export failed; the server's log says how",
        };
        // An error reply must not say "no error".
        Self { errno: if errno.0 == 0 { Errno::EIO } else { errno }, text }
    }
}

/// A finished request, ready to be written out.
pub(super) struct Reply {
    pub(super) request: Request,
    pub(super) result: Outcome,
    /// What it counts against the connection's bound until the reply is written.
    pub(super) held_bytes: usize,
    /// Its share of the common budget, kept as long.
    pub(super) permit: Option<OwnedSemaphorePermit>,
}

/// Replies that wait to be written.
pub(super) struct Replies {
    structured: bool,
    /// Encoded but not yet in `segments`.
    small: BytesMut,
    segments: Vec<Bytes>,
    segments_bytes: usize,
    held_bytes: usize,
    permits: Vec<OwnedSemaphorePermit>,
}

impl Replies {
    pub(super) fn new(structured: bool) -> Self {
        Self {
            structured,
            small: BytesMut::new(),
            segments: Vec::new(),
            segments_bytes: 0,
            held_bytes: 0,
            permits: Vec::new(),
        }
    }

    pub(super) fn len_bytes(&self) -> usize {
        self.small.len() + self.segments_bytes
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len_bytes() == 0
    }

    pub(super) fn push(&mut self, reply: Reply) {
        let Reply { request: Request { cookie, offset_bytes, .. }, result, .. } = reply;
        self.held_bytes += reply.held_bytes;
        self.permits.extend(reply.permit);
        match result {
            Ok(answer) => self.push_answer(cookie, offset_bytes, answer),
            Err(failure) if self.structured => {
                self.chunk(cookie, REPLY_FLAG_DONE, REPLY_TYPE_ERROR, 6 + failure.text.len());
                self.small.put_u32(failure.errno.0);
                self.small.put_u16(failure.text.len() as u16);
                self.small.put_slice(failure.text.as_bytes());
            }
            Err(failure) => self.simple(cookie, failure.errno.0),
        }
    }

    fn push_answer(&mut self, cookie: u64, offset_bytes: u64, answer: Answer) {
        match answer {
            // Allowed beside structured replies for all that carries no data, and shorter.
            Answer::Done => self.simple(cookie, 0),
            Answer::Data(data) if self.structured => {
                self.chunk(cookie, REPLY_FLAG_DONE, REPLY_TYPE_OFFSET_DATA, 8 + data.len());
                self.small.put_u64(offset_bytes);
                self.data(data);
            }
            Answer::Data(data) => {
                self.simple(cookie, 0);
                self.data(data);
            }
            Answer::Pieces(pieces) => {
                for piece in pieces {
                    self.piece(cookie, piece);
                }
                self.chunk(cookie, REPLY_FLAG_DONE, REPLY_TYPE_NONE, 0);
            }
            Answer::Runs(runs) => {
                let len = 4 + 8 * runs.len();
                self.chunk(cookie, REPLY_FLAG_DONE, REPLY_TYPE_BLOCK_STATUS, len);
                self.small.put_u32(ALLOCATION_CONTEXT);
                for run in runs {
                    self.small.put_u32(run.len_bytes as u32);
                    self.small.put_u32(if run.hole { STATE_HOLE | STATE_ZERO } else { 0 });
                }
            }
        }
    }

    fn piece(&mut self, cookie: u64, piece: Piece) {
        match piece {
            Piece::Data { offset_bytes, data } => {
                self.chunk(cookie, 0, REPLY_TYPE_OFFSET_DATA, 8 + data.len());
                self.small.put_u64(offset_bytes);
                self.data(data);
            }
            Piece::Hole { offset_bytes, len_bytes } => {
                self.chunk(cookie, 0, REPLY_TYPE_OFFSET_HOLE, 12);
                self.small.put_u64(offset_bytes);
                self.small.put_u32(len_bytes);
            }
        }
    }

    fn simple(&mut self, cookie: u64, errno: u32) {
        self.small.put_u32(SIMPLE_REPLY_MAGIC);
        self.small.put_u32(errno);
        self.small.put_u64(cookie);
    }

    fn chunk(&mut self, cookie: u64, flags: u16, kind: u16, len: usize) {
        self.small.put_u32(STRUCTURED_REPLY_MAGIC);
        self.small.put_u16(flags);
        self.small.put_u16(kind);
        self.small.put_u64(cookie);
        self.small.put_u32(len as u32);
    }

    fn data(&mut self, data: Bytes) {
        if data.len() <= COPY_BYTES_MAX {
            self.small.put_slice(&data);
            return;
        }
        self.close_small();
        self.segments_bytes += data.len();
        self.segments.push(data);
    }

    fn close_small(&mut self) {
        if !self.small.is_empty() {
            self.segments_bytes += self.small.len();
            self.segments.push(self.small.split().freeze());
        }
    }

    /// Writes everything; gives back how much was held for it.
    pub(super) async fn write_to<W: AsyncWrite + Unpin>(
        &mut self,
        writer: &mut W,
    ) -> io::Result<usize> {
        if self.segments.is_empty() {
            writer.write_all(&self.small).await?;
            self.small.clear();
        } else {
            self.close_small();
            write_all_vectored(writer, &mut self.segments).await?;
            self.segments.clear();
            self.segments_bytes = 0;
        }
        self.permits.clear();
        Ok(std::mem::take(&mut self.held_bytes))
    }
}

/// Writes `segments`, none of which is empty.
async fn write_all_vectored<W: AsyncWrite + Unpin>(
    writer: &mut W,
    segments: &mut [Bytes],
) -> io::Result<()> {
    let mut first = 0;
    while first < segments.len() {
        let mut slices = [IoSlice::new(&[]); SLICES_MAX];
        let count = segments[first..].len().min(SLICES_MAX);
        for (slice, segment) in slices.iter_mut().zip(&segments[first..]) {
            *slice = IoSlice::new(segment);
        }
        let mut written = writer.write_vectored(&slices[..count]).await?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        while let Some(segment) = segments.get_mut(first).filter(|_| written > 0) {
            let part = written.min(segment.len());
            segment.advance(part);
            written -= part;
            first += usize::from(segment.is_empty());
        }
    }
    Ok(())
}
