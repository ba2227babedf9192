//! The handshake of a client that wants one export.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::{Chosen, ClientError};
use crate::handshake::invalid;
use crate::protocol::{
    BASE_ALLOCATION, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, IHAVEOPT, INFO_EXPORT, NBDMAGIC, OPT_GO,
    OPT_SET_META_CONTEXT, OPT_STRUCTURED_REPLY, OPTION_BYTES_MAX, OPTION_REPLY_MAGIC, REP_ACK,
    REP_INFO, REP_META_CONTEXT,
};

/// Replies to one option: enough for any server, and an end for one that would talk for ever.
const REPLIES_MAX: usize = 1024;

/// Asks for structured replies and `base:allocation`, and goes on without where the server has
/// none; then chooses `export`.
pub(super) async fn choose<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    export: &str,
) -> Result<Chosen, ClientError> {
    if stream.read_u64().await? != NBDMAGIC || stream.read_u64().await? != IHAVEOPT {
        return Err(invalid("this is not a newstyle NBD server").into());
    }
    let flags = stream.read_u16().await?;
    if flags & FLAG_FIXED_NEWSTYLE == 0 {
        return Err(invalid("the NBD server does not speak fixed newstyle").into());
    }
    stream.write_u32(u32::from(flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES))).await?;

    let mut allocation = None;
    if option(stream, OPT_STRUCTURED_REPLY, &[]).await?.is_ok() {
        let mut query = string(export);
        query.extend_from_slice(&1u32.to_be_bytes());
        query.extend(string(BASE_ALLOCATION));
        let replies = option(stream, OPT_SET_META_CONTEXT, &query).await?.unwrap_or_default();
        let id = replies.iter().find(|(kind, _)| *kind == REP_META_CONTEXT);
        allocation = id.and_then(|(_, data)| field(data, 0)).map(u32::from_be_bytes);
    }

    let mut wanted = string(export);
    wanted.extend_from_slice(&0u16.to_be_bytes());
    let replies = option(stream, OPT_GO, &wanted).await?;
    let replies = replies.map_err(|text| ClientError::Refused { name: export.to_owned(), text })?;
    let info = replies.iter().find(|(kind, data)| {
        *kind == REP_INFO && field(data, 0) == Some(INFO_EXPORT.to_be_bytes())
    });
    let chosen = info.and_then(|(_, data)| {
        let size_bytes = u64::from_be_bytes(field(data, 2)?);
        Some(Chosen { size_bytes, flags: u16::from_be_bytes(field(data, 10)?), allocation })
    });
    Ok(chosen.ok_or_else(|| invalid("the NBD server did not tell the size of the export"))?)
}

/// Sends an option: the replies before the acknowledgement, or the text of the refusal.
async fn option<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    option: u32,
    data: &[u8],
) -> io::Result<Result<Vec<(u32, Vec<u8>)>, String>> {
    let mut out = IHAVEOPT.to_be_bytes().to_vec();
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
    stream.write_all(&out).await?;
    let mut replies = Vec::new();
    while replies.len() < REPLIES_MAX {
        if stream.read_u64().await? != OPTION_REPLY_MAGIC || stream.read_u32().await? != option {
            return Err(invalid("the NBD server's option reply makes no sense"));
        }
        let kind = stream.read_u32().await?;
        let len = stream.read_u32().await?;
        if len > OPTION_BYTES_MAX {
            return Err(invalid("the NBD server's option reply is too long"));
        }
        let mut data = vec![0; len as usize];
        stream.read_exact(&mut data).await?;
        match kind {
            REP_ACK => return Ok(Ok(replies)),
            // proto.md, "Option reply types": errors have bit 31 set.
            kind if kind & 1 << 31 != 0 && data.is_empty() => {
                return Ok(Err(format!("error {kind:#x}")));
            }
            kind if kind & 1 << 31 != 0 => {
                return Ok(Err(String::from_utf8_lossy(&data).into_owned()));
            }
            kind => replies.push((kind, data)),
        }
    }
    Err(invalid("the NBD server's option replies have no end"))
}

fn string(text: &str) -> Vec<u8> {
    let mut out = (text.len() as u32).to_be_bytes().to_vec();
    out.extend_from_slice(text.as_bytes());
    out
}

fn field<const N: usize>(data: &[u8], at: usize) -> Option<[u8; N]> {
    data.get(at..)?.first_chunk().copied()
}
