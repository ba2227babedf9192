//! The transmission phase: requests in, replies out, many at a time.

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::task::Poll;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

use crate::handshake::{ALLOCATION_CONTEXT, Negotiated, invalid};
use crate::protocol::{
    CMD_BLOCK_STATUS, CMD_DISC, CMD_FLAG_DF, CMD_FLAG_FAST_ZERO, CMD_FLAG_FUA, CMD_FLAG_NO_HOLE,
    CMD_FLAG_REQ_ONE, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES,
    PAYLOAD_BYTES_MAX, REPLY_FLAG_DONE, REPLY_TYPE_BLOCK_STATUS, REPLY_TYPE_ERROR, REPLY_TYPE_NONE,
    REPLY_TYPE_OFFSET_DATA, REQUEST_BYTES, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, STATE_HOLE,
    STATE_ZERO, STRUCTURED_REPLY_MAGIC,
};
use crate::{Errno, Export, Run, ServerOptions, ZeroOptions};

/// Receive buffer that is asked for at a time. A write's payload is a slice of it, so this is also
/// what one small write can keep in memory.
const CHUNK_BYTES: usize = 256 << 10;

/// Extents in one block-status reply: a client asks again from where it ends.
const RUNS_MAX: usize = 4096;

/// A request's header.
#[derive(Debug, Clone, Copy)]
struct Request {
    flags: u16,
    command: u16,
    cookie: u64,
    offset_bytes: u64,
    len_bytes: u32,
}

/// What a request came to.
enum Answer {
    Done,
    Data(Bytes),
    Runs(Vec<Run>),
}

/// A finished request, ready to be written out.
struct Reply {
    request: Request,
    result: Result<Answer, Errno>,
}

/// What a request takes of the connection's bound while it is under way.
fn cost_bytes(request: &Request) -> usize {
    match request.command {
        CMD_READ | CMD_WRITE => request.len_bytes as usize + REQUEST_BYTES,
        _ => REQUEST_BYTES,
    }
}

/// Serves one connection until the client disconnects.
pub(crate) async fn serve<S>(
    stream: S,
    chosen: Negotiated,
    options: &ServerOptions,
) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (mut reader, mut writer) = tokio::io::split(stream);
    // Unbounded in type, bounded in fact: one message for each request under way.
    let (done, mut finished) = mpsc::unbounded_channel::<Reply>();
    let mut input = BytesMut::with_capacity(CHUNK_BYTES);
    let mut out = Replies { structured: chosen.structured, chunks: Vec::new() };
    let (mut under_way, mut under_way_bytes) = (0usize, 0usize);
    let mut leaving = false;
    loop {
        while !leaving
            && under_way < options.requests_max
            && (under_way == 0 || under_way_bytes < options.request_bytes_max)
            && let Some((request, payload)) = take_request(&mut input)?
        {
            if request.command == CMD_DISC {
                leaving = true;
                break;
            }
            if let Err(errno) = check(&request, &chosen) {
                out.push(Reply { request, result: Err(errno) });
                continue;
            }
            let export = Arc::clone(&chosen.export);
            let mut work = Box::pin(async move { run(&*export, request, payload).await });
            // Most writes finish in place; only one that waits is worth a task of its own.
            match poll_fn(|cx| Poll::Ready(work.as_mut().poll(cx))).await {
                Poll::Ready(result) => out.push(Reply { request, result }),
                Poll::Pending => {
                    under_way += 1;
                    under_way_bytes += cost_bytes(&request);
                    let done = done.clone();
                    tokio::spawn(async move {
                        let result = work.await;
                        let _ = done.send(Reply { request, result });
                    });
                }
            }
        }
        while let Ok(reply) = finished.try_recv() {
            under_way -= 1;
            under_way_bytes -= cost_bytes(&reply.request);
            out.push(reply);
        }
        out.write_to(&mut writer).await?;
        if leaving && under_way == 0 {
            return writer.shutdown().await;
        }
        let full = under_way >= options.requests_max
            || under_way > 0 && under_way_bytes >= options.request_bytes_max;
        reserve(&mut input);
        tokio::select! {
            reply = finished.recv(), if under_way > 0 => {
                let Some(reply) = reply else { return Ok(()) };
                under_way -= 1;
                under_way_bytes -= cost_bytes(&reply.request);
                out.push(reply);
            }
            read = reader.read_buf(&mut input), if !leaving && !full => {
                if read? == 0 {
                    // proto.md: a client may also just hang up; what it asked for is finished.
                    leaving = true;
                }
            }
        }
    }
}

