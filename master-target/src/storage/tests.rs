use std::path::Path;

use proptest::prelude::*;

use super::{AlignedBuf, FileId, Op, OpenMode, PortableStorage, Storage, UringStorage};

const FILE_BYTES: usize = 3 << 20;

/// An operation as proptest makes it; offsets and lengths of every alignment.
#[derive(Debug, Clone)]
enum Planned {
    Write { at: usize, len: usize, fill: u8, skew: usize },
    Zero { at: usize, len: usize, may_unmap: bool },
}

impl Planned {
    fn range(&self) -> std::ops::Range<usize> {
        match *self {
            Self::Write { at, len, .. } | Self::Zero { at, len, .. } => at..at + len,
        }
    }
}

fn planned() -> impl Strategy<Value = Planned> {
    let unit = prop_oneof![Just(1usize), Just(512), Just(4096)];
    (unit, 0usize..1000, 1usize..300, any::<u8>(), 0usize..4).prop_map(
        |(unit, at, len, fill, what)| {
            let at = at * unit % FILE_BYTES;
            let len = (len * unit).min(FILE_BYTES - at);
            match what {
                0 => Planned::Zero { at, len, may_unmap: fill % 2 == 0 },
                // Memory that is not aligned although the place is.
                1 => Planned::Write { at, len, fill, skew: 1 },
                _ => Planned::Write { at, len, fill, skew: 0 },
            }
        },
    )
}

/// Runs whose operations do not overlap, as the trait's users promise.
fn runs(planned: &[Planned]) -> Vec<Vec<&Planned>> {
    let mut runs: Vec<Vec<&Planned>> = vec![Vec::new()];
    for op in planned {
        let last = runs.len() - 1;
        let overlaps = |other: &&Planned| {
            other.range().start < op.range().end && op.range().start < other.range().end
        };
        if runs[last].iter().any(overlaps) {
            runs.push(vec![op]);
        } else {
            runs[last].push(op);
        }
    }
    runs
}

fn play(storage: &mut dyn Storage, file: FileId, planned: &[Planned]) {
    for run in runs(planned) {
        let buffers: Vec<_> = run
            .iter()
            .map(|op| match op {
                Planned::Write { len, fill, skew, .. } => {
                    let mut buf = AlignedBuf::zeroed(len + skew);
                    for (i, byte) in buf.iter_mut().enumerate() {
                        *byte = fill.wrapping_add((i / 512) as u8);
                    }
                    buf
                }
                Planned::Zero { .. } => AlignedBuf::zeroed(0),
            })
            .collect();
        let mut ops: Vec<Op<'_>> = run
            .iter()
            .zip(&buffers)
            .map(|(op, buf)| match op {
                Planned::Write { at, len, skew, .. } => {
                    let buf = &buf[*skew..*skew + *len];
                    Op::Write { file, offset_bytes: *at as u64, buf }
                }
                Planned::Zero { at, len, may_unmap } => Op::Zero {
                    file,
                    offset_bytes: *at as u64,
                    len_bytes: *len as u64,
                    may_unmap: *may_unmap,
                },
            })
            .collect();
        storage.run(&mut ops).unwrap();
        storage.run(&mut [Op::Sync { file }]).unwrap();
    }
}

/// The content as the storage reads it back, in pieces of odd sizes, at once.
fn read_back(storage: &mut dyn Storage, file: FileId) -> Vec<u8> {
    let mut content = vec![0; FILE_BYTES];
    let mut ops = Vec::new();
    let mut offset_bytes = 0;
    for buf in content.chunks_mut(70_001) {
        let len = buf.len() as u64;
        ops.push(Op::Read { file, offset_bytes, buf });
        offset_bytes += len;
    }
    storage.run(&mut ops).unwrap();
    content
}

