//! `udplb status`: shows the active configuration, next hops and counters; as a tree on a terminal, else as a
//! table with all details for scripts.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use clap_complete::engine::ArgValueCandidates;

use super::{DEGRADED, complete, netlink};
use crate::cli::output::{
    BOLD, Document, GREEN, RED, TerminalStyle, YELLOW, plural, pretty, print, terminal_style,
};
use crate::cli::table::{self, Column};
use crate::cli::terminal::{self, Key, Live, Scroll, Woken};
use crate::cli::{Global, Output, some_seconds};
use crate::config::{Action, Mode, State};
use crate::datapath::counters::{Count, Counts};
use crate::desired::diff;
use crate::error::Result;
use crate::net::Netlink;
use crate::telemetry::problem::{self, Level, Problem};
use crate::telemetry::status::{
    self, InterfaceStatus, NextHopStatus, RuleStatus, Status, UpstreamStatus,
};
use crate::telemetry::traffic::Rate;
use crate::time;

/// Arguments of `status`.
#[derive(Args, Default)]
pub struct Options {
    /// Only this rule.
    #[arg(value_name = "RULE", add = ArgValueCandidates::new(complete::rules))]
    rule: Option<String>,
    /// Refresh at an interval, with rates, until q is pressed; arrows scroll.
    #[arg(short, long)]
    watch: bool,
    /// Show packets and bits per second instead of totals; takes one interval.
    #[arg(short, long)]
    rate: bool,
    /// Show only problems, and how to fix them.
    #[arg(short, long, conflicts_with_all = ["watch", "rate"])]
    problems: bool,
    /// Measure rates over this many seconds.
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = some_seconds)]
    interval: Duration,
}

pub async fn run(global: &Global, options: &Options) -> Result<u8> {
    let netlink = netlink()?;
    let rule = options.rule.as_deref();
    let mut status = status::read(&global.store(), &netlink, rule, None).await?.status;
    if options.watch {
        return watch(global, options, &netlink, status).await;
    }
    let tree =
        global.output == Output::Table && !global.quiet && layout(global, options) == Layout::Tree;
    if (options.rate || tree) && status.generation.is_some() {
        tokio::time::sleep(options.interval).await;
        status =
            status::read(&global.store(), &netlink, rule, status.traffic.as_ref()).await?.status;
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

/// Refreshes the status until a key or signal ends it.
async fn watch(
    global: &Global,
    options: &Options,
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
        text = match status::read(&global.store(), netlink, rule, status.traffic.as_ref()).await {
            Ok(reading) => {
                status = reading.status;
                shown(global, options, &status, Amounts::Rates)?
            }
            // try again at the next tick
            Err(failure) => format!("{failure}\n"),
        };
    }
    Ok(exit_code(&status))
}

/// Formats a status by the options. JSON of `--watch` is on one line.
fn shown(global: &Global, options: &Options, status: &Status, amounts: Amounts) -> Result<String> {
    let json = match (global.output, options.watch) {
        (Output::Json, false) => return pretty(&Document::new(status)),
        (Output::Json, true) => serde_json::to_string(&Document::new(status)),
        _ if global.quiet => return Ok(status.problems_text()),
        _ => {
            let layout = layout(global, options);
            let width = terminal_style(global).width.filter(|_| layout != Layout::Wide);
            let terminal = TerminalStyle { width, ..terminal_style(global) };
            return Ok(status.text(time::now(), terminal, layout, amounts));
        }
    };
    Ok(json.context("JSON")? + "\n")
}

/// Chooses the layout: a tree if the width is known and no other was requested.
fn layout(global: &Global, options: &Options) -> Layout {
    match (options.problems, global.output, terminal_style(global).width) {
        (true, ..) => Layout::Problems,
        (false, Output::Wide, _) | (false, _, None) => Layout::Wide,
        (false, _, Some(_)) => Layout::Tree,
    }
}

/// Part of a status to show.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Rules with their upstreams below: state, amounts and losses.
    Tree,
    /// A row for each rule and upstream, with next hops.
    Wide,
    /// Problems with their fixes.
    Problems,
}

/// Amounts in the columns.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Amounts {
    /// Packets and bytes since the counters began.
    Totals,
    /// Rates, and totals of what was not forwarded.
    Mixed,
    /// Rates.
    Rates,
}

const TREE: [Column; 5] = [
    Column::text("RULE", 16),
    Column::text("STATE", 7),
    Column::number("FORWARDED"),
    Column::number("BYTES"),
    Column::number("SHARE"),
];

