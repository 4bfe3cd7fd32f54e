//! Problems of the active configuration and their causes. Pure.

mod interfaces;
mod source;
mod upstreams;
mod verdicts;

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

pub use source::Source;
pub use upstreams::{Answer, Silence};
use upstreams::{Unreached, all_drained, losses, silent, unreachable, unreached};
pub use verdicts::{Explanation, explain, is_loss};

use crate::config::{Address, Network, State};
use crate::datapath::description::Generation;
use crate::desired::partial::Unresolved;
use crate::reconcile::observe::{Interface, Observed};
use crate::telemetry::problem::{Problem, problem};
use crate::telemetry::status::{RuleStatus, UpstreamStatus};

/// Maximum of names in one message.
const NAMES: usize = 3;

/// The current time by two clocks.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// Seconds since 1970.
    pub utc: u64,
    /// CLOCK_MONOTONIC.
    pub monotonic: Duration,
}

impl Now {
    /// Converts a time of CLOCK_MONOTONIC to seconds since 1970.
    fn at(self, monotonic: Duration) -> u64 {
        self.utc.saturating_sub(self.monotonic.saturating_sub(monotonic).as_secs())
    }
}

/// Current routes to upstreams whose recorded next hop is missing or unusable.
#[derive(Clone, Debug, Default)]
pub struct Routes {
    /// Interface, or the kernel's reason why there is no route.
    pub to: BTreeMap<Address, Result<String, String>>,
    /// Networks of interfaces that are down.
    pub down: Vec<(String, Network)>,
}

/// Input of the diagnosis.
pub struct Facts<'a> {
    pub observed: &'a Observed,
    /// `None` if nothing is applied, or the description is missing.
    pub serving: Option<&'a Generation>,
    pub rules: &'a [RuleStatus],
    pub routes: &'a Routes,
    pub source: Source<'a>,
    pub now: Now,
}

