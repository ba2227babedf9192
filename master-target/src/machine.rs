//! One machine as the owner loop holds it: its disks, its worker, its session.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use backhaul_disk_image::{
    CreateOptions, ErrorKind, FlatImage, ImageError, OpenOptions, create, open,
};
use backhaul_proto::batch::RecordKind;
use backhaul_proto::id::{BatchSeq, Generation, MachineIndex};
use backhaul_proto::message::{HashRequest, Progress};
use backhaul_proto::session::{Receiver, ReceiverConfig, Watermark};
use thiserror::Error;
use tokio::sync::OwnedSemaphorePermit;

use crate::batch_buffer::IncomingBatch;
use crate::config::MachineConfig;
use crate::failover::{Action, Facts, Failover, Goal};
use crate::hashing::ReadableDisk;
use crate::journal::{Mark, MarkKind};
use crate::machine_state::{Consistency, DiskState, MachineState, StateError, StateFile};
use crate::recovery_point::RecoveryPoint;
use crate::storage::open_best;
use crate::store::{ImageFile, MachineStore, Recovered, StoreError, StoreOptions, Usage};
use crate::worker::{Command, Report, Worker};

mod view;

pub use view::point_view;

/// Identifies a connection for as long as the process lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinkId(pub u64);

/// A machine.
pub struct Machine {
    /// Its configuration.
    pub config: MachineConfig,
    /// Its folder in the store.
    pub dir: PathBuf,
    /// The file there that its state is in.
    file: Arc<StateFile>,
    /// Versions of the state so far, and the newest one that is in the file.
    versions: (u64, u64),
    /// A version is being made durable beside the owner loop.
    saving: bool,
    /// What is made durable of it, in its newest version.
    pub state: MachineState,
    /// Between replication and commit.
    pub failover: Failover,
    /// What it decided and could not be carried out, because its state could not be made durable.
    pub unfinished: Vec<Action>,
    /// The last attempt to make its state durable failed, and `trouble` says so.
    pub persist_failed: bool,
    /// Its disks and journal, once they are open.
    pub open: Option<Open>,
    /// The connection that replicates it, and its index there.
    pub link: Option<(LinkId, MachineIndex)>,
    /// The generation that its agent said hello with.
    pub agent_generation: Generation,
    /// For the RPO.
    pub watermark: Watermark,
    /// What the agent last said.
    pub progress: Option<Progress>,
    /// Markers that are delivered and not durable yet.
    pub marks: VecDeque<Marker>,
    /// A point that was given up: once the file has this version, the worker may go past it.
    giving_up: Option<(u64, Generation, BatchSeq)>,
    /// Questions that wait for batches to be applied.
    pub questions: Vec<(LinkId, HashRequest, OwnedSemaphorePermit)>,
    /// What its worker or its disks complain of; empty when nothing.
    pub trouble: String,
    /// Why its agent may not replicate it; empty when it may.
    pub refusal: String,
    /// Bytes received as they travelled, and plain.
    pub received: (u64, u64),
    /// Bytes of batches that came as references.
    pub referenced_bytes: u64,
    /// Batches that came though they had been acknowledged.
    pub repeated_batches: u64,
    /// When the sync under way began, and how long the last one took.
    pub sync_times: (Option<Instant>, Option<Duration>),
}

/// A marker on its way to stable storage.
#[derive(Debug, Clone, Copy)]
pub struct Marker {
    /// The batch that ends with it.
    pub batch: BatchSeq,
    /// What it marks.
    pub kind: RecordKind,
    /// A point that becomes the newest one: the worker was told to hold there.
    pub counts: bool,
}

/// The end of a batch of a generation.
type Through = Option<(Generation, BatchSeq)>;

/// A version of a machine's state, to be made durable.
#[derive(Debug)]
pub struct Save {
    file: Arc<StateFile>,
    state: MachineState,
    version: u64,
    /// It knows of every marker up to here.
    through: Through,
}

/// How a [`Save`] went.
#[derive(Debug)]
pub struct Saved {
    version: u64,
    through: Through,
    /// What it says of the disk.
    pub result: Result<(), StateError>,
}

impl Save {
    /// Waits for the disk.
    pub fn run(self) -> Saved {
        let Self { file, state, version, through } = self;
        Saved { version, through, result: file.store(version, &state) }
    }
}

