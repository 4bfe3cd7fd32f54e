//! Checks across values: names, keys, endpoints, and limits of their numbers.

use std::hash;
use std::net::{Ipv4Addr, Ipv6Addr};

use foldhash::{HashMap, HashMapExt, HashSet, HashSetExt};

use super::decode::Decoded;
use super::diagnostic::{Diagnostics, Message};
use super::vocabulary::{self as words, Root};
use super::{
    Family, Flows, Hash, Host, KeyAddress, Mode, Network, Path, Ports, RuleConfig, Source,
    Templates, UpstreamConfig, Via,
};
use crate::maglev;

mod local;
mod quic;
mod reply;
mod senders;

/// Maximum number of ports of all keys, counted once for each network of senders.
pub const KEY_ENTRIES: usize = 1_000_000;

/// Maximum number of upstreams and mirrors of all rules.
pub const UPSTREAMS: usize = 200_000;

/// Maximum number of upstreams of one rule.
pub const UPSTREAMS_OF_RULE: usize = 65_535;

/// Maximum number of addresses of a family that flows get, see bpf/udplb.h.
pub const EGRESSES: usize = 16;

/// Maximum number of hosts that get one packet: the upstreams of a rule that replicates, or the mirrors.
pub const RECEIVERS: usize = 64;

/// Adds the errors between rules to the diagnostics of the decoder.
pub(super) fn check(decoded: &mut Decoded) {
    let mut diagnostics = std::mem::take(&mut decoded.diagnostics);
    let at = Path::default().field(words::INTERFACES.name);
    twice(&at, &decoded.interfaces, |name| format!("`{name}`"), &mut diagnostics);
    announcement(decoded, &mut diagnostics);
    decap(decoded, &mut diagnostics);
    egresses(decoded, &mut diagnostics);
    let rules = &decoded.rules;
    for rule in rules {
        families(rule, &mut diagnostics);
        senders::check(rule, &mut diagnostics);
        own_key(rule, &mut diagnostics);
        groups(rule, &mut diagnostics);
        own_source(rule, &mut diagnostics);
        upstream_names(rule, &mut diagnostics);
        // People list an upstream twice as a weight, and the bare list has no other.
        if decoded.root == Root::Map {
            endpoints(rule, &rule.upstreams, &mut diagnostics);
            endpoints(rule, &rule.mirrors, &mut diagnostics);
        }
        receivers(rule, &mut diagnostics);
        upstreams(rule, &mut diagnostics);
        weights(rule, &mut diagnostics);
        reply::check(rule, &mut diagnostics);
        local::check(rule, &mut diagnostics);
        quic::check(rule, &mut diagnostics);
        priorities(rule, &mut diagnostics);
    }
    decoded.warnings.extend(large_tables(rules));
    names(rules, &mut diagnostics);
    // More than the limit would take minutes to compare.
    if limits(rules, &mut diagnostics) {
        overlaps(rules, &mut diagnostics);
        reply::ambiguous(rules, &mut diagnostics);
        local::matched(rules, &mut diagnostics);
    }
    decoded.diagnostics = diagnostics;
}

/// Returns pairs of indices with equal values: the first index and each later one.
fn repeated<K: hash::Hash + Eq>(values: impl Iterator<Item = (usize, K)>) -> Vec<(usize, usize)> {
    let mut first = HashMap::with_capacity(values.size_hint().0);
    let mut pairs = Vec::new();
    for (index, value) in values {
        let before = *first.entry(value).or_insert(index);
        if before != index {
            pairs.push((before, index));
        }
    }
    pairs
}

/// Reports interfaces or networks that the list at a place names twice.
fn twice<T: hash::Hash + Eq>(
    at: &Path,
    all: &[T],
    text: impl Fn(&T) -> String,
    diagnostics: &mut Diagnostics,
) {
    for (first, again) in repeated(all.iter().enumerate()) {
        let message = Message::new(format!("{} is named twice", text(&all[again])));
        let message = message.at(at.index(again));
        diagnostics.push(message.related(at.index(first), "named here first"));
    }
}

