//! Replays the inputs that the fuzz targets keep.

#[path = "../fuzz/attack.rs"]
#[allow(missing_docs, unreachable_pub)]
mod attack;

use std::path::{Path, PathBuf};

fn corpus(target: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let files = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{folder:?}: {error}"));
    let mut files: Vec<_> = files.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty(), "{folder:?} is empty");
    files
}

#[test]
fn kept_inputs_do_no_harm() {
    for target in ["sparse", "stream", "vhd", "snapshot"] {
        for file in corpus(target) {
            attack::image(attack::unpack(&std::fs::read(file).unwrap()));
        }
    }
    for file in corpus("descriptor") {
        attack::descriptor(&std::fs::read(file).unwrap());
    }
}

#[test]
fn the_corpus_stays_small() {
    let (mut count, mut bytes) = (0, 0);
    for target in ["sparse", "stream", "vhd", "snapshot", "descriptor"] {
        for file in corpus(target) {
            let length = std::fs::metadata(&file).unwrap().len();
            assert!(length < 4096, "{file:?} has {length} bytes");
            (count, bytes) = (count + 1, bytes + length);
        }
    }
    assert!(count < 600 && bytes < 1 << 20, "{count} files with {bytes} bytes");
}

#[test]
fn packing_is_undone_by_unpacking() {
    let mut file = vec![0; 3000];
    file[5] = 1;
    file[1400..2100].fill(7);
    let unpacked = attack::unpack(&attack::pack(&file));
    assert_eq!(unpacked[..3000], file);
}
