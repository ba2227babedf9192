//! The programs that people use, against the export of a real agent; what they wrote comes home.

use std::process::Command;

use backhaul_tests::Scenario;

const DISK_BYTES: u64 = 64 << 20;

struct Shell {
    dir: std::path::PathBuf,
}

impl Shell {
    /// Runs a program with these words, and returns what it printed.
    fn run(&self, words: &[&str]) -> String {
        let output = Command::new(words[0]).args(&words[1..]).current_dir(&self.dir).output();
        let output = output.unwrap_or_else(|error| panic!("{}: {error}", words[0]));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{words:?}: {said}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

/// nbdinfo, nbdcopy both ways, qemu-img, qemu-io and fio, in turn, while the machine replicates
/// and under a failover at the end. nbdfuse has a scenario of its own.
#[tokio::test(flavor = "multi_thread")]
async fn every_client_reads_what_the_others_wrote_and_the_vmdk_has_all_of_it() {
    let mut scenario = Scenario::prepare(DISK_BYTES, |_| {}).unwrap();
    scenario.start().unwrap();
    scenario.rig.connect(0).await.unwrap();
    scenario.wait_consistent().await.unwrap();
    let export = scenario.rig.export(0);
    let uri = format!("nbd+unix:///{export}?socket={}", scenario.rig.nbd_socket().display());
    let shell = Shell { dir: scenario.folder.path().to_owned() };

    let info: serde_json::Value =
        serde_json::from_str(&shell.run(&["nbdinfo", "--json", &uri])).unwrap();
    let seen = &info["exports"][0];
    assert_eq!(seen["export-size"], DISK_BYTES, "{seen}");
    for able in ["can_flush", "can_fua", "can_trim", "can_zero", "can_fast_zero", "can_multi_conn"]
    {
        assert_eq!(seen[able], true, "{able}: {seen}");
    }
    assert_eq!(info["structured"], true, "{info}");
    assert!(shell.run(&["nbdinfo", "--list", &uri]).contains(&export));

    // A source with holes and data, copied in, written to with every kind of request, copied out.
    let mut content = vec![0u8; DISK_BYTES as usize];
    for (index, byte) in content[8 << 20..24 << 20].iter_mut().enumerate() {
        *byte = ((index * 7919) >> 5) as u8;
    }
    std::fs::write(shell.dir.join("in.raw"), &content).unwrap();
    shell.run(&["nbdcopy", "--flush", "in.raw", &uri]);
    shell.run(&[
        "qemu-io",
        "-f",
        "raw",
        "-c",
        "write -P 0xa5 1M 3M",
        "-c",
        "write -f -P 0x5a 40M 64k",
        "-c",
        "write -z 9M 2M",
        "-c",
        "discard 12M 1M",
        "-c",
        "flush",
        "-c",
        "read -P 0xa5 1M 3M",
        "-c",
        "read -P 0 9M 2M",
        &uri,
    ]);
    content[1 << 20..4 << 20].fill(0xa5);
    content[40 << 20..(40 << 20) + (64 << 10)].fill(0x5a);
    content[9 << 20..11 << 20].fill(0);
    shell.run(&["nbdcopy", &uri, "out.raw"]);
    let out = std::fs::read(shell.dir.join("out.raw")).unwrap();
    // What was discarded may read as anything.
    assert!(out[..12 << 20] == content[..12 << 20] && out[13 << 20..] == content[13 << 20..]);
    shell.run(&["qemu-img", "compare", "-f", "raw", "-F", "raw", "out.raw", &uri]);
    let map = shell.run(&["qemu-img", "map", "--output=json", "-f", "raw", &uri]);
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let hole =
        |run: &serde_json::Value| run["zero"] == true && run["length"].as_u64() > Some(1 << 20);
    assert!(map.as_array().unwrap().iter().any(hole), "block status says where nothing is: {map}");

    let fio_uri = format!("--uri={uri}");
    shell.run(&[
        "fio",
        "--name=verify",
        "--ioengine=nbd",
        &fio_uri,
        "--rw=randwrite",
        "--bs=4k-64k",
        "--bsrange=4k-64k",
        "--size=32M",
        "--iodepth=16",
        "--verify=crc32c",
        "--randseed=7",
        "--fsync=64",
        "--do_verify=1",
        "--verify_fatal=1",
    ]);
    let done = scenario.fail_over().await.unwrap();
    assert!(done.failover.unwrap().source_drained);
    scenario.compare().unwrap();
}
