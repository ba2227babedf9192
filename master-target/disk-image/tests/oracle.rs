//! The same bytes through `vmdk-core`, a reader that shares nothing with ours or with qemu.

#[path = "support/esxi.rs"]
mod esxi;
mod support;

use std::{
    io::{Read, Seek, SeekFrom},
    path::Path,
};

use backhaul_disk_image::{
    CreateOptions, DiskImage, Kind, OpenOptions, Silent, create, open,
    ops::{ConvertOptions, convert},
};
use esxi::{Grain, cowd, descriptor, sesparse};
use support::Random;
use vmdk::{VmdkChainReader, VmdkReader};

const SIZE: usize = 6 << 20;

fn source(dir: &Path) -> Box<dyn DiskImage> {
    let path = dir.join("source.raw");
    create(&path, &CreateOptions::new(Kind::Raw, SIZE as u64)).unwrap();
    let image = open(&path, &OpenOptions::writable().of_kind(Kind::Raw)).unwrap();
    let mut random = Random(99);
    for _ in 0..12 {
        let mut bytes = vec![0; 512 * (1 + random.below(200) as usize)];
        random.fill(&mut bytes);
        let at = random.below((SIZE - bytes.len()) as u64 / 512) * 512;
        image.write_at(&bytes, at).unwrap();
    }
    image.flush().unwrap();
    image
}

fn whole(image: &dyn DiskImage) -> Vec<u8> {
    let mut bytes = vec![0; image.size_bytes() as usize];
    image.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn judge(mut reader: impl Read + Seek, expected: &[u8], what: &str) {
    let mut found = Vec::new();
    reader.seek(SeekFrom::Start(0)).unwrap();
    reader.read_to_end(&mut found).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(found == expected, "{what}: {} bytes differ from {}", found.len(), expected.len());
}

#[test]
fn what_we_make_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let source = source(dir.path());
    let expected = whole(source.as_ref());
    for kind in [
        Kind::MonolithicFlat,
        Kind::TwoGbMaxExtentFlat,
        Kind::Vmfs,
        Kind::MonolithicSparse,
        Kind::TwoGbMaxExtentSparse,
        Kind::StreamOptimized,
    ] {
        let path = dir.path().join(format!("{kind}.vmdk"));
        convert(source.as_ref(), &path, &ConvertOptions::new(kind), &mut Silent).unwrap();
        let reader = VmdkReader::open_path(&path).unwrap_or_else(|error| panic!("{kind}: {error}"));
        judge(reader, &expected, kind.name());
    }
}

#[test]
fn a_chain_is_read_alike() {
    let dir = tempfile::tempdir().unwrap();
    let source = source(dir.path());
    let base = dir.path().join("base.vmdk");
    convert(source.as_ref(), &base, &ConvertOptions::new(Kind::MonolithicSparse), &mut Silent)
        .unwrap();
    let child = dir.path().join("child.vmdk");
    let options = CreateOptions {
        parent: Some(base),
        ..CreateOptions::new(Kind::MonolithicSparse, SIZE as u64)
    };
    create(&child, &options).unwrap();
    let image = open(&child, &OpenOptions::writable()).unwrap();
    image.write_at(&[3; 100_000], 1_000_000).unwrap();
    image.flush().unwrap();
    let expected = whole(image.as_ref());
    judge(VmdkChainReader::open(&child).unwrap(), &expected, "a chain");
}

#[test]
fn snapshots_are_read_alike() {
    let dir = tempfile::tempdir().unwrap();
    let noise = |length: usize, seed| {
        let mut bytes = vec![0; length];
        Random(seed).fill(&mut bytes);
        bytes
    };
    let grains: Vec<_> =
        [0, 5, 6, 4096].map(|grain| (grain, noise(512, u64::from(grain) + 9))).into();
    let sectors = 8 * 4096;
    let extents = [
        ("vmfsSparse", "VMFSSPARSE", cowd(sectors, 1, &grains)),
        (
            "seSparse",
            "SESPARSE",
            sesparse(
                u64::from(sectors),
                &[
                    (0, Grain::Data(noise(4096, 1))),
                    (3, Grain::Zero),
                    (4, Grain::Unmapped),
                    (4095, Grain::Data(noise(4096, 2))),
                ],
            ),
        ),
    ];
    for (create_type, extent_type, bytes) in extents {
        let path = dir.path().join(format!("{create_type}.vmdk"));
        let name = format!("{create_type}-delta.vmdk");
        std::fs::write(dir.path().join(&name), bytes).unwrap();
        let line = format!("RW {sectors} {extent_type} \"{name}\"\n");
        std::fs::write(&path, descriptor(create_type, &line, None)).unwrap();
        let ours = whole(open(&path, &OpenOptions::read_only()).unwrap().as_ref());
        let reader = VmdkReader::open_path(&path).unwrap();
        judge(reader, &ours, create_type);
    }
}
