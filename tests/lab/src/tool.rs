//! Outside programs, each with the Debian package that brings it.

use std::ffi::OsStr;
use std::io;
use std::path::PathBuf;
use std::process::{Command, Output};

/// A program that the lab calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tool {
    /// Its name.
    pub program: &'static str,
    /// The Debian package that brings it.
    pub package: &'static str,
}

impl Tool {
    /// Makes ext4 file systems.
    pub const MKFS_EXT4: Self = Self { program: "mkfs.ext4", package: "e2fsprogs" };
    /// Reads inside ext4 images without mounting them.
    pub const DEBUGFS: Self = Self { program: "debugfs", package: "e2fsprogs" };
    /// Checks ext4 file systems.
    pub const E2FSCK: Self = Self { program: "e2fsck", package: "e2fsprogs" };
    /// QEMU's reader of disk images.
    pub const QEMU_IMG: Self = Self { program: "qemu-img", package: "qemu-utils" };

    /// Where the program is; `None` when it is not installed. The system folders count even when
    /// `PATH` lacks them, as it does for ordinary users.
    pub fn find(self) -> Option<PathBuf> {
        let paths = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&paths)
            .chain(["/usr/sbin".into(), "/sbin".into()])
            .map(|folder| folder.join(self.program))
            .find(|path| path.is_file())
    }

    /// Runs the program and gives back what it said, whatever its exit code.
    ///
    /// # Errors
    /// When it is not installed or cannot be started.
    pub fn output<A: AsRef<OsStr>>(self, arguments: &[A]) -> Result<Output, ToolError> {
        let path = self
            .find()
            .ok_or(ToolError::Missing { program: self.program, package: self.package })?;
        Command::new(path)
            .args(arguments)
            .env("LC_ALL", "C")
            .output()
            .map_err(|source| ToolError::Start { program: self.program, source })
    }

    /// Runs the program and gives back its standard output.
    ///
    /// # Errors
    /// Also when it fails.
    pub fn run<A: AsRef<OsStr>>(self, arguments: &[A]) -> Result<String, ToolError> {
        let output = self.output(arguments)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(ToolError::Failed { program: self.program, said: said(&output) })
    }
}

/// What a program said, on both of its outputs, on one line.
pub(crate) fn said(output: &Output) -> String {
    let both = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    both.join("\n")
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect::<Vec<_>>()
        .join("; ")
}

/// Why a program gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It is not installed.
    #[error("`{program}` is missing: install the Debian package {package}")]
    Missing {
        /// The program.
        program: &'static str,
        /// What brings it.
        package: &'static str,
    },
    /// It is installed but cannot be started.
    #[error("`{program}` could not be started")]
    Start {
        /// The program.
        program: &'static str,
        /// Why.
        source: io::Error,
    },
    /// It failed.
    #[error("`{program}` failed: {said}")]
    Failed {
        /// The program.
        program: &'static str,
        /// Both its outputs.
        said: String,
    },
}
