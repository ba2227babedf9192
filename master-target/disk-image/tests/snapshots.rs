//! Snapshots of ESXi: read through the chain as qemu reads them, never written.

#[path = "support/esxi.rs"]
mod esxi;
mod support;

use backhaul_disk_image::{
    CreateOptions, Deep, ErrorKind, Kind, OpenOptions, Silent, create, open,
    ops::{ConvertOptions, Leaks, apply_repair, compare, convert, plan_repair},
};
use esxi::{Grain, cowd, descriptor, sesparse};
use support::{qemu, text};

const SECTORS: u64 = 80_000;

struct Chain {
    dir: tempfile::TempDir,
    content_id: String,
}

/// A thin base disk of 40 MB, all of it 0x55.
fn base() -> Chain {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("base.vmdk");
    create(&path, &CreateOptions::new(Kind::Vmfs, SECTORS * 512)).unwrap();
    let image = open(&path, &OpenOptions::writable()).unwrap();
    image.write_at(&vec![0x55; SECTORS as usize * 512], 0).unwrap();
    image.flush().unwrap();
    let content_id = image.content_id().unwrap().to_string();
    Chain { dir, content_id }
}

fn judge(chain: &Chain, name: &str, kind: Kind, model: &[u8]) {
    let path = chain.dir.path().join(name);
    let image = open(&path, &OpenOptions::read_only().of_kind(kind)).unwrap();
    let mut found = vec![0; model.len()];
    image.read_at(&mut found, 0).unwrap();
    assert!(found == model);
    let report = image.check(Deep::Yes, &mut Silent).unwrap();
    assert!(report.is_clean(), "{:?}", report.findings);
    let oracle = chain.dir.path().join("oracle.raw");
    std::fs::write(&oracle, model).unwrap();
    qemu(&["compare", "-f", "vmdk", "-F", "raw", text(&path), text(&oracle)]);
    let refused = open(&path, &OpenOptions::writable()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ReadOnly);
    assert!(refused.to_string().contains("only read, never written"), "{refused}");
    let flat = chain.dir.path().join("converted.vmdk");
    convert(image.as_ref(), &flat, &ConvertOptions::new(Kind::MonolithicSparse), &mut Silent)
        .unwrap();
    let flat = open(&flat, &OpenOptions::read_only()).unwrap();
    assert!(compare(flat.as_ref(), image.as_ref(), None, &mut Silent).unwrap().same_content);
}

#[test]
fn a_cowd_snapshot_is_read_over_its_base() {
    let chain = base();
    let mut model = vec![0x55; SECTORS as usize * 512];
    let grains: Vec<_> = [0, 1, 2, 9, 4095, 4096, 8191, 70_000, 79_999]
        .into_iter()
        .map(|grain: u32| (grain, vec![grain as u8 | 1; 512]))
        .collect();
    for (grain, data) in &grains {
        model[*grain as usize * 512..][..512].copy_from_slice(data);
    }
    let extent = cowd(SECTORS as u32, 1, &grains);
    std::fs::write(chain.dir.path().join("s-delta.vmdk"), extent).unwrap();
    let line = format!("RW {SECTORS} VMFSSPARSE \"s-delta.vmdk\"\n");
    let parent = Some((chain.content_id.as_str(), "base.vmdk"));
    let text = descriptor("vmfsSparse", &line, parent);
    std::fs::write(chain.dir.path().join("s.vmdk"), text).unwrap();
    judge(&chain, "s.vmdk", Kind::VmfsSparse, &model);
}

