//! The commands: one file each, with its arguments, its text and its JSON.

pub mod announce;
pub mod apply;
pub mod arpd;
pub mod check;
pub mod complete;
pub mod confirm;
pub mod detach;
pub mod doctor;
pub mod drain;
pub mod enable;
pub mod flows;
pub mod forget;
pub mod get;
pub mod import;
pub mod init;
pub mod list;
pub mod man;
pub mod metrics;
pub mod plan;
pub mod ready;
pub mod rollback;
pub mod schema;
pub mod senders;
pub mod status;
pub mod top;
pub mod trace;
pub mod withdraw;

use anyhow::Context;
use clap::{Parser, Subcommand};
use foldhash::HashMap;

use crate::cli::Global;
use crate::datapath::pins::{self, WriteGuard};
use crate::error::{Result, say};
use crate::net::Netlink;
use crate::reconcile::execute::{self, Executor};
use crate::reconcile::observe::{Observed, observe};
use crate::reconcile::plan::Action;

/// Exit code of problems, and of `get` where no rule matches.
const DEGRADED: u8 = 3;

/// Relays, forwards and balances UDP in the kernel's traffic control layer.
///
/// Exit codes: 0 success; 1 failure, the previous configuration stays active; 2 changes pending
/// (plan --exit-code); 3 nothing applied (all commands), degraded (status), problems found (doctor) or no rule matches (get) or not ready (ready); 4 applied in part (apply --partial); 64 usage; 65 invalid configuration; 66 unreadable file; 75 locked, no answer from a name server, or flows are left (drain --wait); 77 missing privileges.
#[derive(Parser)]
#[command(version, long_version = LONG_VERSION, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    /// Default: status.
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
    /// Validate configuration files (no privileges needed).
    Check(check::Options),
    /// Apply a configuration atomically.
    Apply(apply::Options),
    /// Confirm a change made with `apply --confirm`.
    Confirm(confirm::Options),
    /// Show what applying a file would change.
    Plan(plan::Options),
    /// Show the active configuration, next hops and counters.
    Status(status::Options),
    /// Show live rates of rules and upstreams, full screen.
    ///
    /// Keys: p, m, d, n sort by packets, bits, drops and name; r reverses; / filters by rule or
    /// upstream, Esc ends that; arrows, Home and End scroll; q quits.
    Top(top::Options),
    /// Print one line per packet or copy as it is processed.
    ///
    /// Filters are applied in the kernel. Only one trace can run at a time. It costs nothing after it
    /// has ended, even if it was killed.
    Trace(trace::Options),
    /// Show how a packet would be handled (dry run of the active program).
    ///
    /// Nothing is sent or counted. Exits with 3 if no rule matches.
    Get(get::Options),
    /// Find what keeps packets from being forwarded, and the command that fixes it.
    ///
    /// Changes nothing. Exits with 3 if there are problems; notes are not counted as problems.
    Doctor(doctor::Options),
    /// Print metrics in Prometheus text format, for the textfile collector of node_exporter.
    ///
    /// arpd --metrics serves the same over HTTP.
    Metrics,
    /// Print the active configuration as a file that can be applied again, or its digest.
    List(list::Options),
    /// Stop sending to an upstream until it is enabled; others get its packets.
    ///
    /// Overrides the state in the file. The override outlasts applies and rollbacks while the rule has
    /// the upstream at the same address and port.
    Drain(drain::Options),
    /// Send to an upstream again, whatever its state in the file.
    Enable(enable::Options),
    /// List the flows of rules with `reply: nat` or `sticky`.
    Flows(flows::Options),
    /// End flows: the next packet of a client selects an upstream anew.
    ///
    /// `drain --now` has the clients of an upstream go to another one.
    Forget(forget::Options),
    /// List the senders of rules with `senders`, and those that have fallen silent.
    Senders(senders::Options),
    /// Show the addresses that are announced, give back withdrawn ones, or print a routing daemon's part.
    Announce(announce::Options),
    /// Stop announcing addresses until `udplb announce`; packets that come are forwarded.
    Withdraw(withdraw::Options),
    /// Exit with 0 if this host serves its rules well, with 3 if not, for load balancers and VRRP.
    Ready(ready::Options),
    /// Switch back to the previous generation; run again to undo.
    Rollback(rollback::Options),
    /// Remove the filter from interfaces.
    Detach(detach::Options),
    /// Keep next hops resolved, check their health, and follow host names (daemon).
    ///
    /// Runs in the foreground and follows every apply. SIGHUP: refresh everything now; SIGTERM: exit;
    /// traffic continues.
    Arpd(arpd::Options),
    /// Print a commented configuration for this host, to begin with.
    Init(init::Options),
    /// Print samplicator's configuration as one of udplb.
    ///
    /// Takes samplicator's own options; comments say where the meaning differs.
    Import(import::Options),
    /// Print the JSON Schema (draft-07) of the configuration, or of the JSON output of a command.
    Schema(schema::Options),
    /// Print a shell completion script; it completes rules, upstreams and interfaces too.
    Completions(complete::Options),
    /// Write the manual pages to a directory.
    Man(man::Options),
}

/// Runs a command and returns its exit code.
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
        Command::List(options) => list::run(global, options).await,
        Command::Drain(options) => drain::run(global, options).await,
        Command::Enable(options) => enable::run(global, options).await,
        Command::Flows(options) => flows::run(global, options).await,
        Command::Forget(options) => forget::run(global, options).await,
        Command::Senders(options) => senders::run(global, options).await,
        Command::Announce(options) => announce::run(global, options).await,
        Command::Withdraw(options) => withdraw::run(global, options).await,
        Command::Ready(options) => ready::run(global, options).await,
        Command::Rollback(options) => rollback::run(global, options).await,
        Command::Detach(options) => detach::run(global, options).await,
        Command::Arpd(options) => arpd::run(global, options).await,
        Command::Init(options) => init::run(options).await,
        Command::Import(options) => import::run(global, options),
        Command::Schema(options) => schema::run(options),
        Command::Completions(options) => complete::run(options),
        Command::Man(options) => man::run(options),
    }
}

fn netlink() -> Result<Netlink> {
    Ok(Netlink::open().context("netlink")?)
}

/// Observes the kernel under the lock, which is released before anything is printed.
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
    let next_hops = HashMap::default();
    let mut executor = Executor::new(guard, netlink, observed, &next_hops);
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
