//! The difference of two configurations, for people and for `-o json`. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use schemars::JsonSchema;
use serde::Serialize;

use crate::config::{ANY, Announce, Decap, Hash, Mode, Network, with_port};
use crate::desired::tables::moved_share;
use crate::desired::{Desired, Rule, Upstream};
use crate::maglev;

/// The changes that applying the new configuration would make.
#[derive(Clone, Debug, Default, PartialEq, Serialize, JsonSchema)]
pub struct Changes {
    pub attach: Vec<String>,
    pub detach: Vec<String>,
    /// Fields of `announce`; a field that is missing is `none`.
    pub announce: Vec<AttributeChange>,
    /// XDP modes of interfaces.
    pub xdp: Difference,
    /// Fields of `flows`.
    pub flows: Vec<AttributeChange>,
    /// Fields of `decap`; a field that is missing is `none`.
    pub decap: Vec<AttributeChange>,
    /// This host's addresses that `any` matches.
    pub addresses: Difference,
    pub added: Vec<RuleSummary>,
    pub removed: Vec<RuleSummary>,
    /// Rules in both configurations.
    pub altered: Vec<RuleChange>,
}

#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct RuleSummary {
    #[serde(rename = "rule")]
    pub name: String,
    pub key: String,
    /// Attribute and value, as in the file.
    pub attributes: BTreeMap<&'static str, String>,
    pub upstreams: Vec<String>,
    pub mirrors: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct RuleChange {
    #[serde(rename = "rule")]
    pub name: String,
    pub attributes: Vec<AttributeChange>,
    #[serde(flatten)]
    pub upstreams: Difference,
    pub mirrors: Difference,
    /// Share of the flows that move, 0 to 1.
    #[serde(rename = "moved_share")]
    pub moved: f64,
}

/// A changed attribute of a rule or an upstream, with both values.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct AttributeChange {
    pub attribute: &'static str,
    pub old: String,
    pub new: String,
}

/// Differences between two lists of addresses or upstreams.
#[derive(Clone, Debug, Default, PartialEq, Serialize, JsonSchema)]
pub struct Difference {
    pub added: Vec<String>,
    pub removed: Vec<String>,
    /// Upstreams in both lists that differ.
    pub altered: Vec<UpstreamChange>,
}

#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct UpstreamChange {
    pub upstream: String,
    pub attributes: Vec<AttributeChange>,
}

impl Changes {
    /// Compares `old` (empty if nothing is applied) with `new`. `attached` are the interfaces that have the
    /// filter now.
    pub fn new(old: &Desired, new: &Desired, attached: &[String]) -> Changes {
        let (before, after) = (by_name(&old.rules), by_name(&new.rules));
        let only = |these: &[Rule], others: &BTreeMap<&str, &Rule>| {
            let only = these.iter().filter(|rule| !others.contains_key(rule.name.as_str()));
            only.map(summary).collect()
        };
        let both =
            new.rules.iter().filter_map(|rule| Some((before.get(rule.name.as_str())?, rule)));
        Changes {
            attach: only_in(&new.interfaces, attached),
            detach: only_in(attached, &new.interfaces),
            announce: differing(announce(old), announce(new)),
            xdp: xdp(old, new),
            flows: differing(flows(old), flows(new)),
            decap: differing(decap(old), decap(new)),
            addresses: addresses(old, new),
            added: only(&new.rules, &before),
            removed: only(&old.rules, &after),
            altered: both.filter_map(|(old, new)| change(old, new)).collect(),
        }
    }

    /// Recomputes the share of flows that move, by the states of upstreams in `old` and `new`.
    pub fn count_moved(&mut self, old: &[Rule], new: &[Rule]) {
        let (before, after) = (by_name(old), by_name(new));
        for rule in &mut self.altered {
            let name = rule.name.as_str();
            if let (Some(then), Some(now)) = (before.get(name), after.get(name)) {
                rule.moved = rounded(moved_share(then, now));
            }
        }
    }

    pub fn is_empty(&self) -> bool {
        *self == Changes::default()
    }
}

fn by_name(rules: &[Rule]) -> BTreeMap<&str, &Rule> {
    rules.iter().map(|rule| (rule.name.as_str(), rule)).collect()
}

fn only_in(these: &[String], others: &[String]) -> Vec<String> {
    let others: BTreeSet<&String> = others.iter().collect();
    these.iter().filter(|it| !others.contains(it)).cloned().collect()
}

