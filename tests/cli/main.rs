//! Command-line interface: output, exit codes, messages, and the checks of `doctor`.

#[path = "../common/mod.rs"]
mod common;
mod schema;

mod commands;
mod doctor;
mod get;
mod messages;
mod output;
mod problems;
mod senders;
