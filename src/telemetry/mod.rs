//! Readings of the kernel for people and programs: data only, without colour and layout.

pub mod announcement;
mod connections;
pub mod diagnosis;
pub mod event;
pub mod flows;
pub mod http;
pub mod metrics;
pub mod pcap;
pub mod problem;
pub mod senders;
pub mod status;
pub mod traffic;
