//! `udplb plan`: shows what applying a file would change.

use anyhow::Context;
use clap::Args;
use foldhash::HashMap;
use schemars::JsonSchema;
use serde::Serialize;

use super::apply::SourceFile;
use super::{look, netlink};
use crate::cli::output::{report, warn};
use crate::cli::{Global, Resolver};
use crate::config::Diagnostic;
use crate::datapath::description::Generation;
use crate::desired::diff::Changes;
use crate::desired::{Desired, RuleIds, assign_ids};
use crate::error::{Result, say};
use crate::net::Netlink;
use crate::reconcile::drain::{self, UpstreamState};
use crate::reconcile::observe::Observed;
use crate::reconcile::plan::{self, Plan};
use crate::reconcile::source::{self, ConfigFile, Loaded, Request, Text};
use crate::reconcile::warnings::Candidate;

/// Exit code of pending changes, with `--exit-code`.
const PENDING: u8 = 2;

/// The file to compare, and how.
#[derive(Args)]
pub struct Options {
    #[command(flatten)]
    source: SourceFile,
    /// Exit with 2 if something would change.
    #[arg(long)]
    exit_code: bool,
    #[command(flatten)]
    resolver: Resolver,
}

/// Output of `plan` and `apply --dry-run`.
#[derive(Serialize, JsonSchema)]
pub struct Planned {
    /// True: an apply would change something.
    pub changed: bool,
    #[serde(flatten)]
    pub changes: Changes,
    /// Upstreams whose state is set by hand.
    pub overrides: Vec<UpstreamState>,
}

pub async fn run(global: &Global, options: &Options) -> Result<u8> {
    show(global, &options.source.target(), options.resolver, options.exit_code).await
}

/// Shows the changes; also `apply --dry-run`.
pub(super) async fn show(
    global: &Global,
    target: &ConfigFile,
    resolver: Resolver,
    exit_code: bool,
) -> Result<u8> {
    let text = Text::read(&target.file)?;
    let request = Request::new(&text, target, resolver.resolve_timeout)?;
    let netlink = netlink()?;
    let observed = look(global, &netlink).await?;
    let mut wanted = source::load(request, &observed, &netlink).await?;
    wanted.expand(&netlink).await?;
    let old = serving(&observed).cloned().unwrap_or_default();
    let attached: Vec<String> = observed.attached().map(|(name, _)| name.into()).collect();
    let mut changes = Changes::new(&old, &wanted.desired, &attached);
    count_moved(&mut changes, &observed, &wanted.desired);
    let plan = plan::apply(&observed, &wanted.desired, &wanted.origin, false);
    if plan.as_ref().map_or(true, Plan::builds) {
        wanted.warnings.extend(of_this_host(&wanted, &netlink).await?);
    }
    warn(global, &wanted.warnings);
    let pending = match plan {
        Ok(Plan { actions, .. }) => !actions.is_empty(),
        Err(refusal) => {
            say(format_args!("warning: apply would fail: {refusal}"));
            true
        }
    };
    let overrides = overrides(&observed, &wanted.desired);
    let mut text = match (changes.is_empty(), pending) {
        (false, _) => changes.to_string(),
        (true, true) => "the same rules; the program, its pins or the filter are renewed\n".into(),
        (true, false) => "no changes\n".into(),
    };
    text.extend(overrides.iter().map(|one| drain::line(one) + "\n"));
    report(global, &text, Planned { changed: pending, changes, overrides })?;
    Ok(if pending && exit_code { PENDING } else { 0 })
}

/// Returns the warnings of `apply` about listeners, interfaces and addresses of this host.
async fn of_this_host(wanted: &Loaded, netlink: &Netlink) -> Result<Vec<Diagnostic>> {
    let Some(config) = &wanted.config else { return Ok(Vec::new()) };
    let links = netlink.links().await.context("interfaces")?;
    let addresses = netlink.addresses().await.context("addresses")?;
    let candidate = Candidate { config, desired: &wanted.desired, next_hops: &HashMap::default() };
    Ok(config.warnings(candidate.of_this_host(&links, &addresses)))
}

/// Counts the flows that move, with overrides by `drain` and `enable`.
pub(super) fn count_moved(changes: &mut Changes, observed: &Observed, new: &Desired) {
    let serving = observed.serving().and_then(|number| observed.generations.get(&number));
    let Some((old, ids)) = serving.map(Generation::hosts) else { return };
    let known: Vec<(&Desired, &[RuleIds])> =
        observed.generations.values().map(Generation::hosts).collect();
    let Ok(new_ids) = assign_ids(new, &known, u32::MAX) else { return };
    let old = drain::effective_rules(old, ids, &observed.overrides);
    let new = drain::effective_rules(new, &new_ids, &observed.overrides);
    changes.count_moved(&old, &new);
}

/// Returns the overrides that hold for a configuration that is not applied yet.
fn overrides(observed: &Observed, desired: &Desired) -> Vec<drain::UpstreamState> {
    let others = observed.generations.values();
    let known: Vec<(&Desired, &[RuleIds])> = others.map(Generation::hosts).collect();
    let ids = assign_ids(desired, &known, u32::MAX).unwrap_or_default();
    drain::overridden([(desired, &ids[..])].into_iter(), &observed.overrides)
}

pub(super) fn serving(observed: &Observed) -> Option<&Desired> {
    Some(&observed.generations.get(&observed.serving()?)?.description.desired)
}
