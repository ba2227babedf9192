//! Other programs that read and write disk images, to judge ours by.
#![allow(dead_code, missing_docs, unreachable_pub)]

use std::{path::Path, process::Command};

pub fn run(program: &str, package: &str, args: &[&str]) -> (bool, String) {
    let output = Command::new(program).args(args).output().unwrap_or_else(|error| {
        panic!("{program} cannot be run ({error}): install the Debian package {package}")
    });
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text)
}

pub fn qemu_img(args: &[&str]) -> (bool, String) {
    run("qemu-img", "qemu-utils", args)
}

/// Runs qemu-img and expects success.
pub fn qemu(args: &[&str]) -> String {
    let (good, said) = qemu_img(args);
    assert!(good, "qemu-img {args:?}: {said}");
    said
}

pub fn qemu_io(format: &str, image: &Path, commands: &[String]) -> String {
    let mut args = vec!["-f", format];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(text(image));
    let (good, said) = run("qemu-io", "qemu-utils", &args);
    assert!(good && !said.contains("failed"), "qemu-io {args:?}: {said}");
    said
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

/// Numbers that look random and are the same in every run.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    pub fn fill(&mut self, buf: &mut [u8]) {
        for chunk in buf.chunks_mut(8) {
            let bytes = self.next().to_le_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
    }
}