#[test]
fn a_sesparse_snapshot_is_read_over_its_base() {
    let chain = base();
    let mut model = vec![0x55; SECTORS as usize * 512];
    let mut grains: Vec<(u64, Grain)> = Vec::new();
    for grain in [0, 1, 5, 6, 7, 4095, 4096, 4097, 9_999] {
        grains.push((
            grain,
            match grain {
                5 => Grain::Zero,
                6 | 4097 => Grain::Unmapped,
                _ => Grain::Data(vec![grain as u8 | 1; 4096]),
            },
        ));
    }
    for (grain, content) in &grains {
        let place = &mut model[*grain as usize * 4096..][..4096];
        match content {
            Grain::Data(data) => place.copy_from_slice(data),
            Grain::Zero | Grain::Unmapped => place.fill(0),
        }
    }
    std::fs::write(chain.dir.path().join("e-sesparse.vmdk"), sesparse(SECTORS, &grains)).unwrap();
    let line = format!("RW {SECTORS} SESPARSE \"e-sesparse.vmdk\"\n");
    let parent = Some((chain.content_id.as_str(), "base.vmdk"));
    let text = descriptor("seSparse", &line, parent);
    std::fs::write(chain.dir.path().join("e.vmdk"), text).unwrap();
    judge(&chain, "e.vmdk", Kind::SeSparse, &model);
}

#[test]
fn a_chain_that_runs_in_a_circle_or_leaves_the_folder_is_refused() {
    let chain = base();
    let path = |name: &str| chain.dir.path().join(name);
    std::fs::write(path("c-delta.vmdk"), cowd(SECTORS as u32, 1, &[])).unwrap();
    let line = format!("RW {SECTORS} VMFSSPARSE \"c-delta.vmdk\"\n");
    let circle = descriptor("vmfsSparse", &line, Some(("0badcafe", "c.vmdk")));
    std::fs::write(path("c.vmdk"), circle).unwrap();
    let error = open(&path("c.vmdk"), &OpenOptions::read_only()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Chain, "{error}");
    let inner = path("inner");
    std::fs::create_dir(&inner).unwrap();
    std::fs::write(inner.join("c-delta.vmdk"), cowd(SECTORS as u32, 1, &[])).unwrap();
    let parent = Some((chain.content_id.as_str(), "../base.vmdk"));
    std::fs::write(inner.join("c.vmdk"), descriptor("vmfsSparse", &line, parent)).unwrap();
    let error = open(&inner.join("c.vmdk"), &OpenOptions::read_only()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Outside, "{error}");
    let trusted = OpenOptions { allow_outside: true, ..OpenOptions::read_only() };
    open(&inner.join("c.vmdk"), &trusted).unwrap();
}

/// Repairs the image at `path`, whose extent had `good` before it was damaged.
fn repaired(path: &std::path::Path, extent: &std::path::Path, good: &[u8]) {
    let error = open(path, &OpenOptions::read_only()).unwrap_err();
    assert!(error.to_string().contains("grain directory"), "{error}");
    let plan = plan_repair(path, &OpenOptions::read_only(), Leaks::Keep, &mut Silent).unwrap();
    assert_eq!((plan.fixes.len(), plan.lost_bytes), (1, 0), "{plan:?}");
    apply_repair(&plan, &mut Silent).unwrap();
    assert!(std::fs::read(extent).unwrap() == good);
}

#[test]
fn a_header_that_names_a_wrong_directory_is_repaired() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s-delta.vmdk");
    let good = cowd(4096 * 300, 1, &[(1, vec![1; 512]), (5000, vec![2; 512])]);
    // Where the directory is, and how many entries it has.
    for (field, wrong) in [(20, 0_u32), (20, 9), (20, u32::MAX), (24, 0), (24, 7)] {
        let mut bytes = good.clone();
        bytes[field..field + 4].copy_from_slice(&wrong.to_le_bytes());
        std::fs::write(&path, bytes).unwrap();
        repaired(&path, &path, &good);
    }
    let good = sesparse(8 * 4096 * 200, &[(0, Grain::Data(vec![1; 4096])), (600_000, Grain::Zero)]);
    for wrong in [0_u64, 3, 1 << 50, u64::MAX] {
        let mut bytes = good.clone();
        bytes[128..136].copy_from_slice(&wrong.to_le_bytes());
        std::fs::write(&path, bytes).unwrap();
        repaired(&path, &path, &good);
    }
}
