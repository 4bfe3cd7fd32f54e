//! The active configuration as a configuration file. Pure.

use serde_json::{Map, Value, json};

use crate::config::{ANY, Addresses, Flows, Key, Mode, Ports, State, Templates};
use crate::desired::{Desired, Rule, Upstream};

/// Returns the map form of the configuration with every option. Host names stay names, and hosts that are
/// missing now are included.
pub fn document(desired: &Desired) -> Value {
    let desired = desired.as_written();
    let interface = |name: &String| match desired.xdp.get(name) {
        Some(xdp) => json!({ "name": name, "xdp": xdp }),
        None => json!(name),
    };
    let interfaces: Vec<Value> = desired.interfaces.iter().map(interface).collect();
    let mut document = json!({ "version": 1, "interfaces": interfaces });
    if let Some(announce) = &desired.announce {
        document["announce"] = json!(announce);
    }
    if desired.flows != Flows::default() {
        let flows = &desired.flows;
        document["flows"] = json!({
            "entries": flows.entries,
            "ports": flows.ports.to_string(),
            "unanswered": flows.unanswered,
            "assured": flows.assured,
        });
        if !flows.addresses.is_empty() {
            document["flows"]["addresses"] = json!(flows.addresses);
        }
    }
    if let Some(decap) = &desired.decap {
        document["decap"] = json!(decap);
    }
    document["rules"] = desired.rules.iter().map(rule).collect();
    document
}

fn rule(rule: &Rule) -> Value {
    let mut value = json!({
        "name": rule.name,
        "key": key(&rule.key),
        "options": options(rule),
        "upstream": rule.upstreams.iter().map(host).collect::<Vec<_>>(),
    });
    if !rule.mirrors.is_empty() {
        value["mirror"] = rule.mirrors.iter().map(host).collect();
    }
    value
}

fn key(key: &Key) -> Value {
    let mut value = json!({ "address": key.address, "port": ports(&key.ports) });
    if !key.from.is_empty() {
        value["from"] = json!(key.from);
    }
    if !key.not_from.is_empty() {
        value["not-from"] = json!(key.not_from);
    }
    value
}

fn ports(ports: &[Ports]) -> Value {
    let spelled = |ports: &Ports| match ports.first == ports.last {
        true => json!(ports.first),
        false => json!(ports.to_string()),
    };
    match ports {
        [] => json!(ANY),
        [one] => spelled(one),
        several => several.iter().map(spelled).collect(),
    }
}

fn options(rule: &Rule) -> Value {
    let mut options = json!({
        "tc_action": rule.action,
        "mode": rule.mode,
        "source": rule.source,
        "reply": rule.reply,
        "health": rule.health,
        "all-down": rule.all_down,
        "fragments": rule.fragments,
        "zero-checksum": rule.zero_checksum,
        "martians": rule.martians,
    });
    if rule.templates != Templates::One {
        options["templates"] = json!(rule.templates);
    }
    if rule.mode == Mode::Balance {
        options["strategy"] = json!(rule.strategy);
        options["hash"] = json!(rule.hash);
    }
    if let Some(via) = rule.via {
        options["via"] = json!(via);
    }
    if let Some(senders) = rule.senders {
        options["senders"] = json!(senders);
    }
    if let Some(answers) = rule.answers {
        options["answers"] = json!(answers);
    }
    if let Some(place) = rule.server_id {
        options["server-id"] = json!(place);
    }
    if rule.sticky {
        options["sticky"] = json!(true);
    }
    if let Some(payload) = rule.payload {
        options["payload"] = match (payload.word(), payload.bytes()) {
            (None, Some((offset, length))) => json!({ "offset": offset, "length": length }),
            (word, _) => json!(word),
        };
    }
    options
}

