//! udplb relays, forwards and balances UDP in the kernel's traffic control layer.
//!
//! The modules in the order of the data flow:
//!
//! ```text
//! file ── config ──> Config ── plan ──> Desired ─┐
//!                                                ├─ diff ──> Vec<Action> ── apply
//! bpffs + tc ── observe ──> Observed ────────────┘
//! ```
//!
//! `config`, `partial`, `plan`, `tables`, `drain` and `diff` are pure. `apply` is the only module that carries
//! actions out, and takes a [`state::WriteGuard`] for it. The kernel is the only state.

pub mod addresses;
pub mod advice;
pub mod apply;
pub mod arpd;
pub mod bpf;
pub mod changes;
pub mod chunks;
pub mod cli;
pub mod clock;
pub mod commands;
pub mod config;
pub mod counters;
pub mod diff;
pub mod drain;
pub mod failure;
pub mod generation;
pub mod lease;
pub mod list;
pub mod maglev;
pub mod netlink;
pub mod nexthop;
pub mod observe;
pub mod overrides;
pub mod partial;
pub mod plan;
pub mod privileges;
pub mod resolve;
pub mod state;
pub mod status;
pub mod tables;
pub mod tc;
pub mod wanted;
