//! `udplb rollback`: switches back to the previous generation.

use std::time::Instant;

use clap::Args;
use schemars::JsonSchema;
use serde::Serialize;

use super::apply::{applied, outcome_text};
use super::plan::{count_moved, serving};
use super::{look, netlink};
use crate::cli::Global;
use crate::cli::output::{report, report_done};
use crate::datapath::description::Origin;
use crate::datapath::{capabilities, pins};
use crate::desired::diff::Changes;
use crate::error::{Failure, Result};
use crate::reconcile::observe::observe;
use crate::reconcile::{execute, plan, resolve_next_hops};
use crate::time;

/// Arguments of `rollback`.
#[derive(Args)]
pub struct Options {
    /// Show what would change; change nothing.
    #[arg(long)]
    dry_run: bool,
}

/// Output of `rollback --dry-run`.
#[derive(Serialize, JsonSchema)]
pub struct RollbackPlanned {
    /// True: a rollback would change something.
    pub changed: bool,
    /// Generation that would serve; none: the filters would be removed.
    pub generation: Option<u32>,
    #[serde(flatten)]
    pub changes: Changes,
}

pub async fn run(global: &Global, options: &Options) -> Result<u8> {
    if options.dry_run { plan_rollback(global).await } else { rollback(global).await }
}

async fn rollback(global: &Global) -> Result<u8> {
    let started = Instant::now();
    capabilities::require()?;
    let netlink = netlink()?;
    let guard = pins::write(&global.pin_dir, global.lock_timeout)?;
    let observed = observe(Some(&guard), &netlink).await?;
    if observed.generations.is_empty() && observed.damaged.is_empty() {
        return Err(Failure::NothingApplied);
    }
    let plan = plan::rollback(&observed, time::now())?;
    let target = observed.generations.get(&plan.generation);
    let desired = target.map(|target| target.description.desired.clone()).unwrap_or_default();
    let next_hops = resolve_next_hops(&netlink, &desired).await?;
    let outcome = execute::reconcile(&guard, &netlink, &observed, &plan, &next_hops).await?;
    drop(guard);
    let took = started.elapsed();
    let text = match target {
        Some(target) => outcome_text(&outcome, &target.description.origin.file, &desired, took),
        None => {
            "detached: nothing was attached before the change that waited to be confirmed\n".into()
        }
    };
    report_done(global, &text, applied(&outcome, &desired, took))
}

/// Shows what `rollback` would change.
async fn plan_rollback(global: &Global) -> Result<u8> {
    let observed = look(global, &netlink()?).await?;
    let plan = plan::rollback(&observed, time::now())?;
    let target = observed.generations.get(&plan.generation);
    let new = target.map(|target| target.description.desired.clone()).unwrap_or_default();
    let attached: Vec<String> = observed.attached().map(|(name, _)| name.into()).collect();
    let old = serving(&observed).cloned().unwrap_or_default();
    let mut changes = Changes::new(&old, &new, &attached);
    count_moved(&mut changes, &observed, &new);
    let mut text = match target {
        Some(target) => {
            let Origin { file, .. } = &target.description.origin;
            format!("rollback leads to generation {} of {file}\n", target.number)
        }
        None => "rollback detaches\n".into(),
    };
    text += &changes.to_string();
    let changed = !plan.actions.is_empty();
    let generation = target.map(|target| target.number);
    report(global, &text, RollbackPlanned { changed, generation, changes })
}
