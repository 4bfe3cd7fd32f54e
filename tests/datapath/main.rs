//! Packet path: tables of packets, and traffic from socket to socket.

#[path = "../common/mod.rs"]
mod common;
mod ends;
mod flow;
mod forge;
mod kernel;
mod packet;
mod prelude;
mod program;
mod quic;
mod random;
mod reference;
mod sticky;
mod testbed;

mod admission;
mod answers;
mod decap;
mod devices;
mod direct_fast;
mod errors;
mod fanout;
mod fragments;
mod fuzz;
mod headers;
mod health;
mod lines;
mod links;
mod nat;
mod nat_changes;
mod nat_fast;
mod nat_races;
mod packets;
mod paths;
mod programs;
mod reassembly;
mod replies;
mod routes;
mod selection;
mod senders;
mod templates;
mod traffic;
mod xdp;
