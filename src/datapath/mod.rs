//! State in the kernel: pins, generations, maps and filters.

pub mod announcements;
pub mod capabilities;
pub mod chunked_map;
pub mod counters;
pub mod description;
pub mod environment;
pub mod gate;
pub mod generation;
pub mod handover;
pub mod hook;
pub mod kernel;
pub mod lease;
pub mod lines;
pub mod lock;
pub mod marks;
pub mod nexthops;
pub mod overrides;
pub mod pin_search;
pub mod pins;
pub mod probes;
pub mod retired;
pub mod spares;
pub mod state_maps;
pub mod tc;
pub mod tcx;
pub mod xdp;
