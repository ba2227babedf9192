//! io_uring: all operations of a run are under way at once.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::thread::ThreadId;

use io_uring::{IoUring, opcode, squeue, types};

use crate::storage::os_file::{self, FileTable, Route};
use crate::storage::portable::run_op;
use crate::storage::{FileId, Op, OpenMode, Storage, StorageError};

/// Files through a ring of this process's own.
pub struct UringStorage {
    files: FileTable,
    ring: IoUring,
    /// The only thread that may use `ring`; another one gets a ring of its own.
    owner: ThreadId,
    setup: Setup,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Setup {
    SingleIssuer,
    Plain,
}

/// A part of an operation that is one submission.
#[derive(Debug, Clone, Copy)]
struct Piece {
    /// Index of the operation.
    op: usize,
    /// Bytes of the operation before this piece.
    done_bytes: usize,
    /// Bytes of this piece.
    len_bytes: usize,
}

impl UringStorage {
    /// Sets up a ring; fails where the kernel, a container or a sysctl forbids it.
    pub fn new() -> io::Result<Self> {
        let (ring, setup) = match build(Setup::SingleIssuer) {
            Ok(ring) => (ring, Setup::SingleIssuer),
            Err(_) => (build(Setup::Plain)?, Setup::Plain),
        };
        let owner = std::thread::current().id();
        Ok(Self { files: FileTable::default(), ring, owner, setup })
    }

    /// What the kernel granted, for the log.
    pub fn describe(&self) -> &'static str {
        match self.setup {
            Setup::SingleIssuer => "single issuer, deferred task work",
            Setup::Plain => "plain ring of an older kernel",
        }
    }

    /// A ring belongs to the thread that made it; no operation is under way between runs, so
    /// changing it here is safe.
    fn adopt_thread(&mut self) -> io::Result<()> {
        let here = std::thread::current().id();
        if self.owner != here {
            self.ring = build(self.setup)?;
            self.owner = here;
        }
        Ok(())
    }

    /// Runs the operations of one route. Returns with nothing under way.
    fn run_phase(&mut self, ops: &mut [Op<'_>], route: Route) -> Result<(), StorageError> {
        let mut waiting = VecDeque::new();
        for (index, op) in ops.iter().enumerate() {
            if self.files.route(op) == route {
                split(index, op, &mut waiting);
            }
        }
        match waiting.len() {
            0 => return Ok(()),
            // One system call is cheaper than a trip through the ring and its workers.
            1 => return run_op(&self.files, &mut ops[waiting[0].op]),
            _ => {}
        }
        let mut flight = Flight::new(waiting);
        loop {
            while let Some((slot, piece)) = flight.next() {
                let entry =
                    entry(&self.files, route, &mut ops[piece.op], piece).user_data(slot as u64);
                // SAFETY: the entry points into buffers borrowed by `ops`, which outlive this
                // call, and this call does not return while anything is in flight.
                let pushed = unsafe { self.ring.submission().push(&entry) };
                if pushed.is_err() {
                    flight.put_back(slot);
                    break;
                }
            }
            if flight.in_flight == 0 {
                break;
            }
            self.wait();
            for done in self.ring.completion() {
                let piece = flight.take(done.user_data() as usize);
                complete(&self.files, &ops[piece.op], piece, done.result(), &mut flight);
            }
        }
        for op in std::mem::take(&mut flight.unsupported) {
            run_op(&self.files, &mut ops[op])?;
        }
        flight.failed.map_or(Ok(()), Err)
    }

    /// Submits what is queued and waits for a completion.
    fn wait(&mut self) {
        loop {
            match self.ring.submit_and_wait(1) {
                Ok(_) => return,
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
                // The kernel is short of memory or of completion slots: reap, then try again.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => return,
                Err(e) => {
                    // The kernel owns buffers of operations that can neither be waited for nor
                    // taken back, so neither returning nor unwinding is sound.
                    tracing::error!("io_uring broke with operations under way: {e}; aborting");
                    std::process::abort();
                }
            }
        }
    }
}

/// What is waiting and under way in one phase.
struct Flight {
    waiting: VecDeque<Piece>,
    slots: Vec<Option<Piece>>,
    free: Vec<usize>,
    in_flight: usize,
    failed: Option<StorageError>,
    /// Operations that this file system leaves to plain writes.
    unsupported: Vec<usize>,
}

impl Flight {
    fn new(waiting: VecDeque<Piece>) -> Self {
        let depth = QUEUE_DEPTH.min(waiting.len());
        Self {
            waiting,
            slots: vec![None; depth],
            free: (0..depth).collect(),
            in_flight: 0,
            failed: None,
            unsupported: Vec::new(),
        }
    }

    /// The next piece to submit; none after a failure.
    fn next(&mut self) -> Option<(usize, Piece)> {
        if self.failed.is_some() || self.waiting.is_empty() {
            return None;
        }
        let slot = self.free.pop()?;
        let piece = self.waiting.pop_front()?;
        self.slots[slot] = Some(piece);
        self.in_flight += 1;
        Some((slot, piece))
    }

    fn put_back(&mut self, slot: usize) {
        let piece = self.take(slot);
        self.waiting.push_front(piece);
    }

    fn take(&mut self, slot: usize) -> Piece {
        self.in_flight -= 1;
        self.free.push(slot);
        self.slots[slot].take().expect("the kernel completes a submission once")
    }
}

fn build(setup: Setup) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    if setup == Setup::SingleIssuer {
        builder.setup_single_issuer().setup_defer_taskrun();
    }
    builder.build(QUEUE_DEPTH as u32)
}

