//! `udplb apply`: applies a configuration file.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use clap_complete::engine::ArgValueCandidates;
use foldhash::HashMap;
use schemars::JsonSchema;
use serde::Serialize;

use super::{complete, lock, look, netlink};
use crate::cli::output::{plural, report_done, warn};
use crate::cli::{Global, Resolver, some_seconds};
use crate::config::{Diagnostic, Message};
use crate::datapath::description::Origin;
use crate::datapath::{capabilities, lease, pins, state_maps};
use crate::desired::Desired;
use crate::error::{Failure, Result, say};
use crate::net::ipsec::security_policies;
use crate::net::nexthop::NextHop;
use crate::net::{Netlink, routing};
use crate::reconcile::execute::{self, Outcome};
use crate::reconcile::observe::{Observed, observe};
use crate::reconcile::source::{self, ConfigFile, Loaded, Request, Text};
use crate::reconcile::warnings::Candidate;
use crate::reconcile::{confirm, plan, resolve_next_hops};
use crate::telemetry::status::PendingStatus;
use crate::time;

/// Exit code of a configuration that was applied in part.
const INCOMPLETE: u8 = 4;

/// Arguments of `apply`.
#[derive(Args)]
pub struct Options {
    #[command(flatten)]
    pub(super) source: SourceFile,
    /// Show what would change; change nothing.
    #[arg(long)]
    dry_run: bool,
    /// Apply even what a rollback left or what waits for confirmation, and replace filters of udplb
    /// whose pins are not found.
    #[arg(long)]
    force: bool,
    /// Apply the rest if an interface is missing or a host name does not resolve. Exits with 4
    /// then; arpd completes it.
    #[arg(long, conflicts_with = "dry_run")]
    partial: bool,
    /// Roll the change back after this many seconds unless `udplb confirm` is run.
    #[arg(long, value_name = "SECONDS", value_parser = some_seconds, conflicts_with = "dry_run")]
    confirm: Option<Duration>,
    #[command(flatten)]
    pub(super) resolver: Resolver,
}

/// A configuration file and the interfaces to apply it to.
#[derive(Args)]
pub struct SourceFile {
    /// YAML, TOML or JSON by extension; - reads YAML from standard input.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Match packets on ingress of this interface instead of those in the file; may be repeated.
    #[arg(short, long = "interface", value_name = "IF",
          add = ArgValueCandidates::new(complete::interfaces))]
    interfaces: Vec<String>,
}

impl SourceFile {
    pub fn target(&self) -> ConfigFile {
        ConfigFile { file: self.file.clone(), interfaces: self.interfaces.clone() }
    }
}

/// Output of `apply` and `rollback`.
#[derive(Serialize, JsonSchema)]
pub struct Applied {
    /// False if the kernel had the same configuration already.
    pub changed: bool,
    pub generation: u32,
    /// Generation that served before.
    pub previous: Option<u32>,
    pub rule_count: usize,
    /// Upstreams and mirrors.
    pub upstream_count: usize,
    pub interfaces: Vec<String>,
    pub milliseconds: u64,
    /// Change that waits for confirmation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pending: Option<PendingStatus>,
    pub warnings: Vec<Diagnostic>,
    /// Parts of the file that could not be applied.
    pub missing: Vec<Diagnostic>,
}

pub async fn run(global: &Global, options: &Options) -> Result<u8> {
    let target = options.source.target();
    if options.dry_run {
        return super::plan::show(global, &target, options.resolver, false).await;
    }
    apply(global, options, &target).await
}

async fn apply(global: &Global, options: &Options, target: &ConfigFile) -> Result<u8> {
    let started = Instant::now();
    let text = Text::read(&target.file)?;
    let mut loaded = load(global, &text, options, target).await?;
    for missing in &loaded.missing {
        say(missing);
    }
    capabilities::require()?;
    let netlink = netlink()?;
    loaded.expand(&netlink).await?;
    let next_hops = resolve_next_hops(&netlink, &loaded.desired).await?;
    let (advice, hops) = advise(global, &text, &loaded, &next_hops, &netlink).await?;
    loaded.warnings.extend(advice);
    // the generation is built in its memory
    loaded.config = None;
    let guard = lock(global, &netlink).await?;
    let observed = observe(Some(&guard), &netlink).await?;
    let deadline = options.confirm.map(|confirm| time::since_boot() + confirm);
    let plan =
        plan::apply_until(&observed, &loaded.desired, &loaded.origin, options.force, deadline)?;
    let is_new = plan.builds() || !is_known(&observed, &loaded.origin);
    let mut warnings = if is_new { loaded.warnings } else { Vec::new() };
    // next hops change between applies of the same file
    warnings.extend(hops);
    warn(global, &warnings);
    let waiter = match deadline.filter(|_| plan.is_pending()) {
        Some(deadline) => Some(confirm::start_waiter(&global.pin_dir, deadline)?),
        None => None,
    };
    let outcome = execute::reconcile(&guard, &netlink, &observed, &plan, &next_hops).await?;
    // the new generation serves already
    let recorded = execute::record_origin(&guard, &observed, outcome.generation, &loaded.origin);
    drop(guard);
    drop(waiter);
    let pending = plan.pending(&observed).map(|pending| PendingStatus::new(&pending));
    let applied = Applied {
        pending,
        warnings,
        missing: loaded.missing,
        ..applied(&outcome, &loaded.desired, started.elapsed())
    };
    if let Err(error) = recorded {
        say(format_args!(
            "warning: the configuration is applied, but its file name is not recorded: {error:#}"
        ));
    }
    show(global, target, &outcome, &loaded.desired, applied)
}

