//! How fast the network delivers: accounting for every packet between `on_sent` and `on_ack`.
//!
//! The estimator of draft-ietf-ccwg-bbr, section 4.1, at quinn's granularity. quinn names a packet
//! by the instant at which it was sent, and a burst shares its instant; so a [`Record`] stands for
//! a burst, and an acknowledgement finds its record by that instant.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Most bursts that are remembered. At 1 Gbit/s and a burst per acknowledgement, this is half a
/// second; what falls out still counts as delivered, it only gives no sample.
const RECORDS_MAX: usize = 16_384;

/// The state of the connection when a burst left.
#[derive(Debug, Clone, Copy)]
struct Record {
    sent: Instant,
    /// Bytes of the burst that nothing was heard of.
    open_bytes: u64,
    delivered_bytes: u64,
    delivered_at: Instant,
    first_sent: Instant,
    in_flight_bytes: u64,
    app_limited: bool,
}

/// What one batch of acknowledgements says about the network.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sample {
    /// Bytes a second, over the flight of the newest packet that was acknowledged.
    pub(super) rate: f64,
    /// The time over which `rate` was measured.
    pub(super) interval: Duration,
    /// Round-trip time of the newest packet.
    pub(super) rtt: Duration,
    /// [`Delivery::delivered_bytes`] when the newest packet left: tells rounds apart.
    pub(super) prior_delivered_bytes: u64,
    /// Bytes this batch acknowledged.
    pub(super) acked_bytes: u64,
    /// There was not always something to send, so the rate may be too low.
    pub(super) app_limited: bool,
}

/// The estimator.
#[derive(Debug, Clone)]
pub(super) struct Delivery {
    records: VecDeque<Record>,
    delivered_bytes: u64,
    delivered_at: Instant,
    first_sent: Instant,
    in_flight_bytes: u64,
    /// Samples are limited by the application until this much was delivered.
    app_limited_until_bytes: Option<u64>,
    newest: Option<Record>,
    batch_bytes: u64,
}

