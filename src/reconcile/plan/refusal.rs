//! Reasons why a command may not change the kernel, with what to do.

use std::fmt;

use crate::datapath::pin_search::{self, Place};
use crate::datapath::state_maps::{Held, Pending};
use crate::time;

/// Reason why an action is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    NoInterface(String),
    UnknownLayer(String),
    Foreign {
        interface: String,
        filter: String,
    },
    Orphan {
        interface: String,
        filter: String,
    },
    Elsewhere {
        interface: String,
        filter: String,
        home: Place,
    },
    OtherNamespace(u64),
    Held(Held),
    Unconfirmed(Pending),
    NothingBefore,
    NothingToReturnTo(u32),
    NothingToConfirm(Option<Held>),
    /// The pending change is not in place on all interfaces.
    Interrupted(u32),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::NoInterface(name) => {
                write!(f, "there is no interface {name} here; `ip link` lists those there are")
            }
            Refusal::UnknownLayer(name) => {
                write!(f, "{name} carries neither Ethernet frames nor plain IP packets")
            }
            Refusal::Foreign { interface, filter } => write!(
                f,
                "{interface}: a filter that is not udplb's has its place on ingress: {filter}; \
                 move it to another priority or handle"
            ),
            Refusal::Orphan { interface, filter } => write!(
                f,
                "{interface}: a filter of udplb whose pins are not in this pin directory is on \
                 ingress: {filter}; {}, {interface} is taken over with --force",
                pin_search::HOW_TO_FIND
            ),
            Refusal::Elsewhere { interface, filter, home } => write!(
                f,
                "{interface}: the filter of another udplb, whose pins are in {home}, is on \
                 ingress: {filter}; apply with that --pin-dir, or take it away with: {} detach -i \
                 {interface}",
                home.command()
            ),
            Refusal::OtherNamespace(inode) => write!(
                f,
                "the pins belong to another network namespace (net:[{inode}]); use another \
                 --pin-dir in this one"
            ),
            Refusal::Held(held) => write!(
                f,
                "held since {}: a rollback left this configuration (generation {}); change the \
                 file, or apply it with --force",
                time::utc(held.since),
                held.generation
            ),
            Refusal::Unconfirmed(pending) => write!(
                f,
                "generation {} waits for confirmation for {} s more; keep it with `udplb confirm` \
                 or undo it with `udplb rollback` first; --confirm replaces it, under a new \
                 deadline, and --force replaces it for good",
                pending.generation,
                pending.remaining().as_secs()
            ),
            Refusal::NothingBefore => {
                write!(f, "there is no earlier generation to roll back to")
            }
            Refusal::NothingToConfirm(None) => write!(f, "nothing waits for confirmation"),
            Refusal::NothingToConfirm(Some(held)) => write!(
                f,
                "nothing waits for confirmation; generation {} was rolled back at {}",
                held.generation,
                time::utc(held.since)
            ),
            Refusal::Interrupted(number) => write!(
                f,
                "generation {number} is not on all of its interfaces: its apply was interrupted; \
                 apply it again, or undo it with `udplb rollback`"
            ),
            Refusal::NothingToReturnTo(number) => write!(
                f,
                "generation {number}, which serves now, has lost pins, so --confirm could not \
                 return to it; apply the file without --confirm"
            ),
        }
    }
}
