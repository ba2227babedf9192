//! What can be asked for.

use std::path::PathBuf;
use std::time::Duration;

use backhaul_disk_image::{AdapterType, Kind};
use backhaul_lab::link::LinkSpec;
use bytesize::ByteSize;
use clap::{Args, Parser, Subcommand};

/// Brings machines home: failover, cancel and commit, and how everything stands
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Exit codes: 0 done, 1 refused or failed, 2 arguments, 3 the target cannot be reached."
)]
pub(crate) struct Arguments {
    /// The master target's socket
    #[arg(long, global = true, default_value = "/run/backhaul/api.sock", env = "BACKHAUL_SOCKET")]
    pub(crate) socket: PathBuf,
    /// Answer with one JSON value, for programs
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// How the target stands
    Status,
    /// How every machine stands
    Machines,
    /// The recovery points of a machine
    Points {
        /// The machine
        machine: String,
    },
    /// Set a crash-consistent recovery point now
    Tag {
        /// The machine
        machine: String,
    },
    /// Fail a machine over from Azure: shut it down there, make its disks ready here
    Failover {
        /// The machine
        machine: String,
        /// `latest`, or a point from `backhaul points`
        #[arg(long, default_value = "latest")]
        to: String,
        /// Leave the machine running: a rehearsal
        #[arg(long)]
        without_shutdown: bool,
        /// How long to wait for the machine to shut down and its last writes to arrive, before
        /// going on with what is here
        #[arg(long, default_value = "60s", value_parser = time)]
        drain_timeout: Duration,
    },
    /// Undo a failover that was not committed: replication goes on
    Cancel {
        /// The machine
        machine: String,
    },
    /// Make a failover final: remove the machine in Azure, end its protection
    Commit {
        /// The machine
        machine: String,
        /// Do not run the removal hook: its agent is gone for good
        #[arg(long)]
        without_removal: bool,
    },
    /// The link between agents and target
    #[command(subcommand)]
    Link(LinkVerb),
    /// Disk images: raw, fixed VHD and every VMDK
    #[command(subcommand)]
    Image(ImageVerb),
    /// A whole failback on this machine, with throw-away keys: protect, sync, write, fail over,
    /// verify, commit
    Lab(Box<LabArguments>),
    /// Print completions for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page
    Man,
}

#[derive(Debug, Subcommand)]
pub(crate) enum LinkVerb {
    /// How every connected agent's link stands: rates, loss, windows, buffers
    Status,
    /// Measure the way from this agent to its target: reach, round-trip time, loss, MTU, clocks,
    /// rates, and what limits them
    Probe {
        /// The agent's configuration, for the target's address and the identity
        #[arg(long, default_value = "/etc/backhaul/agent.toml")]
        config: PathBuf,
        /// How long each direction is measured
        #[arg(long, default_value = "10s", value_parser = time)]
        time: Duration,
    },
}

#[derive(Debug, Subcommand)]
#[command(after_help = "Kinds: raw, monolithicFlat, twoGbMaxExtentFlat, vmfs, monolithicSparse, \
    twoGbMaxExtentSparse, streamOptimized, vmfsSparse, seSparse, vhd.\n\nExit codes: 0 done, 1 refused \
    or failed, 2 arguments, 3 damage was found. Of compare: 0 equal, 1 different, 2 failed.")]
pub(crate) enum ImageVerb {
    /// What an image is: kind, sizes, identity, files, parents
    Info {
        #[command(flatten)]
        input: ImageInput,
    },
    /// Look for damage; exit code 3 when there is some
    Check {
        #[command(flatten)]
        input: ImageInput,
        /// Inflate every compressed grain as well
        #[arg(long)]
        deep: bool,
    },
    /// Which parts of the disk are data, zeros, or not allocated
    Map {
        #[command(flatten)]
        input: ImageInput,
    },
    /// Make a new image of another kind with the same content
    Convert(ConvertArguments),
    /// Compare two disks; exit code 1 when they differ
    Compare {
        /// One image
        one: PathBuf,
        /// The other
        other: PathBuf,
        /// What the one must be; probed when absent
        #[arg(short = 'f', long)]
        from: Option<Kind>,
        /// What the other must be; probed when absent
        #[arg(short = 'F', long)]
        other_from: Option<Kind>,
        /// Follow paths out of the images' folders
        #[arg(long)]
        allow_outside: bool,
    },
    /// Make an empty image
    Create {
        /// The kind to make
        #[arg(short = 'O', long = "kind")]
        to: Kind,
        /// The new image, which must not exist
        output: PathBuf,
        /// Size of the disk: bytes, or a number with K, M, G or T (of 1024, as KiB to TiB) or KB, MB,
        /// GB or TB (of 1000), such as 40G; that of the parent when absent
        #[arg(long, required_unless_present = "parent", value_parser = size)]
        size: Option<ByteSize>,
        /// The controller that the new descriptor names
        #[arg(long, default_value_t = AdapterType::LsiLogic)]
        adapter: AdapterType,
        /// Make a delta on this image
        #[arg(long)]
        parent: Option<PathBuf>,
        /// For vmfs: reserve the space
        #[arg(long)]
        thick: bool,
    },
    /// Mend what can be mended, after showing the plan
    Repair {
        #[command(flatten)]
        input: ImageInput,
        /// Do it without asking
        #[arg(long)]
        yes: bool,
        /// Give back space that no table names; whoever lost both copies of a table may find data
        /// there
        #[arg(long)]
        free_leaks: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct ConvertArguments {
    /// The kind to make
    #[arg(short = 'O', long = "kind")]
    pub(crate) to: Kind,
    #[command(flatten)]
    pub(crate) input: ImageInput,
    /// The new image, which must not exist; or, with -O raw and --force, a block device that is free
    pub(crate) output: PathBuf,
    /// The controller that the new descriptor names
    #[arg(long, default_value_t = AdapterType::LsiLogic)]
    pub(crate) adapter: AdapterType,
    /// For streamOptimized: 1 is fast, 9 is small
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u32).range(1..=9))]
    pub(crate) deflate_level: u32,
    /// For vmfs: reserve the space
    #[arg(long)]
    pub(crate) thick: bool,
    /// Replace the image that is there, once the new one is whole; or overwrite a block device
    #[arg(long)]
    pub(crate) force: bool,
    /// Do not wait for the disk, as qemu-img does not by default: a power cut soon after may leave
    /// an image that looks whole and is not
    #[arg(long)]
    pub(crate) no_sync: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ImageInput {
    /// The image: a descriptor, a sparse VMDK, a VHD, a raw file or a device
    pub(crate) image: PathBuf,
    /// What it must be; probed when absent. Name `raw` for disks of guests that are not trusted
    #[arg(short = 'f', long)]
    pub(crate) from: Option<Kind>,
    /// Follow paths out of the descriptor's folder
    #[arg(long)]
    pub(crate) allow_outside: bool,
    /// Read although somebody else may be writing
    #[arg(long)]
    pub(crate) shared: bool,
}