fn storages() -> Vec<(&'static str, Box<dyn Storage>)> {
    let mut storages: Vec<(&'static str, Box<dyn Storage>)> =
        vec![("portable", Box::new(PortableStorage::new()))];
    match UringStorage::new() {
        Ok(uring) => storages.push(("uring", Box::new(uring))),
        Err(error) => println!("skipped: io_uring is refused here: {error}"),
    }
    storages
}

fn create(storage: &mut dyn Storage, path: &Path) -> FileId {
    let file = storage.open(path, OpenMode::CreateNew).unwrap();
    storage.preallocate(file, FILE_BYTES as u64).unwrap();
    file
}

/// In the build's own directory, which is on a real disk more often than /tmp is.
fn tempdir() -> tempfile::TempDir {
    tempfile::tempdir_in(std::env::current_dir().unwrap()).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// A model, `std::fs` and both storages agree about every byte.
    #[test]
    fn storages_agree_with_a_model(planned in prop::collection::vec(planned(), 1..40)) {
        let mut model = vec![0; FILE_BYTES];
        for op in &planned {
            match op {
                Planned::Write { at, len, fill, skew } => {
                    for i in 0..*len {
                        model[at + i] = fill.wrapping_add(((i + skew) / 512) as u8);
                    }
                }
                Planned::Zero { at, len, .. } => model[*at..at + len].fill(0),
            }
        }
        for (name, mut storage) in storages() {
            let dir = tempdir();
            let path = dir.path().join("file");
            let file = create(&mut *storage, &path);
            play(&mut *storage, file, &planned);
            prop_assert!(read_back(&mut *storage, file) == model, "{} reads", name);
            prop_assert!(std::fs::read(&path).unwrap() == model, "{} wrote", name);
        }
    }
}

#[test]
fn errors_name_the_file_and_the_place() {
    for (name, mut storage) in storages() {
        let dir = tempdir();
        let missing = dir.path().join("missing");
        let error = storage.open(&missing, OpenMode::Read).unwrap_err();
        assert!(error.is_not_found() && error.to_string().contains("missing"), "{name}: {error}");
        let file = create(&mut *storage, &dir.path().join("short"));
        let mut bufs = [AlignedBuf::zeroed(4096), AlignedBuf::zeroed(4096)];
        let [a, b] = &mut bufs;
        let error = storage
            .run(&mut [
                Op::Read { file, offset_bytes: 0, buf: a },
                Op::Read { file, offset_bytes: FILE_BYTES as u64, buf: b },
            ])
            .unwrap_err();
        let text = error.to_string();
        assert!(text.contains("short") && text.contains("at byte 3145728"), "{name}: {text}");
    }
}

#[test]
fn a_renamed_file_stays_open_and_names_are_listed() {
    for (_, mut storage) in storages() {
        let dir = tempdir();
        let (from, to) = (dir.path().join("a"), dir.path().join("b"));
        let file = create(&mut *storage, &from);
        storage.rename(&from, &to).unwrap();
        storage.sync_dir(dir.path()).unwrap();
        storage.run(&mut [Op::Write { file, offset_bytes: 5, buf: b"odd" }]).unwrap();
        assert_eq!(std::fs::read(&to).unwrap()[5..8], *b"odd");
        assert_eq!(storage.list(dir.path()).unwrap(), ["b"]);
        storage.close(file);
        storage.remove(&to).unwrap();
        assert!(storage.list(dir.path()).unwrap().is_empty());
    }
}

/// A ring belongs to one thread; the storage may still be handed to another.
#[test]
fn a_storage_moves_between_threads() {
    for (_, mut storage) in storages() {
        let dir = tempdir();
        let file = create(&mut *storage, &dir.path().join("file"));
        let two = |storage: &mut dyn Storage, fill: u8| {
            let mut buf = AlignedBuf::zeroed(8192);
            buf.fill(fill);
            let (a, b) = buf.split_at(4096);
            let mut ops = [
                Op::Write { file, offset_bytes: 0, buf: a },
                Op::Write { file, offset_bytes: 4096, buf: b },
            ];
            storage.run(&mut ops).unwrap();
        };
        two(&mut *storage, 1);
        std::thread::scope(|scope| {
            scope.spawn(|| two(&mut *storage, 2));
        });
        two(&mut *storage, 3);
        assert_eq!(std::fs::read(dir.path().join("file")).unwrap()[..8192], [3; 8192]);
    }
}
