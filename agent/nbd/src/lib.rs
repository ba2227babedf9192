//! An NBD server and client: fixed newstyle, structured replies, block status, several exports.
