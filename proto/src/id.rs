//! Every identifier has a type of its own, so that no call can mix two of them up.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use thiserror::Error;

use crate::limits::NAME_BYTES_MAX;

/// Why a text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "`{text}` is not a name: use 1 to {NAME_BYTES_MAX} letters, digits, `.`, `_` or `-`, starting with a letter or digit"
)]
pub struct NameError {
    text: String,
}

fn check_name(text: &str) -> Result<Arc<str>, NameError> {
    let plain = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
    let good = (1..=NAME_BYTES_MAX).contains(&text.len())
        && text.bytes().all(plain)
        && text.as_bytes()[0].is_ascii_alphanumeric();
    if good { Ok(text.into()) } else { Err(NameError { text: text.chars().take(80).collect() }) }
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $type(Arc<str>);

        impl $type {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl FromStr for $type {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                check_name(text).map(Self)
            }
        }
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

name!(
    /// A protected machine, as both configurations name it.
    MachineName
);
name!(
    /// A disk of a protected machine.
    DiskName
);
name!(
    /// An agent or a target: the common name of its certificate.
    PeerName
);

macro_rules! number {
    ($(#[$doc:meta])* $type:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $type(pub $inner);

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number!(
    /// A machine's place in the hello of one connection.
    MachineIndex(u16)
);
number!(
    /// A disk's place in its machine's list of disks.
    DiskIndex(u16)
);
number!(
    /// One unbroken life of a machine's write order. An agent that cannot prove that it captured
    /// every write since the last one begins a new generation, and with it a sync.
    Generation(u64)
);
number!(
    /// A batch's place in its generation, from 1. 0 stands for "none yet".
    BatchSeq(u64)
);
number!(
    /// A record's place in its machine's write order within a generation, over all disks, from 1.
    WriteSeq(u64)
);
number!(
    /// A job the target asked an agent to do. Asking again with the same id does it at most once.
    JobId(u64)
);

impl BatchSeq {
    /// The sequence number after this one.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// A recovery point: the agent's wall clock at the moment of the marker, in microseconds since
/// 1970-01-01 UTC, made strictly increasing per machine so that it is an identifier too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PointId(pub u64);

#[cfg(test)]
mod tests {
    use super::MachineName;

    #[test]
    fn names_are_checked() {
        for good in ["a", "web01", "Web-01.example_x", "0"] {
            assert_eq!(good.parse::<MachineName>().unwrap().as_str(), good);
        }
        let long = "x".repeat(64);
        for bad in ["", ".", "-a", "a b", "a/b", "é", long.as_str()] {
            assert!(bad.parse::<MachineName>().is_err(), "{bad}");
        }
    }
}