fn xdp(old: &Desired, new: &Desired) -> Difference {
    let all = |desired: &Desired| -> Vec<String> {
        desired.xdp.iter().map(|(name, xdp)| format!("{name}: {}", word(xdp))).collect()
    };
    let (old, new) = (all(old), all(new));
    Difference { added: only_in(&new, &old), removed: only_in(&old, &new), altered: Vec::new() }
}

fn addresses(old: &Desired, new: &Desired) -> Difference {
    let all = |desired: &Desired| -> Vec<String> {
        let any = desired.addresses.iter().map(|address| format!("{address} is one of `{ANY}`"));
        let broadcasts = desired.broadcasts.iter();
        let ports = desired.local_ports.iter();
        any.chain(broadcasts.map(|address| format!("{address} is a broadcast address")))
            .chain(ports.map(|ports| format!("{ports} are ports of this host's sockets")))
            .collect()
    };
    let (old, new) = (all(old), all(new));
    Difference { added: only_in(&new, &old), removed: only_in(&old, &new), altered: Vec::new() }
}

fn summary(rule: &Rule) -> RuleSummary {
    let attributes = attributes(rule).into_iter();
    RuleSummary {
        name: rule.name.clone(),
        key: key(rule),
        attributes: attributes.filter(|(attribute, _)| *attribute != KEY).collect(),
        upstreams: rule.upstreams.iter().map(endpoint).collect(),
        mirrors: rule.mirrors.iter().map(endpoint).collect(),
    }
}

fn change(old: &Rule, new: &Rule) -> Option<RuleChange> {
    if old == new {
        return None;
    }
    Some(RuleChange {
        name: new.name.clone(),
        attributes: differing(attributes(old), attributes(new)),
        upstreams: difference((old, &old.upstreams), (new, &new.upstreams)),
        mirrors: difference((old, &old.mirrors), (new, &new.mirrors)),
        moved: rounded(moved_share(old, new)),
    })
}

const KEY: &str = "key";

/// Returns attributes of a rule and their values, in the order of the file.
fn attributes(rule: &Rule) -> Vec<(&'static str, String)> {
    let mut attributes = vec![
        (KEY, key(rule)),
        ("tc_action", word(&rule.action)),
        ("mode", word(&rule.mode)),
        ("strategy", word(&rule.strategy)),
        ("payload", payload(rule)),
        ("server-id", rule.server_id.map_or("none".into(), |it| bytes_at(it.length, it.offset))),
        ("hash", word(&rule.hash)),
        ("templates", word(&rule.templates)),
        ("source", word(&rule.source)),
        ("reply", word(&rule.reply)),
        ("answers", rule.answers.map_or("none".into(), |answers| answers.to_string())),
        ("sticky", rule.sticky.to_string()),
        ("via", rule.via.map_or("none".into(), |via| word(&via))),
        ("health", rule.health.to_string()),
        ("all-down", word(&rule.all_down)),
        ("fragments", word(&rule.fragments)),
        ("zero-checksum", word(&rule.zero_checksum)),
        ("martians", word(&rule.martians)),
        ("senders", rule.senders.map_or("none".into(), |senders| senders.to_string())),
    ];
    attributes.extend(slots(rule).map(|slots| ("slots", slots.to_string())));
    attributes
}

/// Returns the fields of `announce` and their values.
fn announce(desired: &Desired) -> Vec<(&'static str, String)> {
    let text = |value: fn(&Announce) -> String| match &desired.announce {
        Some(announce) => value(announce),
        None => "none".into(),
    };
    vec![
        ("interface", text(|it| it.interface.clone())),
        ("last_resort", text(|it| it.last_resort.clone().unwrap_or("none".into()))),
        ("hold_down", text(|it| it.hold_down.to_string())),
        ("settle", text(|it| it.settle.to_string())),
        ("expire", text(|it| it.expire.to_string())),
    ]
}

/// Returns the fields of `flows` and their values.
fn flows(desired: &Desired) -> Vec<(&'static str, String)> {
    let flows = &desired.flows;
    let addresses = flows.addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let addresses = if addresses.is_empty() { "none".into() } else { addresses };
    vec![
        ("entries", flows.entries.to_string()),
        ("ports", flows.ports.to_string()),
        ("addresses", addresses),
        ("unanswered", flows.unanswered.to_string()),
        ("assured", flows.assured.to_string()),
    ]
}

/// Returns the fields of `decap` and their values.
fn decap(desired: &Desired) -> Vec<(&'static str, String)> {
    let text = |value: fn(&Decap) -> String| desired.decap.as_ref().map_or("none".into(), value);
    vec![
        ("from", text(|it| networks(&it.from, ""))),
        ("via", text(|it| it.via.iter().map(word).collect::<Vec<_>>().join(","))),
    ]
}

