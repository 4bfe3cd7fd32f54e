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
//!
//! What comes of it is read back the other way:
//!
//! ```text
//! counters + former ── traffic ──> Traffic ─┐
//!                                           ├─ status ──> Status ──> status, top, metrics
//! bpffs + tc ── observe ────────────────────┘
//! ```
//!
//! `diagnosis` is pure and turns that into problems; `doctor` adds those of the host.

pub mod addresses;
pub mod advice;
pub mod apply;
pub mod arpd;
pub mod bpf;
pub mod changes;
pub mod chunks;
pub mod cli;
pub mod clock;
pub mod columns;
pub mod commands;
pub mod complete;
pub mod config;
pub mod confirm;
pub mod counters;
pub mod diagnosis;
pub mod diff;
pub mod doctor;
pub mod drain;
pub mod drift;
pub mod environment;
pub mod event;
pub mod failure;
pub mod flow;
pub mod former;
pub mod generation;
pub mod get;
pub mod ipsec;
pub mod journal;
pub mod kernel;
pub mod lease;
pub mod list;
pub mod lock;
pub mod maglev;
pub mod marks;
pub mod metrics;
pub mod miss;
pub mod netlink;
pub mod nexthop;
pub mod observe;
pub mod output;
pub mod overrides;
pub mod partial;
pub mod pcap;
pub mod pins;
pub mod plan;
pub mod privileges;
pub mod problem;
pub mod resolve;
pub mod routing;
pub mod spares;
pub mod state;
pub mod status;
pub mod tables;
pub mod tc;
pub mod terminal;
pub mod top;
pub mod trace;
pub mod traffic;
pub mod wanted;
