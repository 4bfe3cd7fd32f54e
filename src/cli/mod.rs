//! The command line.

pub mod output;
pub mod table;
pub mod terminal;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use clap_complete::engine::ArgValueCandidates;

use crate::cli::output::Subject;
use crate::commands::complete;
use crate::commands::top::Order;
use crate::config::Network;
use crate::datapath::pins::PIN_DIR;
use crate::reconcile::drain;

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

#[derive(Args, Clone)]
#[command(next_help_heading = "Global options")]
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
    #[arg(long, global = true, value_name = "DIR", default_value = PIN_DIR, value_parser = pin_dir)]
    pub pin_dir: PathBuf,
    /// How long to wait for another udplb, in seconds.
    #[arg(long, global = true, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    pub lock_timeout: Duration,
}

fn pin_dir(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    match path.file_name() {
        None => Err("a directory of its own in a bpffs, like /sys/fs/bpf/udplb".into()),
        Some(name) if name.to_string_lossy().contains('.') => {
            Err("a bpffs takes no names with a dot (`.`); choose one without".into())
        }
        Some(_) => Ok(path),
    }
}

/// Parses seconds, with a fraction or without; at most so many that no clock overflows.
fn seconds(text: &str) -> Result<Duration, String> {
    const LONGEST: Duration = Duration::from_secs(u32::MAX as u64);
    let wrong = || "a number of seconds, like 2 or 0.5".to_string();
    let seconds = text.parse().map_err(|_| wrong())?;
    let duration = Duration::try_from_secs_f64(seconds).map_err(|_| wrong())?;
    Ok(duration.min(LONGEST))
}

/// Parses a number of packets.
fn at_least_one<T: std::str::FromStr + Default + PartialEq>(text: &str) -> Result<T, String> {
    let number = text.parse().ok().filter(|number| *number != T::default());
    number.ok_or_else(|| "a number, at least 1".into())
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Table,
    /// With next hops, MAC addresses, ages and totals (status).
    Wide,
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
        #[command(flatten)]
        resolver: Resolver,
    },
    /// Make the kernel do what the file says, in one step.
    Apply(Apply),
    /// Keep what `apply --confirm` changed.
    Confirm {
        /// Roll the change with this deadline back when it has passed; in nanoseconds since boot.
        #[arg(long, hide = true, value_name = "NANOSECONDS")]
        waiter: Option<u64>,
    },
    /// Show what applying the file would change.
    Plan {
        #[command(flatten)]
        target: Target,
        /// Exit with 2 when something would change.
        #[arg(long)]
        exit_code: bool,
        #[command(flatten)]
        resolver: Resolver,
    },
    /// Show what serves, where packets go and what became of them.
    Status(Status),
    /// Show where packets go right now, on the whole screen.
    ///
    /// Keys: p, m, d, n sort by packets, bits, drops and name; r reverses; / filters by rule or
    /// upstream, Esc ends that; arrows, Home and End scroll; q quits.
    Top(Top),
    /// Tell of packets as they come: one line for each, or for each copy, in the file's own words.
    ///
    /// Filters are applied in the kernel. Only one trace runs at a time; when it ends, also when it
    /// is killed, packets cost what they did before.
    Trace(Trace),
    /// Say what would happen to such a packet now, and why: the program itself is asked, and
    /// nothing is sent or counted.
    ///
    /// Exits with 3 where no rule matches.
    Get(Get),
    /// Look for what keeps packets from being forwarded, and name the command that fixes it.
    ///
    /// Changes nothing. Exits with 3 where there are problems; notes are no problems.
    Doctor {
        /// Compare this file with what serves, instead of the one that was applied.
        #[arg(value_name = "FILE")]
        file: Option<PathBuf>,
    },
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
    Drain {
        /// A rule, and its upstream or mirror: name or address, as status shows them.
        #[arg(value_name = "RULE/UPSTREAM", add = ArgValueCandidates::new(complete::upstreams))]
        target: drain::Target,
    },
    /// Give an upstream its packets again, whatever the file says.
    Enable {
        /// A rule, and its upstream or mirror: name or address, as status shows them.
        #[arg(value_name = "RULE/UPSTREAM", required_unless_present = "all",
              add = ArgValueCandidates::new(complete::upstreams))]
        target: Option<drain::Target>,
        /// Take back all that drain and enable said: what the file says holds.
        #[arg(long, conflicts_with = "target")]
        all: bool,
    },
    /// Go back to the generation before; a second time, forth again.
    Rollback {
        /// Only show what would change.
        #[arg(long)]
        dry_run: bool,
    },
    /// Take the filter off the interfaces.
    Detach {
        /// Only this interface; may be given several times.
        #[arg(short, long = "interface", value_name = "IF",
              add = ArgValueCandidates::new(complete::interfaces))]
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
    /// Print the JSON Schema (draft-07) of the configuration, or of a command's -o json.
    Schema {
        #[arg(value_enum, default_value = "config", value_name = "OF")]
        subject: Subject,
    },
    /// Print a completion script, which asks udplb for rules, upstreams and interfaces.
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

