//! Scenarios with real processes and simulations of the whole system.
