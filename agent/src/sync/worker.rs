//! The thread that carries a machine's syncs out.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use backhaul_proto::id::{BatchSeq, MachineName};
use backhaul_proto::message::HashReply;
use tokio::sync::mpsc::UnboundedSender;

use crate::capture::{MachineCapture, Mode, now_us};
use crate::sync::plan::Question;
use crate::sync::region::{Outcome, deal_with};
use crate::sync::{Plan, RegionRef};

/// How long blocks that could not be read are left alone before they are tried again.
const RETRY_UNREADABLE: Duration = Duration::from_secs(10);

/// What the owner loop tells a sync.
#[derive(Debug)]
pub enum SyncInput {
    /// A connection is up.
    Connected,
    /// It is gone.
    Disconnected,
    /// The target answered a question.
    Answer(HashReply),
    /// The queue has room again, or something became dirty.
    Wake,
}

/// What a sync tells the owner loop.
#[derive(Debug)]
pub enum SyncOutput {
    /// Ask the target for hashes.
    Ask {
        /// Whose disk.
        machine: MachineName,
        /// What.
        question: Question,
        /// The image must hold every batch up to here first.
        after: BatchSeq,
    },
    /// Bytes that had to be sent, since the last report.
    Sent {
        /// Whose.
        machine: MachineName,
        /// How many.
        bytes: u64,
    },
    /// A person is needed, or (when empty) not any more.
    Trouble {
        /// Whose.
        machine: MachineName,
        /// What is wrong and what to do.
        sentence: String,
    },
    /// The sync is over: everything is in the stream.
    Finished {
        /// Whose.
        machine: MachineName,
    },
}

/// A running worker; it ends when this is dropped.
#[derive(Debug)]
pub struct SyncHandle(Sender<SyncInput>);

impl SyncHandle {
    /// Tells the worker something.
    pub fn send(&self, input: SyncInput) {
        // It ends only after this handle, so nobody is lost.
        let _ = self.0.send(input);
    }
}

/// Starts the worker of a machine. It waits while the machine is ordered.
pub fn start(
    machine: Arc<MachineCapture>,
    output: UnboundedSender<SyncOutput>,
    runtime: tokio::runtime::Handle,
) -> std::io::Result<SyncHandle> {
    let (sender, inputs) = channel();
    let name = format!("sync-{}", machine.name());
    let worker =
        Worker { machine, inputs, output, runtime, connected: false, plan: None, troubled: None };
    thread::Builder::new().name(name.chars().take(15).collect()).spawn(move || worker.run())?;
    Ok(SyncHandle(sender))
}

struct Worker {
    machine: Arc<MachineCapture>,
    inputs: Receiver<SyncInput>,
    output: UnboundedSender<SyncOutput>,
    runtime: tokio::runtime::Handle,
    connected: bool,
    plan: Option<(backhaul_proto::id::Generation, Plan)>,
    /// When unreadable blocks were last met.
    troubled: Option<Instant>,
}

impl Worker {
    fn run(mut self) {
        loop {
            let busy = self.step();
            let input = if busy {
                self.inputs.try_recv().map_err(|error| match error {
                    std::sync::mpsc::TryRecvError::Empty => RecvTimeoutError::Timeout,
                    std::sync::mpsc::TryRecvError::Disconnected => RecvTimeoutError::Disconnected,
                })
            } else if self.troubled.is_some() {
                self.inputs.recv_timeout(RETRY_UNREADABLE)
            } else {
                self.inputs.recv().map_err(|_| RecvTimeoutError::Disconnected)
            };
            match input {
                Ok(input) => self.handle(input),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn handle(&mut self, input: SyncInput) {
        match input {
            SyncInput::Connected => {
                self.connected = true;
                if let Some((_, plan)) = &mut self.plan {
                    plan.handle_connected();
                }
            }
            SyncInput::Disconnected => {
                self.connected = false;
                if let Some((_, plan)) = &mut self.plan {
                    plan.handle_disconnected();
                }
            }
            SyncInput::Answer(reply) => {
                if let Some((_, plan)) = &mut self.plan {
                    plan.handle_answer(reply.request, &reply.hashes);
                }
            }
            SyncInput::Wake => {}
        }
    }

    /// Does one thing, if there is one to do now.
    fn step(&mut self) -> bool {
        let machine = Arc::clone(&self.machine);
        let disks = machine.disks().len();
        let order = machine.order();
        let Mode::Syncing { compare, .. } = order.mode() else {
            self.plan = None;
            return false;
        };
        let generation = order.generation();
        if self.plan.as_ref().is_none_or(|(of, _)| *of != generation) {
            let mut plan = Plan::new(compare);
            if self.connected {
                plan.handle_connected();
            }
            self.plan = Some((generation, plan));
        }
        let Some((_, plan)) = &mut self.plan else { return false };
        if let Some(question) = plan.poll_question(&order, disks) {
            let (machine, after) = (machine.name().clone(), order.newest_with_open());
            drop(order);
            return self.tell(SyncOutput::Ask { machine, question, after });
        }
        if !order.has_room_for_sync() {
            return false;
        }
        if let Some((region, known)) = plan.poll_region(&order, disks) {
            let epoch = order.epoch();
            drop(order);
            let outcome = deal_with(&machine, region, (&known, epoch), &self.runtime);
            return self.handle_outcome(region, outcome);
        }
        let over = plan.is_pass_over(disks);
        drop(order);
        over && self.finish_pass()
    }

    fn tell(&self, output: SyncOutput) -> bool {
        self.output.send(output).is_ok()
    }

    fn handle_outcome(&mut self, region: RegionRef, outcome: Outcome) -> bool {
        let machine = self.machine.name().clone();
        match outcome {
            Outcome::Done { sent_bytes: 0 } => true,
            Outcome::Done { sent_bytes: bytes } => self.tell(SyncOutput::Sent { machine, bytes }),
            Outcome::Differs => {
                if let Some((_, plan)) = &mut self.plan {
                    plan.handle_differs(region);
                }
                true
            }
            Outcome::Unreadable { offset_bytes, error } => {
                self.troubled = Some(Instant::now());
                let disk = &self.machine.disks()[usize::from(region.disk.0)];
                let sentence = format!(
                    "disk {} of {machine} cannot be read at byte {offset_bytes} ({error}); the machine stays not \
                     consistent until {} can be read there or the guest writes those blocks anew",
                    disk.name,
                    disk.device.path().display()
                );
                tracing::error!("{sentence}");
                self.tell(SyncOutput::Trouble { machine, sentence })
            }
        }
    }

    /// Every region was looked at. Ends the sync, or starts another pass over what became dirty.
    fn finish_pass(&mut self) -> bool {
        let machine = self.machine.name().clone();
        let finished = self.machine.with_order(|order| order.finish_sync(now_us()));
        if finished.is_some() {
            if self.troubled.take().is_some() {
                self.tell(SyncOutput::Trouble {
                    machine: machine.clone(),
                    sentence: String::new(),
                });
            }
            self.plan = None;
            self.tell(SyncOutput::Finished { machine });
            return false;
        }
        let wait = self.troubled.is_some_and(|at| at.elapsed() < RETRY_UNREADABLE);
        if !wait && let Some((_, plan)) = &mut self.plan {
            plan.restart();
        }
        !wait
    }
}
