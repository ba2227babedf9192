//! Compressing a body, when that is worth it.

use bytes::Bytes;

use crate::batch::Codec;

/// Whether, and how hard, to compress a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Send it as it is: the processor is the bottleneck.
    Off,
    /// zstd at this level: the link is the bottleneck.
    Zstd(i32),
}

/// Compresses bodies, one after the other. Its buffers are as large as the largest body it has seen:
/// what it returns holds no more memory than the bytes it says.
#[derive(Default)]
pub struct Compressor {
    zstd: zstd::bulk::Compressor<'static>,
    packed: Vec<u8>,
    compressed: Vec<u8>,
}

impl std::fmt::Debug for Compressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let bytes = self.packed.len();
        f.debug_struct("Compressor").field("packed_bytes", &bytes).finish_non_exhaustive()
    }
}

impl Compressor {
    /// The body as it travels: `head`, then `data`.
    pub(super) fn pack(
        &mut self,
        head: Vec<u8>,
        data: Vec<Bytes>,
        compression: Compression,
    ) -> (Codec, Vec<Bytes>) {
        if let Compression::Zstd(level) = compression
            && let Some(body) = self.compress(&head, &data, level)
        {
            return (Codec::Zstd, vec![body]);
        }
        let data_bytes: usize = data.iter().map(Bytes::len).sum();
        if data_bytes < data.len() * PIECE_BYTES_MIN {
            let mut body = head;
            body.reserve_exact(data_bytes);
            data.iter().for_each(|piece| body.extend_from_slice(piece));
            return (Codec::Plain, vec![body.into()]);
        }
        let mut body = Vec::with_capacity(1 + data.len());
        body.push(Bytes::from(head));
        body.extend(data);
        (Codec::Plain, body)
    }

    /// The compressed body, or `None` when it saves less than an eighth: then the target would
    /// spend time on decompression for next to no bytes.
    fn compress(&mut self, head: &[u8], data: &[Bytes], level: i32) -> Option<Bytes> {
        let data_bytes: usize = data.iter().map(Bytes::len).sum();
        if data_bytes >= SAMPLED_BYTES_MIN {
            self.sample(data, data_bytes);
            let sample_bytes = self.packed.len();
            // Less than for the whole body: what is alike may lie further apart than a piece is long.
            if self.zstd(1)? > sample_bytes - sample_bytes / 32 {
                return None;
            }
        }
        self.packed.clear();
        self.packed.extend_from_slice(head);
        for chunk in data {
            self.packed.extend_from_slice(chunk);
        }
        let len = self.zstd(level)?;
        let worth = len <= self.packed.len() - self.packed.len() / 8;
        // Copied, because a queue full of batches would otherwise hold this buffer for each of them.
        worth.then(|| Bytes::copy_from_slice(&self.compressed[..len]))
    }

    /// Gathers a few pieces from all over the data. A piece may reach over several small writes.
    fn sample(&mut self, data: &[Bytes], data_bytes: usize) {
        self.packed.clear();
        let stride = (data_bytes / SAMPLES).max(SAMPLE_BYTES);
        let (mut start, mut piece) = (0, 0);
        for chunk in data {
            let end = start + chunk.len();
            while piece < end {
                let piece_end = piece + SAMPLE_BYTES;
                let (from, to) = (piece.max(start), piece_end.min(end));
                self.packed.extend_from_slice(&chunk[from - start..to - start]);
                if piece_end > end {
                    break;
                }
                piece += stride;
            }
            start = end;
        }
    }

    /// Compresses what was gathered; returns the size.
    fn zstd(&mut self, level: i32) -> Option<usize> {
        self.zstd.set_compression_level(level).ok()?;
        self.compressed.clear();
        self.compressed.reserve(zstd::zstd_safe::compress_bound(self.packed.len()));
        self.zstd.compress_to_buffer(&self.packed, &mut self.compressed).ok()
    }
}

/// Data in smaller pieces, on average, is gathered: to hold each costs a handle and what lies around
/// it in the buffer that it is a slice of, and to send each costs more than to copy it.
const PIECE_BYTES_MIN: usize = 2048;

/// zstd goes through all of a body to find out that there is nothing to find: at level 1 that takes longer than to
/// hash it, at level 9 three times as long (`benches/REPORT.md`). So a sample is tried first. A smaller body is hardly
/// larger than the sample.
const SAMPLED_BYTES_MIN: usize = 4 * SAMPLES * SAMPLE_BYTES;
const SAMPLES: usize = 8;
const SAMPLE_BYTES: usize = 4096;
