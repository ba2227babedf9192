//! What a target knows of a machine on its own disks: enough for a fresh host to go on.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::{fs, io};

use backhaul_daemon::folder::replace_file;
use backhaul_disk_image::{FlatImage, ImageError};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::failover::Stage;
use crate::recovery_point::RecoveryPoint;

/// The format that this build writes. Older ones are read, newer ones refused.
const FORMAT: u32 = 1;

/// Whether the disks can be used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Consistency {
    /// Nothing was received yet.
    #[default]
    Empty,
    /// A sync is under way or was interrupted.
    Syncing,
    /// The disks, with what the journal holds, are a prefix of the machine's writes.
    Consistent,
}

/// The durable state of one machine: `machine.json` in its folder of the store. Written whole, on
/// transitions only, never for a batch.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct MachineState {
    /// The format of this file.
    pub format: u32,
    /// The generation that the journal continues; 0 before the first.
    pub generation: u64,
    /// Whether the disks can be used.
    pub consistency: Consistency,
    /// The newest point, to which the apply is held.
    pub point: Option<RecoveryPoint>,
    /// The newest point of any generation, so that identifiers keep increasing.
    pub newest_point_us: u64,
    /// The identifier of the newest point that was given up because the journal was full. Until the next
    /// checkpoint the journal has it still, and the disks may be past it.
    #[serde(default)]
    pub given_up_us: u64,
    /// Damage took acknowledged batches away, and no sync has made them good yet.
    #[serde(default)]
    pub damaged: bool,
    /// Between replication and commit.
    pub stage: Stage,
    /// Why the last failover, cancel or commit did not work.
    pub failure: String,
    /// How the images looked when a failover made them ready, to tell whether they were used.
    #[serde(default)]
    pub ready: Vec<ImageMark>,
    /// The disks, as the agent named them at first.
    pub disks: Vec<DiskState>,
}

/// A disk, as the agent named it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskState {
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub size_bytes: u64,
}

/// What changes when somebody writes to an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageMark {
    /// The content id; VMware renews it on the first write after opening.
    pub content_id: Option<u32>,
    /// The extent's time of modification, in seconds and nanoseconds since 1970 UTC.
    pub modified: (i64, i64),
}

impl ImageMark {
    /// The marks of all images of a machine.
    pub fn of_all(images: &[FlatImage]) -> Result<Vec<Self>, ImageError> {
        let mark = |image: &FlatImage| {
            let metadata = image.file().metadata();
            let metadata = metadata
                .map_err(|source| ImageError::io("measure", image.extent_path(), source))?;
            let modified = (metadata.mtime(), metadata.mtime_nsec());
            Ok(Self { content_id: image.content_id().map(|id| id.0), modified })
        };
        images.iter().map(mark).collect()
    }
}

/// The file of a machine's state, for several that write it: the newest version stays.
#[derive(Debug)]
pub struct StateFile {
    dir: PathBuf,
    /// The newest version that was written.
    version: Mutex<u64>,
}

impl StateFile {
    /// The file in `dir`. Versions count from 1.
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), version: Mutex::new(0) }
    }

    /// Replaces the file on stable storage, unless a newer version is there. Waits for who writes it now.
    pub fn store(&self, version: u64, state: &MachineState) -> Result<(), StateError> {
        let mut written = self.version.lock().unwrap_or_else(PoisonError::into_inner);
        if version > *written {
            state.clone().store(&self.dir)?;
            *written = version;
        }
        Ok(())
    }
}

/// Why the state could not be read or written.
#[derive(Debug, Error)]
pub enum StateError {
    /// The file cannot be read or written.
    #[error("the machine's state file {path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is damaged.
    #[error("the machine's state file {path} cannot be understood: {source}", path = path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// A newer Backhaul wrote it.
    #[error("{path} has format {found}, this version knows {FORMAT}; install the version that wrote it", path = path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
}

impl MachineState {
    /// Reads the state in `dir`; that of a machine never seen is the default.
    pub fn load(dir: &Path) -> Result<Self, StateError> {
        let path = dir.join("machine.json");
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(source) => return Err(StateError::Io { path, source }),
        };
        let state: Self = serde_json::from_slice(&bytes)
            .map_err(|source| StateError::Damaged { path: path.clone(), source })?;
        if state.format > FORMAT {
            return Err(StateError::Newer { path, found: state.format });
        }
        Ok(state)
    }

    /// Replaces the state on stable storage: after a crash it is the old one or the new one.
    pub fn store(&mut self, dir: &Path) -> Result<(), StateError> {
        self.format = FORMAT;
        let path = dir.join("machine.json");
        let write = || replace_file(&path, &serde_json::to_vec_pretty(self)?);
        write().map_err(|source| StateError::Io { path: path.clone(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::{Consistency, MachineState, StateError, StateFile};

    /// A point's write may still be under way, or wait for its thread, when a failover's is done.
    #[test]
    fn a_version_that_comes_late_does_not_replace_a_newer_one() {
        let dir = tempfile::tempdir().unwrap();
        let file = StateFile::new(dir.path());
        let state = |generation| MachineState { generation, ..MachineState::default() };
        for (version, generation, found) in [(2, 7, 7), (1, 5, 7), (3, 8, 8)] {
            file.store(version, &state(generation)).unwrap();
            assert_eq!(MachineState::load(dir.path()).unwrap().generation, found);
        }
    }

    #[test]
    fn comes_back_and_a_newer_format_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(MachineState::load(dir.path()).unwrap(), MachineState::default());
        let mut state =
            MachineState { consistency: Consistency::Syncing, ..MachineState::default() };
        state.store(dir.path()).unwrap();
        assert_eq!(MachineState::load(dir.path()).unwrap(), state);
        let newer = serde_json::to_string(&state).unwrap().replace("\"format\":1", "\"format\":2");
        std::fs::write(dir.path().join("machine.json"), newer).unwrap();
        assert!(matches!(MachineState::load(dir.path()), Err(StateError::Newer { found: 2, .. })));
    }
}