/// Makes room for what the request at the head of `input` still lacks.
fn reserve(input: &mut BytesMut) {
    let wanted = match peek(input) {
        Some(request) if request.command == CMD_WRITE => {
            REQUEST_BYTES + request.len_bytes.min(PAYLOAD_BYTES_MAX) as usize
        }
        _ => REQUEST_BYTES,
    };
    let missing = wanted.saturating_sub(input.len());
    if input.capacity() - input.len() < missing.max(REQUEST_BYTES) {
        input.reserve(missing.max(CHUNK_BYTES));
    }
}

fn peek(input: &BytesMut) -> Option<Request> {
    let mut head = input.get(4..REQUEST_BYTES)?;
    Some(Request {
        flags: head.get_u16(),
        command: head.get_u16(),
        cookie: head.get_u64(),
        offset_bytes: head.get_u64(),
        len_bytes: head.get_u32(),
    })
}

/// The next whole request, if it is here. A write's payload is cut out of the buffer, not copied.
fn take_request(input: &mut BytesMut) -> io::Result<Option<(Request, Bytes)>> {
    let Some(request) = peek(input) else { return Ok(None) };
    if input[..4] != REQUEST_MAGIC.to_be_bytes() {
        return Err(invalid("a request does not start with its magic number"));
    }
    let payload_bytes = if request.command == CMD_WRITE { request.len_bytes as usize } else { 0 };
    if payload_bytes > PAYLOAD_BYTES_MAX as usize {
        // Nothing sensible follows: reading gigabytes only to throw them away helps nobody.
        return Err(invalid("a write is over the largest payload that was announced"));
    }
    if input.len() < REQUEST_BYTES + payload_bytes {
        return Ok(None);
    }
    input.advance(REQUEST_BYTES);
    Ok(Some((request, input.split_to(payload_bytes).freeze())))
}

/// What the protocol allows of this request on this export.
fn check(request: &Request, chosen: &Negotiated) -> Result<(), Errno> {
    let allowed = match request.command {
        CMD_READ if chosen.structured => CMD_FLAG_DF | CMD_FLAG_FUA,
        CMD_READ | CMD_WRITE | CMD_FLUSH | CMD_TRIM => CMD_FLAG_FUA,
        CMD_WRITE_ZEROES => CMD_FLAG_FUA | CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO,
        CMD_BLOCK_STATUS if chosen.allocation => CMD_FLAG_REQ_ONE | CMD_FLAG_FUA,
        _ => return Err(Errno::EINVAL),
    };
    if request.flags & !allowed != 0 {
        return Err(Errno::EINVAL);
    }
    if request.command == CMD_FLUSH {
        return Ok(());
    }
    let changes = matches!(request.command, CMD_WRITE | CMD_TRIM | CMD_WRITE_ZEROES);
    if changes && chosen.export.read_only() {
        return Err(Errno::EPERM);
    }
    let minimum = u64::from(chosen.export.block_size().minimum.max(1));
    let len = u64::from(request.len_bytes);
    if len == 0 || request.offset_bytes % minimum != 0 || len % minimum != 0 {
        return Err(Errno::EINVAL);
    }
    if request.command == CMD_READ && request.len_bytes > PAYLOAD_BYTES_MAX {
        return Err(Errno::EOVERFLOW);
    }
    let fits =
        request.offset_bytes.checked_add(len).is_some_and(|end| end <= chosen.export.size_bytes());
    match (fits, changes) {
        (true, _) => Ok(()),
        (false, true) => Err(Errno::ENOSPC),
        (false, false) => Err(Errno::EINVAL),
    }
}

