//! `udplb top`: live rates of rules and upstreams.

use std::cmp::Ordering;
use std::collections::{HashMap, VecDeque};
use std::fmt::Write;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};
use schemars::JsonSchema;
use serde::Serialize;

use super::netlink;
use crate::bpf;
use crate::cli::output::{Document, TerminalStyle, print, terminal_style};
use crate::cli::table::{self, Column};
use crate::cli::terminal::{self, Key, Live, Scroll, Woken};
use crate::cli::{Global, Output, some_seconds};
use crate::config::State;
use crate::error::{Failure, Result};
use crate::net::Netlink;
use crate::telemetry::status::{self, Reading, Status};
use crate::telemetry::traffic::Rate;

/// Number of rates in a sparkline.
const HISTORY: usize = 20;

const COLUMNS: [Column; 8] = [
    Column::text("RULE", 8),
    Column::text("UPSTREAM", 12),
    Column::text("STATE", 5),
    Column::number("PPS"),
    Column::number("MBIT/S"),
    Column::number("SHARE"),
    Column::number("DROPS/S"),
    Column::text("PPS BEFORE", 10),
];

/// Order and interval of `top`.
#[derive(Args)]
pub struct Options {
    /// Print once after an interval and exit.
    #[arg(long)]
    once: bool,
    /// Measure rates over this many seconds.
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = some_seconds)]
    interval: Duration,
    /// Sort by this column.
    #[arg(short, long, value_enum, default_value = "pps")]
    sort: Order,
    /// Measure the time that the program takes for each packet. Meanwhile the kernel measures every BPF
    /// program of this machine, which costs each of them about 70 ns a run.
    #[arg(long)]
    cost: bool,
}

/// Order of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Order {
    Pps,
    Mbit,
    Drops,
    Name,
}

/// An upstream in the last interval.
#[derive(Clone, Debug, Serialize, JsonSchema)]
struct Row {
    rule: String,
    upstream: String,
    /// True for a receiver of additional copies.
    mirror: bool,
    health: Option<&'static str>,
    /// Override, or else the state in the file.
    state: State,
    #[serde(rename = "override")]
    override_state: Option<State>,
    /// State in words if drained or overridden.
    #[serde(skip)]
    drained: Option<&'static str>,
    #[serde(flatten)]
    rate: Rate,
    #[serde(rename = "not_forwarded_per_second")]
    drops_per_second: f64,
    /// Share of the forwarded packets of the rule, 0 to 1.
    share: Option<f64>,
    /// Packets a second, the latest last.
    history: Vec<f64>,
}

/// Rates of all rules and upstreams in one interval.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct View {
    generation: Option<u32>,
    /// Packets that matched any rule.
    packets_per_second: f64,
    bits_per_second: f64,
    /// Includes packets without an upstream.
    #[serde(rename = "not_forwarded_per_second")]
    drops_per_second: f64,
    /// Run time of the program per received packet, matched or not. `None`: there were none, or the kernel
    /// does not measure run times, as without `--cost`.
    nanoseconds_per_packet: Option<f64>,
    upstreams: Vec<Row>,
}

pub async fn run(global: &Global, options: &Options) -> Result<u8> {
    show(global, options, &netlink()?, terminal_style(global)).await
}