/// Formats a share to a tenth of a percent.
fn rounded(share: f64) -> f64 {
    (share * 1000.0).round() / 1000.0
}

/// Returns the size of a rule's table if its weights determine it. A change of size moves most flows.
fn slots(rule: &Rule) -> Option<u32> {
    let weights: Vec<u32> = rule.preferred().map(|(_, upstream)| upstream.weight).collect();
    let weighted = rule.mode == Mode::Balance && rule.hash == Hash::Maglev;
    weighted.then(|| maglev::size(&weights).ok()).flatten()
}

/// Returns the attributes in both lists whose values differ.
fn differing(
    old: Vec<(&'static str, String)>,
    new: Vec<(&'static str, String)>,
) -> Vec<AttributeChange> {
    let old: BTreeMap<&str, String> = old.into_iter().collect();
    let change = |(attribute, new): (&'static str, String)| {
        let old = old.get(attribute).filter(|old| **old != new)?.clone();
        Some(AttributeChange { attribute, old, new })
    };
    new.into_iter().filter_map(change).collect()
}

/// Returns the differences between two lists of upstreams or mirrors.
fn difference(
    (old, before): (&Rule, &[Upstream]),
    (new, after): (&Rule, &[Upstream]),
) -> Difference {
    let endpoints = |list: &[Upstream]| list.iter().map(endpoint).collect::<Vec<_>>();
    let known: BTreeMap<String, &Upstream> =
        before.iter().map(|upstream| (endpoint(upstream), upstream)).collect();
    let altered = |upstream: &Upstream| {
        let endpoint = endpoint(upstream);
        let before = known.get(&endpoint)?;
        // A source that both inherit is shown at the rule.
        let own = before.source.is_some() || upstream.source.is_some();
        let own_via = before.via.is_some() || upstream.via.is_some();
        let attributes = |rule: &Rule, upstream: &Upstream| {
            let mut attributes = vec![
                ("weight", upstream.weight.to_string()),
                ("priority", upstream.priority.to_string()),
                ("state", word(&upstream.state)),
                ("sample", upstream.sample.to_string()),
                (
                    "server-id",
                    upstream.server_id.as_ref().map_or("none".into(), ToString::to_string),
                ),
                ("from", networks(&upstream.from, "any")),
                ("not-from", networks(&upstream.not_from, "none")),
            ];
            attributes.extend(own.then(|| ("source", word(&rule.source_of(upstream)))));
            let via = rule.via_of(upstream).filter(|_| own_via);
            attributes.extend(via.map(|via| ("via", word(&via))));
            attributes
        };
        let attributes = differing(attributes(old, before), attributes(new, upstream));
        (!attributes.is_empty()).then_some(UpstreamChange { upstream: endpoint, attributes })
    };
    Difference {
        added: only_in(&endpoints(after), &endpoints(before)),
        removed: only_in(&endpoints(before), &endpoints(after)),
        altered: after.iter().filter_map(altered).collect(),
    }
}

/// Returns a value's word in the file, or its list of words.
pub fn word(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        Ok(serde_json::Value::Array(list)) => {
            format!("[{}]", list.iter().map(word).collect::<Vec<_>>().join(", "))
        }
        other => format!("{other:?}"),
    }
}

fn bytes_at(length: u8, offset: impl fmt::Display) -> String {
    format!("{length} bytes at {offset}")
}

fn payload(rule: &Rule) -> String {
    match rule.payload {
        None => "none".into(),
        Some(payload) => match (payload.word(), payload.bytes()) {
            (None, Some((offset, length))) => bytes_at(length, offset),
            (word, _) => word.unwrap_or_default().into(),
        },
    }
}

/// Formats a rule's key: `10.0.0.5:2055,4739,6343-6350 from 10.20.0.0/16`.
pub fn key(rule: &Rule) -> String {
    let list = |items: Vec<String>| items.join(",");
    let key = &rule.key;
    let ports = match key.ports.is_empty() {
        true => ANY.into(),
        false => list(key.ports.iter().map(ToString::to_string).collect()),
    };
    let mut text = with_port(key.address, ports);
    for (word, list) in [("from", &key.from), ("not from", &key.not_from)] {
        if !list.is_empty() {
            text += &format!(" {word} {}", networks(list, ""));
        }
    }
    text
}

/// Lists networks; `none` stands for an empty list.
fn networks(networks: &[Network], none: &str) -> String {
    match networks {
        [] => none.into(),
        _ => networks.iter().map(ToString::to_string).collect::<Vec<_>>().join(","),
    }
}

/// Returns an upstream's endpoint, `nfcapd 10.0.9.11:2055`, without a port if it keeps the packet's.
pub fn endpoint(upstream: &Upstream) -> String {
    let mut text = match &upstream.name {
        Some(name) => format!("{name} "),
        None => String::new(),
    };
    let host = upstream.host.to_string();
    let address = if upstream.is_local() { host.clone() } else { upstream.address.to_string() };
    if host != address {
        text += &format!("{host} ");
    }
    text += &match upstream.port {
        Some(port) => with_port(address, port),
        None => address,
    };
    text
}

impl fmt::Display for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for name in &self.attach {
            writeln!(f, "+ interface {name}")?;
        }
        for name in &self.detach {
            writeln!(f, "- interface {name}: detached")?;
        }
        if !self.announce.is_empty() {
            writeln!(f, "~ announce")?;
        }
        for attribute in &self.announce {
            writeln!(f, "    {attribute}")?;
        }
        self.xdp.lines(f, "", "XDP on")?;
        if !self.flows.is_empty() {
            writeln!(f, "~ flows")?;
        }
        for attribute in &self.flows {
            writeln!(f, "    {attribute}")?;
        }
        if !self.decap.is_empty() {
            writeln!(f, "~ decap")?;
        }
        for attribute in &self.decap {
            writeln!(f, "    {attribute}")?;
        }
        self.addresses.lines(f, "", "address")?;
        for rule in &self.added {
            writeln!(f, "+ rule {rule}")?;
            for (attribute, value) in &rule.attributes {
                writeln!(f, "    {attribute}: {value}")?;
            }
        }
        for rule in &self.removed {
            writeln!(f, "- rule {rule}")?;
        }
        for rule in &self.altered {
            let percent = (rule.moved * 1000.0).round() / 10.0;
            writeln!(f, "~ rule {}: {percent} % of its flows move", rule.name)?;
            for attribute in &rule.attributes {
                writeln!(f, "    {attribute}")?;
            }
            rule.upstreams.lines(f, "    ", "upstream")?;
            rule.mirrors.lines(f, "    ", "mirror")?;
        }
        Ok(())
    }
}

