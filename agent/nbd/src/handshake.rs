//! The handshake: from the greeting to the export that the client chose.

use std::io;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::protocol::{
    BASE_ALLOCATION, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, IHAVEOPT, INFO_BLOCK_SIZE,
    INFO_DESCRIPTION, INFO_EXPORT, INFO_NAME, NBDMAGIC, OPT_ABORT, OPT_EXPORT_NAME, OPT_GO,
    OPT_INFO, OPT_LIST, OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT, OPT_STRUCTURED_REPLY,
    OPTION_BYTES_MAX, OPTION_REPLY_MAGIC, PAYLOAD_BYTES_MAX, REP_ACK, REP_ERR_INVALID,
    REP_ERR_TOO_BIG, REP_ERR_UNKNOWN, REP_ERR_UNSUP, REP_INFO, REP_META_CONTEXT, REP_SERVER,
    STRING_BYTES_MAX, TRANSMIT_CAN_MULTI_CONN, TRANSMIT_HAS_FLAGS, TRANSMIT_READ_ONLY,
    TRANSMIT_SEND_DF, TRANSMIT_SEND_FAST_ZERO, TRANSMIT_SEND_FLUSH, TRANSMIT_SEND_FUA,
    TRANSMIT_SEND_TRIM, TRANSMIT_SEND_WRITE_ZEROES,
};
use crate::{Export, Exports};

/// Options a client may send before it settles on an export: enough for any real one, and an end
/// for one that would talk for ever.
const OPTIONS_MAX: usize = 1024;

/// The id this server gives to `base:allocation`.
pub(crate) const ALLOCATION_CONTEXT: u32 = 1;

/// What the handshake settled.
pub(crate) struct Negotiated {
    pub(crate) export: Arc<dyn Export>,
    pub(crate) name: String,
    pub(crate) structured: bool,
    pub(crate) allocation: bool,
}

/// Runs the handshake. `Ok(None)`: the client left in good order.
pub(crate) async fn negotiate<S>(
    stream: &mut S,
    exports: &Exports,
) -> io::Result<Option<Negotiated>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut greeting = Vec::with_capacity(18);
    greeting.extend_from_slice(&NBDMAGIC.to_be_bytes());
    greeting.extend_from_slice(&IHAVEOPT.to_be_bytes());
    greeting.extend_from_slice(&(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
    stream.write_all(&greeting).await?;
    let flags = stream.read_u32().await?;
    if flags & !u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES) != 0 {
        return Err(invalid("the client set handshake flags that were not offered"));
    }
    let no_zeroes = flags & u32::from(FLAG_NO_ZEROES) != 0;
    let mut session = Session { stream, exports, structured: false, allocation_of: None };
    for _ in 0..OPTIONS_MAX {
        if session.stream.read_u64().await? != IHAVEOPT {
            return Err(invalid("an option does not start with its magic number"));
        }
        let option = session.stream.read_u32().await?;
        let len = session.stream.read_u32().await?;
        if len > OPTION_BYTES_MAX {
            session.skip(len).await?;
            session.reply(option, REP_ERR_TOO_BIG, b"option data over 64 KiB").await?;
            continue;
        }
        let mut data = vec![0; len as usize];
        session.stream.read_exact(&mut data).await?;
        match option {
            OPT_EXPORT_NAME => return session.export_name(&data, no_zeroes).await.map(Some),
            OPT_ABORT => {
                session.reply(option, REP_ACK, b"").await?;
                return Ok(None);
            }
            OPT_GO | OPT_INFO => {
                if let Some(chosen) = session.info(option, &data).await?
                    && option == OPT_GO
                {
                    return Ok(Some(chosen));
                }
            }
            OPT_LIST => session.list(&data).await?,
            OPT_STRUCTURED_REPLY if data.is_empty() => {
                session.structured = true;
                session.reply(option, REP_ACK, b"").await?;
            }
            OPT_STRUCTURED_REPLY => session.reply(option, REP_ERR_INVALID, b"").await?,
            OPT_LIST_META_CONTEXT | OPT_SET_META_CONTEXT => session.meta(option, &data).await?,
            _ => session.reply(option, REP_ERR_UNSUP, b"").await?,
        }
    }
    Err(invalid("the client sent options without end"))
}

