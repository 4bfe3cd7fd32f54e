//! What happens to packets between two readings.

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

/// Verdicts of packets that were not sent meanwhile.
pub fn growth(before: &Status, after: &Status) -> Vec<Growth> {
    let mut all = drops("", after.unmatched, before.unmatched);
    let known: HashMap<&str, &RuleStatus> =
        before.rules.iter().map(|rule| (rule.name.as_str(), rule)).collect();
    for rule in &after.rules {
        let Some(earlier) = known.get(rule.name.as_str()) else { continue };
        let pairs = rule.destinations().zip(earlier.destinations());
        let same = pairs.filter(|((now, _), (then, _))| now.id == then.id);
        let mut found: Vec<Growth> = same
            .flat_map(|((now, _), (then, _))| {
                drops(&format!("{}/{}", rule.name, now.label), now.counters, then.counters)
            })
            .collect();
        // where none of several copies was sent, the rule's own counter says the same again
        let is_new = |own: &Growth| found.iter().all(|other| other.verdict != own.verdict);
        let own: Vec<Growth> =
            drops(&rule.name, rule.own, earlier.own).into_iter().filter(is_new).collect();
        found.extend(own);
        all.append(&mut found);
    }
    all
}

fn drops(place: &str, now: Counts, then: Counts) -> Vec<Growth> {
    let grown = now - then;
    let growth = |verdict, packets| Growth { place: place.into(), verdict, packets };
    grown.drops().map(|(verdict, count)| growth(verdict, count.packets)).collect()
}

/// The interfaces that packets came in by, with their number, while udplb's program never ran: something
/// before it took them all. `links` are of a time between the readings, so that what was received after
/// them has met the program by the second one. Empty where the kernel did not measure runs.
pub fn hidden(before: &Reading, links: &[Link], after: &Reading) -> BTreeMap<String, u64> {
    /// One may be under way.
    const SOME: u64 = 3;
    let (Some(earlier), Some(later)) = (before.runs, after.runs) else { return BTreeMap::new() };
    if later.count != earlier.count {
        return BTreeMap::new();
    }
    let interfaces = after.observed.attached().filter_map(|(name, _)| {
        let then = links.iter().find(|link| link.name == name)?.received;
        let packets = after.observed.interfaces.get(name)?.received.saturating_sub(then);
        (packets >= SOME).then(|| (name.to_string(), packets))
    });
    interfaces.collect()
}
