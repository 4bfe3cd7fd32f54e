//! Makes the kernel hold what a file asks for.
//!
//! [`source`] reads the file, [`observe`] the kernel; [`plan`] is pure and lists the actions that lead from the one to
//! the other, and [`execute`] carries them out.

pub mod addresses;
pub mod confirm;
pub mod drain;
pub mod drift;
pub mod execute;
pub mod observe;
pub mod plan;
pub mod readiness;
mod reply_warnings;
pub mod sockets;
pub mod source;
pub mod warnings;

use anyhow::Context;
use foldhash::HashMap;

use crate::desired::Desired;
use crate::net::Netlink;
use crate::net::nexthop::{self, NextHop};
use crate::net::routing::Target;

/// Resolves the next hops of all upstreams, see [`nexthop::resolve`].
pub async fn resolve_next_hops(
    netlink: &Netlink,
    desired: &Desired,
) -> anyhow::Result<HashMap<Target, NextHop>> {
    nexthop::resolve(netlink, desired.targets(), &desired.interfaces).await.context("next hops")
}
