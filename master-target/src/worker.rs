//! The thread that owns a machine's [`MachineStore`]: everything that waits for a disk waits here.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use backhaul_proto::batch::RecordKind;
use backhaul_proto::id::{BatchSeq, Generation, MachineName};

use crate::batch_buffer::IncomingBatch;
use crate::store::{MachineStore, StoreError, Usage};

/// Bytes of batches that are made durable together: enough to amortise a sync, and less than the
/// window, so that the next group arrives meanwhile.
const GROUP_BYTES_MAX: usize = 24 << 20;
/// What is applied before commands are looked at again.
const APPLY_STEP_BYTES: u64 = 16 << 20;
/// A checkpoint is written after this much was applied, which bounds what a restart reads.
const CHECKPOINT_BYTES: u64 = 256 << 20;
/// A checkpoint is also written when nothing happened for this long.
const IDLE: Duration = Duration::from_secs(2);
/// How often a full disk is tried again.
const RETRY_FULL: Duration = Duration::from_secs(1);

/// What the owner loop asks for. Bounded by the session window: nothing else sends batches.
pub enum Command {
    /// The next batch of the order.
    Append(IncomingBatch),
    /// Apply up to here and no further; `None` for everything that is durable.
    Hold(Option<BatchSeq>),
    /// The machine's state knows of every marker up to this batch of a generation.
    Noted(Generation, BatchSeq),
    /// The machine's state says durably that the point at this batch of a generation was given up.
    Release(Generation, BatchSeq),
    /// A new generation begins.
    Begin(Generation),
    /// Bring the disks to the end of a batch of a generation, or of the journal, and make them
    /// durable; then hold.
    Prepare {
        /// Of which failover: comes back with the answer.
        failover: u64,
        /// Where to; `None` for the end of the journal.
        through: Option<(Generation, BatchSeq)>,
    },
    /// Make everything durable and end.
    Close,
}

/// What the worker tells the owner loop.
#[derive(Debug)]
pub enum Report {
    /// Every batch up to here is on stable storage.
    Durable {
        /// Their generation: reports of an older one may still be on their way when a new begins.
        generation: Generation,
        /// The last one.
        batch: BatchSeq,
        /// Memory of the batches that became durable with it.
        bytes: u64,
    },
    /// Every batch of this generation up to here is on the disks.
    Applied(Generation, BatchSeq),
    /// The generation began, after everything of the one before was applied.
    Begun(Generation),
    /// For this failover the disks are durable at the end of this batch, or why not.
    Prepared(u64, Result<BatchSeq, String>),
    /// The journal is over its bound because of the hold at this point of a generation. Said again with each
    /// group that is appended and while the disk is full, until [`Command::Release`].
    OverBound(Generation, BatchSeq),
    /// Sizes, now and then.
    Usage(Usage),
    /// A person is needed; replication of the machine stands still, or (when empty) goes on again.
    Trouble(String),
    /// The store failed and takes nothing more until it is opened again.
    Failed(String),
}