const WIDE: [Column; 9] = [
    Column::text("RULE", 8),
    Column::text("KEY", 12),
    Column::text("UPSTREAM", 12),
    Column::text("NEXT HOP", 9),
    Column::text("STATE", 5),
    Column::number("FORWARDED"),
    Column::number("BYTES"),
    Column::number("SHARE"),
    Column::text("NOT FORWARDED", 13),
];

/// A line of the tree: cells, or text below a row.
enum Line {
    Row { cells: Vec<Cow<'static, str>>, style: &'static str },
    Remark { text: String, style: &'static str },
}

impl Status {
    /// Returns the status as text; `now` is in seconds since 1970.
    pub fn text(
        &self,
        now: u64,
        terminal: TerminalStyle,
        layout: Layout,
        amounts: Amounts,
    ) -> String {
        let mut text = self.head(now, terminal, layout, amounts);
        for problem in &self.problems {
            text += &problem_lines(problem, terminal, layout == Layout::Problems);
        }
        if self.rules.is_empty() || layout == Layout::Problems {
            return text;
        }
        text.push('\n');
        match layout {
            Layout::Tree => self.tree(&mut text, terminal, amounts),
            _ => self.table(&mut text, terminal, amounts),
        }
        text
    }

    /// Returns a line for each problem, without notes.
    pub fn problems_text(&self) -> String {
        let problems = self.problems.iter().filter(|problem| problem.level == Level::Problem);
        problems.map(|problem| format!("! {problem}\n")).collect()
    }

    /// Returns the lines above the table: verdict, generation, interfaces.
    fn head(&self, now: u64, terminal: TerminalStyle, layout: Layout, amounts: Amounts) -> String {
        let mut text = String::new();
        let count = |level| self.problems.iter().filter(|problem| problem.level == level).count();
        let (style, verdict) = match count(Level::Problem) {
            0 => (GREEN, "all is well".into()),
            1 => (RED, "1 problem".into()),
            problems => (RED, format!("{problems} problems")),
        };
        let (Some(number), Some(built), Some(file)) = (self.generation, self.built, &self.file)
        else {
            return text;
        };
        let age = time::age(now.saturating_sub(built));
        let applied = match layout {
            Layout::Wide => format!("applied {} ({age} ago)", time::utc(built)),
            _ => format!("applied {age} ago"),
        };
        let verdict = terminal.painted(style, &verdict);
        let _ = writeln!(text, "{verdict}: generation {number} of {file}, {applied}");
        if layout == Layout::Problems {
            return text;
        }
        let interfaces: Vec<String> =
            self.interfaces.iter().map(|it| interface_text(it, self.generation)).collect();
        let xdp = self.xdp.map(|xdp| format!("; XDP sent {:.1} %", xdp.share * 100.0));
        let arpd = match self.arpd {
            Some(true) => "; arpd keeps the next hops",
            Some(false) => "; arpd has ended, and the kernel's own table is relied on",
            None => "",
        };
        let xdp = xdp.unwrap_or_default();
        let _ = writeln!(text, "on {}{xdp}{arpd}", interfaces.join(", "));
        for announced in &self.announced {
            let _ = writeln!(text, "announce {announced}");
        }
        if let Some(decap) = &self.decap {
            let (via, from) = (decap.via.join(", "), decap.from.join(", "));
            let _ = writeln!(
                text,
                "decap {via} from {from}: {}",
                plural(decap.count.packets as usize, "packet")
            );
        }
        if let (Some(since), false) = (self.counted_since, amounts == Amounts::Rates) {
            let what =
                if amounts == Amounts::Mixed { "what was not forwarded is" } else { "totals are" };
            let _ = writeln!(text, "{what} counted since {}", time::utc(since));
        }
        if let Some(held) = self.held {
            let _ = writeln!(text, "generation {held} is held: a rollback left it");
        }
        if let Some(pending) = self.pending.as_ref().filter(|pending| pending.seconds_left > 0) {
            let _ = writeln!(text, "{pending}");
        }
        text
    }

