//! The agent's Prometheus metrics.

use backhaul_proto::batch::EncodedBatch;
use backhaul_proto::link::Connection;
use backhaul_proto::session::Unfolded;
use prometheus::{
    Gauge, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};

/// Bounds of what is told apart in the times of acknowledgements, in seconds: from a LAN to a link that was dark.
const ACKNOWLEDGED_BOUNDS_SECONDS: [f64; 12] =
    [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 60.0];

/// Every metric of the agent. Names end in their unit, as Prometheus asks.
#[derive(Debug, Clone)]
pub struct Metrics {
    session_up: IntGauge,
    rtt_seconds: Gauge,
    window_bytes: IntGauge,
    path_bytes_per_second: IntGauge,
    acked_bytes_per_second: IntGauge,
    sent_bytes: IntGauge,
    sent_packets: IntGauge,
    lost_packets: IntGauge,
    lost_bytes: IntGauge,
    mtu_bytes: IntGauge,
    connections: IntGauge,
    receive_buffer_bytes: IntGauge,
    send_buffer_bytes: IntGauge,
    dropped_datagrams: IntGauge,
    compression_level: IntGauge,
    compression_ratio: Gauge,
    replicating: IntGaugeVec,
    queue_bytes: IntGaugeVec,
    dirty_bytes: IntGaugeVec,
    sync_total_bytes: IntGaugeVec,
    sync_done_bytes: IntGaugeVec,
    sent_wire_bytes: IntCounterVec,
    sent_plain_bytes: IntCounterVec,
    referenced_bytes: IntCounterVec,
    resent_batches: IntCounterVec,
    acknowledged_seconds: HistogramVec,
}

impl Metrics {
    /// Makes the metrics and registers them.
    pub fn new(registry: &Registry) -> prometheus::Result<Self> {
        let gauge = |name: &str, help: &str| {
            let gauge = IntGauge::with_opts(Opts::new(format!("backhaul_agent_{name}"), help))?;
            registry.register(Box::new(gauge.clone()))?;
            prometheus::Result::Ok(gauge)
        };
        let gauges = |name: &str, help: &str| {
            let opts = Opts::new(format!("backhaul_agent_{name}"), help);
            let gauges = IntGaugeVec::new(opts, &["machine"])?;
            registry.register(Box::new(gauges.clone()))?;
            prometheus::Result::Ok(gauges)
        };
        let counters = |name: &str, help: &str| {
            let opts = Opts::new(format!("backhaul_agent_{name}"), help);
            let counters = IntCounterVec::new(opts, &["machine"])?;
            registry.register(Box::new(counters.clone()))?;
            prometheus::Result::Ok(counters)
        };
        let histograms = |name: &str, help: &str, bounds: &[f64]| {
            let opts = HistogramOpts::new(format!("backhaul_agent_{name}"), help);
            let histograms = HistogramVec::new(opts.buckets(bounds.to_vec()), &["machine"])?;
            registry.register(Box::new(histograms.clone()))?;
            prometheus::Result::Ok(histograms)
        };
        let number = |name: &str, help: &str| {
            let gauge = Gauge::with_opts(Opts::new(format!("backhaul_agent_{name}"), help))?;
            registry.register(Box::new(gauge.clone()))?;
            prometheus::Result::Ok(gauge)
        };
        Ok(Self {
            rtt_seconds: number("link_rtt_seconds", "Round-trip time")?,
            compression_ratio: number("compression_ratio", "Plain bytes a byte on the wire")?,
            session_up: gauge("session_up", "Whether the target is connected")?,
            window_bytes: gauge("link_window_bytes", "Congestion window")?,
            path_bytes_per_second: gauge(
                "link_path_bytes_per_second",
                "Rate that the path is measured to deliver",
            )?,
            acked_bytes_per_second: gauge(
                "link_acked_bytes_per_second",
                "Batches acknowledged as durable, lately",
            )?,
            sent_bytes: gauge("link_sent_bytes", "Sent on this connection, headers included")?,
            sent_packets: gauge("link_sent_packets", "Packets sent on this connection")?,
            lost_packets: gauge("link_lost_packets", "Packets lost on this connection")?,
            lost_bytes: gauge("link_retransmitted_bytes", "Bytes of those, sent again")?,
            mtu_bytes: gauge(
                "link_mtu_bytes",
                "What a packet carries at most: the UDP payload, or the whole over TCP",
            )?,
            connections: gauge("link_connections", "QUIC connections that carry batches")?,
            receive_buffer_bytes: gauge("socket_receive_buffer_bytes", "Granted by the system")?,
            send_buffer_bytes: gauge("socket_send_buffer_bytes", "Granted by the system")?,
            dropped_datagrams: gauge("socket_dropped_datagrams", "Arrived, and found no room")?,
            compression_level: gauge(
                "compression_level",
                "Level of zstd; 0 while it does not pay",
            )?,
            replicating: gauges("replicating", "Whether the machine is being replicated")?,
            queue_bytes: gauges("queue_bytes", "Writes not acknowledged by the target")?,
            dirty_bytes: gauges("dirty_bytes", "Content that is in no batch yet")?,
            sync_total_bytes: gauges("sync_total_bytes", "What the present sync looks at")?,
            sync_done_bytes: gauges("sync_done_bytes", "What of that is dealt with")?,
            sent_wire_bytes: counters("sent_wire_bytes_total", "Batches sent, as they travel")?,
            sent_plain_bytes: counters("sent_plain_bytes_total", "Batches sent, uncompressed")?,
            referenced_bytes: counters("referenced_bytes_total", "Data sent as references")?,
            resent_batches: counters("resent_batches_total", "Batches sent again without them")?,
            acknowledged_seconds: histograms(
                "acknowledged_seconds",
                "From a batch's sending to its acknowledgement as durable",
                &ACKNOWLEDGED_BOUNDS_SECONDS,
            )?,
        })
    }