/// Returns all problems, causes before their effects.
pub fn problems(facts: &Facts<'_>) -> Vec<Problem> {
    let mut problems = Vec::from_iter(overdue(facts.observed));
    let Some(serving) = facts.serving else {
        problems.extend(nothing(facts));
        return problems;
    };
    let unreached: Vec<(&RuleStatus, &UpstreamStatus, Unreached<'_>)> = active(facts.rules)
        .filter_map(|(rule, upstream)| Some((rule, upstream, unreached(facts, upstream)?)))
        .collect();
    problems.extend(generation(facts, serving));
    problems.extend(interfaces::problems(facts, serving, &unreached));
    problems.extend(serving.description.desired.incomplete.hosts.iter().map(unresolved));
    problems.extend(facts.rules.iter().filter_map(|rule| all_drained(facts, rule)));
    problems.extend(
        unreached
            .iter()
            .filter_map(|(rule, upstream, why)| unreachable(facts, rule, upstream, why)),
    );
    // losses with a known cause are not repeated
    let explained: HashSet<u32> = unreached.iter().map(|(_, upstream, _)| upstream.id).collect();
    problems.extend(facts.rules.iter().flat_map(|rule| losses(facts, rule, &explained)));
    problems.extend(silent(facts, serving));
    problems
}

/// Returns the active upstreams and mirrors, each with its rule.
fn active(rules: &[RuleStatus]) -> impl Iterator<Item = (&RuleStatus, &UpstreamStatus)> {
    let all = rules.iter().flat_map(|rule| rule.destinations().map(move |(it, _)| (rule, it)));
    all.filter(|(_, upstream)| upstream.state == State::Active)
}

/// Returns the addresses of upstreams whose recorded next hop is missing or unusable, for [`Routes`].
pub fn suspects(rules: &[RuleStatus], observed: &Observed) -> Vec<Address> {
    let usable = |interface: &str| observed.interfaces.get(interface).is_some_and(is_usable);
    let suspect = active(rules)
        .map(|(_, upstream)| upstream)
        .filter(|upstream| upstream.next_hop.as_ref().is_none_or(|hop| !usable(&hop.interface)));
    let mut addresses: Vec<Address> = suspect.map(|upstream| upstream.address.clone()).collect();
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

fn is_usable(interface: &Interface) -> bool {
    interface.up && interface.carrier
}

/// Reports a change that was neither confirmed in time nor rolled back.
fn overdue(observed: &Observed) -> Option<Problem> {
    let pending = observed.pending.filter(|pending| pending.remaining().is_zero())?;
    let what = format!(
        "generation {} was not confirmed in time, and its rollback is overdue",
        pending.generation
    );
    let why = "the process that was to roll it back is gone, and no arpd runs";
    Some(problem("rollback-overdue", "", what).why(why).fix("udplb rollback"))
}

/// Reports the problems without a described active generation.
fn nothing(facts: &Facts<'_>) -> Vec<Problem> {
    let orphans = facts.observed.orphans();
    let orphans: Vec<Problem> = orphans.map(|orphan| interfaces::orphan(facts, &orphan)).collect();
    if let Some(number) = facts.observed.serving() {
        let what = format!("the description of generation {number} is gone");
        let why = "its program still runs, and nobody can tell what it does";
        return vec![problem("damage", "", what).why(why).fix(facts.source.apply())];
    }
    if !orphans.is_empty() {
        return orphans;
    }
    let nothing = problem("nothing-applied", "", "nothing is applied");
    vec![nothing.why("no packet is forwarded").fix(facts.source.apply())]
}

/// Reports problems of the generation as a whole.
fn generation(facts: &Facts<'_>, serving: &Generation) -> Vec<Problem> {
    let mut problems = Vec::new();
    if !serving.intact {
        let what = format!("pins of generation {} are missing", serving.number);
        let why = "rollback, arpd or the next apply may miss them";
        problems.push(problem("damage", "", what).why(why).fix(facts.source.apply()));
    }
    let namespace = serving.description.namespace;
    if namespace != facts.observed.namespace {
        let what = "the pins belong to another network namespace";
        let why = format!("they are of net:[{namespace}]");
        let fix = "run udplb in that namespace, or with another --pin-dir";
        problems.push(problem("other-namespace", "", what).why(why).fix(fix));
    }
    problems
}

/// Reports a host without an address.
fn unresolved(host: &Unresolved) -> Problem {
    let place = format!("{}/{}", host.rule, host.upstream);
    problem("name-unresolved", &place, host.effect.to_string())
        .why(format!("`{}` {}", host.host, host.cause))
        .fix(format!("getent ahosts {}", host.host))
}

/// Lists the first names and the number of the others.
fn few(names: &[String]) -> String {
    match names.len().saturating_sub(NAMES) {
        0 => names.join(", "),
        more => format!("{} and {more} more", names[..NAMES].join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::upstreams::GRACE;
    use super::*;
    use crate::config::{Action, Key, Mode, Ports};
    use crate::datapath::counters::Counts;
    use crate::datapath::description::{Description, Origin, ProgramName};
    use crate::datapath::hook::{Attachment, Hook, Slot};
    use crate::desired::{Desired, Rule, Upstream};
    use crate::telemetry::problem::Level;

    const BUILT: u64 = 1_000_000;

    fn serving(rules: usize) -> Generation {
        let key = || Key::new([10, 0, 0, 5], vec![Ports { first: 1, last: 1 }]);
        let upstream = || vec![Upstream::new([10, 0, 9, 1], None)];
        let rules = (0..rules).map(|index| Rule::new(format!("rule{index}"), key(), upstream()));
        let desired = Desired {
            interfaces: vec!["eth0".into()],
            rules: rules.collect(),
            ..Desired::default()
        };
        let description = Description {
            origin: Origin { file: "/etc/udplb.yaml".into(), ..Origin::default() },
            version: String::new(),
            object: String::new(),
            built: BUILT,
            namespace: 1,
            program: ProgramName::default(),
            program_l3: None,
            program_xdp: None,
            clsact: Vec::new(),
            seed: 0,
            desired: desired.into(),
            ids: Vec::new(),
        };
        Generation { number: 2, description: description.into(), intact: true }
    }

    fn interface(slot: Slot) -> Interface {
        let hook = Hook { filter: slot, ..Hook::empty(Attachment::Filter) };
        Interface {
            index: 1,
            altnames: Vec::new(),
            layer: None,
            up: true,
            carrier: true,
            received: 0,
            hook,
            xdp: Default::default(),
        }
    }

    /// The rows of rules that matched their last packet so many seconds after they were applied.
    fn rows(last: &[Option<u64>]) -> Vec<RuleStatus> {
        let row = |(index, last): (usize, &Option<u64>)| RuleStatus {
            name: format!("rule{index}"),
            key: "10.0.0.5:1".into(),
            tc_action: Action::Pass,
            mode: Mode::Balance,
            upstreams: Vec::new(),
            mirrors: Vec::new(),
            flows: None,
            senders: None,
            counters: last.map_or_else(Counts::default, |last| {
                // the clock of BUILT is one second after the start
                Counts::forwarded_at(Duration::from_secs(last + 1))
            }),
            own: Counts::default(),
            notes: BTreeMap::new(),
            rate: None,
            losses: BTreeMap::new(),
            own_losses: BTreeMap::new(),
        };
        last.iter().enumerate().map(row).collect()
    }

    /// Problems so many seconds after the generation was built: level, id and title.
    fn found(slot: Slot, rules: &[RuleStatus], age: u64) -> Vec<(Level, &'static str, String)> {
        let serving = serving(rules.len());
        let mut observed = Observed { namespace: 1, ..Observed::default() };
        observed.interfaces.insert("eth0".into(), interface(slot));
        let facts = Facts {
            observed: &observed,
            serving: Some(&serving),
            rules,
            routes: &Routes::default(),
            source: Source("/etc/udplb.yaml"),
            now: Now { utc: BUILT + age, monotonic: Duration::from_secs(1 + age) },
        };
        let problems = problems(&facts);
        let drained = |problem: &&Problem| problem.id != "all-drained";
        let problems = problems.iter().filter(drained);
        problems.map(|problem| (problem.level, problem.id, problem.title())).collect()
    }

    #[test]
    fn hooks() {
        let ids = |slot: Slot| -> Vec<&'static str> {
            found(slot, &[], 0).iter().map(|(_, id, _)| *id).collect()
        };
        assert!(ids(Slot::Generation(2)).is_empty());
        assert_eq!(ids(Slot::Empty), ["not-attached"]);
        assert_eq!(ids(Slot::Generation(1)), ["other-generation"]);
        assert_eq!(ids(Slot::Foreign("flower".into())), ["place-taken"]);
        let (filter, link, home) = ("bpf".into(), None, None);
        assert_eq!(ids(Slot::Orphan { program: 1, filter, link, home }), ["orphan"]);
    }

    #[test]
    fn silent_rules_are_notes_after_a_grace() {
        let found = |rules: &[Option<u64>], age| found(Slot::Generation(2), &rows(rules), age);
        assert!(found(&[None, Some(5)], GRACE - 1).is_empty());
        let note = |title: &str| vec![(Level::Note, "rule-silent", title.to_string())];
        let since = "since 1970-01-12T13:46:40Z";
        let one = format!("rule0: no packet has matched it {since}");
        assert_eq!(found(&[None, Some(5)], GRACE), note(&one));
        // before it was applied
        assert_eq!(found(&[Some(0), Some(5)], GRACE).len(), 0);
        let many =
            format!("no packet has matched 8 of 9 rules, rule0, rule1, rule2 and 5 more, {since}");
        let mut rules = vec![None; 9];
        rules[8] = Some(1);
        assert_eq!(found(&rules, GRACE), note(&many));
    }
}