struct Session<'a, S> {
    stream: &'a mut S,
    exports: &'a Exports,
    structured: bool,
    /// The export for which `base:allocation` was chosen.
    allocation_of: Option<String>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Session<'_, S> {
    async fn reply(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        let mut out = Vec::with_capacity(20 + data.len());
        out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
        out.extend_from_slice(&option.to_be_bytes());
        out.extend_from_slice(&kind.to_be_bytes());
        out.extend_from_slice(&(data.len() as u32).to_be_bytes());
        out.extend_from_slice(data);
        self.stream.write_all(&out).await
    }

    async fn skip(&mut self, len: u32) -> io::Result<()> {
        let mut left = (&mut *self.stream).take(len.into());
        tokio::io::copy(&mut left, &mut tokio::io::sink()).await?;
        Ok(())
    }

    async fn unknown(&mut self, option: u32, name: &str) -> io::Result<()> {
        let text = format!("list the exports to see their names; there is none named `{name}`");
        self.reply(option, REP_ERR_UNKNOWN, cut(&text).as_bytes()).await
    }

    fn chosen(&self, name: &str, export: Arc<dyn Export>) -> Negotiated {
        let allocation = self.structured && self.allocation_of.as_deref() == Some(name);
        Negotiated { export, name: name.to_owned(), structured: self.structured, allocation }
    }

    async fn export_name(&mut self, data: &[u8], no_zeroes: bool) -> io::Result<Negotiated> {
        let name = str::from_utf8(data).map_err(|_| invalid("an export name is not UTF-8"))?;
        // This old option has no error reply: proto.md tells the server to hang up.
        let Some((name, export)) = self.exports.get(name) else {
            return Err(invalid("the client asked for an export that does not exist"));
        };
        let mut out = Vec::with_capacity(134);
        out.extend_from_slice(&export.size_bytes().to_be_bytes());
        out.extend_from_slice(&transmission_flags(&*export, self.structured).to_be_bytes());
        if !no_zeroes {
            out.resize(out.len() + 124, 0);
        }
        self.stream.write_all(&out).await?;
        Ok(self.chosen(&name, export))
    }

    async fn list(&mut self, data: &[u8]) -> io::Result<()> {
        if !data.is_empty() {
            return self.reply(OPT_LIST, REP_ERR_INVALID, b"a list takes no data").await;
        }
        for name in self.exports.names() {
            let mut entry = (name.len() as u32).to_be_bytes().to_vec();
            entry.extend_from_slice(name.as_bytes());
            self.reply(OPT_LIST, REP_SERVER, &entry).await?;
        }
        self.reply(OPT_LIST, REP_ACK, b"").await
    }

    async fn info(&mut self, option: u32, data: &[u8]) -> io::Result<Option<Negotiated>> {
        let mut fields = Fields(data);
        let parsed = (|| {
            let name = fields.string()?;
            let count = fields.u16()?;
            let requests = (0..count).map(|_| fields.u16()).collect::<Option<Vec<_>>>()?;
            fields.0.is_empty().then_some((name, requests))
        })();
        let Some((name, requests)) = parsed else {
            self.reply(option, REP_ERR_INVALID, b"malformed option").await?;
            return Ok(None);
        };
        let Some((name, export)) = self.exports.get(name) else {
            self.unknown(option, name).await?;
            return Ok(None);
        };
        let mut info = INFO_EXPORT.to_be_bytes().to_vec();
        info.extend_from_slice(&export.size_bytes().to_be_bytes());
        info.extend_from_slice(&transmission_flags(&*export, self.structured).to_be_bytes());
        self.reply(option, REP_INFO, &info).await?;

        let size = export.block_size();
        let mut info = INFO_BLOCK_SIZE.to_be_bytes().to_vec();
        for number in [size.minimum, size.preferred, PAYLOAD_BYTES_MAX] {
            info.extend_from_slice(&number.to_be_bytes());
        }
        self.reply(option, REP_INFO, &info).await?;
        for request in requests {
            let text = match request {
                INFO_NAME => name.clone(),
                INFO_DESCRIPTION => export.description(),
                _ => continue,
            };
            let mut info = request.to_be_bytes().to_vec();
            info.extend_from_slice(cut(&text).as_bytes());
            self.reply(option, REP_INFO, &info).await?;
        }
        self.reply(option, REP_ACK, b"").await?;
        Ok(Some(self.chosen(&name, export)))
    }

    async fn meta(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        let mut fields = Fields(data);
        let parsed = (|| {
            let name = fields.string()?;
            let count = fields.u32()?;
            if count as usize > data.len() / 4 {
                return None;
            }
            let queries = (0..count).map(|_| fields.string()).collect::<Option<Vec<_>>>()?;
            fields.0.is_empty().then_some((name, queries))
        })();
        let set = option == OPT_SET_META_CONTEXT;
        if set {
            // Also when it fails: what was chosen before is replaced by what this asks for.
            self.allocation_of = None;
        }
        if !self.structured {
            return self.reply(option, REP_ERR_INVALID, b"ask for structured replies first").await;
        }
        let Some((name, queries)) = parsed else {
            return self.reply(option, REP_ERR_INVALID, b"malformed option").await;
        };
        let Some((name, _)) = self.exports.get(name) else {
            return self.unknown(option, name).await;
        };
        let wanted = queries.contains(&BASE_ALLOCATION)
            || !set && (queries.is_empty() || queries.contains(&"base:"));
        if wanted {
            let id = if set { ALLOCATION_CONTEXT } else { 0 };
            let mut context = id.to_be_bytes().to_vec();
            context.extend_from_slice(BASE_ALLOCATION.as_bytes());
            self.reply(option, REP_META_CONTEXT, &context).await?;
            if set {
                self.allocation_of = Some(name);
            }
        }
        self.reply(option, REP_ACK, b"").await
    }
}

fn transmission_flags(export: &dyn Export, structured: bool) -> u16 {
    let mut always =
        TRANSMIT_HAS_FLAGS | TRANSMIT_SEND_FLUSH | TRANSMIT_SEND_FUA | TRANSMIT_CAN_MULTI_CONN;
    if structured {
        always |= TRANSMIT_SEND_DF;
    }
    if export.read_only() {
        always | TRANSMIT_READ_ONLY
    } else {
        always | TRANSMIT_SEND_TRIM | TRANSMIT_SEND_WRITE_ZEROES | TRANSMIT_SEND_FAST_ZERO
    }
}

/// Big-endian fields of option data; `None` where the data ends early.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(len)?;
        self.0 = tail;
        Some(head)
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.take(2)?.try_into().ok()?))
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.take(4)?.try_into().ok()?))
    }

    fn string(&mut self) -> Option<&'a str> {
        let len = self.u32()? as usize;
        if len > STRING_BYTES_MAX {
            return None;
        }
        str::from_utf8(self.take(len)?).ok()
    }
}

/// The part of `text` that fits a string of the protocol.
fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(STRING_BYTES_MAX)]
}

/// The error for a peer that breaks the protocol.
pub(crate) fn invalid(sentence: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, sentence)
}
