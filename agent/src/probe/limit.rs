//! What keeps the rate to the target from being higher.

use serde::Serialize;

/// An end that takes so much of a core has none to spare, in percent.
const CPU_PERCENT_BUSY: u64 = 90;

/// What limits the rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Limit {
    /// The line itself.
    Link,
    /// The transport's window is too small for bandwidth × delay.
    Window,
    /// A processor, here or there.
    Cpu,
    /// The target's store is slower than the line.
    Disk,
    /// The target's kernel drops datagrams: its socket buffer is too small.
    SocketBuffer,
}

/// What the verdict is made of.
#[derive(Debug, Clone, Copy)]
pub(super) struct Measured {
    /// Payload bytes a second to the target.
    pub(super) up_bytes_per_second: f64,
    /// The round-trip time meanwhile, in seconds.
    pub(super) rtt_seconds: f64,
    /// Bandwidth × delay up to which the transport fills a link whatever it loses, in bytes; `None`
    /// over TCP, where the kernel sizes the windows.
    pub(super) filled_bytes: Option<u64>,
    /// Bytes a second that the target's store takes durably.
    pub(super) disk_bytes_per_second: u64,
    /// Datagrams that the target's kernel dropped meanwhile.
    pub(super) dropped_datagrams: u64,
    /// What the busier end took of a core, in percent.
    pub(super) cpu_percent: u64,
}

impl Limit {
    /// The verdict. What is found at an end goes before the line, which then carries less than it
    /// could.
    pub(super) fn of(measured: &Measured) -> Self {
        let rate = measured.up_bytes_per_second;
        // A batch keeps its place in the window until its last byte is acknowledged, repairs included:
        // with about a fifth of the window on its way, the rest may be held by what waits for that.
        let on_its_way_bytes = rate * measured.rtt_seconds;
        let holds = |filled_bytes: u64| on_its_way_bytes > filled_bytes as f64;
        if measured.dropped_datagrams > 0 {
            Self::SocketBuffer
        } else if measured.cpu_percent >= CPU_PERCENT_BUSY {
            Self::Cpu
        } else if (measured.disk_bytes_per_second as f64) < rate {
            Self::Disk
        } else if measured.filled_bytes.is_some_and(holds) {
            Self::Window
        } else {
            Self::Link
        }
    }

    /// What it is, and what can be done about it.
    pub fn sentence(self) -> &'static str {
        match self {
            Self::Link => "the line itself: this is what it carries",
            Self::Window => {
                "the transport's window, it seems: bandwidth x delay is more than a fifth of it; raise link_window at both ends"
            }
            Self::Cpu => "a processor: one end encrypts or copies as fast as it can",
            Self::Disk => "the target's store: it takes less than the line carries",
            Self::SocketBuffer => {
                "the target's socket buffer: raise net.core.rmem_max there and restart it"
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use backhaul_proto::quic::TransportOptions;

    use super::{Limit, Measured};

    /// An operator would buy a line where a setting is wrong, or tune hosts where the line is full.
    #[test]
    fn every_limit_is_told_by_what_was_measured() {
        let line = Measured {
            up_bytes_per_second: 50e6,
            rtt_seconds: 0.04,
            filled_bytes: Some(TransportOptions::default().filled_bytes()),
            disk_bytes_per_second: 400_000_000,
            dropped_datagrams: 0,
            cpu_percent: 40,
        };
        // 25 MB on their way, of a window of 48 MiB.
        let long = Measured { rtt_seconds: 0.5, ..line };
        let slow_disk = Measured { disk_bytes_per_second: 49_999_999, ..long };
        let busy = Measured { cpu_percent: 90, ..slow_disk };
        let dropping = Measured { dropped_datagrams: 1, ..busy };
        let table = [
            (Limit::Link, line),
            (Limit::Link, Measured { cpu_percent: 89, ..line }),
            (Limit::Link, Measured { disk_bytes_per_second: 50_000_000, ..line }),
            // Just below a fifth of the window, and just above.
            (Limit::Link, Measured { rtt_seconds: 0.19, ..line }),
            (Limit::Window, Measured { rtt_seconds: 0.21, ..line }),
            (Limit::Window, long),
            (Limit::Link, Measured { filled_bytes: None, ..long }),
            (Limit::Disk, Measured { disk_bytes_per_second: 49_999_999, ..line }),
            (Limit::Cpu, Measured { cpu_percent: 90, ..line }),
            (Limit::SocketBuffer, Measured { dropped_datagrams: 1, ..line }),
            // Several at a time: the one whose mend helps first.
            (Limit::Disk, slow_disk),
            (Limit::Cpu, busy),
            (Limit::SocketBuffer, dropping),
        ];
        for (limit, measured) in table {
            assert_eq!(Limit::of(&measured), limit, "{measured:?}");
        }
    }
}
