//! What one round trip brought.

use std::time::Duration;

use crate::quic::congestion::delivery::Sample;
use crate::quic::congestion::pace::HELD_BACK;

/// A round under way: it ends when a packet that left after its beginning is acknowledged.
#[derive(Debug, Clone)]
pub(super) struct Round {
    /// The round ends with a packet that left when at least this much had been delivered.
    pub(super) ends_at_bytes: u64,
    /// Highest delivery rate, in bytes a second.
    pub(super) rate: f64,
    /// The newest sample's delivery rate, in bytes a second.
    pub(super) last_rate: f64,
    pub(super) rtt_min: Duration,
    pub(super) rtt_samples: u32,
    pub(super) rtt_max: Duration,
    pub(super) lost_bytes: f64,
    /// What was in flight when the newest lost packet left.
    pub(super) in_flight_at_loss: Option<f64>,
    /// Most that was in flight, as a share of the window.
    pub(super) fullest: f64,
    rtt_sum: Duration,
    acked_bytes: f64,
    app_limited: bool,
}

/// A round that has ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct RoundEnd {
    /// Highest delivery rate, in bytes a second.
    pub(super) rate: f64,
    /// Delivery rate over just this round, in bytes a second: that of its last sample.
    pub(super) last_rate: f64,
    pub(super) rtt_min: Duration,
    pub(super) rtt_mean: Duration,
    pub(super) rtt_max: Duration,
    pub(super) lost_bytes: f64,
    /// Acknowledged and lost.
    pub(super) total_bytes: f64,
    pub(super) in_flight_at_loss: Option<f64>,
    /// Most that was in flight, as a share of the window.
    pub(super) fullest: f64,
    pub(super) app_limited: bool,
}

impl RoundEnd {
    /// Whether it was the pacer that kept it from more: there was more to send, and room in the window.
    pub(super) fn is_held_back(&self) -> bool {
        !self.app_limited && self.fullest < HELD_BACK
    }
}

impl Round {
    pub(super) fn new(ends_at_bytes: u64) -> Self {
        Self {
            ends_at_bytes,
            rate: 0.0,
            last_rate: 0.0,
            rtt_min: Duration::MAX,
            rtt_samples: 0,
            rtt_max: Duration::ZERO,
            lost_bytes: 0.0,
            in_flight_at_loss: None,
            fullest: 0.0,
            rtt_sum: Duration::ZERO,
            acked_bytes: 0.0,
            app_limited: false,
        }
    }

    pub(super) fn add(&mut self, sample: &Sample) {
        self.last_rate = sample.rate;
        self.rtt_min = self.rtt_min.min(sample.rtt);
        self.rtt_max = self.rtt_max.max(sample.rtt);
        self.rtt_sum += sample.rtt;
        self.rtt_samples += 1;
        self.acked_bytes += sample.acked_bytes as f64;
        self.app_limited |= sample.app_limited;
    }

    /// Ends the round and begins the next.
    pub(super) fn finish(&mut self, delivered_bytes: u64) -> RoundEnd {
        let done = std::mem::replace(self, Self::new(delivered_bytes));
        RoundEnd {
            rate: done.rate,
            last_rate: done.last_rate,
            rtt_min: done.rtt_min,
            rtt_mean: done.rtt_sum / done.rtt_samples.max(1),
            rtt_max: done.rtt_max,
            lost_bytes: done.lost_bytes,
            total_bytes: done.acked_bytes + done.lost_bytes,
            in_flight_at_loss: done.in_flight_at_loss,
            fullest: done.fullest,
            app_limited: done.app_limited,
        }
    }
}
