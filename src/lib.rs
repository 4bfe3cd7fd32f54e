//! udplb relays, forwards and balances UDP in the kernel's traffic control layer.
//!
//! The folders in the order of data flow; each imports only from those below it, which `./dev lint` checks:
//!
//! ```text
//! commands    one file a command: its arguments, its text and its JSON
//! arpd        the daemon that keeps next hops and host names fresh
//! cli         global options, printing, tables, the terminal
//! telemetry   readings for people and programs: status, trace events, metrics
//! reconcile   source (file -> desired), observe, plan, execute
//! datapath    pins, generations, maps and filters in the kernel
//! desired     configuration -> desired state -> contents of maps; pure
//! net         rtnetlink in the project's own types, next-hop resolution
//! config      text -> configuration or diagnostics
//! bpf.rs      the compiled program and its types; error, heap, journal, maglev and time import next to nothing
//! ```
//!
//! Applying a file:
//!
//! ```text
//! file ── config ──> Config ── desired ──> Desired ─┐
//!                                                   ├─ reconcile::plan ──> Vec<Action> ── execute
//! bpffs + tc ── reconcile::observe ──> Observed ────┘
//! ```
//!
//! `config`, `desired` and `reconcile::plan` are pure. `reconcile::execute` is the only module that carries actions
//! out, and takes a [`datapath::pins::WriteGuard`] for it. The kernel is the only state.
//!
//! Reading it back:
//!
//! ```text
//! counters + retired ── telemetry::traffic ──> Traffic ─┐
//!                                                       ├─ telemetry::status ──> status, top, metrics
//! bpffs + tc ── reconcile::observe ─────────────────────┘
//! ```
//!
//! `telemetry::diagnosis` is pure and turns that into problems; `commands::doctor` adds those of the host.

pub mod arpd;
pub mod bpf;
pub mod cli;
pub mod commands;
pub mod config;
pub mod datapath;
pub mod desired;
pub mod error;
pub mod heap;
pub mod journal;
pub mod maglev;
pub mod net;
pub mod reconcile;
pub mod telemetry;
pub mod time;
