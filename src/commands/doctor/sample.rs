//! Comparison of two readings.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use crate::datapath::counters::Counts;
use crate::net::link::Link;
use crate::telemetry::status::{Reading, RuleStatus, Status};

/// Time between the readings.
pub const LENGTH: Duration = Duration::from_secs(1);

/// A verdict of packets that were not sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Growth {
    /// A rule, `RULE/UPSTREAM`, or empty for packets of no rule.
    pub place: String,
    pub verdict: &'static str,
    pub packets: u64,
}

/// Returns the verdicts of packets that were not sent between two readings.
pub fn growth(before: &Status, after: &Status) -> Vec<Growth> {
    let mut all = drops("", &after.unmatched, &before.unmatched);
    let known: HashMap<&str, &RuleStatus> =
        before.rules.iter().map(|rule| (rule.name.as_str(), rule)).collect();
    for rule in &after.rules {
        let Some(earlier) = known.get(rule.name.as_str()) else { continue };
        let pairs = rule.destinations().zip(earlier.destinations());
        let same = pairs.filter(|((now, _), (then, _))| now.id == then.id);
        let mut found: Vec<Growth> = same
            .flat_map(|((now, _), (then, _))| {
                drops(&format!("{}/{}", rule.name, now.label), &now.counters, &then.counters)
            })
            .collect();
        // if no copy was sent, the rule's own counter repeats the verdict
        let is_new = |own: &Growth| found.iter().all(|other| other.verdict != own.verdict);
        let own: Vec<Growth> =
            drops(&rule.name, &rule.own, &earlier.own).into_iter().filter(is_new).collect();
        found.extend(own);
        all.append(&mut found);
    }
    all
}

fn drops(place: &str, now: &Counts, then: &Counts) -> Vec<Growth> {
    let grown = now - then;
    let growth = |verdict, packets| Growth { place: place.into(), verdict, packets };
    grown.drops().map(|(verdict, count)| growth(verdict, count.packets)).collect()
}

/// Returns the interfaces that received packets, with their number, while the program never ran: something
/// before it took them all. `links` are read between the readings, so that the program has processed later
/// packets by the second one. Empty if the kernel did not measure runs.
pub fn hidden(before: &Reading, links: &[Link], after: &Reading) -> BTreeMap<String, u64> {
    /// Fewer may still be in flight.
    const MIN_PACKETS: u64 = 3;
    let (Some(earlier), Some(later)) = (before.runs, after.runs) else { return BTreeMap::new() };
    if later.count != earlier.count {
        return BTreeMap::new();
    }
    let interfaces = after.observed.attached().filter_map(|(name, _)| {
        let then = links.iter().find(|link| link.name == name)?.received;
        let packets = after.observed.interfaces.get(name)?.received.saturating_sub(then);
        (packets >= MIN_PACKETS).then(|| (name.to_string(), packets))
    });
    interfaces.collect()
}
