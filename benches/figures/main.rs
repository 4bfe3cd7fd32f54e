//! Cost of udplb compared with the same work without udplb: `./dev bench`.
//!
//! The figures of a ratio are measured alternately, in one run, on one CPU. The minimum of all rounds
//! is used, since other load only adds time. A missed limit is reported and fails nothing: a noisy
//! machine is not a bug.

mod apply;
mod copies;
mod floors;
mod fragments;
mod healing;
mod load;
mod packets;
mod relay;
mod replicator;
mod tables;
mod trace;
mod veth;

#[path = "../../tests/common/mod.rs"]
mod common;

/// A group of figures: its name and the function that measures it.
type Part = (&'static str, fn(&mut Report));

const PARTS: [Part; 9] = [
    ("packets", packets::measure),
    ("fragments", fragments::measure),
    ("copies", copies::measure),
    ("veth", veth::measure),
    ("load", load::measure),
    ("apply", apply::measure),
    ("healing", healing::measure),
    ("tables", tables::measure),
    ("trace", trace::measure),
];

/// Measures the groups named on the command line, or all, and prints the report.
fn main() {
    // Cargo adds --bench.
    let named: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    if let Some(word) = named.iter().find(|word| !PARTS.iter().any(|(name, _)| name == word)) {
        let names = PARTS.map(|(name, _)| name).join(", ");
        eprintln!("there is no part {word}, but {names}");
        std::process::exit(64);
    }
    let mut report = Report::default();
    for (name, measure) in PARTS {
        if named.is_empty() || named.iter().any(|word| word == name) {
            measure(&mut report);
        }
    }
    match report.missed {
        0 => println!("\nall within their limits"),
        missed => println!("\n{missed} MISSED; measure again where nothing else runs"),
    }
}

/// Prints figures, and counts missed limits.
#[derive(Default)]
struct Report {
    missed: usize,
}

impl Report {
    fn title(&self, title: &str) {
        println!("\n{title}");
    }

    /// Reports a floor, the reference for other figures.
    fn floor(&self, what: &str, figure: f64) {
        println!("  {what:44}{:>9}", format!("{figure:.1} ns"));
    }

    /// Reports a figure without a limit.
    fn note(&self, what: &str, figure: &str) {
        println!("  {what:44}{figure:>20}");
    }

    /// Reports a figure with a limit for `value`, which is a multiple of the floor or the figure
    /// itself.
    fn at_most(&mut self, what: &str, figure: &str, value: f64, unit: &str, limit: f64) {
        self.line(what, figure, value, unit, &format!("at most {limit}{unit}"), value <= limit);
    }

    fn at_least(&mut self, what: &str, figure: &str, value: f64, unit: &str, limit: f64) {
        self.line(what, figure, value, unit, &format!("at least {limit}{unit}"), value >= limit);
    }

    fn line(&mut self, what: &str, figure: &str, value: f64, unit: &str, limit: &str, good: bool) {
        let verdict = if good { "ok" } else { "MISSED" };
        println!("  {what:44}{figure:>9}{:>11}   {limit:16}{verdict}", format!("{value:.2}{unit}"));
        self.missed += usize::from(!good);
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
