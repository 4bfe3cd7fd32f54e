//! From a configuration to the kernel: plans, their execution, and what survives failures.

#[path = "../common/mod.rs"]
mod common;
mod model;

mod confirm;
mod drain;
mod faults;
mod lifecycle;
mod nexthops;
mod partial;
mod plans;
