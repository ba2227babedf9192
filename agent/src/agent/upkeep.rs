//! What is done on every tick: ceilings, points, reports, metrics.

use std::time::{Duration, Instant};

use backhaul_daemon::bandwidth::{Rate, Timestamp};
use backhaul_proto::link::Transport;
use backhaul_proto::message::{Heartbeat, LinkReport, Progress, agent_message};

use super::Agent;
use crate::batch::Backlog;
use crate::capture::{Mode, now_us};
use crate::progress::SyncStanding;
use crate::sync::SyncInput;

impl Agent {
    /// What is done on every tick.
    pub(super) fn upkeep(&mut self) {
        let now = Instant::now();
        self.apply_ceilings(Timestamp::now());
        for machine in &mut self.machines {
            let Some(period) = machine.point_period else { continue };
            if machine.replicating.is_some() && now >= machine.next_point {
                machine.next_point = now + period;
                if !machine.capture.is_fenced() {
                    machine.capture.with_order(|order| order.set_point(now_us()));
                }
            }
            let mode = machine.capture.order().mode();
            if mode != Mode::Ordered {
                machine.sync.send(SyncInput::Wake);
            }
        }
        // A ceiling that was lifted leaves no timer behind that would go on sending.
        self.transmit_all();
        let (since, bytes) = self.rate_since;
        let seconds = now.duration_since(since).as_secs_f64();
        if seconds >= 0.2 {
            let rate = (self.acked_wire_bytes - bytes) as f64 / seconds;
            self.rate_since = (now, self.acked_wire_bytes);
            // Over about a second, so that a person can read it.
            self.acked_bytes_per_second += (rate - self.acked_bytes_per_second) * seconds.min(1.0);
        }
        self.judge_link(now);
        if now.duration_since(self.last_progress) >= Duration::from_secs(1) {
            self.check_sizes();
            self.report_progress();
            self.say(agent_message::Kind::Heartbeat(Heartbeat {
                nonce: now_us(),
                ..Heartbeat::default()
            }));
            self.report_link();
        }
        let connection = self.link.as_ref().map(|link| &link.connection);
        self.metrics.link(connection, self.acked_bytes_per_second);
        for machine in &self.machines {
            let order = machine.capture.order();
            let total_bytes = match order.mode() {
                Mode::Ordered => 0,
                Mode::Syncing { total_bytes, .. } => total_bytes,
            };
            let (queued, dirty) = (order.queued_bytes(), order.dirty_bytes());
            drop(order);
            let name = machine.config.name.as_str();
            self.metrics.machine(name, machine.replicating.is_some(), queued, dirty, total_bytes);
            let standing = SyncStanding {
                total_bytes,
                dirty_bytes: dirty,
                sent_bytes: machine.sync_sent_bytes,
                replicating: machine.replicating.is_some(),
            };
            self.progress.update(name, standing);
        }
    }

    /// Tells the encoders what waits for the link.
    fn judge_link(&self, now: Instant) {
        let held = self.machines.iter().map(|machine| machine.sender.held_wire_bytes());
        let backlog = self.link.as_ref().map(|link| Backlog {
            encoder_bytes: 0,
            link_bytes: held.sum(),
            acked_wire_bytes: self.acked_wire_bytes,
            round_trip: link.connection.stats().rtt,
        });
        let replicating = self.machines.iter().any(|machine| machine.replicating.is_some());
        self.pool.handle_link(now, backlog.filter(|_| replicating));
        self.metrics.compression(self.pool.level(), self.pool.ratio());
    }

    /// A disk that is resized under the agent reads and writes as if nothing were wrong, in parts.
    fn check_sizes(&mut self) {
        for machine in &mut self.machines {
            for disk in machine.capture.disks() {
                let was_bytes = disk.device.size_bytes();
                let is_bytes = disk.device.current_size_bytes().unwrap_or(was_bytes);
                if is_bytes != was_bytes {
                    let sentence = format!(
                        "protected disk {} changed its size from {was_bytes} to {is_bytes} bytes while it is protected; restore the size and restart the agent",
                        disk.device.path().display()
                    );
                    if machine.trouble != sentence {
                        tracing::error!(machine = %machine.config.name, "{sentence}");
                        machine.trouble = sentence;
                    }
                }
            }
        }
    }

    pub(super) fn report_link(&self) {
        let Some(link) = &self.link else { return };
        let stats = link.connection.stats();
        let path = link.connection.path();
        self.say(agent_message::Kind::Link(LinkReport {
            congestion: match link.connection.transport() {
                Transport::Quic => self.config.congestion.to_string(),
                Transport::Tcp => "the kernel's".into(),
            },
            rtt_us: if stats.rtt.is_zero() {
                self.heartbeat_us
            } else {
                stats.rtt.as_micros() as u64
            },
            window_bytes: stats.congestion_window_bytes,
            acked_bytes_per_second: self.acked_bytes_per_second as u64,
            ceiling_bytes_per_second: self.config.limit.now().map_or(0, Rate::bytes_per_second),
            mtu_bytes: stats.mtu_bytes.into(),
            sent_bytes: stats.sent_bytes,
            sent_packets: stats.sent_packets,
            lost_packets: stats.lost_packets,
            lost_bytes: stats.lost_bytes,
            mtu_black_holes: stats.mtu_black_holes,
            receive_buffer_bytes: stats.socket.receive_bytes as u64,
            send_buffer_bytes: stats.socket.send_bytes as u64,
            dropped_datagrams: stats.socket.dropped_datagrams(),
            state: path.state.into(),
            path_bytes_per_second: path.bytes_per_second,
            min_rtt_us: path.min_rtt.as_micros() as u64,
            compression_level: self.pool.level().unsigned_abs(),
            referenced_bytes: self.referenced_bytes,
            connections: stats.connections,
        }));
    }

    pub(super) fn report_progress(&mut self) {
        self.last_progress = Instant::now();
        for (index, machine) in self.machines.iter().enumerate() {
            if machine.replicating.is_none() {
                continue;
            }
            let order = machine.capture.order();
            let total = match order.mode() {
                Mode::Ordered => 0,
                Mode::Syncing { total_bytes, .. } => total_bytes,
            };
            let progress = Progress {
                machine: index as u32,
                newest_batch: order.newest_with_open().0,
                queued_bytes: order.queued_bytes(),
                dirty_bytes: order.dirty_bytes(),
                sync_total_bytes: total,
                sync_done_bytes: total.saturating_sub(order.dirty_bytes()),
                sync_sent_bytes: machine.sync_sent_bytes,
                trouble: machine.trouble.clone(),
            };
            drop(order);
            self.say(agent_message::Kind::Progress(progress));
        }
    }
}