/// The open half of a machine.
pub struct Open {
    /// The thread that owns the store.
    pub worker: Worker,
    /// The session.
    pub receiver: Receiver<IncomingBatch>,
    /// Its disks, for hashing.
    pub disks: Vec<Arc<ReadableDisk>>,
    /// Its images, for their content ids and locks.
    pub images: Arc<Vec<FlatImage>>,
    /// Every batch up to here is on the disks.
    pub applied: BatchSeq,
    /// The worker has begun the generation of `receiver`: before, the disks still change by the one
    /// before, and nothing may be concluded from what they hold.
    pub begun: bool,
    /// Acknowledged data is gone: only a new generation helps.
    pub damaged: bool,
    /// Bytes delivered to the worker and not durable.
    pub pending_bytes: u64,
    /// The journal's sizes.
    pub usage: Option<Usage>,
}

/// Why a machine's disks cannot be used.
#[derive(Debug, Error)]
pub enum OpenError {
    /// An image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The journal.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The state file.
    #[error(transparent)]
    State(#[from] StateError),
    /// The datastore is not mounted, or the folder was never made.
    #[error(
        "folder {folder} for the image of disk {disk} does not exist; mount its datastore or make the folder, and it is tried again by itself", folder = folder.display()
    )]
    Folder {
        /// The disk.
        disk: String,
        /// The folder.
        folder: PathBuf,
    },
    /// An image has another size than its disk.
    #[error(
        "disk {disk} has {disk_bytes} bytes at the agent, but image {image} has {image_bytes}; enlarge the image, or name another one", image = image.display()
    )]
    Size {
        /// The disk.
        disk: String,
        /// Its size at the agent.
        disk_bytes: u64,
        /// The image.
        image: PathBuf,
        /// Its size.
        image_bytes: u64,
    },
    /// The worker's thread cannot be started.
    #[error("no thread can be started: {0}")]
    Thread(#[from] std::io::Error),
}

impl Machine {
    /// Reads what is durable of a machine.
    pub fn load(config: MachineConfig, store: &std::path::Path) -> Result<Self, StateError> {
        let dir = store.join(config.name.as_str());
        let state = MachineState::load(&dir)?;
        let failover =
            Failover::new(config.name.as_str(), state.stage.clone(), state.failure.clone());
        Ok(Self {
            file: Arc::new(StateFile::new(&dir)),
            versions: (0, 0),
            saving: false,
            dir,
            state,
            failover,
            unfinished: Vec::new(),
            persist_failed: false,
            open: None,
            link: None,
            agent_generation: Generation(0),
            watermark: Watermark::new(),
            progress: None,
            marks: VecDeque::new(),
            giving_up: None,
            questions: Vec::new(),
            trouble: String::new(),
            refusal: String::new(),
            received: (0, 0),
            referenced_bytes: 0,
            repeated_batches: 0,
            sync_times: (None, None),
            config,
        })
    }

    /// Makes the state durable.
    pub fn persist(&mut self) -> Result<(), StateError> {
        self.versions.0 += 1;
        let saved = self.newest().run();
        self.note_saved(&saved);
        saved.result
    }

    /// A new version of the state, to be made durable beside the owner loop, and [`Machine::handle_saved`] to be
    /// told how that went; `None` while an older one is on its way. What is new in it must be known otherwise
    /// until then.
    pub fn save(&mut self) -> Option<Save> {
        self.versions.0 += 1;
        self.next_save()
    }

    /// The newest version, if it is not in the file and nobody is about to write one.
    pub fn next_save(&mut self) -> Option<Save> {
        if self.saving || !self.is_unsaved() {
            return None;
        }
        self.saving = true;
        Some(self.newest())
    }

    /// A [`Save`] has ended. Returns what it says of the disk, unless a newer version has said more since.
    pub fn handle_saved(&mut self, saved: Saved) -> Option<Result<(), StateError>> {
        self.saving = false;
        self.note_saved(&saved);
        (saved.version == self.versions.0).then_some(saved.result)
    }

    /// Whether the file lacks something of the state.
    pub fn is_unsaved(&self) -> bool {
        self.versions.1 < self.versions.0
    }

    /// The disks go past every point that is listed or on its way, but for `kept`. Says whether there were any;
    /// the state is to be made durable first.
    pub fn give_up_points(&mut self, kept: Option<RecoveryPoint>) -> bool {
        let mut gone_us = match self.state.point.take_if(|point| Some(*point) != kept) {
            Some(point) => point.id_us,
            None => 0,
        };
        for marker in &mut self.marks {
            if let RecordKind::Point(id) = marker.kind
                && kept.is_none_or(|kept| kept.id() != id)
            {
                marker.counts = false;
                gone_us = gone_us.max(id.0);
            }
        }
        self.state.given_up_us = self.state.given_up_us.max(gone_us);
        gone_us > 0
    }

