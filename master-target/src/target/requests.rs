//! What operators ask for.

use std::time::Instant;

use backhaul_api::{Failure, Link as LinkView, Point, Status};
use backhaul_proto::id::{JobId, MachineName};
use backhaul_proto::message::JobKind;

use super::{Answer, ApiRequest, Link, MachineRequest, Tag, Target, printable};
use crate::failover::{Plan, Stage};
use crate::machine::{Machine, now_us};
use crate::machine_state::Consistency;
use crate::recovery_point::PointText;

impl Target {
    pub(super) fn handle_api(&mut self, request: ApiRequest) {
        let now = Instant::now();
        match request {
            ApiRequest::Status(answer) => drop(answer.send(self.status())),
            ApiRequest::Machines(answer) => {
                let views = self.machines.values().map(|machine| machine.view(now)).collect();
                let _ = answer.send(views);
            }
            ApiRequest::Links(answer) => {
                let mut views: Vec<_> = self.links.values().map(Link::view).collect();
                views.sort_by(|a, b| a.agent.cmp(&b.agent));
                let _ = answer.send(views);
            }
            ApiRequest::Machine(name, request) => {
                let known = name.parse::<MachineName>().ok();
                match known.filter(|name| self.machines.contains_key(name)) {
                    Some(name) => self.handle_machine_request(&name, request),
                    None => self.refuse_unknown(&name, request),
                }
            }
        }
    }

    fn status(&self) -> Status {
        let consistent = |machine: &&Machine| machine.state.consistency == Consistency::Consistent;
        let mut agents: Vec<_> = self.links.values().map(|link| link.agent.to_string()).collect();
        agents.sort();
        Status {
            target: self.metrics.target_name().to_owned(),
            version: env!("CARGO_PKG_VERSION").into(),
            listen: self.config.listen.to_string(),
            uptime_seconds: self.started.elapsed().as_secs(),
            agents,
            machines: self.machines.len(),
            machines_consistent: self.machines.values().filter(consistent).count(),
        }
    }

    fn refuse_unknown(&self, name: &str, request: MachineRequest) {
        let names: Vec<_> = self.machines.keys().map(ToString::to_string).collect();
        let failure = Failure {
            code: "unknown-machine".into(),
            sentence: format!(
                "there is no machine `{}` here; the target's configuration has: {}",
                printable(name),
                names.join(", ")
            ),
        };
        match request {
            MachineRequest::Tag(answer) => drop(answer.send(Err(failure))),
            MachineRequest::Show(answer)
            | MachineRequest::Failover(_, answer)
            | MachineRequest::Cancel(answer)
            | MachineRequest::Commit(_, answer) => drop(answer.send(Err(failure))),
        }
    }

    fn handle_machine_request(&mut self, name: &MachineName, request: MachineRequest) {
        let now = Instant::now();
        let Some(machine) = self.machines.get_mut(name) else { return };
        let facts = machine.facts(now);
        let (decision, answer) = match request {
            MachineRequest::Show(answer) => return drop(answer.send(Ok(machine.view(now)))),
            MachineRequest::Tag(answer) => return self.tag(name, answer),
            MachineRequest::Cancel(answer) => (machine.failover.handle_cancel(&facts), answer),
            MachineRequest::Commit(request, answer) => {
                (machine.failover.handle_commit(&facts, request.without_removal), answer)
            }
            MachineRequest::Failover(request, answer) => {
                let to = match request.to.as_str() {
                    "latest" => None,
                    text => match text.parse::<PointText>() {
                        Ok(point) => Some(point.0),
                        Err(error) => {
                            let (code, sentence) = ("unknown-point".into(), error.to_string());
                            return drop(answer.send(Err(Failure { code, sentence })));
                        }
                    },
                };
                let plan = Plan {
                    without_shutdown: request.without_shutdown,
                    drain_timeout_seconds: request.drain_timeout_seconds.clamp(0.0, 86_400.0),
                    requested_at_us: facts.now_us,
                    to: None,
                };
                (machine.failover.handle_failover(now, &facts, to, plan), answer)
            }
        };
        match decision {
            Ok(actions) => {
                self.carry_out(name, actions);
                if let Some(machine) = self.machines.get(name) {
                    let _ = answer.send(Ok(machine.view(now)));
                }
            }
            Err(refusal) => {
                let code = refusal.code.to_owned();
                let _ = answer.send(Err(Failure { code, sentence: refusal.sentence }));
            }
        }
    }

    fn tag(&mut self, name: &MachineName, answer: Answer<Point>) {
        let Some(machine) = self.machines.get(name) else { return };
        let link = machine.link;
        let consistent = machine.state.consistency == Consistency::Consistent;
        let refusal = if link.is_none() {
            Some((
                "agent-away",
                format!(
                    "machine {name} has no agent connected, so no point can be set; start its agent"
                ),
            ))
        } else if *machine.failover.stage() != Stage::Replicating {
            Some((
                "failed-over",
                format!(
                    "machine {name} is being failed over, or is so already, and no point can be set; cancel or commit first"
                ),
            ))
        } else if !consistent {
            Some((
                "not-consistent",
                format!(
                    "machine {name} is being synced, so there is no consistent state to tag yet; try again when the sync is over"
                ),
            ))
        } else {
            None
        };
        if let Some((code, sentence)) = refusal {
            return drop(answer.send(Err(Failure { code: code.into(), sentence })));
        }
        self.last_job = now_us().max(self.last_job + 1);
        let job = JobId(self.last_job);
        self.tags.insert(job, Tag { machine: name.clone(), answer, made: None });
        self.send_job(link, job, JobKind::Tag);
    }
}

impl Link {
    /// The link as the API shows it.
    fn view(&self) -> LinkView {
        let report = &self.report;
        let here = self.up.connection.stats();
        LinkView {
            agent: self.agent.to_string(),
            address: self.up.connection.remote_address().to_string(),
            connected_seconds: self.since.elapsed().as_secs(),
            transport: self.up.connection.transport().to_string(),
            congestion: report.congestion.clone(),
            state: report.state.clone(),
            path_bytes_per_second: Some(report.path_bytes_per_second).filter(|rate| *rate > 0),
            min_rtt_seconds: report.min_rtt_us as f64 / 1e6,
            rtt_seconds: report.rtt_us as f64 / 1e6,
            acked_bytes_per_second: report.acked_bytes_per_second,
            ceiling_bytes_per_second: Some(report.ceiling_bytes_per_second)
                .filter(|rate| *rate > 0),
            compression_level: report.compression_level,
            referenced_bytes: report.referenced_bytes,
            connections: report.connections,
            window_bytes: report.window_bytes,
            mtu_bytes: report.mtu_bytes,
            sent_bytes: report.sent_bytes,
            sent_packets: report.sent_packets,
            lost_packets: report.lost_packets,
            retransmitted_bytes: report.lost_bytes,
            mtu_black_holes: report.mtu_black_holes,
            agent_receive_buffer_bytes: report.receive_buffer_bytes,
            agent_send_buffer_bytes: report.send_buffer_bytes,
            agent_dropped_datagrams: report.dropped_datagrams,
            target_receive_buffer_bytes: here.socket.receive_bytes as u64,
            target_send_buffer_bytes: here.socket.send_bytes as u64,
            target_dropped_datagrams: here.socket.dropped_datagrams(),
        }
    }
}
