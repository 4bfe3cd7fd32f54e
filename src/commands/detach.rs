//! `udplb detach`: removes the filter from interfaces.

use anyhow::{Context, anyhow};
use clap::Args;
use clap_complete::engine::ArgValueCandidates;
use schemars::JsonSchema;
use serde::Serialize;

use super::{carry_out, complete, netlink};
use crate::cli::Global;
use crate::cli::output::{report, report_done};
use crate::datapath::{capabilities, hook, pin_search, pins};
use crate::error::{Failure, Result};
use crate::net::Netlink;
use crate::net::neighbour::{NeighbourKey, OUR_PROTOCOL};
use crate::reconcile::observe::{Observed, Orphan, observe};
use crate::reconcile::plan::{self, Action};

/// Interfaces to detach from.
#[derive(Args)]
pub struct Options {
    /// Detach from this interface only; may be repeated.
    #[arg(short, long = "interface", value_name = "IF",
          add = ArgValueCandidates::new(complete::interfaces))]
    interfaces: Vec<String>,
    /// Remove all pins too, so that nothing of udplb is left in the kernel.
    #[arg(long, conflicts_with = "interfaces")]
    purge: bool,
}

/// Output of `detach`.
#[derive(Serialize, JsonSchema)]
pub struct Detached {
    pub changed: bool,
    /// Interfaces that were attached.
    pub detached: Vec<String>,
}

pub async fn run(global: &Global, options: &Options) -> Result<u8> {
    let Options { interfaces, purge } = options;
    let purge = *purge;
    capabilities::require()?;
    let netlink = netlink()?;
    let is_there = pins::read(&global.pin_dir, global.lock_timeout)?.is_some();
    let (mut changed, detached) = match is_there {
        true => detach_locked(global, &netlink, interfaces, purge).await?,
        false => {
            let observed = observe(None, &netlink).await?;
            refuse_orphans(&observed, &canonical(&observed, interfaces))?;
            (false, Vec::new())
        }
    };
    if purge {
        changed |= forget_neighbours(&netlink).await?;
    }
    if !changed {
        return report(global, "nothing was attached\n", Detached { changed, detached });
    }
    let mut text = match detached.is_empty() {
        true if purge => String::new(),
        true => "nothing was attached; missing interfaces will not be attached when they appear\n"
            .into(),
        false => format!("detached from {}\n", detached.join(", ")),
    };
    if purge {
        text += "removed all pins\n";
    }
    report_done(global, &text, Detached { changed, detached })
}

fn canonical(observed: &Observed, interfaces: &[String]) -> Vec<String> {
    interfaces.iter().map(|name| observed.canonical(name)).collect()
}

/// Returns whether anything changed, and the interfaces that the filter was taken off.
async fn detach_locked(
    global: &Global,
    netlink: &Netlink,
    interfaces: &[String],
    purge: bool,
) -> Result<(bool, Vec<String>)> {
    let guard = pins::write(&global.pin_dir, global.lock_timeout)?;
    let observed = observe(Some(&guard), netlink).await?;
    let interfaces = canonical(&observed, interfaces);
    let actions = plan::detach(&observed, &interfaces, purge)?;
    let purges = purge && !guard.is_empty()?;
    carry_out(&guard, netlink, &observed, &actions).await?;
    if purge {
        guard.remove_all()?;
    }
    refuse_orphans(&observed, &interfaces)?;
    let detached = actions.iter().filter_map(|action| match action {
        Action::Detach { interface, .. } => Some(interface.clone()),
        _ => None,
    });
    Ok((purges || !actions.is_empty(), detached.collect()))
}

/// Removes the neighbour entries of an arpd that was killed.
async fn forget_neighbours(netlink: &Netlink) -> Result<bool> {
    let all = netlink.neighbours().await.context("neighbours")?;
    let ours = all.iter().filter(|neighbour| neighbour.protocol == OUR_PROTOCOL);
    let ours: Vec<NeighbourKey> =
        ours.map(|neighbour| (neighbour.ifindex, neighbour.address)).collect();
    netlink.delete_neighbours(&ours).await.context("neighbours")?;
    Ok(!ours.is_empty())
}

/// Returns an error for a filter whose pins are not found: it may belong to another udplb, and stays.
fn refuse_orphans(observed: &Observed, interfaces: &[String]) -> Result<()> {
    let named = |name: &str| interfaces.is_empty() || interfaces.iter().any(|it| it == name);
    let mut orphans = observed.orphans();
    let orphan = orphans.find(|it| it.home.is_none() && named(it.interface));
    orphan.map_or(Ok(()), |Orphan { interface, filter, link, .. }| {
        Err(Failure::Failed(anyhow!(
            "{interface}: a filter of udplb whose pins are not in this pin directory stays on \
             ingress: {filter}; {}, remove it with: {}",
            pin_search::HOW_TO_FIND,
            hook::removal(interface, link)
        )))
    })
}
