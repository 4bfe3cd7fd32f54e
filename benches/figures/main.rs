//! Cost of udplb compared with the same work without udplb: `./dev bench`.
//!
//! The figures of a ratio are measured alternately, in one run, on one CPU. The minimum of all rounds
//! counts, since other load only adds time; the median is in brackets. A missed limit is reported and
//! fails nothing: a noisy machine is not a bug.

mod apply;
mod copies;
mod e2e;
mod floors;
mod flows;
mod fragments;
mod from;
mod healing;
mod host;
mod load;
mod many;
mod packets;
mod probing;
mod relay;
mod replicator;
mod scale;
mod senders;
mod tables;
mod trace;
mod trip;
mod turns;
mod xdp;

#[path = "../../tests/common/mod.rs"]
mod common;

use crate::turns::Cost;

/// A group of figures: its name and the function that measures it.
type Part = (&'static str, fn(&mut Report));

const PARTS: [Part; 14] = [
    ("packets", packets::measure),
    ("senders", senders::measure),
    ("from", from::measure),
    ("e2e", e2e::measure),
    ("xdp", xdp::measure),
    ("flows", flows::measure),
    ("fragments", fragments::measure),
    ("copies", copies::measure),
    ("load", load::measure),
    ("apply", apply::measure),
    ("healing", healing::measure),
    ("tables", tables::measure),
    ("scale", scale::measure),
    ("trace", trace::measure),
];

/// Measures the groups named on the command line, or all, and prints the report.
fn main() {
    // Cargo adds --bench.
    let mut named: Vec<String> =
        std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let words = named.len();
    named.retain(|word| word != "--json");
    let mut report = Report { json: named.len() < words, ..Report::default() };
    if let Some(word) = named.iter().find(|word| !PARTS.iter().any(|(name, _)| name == word)) {
        let names = PARTS.map(|(name, _)| name).join(", ");
        eprintln!("there is no part {word}, but {names}");
        std::process::exit(64);
    }
    report.print(&machine());
    for (name, measure) in PARTS {
        if named.is_empty() || named.iter().any(|word| word == name) {
            measure(&mut report);
        }
    }
    report.end();
}

/// Returns the date and the machine of the figures.
fn machine() -> String {
    let date = common::run("date", ["+%F"]);
    let kernel = common::run("uname", ["-srm"]);
    let cpus = std::thread::available_parallelism().expect("CPUs");
    format!("{}, {}, {cpus} CPUs", date.trim(), kernel.trim())
}

/// Prints figures, and counts missed limits.
#[derive(Default)]
struct Report {
    /// Print an object of the recorded figures, and nothing else.
    json: bool,
    recorded: serde_json::Map<String, serde_json::Value>,
    missed: usize,
}

impl Report {
    fn title(&self, title: &str) {
        self.print(&format!("\n{title}"));
    }

    /// Reports a cost that other figures are compared with.
    fn floor(&self, what: &str, cost: Cost) {
        let [least, median] = [cost.least, cost.median].map(|figure| format!("{figure:.1} ns"));
        self.print(&format!("  {what:44}{least:>9}  (median {median})"));
    }

    /// Reports a figure without a limit.
    fn note(&self, what: &str, figure: &str) {
        self.print(&format!("  {what:44}{figure:>20}"));
    }

    /// Reports a figure with a limit for `value`, which is a multiple of the floor or the figure
    /// itself.
    fn at_most(&mut self, what: &str, figure: &str, value: f64, unit: &str, limit: f64) {
        let limits = format!("at most {limit}{unit}");
        self.line(what, figure, &format!("{value:.2}{unit}"), &limits, value <= limit);
    }

    /// Reports a cost as a multiple of `floor`: by the minima, and by the medians.
    fn times(&mut self, what: &str, cost: Cost, floor: Cost, limit: f64) {
        let ratio = cost / floor;
        self.ratio(what, cost, ratio, &format!("at most {limit} x"), ratio.least <= limit);
    }

    /// Reports by which factor a cost is less than `other`.
    fn cheaper(&mut self, what: &str, cost: Cost, other: Cost, limit: f64) {
        let ratio = other / cost;
        self.ratio(what, cost, ratio, &format!("at least {limit} x"), ratio.least >= limit);
    }

    /// Reports a cost by itself.
    fn nanoseconds(&mut self, what: &str, cost: Cost, limit: f64) {
        let value = format!("{:.2} ns ({:.2})", cost.least, cost.median);
        self.line(what, "", &value, &format!("at most {limit} ns"), cost.least <= limit);
    }

    fn ratio(&mut self, what: &str, cost: Cost, ratio: Cost, limit: &str, good: bool) {
        let figure = format!("{:.1} ns", cost.least);
        let value = format!("{:.2} x ({:.2})", ratio.least, ratio.median);
        self.line(what, &figure, &value, limit, good);
    }

    fn line(&mut self, what: &str, figure: &str, value: &str, limit: &str, good: bool) {
        let verdict = if good { "ok" } else { "MISSED" };
        self.print(&format!("  {what:44}{figure:>9}{value:>18}   {limit:16}{verdict}"));
        self.missed += usize::from(!good);
    }

    /// Records a figure for the object.
    fn record(&mut self, key: &str, value: f64) {
        let rounded = (value * 1000.0).round() / 1000.0;
        self.recorded.insert(key.to_owned(), rounded.into());
    }

    fn end(self) {
        if self.json {
            println!("{}", serde_json::Value::Object(self.recorded));
            return;
        }
        match self.missed {
            0 => println!("\nall within their limits"),
            missed => println!("\n{missed} MISSED; measure again where nothing else runs"),
        }
    }

    fn print(&self, line: &str) {
        if !self.json {
            println!("{line}");
        }
    }
}

/// Measures all cases alternately; returns the minimum of each.
fn least<const N: usize>(rounds: usize, mut measure: impl FnMut(usize) -> f64) -> [f64; N] {
    let mut least = [f64::INFINITY; N];
    for _ in 0..rounds {
        for (index, least) in least.iter_mut().enumerate() {
            *least = least.min(measure(index));
        }
    }
    assert!(least.iter().all(|figure| figure.is_finite()), "no round succeeded: {least:?}");
    least
}
