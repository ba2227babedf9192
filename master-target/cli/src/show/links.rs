//! How the links stand: what their transports know of the path, and the sockets under them.

use backhaul_api::Link;
use backhaul_proto::quic::TransportOptions;
use bytesize::ByteSize;
use comfy_table::{Cell, Color};

use super::Output;
use crate::print::say;

/// A line that loses more is ill, in percent.
const LOST_PERCENT_MAX: f64 = 2.0;

/// A cell, and whether it stands out because something is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Value {
    text: String,
    is_bad: bool,
}

impl Value {
    fn of(text: impl ToString) -> Self {
        Self { text: text.to_string(), is_bad: false }
    }

    fn judged(text: impl ToString, is_bad: bool) -> Self {
        Self { text: text.to_string(), is_bad }
    }
}

impl Output {
    pub(crate) fn links(&self, links: &[Link]) {
        if self.json {
            return self.json(&links);
        }
        let rows: Vec<_> = links.iter().map(path_row).collect();
        self.values(&PATH_HEADS, &rows);
        let rows = socket_rows(links);
        if !rows.is_empty() {
            self.values(&SOCKET_HEADS, &rows);
        }
        for link in links {
            let level = match link.compression_level {
                0 => "not compressed".to_owned(),
                level => format!("zstd {level}"),
            };
            let referenced = size(link.referenced_bytes);
            let connections = match link.connections {
                0 | 1 => String::new(),
                several => format!("; {several} connections carry batches"),
            };
            say!("{}: {level}; {referenced} went as references{connections}", link.agent);
        }
    }

    fn values<const N: usize>(&self, heads: &[&str; N], rows: &[[Value; N]]) {
        let mut table = self.table(heads);
        for row in rows {
            table.add_row(row.iter().map(|value| match value.is_bad {
                true => self.cell(&value.text, Color::Red),
                false => Cell::new(&value.text),
            }));
        }
        say!("{table}");
    }
}

const PATH_HEADS: [&str; 9] = [
    "agent",
    "over",
    "rate",
    "path",
    "ceiling",
    "RTT (least)",
    "lost (sent again)",
    "window",
    "MTU",
];

/// A link as its sender, the agent, sees it.
fn path_row(link: &Link) -> [Value; 9] {
    let rate = |bytes: u64| format!("{:.1} Mbit/s", bytes as f64 * 8.0 / 1e6);
    let ms = |seconds: f64| format!("{:.1}", seconds * 1e3);
    let lost = link.lost_packets as f64 * 100.0 / link.sent_packets.max(1) as f64;
    let again = size(link.retransmitted_bytes);
    [
        Value::of(format!("{} ({})", link.agent, link.address)),
        Value::of(format!("{}, {} {}", link.transport, link.congestion, link.state)),
        Value::of(rate(link.acked_bytes_per_second)),
        Value::of(link.path_bytes_per_second.map_or("–".into(), rate)),
        Value::of(link.ceiling_bytes_per_second.map_or("none".into(), rate)),
        Value::of(format!("{} ms ({})", ms(link.rtt_seconds), ms(link.min_rtt_seconds))),
        Value::judged(format!("{lost:.2} % ({again})"), lost > LOST_PERCENT_MAX),
        Value::of(size(link.window_bytes)),
        Value::of(link.mtu_bytes),
    ]
}

const SOCKET_HEADS: [&str; 4] = ["UDP socket of", "receive buffer", "send buffer", "dropped"];

/// The target's socket, which all links share, and each agent's. A link over TCP has none.
fn socket_rows(links: &[Link]) -> Vec<[Value; 4]> {
    let over_quic = |link: &&Link| link.transport != "tcp";
    let here = links.iter().find(over_quic).map(|link| {
        socket_row(
            "this target",
            link.target_receive_buffer_bytes,
            link.target_send_buffer_bytes,
            link.target_dropped_datagrams,
        )
    });
    let there = links.iter().filter(over_quic).map(|link| {
        socket_row(
            &link.agent,
            link.agent_receive_buffer_bytes,
            link.agent_send_buffer_bytes,
            link.agent_dropped_datagrams,
        )
    });
    here.into_iter().chain(there).collect()
}

/// A receive buffer smaller than daemons ask for drops bursts; a small send buffer makes its owner wait.
fn socket_row(of: &str, receive_bytes: u64, send_bytes: u64, dropped: u64) -> [Value; 4] {
    let asked_bytes = TransportOptions::default().socket_buffer_bytes as u64;
    [
        Value::of(of),
        Value::judged(size(receive_bytes), receive_bytes < asked_bytes),
        Value::of(size(send_bytes)),
        Value::judged(dropped, dropped > 0),
    ]
}

