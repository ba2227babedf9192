//! What we make, qemu must accept; what qemu makes, we must open. Needs the package qemu-utils.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use backhaul_disk_image::{
    AdapterType, CreateOptions, ImageError, Kind, OpenOptions, create, open,
};

fn qemu_img(args: &[&str]) -> (bool, String) {
    let output = Command::new("qemu-img")
        .args(args)
        .output()
        .expect("qemu-img is missing: install the Debian package qemu-utils");
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

const WRITABLE: OpenOptions = OpenOptions { writable: true, kind: None, allow_outside: false };

#[test]
fn qemu_accepts_every_kind_and_size_and_reads_what_was_written() {
    let dir = tempfile::tempdir().unwrap();
    for kind in [Kind::Raw, Kind::MonolithicFlat, Kind::Vmfs] {
        for size_bytes in [512, 513 * 512, 8 << 30, (3 << 40) + 512] {
            let image = dir.path().join(format!("{kind}-{size_bytes} disk.vmdk"));
            let adapter = AdapterType::LsiLogic;
            create(&image, &CreateOptions { kind, size_bytes, adapter }).unwrap();
            let opened = open(&image, &OpenOptions { kind: Some(kind), ..WRITABLE }).unwrap();
            assert_eq!((opened.size_bytes(), opened.kind()), (size_bytes, kind));
            let oracle = dir.path().join("oracle.raw");
            let raw = std::fs::File::create(&oracle).unwrap();
            raw.set_len(size_bytes).unwrap();
            for at in [0, size_bytes / 2 / 512 * 512, size_bytes - 512] {
                let sector = [at as u8 | 1; 512];
                opened.file().write_all_at(&sector, opened.base_offset_bytes() + at).unwrap();
                raw.write_all_at(&sector, at).unwrap();
            }
            opened.renew_content_id().unwrap();
            let format = if kind == Kind::Raw { "raw" } else { "vmdk" };
            let (good, info) = qemu_img(&["info", "-f", format, "--output=json", text(&image)]);
            assert!(good && info.contains(&format!("\"virtual-size\": {size_bytes}")), "{info}");
            if let Some(create_type) = kind.create_type() {
                assert!(info.contains(&format!("\"create-type\": \"{create_type}\"")), "{info}");
            }
            let compare = ["compare", "-f", format, "-F", "raw", text(&image), text(&oracle)];
            let (same, said) = qemu_img(&compare);
            assert!(same, "{kind} {size_bytes}: {said}");
        }
    }
}

#[test]
fn images_of_qemu_open_and_a_second_writer_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("q.vmdk");
    let options = "subformat=monolithicFlat,adapter_type=ide";
    let (good, said) = qemu_img(&["create", "-f", "vmdk", "-o", options, text(&image), "10M"]);
    assert!(good, "{said}");
    let first = open(&image, &WRITABLE).unwrap();
    assert_eq!((first.kind(), first.size_bytes()), (Kind::MonolithicFlat, 10 << 20));
    assert!(matches!(open(&image, &WRITABLE), Err(ImageError::Busy { .. })));
    let old = first.content_id().unwrap();
    first.renew_content_id().unwrap();
    assert_ne!(first.content_id().unwrap(), old);
}

#[test]
fn what_is_wrong_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("d.vmdk");
    let say = |text: &str| {
        std::fs::write(&image, text).unwrap();
        open(&image, &WRITABLE).unwrap_err().to_string()
    };
    let head = "# Disk DescriptorFile\ncreateType=\"vmfs\"\n";
    let sparse = say("# Disk DescriptorFile\ncreateType=\"seSparse\"\n");
    assert!(sparse.contains("is a seSparse image"), "{sparse}");
    let outside = say(&format!("{head}RW 8 VMFS \"../d-flat.vmdk\"\n"));
    assert!(outside.contains("leaves the descriptor's folder"), "{outside}");
    let huge = say(&format!("{head}RW 99999999999999999 VMFS \"d-flat.vmdk\"\n"));
    assert!(huge.contains("line 3: an extent's size"), "{huge}");
    let missing = say(&format!("{head}RW 8 VMFS \"d-flat.vmdk\"\n"));
    assert!(missing.contains("cannot open") && missing.contains("d-flat.vmdk"), "{missing}");
    std::fs::write(dir.path().join("d-flat.vmdk"), [0; 512]).unwrap();
    let short = say(&format!("{head}RW 8 VMFS \"d-flat.vmdk\"\n"));
    assert!(short.contains("has 512 bytes, but its descriptor needs 4096"), "{short}");
    let options =
        CreateOptions { kind: Kind::Vmfs, size_bytes: 4096, adapter: AdapterType::LsiLogic };
    assert!(matches!(create(&image, &options), Err(ImageError::Exists { .. })));
}