    fn tree(&self, text: &mut String, terminal: TerminalStyle, amounts: Amounts) {
        let mut lines = Vec::new();
        for rule in &self.rules {
            let cells = amount_cells(&rule.counters, rule.rate, None);
            let name = format!("{} {}", rule.name, treatment(rule));
            let cells = [name.into(), "".into()].into_iter().chain(cells).collect();
            lines.push(Line::Row { cells, style: BOLD });
            lines.extend(remark(&rule.own, &rule.notes, &rule.own_losses, amounts, "  "));
            let last = rule.destinations().count() - 1;
            for (place, (upstream, is_mirror)) in rule.destinations().enumerate() {
                let (branch, stem) =
                    if place == last { ("└ ", "    ") } else { ("├ ", "│   ") };
                let mirror = if is_mirror { "mirror " } else { "" };
                let cells = amount_cells(&upstream.counters, upstream.rate, upstream.share);
                let name = format!("{branch}{mirror}{}", upstream.endpoint);
                let state = upstream.condition().unwrap_or_default();
                let cells = [name.into(), state.into()].into_iter().chain(cells).collect();
                lines.push(Line::Row { cells, style: upstream.style() });
                let none = BTreeMap::new();
                lines.extend(remark(&upstream.counters, &none, &upstream.losses, amounts, stem));
            }
        }
        let cells = |line: &Line| match line {
            Line::Row { cells, .. } => Some(cells.clone()),
            Line::Remark { .. } => None,
        };
        let rows: Vec<Vec<Cow<'_, str>>> = lines.iter().filter_map(cells).collect();
        let mut titles = TREE;
        if amounts != Amounts::Totals {
            (titles[2].title, titles[3].title) = ("PPS", "MBIT/S");
        }
        let mut table = table::lines(&titles, &rows, terminal.width).into_iter();
        let header = table.next().unwrap_or_default();
        let _ = writeln!(text, "{}", terminal.painted(BOLD, &header));
        for line in &lines {
            let _ = match line {
                Line::Row { style, .. } => {
                    writeln!(text, "{}", terminal.painted(style, &table.next().unwrap_or_default()))
                }
                Line::Remark { text: remark, style } => {
                    let remark = table::cut(remark, terminal.width.unwrap_or(usize::MAX));
                    writeln!(text, "{}", terminal.painted(style, &remark))
                }
            };
        }
    }

    fn table(&self, text: &mut String, terminal: TerminalStyle, amounts: Amounts) {
        let mut columns = WIDE;
        if amounts == Amounts::Rates {
            (columns[5].title, columns[6].title) = ("PPS", "MBIT/S");
            columns[8].title = "NOT FORWARDED/S";
        }
        let rows = self.rows(terminal, amounts);
        let lines = table::lines(&columns, &rows, terminal.width);
        for (nth, line) in lines.iter().enumerate() {
            let _ = writeln!(text, "{}", terminal.painted(if nth == 0 { BOLD } else { "" }, line));
        }
    }

    fn rows(&self, terminal: TerminalStyle, amounts: Amounts) -> Vec<Vec<Cow<'_, str>>> {
        let filler = if terminal.width.is_some() { "" } else { "-" };
        let mut rows = Vec::new();
        for rule in &self.rules {
            let mut row: Vec<Cow<'_, str>> = Vec::with_capacity(WIDE.len());
            row.extend([rule.name.as_str().into(), treatment(rule).into()]);
            row.extend([const { Cow::Borrowed("") }; 3]);
            let rate = rule.rate.filter(|_| amounts == Amounts::Rates);
            row.extend(amount_cells(&rule.counters, rate, None));
            row.push(losses(&rule.counters, &rule.notes, &rule.losses, amounts).into());
            rows.push(row);
            for (upstream, is_mirror) in rule.destinations() {
                let name = if terminal.width.is_some() { "" } else { &rule.name };
                let mirror = if is_mirror { "mirror " } else { "" };
                let hop = upstream.next_hop.as_ref();
                let mut row: Vec<Cow<'_, str>> = Vec::with_capacity(WIDE.len());
                row.extend([
                    name.into(),
                    "".into(),
                    format!("{mirror}{}", upstream.endpoint).into(),
                    hop.map_or("no route".into(), |hop| hop.text().into()),
                    upstream.condition().unwrap_or_default().into(),
                ]);
                let rate = upstream.rate.filter(|_| amounts == Amounts::Rates);
                row.extend(amount_cells(&upstream.counters, rate, upstream.share));
                let none = BTreeMap::new();
                row.push(losses(&upstream.counters, &none, &upstream.losses, amounts).into());
                rows.push(row);
            }
        }
        for cell in rows.iter_mut().flatten().filter(|cell| cell.is_empty()) {
            *cell = filler.into();
        }
        rows
    }
}

impl UpstreamStatus {
    /// Returns the override or drained state with the flows that are left, else the health, else a silent next
    /// hop.
    fn condition(&self) -> Option<String> {
        let left = self.flows.map(|flows| flows.all()).filter(|_| self.state == State::Drained);
        let drained = self.drained.map(|word| match left {
            Some(flows) => format!("{word}, {} left", plural(flows as usize, "flow")),
            None => word.into(),
        });
        let other = || self.health.or(self.silence.map(|_| "silent")).map(String::from);
        drained.or_else(other)
    }

