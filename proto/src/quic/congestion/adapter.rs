//! The cores, as quinn calls a controller.

use std::any::Any;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics, CubicConfig};
use quinn_proto::RttEstimator;

use crate::quic::congestion::ceiling::{Ceiling, RateLimit};
use crate::quic::congestion::fixed::Fixed;
use crate::quic::congestion::flow::{Flow, WINDOW_PACKETS_INITIAL};
use crate::quic::congestion::known::PathMemory;
use crate::quic::congestion::share::Siblings;

/// Packets that one knock lets out: the window is full of what was lost, and never had room for them.
const KNOCK_PACKETS: u32 = 4;

/// What the congestion controller knows of a connection's path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CongestionStats {
    /// The controller's state: `startup`, `drain`, `probe_bw_down`, `probe_bw_cruise`,
    /// `probe_bw_refill`, `probe_bw_up` or `probe_rtt`; `cubic` and `fixed` are their own.
    pub state: &'static str,
    /// Estimated rate of the path in bytes a second, 0 where the method makes no estimate.
    pub bandwidth_bytes_per_second: u64,
    /// Smallest round-trip time of the last twenty seconds (`fixed`: of this route), if one was measured.
    pub min_rtt: Option<Duration>,
    /// Bytes that may be in flight, the ceiling considered.
    pub window_bytes: u64,
    /// Bytes that were declared lost.
    pub lost_bytes: u64,
    /// Bytes that were acknowledged.
    pub acked_bytes: u64,
    /// Of those, what was acknowledged while there was room in the window and nothing more that might be sent.
    pub starved_bytes: u64,
    /// Share of packets that the path loses by chance, in millionths.
    pub chance_loss_ppm: u32,
    /// The ceiling in force, in bytes a second.
    pub limit_bytes_per_second: Option<u64>,
}

/// How the window is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Method {
    Auto,
    Cubic,
    Fixed { bytes_per_second: u64 },
}

/// Makes controllers of one method under one ceiling.
#[derive(Debug)]
pub(crate) struct Limited {
    pub(crate) method: Method,
    pub(crate) limit: RateLimit,
    /// IP and UDP headers of a datagram to the peer.
    pub(crate) header_bytes: u64,
    pub(crate) siblings: Siblings,
    /// Where a connection begins with what the one before it learned.
    pub(crate) memory: Option<PathMemory>,
}

impl ControllerFactory for Limited {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        let inner = match self.method {
            // Two connections that begin together must not probe together.
            Method::Auto => {
                let seed = RandomState::new().hash_one(0u8);
                let known = self.memory.as_ref().and_then(|memory| memory.recall(now));
                Inner::Auto(Box::new(Flow::new(now, current_mtu, seed, known)))
            }
            Method::Cubic => {
                let cubic = Arc::new(CubicConfig::default());
                Inner::Cubic(cubic.build(now, current_mtu))
            }
            Method::Fixed { bytes_per_second } => {
                Inner::Fixed(Fixed::new(bytes_per_second, current_mtu))
            }
        };
        let ceiling = Ceiling::new(self.limit.clone(), current_mtu.into(), self.header_bytes);
        let adapter = Adapter {
            inner,
            ceiling,
            limit: self.limit.clone(),
            siblings: self.siblings.clone(),
            memory: self.memory.clone(),
            mtu: current_mtu,
            lost_bytes: 0,
            acked_bytes: 0,
            starved_bytes: 0,
            in_flight_bytes: 0,
            gauge: Arc::default(),
            knocks: Arc::default(),
            knock_sent: None,
        };
        adapter.gauge.store(adapter.allowed_bytes(), Ordering::Relaxed);
        Box::new(adapter)
    }
}

/// Where the controller of `connection` keeps the bytes that may be in flight, up to date. What quinn's own
/// statistics call so is what its pacer was told last. `None` when it is none of ours.
pub(crate) fn window_gauge(connection: &quinn::Connection) -> Option<Arc<AtomicU64>> {
    let adapter = connection.congestion_state().into_any().downcast::<Adapter>().ok()?;
    Some(Arc::clone(&adapter.gauge))
}

