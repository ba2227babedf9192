//! The programs that people use with NBD, each against our server.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use backhaul_nbd::FileExport;

use crate::common::{KIB, MIB, PATIENCE, Site, noise, run, tool};
use crate::memory::Memory;

const LIBNBD: &str = "libnbd-bin";
const QEMU: &str = "qemu-utils";

/// A file with data, zeroes and holes, of `size_bytes`.
fn patchwork(path: &Path, size_bytes: u64) {
    use std::os::unix::fs::FileExt;
    let file = fs::File::create(path).unwrap();
    file.set_len(size_bytes).unwrap();
    let mut at = 0;
    while at < size_bytes {
        let len = (MIB + 12 * KIB).min(size_bytes - at);
        file.write_all_at(&noise(at, len as usize), at).unwrap();
        at += 3 * MIB;
    }
    file.write_all_at(&vec![0; MIB as usize], size_bytes - MIB).unwrap();
}

async fn compare(file: &Path, uri: &str) {
    let file = file.display().to_string();
    tool(QEMU, "qemu-img", &["compare", "-f", "raw", "-F", "raw", &file, uri]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nbdinfo_lists_describes_and_maps() {
    let site = Site::new().await;
    let path = site.file("disk", 8 * MIB);
    patchwork(&path, 4 * MIB);
    fs::File::options().write(true).open(&path).unwrap().set_len(8 * MIB).unwrap();
    let frozen = FileExport::open(&path, true).unwrap();
    site.exports.insert("frozen", Arc::new(frozen));

    for all in [site.uri(""), site.tcp_uri("")] {
        let listed = tool(LIBNBD, "nbdinfo", &["--list", "--json", &all]).await;
        for fact in [
            r#""protocol": "newstyle-fixed""#,
            r#""structured": true"#,
            r#""export-name": "disk""#,
            r#""export-name": "frozen""#,
            r#""export-size": 8388608"#,
            r#""base:allocation""#,
            r#""block_size_maximum": 33554432"#,
        ] {
            assert!(listed.contains(fact), "{fact} is not in\n{listed}");
        }
    }
    for can in ["fua", "flush", "trim", "zero", "fast-zero", "multi-conn", "df"] {
        tool(LIBNBD, "nbdinfo", &["--can", can, &site.uri("disk")]).await;
    }
    tool(LIBNBD, "nbdinfo", &["--is", "read-only", &site.uri("frozen")]).await;
    let read_only = run(LIBNBD, "nbdinfo", &["--is", "read-only", &site.uri("disk")]).await;
    assert_eq!(read_only.status.code(), Some(2));
    let size = tool(LIBNBD, "nbdinfo", &["--size", &site.tcp_uri("disk")]).await;
    assert_eq!(size.trim(), "8388608");

    let map = tool(LIBNBD, "nbdinfo", &["--map", &site.uri("disk")]).await;
    let rows: Vec<Vec<&str>> = map.lines().map(|row| row.split_whitespace().collect()).collect();
    let wanted = [
        ["0", "1060864", "0", "data"],
        ["1060864", "2084864", "3", "hole,zero"],
        ["3145728", "1048576", "0", "data"],
        ["4194304", "4194304", "3", "hole,zero"],
    ];
    assert_eq!(rows, wanted);
    let absent = run(LIBNBD, "nbdinfo", &[site.uri("absent")]).await;
    assert!(!absent.status.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn nbdcopy_goes_both_ways() {
    let site = Site::new().await;
    let source = site.path("source");
    patchwork(&source, 48 * MIB);
    let from = source.display().to_string();
    for (name, connections, uri) in [
        ("unix", "--connections=4", site.uri("unix")),
        ("tcp", "--connections=1", site.tcp_uri("tcp")),
    ] {
        let disk = site.file(name, 48 * MIB);
        // Old content must go, also where the source has holes.
        fs::write(&disk, noise(1, 48 << 20)).unwrap();
        let requests = "--requests=64";
        tool(LIBNBD, "nbdcopy", &[connections, requests, "--flush", &from, &uri]).await;
        assert!(fs::read(&disk).unwrap() == fs::read(&source).unwrap(), "{name}: to us");
        compare(&source, &uri).await;
        let back = site.path("back");
        let to = back.display().to_string();
        tool(LIBNBD, "nbdcopy", &[connections, requests, &uri, &to]).await;
        assert!(fs::read(&back).unwrap() == fs::read(&source).unwrap(), "{name}: from us");
    }
    // From one of our exports to another.
    site.file("other", 48 * MIB);
    tool(LIBNBD, "nbdcopy", &[site.uri("unix"), site.tcp_uri("other")]).await;
    compare(&source, &site.uri("other")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_img_converts_compares_and_maps() {
    let site = Site::new().await;
    let source = site.path("source");
    patchwork(&source, 24 * MIB);
    let from = source.display().to_string();
    site.file("disk", 24 * MIB);
    let uri = site.uri("disk");
    let info = tool(QEMU, "qemu-img", &["info", "--output=json", &uri]).await;
    assert!(info.contains("\"virtual-size\": 25165824"), "{info}");
    tool(QEMU, "qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", &from, &uri]).await;
    compare(&source, &uri).await;
    compare(&source, &site.tcp_uri("disk")).await;
    let vmdk = site.path("disk.vmdk").display().to_string();
    tool(QEMU, "qemu-img", &["convert", "-f", "raw", "-O", "vmdk", &uri, &vmdk]).await;
    tool(QEMU, "qemu-img", &["compare", "-f", "raw", "-F", "vmdk", &from, &vmdk]).await;
    let map = tool(QEMU, "qemu-img", &["map", "--output=json", "-f", "raw", &uri]).await;
    let first = r#""start": 0, "length": 1060864"#;
    assert!(map.contains(first) && map.contains(r#""data": false"#), "{map}");

    fs::write(&source, noise(3, 24 << 20)).unwrap();
    let args = ["compare", "-f", "raw", "-F", "raw", &from, &uri];
    assert_eq!(run(QEMU, "qemu-img", &args).await.status.code(), Some(1), "they differ now");
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_io_writes_zeroes_discards_and_flushes() {
    let site = Site::new().await;
    let path = site.file("disk", 4 * MIB);
    let uri = site.uri("disk");
    let commands = [
        "aio_write -P 0xab 0 64k",
        "aio_write -P 0xcd 1M 1M",
        "aio_flush",
        "write -f -P 0xee 4k 4k",
        "write -z 1M 64k",
        "write -z -u 1216k 64k",
        "discard 1536k 64k",
        "flush",
        "read -P 0xab 0 4k",
        "read -P 0xee 4k 4k",
        "read -P 0 1M 64k",
        "read -P 0 1216k 64k",
        "read -P 0 1536k 64k",
        "read -P 0xcd 1088k 128k",
        "read -P 0 2M 2M",
    ];
    let mut args = vec!["-f", "raw", "--discard=unmap"];
    args.extend(commands.iter().flat_map(|command| ["-c", *command]));
    args.push(&uri);
    let printed = tool(QEMU, "qemu-io", &args).await;
    // It exits with 0 whatever a command came to.
    assert!(!printed.contains("failed"), "{printed}");

    let mut expected = vec![0; 4 << 20];
    expected[..64 << 10].fill(0xab);
    expected[4 << 10..8 << 10].fill(0xee);
    expected[1 << 20..2 << 20].fill(0xcd);
    for at in [1024usize, 1216, 1536] {
        expected[at << 10..(at + 64) << 10].fill(0);
    }
    assert!(fs::read(&path).unwrap() == expected);
    let map = tool(LIBNBD, "nbdinfo", &["--map", &uri]).await;
    let hole = |at: &str| {
        map.lines().any(|row| row.split_whitespace().next() == Some(at) && row.ends_with("zero"))
    };
    // `write -z` keeps the space, `-u` and `discard` give it back.
    assert!(hole("1245184") && hole("1572864"), "{map}");
}

#[tokio::test(flavor = "multi_thread")]
async fn flush_and_fua_reach_the_export() {
    let site = Site::new().await;
    let disk = Arc::new(Memory::new(MIB));
    site.export("disk", Arc::clone(&disk));
    let uri = site.uri("disk");
    let io = async |command: &str| {
        // Write-back, or qemu-io makes every write durable by itself.
        let args = ["-f", "raw", "-t", "writeback", "-c", command, &uri];
        tool(QEMU, "qemu-io", &args).await;
        (disk.fua.swap(0, Ordering::SeqCst), disk.flushes.swap(0, Ordering::SeqCst) > 0)
    };
    assert_eq!(io("write -P 1 0 4k").await.0, 0);
    assert_eq!(io("write -f -P 2 0 4k").await.0, 1);
    assert_eq!(io("write -z -f 8k 4k").await.0, 1);
    assert!(io("flush").await.1);
}

#[tokio::test(flavor = "multi_thread")]
async fn fio_verifies_what_it_wrote() {
    let site = Site::new().await;
    site.file("disk", 16 * MIB);
    for (uri, depth) in [(site.uri("disk"), "32"), (site.tcp_uri("disk"), "1")] {
        let printed = tool(
            "fio",
            "fio",
            &[
                "--name=verify",
                "--ioengine=nbd",
                &format!("--uri={uri}"),
                "--rw=randwrite",
                "--bsrange=512-128k",
                "--bs_unaligned=0",
                "--size=16m",
                "--io_size=24m",
                &format!("--iodepth={depth}"),
                "--verify=crc32c",
                "--verify_fatal=1",
                "--fsync=64",
                "--aux-path",
                &site.path("").display().to_string(),
            ],
        )
        .await;
        assert!(printed.contains("err= 0"), "{printed}");
        assert!(printed.contains("READ: "), "nothing was verified:\n{printed}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nbdfuse_makes_a_file_of_the_export() {
    if !rustix::process::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
        println!("skipped: nbdfuse needs root and /dev/fuse");
        return;
    }
    let site = Site::new().await;
    let disk = site.file("disk", 8 * MIB);
    let mount = site.path("mount");
    fs::create_dir(&mount).unwrap();
    let (file, pid) = (mount.join("nbd"), site.path("pid"));
    let started = tokio::process::Command::new("nbdfuse")
        .args(["--pidfile".as_ref(), pid.as_os_str(), file.as_os_str(), site.uri("disk").as_ref()])
        .kill_on_drop(true)
        .spawn();
    let mut nbdfuse = started.expect("this test needs `nbdfuse`: apt-get install libnbd-bin");
    let ready = async {
        // The file is written once the mount is there; there is nothing to wait on but the file.
        while fs::read_to_string(&pid).map_or(true, |pid| pid.is_empty()) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, ready).await.expect("nbdfuse did not mount");

    let data = noise(11, 3 << 20);
    let (through, expected) = (file.clone(), data.clone());
    let used = tokio::task::spawn_blocking(move || {
        use std::os::unix::fs::FileExt;
        let file = fs::File::options().read(true).write(true).open(through)?;
        file.write_all_at(&data, 70_000)?;
        file.sync_all()?;
        let mut read = vec![0; expected.len()];
        file.read_exact_at(&mut read, 70_000)?;
        assert!(read == expected);
        std::io::Result::Ok((file.metadata()?.len(), expected))
    });
    let (size_bytes, data) = used.await.unwrap().unwrap();
    assert_eq!(size_bytes, 8 * MIB);
    tool("mount", "umount", &[&mount]).await;
    assert!(tokio::time::timeout(PATIENCE, nbdfuse.wait()).await.unwrap().unwrap().success());
    let content = fs::read(disk).unwrap();
    assert!(content[70_000..70_000 + data.len()] == data[..]);
    assert!(content[70_000 + data.len()..].iter().all(|byte| *byte == 0));
}
