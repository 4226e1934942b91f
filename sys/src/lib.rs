//! The kernel as Gantry uses it, and the one crate where `unsafe` may stand.
pub mod beneath;
pub mod btrfs;
pub mod cgroup;
pub mod failpoints;
pub mod fifo;
pub mod floor;
pub mod fs;
pub mod idmap;
pub mod loopdev;
pub mod mount;
pub mod namespace;
pub mod pidfd;
pub mod process;
pub mod pty;
pub mod reaper;