/// Reports addresses of flows that are too many, and rules that match packets to their ports.
fn egresses(decoded: &Decoded, diagnostics: &mut Diagnostics) {
    let at = Path::default().field(words::FLOWS.name).field(words::FLOWS_ADDRESSES.name);
    let Flows { addresses, ports, .. } = &decoded.flows;
    twice(&at, addresses, ToString::to_string, diagnostics);
    for family in [false, true] {
        let mut of_family = addresses.iter().enumerate().filter(|(_, it)| it.is_ipv6() == family);
        if let Some((index, _)) = of_family.nth(EGRESSES) {
            let message = format!("at most {EGRESSES} addresses of a family are used");
            diagnostics.push(Message::new(message).at(at.index(index)));
        }
    }
    for rule in &decoded.rules {
        let key = &rule.key;
        let Some(index) = addresses.iter().position(|it| key.address == KeyAddress::Is(*it)) else {
            continue;
        };
        if key.has_port_in(*ports) {
            let message =
                format!("{} has ports of {ports}, at which flows get answers", addresses[index]);
            let help = "give the rule another port or address, or `flows` other `ports`";
            let message = Message::about(&rule.at.field(words::KEY.name), message).help(help);
            diagnostics.push(message.related(at.index(index), "an address of flows"));
        }
    }
}

/// Reports interfaces of the announcement that have another part already.
fn announcement(decoded: &Decoded, diagnostics: &mut Diagnostics) {
    let Some(announce) = &decoded.announce else { return };
    let at = Path::default().field(words::ANNOUNCE.name);
    let interface = at.field(words::ANNOUNCE_INTERFACE.name);
    let last_resort = at.field(words::ANNOUNCE_LAST_RESORT.name);
    if announce.last_resort.as_ref() == Some(&announce.interface) {
        let message = "sick and well are told apart by the interface: name another one";
        let message = Message::about(&last_resort, message);
        diagnostics.push(message.related(interface.clone(), "the interface of the well"));
    }
    let places =
        [(Some(&announce.interface), interface), (announce.last_resort.as_ref(), last_resort)];
    for (name, place) in places {
        let nth = decoded.interfaces.iter().position(|other| Some(other) == name);
        let (Some(name), Some(nth)) = (name, nth) else { continue };
        let message =
            format!("packets come in on {name}; addresses are announced from another interface");
        let message =
            Message::about(&place, message).help("a dummy: `ip link add anycast0 up type dummy`");
        let at = Path::default().field(words::INTERFACES.name).index(nth);
        diagnostics.push(message.related(at, "named here"));
    }
}

/// Reports networks and ways of `decap` that are named twice, and warns of one that anybody is in.
fn decap(decoded: &mut Decoded, diagnostics: &mut Diagnostics) {
    let Some(decap) = &decoded.decap else { return };
    let at = Path::default().field(words::DECAP.name);
    let (from, via) = (at.field(words::DECAP_FROM.name), at.field(words::DECAP_VIA.name));
    twice(&from, &decap.from, ToString::to_string, diagnostics);
    let word = |nth: usize| words::TUNNELS[usize::from(decap.via[nth] == Via::Gue)];
    let ways = Vec::from_iter((0..decap.via.len()).map(word));
    twice(&via, &ways, |word| format!("`{word}`"), diagnostics);
    if let Some(all) = decap.from.iter().find(|network| network.prefix == 0) {
        let message = format!("{all} has anybody put packets into this host, past its filters");
        let message = Message::about(&from, message);
        decoded.warnings.push(message.help("name the networks of the balancers"));
    }
}

/// Reports rules with addresses of both families: packets are not translated.
fn families(rule: &RuleConfig, diagnostics: &mut Diagnostics) {
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
    let lists = senders::lists(rule).into_iter();
    let from = lists.flat_map(|(at, list)| (0..list.len()).map(move |nth| at.index(nth)));
    let hosts = rule.destinations().filter(|it| matches!(it.address, Host::Address(_)));
    let hosts = hosts.map(|it| it.at.field(words::UPSTREAM_ADDRESS.name));
    let sources = rule.sources().map(|(at, _)| at);
    let places: Vec<Path> = is.into_iter().chain(from).chain(hosts).chain(sources).collect();
    for (address, place) in rule.addresses().zip(&places) {
        let other = Family::from(address);
        if other != family {
            let message = format!("{address} is {other}, and {first} is {family}");
            let message = Message::about(place, message);
            let message = message.help("a rule is of one family: write one for each");
            diagnostics.push(message.related(places[0].clone(), "the other family"));
        }
    }
}

