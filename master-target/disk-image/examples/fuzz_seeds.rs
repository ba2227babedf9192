//! Writes the first inputs of every fuzz corpus anew; for whoever changes how they are packed:
//! `cargo run -p backhaul-disk-image --example fuzz_seeds`.

#[path = "../fuzz/attack.rs"]
#[allow(missing_docs, unreachable_pub, dead_code)]
mod attack;
#[path = "../tests/support/esxi.rs"]
mod esxi;

use std::path::Path;

use backhaul_disk_image::{
    CreateOptions, Kind, OpenOptions, Silent, create, open,
    ops::{ConvertOptions, convert},
};
use esxi::{Grain, cowd, sesparse};

fn main() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source.vmdk");
    create(&source, &CreateOptions::new(Kind::MonolithicSparse, 200_192)).unwrap();
    let image = open(&source, &OpenOptions::writable()).unwrap();
    image.write_at(&[7; 600], 66_000).unwrap();
    image.flush().unwrap();
    let seed = |target: &str, name: &str, bytes: &[u8]| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join(name), bytes).unwrap();
    };
    let made = |kind: Kind, zeroed_grains: bool| {
        let target = dir.path().join(format!("{kind}-{zeroed_grains}.vmdk"));
        let mut options = ConvertOptions::new(kind);
        options.create.zeroed_grains = zeroed_grains;
        convert(image.as_ref(), &target, &options, &mut Silent).unwrap();
        std::fs::read(target).unwrap()
    };
    seed("sparse", "version-1", &attack::pack(&made(Kind::MonolithicSparse, false)));
    seed("sparse", "version-2", &attack::pack(&made(Kind::MonolithicSparse, true)));
    seed("stream", "footer", &attack::pack(&made(Kind::StreamOptimized, false)));
    seed("vhd", "fixed", &attack::pack(&made(Kind::FixedVhd, false)));
    seed("snapshot", "cowd", &attack::pack(&cowd(500, 1, &[(1, vec![1; 512]), (2, vec![2; 512])])));
    let grains = [(0, Grain::Data(vec![1; 4096])), (1, Grain::Zero), (3, Grain::Unmapped)];
    let mut extent = sesparse(80, &grains);
    extent[36_000..].iter_mut().for_each(|byte| *byte &= 0);
    seed("snapshot", "sesparse", &attack::pack(&extent));
    let vmfs = dir.path().join("v.vmdk");
    create(&vmfs, &CreateOptions::new(Kind::Vmfs, 1 << 20)).unwrap();
    seed("descriptor", "vmfs", &std::fs::read(vmfs).unwrap());
    let split = dir.path().join("t.vmdk");
    create(&split, &CreateOptions::new(Kind::TwoGbMaxExtentSparse, 5 << 30)).unwrap();
    seed("descriptor", "split", &std::fs::read(split).unwrap());
    let odd = b"\xef\xbb\xbf# Disk DescriptorFile\r\nversion = 1\r\nencoding=\"windows-1252\"\r\nCID=1\r\n\
        parentCID=0badcafe\r\ncreateType=\"monolithicSparse\"\r\nparentFileNameHint=\"a b \xfc.vmdk\"\r\n\
        RDONLY 5 FLAT \"it's \"so\".vmdk\" 63\r\nRW 9 ZERO\r\n";
    seed("descriptor", "odd", odd);
}
