//! The kernel as Gantry uses it, and the one crate where `unsafe` may stand.
pub mod beneath;
pub mod cgroup;
pub mod fifo;
pub mod fs;
pub mod mount;
pub mod pidfd;
pub mod process;
pub mod pty;
pub mod reaper;
