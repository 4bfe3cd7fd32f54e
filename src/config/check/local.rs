//! Checks of upstreams on this host: `address: local`.

use std::collections::BTreeMap;

use super::ALL_PORTS;
use crate::config::diagnostic::{Diagnostics, Message};
use crate::config::vocabulary as words;
use crate::config::{
    Action, Host, KeyAddress, Mode, Ports, Reply, RuleConfig, Source, UpstreamConfig,
};

/// Reports upstreams on this host in rules whose upstreams answer, copies without a port of their own, and
/// sources of packets that keep theirs.
pub(super) fn check(rule: &RuleConfig, diagnostics: &mut Diagnostics) {
    let upstreams = rule.upstreams.iter().map(|it| (it, false));
    let all = upstreams.chain(rule.mirrors.iter().map(|it| (it, true)));
    for (upstream, is_mirror) in all.filter(|(it, _)| it.address == Host::Local) {
        let at = upstream.at.field(words::UPSTREAM_ADDRESS.name);
        if !is_mirror && rule.reply != Reply::None {
            let message =
                "`reply` needs upstreams on other hosts: a receiver here answers by itself";
            let help = "leave `reply` out, or use a rule of its own";
            diagnostics.push(Message::about(&at, message).help(help));
        }
        let is_copy = is_mirror || rule.action == Action::Pass || rule.mode == Mode::Replicate;
        if is_copy && upstream.port.is_none() {
            let message =
                "a copy to this host needs a `port`: at the key's own it would match again";
            let help = "`tc_action: pass` delivers the packet itself at its own port";
            diagnostics.push(Message::about(&at, message).help(help));
        }
        if upstream.source.is_some_and(|source| source != Source::Preserve) {
            let message = "packets to this host keep their sender (`source: preserve`)";
            let at = upstream.at.field(words::UPSTREAM_SOURCE.field.name);
            diagnostics.push(Message::about(&at, message).help("leave `source` out"));
        }
    }
}

/// Reports ports of upstreams on this host that are ports of a key too: their packets would match again.
pub(super) fn matched(rules: &[RuleConfig], diagnostics: &mut Diagnostics) {
    let mut keys: BTreeMap<KeyAddress, Vec<&RuleConfig>> = BTreeMap::new();
    for rule in rules {
        keys.entry(rule.key.address).or_default().push(rule);
    }
    for rule in rules {
        for upstream in rule.destinations().filter(|it| it.address == Host::Local) {
            let Some(port) = upstream.port else { continue };
            let others: Vec<&&RuleConfig> = match rule.key.address {
                KeyAddress::Any => keys.values().flatten().collect(),
                address => {
                    let both = [address, KeyAddress::Any].into_iter();
                    both.filter_map(|address| keys.get(&address)).flatten().collect()
                }
            };
            let meets_key =
                |it: &&&RuleConfig| it.family() == rule.family() && it.key.has_port(port);
            if let Some(other) = others.into_iter().find(meets_key) {
                diagnostics.push(meets(rule, upstream, other, port));
            }
        }
    }
}

fn meets(rule: &RuleConfig, upstream: &UpstreamConfig, other: &RuleConfig, port: u16) -> Message {
    let any = [ALL_PORTS];
    let ports: &[Ports] = if other.key.ports.is_empty() { &any } else { &other.key.ports };
    let nth = ports.iter().position(|ports| ports.contains(port)).unwrap_or(0);
    let message = format!(
        "port {port} of this host is matched by rule `{}`: packets of rule `{}` would match again",
        other.name, rule.name
    );
    let at = upstream.at.field(words::UPSTREAM_PORT.name);
    let key = other.at.field(words::KEY.name).field(words::KEY_PORT.name);
    let key = if ports.len() > 1 { key.index(nth) } else { key };
    let message = Message::about(&at, message).help("listen on a port that is no key's");
    message.related(key, "the key")
}
