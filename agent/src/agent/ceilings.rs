//! The ceilings, as the clock says and as they are kept.
//!
//! A ceiling is counted in bytes of IP packets from the agent to the target: batches with all their
//! headers and what is sent again.
//!
//! What was handed to the transport while there was no ceiling is not called back: when the first one comes
//! in the middle of a sync, as much as the target's window admits goes out at the link's own rate. It is a
//! debt: nothing more is sent until the ceiling has paid for it, for twenty seconds at most, but the markers
//! of points. What has left and is not durable is no debt. What has not left is counted for all machines
//! together, and a machine's debt is never more than that. The link's over QUIC alone holds at once, where
//! it has one connection.

use std::time::Instant;

use backhaul_daemon::bandwidth::{BandwidthLimits, Rate, Timestamp};
use backhaul_proto::link::Connection;
use backhaul_proto::quic::RateLimit;
use backhaul_proto::session::{BatchLimit, Due, LinkCost, Release};

use super::Agent;

impl Agent {
    /// The ceilings are what the configuration says at `clock`.
    pub(super) fn apply_ceilings(&mut self, clock: Timestamp) {
        let connection = self.link.as_ref().map(|link| &link.connection);
        if let Some(connection) = connection {
            let stats = connection.stats();
            self.ceiling.handle_counts(stats.link_bytes, stats.content_bytes);
        }
        let keeps = |rate| connection.is_none_or(|connection| connection.keeps_ceiling(rate));
        let now = Instant::now();
        let unsent_bytes = connection.map_or(0, Connection::unsent_bytes);
        self.ceiling.follow(now, &self.config.limit, clock, unsent_bytes, keeps);
        for machine in &mut self.machines {
            let rate = rate(&machine.config.limit, clock);
            let its_bytes = machine.sender.under_way_bytes().min(unsent_bytes);
            machine.limit.set(now, rate, self.ceiling.cost.of(its_bytes));
            let most = machine.limit.batch_bytes_max().min(self.ceiling.batch_bytes_max());
            machine.capture.order().set_batch_bytes_max(most);
        }
    }

    /// Nobody waits for what was under way before.
    pub(super) fn forgive_debts(&mut self) {
        self.ceiling.forgive_debt();
        for machine in &mut self.machines {
            machine.limit.forgive_debt();
        }
    }
}

/// The ceiling that `rules` say at `clock`, in bytes a second.
fn rate(rules: &BandwidthLimits, clock: Timestamp) -> Option<u64> {
    rules.at(clock).map(Rate::bytes_per_second)
}

/// The ceiling of all machines together, and what batches cost under it and under the machines' own.
#[derive(Debug)]
pub(super) struct LinkCeiling {
    /// As QUIC keeps it, packet by packet.
    transport: RateLimit,
    /// The same, batch by batch. Where the transport keeps it, this only holds back what would wait
    /// inside the transport, and counts no headers, so that the exact one is the lower one.
    batches: BatchLimit,
    transport_keeps: bool,
    cost: LinkCost,
}

impl Default for LinkCeiling {
    fn default() -> Self {
        Self {
            transport: RateLimit::default(),
            batches: BatchLimit::unlimited(),
            transport_keeps: true,
            cost: LinkCost::default(),
        }
    }
}

impl LinkCeiling {
    /// For the transport to keep.
    pub(super) fn transport(&self) -> RateLimit {
        self.transport.clone()
    }

    /// Looks at the connection's counters; see [`LinkCost::handle_counts`].
    fn handle_counts(&mut self, link_bytes: u64, content_bytes: u64) {
        self.cost.handle_counts(link_bytes, content_bytes);
    }

    /// It is what `rules` say at `clock`; so many bytes of batches have not left, and `keeps` tells whether
    /// the transport keeps the ceiling by itself, for those too.
    fn follow(
        &mut self,
        now: Instant,
        rules: &BandwidthLimits,
        clock: Timestamp,
        unsent_bytes: u64,
        keeps: impl FnOnce(u64) -> bool,
    ) {
        let rate = rate(rules, clock);
        self.transport.set(rate);
        self.transport_keeps = rate.is_none_or(keeps);
        let let_out_bytes = if self.transport_keeps { 0 } else { self.cost.of(unsent_bytes) };
        self.batches.set(now, rate, let_out_bytes);
    }

    /// See [`BatchLimit::forgive_debt`].
    pub(super) fn forgive_debt(&mut self) {
        self.batches.forgive_debt();
    }

    /// What a batch is to have of data at most, in bytes.
    fn batch_bytes_max(&self) -> u32 {
        match self.transport_keeps {
            true => BatchLimit::unlimited().batch_bytes_max(),
            false => self.batches.batch_bytes_max(),
        }
    }

    /// Whether something may be sent now; if not, when.
    pub(super) fn poll_ready(&self, now: Instant) -> Result<(), Instant> {
        self.batches.poll_ready(now)
    }

    /// Nothing waits to be sent.
    pub(super) fn handle_idle(&mut self) {
        self.batches.handle_idle();
    }

