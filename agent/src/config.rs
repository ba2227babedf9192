//! The agent's configuration, `/etc/backhaul/agent.toml`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use backhaul_daemon::bandwidth::{BandwidthLimits, Rate};
use backhaul_daemon::config::{ConfigErrors, Size, Table, load};
use backhaul_proto::id::{DiskName, MachineName, PeerName};
use backhaul_proto::identity::IdentityFiles;
use backhaul_proto::limits::{DISKS_MAX, MACHINES_MAX};
use backhaul_proto::link::TransportChoice;
use backhaul_proto::quic::{
    CONNECTIONS_MAX, Congestion, Connections, TransportOptions, WINDOW_BYTES,
};

use crate::batch::CompressionChoice;

/// Everything the agent is told.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where the agent keeps what must survive a restart.
    pub state_dir: PathBuf,
    /// The target's address, `host:port`.
    pub target: String,
    /// The name that the target's certificate must have; any target of the site when absent.
    pub target_name: Option<PeerName>,
    /// This agent's identity.
    pub identity: IdentityFiles,
    /// Where `/metrics` is served, if it is.
    pub metrics: Option<SocketAddr>,
    /// Bytes of unacknowledged writes a machine may hold (default 64 MiB), all machines together:
    /// it is divided among them.
    pub queue_bytes: u64,
    /// When to compress.
    pub compression: CompressionChoice,
    /// Memory of the index of content that the target holds, all machines together (default 32 MiB,
    /// which knows about 32 GiB of content); with 0 nothing goes as a reference.
    pub reference_index_bytes: u64,
    /// Which transports may be used.
    pub transport: TransportChoice,
    /// How the sending rate is found.
    pub congestion: Congestion,
    /// How many connections the link is given.
    pub connections: Connections,
    /// Most bytes of the link that are under way (default 48 MiB).
    pub link_window_bytes: u32,
    /// Ceilings of the link as a whole, over the week. Read again on SIGHUP.
    pub limit: BandwidthLimits,
    /// Longest a write waits for others before its batch is sealed.
    pub batch_delay: Duration,
    /// The NBD server's Unix socket.
    pub nbd_unix: Option<PathBuf>,
    /// The NBD server's TCP address.
    pub nbd_tcp: Option<SocketAddr>,
    /// The protected machines.
    pub machines: Vec<MachineConfig>,
}

/// A protected machine.
#[derive(Debug, Clone)]
pub struct MachineConfig {
    /// Its name, as the target knows it.
    pub name: MachineName,
    /// Shuts the machine down at failover: program and arguments.
    pub shutdown_hook: Vec<String>,
    /// Removes the machine at commit: program and arguments.
    pub removal_hook: Vec<String>,
    /// Ceilings of this machine's share of the link, over the week. Read again on SIGHUP.
    pub limit: BandwidthLimits,
    /// A hook that runs longer has failed.
    pub hook_timeout: Duration,
    /// Its disks, in order.
    pub disks: Vec<DiskConfig>,
}

/// A protected disk.
#[derive(Debug, Clone)]
pub struct DiskConfig {
    /// Its name.
    pub name: DiskName,
    /// The raw file or block device.
    pub path: PathBuf,
    /// The NBD export's name (default `MACHINE-DISK`).
    pub export: String,
}

impl Config {
    /// Reads the configuration, or says everything that is wrong with it.
    pub fn load(path: &Path) -> Result<Self, ConfigErrors> {
        load(path, read)
    }

    /// How the link's transport is tuned; without a ceiling.
    pub fn transport_options(&self) -> TransportOptions {
        TransportOptions {
            congestion: self.congestion,
            connections: self.connections,
            window_bytes: self.link_window_bytes,
            ..TransportOptions::default()
        }
    }
}