impl fmt::Display for RuleSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RuleSummary { name, key, upstreams, mirrors, .. } = self;
        write!(f, "{name} ({key}) -> {}", upstreams.join(", "))?;
        match mirrors.is_empty() {
            true => Ok(()),
            false => write!(f, "; copies to {}", mirrors.join(", ")),
        }
    }
}

impl fmt::Display for AttributeChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} -> {}", self.attribute, self.old, self.new)
    }
}

impl fmt::Display for UpstreamChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let attributes: Vec<String> = self.attributes.iter().map(ToString::to_string).collect();
        write!(f, "{}: {}", self.upstream, attributes.join(", "))
    }
}

impl Difference {
    fn lines(&self, f: &mut fmt::Formatter<'_>, indent: &str, what: &str) -> fmt::Result {
        for item in &self.added {
            writeln!(f, "{indent}+ {what} {item}")?;
        }
        for item in &self.removed {
            writeln!(f, "{indent}- {what} {item}")?;
        }
        for item in &self.altered {
            writeln!(f, "{indent}~ {what} {item}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Changes;
    use crate::config::{Action, Config};
    use crate::desired::Desired;

    fn desired(rules: &str) -> Desired {
        let text = format!("version: 1\ninterfaces: [b, a]\nrules:\n{rules}");
        let config = Config::parse("test.yaml", &text).expect("a good configuration");
        Desired::written(&config, &config.interfaces)
    }

    const ONE: &str = "
- name: one
  key: { address: 10.0.0.5, port: [5, 7-9] }
  options: { hash: modulo }
  upstream: [{ name: x, address: 10.0.9.1 }, { address: 10.0.9.2, port: 8 }]
";
    const TWO: &str = "
- key: { address: 10.0.0.5, port: 6 }
  options: { hash: modulo }
  upstream: [{ address: 10.0.9.1 }]
";

    #[test]
    fn nothing() {
        let one = desired(ONE);
        let attached = ["a".to_string(), "b".to_string()];
        let changes = Changes::new(&one, &one, &attached);
        assert!(changes.is_empty());
        assert_eq!(changes.to_string(), "");
    }

    #[test]
    fn every_field_of_a_rule_and_its_hosts() {
        let old = desired(
            "
- name: one
  key: { address: any, port: any, from: 10.0.0.0/8 }
  options: { hash: modulo, source: preserve }
  upstream: [{ address: 10.0.9.1 }, { address: 10.0.9.2, source: vip }]
  mirror: [{ address: 10.0.9.3 }, { address: 10.0.9.4, port: 1 }]
",
        );
        let mut new = desired(
            "
- name: one
  key: { address: 10.0.0.5, port: 53, from: [10.0.0.0/8, 192.0.2.1] }
  options: { strategy: [src-ip, payload], payload: { offset: 4, length: 2 }, templates: all, fragments: drop }
  upstream: [{ address: 10.0.9.1, weight: 2, state: drained }, { address: 10.0.9.2 }]
  mirror: [{ address: 10.0.9.3, source: egress, sample: 9 }]
",
        );
        let attached = ["a".to_string(), "b".to_string()];
        let text = Changes::new(&old, &new, &attached).to_string();
        let (first, rest) = text.split_once('\n').expect("lines");
        assert!(first.starts_with("~ rule one: ") && first.ends_with(" % of its flows move"));
        assert_eq!(
            rest,
            "    key: any:any from 10.0.0.0/8 -> 10.0.0.5:53 from 10.0.0.0/8,192.0.2.1\n    \
             strategy: src-ip-port -> [src-ip, payload]\n    payload: none -> 2 bytes at 4\n    \
             hash: modulo -> maglev\n    templates: one -> all\n    source: preserve -> vip\n    \
             fragments: follow -> drop\n    \
             ~ upstream 10.0.9.1: weight: 1 -> 2, state: active -> drained\n    \
             - mirror 10.0.9.4:1\n    \
             ~ mirror 10.0.9.3: sample: 1 -> 9, source: preserve -> egress\n"
        );
        new.rules.truncate(0);
        let old = Desired { addresses: vec![[10, 0, 0, 5].into()], ..old };
        let new = Desired { broadcasts: vec![[10, 0, 0, 255].into()], ..new };
        assert_eq!(
            Changes::new(&old, &new, &attached).to_string(),
            "+ address 10.0.0.255 is a broadcast address\n\
             - address 10.0.0.5 is one of `any`\n\
             - rule one (any:any from 10.0.0.0/8) -> 10.0.9.1, 10.0.9.2; \
             copies to 10.0.9.3, 10.0.9.4:1\n"
        );
    }

    #[test]
    fn weights_that_need_another_table() {
        let weighted = |weight: u32| {
            desired(&format!(
                "
- name: one
  key: {{ address: 10.0.0.5, port: 53 }}
  upstream: [{{ address: 10.0.9.1 }}, {{ address: 10.0.9.2, weight: {weight} }}]
"
            ))
        };
        let attributes = |old: u32, new: u32| {
            let changes = Changes::new(&weighted(old), &weighted(new), &[]);
            changes.altered[0].attributes.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(attributes(1, 99), Vec::<String>::new());
        assert_eq!(attributes(1, 100), ["slots: 10007 -> 100003"]);
        assert_eq!(attributes(9999, 100), ["slots: 1000003 -> 100003"]);
    }

    #[test]
    fn everything() {
        let mut new = desired(&[ONE, TWO].concat());
        let from_nothing = Changes::new(&Desired::default(), &new, &[]);
        let attributes = "    all-down: open\n    answers: none\n    fragments: follow\n    hash: modulo\n    health: off\n    \
             martians: deny\n    mode: balance\n    payload: none\n    reply: none\n    senders: none\n    server-id: none\n    \
             source: vip\n    sticky: false\n    strategy: src-ip-port\n    tc_action: pass\n    templates: one\n    via: none\n    zero-checksum: deny\n";
        assert_eq!(
            from_nothing.to_string(),
            format!(
                "+ interface a\n+ interface b\n\
                 + rule one (10.0.0.5:5,7-9) -> x 10.0.9.1, 10.0.9.2:8\n{attributes}\
                 + rule 10.0.0.5:6 (10.0.0.5:6) -> 10.0.9.1\n{attributes}"
            )
        );
        let old = desired(ONE);
        new.interfaces = vec!["c".into()];
        new.rules[0].action = Action::Block;
        new.rules[0].upstreams[1].port = Some(9);
        let attached = ["a".to_string()];
        assert_eq!(
            Changes::new(&old, &new, &attached).to_string(),
            format!(
                "+ interface c\n- interface a: detached\n\
                 + rule 10.0.0.5:6 (10.0.0.5:6) -> 10.0.9.1\n{attributes}\
                 ~ rule one: 50 % of its flows move\n    tc_action: pass -> block\n    \
                 + upstream 10.0.9.2:9\n    - upstream 10.0.9.2:8\n"
            )
        );
    }
}
