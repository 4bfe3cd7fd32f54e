//! `udplb announce`: shows announced addresses, gives them back, and prints the part of a routing daemon.

mod engine;

use std::net::IpAddr;
use std::path::PathBuf;

use clap::Args;
use engine::{Engine, Neighbour};
use schemars::JsonSchema;
use serde::Serialize;

use super::drain::lock_overrides;
use super::{carry_out, look, netlink};
use crate::cli::Global;
use crate::cli::output::{print, report, report_done};
use crate::config::Announce;
use crate::datapath::{announcements, capabilities};
use crate::error::{Failure, Result};
use crate::reconcile::observe::Observed;
use crate::reconcile::plan::{self, Action};
use crate::reconcile::source::Text;
use crate::telemetry::announcement::{AnnouncedAddress, refuse_others};
use crate::telemetry::status;

/// The addresses to show or give back, or the part to print.
#[derive(Args)]
pub struct Options {
    /// Announce these addresses again that `withdraw` has withdrawn; none: show all.
    #[arg(value_name = "ADDRESS")]
    addresses: Vec<IpAddr>,
    /// End all withdrawals.
    #[arg(long, conflicts_with = "addresses")]
    all: bool,
    /// Print the part of BIRD's configuration that announces the addresses.
    #[arg(long, conflicts_with_all = ["addresses", "all", "frr"], requires = "autonomous_system")]
    bird: bool,
    /// Print the part of FRR's configuration that announces the addresses.
    #[arg(long, conflicts_with_all = ["addresses", "all"], requires = "autonomous_system")]
    frr: bool,
    /// Number of this host's autonomous system.
    #[arg(long = "as", value_name = "AS")]
    autonomous_system: Option<u32>,
    /// A router and its autonomous system; may be repeated.
    #[arg(long = "neighbor", value_name = "ADDRESS=AS", requires = "autonomous_system")]
    neighbours: Vec<Neighbour>,
    /// The configuration that is announced; default: the active one.
    #[arg(long, value_name = "FILE", requires = "autonomous_system")]
    file: Option<PathBuf>,
}

/// Output of `announce` without addresses.
#[derive(Serialize, JsonSchema)]
pub struct Announced {
    pub announced: Vec<AnnouncedAddress>,
}

/// Output of `withdraw`, and of `announce` with addresses.
#[derive(Serialize, JsonSchema)]
pub struct AnnouncementChanged {
    pub changed: bool,
    /// `::` stands for all.
    pub addresses: Vec<IpAddr>,
}

pub async fn run(global: &Global, options: &Options) -> Result<u8> {
    let engine = match (options.bird, options.frr) {
        (true, _) => Some(Engine::Bird),
        (_, true) => Some(Engine::Frr),
        _ => None,
    };
    if let (Some(engine), Some(own)) = (engine, options.autonomous_system) {
        let announce = announce_of(global, options).await?;
        return print(&engine.part(&announce, own, &options.neighbours));
    }
    if options.all || !options.addresses.is_empty() {
        return restore(global, options).await;
    }
    let status = status::read(&global.store(), &netlink()?, None, None).await?.status;
    if status.generation.is_none() {
        return Err(Failure::NothingApplied);
    }
    let lines: String = status.announced.iter().map(|it| format!("{it}\n")).collect();
    let text = match lines.is_empty() {
        true => "nothing is announced: no `announce`, or no key with an address of its own\n",
        false => &lines,
    };
    report(global, text, Announced { announced: status.announced })
}

/// Returns the announcement of the file, or of the active configuration.
async fn announce_of(global: &Global, options: &Options) -> Result<Announce> {
    let announce = match &options.file {
        Some(file) => Text::read(file)?.parse()?.announce,
        None => {
            let observed = look(global, &netlink()?).await?;
            let serving = observed.described()?.ok_or(Failure::NothingApplied)?;
            serving.description.desired.announce.clone()
        }
    };
    announce.ok_or_else(|| Failure::Failed(anyhow::anyhow!("the configuration has no `announce`")))
}

async fn restore(global: &Global, options: &Options) -> Result<u8> {
    capabilities::require()?;
    let netlink = netlink()?;
    let (guard, observed) = lock_overrides(global, &netlink).await?;
    let addresses = match options.all {
        true => observed.announcements.withdrawn.keys().copied().collect(),
        false => {
            refuse_others(
                observed.described()?.ok_or(Failure::NothingApplied)?,
                &options.addresses,
            )?;
            refuse_half(&observed)?;
            options.addresses.clone()
        }
    };
    let actions = plan::restore(&observed, &addresses);
    carry_out(&guard, &netlink, &observed, &actions).await?;
    drop(guard);
    report_change(global, &actions, |address| format!("{address} is announced while it is served"))
}

/// Refuses to announce one address of a host that is withdrawn as a whole.
fn refuse_half(observed: &Observed) -> Result<()> {
    match observed.announcements.withdrawn.contains_key(&announcements::ALL) {
        false => Ok(()),
        true => Err(Failure::Failed(anyhow::anyhow!(
            "all addresses are withdrawn; give them back with: udplb announce --all"
        ))),
    }
}

/// Reports the withdrawals that began or ended.
pub(super) fn report_change(
    global: &Global,
    actions: &[Action],
    line: impl Fn(&str) -> String,
) -> Result<u8> {
    let addresses = actions.iter().filter_map(|action| match action {
        Action::SetWithdrawn { address, .. } => Some(*address),
        _ => None,
    });
    let addresses: Vec<IpAddr> = addresses.collect();
    let name = |address: &IpAddr| match *address {
        announcements::ALL => "every address".to_string(),
        address => address.to_string(),
    };
    let mut text: String = addresses.iter().map(|it| line(&name(it)) + "\n").collect();
    if actions.is_empty() {
        text += "unchanged\n";
    }
    report_done(global, &text, AnnouncementChanged { changed: !actions.is_empty(), addresses })
}
