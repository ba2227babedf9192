//! Conversion and random writes of every kind of image, against `qemu-img convert` and `qemu-io`.
//!
//! Ours is on stable storage at the end. `qemu-img convert` syncs nothing by default, so it is
//! measured twice: as it comes, and with `-t writeback`, which makes it flush. Its read-ahead and
//! ours find the source in the page cache.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, ensure};
use backhaul_disk_image::{CreateOptions, Kind, OpenOptions, Silent, create, open, ops};
use backhaul_lab::disk::{DiskSpec, make_disk};
use backhaul_lab::random::Random;

use crate::sample::Sample;

/// Bytes of the disk that is written at random.
const WRITTEN_DISK_BYTES: u64 = 4 << 30;
/// Writes of a run: some seconds on a slow disk, and long against the start of a process.
const WRITES: usize = 30_000;
const WRITE_BYTES: u64 = 4096;

/// Each kind, and how qemu-img is told to make it, or what is nearest to it.
const KINDS: [(Kind, &[&str]); 8] = [
    (Kind::Raw, &["-O", "raw"]),
    (Kind::MonolithicFlat, &["-O", "vmdk", "-o", "subformat=monolithicFlat"]),
    (Kind::TwoGbMaxExtentFlat, &["-O", "vmdk", "-o", "subformat=twoGbMaxExtentFlat"]),
    (Kind::Vmfs, &["-O", "vmdk", "-o", "subformat=monolithicFlat"]),
    (Kind::MonolithicSparse, &["-O", "vmdk", "-o", "subformat=monolithicSparse"]),
    (Kind::TwoGbMaxExtentSparse, &["-O", "vmdk", "-o", "subformat=twoGbMaxExtentSparse"]),
    (Kind::StreamOptimized, &["-O", "vmdk", "-o", "subformat=streamOptimized"]),
    (Kind::FixedVhd, &["-O", "vpc", "-o", "subformat=fixed,force_size=on"]),
];

/// Runs all of it, `runs` times each, in `dir`; prints two tables.
pub fn run(dir: &Path, size_bytes: u64, runs: usize, only: &str) -> anyhow::Result<()> {
    let kinds = || KINDS.iter().filter(|(kind, _)| kind.name().contains(only));
    let disk = dir.join(format!("images-{}.raw", size_bytes >> 20));
    if !disk.exists() {
        eprintln!("making a disk of {} MiB", size_bytes >> 20);
        make_disk(&disk, &DiskSpec::with_size(size_bytes))?;
    }
    println!(
        "| convert {} MiB, half real files | backhaul, s | qemu-img, s | qemu-img -t writeback, s | times as fast | as with -t writeback |",
        size_bytes >> 20
    );
    println!("| --- | --- | --- | --- | --- | --- |");
    for (kind, options) in kinds() {
        conversions(dir, &disk, *kind, options, runs)?;
    }
    if "streamOptimized".contains(only) {
        import(dir, &disk, runs)?;
    }
    println!();
    println!("| 4 KiB random writes, one at a time | backhaul, 1/s | qemu-io, 1/s | ratio |");
    println!("| --- | --- | --- | --- |");
    for (kind, _) in kinds().filter(|(kind, _)| kind.is_writable()) {
        writes(dir, *kind, runs)?;
    }
    Ok(())
}

/// From raw to `kind`.
fn conversions(
    dir: &Path,
    disk: &Path,
    kind: Kind,
    options: &[&str],
    runs: usize,
) -> anyhow::Result<()> {
    let (mut ours, mut lazy, mut durable) = Default::default();
    for run in 0..runs {
        let folder = tempfile::tempdir_in(dir)?;
        let made = backhaul(&["-f", "raw", "-O", kind.name()], disk, &folder, &mut ours)?;
        let made_by_qemu = qemu_img(&["-f", "raw"], options, disk, &folder, "lazy", &mut lazy)?;
        if run == 0 {
            same(&made, &made_by_qemu)?;
        }
        fs::remove_file(made_by_qemu)?;
        let durably = &["-t", "writeback", "-f", "raw"];
        qemu_img(durably, options, disk, &folder, "durable", &mut durable)?;
    }
    row(&format!("raw → {kind}"), &ours, &lazy, &durable);
    Ok(())
}

/// From streamOptimized, made by qemu, to raw.
fn import(dir: &Path, disk: &Path, runs: usize) -> anyhow::Result<()> {
    let place = tempfile::tempdir_in(dir)?;
    let stream = place.path().join("stream.vmdk");
    let options = ["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized"];
    command(Command::new("qemu-img").args(options).args([disk, &stream]))?;
    let (mut ours, mut lazy, mut durable) = Default::default();
    for _ in 0..runs {
        let folder = tempfile::tempdir_in(dir)?;
        backhaul(&["-O", "raw"], &stream, &folder, &mut ours)?;
        let from = ["-f", "vmdk"];
        qemu_img(&from, &["-O", "raw"], &stream, &folder, "lazy", &mut lazy)?;
        let from = ["-t", "writeback", "-f", "vmdk"];
        qemu_img(&from, &["-O", "raw"], &stream, &folder, "durable", &mut durable)?;
    }
    row("streamOptimized → raw", &ours, &lazy, &durable);
    Ok(())
}

fn row(name: &str, ours: &Sample, lazy: &Sample, durable: &Sample) {
    let (to_lazy, to_durable) = (lazy.median() / ours.median(), durable.median() / ours.median());
    println!("| {name} | {ours} | {lazy} | {durable} | {to_lazy:.2} | {to_durable:.2} |");
}

