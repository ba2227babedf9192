//! What both Backhaul daemons need from their host: configuration with exact errors, logs, metrics.