/// Reports upstreams that are the key itself: their packets would match again, in a loop.
fn own_key(rule: &RuleConfig, diagnostics: &mut Diagnostics) {
    for upstream in rule.destinations() {
        let Host::Address(address) = &upstream.address else { continue };
        if rule.key.is(address.ip, upstream.port) {
            let message = "this is the rule's own key, to which it would send in a circle";
            let at = upstream.at.field(words::UPSTREAM_ADDRESS.name);
            diagnostics.push(Message::about(&at, message));
        }
    }
}

/// Reports `source: vip` with a multicast or broadcast key: receivers drop packets from such a source.
fn groups(rule: &RuleConfig, diagnostics: &mut Diagnostics) {
    let KeyAddress::Is(address) = rule.key.address else { return };
    if !address.is_multicast() && address != Ipv4Addr::BROADCAST {
        return;
    }
    let of_rule = rule.source == Source::Vip
        && rule.destinations().any(|it| it.source.is_none() && it.address != Host::Local);
    let at = of_rule.then(|| rule.at.field(words::OPTIONS.name).field(words::SOURCE.field.name));
    let own = rule.destinations().filter(|it| it.source == Some(Source::Vip));
    let own = own.map(|it| it.at.field(words::UPSTREAM_SOURCE.field.name));
    for at in at.into_iter().chain(own) {
        let message = format!("with `source: vip` the sender would be {address}, which is no host");
        let help = "say `source: preserve` or `source: egress`";
        diagnostics.push(Message::about(&at, message).help(help));
    }
}

/// Reports upstreams whose packets would come from their own address: they drop those.
fn own_source(rule: &RuleConfig, diagnostics: &mut Diagnostics) {
    for upstream in rule.destinations() {
        let (Host::Address(address), Some(source)) =
            (&upstream.address, upstream.source.unwrap_or(rule.source).fixed())
        else {
            continue;
        };
        if address.ip == source {
            let message = format!("the source of its packets would be {source}, its own address");
            let at = upstream.at.field(words::UPSTREAM_ADDRESS.name);
            diagnostics.push(Message::about(&at, message));
        }
    }
}

fn upstream_names(rule: &RuleConfig, diagnostics: &mut Diagnostics) {
    let all: Vec<&UpstreamConfig> = rule.destinations().collect();
    if all.len() < 2 {
        return;
    }
    let names = all.iter().enumerate();
    let names = names.filter_map(|(index, upstream)| Some((index, upstream.name.as_ref()?)));
    for (first, again) in repeated(names) {
        let (first, again) = (all[first], all[again]);
        let name = again.name.as_deref().unwrap_or_default();
        let at = |host: &UpstreamConfig| host.at.field(words::UPSTREAM_NAME.name);
        let message = format!("two hosts of the rule are named `{name}`");
        let message = Message::about(&at(again), message);
        diagnostics.push(message.related(at(first), "the first of that name"));
    }
}

/// Reports hosts that are listed twice. `hosts` is the rule's upstreams, or its mirrors.
fn endpoints(rule: &RuleConfig, hosts: &[UpstreamConfig], diagnostics: &mut Diagnostics) {
    if hosts.len() < 2 {
        return;
    }
    let endpoint = |upstream: &UpstreamConfig| match &upstream.address {
        Host::Address(address) => (Host::Address(address.clone()), port(rule, upstream)),
        Host::Name(name) => (Host::Name(name.to_ascii_lowercase()), port(rule, upstream)),
        Host::Local => (Host::Local, port(rule, upstream)),
    };
    let all = hosts.iter().map(endpoint).enumerate();
    for (first, again) in repeated(all) {
        let (first, again) = (&hosts[first], &hosts[again]);
        let message = format!("{} is in this list already", again.endpoint());
        let message = Message::about(&again.at, message);
        diagnostics.push(message.related(first.at.clone(), "the same host"));
    }
}

