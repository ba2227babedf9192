//! Capture: where a guest's writes enter the pipeline.
//!
//! ```text
//! NBD request → range lock → protected disk → Order (in the stream, or dirty) → reply
//! ```

mod device;
mod dirty_map;
mod export;
pub(crate) mod machine;
mod order;
mod range_lock;

pub use device::{Device, DeviceError};
pub use dirty_map::{BlockRun, DirtyMap};
pub use export::DiskExport;
pub use machine::{CapturedDisk, Fence, MachineCapture, now_us};
pub use order::{Change, Mode, Order, OrderOptions};
pub use range_lock::{RangeGuard, RangeLock};
