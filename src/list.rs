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