/// Shows the view until it is ended, or once.
async fn show(
    global: &Global,
    options: &Options,
    netlink: &Netlink,
    terminal: TerminalStyle,
) -> Result<u8> {
    // the kernel measures while this is open
    let _measured = options.cost.then(bpf::measure_runs).transpose().context("--cost")?;
    let mut screen = Screen::new(options.sort, options.cost);
    let store = global.store();
    let mut last = status::read(&store, netlink, None, None).await?;
    let mut history = History::default();
    if options.once && last.status.generation.is_none() {
        return Err(Failure::NothingApplied);
    }
    if options.once {
        tokio::time::sleep(options.interval).await;
        let reading = status::read(&store, netlink, None, last.status.traffic.as_ref()).await?;
        let view = history.view(&reading, &last, screen.order);
        let text = shown(global, &screen, &view, terminal, usize::MAX)?;
        return print(&text);
    }
    let mut live = Live::open(options.interval, true).context("the terminal")?;
    let mut view = history.view(&last, &last, screen.order);
    loop {
        let size = terminal::size();
        let terminal = TerminalStyle { width: size.map(|(width, _)| width), ..terminal };
        let lines = size.map_or(usize::MAX, |(_, lines)| lines);
        if live.show(&shown(global, &screen, &view, terminal, lines)?).is_err() {
            return Ok(0);
        }
        match live.woken().await {
            Woken::End => return Ok(0),
            Woken::Key(Key::Char('q')) if !screen.typing => return Ok(0),
            Woken::Key(key) => {
                screen.press(key, &view, lines);
                sort(&mut view.upstreams, screen.order);
            }
            Woken::Tick => {
                // try again at the next tick
                let earlier = last.status.traffic.as_ref();
                let Ok(reading) = status::read(&store, netlink, None, earlier).await else {
                    continue;
                };
                view = history.view(&reading, &last, screen.order);
                last = reading;
            }
        }
    }
}

/// Previous rates by rule and upstream.
#[derive(Default)]
struct History(HashMap<(String, String), VecDeque<f64>>);

impl History {
    fn view(&mut self, now: &Reading, before: &Reading, order: Order) -> View {
        let Status { generation, rules, .. } = &now.status;
        let mut view = View {
            generation: *generation,
            packets_per_second: 0.0,
            bits_per_second: 0.0,
            drops_per_second: 0.0,
            nanoseconds_per_packet: now.runs.zip(before.runs).and_then(|(now, before)| {
                let runs = now.count.checked_sub(before.count).filter(|runs| *runs > 0)?;
                Some(now.nanoseconds.saturating_sub(before.nanoseconds) as f64 / runs as f64)
            }),
            upstreams: Vec::new(),
        };
        let mut histories = HashMap::new();
        for rule in rules {
            if let Some(rate) = rule.rate {
                view.packets_per_second += rate.packets_per_second;
                view.bits_per_second += rate.bits_per_second;
                view.drops_per_second += rule.losses.values().sum::<f64>();
            }
            for (upstream, is_mirror) in rule.destinations() {
                let key = (rule.name.clone(), upstream.label.clone());
                let mut history = self.0.remove(&key).unwrap_or_default();
                let none = Rate { packets_per_second: 0.0, bits_per_second: 0.0 };
                let rate = upstream.rate.unwrap_or(none);
                if upstream.rate.is_some() {
                    history.push_back(rate.packets_per_second);
                }
                if history.len() > HISTORY {
                    history.pop_front();
                }
                view.upstreams.push(Row {
                    rule: key.0.clone(),
                    upstream: key.1.clone(),
                    mirror: is_mirror,
                    health: upstream.health,
                    state: upstream.state,
                    override_state: upstream.override_state,
                    drained: upstream.drained,
                    rate,
                    // sum() of nothing is -0.0
                    drops_per_second: upstream.losses.values().fold(0.0, |sum, rate| sum + rate),
                    share: upstream.rate.and(upstream.share),
                    history: history.iter().copied().collect(),
                });
                histories.insert(key, history);
            }
        }
        self.0 = histories;
        sort(&mut view.upstreams, order);
        view
    }
}

fn sort(rows: &mut [Row], order: Order) {
    let descending = |one: f64, other: f64| other.total_cmp(&one);
    rows.sort_by(|one, other| {
        let names = || (&one.rule, &one.upstream).cmp(&(&other.rule, &other.upstream));
        let first = match order {
            Order::Pps => descending(one.rate.packets_per_second, other.rate.packets_per_second),
            Order::Mbit => descending(one.rate.bits_per_second, other.rate.bits_per_second),
            Order::Drops => descending(one.drops_per_second, other.drops_per_second),
            Order::Name => Ordering::Equal,
        };
        first.then_with(names)
    });
}

