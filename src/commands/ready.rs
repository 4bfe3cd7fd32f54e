//! `udplb ready`: tells by its exit code whether this host serves its rules well.

use clap::Args;
use clap_complete::engine::ArgValueCandidates;
use schemars::JsonSchema;
use serde::Serialize;

use super::{DEGRADED, complete, netlink};
use crate::cli::Global;
use crate::cli::output::report;
use crate::datapath::pins;
use crate::error::{Failure, Result};
use crate::reconcile::observe::observe;
use crate::telemetry::announcement::Announcement;

/// The rule to judge.
#[derive(Args)]
pub struct Options {
    /// Only this rule.
    #[arg(value_name = "RULE", add = ArgValueCandidates::new(complete::rules))]
    rule: Option<String>,
}

/// Output of `ready`.
#[derive(Serialize, JsonSchema)]
pub struct Ready {
    pub ready: bool,
    /// Reason why it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

pub async fn run(global: &Global, options: &Options) -> Result<u8> {
    let netlink = netlink()?;
    let guard = pins::read(&global.pin_dir, global.lock_timeout)?.ok_or(Failure::NothingApplied)?;
    let observed = observe(Some(&guard), &netlink).await?;
    let serving = observed.described()?.ok_or(Failure::NothingApplied)?;
    let announcement = Announcement::read(&guard, &netlink, &observed, serving).await?;
    drop(guard);
    let reason = announcement.trouble(options.rule.as_deref())?;
    let text = match &reason {
        Some(reason) => format!("not ready: {reason}\n"),
        None => "ready\n".into(),
    };
    let exit_code = if reason.is_some() { DEGRADED } else { 0 };
    report(global, &text, Ready { ready: reason.is_none(), reason })?;
    Ok(exit_code)
}