    fn newest(&mut self) -> Save {
        match self.failover.goal().copied() {
            Some(Goal::Point { point, .. }) => self.give_up_points(Some(point)),
            Some(Goal::JournalEnd { .. }) => self.give_up_points(None),
            None => false,
        };
        self.state.stage = self.failover.stage().clone();
        self.state.failure = self.failover.failure().to_owned();
        let through = |open: &Open| (open.receiver.generation(), open.receiver.durable());
        Save {
            file: Arc::clone(&self.file),
            state: self.state.clone(),
            version: self.versions.0,
            through: self.open.as_ref().map(through),
        }
    }

    /// The journal may forget the markers that are in the file now.
    fn note_saved(&mut self, saved: &Saved) {
        if saved.result.is_err() {
            return;
        }
        self.versions.1 = self.versions.1.max(saved.version);
        let known = self.giving_up.take_if(|(version, ..)| *version <= saved.version);
        let Some(open) = &self.open else { return };
        if let Some((generation, batch)) = saved.through {
            open.worker.send(Command::Noted(generation, batch));
        }
        if let Some((_, generation, point)) = known {
            open.worker.send(Command::Release(generation, point));
        }
    }

    /// The journal is over its bound while the disks are held at this point of a generation. Gives the point
    /// up, unless a failover goes there. The worker goes past it when the file says so: killed before, the
    /// target would list it over disks that are past it, and a failover to it would be a mixture.
    pub fn give_up(&mut self, generation: Generation, point: BatchSeq) -> Option<Save> {
        if self.giving_up.is_some() || !self.failover.may_give_up_point() {
            return None;
        }
        // A newer one may have come to the journal with what filled it, and is held by now.
        let gone =
            |held: &mut RecoveryPoint| held.generation == generation.0 && held.batch() <= point;
        if let Some(gone) = self.state.point.take_if(gone) {
            self.state.given_up_us = self.state.given_up_us.max(gone.id_us);
            tracing::warn!(machine = %self.config.name, "the journal is full: the newest point is given up, the disks go past it");
        }
        self.giving_up = Some((self.versions.0 + 1, generation, point));
        self.save()
    }

    /// Opens the disks that [`MachineState::disks`] names, making images that are missing, recovers
    /// the journal and starts the worker.
    pub fn open(
        &mut self,
        window_bytes: u64,
        journal_bytes_max: u64,
        report: impl Fn(Report) + Send + 'static,
    ) -> Result<(), OpenError> {
        if self.open.is_some() {
            return Ok(());
        }
        let mut images = Vec::new();
        for disk in &self.state.disks {
            images.push(self.open_image(disk)?);
        }
        let files = images.iter().map(|image| ImageFile {
            path: image.extent_path().to_owned(),
            base_offset_bytes: image.base_offset_bytes(),
            size_bytes: image.size_bytes(),
        });
        let journal = self.dir.join("journal");
        let (store, recovered) = MachineStore::open(
            open_best(),
            &journal,
            &self.config.name,
            files.collect(),
            StoreOptions { cache_bytes_max: 8 << 20, ..StoreOptions::default() },
        )?;
        // What was on its way to the worker before this one is in the journal, or comes again.
        self.marks.clear();
        self.handle_recovered(&recovered)?;
        let hold = self.hold();
        let generation = recovered.generation.unwrap_or_default();
        let worker =
            Worker::start(&self.config.name, store, generation, hold, journal_bytes_max, report)?;
        let config = ReceiverConfig { window_bytes, ..ReceiverConfig::default() };
        let (durable, write) = (recovered.durable, recovered.durable_write);
        let disks = images.iter().map(|image| {
            Ok(Arc::new(ReadableDisk {
                file: image.file().try_clone()?,
                path: image.extent_path().to_owned(),
                base_offset_bytes: image.base_offset_bytes(),
                size_bytes: image.size_bytes(),
            }))
        });
        self.open = Some(Open {
            worker,
            receiver: Receiver::new(config, generation, durable, write),
            disks: disks.collect::<std::io::Result<_>>()?,
            images: Arc::new(images),
            applied: recovered.applied,
            begun: true,
            damaged: recovered.damage.is_some(),
            pending_bytes: 0,
            usage: None,
        });
        Ok(())
    }

