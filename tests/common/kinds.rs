//! Rules of every kind: both actions with each source.

use serde_json::{Value, json};

use super::lab::{Net, V4, V6, config};

/// Port, `tc_action` and `source` of each rule; each rule has its own upstream port.
pub const KINDS: [(u16, &str, &str); 6] = [
    (5000, "pass", "vip"),
    (5001, "pass", "preserve"),
    (5002, "pass", "egress"),
    (5003, "block", "vip"),
    (5004, "block", "preserve"),
    (5005, "block", "egress"),
];

pub fn options(action: &str, source: &str) -> Value {
    json!({ "tc_action": action, "source": source })
}

/// Returns the name of a rule.
pub fn name(net: &Net, action: &str, source: &str) -> String {
    format!("{action}-{source}{}", if net.is_ipv6() { "-6" } else { "" })
}

/// Returns the rules of one family for an upstream at `address`, which may have a scope.
pub fn rules_to(net: &Net, address: &str) -> Vec<Value> {
    let rule = |&(port, action, source): &(u16, &str, &str)| {
        let upstream = json!({ "name": address, "address": address, "port": port + 2000 });
        net.rule(&name(net, action, source), port, options(action, source), &[upstream])
    };
    KINDS.iter().map(rule).collect()
}

pub fn rules(net: &Net) -> Vec<Value> {
    rules_to(net, &net.upstreams[0].to_string())
}

/// Returns the rules of both families.
pub fn all_kinds() -> Value {
    config(&[rules(&V4), rules(&V6)].concat())
}
