//! The running link: two sites and the line between them, changed while it runs.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;

use super::forwarder::{Forwarder, SharedShaper};
use super::namespace::{ADDRESS_A_LATER, Site, SitePair, ip};
use super::shaper::{DirectionStats, Shaper};
use super::spec::LinkSpec;
use super::tun;

/// Two sites with an emulated line between them. Everything is removed when it is dropped.
#[derive(Debug)]
pub struct Link {
    spec: LinkSpec,
    up: SharedShaper,
    down: SharedShaper,
    joins: bool,
    // Dropped in this order: threads end before their devices and namespaces go.
    forwarders: [Forwarder; 2],
    sites: SitePair,
}

/// Counters of both directions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LinkStats {
    /// Site A to site B.
    pub up: DirectionStats,
    /// Site B to site A.
    pub down: DirectionStats,
    /// What part of `up.delivered_bytes` was TCP, for a rival of a UDP transport.
    pub up_tcp_bytes: u64,
}

impl Link {
    /// Makes the sites and starts the line.
    ///
    /// # Errors
    /// When something that [`is_available`] checks is missing, or a command or device fails.
    pub fn start(spec: LinkSpec) -> Result<Self, LinkError> {
        is_available()?;
        let sites = SitePair::create()?;
        let (device_a, a_joins) = make_device(&sites.a, &spec)?;
        let (device_b, b_joins) = make_device(&sites.b, &spec)?;
        let joins = a_joins && b_joins;
        let up = SharedShaper::new(Shaper::new(spec.up, spec.seed));
        let down = SharedShaper::new(Shaper::new(spec.down, spec.seed ^ DOWN_SEED));
        let start = |name: &str, from: &Arc<File>, to: &Arc<File>, shaper: &SharedShaper| {
            Forwarder::start(name, Arc::clone(from), Arc::clone(to), joins, shaper.clone())
                .map_err(LinkError::Forwarder)
        };
        let forwarders = [
            start("lab-link-up", &device_a, &device_b, &up)?,
            start("lab-link-down", &device_b, &device_a, &down)?,
        ];
        Ok(Self { spec, up, down, joins, forwarders, sites })
    }

    /// The site with the agent, by convention.
    pub fn site_a(&self) -> &Site {
        &self.sites.a
    }

    /// The site with the master target, by convention.
    pub fn site_b(&self) -> &Site {
        &self.sites.b
    }

    /// What the line is like now.
    pub fn spec(&self) -> &LinkSpec {
        &self.spec
    }

    /// Changes the line while it runs: at once for packets that enter from now on. The seed
    /// stays that of the start.
    ///
    /// # Errors
    /// When the devices refuse the new MTU.
    pub fn set_spec(&mut self, spec: LinkSpec) -> Result<(), LinkError> {
        if spec.mtu_bytes != self.spec.mtu_bytes {
            for site in [&self.sites.a, &self.sites.b] {
                let mtu = spec.mtu_bytes.to_string();
                ip(&["-n", site.name(), "link", "set", "dev", DEVICE_NAME, "mtu", &mtu])?;
            }
        }
        self.up.lock().set_spec(spec.up);
        self.down.lock().set_spec(spec.down);
        self.spec = LinkSpec { seed: self.spec.seed, ..spec };
        Ok(())
    }

    /// Gives site A another address in place of the one it has, as a VPN that is re-keyed may, and
    /// returns it. Once only.
    ///
    /// # Errors
    /// When the devices refuse it.
    pub fn move_site_a(&self) -> Result<Ipv4Addr, LinkError> {
        let (a, b) = (&self.sites.a, &self.sites.b);
        let (old, new) = (format!("{}/30", a.address()), ADDRESS_A_LATER.to_string());
        let peer = b.address().to_string();
        ip(&["-n", b.name(), "route", "add", &new, "dev", DEVICE_NAME])?;
        ip(&["-n", a.name(), "addr", "add", &new, "peer", &peer, "dev", DEVICE_NAME])?;
        ip(&["-n", a.name(), "addr", "del", &old, "dev", DEVICE_NAME])?;
        Ok(ADDRESS_A_LATER)
    }