/// Order, position and filter set by keys.
struct Screen {
    order: Order,
    reversed: bool,
    scroll: Scroll,
    /// Part of the name of a rule or upstream to show; empty: all.
    filter: String,
    /// True while keys edit the filter.
    typing: bool,
    /// True while the kernel measures all BPF programs for this view.
    measures: bool,
}

/// Number of lines above the rows.
const HEAD: usize = 3;

impl Screen {
    fn new(order: Order, measures: bool) -> Screen {
        let (scroll, filter) = (Scroll::default(), String::new());
        Screen { order, reversed: false, scroll, filter, typing: false, measures }
    }

    fn press(&mut self, key: Key, view: &View, lines: usize) {
        match (self.typing, key) {
            (_, Key::Escape) => (self.typing, self.filter) = (false, String::new()),
            (true, Key::Enter) => self.typing = false,
            (true, Key::Char(c)) if !c.is_control() => self.filter.push(c),
            (true, Key::Backspace) => drop(self.filter.pop()),
            (false, Key::Char('/')) => self.typing = true,
            (false, Key::Char('p')) => self.order = Order::Pps,
            (false, Key::Char('m')) => self.order = Order::Mbit,
            (false, Key::Char('d')) => self.order = Order::Drops,
            (false, Key::Char('n')) => self.order = Order::Name,
            (false, Key::Char('r')) => self.reversed = !self.reversed,
            _ => {}
        }
        let key = if self.typing && matches!(key, Key::Char(_)) { Key::Enter } else { key };
        let rows = view.upstreams.iter().filter(|row| self.shows(row)).count();
        self.scroll.press(key, rows, lines.saturating_sub(HEAD));
    }

    fn shows(&self, row: &Row) -> bool {
        let filter = self.filter.to_lowercase();
        [&row.rule, &row.upstream].iter().any(|name| name.to_lowercase().contains(&filter))
    }

    /// Returns the columns with the sort order marked.
    fn columns(&self) -> [Column; 8] {
        let (place, titles) = match self.order {
            Order::Name => (0, ["RULE▼", "RULE▲"]),
            Order::Pps => (3, ["PPS▼", "PPS▲"]),
            Order::Mbit => (4, ["MBIT/S▼", "MBIT/S▲"]),
            Order::Drops => (6, ["DROPS/S▼", "DROPS/S▲"]),
        };
        let mut columns = COLUMNS;
        // names go up where numbers go down
        columns[place].title = titles[usize::from(self.reversed != (place == 0))];
        columns
    }

    fn keys(&self) -> String {
        match (self.typing, self.filter.is_empty()) {
            (true, _) => format!("/{}_  Enter: keep  Esc: all", self.filter),
            (false, true) => "p m d n: sort  r: reverse  /: filter  q: quit".into(),
            (false, false) => {
                format!("/{}  Esc: all  p m d n: sort  r: reverse  q: quit", self.filter)
            }
        }
    }
}

fn shown(
    global: &Global,
    screen: &Screen,
    view: &View,
    terminal: TerminalStyle,
    lines: usize,
) -> Result<String> {
    match global.output {
        Output::Json => Ok(serde_json::to_string(&Document::new(view)).context("JSON")? + "\n"),
        _ => Ok(text(screen, view, terminal, lines)),
    }
}

