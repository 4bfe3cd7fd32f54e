//! Checks of `reply`: whether answers can be recognised, and where they are to come from.

use std::net::Ipv4Addr;

use super::ALL_PORTS;
use crate::config::diagnostic::{Diagnostics, Message};
use crate::config::vocabulary as words;
use crate::config::{Action, KeyAddress, Mode, Path, Ports, Reply, RuleConfig, Source};

/// Reports options and keys that exclude the rule's `reply`.
pub(super) fn check(rule: &RuleConfig, diagnostics: &mut Diagnostics) {
    let word = match rule.reply {
        Reply::None => "none",
        Reply::Direct => "direct",
        Reply::Route => "route",
        Reply::Nat => "nat",
    };
    if rule.reply != Reply::Direct {
        unused_ways(rule, diagnostics);
    }
    if rule.reply == Reply::None {
        return;
    }
    let at = option(rule, words::REPLY.field.name);
    let mut refuse = |at: &Path, why: &str, help: &str| {
        let message = Message::about(at, format!("`reply: {word}` {why}"));
        diagnostics.push(message.help(help));
    };
    if rule.action != Action::Block {
        refuse(&at, "needs `tc_action: block`: else this host answers as well", "say both");
    }
    if rule.mode != Mode::Balance {
        let why = "needs `mode: balance`: a client expects one answer";
        refuse(&at, why, "hosts whose answers nobody wants can be mirrors");
    }
    match rule.reply {
        Reply::Nat => {
            let why = "needs `source: egress`: the upstreams answer to this host";
            sources(rule, Source::Egress, why, &mut refuse);
            group(rule, &mut refuse);
        }
        _ => {
            let why = "needs `source: preserve`: the upstreams answer to the client itself";
            sources(rule, Source::Preserve, why, &mut refuse);
            key(rule, &mut refuse);
        }
    }
    match rule.reply {
        Reply::None | Reply::Nat => {}
        Reply::Direct => direct(rule, &at, refuse),
        Reply::Route => route(rule, refuse),
    }
}

/// Reports sources of the rule and of its upstreams other than the one that is needed.
fn sources(
    rule: &RuleConfig,
    needed: Source,
    why: &str,
    refuse: &mut impl FnMut(&Path, &str, &str),
) {
    let help = match needed {
        Source::Egress => "leave `source` out; with `reply: route` upstreams see the client",
        _ => "leave `source` out",
    };
    if rule.source != needed {
        refuse(&option(rule, words::SOURCE.field.name), why, help);
    }
    let own = rule.upstreams.iter().filter(|it| it.source.is_some_and(|it| it != needed));
    for upstream in own {
        refuse(&upstream.at.field(words::UPSTREAM_SOURCE.field.name), why, help);
    }
}

fn key_address(rule: &RuleConfig) -> Path {
    rule.at.field(words::KEY.name).field(words::KEY_ADDRESS.name)
}

/// Reports the address of a group, which nothing can come from.
fn group(rule: &RuleConfig, refuse: &mut impl FnMut(&Path, &str, &str)) {
    if let KeyAddress::Is(address) = rule.key.address
        && (address.is_multicast() || address == Ipv4Addr::BROADCAST)
    {
        let why = "needs the address of a host: answers cannot come from a group";
        refuse(&key_address(rule), why, "leave `reply` out");
    }
}

/// Reports ways to upstreams of rules whose packets are sent to their addresses.
fn unused_ways(rule: &RuleConfig, diagnostics: &mut Diagnostics) {
    for upstream in rule.upstreams.iter().filter(|it| it.via.is_some()) {
        let at = upstream.at.field(words::UPSTREAM_VIA.field.name);
        diagnostics.push(Message::about(&at, "`via` needs `reply: direct`"));
    }
}

/// Reports upstreams without a way, and those to another port.
fn direct(rule: &RuleConfig, at: &Path, mut refuse: impl FnMut(&Path, &str, &str)) {
    if rule.via.is_none() && rule.upstreams.iter().any(|it| it.via.is_none()) {
        refuse(at, "needs `via`, for the rule or each upstream", "`via: link`, `ipip` or `gue`");
    }
    for upstream in rule.upstreams.iter().filter(|it| it.port.is_some()) {
        let why = "needs upstreams without `port`: packets keep their destination";
        refuse(&upstream.at.field(words::UPSTREAM_PORT.name), why, "leave the port out");
    }
}

fn option(rule: &RuleConfig, name: &'static str) -> Path {
    rule.at.field(words::OPTIONS.name).field(name)
}

/// Reports keys of several addresses, or of a group.
fn key(rule: &RuleConfig, refuse: &mut impl FnMut(&Path, &str, &str)) {
    if rule.key.address == KeyAddress::Any {
        let why = "needs one address, which answers come from, and `any` is several";
        refuse(&key_address(rule), why, "write a rule for each address");
    }
    group(rule, refuse);
}

/// Reports upstreams whose answers do not tell the port that they are to come from.
fn route(rule: &RuleConfig, mut refuse: impl FnMut(&Path, &str, &str)) {
    if rule.key.only_port().is_some() {
        return;
    }
    for upstream in rule.upstreams.iter().filter(|it| it.port.is_some()) {
        let why = "needs upstreams without `port` where the key has several ports: an answer from this \
                   port could be for any of them";
        let help = "leave the port out, or write a rule for each port";
        refuse(&upstream.at.field(words::UPSTREAM_PORT.name), why, help);
    }
}

/// Ports that an upstream of a rule answers from.
struct Answers<'a> {
    host: String,
    ports: Ports,
    rule: &'a RuleConfig,
    at: &'a Path,
}

/// Returns the answers of a rule's upstreams that come through this host.
fn answers(rule: &RuleConfig) -> impl Iterator<Item = Answers<'_>> {
    let upstreams = rule.upstreams.iter().filter(|_| rule.reply == Reply::Route);
    upstreams.flat_map(move |upstream| {
        let own = upstream.port.map(|port| Ports { first: port, last: port });
        let asked = rule.key.ports.iter().copied().filter(move |_| own.is_none());
        let any = (own.is_none() && rule.key.ports.is_empty()).then_some(ALL_PORTS);
        own.into_iter().chain(asked).chain(any).map(|ports| Answers {
            host: upstream.address.to_string().to_ascii_lowercase(),
            ports,
            rule,
            at: &upstream.at,
        })
    })
}

/// Reports upstreams whose answers could be for several rules.
pub(super) fn ambiguous(rules: &[RuleConfig], diagnostics: &mut Diagnostics) {
    let mut all: Vec<Answers<'_>> = rules.iter().flat_map(answers).collect();
    all.sort_by(|one, other| (&one.host, one.ports).cmp(&(&other.host, other.ports)));
    // The answers before with the highest last port.
    let mut reach: Option<&Answers<'_>> = None;
    for other in &all {
        let meets = |one: &&Answers<'_>| one.host == other.host && one.ports.overlaps(other.ports);
        let met = reach.filter(meets);
        if met.is_none_or(|one| one.ports.last < other.ports.last) {
            reach = Some(other);
        }
        let Some(one) = met.filter(|one| !std::ptr::eq(one.rule, other.rule)) else { continue };
        let message = format!(
            "answers of {} from port {} could be for rule `{}` or for rule `{}`",
            one.host, other.ports, one.rule.name, other.rule.name
        );
        let message = Message::about(other.at, message);
        let message = message.help("give the upstream another port or address in one of them");
        diagnostics.push(message.related(one.at.clone(), "the same upstream"));
    }
}
