//! `udplb forget`: ends flows of rules with `reply: nat`.

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
use crate::datapath::flows::Ender;
use crate::error::{Failure, Result};
use crate::reconcile::drain::RuleOrUpstream;
use crate::telemetry::flows::{self, Client, Names};

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
    let names = Names::new(serving.hosts());
    let mut handles = Vec::new();
    flows::read(&guard, serving, &names, &selection, |flow| handles.push(flow.handle))?;
    let mut forgotten = 0;
    if !handles.is_empty() {
        let ender = Ender::load(&guard, serving)?;
        for handle in handles {
            forgotten += usize::from(ender.end(handle)?);
        }
    }
    drop(guard);
    let text = format!("{} ended\n", plural(forgotten, "flow"));
    report_done(global, &text, Forgotten { forgotten })
}
