//! Answering an agent's questions about what the disks hold.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use backhaul_proto::limits::{HASH_REGIONS_MAX, LEAF_BYTES, REGION_BYTES};
use backhaul_proto::message::{Code, HashReply, HashRequest, Refusal};
use bytes::Bytes;

/// A disk's bytes, for reading beside the worker that writes them. A question is only answered
/// once every batch it depends on is applied, so what is read here does not change under it; blocks
/// that do are ones whose answer is not used.
#[derive(Debug)]
pub struct ReadableDisk {
    /// The flat file.
    pub file: File,
    /// Its path, for messages.
    pub path: PathBuf,
    /// Where the disk starts in it.
    pub base_offset_bytes: u64,
    /// The disk's size.
    pub size_bytes: u64,
}

impl ReadableDisk {
    /// Reads from the disk as it is at this moment.
    pub fn read(&self, offset_bytes: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, self.base_offset_bytes + offset_bytes)
    }

    fn is_hole(&self, start: u64, end: u64) -> bool {
        use rustix::fs::{SeekFrom, seek};
        match seek(&self.file, SeekFrom::Data(self.base_offset_bytes + start)) {
            Ok(data) => data >= self.base_offset_bytes + end,
            Err(rustix::io::Errno::NXIO) => true,
            Err(_) => false,
        }
    }
}

/// Answers a question about `disk`. Blocks; reads up to 256 MiB.
pub fn answer(disk: &ReadableDisk, request: &HashRequest) -> HashReply {
    let mut reply = HashReply { request: request.request, ..HashReply::default() };
    if request.regions == 0
        || request.regions > HASH_REGIONS_MAX
        || request.leaves && request.regions != 1
    {
        reply.failure = Some(Refusal {
            code: Code::Protocol.into(),
            sentence: "a question about hashes names too many regions or none".into(),
        });
        return reply;
    }
    let mut content = vec![0; REGION_BYTES as usize];
    for index in 0..u64::from(request.regions) {
        let start = request.first_region.saturating_add(index).saturating_mul(REGION_BYTES.into());
        if start >= disk.size_bytes {
            break;
        }
        let end = (start + u64::from(REGION_BYTES)).min(disk.size_bytes);
        let content = &mut content[..(end - start) as usize];
        if let Err(error) = read(disk, start, content, &mut reply, request.leaves) {
            reply.hashes.clear();
            let path = disk.path.display();
            reply.failure = Some(Refusal {
                code: Code::Storage.into(),
                sentence: format!(
                    "{path} cannot be read at byte {start} ({error}); its content is sent again unseen"
                ),
            });
            return reply;
        }
    }
    reply
}

/// Adds the hashes of the region at `start` to the reply.
fn read(
    disk: &ReadableDisk,
    start: u64,
    content: &mut [u8],
    reply: &mut HashReply,
    leaves: bool,
) -> io::Result<()> {
    if !leaves && disk.is_hole(start, start + content.len() as u64) {
        reply.hashes.push(Bytes::new());
        return Ok(());
    }
    disk.read(start, content)?;
    let zero = content[0] == 0 && content[1..] == content[..content.len() - 1];
    if !leaves && zero {
        reply.hashes.push(Bytes::new());
        return Ok(());
    }
    let mut root = blake3::Hasher::new();
    for leaf in content.chunks(LEAF_BYTES as usize) {
        let hash = blake3::hash(leaf);
        if leaves {
            reply.hashes.push(Bytes::copy_from_slice(hash.as_bytes()));
        } else {
            root.update(hash.as_bytes());
        }
    }
    if !leaves {
        reply.hashes.push(Bytes::copy_from_slice(root.finalize().as_bytes()));
    }
    Ok(())
}
