//! A client that sends what it is told, right or wrong, and takes replies apart byte by byte.

use std::collections::HashMap;
use std::io;
use std::path::Path;

use backhaul_nbd::protocol::{
    BASE_ALLOCATION, CMD_READ, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, IHAVEOPT, NBDMAGIC, OPT_GO,
    OPT_SET_META_CONTEXT, OPT_STRUCTURED_REPLY, OPTION_REPLY_MAGIC, REP_ACK, REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

pub struct Raw {
    pub stream: UnixStream,
    /// Lengths of reads that were asked for: a simple reply does not tell.
    reads: HashMap<u64, u32>,
}

/// One message of the transmission phase.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    Simple { cookie: u64, errno: u32, data: Vec<u8> },
    Chunk { cookie: u64, flags: u16, kind: u16, data: Vec<u8> },
}

impl Message {
    pub fn cookie(&self) -> u64 {
        match self {
            Self::Simple { cookie, .. } | Self::Chunk { cookie, .. } => *cookie,
        }
    }
}

pub fn option_bytes(option: u32, data: &[u8]) -> Vec<u8> {
    let mut out = IHAVEOPT.to_be_bytes().to_vec();
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
    out
}

pub fn request_bytes(flags: u16, command: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut out = REQUEST_MAGIC.to_be_bytes().to_vec();
    out.extend_from_slice(&flags.to_be_bytes());
    out.extend_from_slice(&command.to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
    out.extend_from_slice(&offset.to_be_bytes());
    out.extend_from_slice(&len.to_be_bytes());
    out
}

pub fn string(text: &str) -> Vec<u8> {
    let mut out = (text.len() as u32).to_be_bytes().to_vec();
    out.extend_from_slice(text.as_bytes());
    out
}

/// Data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
pub fn info(name: &str, requests: &[u16]) -> Vec<u8> {
    let mut out = string(name);
    out.extend_from_slice(&(requests.len() as u16).to_be_bytes());
    out.extend(requests.iter().flat_map(|request| request.to_be_bytes()));
    out
}

/// Data of the options about metadata contexts.
pub fn meta(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut out = string(name);
    out.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    out.extend(queries.iter().flat_map(|query| string(query)));
    out
}

impl Raw {
    /// Connects and takes the greeting; says nothing.
    pub async fn connect(socket: &Path) -> Self {
        let mut stream = UnixStream::connect(socket).await.unwrap();
        assert_eq!(stream.read_u64().await.unwrap(), NBDMAGIC);
        assert_eq!(stream.read_u64().await.unwrap(), IHAVEOPT);
        assert_eq!(stream.read_u16().await.unwrap(), FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
        Self { stream, reads: HashMap::new() }
    }

    /// Connects and sets the usual flags.
    pub async fn greeted(socket: &Path) -> Self {
        let mut raw = Self::connect(socket).await;
        raw.send(&3u32.to_be_bytes()).await;
        raw
    }

    /// Connects and chooses `name`, with all extensions or none.
    pub async fn chosen(socket: &Path, name: &str, extended: bool) -> Self {
        let mut raw = Self::greeted(socket).await;
        if extended {
            assert_eq!(raw.option(OPT_STRUCTURED_REPLY, &[]).await, [(REP_ACK, vec![])]);
            raw.option(OPT_SET_META_CONTEXT, &meta(name, &[BASE_ALLOCATION])).await;
        }
        let replies = raw.option(OPT_GO, &info(name, &[])).await;
        assert_eq!(replies.last(), Some(&(REP_ACK, vec![])));
        raw
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    /// Sends an option and takes its replies, the last of which is final.
    pub async fn option(&mut self, option: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.send(&option_bytes(option, data)).await;
        let mut replies = Vec::new();
        loop {
            assert_eq!(self.stream.read_u64().await.unwrap(), OPTION_REPLY_MAGIC);
            assert_eq!(self.stream.read_u32().await.unwrap(), option);
            let kind = self.stream.read_u32().await.unwrap();
            let mut data = vec![0; self.stream.read_u32().await.unwrap() as usize];
            self.stream.read_exact(&mut data).await.unwrap();
            replies.push((kind, data));
            if kind == REP_ACK || kind & 1 << 31 != 0 {
                return replies;
            }
        }
    }

    pub async fn ask(&mut self, flags: u16, command: u16, cookie: u64, offset: u64, len: u32) {
        self.expect(command, cookie, len);
        self.send(&request_bytes(flags, command, cookie, offset, len)).await;
    }

    /// Notes how long the data of a simple reply to `cookie` will be.
    pub fn expect(&mut self, command: u16, cookie: u64, len: u32) {
        if command == CMD_READ {
            self.reads.insert(cookie, len);
        }
    }

    /// The next message.
    pub async fn message(&mut self) -> io::Result<Message> {
        let stream = &mut self.stream;
        match stream.read_u32().await? {
            SIMPLE_REPLY_MAGIC => {
                let errno = stream.read_u32().await?;
                let cookie = stream.read_u64().await?;
                let len = self.reads.remove(&cookie).filter(|_| errno == 0).unwrap_or(0);
                let mut data = vec![0; len as usize];
                stream.read_exact(&mut data).await?;
                Ok(Message::Simple { cookie, errno, data })
            }
            STRUCTURED_REPLY_MAGIC => {
                let flags = stream.read_u16().await?;
                let kind = stream.read_u16().await?;
                let cookie = stream.read_u64().await?;
                let mut data = vec![0; stream.read_u32().await? as usize];
                stream.read_exact(&mut data).await?;
                Ok(Message::Chunk { cookie, flags, kind, data })
            }
            other => panic!("a reply starts with {other:#x}"),
        }
    }

    /// The errno of the next message, which must belong to `cookie`; 0 for success.
    pub async fn errno(&mut self, cookie: u64) -> u32 {
        let message = self.message().await.unwrap();
        assert_eq!(message.cookie(), cookie);
        match message {
            Message::Simple { errno, .. } => errno,
            Message::Chunk { kind, data, .. } if kind & 1 << 15 != 0 => {
                u32::from_be_bytes(*data.first_chunk().unwrap())
            }
            Message::Chunk { .. } => 0,
        }
    }

    /// Whether the server closed the connection without another word.
    pub async fn at_end(&mut self) -> bool {
        let mut rest = Vec::new();
        // A reset is an end as well: the server did not read what we sent last.
        let _ = self.stream.read_to_end(&mut rest).await;
        rest.is_empty()
    }
}
