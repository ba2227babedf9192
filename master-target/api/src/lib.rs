//! The master target's REST interface: its types and a client over the Unix socket.
