//! What passes between agent and target besides batches: standings, messages, the end of a link.

use std::time::{Duration, Instant};

use backhaul_proto::batch::BodyError;
use backhaul_proto::id::{BatchSeq, MachineIndex, PointId};
use backhaul_proto::message::{
    DiskHello, Hello, MachineHello, MachineWelcome, Standing, agent_message, target_message,
};
use backhaul_proto::session::Sender;
use backhaul_proto::version::{VERSION_2, VERSION_3, VERSION_MAX, VERSION_MIN, Version};

use super::{Agent, disk_sizes, new_generation};
use crate::capture::{Order, now_us};
use crate::job;
use crate::sync::SyncInput;

/// A round trip below this, with what a busy host adds to it, stays in the same town, where links are
/// fast.
const SHORT_LINK: Duration = Duration::from_millis(3);

impl Agent {
    pub(super) fn hello(&self) -> Hello {
        let machines = self.machines.iter().map(|machine| MachineHello {
            name: machine.config.name.to_string(),
            generation: machine.sender.generation().0,
            disks: machine
                .capture
                .disks()
                .iter()
                .map(|disk| DiskHello {
                    name: disk.name.to_string(),
                    // The size it has now: a disk that was resized is refused in words.
                    size_bytes: disk
                        .device
                        .current_size_bytes()
                        .unwrap_or(disk.device.size_bytes()),
                })
                .collect(),
            acked_batch: machine.sender.acked().0,
        });
        Hello {
            version_min: VERSION_MIN.0,
            version_max: VERSION_MAX.0,
            software: env!("CARGO_PKG_VERSION").into(),
            machines: machines.collect(),
            ended_machines: self.ended.iter().map(ToString::to_string).collect(),
        }
    }

    /// What the target can be sent, and how it is likely to be reached. One that was replaced by an older one
    /// knows no references.
    pub(super) fn handle_version(&mut self, version: Version) {
        self.references = version >= VERSION_2;
        self.control_batches = version >= VERSION_3;
        self.referenced_bytes = 0;
        self.pool.allow_references(self.references);
        let rtt = self.link.as_ref().map(|link| link.connection.stats().rtt);
        let short = rtt.is_some_and(|rtt| !rtt.is_zero() && rtt < SHORT_LINK);
        let limited = self.config.limit.now().is_some();
        self.pool.handle_connected(short && !limited);
        if self.references {
            return;
        }
        for index in 0..self.machines.len() {
            let machine = &mut self.machines[index];
            match machine.sender.unfold_all() {
                Ok((before, after)) => machine.capture.order().handle_resized(before, after),
                Err(error) => self.give_up_stream(index, &error),
            }
        }
    }

    /// A batch that was held cannot be sent any more.
    pub(super) fn give_up_stream(&mut self, index: usize, error: &BodyError) {
        let machine = &self.machines[index].config.name;
        tracing::error!(%machine, %error, "a batch was damaged in this host's memory; everything is compared anew");
        self.restart(index);
    }

