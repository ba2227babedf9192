//! Conversion and random writes of every kind of image, against `qemu-img convert` and `qemu-io`.
//!
//! A conversion of ours is on stable storage at its end; `qemu-img convert` syncs nothing by default.
//! So that like meets like, both are measured both ways: ours as it comes and with `--no-sync`, its
//! as it comes and with `-t writeback`, which makes it flush. Both find the source in the page cache.

use std::fs::File;
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
        "| convert {} MiB, half real files | backhaul, s | qemu-img -t writeback, s | times as fast, both synced | backhaul --no-sync, s | qemu-img, s | times as fast, none synced | ours synced, qemu-img's not |",
        size_bytes >> 20
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
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
    let mut pairs = Pairs::default();
    let from = ["-f", "raw"];
    for run in 0..runs {
        let folder = tempfile::tempdir_in(dir)?;
        let ours = [&from[..], &["-O", kind.name()]].concat();
        let [made, made_by_qemu] = pairs.measure(&ours, &from, options, disk, &folder)?;
        if run == 0 {
            same(&made, &made_by_qemu)?;
        }
    }
    pairs.row(&format!("raw → {kind}"));
    Ok(())
}

/// From streamOptimized, made by qemu, to raw.
fn import(dir: &Path, disk: &Path, runs: usize) -> anyhow::Result<()> {
    let place = tempfile::tempdir_in(dir)?;
    let stream = place.path().join("stream.vmdk");
    let options = ["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized"];
    command(Command::new("qemu-img").args(options).args([disk, &stream]))?;
    let mut pairs = Pairs::default();
    for _ in 0..runs {
        let folder = tempfile::tempdir_in(dir)?;
        let to = ["-O", "raw"];
        pairs.measure(&to, &["-f", "vmdk"], &to, &stream, &folder)?;
    }
    pairs.row("streamOptimized → raw");
    Ok(())
}

/// Seconds of both contenders, with a sync at the end and without.
#[derive(Default)]
struct Pairs {
    synced: [Sample; 2],
    lazy: [Sample; 2],
}

impl Pairs {
    /// One run of each, in turn; tells where the images that were synced are.
    fn measure(
        &mut self,
        ours: &[&str],
        from: &[&str],
        to: &[&str],
        disk: &Path,
        folder: &tempfile::TempDir,
    ) -> anyhow::Result<[PathBuf; 2]> {
        let [ours_synced, qemu_synced] = &mut self.synced;
        let [ours_lazy, qemu_lazy] = &mut self.lazy;
        let made = backhaul(ours, disk, folder, "synced", ours_synced)?;
        let durably = [from, &["-t", "writeback"]].concat();
        let made_by_qemu = qemu_img(&durably, to, disk, folder, "synced", qemu_synced)?;
        let lazily = [ours, &["--no-sync"]].concat();
        backhaul(&lazily, disk, folder, "lazy", ours_lazy)?;
        qemu_img(from, to, disk, folder, "lazy", qemu_lazy)?;
        Ok([made, made_by_qemu])
    }

    fn row(&self, name: &str) {
        let ([ours, qemu], [ours_lazy, qemu_lazy]) = (&self.synced, &self.lazy);
        let times = |ours: &Sample, qemu: &Sample| qemu.median() / ours.median();
        let (both, none) = (times(ours, qemu), times(ours_lazy, qemu_lazy));
        let across = times(ours, qemu_lazy);
        println!(
            "| {name} | {ours} | {qemu} | {both:.2} | {ours_lazy} | {qemu_lazy} | {none:.2} | {across:.2} |"
        );
    }
}

fn backhaul(
    options: &[&str],
    disk: &Path,
    folder: &tempfile::TempDir,
    name: &str,
    sample: &mut Sample,
) -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe()?.with_file_name("backhaul");
    ensure!(
        program.exists(),
        "{} is missing; build it with `cargo build --release`",
        program.display()
    );
    let target = folder.path().join(format!("ours-{name}.img"));
    let mut line = Command::new(program);
    line.args(["image", "convert"]).args(options).args([disk, &target]).stdout(Stdio::null());
    timed(&mut line, &format!("backhaul, {name}"), sample)?;
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
    let target = folder.path().join(format!("qemu-{name}.img"));
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
