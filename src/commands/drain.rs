//! `udplb drain`: stops sending to an upstream, whatever its state in the file.

use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use clap::Args;
use clap_complete::engine::ArgValueCandidates;
use schemars::JsonSchema;
use serde::Serialize;

use super::flows::selection;
use super::forget::end_flows;
use super::{carry_out, complete, lock, look, netlink};
use crate::cli::output::{plural, report, report_done};
use crate::cli::{Global, seconds};
use crate::config::State;
use crate::datapath::pins::{self, WriteGuard};
use crate::datapath::{capabilities, hook, state_maps};
use crate::error::{Failure, Result, say};
use crate::net::Netlink;
use crate::reconcile::drain::{self, Change, RuleOrUpstream, UpstreamState};
use crate::reconcile::observe::{Observed, observe};
use crate::reconcile::plan;
use crate::telemetry::flows::{self, Names};

/// The upstream to drain.
#[derive(Args)]
pub struct Options {
    /// A rule and its upstream or mirror, by name or address as in status.
    #[arg(value_name = "RULE/UPSTREAM", add = ArgValueCandidates::new(complete::upstreams))]
    target: drain::UpstreamName,
    /// Change nothing: print the upstream's lines for the file, since an override holds on this host alone.
    #[arg(long)]
    print: bool,
    /// End its flows too: their clients' next packets go to other upstreams.
    #[arg(long, conflicts_with = "print")]
    now: bool,
    /// Wait until it has no flows left, but no longer than this. Exits with 75 if there are some then.
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, value_parser = seconds,
          conflicts_with_all = ["print", "now"])]
    wait: Option<Option<Duration>>,
}

/// Output of `drain --print`.
#[derive(Serialize, JsonSchema)]
pub struct DrainedFields {
    pub rule: String,
    /// The upstream's fields in the file.
    pub upstream: serde_json::Value,
}

/// Output of `drain`.
#[derive(Serialize, JsonSchema)]
pub struct Drained {
    #[serde(flatten)]
    pub change: OverrideChanged,
    /// Number of flows that `--now` has ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flows_ended: Option<usize>,
    /// Number of flows that are left after `--wait`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flows_left: Option<u64>,
    /// Reason why the upstream has no flows to end or to wait for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_flows: Option<String>,
}

/// Output of `enable` with an upstream, and a part of `drain`'s.
#[derive(Serialize, JsonSchema)]
pub struct OverrideChanged {
    pub changed: bool,
    #[serde(flatten)]
    pub upstream: UpstreamState,
    pub warnings: Vec<String>,
}

impl OverrideChanged {
    pub fn new(change: &Change) -> OverrideChanged {
        let warnings = Vec::from_iter(change.warning());
        let changed = change.action.is_some();
        OverrideChanged { changed, upstream: change.after.clone(), warnings }
    }
}

/// Exit code of flows that are left when time is up.
const FLOWS_LEFT: u8 = 75;

pub async fn run(global: &Global, options: &Options) -> Result<u8> {
    match options.print {
        true => print_lines(global, &options.target).await,
        false => drain(global, options).await,
    }
}

/// Drains an upstream, and ends its flows or waits for their end.
async fn drain(global: &Global, options: &Options) -> Result<u8> {
    let (guard, observed, change) = set_override(global, &options.target, State::Drained).await?;
    let (mut ended, mut left, mut no_flows) = (None, None, None);
    let mut text = change.text() + "\n";
    let name = change.after.name();
    if options.now || options.wait.is_some() {
        no_flows = change.after.why_no_flows();
    }
    if let Some(why) = &no_flows {
        text += &format!("{name} has no flows: {why}\n");
    } else if options.now {
        // a packet on its way may still make a flow
        hook::wait_for_packets();
        let serving = observed.described()?.ok_or(Failure::NothingApplied)?;
        let target = RuleOrUpstream::Upstream(options.target.clone());
        let forgotten = end_flows(&guard, serving, &selection(serving, Some(&target), None)?)?;
        text += &format!("{} ended\n", plural(forgotten, "flow"));
        ended = Some(forgotten);
    }
    drop(guard);
    if let Some(timeout) = options.wait.filter(|_| no_flows.is_none()) {
        let flows = wait(global, &options.target, timeout).await?;
        text += &format!("{name} has {}\n", flows_left(flows));
        left = Some(flows);
    }
    let change = OverrideChanged::new(&change);
    let output = Drained { change, flows_ended: ended, flows_left: left, no_flows };
    report_done(global, &text, output)?;
    Ok(if left.unwrap_or(0) == 0 { 0 } else { FLOWS_LEFT })
}

fn flows_left(flows: u64) -> String {
    match flows {
        0 => "no flows left".into(),
        flows => format!("{} left", plural(flows as usize, "flow")),
    }
}

/// Waits until an upstream has no flows; returns their number when time is up.
///
/// # Errors
/// The upstream is gone, or was enabled meanwhile.
async fn wait(
    global: &Global,
    target: &drain::UpstreamName,
    timeout: Option<Duration>,
) -> Result<u64> {
    const POLL_INTERVAL: Duration = Duration::from_millis(500);
    const REPORT_INTERVAL: Duration = Duration::from_secs(10);
    let (netlink, started, mut reports) = (netlink()?, Instant::now(), 0);
    loop {
        let flows = count_flows(global, &netlink, target).await?;
        let elapsed = started.elapsed();
        let rest = timeout.map_or(Duration::MAX, |timeout| timeout.saturating_sub(elapsed));
        if flows == 0 || rest.is_zero() {
            return Ok(flows);
        }
        if elapsed >= REPORT_INTERVAL * reports && !global.quiet {
            say(format_args!("{}/{}: {}", target.rule, target.upstream, flows_left(flows)));
            reports += 1;
        }
        tokio::time::sleep(rest.min(POLL_INTERVAL)).await;
    }
}

/// Returns the number of a drained upstream's flows.
async fn count_flows(
    global: &Global,
    netlink: &Netlink,
    target: &drain::UpstreamName,
) -> Result<u64> {
    let guard = pins::read(&global.pin_dir, global.lock_timeout)?.ok_or(Failure::NothingApplied)?;
    let observed = observe(Some(&guard), netlink).await?;
    let serving = observed.described()?.ok_or(Failure::NothingApplied)?;
    let (desired, ids) = serving.hosts();
    let change = Change::new(desired, ids, &observed.overrides, target, State::Drained)?;
    if change.action.is_some() {
        let name = change.before.name();
        return Err(anyhow!("{name} was enabled meanwhile: it gets new flows").into());
    }
    let target = RuleOrUpstream::Upstream(target.clone());
    let (names, mut flows) = (Names::new(serving.hosts()), 0);
    let selection = selection(serving, Some(&target), None)?;
    flows::read(&guard, serving, &names, &selection, |_| flows += 1)?;
    Ok(flows)
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

/// Drains or enables one upstream, and prints a warning.
pub(super) async fn set_override(
    global: &Global,
    target: &drain::UpstreamName,
    state: State,
) -> Result<(WriteGuard, Observed, Change)> {
    capabilities::require()?;
    let netlink = netlink()?;
    let (guard, observed) = lock_overrides(global, &netlink).await?;
    let number = observed.serving().context("nothing is applied")?;
    let (desired, ids) = observed.generations[&number].hosts();
    let change = Change::new(desired, ids, &observed.overrides, target, state)?;
    carry_out(&guard, &netlink, &observed, change.action.as_slice()).await?;
    if let Some(warning) = change.warning().filter(|_| !global.quiet) {
        say(format_args!("warning: {warning}"));
    }
    Ok((guard, observed, change))
}
