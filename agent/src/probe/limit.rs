//! What keeps the rate to the target from being higher.

use serde::Serialize;

/// An end that takes so much of a core has none to spare, in percent.
const CPU_PERCENT_BUSY: u64 = 90;

/// A flood for which the windows were closed for more of its bytes than this was held up by them; on a full line
/// they are for hardly any.
const STARVED_SHARE_MAX: f64 = 0.2;

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
    /// The share of what was acknowledged that was so while the path would have taken more and the windows let no
    /// more out; 0 over TCP, where the kernel sizes them.
    pub(super) starved_share: f64,
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
        if measured.dropped_datagrams > 0 {
            Self::SocketBuffer
        } else if measured.cpu_percent >= CPU_PERCENT_BUSY {
            Self::Cpu
        } else if (measured.disk_bytes_per_second as f64) < rate {
            Self::Disk
        } else if measured.starved_share > STARVED_SHARE_MAX {
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
                "the transport's window: the line would take more than it lets out; raise link_window at both ends"
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
    use super::{Limit, Measured};

    /// An operator would buy a line where a setting is wrong, or tune hosts where the line is full.
    #[test]
    fn every_limit_is_told_by_what_was_measured() {
        let line = Measured {
            up_bytes_per_second: 50e6,
            starved_share: 0.1,
            disk_bytes_per_second: 400_000_000,
            dropped_datagrams: 0,
            cpu_percent: 40,
        };
        let long = Measured { starved_share: 0.9, ..line };
        let slow_disk = Measured { disk_bytes_per_second: 49_999_999, ..long };
        let busy = Measured { cpu_percent: 90, ..slow_disk };
        let dropping = Measured { dropped_datagrams: 1, ..busy };
        let table = [
            (Limit::Link, line),
            (Limit::Link, Measured { cpu_percent: 89, ..line }),
            (Limit::Link, Measured { disk_bytes_per_second: 50_000_000, ..line }),
            (Limit::Link, Measured { starved_share: 0.19, ..line }),
            (Limit::Window, Measured { starved_share: 0.21, ..line }),
            (Limit::Window, long),
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