fn text(screen: &Screen, view: &View, terminal: TerminalStyle, lines: usize) -> String {
    let generation = view
        .generation
        .map_or("nothing is applied".into(), |number| format!("generation {number}"));
    let cost = view.nanoseconds_per_packet.map(|cost| format!(", {cost:.0} ns/packet"));
    let mut head = format!(
        "{generation}: {:.0} packets/s, {:.2} Mbit/s, {:.0} drops/s{}",
        view.packets_per_second,
        view.bits_per_second / 1e6,
        view.drops_per_second,
        cost.unwrap_or_default()
    );
    if screen.measures {
        head += "; every BPF program of this machine is measured, about 70 ns a run";
    }
    let mut keys = screen.keys();
    if let Some(width) = terminal.width {
        (head, keys) = (table::cut(&head, width).into(), table::cut(&keys, width).into());
    }
    let filler = if terminal.width.is_some() { "" } else { "-" };
    let shown = view.upstreams.iter().filter(|row| screen.shows(row));
    let mut rows: Vec<Vec<String>> = shown.map(|row| cells(row, filler)).collect();
    if screen.reversed {
        rows.reverse();
    }
    let rows: Vec<Vec<String>> =
        rows.into_iter().skip(screen.scroll.first).take(lines.saturating_sub(HEAD)).collect();
    // nobody presses keys where there is no terminal
    let is_live = lines != usize::MAX;
    let columns = if is_live { screen.columns() } else { COLUMNS };
    let mut table = table::lines(&columns, &rows, terminal.width).into_iter();
    let titles = table.next().unwrap_or_default();
    let mut text = head + "\n";
    if is_live {
        text += &(keys + "\n");
    }
    let _ = match terminal.colour {
        true => writeln!(text, "\x1b[1m{titles}\x1b[0m"),
        false => writeln!(text, "{titles}"),
    };
    table.for_each(|line| text += &(line + "\n"));
    text
}

fn cells(row: &Row, filler: &str) -> Vec<String> {
    let or = |text: Option<String>| text.unwrap_or_else(|| filler.into());
    vec![
        row.rule.clone(),
        if row.mirror { format!("mirror {}", row.upstream) } else { row.upstream.clone() },
        or(row.drained.or(row.health).map(String::from)),
        format!("{:.0}", row.rate.packets_per_second),
        format!("{:.2}", row.rate.bits_per_second / 1e6),
        or(row.share.map(|share| format!("{:.1}%", share * 100.0))),
        format!("{:.0}", row.drops_per_second),
        or(Some(sparkline(&row.history)).filter(|line| !line.is_empty())),
    ]
}

