//! What values must not be together: names, keys, endpoints, and how many there may be.

use std::collections::HashMap;
use std::hash::Hash;

use super::decode::Decoded;
use super::diagnostic::{Complaint, Problems};
use super::vocabulary::{self as words, Root};
use super::{Host, KeyAddress, Path, Ports, Rule, Upstream};

/// How many ports all keys may have together: each is an entry of the kernel's map of rules.
pub const KEY_ENTRIES: usize = 100_000;

/// How many upstreams all rules may have together.
pub const UPSTREAMS: usize = 65_535;

/// Adds what is wrong between the rules to the problems of the decoding.
pub(super) fn check(decoded: &mut Decoded) {
    let mut problems = std::mem::take(&mut decoded.problems);
    interfaces(&decoded.interfaces, &mut problems);
    let rules = &decoded.rules;
    for rule in rules {
        own_key(rule, &mut problems);
        upstream_names(rule, &mut problems);
        // People list an upstream twice as a weight, and the bare list has no other.
        if decoded.root == Root::Map {
            endpoints(rule, &mut problems);
        }
    }
    names(rules, &mut problems);
    overlaps(rules, &mut problems);
    limits(rules, &mut problems);
    decoded.problems = problems;
}

/// Pairs of indices whose values are equal: the first of its kind, and each later one.
fn repeated<K: Hash + Eq>(values: impl Iterator<Item = (usize, K)>) -> Vec<(usize, usize)> {
    let mut first = HashMap::new();
    let mut pairs = Vec::new();
    for (index, value) in values {
        let before = *first.entry(value).or_insert(index);
        if before != index {
            pairs.push((before, index));
        }
    }
    pairs
}

fn interfaces(names: &[String], problems: &mut Problems) {
    let at = Path::default().field(words::INTERFACES.name);
    for (first, again) in repeated(names.iter().enumerate()) {
        let message = format!("`{}` is named twice", names[again]);
        problems.push_pair(
            at.index(again),
            Complaint::new(message),
            at.index(first),
            "named here first",
        );
    }
}

/// What an upstream sends back to the key would be matched, and sent, again and again.
fn own_key(rule: &Rule, problems: &mut Problems) {
    for upstream in &rule.upstreams {
        let within = |port| rule.key.ports.iter().any(|ports| ports.contains(port));
        let same_port = upstream.port.is_none_or(within);
        let own = match &upstream.address {
            Host::Address(address) => KeyAddress::Is(address.ip) == rule.key.address,
            Host::Name(_) => false,
        };
        if own && same_port {
            let message = "the upstream is the rule's own key, to which it would send in a circle";
            problems.push(upstream.at.field(words::UPSTREAM_ADDRESS.name), Complaint::new(message));
        }
    }
}

fn upstream_names(rule: &Rule, problems: &mut Problems) {
    if rule.upstreams.len() < 2 {
        return;
    }
    let names = rule.upstreams.iter().enumerate();
    let names = names.filter_map(|(index, upstream)| Some((index, upstream.name.as_ref()?)));
    for (first, again) in repeated(names) {
        let (first, again) = (&rule.upstreams[first], &rule.upstreams[again]);
        let name = again.name.as_deref().unwrap_or_default();
        problems.push_pair(
            again.at.field(words::UPSTREAM_NAME.name),
            Complaint::new(format!("two upstreams of the rule are named `{name}`")),
            first.at.field(words::UPSTREAM_NAME.name),
            "the first of that name",
        );
    }
}

fn endpoints(rule: &Rule, problems: &mut Problems) {
    if rule.upstreams.len() < 2 {
        return;
    }
    let endpoint = |upstream: &Upstream| match &upstream.address {
        Host::Address(address) => (Host::Address(address.clone()), port(rule, upstream)),
        Host::Name(name) => (Host::Name(name.to_ascii_lowercase()), port(rule, upstream)),
    };
    let all = rule.upstreams.iter().map(endpoint).enumerate();
    for (first, again) in repeated(all) {
        let (first, again) = (&rule.upstreams[first], &rule.upstreams[again]);
        problems.push_pair(
            again.at.clone(),
            Complaint::new(format!("{} is an upstream of the rule already", again.endpoint())),
            first.at.clone(),
            "the same upstream",
        );
    }
}

/// The one port that an upstream gets; none where it gets each packet's own.
fn port(rule: &Rule, upstream: &Upstream) -> Option<u16> {
    match (upstream.port, &rule.key.ports[..]) {
        (None, [only]) if only.first == only.last => Some(only.first),
        (port, _) => port,
    }
}

