//! A disk in memory that forgets what was not synced, fails when told to, and loses power at any
//! operation: for tests here and in every crate that builds on the store.
//!
//! The model is the one of `JOURNAL.md`: unsynced writes survive a crash in any subset of their
//! 512-byte sectors, old versions of a sector included; the operations of one run happen in any
//! order; of the directory changes since the last sync of a directory a prefix survives; after a
//! failed sync the cache counts as clean although nothing reached the disk.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::storage::{FileId, Op, OpenMode, Storage, StorageError};

/// The disk. Clones are handles to the same one; it outlives every [`SimStorage`] on it.
#[derive(Clone)]
pub struct SimDisk(Arc<Mutex<State>>);

/// The storage of one life of a process on a [`SimDisk`].
pub struct SimStorage {
    disk: SimDisk,
    open: Vec<Option<(u64, PathBuf)>>,
}

/// A generator of numbers that is the same on every machine for a seed (SplitMix64).
#[derive(Debug, Clone)]
pub struct SimRng(u64);

struct State {
    rng: SimRng,
    inodes: BTreeMap<u64, Inode>,
    next_inode: u64,
    names: BTreeMap<PathBuf, u64>,
    durable_names: BTreeMap<PathBuf, u64>,
    name_changes: Vec<NameChange>,
    steps: u64,
    crash_at: Option<u64>,
    faults: BTreeMap<u64, i32>,
    capacity_bytes: u64,
    dead: bool,
}

#[derive(Default)]
struct Inode {
    bytes: Vec<u8>,
    durable: Vec<u8>,
    unsynced: Vec<(usize, [u8; SECTOR_BYTES])>,
}

enum NameChange {
    Set(PathBuf, u64),
    Remove(PathBuf),
    Rename(PathBuf, PathBuf),
}

impl SimRng {
    /// The generator of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.draw() % bound
    }
}