impl Delivery {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            records: VecDeque::new(),
            delivered_bytes: 0,
            delivered_at: now,
            first_sent: now,
            in_flight_bytes: 0,
            app_limited_until_bytes: None,
            newest: None,
            batch_bytes: 0,
        }
    }

    /// Bytes that were acknowledged so far.
    pub(super) fn delivered_bytes(&self) -> u64 {
        self.delivered_bytes
    }

    /// Bytes under way.
    pub(super) fn in_flight_bytes(&self) -> u64 {
        self.in_flight_bytes
    }

    /// What was under way when the burst of `sent` had left.
    pub(super) fn in_flight_at(&self, sent: Instant) -> Option<u64> {
        self.find(sent).map(|index| self.records[index].in_flight_bytes)
    }

    pub(super) fn on_sent(&mut self, now: Instant, bytes: u64) {
        if self.in_flight_bytes == 0 {
            self.first_sent = now;
            self.delivered_at = now;
        }
        self.in_flight_bytes += bytes;
        if let Some(last) = self.records.back_mut().filter(|last| last.sent >= now) {
            last.open_bytes += bytes;
            last.in_flight_bytes = self.in_flight_bytes;
            return;
        }
        if self.records.len() == RECORDS_MAX {
            self.records.pop_front();
        }
        self.records.push_back(Record {
            sent: now,
            open_bytes: bytes,
            delivered_bytes: self.delivered_bytes,
            delivered_at: self.delivered_at,
            first_sent: self.first_sent,
            in_flight_bytes: self.in_flight_bytes,
            app_limited: self.app_limited_until_bytes.is_some(),
        });
    }

    pub(super) fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64) {
        self.delivered_bytes += bytes;
        self.delivered_at = now;
        self.batch_bytes += bytes;
        self.in_flight_bytes = self.in_flight_bytes.saturating_sub(bytes);
        let Some(index) = self.find(sent) else { return };
        let record = &mut self.records[index];
        record.open_bytes = record.open_bytes.saturating_sub(bytes);
        if self.newest.is_none_or(|newest| newest.sent <= sent) {
            self.newest = Some(*record);
            self.first_sent = self.first_sent.max(sent);
        }
    }

    pub(super) fn on_loss(&mut self, bytes: u64) {
        self.in_flight_bytes = self.in_flight_bytes.saturating_sub(bytes);
    }

    /// Ends a batch. `in_flight_bytes` is the transport's own count, which is right where ours
    /// drifts: packets that carry nothing but acknowledgements are sent, but never acknowledged.
    pub(super) fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight_bytes: u64,
        app_limited: bool,
        smoothed_rtt: Duration,
    ) -> Option<Sample> {
        self.in_flight_bytes = in_flight_bytes;
        if self.app_limited_until_bytes.is_some_and(|until| self.delivered_bytes > until) {
            self.app_limited_until_bytes = None;
        }
        if app_limited {
            self.app_limited_until_bytes = Some(self.delivered_bytes + in_flight_bytes);
        }
        let acked_bytes = std::mem::take(&mut self.batch_bytes);
        let newest = self.newest.take()?;
        self.forget(newest.sent, smoothed_rtt);
        let send_elapsed = newest.sent.saturating_duration_since(newest.first_sent);
        let ack_elapsed = now.saturating_duration_since(newest.delivered_at);
        let interval = send_elapsed.max(ack_elapsed);
        let delivered = self.delivered_bytes - newest.delivered_bytes;
        Some(Sample {
            rate: delivered as f64 / interval.as_secs_f64().max(1e-6),
            interval,
            rtt: now.saturating_duration_since(newest.sent),
            prior_delivered_bytes: newest.delivered_bytes,
            acked_bytes,
            app_limited: app_limited || newest.app_limited,
        })
    }

    fn find(&self, sent: Instant) -> Option<usize> {
        let index = self.records.partition_point(|record| record.sent < sent);
        self.records.get(index).filter(|record| record.sent == sent).map(|_| index)
    }

    /// Drops bursts that were answered, and those so much older than the newest answer that the
    /// transport has declared them lost.
    fn forget(&mut self, newest: Instant, smoothed_rtt: Duration) {
        let old =
            |record: &Record| newest.saturating_duration_since(record.sent) > 2 * smoothed_rtt;
        while self.records.front().is_some_and(|first| first.open_bytes == 0 || old(first)) {
            self.records.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{Delivery, RECORDS_MAX};

    const RTT: Duration = Duration::from_millis(50);

    /// Sends `bytes` every millisecond for `millis`, each acknowledged one round trip later.
    fn steady(delivery: &mut Delivery, start: Instant, millis: u32, bytes: u64) -> f64 {
        let mut rate = 0.0;
        for tick in 0..millis {
            let now = start + Duration::from_millis(tick.into());
            if let Some(sent) = now.checked_sub(RTT).filter(|sent| *sent >= start) {
                delivery.on_ack(now, sent, bytes);
                let in_flight = delivery.in_flight_bytes();
                let sample = delivery.on_end_acks(now, in_flight, false, RTT).unwrap();
                assert_eq!(sample.rtt, RTT);
                rate = sample.rate;
            }
            delivery.on_sent(now, bytes / 2);
            delivery.on_sent(now, bytes / 2);
        }
        rate
    }

    #[test]
    fn a_steady_flow_is_measured_exactly() {
        let start = Instant::now();
        let rate = steady(&mut Delivery::new(start), start, 500, 3000);
        assert!((rate / 3e6 - 1.0).abs() < 0.03, "{rate}");
    }

    #[test]
    fn compressed_acknowledgements_do_not_look_fast() {
        let start = Instant::now();
        let mut delivery = Delivery::new(start);
        steady(&mut delivery, start, 200, 3000);
        // The next 40 bursts are answered all at once, 40 ms late.
        let now = start + Duration::from_millis(239);
        for tick in 150..190 {
            delivery.on_ack(now, start + Duration::from_millis(tick), 3000);
        }
        let sample = delivery.on_end_acks(now, 0, false, RTT).unwrap();
        assert!(sample.rate < 3.2e6, "{}", sample.rate);
    }

    #[test]
    fn an_idle_application_marks_its_samples_for_a_round() {
        let start = Instant::now();
        let mut delivery = Delivery::new(start);
        delivery.on_sent(start, 1000);
        delivery.on_ack(start + RTT, start, 1000);
        assert!(delivery.on_end_acks(start + RTT, 0, true, RTT).unwrap().app_limited);
        let (second, third) = (start + 2 * RTT, start + 3 * RTT);
        delivery.on_sent(second, 1000);
        delivery.on_ack(third, second, 1000);
        assert!(delivery.on_end_acks(third, 0, false, RTT).unwrap().app_limited);
        delivery.on_sent(third, 1000);
        delivery.on_ack(third + RTT, third, 1000);
        assert!(!delivery.on_end_acks(third + RTT, 0, false, RTT).unwrap().app_limited);
    }

    #[test]
    fn memory_is_bounded_when_nothing_is_answered() {
        let start = Instant::now();
        let mut delivery = Delivery::new(start);
        for tick in 0..2 * RECORDS_MAX as u64 {
            delivery.on_sent(start + Duration::from_micros(tick), 1);
        }
        assert_eq!(delivery.records.len(), RECORDS_MAX);
        delivery.on_ack(start + RTT, start, 1);
        assert!(delivery.on_end_acks(start + RTT, 0, false, RTT).is_none());
    }
}
