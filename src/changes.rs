//! How two configurations differ, for people and for `-o json`. Pure.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use crate::plan::{Desired, Rule, Upstream};
use crate::tables::moved_share;

/// What applying the new configuration would change.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Changes {
    pub attach: Vec<String>,
    pub detach: Vec<String>,
    pub added: Vec<RuleSummary>,
    pub removed: Vec<RuleSummary>,
    pub changed: Vec<RuleChange>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RuleSummary {
    pub name: String,
    pub key: String,
    pub upstreams: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RuleChange {
    pub name: String,
    /// `field: old -> new`.
    pub fields: Vec<String>,
    pub added: Vec<String>,
    pub removed: Vec<String>,
    /// Share of the flows that go elsewhere, in percent.
    pub moved: f64,
}

impl Changes {
    /// From `old` (nothing is applied: empty) to `new`. `attached` are the interfaces that the
    /// filter is on now.
    pub fn new(old: &Desired, new: &Desired, attached: &[String]) -> Changes {
        let before: BTreeMap<&str, &Rule> =
            old.rules.iter().map(|rule| (rule.name.as_str(), rule)).collect();
        let after: BTreeMap<&str, &Rule> =
            new.rules.iter().map(|rule| (rule.name.as_str(), rule)).collect();
        let without = |list: &[String], other: &[String]| {
            list.iter().filter(|name| !other.contains(name)).cloned().collect()
        };
        Changes {
            attach: without(&new.interfaces, attached),
            detach: without(attached, &new.interfaces),
            added: new
                .rules
                .iter()
                .filter(|rule| !before.contains_key(rule.name.as_str()))
                .map(summary)
                .collect(),
            removed: old
                .rules
                .iter()
                .filter(|rule| !after.contains_key(rule.name.as_str()))
                .map(summary)
                .collect(),
            changed: new
                .rules
                .iter()
                .filter_map(|rule| change(before.get(rule.name.as_str())?, rule))
                .collect(),
        }
    }

    pub fn is_empty(&self) -> bool {
        *self == Changes::default()
    }
}

fn summary(rule: &Rule) -> RuleSummary {
    RuleSummary {
        name: rule.name.clone(),
        key: key(rule),
        upstreams: rule.upstreams.iter().map(endpoint).collect(),
    }
}

fn change(old: &Rule, new: &Rule) -> Option<RuleChange> {
    if old == new {
        return None;
    }
    let fields = [
        ("key", key(old), key(new)),
        ("tc_action", word(&old.action), word(&new.action)),
        ("strategy", word(&old.strategy), word(&new.strategy)),
        ("hash", word(&old.hash), word(&new.hash)),
        ("source", word(&old.source), word(&new.source)),
        ("health", word(&old.health), word(&new.health)),
    ];
    let fields = fields
        .into_iter()
        .filter(|(_, old, new)| old != new)
        .map(|(field, old, new)| format!("{field}: {old} -> {new}"))
        .collect();
    let only_in = |these: &[Upstream], others: &[Upstream]| -> Vec<String> {
        let others: Vec<String> = others.iter().map(endpoint).collect();
        these.iter().map(endpoint).filter(|endpoint| !others.contains(endpoint)).collect()
    };
    Some(RuleChange {
        name: new.name.clone(),
        fields,
        added: only_in(&new.upstreams, &old.upstreams),
        removed: only_in(&old.upstreams, &new.upstreams),
        moved: (moved_share(old, new) * 1000.0).round() / 10.0,
    })
}

/// A word of the vocabulary, as the file spells it.
fn word(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        other => format!("{other:?}"),
    }
}

/// A rule's key: `10.0.0.5:2055,4739,6343-6350`.
pub fn key(rule: &Rule) -> String {
    let ports: Vec<String> = rule.key.ports.iter().map(ToString::to_string).collect();
    format!("{}:{}", rule.key.address, ports.join(","))
}

/// Where an upstream is: `nfcapd 10.0.9.11:2055`; without a port where it keeps the packet's.
pub fn endpoint(upstream: &Upstream) -> String {
    let mut text = match &upstream.name {
        Some(name) => format!("{name} "),
        None => String::new(),
    };
    let host = upstream.host.to_string();
    let address = upstream.address.to_string();
    if host != address {
        text += &format!("{host} ");
    }
    text += &address;
    if let Some(port) = upstream.port {
        text += &format!(":{port}");
    }
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
        for (sign, rules) in [('+', &self.added), ('-', &self.removed)] {
            for rule in rules {
                writeln!(
                    f,
                    "{sign} rule {} ({}) -> {}",
                    rule.name,
                    rule.key,
                    rule.upstreams.join(", ")
                )?;
            }
        }
        for rule in &self.changed {
            writeln!(f, "~ rule {}: {} % of its flows move", rule.name, rule.moved)?;
            for field in &rule.fields {
                writeln!(f, "    {field}")?;
            }
            for (sign, upstreams) in [('+', &rule.added), ('-', &rule.removed)] {
                for upstream in upstreams {
                    writeln!(f, "    {sign} upstream {upstream}")?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Changes;
    use crate::config::{Action, Config};
    use crate::plan::Desired;

    fn desired(rules: &str) -> Desired {
        let text = format!("version: 1\ninterfaces: [b, a]\nrules:\n{rules}");
        let config = Config::parse("test.yaml", &text).expect("a good configuration");
        Desired::new(&config, &config.interfaces, &Default::default()).expect("no names")
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
    fn everything() {
        let mut new = desired(&[ONE, TWO].concat());
        let from_nothing = Changes::new(&Desired::default(), &new, &[]);
        assert_eq!(
            from_nothing.to_string(),
            "+ interface a\n+ interface b\n\
             + rule one (10.0.0.5:5,7-9) -> x 10.0.9.1, 10.0.9.2:8\n\
             + rule 10.0.0.5:6 (10.0.0.5:6) -> 10.0.9.1\n"
        );
        let old = desired(ONE);
        new.interfaces = vec!["c".into()];
        new.rules[0].action = Action::Block;
        new.rules[0].upstreams[1].port = Some(9);
        let attached = ["a".to_string()];
        assert_eq!(
            Changes::new(&old, &new, &attached).to_string(),
            "+ interface c\n- interface a: detached\n\
             + rule 10.0.0.5:6 (10.0.0.5:6) -> 10.0.9.1\n\
             ~ rule one: 50 % of its flows move\n    tc_action: pass -> block\n    \
             + upstream 10.0.9.2:9\n    - upstream 10.0.9.2:8\n"
        );
    }
}
