//! `status` for people: a tree where the width is known, else a table with everything for scripts.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::{InterfaceStatus, NextHopStatus, RuleStatus, Status, UpstreamStatus};
use crate::cli::table::{self, Column};
use crate::config::{Action, Mode};
use crate::datapath::counters::{Count, Counts};
use crate::telemetry::problem::{Level, Problem};
use crate::time;

/// Where text is written to.
#[derive(Clone, Copy)]
pub struct Paper {
    pub colour: bool,
    /// Of the terminal, in characters. Without one no cell is empty or cut, and every row of a table
    /// says its rule.
    pub width: Option<usize>,
}

/// Part of a status to show.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Rules with their upstreams below them: state, amounts and what was not forwarded.
    Tree,
    /// A row for each rule and upstream, with next hops.
    Wide,
    /// Problems and what to do about them.
    Problems,
}

/// Amounts that the columns show.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Amounts {
    /// Packets and bytes since the counters began.
    Totals,
    /// Rates, and of what was not forwarded the totals.
    Mixed,
    /// Amounts a second.
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

const BOLD: &str = "\x1b[1m";
const RED: &str = "\x1b[31m";
const GREEN: &str = "\x1b[32m";
const YELLOW: &str = "\x1b[33m";
const PLAIN: &str = "\x1b[0m";

impl Paper {
    fn painted(self, style: &str, text: &str) -> String {
        match self.colour && !style.is_empty() {
            true => format!("{style}{text}{PLAIN}"),
            false => text.into(),
        }
    }
}

/// A line of the tree: cells of the table, or text below one.
enum Line {
    Row { cells: Vec<String>, style: &'static str },
    Remark(String),
}

impl Status {
    /// Returns the status as text; `now` is in seconds since 1970.
    pub fn text(&self, now: u64, paper: Paper, layout: Layout, amounts: Amounts) -> String {
        let mut text = self.head(now, paper, layout, amounts);
        for problem in &self.problems {
            text += &problem_lines(problem, paper, layout == Layout::Problems);
        }
        if self.rules.is_empty() || layout == Layout::Problems {
            return text;
        }
        text.push('\n');
        match layout {
            Layout::Tree => self.tree(&mut text, paper, amounts),
            _ => self.table(&mut text, paper, amounts),
        }
        text
    }

    /// The problems alone, a line for each; notes are none.
    pub fn problems_text(&self) -> String {
        let problems = self.problems.iter().filter(|problem| problem.level == Level::Problem);
        problems.map(|problem| format!("! {problem}\n")).collect()
    }

