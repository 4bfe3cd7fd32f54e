//! What values must not be together: names, keys, endpoints, and how many there may be.

use std::collections::{HashMap, HashSet};
use std::hash;
use std::net::{Ipv4Addr, Ipv6Addr};

use super::decode::Decoded;
use super::diagnostic::{Complaint, Problems};
use super::vocabulary::{self as words, Root};
use super::{
    Family, Finding, Hash, Host, KeyAddress, Mode, Network, Path, Ports, Rule, Source, Upstream,
};
use crate::maglev;

/// How many ports all keys may have together, each for each of its networks of senders.
pub const KEY_ENTRIES: usize = 100_000;

/// How many upstreams and mirrors all rules may have together.
pub const UPSTREAMS: usize = 65_535;

/// How many hosts may get one packet: the upstreams of a rule that replicates, or the mirrors.
pub const RECEIVERS: usize = 64;

/// Adds what is wrong between the rules to the problems of the decoding.
pub(super) fn check(decoded: &mut Decoded) {
    let mut problems = std::mem::take(&mut decoded.problems);
    interfaces(&decoded.interfaces, &mut problems);
    let rules = &decoded.rules;
    for rule in rules {
        families(rule, &mut problems);
        networks(rule, &mut problems);
        own_key(rule, &mut problems);
        groups(rule, &mut problems);
        upstream_names(rule, &mut problems);
        // People list an upstream twice as a weight, and the bare list has no other.
        if decoded.root == Root::Map {
            endpoints(rule, &rule.upstreams, &mut problems);
            endpoints(rule, &rule.mirrors, &mut problems);
        }
        receivers(rule, &mut problems);
        weights(rule, &mut problems);
    }
    decoded.warnings.extend(large_tables(rules));
    names(rules, &mut problems);
    // Too many to compare would be too many.
    if limits(rules, &mut problems) {
        overlaps(rules, &mut problems);
    }
    decoded.problems = problems;
}