/// A running worker.
#[derive(Debug)]
pub struct Worker {
    commands: Sender<Command>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Worker {
    /// Starts the worker of a machine.
    pub fn start(
        machine: &MachineName,
        store: MachineStore,
        generation: Generation,
        hold: Option<BatchSeq>,
        journal_bytes_max: u64,
        report: impl Fn(Report) + Send + 'static,
    ) -> std::io::Result<Self> {
        let (commands, inbox) = channel();
        let name: String = format!("disk-{machine}").chars().take(15).collect();
        let running = Running {
            store,
            generation,
            inbox,
            later: VecDeque::new(),
            hold,
            newest_point: None,
            newest_sync_marker: None,
            noted: None,
            journal_bytes_max,
            report: Box::new(report),
            applied_since_checkpoint: 0,
            dirty: false,
            last_usage: None,
        };
        let thread = thread::Builder::new().name(name).spawn(move || running.run())?;
        Ok(Self { commands, thread: Some(thread) })
    }

    /// Sends a command. One to a worker that failed is dropped: its machine was told so.
    pub fn send(&self, command: Command) {
        let _ = self.commands.send(command);
    }

    /// Makes everything durable and waits for the thread to end.
    pub fn close(mut self) {
        self.send(Command::Close);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Running {
    store: MachineStore,
    generation: Generation,
    inbox: Receiver<Command>,
    /// Commands that were taken out of the queue before their turn. Bounded as the queue is.
    later: VecDeque<Command>,
    hold: Option<BatchSeq>,
    /// The newest batches since the start with a point in them, and with the start or the end of a sync.
    newest_point: Option<BatchSeq>,
    newest_sync_marker: Option<BatchSeq>,
    /// The machine's state is known to have the markers up to here.
    noted: Option<BatchSeq>,
    journal_bytes_max: u64,
    report: Box<dyn Fn(Report) + Send>,
    applied_since_checkpoint: u64,
    /// Something was appended or applied since the last checkpoint.
    dirty: bool,
    last_usage: Option<Instant>,
}

impl Running {
    fn run(mut self) {
        loop {
            let command = match self.later.pop_front() {
                Some(command) => Ok(command),
                None if self.has_work() => {
                    self.inbox.try_recv().map_err(|_| RecvTimeoutError::Timeout)
                }
                None => self.inbox.recv_timeout(IDLE),
            };
            let result = match command {
                Ok(Command::Append(batch)) => {
                    let group = self.gather(batch);
                    self.append(group)
                }
                Ok(Command::Hold(hold)) => {
                    self.hold = hold;
                    Ok(())
                }
                Ok(Command::Release(generation, point)) => {
                    self.release(generation, point);
                    Ok(())
                }
                Ok(Command::Noted(generation, point)) => self.handle_noted(generation, point),
                Ok(Command::Begin(generation)) => self.begin(generation),
                Ok(Command::Prepare { failover, through }) => self.prepare(through).map(|result| {
                    (self.report)(Report::Prepared(failover, result));
                }),
                // As after a kill: the restart reads a little more, and finds the marker.
                Ok(Command::Close) | Err(RecvTimeoutError::Disconnected) if self.is_ahead() => {
                    return;
                }
                Ok(Command::Close) | Err(RecvTimeoutError::Disconnected) => {
                    if let Err(error) = self.store.close() {
                        tracing::error!(%error, "a store could not be closed in good order");
                    }
                    return;
                }
                Err(RecvTimeoutError::Timeout) if self.has_work() => self.apply(),
                Err(RecvTimeoutError::Timeout) => self.idle(),
            };
            if let Err(error) = result {
                (self.report)(Report::Failed(error.to_string()));
                return;
            }
            self.tell_usage();
        }
    }

    fn limit(&self) -> BatchSeq {
        self.hold.unwrap_or(BatchSeq(u64::MAX)).min(self.store.durable().durable)
    }

    fn has_work(&self) -> bool {
        self.store.applied().through < self.limit()
    }

    fn gather(&mut self, first: IncomingBatch) -> Vec<IncomingBatch> {
        let mut bytes = first.memory_bytes();
        let mut group = vec![first];
        while bytes < GROUP_BYTES_MAX {
            let next = self.later.pop_front().or_else(|| self.inbox.try_recv().ok());
            match next {
                Some(Command::Append(batch)) => {
                    bytes += batch.memory_bytes();
                    group.push(batch);
                }
                Some(other) => {
                    self.later.push_front(other);
                    break;
                }
                None => break,
            }
        }
        group
    }

    /// Runs `step` until it succeeds or fails for good; a full disk is waited for.
    fn with_space<T>(
        &mut self,
        mut step: impl FnMut(&mut MachineStore) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mut troubled = false;
        loop {
            match step(&mut self.store) {
                Err(error @ StoreError::Full { .. }) => {
                    if self.make_room()? {
                        continue;
                    }
                    self.tell_hold();
                    if !troubled {
                        (self.report)(Report::Trouble(error.to_string()));
                        troubled = true;
                    }
                    match self.inbox.recv_timeout(RETRY_FULL) {
                        // What is not durable was not acknowledged, so it may be left behind.
                        Ok(Command::Close) | Err(RecvTimeoutError::Disconnected) => {
                            return Err(error);
                        }
                        // These two make room.
                        Ok(Command::Release(generation, point)) => self.release(generation, point),
                        Ok(Command::Noted(generation, through)) => self.note(generation, through),
                        Ok(later) => self.later.push_back(later),
                        Err(RecvTimeoutError::Timeout) => {}
                    }
                }
                result => {
                    if troubled {
                        (self.report)(Report::Trouble(String::new()));
                    }
                    return result;
                }
            }
        }
    }

    /// Has segments recycled whose batches may be on the disks. Says whether there were any.
    fn make_room(&mut self) -> Result<bool, StoreError> {
        let before = self.store.usage().journal_bytes;
        let limit = self.limit();
        while self.store.applied().through < limit {
            let applied = match self.store.apply(limit, APPLY_STEP_BYTES) {
                // A sparse image needs room as well.
                Err(StoreError::Full { .. }) => break,
                applied => applied?,
            };
            self.applied_since_checkpoint += APPLY_STEP_BYTES;
            (self.report)(Report::Applied(self.generation, applied.through));
        }
        if self.applied_since_checkpoint > 0 && !self.is_ahead() {
            self.store.checkpoint()?;
            self.applied_since_checkpoint = 0;
        }
        Ok(self.store.usage().journal_bytes < before)
    }

    fn append(&mut self, mut group: Vec<IncomingBatch>) -> Result<(), StoreError> {
        let bytes = group.iter().map(|batch| batch.memory_bytes() as u64).sum();
        let point = newest(&group, |kind| matches!(kind, RecordKind::Point(_)));
        let sync_marker =
            newest(&group, |kind| matches!(kind, RecordKind::SyncStart | RecordKind::SyncDone));
        let appended = self.with_space(|store| store.append(&mut group))?;
        self.newest_point = point.or(self.newest_point);
        self.newest_sync_marker = sync_marker.or(self.newest_sync_marker);
        self.dirty = true;
        let (generation, batch) = (self.generation, appended.durable);
        (self.report)(Report::Durable { generation, batch, bytes });
        self.look_at_bound()?;
        // A sync batch is on the disks already, and others may wait for hearing so.
        (self.report)(Report::Applied(generation, self.store.applied().through));
        self.apply()
    }

    fn apply(&mut self) -> Result<(), StoreError> {
        let limit = self.limit();
        if self.store.applied().through >= limit {
            return Ok(());
        }
        let applied = self.with_space(|store| store.apply(limit, APPLY_STEP_BYTES))?;
        self.dirty = true;
        (self.report)(Report::Applied(self.generation, applied.through));
        self.applied_since_checkpoint += APPLY_STEP_BYTES;
        self.checkpoint_when_due()
    }

    /// Says that the hold keeps the journal over its bound, if it is the hold: not while there is something to apply
    /// up to it, nor while a checkpoint would do.
    fn look_at_bound(&mut self) -> Result<(), StoreError> {
        let reached = self.hold.is_some_and(|point| self.store.applied().through >= point);
        let over = self.store.usage().journal_bytes > self.journal_bytes_max;
        if reached && over && self.applied_since_checkpoint > 0 {
            self.checkpoint()?;
        }
        self.tell_hold();
        Ok(())
    }

    /// Nor while the state lacks a marker: what names the point as given up is the same write.
    fn tell_hold(&self) {
        let over = self.store.usage().journal_bytes > self.journal_bytes_max;
        if let Some(point) = self.hold
            && over
            && self.store.applied().through >= point
            && !self.is_ahead()
        {
            (self.report)(Report::OverBound(self.generation, point));
        }
    }

    /// A hold at a newer point stays.
    fn release(&mut self, generation: Generation, point: BatchSeq) {
        if generation == self.generation {
            self.hold.take_if(|held| *held <= point);
        }
    }

    fn handle_noted(
        &mut self,
        generation: Generation,
        through: BatchSeq,
    ) -> Result<(), StoreError> {
        self.note(generation, through);
        self.checkpoint_when_due()
    }

    fn note(&mut self, generation: Generation, through: BatchSeq) {
        // It may be of the generation before.
        if generation == self.generation {
            self.noted = self.noted.max(Some(through));
        }
    }

    /// Whether a checkpoint here would forget a marker that only the journal knows of as yet. A point that the
    /// disks have gone past is to be forgotten.
    fn is_ahead(&self) -> bool {
        let applied = self.store.applied().through;
        let at_point = self.newest_point.filter(|point| *point == applied);
        let synced = self.newest_sync_marker.filter(|marker| *marker <= applied);
        at_point.max(synced) > self.noted
    }

    fn checkpoint_when_due(&mut self) -> Result<(), StoreError> {
        if self.applied_since_checkpoint < CHECKPOINT_BYTES {
            return Ok(());
        }
        self.checkpoint()
    }

    /// Writes a checkpoint, unless it would forget a marker: a restart finds those behind the checkpoint.
    fn checkpoint(&mut self) -> Result<(), StoreError> {
        if self.is_ahead() {
            return Ok(());
        }
        self.with_space(MachineStore::checkpoint)?;
        self.applied_since_checkpoint = 0;
        self.dirty = false;
        Ok(())
    }

    fn idle(&mut self) -> Result<(), StoreError> {
        if self.dirty {
            self.checkpoint()?;
        }
        match self.store.prepare() {
            // A spare segment is a comfort; without room for it the machine still runs.
            Err(StoreError::Full { .. }) => Ok(()),
            other => other,
        }
    }

    fn begin(&mut self, generation: Generation) -> Result<(), StoreError> {
        (self.hold, self.noted) = (None, None);
        (self.newest_point, self.newest_sync_marker) = (None, None);
        self.with_space(|store| store.begin_generation(generation))?;
        self.generation = generation;
        self.dirty = false;
        (self.report)(Report::Begun(generation));
        Ok(())
    }

    fn prepare(
        &mut self,
        goal: Option<(Generation, BatchSeq)>,
    ) -> Result<Result<BatchSeq, String>, StoreError> {
        let durable = self.store.durable().durable;
        let (generation, through) = goal.unwrap_or((self.generation, durable));
        if generation != self.generation || through > durable {
            let sentence = format!(
                "the point is not in the journal any more: it is batch {through} of generation {generation}, the journal has generation {} up to batch {durable}",
                self.generation
            );
            return Ok(Err(sentence));
        }
        if self.store.applied().through > through {
            let sentence =
                "the disks have gone past that point already; fail over to another one, or to the newest state".into();
            return Ok(Err(sentence));
        }
        // The failover's goal was made durable before it was asked for.
        self.hold = Some(through);
        self.noted = self.noted.max(self.hold);
        while self.store.applied().through < through {
            let applied = self.with_space(|store| store.apply(through, APPLY_STEP_BYTES))?;
            (self.report)(Report::Applied(generation, applied.through));
        }
        self.checkpoint()?;
        Ok(Ok(through))
    }

    fn tell_usage(&mut self) {
        let due = self.last_usage.is_none_or(|at| at.elapsed() >= Duration::from_millis(500));
        if due {
            self.last_usage = Some(Instant::now());
            (self.report)(Report::Usage(self.store.usage()));
        }
    }
}

/// The newest batch of a group with such a record.
fn newest(group: &[IncomingBatch], wanted: impl Fn(&RecordKind) -> bool) -> Option<BatchSeq> {
    let has = |batch: &&IncomingBatch| batch.records().iter().any(|record| wanted(&record.kind));
    group.iter().rev().find(has).map(|batch| batch.header().batch)
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::fs::File;
    use std::path::Path;
    use std::sync::mpsc::channel;

    use backhaul_proto::batch::{BatchKind, Compression, Record, RecordKind};
    use backhaul_proto::id::{BatchSeq, DiskIndex, Generation, PointId};

    use super::{APPLY_STEP_BYTES, CHECKPOINT_BYTES, Report, Running};
    use crate::batch_buffer::IncomingBatch;
    use crate::batch_buffer::tests::{Write, plain, receive};
    use crate::storage::open_best;
    use crate::store::{ImageFile, MachineStore, Recovered, StoreOptions};

    const GENERATION: Generation = Generation(1);

    fn open(dir: &Path) -> (MachineStore, Recovered) {
        let path = dir.join("disk.img");
        File::options().create(true).append(true).open(&path).unwrap().set_len(64 << 10).unwrap();
        let image = ImageFile { path, base_offset_bytes: 0, size_bytes: 64 << 10 };
        let (name, options) = ("web01".parse().unwrap(), StoreOptions::default());
        MachineStore::open(open_best(), &dir.join("journal"), &name, vec![image], options).unwrap()
    }

    /// What a restart finds of the points after the worker was killed here.
    fn found(dir: &Path) -> Vec<BatchSeq> {
        open(dir).1.marks.iter().map(|mark| mark.batch).collect()
    }

    fn running(dir: &Path) -> Running {
        let (mut store, _) = open(dir);
        store.begin_generation(GENERATION).unwrap();
        Running {
            store,
            generation: GENERATION,
            inbox: channel().1,
            later: VecDeque::new(),
            hold: None,
            newest_point: None,
            newest_sync_marker: None,
            noted: None,
            journal_bytes_max: u64::MAX,
            report: Box::new(|_| {}),
            applied_since_checkpoint: 0,
            dirty: false,
            last_usage: None,
        }
    }

    /// A batch that ends with a point.
    fn point(batch: u64) -> IncomingBatch {
        ends_with(RecordKind::Point(PointId(batch)), batch)
    }

    fn ends_with(kind: RecordKind, batch: u64) -> IncomingBatch {
        let data = Write::Data { disk: 0, offset_bytes: 0, content: vec![batch as u8; 4096] };
        let marker = Write::Other(Record { disk: DiskIndex(0), kind });
        let plain = plain(BatchKind::Ordered, 1, batch, 2 * batch - 1, &[data, marker]);
        receive(plain, Compression::Off)
    }

    /// The state is written beside the worker, so it may not name a point yet that the disks have reached.
    /// A checkpoint there and a crash, and the point that an operator was told of would be gone.
    #[test]
    fn a_checkpoint_waits_until_the_newest_point_is_noted() {
        let dir = tempfile::tempdir().unwrap();
        let mut running = running(dir.path());
        running.append(vec![point(1)]).unwrap();
        running.checkpoint().unwrap();
        assert_eq!(found(dir.path()), [BatchSeq(1)]);
        running.handle_noted(Generation(9), BatchSeq(1)).unwrap();
        running.checkpoint().unwrap();
        assert_eq!(found(dir.path()), [BatchSeq(1)], "that was another generation's");
        running.handle_noted(GENERATION, BatchSeq(1)).unwrap();
        running.checkpoint().unwrap();
        assert_eq!(found(dir.path()), []);
        running.hold = Some(BatchSeq(1));
        running.append(vec![point(2)]).unwrap();
        running.checkpoint().unwrap();
        assert_eq!(found(dir.path()), [BatchSeq(2)], "it is held before that one");
        running.hold = Some(BatchSeq(2));
        running.apply().unwrap();
        running.checkpoint().unwrap();
        assert_eq!(found(dir.path()), [BatchSeq(2)]);
    }

    /// The hold at a point comes after its batch. Where nothing was held, the step that applied the batch
    /// wrote the checkpoint that was due, and knew of no point.
    #[test]
    fn nor_is_a_checkpoint_written_that_falls_due_with_the_point() {
        let dir = tempfile::tempdir().unwrap();
        let mut running = running(dir.path());
        running.applied_since_checkpoint = CHECKPOINT_BYTES - APPLY_STEP_BYTES;
        running.append(vec![point(1)]).unwrap();
        assert_eq!(found(dir.path()), [BatchSeq(1)]);
        running.handle_noted(GENERATION, BatchSeq(1)).unwrap();
        assert_eq!(found(dir.path()), [], "it is made up for");
    }

    /// Only the newest marker was looked at, so the end of the sync was forgotten behind it.
    #[test]
    fn nor_does_it_forget_the_end_of_a_sync_before_a_newer_point() {
        let dir = tempfile::tempdir().unwrap();
        let mut running = running(dir.path());
        running.append(vec![ends_with(RecordKind::SyncDone, 1)]).unwrap();
        running.hold = Some(BatchSeq(1));
        running.append(vec![point(2)]).unwrap();
        running.checkpoint().unwrap();
        assert_eq!(found(dir.path()), [BatchSeq(1), BatchSeq(2)]);
    }

    /// The journal was over its bound and the disks went past a point that was not noted. Closed without a
    /// checkpoint, the restart found it, and would have listed what no disk could be brought to.
    #[test]
    fn a_point_that_the_disks_have_gone_past_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let mut running = running(dir.path());
        running.append(vec![point(1)]).unwrap();
        let zero = RecordKind::Zero { offset_bytes: 8192, len_bytes: 4096, may_unmap: false };
        running.append(vec![ends_with(zero, 2)]).unwrap();
        running.run();
        assert_eq!(found(dir.path()), []);
    }

    /// The hold was let go at once, and a target that was killed before its state said so listed a point that
    /// its disks were past.
    #[test]
    fn beyond_its_bound_the_journal_waits_until_the_point_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let mut running = running(dir.path());
        running.journal_bytes_max = 0;
        running.append(vec![point(1)]).unwrap();
        running.hold = Some(BatchSeq(1));
        running.append(vec![point(2)]).unwrap();
        running.release(Generation(9), BatchSeq(1));
        running.apply().unwrap();
        assert_eq!(running.store.applied().through, BatchSeq(1));
        running.release(GENERATION, BatchSeq(1));
        running.apply().unwrap();
        assert_eq!(running.store.applied().through, BatchSeq(2));
        running.hold = Some(BatchSeq(2));
        running.release(GENERATION, BatchSeq(1));
        assert_eq!(running.hold, Some(BatchSeq(2)), "a newer point came meanwhile");
    }

    /// A point was given up for a journal that would have shrunk without that: its disks were behind it still.
    #[test]
    fn only_a_hold_that_stands_in_the_way_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let mut running = running(dir.path());
        let (sender, reports) = channel();
        running.report = Box::new(move |report| sender.send(report).unwrap());
        let told = || reports.try_iter().any(|report| matches!(report, Report::OverBound(..)));
        running.journal_bytes_max = 0;
        running.hold = Some(BatchSeq(2));
        running.append(vec![point(1)]).unwrap();
        assert!(!told(), "the disks may go on");
        running.append(vec![point(2)]).unwrap();
        running.append(vec![point(3)]).unwrap();
        assert!(told());
    }

    #[test]
    fn nor_when_the_target_stops() {
        for noted in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let mut running = running(dir.path());
            running.append(vec![point(1)]).unwrap();
            if noted {
                running.handle_noted(GENERATION, BatchSeq(1)).unwrap();
            }
            running.run();
            let expected: &[BatchSeq] = if noted { &[] } else { &[BatchSeq(1)] };
            assert_eq!(found(dir.path()), expected);
        }
    }
}