    fn open_image(&self, disk: &DiskState) -> Result<FlatImage, OpenError> {
        let config = self.config.disks.iter().find(|config| config.name.as_str() == disk.name);
        let Some(config) = config else {
            let path = self.dir.join("machine.json");
            let sentence = format!("disk `{}` is not in the configuration any more", disk.name);
            return Err(ImageError::new(ErrorKind::Invalid, &path, sentence).into());
        };
        if !config.kind.is_flat() {
            let sentence = format!(
                "a machine's writes go straight into the image, which a {} image does not allow; \
                 choose vmfs, monolithicFlat, vhd or raw, and convert it afterwards",
                config.kind
            );
            return Err(ImageError::new(ErrorKind::Unsupported, &config.image, sentence).into());
        }
        if let Some(folder) = config.image.parent()
            && !folder.as_os_str().is_empty()
            && !folder.is_dir()
        {
            let (disk, folder) = (disk.name.clone(), folder.to_owned());
            return Err(OpenError::Folder { disk, folder });
        }
        if !config.image.exists() {
            let (kind, adapter) = (config.kind, config.adapter);
            let options = CreateOptions { adapter, ..CreateOptions::new(kind, disk.size_bytes) };
            create(&config.image, &options)?;
            tracing::info!(image = %config.image.display(), %kind, "made an image");
        }
        let image = open(&config.image, &OpenOptions::writable().of_kind(config.kind))?;
        let image = FlatImage::new(image)?;
        if image.size_bytes() != disk.size_bytes {
            return Err(OpenError::Size {
                disk: disk.name.clone(),
                disk_bytes: disk.size_bytes,
                image: config.image.clone(),
                image_bytes: image.size_bytes(),
            });
        }
        Ok(image)
    }

    /// Brings the durable state up to what the journal holds: markers that were durable when the
    /// process ended, and may not have been noted.
    fn handle_recovered(&mut self, recovered: &Recovered) -> Result<(), StateError> {
        let before = self.state.clone();
        let generation = recovered.generation.unwrap_or_default();
        self.state.generation = generation.0;
        for Mark { batch, kind, .. } in &recovered.marks {
            let kind = match kind {
                MarkKind::Point(id) => RecordKind::Point(*id),
                MarkKind::SyncStart => RecordKind::SyncStart,
                MarkKind::SyncDone => RecordKind::SyncDone,
            };
            let mut counts = false;
            if let RecordKind::Point(id) = kind {
                counts = id.0 > self.state.given_up_us;
                if !self.failover.takes_point(generation, *batch) {
                    self.state.given_up_us = self.state.given_up_us.max(id.0);
                    counts = false;
                }
            }
            self.note(generation, &Marker { batch: *batch, kind, counts });
        }
        // Whatever sent the disks past it, a failover to it would fail.
        let replicates = self.failover.is_replicating();
        let gone_past = |point: &mut RecoveryPoint| {
            // The process ended before a new generation began in the journal.
            let never_was = replicates && point.generation > generation.0;
            never_was || (point.generation == generation.0 && point.batch() < recovered.applied)
        };
        if self.state.point.take_if(gone_past).is_some() {
            tracing::warn!(machine = %self.config.name, "the disks have gone past the newest point, which is given up");
        }
        if let Some(sentence) = &recovered.torn_tail {
            tracing::info!(machine = %self.config.name, "{sentence}");
        }
        if let Some(damage) = &recovered.damage {
            tracing::error!(machine = %self.config.name, "{}", damage.sentence);
            self.trouble.clone_from(&damage.sentence);
            if !recovered.consistent {
                self.state.consistency = Consistency::Syncing;
            }
            self.state.point = None;
            self.state.damaged = true;
        }
        // The attempt before this one, or a save under way, may have failed.
        if self.state != before || self.is_unsaved() { self.persist() } else { Ok(()) }
    }

    /// A marker is on stable storage.
    pub fn note(&mut self, generation: Generation, marker: &Marker) {
        match marker.kind {
            RecordKind::SyncStart => {
                self.state.consistency = Consistency::Syncing;
                self.state.point = None;
            }
            RecordKind::SyncDone => {
                self.state.consistency = Consistency::Consistent;
                self.state.damaged = false;
            }
            RecordKind::Point(id) => {
                self.state.newest_point_us = self.state.newest_point_us.max(id.0);
                if self.state.consistency == Consistency::Consistent && marker.counts {
                    self.state.point = Some(RecoveryPoint::new(id, generation, marker.batch));
                }
            }
            RecordKind::Data { .. } | RecordKind::Zero { .. } => {}
        }
    }

