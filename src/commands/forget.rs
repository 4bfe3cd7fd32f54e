//! `udplb forget`: ends flows of rules with `reply: nat` or `sticky`.

use clap::Args;
use clap_complete::engine::ArgValueCandidates;
use schemars::JsonSchema;
use serde::Serialize;

use super::drain::lock_overrides;
use super::flows::selection;
use super::{complete, netlink};
use crate::cli::Global;
use crate::cli::output::{plural, report_done};
use crate::datapath::capabilities;
use crate::datapath::description::Generation;
use crate::datapath::flows::Ender;
use crate::datapath::pins::WriteGuard;
use crate::error::{Failure, Result};
use crate::reconcile::drain::RuleOrUpstream;
use crate::telemetry::flows::{self, Client, Names, Selection};

/// The flows to end.
#[derive(Args)]
pub struct Options {
    /// A rule, or one of its upstreams, by name or address as in status.
    #[arg(
        value_name = "RULE[/UPSTREAM]",
        required_unless_present = "client",
        add = ArgValueCandidates::new(complete::upstreams)
    )]
    target: Option<RuleOrUpstream>,
    /// Only flows of this client.
    #[arg(long, value_name = "A[:P]")]
    client: Option<Client>,
}

/// Output of `forget`.
#[derive(Serialize, JsonSchema)]
pub struct Forgotten {
    /// Number of flows that were ended.
    pub forgotten: usize,
}

pub async fn run(global: &Global, options: &Options) -> Result<u8> {
    capabilities::require()?;
    let (guard, observed) = lock_overrides(global, &netlink()?).await?;
    let serving = observed.described()?.ok_or(Failure::NothingApplied)?;
    let selection = selection(serving, options.target.as_ref(), options.client)?;
    let forgotten = end_flows(&guard, serving, &selection)?;
    drop(guard);
    let text = format!("{} ended\n", plural(forgotten, "flow"));
    report_done(global, &text, Forgotten { forgotten })
}

/// Ends the selected flows of a generation; returns their number.
pub(super) fn end_flows(
    guard: &WriteGuard,
    generation: &Generation,
    selection: &Selection,
) -> Result<usize> {
    let names = Names::new(generation.hosts());
    let mut handles = Vec::new();
    flows::read(guard, generation, &names, selection, |flow| handles.push(flow.handle))?;
    if handles.is_empty() {
        return Ok(0);
    }
    let (ender, mut ended) = (Ender::load(guard, generation)?, 0);
    for handle in handles {
        ended += usize::from(ender.end(handle)?);
    }
    Ok(ended)
}