fn read(top: &Table<'_>) -> Option<Config> {
    let state_dir = top.or("state_dir", PathBuf::from("/var/lib/backhaul-agent"));
    let target = top.required::<String>("target");
    let target_name = top.parsed_or("target_name", None);
    let metrics = top.parsed_or("metrics", None);
    let queue = top.within("queue", Size(64 << 20), Size(4 << 20)..=Size(4 << 30));
    let compression = read_compression(top);
    let reference_index = top.within("reference_index", Size(32 << 20), Size(0)..=Size(4 << 30));
    let transport = match top.or("transport", "auto".to_owned()).map(|text| text.parse()) {
        Some(Ok(choice)) => Some(choice),
        Some(Err(sentence)) => {
            let sentence: String = sentence;
            top.report("transport", sentence);
            None
        }
        None => None,
    };
    let congestion = read_congestion(top);
    let connections = read_connections(top, congestion, transport);
    let link_window =
        top.within("link_window", Size(WINDOW_BYTES.into()), Size(16 << 20)..=Size(1 << 30));
    let limit = top.or("limit", BandwidthLimits::default());
    let batch_delay = top.within(
        "batch_delay",
        Duration::from_millis(5),
        Duration::ZERO..=Duration::from_secs(10),
    );
    let identity = top.table("identity", |table| {
        let (ca, cert, key) = (table.required("ca"), table.required("cert"), table.required("key"));
        Some(IdentityFiles { ca: ca?, cert: cert?, key: key? })
    });
    let nbd = top.table("nbd", |table| {
        let unix = table.or("unix", PathBuf::new());
        let tcp = table.parsed_or("tcp", None);
        Some((unix?, tcp?))
    });
    let machines = top.tables("machine", read_machine);
    if let Some(machines) = &machines {
        check_machines(top, machines);
    }
    let (nbd_unix, nbd_tcp) = nbd?;
    let nbd_unix = (!nbd_unix.as_os_str().is_empty()).then_some(nbd_unix);
    if nbd_unix.is_none() && nbd_tcp.is_none() {
        top.report("nbd", "`nbd` needs a `unix` socket path, a `tcp` address, or both");
    }
    Some(Config {
        state_dir: state_dir?,
        target: target?,
        target_name: target_name?,
        identity: identity?,
        metrics: metrics?,
        queue_bytes: queue?.0,
        compression: compression?,
        reference_index_bytes: reference_index?.0,
        transport: transport?,
        congestion: congestion?,
        connections: connections?,
        link_window_bytes: link_window?.0 as u32,
        limit: limit?,
        batch_delay: batch_delay?,
        nbd_unix,
        nbd_tcp,
        machines: machines?,
    })
}

fn read_compression(top: &Table<'_>) -> Option<CompressionChoice> {
    match top.or("compression", "auto".to_owned())?.as_str() {
        "auto" => Some(CompressionChoice::Auto),
        "off" => Some(CompressionChoice::Off),
        text => match text.parse::<i32>() {
            Ok(level @ 1..=19) => Some(CompressionChoice::Level(level)),
            _ => {
                let sentence =
                    "`compression` must be \"auto\", \"off\", or a zstd level from \"1\" to \"19\"";
                top.report("compression", sentence);
                None
            }
        },
    }
}

fn read_congestion(top: &Table<'_>) -> Option<Congestion> {
    let text = top.or("congestion", "auto".to_owned())?;
    let sentence = match (text.as_str(), text.strip_prefix("fixed ")) {
        ("auto", _) => return Some(Congestion::Auto),
        ("cubic", _) => return Some(Congestion::Cubic),
        (_, Some(rate)) => match rate.trim().parse::<Rate>() {
            Ok(Rate { bits_per_second }) => return Some(Congestion::Fixed { bits_per_second }),
            Err(sentence) => sentence,
        },
        _ => "`congestion` must be \"auto\", \"cubic\" or \"fixed 200 Mbit/s\"".into(),
    };
    top.report("congestion", sentence);
    None
}