/// Pairs of indices whose values are equal: the first of its kind, and each later one.
fn repeated<K: hash::Hash + Eq>(values: impl Iterator<Item = (usize, K)>) -> Vec<(usize, usize)> {
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

/// What comes by one family cannot be sent by the other.
fn families(rule: &Rule, problems: &mut Problems) {
    let mut addresses = rule.addresses();
    let Some(first) = addresses.next() else { return };
    let family = Family::from(first);
    if addresses.all(|address| Family::from(address) == family) {
        return;
    }
    let key = rule.at.field(words::KEY.name);
    let is = match rule.key.address {
        KeyAddress::Is(_) => Some(key.field(words::KEY_ADDRESS.name)),
        KeyAddress::Any => None,
    };
    let from = key.field(words::KEY_FROM.name);
    let from = (0..rule.key.from.len()).map(|nth| from.index(nth));
    let hosts = rule.destinations().filter(|it| matches!(it.address, Host::Address(_)));
    let hosts = hosts.map(|it| it.at.field(words::UPSTREAM_ADDRESS.name));
    let places: Vec<Path> = is.into_iter().chain(from).chain(hosts).collect();
    for (address, place) in rule.addresses().zip(&places) {
        let other = Family::from(address);
        if other != family {
            let message = format!("{address} is {other}, and {first} is {family}");
            let complaint =
                Complaint::new(message).help("a rule is of one family: write one for each");
            problems.push_pair(place.clone(), complaint, places[0].clone(), "the other family");
        }
    }
}

fn networks(rule: &Rule, problems: &mut Problems) {
    let at = rule.at.field(words::KEY.name).field(words::KEY_FROM.name);
    for (first, again) in repeated(rule.key.from.iter().enumerate()) {
        let message = format!("{} is named twice", rule.key.from[again]);
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
    for upstream in rule.destinations() {
        let Host::Address(address) = &upstream.address else { continue };
        if rule.key.is(address.ip, upstream.port) {
            let message = "this is the rule's own key, to which it would send in a circle";
            problems.push(upstream.at.field(words::UPSTREAM_ADDRESS.name), Complaint::new(message));
        }
    }
}

/// What comes from the address of many is dropped by whoever gets it.
fn groups(rule: &Rule, problems: &mut Problems) {
    let KeyAddress::Is(address) = rule.key.address else { return };
    if !address.is_multicast() && address != Ipv4Addr::BROADCAST {
        return;
    }
    let of_rule = rule.source == Source::Vip && rule.destinations().any(|it| it.source.is_none());
    let at = of_rule.then(|| rule.at.field(words::OPTIONS.name).field(words::SOURCE.field.name));
    let own = rule.destinations().filter(|it| it.source == Some(Source::Vip));
    let own = own.map(|it| it.at.field(words::UPSTREAM_SOURCE.field.name));
    for at in at.into_iter().chain(own) {
        let message = format!("with `source: vip` the sender would be {address}, which is no host");
        let help = "say `source: preserve` or `source: egress`";
        problems.push(at, Complaint::new(message).help(help));
    }
}

fn upstream_names(rule: &Rule, problems: &mut Problems) {
    let all: Vec<&Upstream> = rule.destinations().collect();
    if all.len() < 2 {
        return;
    }
    let names = all.iter().enumerate();
    let names = names.filter_map(|(index, upstream)| Some((index, upstream.name.as_ref()?)));
    for (first, again) in repeated(names) {
        let (first, again) = (all[first], all[again]);
        let name = again.name.as_deref().unwrap_or_default();
        problems.push_pair(
            again.at.field(words::UPSTREAM_NAME.name),
            Complaint::new(format!("two hosts of the rule are named `{name}`")),
            first.at.field(words::UPSTREAM_NAME.name),
            "the first of that name",
        );
    }
}

/// `hosts`: the rule's upstreams, or its mirrors.
fn endpoints(rule: &Rule, hosts: &[Upstream], problems: &mut Problems) {
    if hosts.len() < 2 {
        return;
    }
    let endpoint = |upstream: &Upstream| match &upstream.address {
        Host::Address(address) => (Host::Address(address.clone()), port(rule, upstream)),
        Host::Name(name) => (Host::Name(name.to_ascii_lowercase()), port(rule, upstream)),
    };
    let all = hosts.iter().map(endpoint).enumerate();
    for (first, again) in repeated(all) {
        let (first, again) = (&hosts[first], &hosts[again]);
        problems.push_pair(
            again.at.clone(),
            Complaint::new(format!("{} is in this list already", again.endpoint())),
            first.at.clone(),
            "the same host",
        );
    }
}

fn receivers(rule: &Rule, problems: &mut Problems) {
    let mirrors = rule.at.field(words::MIRROR.name);
    let replicate = rule.mode == Mode::Replicate;
    if replicate && !rule.mirrors.is_empty() {
        let message = "with `mode: replicate` all upstreams get the packet";
        let complaint = Complaint::new(message).help("make the mirrors upstreams");
        problems.push(mirrors.clone(), complaint);
    }
    let upstreams = rule.at.field(words::UPSTREAM.name);
    for (at, hosts, all_of_them) in
        [(upstreams, &rule.upstreams, replicate), (mirrors, &rule.mirrors, true)]
    {
        if all_of_them && hosts.len() > RECEIVERS {
            let message =
                format!("{} hosts, and at most {RECEIVERS} can get one packet", hosts.len());
            problems.push(at, Complaint::new(message));
        }
    }
    for upstream in rule.upstreams.iter().filter(|it| !replicate && it.sample.is_some()) {
        let message = "`sample` needs `mode: replicate`: a balanced packet has one upstream only";
        let help = "a mirror can have it";
        let at = upstream.at.field(words::UPSTREAM_SAMPLE.name);
        problems.push(at, Complaint::new(message).help(help));
    }
}

fn weights(rule: &Rule, problems: &mut Problems) {
    let misused = match (rule.mode, rule.hash) {
        (Mode::Replicate, _) => {
            Some("`weight` has no meaning with `mode: replicate`: every upstream gets each packet")
        }
        (Mode::Balance, Hash::Modulo) => Some("`weight` needs `hash: maglev`"),
        (Mode::Balance, Hash::Maglev) => None,
    };
    if let Some(message) = misused {
        for upstream in rule.upstreams.iter().filter(|it| it.weight.is_some()) {
            let at = upstream.at.field(words::UPSTREAM_WEIGHT.name);
            problems.push(at, Complaint::new(message));
        }
        return;
    }
    let weights: Vec<u32> = rule.upstreams.iter().map(|it| it.weight.unwrap_or(1)).collect();
    if let Err(error) = maglev::size(&weights) {
        problems.push(rule.at.field(words::UPSTREAM.name), Complaint::new(error.to_string()));
    }
}

/// Warns of weights so uneven that their tables take much memory.
fn large_tables(rules: &[Rule]) -> Option<Finding> {
    const LARGE: u32 = 100_000;
    /// Kernel memory of a slot, in bytes.
    const SLOT: u64 = 2;
    let weighted = |rule: &&Rule| (rule.mode, rule.hash) == (Mode::Balance, Hash::Maglev);
    let slots = |rule: &Rule| {
        let weights: Vec<u32> = rule.upstreams.iter().map(|it| it.weight.unwrap_or(1)).collect();
        maglev::size(&weights).ok().filter(|slots| *slots >= LARGE)
    };
    let large = rules.iter().filter(weighted).filter_map(|rule| Some((rule, slots(rule)?)));
    let large: Vec<(&Rule, u32)> = large.collect();
    let (rule, slots) = large.first()?;
    let kilobytes = large.iter().map(|(_, slots)| SLOT * u64::from(*slots)).sum::<u64>() / 1000;
    let others = match large.len() - 1 {
        0 => String::new(),
        others => format!(", with the tables of {others} more such rules"),
    };
    let message = format!(
        "these weights need a table of {slots} slots, and apply takes longer to fill it: up to \
         {kilobytes} kB of kernel memory{others}; weights of at most 100 times the least in all \
         need 20 kB"
    );
    Some(Finding::new(&rule.at.field(words::UPSTREAM.name), message))
}

/// The one port that an upstream gets; none where it gets each packet's own.
fn port(rule: &Rule, upstream: &Upstream) -> Option<u16> {
    match (upstream.port, &rule.key.ports[..]) {
        (None, [only]) if only.first == only.last => Some(only.first),
        (port, _) => port,
    }
}

fn names(rules: &[Rule], problems: &mut Problems) {
    let own = |rule: &Rule| rule.name != rule.key.to_string();
    let names = rules.iter().map(|rule| &rule.name).enumerate();
    for (first, again) in repeated(names) {
        let (first, again) = (&rules[first], &rules[again]);
        let none_own = !own(first) && !own(again);
        // Rules without names of their own have one name if they have one key: if that is wrong,
        // it is said of the key.
        let from = |rule: &Rule| senders(rule).collect::<HashSet<_>>();
        if none_own && !from(first).is_disjoint(&from(again)) {
            continue;
        }
        let at = |rule: &Rule| {
            let field = if own(rule) { &words::NAME } else { &words::KEY };
            rule.at.field(field.name)
        };
        let complaint = Complaint::new(format!("two rules are named `{}`", again.name));
        let complaint = match none_own {
            true => complaint.help("that is their key, which they share: give them a `name`"),
            false => complaint,
        };
        problems.push_pair(at(again), complaint, at(first), "the first of that name");
    }
}

/// One port or range of a rule's key, of one network of senders.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Claim {
    address: KeyAddress,
    from: Network,
    /// Of a key with any port, which leaves single ports to others.
    any_port: bool,
    ports: Ports,
    rule: usize,
    /// Which of the rule's ports.
    nth: usize,
}

const ALL_PORTS: Ports = Ports { first: 1, last: u16::MAX };

/// Where a rule does not say whose packets it takes, it takes those of all networks.
fn senders(rule: &Rule) -> impl Iterator<Item = Network> {
    let address = match rule.family() {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    };
    let all = Network { address, prefix: 0 };
    rule.key.from.iter().copied().chain(rule.key.from.is_empty().then_some(all))
}

fn claims(index: usize, rule: &Rule) -> impl Iterator<Item = Claim> {
    let any_port = rule.key.ports.is_empty();
    let ports = rule.key.ports.iter().copied().chain(any_port.then_some(ALL_PORTS)).enumerate();
    ports.flat_map(move |(nth, ports)| {
        let address = rule.key.address;
        senders(rule).map(move |from| Claim { address, from, any_port, ports, rule: index, nth })
    })
}

/// Sorted, since each against each would take minutes where sorting takes milliseconds.
fn overlaps(rules: &[Rule], problems: &mut Problems) {
    let claims = rules.iter().enumerate().flat_map(|(index, rule)| claims(index, rule));
    let mut claims: Vec<_> = claims.collect();
    claims.sort_unstable();
    let mut said = HashSet::new();
    // Of all before, the one that reaches furthest.
    let mut reach: Option<Claim> = None;
    let space = |claim: &Claim| (claim.address, claim.from, claim.any_port);
    for claim in claims {
        match reach {
            Some(far) if space(&far) == space(&claim) && far.ports.last >= claim.ports.first => {
                // One pair may meet in several networks.
                let in_file = |claim: &Claim| (claim.rule, claim.nth);
                let (first, again) = match in_file(&far) < in_file(&claim) {
                    true => (far, claim),
                    false => (claim, far),
                };
                if in_file(&first) != in_file(&again)
                    && said.insert((in_file(&first), in_file(&again)))
                {
                    overlap(rules, first, again, problems);
                }
                if far.ports.last < claim.ports.last {
                    reach = Some(claim);
                }
            }
            _ => reach = Some(claim),
        }
    }
}

fn overlap(rules: &[Rule], first: Claim, again: Claim, problems: &mut Problems) {
    let at = |claim: Claim| {
        let rule = &rules[claim.rule];
        let at = rule.at.field(words::KEY.name).field(words::KEY_PORT.name);
        match rule.key.ports.len() {
            0 | 1 => at,
            _ => at.index(claim.nth),
        }
    };
    let (one, other) = (&rules[first.rule], &rules[again.rule]);
    let (old, new) = (&one.name, &other.name);
    let (ports, overlap, is) = match again.ports.count() {
        _ if again.any_port => ("any port".into(), "overlaps", "is"),
        1 => (format!("port {}", again.ports), "overlaps", "is"),
        _ => (format!("ports {}", again.ports), "overlap", "are"),
    };
    let mut message = match (first.rule == again.rule, first.ports == again.ports) {
        (true, true) => format!("{ports} {is} in the key twice"),
        (true, false) => format!("{ports} {overlap} {} of the same key", first.ports),
        (false, true) => format!("{ports} of rule `{new}` {is} already matched by rule `{old}`"),
        (false, false) => {
            format!("{ports} of rule `{new}` {overlap} {} of rule `{old}`", first.ports)
        }
    };
    if first.rule != again.rule && !(one.key.from.is_empty() && other.key.from.is_empty()) {
        message += &format!(", both for senders in {}", again.from);
    }
    let label = "first defined here";
    problems.push_pair(at(again), Complaint::new(message), at(first), label);
}

/// Whether all fit.
fn limits(rules: &[Rule], problems: &mut Problems) -> bool {
    let keys = beyond(rules, KEY_ENTRIES, |rule| rule.key.entries());
    if let Some((rule, all)) = keys {
        let message = format!(
            "{all} key entries (each port of a range is one, for each network of senders), and at \
             most {KEY_ENTRIES} fit"
        );
        let at = rule.at.field(words::KEY.name).field(words::KEY_PORT.name);
        problems.push(at, Complaint::new(message));
    }
    if let Some((rule, all)) = beyond(rules, UPSTREAMS, |rule| rule.destinations().count()) {
        let message = format!("{all} upstreams in all rules, and at most {UPSTREAMS} fit");
        let at = rule.at.field(words::UPSTREAM.name);
        problems.push(at, Complaint::new(message));
    }
    keys.is_none()
}

/// The rule with which the sum goes over the limit, and the whole sum.
fn beyond(rules: &[Rule], limit: usize, count: impl Fn(&Rule) -> usize) -> Option<(&Rule, usize)> {
    let mut sum: usize = 0;
    let mut last = None;
    for rule in rules {
        sum = sum.saturating_add(count(rule));
        if sum > limit {
            last = last.or(Some(rule));
        }
    }
    last.map(|rule| (rule, sum))
}
