//! Disk images: raw and VMDK, created, opened, read and written.
