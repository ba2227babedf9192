//! The transmission phase: requests in, replies out, many at a time.

mod input;
mod reply;
mod request;

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::task::Poll;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};

use crate::handshake::Negotiated;
use crate::protocol::CMD_DISC;
use crate::server::Signal;
use crate::{Errno, ServerOptions};
use input::{CHUNK_BYTES, Input};
use reply::{Answer, Failure, Replies, Reply};
use request::{Request, check, run};

/// Request bytes that a connection may hold without asking the server's common budget. Small
/// requests at ordinary depths therefore never touch it, and a connection always gets on, however
/// much the others hold.
const OWN_BYTES: usize = CHUNK_BYTES;

/// Replies are written out once this much is waiting, even when more requests could be started.
const REPLY_BATCH_BYTES: usize = 256 << 10;

/// What one permit of the server's common budget stands for.
const PERMIT_BYTES: usize = 4096;

/// The server's common budget for the bytes of requests under way.
pub(crate) fn memory_budget(bytes: usize) -> Arc<Semaphore> {
    // The largest request must fit, or it would wait for ever.
    let bytes = bytes.max(crate::protocol::PAYLOAD_BYTES_MAX as usize + PERMIT_BYTES);
    Arc::new(Semaphore::new((bytes / PERMIT_BYTES).min(Semaphore::MAX_PERMITS)))
}

/// Serves one connection until the client disconnects, or the server stops.
pub(crate) async fn serve<S>(
    stream: S,
    chosen: Negotiated,
    options: &ServerOptions,
    memory: Arc<Semaphore>,
    signal: watch::Receiver<Signal>,
) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (mut reader, mut writer) = tokio::io::split(stream);
    // Unbounded in type, bounded in fact: one message for each request under way.
    let (done, mut finished) = mpsc::unbounded_channel::<Reply>();
    let mut stopping = signal.clone();
    let structured = chosen.structured;
    let mut connection = Connection {
        chosen,
        options,
        memory: Arc::clone(&memory),
        signal,
        input: Input::default(),
        out: Replies::new(structured),
        done,
        under_way: 0,
        held_bytes: 0,
        admitted: None,
    };
    let mut leaving = false;
    loop {
        let next = if leaving { Next::Finish } else { connection.start_requests().await? };
        leaving |= matches!(next, Next::Leave);
        while let Ok(reply) = finished.try_recv() {
            connection.finish(reply);
        }
        connection.held_bytes -= connection.out.write_to(&mut writer).await?;
        if leaving && connection.under_way == 0 {
            return match writer.shutdown().await {
                // The client may have gone without waiting for us, as proto.md allows.
                Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
                other => other,
            };
        }
        let (read, permits) = match next {
            Next::Leave | Next::Write => continue,
            Next::Read => (true, None),
            Next::Memory(permits) => (false, Some(permits)),
            Next::Finish => (false, None),
        };
        tokio::select! {
            Some(reply) = finished.recv(), if connection.under_way > 0 => connection.finish(reply),
            read = connection.input.fill(&mut reader), if read => {
                // A client may also just hang up; what it asked for is finished.
                leaving = read? == 0;
            }
            permit = Arc::clone(&memory).acquire_many_owned(permits.unwrap_or(0)),
                if permits.is_some() => connection.admitted = permit.ok(),
            _ = stopping.wait_for(|signal| signal.stopping), if !leaving => leaving = true,
        }
    }
}

/// What a connection waits for once it has started what it can.
enum Next {
    /// More input.
    Read,
    /// Nothing: replies are to be written out, then more can be started.
    Write,
    /// This many permits of the common budget.
    Memory(u32),
    /// A request that is under way: the connection is at its bounds, or is leaving.
    Finish,
    /// The client said good-bye.
    Leave,
}