    /// A batch of so many bytes is sent, under the ceiling of its `machine` too, when the answer says.
    pub(super) fn handle_sent(
        &mut self,
        now: Instant,
        wire_bytes: usize,
        machine: &mut BatchLimit,
    ) -> Due {
        let cost_bytes = self.cost.of(wire_bytes as u64);
        let machine = machine.handle_sent(now, cost_bytes);
        if self.transport_keeps {
            self.batches.handle_sent(now, wire_bytes as u64);
            return Due { machine, link: Release::at_once(now) };
        }
        Due { machine, link: self.batches.handle_sent(now, cost_bytes) }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use backhaul_daemon::bandwidth::{BandwidthLimits, Timestamp};
    use backhaul_proto::session::BatchLimit;

    use super::{LinkCeiling, rate};
    use crate::agent::TICK;

    const MBIT: u64 = 125_000;
    const BATCH_BYTES: usize = 64 << 10;

    fn rules(rules: &[&str]) -> BandwidthLimits {
        BandwidthLimits::parse(rules).unwrap()
    }

    /// Sends all that a link's and a machine's ceiling allow for so many seconds from `clock` on, while
    /// both follow the clock with every tick; returns the bits that the link was given in each second.
    fn send(
        link: &BandwidthLimits,
        machine: &BandwidthLimits,
        clock: &str,
        seconds: u64,
    ) -> Vec<u64> {
        let (begin, start): (Timestamp, _) = (clock.parse().unwrap(), Instant::now());
        let (mut ceiling, mut limit) = (LinkCeiling::default(), BatchLimit::unlimited());
        let mut sent = vec![0; seconds as usize];
        let (mut now, mut next_tick) = (start, start);
        while now < start + Duration::from_secs(seconds) {
            if now >= next_tick {
                // Over TCP.
                let clock = begin + (now - start);
                ceiling.follow(now, link, clock, 0, |_| false);
                limit.set(now, rate(machine, clock), 0);
                next_tick += TICK;
            }
            match ceiling.poll_ready(now).and(limit.poll_ready(now)) {
                Ok(()) => {
                    ceiling.handle_sent(now, BATCH_BYTES, &mut limit);
                    let bits = ceiling.cost.of(BATCH_BYTES as u64) * 8;
                    sent[(now - start).as_secs() as usize] += bits;
                }
                Err(at) => now = at.min(next_tick),
            }
        }
        sent
    }

    /// The rate in Mbit/s in the ten seconds before and after the middle.
    fn around(sent: &[u64]) -> [f64; 2] {
        let middle = sent.len() / 2;
        [&sent[middle - 10..middle], &sent[middle..]]
            .map(|part| part.iter().sum::<u64>() as f64 / 1e7)
    }

    fn is_near(rate: f64, wanted: f64) -> bool {
        (rate / wanted - 1.0).abs() < 0.03
    }

    /// The schedule was tested as a table only: what runs has to change with the clock, in winter, in
    /// summer, and on the mornings after the hour was lost and gained.
    #[test]
    fn a_running_ceiling_changes_at_eight_in_berlin() {
        let day = rules(&["5 Mbit/s daily 08:00-18:00 Europe/Berlin", "20 Mbit/s"]);
        let none = BandwidthLimits::default();
        for (before, rates) in [
            ("2026-01-05T06:59:50Z", [20.0, 5.0]),
            ("2026-01-05T16:59:50Z", [5.0, 20.0]),
            ("2026-07-06T05:59:50Z", [20.0, 5.0]),
            ("2026-03-28T06:59:50Z", [20.0, 5.0]),
            ("2026-03-29T05:59:50Z", [20.0, 5.0]),
            ("2026-10-24T05:59:50Z", [20.0, 5.0]),
            ("2026-10-25T06:59:50Z", [20.0, 5.0]),
        ] {
            for (link, machine) in [(&day, &none), (&none, &day)] {
                let seen = around(&send(link, machine, before, 20));
                let near = seen.iter().zip(rates).all(|(rate, wanted)| is_near(*rate, wanted));
                assert!(near, "{before}: {seen:?} Mbit/s instead of {rates:?}");
            }
        }
    }

    #[test]
    fn the_lower_of_both_ceilings_holds() {
        let (low, high) = (rules(&["5 Mbit/s"]), rules(&["20 Mbit/s"]));
        for (link, machine) in [(&low, &high), (&high, &low)] {
            let [_, rate] = around(&send(link, machine, "2026-01-05T12:00:00Z", 20));
            assert!(is_near(rate, 5.0), "{rate}");
        }
    }

    /// Over QUIC on a long path the transport's own ceiling is exact; small batches would only cost
    /// compression there.
    #[test]
    fn where_the_transport_keeps_the_ceiling_batches_stay_large_and_headers_are_its_own() {
        let now = Instant::now();
        let mut machine = BatchLimit::unlimited();
        for (keeps, batch_bytes_max, bytes) in
            [(true, 1 << 20, 1_000_000), (false, 64 << 10, 1_050_000)]
        {
            let mut ceiling = LinkCeiling::default();
            let rules = rules(&["8 Mbit/s"]);
            ceiling.follow(now, &rules, Timestamp::UNIX_EPOCH, 0, |_| keeps);
            assert_eq!(ceiling.batch_bytes_max(), batch_bytes_max);
            assert_eq!(ceiling.transport().get(), Some(8 * MBIT));
            ceiling.handle_sent(now, 1_000_000, &mut machine);
            let paid = ceiling.poll_ready(now).unwrap_err() - now;
            assert_eq!((paid.as_secs_f64() * 1e6).round() as u64, bytes);
        }
    }

    /// Over TCP 41 MB went out at the line's rate after the link's first ceiling had come.
    #[test]
    fn what_is_under_way_is_a_debt_where_nothing_holds_it_back() {
        let (now, clock) = (Instant::now(), Timestamp::UNIX_EPOCH);
        for (keeps, debt) in [(false, Err(10_500)), (true, Ok(()))] {
            let mut ceiling = LinkCeiling::default();
            ceiling.follow(now, &BandwidthLimits::default(), clock, 10_000_000, |_| keeps);
            assert_eq!(ceiling.poll_ready(now), Ok(()), "there is no ceiling");
            ceiling.follow(now, &rules(&["8 Mbit/s"]), clock, 10_000_000, |_| keeps);
            assert_eq!(ceiling.poll_ready(now).map_err(|at| (at - now).as_millis()), debt);
        }
    }
}
