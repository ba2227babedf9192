//! Many threads on one sparse image: every thread has its own sectors, and the grains are shared.

mod support;

use std::{sync::Barrier, thread};

use backhaul_disk_image::{CreateOptions, Deep, Kind, OpenOptions, Silent, create, open};
use support::Random;

const THREADS: usize = 4;
const SECTORS: usize = 16 * 1024;

#[test]
fn threads_do_not_see_each_other() {
    let dir = tempfile::tempdir().unwrap();
    for (kind, zeroed_grains) in [
        (Kind::MonolithicSparse, false),
        (Kind::MonolithicSparse, true),
        (Kind::TwoGbMaxExtentSparse, true),
        (Kind::Vmfs, false),
    ] {
        let path = dir.path().join(format!("{kind}-{zeroed_grains}.vmdk"));
        let options =
            CreateOptions { zeroed_grains, ..CreateOptions::new(kind, SECTORS as u64 * 512) };
        create(&path, &options).unwrap();
        let image = open(&path, &OpenOptions::writable()).unwrap();
        let start = Barrier::new(THREADS);
        thread::scope(|scope| {
            for number in 0..THREADS {
                let (image, start) = (image.as_ref(), &start);
                scope.spawn(move || {
                    let mut random = Random(number as u64 + 3);
                    let mut model = vec![0_u8; SECTORS];
                    start.wait();
                    for step in 0..3000_u64 {
                        // Sectors of a thread are those with its remainder.
                        let place =
                            random.below((SECTORS / THREADS) as u64) as usize * THREADS + number;
                        let at = place as u64 * 512;
                        match random.below(8) {
                            0 => image.flush().unwrap(),
                            1 => {
                                image.write_zeroes_at(at, 512).unwrap();
                                model[place] = 0;
                            }
                            2..=4 => {
                                let mut found = [0; 512];
                                image.read_at(&mut found, at).unwrap();
                                assert_eq!(found, [model[place]; 512], "sector {place}");
                            }
                            _ => {
                                model[place] = (step % 255) as u8 + 1;
                                image.write_at(&[model[place]; 512], at).unwrap();
                            }
                        }
                    }
                    for place in (number..SECTORS).step_by(THREADS) {
                        let mut found = [1; 512];
                        image.read_at(&mut found, place as u64 * 512).unwrap();
                        assert_eq!(found, [model[place]; 512], "sector {place}");
                    }
                });
            }
        });
        image.flush().unwrap();
        let report = image.check(Deep::Yes, &mut Silent).unwrap();
        assert!(report.is_clean(), "{:?}", report.findings);
    }
}

#[test]
fn grains_that_are_freed_are_not_read_by_others() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("free.vmdk");
    create(&path, &CreateOptions::new(Kind::MonolithicSparse, 32 << 20)).unwrap();
    let image = open(&path, &OpenOptions::writable()).unwrap();
    thread::scope(|scope| {
        for number in 0..THREADS as u64 {
            let image = image.as_ref();
            scope.spawn(move || {
                let first = number * (8 << 20);
                let mut random = Random(number + 1);
                for step in 0..150_u64 {
                    let at = first + random.below(120) * 65_536;
                    let byte = (step % 250) as u8 + 1;
                    image.write_at(&[byte; 131_072], at).unwrap();
                    let mut found = vec![0; 131_072];
                    image.read_at(&mut found, at).unwrap();
                    assert!(found.iter().all(|found| *found == byte));
                    image.write_zeroes_at(at, 65_536).unwrap();
                    image.flush().unwrap();
                    image.read_at(&mut found, at).unwrap();
                    assert!(found[..65_536].iter().all(|found| *found == 0));
                    assert!(found[65_536..].iter().all(|found| *found == byte));
                }
            });
        }
    });
    let report = image.check(Deep::Yes, &mut Silent).unwrap();
    assert_eq!((report.losses, report.redundancies), (0, 0), "{:?}", report.findings);
}