fn names(rules: &[Rule], problems: &mut Problems) {
    // Rules without names of their own have one name if they have one key: that is said of the key.
    let own = |rule: &Rule| rule.name != rule.key.to_string();
    let names = rules.iter().map(|rule| &rule.name).enumerate();
    for (first, again) in repeated(names) {
        let (first, again) = (&rules[first], &rules[again]);
        if !own(first) && !own(again) {
            continue;
        }
        let at = |rule: &Rule| {
            let field = if own(rule) { &words::NAME } else { &words::KEY };
            rule.at.field(field.name)
        };
        let message = format!("two rules are named `{}`", again.name);
        problems.push_pair(at(again), Complaint::new(message), at(first), "the first of that name");
    }
}

/// One port or range of a rule's key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Claim {
    address: KeyAddress,
    ports: Ports,
    rule: usize,
    /// Which of the rule's.
    nth: usize,
}

/// Sorted, since each against each would take minutes where sorting takes milliseconds.
fn overlaps(rules: &[Rule], problems: &mut Problems) {
    let claims = rules.iter().enumerate().flat_map(|(index, rule)| {
        let ports = rule.key.ports.iter().enumerate();
        ports.map(move |(nth, ports)| Claim {
            address: rule.key.address,
            ports: *ports,
            rule: index,
            nth,
        })
    });
    let mut claims: Vec<_> = claims.collect();
    claims.sort_unstable();
    // Of all before, the one that reaches furthest.
    let mut reach: Option<Claim> = None;
    for claim in claims {
        match reach {
            Some(far) if far.address == claim.address && far.ports.last >= claim.ports.first => {
                overlap(rules, far, claim, problems);
                if far.ports.last < claim.ports.last {
                    reach = Some(claim);
                }
            }
            _ => reach = Some(claim),
        }
    }
}

fn overlap(rules: &[Rule], one: Claim, other: Claim, problems: &mut Problems) {
    let in_file = |claim: &Claim| (claim.rule, claim.nth);
    let (first, again) = if in_file(&one) < in_file(&other) { (one, other) } else { (other, one) };
    let at = |claim: Claim| {
        let rule = &rules[claim.rule];
        let at = rule.at.field(words::KEY.name).field(words::KEY_PORT.name);
        match rule.key.ports.len() {
            1 => at,
            _ => at.index(claim.nth),
        }
    };
    let (old, new) = (&rules[first.rule].name, &rules[again.rule].name);
    let (ports, overlap, is) = match again.ports.count() {
        1 => (format!("port {}", again.ports), "overlaps", "is"),
        _ => (format!("ports {}", again.ports), "overlap", "are"),
    };
    let message = match (first.rule == again.rule, first.ports == again.ports) {
        (true, true) => format!("{ports} {is} in the key twice"),
        (true, false) => format!("{ports} {overlap} {} of the same key", first.ports),
        (false, true) => format!("{ports} of rule `{new}` {is} already matched by rule `{old}`"),
        (false, false) => {
            format!("{ports} of rule `{new}` {overlap} {} of rule `{old}`", first.ports)
        }
    };
    let label = "first defined here";
    problems.push_pair(at(again), Complaint::new(message), at(first), label);
}

fn limits(rules: &[Rule], problems: &mut Problems) {
    let entries = |rule: &Rule| rule.key.ports.iter().map(Ports::count).sum();
    if let Some((rule, all)) = beyond(rules, KEY_ENTRIES, entries) {
        let message = format!(
            "{all} key entries (each port of a range is one), and at most {KEY_ENTRIES} fit"
        );
        let at = rule.at.field(words::KEY.name).field(words::KEY_PORT.name);
        problems.push(at, Complaint::new(message));
    }
    if let Some((rule, all)) = beyond(rules, UPSTREAMS, |rule| rule.upstreams.len()) {
        let message = format!("{all} upstreams in all rules, and at most {UPSTREAMS} fit");
        let at = rule.at.field(words::UPSTREAM.name);
        problems.push(at, Complaint::new(message));
    }
}

/// The rule with which the sum goes over the limit, and the whole sum.
fn beyond(rules: &[Rule], limit: usize, count: impl Fn(&Rule) -> usize) -> Option<(&Rule, usize)> {
    let mut sum = 0;
    let mut last = None;
    for rule in rules {
        sum += count(rule);
        if sum > limit {
            last = last.or(Some(rule));
        }
    }
    last.map(|rule| (rule, sum))
}
