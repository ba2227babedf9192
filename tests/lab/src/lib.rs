//! A whole failback on one machine: keys, daemons, disk, writes, link and verification.
