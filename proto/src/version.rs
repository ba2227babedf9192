//! Protocol versions. A version is added here, with its reason, whenever a byte on the wire changes that the
//! other end has to know of. Lanes have an application protocol name of their own instead.

use std::fmt;

/// A protocol version, negotiated once per connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(pub u32);

/// First version: ordered and sync batches, hash comparison, failover, cancel and commit.
pub const VERSION_1: Version = Version(1);

/// References: data that the target holds elsewhere travels as its place, and the target may ask for
/// a batch again without them.
pub const VERSION_2: Version = Version(2);

/// Batches in control messages: a small one of a machine that has little under way does not wait behind
/// those of other machines, nor for a lost packet to be sent again.
pub const VERSION_3: Version = Version(3);

/// Oldest version this build still speaks.
pub const VERSION_MIN: Version = VERSION_1;

/// Newest version this build speaks.
pub const VERSION_MAX: Version = VERSION_3;

/// The TLS application protocol name. It names the framing of the first message only; everything
/// after that is settled by [`negotiate`], so it never changes.
pub const ALPN: &[u8] = b"backhaul";

/// The newest version that both `[min, max]` ranges contain, or `None` when they do not meet.
pub fn negotiate(ours: (Version, Version), theirs: (Version, Version)) -> Option<Version> {
    let newest = ours.1.min(theirs.1);
    let oldest = ours.0.max(theirs.0);
    (newest >= oldest).then_some(newest)
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::{Version, negotiate};

    #[test]
    fn picks_the_newest_common_version() {
        let v = |a, b| (Version(a), Version(b));
        assert_eq!(negotiate(v(1, 3), v(2, 5)), Some(Version(3)));
        assert_eq!(negotiate(v(4, 6), v(2, 5)), Some(Version(5)));
        assert_eq!(negotiate(v(1, 1), v(2, 5)), None);
        assert_eq!(negotiate(v(6, 7), v(2, 5)), None);
    }
}
