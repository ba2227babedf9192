//! What an emulated link saw while something ran over it.

use std::time::{Duration, Instant};

use backhaul_lab::link::{DirectionStats, Link, LinkStats};

/// Counters of a link at moments, in their order.
#[derive(Debug, Clone, Default)]
pub struct Record(Vec<(f64, LinkStats)>);

impl Record {
    /// Reads the counters every `period` for `duration`, or until `enough` says so.
    pub async fn of(
        link: &Link,
        period: Duration,
        duration: Duration,
        mut enough: impl FnMut(&Self) -> bool,
    ) -> Self {
        let mut record = Self::default();
        let began = Instant::now();
        let mut ticks = tokio::time::interval(period);
        loop {
            ticks.tick().await;
            let at = began.elapsed();
            record.0.push((at.as_secs_f64(), link.stats()));
            if at >= duration || enough(&record) {
                return record;
            }
        }
    }

    /// What was added up to the end, and in how many seconds; nothing for fewer than two moments.
    pub fn whole(&self) -> Change {
        match (self.0.first(), self.0.last()) {
            (Some(first), Some(last)) => Change::between(first, last),
            _ => Change::default(),
        }
    }

    /// What was added in the last `seconds`; `None` when the record is shorter.
    pub fn last(&self, seconds: f64) -> Option<Change> {
        let last = self.0.last()?;
        let after = self.0.partition_point(|(at, _)| *at <= last.0 - seconds);
        Some(Change::between(self.0.get(after.checked_sub(1)?)?, last))
    }

    /// When the first packet came, in seconds from the start of the record: the moment before it was
    /// counted. `None` when none came.
    pub fn first_packet_seconds(&self) -> Option<f64> {
        let before = self.0.first()?.1.up.entered_packets;
        let after = self.0.iter().position(|(_, stats)| stats.up.entered_packets > before)?;
        Some(self.0[after - 1].0)
    }

    /// What was added in each window of so many seconds, from the start. A window that is not whole
    /// at the end is left out.
    pub fn windows(&self, seconds: f64) -> Vec<Change> {
        let Some((begin, _)) = self.0.first() else { return Vec::new() };
        let mut changes = Vec::new();
        let mut first = 0;
        for (index, (at, _)) in self.0.iter().enumerate() {
            // Counted from the start, so that late ticks do not add up; a tick that comes a little
            // early still closes its window.
            if at - begin >= seconds * (changes.len() as f64 + 0.999) {
                changes.push(Change::between(&self.0[first], &self.0[index]));
                first = index;
            }
        }
        changes
    }
}

/// What a link carried between two moments, from site A to site B.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Change {
    /// How long that took.
    pub seconds: f64,
    /// Bytes of IP packets that came to the link.
    pub entered_bytes: u64,
    /// Bytes of IP packets that came out.
    pub delivered_bytes: u64,
    /// Those of them that were TCP.
    pub tcp_bytes: u64,
    /// Share of the packets that found the queue full.
    pub queue_dropped: f64,
    /// How long a packet waited in the queue on average, in seconds.
    pub queue_seconds: f64,
}

impl Change {
    fn between(from: &(f64, LinkStats), to: &(f64, LinkStats)) -> Self {
        let (before, after): (&DirectionStats, &DirectionStats) = (&from.1.up, &to.1.up);
        let entered = after.entered_packets - before.entered_packets;
        let dropped = after.dropped_by_queue - before.dropped_by_queue;
        let waited = after.queue_wait_nanos_total - before.queue_wait_nanos_total;
        Self {
            seconds: to.0 - from.0,
            entered_bytes: after.entered_bytes - before.entered_bytes,
            delivered_bytes: after.delivered_bytes - before.delivered_bytes,
            tcp_bytes: to.1.up_tcp_bytes - from.1.up_tcp_bytes,
            queue_dropped: dropped as f64 / entered.max(1) as f64,
            queue_seconds: waited as f64 / (entered - dropped).max(1) as f64 * 1e-9,
        }
    }

    /// Delivered, in bits a second.
    pub fn delivered_bits_per_second(&self) -> f64 {
        self.delivered_bytes as f64 * 8.0 / self.seconds
    }

    /// Sent, whatever became of it, in bits a second.
    pub fn entered_bits_per_second(&self) -> f64 {
        self.entered_bytes as f64 * 8.0 / self.seconds
    }
}

#[cfg(test)]
mod tests {
    use super::Record;
    use backhaul_lab::link::LinkStats;

    /// A packet of 100 bytes every tenth of a second; every fourth is dropped by the queue, and the
    /// others wait 3 ms.
    fn record() -> Record {
        let at = |tick: u64| {
            let mut stats = LinkStats::default();
            stats.up.entered_packets = tick;
            stats.up.entered_bytes = tick * 100;
            stats.up.dropped_by_queue = tick / 4;
            stats.up.delivered_bytes = (tick - tick / 4) * 100;
            stats.up.queue_wait_nanos_total = (tick - tick / 4) * 3_000_000;
            (tick as f64 / 10.0, stats)
        };
        Record((0..=40).map(at).collect())
    }

    #[test]
    fn shares_rates_and_waits_are_those_of_the_packets() {
        let whole = record().whole();
        assert_eq!((whole.seconds, whole.entered_bytes, whole.delivered_bytes), (4.0, 4000, 3000));
        assert_eq!(whole.queue_dropped, 0.25);
        assert!((whole.queue_seconds - 0.003).abs() < 1e-9);
        assert_eq!(whole.delivered_bits_per_second(), 6000.0);
        assert_eq!(whole.entered_bits_per_second(), 8000.0);
    }

    #[test]
    fn windows_are_whole_and_do_not_overlap() {
        let windows = record().windows(1.5);
        assert_eq!(windows.len(), 2);
        assert!(windows.iter().all(|window| window.entered_bytes == 1500));
        let last = record().last(1.0).unwrap();
        assert_eq!(last.entered_bytes, 1000);
        assert!(record().last(5.0).is_none());
        assert_eq!(record().first_packet_seconds(), Some(0.0));
    }
}