fn read_connections(
    top: &Table<'_>,
    congestion: Option<Congestion>,
    transport: Option<TransportChoice>,
) -> Option<Connections> {
    let text = top.or("connections", "auto".to_owned())?;
    let connections = match text.as_bytes() {
        b"auto" => return Some(Connections::Auto),
        [digit @ b'1'..=b'9'] if usize::from(digit - b'0') <= CONNECTIONS_MAX => {
            Connections::Exactly((digit - b'0').into())
        }
        _ => {
            let sentence = format!(
                "`connections` must be \"auto\", or a number from \"1\" to \"{CONNECTIONS_MAX}\""
            );
            top.report("connections", sentence);
            return None;
        }
    };
    if connections != Connections::Exactly(1) {
        let sentence = if congestion.is_some_and(|congestion| congestion != Congestion::Auto) {
            "`connections` above \"1\" needs `congestion = \"auto\"`: each would take the rate of a link"
        } else if transport == Some(TransportChoice::Tcp) {
            "`connections` above \"1\" needs QUIC: with `transport = \"tcp\"` there is one for batches"
        } else {
            return Some(connections);
        };
        top.report("connections", sentence);
        return None;
    }
    Some(connections)
}

fn read_machine(table: &Table<'_>) -> Option<MachineConfig> {
    let name: Option<MachineName> = table.parsed("name");
    let shutdown_hook = table.or("shutdown_hook", Vec::<String>::new());
    let removal_hook = table.or("removal_hook", Vec::<String>::new());
    let hook_timeout = table.or("hook_timeout", Duration::from_secs(300));
    let limit = table.or("limit", BandwidthLimits::default());
    let label = name.as_ref().map(ToString::to_string).unwrap_or_default();
    let disks = table.tables("disk", |disk| {
        let name: Option<DiskName> = disk.parsed("name");
        let path = disk.required("path");
        let export = match &name {
            Some(name) => disk.or("export", format!("{label}-{name}")),
            None => disk.or("export", String::new()),
        };
        Some(DiskConfig { name: name?, path: path?, export: export? })
    });
    if disks.as_ref().is_some_and(|disks| disks.len() > DISKS_MAX) {
        table.report("disk", format!("a machine has at most {DISKS_MAX} disks"));
    }
    Some(MachineConfig {
        name: name?,
        shutdown_hook: shutdown_hook?,
        removal_hook: removal_hook?,
        limit: limit?,
        hook_timeout: hook_timeout?,
        disks: disks?,
    })
}