#[derive(Debug, Args)]
pub(crate) struct LabArguments {
    /// Protect a copy of this disk, instead of an ext4 disk with real files
    #[arg(long)]
    pub(crate) disk: Option<PathBuf>,
    /// Size of the ext4 disk that is made
    #[arg(long, default_value = "512MiB", conflicts_with = "disk", value_parser = size)]
    pub(crate) size: ByteSize,
    /// How long the guest writes after the first sync
    #[arg(long, default_value_t = 6)]
    pub(crate) seconds: u64,
    /// Put a link between the two, as root: rate, one-way delay, loss, such as
    /// `200mbit,40ms,0.5%`, then any of queue=50ms, jitter=2ms, reorder=1%, reorder_by=2ms,
    /// duplicate=1%, blackout=20s+5s (up, dark, again), blackhole=1300, mtu=1420, seed=1; up. or
    /// down. before a key means one direction
    #[arg(long)]
    pub(crate) link: Option<LinkSpec>,
    /// Keep everything in this folder, which must be empty or absent
    #[arg(long)]
    pub(crate) keep: Option<PathBuf>,
    /// Decides the disk's content and the writes
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
}

/// A size as administrators write it: a bare letter is binary, as qemu-img and vmkfstools have it.
fn size(text: &str) -> Result<ByteSize, String> {
    let text = text.trim();
    let digits = text.find(|char: char| !char.is_ascii_digit() && char != '.');
    let (number, unit) = text.split_at(digits.unwrap_or(text.len()));
    let factor: Option<u64> = match unit.trim_start().to_ascii_uppercase().as_str() {
        "" | "B" => Some(1),
        "K" | "KIB" => Some(1 << 10),
        "M" | "MIB" => Some(1 << 20),
        "G" | "GIB" => Some(1 << 30),
        "T" | "TIB" => Some(1 << 40),
        "KB" => Some(1_000),
        "MB" => Some(1_000_000),
        "GB" => Some(1_000_000_000),
        "TB" => Some(1_000_000_000_000),
        _ => None,
    };
    let bytes = factor.and_then(|factor| match number.parse::<u64>() {
        Ok(whole) => whole.checked_mul(factor),
        Err(_) => number.parse::<f64>().ok().map(|number| (number * factor as f64) as u64),
    });
    bytes.map(ByteSize).ok_or_else(|| {
        format!(
            "`{text}` is not a size; write bytes, or a number with K, M, G or T (of 1024) or KB, MB, GB \
             or TB (of 1000), such as 40G"
        )
    })
}

fn time(text: &str) -> Result<Duration, String> {
    let span = text.parse::<jiff::SignedDuration>().ok();
    span.and_then(|span| Duration::try_from(span).ok())
        .ok_or_else(|| format!("`{text}` is not a time such as `60s` or `5 min`"))
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::{Arguments, Verb, size};

    /// `40G` was 40 * 10^9 bytes, which is smaller than the disk that qemu-img makes of it; errors were
    /// those of a parser's insides.
    #[test]
    fn sizes_are_those_of_qemu_img() {
        for (text, bytes) in [
            ("1048577B", 1_048_577),
            ("40", 40),
            ("1K", 1024),
            ("1m", 1 << 20),
            ("40G", 40 << 30),
            ("1.5 G", 3 << 29),
            ("2TiB", 2 << 40),
            ("1kb", 1000),
            ("40GB", 40_000_000_000),
        ] {
            assert_eq!(size(text).map(|size| size.as_u64()), Ok(bytes), "{text}");
        }
        for text in ["", "G", "1 xb", "abc", "-5", "1.2.3G", "99999999999T", "1e3", "."] {
            let error = size(text).unwrap_err();
            assert!(error.contains("K, M, G or T (of 1024)"), "{error}");
        }
    }

    #[test]
    fn arguments_are_sound_and_times_are_read() {
        Arguments::command().debug_assert();
        let line = ["backhaul", "failover", "web01", "--drain-timeout", "5 min", "--json"];
        let arguments = Arguments::try_parse_from(line).unwrap();
        let Verb::Failover { drain_timeout, to, .. } = arguments.verb else { panic!() };
        assert_eq!((drain_timeout.as_secs(), to.as_str()), (300, "latest"));
        assert!(Arguments::try_parse_from(["backhaul", "lab", "--link", "fast"]).is_err());
    }
}