/// Returns the fields of an upstream or a mirror.
pub fn host(upstream: &Upstream) -> Value {
    let mut fields = Map::new();
    let mut say = |field: &str, value: Value| fields.insert(field.into(), value);
    if let Some(name) = &upstream.name {
        say("name", json!(name));
    }
    say("address", json!(upstream.host));
    if upstream.addresses == Addresses::All {
        say("addresses", json!(upstream.addresses));
    }
    if let Some(port) = upstream.port {
        say("port", json!(port));
    }
    if upstream.weight != 1 {
        say("weight", json!(upstream.weight));
    }
    if upstream.priority != 1 {
        say("priority", json!(upstream.priority));
    }
    if upstream.state != State::Active {
        say("state", json!(upstream.state));
    }
    if let Some(source) = upstream.source {
        say("source", json!(source));
    }
    if let Some(via) = upstream.via {
        say("via", json!(via));
    }
    if let Some(id) = &upstream.server_id {
        say("server-id", json!(id));
    }
    if upstream.sample != 1 {
        say("sample", json!(upstream.sample));
    }
    for (field, networks) in [("from", &upstream.from), ("not-from", &upstream.not_from)] {
        if !networks.is_empty() {
            say(field, json!(networks));
        }
    }
    Value::Object(fields)
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv6Addr};

    use proptest::collection::{btree_set, vec};
    use proptest::option;
    use proptest::prelude::*;
    use proptest::sample::{select, subsequence};

    use super::document;
    use crate::config::{
        Action, Address, Admission, AllDown, Announce, Check, Config, Decap, Family, Fragments,
        Hash, Health, Host, Key, KeyAddress, Mode, Network, Payload, Period, Ports, Probe, Source,
        State, Strategy as Selection, StrategyPart, Templates, Via,
    };
    use crate::desired::dns::Answers;
    use crate::desired::partial::{Known, resolve};
    use crate::desired::{Desired, Rule, Upstream};

    const NAMES: [&str; 4] = ["logs.example.net", "a", "true.example", "0x1f.example"];

    /// An address in network 10.0.`place`.0/24 or 2001:db8:`place`::/48.
    fn ip(family: Family, place: u8, last: u8) -> IpAddr {
        match family {
            Family::V4 => [10, 0, place, last].into(),
            Family::V6 => {
                Ipv6Addr::new(0x2001, 0xdb8, place.into(), 0, 0, 0, 0, last.into()).into()
            }
        }
    }

    /// The addresses of the host names.
    fn names() -> Answers {
        let families = [Family::V4, Family::V6].into_iter();
        let names = families.flat_map(|family| NAMES.map(|name| (name, family)));
        let numbered = names.zip(1..);
        numbered
            .map(|((name, family), last)| ((name.into(), family), Ok([ip(family, 8, last)].into())))
            .collect()
    }

    fn resolved(written: &Desired) -> Desired {
        let (own, shrunk) = Default::default();
        resolve(written, &Known { answers: &names(), own: &own, serving: None, shrunk: &shrunk })
            .desired
    }

    fn address(family: Family) -> BoxedStrategy<Address> {
        let host = (1..250_u8).prop_map(move |last| ip(family, 9, last).into()).boxed();
        match family {
            Family::V4 => host,
            Family::V6 => {
                let link_local = ("[a-z0-9.]{3,15}", 1..99_u16).prop_map(|(scope, last)| Address {
                    ip: Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, last).into(),
                    scope: Some(scope),
                });
                prop_oneof![host, link_local].boxed()
            }
        }
    }

    /// Generates distinct hosts without options that depend on the rule; names begin with `prefix`.
    fn hosts(family: Family, prefix: &'static str) -> impl Strategy<Value = Vec<Upstream>> {
        let host = prop_oneof![
            address(family).prop_map(Host::Address),
            select(NAMES.to_vec()).prop_map(|name| Host::Name(name.into())),
        ];
        // Names that must be quoted in YAML.
        let names = btree_set("[a-z0-9][a-z0-9.:-]{0,8}|null|yes|1e3|0o7|~|1:30", 5);
        let states = select(vec![State::Active, State::Drained]);
        let list = vec((host, option::of(1..=u16::MAX), any::<bool>(), states), 1..5);
        (list, names).prop_map(move |(mut list, names)| {
            let mut seen = Vec::new();
            list.retain(|(host, port, ..)| {
                let new = !seen.contains(&(host.clone(), *port));
                seen.push((host.clone(), *port));
                new
            });
            list.into_iter()
                .zip(names)
                .map(|((host, port, named, state), name)| {
                    let address = match &host {
                        Host::Address(address) => address.clone(),
                        Host::Name(name) => match &self::names()[&(name.clone(), family)] {
                            Ok(found) => (*found.first().expect("an address")).into(),
                            Err(no) => panic!("{}", no.cause),
                        },
                        Host::Local => unreachable!("it is not generated"),
                    };
                    let name = named.then(|| format!("{prefix}{name}"));
                    Upstream { name, host, state, ..Upstream::new(address, port) }
                })
                .collect()
        })
    }

    /// Generates a key that no rule at another place has.
    fn key(place: u8, family: Family) -> impl Strategy<Value = Key> {
        let first = u16::from(place) * 200;
        let range = (0..30_u16, 0..30_u16).prop_map(move |(low, more)| Ports {
            first: first + 1 + low,
            last: first + 1 + low + more,
        });
        let lone = Just(Ports { first: first + 150, last: first + 150 });
        let ports = (option::of(range), lone)
            .prop_map(|(range, lone)| range.into_iter().chain([lone]).collect::<Vec<_>>());
        let own = KeyAddress::Is(ip(family, 0, place));
        let whole = (Just(own), prop_oneof![ports.clone(), Just(Vec::new())]);
        let address = prop_oneof![whole, (Just(KeyAddress::Any), ports)];
        let network = match family {
            Family::V4 => select(vec!["10.0.0.0/8", "10.20.0.0/16", "192.0.2.1", "0.0.0.0/0"]),
            Family::V6 => select(vec!["::/0", "2001:db8::/32", "2001:db8::5", "fe80::/10"]),
        };
        (address, btree_set(network, 0..3)).prop_map(move |((address, ports), from)| {
            let mut from: Vec<Network> =
                from.into_iter().map(|text| text.parse().expect("a network")).collect();
            if from.is_empty() && address == KeyAddress::Any {
                // Host names alone do not determine the family.
                from.push(ip(family, 20, 1).into());
            }
            let not_from = if from.len() > 1 { from.split_off(1) } else { Vec::new() };
            Key { address, ports, from, not_from }
        })
    }

    fn announce() -> impl Strategy<Value = Announce> {
        let period = |text: &str| text.parse().expect("a duration");
        let hold_downs = select(["0s", "500ms", "10s", "1h"].map(period).to_vec());
        let settles = select(["0s", "1ms", "2m"].map(period).to_vec());
        let last_resort = option::of(Just("anycast1".to_string()));
        let all = (last_resort, hold_downs, settles, any::<bool>());
        all.prop_map(|(last_resort, hold_down, settle, expire)| Announce {
            interface: "anycast0".into(),
            last_resort,
            hold_down,
            settle,
            expire,
        })
    }

    /// Generates health checks, with ports of their own.
    fn health() -> impl Strategy<Value = (Health, AllDown)> {
        let port = Some(5353);
        let checks = [
            Check::Udp { send: "0x00ff".into(), expect: Some("0x?1".into()), port },
            Check::Udp { send: "ping\n".into(), expect: None, port },
            Check::Tcp(514),
            Check::Http { port, path: "/healthz".into(), status: Some(204) },
            Check::Icmp {},
            Check::Dns { port, name: Some("example.org".into()) },
            Check::Ntp { port },
            Check::Snmp { port, community: "0x".into() },
            Check::Sip { port },
            Check::Radius { port, secret: "1: {".into() },
            Check::Syslog { port },
        ];
        let pace = (10..=60_000_u32, 60_000..=3_600_000_u32, 1..=100_u32, 1..=100_u32);
        let probe = (select(checks.to_vec()), pace).prop_map(|(check, pace)| {
            let (timeout, interval, rise, fall) = pace;
            let [timeout, interval] = [timeout, interval].map(Period::from_millis);
            Health::Probe(Box::new(Probe { check, interval, timeout, rise, fall }))
        });
        let words = select(vec![Health::Off, Health::Neighbour]);
        (prop_oneof![words, probe], select(vec![AllDown::Open, AllDown::Drop]))
    }

    /// Generates rules with distinct keys.
    fn rule(place: u8) -> impl Strategy<Value = Rule> {
        let sources = || vec![Source::Vip, Source::Preserve, Source::Egress];
        let words = (
            select(vec![Action::Pass, Action::Block]),
            select(sources()),
            health(),
            select(vec![Fragments::Follow, Fragments::Pass, Fragments::Drop]),
            select(vec![Admission::Deny, Admission::Allow]),
            select(vec![Admission::Deny, Admission::Allow]),
            select(vec![
                (Mode::Balance, Templates::One),
                (Mode::Balance, Templates::All),
                (Mode::Replicate, Templates::One),
            ]),
            select(vec![Hash::Modulo, Hash::Maglev]),
            option::of(16..=262_144_u32),
        );
        let list = |parts: &[StrategyPart]| Selection::Parts(parts.to_vec().into());
        let strategies = vec![
            Selection::SrcPort,
            Selection::SrcIp,
            Selection::SrcIpPort,
            Selection::DstPort,
            Selection::Random,
            list(&[StrategyPart::SrcIp, StrategyPart::DstPort]),
        ];
        let with_payload = vec![
            Selection::Payload,
            list(&[StrategyPart::SrcIp, StrategyPart::Payload]),
            list(&[StrategyPart::SrcIp, StrategyPart::SrcPort, StrategyPart::Payload]),
        ];
        let payload = prop_oneof![
            select(Payload::WORDS.map(|(_, payload)| payload).to_vec()),
            (0..=u16::MAX, 1..=64_u8)
                .prop_map(|(offset, length)| Payload::Bytes { offset, length }),
        ];
        let selection = prop_oneof![
            select(strategies).prop_map(|strategy| (strategy, None)),
            (select(with_payload), payload.prop_map(Some)),
        ];
        // Options of a host: weight, source, and sample or priority.
        let own = vec((1..100_u32, option::of(select(sources())), 1..=255_u32), 10);
        let hosts = select(vec![Family::V4, Family::V6]).prop_flat_map(move |family| {
            (key(place, family), hosts(family, "u"), option::of(hosts(family, "m")))
        });
        (words, selection, hosts, own).prop_map(move |(words, selection, hosts, own)| {
            let (key, upstreams, mirrors) = hosts;
            let (action, source, health, fragments, zero_checksum, martians, mode, hash, senders) =
                words;
            let (mode, templates) = mode;
            let (strategy, payload) = match (selection, key.only_port()) {
                // refused
                ((strategy, _), Some(_)) if strategy.reads_dst_port() => (Selection::SrcIp, None),
                (selection, _) => selection,
            };
            let mirrors = mirrors.unwrap_or_default();
            let rule = Rule::new(format!("r{place}"), key, upstreams);
            let mut rule = match mode {
                Mode::Balance => Rule { strategy, payload, hash, templates, mirrors, ..rule },
                Mode::Replicate => rule,
            };
            let mut own = own.into_iter();
            for (upstream, (weight, own, sample)) in rule.upstreams.iter_mut().zip(&mut own) {
                upstream.source = own.filter(|own| *own != source);
                match (mode, hash) {
                    (Mode::Replicate, _) => upstream.sample = sample,
                    (Mode::Balance, Hash::Maglev) => {
                        (upstream.weight, upstream.priority) = (weight, sample);
                    }
                    (Mode::Balance, Hash::Modulo) => upstream.priority = sample,
                }
            }
            for (mirror, (_, own, sample)) in rule.mirrors.iter_mut().zip(own) {
                mirror.source = own.filter(|own| *own != source);
                mirror.sample = sample;
            }
            let (health, all_down) = health;
            let rule = Rule { health, all_down, fragments, zero_checksum, martians, ..rule };
            Rule { action, mode, source, senders, ..rule }
        })
    }

    fn decap() -> impl Strategy<Value = Decap> {
        let network = |text: &str| text.parse().expect("a network");
        let networks = ["10.2.0.0/24", "10.3.0.1", "2001:db8::/32"].map(network).to_vec();
        let all = (subsequence(networks, 1..=3), subsequence(vec![Via::Ipip, Via::Gue], 1..=2));
        all.prop_map(|(from, via)| Decap { from, via })
    }

    proptest! {
        #[test]
        fn applies_to_the_same(
            rules in (0..5_u8).prop_flat_map(|count| (1..=count).map(rule).collect::<Vec<_>>()),
            interfaces in subsequence(vec!["eth0", "no", "1e3", "wlp0s20f3"], 1..4),
            announce in option::of(announce()),
            decap in option::of(decap()),
        ) {
            let mut interfaces: Vec<String> = interfaces.into_iter().map(String::from).collect();
            interfaces.sort();
            let desired = Desired { interfaces, announce, decap, rules, ..Desired::default() };
            let text = serde_yaml::to_string(&document(&desired)).expect("YAML");
            for text in [text, document(&desired).to_string()] {
                let config = Config::parse("list.yaml", &text)
                    .unwrap_or_else(|errors| panic!("{}\n{text}", errors[0]));
                let written = Desired::written(&config, &config.interfaces);
                let again = resolved(&written);
                prop_assert_eq!(again, desired.clone(), "{}", text);
            }
            let stored = serde_json::to_string(&(&desired, &desired.rules)).expect("JSON");
            let (read, rules) = serde_json::from_str(&stored).expect("the same");
            prop_assert_eq!(Desired { rules, ..read }, desired);
        }
    }
}