/// How a file is applied.
#[derive(Args)]
pub struct Apply {
    #[command(flatten)]
    pub target: Target,
    /// Only show what would change.
    #[arg(long)]
    pub dry_run: bool,
    /// Apply what a rollback left or what waits for confirmation, and take over filters whose
    /// pins are nowhere to be seen.
    #[arg(long)]
    pub force: bool,
    /// Apply what can be applied where an interface is missing or a host name does not
    /// resolve; exits with 4 then, and arpd completes it.
    #[arg(long, conflicts_with = "dry_run")]
    pub partial: bool,
    /// Roll the change back after so many seconds, unless `udplb confirm` comes before.
    #[arg(long, value_name = "SECONDS", value_parser = some_seconds, conflicts_with = "dry_run")]
    pub confirm: Option<Duration>,
    #[command(flatten)]
    pub resolver: Resolver,
}

/// A configuration file and where it is to be applied.
#[derive(Args)]
pub struct Target {
    /// YAML, TOML or JSON, by extension; - is YAML on standard input.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Interface on whose ingress packets are matched, instead of the file's; may be given
    /// several times.
    #[arg(short, long = "interface", value_name = "IF",
          add = ArgValueCandidates::new(complete::interfaces))]
    pub interfaces: Vec<String>,
}

/// How host names are resolved.
#[derive(Args, Clone, Copy)]
pub struct Resolver {
    /// Wait this long for the addresses of all host names together, in seconds.
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = some_seconds)]
    pub resolve_timeout: Duration,
}

/// As for a command that has no such option.
impl Default for Resolver {
    fn default() -> Resolver {
        Resolver { resolve_timeout: Duration::from_secs(10) }
    }
}

/// What `status` shows, and how often.
#[derive(Args, Default)]
pub struct Status {
    /// Only this rule.
    #[arg(value_name = "RULE", add = ArgValueCandidates::new(complete::rules))]
    pub rule: Option<String>,
    /// Show it again and again, with rates, until q is pressed; arrows scroll.
    #[arg(short, long)]
    pub watch: bool,
    /// Packets and bits a second instead of totals; takes an interval's time.
    #[arg(short, long)]
    pub rate: bool,
    /// Problems only, and what to do about them.
    #[arg(short, long, conflicts_with_all = ["watch", "rate"])]
    pub problems: bool,
    /// What rates are measured over, in seconds.
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = some_seconds)]
    pub interval: Duration,
}