    /// Says whether all is well, what serves, and where.
    fn head(&self, now: u64, paper: Paper, layout: Layout, amounts: Amounts) -> String {
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
        let verdict = paper.painted(style, &verdict);
        let _ = writeln!(text, "{verdict}: generation {number} of {file}, {applied}");
        if layout == Layout::Problems {
            return text;
        }
        let interfaces: Vec<String> =
            self.interfaces.iter().map(|it| interface_text(it, self.generation)).collect();
        let arpd = match self.arpd {
            Some(true) => "; arpd keeps the next hops",
            Some(false) => "; arpd has ended, and the kernel's own table is relied on",
            None => "",
        };
        let _ = writeln!(text, "on {}{arpd}", interfaces.join(", "));
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

    fn tree(&self, text: &mut String, paper: Paper, amounts: Amounts) {
        let mut lines = Vec::new();
        for rule in &self.rules {
            let cells = amount_cells(&rule.counters, rule.rate, None);
            let name = format!("{} {}", rule.name, treatment(rule));
            let cells = [name, String::new()].into_iter().chain(cells).collect();
            lines.push(Line::Row { cells, style: BOLD });
            lines.extend(remark(&rule.own, &rule.notes, &rule.own_losses, amounts, "  "));
            let last = rule.destinations().count() - 1;
            for (place, (upstream, is_mirror)) in rule.destinations().enumerate() {
                let (branch, stem) =
                    if place == last { ("└ ", "    ") } else { ("├ ", "│   ") };
                let mirror = if is_mirror { "mirror " } else { "" };
                let cells = amount_cells(&upstream.counters, upstream.rate, upstream.share);
                let name = format!("{branch}{mirror}{}", upstream.endpoint);
                let state = upstream.condition().unwrap_or_default().to_string();
                let cells = [name, state].into_iter().chain(cells).collect();
                lines.push(Line::Row { cells, style: upstream.style() });
                let none = BTreeMap::new();
                lines.extend(remark(&upstream.counters, &none, &upstream.losses, amounts, stem));
            }
        }
        let cells = |line: &Line| match line {
            Line::Row { cells, .. } => Some(cells.clone()),
            Line::Remark(_) => None,
        };
        let rows: Vec<Vec<String>> = lines.iter().filter_map(cells).collect();
        let mut titles = TREE;
        if amounts != Amounts::Totals {
            (titles[2].title, titles[3].title) = ("PPS", "MBIT/S");
        }
        let mut table = table::lines(&titles, &rows, paper.width).into_iter();
        let header = table.next().unwrap_or_default();
        let _ = writeln!(text, "{}", paper.painted(BOLD, &header));
        for line in &lines {
            let _ = match line {
                Line::Row { style, .. } => {
                    writeln!(text, "{}", paper.painted(style, &table.next().unwrap_or_default()))
                }
                Line::Remark(remark) => {
                    let remark = table::cut(remark, paper.width.unwrap_or(usize::MAX));
                    writeln!(text, "{}", paper.painted(RED, &remark))
                }
            };
        }
    }

    fn table(&self, text: &mut String, paper: Paper, amounts: Amounts) {
        let mut columns = WIDE;
        if amounts == Amounts::Rates {
            (columns[5].title, columns[6].title) = ("PPS", "MBIT/S");
            columns[8].title = "NOT FORWARDED/S";
        }
        let rows = self.rows(paper, amounts);
        let lines = table::lines(&columns, &rows, paper.width);
        for (nth, line) in lines.iter().enumerate() {
            let _ = writeln!(text, "{}", paper.painted(if nth == 0 { BOLD } else { "" }, line));
        }
    }

    fn rows(&self, paper: Paper, amounts: Amounts) -> Vec<Vec<String>> {
        let filler = if paper.width.is_some() { "" } else { "-" };
        let mut rows = Vec::new();
        for rule in &self.rules {
            let mut row = vec![rule.name.clone(), treatment(rule)];
            row.extend(vec![String::new(); 3]);
            let rate = rule.rate.filter(|_| amounts == Amounts::Rates);
            row.extend(amount_cells(&rule.counters, rate, None));
            row.push(losses(&rule.counters, &rule.notes, &rule.losses, amounts));
            rows.push(row);
            for (upstream, is_mirror) in rule.destinations() {
                let name = if paper.width.is_some() { "" } else { &rule.name };
                let mirror = if is_mirror { "mirror " } else { "" };
                let hop = upstream.next_hop.as_ref();
                let mut row = vec![
                    name.into(),
                    String::new(),
                    format!("{mirror}{}", upstream.endpoint),
                    hop.map_or("no route".into(), NextHopStatus::text),
                    upstream.condition().unwrap_or_default().into(),
                ];
                let rate = upstream.rate.filter(|_| amounts == Amounts::Rates);
                row.extend(amount_cells(&upstream.counters, rate, upstream.share));
                let none = BTreeMap::new();
                row.push(losses(&upstream.counters, &none, &upstream.losses, amounts));
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
    /// What the configuration or somebody by hand says, unless it is active by the configuration.
    pub fn drained(&self) -> Option<&'static str> {
        self.drained
    }

    /// Override or drained, or else health, or else that the next hop does not answer.
    fn condition(&self) -> Option<&str> {
        self.drained.or(self.health).or(self.silence.map(|_| "silent"))
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
    let name = &interface.name;
    match interface.generation {
        Some(number) if Some(number) == serving => name.clone(),
        Some(number) => format!("{name} (generation {number})"),
        None => format!("{name} (not attached)"),
    }
}

fn problem_lines(problem: &Problem, paper: Paper, with_fix: bool) -> String {
    let style = if problem.level == Level::Problem { RED } else { YELLOW };
    let width = paper.width.unwrap_or(usize::MAX);
    let mut lines = table::wrapped(&format!("! {problem}"), width, "  ");
    if with_fix && !problem.fix.is_empty() {
        lines.extend(table::wrapped(&format!("  fix: {}", problem.fix), width, "    "));
    }
    lines.iter().map(|line| paper.painted(style, line) + "\n").collect()
}

/// A rule's key and what happens to its packets.
fn treatment(rule: &RuleStatus) -> String {
    let action = match rule.tc_action {
        Action::Pass => "pass",
        Action::Block => "block",
    };
    let mode = if rule.mode == Mode::Replicate { " replicate" } else { "" };
    format!("{} {action}{mode}", rule.key)
}

/// Forwarded packets and bytes, or their rate; and the share.
fn amount_cells(
    counts: &Counts,
    rate: Option<crate::telemetry::traffic::Rate>,
    share: Option<f64>,
) -> [String; 3] {
    const STALE: &str = "stale-neighbour";
    let forwarded = counts.forwarded();
    let stale = counts.by_verdict().find(|(name, count)| *name == STALE && count.packets > 0);
    let stale = stale.map(|(_, count)| format!(" ({} stale)", count.packets));
    let [packets, bytes] = match rate {
        Some(rate) => [
            format!("{:.0}", rate.packets_per_second),
            format!("{:.2}", rate.bits_per_second / 1e6),
        ],
        None => [
            forwarded.packets.to_string() + &stale.unwrap_or_default(),
            forwarded.bytes.to_string(),
        ],
    };
    let share = share.map(|share| format!("{:.1}%", share * 100.0));
    [packets, bytes, share.unwrap_or_default()]
}

/// Packets that were not forwarded, by reason, and notes; a second where all is.
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
    // they were forwarded all the same
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
    let what = if amounts == Amounts::Rates { "not forwarded/s" } else { "not forwarded" };
    (!losses.is_empty()).then(|| Line::Remark(format!("{stem}{what}: {losses}")))
}
