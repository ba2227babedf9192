#![no_main]

#[path = "../attack.rs"]
#[allow(dead_code)]
mod attack;

libfuzzer_sys::fuzz_target!(|input: &[u8]| attack::image(attack::unpack(input)));