fn receivers(rule: &RuleConfig, diagnostics: &mut Diagnostics) {
    let mirrors = rule.at.field(words::MIRROR.name);
    let replicate = rule.mode == Mode::Replicate;
    if replicate && !rule.mirrors.is_empty() {
        let message = "with `mode: replicate` all upstreams get the packet";
        diagnostics.push(Message::about(&mirrors, message).help("make the mirrors upstreams"));
    }
    let upstreams = rule.at.field(words::UPSTREAM.name);
    let to_all = replicate || rule.templates == Templates::All;
    for (at, hosts, all_of_them) in
        [(upstreams, &rule.upstreams, to_all), (mirrors, &rule.mirrors, true)]
    {
        if all_of_them && hosts.len() > RECEIVERS {
            let message =
                format!("{} hosts, and at most {RECEIVERS} can get one packet", hosts.len());
            diagnostics.push(Message::about(&at, message));
        }
    }
    for upstream in rule.upstreams.iter().filter(|it| !replicate && it.sample.is_some()) {
        let message = "`sample` needs `mode: replicate`: a balanced packet has one upstream only";
        let help = "a mirror can have it";
        let at = upstream.at.field(words::UPSTREAM_SAMPLE.name);
        diagnostics.push(Message::about(&at, message).help(help));
    }
}

/// Reports priorities where all upstreams get the packet.
fn priorities(rule: &RuleConfig, diagnostics: &mut Diagnostics) {
    if rule.mode == Mode::Balance {
        return;
    }
    for upstream in rule.upstreams.iter().filter(|it| it.priority.is_some()) {
        let message =
            "`priority` has no meaning with `mode: replicate`: every upstream gets each packet";
        let at = upstream.at.field(words::UPSTREAM_PRIORITY.name);
        diagnostics.push(Message::about(&at, message));
    }
}

fn weights(rule: &RuleConfig, diagnostics: &mut Diagnostics) {
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
            diagnostics.push(Message::about(&at, message));
        }
        return;
    }
    if let Err(error) = slots(rule) {
        let at = rule.at.field(words::UPSTREAM.name);
        diagnostics.push(Message::about(&at, error.to_string()));
    }
}

/// Returns the size of the table of a rule, which has the upstreams of the lowest priority.
fn slots(rule: &RuleConfig) -> Result<u32, maglev::TooUneven> {
    let priority = |upstream: &UpstreamConfig| upstream.priority.unwrap_or(1);
    let lowest = rule.upstreams.iter().map(priority).min();
    let preferred = rule.upstreams.iter().filter(|it| Some(priority(it)) == lowest);
    let weights: Vec<u32> = preferred.map(|it| it.weight.unwrap_or(1)).collect();
    maglev::size(&weights)
}

fn upstreams(rule: &RuleConfig, diagnostics: &mut Diagnostics) {
    let count = rule.upstreams.len();
    if count > UPSTREAMS_OF_RULE {
        let message = format!("{count} upstreams, and at most {UPSTREAMS_OF_RULE} fit into a rule");
        diagnostics.push(Message::about(&rule.at.field(words::UPSTREAM.name), message));
    }
}

/// Warns of weights so uneven that their tables take much memory.
fn large_tables(rules: &[RuleConfig]) -> Option<Message> {
    const LARGE: u32 = 100_000;
    /// Kernel memory of a slot, in bytes.
    const SLOT: u64 = 2;
    let weighted = |rule: &&RuleConfig| (rule.mode, rule.hash) == (Mode::Balance, Hash::Maglev);
    let slots = |rule: &RuleConfig| slots(rule).ok().filter(|slots| *slots >= LARGE);
    let large = rules.iter().filter(weighted).filter_map(|rule| Some((rule, slots(rule)?)));
    let large: Vec<(&RuleConfig, u32)> = large.collect();
    let (rule, slots) = large.first()?;
    let kilobytes = large.iter().map(|(_, slots)| SLOT * u64::from(*slots)).sum::<u64>() / 1000;
    let others = match large.len() - 1 {
        0 => String::new(),
        others => format!(", with the tables of {others} more such rules"),
    };
    let message = format!(
        "these weights need a table of {slots} slots, and apply takes longer to fill it: up to \
         {kilobytes} kB of kernel memory{others}; weights of at most 100 times the smallest in all \
         need 20 kB"
    );
    Some(Message::about(&rule.at.field(words::UPSTREAM.name), message))
}

/// Returns the port of an upstream; none where it is each packet's own.
fn port(rule: &RuleConfig, upstream: &UpstreamConfig) -> Option<u16> {
    upstream.port.or(rule.key.only_port())
}

