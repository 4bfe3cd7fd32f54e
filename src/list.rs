//! What serves, as a configuration file. Pure.

use serde_json::{Map, Value, json};

use crate::config::Ports;
use crate::plan::{Desired, Rule, Upstream};

/// The map form of the configuration, every option spelled out. Host names stay names.
pub fn document(desired: &Desired) -> Value {
    json!({
        "version": 1,
        "interfaces": desired.interfaces,
        "rules": desired.rules.iter().map(rule).collect::<Vec<_>>(),
    })
}

fn rule(rule: &Rule) -> Value {
    json!({
        "name": rule.name,
        "key": { "address": rule.key.address, "port": ports(&rule.key.ports) },
        "options": {
            "tc_action": rule.action,
            "source": rule.source,
            "strategy": rule.strategy,
            "hash": rule.hash,
            "health": rule.health,
        },
        "upstream": rule.upstreams.iter().map(upstream).collect::<Vec<_>>(),
    })
}

fn ports(ports: &[Ports]) -> Value {
    let spelled = |ports: &Ports| match ports.first == ports.last {
        true => json!(ports.first),
        false => json!(ports.to_string()),
    };
    match ports {
        [one] => spelled(one),
        several => several.iter().map(spelled).collect(),
    }
}

fn upstream(upstream: &Upstream) -> Value {
    let mut fields = Map::new();
    if let Some(name) = &upstream.name {
        fields.insert("name".into(), json!(name));
    }
    fields.insert("address".into(), json!(upstream.host));
    if let Some(port) = upstream.port {
        fields.insert("port".into(), json!(port));
    }
    Value::Object(fields)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::net::IpAddr;

    use proptest::collection::{btree_set, vec};
    use proptest::prelude::*;
    use proptest::sample::{select, subsequence};

    use super::document;
    use crate::config::{Action, Config, Health, Host, Key, Ports, Source, Strategy as Selection};
    use crate::plan::{Desired, Rule, Upstream};

    const NAMES: [&str; 4] = ["logs.example.net", "a", "true.example", "0x1f.example"];

    fn upstreams() -> impl Strategy<Value = Vec<Upstream>> {
        let host = prop_oneof![
            (1..250_u8).prop_map(|last| Host::Address([10, 0, 9, last].into())),
            select(NAMES.to_vec()).prop_map(|name| Host::Name(name.into())),
        ];
        // names are such that a sloppy writer of YAML would make something else of them
        let names = btree_set("[a-z0-9][a-z0-9.:-]{0,8}|null|yes|1e3|0o7|~|1:30", 5);
        let list = vec((host, prop::option::of(1..=u16::MAX), any::<bool>()), 1..5);
        (list, names).prop_map(|(mut list, names)| {
            let mut seen = Vec::new();
            list.retain(|(host, port, _)| {
                let new = !seen.contains(&(host.clone(), *port));
                seen.push((host.clone(), *port));
                new
            });
            list.into_iter()
                .zip(names)
                .map(|((host, port, named), name)| {
                    let address = match &host {
                        Host::Address(address) => address.clone(),
                        Host::Name(name) => address(name).into(),
                    };
                    let name = named.then_some(name);
                    Upstream { name, host, ..Upstream::new(address, port) }
                })
                .collect()
        })
    }

    fn address(name: &str) -> IpAddr {
        let index = NAMES.iter().position(|it| *it == name).expect("a known name");
        [10, 0, 8, index as u8 + 1].into()
    }

    /// Rules with ports of their own, by their place among the rules.
    fn rule(place: u16) -> impl Strategy<Value = Rule> {
        let range = (0..30_u16, 0..30_u16).prop_map(move |(first, more)| Ports {
            first: 1 + place * 200 + first,
            last: 1 + place * 200 + first + more,
        });
        let lone = Just(Ports { first: 150 + place * 200, last: 150 + place * 200 });
        let ports = (prop::option::of(range), lone)
            .prop_map(|(range, lone)| range.into_iter().chain([lone]).collect());
        let words = (
            select(vec![Action::Pass, Action::Block]),
            select(vec![Selection::SrcPort, Selection::SrcIp, Selection::SrcIpPort]),
            select(vec![Source::Vip, Source::Preserve]),
            select(vec![Health::Off, Health::Neighbour]),
        );
        (ports, words, upstreams()).prop_map(
            move |(ports, (action, strategy, source, health), upstreams)| {
                let key = Key::new([10, 0, 0, 5], ports);
                let rule = Rule::new(format!("r{place}"), key, upstreams);
                Rule { action, strategy, source, health, ..rule }
            },
        )
    }

    proptest! {
        #[test]
        fn applies_to_the_same(
            rules in (0..5_u16).prop_flat_map(|count| (0..count).map(rule).collect::<Vec<_>>()),
            interfaces in subsequence(vec!["eth0", "no", "1e3", "wlp0s20f3"], 1..4),
        ) {
            let mut interfaces: Vec<String> = interfaces.into_iter().map(String::from).collect();
            interfaces.sort();
            let desired = Desired { interfaces, rules, addresses: Vec::new() };
            let names: BTreeMap<String, IpAddr> =
                NAMES.iter().map(|name| (name.to_string(), address(name))).collect();
            let text = serde_yaml::to_string(&document(&desired)).expect("YAML");
            for text in [text, document(&desired).to_string()] {
                let config = Config::parse("list.yaml", &text)
                    .unwrap_or_else(|errors| panic!("{}\n{text}", errors[0]));
                let again = Desired::new(&config, &config.interfaces, &names);
                prop_assert_eq!(again.expect("good names"), desired.clone(), "{}", text);
            }
        }
    }
}
