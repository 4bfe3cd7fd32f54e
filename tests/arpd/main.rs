//! `udplb arpd`: neighbours, host names, multicast groups.

mod announce;
#[path = "../common/mod.rs"]
mod common;
mod dns;
mod syscalls;

mod groups;
mod ipv6;
mod names;
mod neighbours;
mod probes;
mod stale;