/// What the controller of `connection` knows. `None` when it is none of ours.
pub(crate) fn stats(connection: &quinn::Connection) -> Option<CongestionStats> {
    let adapter = connection.congestion_state().into_any().downcast::<Adapter>().ok()?;
    Some(adapter.stats())
}

/// Whether a knock at `connection` was not answered yet.
pub(crate) fn is_knocking(connection: &quinn::Connection) -> bool {
    let adapter = connection.congestion_state().into_any().downcast::<Adapter>();
    adapter.is_ok_and(|adapter| adapter.knocks.load(Ordering::Relaxed) > 0)
}

/// Lets a few packets of `connection` out beyond its window, until the next acknowledgement.
pub(crate) fn knock(connection: &quinn::Connection) {
    if let Ok(adapter) = connection.congestion_state().into_any().downcast::<Adapter>() {
        adapter.knocks.fetch_add(1, Ordering::Relaxed);
    }
}

enum Inner {
    Auto(Box<Flow>),
    Cubic(Box<dyn Controller>),
    Fixed(Fixed),
}

struct Adapter {
    inner: Inner,
    ceiling: Ceiling,
    limit: RateLimit,
    siblings: Siblings,
    memory: Option<PathMemory>,
    mtu: u16,
    lost_bytes: u64,
    acked_bytes: u64,
    starved_bytes: u64,
    /// What was under way when the peer was last heard, and what was sent since, before any knock.
    in_flight_bytes: u64,
    /// Bytes that may be in flight, for who has no time to ask; shared with the clones.
    gauge: Arc<AtomicU64>,
    /// Knocks that were not answered yet; shared with the clones that are made of this.
    knocks: Arc<AtomicU32>,
    /// When the first packet after them was sent. A peer that knocks itself acknowledges first what it
    /// had received before the dark: that is no answer.
    knock_sent: Option<Instant>,
}

impl Adapter {
    fn inner_window(&self) -> u64 {
        match &self.inner {
            Inner::Auto(flow) => flow.window(),
            Inner::Cubic(cubic) => cubic.window(),
            Inner::Fixed(fixed) => fixed.window(),
        }
    }

    fn allowed_bytes(&self) -> u64 {
        self.ceiling.lower(self.inner_window())
    }

    /// A sender held back by the ceiling says as little about the path as an idle one.
    fn is_capped(&self) -> bool {
        let window = self.inner_window();
        self.ceiling.lower(window) < window
    }

    fn stats(&self) -> CongestionStats {
        let (state, rate, min_rtt, chance) = match &self.inner {
            Inner::Auto(flow) => {
                let chance = flow.loss.share();
                (flow.phase.name(), flow.rate() as u64, flow.min_rtt.get(), chance)
            }
            Inner::Cubic(_) => ("cubic", 0, None, 0.0),
            Inner::Fixed(fixed) => ("fixed", fixed.bytes_per_second(), fixed.min_rtt(), 0.0),
        };
        CongestionStats {
            state,
            bandwidth_bytes_per_second: rate,
            min_rtt,
            window_bytes: self.allowed_bytes(),
            lost_bytes: self.lost_bytes,
            acked_bytes: self.acked_bytes,
            starved_bytes: self.starved_bytes,
            chance_loss_ppm: (chance * 1e6) as u32,
            limit_bytes_per_second: self.limit.get(),
        }
    }
}