impl SimDisk {
    /// An empty disk. `seed` decides the order of operations within a run.
    pub fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(State {
            rng: SimRng::new(seed),
            inodes: BTreeMap::new(),
            next_inode: 1,
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            name_changes: Vec::new(),
            steps: 0,
            crash_at: None,
            faults: BTreeMap::new(),
            capacity_bytes: u64::MAX,
            dead: false,
        })))
    }

    /// A storage on this disk.
    pub fn storage(&self) -> SimStorage {
        SimStorage { disk: self.clone(), open: Vec::new() }
    }

    /// Operations since the disk was made. Every operation of a run and every change of a name is
    /// one step.
    pub fn steps(&self) -> u64 {
        self.state().steps
    }

    /// Power fails at this step: it and all later ones fail until [`SimDisk::crash`].
    pub fn crash_at(&self, step: u64) {
        self.state().crash_at = Some(step);
    }

    /// The operation at this step fails with this error number and has no effect, except that a
    /// failing sync also makes the unsynced writes count as clean.
    pub fn fail_at(&self, step: u64, errno: i32) {
        self.state().faults.insert(step, errno);
    }

    /// Sum of file sizes beyond which preallocation fails with "no space".
    pub fn set_capacity_bytes(&self, capacity_bytes: u64) {
        self.state().capacity_bytes = capacity_bytes;
    }

    /// Power comes back: `seed` decides what of the unsynced state survived.
    pub fn crash(&self, seed: u64) {
        let mut state = self.state();
        let mut rng = SimRng::new(seed);
        let survivors = rng.below(state.name_changes.len() as u64 + 1) as usize;
        let changes = std::mem::take(&mut state.name_changes);
        for change in changes.into_iter().take(survivors) {
            change.apply(&mut state.durable_names);
        }
        state.names = state.durable_names.clone();
        for inode in state.inodes.values_mut() {
            inode.crash(&mut rng);
        }
        state.dead = false;
        state.crash_at = None;
        state.faults.clear();
    }

    /// Only the process died: what it wrote is still in the cache, and no more durable than before.
    pub fn restart(&self) {
        let mut state = self.state();
        state.dead = false;
        state.crash_at = None;
        state.faults.clear();
    }

    /// A file's content as a reader sees it now.
    pub fn read_file(&self, path: impl AsRef<Path>) -> Option<Vec<u8>> {
        let state = self.state();
        state.names.get(path.as_ref()).map(|inode| state.inodes[inode].bytes.clone())
    }

    /// Puts a durable file in place.
    pub fn write_file(&self, path: impl AsRef<Path>, bytes: &[u8]) {
        let mut state = self.state();
        let inode = state.next_inode;
        state.next_inode += 1;
        let content =
            Inode { bytes: bytes.to_vec(), durable: bytes.to_vec(), unsynced: Vec::new() };
        state.inodes.insert(inode, content);
        state.names.insert(path.as_ref().to_owned(), inode);
        state.durable_names.insert(path.as_ref().to_owned(), inode);
    }

    /// Removes a file, durably.
    pub fn remove_file(&self, path: impl AsRef<Path>) {
        let mut state = self.state();
        state.names.remove(path.as_ref());
        state.durable_names.remove(path.as_ref());
    }

    /// All file names.
    pub fn files(&self) -> Vec<PathBuf> {
        self.state().names.keys().cloned().collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inode {
    fn write(&mut self, at: usize, bytes: &[u8]) {
        let end = at + bytes.len();
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes[at..end].copy_from_slice(bytes);
        for sector in at / SECTOR_BYTES..end.div_ceil(SECTOR_BYTES) {
            let start = sector * SECTOR_BYTES;
            let stop = self.bytes.len().min(start + SECTOR_BYTES);
            let mut content = [0; SECTOR_BYTES];
            content[..stop - start].copy_from_slice(&self.bytes[start..stop]);
            self.unsynced.push((sector, content));
        }
    }

    fn crash(&mut self, rng: &mut SimRng) {
        let mut survived = std::mem::take(&mut self.durable);
        if survived.len() != self.bytes.len() && rng.below(2) == 0 {
            survived.resize(self.bytes.len(), 0);
        }
        // One crash keeps most, another one little: uniform coins would always keep half.
        let keep = rng.below(5);
        for (sector, content) in self.unsynced.drain(..) {
            let start = sector * SECTOR_BYTES;
            if rng.below(4) < keep && start < survived.len() {
                let stop = survived.len().min(start + SECTOR_BYTES);
                survived[start..stop].copy_from_slice(&content[..stop - start]);
            }
        }
        self.durable = survived.clone();
        self.bytes = survived;
    }
}

impl NameChange {
    fn apply(self, names: &mut BTreeMap<PathBuf, u64>) {
        match self {
            Self::Set(path, inode) => {
                names.insert(path, inode);
            }
            Self::Remove(path) => {
                names.remove(&path);
            }
            Self::Rename(from, to) => {
                if let Some(inode) = names.remove(&from) {
                    names.insert(to, inode);
                }
            }
        }
    }
}

impl State {
    /// Counts a step; fails if power is gone or a fault is due.
    fn step(&mut self) -> io::Result<()> {
        self.steps += 1;
        self.dead |= self.crash_at.is_some_and(|at| self.steps >= at);
        if self.dead {
            return Err(io::Error::other("the simulated machine lost power"));
        }
        match self.faults.remove(&self.steps) {
            Some(errno) => Err(io::Error::from_raw_os_error(errno)),
            None => Ok(()),
        }
    }

    fn run(&mut self, inode: u64, op: &mut Op<'_>) -> io::Result<()> {
        let step = self.step();
        let Some(inode) = self.inodes.get_mut(&inode) else {
            return Err(io::ErrorKind::NotFound.into());
        };
        if step.is_err() && matches!(op, Op::Sync { .. }) && !self.dead {
            inode.unsynced.clear();
        }
        step?;
        match op {
            Op::Read { offset_bytes, buf, .. } => {
                let at = *offset_bytes as usize;
                let found = inode.bytes.get(at..at + buf.len());
                buf.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
            }
            Op::Write { offset_bytes, buf, .. } => inode.write(*offset_bytes as usize, buf),
            Op::Zero { offset_bytes, len_bytes, .. } => {
                let at = (*offset_bytes as usize).min(inode.bytes.len());
                let end = (at + *len_bytes as usize).min(inode.bytes.len());
                inode.write(at, &vec![0; end - at]);
            }
            Op::Sync { .. } => {
                inode.unsynced.clear();
                inode.durable = inode.bytes.clone();
            }
        }
        Ok(())
    }

    fn change(&mut self, change: NameChange) {
        match &change {
            NameChange::Set(path, inode) => {
                self.names.insert(path.clone(), *inode);
            }
            NameChange::Remove(path) => {
                self.names.remove(path);
            }
            NameChange::Rename(from, to) => {
                if let Some(inode) = self.names.remove(from) {
                    self.names.insert(to.clone(), inode);
                }
            }
        }
        self.name_changes.push(change);
    }
}

impl SimStorage {
    fn file(&self, id: FileId) -> (u64, PathBuf) {
        self.open[id.0].clone().expect("a FileId is used while its file is open")
    }
}

fn failed(
    path: &Path,
    action: &'static str,
    offset_bytes: Option<u64>,
) -> impl FnOnce(io::Error) -> StorageError {
    let path = path.to_owned();
    move |source| StorageError { path, action, offset_bytes, source }
}

impl Storage for SimStorage {
    fn open(&mut self, path: &Path, mode: OpenMode) -> Result<FileId, StorageError> {
        let mut state = self.disk.state();
        state.step().map_err(failed(path, "open", None))?;
        let inode = match (state.names.get(path), mode) {
            (Some(inode), OpenMode::Read | OpenMode::ReadWrite) => *inode,
            (None, OpenMode::CreateNew) => {
                let inode = state.next_inode;
                state.next_inode += 1;
                state.inodes.insert(inode, Inode::default());
                state.change(NameChange::Set(path.to_owned(), inode));
                inode
            }
            (Some(_), OpenMode::CreateNew) => {
                return Err(failed(path, "create", None)(io::ErrorKind::AlreadyExists.into()));
            }
            (None, _) => return Err(failed(path, "open", None)(io::ErrorKind::NotFound.into())),
        };
        drop(state);
        self.open.push(Some((inode, path.to_owned())));
        Ok(FileId(self.open.len() - 1))
    }

    fn close(&mut self, file: FileId) {
        self.open[file.0] = None;
    }

    fn run(&mut self, ops: &mut [Op<'_>]) -> Result<(), StorageError> {
        let mut left: Vec<usize> = (0..ops.len()).collect();
        let mut first_error = None;
        while !left.is_empty() {
            let mut state = self.disk.state();
            let pick = state.rng.below(left.len() as u64) as usize;
            let op = &mut ops[left.swap_remove(pick)];
            let (file, action, offset_bytes) = match op {
                Op::Read { file, offset_bytes, .. } => (*file, "read", Some(*offset_bytes)),
                Op::Write { file, offset_bytes, .. } => (*file, "write", Some(*offset_bytes)),
                Op::Zero { file, offset_bytes, .. } => (*file, "zero", Some(*offset_bytes)),
                Op::Sync { file } => (*file, "sync", None),
            };
            let (inode, path) = self.file(file);
            if let Err(source) = state.run(inode, op) {
                first_error.get_or_insert(failed(&path, action, offset_bytes)(source));
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    fn len_bytes(&mut self, file: FileId) -> Result<u64, StorageError> {
        let (inode, path) = self.file(file);
        let state = self.disk.state();
        let inode = state.inodes.get(&inode);
        inode
            .map(|i| i.bytes.len() as u64)
            .ok_or_else(|| failed(&path, "read the size of", None)(io::ErrorKind::NotFound.into()))
    }

    fn preallocate(&mut self, file: FileId, len_bytes: u64) -> Result<(), StorageError> {
        let (inode, path) = self.file(file);
        let mut state = self.disk.state();
        state.step().map_err(failed(&path, "reserve space for", None))?;
        let used_bytes: usize = state.names.values().map(|i| state.inodes[i].bytes.len()).sum();
        if used_bytes as u64 + len_bytes > state.capacity_bytes {
            let full = io::Error::from_raw_os_error(libc::ENOSPC);
            return Err(failed(&path, "reserve space for", None)(full));
        }
        if let Some(inode) = state.inodes.get_mut(&inode)
            && inode.bytes.len() < len_bytes as usize
        {
            inode.bytes.resize(len_bytes as usize, 0);
        }
        Ok(())
    }

    fn rename(&mut self, from: &Path, to: &Path) -> Result<(), StorageError> {
        let mut state = self.disk.state();
        state.step().map_err(failed(from, "rename", None))?;
        if !state.names.contains_key(from) {
            return Err(failed(from, "rename", None)(io::ErrorKind::NotFound.into()));
        }
        state.change(NameChange::Rename(from.to_owned(), to.to_owned()));
        Ok(())
    }

    fn remove(&mut self, path: &Path) -> Result<(), StorageError> {
        let mut state = self.disk.state();
        state.step().map_err(failed(path, "remove", None))?;
        if !state.names.contains_key(path) {
            return Err(failed(path, "remove", None)(io::ErrorKind::NotFound.into()));
        }
        state.change(NameChange::Remove(path.to_owned()));
        Ok(())
    }

    fn list(&mut self, dir: &Path) -> Result<Vec<String>, StorageError> {
        let state = self.disk.state();
        let inside = state.names.keys().filter(|path| path.parent() == Some(dir));
        Ok(inside.filter_map(|path| path.file_name()?.to_str().map(str::to_owned)).collect())
    }

    fn create_dir(&mut self, _dir: &Path) -> Result<(), StorageError> {
        Ok(())
    }

    fn sync_dir(&mut self, dir: &Path) -> Result<(), StorageError> {
        let mut state = self.disk.state();
        state.step().map_err(failed(dir, "sync the directory", None))?;
        state.name_changes.clear();
        state.durable_names = state.names.clone();
        Ok(())
    }
}

const SECTOR_BYTES: usize = 512;
