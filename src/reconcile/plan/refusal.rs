//! Reasons why a command may not change the kernel, with what to do.

use thiserror::Error;

use crate::datapath::pin_search::{HOW_TO_FIND, Place};
use crate::datapath::state_maps::{Held, Pending};
use crate::error::Failure;
use crate::time::utc;

/// Reason why an action is refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Refusal {
    #[error("there is no interface {0} here; `ip link` lists those there are")]
    NoInterface(String),
    #[error("{0} carries neither Ethernet frames nor plain IP packets")]
    UnknownLayer(String),
    #[error(
        "{interface}: a filter that is not udplb's has its place on ingress: {filter}; move it to \
         another priority or handle"
    )]
    Foreign { interface: String, filter: String },
    #[error(
        "{interface}: a filter of udplb whose pins are not in this pin directory is on ingress: \
         {filter}; {find}, {interface} is taken over with --force",
        find = HOW_TO_FIND
    )]
    Orphan { interface: String, filter: String },
    #[error(
        "{interface}: the filter of another udplb, whose pins are in {home}, is on ingress: {filter}; \
         apply with that --pin-dir, or take it away with: {} detach -i {interface}", home.command()
    )]
    Elsewhere { interface: String, filter: String, home: Place },
    #[error(
        "{interface}: the XDP program {program}, which is not udplb's, is attached, and there is room for \
         one; leave `xdp` away, or remove it with: ip link set dev {interface} xdp off"
    )]
    ForeignXdp { interface: String, program: String },
    #[error("{0} carries no Ethernet frames: leave `xdp` away")]
    NoXdp(String),
    #[error(
        "the pins belong to another network namespace (net:[{0}]); use another --pin-dir in this one"
    )]
    OtherNamespace(u64),
    #[error(
        "held since {}: a rollback left this configuration (generation {}); change the file, or apply \
         it with --force", utc(.0.since), .0.generation
    )]
    Held(Held),
    #[error(
        "generation {} waits for confirmation for {} s more; keep it with `udplb confirm` or undo it \
         with `udplb rollback` first; --confirm replaces it, under a new deadline, and --force replaces \
         it for good", .0.generation, .0.remaining().as_secs()
    )]
    Unconfirmed(Pending),
    #[error("there is no earlier generation to roll back to")]
    NothingBefore,
    #[error(
        "generation {0}, which serves now, has lost pins, so --confirm could not return to it; apply \
         the file without --confirm"
    )]
    NothingToReturnTo(u32),
    #[error("nothing waits for confirmation")]
    NothingToConfirm,
    #[error(
        "nothing waits for confirmation; generation {} was rolled back at {}",
        .0.generation, utc(.0.since)
    )]
    RolledBack(Held),
    /// The pending change is not in place on all interfaces.
    #[error(
        "generation {0} is not on all of its interfaces: its apply was interrupted; apply it again, or \
         undo it with `udplb rollback`"
    )]
    Interrupted(u32),
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Failure {
        Failure::Failed(refusal.into())
    }
}
