//! `udplb withdraw`: stops announcing addresses until `udplb announce`.

use std::net::IpAddr;

use clap::Args;

use super::announce::report_change;
use super::drain::lock_overrides;
use super::{carry_out, netlink};
use crate::cli::Global;
use crate::datapath::{announcements, capabilities};
use crate::error::{Failure, Result};
use crate::reconcile::plan;
use crate::telemetry::announcement::refuse_others;

/// The addresses to withdraw.
#[derive(Args)]
pub struct Options {
    /// Addresses of the file's `announce`; none: all, also those of later files.
    #[arg(value_name = "ADDRESS")]
    addresses: Vec<IpAddr>,
    /// Return only after the file's time to settle, when routers send elsewhere.
    #[arg(long)]
    wait: bool,
}

pub async fn run(global: &Global, options: &Options) -> Result<u8> {
    capabilities::require()?;
    let netlink = netlink()?;
    let (guard, observed) = lock_overrides(global, &netlink).await?;
    let serving = observed.described()?.ok_or(Failure::NothingApplied)?;
    refuse_others(serving, &options.addresses)?;
    let addresses = match options.addresses.is_empty() {
        true => &[announcements::ALL],
        false => &options.addresses[..],
    };
    let actions = plan::withdraw(&observed, addresses);
    carry_out(&guard, &netlink, &observed, &actions).await?;
    drop(guard);
    if let (true, Some(announce)) = (options.wait, &serving.description.desired.announce) {
        tokio::time::sleep(announce.settle.into()).await;
    }
    report_change(global, &actions, |address| format!("{address} is withdrawn"))
}
