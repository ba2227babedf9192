//! A whole guest runs from a converted image of every kind, reads what was converted, and what it
//! writes there is read by us.

use std::path::{Path, PathBuf};
use std::process::Command;

use backhaul_lab::random::Random;
use backhaul_lab::tool::Tool;
use backhaul_tests::whole_guest::Parts;

const DISK_BYTES: u64 = 48 << 20;
const PAYLOAD_BYTES: usize = 3 << 20;

/// Every kind that a guest can run from, what its name ends in, and how qemu takes it. A stream is
/// written once, so the guest's writes go elsewhere; of a VHD, qemu is to take the size that the
/// footer names instead of its geometry.
const KINDS: [(&str, &str, &str); 8] = [
    ("raw", "raw", "format=raw"),
    ("monolithicFlat", "vmdk", "format=vmdk"),
    ("twoGbMaxExtentFlat", "vmdk", "format=vmdk"),
    ("vmfs", "vmdk", "format=vmdk"),
    ("monolithicSparse", "vmdk", "format=vmdk"),
    ("twoGbMaxExtentSparse", "vmdk", "format=vmdk"),
    (STREAM, "vmdk", "format=vmdk,snapshot=on"),
    ("vhd", "vhd", "format=vpc,force_size_calc=current_size"),
];

const STREAM: &str = "streamOptimized";

struct Lab {
    parts: Parts,
    folder: tempfile::TempDir,
    payload: PathBuf,
    payload_hash: String,
    initramfs: PathBuf,
}

impl Lab {
    /// None where a guest cannot be run, said.
    fn prepare() -> Option<Self> {
        let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("guest");
        let parts = match Parts::find(&cache) {
            Ok(parts) => parts,
            Err(missing) => {
                println!("skipped: no guest can be run: {missing:#}");
                return None;
            }
        };
        let folder = tempfile::tempdir().unwrap();
        let (payload, initramfs) = (folder.path().join("payload"), folder.path().join("initramfs"));
        let mut bytes = vec![0; PAYLOAD_BYTES];
        Random::new(7).fill(&mut bytes);
        std::fs::write(&payload, &bytes).unwrap();
        parts.make_disk(&folder.path().join("disk.raw"), &bytes, DISK_BYTES).unwrap();
        std::fs::write(&initramfs, parts.initramfs().unwrap()).unwrap();
        let hash = Command::new("sha256sum").arg(&payload).output().unwrap();
        let payload_hash = String::from_utf8(hash.stdout).unwrap()[..64].to_owned();
        Some(Self { parts, folder, payload, payload_hash, initramfs })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn image(&self, words: &[&str], paths: &[&Path]) {
        let program = backhaul_tests::programs().join("backhaul");
        let output = Command::new(program).arg("image").args(words).args(paths).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{words:?} {paths:?}: {said}");
    }

    fn boot(&self, image: &Path, format: &str) {
        let drive = format!("file={},{format}", image.display());
        let said = self.parts.boot(&self.initramfs, &drive).unwrap();
        assert!(said.contains(&format!("payload {}", self.payload_hash)), "{drive}: {said}");
        assert!(said.contains("written"), "{drive}: {said}");
    }

    /// Fails unless the image is sound and holds what the guest wrote, in a sound file system.
    fn judge(&self, image: &Path) {
        self.image(&["check"], &[image]);
        let (raw, copy) = (self.path("judged.raw"), self.path("copy"));
        self.image(&["convert", "--force", "-O", "raw"], &[image, &raw]);
        let dump = format!("dump /copy {}", copy.display());
        Tool::DEBUGFS.run(&["-R".as_ref(), dump.as_ref(), raw.as_os_str()]).unwrap();
        assert!(std::fs::read(&copy).unwrap() == std::fs::read(&self.payload).unwrap());
        Tool::E2FSCK.run(&["-fn".as_ref(), raw.as_os_str()]).unwrap();
    }
}

#[test]
fn a_guest_runs_from_every_kind() {
    let Some(lab) = Lab::prepare() else { return };
    for (kind, ending, format) in KINDS {
        let image = lab.path(&format!("{kind}.{ending}"));
        lab.image(&["convert", "-f", "raw", "-O", kind], &[&lab.path("disk.raw"), &image]);
        lab.boot(&image, format);
        if kind != STREAM {
            lab.judge(&image);
        }
        println!("a guest ran from {kind}");
    }
}

#[test]
fn a_guest_runs_from_a_delta_and_its_parent_stays() {
    let Some(lab) = Lab::prepare() else { return };
    let (raw, base, delta) = (lab.path("disk.raw"), lab.path("base.vmdk"), lab.path("delta.vmdk"));
    lab.image(&["convert", "-f", "raw", "-O", "vmfs"], &[&raw, &base]);
    lab.image(&["create", "-O", "monolithicSparse", "--parent"], &[&base, &delta]);
    lab.boot(&delta, "format=vmdk");
    lab.judge(&delta);
    lab.image(&["compare"], &[&raw, &base]);
}
