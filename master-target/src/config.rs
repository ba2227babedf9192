//! The target's configuration, `/etc/backhaul/master-target.toml`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use backhaul_daemon::config::{ConfigErrors, Size, Table, load};
use backhaul_disk_image::{AdapterType, Kind};
use backhaul_proto::id::{DiskName, MachineName, PeerName};
use backhaul_proto::identity::IdentityFiles;
use backhaul_proto::limits::DISKS_MAX;
use backhaul_proto::quic::WINDOW_BYTES;

/// Everything the target is told.
#[derive(Debug, Clone)]
pub struct Config {
    /// The UDP address that agents connect to.
    pub listen: SocketAddr,
    /// Whether agents may come over TCP on the same port (default: they may).
    pub tcp: bool,
    /// Where journals and machine states are kept, a folder a machine.
    pub store: PathBuf,
    /// The API's Unix socket.
    pub api_socket: PathBuf,
    /// Where `/metrics` is served, if it is.
    pub metrics: Option<SocketAddr>,
    /// This target's identity.
    pub identity: IdentityFiles,
    /// Most bytes that are under way on the link of an agent (default 48 MiB).
    pub link_window_bytes: u32,
    /// Bytes of received batches that may wait for stable storage (default 64 MiB), all machines
    /// together: it is divided among them, and bounds what agents may have under way.
    pub receive_memory_bytes: u64,
    /// Bytes of journal a machine may use (default 16 GiB) to keep its newest point restorable.
    /// Beyond it changes are applied past the point, which then is listed no more.
    pub journal_bytes_max: u64,
    /// The machines that may be replicated here.
    pub machines: Vec<MachineConfig>,
}

/// A machine.
#[derive(Debug, Clone)]
pub struct MachineConfig {
    /// Its name.
    pub name: MachineName,
    /// The agent it is enrolled to; no other identity may touch it.
    pub agent: PeerName,
    /// How often a crash-consistent point is set.
    pub point_period: Duration,
    /// Its disks.
    pub disks: Vec<DiskConfig>,
}

/// A disk.
#[derive(Debug, Clone)]
pub struct DiskConfig {
    /// Its name, as the agent's configuration has it.
    pub name: DiskName,
    /// The image: a descriptor for VMDKs, the file itself when raw. Made when it is missing.
    pub image: PathBuf,
    /// What to make when it is missing, and what it must be when it is there.
    pub kind: Kind,
    /// The controller written into a new descriptor.
    pub adapter: AdapterType,
}

impl Config {
    /// Reads the configuration, or says everything that is wrong with it.
    pub fn load(path: &Path) -> Result<Self, ConfigErrors> {
        load(path, read)
    }
}

fn read(top: &Table<'_>) -> Option<Config> {
    let listen = top.parsed("listen");
    let tcp = top.or("tcp", true);
    let store = top.or("store", PathBuf::from("/var/lib/backhaul"));
    let api_socket = top.or("api_socket", PathBuf::from("/run/backhaul/api.sock"));
    let metrics = top.parsed_or("metrics", None);
    let link_window =
        top.within("link_window", Size(WINDOW_BYTES.into()), Size(16 << 20)..=Size(1 << 30));
    let memory = top.within("receive_memory", Size(64 << 20), Size(8 << 20)..=Size(8 << 30));
    let journal = top.within("journal", Size(16 << 30), Size(256 << 20)..=Size(1 << 50));
    let identity = top.table("identity", |table| {
        let (ca, cert, key) = (table.required("ca"), table.required("cert"), table.required("key"));
        Some(IdentityFiles { ca: ca?, cert: cert?, key: key? })
    });
    let machines = top.tables("machine", read_machine);
    if let Some(machines) = &machines {
        let mut seen = std::collections::BTreeSet::new();
        for machine in machines {
            let images = machine.disks.iter().map(|disk| format!("image {}", disk.image.display()));
            for thing in images.chain([format!("machine name {}", machine.name)]) {
                if !seen.insert(thing.clone()) {
                    top.report("machine", format!("the {thing} is given twice"));
                }
            }
        }
    }
    Some(Config {
        listen: listen?,
        tcp: tcp?,
        store: store?,
        api_socket: api_socket?,
        metrics: metrics?,
        identity: identity?,
        link_window_bytes: link_window?.0 as u32,
        receive_memory_bytes: memory?.0,
        journal_bytes_max: journal?.0,
        machines: machines?,
    })
}

fn read_machine(table: &Table<'_>) -> Option<MachineConfig> {
    let name = table.parsed("name");
    let agent = table.parsed("agent");
    let point_period = table.within(
        "point_period",
        Duration::from_secs(300),
        Duration::from_secs(1)..=Duration::from_secs(86_400),
    );
    let disks = table.tables("disk", |disk| {
        let name = disk.parsed("name");
        let image = disk.required("image");
        let kind = disk.parsed_or("kind", Some(Kind::Vmfs));
        let adapter = disk.parsed_or("adapter", Some(AdapterType::LsiLogic));
        Some(DiskConfig { name: name?, image: image?, kind: kind??, adapter: adapter?? })
    });
    if let Some(disks) = &disks {
        let names: std::collections::BTreeSet<_> = disks.iter().map(|disk| &disk.name).collect();
        if names.len() != disks.len() {
            table.report("disk", "two disks of the machine have the same name");
        }
        if disks.len() > DISKS_MAX {
            table.report("disk", format!("a machine has at most {DISKS_MAX} disks"));
        }
    }
    Some(MachineConfig { name: name?, agent: agent?, point_period: point_period?, disks: disks? })
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use backhaul_daemon::config::parse;

    use super::read;

    #[test]
    fn defaults_and_mistakes() {
        let text = r#"
listen = "0.0.0.0:4433"
identity = { ca = "ca.pem", cert = "t.pem", key = "t.key" }
[[machine]]
name = "web01"
agent = "ps1"
disk = [{ name = "disk0", image = "/vmfs/web01.vmdk" }]
"#;
        let config = parse(Path::new("t.toml"), text, read).unwrap();
        assert_eq!(config.machines[0].point_period, Duration::from_secs(300));
        let bad = text
            .replace("agent = \"ps1\"", "point_period = \"0 s\"")
            .replace("disk0\",", "disk0\", kind = \"qcow2\",");
        let errors = parse(Path::new("t.toml"), &bad, read).unwrap_err().to_string();
        assert!(errors.contains("`machine.agent` is missing"), "{errors}");
        assert!(errors.contains("`machine.point_period` must lie between"), "{errors}");
        assert!(
            errors.contains("t.toml:7:9: `machine.disk.kind`") || errors.contains("kind"),
            "{errors}"
        );
    }

    /// The documentation named no more keys than its example needs.
    #[test]
    fn every_key_is_documented() {
        let page = include_str!("../../docs/CONFIGURATION.md");
        let text = "zzzzzzzz = 1\nidentity = { zzzzzzzz = 1 }\n[[machine]]\nzzzzzzzz = 1\ndisk = [{ zzzzzzzz = 1 }]\n";
        let errors = parse(Path::new("x.toml"), text, read).unwrap_err();
        let known: Vec<_> =
            errors.0.iter().filter_map(|error| error.sentence.split_once("known here: ")).collect();
        assert_eq!(known.len(), 4, "{errors}");
        for key in known.iter().flat_map(|(_, keys)| keys.split(", ")) {
            assert!(page.contains(key), "{key} is not in the page");
        }
    }
}