    fn style(&self) -> &'static str {
        match (self.silence, self.drained) {
            (Some(_), _) => RED,
            (_, Some(_)) => YELLOW,
            _ => "",
        }
    }
}

fn interface_text(interface: &InterfaceStatus, serving: Option<u32>) -> String {
    let name = match interface.xdp {
        Some(xdp) => &format!("{} (XDP, {})", interface.name, diff::word(&xdp)),
        None => &interface.name,
    };
    match interface.generation {
        Some(number) if Some(number) == serving => name.clone(),
        Some(number) => format!("{name} (generation {number})"),
        None => format!("{name} (not attached)"),
    }
}

fn problem_lines(problem: &Problem, terminal: TerminalStyle, with_fix: bool) -> String {
    let style = if problem.level == Level::Problem { RED } else { YELLOW };
    let width = terminal.width.unwrap_or(usize::MAX);
    let mut lines = table::wrapped(&format!("! {problem}"), width, "  ");
    if with_fix && !problem.fix.is_empty() {
        lines.extend(table::wrapped(&format!("  fix: {}", problem.fix), width, "    "));
    }
    lines.iter().map(|line| terminal.painted(style, line) + "\n").collect()
}

/// Describes the key and action of a rule.
fn treatment(rule: &RuleStatus) -> String {
    let action = match rule.tc_action {
        Action::Pass => "pass",
        Action::Block => "block",
    };
    let mode = if rule.mode == Mode::Replicate { " replicate" } else { "" };
    format!("{} {action}{mode}", rule.key)
}

/// Returns cells with forwarded packets and bytes, or their rate, and the share.
fn amount_cells(counts: &Counts, rate: Option<Rate>, share: Option<f64>) -> [Cow<'static, str>; 3] {
    const STALE: &str = "stale-neighbour";
    let forwarded = counts.forwarded();
    let stale = counts.by_verdict().find(|(name, count)| *name == STALE && count.packets > 0);
    let stale = stale.map(|(_, count)| format!(" ({} stale)", count.packets));
    let [packets, bytes] = match rate {
        Some(rate) => [
            format!("{:.0}", rate.packets_per_second).into(),
            format!("{:.2}", rate.bits_per_second / 1e6).into(),
        ],
        // most are
        None if forwarded == Count::default() => ["0".into(), "0".into()],
        None => [
            (forwarded.packets.to_string() + &stale.unwrap_or_default()).into(),
            forwarded.bytes.to_string().into(),
        ],
    };
    let share = share.map(|share| format!("{:.1}%", share * 100.0));
    [packets, bytes, share.unwrap_or_default().into()]
}

/// Describes packets that were not forwarded by reason, and notes; rates only for [`Amounts::Rates`].
fn losses(
    counts: &Counts,
    notes: &BTreeMap<&str, Count>,
    rates: &BTreeMap<&str, f64>,
    amounts: Amounts,
) -> String {
    if amounts == Amounts::Rates {
        let rates: Vec<String> =
            rates.iter().map(|(reason, rate)| format!("{reason} {rate:.0}")).collect();
        return rates.join(", ");
    }
    let drops = counts.drops().map(|(reason, count)| format!("{reason} {}", count.packets));
    // notes are of forwarded packets
    let notes = notes.iter().map(|(note, count)| format!("({note} {})", count.packets));
    drops.chain(notes).collect::<Vec<_>>().join(", ")
}

fn remark(
    counts: &Counts,
    notes: &BTreeMap<&str, Count>,
    rates: &BTreeMap<&str, f64>,
    amounts: Amounts,
    stem: &str,
) -> Option<Line> {
    let losses = losses(counts, notes, rates, amounts);
    let (what, style) = match amounts {
        Amounts::Rates => ("not forwarded/s", RED),
        _ if counts.drops().next().is_none() => ("noted", ""),
        _ => ("not forwarded", RED),
    };
    let text = || format!("{stem}{what}: {losses}");
    (!losses.is_empty()).then(|| Line::Remark { text: text(), style })
}

impl NextHopStatus {
    fn text(&self) -> String {
        let mut text = format!("{} dev {}", self.gateway, self.interface);
        for word in [&self.mac, &self.state].into_iter().flatten() {
            text += &format!(" {word}");
        }
        if self.unresolved {
            text += " unresolved";
        }
        if let (Some(age), Some(_)) = (self.age, &self.mac) {
            text += &format!(" {}", time::age(age));
        }
        text
    }
}
