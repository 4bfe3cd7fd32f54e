//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use crate::drain;
use crate::state::PIN_DIR;

/// Relays, forwards and balances UDP in the kernel's traffic control layer.
///
/// Verbs change the kernel, nouns read it. Exit codes: 0 done; 1 failed, what served before
/// still serves; 2 changes pending (plan --exit-code); 3 degraded or nothing applied (status);
/// 64 usage; 65 bad configuration; 66 unreadable file; 75 locked; 77 privileges missing.
#[derive(Parser)]
#[command(version, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Args)]
pub struct Global {
    /// How data is printed.
    #[arg(short, long, global = true, value_enum, default_value = "table")]
    pub output: Output,
    /// Whether to use colour; NO_COLOR switches it off too.
    #[arg(long, global = true, value_enum, default_value = "auto", value_name = "WHEN")]
    pub color: Color,
    /// Say more; twice for all.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Say nothing unless there is trouble.
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Where the pins are, in a bpffs.
    #[arg(long, global = true, value_name = "DIR", default_value = PIN_DIR)]
    pub pin_dir: PathBuf,
    /// How long to wait for another udplb, in seconds.
    #[arg(long, global = true, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    pub lock_timeout: Duration,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<u32>().map_err(|error| error.to_string())?;
    Ok(Duration::from_secs(seconds.into()))
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    Table,
    Json,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Color {
    Auto,
    Always,
    Never,
}

#[derive(Subcommand)]
pub enum Command {
    /// Judge configuration files; needs no privileges and touches nothing.
    Check {
        /// YAML, TOML or JSON, by extension; - is YAML on standard input.
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
        /// Leave host names unresolved.
        #[arg(long)]
        no_resolve: bool,
    },
    /// Make the kernel do what the file says, in one step.
    Apply {
        #[command(flatten)]
        target: Target,
        /// Only show what would change.
        #[arg(long)]
        dry_run: bool,
        /// Apply what a rollback left, and take over filters whose pins are gone.
        #[arg(long)]
        force: bool,
        /// Apply what can be applied where an interface is missing or a host name does not
        /// resolve; exits with 1 then.
        #[arg(long, conflicts_with = "dry_run")]
        partial: bool,
    },
    /// Show what applying the file would change.
    Plan {
        #[command(flatten)]
        target: Target,
        /// Exit with 2 when something would change.
        #[arg(long)]
        exit_code: bool,
    },
    /// Show what serves, where packets go and what became of them.
    Status {
        /// Only this rule.
        #[arg(value_name = "RULE")]
        rule: Option<String>,
    },
    /// Print what serves as a file that applies to the same state.
    List,
    /// Leave an upstream out, whatever the file says: others get its packets, until it is enabled.
    ///
    /// No generation is built for it, and it holds through applies and rollbacks while the rule has
    /// the upstream at the same address and port.
    Drain {
        /// A rule, and its upstream or mirror: name or address, as status shows them.
        #[arg(value_name = "RULE/UPSTREAM")]
        target: drain::Target,
    },
    /// Give an upstream its packets again, whatever the file says.
    Enable {
        /// A rule, and its upstream or mirror: name or address, as status shows them.
        #[arg(value_name = "RULE/UPSTREAM", required_unless_present = "all")]
        target: Option<drain::Target>,
        /// Take back all that drain and enable said: what the file says holds.
        #[arg(long, conflicts_with = "target")]
        all: bool,
    },
    /// Go back to the generation before; a second time, forth again.
    Rollback,
    /// Take the filter off the interfaces.
    Detach {
        /// Only this interface; may be given several times.
        #[arg(short, long = "interface", value_name = "IF")]
        interfaces: Vec<String>,
        /// Remove the pins too: nothing of udplb stays in the kernel.
        #[arg(long, conflicts_with = "interfaces")]
        purge: bool,
    },
    /// Keep the next hops of all upstreams resolved and fresh, and know which of them are dead.
    ///
    /// Runs in the foreground. Follows what is applied by itself. SIGHUP: look at everything now;
    /// SIGTERM: end, while traffic goes on.
    Arpd(Arpd),
    /// Print the JSON Schema (draft-07) of the configuration.
    Schema,
    /// Print a completion script.
    Completions {
        #[arg(value_name = "SH")]
        shell: Shell,
    },
    /// Write the manual pages into a directory.
    Man {
        #[arg(value_name = "DIR")]
        directory: PathBuf,
    },
}

/// A configuration file and where it is to be applied.
#[derive(Args)]
pub struct Target {
    /// YAML, TOML or JSON, by extension; - is YAML on standard input.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Interface on whose ingress packets are matched, instead of the file's; may be given
    /// several times.
    #[arg(short, long = "interface", value_name = "IF")]
    pub interfaces: Vec<String>,
}

/// How the next hops are kept.
#[derive(Args, Clone, Copy)]
pub struct Arpd {
    /// Resolve everything once and end, for cron.
    #[arg(long)]
    pub once: bool,
    /// Look at everything this often, whether or not the kernel told of a change; in seconds.
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = some_seconds)]
    pub interval: Duration,
    /// How long the program relies on next hops that are not renewed, in seconds.
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = some_seconds)]
    pub lease: Duration,
    /// Probe each next hop this often, in seconds; 100 a second at most of all of them.
    #[arg(long, value_name = "SECONDS", default_value = "2", value_parser = some_seconds)]
    pub probe_interval: Duration,
    /// Ask for the addresses of host names this often, in seconds; 0: never.
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = seconds)]
    pub resolve_interval: Duration,
}

fn some_seconds(text: &str) -> Result<Duration, String> {
    match seconds(text)? {
        Duration::ZERO => Err("at least 1".into()),
        seconds => Ok(seconds.min(Duration::from_secs(86_400))),
    }
}
