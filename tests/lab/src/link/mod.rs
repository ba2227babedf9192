//! The emulated site-to-site link: two network namespaces joined by a forwarder with a rate, a
//! one-way delay, loss and the other ills of a long line.
//!
//! Kernels built without netem cannot do this by themselves, so the lab brings its own:
//!
//! ```text
//! namespace A                                                   namespace B
//! processes ── bh0 (TUN 10.213.0.1) ─ up ─ Shaper ─→ bh0 (TUN 10.213.0.2) ── processes
//!                                   ←─ Shaper ─ down ─
//! ```
//!
//! [`Shaper`] is the pure core of one direction; [`Link`] is the edge with threads and devices.

mod forwarder;
mod namespace;
mod offload;
mod shaper;
mod site_link;
mod spec;
mod tun;

pub use namespace::Site;
pub use shaper::{Departure, DirectionStats, DropReason, PACKETS_IN_FLIGHT_MAX, Shaper, Verdict};
pub use site_link::{Link, LinkError, LinkStats, Unavailable, is_available};
pub use spec::{BitRate, Blackout, DirectionSpec, LinkSpec, LinkSpecError, Probability};
