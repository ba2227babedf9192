//! Compressed grains: found by their marker, inflated within bounds, a few of them remembered.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use flate2::{Decompress, FlushDecompress, Status};

use crate::{
    error::{ErrorKind, ImageError, Result},
    image::SECTOR_BYTES,
    sparse::header::{FLAG_MARKERS, Header},
    storage::Store,
};

/// Memory for inflated grains of one extent; one grain is kept even if it is larger.
const INFLATED_BYTES_MAX: u64 = 4 << 20;

/// Bytes before a grain's compressed data: its first sector and the data's length.
pub(crate) const MARKER_BYTES: u64 = 12;

/// The mend: what is compressed cannot be guessed.
const FETCH: &str = "the file is damaged here, so fetch it again from its source";

/// Reads compressed grains.
pub(crate) struct Inflated {
    header: Header,
    recent: Mutex<VecDeque<(u64, Arc<[u8]>)>>,
}

impl Inflated {
    pub(crate) fn new(header: Header) -> Self {
        Self { header, recent: Mutex::default() }
    }

    /// Fills `buf` from byte `within` of grain number `grain`, which is at `sector` of the file.
    pub(crate) fn read(
        &self,
        store: &Store,
        sector: u32,
        grain: u64,
        within: usize,
        buf: &mut [u8],
    ) -> Result<()> {
        let copy = |bytes: &[u8], buf: &mut [u8]| {
            buf.copy_from_slice(&bytes[within..within + buf.len()]);
        };
        {
            let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((_, bytes)) = recent.iter().find(|(number, _)| *number == grain) {
                copy(bytes, buf);
                return Ok(());
            }
        }
        let bytes = self.inflate(store, sector, grain)?;
        copy(&bytes, buf);
        // A grain that was read whole is not asked for again soon.
        if buf.len() < bytes.len() {
            let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
            recent.push_front((grain, bytes.into()));
            let keep = (INFLATED_BYTES_MAX / self.header.grain_bytes()).max(1);
            recent.truncate(keep as usize);
        }
        Ok(())
    }

    /// The whole grain. Checks everything that the format lets one check.
    pub(crate) fn inflate(&self, store: &Store, sector: u32, grain: u64) -> Result<Vec<u8>> {
        let at = u64::from(sector) * SECTOR_BYTES;
        let damaged =
            |sentence: String| ImageError::new(ErrorKind::Damaged, &store.path, sentence).at(at);
        let grain_bytes = self.header.grain_bytes();
        let most = compressed_bytes_max(grain_bytes);
        let data = if self.header.has(FLAG_MARKERS) {
            let mut marker = [0; MARKER_BYTES as usize];
            store.read(&mut marker, at)?;
            let (first, length) = split_marker(&marker);
            if first != grain * self.header.grain_sectors {
                let sentence = format!(
                    "the compressed grain here says that it begins at sector {first}, but it is \
                     named for sector {}; {FETCH}",
                    grain * self.header.grain_sectors
                );
                return Err(damaged(sentence));
            }
            if length == 0 || u64::from(length) > most {
                let sentence = format!(
                    "the compressed grain here says that it has {length} bytes, which none has; \
                     {FETCH}"
                );
                return Err(damaged(sentence));
            }
            store.read_vec(at + MARKER_BYTES, length as usize)?
        } else {
            let left = store.length()?.saturating_sub(at).min(most);
            store.read_vec(at, left as usize)?
        };
        let visible = (self.header.capacity_bytes() - grain * grain_bytes).min(grain_bytes);
        inflate(&data, grain_bytes as usize, visible as usize).map_err(|sentence| {
            damaged(format!(
                "the compressed grain of sector {} {sentence}; {FETCH}",
                grain * self.header.grain_sectors
            ))
        })
    }
}

/// Most bytes that deflate makes of a grain: fast compressors make noise an eighth larger, and
/// qemu reads twice the grain at most.
pub(crate) fn compressed_bytes_max(grain_bytes: u64) -> u64 {
    grain_bytes * 2
}

/// First sector and length of data that a grain's marker gives.
pub(crate) fn split_marker(bytes: &[u8; MARKER_BYTES as usize]) -> (u64, u32) {
    let first = u64::from_le_bytes(crate::sparse::header::first_eight(bytes));
    (first, u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]))
}

/// Inflates to at most `whole` bytes, and pads with zeros what is beyond `visible`.
pub(crate) fn inflate(data: &[u8], whole: usize, visible: usize) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0; whole];
    let mut inflater = Decompress::new(true);
    let status = inflater
        .decompress(data, &mut bytes, FlushDecompress::Finish)
        .map_err(|error| format!("cannot be inflated: {error}"))?;
    let found = inflater.total_out();
    if status != Status::StreamEnd {
        return Err("does not end where it should".into());
    }
    if found < visible as u64 {
        return Err(format!("has {found} bytes of the {visible} that it should have"));
    }
    Ok(bytes)
}
