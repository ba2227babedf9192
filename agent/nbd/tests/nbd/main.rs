//! The server and the client against real programs, against hostile bytes, and against a model.

#![allow(unreachable_pub, reason = "the modules of a test are one crate")]

mod common;
mod hostile;
mod interop;
mod lifecycle;
mod memory;
mod model;
mod raw;
mod tools;
mod wire;
