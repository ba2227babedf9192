//! `backhaul-benches`: measures Backhaul against its peers, in one run.

use std::path::PathBuf;

use backhaul_benches::{first_sync, guest_writes, images, links};
use clap::{Parser, Subcommand};

/// Measures Backhaul against its peers, in one run. Build the daemons first:
/// `cargo build --release`. Run nothing else meanwhile.
#[derive(Parser)]
struct Arguments {
    /// Where disks and images are put; it needs room for three times the disk
    #[arg(long, default_value = "/var/tmp")]
    dir: PathBuf,
    /// Runs of each contender
    #[arg(long, default_value_t = 3)]
    runs: usize,
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// First sync against nbdcopy and qemu-img convert
    FirstSync {
        /// Size of the disk, half of which is real files
        #[arg(long, default_value_t = 8)]
        gib: u64,
    },
    /// 4 KiB random writes through the export against qemu-nbd
    GuestWrites,
    /// Conversion and random writes of images against qemu-img and qemu-io
    Images {
        /// Size of the disk that is converted, half of which is real files
        #[arg(long, default_value_t = 2048)]
        mib: u64,
        /// Only kinds whose name contains this
        #[arg(long, default_value = "")]
        only: String,
    },
    /// Control under load over the same links
    Control {
        /// Only links whose name contains this
        #[arg(long, default_value = "")]
        only: String,
    },
    /// Payload over long, lossy links against iperf3, rsync, nbdcopy over TLS and quinn's Cubic
    Links {
        /// Only links whose name contains this
        #[arg(long, default_value = "")]
        only: String,
        /// Only these contenders
        #[arg(long)]
        contender: Vec<String>,
    },
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    std::fs::create_dir_all(&arguments.dir)?;
    match arguments.what {
        What::FirstSync { gib } => first_sync::run(&arguments.dir, gib << 30, arguments.runs).await,
        What::Links { only, contender } => {
            links::run(&arguments.dir, arguments.runs, &only, &contender).await
        }
        What::Images { mib, only } => images::run(&arguments.dir, mib << 20, arguments.runs, &only),
        What::Control { only } => links::probe(&arguments.dir, arguments.runs, &only).await,
        What::GuestWrites => guest_writes::run(&arguments.dir, arguments.runs).await,
    }
}
