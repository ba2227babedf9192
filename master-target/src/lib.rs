//! The on-premises side of Backhaul: journals, applies, tags recovery points and fails machines over.
//!
//! | module | holds | depends on |
//! | --- | --- | --- |
//! | [`storage`] | files behind one small trait: io_uring, portable, simulated | nothing |
//! | [`batch_buffer`] | a received batch, laid out as the journal stores it | storage |
//! | [`journal`] | the redo journal's bytes, writer and recovery; `JOURNAL.md` | batch_buffer |
//! | [`apply`] | which bytes of a run of batches reach the image | batch_buffer |
//! | [`store`] | one machine's journal and images, in the order that must hold | all of the above |

pub mod apply;
pub mod batch_buffer;
pub mod journal;
pub mod storage;
pub mod store;