fn show(
    global: &Global,
    target: &ConfigFile,
    outcome: &Outcome,
    desired: &Desired,
    applied: Applied,
) -> Result<u8> {
    if outcome.counters_reset && !global.quiet {
        say("warning: the counters were missing and start at zero again");
    }
    let file = target.file.file_name().map_or("-".into(), |name| name.to_string_lossy());
    let took = Duration::from_millis(applied.milliseconds);
    let mut text = outcome_text(outcome, &file, desired, took);
    text.extend(applied.pending.iter().map(|pending| format!("{pending}\n")));
    let complete = applied.missing.is_empty();
    report_done(global, &text, applied)?;
    Ok(if complete { 0 } else { INCOMPLETE })
}

async fn load(
    global: &Global,
    text: &Text,
    options: &Options,
    target: &ConfigFile,
) -> Result<Loaded> {
    let Options { resolver, partial, .. } = options;
    let cached = match pins::read(&global.pin_dir, global.lock_timeout) {
        Ok(guard) => guard.and_then(|guard| source::load_cached(text, target, &guard)),
        Err(Failure::Locked(message)) => return Err(Failure::Locked(message)),
        // reported where it is needed
        Err(_) => None,
    };
    if let Some(loaded) = cached {
        // the same text, and an interface may have gone since
        if !*partial || is_here(&loaded.desired, &look(global, &netlink()?).await?) {
            return Ok(loaded);
        }
    }
    let request = Request::new(text, target, resolver.resolve_timeout)?;
    capabilities::require()?;
    let netlink = netlink()?;
    let observed = look(global, &netlink).await?;
    match *partial {
        true => source::load_partial(request, &observed, &netlink).await,
        false => source::load(request, &observed, &netlink).await,
    }
}

/// Returns true if the same text was applied last: a cron job applies a file again and again, and its
/// warnings are printed once.
fn is_known(observed: &Observed, origin: &Origin) -> bool {
    let serving = observed.serving().and_then(|number| observed.generations.get(&number));
    serving.is_some_and(|serving| serving.description.origin.digest == origin.digest)
}

fn is_here(desired: &Desired, observed: &Observed) -> bool {
    desired.interfaces.iter().all(|name| observed.interfaces.contains_key(name))
}

/// Returns the warnings of a file that was not applied before, and those of missing next hops.
///
/// # Errors
/// An upstream is this host itself, or its packets would bypass IPsec.
async fn advise(
    global: &Global,
    text: &Text,
    loaded: &Loaded,
    next_hops: &HashMap<routing::Target, NextHop>,
    netlink: &Netlink,
) -> Result<(Vec<Diagnostic>, Vec<Diagnostic>)> {
    let desired = &loaded.desired;
    let policies = security_policies().context("IPsec policies")?;
    let Some(config) = &loaded.config else {
        if policies.is_empty() && !next_hops.values().any(NextHop::is_wanting) {
            return Ok((Vec::new(), Vec::new()));
        }
        let config = text.parse()?;
        let candidate = Candidate { config: &config, desired, next_hops };
        refuse(candidate, candidate.in_clear(&policies))?;
        return Ok((Vec::new(), config.warnings(candidate.missing_hops())));
    };
    let candidate = Candidate { config, desired, next_hops };
    refuse(candidate, candidate.own_upstreams())?;
    refuse(candidate, candidate.flow_ports_taken())?;
    refuse(candidate, candidate.in_clear(&policies))?;
    let links = netlink.links().await.context("interfaces")?;
    let addresses = netlink.addresses().await.context("addresses")?;
    let mut findings = candidate.several();
    findings.extend(candidate.replies(&links));
    if !arpd_runs(global) {
        findings.extend(candidate.not_joined(&links));
    }
    findings.extend(candidate.of_this_host(&links, &addresses));
    findings.extend(candidate.of_xdp(&links));
    Ok((config.warnings(findings), config.warnings(candidate.missing_hops())))
}

fn refuse(candidate: Candidate<'_>, findings: Vec<Message>) -> Result<()> {
    match findings.is_empty() {
        true => Ok(()),
        false => Err(Failure::Config(candidate.config.errors(findings))),
    }
}

/// Returns true while arpd's lease holds.
fn arpd_runs(global: &Global) -> bool {
    let guard = pins::read(&global.pin_dir, global.lock_timeout).ok().flatten();
    let maps = guard.and_then(|guard| state_maps::open(&guard).ok().flatten());
    let left = maps.and_then(|maps| lease::remaining(&maps.heartbeat).ok().flatten());
    left.is_some_and(|left| !left.is_zero())
}

pub(super) fn outcome_text(
    outcome: &Outcome,
    file: &str,
    desired: &Desired,
    took: Duration,
) -> String {
    if !outcome.changed {
        return format!("unchanged (generation {})\n", outcome.generation);
    }
    let generation = match outcome.previous {
        Some(previous) if previous != outcome.generation => {
            format!("{previous} -> {}", outcome.generation)
        }
        _ => outcome.generation.to_string(),
    };
    format!(
        "{file}: {}, {} on {}, generation {generation} ({} ms)\n",
        plural(desired.rules.len(), "rule"),
        plural(desired.upstreams().count(), "upstream"),
        desired.interfaces.join(", "),
        took.as_millis()
    )
}

pub(super) fn applied(outcome: &Outcome, desired: &Desired, took: Duration) -> Applied {
    Applied {
        changed: outcome.changed,
        generation: outcome.generation,
        previous: outcome.previous,
        rule_count: desired.rules.len(),
        upstream_count: desired.upstreams().count(),
        interfaces: desired.interfaces.clone(),
        milliseconds: took.as_millis() as u64,
        pending: None,
        warnings: Vec::new(),
        missing: Vec::new(),
    }
}
