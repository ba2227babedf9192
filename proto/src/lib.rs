//! The language both ends of Backhaul speak: ids, limits, messages, session and transport.
