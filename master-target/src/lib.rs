//! The on-premises side of Backhaul: journals, applies, tags recovery points and fails machines over.
//!
//! | module | holds | depends on |
//! | --- | --- | --- |
//! | [`storage`] | files behind one small trait: io_uring, portable, simulated | nothing |
//! | [`batch_buffer`] | a received batch, laid out as the journal stores it | storage |
//! | [`journal`] | the redo journal's bytes, writer and recovery; `JOURNAL.md` | batch_buffer |
//! | [`apply`] | which bytes of a run of batches reach the image | batch_buffer |
//! | [`store`] | one machine's journal and images, in the order that must hold | all of the above |
//! | [`worker`] | the thread that owns a store | store |
//! | [`recovery_point`], [`failover`] | points, and the pure failover state machine | nothing |
//! | [`machine_state`] | what is durable of a machine besides journal and images | failover |
//! | [`receive`], [`link`] | batches and messages on their way in | batch_buffer |
//! | [`probe`] | the target's half of a probe of the link | nothing |
//! | [`hashing`] | answering the agent's questions during a sync | nothing |
//! | [`machine`], [`target`] | the owner loop and what it owns | all of the above |
//! | [`api`], [`metrics`], [`config`] | what operators see | target |

pub mod api;
pub mod apply;
pub mod batch_buffer;
pub mod config;
pub mod failover;
pub mod hashing;
pub mod journal;
pub mod link;
pub mod machine;
pub mod machine_state;
pub mod metrics;
pub mod probe;
pub mod receive;
pub mod recovery_point;
pub mod storage;
pub mod store;
pub mod target;
pub mod worker;