async fn run(export: &dyn Export, request: Request, payload: Bytes) -> Result<Answer, Errno> {
    let Request { offset_bytes, len_bytes, flags, .. } = request;
    let fua = flags & CMD_FLAG_FUA != 0;
    match request.command {
        CMD_READ => export.read(offset_bytes, len_bytes).await.map(Answer::Data),
        CMD_WRITE => export.write(offset_bytes, payload, fua).await.map(|()| Answer::Done),
        CMD_FLUSH => export.flush().await.map(|()| Answer::Done),
        CMD_TRIM => export.trim(offset_bytes, len_bytes, fua).await.map(|()| Answer::Done),
        CMD_WRITE_ZEROES => {
            let options = ZeroOptions {
                fua,
                no_hole: flags & CMD_FLAG_NO_HOLE != 0,
                fast: flags & CMD_FLAG_FAST_ZERO != 0,
            };
            export.write_zeroes(offset_bytes, len_bytes, options).await.map(|()| Answer::Done)
        }
        CMD_BLOCK_STATUS => {
            let mut runs = export.runs(offset_bytes, len_bytes).await?;
            runs.truncate(if flags & CMD_FLAG_REQ_ONE != 0 { 1 } else { RUNS_MAX });
            Ok(Answer::Runs(runs))
        }
        _ => Err(Errno::EINVAL),
    }
}

/// Replies that wait to be written, many in one call.
struct Replies {
    structured: bool,
    chunks: Vec<Bytes>,
}

impl Replies {
    fn push(&mut self, Reply { request, result }: Reply) {
        let mut head = BytesMut::with_capacity(64);
        // Only replies to reads and block status must be structured; a simple one is shorter.
        let structured = self.structured && matches!(request.command, CMD_READ | CMD_BLOCK_STATUS);
        if !structured {
            head.put_u32(SIMPLE_REPLY_MAGIC);
            head.put_u32(result.as_ref().err().map_or(0, |errno| errno.0));
            head.put_u64(request.cookie);
            self.chunks.push(head.freeze());
            if let Ok(Answer::Data(data)) = result {
                self.chunks.push(data);
            }
            return;
        }
        let mut chunk = |kind: u16, len: usize| {
            head.put_u32(STRUCTURED_REPLY_MAGIC);
            head.put_u16(REPLY_FLAG_DONE);
            head.put_u16(kind);
            head.put_u64(request.cookie);
            head.put_u32(len as u32);
        };
        match result {
            Ok(Answer::Done) => chunk(REPLY_TYPE_NONE, 0),
            Ok(Answer::Data(data)) => {
                chunk(REPLY_TYPE_OFFSET_DATA, 8 + data.len());
                head.put_u64(request.offset_bytes);
                self.chunks.push(head.freeze());
                self.chunks.push(data);
                return;
            }
            Ok(Answer::Runs(runs)) => {
                chunk(REPLY_TYPE_BLOCK_STATUS, 4 + 8 * runs.len());
                head.put_u32(ALLOCATION_CONTEXT);
                for run in runs {
                    head.put_u32(run.len_bytes.min(u64::from(u32::MAX) & !0xffff) as u32);
                    head.put_u32(if run.hole { STATE_HOLE | STATE_ZERO } else { 0 });
                }
            }
            Err(errno) => {
                chunk(REPLY_TYPE_ERROR, 6);
                head.put_u32(errno.0);
                head.put_u16(0);
            }
        }
        self.chunks.push(head.freeze());
    }

    async fn write_to<W: AsyncWrite + Unpin>(&mut self, writer: &mut W) -> io::Result<()> {
        // One copy gathers small replies into one system call; large data goes as it is.
        let mut small = BytesMut::new();
        for chunk in self.chunks.drain(..) {
            if chunk.len() <= 16 << 10 {
                small.extend_from_slice(&chunk);
            } else {
                writer.write_all(&small.split()).await?;
                writer.write_all(&chunk).await?;
            }
        }
        if !small.is_empty() {
            writer.write_all(&small).await?;
        }
        Ok(())
    }
}
