//! Reconciliation from configuration to kernel: plans, their execution, and recovery from failures.

#[path = "../common/mod.rs"]
mod common;
mod model;

mod confirm;
mod drain;
mod faults;
mod flows;
mod hooks;
mod kills;
mod lifecycle;
mod nexthops;
mod partial;
mod plans;
mod stale;
mod xdp;

use common::lab::{CLIENTS, Lab, RELAY, UPSTREAMS};
use common::net::{bind, receive};

/// Checks that a datagram to port 5000 of the relay arrives at this port of the first upstream.
#[track_caller]
fn expect_way(lab: &Lab, port: u16) {
    let receiver = bind(&lab.upstream, UPSTREAMS[0], port);
    let sender = bind(&lab.client, CLIENTS[0], 0);
    sender.send_to(b"which way", (RELAY, 5000)).expect("sent");
    assert_eq!(receive(&receiver).payload, b"which way");
}
