//! `udplb confirm`: confirms a change made with `apply --confirm`.

use std::time::Duration;

use anyhow::anyhow;
use clap::Args;
use schemars::JsonSchema;
use serde::Serialize;

use super::{carry_out, netlink};
use crate::cli::Global;
use crate::cli::output::report_done;
use crate::datapath::{capabilities, pins};
use crate::error::{Failure, Result};
use crate::reconcile::observe::observe;
use crate::reconcile::{confirm, plan};

/// The change to confirm, or to wait for.
#[derive(Args)]
pub struct Options {
    /// Wait for this deadline, in nanoseconds since boot, and roll its change back.
    #[arg(long, hide = true, value_name = "NANOSECONDS")]
    waiter: Option<u64>,
}

/// Output of `confirm`.
#[derive(Serialize, JsonSchema)]
pub struct Confirmed {
    pub changed: bool,
    pub generation: Option<u32>,
}

pub async fn run(global: &Global, options: &Options) -> Result<u8> {
    match options.waiter {
        Some(deadline) => {
            confirm::wait(&global.store(), &netlink()?, Duration::from_nanos(deadline)).await
        }
        None => keep(global).await,
    }
}

async fn keep(global: &Global) -> Result<u8> {
    capabilities::require()?;
    let netlink = netlink()?;
    let nothing = || Failure::Failed(anyhow!("nothing waits for confirmation"));
    // pins::write creates the directory
    drop(pins::read(&global.pin_dir, global.lock_timeout)?.ok_or_else(nothing)?);
    let guard = pins::write(&global.pin_dir, global.lock_timeout)?;
    if let Some(done) = confirm::settle(&guard, &netlink).await? {
        return Err(Failure::Failed(anyhow!("too late: {done}")));
    }
    let observed = observe(Some(&guard), &netlink).await?;
    let actions = plan::confirm(&observed)?;
    let number = observed.pending.map(|pending| pending.generation);
    carry_out(&guard, &netlink, &observed, &actions).await?;
    drop(guard);
    let text = number.map(|number| format!("generation {number} is confirmed\n"));
    let json = Confirmed { changed: true, generation: number };
    report_done(global, &text.unwrap_or_default(), json)
}
