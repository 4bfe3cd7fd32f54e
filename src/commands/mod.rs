//! What each command does: effects at the rim, around the pure middle.

pub mod complete;
pub mod doctor;
pub mod get;
pub mod man;
pub mod top;
pub mod trace;

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use serde::Serialize;

use crate::cli::output::{
    Applied, Checked, CheckedFile, Confirmed, Detached, Document, Enabled, Planned,
    RollbackPlanned, Steered,
};
use crate::cli::terminal::{self, Key, Live, Scroll, Woken};
use crate::cli::{self, Cli, Color, Command, Global, Output, Resolver, Target};
use crate::config::{self, Config, Diagnostic, State};
use crate::datapath::description::{Generation, Origin};
use crate::datapath::pins::{self, WriteGuard};
use crate::datapath::{capabilities, lease, pin_search, state_maps, tc};
use crate::desired::diff::Changes;
use crate::desired::{Desired, RuleIds, assign_ids, export};
use crate::error::{Failure, Result, say};
use crate::net::ipsec::security_policies;
use crate::net::neighbour::{NeighbourKey, OUR_PROTOCOL};
use crate::net::nexthop::{self, Way};
use crate::net::{Netlink, routing};
use crate::reconcile::drain::{self, Change};
use crate::reconcile::execute::{self, Executor, Outcome};
use crate::reconcile::observe::{Observed, observe};
use crate::reconcile::plan::{self, Action, Plan, Refusal};
use crate::reconcile::source::{self, Request, Text, Wanted};
use crate::reconcile::{confirm, warnings};
use crate::telemetry::metrics::Gatherer;
use crate::telemetry::problem;
use crate::telemetry::status::{self, Amounts, Layout, Paper, Status};
use crate::time;

const PENDING: u8 = 2;
const DEGRADED: u8 = 3;
/// Something of the file is missing, and the rest serves.
const INCOMPLETE: u8 = 4;

/// Runs a command; the exit code is 0 or one that is no failure.
pub async fn run(cli: &Cli) -> Result<u8> {
    let global = &cli.global;
    let Some(command) = &cli.command else { return status(global, &cli::Status::default()).await };
    match command {
        Command::Check { files, no_resolve, resolver } => {
            let timeout = (!no_resolve).then_some(resolver.resolve_timeout);
            check(global, files, timeout).await
        }
        Command::Apply(options) if options.dry_run => {
            plan(global, &options.target, options.resolver, false).await
        }
        Command::Apply(options) => apply_file(global, options).await,
        Command::Confirm { waiter: Some(deadline) } => {
            confirm::wait(global, &netlink()?, Duration::from_nanos(*deadline)).await
        }
        Command::Confirm { waiter: None } => confirm(global).await,
        Command::Plan { target, exit_code, resolver } => {
            plan(global, target, *resolver, *exit_code).await
        }
        Command::Status(options) => status(global, options).await,
        Command::Top(options) => top::run(global, options, &netlink()?, paper(global)).await,
        Command::Trace(options) => {
            match trace::run(global, options, &netlink()?, colour(global)).await? {
                Some(_) => Ok(0),
                None => Err(Failure::NothingApplied),
            }
        }
        Command::Get(options) => match get::run(global, options, &netlink()?).await? {
            Some(answer) => {
                report(global, &answer.to_string(), &answer)?;
                Ok(if answer.matched() { 0 } else { DEGRADED })
            }
            None => Err(Failure::NothingApplied),
        },
        Command::Doctor { file } => examine(global, file.as_deref()).await,
        Command::Metrics => print(&Gatherer::new(global.clone()).gather(&netlink()?).await?),
        Command::List => list_rules(global).await,
        Command::Drain { target } => steer(global, target, State::Drained).await,
        Command::Enable { target: Some(target), .. } => steer(global, target, State::Active).await,
        Command::Enable { target: None, .. } => enable_all(global).await,
        Command::Rollback { dry_run: true } => plan_rollback(global).await,
        Command::Rollback { dry_run: false } => rollback(global).await,
        Command::Detach { interfaces, purge } => detach(global, interfaces, *purge).await,
        Command::Arpd(options) => crate::arpd::run(global, options).await,
        Command::Schema { subject } => print(&pretty(&subject.schema())?),
        Command::Completions { shell } => {
            print(&complete::script(*shell).with_context(|| format!("a script for {shell}"))?)
        }
        Command::Man { directory } => {
            man::write(directory).with_context(|| directory.display().to_string())?;
            Ok(0)
        }
    }
}

