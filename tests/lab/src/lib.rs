//! A whole failback on one machine: keys, daemons, disk, writes, link and verification.
//!
//! | part | does |
//! | --- | --- |
//! | [`link`] | a site-to-site link with rate, delay and loss between two network namespaces |
//! | [`disk`] | a real ext4 disk image with real files, or a copy of a given disk |
//! | [`workload`] | a seeded stream of disk writes and the model that says what must come out |
//! | [`verify`] | judges that share no code with the pipeline |
//! | [`rig`] | both daemons as real processes, with throw-away keys |
//! | [`writer`] | a guest that runs a workload against an export |
//! | [`failback`] | the whole story, from protection to commit |
//! | [`port`] | a port that stays ours while daemons come and go |
//! | [`tool`] | outside programs, with the package that brings each |
//! | [`random`] | the seeded generator behind every random choice |

pub mod disk;
pub mod failback;
pub mod link;
pub mod port;
pub mod random;
pub mod rig;
pub mod steal;
pub mod tool;
pub mod verify;
pub mod workload;
pub mod writer;
