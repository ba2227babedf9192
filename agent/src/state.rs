//! What the agent remembers of a machine: whether it is fenced, and whether protection has ended.

use std::path::{Path, PathBuf};
use std::{fs, io};

use backhaul_daemon::folder::replace_file;
use backhaul_proto::id::MachineName;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The stage of a machine's protection, as far as the agent must know it without the target.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protection {
    /// Writes are taken and replicated.
    #[default]
    Active,
    /// Failed over: writes are refused until a cancel, even after a restart.
    Fenced,
    /// Committed: the machine is not protected any more.
    Ended,
}

/// The durable state of one machine, `MACHINE.json` in the state folder.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineState {
    /// The stage.
    pub protection: Protection,
}

/// Why the state could not be read or written.
#[derive(Debug, Error)]
pub enum StateError {
    /// The file cannot be read or written.
    #[error("the agent's state file {path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is damaged.
    #[error(
        "the agent's state file {path} cannot be understood ({source}); move it away to protect the machine anew", path = path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
}

impl MachineState {
    fn path(dir: &Path, machine: &MachineName) -> PathBuf {
        dir.join(format!("{machine}.json"))
    }

    /// Reads the state of `machine`; that of one never seen is the default.
    pub fn load(dir: &Path, machine: &MachineName) -> Result<Self, StateError> {
        let path = Self::path(dir, machine);
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|source| StateError::Damaged { path, source }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(source) => Err(StateError::Io { path, source }),
        }
    }

    /// Replaces the state on stable storage: after a crash it is the old one or the new one.
    pub fn store(&self, dir: &Path, machine: &MachineName) -> Result<(), StateError> {
        let path = Self::path(dir, machine);
        let write = || replace_file(&path, &serde_json::to_vec_pretty(self)?);
        write().map_err(|source| StateError::Io { path: path.clone(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::{MachineState, Protection, StateError};

    #[test]
    fn comes_back_and_damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let machine = "web01".parse().unwrap();
        assert_eq!(MachineState::load(dir.path(), &machine).unwrap(), MachineState::default());
        let state = MachineState { protection: Protection::Fenced };
        state.store(dir.path(), &machine).unwrap();
        assert_eq!(MachineState::load(dir.path(), &machine).unwrap(), state);
        std::fs::write(dir.path().join("web01.json"), "{").unwrap();
        let error = MachineState::load(dir.path(), &machine).unwrap_err();
        assert!(matches!(error, StateError::Damaged { .. }));
    }
}