    /// Up to where the disks may be brought: the newest point, so that it stays restorable.
    pub fn hold(&self) -> Option<BatchSeq> {
        let point = match self.failover.goal() {
            Some(Goal::Point { point, .. }) => Some(*point),
            _ => self.newest_held(),
        }?;
        (point.generation == self.state.generation).then_some(point.batch())
    }

    /// The point that the disks are held at, or soon will be: its batch may be on its way to the journal.
    fn newest_held(&self) -> Option<RecoveryPoint> {
        for marker in self.marks.iter().rev() {
            match marker.kind {
                RecordKind::SyncStart => return None,
                RecordKind::Point(id) if marker.counts => {
                    let generation = Generation(self.state.generation);
                    return Some(RecoveryPoint::new(id, generation, marker.batch));
                }
                _ => {}
            }
        }
        self.state.point
    }

    /// What a decision of the failover depends on.
    pub fn facts(&self, now: Instant) -> Facts {
        Facts {
            connected: self.link.is_some(),
            consistent: self.state.consistency == Consistency::Consistent,
            sync_percent: self
                .sync_view()
                .map(|sync| sync.done_bytes.saturating_mul(100) / sync.total_bytes.max(1)),
            point: self.newest_held(),
            newest_point_us: self.state.newest_point_us,
            damaged: self.state.damaged,
            durable: self.open.as_ref().map_or(BatchSeq(0), |open| open.receiver.durable()),
            rpo: self.watermark.rpo(now),
            now_us: now_us(),
        }
    }
}