    pub(super) fn handle_standing(&mut self, welcome: &MachineWelcome) {
        let Some(machine) = self.machines.get_mut(welcome.machine as usize) else { return };
        let name = machine.config.name.clone();
        machine.trouble.clear();
        machine.capture.order().raise_last_point(PointId(welcome.newest_point));
        match welcome.standing() {
            Standing::Replicate => {
                let period = Duration::from_millis(welcome.point_period_ms);
                machine.point_period = (!period.is_zero()).then_some(period);
                machine.next_point = Instant::now() + period;
                machine.ack_times.handle_disconnected();
                let resumed = machine.sender.handle_connected(
                    BatchSeq(welcome.durable_batch),
                    BatchSeq(welcome.received_batch),
                    welcome.window_bytes,
                );
                match resumed {
                    Ok(released) => {
                        machine.capture.order().handle_resized(released.bytes, 0);
                        machine.dedupe.handle_acked(machine.sender.acked(), BatchSeq(0));
                        machine.replicating = Some(MachineIndex(welcome.machine as u16));
                        machine.sync.send(SyncInput::Connected);
                        self.transmit(welcome.machine as usize);
                    }
                    Err(error) => {
                        tracing::error!(machine = %name, %error, "everything is compared anew");
                        self.restart(welcome.machine as usize);
                    }
                }
            }
            Standing::Restart => {
                tracing::warn!(machine = %name, "the target asks for a new generation");
                self.restart(welcome.machine as usize);
            }
            Standing::FailedOver => {
                tracing::info!(machine = %name, "failed over; waiting for commit or cancel");
                machine.sender.handle_disconnected();
                machine.ack_times.handle_disconnected();
                machine.replicating = None;
                machine.sync.send(SyncInput::Disconnected);
                if welcome.fence && !machine.capture.is_fenced() {
                    tracing::warn!(machine = %name, "it was failed over without having been shut down; its writes are refused from now on");
                    let context = self.job_context(welcome.machine as usize);
                    tokio::spawn(job::fence(context));
                }
            }
            Standing::Ended => {
                machine.replicating = None;
                machine.trouble = "protection has ended: the machine was committed".into();
                tracing::warn!(machine = %name, "protection has ended: the machine was committed");
            }
            Standing::Refused | Standing::Unknown => {
                machine.replicating = None;
                let sentence = welcome.refusal.as_ref().map(|refusal| refusal.sentence.clone());
                machine.trouble = sentence.unwrap_or_else(|| "the target refuses it".into());
                tracing::error!(machine = %name, "the target refuses it: {}", machine.trouble);
            }
        }
    }

    /// Begins a new generation of a machine, and the session anew.
    pub(super) fn restart(&mut self, index: usize) {
        let options = self.order_options();
        let machine = &mut self.machines[index];
        let generation = new_generation(machine.sender.generation());
        let sizes = disk_sizes(machine.capture.disks());
        // Before anything of it is sealed.
        machine.dedupe.handle_generation(generation);
        machine.capture.with_order(|order| {
            let last_point = order.last_point();
            *order = Order::new(options, generation, &sizes, last_point, now_us());
        });
        machine.sender = Sender::new(generation);
        machine.ack_times.handle_disconnected();
        machine.encoded.clear();
        machine.replicating = None;
        machine.sync_sent_bytes = 0;
        // A point of the old generation is none of the new one: a target that asks for it again
        // would take the batch of that number for the end of the machine's writes.
        machine.last_reply.take_if(|reply| reply.point_batch > 0);
        machine.sync.send(SyncInput::Disconnected);
        if let Some(link) = &self.link {
            link.connection.close("a machine begins a new generation");
        }
    }

    pub(super) fn handle_down(&mut self, reason: String) {
        self.link = None;
        for machine in &mut self.machines {
            machine.sender.handle_disconnected();
            machine.ack_times.handle_disconnected();
            machine.replicating = None;
            machine.sync.send(SyncInput::Disconnected);
        }
        self.forgive_debts();
        if reason != self.down_reason {
            tracing::warn!(%reason, "no connection to the target; trying again for as long as it takes");
            self.down_reason = reason;
        }
    }

    pub(super) fn handle_message(&mut self, message: target_message::Kind) {
        match message {
            target_message::Kind::Ack(ack) => self.handle_ack(&ack),
            target_message::Kind::Resend(resend) => self.handle_resend(&resend),
            target_message::Kind::Job(job) => self.handle_job(job),
            target_message::Kind::Machine(welcome) => self.handle_standing(&welcome),
            target_message::Kind::Heartbeat(beat) => {
                self.heartbeat_us = now_us().saturating_sub(beat.nonce);
                if let Some(link) = &self.link {
                    link.connection.handle_peer_load(beat.load_percent, beat.connections_max);
                }
            }
            target_message::Kind::Welcome(_)
            | target_message::Kind::Refused(_)
            | target_message::Kind::Probe(_) => {
                self.drop_link("the target greeted twice");
            }
        }
    }

    pub(super) fn drop_link(&self, reason: &str) {
        if let Some(link) = &self.link {
            tracing::warn!(reason, "the connection is given up");
            link.connection.close(reason);
        }
    }

    pub(super) fn say(&self, message: agent_message::Kind) {
        if let Some(link) = &self.link {
            link.control(message);
        }
    }
}