struct Connection<'a> {
    chosen: Negotiated,
    options: &'a ServerOptions,
    memory: Arc<Semaphore>,
    signal: watch::Receiver<Signal>,
    input: Input,
    out: Replies,
    done: mpsc::UnboundedSender<Reply>,
    under_way: usize,
    /// Bytes of requests whose reply is not written out yet.
    held_bytes: usize,
    /// The common budget's share for the request at the head of the input.
    admitted: Option<OwnedSemaphorePermit>,
}

impl Connection<'_> {
    /// Starts requests as long as they are here and the bounds allow it.
    async fn start_requests(&mut self) -> io::Result<Next> {
        loop {
            if self.out.len_bytes() >= REPLY_BATCH_BYTES {
                return Ok(Next::Write);
            }
            let Some(request) = self.input.head()? else { return Ok(Next::Read) };
            if request.command == CMD_DISC {
                return Ok(Next::Leave);
            }
            if let Err(failure) = check(&request, &self.chosen) {
                self.input.skip(&request);
                self.out.push(Reply { request, result: Err(failure), held_bytes: 0, permit: None });
                continue;
            }
            if let Some(next) = self.admit(&request) {
                // What waits to be written holds memory too; writing it may be all that is needed.
                return Ok(if self.out.is_empty() { next } else { Next::Write });
            }
            let Some(payload) = self.input.take(&request) else { return Ok(Next::Read) };
            self.start(request, payload).await;
        }
    }

    /// Whether the bounds allow one more request; else what to wait for.
    fn admit(&mut self, request: &Request) -> Option<Next> {
        let held_bytes = self.held_bytes + request.memory_bytes();
        if self.under_way >= self.options.requests_max.max(1)
            || self.held_bytes > 0 && held_bytes > self.options.request_bytes_max
        {
            return Some(Next::Finish);
        }
        if self.admitted.is_some() || held_bytes <= OWN_BYTES {
            return None;
        }
        let permits = request.memory_bytes().div_ceil(PERMIT_BYTES) as u32;
        match Arc::clone(&self.memory).try_acquire_many_owned(permits) {
            Ok(permit) => {
                self.admitted = Some(permit);
                None
            }
            Err(_) => Some(Next::Memory(permits)),
        }
    }

    async fn start(&mut self, request: Request, payload: Bytes) {
        let held_bytes = request.memory_bytes();
        self.held_bytes += held_bytes;
        let permit = self.admitted.take();
        let export = Arc::clone(&self.chosen.export);
        let structured = self.chosen.structured;
        let mut work = Box::pin(async move { run(&*export, request, payload, structured).await });
        // Most requests finish in place; only one that waits is worth a task of its own.
        match poll_fn(|cx| Poll::Ready(work.as_mut().poll(cx))).await {
            Poll::Ready(result) => self.out.push(Reply { request, result, held_bytes, permit }),
            Poll::Pending => {
                self.under_way += 1;
                let result = Err(Failure::from(Errno::EIO));
                let mut job = Job {
                    done: self.done.clone(),
                    reply: Some(Reply { request, result, held_bytes, permit }),
                    _signal: self.signal.clone(),
                };
                tokio::spawn(async move {
                    let result = work.await;
                    if let Some(reply) = &mut job.reply {
                        reply.result = result;
                    }
                });
            }
        }
    }

    fn finish(&mut self, reply: Reply) {
        self.under_way -= 1;
        self.out.push(reply);
    }
}

/// A request that runs in a task of its own. It is answered when this is dropped, so that a panic
/// in an export costs one request and not the connection.
struct Job {
    done: mpsc::UnboundedSender<Reply>,
    reply: Option<Reply>,
    /// Keeps [`crate::Server::stopped`] waiting while the export is at work.
    _signal: watch::Receiver<Signal>,
}

impl Drop for Job {
    fn drop(&mut self) {
        if let Some(reply) = self.reply.take() {
            // Nobody listens any more once the connection broke.
            let _ = self.done.send(reply);
        }
    }
}

/// How a request ended.
type Outcome = Result<Answer, Failure>;