/// The wall clock, in microseconds since 1970 UTC.
pub fn now_us() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_micros() as u64)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use backhaul_proto::batch::RecordKind;
    use backhaul_proto::id::{BatchSeq, Generation, PointId, WriteSeq};

    use super::{Machine, Marker, Saved};
    use crate::config::MachineConfig;
    use crate::failover::{Failover, Goal, Plan, Stage};
    use crate::journal::{Mark, MarkKind};
    use crate::machine_state::Consistency;
    use crate::recovery_point::RecoveryPoint;
    use crate::store::Recovered;

    fn machine(store: &std::path::Path) -> Machine {
        let (name, agent) = ("web01".parse().unwrap(), "ps1".parse().unwrap());
        let point_period = Duration::from_secs(300);
        let config = MachineConfig { name, agent, point_period, disks: Vec::new() };
        let mut machine = Machine::load(config, store).unwrap();
        machine.state.consistency = Consistency::Consistent;
        machine.state.generation = 1;
        machine
    }

    fn recovery_point(batch: u64) -> RecoveryPoint {
        RecoveryPoint::new(PointId(batch), Generation(1), BatchSeq(batch))
    }

    /// Whether a point counts was decided when it was delivered, for the disks, and again when it was durable,
    /// for the list. A failover or its end in between left the one without the other.
    #[test]
    fn the_disks_and_the_list_agree_on_a_point() {
        let store = tempfile::tempdir().unwrap();
        for counts in [true, false] {
            let mut machine = machine(store.path());
            machine.state.point = Some(recovery_point(5));
            let (batch, kind) = (BatchSeq(7), RecordKind::Point(PointId(7)));
            let marker = Marker { batch, kind, counts };
            machine.marks.push_back(marker);
            let held = machine.facts(Instant::now()).point;
            assert_eq!(held, Some(recovery_point(if counts { 7 } else { 5 })));
            assert_eq!(machine.hold(), held.map(|point| point.batch()), "a cancel sends it anew");
            let (batch, kind) = (BatchSeq(8), RecordKind::SyncStart);
            machine.marks.push_back(Marker { batch, kind, counts: false });
            assert_eq!(machine.hold(), None, "a sync goes past every point");
            machine.marks.clear();
            machine.note(Generation(1), &marker);
            assert_eq!(machine.state.point, held);
        }
    }

    fn preparing(goal: Goal) -> Failover {
        let plan = Plan {
            without_shutdown: false,
            drain_timeout_seconds: 60.0,
            requested_at_us: 0,
            to: None,
        };
        Failover::new("web01", Stage::Preparing { plan, goal }, String::new())
    }

    /// A failover to the newest state was cancelled while the disks were brought there. The point that they had
    /// gone past was listed still, and one that was on its way to the journal was listed afterwards.
    #[test]
    fn a_failover_gives_up_every_point_that_it_goes_past() {
        let store = tempfile::tempdir().unwrap();
        let chosen = Goal::Point { point: recovery_point(5), drained: false, loss_seconds: 0.0 };
        for (goal, kept) in
            [(Goal::JournalEnd { loss_seconds: 0.0 }, None), (chosen, Some(recovery_point(5)))]
        {
            let mut machine = machine(store.path());
            machine.state.point = Some(recovery_point(5));
            let (batch, kind) = (BatchSeq(7), RecordKind::Point(PointId(7)));
            machine.marks.push_back(Marker { batch, kind, counts: true });
            machine.failover = preparing(goal);
            machine.persist().unwrap();
            assert_eq!((machine.state.point, machine.state.given_up_us), (kept, 7));
            assert_eq!(machine.hold(), kept.map(|point| point.batch()));
            let marker = machine.marks.pop_front().unwrap();
            machine.note(Generation(1), &marker);
            assert_eq!(machine.state.point, kept);
        }
    }

    /// The journal has markers behind its checkpoint that nothing held the disks at.
    #[test]
    fn a_restart_lists_no_point_that_was_given_up_nor_one_of_a_generation_that_never_began() {
        let store = tempfile::tempdir().unwrap();
        let mut machine = machine(store.path());
        machine.state.given_up_us = 7;
        machine.state.generation = 2;
        machine.state.point = Some(RecoveryPoint::new(PointId(8), Generation(2), BatchSeq(0)));
        let mark = Mark {
            batch: BatchSeq(7),
            write: WriteSeq(7),
            captured_at_us: 7,
            kind: MarkKind::Point(PointId(7)),
        };
        machine.handle_recovered(&Recovered { marks: vec![mark], ..recovered(4) }).unwrap();
        assert_eq!((machine.state.generation, machine.state.point), (1, None));
    }

    #[test]
    fn a_point_is_given_up_once_and_in_the_file_first() {
        let store = tempfile::tempdir().unwrap();
        let mut machine = machine(store.path());
        machine.state.point = Some(recovery_point(5));
        let save = machine.give_up(Generation(1), BatchSeq(5)).unwrap();
        assert!(machine.give_up(Generation(1), BatchSeq(5)).is_none(), "it is on its way");
        assert_eq!((machine.state.point, machine.state.given_up_us), (None, 5));
        machine.note_saved(&Saved { version: 0, through: None, result: Ok(()) });
        assert!(machine.giving_up.is_some(), "that was an older version");
        machine.handle_saved(save.run()).unwrap().unwrap();
        assert!(machine.giving_up.is_none());
        let machine = Machine::load(machine.config.clone(), store.path()).unwrap();
        assert_eq!((machine.state.point, machine.state.given_up_us), (None, 5));
    }

    fn recovered(applied: u64) -> Recovered {
        Recovered {
            generation: Some(Generation(1)),
            durable: BatchSeq(9),
            durable_write: WriteSeq(9),
            applied: BatchSeq(applied),
            applied_write: WriteSeq(applied),
            consistent: true,
            marks: Vec::new(),
            torn_tail: None,
            damage: None,
        }
    }

    /// The journal was full, so the disks went past the newest point; the store was full too, so
    /// the target could not note it, and was killed. The point was listed again afterwards, and
    /// could not be failed over to.
    #[test]
    fn a_point_that_the_disks_have_gone_past_is_not_listed_after_a_restart() {
        let store = tempfile::tempdir().unwrap();
        let mut machine = machine(store.path());
        let point = recovery_point(5);
        machine.state.point = Some(point);
        machine.handle_recovered(&recovered(5)).unwrap();
        assert_eq!(machine.state.point, Some(point));
        machine.handle_recovered(&recovered(6)).unwrap();
        assert_eq!(machine.state.point, None);
        // Killed before the next checkpoint, the journal has its marker still.
        machine.state.given_up_us = 5;
        let mark = |batch| {
            let (write, kind) = (WriteSeq(batch), MarkKind::Point(PointId(batch)));
            Mark { batch: BatchSeq(batch), write, captured_at_us: batch, kind }
        };
        machine.handle_recovered(&Recovered { marks: vec![mark(5)], ..recovered(4) }).unwrap();
        assert_eq!(machine.state.point, None);
        assert_eq!(Machine::load(machine.config.clone(), store.path()).unwrap().state.point, None);
        let marks = vec![mark(5), mark(7)];
        machine.handle_recovered(&Recovered { marks, ..recovered(4) }).unwrap();
        assert_eq!(machine.state.point.map(|point| point.id()), Some(PointId(7)));
    }
}
