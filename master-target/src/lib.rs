//! The on-premises side of Backhaul: journals, applies, tags recovery points and fails machines over.