/// Draws a bar for each number, relative to the largest.
fn sparkline(numbers: &[f64]) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let max = numbers.iter().copied().fold(0.0, f64::max);
    let height = |number: f64| match max > 0.0 {
        true => (number / max * 7.0).round() as usize,
        false => 0,
    };
    numbers.iter().map(|number| BARS[height(*number).min(7)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(rule: &str, upstream: &str, pps: f64, bits: f64, drops: f64) -> Row {
        Row {
            rule: rule.into(),
            upstream: upstream.into(),
            mirror: false,
            health: Some("up"),
            state: State::Active,
            override_state: None,
            drained: None,
            rate: Rate { packets_per_second: pps, bits_per_second: bits },
            drops_per_second: drops,
            share: Some(0.5),
            history: vec![0.0, pps / 2.0, pps],
        }
    }

    fn view(order: Order) -> View {
        let mut upstreams = vec![
            row("flows", "one", 10.0, 9e6, 0.0),
            row("flows", "two", 30.0, 1e6, 0.0),
            row("a", "one", 20.0, 2e6, 5.0),
        ];
        sort(&mut upstreams, order);
        View {
            generation: Some(4),
            packets_per_second: 65.0,
            bits_per_second: 12e6,
            drops_per_second: 5.0,
            nanoseconds_per_packet: Some(87.4),
            upstreams,
        }
    }

    const SCRIPT: TerminalStyle = TerminalStyle { colour: false, width: None };

    #[test]
    fn a_screen_of_it() {
        let screen = Screen::new(Order::Pps, false);
        let wanted = "\
generation 4: 65 packets/s, 12.00 Mbit/s, 5 drops/s, 87 ns/packet
RULE   UPSTREAM  STATE  PPS  MBIT/S  SHARE  DROPS/S  PPS BEFORE
flows  two       up      30    1.00  50.0%        0  ▁▅█
a      one       up      20    2.00  50.0%        5  ▁▅█
flows  one       up      10    9.00  50.0%        0  ▁▅█
";
        assert_eq!(text(&screen, &view(Order::Pps), SCRIPT, usize::MAX), wanted);
        let measuring = Screen::new(Order::Pps, true);
        let measured = text(&measuring, &view(Order::Pps), SCRIPT, usize::MAX);
        assert!(measured.contains("87 ns/packet; every BPF program"), "{measured}");
        let terminal = TerminalStyle { colour: false, width: Some(40) };
        let wanted = "\
generation 4: 65 packets/s, 12.00 Mbit/…
p m d n: sort  r: reverse  /: filter  q…
RULE   UPSTREAM  STATE  PPS▼  MBIT/S  S…
flows  two       up       30    1.00  5…
";
        assert_eq!(text(&screen, &view(Order::Pps), terminal, 4), wanted);
    }

    #[test]
    fn it_is_sorted() {
        let order = |order| {
            let view = view(order);
            view.upstreams.iter().map(|row| row.rate.packets_per_second as u32).collect::<Vec<_>>()
        };
        assert_eq!(order(Order::Pps), [30, 20, 10]);
        assert_eq!(order(Order::Mbit), [10, 20, 30]);
        assert_eq!(order(Order::Drops), [20, 10, 30]);
        assert_eq!(order(Order::Name), [20, 10, 30]);
    }

    #[test]
    fn keys_choose() {
        let mut screen = Screen::new(Order::Pps, false);
        let view = view(Order::Pps);
        let mut press = |keys: &[Key]| {
            for key in keys {
                screen.press(*key, &view, 5);
            }
            let text = text(&screen, &view, SCRIPT, 5);
            let rows = text.lines().skip(3);
            let names: Vec<String> =
                rows.map(|row| row.split_whitespace().take(2).collect()).collect();
            (text.lines().nth(2).unwrap_or_default().to_string(), names.join(" "))
        };
        let (titles, _) = press(&[Key::Char('m'), Key::Char('r')]);
        assert!(titles.contains("MBIT/S▲"), "{titles}");
        let (titles, rows) = press(&[Key::Char('n'), Key::Char('r')]);
        assert!(titles.starts_with("RULE▲"), "{titles}");
        // two of the three rows have room
        assert_eq!(rows, "flowstwo aone");
        assert_eq!(press(&[Key::End]).1, "aone flowsone");
        assert_eq!(press(&[Key::Home]).1, "flowstwo aone");
        // keys that would sort are letters of the filter
        assert_eq!(press(&[Key::Char('/'), Key::Char('O'), Key::Char('n')]).1, "aone flowsone");
        assert_eq!(press(&[Key::Backspace, Key::Backspace, Key::Char('t')]).1, "flowstwo");
        assert_eq!(press(&[Key::Enter, Key::Char('d')]).1, "flowstwo");
        assert_eq!(press(&[Key::Escape]).1, "flowstwo aone");
    }

    #[test]
    fn drained_upstreams_are_shown_as_such() {
        let mut view = view(Order::Name);
        view.upstreams[0].drained = Some("drained (override)");
        let text = text(&Screen::new(Order::Name, false), &view, SCRIPT, usize::MAX);
        assert!(text.contains("a      one       drained (override)"), "{text}");
    }

    #[test]
    fn sparklines() {
        assert_eq!(sparkline(&[]), "");
        assert_eq!(sparkline(&[0.0, 0.0]), "▁▁");
        assert_eq!(sparkline(&[0.0, 1.0, 2.0, 4.0, 8.0, 7.0]), "▁▂▃▅█▇");
    }
}
