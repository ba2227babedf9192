//! One request: what is allowed, and carrying it out.

use bytes::Bytes;

use super::Outcome;
use super::reply::{Answer, Failure, Piece};
use crate::handshake::Negotiated;
use crate::protocol::{
    CMD_BLOCK_STATUS, CMD_FLAG_DF, CMD_FLAG_FAST_ZERO, CMD_FLAG_FUA, CMD_FLAG_NO_HOLE,
    CMD_FLAG_REQ_ONE, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES,
    PAYLOAD_BYTES_MAX,
};
use crate::{Errno, Export, Run, ZeroOptions};

/// Runs in one block-status reply, 32 KiB of it: a client asks again from where it ends.
const RUNS_MAX: usize = 4096;

/// Reads from this size on leave out holes. For smaller ones, asking where holes are costs more
/// than sending zeroes.
const SPARSE_READ_BYTES_MIN: u32 = 64 << 10;

/// A request's header (proto.md, "Request message").
#[derive(Debug, Clone, Copy)]
pub(super) struct Request {
    pub(super) flags: u16,
    pub(super) command: u16,
    /// The client's name for it, which the reply repeats.
    pub(super) cookie: u64,
    pub(super) offset_bytes: u64,
    pub(super) len_bytes: u32,
}

impl Request {
    /// What follows the header.
    pub(super) fn payload_bytes(&self) -> usize {
        if self.command == CMD_WRITE { self.len_bytes as usize } else { 0 }
    }

    /// What the request keeps in memory until its reply is written.
    pub(super) fn memory_bytes(&self) -> usize {
        match self.command {
            CMD_READ | CMD_WRITE => self.len_bytes as usize,
            CMD_BLOCK_STATUS => RUNS_MAX * size_of::<Run>(),
            _ => 0,
        }
    }
}

/// What the protocol allows of this request on this export.
pub(super) fn check(request: &Request, chosen: &Negotiated) -> Result<(), Failure> {
    let refuse = |errno, text| Err(Failure { errno, text });
    let allowed = match request.command {
        CMD_READ if chosen.structured => CMD_FLAG_DF | CMD_FLAG_FUA,
        CMD_READ | CMD_WRITE | CMD_FLUSH | CMD_TRIM => CMD_FLAG_FUA,
        CMD_WRITE_ZEROES => CMD_FLAG_FUA | CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO,
        CMD_BLOCK_STATUS if chosen.allocation => CMD_FLAG_REQ_ONE | CMD_FLAG_FUA,
        CMD_BLOCK_STATUS => {
            return refuse(Errno::EINVAL, "block status needs a metadata context to be set first");
        }
        _ => return refuse(Errno::EINVAL, "the server does not know this command"),
    };
    if request.flags & !allowed != 0 {
        return refuse(Errno::EINVAL, "the command does not take these flags");
    }
    if request.command == CMD_FLUSH {
        return Ok(());
    }
    let changes = matches!(request.command, CMD_WRITE | CMD_TRIM | CMD_WRITE_ZEROES);
    if changes && chosen.export.read_only() {
        return refuse(Errno::EPERM, "the export is read-only");
    }
    let carries_data = matches!(request.command, CMD_READ | CMD_WRITE);
    if carries_data && request.len_bytes > PAYLOAD_BYTES_MAX {
        return refuse(Errno::EOVERFLOW, "the request is over the largest block size announced");
    }
    let minimum = u64::from(chosen.export.block_size().minimum.max(1));
    let len = u64::from(request.len_bytes);
    if len == 0 || !request.offset_bytes.is_multiple_of(minimum) || !len.is_multiple_of(minimum) {
        return refuse(Errno::EINVAL, "the request is empty, or no multiple of the block size");
    }
    let end = request.offset_bytes.checked_add(len);
    match end {
        Some(end) if end <= chosen.export.size_bytes() => Ok(()),
        _ if changes => refuse(Errno::ENOSPC, "the request reaches beyond the end of the export"),
        _ => refuse(Errno::EINVAL, "the request reaches beyond the end of the export"),
    }
}

