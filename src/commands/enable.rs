//! `udplb enable`: gives an upstream its packets again.

use clap::Args;
use clap_complete::engine::ArgValueCandidates;
use schemars::JsonSchema;
use serde::Serialize;

use super::drain::{steer, to_steer};
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
    /// A rule, and its upstream or mirror: name or address, as status shows them.
    #[arg(value_name = "RULE/UPSTREAM", required_unless_present = "all",
          add = ArgValueCandidates::new(complete::upstreams))]
    target: Option<drain::UpstreamName>,
    /// Take back all that drain and enable said: what the file says holds.
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
        Some(target) => steer(global, target, State::Active).await,
        None => enable_all(global).await,
    }
}

/// Takes back all that was said of upstreams, those of the generation before included.
async fn enable_all(global: &Global) -> Result<u8> {
    capabilities::require()?;
    let netlink = netlink()?;
    let (guard, observed) = to_steer(global, &netlink).await?;
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