/// What no machine can know alone: names, exports and paths must be unique.
fn check_machines(top: &Table<'_>, machines: &[MachineConfig]) {
    if machines.len() > MACHINES_MAX {
        top.report("machine", format!("an agent protects at most {MACHINES_MAX} machines"));
    }
    let mut seen = std::collections::BTreeSet::new();
    let mut twice = |what: &str, value: String| {
        if !seen.insert(format!("{what} {value}")) {
            top.report("machine", format!("the {what} `{value}` is given twice"));
        }
    };
    for machine in machines {
        twice("machine name", machine.name.to_string());
        for disk in &machine.disks {
            twice("export", disk.export.clone());
            twice("disk path", disk.path.display().to_string());
            twice("disk name", format!("{}/{}", machine.name, disk.name));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use backhaul_daemon::config::parse;
    use backhaul_proto::quic::Congestion;

    use super::read;

    #[test]
    fn a_small_configuration_is_enough() {
        let text = r#"
            target = "10.0.0.1:4433"
            identity = { ca = "ca.pem", cert = "a.pem", key = "a.key" }
            nbd = { unix = "/run/nbd.sock" }
            [[machine]]
            name = "web01"
            [[machine.disk]]
            name = "disk0"
            path = "/dev/sdc"
        "#;
        let config = parse(Path::new("a.toml"), text, read).unwrap();
        assert_eq!(config.machines[0].disks[0].export, "web01-disk0");
        assert_eq!(config.queue_bytes, 64 << 20);
        assert_eq!(config.reference_index_bytes, 32 << 20);
        assert_eq!(config.transport_options().window_bytes, 48 << 20);
        let wider = format!("link_window = \"96 MiB\"\n{text}");
        let config = parse(Path::new("a.toml"), &wider, read).unwrap();
        assert_eq!(config.transport_options().window_bytes, 96 << 20);
    }

    #[test]
    fn what_is_given_twice_is_named() {
        let text = r#"
target = "10.0.0.1:4433"
compression = "99"
identity = { ca = "ca.pem", cert = "a.pem", key = "a.key" }
[[machine]]
name = "a b"
disk = [{ name = "d", path = "/x" }, { name = "d", path = "/x" }]
"#;
        let errors = parse(Path::new("a.toml"), text, read).unwrap_err().to_string();
        assert!(errors.contains("a.toml:3:15: `compression` must be"), "{errors}");
        assert!(errors.contains("`machine.name`: `a b` is not a name"), "{errors}");
        assert!(errors.contains("`nbd` needs a `unix` socket"), "{errors}");
    }

    /// A rate that is not understood would be a line that is filled wrongly, or not at all.
    #[test]
    fn a_congestion_control_is_chosen_by_name_or_refused_in_words() {
        let congestion = |line: &str| {
            let text = format!(
                r#"
                {line}
                target = "10.0.0.1:4433"
                identity = {{ ca = "ca.pem", cert = "a.pem", key = "a.key" }}
                nbd = {{ unix = "/run/nbd.sock" }}
                machine = [{{ name = "web01", disk = [{{ name = "disk0", path = "/dev/sdc" }}] }}]
                "#
            );
            let config = parse(Path::new("a.toml"), &text, read);
            config.map(|config| config.congestion).map_err(|errors| errors.to_string())
        };
        let fixed = |bits_per_second| Congestion::Fixed { bits_per_second };
        for (line, chosen) in [
            ("", Congestion::Auto),
            ("congestion = \"auto\"", Congestion::Auto),
            ("congestion = \"cubic\"", Congestion::Cubic),
            ("congestion = \"fixed 200 Mbit/s\"", fixed(200_000_000)),
            ("congestion = \"fixed 1.5Gbit/s\"", fixed(1_500_000_000)),
        ] {
            assert_eq!(congestion(line), Ok(chosen), "{line}");
        }
        let choice = "`congestion` must be \"auto\", \"cubic\" or \"fixed 200 Mbit/s\"";
        for (value, sentence) in [
            ("bbr", choice),
            ("fixed", choice),
            ("Cubic", choice),
            ("fixed fast", "`fast` is not a rate such as \"50 Mbit/s\""),
            ("fixed 200", "`200` is not a rate such as \"50 Mbit/s\""),
            ("fixed -5 Mbit/s", "a rate lies between 8 kbit/s and 1000 Gbit/s"),
            ("fixed 2000 Gbit/s", "a rate lies between 8 kbit/s and 1000 Gbit/s"),
        ] {
            let error = congestion(&format!("congestion = \"{value}\"")).unwrap_err();
            assert!(error.contains(sentence) && error.contains("a.toml:2:"), "{value}: {error}");
        }
    }

    /// The documentation named no more keys than its example needs.
    #[test]
    fn every_key_is_documented() {
        let page = include_str!("../../docs/CONFIGURATION.md");
        let text = "zzzzzzzz = 1\nidentity = { zzzzzzzz = 1 }\nnbd = { zzzzzzzz = 1 }\n[[machine]]\nzzzzzzzz = 1\ndisk = [{ zzzzzzzz = 1 }]\n";
        let errors = parse(Path::new("x.toml"), text, read).unwrap_err();
        let known: Vec<_> =
            errors.0.iter().filter_map(|error| error.sentence.split_once("known here: ")).collect();
        assert_eq!(known.len(), 5, "{errors}");
        for key in known.iter().flat_map(|(_, keys)| keys.split(", ")) {
            assert!(page.contains(key), "{key} is not in the page");
        }
    }
}