    pub(crate) fn sent(&self, machine: &str, batch: &EncodedBatch) {
        self.sent_wire_bytes.with_label_values(&[machine]).inc_by(batch.wire_bytes() as u64);
        let plain = u64::from(batch.header.plain_bytes);
        self.sent_plain_bytes.with_label_values(&[machine]).inc_by(plain);
        let referenced = u64::from(batch.header.referenced_bytes());
        self.referenced_bytes.with_label_values(&[machine]).inc_by(referenced);
    }

    pub(crate) fn resent(&self, machine: &str, unfolded: &Unfolded) {
        let wire_bytes = unfolded.batch.wire_bytes() as u64;
        self.sent_wire_bytes.with_label_values(&[machine]).inc_by(wire_bytes);
        self.resent_batches.with_label_values(&[machine]).inc();
    }

    /// A batch was acknowledged so long after it was sent.
    pub(crate) fn acknowledged(&self, machine: &str, seconds: f64) {
        self.acknowledged_seconds.with_label_values(&[machine]).observe(seconds);
    }

    pub(crate) fn compression(&self, level: i32, ratio: f64) {
        self.compression_level.set(level.into());
        self.compression_ratio.set(ratio);
    }

    /// The link at present, over which so much was acknowledged a second, lately. Without one, what
    /// the last one's transport knew stays.
    pub(crate) fn link(&self, connection: Option<&Connection>, acked_bytes_per_second: f64) {
        self.session_up.set(connection.is_some().into());
        self.acked_bytes_per_second.set(acked_bytes_per_second as i64);
        if let Some(connection) = connection {
            let stats = connection.stats();
            self.path_bytes_per_second.set(connection.path().bytes_per_second as i64);
            self.sent_bytes.set(stats.sent_bytes as i64);
            self.sent_packets.set(stats.sent_packets as i64);
            self.rtt_seconds.set(stats.rtt.as_secs_f64());
            self.window_bytes.set(stats.congestion_window_bytes as i64);
            self.lost_packets.set(stats.lost_packets as i64);
            self.lost_bytes.set(stats.lost_bytes as i64);
            self.mtu_bytes.set(stats.mtu_bytes.into());
            self.connections.set(stats.connections.into());
            self.receive_buffer_bytes.set(stats.socket.receive_bytes as i64);
            self.send_buffer_bytes.set(stats.socket.send_bytes as i64);
            self.dropped_datagrams.set(stats.socket.dropped_datagrams() as i64);
        }
    }

    pub(crate) fn machine(
        &self,
        machine: &str,
        replicating: bool,
        queued_bytes: u64,
        dirty_bytes: u64,
        sync_total_bytes: u64,
    ) {
        let set = |gauges: &IntGaugeVec, value: u64| {
            gauges.with_label_values(&[machine]).set(value as i64);
        };
        set(&self.replicating, replicating.into());
        set(&self.queue_bytes, queued_bytes);
        set(&self.dirty_bytes, dirty_bytes);
        set(&self.sync_total_bytes, sync_total_bytes);
        set(&self.sync_done_bytes, sync_total_bytes.saturating_sub(dirty_bytes));
    }
}