fn backhaul(
    options: &[&str],
    disk: &Path,
    folder: &tempfile::TempDir,
    sample: &mut Sample,
) -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe()?.with_file_name("backhaul");
    ensure!(
        program.exists(),
        "{} is missing; build it with `cargo build --release`",
        program.display()
    );
    let target = folder.path().join("ours.img");
    let mut line = Command::new(program);
    line.args(["image", "convert"]).args(options).args([disk, &target]).stdout(Stdio::null());
    timed(&mut line, "backhaul", sample)?;
    Ok(target)
}

fn qemu_img(
    from: &[&str],
    to: &[&str],
    disk: &Path,
    folder: &tempfile::TempDir,
    name: &str,
    sample: &mut Sample,
) -> anyhow::Result<PathBuf> {
    let target = folder.path().join(format!("{name}.img"));
    let mut line = Command::new("qemu-img");
    line.arg("convert").args(from).args(to).args([disk, &target]);
    timed(&mut line, &format!("qemu-img, {name}"), sample)?;
    Ok(target)
}

fn timed(line: &mut Command, name: &str, sample: &mut Sample) -> anyhow::Result<()> {
    // What the one before left to be written is not this one's.
    rustix::fs::sync();
    let began = Instant::now();
    command(line)?;
    let seconds = began.elapsed().as_secs_f64();
    eprintln!("{name}: {seconds:.2} s");
    sample.push(seconds);
    Ok(())
}

fn command(line: &mut Command) -> anyhow::Result<()> {
    let status = line.status().with_context(|| format!("{line:?} cannot be started"))?;
    ensure!(status.success(), "{line:?}: {status}");
    Ok(())
}

fn same(one: &Path, other: &Path) -> anyhow::Result<()> {
    let options = OpenOptions::read_only();
    let report = ops::compare(&*open(one, &options)?, &*open(other, &options)?, None, &mut Silent)?;
    ensure!(report.same_content, "{} and {} differ", one.display(), other.display());
    Ok(())
}

/// Writes into an image that stores nothing yet, then the same places again; a flush at the end of
/// each. Both contenders write into an image that we made.
fn writes(dir: &Path, kind: Kind, runs: usize) -> anyhow::Result<()> {
    let (mut ours, mut theirs) = (<[Sample; 2]>::default(), <[Sample; 2]>::default());
    for _ in 0..runs {
        let offsets = offsets();
        let folder = tempfile::tempdir_in(dir)?;
        let [our_image, their_image] = ["ours", "theirs"].map(|name| folder.path().join(name));
        for image in [&our_image, &their_image] {
            create(image, &CreateOptions::new(kind, WRITTEN_DISK_BYTES))?;
        }
        for pass in 0..2 {
            rustix::fs::sync();
            let rate = WRITES as f64 / write_ours(&our_image, kind, &offsets)?;
            eprintln!("{kind}: backhaul: {rate:.0}/s");
            ours[pass].push(rate);
            rustix::fs::sync();
            let rate = WRITES as f64 / write_theirs(&their_image, kind, &offsets)?;
            eprintln!("{kind}: qemu-io: {rate:.0}/s");
            theirs[pass].push(rate);
        }
        same(&our_image, &their_image)?;
    }
    for (pass, name) in ["first", "again"].iter().enumerate() {
        let (ours, theirs) = (&ours[pass], &theirs[pass]);
        println!(
            "| {kind}, {name} | {ours:.0} | {theirs:.0} | {:.2} |",
            ours.median() / theirs.median()
        );
    }
    Ok(())
}

fn offsets() -> Vec<u64> {
    let mut random = Random::new(5);
    (0..WRITES).map(|_| random.below(WRITTEN_DISK_BYTES / WRITE_BYTES) * WRITE_BYTES).collect()
}

fn write_ours(path: &Path, kind: Kind, offsets: &[u64]) -> anyhow::Result<f64> {
    let began = Instant::now();
    let image = open(path, &OpenOptions::writable().of_kind(kind))?;
    let bytes = [0x5a; WRITE_BYTES as usize];
    for offset in offsets {
        image.write_at(&bytes, *offset)?;
    }
    image.flush()?;
    Ok(began.elapsed().as_secs_f64())
}

/// The time of qemu-io without that of starting and opening, in its favour. Every write is a line of
/// its input, which costs it about a microsecond.
fn write_theirs(path: &Path, kind: Kind, offsets: &[u64]) -> anyhow::Result<f64> {
    let mut script = String::new();
    let nothing = qemu_io(path, kind, "flush\n")?;
    for offset in offsets {
        script += &format!("write -q -P 0x5a {offset} {WRITE_BYTES}\n");
    }
    script += "flush\n";
    Ok(qemu_io(path, kind, &script)? - nothing)
}

fn qemu_io(path: &Path, kind: Kind, script: &str) -> anyhow::Result<f64> {
    let driver = match kind {
        Kind::Raw => "driver=raw",
        Kind::FixedVhd => "driver=vpc,force_size_calc=current_size",
        _ => "driver=vmdk",
    };
    let commands = tempfile::NamedTempFile::new()?;
    commands.as_file().write_all(script.as_bytes())?;
    let began = Instant::now();
    let mut line = Command::new("qemu-io");
    // Its default syncs after every write.
    line.args([
        "-t",
        "writeback",
        "--image-opts",
        &format!("{driver},file.filename={}", path.display()),
    ]);
    line.stdin(File::open(commands.path())?).stdout(Stdio::null());
    command(&mut line)?;
    Ok(began.elapsed().as_secs_f64())
}
