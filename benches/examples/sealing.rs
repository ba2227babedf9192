//! What it costs to seal a batch: hash it, and compress it as hard as the link asks for. Noise, which nothing
//! compresses, beside words, which something does; and beside zstd itself at the same level, which goes through
//! the whole of it to find out.
//!
//! `cargo run --release -p backhaul-benches --example sealing`; prints a table for `benches/REPORT.md`.

use std::hint::black_box;
use std::time::{Duration, Instant};

use backhaul_benches::sample::Sample;
use backhaul_lab::random::Random;
use backhaul_proto::batch::{Compression, Compressor, PlainBatch};
use backhaul_proto::id::{BatchSeq, Generation};
use bytes::Bytes;

/// Data of a batch, as a sync's have it.
const BATCH_BYTES: usize = 1 << 20;
/// Different batches: more than the processor's caches hold.
const BATCHES: usize = 48;
const RUNS: usize = 5;
/// The levels that the agent goes through as the link asks for more.
const LEVELS: [i32; 4] = [1, 3, 6, 9];

/// Makes the data of a batch out of its number.
type Content = fn(u64) -> Bytes;

fn noise(seed: u64) -> Bytes {
    let mut data = vec![0; BATCH_BYTES];
    Random::new(seed).fill(&mut data);
    data.into()
}

/// Words of a few letters in no order.
fn words(seed: u64) -> Bytes {
    let mut random = Random::new(seed);
    let mut data = Vec::with_capacity(BATCH_BYTES + 16);
    while data.len() < BATCH_BYTES {
        let word = random.below(4096).wrapping_mul(0x9e37_79b9) >> 8;
        data.extend_from_slice(format!("{word:x} ").as_bytes());
    }
    data.truncate(BATCH_BYTES);
    data.into()
}

/// Milliseconds a batch, on one thread.
fn each(batches: &[Bytes], mut work: impl FnMut(&Bytes)) -> f64 {
    let began = Instant::now();
    batches.iter().for_each(&mut work);
    let whole: Duration = began.elapsed();
    whole.as_secs_f64() * 1e3 / batches.len() as f64
}

fn seal(batches: &[Bytes], compressor: &mut Compressor, compression: Compression) -> f64 {
    each(batches, |data| {
        let batch = PlainBatch::of_one_write(Generation(1), BatchSeq(1), 0, data.clone());
        black_box(batch.encode(compression, compressor));
    })
}

fn main() -> anyhow::Result<()> {
    let contents: [(&str, Content); 2] = [("noise", noise), ("words", words)];
    println!(
        "| 1 MiB of | level | hashed only | sealed | times that | zstd alone | sealed ÷ zstd |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for (name, content) in contents {
        let batches: Vec<Bytes> = (1..=BATCHES as u64).map(content).collect();
        for level in LEVELS {
            let [mut hashed, mut sealed, mut times, mut alone, mut ratio]: [Sample; 5] =
                Default::default();
            let mut compressor = Compressor::default();
            let mut zstd = zstd::bulk::Compressor::new(level)?;
            // The first run finds cold caches and no buffers.
            for run in 0..=RUNS {
                let off = seal(&batches, &mut compressor, Compression::Off);
                let on = seal(&batches, &mut compressor, Compression::Zstd(level));
                let bare = each(&batches, |data| drop(black_box(zstd.compress(data))));
                if run > 0 {
                    hashed.push(off);
                    sealed.push(on);
                    times.push(on / off);
                    alone.push(bare);
                    ratio.push(on / bare);
                }
            }
            println!(
                "| {name} | {level} | {hashed} ms | {sealed} ms | {times} | {alone} ms | {ratio:.3} |"
            );
        }
    }
    Ok(())
}