fn split(op: usize, what: &Op<'_>, pieces: &mut VecDeque<Piece>) {
    let total_bytes = match what {
        Op::Read { buf, .. } => buf.len(),
        Op::Write { buf, .. } => buf.len(),
        Op::Zero { .. } | Op::Sync { .. } => {
            pieces.push_back(Piece { op, done_bytes: 0, len_bytes: 0 });
            return;
        }
    };
    let mut done_bytes = 0;
    while done_bytes < total_bytes {
        let len_bytes = PIECE_BYTES.min(total_bytes - done_bytes);
        pieces.push_back(Piece { op, done_bytes, len_bytes });
        done_bytes += len_bytes;
    }
}

fn entry(files: &FileTable, route: Route, op: &mut Op<'_>, piece: Piece) -> squeue::Entry {
    let range = piece.done_bytes..piece.done_bytes + piece.len_bytes;
    match op {
        Op::Read { file, offset_bytes, buf } => {
            let fd = types::Fd(files.get(*file).fd(route).as_raw_fd());
            opcode::Read::new(fd, buf[range].as_mut_ptr(), piece.len_bytes as u32)
                .offset(*offset_bytes + piece.done_bytes as u64)
                .build()
        }
        Op::Write { file, offset_bytes, buf } => {
            let fd = types::Fd(files.get(*file).fd(route).as_raw_fd());
            opcode::Write::new(fd, buf[range].as_ptr(), piece.len_bytes as u32)
                .offset(*offset_bytes + piece.done_bytes as u64)
                .build()
        }
        Op::Zero { file, offset_bytes, len_bytes, may_unmap } => {
            let fd = types::Fd(files.get(*file).fd(route).as_raw_fd());
            opcode::Fallocate::new(fd, *len_bytes)
                .offset(*offset_bytes)
                .mode(os_file::zero_flags(*may_unmap).bits() as i32)
                .build()
        }
        Op::Sync { file } => {
            let fd = types::Fd(files.get(*file).fd(route).as_raw_fd());
            opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build()
        }
    }
}

/// Books one completion: done, to be continued, or failed.
fn complete(files: &FileTable, op: &Op<'_>, piece: Piece, result: i32, flight: &mut Flight) {
    let again = |flight: &mut Flight, piece| flight.waiting.push_front(piece);
    if result == -libc::EINTR || result == -libc::EAGAIN {
        return again(flight, piece);
    }
    let (file, action, offset_bytes) = match op {
        Op::Read { file, offset_bytes, .. } => (*file, "read", Some(*offset_bytes)),
        Op::Write { file, offset_bytes, .. } => (*file, "write", Some(*offset_bytes)),
        Op::Zero { file, offset_bytes, .. } => (*file, "zero a part of", Some(*offset_bytes)),
        Op::Sync { file } => (*file, "sync", None),
    };
    if result < 0 && matches!(op, Op::Zero { .. }) && os_file::is_unsupported(-result) {
        flight.unsupported.push(piece.op);
        return;
    }
    let offset_bytes = offset_bytes.map(|offset| offset + piece.done_bytes as u64);
    let source = match (op, result) {
        (_, ..0) => io::Error::from_raw_os_error(-result),
        (Op::Read { .. }, 0) => io::ErrorKind::UnexpectedEof.into(),
        (Op::Write { .. }, 0) => io::ErrorKind::WriteZero.into(),
        (_, n) if (n as usize) < piece.len_bytes => {
            let n = n as usize;
            let rest =
                Piece { done_bytes: piece.done_bytes + n, len_bytes: piece.len_bytes - n, ..piece };
            return again(flight, rest);
        }
        _ => return,
    };
    if flight.failed.is_none() {
        flight.failed = Some(files.get(file).error(action, offset_bytes, source));
    }
}

impl Storage for UringStorage {
    fn open(&mut self, path: &Path, mode: OpenMode) -> Result<FileId, StorageError> {
        self.files.open(path, mode)
    }

    fn close(&mut self, file: FileId) {
        self.files.close(file);
    }

    fn run(&mut self, ops: &mut [Op<'_>]) -> Result<(), StorageError> {
        self.adopt_thread().map_err(|source| StorageError {
            path: "io_uring".into(),
            action: "set up",
            offset_bytes: None,
            source,
        })?;
        self.run_phase(ops, Route::Direct)?;
        self.run_phase(ops, Route::Buffered)
    }

    fn len_bytes(&mut self, file: FileId) -> Result<u64, StorageError> {
        self.files.len_bytes(file)
    }

    fn preallocate(&mut self, file: FileId, len_bytes: u64) -> Result<(), StorageError> {
        self.files.preallocate(file, len_bytes)
    }

    fn rename(&mut self, from: &Path, to: &Path) -> Result<(), StorageError> {
        os_file::rename(from, to)
    }

    fn remove(&mut self, path: &Path) -> Result<(), StorageError> {
        os_file::remove(path)
    }

    fn list(&mut self, dir: &Path) -> Result<Vec<String>, StorageError> {
        os_file::list(dir)
    }

    fn create_dir(&mut self, dir: &Path) -> Result<(), StorageError> {
        os_file::create_dir(dir)
    }

    fn sync_dir(&mut self, dir: &Path) -> Result<(), StorageError> {
        os_file::sync_dir(dir)
    }
}

/// Most submissions under way: beyond this a disk only queues.
const QUEUE_DEPTH: usize = 64;

/// Largest submission. Small enough that one large write becomes several that run at once.
const PIECE_BYTES: usize = 512 << 10;
