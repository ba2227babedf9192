//! The process-server side of Backhaul: captures the writes of protected machines and streams them.