/// To standard output; a reader that went away is no failure.
pub fn print(text: &str) -> Result<u8> {
    match io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(anyhow!(error).context("standard output").into())
        }
        _ => Ok(0),
    }
}

fn pretty(value: &impl Serialize) -> Result<String> {
    Ok(serde_json::to_string_pretty(value).context("JSON")? + "\n")
}

/// Prints `json` where that is asked for, else `text` unless silence is.
fn report(global: &Global, text: &str, json: impl Serialize) -> Result<u8> {
    match global.output {
        Output::Json => print(&pretty(&Document::new(json))?),
        _ if global.quiet => Ok(0),
        _ => print(text),
    }
}

/// Like [`report`], of a change that has been made: that its report cannot be written is a warning.
fn report_done(global: &Global, text: &str, json: impl Serialize) -> Result<u8> {
    if let Err(failure) = report(global, text, json) {
        let why = failure.to_string();
        let why = why.strip_prefix("error: ").unwrap_or(&why);
        say(format_args!("warning: the change is made, and cannot be reported: {why}"));
    }
    Ok(0)
}

fn warn(global: &Global, warnings: &[Diagnostic]) {
    if !global.quiet {
        for warning in warnings {
            say(warning);
        }
    }
}

async fn check(global: &Global, files: &[PathBuf], timeout: Option<Duration>) -> Result<u8> {
    let mut code = 0;
    let mut checked = Vec::new();
    let mut text = String::new();
    for file in files {
        let name = file.display().to_string();
        checked.push(match check_one(file, timeout).await {
            Ok((rules, upstreams, warnings)) => {
                warn(global, &warnings);
                let counts = [plural(rules, "rule"), plural(upstreams, "upstream")];
                text += &format!("{name}: {}\n", counts.join(", "));
                CheckedFile {
                    file: name,
                    valid: true,
                    rule_count: Some(rules),
                    upstream_count: Some(upstreams),
                    diagnostics: warnings,
                    error: None,
                }
            }
            Err(failure) => {
                say(&failure);
                code = failure.exit_code();
                CheckedFile::failed(name, failure)
            }
        });
    }
    report(global, &text, Checked { valid: code == 0, files: checked })?;
    Ok(code)
}

/// Returns the numbers of rules and of upstreams, and warnings.
async fn check_one(
    file: &Path,
    timeout: Option<Duration>,
) -> Result<(usize, usize, Vec<Diagnostic>)> {
    let config = Text::read(file)?.parse()?;
    let mut warnings = config.warnings.clone();
    if let Some(timeout) = timeout {
        warnings.extend(source::check_names(&config, timeout).await?);
    }
    let upstreams = config.rules.iter().map(|rule| rule.destinations().count()).sum();
    Ok((config.rules.len(), upstreams, warnings))
}

