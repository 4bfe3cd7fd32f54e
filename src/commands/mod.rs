//! The commands: one file each, with its arguments, its text and its JSON. Effects are at the rim, around the
//! pure middle.

pub mod apply;
pub mod arpd;
pub mod check;
pub mod complete;
pub mod confirm;
pub mod detach;
pub mod doctor;
pub mod drain;
pub mod enable;
pub mod get;
pub mod list;
pub mod man;
pub mod metrics;
pub mod plan;
pub mod rollback;
pub mod schema;
pub mod status;
pub mod top;
pub mod trace;

use std::collections::BTreeMap;

use anyhow::{Context, anyhow};
use clap::{Parser, Subcommand};

use crate::cli::Global;
use crate::datapath::pins::{self, WriteGuard};
use crate::error::{Failure, Result, say};
use crate::net::Netlink;
use crate::reconcile::execute::{self, Executor};
use crate::reconcile::observe::{Observed, observe};
use crate::reconcile::plan::{Action, Refusal};

/// There are problems, or no rule matches.
const DEGRADED: u8 = 3;

/// Relays, forwards and balances UDP in the kernel's traffic control layer.
///
/// Verbs change the kernel, nouns read it. Exit codes: 0 done; 1 failed, what served before
/// still serves; 2 changes pending (plan --exit-code); 3 nothing applied (in all commands), degraded (status), problems found (doctor) or no rule matches (get); 4 applied in part (apply --partial); 64 usage; 65 bad configuration; 66 unreadable file; 75 locked, or no answer from a name server; 77 privileges missing.
#[derive(Parser)]
#[command(version, long_version = LONG_VERSION, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    /// Without one: status.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// Version, commit and kernel object, for reports.
const LONG_VERSION: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    "\ncommit: ",
    env!("UDPLB_COMMIT"),
    "\nkernel object: sha256 ",
    env!("UDPLB_OBJECT_SHA256")
);

#[derive(Subcommand)]
pub enum Command {
    /// Judge configuration files; needs no privileges and touches nothing.
    Check(check::Options),
    /// Make the kernel do what the file says, in one step.
    Apply(apply::Options),
    /// Keep what `apply --confirm` changed.
    Confirm(confirm::Options),
    /// Show what applying the file would change.
    Plan(plan::Options),
    /// Show what serves, where packets go and what became of them.
    Status(status::Options),
    /// Show where packets go right now, on the whole screen.
    ///
    /// Keys: p, m, d, n sort by packets, bits, drops and name; r reverses; / filters by rule or
    /// upstream, Esc ends that; arrows, Home and End scroll; q quits.
    Top(top::Options),
    /// Tell of packets as they come: one line for each, or for each copy, in the file's own words.
    ///
    /// Filters are applied in the kernel. Only one trace runs at a time; when it ends, also when it
    /// is killed, packets cost what they did before.
    Trace(trace::Options),
    /// Say what would happen to such a packet now, and why: the program itself is asked, and
    /// nothing is sent or counted.
    ///
    /// Exits with 3 where no rule matches.
    Get(get::Options),
    /// Look for what keeps packets from being forwarded, and name the command that fixes it.
    ///
    /// Changes nothing. Exits with 3 where there are problems; notes are no problems.
    Doctor(doctor::Options),
    /// Print metrics for Prometheus, as the textfile collector of node_exporter reads them.
    ///
    /// arpd --metrics has the same for a scraper.
    Metrics,
    /// Print what serves as a file that applies to the same state.
    List,
    /// Leave an upstream out, whatever the file says: others get its packets, until it is enabled.
    ///
    /// No generation is built for it, and it holds through applies and rollbacks while the rule has
    /// the upstream at the same address and port.
    Drain(drain::Options),
    /// Give an upstream its packets again, whatever the file says.
    Enable(enable::Options),
    /// Go back to the generation before; a second time, forth again.
    Rollback(rollback::Options),
    /// Take the filter off the interfaces.
    Detach(detach::Options),
    /// Keep the next hops of all upstreams resolved and fresh, and know which of them are dead.
    ///
    /// Runs in the foreground. Follows what is applied by itself. SIGHUP: look at everything now;
    /// SIGTERM: end, while traffic goes on.
    Arpd(arpd::Options),
    /// Print the JSON Schema (draft-07) of the configuration, or of a command's -o json.
    Schema(schema::Options),
    /// Print a completion script, which asks udplb for rules, upstreams and interfaces.
    Completions(complete::Options),
    /// Write the manual pages into a directory.
    Man(man::Options),
}

/// Runs a command; the exit code is 0 or one that is no failure.
pub async fn run(cli: &Cli) -> Result<u8> {
    let global = &cli.global;
    let Some(command) = &cli.command else {
        return status::run(global, &status::Options::default()).await;
    };
    match command {
        Command::Check(options) => check::run(global, options).await,
        Command::Apply(options) => apply::run(global, options).await,
        Command::Confirm(options) => confirm::run(global, options).await,
        Command::Plan(options) => plan::run(global, options).await,
        Command::Status(options) => status::run(global, options).await,
        Command::Top(options) => top::run(global, options).await,
        Command::Trace(options) => trace::run(global, options).await,
        Command::Get(options) => get::run(global, options).await,
        Command::Doctor(options) => doctor::run(global, options).await,
        Command::Metrics => metrics::run(global).await,
        Command::List => list::run(global).await,
        Command::Drain(options) => drain::run(global, options).await,
        Command::Enable(options) => enable::run(global, options).await,
        Command::Rollback(options) => rollback::run(global, options).await,
        Command::Detach(options) => detach::run(global, options).await,
        Command::Arpd(options) => arpd::run(global, options).await,
        Command::Schema(options) => schema::run(options),
        Command::Completions(options) => complete::run(options),
        Command::Man(options) => man::run(options),
    }
}

fn netlink() -> Result<Netlink> {
    Ok(Netlink::open().context("netlink")?)
}

fn refused(refusal: Refusal) -> Failure {
    Failure::Failed(anyhow!("{refusal}"))
}

/// Looks at the kernel under the lock, and lets go of it before anything is printed.
async fn look(global: &Global, netlink: &Netlink) -> Result<Observed> {
    let guard = pins::read(&global.pin_dir, global.lock_timeout)?;
    Ok(observe(guard.as_ref(), netlink).await?)
}

async fn carry_out(
    guard: &WriteGuard,
    netlink: &Netlink,
    observed: &Observed,
    actions: &[Action],
) -> Result<()> {
    let ways = BTreeMap::new();
    let mut executor = Executor::new(guard, netlink, observed, &ways);
    Ok(executor.run(actions, &mut execute::log).await?)
}

/// Locks for writing, and first carries out a rollback that is overdue.
async fn lock(global: &Global, netlink: &Netlink) -> Result<WriteGuard> {
    let guard = pins::write(&global.pin_dir, global.lock_timeout)?;
    if let Some(done) = crate::reconcile::confirm::settle(&guard, netlink).await? {
        say(format_args!("warning: {done}"));
    }
    Ok(guard)
}
