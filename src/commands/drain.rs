//! `udplb drain`: stops sending to an upstream, whatever its state in the file.

use anyhow::Context;
use clap::Args;
use clap_complete::engine::ArgValueCandidates;
use schemars::JsonSchema;
use serde::Serialize;

use super::{carry_out, complete, lock, look, netlink};
use crate::cli::Global;
use crate::cli::output::{report, report_done};
use crate::config::State;
use crate::datapath::pins::{self, WriteGuard};
use crate::datapath::{capabilities, state_maps};
use crate::error::{Failure, Result, say};
use crate::net::Netlink;
use crate::reconcile::drain::{self, Change, UpstreamState};
use crate::reconcile::observe::{Observed, observe};
use crate::reconcile::plan;

/// The upstream to drain.
#[derive(Args)]
pub struct Options {
    /// A rule and its upstream or mirror, by name or address as in status.
    #[arg(value_name = "RULE/UPSTREAM", add = ArgValueCandidates::new(complete::upstreams))]
    target: drain::UpstreamName,
    /// Change nothing: print the upstream's lines for the file, since an override holds on this host alone.
    #[arg(long)]
    print: bool,
}

/// Output of `drain --print`.
#[derive(Serialize, JsonSchema)]
pub struct DrainedFields {
    pub rule: String,
    /// The upstream's fields in the file.
    pub upstream: serde_json::Value,
}

/// Output of `drain` and of `enable` with an upstream.
#[derive(Serialize, JsonSchema)]
pub struct OverrideChanged {
    pub changed: bool,
    #[serde(flatten)]
    pub upstream: UpstreamState,
    pub warnings: Vec<String>,
}

pub async fn run(global: &Global, options: &Options) -> Result<u8> {
    match options.print {
        true => print_lines(global, &options.target).await,
        false => set_override(global, &options.target, State::Drained).await,
    }
}

async fn print_lines(global: &Global, target: &drain::UpstreamName) -> Result<u8> {
    let observed = look(global, &netlink()?).await?;
    let serving = observed.described()?.ok_or(Failure::NothingApplied)?;
    let (desired, ids) = serving.hosts();
    let upstream = drain::drained_fields(desired, ids, target)?;
    let file = &serving.description.origin.file;
    let lines = serde_yaml::to_string(&[&upstream]).context("YAML")?;
    let text = format!(
        "# {file}, rule {}: on all hosts in the place of this upstream\n{lines}",
        target.rule
    );
    report(global, &text, DrainedFields { rule: target.rule.clone(), upstream })
}

/// Locks for writing overrides, and observes the kernel. Builds no generation.
pub(super) async fn lock_overrides(
    global: &Global,
    netlink: &Netlink,
) -> Result<(WriteGuard, Observed)> {
    // pins::write creates the directory
    let guard = pins::read(&global.pin_dir, global.lock_timeout)?;
    drop(guard.ok_or(Failure::NothingApplied)?);
    let guard = lock(global, netlink).await?;
    let observed = observe(Some(&guard), netlink).await?;
    plan::refuse_other_namespace(&observed)?;
    observed.described()?.ok_or(Failure::NothingApplied)?;
    // overrides are read from the state maps
    state_maps::open(&guard)?.context(state_maps::INCOMPLETE)?;
    Ok((guard, observed))
}

/// Drains or enables one upstream.
pub(super) async fn set_override(
    global: &Global,
    target: &drain::UpstreamName,
    state: State,
) -> Result<u8> {
    capabilities::require()?;
    let netlink = netlink()?;
    let (guard, observed) = lock_overrides(global, &netlink).await?;
    let number = observed.serving().context("nothing is applied")?;
    let (desired, ids) = observed.generations[&number].hosts();
    let change = Change::new(desired, ids, &observed.overrides, target, state)?;
    carry_out(&guard, &netlink, &observed, change.action.as_slice()).await?;
    drop(guard);
    let warning = change.warning();
    if let Some(warning) = warning.as_ref().filter(|_| !global.quiet) {
        say(format_args!("warning: {warning}"));
    }
    let text = change.text() + "\n";
    let changed = change.action.is_some();
    let output =
        OverrideChanged { changed, upstream: change.after, warnings: Vec::from_iter(warning) };
    report_done(global, &text, output)
}
