//! Explains why no rule matches a packet. Pure.

use std::net::{IpAddr, SocketAddr};

use schemars::JsonSchema;
use serde::Serialize;

use crate::config::{Key, KeyAddress, Ports, deciding, with_port};
use crate::desired::{Desired, Rule, diff, senders};

/// Maximum number of rules in an answer.
const SHOWN: usize = 5;

/// A rule that nearly matches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Miss {
    pub rule: String,
    pub key: String,
    pub differs: Differs,
    #[serde(rename = "what")]
    pub text: String,
}

/// The part of the key that differs, nearest to a match first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Differs {
    Interface,
    Sender,
    Port,
    Address,
}

/// Returns the rules nearest to a packet, at most `SHOWN`.
pub fn explain(
    desired: &Desired,
    source: IpAddr,
    destination: SocketAddr,
    interface: &str,
) -> Vec<Miss> {
    let attached = desired.interfaces.iter().any(|name| name == interface);
    let of_family = desired.rules.iter().filter(|rule| rule.family() == source.into());
    let near = of_family.filter_map(|rule| {
        let differs = differs(rule, desired, source, destination, attached)?;
        Some((differs, rule))
    });
    let near: Vec<(Differs, &Rule)> = near.collect();
    let Some(nearest) = near.iter().map(|(differs, _)| *differs).min() else { return Vec::new() };
    let nearest = near.into_iter().filter(|(differs, _)| *differs == nearest);
    nearest
        .take(SHOWN)
        .map(|(differs, rule)| miss(differs, rule, desired, source, destination))
        .collect()
}

/// Returns the part of the key that differs; `None` if more than one does, or none.
fn differs(
    rule: &Rule,
    desired: &Desired,
    source: IpAddr,
    destination: SocketAddr,
    attached: bool,
) -> Option<Differs> {
    let key = &rule.key;
    let address = match key.address {
        KeyAddress::Is(address) => address == destination.ip(),
        KeyAddress::Any => desired.addresses.contains(&destination.ip()),
    };
    let port = key.has_port(destination.port());
    let sender = senders::admits(rule, source);
    match (address, port, sender) {
        (true, true, true) => (!attached).then_some(Differs::Interface),
        (true, true, false) => Some(Differs::Sender),
        (true, false, _) => Some(Differs::Port),
        (false, true, _) => Some(Differs::Address),
        _ => None,
    }
}

fn miss(
    differs: Differs,
    rule: &Rule,
    desired: &Desired,
    source: IpAddr,
    destination: SocketAddr,
) -> Miss {
    let list = |items: Vec<String>| items.join(", ");
    let key = &rule.key;
    let text = match differs {
        Differs::Interface => format!("matches on {} only", list(desired.interfaces.clone())),
        Differs::Sender => sender_missed(key, source),
        Differs::Port => {
            let ports = list(key.ports.iter().map(Ports::to_string).collect());
            format!("matches {} on port {ports} only", destination.ip())
        }
        Differs::Address => {
            let port = destination.port();
            format!("matches port {port} of {} only", key.address)
        }
    };
    Miss { rule: rule.name.clone(), key: diff::key(rule), differs, text }
}

/// Says why a key does not match a sender.
fn sender_missed(key: &Key, source: IpAddr) -> String {
    match deciding(&key.from, &key.not_from, &source.into()) {
        (true, _) => format!("has no upstream that gets packets of {source}"),
        (_, Some(network)) => format!("matches no senders in {network}"),
        (_, None) => {
            let networks: Vec<String> = key.from.iter().map(ToString::to_string).collect();
            format!(
                "matches senders in {} only, and {source} is in none of them",
                networks.join(", ")
            )
        }
    }
}

impl Miss {
    /// Returns source and destination of a packet that would match, as arguments of `get`.
    pub fn example(&self, rule: &Rule, source: IpAddr, destination: SocketAddr) -> Option<String> {
        let address = match rule.key.address {
            KeyAddress::Is(address) => address,
            KeyAddress::Any => destination.ip(),
        };
        let port = rule.key.ports.first().map_or(destination.port(), |ports| ports.first);
        let from = rule.key.from.first().map(|network| network.address);
        let from = from.filter(|_| self.differs == Differs::Sender).unwrap_or(source);
        (self.differs != Differs::Interface).then(|| format!("{from} {}", with_port(address, port)))
    }
}

#[cfg(test)]
mod tests {
    use super::{Differs, explain};
    use crate::config::Config;
    use crate::desired::Desired;

    const FILE: &str = "
version: 1
interfaces: [eth0, eth1]
rules:
  - name: flows
    key: { address: 10.0.0.5, port: [2055, '6343-6350'], from: [10.20.0.0/16, 10.30.0.1] }
    upstream: [{ address: 10.0.9.1 }]
  - name: syslog
    key: { address: 10.0.0.5, port: 514 }
    upstream: [{ address: 10.0.9.1 }]
  - name: every
    key: { address: any, port: 53 }
    upstream: [{ address: 10.0.9.1 }]
  - name: six
    key: { address: '2001:db8::5', port: 514 }
    upstream: [{ address: '2001:db8::9' }]
";

    #[test]
    fn nearest_rules() {
        let config = Config::parse("test.yaml", FILE).expect("a good configuration");
        let mut desired = Desired::written(&config, &config.interfaces);
        desired.addresses = vec![[10, 0, 0, 5].into(), [10, 0, 0, 6].into()];
        let check = |source: &str,
                     destination: &str,
                     interface: &str,
                     wanted: &[(&str, Differs, &str)]| {
            let found = explain(
                &desired,
                source.parse().expect("an address"),
                destination.parse().expect("an endpoint"),
                interface,
            );
            let found: Vec<(&str, Differs, &str)> =
                found.iter().map(|it| (it.rule.as_str(), it.differs, it.text.as_str())).collect();
            assert_eq!(found, wanted, "{source} > {destination}");
        };
        use Differs::{Address, Interface, Port, Sender};
        let networks =
            "matches senders in 10.20.0.0/16, 10.30.0.1 only, and 10.9.0.1 is in none of them";
        check("10.9.0.1", "10.0.0.5:2055", "eth0", &[("flows", Sender, networks)]);
        check(
            "10.20.0.1",
            "10.0.0.5:99",
            "eth0",
            &[
                ("flows", Port, "matches 10.0.0.5 on port 2055, 6343-6350 only"),
                ("syslog", Port, "matches 10.0.0.5 on port 514 only"),
                ("every", Port, "matches 10.0.0.5 on port 53 only"),
            ],
        );
        check(
            "10.9.0.1",
            "10.0.0.9:514",
            "eth0",
            &[("syslog", Address, "matches port 514 of 10.0.0.5 only")],
        );
        check(
            "10.9.0.1",
            "10.0.0.5:514",
            "eth9",
            &[("syslog", Interface, "matches on eth0, eth1 only")],
        );
        check(
            "10.9.0.1",
            "10.0.0.6:514",
            "eth0",
            &[("every", Port, "matches 10.0.0.6 on port 53 only")],
        );
        check(
            "2001:db8::1",
            "[2001:db8::5]:53",
            "eth0",
            &[("six", Port, "matches 2001:db8::5 on port 514 only")],
        );
        check(
            "10.9.0.1",
            "10.0.0.5:514",
            "eth0",
            &[
                ("flows", Port, "matches 10.0.0.5 on port 2055, 6343-6350 only"),
                ("every", Port, "matches 10.0.0.5 on port 53 only"),
            ],
        );
        check("10.9.0.1", "10.9.9.9:99", "eth0", &[]);
    }
}
