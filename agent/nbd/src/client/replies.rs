//! Replies of a server, simple and structured.

use std::collections::HashMap;
use std::io;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, BufReader};

use super::{Answer, ClientError, Pending, Waiting};
use crate::handshake::invalid;
use crate::protocol::{
    CMD_BLOCK_STATUS, CMD_READ, REPLY_FLAG_DONE, REPLY_TYPE_BLOCK_STATUS, REPLY_TYPE_NONE,
    REPLY_TYPE_OFFSET_DATA, REPLY_TYPE_OFFSET_HOLE, SIMPLE_REPLY_MAGIC, STATE_HOLE, STATE_ZERO,
    STRUCTURED_REPLY_MAGIC,
};
use crate::{Errno, Run};

/// Longest chunk of anything but data: 64 Ki runs, or an error text.
const CHUNK_BYTES_MAX: usize = 4 + 8 * (64 << 10);

/// Reads replies and hands them to who asked, until the connection ends.
pub(super) async fn read<R: AsyncRead + Unpin>(
    reader: R,
    waiting: &Waiting,
    allocation: Option<u32>,
) -> io::Result<()> {
    let reader = BufReader::with_capacity(64 << 10, reader);
    let mut replies = Replies { reader, waiting, allocation, begun: HashMap::new() };
    loop {
        match replies.reader.read_u32().await? {
            SIMPLE_REPLY_MAGIC => replies.simple().await?,
            STRUCTURED_REPLY_MAGIC => replies.chunk().await?,
            _ => return Err(invalid("the NBD server's reply makes no sense")),
        }
    }
}

struct Replies<'a, R> {
    reader: BufReader<R>,
    waiting: &'a Waiting,
    allocation: Option<u32>,
    /// Structured replies whose last chunk is still to come.
    begun: HashMap<u64, Begun>,
}

struct Begun {
    pending: Pending,
    data: BytesMut,
    /// How much of `data` came.
    data_bytes: u64,
    runs: Vec<Run>,
    failure: Option<(Errno, String)>,
}

impl<R: AsyncRead + Unpin> Replies<'_, R> {
    async fn simple(&mut self) -> io::Result<()> {
        let errno = self.reader.read_u32().await?;
        let cookie = self.reader.read_u64().await?;
        let pending = self.waiting.remove(cookie).ok_or_else(not_asked)?;
        let answer = if errno != 0 {
            Err(ClientError::Failed { errno: Errno(errno), text: "no more was said".into() })
        } else if pending.command == CMD_READ {
            let mut data = BytesMut::zeroed(pending.len_bytes as usize);
            self.reader.read_exact(&mut data).await?;
            Ok(Answer::Data(data.freeze()))
        } else {
            Ok(Answer::Done)
        };
        // Who asked may have given up waiting.
        let _ = pending.asker.send(answer);
        Ok(())
    }

    async fn chunk(&mut self) -> io::Result<()> {
        let flags = self.reader.read_u16().await?;
        let kind = self.reader.read_u16().await?;
        let cookie = self.reader.read_u64().await?;
        let len = self.reader.read_u32().await? as usize;
        let mut begun = match self.begun.remove(&cookie) {
            Some(begun) => begun,
            None => Begun::new(self.waiting.remove(cookie).ok_or_else(not_asked)?),
        };
        if kind == REPLY_TYPE_OFFSET_DATA {
            let at = self.reader.read_u64().await?;
            let place = begun.place(at, len.checked_sub(8).ok_or_else(malformed)? as u64)?;
            self.reader.read_exact(place).await?;
        } else {
            if len > CHUNK_BYTES_MAX {
                return Err(malformed());
            }
            let mut data = vec![0; len];
            self.reader.read_exact(&mut data).await?;
            begun.handle(kind, data.into(), self.allocation)?;
        }
        if flags & REPLY_FLAG_DONE == 0 {
            self.begun.insert(cookie, begun);
            return Ok(());
        }
        begun.finish()
    }
}

impl Begun {
    fn new(pending: Pending) -> Self {
        let len = if pending.command == CMD_READ { pending.len_bytes as usize } else { 0 };
        let data = BytesMut::zeroed(len);
        Self { pending, data, data_bytes: 0, runs: Vec::new(), failure: None }
    }

    /// The part of the data that a chunk fills.
    fn place(&mut self, at: u64, len: u64) -> io::Result<&mut [u8]> {
        let start = at.checked_sub(self.pending.offset_bytes).ok_or_else(malformed)?;
        let end = start.checked_add(len).filter(|end| *end <= self.data.len() as u64);
        let end = end.ok_or_else(malformed)?;
        self.data_bytes += len;
        Ok(&mut self.data[start as usize..end as usize])
    }

    fn handle(&mut self, kind: u16, mut data: Bytes, allocation: Option<u32>) -> io::Result<()> {
        match kind {
            REPLY_TYPE_NONE => {}
            REPLY_TYPE_OFFSET_HOLE if data.len() == 12 => {
                let at = data.get_u64();
                self.place(at, data.get_u32().into())?.fill(0);
            }
            REPLY_TYPE_BLOCK_STATUS if data.len() >= 12 && data.len() % 8 == 4 => {
                if Some(data.get_u32()) != allocation {
                    return Err(malformed());
                }
                while data.has_remaining() {
                    let len_bytes = u64::from(data.get_u32());
                    let both = STATE_HOLE | STATE_ZERO;
                    self.runs.push(Run { len_bytes, hole: data.get_u32() & both == both });
                }
            }
            // proto.md, "Structured reply types": all errors have bit 15 set and begin alike.
            kind if kind & 1 << 15 != 0 && data.len() >= 6 => {
                let errno = Errno(data.get_u32());
                let len = usize::from(data.get_u16());
                let text = data.get(..len).ok_or_else(malformed)?;
                self.failure = Some((errno, String::from_utf8_lossy(text).into_owned()));
            }
            _ => return Err(malformed()),
        }
        Ok(())
    }

    fn finish(self) -> io::Result<()> {
        let answer = match (self.failure, self.pending.command) {
            (Some((errno, text)), _) => Err(ClientError::Failed { errno, text }),
            (None, CMD_READ) if self.data_bytes != self.data.len() as u64 => {
                return Err(invalid("the NBD server left out a part of a read"));
            }
            (None, CMD_READ) => Ok(Answer::Data(self.data.freeze())),
            (None, CMD_BLOCK_STATUS) if self.runs.is_empty() => return Err(malformed()),
            (None, CMD_BLOCK_STATUS) => Ok(Answer::Runs(self.runs)),
            (None, _) => Ok(Answer::Done),
        };
        let _ = self.pending.asker.send(answer);
        Ok(())
    }
}

fn not_asked() -> io::Error {
    invalid("the NBD server answered what was not asked")
}

fn malformed() -> io::Error {
    invalid("the NBD server sent a malformed chunk")
}