impl Controller for Adapter {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.ceiling.on_sent(now, bytes);
        if self.knocks.load(Ordering::Relaxed) == 0 {
            self.in_flight_bytes += bytes;
        } else {
            self.knock_sent.get_or_insert(now);
        }
        match &mut self.inner {
            Inner::Auto(flow) => flow.on_sent(now, bytes),
            Inner::Cubic(cubic) => cubic.on_sent(now, bytes, last_packet_number),
            Inner::Fixed(_) => {}
        }
    }

    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        app_limited: bool,
        rtt: &RttEstimator,
    ) {
        if self.knock_sent.is_some_and(|knock_sent| sent >= knock_sent) {
            self.knocks.store(0, Ordering::Relaxed);
            self.knock_sent = None;
        }
        self.ceiling.on_ack(now, rtt.get());
        self.acked_bytes += bytes;
        self.starved_bytes += if app_limited { bytes } else { 0 };
        let limited = app_limited || self.is_capped();
        match &mut self.inner {
            Inner::Auto(flow) => flow.on_ack(now, sent, bytes, rtt.get()),
            Inner::Cubic(cubic) => cubic.on_ack(now, sent, bytes, limited, rtt),
            Inner::Fixed(fixed) => fixed.on_ack(now, sent, limited),
        }
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        app_limited: bool,
        largest_packet_num_acked: Option<u64>,
    ) {
        self.in_flight_bytes = in_flight;
        // It has what the knocks before let out in it.
        let _ = self
            .knocks
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |knocks| (knocks > 1).then_some(1));
        let limited = app_limited || self.is_capped();
        match &mut self.inner {
            Inner::Auto(flow) => {
                flow.set_siblings(self.siblings.count());
                flow.on_end_acks(now, in_flight, limited);
                if let (Some(memory), Some(path)) = (&self.memory, flow.learned()) {
                    memory.keep(path);
                }
            }
            Inner::Cubic(cubic) => {
                cubic.on_end_acks(now, in_flight, limited, largest_packet_num_acked);
            }
            Inner::Fixed(_) => {}
        }
        self.gauge.store(self.allowed_bytes(), Ordering::Relaxed);
    }

    fn on_congestion_event(
        &mut self,
        now: Instant,
        sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        self.lost_bytes += lost_bytes;
        match &mut self.inner {
            Inner::Auto(flow) => flow.on_loss(now, sent, lost_bytes, is_persistent_congestion),
            Inner::Cubic(cubic) => {
                cubic.on_congestion_event(now, sent, is_persistent_congestion, lost_bytes);
            }
            Inner::Fixed(_) => {}
        }
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.mtu = new_mtu;
        self.ceiling.on_mtu(new_mtu.into());
        match &mut self.inner {
            Inner::Auto(flow) => flow.on_mtu(new_mtu),
            Inner::Cubic(cubic) => cubic.on_mtu_update(new_mtu),
            Inner::Fixed(fixed) => fixed.on_mtu(new_mtu),
        }
    }

    fn window(&self) -> u64 {
        let window = match &self.inner {
            Inner::Auto(flow) if !self.is_capped() => flow.paced_window(),
            _ => self.allowed_bytes(),
        };
        match self.knocks.load(Ordering::Relaxed) {
            0 => window,
            // The window may have shrunk below what is under way, or lost, since that was sent.
            knocks => {
                let packets = u64::from(knocks.saturating_mul(KNOCK_PACKETS));
                window.max(self.in_flight_bytes) + packets * u64::from(self.mtu)
            }
        }
    }

    fn metrics(&self) -> ControllerMetrics {
        let mut metrics = ControllerMetrics::default();
        metrics.congestion_window = self.allowed_bytes();
        if let Inner::Auto(flow) = &self.inner {
            metrics.pacing_rate = Some(flow.rate() as u64 * 8);
        }
        metrics
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        let inner = match &self.inner {
            Inner::Auto(flow) => Inner::Auto(flow.clone()),
            Inner::Cubic(cubic) => Inner::Cubic(cubic.clone_box()),
            Inner::Fixed(fixed) => Inner::Fixed(fixed.clone()),
        };
        Box::new(Self {
            inner,
            ceiling: self.ceiling.clone(),
            limit: self.limit.clone(),
            siblings: self.siblings.clone(),
            memory: self.memory.clone(),
            mtu: self.mtu,
            lost_bytes: self.lost_bytes,
            acked_bytes: self.acked_bytes,
            starved_bytes: self.starved_bytes,
            in_flight_bytes: self.in_flight_bytes,
            gauge: Arc::clone(&self.gauge),
            knocks: Arc::clone(&self.knocks),
            knock_sent: self.knock_sent,
        })
    }

    fn initial_window(&self) -> u64 {
        (WINDOW_PACKETS_INITIAL * f64::from(self.mtu)) as u64
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
