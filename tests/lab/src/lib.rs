//! A whole failback on one machine: keys, daemons, disk, writes, link and verification.
//!
//! | part | does |
//! | --- | --- |
//! | [`link`] | a site-to-site link with rate, delay and loss between two network namespaces |
//! | [`random`] | the seeded generator behind every random choice |

pub mod link;
pub mod random;
