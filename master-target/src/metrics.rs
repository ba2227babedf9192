//! The target's Prometheus metrics.

use backhaul_api::{Consistency, Machine};
use backhaul_proto::quic::SocketFacts;
use prometheus::{GaugeVec, IntGauge, IntGaugeVec, Opts, Registry};

/// Reads a metric off a machine's view.
type Read = fn(&Machine) -> u64;

/// Every metric of the target.
#[derive(Debug, Clone)]
pub struct Metrics {
    target: String,
    agents: IntGauge,
    /// The one that every agent's datagrams come to.
    socket: SocketFacts,
    dropped_datagrams: IntGauge,
    rpo_seconds: GaugeVec,
    gauges: Vec<(IntGaugeVec, Read)>,
}

impl Metrics {
    /// Makes the metrics of the target called `target`, which listens on `socket`, and registers
    /// them.
    pub fn new(registry: &Registry, target: &str, socket: SocketFacts) -> prometheus::Result<Self> {
        let prefixed = |name: &str, help: &str| Opts::new(format!("backhaul_target_{name}"), help);
        let single = |name: &str, help: &str| {
            let gauge = IntGauge::with_opts(prefixed(name, help))?;
            registry.register(Box::new(gauge.clone()))?;
            prometheus::Result::Ok(gauge)
        };
        let agents = single("agents", "Agents connected")?;
        let dropped_datagrams = single("socket_dropped_datagrams", "Arrived, and found no room")?;
        let granted = "Granted by the system";
        single("socket_receive_buffer_bytes", granted)?.set(socket.receive_bytes as i64);
        single("socket_send_buffer_bytes", granted)?.set(socket.send_bytes as i64);
        let help = "Writes that would be lost now; -1 before the first sync";
        let rpo_seconds = GaugeVec::new(prefixed("rpo_seconds", help), &["machine"])?;
        registry.register(Box::new(rpo_seconds.clone()))?;
        let table: [(&str, &str, Read); 11] = [
            ("session_up", "Whether the machine's agent is connected", |m| m.connected.into()),
            ("consistent", "Whether its disks are a prefix of its writes", |m| {
                (m.consistency == Consistency::Consistent).into()
            }),
            ("lag_bytes", "Writes that the agent holds unacknowledged", |m| m.lag_bytes),
            ("dirty_bytes", "Content that is in no batch yet", |m| m.dirty_bytes),
            ("journal_bytes", "Size of its journal", |m| m.journal_bytes),
            ("sync_total_bytes", "What its sync looks at", |m| {
                m.sync.as_ref().map_or(0, |sync| sync.total_bytes)
            }),
            ("sync_done_bytes", "What of that is dealt with", |m| {
                m.sync.as_ref().map_or(0, |sync| sync.done_bytes)
            }),
            ("received_wire_bytes", "Batches received, as they travelled", |m| {
                m.received_wire_bytes
            }),
            ("received_plain_bytes", "Batches received, uncompressed", |m| m.received_plain_bytes),
            ("referenced_bytes", "Data of those that came as references", |m| m.referenced_bytes),
            ("repeated_batches", "Batches that came though acknowledged", |m| m.repeated_batches),
        ];
        let mut gauges = Vec::new();
        for (name, help, read) in table {
            let gauge = IntGaugeVec::new(prefixed(name, help), &["machine"])?;
            registry.register(Box::new(gauge.clone()))?;
            gauges.push((gauge, read));
        }
        let target = target.to_owned();
        Ok(Self { target, agents, socket, dropped_datagrams, rpo_seconds, gauges })
    }

    pub(crate) fn target_name(&self) -> &str {
        &self.target
    }

    pub(crate) fn agents(&self, connected: usize) {
        self.agents.set(connected as i64);
    }

    /// Asks the kernel what became of datagrams, which it counts whether or not somebody is connected.
    pub(crate) fn socket(&self) {
        self.dropped_datagrams.set(self.socket.dropped_datagrams() as i64);
    }

    pub(crate) fn machine(&self, view: &Machine) {
        let name = [view.name.as_str()];
        self.rpo_seconds.with_label_values(&name).set(view.rpo_seconds.unwrap_or(-1.0));
        for (gauge, read) in &self.gauges {
            gauge.with_label_values(&name).set(read(view) as i64);
        }
    }
}
