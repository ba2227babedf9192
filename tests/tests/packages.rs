//! The Debian packages: what an operator installs, and what it sets.
//!
//! Nothing looked into them. A file that is not there, or a kernel setting with a typing mistake,
//! would have been noticed by the first user whose bursts are dropped.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The lines that a command prints; panics when it fails.
fn lines(command: &mut Command) -> Vec<String> {
    let output = command.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

fn project() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

#[test]
fn both_packages_bring_what_their_host_needs() {
    if Command::new("dpkg-deb").arg("--version").output().is_err() {
        eprintln!("skipped: this is no Debian, dpkg-deb is missing");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut make = Command::new(project().join("packaging/deb"));
    // Programs with all that a debugger wants take a minute to be packed well.
    make.env("DPKG_DEB_COMPRESSOR_TYPE", "gzip").env("DPKG_DEB_COMPRESSOR_LEVEL", "1");
    lines(make.arg(folder.path()).arg(backhaul_tests::programs()));
    let packages: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(Result::unwrap).collect();
    assert_eq!(packages.len(), 2);
    for (name, programs) in [
        ("backhaul-agent", &["backhaul-agent"][..]),
        ("backhaul-master-target", &["backhaul-master-target", "backhaul"]),
    ] {
        let is_it = |path: &PathBuf| {
            path.file_name().unwrap().to_str().unwrap().starts_with(&format!("{name}_"))
        };
        let package = packages.iter().map(std::fs::DirEntry::path).find(is_it).unwrap();
        let listed = lines(Command::new("dpkg-deb").arg("-c").arg(&package));
        let has = |path: &str| {
            assert!(listed.iter().any(|line| line.ends_with(path)), "{name} lacks {path}");
        };
        for program in programs {
            has(&format!("./usr/bin/{program}"));
            has(&format!("./usr/share/man/man1/{program}.1.gz"));
            has(&format!("./usr/share/bash-completion/completions/{program}"));
        }
        has(&format!("./usr/lib/systemd/system/{name}.service"));
        has(&format!("./usr/lib/sysctl.d/60-{name}.conf"));
        has("./etc/backhaul/");
        let field = lines(Command::new("dpkg-deb").arg("-f").arg(&package).arg("Package"));
        assert_eq!(field, [name]);
    }
}

#[test]
fn the_kernel_knows_every_setting() {
    let settings = std::fs::read_to_string(project().join("packaging/60-backhaul.conf")).unwrap();
    let mut found = Vec::new();
    for line in settings.lines().filter(|line| !line.starts_with('#')) {
        let (key, value) = line.split_once(" = ").unwrap();
        assert!(value.split(' ').all(|number| number.parse::<u64>().is_ok()), "{line}");
        let file = Path::new("/proc/sys").join(key.replace('.', "/"));
        // A container's network has the host's buffers, and does not show them.
        let hidden = !Path::new("/proc/sys/net/core/rmem_default").exists();
        assert!(file.exists() || hidden, "{key} is no setting of this kernel");
        found.push(key);
    }
    assert!(found.contains(&"net.core.rmem_max"), "the receive buffer is what drops bursts");
}
