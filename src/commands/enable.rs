//! `udplb enable`: sends to an upstream again.

use clap::Args;
use clap_complete::engine::ArgValueCandidates;
use schemars::JsonSchema;
use serde::Serialize;

use super::drain::{OverrideChanged, lock_overrides, set_override};
use super::{carry_out, complete, netlink};
use crate::cli::Global;
use crate::cli::output::report_done;
use crate::config::State;
use crate::datapath::capabilities;
use crate::datapath::description::Generation;
use crate::error::Result;
use crate::reconcile::drain::{self, UpstreamState};

/// The upstream to enable, or all.
#[derive(Args)]
pub struct Options {
    /// A rule and its upstream or mirror, by name or address as in status.
    #[arg(value_name = "RULE/UPSTREAM", required_unless_present = "all",
          add = ArgValueCandidates::new(complete::upstreams))]
    target: Option<drain::UpstreamName>,
    /// Remove all overrides of drain and enable: the states in the file apply.
    #[arg(long, conflicts_with = "target")]
    all: bool,
}

/// Output of `enable --all`.
#[derive(Serialize, JsonSchema)]
pub struct Enabled {
    pub changed: bool,
    /// Upstreams whose overrides were removed.
    pub upstreams: Vec<UpstreamState>,
}

pub async fn run(global: &Global, options: &Options) -> Result<u8> {
    match &options.target {
        Some(target) => {
            let (guard, _, change) = set_override(global, target, State::Active).await?;
            drop(guard);
            report_done(global, &(change.text() + "\n"), OverrideChanged::new(&change))
        }
        None => enable_all(global).await,
    }
}

/// Removes all overrides, those of the previous generation included.
async fn enable_all(global: &Global) -> Result<u8> {
    capabilities::require()?;
    let netlink = netlink()?;
    let (guard, observed) = lock_overrides(global, &netlink).await?;
    let newest_first = observed.generations.values().rev().map(Generation::hosts);
    let serving = observed.serving().and_then(|number| observed.generations.get(&number));
    let all = serving.map(Generation::hosts).into_iter().chain(newest_first);
    let (actions, after) = drain::remove_all(drain::overridden(all, &observed.overrides));
    carry_out(&guard, &netlink, &observed, &actions).await?;
    drop(guard);
    let mut text = String::new();
    for one in &after {
        text += &format!("{} is {} by the file\n", one.name(), drain::word(one.state));
    }
    if after.is_empty() {
        text += "unchanged (there are no overrides)\n";
    }
    report_done(global, &text, Enabled { changed: !after.is_empty(), upstreams: after })
}
