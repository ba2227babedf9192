//! What a byte of a batch costs on the link.

/// Until something was measured: a packet of 1,280 bytes spends about so much on headers, over QUIC
/// (UDP, QUIC and its seal) as over TCP (TCP and TLS).
const RATIO_ASSUMED: f64 = 1.05;

/// More is no overhead of batches but a link that carries next to none.
const RATIO_MAX: f64 = 2.0;

/// Content between two looks that says something of batches: heartbeats alone, in packets of their own,
/// are mostly headers.
const CONTENT_BYTES_MIN: u64 = 16 << 10;

/// Content that one measure is made of; at 1 % of loss it is off by half a percent, either way.
const MEASURED_BYTES: u64 = 1 << 20;

/// Bytes that the link is given for each byte of a batch: headers and what was lost and sent again
/// come on top. A ceiling counts in bytes of IP packets, as whoever sells or polices a line does.
#[derive(Debug, Clone)]
pub struct LinkCost {
    ratio: f64,
    /// Counters when they were looked at last: of the link, and of content.
    seen: (u64, u64),
    /// What was added to them since the last measure.
    gathered: (u64, u64),
}

impl Default for LinkCost {
    fn default() -> Self {
        Self { ratio: RATIO_ASSUMED, seen: (0, 0), gathered: (0, 0) }
    }
}

impl LinkCost {
    /// Looks at a connection's counters: bytes of IP packets that the link was given, and bytes of
    /// content in them, each once. Counters that went back are another connection's.
    pub fn handle_counts(&mut self, link_bytes: u64, content_bytes: u64) {
        let before = std::mem::replace(&mut self.seen, (link_bytes, content_bytes));
        let (Some(link), Some(content)) =
            (link_bytes.checked_sub(before.0), content_bytes.checked_sub(before.1))
        else {
            return;
        };
        if content < CONTENT_BYTES_MIN {
            return;
        }
        self.gathered = (self.gathered.0 + link, self.gathered.1 + content);
        if self.gathered.1 >= MEASURED_BYTES {
            let (link, content) = std::mem::take(&mut self.gathered);
            self.ratio = (link as f64 / content as f64).clamp(1.0, RATIO_MAX);
        }
    }

    /// What so many bytes of a batch cost on the link, in bytes.
    pub fn of(&self, bytes: u64) -> u64 {
        (bytes as f64 * self.ratio) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::LinkCost;

    /// Without headers, a ceiling was exceeded by 5 %, and by more over a link that loses packets.
    #[test]
    fn headers_and_repetitions_are_counted_as_they_are_measured() {
        let mut cost = LinkCost::default();
        assert_eq!(cost.of(1_000_000), 1_050_000, "assumed");
        let (mut link, mut content) = (0, 0);
        for (packets, lost, ratio) in [(10_000, 0, 1.048), (10_000, 300, 1.080), (10_000, 0, 1.048)]
        {
            for _ in 0..10 {
                link += packets / 10 * 1480;
                content += (packets - lost) / 10 * 1412;
                cost.handle_counts(link, content);
            }
            let measured = cost.of(1_000_000) as f64 / 1e6;
            assert!((measured - ratio).abs() < 0.002, "{lost} lost: {measured}");
        }
    }

    #[test]
    fn neither_heartbeats_nor_another_connection_are_a_measure_of_batches() {
        let mut cost = LinkCost::default();
        for second in 1..20_000 {
            cost.handle_counts(second * 400, second * 200);
        }
        assert_eq!(cost.of(100), 105);
        cost.handle_counts(1000, 500);
        cost.handle_counts(1000 + (2 << 20), 500 + (2 << 20));
        assert_eq!(cost.of(100), 100);
    }
}