/// Which packets `trace` tells of, and how.
#[derive(Args)]
pub struct Trace {
    /// Only those of this rule.
    #[arg(long, value_name = "RULE", add = ArgValueCandidates::new(complete::rules))]
    pub rule: Option<String>,
    /// Only those from this network or address.
    #[arg(long, value_name = "CIDR")]
    pub src: Option<Network>,
    /// Only those to this network or address.
    #[arg(long, value_name = "CIDR")]
    pub dst: Option<Network>,
    /// Only what was not sent on.
    #[arg(long)]
    pub drops: bool,
    /// Instead, UDP packets to this host that no rule takes, and why.
    #[arg(long, conflicts_with_all = ["rule", "drops"])]
    pub unmatched: bool,
    /// End after so many lines.
    #[arg(short, long, value_name = "N", value_parser = at_least_one::<u64>)]
    pub count: Option<u64>,
    /// Only every N-th packet of those.
    #[arg(long, value_name = "N", default_value = "1", value_parser = at_least_one::<u32>)]
    pub sample: u32,
    /// Write the frames too, the first 128 bytes of each, as they came and as they left; - is
    /// standard output, instead of the lines.
    #[arg(long, value_name = "FILE")]
    pub pcap: Option<PathBuf>,
}

/// The packet that `get` asks about.
#[derive(Args)]
pub struct Get {
    /// Who sends it: an address, 10.0.0.9:5000 or [2001:db8::9]:5000; port 1024 where none is given.
    #[arg(value_name = "SRC[:PORT]")]
    pub source: Endpoint,
    /// Where it is sent; the port may be missing where the rules have only one for the address.
    #[arg(value_name = "DST[:PORT]")]
    pub destination: Endpoint,
    /// What it says.
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub payload: String,
    /// Where it comes in, where there are several interfaces.
    #[arg(short, long, value_name = "IF", add = ArgValueCandidates::new(complete::interfaces))]
    pub interface: Option<String>,
}

/// An address, with or without a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub address: IpAddr,
    pub port: Option<u16>,
}

impl std::str::FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Endpoint, String> {
        if let Ok(both) = text.parse::<SocketAddr>() {
            return Ok(Endpoint { address: both.ip(), port: Some(both.port()) });
        }
        let address = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        match address.unwrap_or(text).parse() {
            Ok(address) => Ok(Endpoint { address, port: None }),
            Err(_) => Err("an address, `10.0.0.9:5000` or `[2001:db8::9]:5000`".into()),
        }
    }
}

/// What `top` shows, and how often.
#[derive(Args)]
pub struct Top {
    /// Print it once, after an interval, and end.
    #[arg(long)]
    pub once: bool,
    /// What rates are measured over, in seconds.
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = some_seconds)]
    pub interval: Duration,
    /// What comes first.
    #[arg(short, long, value_enum, default_value = "pps")]
    pub sort: Order,
}

/// How the next hops are kept.
#[derive(Args, Clone)]
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
    #[command(flatten)]
    pub resolver: Resolver,
    /// Answer Prometheus here, at /metrics; by default at 127.0.0.1, and at port 9477.
    #[arg(long, value_name = "ADDRESS[:PORT]", num_args = 0..=1, default_missing_value = "127.0.0.1",
          value_parser = metrics_address)]
    pub metrics: Option<SocketAddr>,
    /// A name that Prometheus calls this host by, beside its own name and addresses; may be given
    /// several times, and * is any name.
    #[arg(long = "metrics-host", value_name = "NAME", requires = "metrics")]
    pub metrics_hosts: Vec<String>,
}

/// Of Prometheus' exporters this is the port that udplb has.
const METRICS_PORT: u16 = 9477;

fn metrics_address(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .or_else(|_| text.parse().map(|address: IpAddr| SocketAddr::new(address, METRICS_PORT)))
        .map_err(|_| {
            "an IP address, like `127.0.0.1` or `[::1]:9477`; host names are not resolved".into()
        })
}

fn some_seconds(text: &str) -> Result<Duration, String> {
    const LEAST: Duration = Duration::from_millis(100);
    match seconds(text)? {
        seconds if seconds < LEAST => Err("at least 0.1 seconds".into()),
        seconds => Ok(seconds.min(Duration::from_secs(86_400))),
    }
}