fn size(bytes: u64) -> String {
    ByteSize(bytes).display().iec().to_string()
}

#[cfg(test)]
mod tests {
    use backhaul_api::Link;
    use serde_json::json;

    use super::{PATH_HEADS, SOCKET_HEADS, Value, path_row, socket_rows};

    /// A link over QUIC on which nothing is wrong.
    fn link() -> Link {
        let fields = json!({
            "agent": "ps1",
            "address": "192.0.2.7:40000",
            "connected_seconds": 60,
            "transport": "quic",
            "congestion": "auto",
            "state": "probe_bw_cruise",
            "path_bytes_per_second": 25_000_000,
            "min_rtt_seconds": 0.08,
            "rtt_seconds": 0.0834,
            "acked_bytes_per_second": 12_500_000,
            "ceiling_bytes_per_second": null,
            "window_bytes": 2 << 20,
            "mtu_bytes": 1392,
            "sent_bytes": 100_000_000,
            "sent_packets": 80_000,
            "lost_packets": 400,
            "retransmitted_bytes": 512 << 10,
            "mtu_black_holes": 0,
            "agent_receive_buffer_bytes": 16 << 20,
            "agent_send_buffer_bytes": 416 << 10,
            "agent_dropped_datagrams": 0,
            "target_receive_buffer_bytes": 16 << 20,
            "target_send_buffer_bytes": 8 << 20,
            "target_dropped_datagrams": 0,
        });
        serde_json::from_value(fields).unwrap()
    }

    fn texts<const N: usize>(row: &[Value; N]) -> [&str; N] {
        row.each_ref().map(|value| value.text.as_str())
    }

    /// The heads of what stands out.
    fn bad<const N: usize>(heads: [&'static str; N], row: &[Value; N]) -> Vec<&'static str> {
        let marked = heads.into_iter().zip(row).filter(|(_, value)| value.is_bad);
        marked.map(|(head, _)| head).collect()
    }

    /// What was sent again, what the kernels granted, and what the agent's dropped, was to be had as
    /// JSON only.
    #[test]
    fn everything_that_a_sender_and_its_sockets_know_is_in_the_tables() {
        let path = path_row(&link());
        let expected = [
            "ps1 (192.0.2.7:40000)",
            "quic, auto probe_bw_cruise",
            "100.0 Mbit/s",
            "200.0 Mbit/s",
            "none",
            "83.4 ms (80.0)",
            "0.50 % (512.0 KiB)",
            "2.0 MiB",
            "1392",
        ];
        assert_eq!(texts(&path), expected);
        let other = Link { agent: "ps2".into(), agent_dropped_datagrams: 3, ..link() };
        let sockets = socket_rows(&[link(), other]);
        let expected = [
            ["this target", "16.0 MiB", "8.0 MiB", "0"],
            ["ps1", "16.0 MiB", "416.0 KiB", "0"],
            ["ps2", "16.0 MiB", "416.0 KiB", "3"],
        ];
        assert_eq!(sockets.iter().map(texts).collect::<Vec<_>>(), expected);
        let over_tcp = Link { transport: "tcp".into(), ..link() };
        assert_eq!(socket_rows(&[over_tcp]), [] as [[Value; 4]; 0]);
    }

    /// An operator with forty lines on the screen sees the one that is ill.
    #[test]
    fn what_is_wrong_stands_out_and_nothing_else_does() {
        assert_eq!(bad(PATH_HEADS, &path_row(&link())), [] as [&str; 0]);
        let lossy = Link { lost_packets: 1601, ..link() };
        assert_eq!(bad(PATH_HEADS, &path_row(&lossy)), ["lost (sent again)"]);
        let marked = |link: Link| -> Vec<_> {
            socket_rows(&[link]).iter().map(|row| bad(SOCKET_HEADS, row)).collect()
        };
        assert_eq!(marked(link()), [[]; 2] as [[&str; 0]; 2]);
        let small = Link { target_receive_buffer_bytes: 416 << 10, ..link() };
        assert_eq!(marked(small), [vec!["receive buffer"], vec![]]);
        let there =
            Link { agent_receive_buffer_bytes: 416 << 10, agent_dropped_datagrams: 1, ..link() };
        assert_eq!(marked(there), [vec![], vec!["receive buffer", "dropped"]]);
        let dropping = Link { target_dropped_datagrams: 17, ..link() };
        assert_eq!(marked(dropping), [vec!["dropped"], vec![]]);
    }
}