    /// Cuts both directions, or mends them.
    pub fn blackout(&self, cut: bool) {
        self.up.lock().set_blackout(cut);
        self.down.lock().set_blackout(cut);
    }

    /// Whether datagrams that arrive together reach a socket in one call, if it asks for that (`UDP_GRO`).
    /// Takes Linux 6.2.
    pub fn joins(&self) -> bool {
        self.joins
    }

    /// Counters since the start.
    pub fn stats(&self) -> LinkStats {
        // First, so that it is never more than what it is a part of.
        let up_tcp_bytes = self.forwarders[0].tcp_bytes();
        LinkStats { up: self.up.lock().stats(), down: self.down.lock().stats(), up_tcp_bytes }
    }

    /// False when a forwarder has ended by itself: the measurement is void.
    pub fn is_running(&self) -> bool {
        self.forwarders.iter().all(Forwarder::is_running)
    }
}

/// Says whether this process can make a link.
///
/// # Errors
/// Everything that is missing, each with its mend.
pub fn is_available() -> Result<(), Unavailable> {
    let mut missing = Vec::new();
    if !rustix::process::geteuid().is_root() {
        missing.push("root (network namespaces and TUN devices need it): run with sudo");
    }
    if !Path::new(tun::DEVICE).exists() {
        missing.push("/dev/net/tun: load the kernel module with `modprobe tun`");
    }
    if !Path::new("/proc/self/ns/net").exists() {
        missing.push("network namespaces: use a kernel with CONFIG_NET_NS");
    }
    let paths = std::env::var_os("PATH").unwrap_or_default();
    if !std::env::split_paths(&paths).any(|folder| folder.join("ip").is_file()) {
        missing.push("the command `ip`: install the Debian package iproute2");
    }
    if missing.is_empty() { Ok(()) } else { Err(Unavailable { missing }) }
}

/// What this machine lacks for an emulated link.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an emulated link needs {}", .missing.join("; and "))]
pub struct Unavailable {
    /// One phrase each: the thing and the mend.
    pub missing: Vec<&'static str>,
}

/// Why a link could not be made or changed.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The machine lacks something.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    /// A program could not be started.
    #[error("`{command}` could not be started")]
    Start {
        /// The command line.
        command: String,
        /// Why.
        source: io::Error,
    },
    /// A program failed.
    #[error("`{command}` failed: {said}")]
    Command {
        /// The command line.
        command: String,
        /// Its error output.
        said: String,
    },
    /// A namespace could not be opened or entered.
    #[error("network namespace {path} could not be entered")]
    Open {
        /// Where it is.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A TUN device could not be made.
    #[error("no TUN device could be made in the namespace {site}")]
    Device {
        /// The namespace's name.
        site: String,
        /// Why.
        source: io::Error,
    },
    /// A forwarder could not be started.
    #[error("the link's forwarder could not be started")]
    Forwarder(#[source] io::Error),
}

fn make_device(site: &Site, spec: &LinkSpec) -> Result<(Arc<File>, bool), LinkError> {
    let (device, joins) = site
        .run_inside(|| tun::open(DEVICE_NAME))
        .flatten()
        .map_err(|source| LinkError::Device { site: site.name().to_owned(), source })?;
    let name = site.name();
    let address = format!("{}/30", site.address());
    let mtu = spec.mtu_bytes.to_string();
    ip(&["-n", name, "addr", "add", &address, "dev", DEVICE_NAME])?;
    ip(&[
        "-n",
        name,
        "link",
        "set",
        "dev",
        DEVICE_NAME,
        "mtu",
        &mtu,
        "txqueuelen",
        DEVICE_QUEUE,
        "multicast",
        "off",
        "up",
    ])?;
    Ok((Arc::new(device), joins))
}

const DEVICE_NAME: &str = "bh0";
/// What waits for the forwarder, each a packet or what a program sent with one call: single packets are 0.1 s of
/// 1 Gbit/s. The line's own queue is the shaper's, so this one must never be the one that drops.
const DEVICE_QUEUE: &str = "10000";
/// Keeps the directions' random choices apart.
const DOWN_SEED: u64 = 0x646f_776e;