/// Carries out a request that [`check`] let through.
pub(super) async fn run(
    export: &dyn Export,
    request: Request,
    payload: Bytes,
    structured: bool,
) -> Outcome {
    let Request { offset_bytes, len_bytes, flags, .. } = request;
    let fua = flags & CMD_FLAG_FUA != 0;
    match request.command {
        CMD_READ => {
            let fragments = structured && flags & CMD_FLAG_DF == 0;
            if fragments && len_bytes >= SPARSE_READ_BYTES_MIN {
                return read_sparse(export, offset_bytes, len_bytes).await;
            }
            read_whole(export, offset_bytes, len_bytes).await.map(Answer::Data)
        }
        CMD_WRITE => {
            export.write(offset_bytes, payload, fua).await?;
            Ok(Answer::Done)
        }
        CMD_FLUSH => {
            export.flush().await?;
            Ok(Answer::Done)
        }
        CMD_TRIM => {
            export.trim(offset_bytes, len_bytes, fua).await?;
            Ok(Answer::Done)
        }
        CMD_WRITE_ZEROES => {
            let options = ZeroOptions {
                fua,
                no_hole: flags & CMD_FLAG_NO_HOLE != 0,
                fast: flags & CMD_FLAG_FAST_ZERO != 0,
            };
            export.write_zeroes(offset_bytes, len_bytes, options).await?;
            Ok(Answer::Done)
        }
        CMD_BLOCK_STATUS => {
            let runs = export.runs(offset_bytes, len_bytes).await?;
            let runs_max = if flags & CMD_FLAG_REQ_ONE != 0 { 1 } else { RUNS_MAX };
            let runs = tidy(runs, u64::from(len_bytes), runs_max);
            if runs.is_empty() {
                return Err(Errno::EIO.into());
            }
            Ok(Answer::Runs(runs))
        }
        _ => Err(Errno::EINVAL.into()),
    }
}

/// A read of exactly the length that was asked for: a simple reply has no other length.
async fn read_whole(
    export: &dyn Export,
    offset_bytes: u64,
    len_bytes: u32,
) -> Result<Bytes, Failure> {
    let data = export.read(offset_bytes, len_bytes).await?;
    if data.len() == len_bytes as usize { Ok(data) } else { Err(Errno::EIO.into()) }
}

/// A read that leaves out what nothing is allocated for.
async fn read_sparse(export: &dyn Export, offset_bytes: u64, len_bytes: u32) -> Outcome {
    let runs = export.runs(offset_bytes, len_bytes).await.unwrap_or_default();
    let runs = tidy(runs, u64::from(len_bytes), RUNS_MAX);
    if !runs.iter().any(|run| run.hole) {
        return read_whole(export, offset_bytes, len_bytes).await.map(Answer::Data);
    }
    let mut pieces = Vec::with_capacity(runs.len() + 1);
    let (mut at, end) = (offset_bytes, offset_bytes + u64::from(len_bytes));
    let known: u64 = runs.iter().map(|run| run.len_bytes).sum();
    let rest = Run { len_bytes: u64::from(len_bytes) - known, hole: false };
    for run in runs.into_iter().chain([rest]) {
        let len_bytes = run.len_bytes.min(end - at) as u32;
        if len_bytes == 0 {
            continue;
        }
        pieces.push(match run.hole {
            true => Piece::Hole { offset_bytes: at, len_bytes },
            false => {
                let data = read_whole(export, at, len_bytes).await?;
                Piece::Data { offset_bytes: at, data }
            }
        });
        at += u64::from(len_bytes);
    }
    Ok(Answer::Pieces(pieces))
}

/// Runs as the protocol wants them: none empty, neighbours different, within the request, whose
/// length is 32 bits.
fn tidy(runs: Vec<Run>, len_bytes: u64, runs_max: usize) -> Vec<Run> {
    let mut tidied: Vec<Run> = Vec::with_capacity(runs.len().min(runs_max));
    let mut left = len_bytes;
    for run in runs {
        let len_bytes = run.len_bytes.min(left);
        left -= len_bytes;
        if len_bytes == 0 {
            continue;
        }
        let full = tidied.len() == runs_max;
        match tidied.last_mut() {
            Some(last) if last.hole == run.hole => last.len_bytes += len_bytes,
            _ if full => break,
            _ => tidied.push(Run { len_bytes, hole: run.hole }),
        }
    }
    tidied
}
