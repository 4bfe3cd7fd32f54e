//! Status, counters, metrics and traces.

#[path = "../common/mod.rs"]
mod common;

mod conservation;
mod metrics;
mod status;
mod totals;
mod trace;