fn names(rules: &[RuleConfig], diagnostics: &mut Diagnostics) {
    let own = |rule: &RuleConfig| rule.name != rule.key.to_string();
    let names = rules.iter().map(|rule| &rule.name).enumerate();
    for (first, again) in repeated(names) {
        let (first, again) = (&rules[first], &rules[again]);
        let none_own = !own(first) && !own(again);
        // Rules without a name share one if they share a key, which is reported at the key.
        let from = |rule: &RuleConfig| networks(rule).collect::<HashSet<_>>();
        if none_own && !from(first).is_disjoint(&from(again)) {
            continue;
        }
        let at = |rule: &RuleConfig| {
            let field = if own(rule) { &words::NAME } else { &words::KEY };
            rule.at.field(field.name)
        };
        let mut message =
            Message::about(&at(again), format!("two rules are named `{}`", again.name));
        if none_own {
            message = message.help("that is their key, which they share: give them a `name`");
        }
        diagnostics.push(message.related(at(first), "the first of that name"));
    }
}

/// A port or range of a rule's key, for one network of senders.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Claim {
    address: KeyAddress,
    from: Network,
    /// True if the key has any port: keys with single ports precede it.
    any_port: bool,
    ports: Ports,
    rule: usize,
    /// Index among the rule's ports.
    nth: usize,
}

const ALL_PORTS: Ports = Ports { first: 1, last: u16::MAX };

/// Returns the networks of senders of a rule: all addresses where it has no `from`.
fn networks(rule: &RuleConfig) -> impl Iterator<Item = Network> {
    let address = match rule.family() {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    };
    let all = Network { address, prefix: 0 };
    rule.key.from.iter().copied().chain(rule.key.from.is_empty().then_some(all))
}

fn claims(index: usize, rule: &RuleConfig) -> impl Iterator<Item = Claim> {
    let any_port = rule.key.ports.is_empty();
    let ports = rule.key.ports.iter().copied().chain(any_port.then_some(ALL_PORTS)).enumerate();
    ports.flat_map(move |(nth, ports)| {
        let address = rule.key.address;
        networks(rule).map(move |from| Claim { address, from, any_port, ports, rule: index, nth })
    })
}

/// Reports keys that overlap. Sorting takes milliseconds where comparing all pairs would take minutes.
fn overlaps(rules: &[RuleConfig], diagnostics: &mut Diagnostics) {
    let claims = rules.iter().enumerate().flat_map(|(index, rule)| claims(index, rule));
    let mut claims: Vec<_> = claims.collect();
    claims.sort_unstable();
    let mut said = HashSet::new();
    // The claim before with the highest last port.
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
                    overlap(rules, first, again, diagnostics);
                }
                if far.ports.last < claim.ports.last {
                    reach = Some(claim);
                }
            }
            _ => reach = Some(claim),
        }
    }
}

fn overlap(rules: &[RuleConfig], first: Claim, again: Claim, diagnostics: &mut Diagnostics) {
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
    let message = Message::about(&at(again), message);
    diagnostics.push(message.related(at(first), "first defined here"));
}

/// Reports the rules that exceed a limit; returns true if the key entries fit.
fn limits(rules: &[RuleConfig], diagnostics: &mut Diagnostics) -> bool {
    let keys = beyond(rules, KEY_ENTRIES, |rule| rule.key.entries());
    if let Some((rule, all)) = keys {
        let message = format!(
            "{all} key entries (each port of a range is one, for each network of senders), and at \
             most {KEY_ENTRIES} fit"
        );
        let at = rule.at.field(words::KEY.name).field(words::KEY_PORT.name);
        diagnostics.push(Message::about(&at, message));
    }
    if let Some((rule, all)) = beyond(rules, UPSTREAMS, |rule| rule.destinations().count()) {
        let message = format!("{all} upstreams in all rules, and at most {UPSTREAMS} fit");
        let at = rule.at.field(words::UPSTREAM.name);
        diagnostics.push(Message::about(&at, message));
    }
    keys.is_none()
}

/// Returns the rule at which the sum exceeds the limit, and the whole sum.
fn beyond(
    rules: &[RuleConfig],
    limit: usize,
    count: impl Fn(&RuleConfig) -> usize,
) -> Option<(&RuleConfig, usize)> {
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
