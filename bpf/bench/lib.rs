//! Skeleton of floors.bpf.c, the programs that udplb is measured against.

#![allow(clippy::all, dead_code)]

include!(concat!(env!("OUT_DIR"), "/floors.skel.rs"));