fn plural(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

async fn apply_file(global: &Global, options: &cli::Apply) -> Result<u8> {
    let started = Instant::now();
    let text = Text::read(&options.target.file)?;
    let mut wanted = wanted_by_apply(global, &text, options).await?;
    for missing in &wanted.missing {
        say(missing);
    }
    capabilities::require()?;
    let netlink = netlink()?;
    wanted.expand(&netlink).await?;
    let (targets, interfaces) = (wanted.desired.targets(), &wanted.desired.interfaces);
    let ways = nexthop::resolve(&netlink, &targets, interfaces).await.context("next hops")?;
    let (advice, hops) = advise(global, &text, &wanted, &ways, &netlink).await?;
    wanted.warnings.extend(advice);
    let desired = &wanted.desired;
    let guard = lock(global, &netlink).await?;
    let observed = observe(Some(&guard), &netlink).await?;
    let deadline = options.confirm.map(|confirm| time::since_boot() + confirm);
    let plan = plan::apply_until(&observed, desired, &wanted.origin, options.force, deadline)
        .map_err(refused)?;
    // once a generation: the cron job has said them already
    let mut warnings = if plan.builds() { wanted.warnings } else { Vec::new() };
    // whoever answers now may not the next time
    warnings.extend(hops);
    warn(global, &warnings);
    let waiter = deadline.filter(|_| plan.is_pending());
    let waiter = waiter.map(|deadline| confirm::start_waiter(global, deadline)).transpose()?;
    let outcome = execute::reconcile(&guard, &netlink, &observed, &plan, &ways).await?;
    // the new generation serves already
    if let Err(error) =
        execute::record_origin(&guard, &observed, outcome.generation, &wanted.origin)
    {
        say(format_args!("warning: the file that was applied is not recorded: {error:#}"));
    }
    drop(guard);
    drop(waiter);
    if outcome.counters_reset && !global.quiet {
        say("warning: the counters were gone and start again at zero");
    }
    let file = options.target.file.file_name().map_or("-".into(), |name| name.to_string_lossy());
    let mut text = outcome_text(&outcome, &file, desired, started.elapsed());
    let pending = plan.pending(&observed).map(|pending| status::PendingStatus::new(&pending));
    text.extend(pending.iter().map(|pending| format!("{pending}\n")));
    let applied = Applied {
        pending,
        warnings,
        missing: wanted.missing,
        ..applied(&outcome, desired, started.elapsed())
    };
    let complete = applied.missing.is_empty();
    report_done(global, &text, applied)?;
    Ok(if complete { 0 } else { INCOMPLETE })
}

async fn wanted_by_apply(global: &Global, text: &Text, options: &cli::Apply) -> Result<Wanted> {
    let cli::Apply { target, resolver, partial, .. } = options;
    let again = match pins::read(&global.pin_dir, global.lock_timeout) {
        Ok(guard) => guard.and_then(|guard| Wanted::again(text, target, &guard)),
        Err(Failure::Locked(message)) => return Err(Failure::Locked(message)),
        // that is said where it is needed
        Err(_) => None,
    };
    if let Some(wanted) = again {
        // the same text, and an interface may have gone since
        if !*partial || is_here(&wanted.desired, &look(global, &netlink()?).await?) {
            return Ok(wanted);
        }
    }
    let request = Request::new(text, target, *resolver)?;
    capabilities::require()?;
    let netlink = netlink()?;
    let observed = look(global, &netlink).await?;
    match *partial {
        true => Wanted::partial(request, &observed, &netlink).await,
        false => Wanted::whole(request, &observed, &netlink).await,
    }
}

fn is_here(desired: &Desired, observed: &Observed) -> bool {
    desired.interfaces.iter().all(|name| observed.interfaces.contains_key(name))
}

fn netlink() -> Result<Netlink> {
    Ok(Netlink::open().context("netlink")?)
}

/// Returns what is probably not meant, of a file that was not applied before, and the next hops that are
/// not there now.
///
/// # Errors
/// An upstream that is this host itself, or packets to which IPsec would protect.
async fn advise(
    global: &Global,
    text: &Text,
    wanted: &Wanted,
    ways: &BTreeMap<routing::Target, Way>,
    netlink: &Netlink,
) -> Result<(Vec<Diagnostic>, Vec<Diagnostic>)> {
    let desired = &wanted.desired;
    let policies = security_policies().context("IPsec policies")?;
    let Some(config) = &wanted.config else {
        if policies.is_empty() && !ways.values().any(Way::is_wanting) {
            return Ok((Vec::new(), Vec::new()));
        }
        let config = text.parse()?;
        refuse(&config, warnings::in_clear(&config, desired, ways, &policies))?;
        return Ok((Vec::new(), config.warnings(missing_hops(&config, desired, ways))));
    };
    refuse(config, warnings::own_upstreams(config, desired, ways))?;
    refuse(config, warnings::in_clear(config, desired, ways, &policies))?;
    let links = netlink.links().await.context("interfaces")?;
    let addresses = netlink.addresses().await.context("addresses")?;
    let mut findings = warnings::several(config, desired, ways);
    if !arpd_runs(global) {
        findings.extend(warnings::not_joined(config, &desired.interfaces, &links));
    }
    findings.extend(warnings::of_this_host(config, desired, &links, &addresses));
    Ok((config.warnings(findings), config.warnings(missing_hops(config, desired, ways))))
}

fn refuse(config: &Config, findings: Vec<config::Unlocated>) -> Result<()> {
    if findings.is_empty() { Ok(()) } else { Err(Failure::Config(config.errors(findings))) }
}

/// Returns true while arpd's lease holds.
fn arpd_runs(global: &Global) -> bool {
    let guard = pins::read(&global.pin_dir, global.lock_timeout).ok().flatten();
    let maps = guard.and_then(|guard| state_maps::open(&guard).ok().flatten());
    let left = maps.and_then(|maps| lease::remaining(&maps.heartbeat).ok().flatten());
    left.is_some_and(|left| !left.is_zero())
}

fn missing_hops(
    config: &Config,
    desired: &Desired,
    ways: &BTreeMap<routing::Target, Way>,
) -> Vec<config::Unlocated> {
    let mut findings = warnings::unreachable(config, desired, ways);
    findings.extend(warnings::unanswered(config, desired, ways));
    findings
}

fn outcome_text(outcome: &Outcome, file: &str, desired: &Desired, took: Duration) -> String {
    if !outcome.changed {
        return format!("unchanged (generation {})\n", outcome.generation);
    }
    let generation = match outcome.previous {
        Some(previous) if previous != outcome.generation => {
            format!("{previous} -> {}", outcome.generation)
        }
        _ => outcome.generation.to_string(),
    };
    format!(
        "{file}: {}, {} on {}, generation {generation} ({} ms)\n",
        plural(desired.rules.len(), "rule"),
        plural(desired.upstreams().count(), "upstream"),
        desired.interfaces.join(", "),
        took.as_millis()
    )
}

fn applied(outcome: &Outcome, desired: &Desired, took: Duration) -> Applied {
    Applied {
        changed: outcome.changed,
        generation: outcome.generation,
        previous: outcome.previous,
        rule_count: desired.rules.len(),
        upstream_count: desired.upstreams().count(),
        interfaces: desired.interfaces.clone(),
        milliseconds: took.as_millis() as u64,
        pending: None,
        warnings: Vec::new(),
        missing: Vec::new(),
    }
}

fn refused(refusal: Refusal) -> Failure {
    Failure::Failed(anyhow!("{refusal}"))
}

/// Looks at the kernel under the lock, and lets go of it before anything is printed.
async fn look(global: &Global, netlink: &Netlink) -> Result<Observed> {
    let guard = pins::read(&global.pin_dir, global.lock_timeout)?;
    Ok(observe(guard.as_ref(), netlink).await?)
}

async fn plan(global: &Global, target: &Target, resolver: Resolver, exit_code: bool) -> Result<u8> {
    let text = Text::read(&target.file)?;
    let request = Request::new(&text, target, resolver)?;
    let netlink = netlink()?;
    let observed = look(global, &netlink).await?;
    let mut wanted = Wanted::whole(request, &observed, &netlink).await?;
    warn(global, &wanted.warnings);
    wanted.expand(&netlink).await?;
    let old = serving(&observed).cloned().unwrap_or_default();
    let attached: Vec<String> = observed.attached().map(|(name, _)| name.into()).collect();
    let mut changes = Changes::new(&old, &wanted.desired, &attached);
    count_moved(&mut changes, &observed, &wanted.desired);
    let pending = match plan::apply(&observed, &wanted.desired, &wanted.origin, false) {
        Ok(Plan { actions, .. }) => !actions.is_empty(),
        Err(refusal) => {
            say(format_args!("warning: apply would fail: {refusal}"));
            true
        }
    };
    let standing = standing(&observed, &wanted.desired);
    let mut text = match (changes.is_empty(), pending) {
        (false, _) => changes.to_string(),
        (true, true) => "the same rules; the program, its pins or the filter are renewed\n".into(),
        (true, false) => "no changes\n".into(),
    };
    text.extend(standing.iter().map(|one| drain::line(one) + "\n"));
    report(global, &text, Planned { changed: pending, changes, overrides: standing })?;
    Ok(if pending && exit_code { PENDING } else { 0 })
}

/// Counts how many flows move, with what `drain` and `enable` say of upstreams.
fn count_moved(changes: &mut Changes, observed: &Observed, new: &Desired) {
    let serving = observed.serving().and_then(|number| observed.generations.get(&number));
    let Some((old, ids)) = serving.map(Generation::hosts) else { return };
    let known: Vec<(&Desired, &[RuleIds])> =
        observed.generations.values().map(Generation::hosts).collect();
    let Ok(new_ids) = assign_ids(new, &known, u32::MAX) else { return };
    let old = drain::effective_rules(old, ids, &observed.overrides);
    let new = drain::effective_rules(new, &new_ids, &observed.overrides);
    changes.count_moved(&old, &new);
}

/// What `drain` and `enable` say of the hosts of a configuration that is not applied yet.
fn standing(observed: &Observed, desired: &Desired) -> Vec<drain::Standing> {
    let others = observed.generations.values();
    let known: Vec<(&Desired, &[RuleIds])> = others.map(Generation::hosts).collect();
    let ids = assign_ids(desired, &known, u32::MAX).unwrap_or_default();
    drain::standing([(desired, &ids[..])].into_iter(), &observed.overrides)
}

fn serving(observed: &Observed) -> Option<&Desired> {
    Some(&observed.generations.get(&observed.serving()?)?.description.desired)
}

async fn status(global: &Global, options: &cli::Status) -> Result<u8> {
    let netlink = netlink()?;
    let rule = options.rule.as_deref();
    let mut status = status::read(global, &netlink, rule, None).await?.status;
    if options.watch {
        return watch(global, options, &netlink, status).await;
    }
    let tree =
        global.output == Output::Table && !global.quiet && layout(global, options) == Layout::Tree;
    if (options.rate || tree) && status.generation.is_some() {
        tokio::time::sleep(options.interval).await;
        status = status::read(global, &netlink, rule, status.traffic.as_ref()).await?.status;
    }
    let amounts = match (options.rate, tree) {
        (true, _) => Amounts::Rates,
        (false, true) => Amounts::Mixed,
        (false, false) => Amounts::Totals,
    };
    print(&shown(global, options, &status, amounts)?)?;
    Ok(exit_code(&status))
}

fn exit_code(status: &Status) -> u8 {
    if problem::any(&status.problems) { DEGRADED } else { 0 }
}

/// Shows it again and again.
async fn watch(
    global: &Global,
    options: &cli::Status,
    netlink: &Netlink,
    mut status: Status,
) -> Result<u8> {
    let mut live = Live::open(options.interval, true).context("the terminal")?;
    let mut scroll = Scroll::default();
    let mut text = match global.output {
        Output::Json => shown(global, options, &status, Amounts::Totals)?,
        _ if live.is_on_screen() => "measuring\n".into(),
        _ => String::new(),
    };
    while live.show(scroll.window(&text)).is_ok() {
        match live.woken().await {
            Woken::End | Woken::Key(Key::Char('q')) => break,
            Woken::Key(key) => {
                let lines = terminal::size().map_or(usize::MAX, |(_, lines)| lines);
                scroll.press(key, text.lines().count(), lines);
                continue;
            }
            Woken::Tick => {}
        }
        let rule = options.rule.as_deref();
        text = match status::read(global, netlink, rule, status.traffic.as_ref()).await {
            Ok(reading) => {
                status = reading.status;
                shown(global, options, &status, Amounts::Rates)?
            }
            // it may be over the next time
            Err(failure) => format!("{failure}\n"),
        };
    }
    Ok(exit_code(&status))
}

/// As the options ask for it; JSON of one of many is on one line.
fn shown(
    global: &Global,
    options: &cli::Status,
    status: &Status,
    amounts: Amounts,
) -> Result<String> {
    let json = match (global.output, options.watch) {
        (Output::Json, false) => return pretty(&Document::new(status)),
        (Output::Json, true) => serde_json::to_string(&Document::new(status)),
        _ if global.quiet => return Ok(status.problems_text()),
        _ => {
            let layout = layout(global, options);
            let width = paper(global).width.filter(|_| layout != Layout::Wide);
            let paper = Paper { width, ..paper(global) };
            return Ok(status.text(time::now(), paper, layout, amounts));
        }
    };
    Ok(json.context("JSON")? + "\n")
}

/// A tree where the width is known, unless something else is asked for.
fn layout(global: &Global, options: &cli::Status) -> Layout {
    match (options.problems, global.output, paper(global).width) {
        (true, ..) => Layout::Problems,
        (false, Output::Wide, _) | (false, _, None) => Layout::Wide,
        (false, _, Some(_)) => Layout::Tree,
    }
}

async fn examine(global: &Global, file: Option<&Path>) -> Result<u8> {
    let facts = doctor::read(global, &netlink()?, file).await?;
    let findings = doctor::judge(&facts);
    let problems = problem::any(&findings);
    match (global.output, global.quiet && !problems) {
        (Output::Json, _) => {
            let report = doctor::Report { healthy: !problems, findings };
            print(&pretty(&Document::new(report))?)?
        }
        (_, true) => 0,
        (_, false) => print(&doctor::text(&findings, colour(global)))?,
    };
    Ok(if problems { DEGRADED } else { 0 })
}

fn paper(global: &Global) -> Paper {
    Paper { colour: colour(global), width: terminal::width() }
}

fn colour(global: &Global) -> bool {
    match global.color {
        Color::Always => true,
        Color::Never => false,
        Color::Auto => std::env::var_os("NO_COLOR").is_none() && io::stdout().is_terminal(),
    }
}

async fn list_rules(global: &Global) -> Result<u8> {
    let observed = look(global, &netlink()?).await?;
    let Some(serving) = observed.described()? else {
        return Err(Failure::NothingApplied);
    };
    let document = export::document(&serving.description.desired);
    let yaml = serde_yaml::to_string(&document).context("YAML")?;
    match global.output {
        // a configuration file, which has a version of its own
        Output::Json => print(&pretty(&document)?),
        _ => report(global, &yaml, &document),
    }
}

/// The lock and what is below it, for what only writes what is said of upstreams.
async fn to_steer(global: &Global, netlink: &Netlink) -> Result<(WriteGuard, Observed)> {
    // writing makes the directory
    let guard = pins::read(&global.pin_dir, global.lock_timeout)?;
    drop(guard.ok_or(Failure::NothingApplied)?);
    let guard = lock(global, netlink).await?;
    let observed = observe(Some(&guard), netlink).await?;
    plan::refuse_other_namespace(&observed).map_err(refused)?;
    observed.described()?.ok_or(Failure::NothingApplied)?;
    // without them nobody knows what was said of upstreams before
    state_maps::open(&guard)?.context(state_maps::INCOMPLETE)?;
    Ok((guard, observed))
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

/// Drains or enables one upstream.
async fn steer(global: &Global, target: &drain::Target, state: State) -> Result<u8> {
    capabilities::require()?;
    let netlink = netlink()?;
    let (guard, observed) = to_steer(global, &netlink).await?;
    let number = observed.serving().context("nothing is applied")?;
    let (desired, ids) = observed.generations[&number].hosts();
    let change = Change::new(desired, ids, &observed.overrides, target, state)?;
    carry_out(&guard, &netlink, &observed, change.action.as_slice()).await?;
    drop(guard);
    let warning = change.warning();
    if let Some(warning) = warning.as_ref().filter(|_| !global.quiet) {
        say(format_args!("warning: {warning}"));
    }
    let text = change.text() + "\n";
    let changed = change.action.is_some();
    let steered = Steered { changed, upstream: change.after, warnings: Vec::from_iter(warning) };
    report_done(global, &text, steered)
}

/// Takes back all that was said of upstreams, those of the generation before included.
async fn enable_all(global: &Global) -> Result<u8> {
    capabilities::require()?;
    let netlink = netlink()?;
    let (guard, observed) = to_steer(global, &netlink).await?;
    let newest_first = observed.generations.values().rev().map(Generation::hosts);
    let serving = observed.serving().and_then(|number| observed.generations.get(&number));
    let all = serving.map(Generation::hosts).into_iter().chain(newest_first);
    let (actions, after) = drain::take_back(drain::standing(all, &observed.overrides));
    carry_out(&guard, &netlink, &observed, &actions).await?;
    drop(guard);
    let mut text = String::new();
    for one in &after {
        text += &format!("{} is {} by the file\n", one.name(), drain::word(one.state));
    }
    if after.is_empty() {
        text += "unchanged (there are no overrides)\n";
    }
    report_done(global, &text, Enabled { changed: !after.is_empty(), upstreams: after })
}

/// Locks for writing, and first carries out a rollback that is overdue.
async fn lock(global: &Global, netlink: &Netlink) -> Result<WriteGuard> {
    let guard = pins::write(&global.pin_dir, global.lock_timeout)?;
    if let Some(done) = confirm::settle(&guard, netlink).await? {
        say(format_args!("warning: {done}"));
    }
    Ok(guard)
}

async fn confirm(global: &Global) -> Result<u8> {
    capabilities::require()?;
    let netlink = netlink()?;
    let nothing = || Failure::Failed(anyhow!("nothing waits for confirmation"));
    // writing makes the directory
    drop(pins::read(&global.pin_dir, global.lock_timeout)?.ok_or_else(nothing)?);
    let guard = pins::write(&global.pin_dir, global.lock_timeout)?;
    if let Some(done) = confirm::settle(&guard, &netlink).await? {
        return Err(Failure::Failed(anyhow!("too late: {done}")));
    }
    let observed = observe(Some(&guard), &netlink).await?;
    let actions = plan::confirm(&observed).map_err(refused)?;
    let number = observed.pending.map(|pending| pending.generation);
    carry_out(&guard, &netlink, &observed, &actions).await?;
    drop(guard);
    let text = number.map(|number| format!("generation {number} is confirmed\n"));
    let json = Confirmed { changed: true, generation: number };
    report_done(global, &text.unwrap_or_default(), json)
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
    let plan = plan::rollback(&observed, time::now()).map_err(refused)?;
    let target = observed.generations.get(&plan.generation);
    let desired = target.map(|target| target.description.desired.clone()).unwrap_or_default();
    let (targets, interfaces) = (desired.targets(), &desired.interfaces);
    let ways = nexthop::resolve(&netlink, &targets, interfaces).await.context("next hops")?;
    let outcome = execute::reconcile(&guard, &netlink, &observed, &plan, &ways).await?;
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
    let plan = plan::rollback(&observed, time::now()).map_err(refused)?;
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

async fn detach(global: &Global, interfaces: &[String], purge: bool) -> Result<u8> {
    capabilities::require()?;
    let netlink = netlink()?;
    let is_there = pins::read(&global.pin_dir, global.lock_timeout)?.is_some();
    let (mut changed, detached) = match is_there {
        true => detach_locked(global, &netlink, interfaces, purge).await?,
        false => {
            let observed = observe(None, &netlink).await?;
            refuse_orphans(&observed, &canonical(&observed, interfaces))?;
            (false, Vec::new())
        }
    };
    if purge {
        changed |= forget_neighbours(&netlink).await?;
    }
    if !changed {
        return report(global, "nothing was attached\n", Detached { changed, detached });
    }
    let mut text = match detached.is_empty() {
        true if purge => String::new(),
        true => "nothing was attached; interfaces that are missing stay without udplb\n".into(),
        false => format!("detached from {}\n", detached.join(", ")),
    };
    if purge {
        text += "removed all pins\n";
    }
    report_done(global, &text, Detached { changed, detached })
}

fn canonical(observed: &Observed, interfaces: &[String]) -> Vec<String> {
    interfaces.iter().map(|name| observed.canonical(name)).collect()
}

/// Returns whether anything changed, and the interfaces that the filter was taken off.
async fn detach_locked(
    global: &Global,
    netlink: &Netlink,
    interfaces: &[String],
    purge: bool,
) -> Result<(bool, Vec<String>)> {
    let guard = pins::write(&global.pin_dir, global.lock_timeout)?;
    let observed = observe(Some(&guard), netlink).await?;
    let interfaces = canonical(&observed, interfaces);
    let actions = plan::detach(&observed, &interfaces, purge).map_err(refused)?;
    let purges = purge && !guard.is_empty()?;
    carry_out(&guard, netlink, &observed, &actions).await?;
    if purge {
        guard.remove_all()?;
    }
    refuse_orphans(&observed, &interfaces)?;
    let detached = actions.iter().filter_map(|action| match action {
        Action::Detach { interface, .. } => Some(interface.clone()),
        _ => None,
    });
    Ok((purges || !actions.is_empty(), detached.collect()))
}

/// Removes the neighbours that an arpd has the kernel keep: one that was killed leaves them.
async fn forget_neighbours(netlink: &Netlink) -> Result<bool> {
    let all = netlink.neighbours().await.context("neighbours")?;
    let ours = all.iter().filter(|neighbour| neighbour.protocol == OUR_PROTOCOL);
    let ours: Vec<NeighbourKey> =
        ours.map(|neighbour| (neighbour.ifindex, neighbour.address)).collect();
    netlink.delete_neighbours(&ours).await.context("neighbours")?;
    Ok(!ours.is_empty())
}

/// A filter whose pins are nowhere to be seen stays: nothing proves that it is ours to take away.
fn refuse_orphans(observed: &Observed, interfaces: &[String]) -> Result<()> {
    let named = |name: &str| interfaces.is_empty() || interfaces.iter().any(|it| it == name);
    let mut orphans = observed.orphans();
    let orphan = orphans.find(|(name, _, home)| home.is_none() && named(name));
    orphan.map_or(Ok(()), |(name, filter, _)| {
        Err(Failure::Failed(anyhow!(
            "{name}: a filter of udplb whose pins are not in this pin directory stays on ingress: \
             {filter}; {}, remove it with: tc filter del dev {name} ingress pref {}",
            pin_search::HOW_TO_FIND,
            tc::PRIORITY
        )))
    })
}
