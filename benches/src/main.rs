//! `backhaul-benches`: measures Backhaul against its peers, in one run.

use std::path::PathBuf;
use std::time::Duration;

use backhaul_benches::ceiling::Whose;
use backhaul_benches::files::Files;
use backhaul_benches::sharing::Sharing;
use backhaul_benches::{
    Span, barriers, ceiling, clean, control, dark, files, first_sync, guest_writes, images,
    instrument, links, loopback, sharing, startup,
};
use backhaul_lab::link::LinkSpec;
use clap::{Parser, Subcommand};

/// Measures Backhaul against its peers, in one run. Build the daemons first:
/// `cargo build --release`, and `cargo build --release -p backhaul-benches --examples` for what
/// measures bare transports. Run nothing else meanwhile.
#[derive(Parser)]
struct Arguments {
    /// Where disks and images are put; it needs room for five times the disk
    #[arg(long, default_value = "/var/tmp")]
    dir: PathBuf,
    /// Runs of each contender
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Seconds of a link's traffic that are measured
    #[arg(long, global = true, default_value_t = 15, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    /// Seconds before that which are left out
    #[arg(long, global = true, default_value_t = 5, value_parser = clap::value_parser!(u64).range(0..=3600))]
    settle: u64,
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
        /// What carries it: auto, quic or tcp
        #[arg(long, default_value = "auto")]
        transport: String,
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
        /// These links instead: rate, one-way delay, loss and so on
        #[arg(long)]
        link: Vec<LinkSpec>,
    },
    /// Recovery points of one machine while another one's data fill the same links
    Barriers {
        /// Only links whose name contains this
        #[arg(long, default_value = "")]
        only: String,
        /// What carries it: quic or tcp
        #[arg(long, default_value = "quic", value_parser = ["quic", "tcp"])]
        transport: String,
    },
    /// Payload over long, lossy links against iperf3, rsync, nbdcopy over TLS, quinn and noq
    Links {
        /// Only links whose name contains this
        #[arg(long, default_value = "")]
        only: String,
        /// Only these contenders
        #[arg(long)]
        contender: Vec<String>,
    },
    /// Whether the emulated link is what it says, by iperf3's UDP
    Instrument,
    /// A link shared with one flow of kernel TCP, Cubic or BBR
    Sharing {
        /// The link: rate, one-way delay, loss and so on
        #[arg(long, default_value = "200mbit,20ms")]
        link: LinkSpec,
        /// Only rows whose name contains this, such as "bbr, which is there before"
        #[arg(long, default_value = "")]
        only: String,
        /// Who shares it: the whole pipeline (backhaul), or a bare transport such as quinn-cubic
        #[arg(long, default_value = "backhaul")]
        contender: Vec<String>,
    },
    /// From idle to 80 % of the rate, in round trips
    Startup {
        /// Only links whose name contains this
        #[arg(long, default_value = "")]
        only: String,
    },
    /// How soon a link that was dark is full again
    Dark {
        /// Only links whose name contains this
        #[arg(long, default_value = "")]
        only: String,
        /// For how long it is dark
        #[arg(long, default_value_t = 30)]
        dark_seconds: u64,
    },
    /// What senders lose and delay by themselves on a link without loss
    Clean {
        /// Only links whose name contains this
        #[arg(long, default_value = "")]
        only: String,
    },
    /// The transport alone over loopback against bare quinn and noq, and TCP with TLS
    Loopback,
    /// A disk with real files over a long link against nbdcopy over TLS, rsync and qemu-img
    Files {
        /// Size of the disk, half of which is files
        #[arg(long, default_value_t = 8)]
        gib: u64,
        /// The link: rate, one-way delay, loss and so on
        #[arg(long, default_value = files::LINK)]
        link: LinkSpec,
        /// The kernel's congestion control for the peers, such as cubic; without it, this machine's
        #[arg(long)]
        tcp: Option<String>,
        /// Only these contenders
        #[arg(long)]
        contender: Vec<String>,
        /// Cut a peer off after so many times Backhaul's time; its row is a bound then
        #[arg(long)]
        give_up: Option<f64>,
    },
    /// How closely a ceiling holds, and how soon a changed one does
    Ceiling {
        /// Whose ceiling it is
        #[arg(long, value_enum, default_value = "link")]
        of: Whose,
        /// What carries it: quic or tcp
        #[arg(long, default_value = "quic", value_parser = ["quic", "tcp"])]
        transport: String,
    },
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Arguments { dir, runs, seconds, settle, what } = Arguments::parse();
    std::fs::create_dir_all(&dir)?;
    let span = Span { settle: Duration::from_secs(settle), measure: Duration::from_secs(seconds) };
    match what {
        What::FirstSync { gib, transport } => {
            first_sync::run(&dir, gib << 30, runs, &transport).await
        }
        What::Links { only, contender } => links::run(&dir, runs, &span, &only, &contender).await,
        What::Images { mib, only } => images::run(&dir, mib << 20, runs, &only),
        What::Control { only, link } => control::run(&dir, runs, &only, &link).await,
        What::Barriers { only, transport } => {
            barriers::run(&dir, runs, &span, &only, &transport).await
        }
        What::GuestWrites => guest_writes::run(&dir, runs).await,
        What::Instrument => instrument::run(runs, &span),
        What::Sharing { link, only, contender } => {
            let what = Sharing { link, only, contenders: contender };
            sharing::run(&dir, runs, &span, &what).await
        }
        What::Startup { only } => startup::run(&dir, runs, &only).await,
        What::Dark { only, dark_seconds } => {
            dark::run(&dir, runs, &only, Duration::from_secs(dark_seconds)).await
        }
        What::Clean { only } => clean::run(&dir, runs, &span, &only).await,
        What::Loopback => loopback::run(&dir, runs, &span),
        What::Files { gib, link, tcp, contender, give_up } => {
            let (size_bytes, contenders) = (gib << 30, contender);
            let what = Files { size_bytes, link, tcp, contenders, give_up };
            files::run(&dir, runs, &what).await
        }
        What::Ceiling { of, transport } => ceiling::run(&dir, runs, &span, of, &transport).await,
    }
}
