//! The transport alone over loopback, without a limit: ours, bare quinn and noq, and TCP with TLS.

use std::path::Path;

use crate::Span;
use crate::sample::Sample;
use crate::transfer::Transfer;

/// Name in the table, and the kind that the example `transfer` knows.
const CONTENDERS: [(&str, &str); 6] = [
    ("backhaul's link", "ours"),
    ("backhaul's link, two connections", "ours-two"),
    ("bare quinn, same windows and packets", "quinn-cubic"),
    ("bare quinn as it comes", "quinn-default"),
    ("bare noq, same windows and packets", "noq-cubic"),
    ("TCP and TLS 1.3", "tls"),
];
const MIB: f64 = (1 << 20) as f64;
const GIB: f64 = (1 << 30) as f64;

/// Measures each in turn, `runs` times; prints a table.
pub fn run(dir: &Path, runs: usize, span: &Span) -> anyhow::Result<()> {
    let mut samples = vec![<[Sample; 2]>::default(); CONTENDERS.len()];
    for _ in 0..runs {
        for ((name, kind), [rate, cpu]) in CONTENDERS.iter().zip(&mut samples) {
            let folder = tempfile::tempdir_in(dir)?;
            let result = Transfer::start(kind, None, folder.path())?.measure(span)?;
            rate.push(result.bytes_per_second / MIB);
            cpu.push(result.cpu_seconds_per_byte * GIB);
            eprintln!("{name}: {:.0} MiB/s", result.bytes_per_second / MIB);
        }
    }
    println!(
        "| loopback, transport only | MiB/s | against bare quinn (goal ≥ 0.85) | CPU seconds for a GiB, both ends |"
    );
    println!("| --- | --- | --- | --- |");
    let quinn = samples[2][0].median();
    for ((name, _), [rate, cpu]) in CONTENDERS.iter().zip(&samples) {
        println!("| {name} | {rate:.0} | {:.2} | {cpu} |", rate.median() / quinn);
    }
    Ok(())
}
