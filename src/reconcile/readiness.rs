//! Judges whether this host can serve its rules well. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::config::{KeyAddress, State};
use crate::datapath::spares::Situation;
use crate::desired::{Desired, Rule, RuleIds};
use crate::net::link::{LOOPBACK, OwnAddress};

/// The active configuration and its state.
pub struct Readiness<'a> {
    pub desired: &'a Desired,
    /// In the order of the rules.
    pub ids: &'a [RuleIds],
    /// Interfaces of the configuration without the active filter.
    pub unattached: Vec<&'a str>,
    pub situation: &'a Situation,
}

impl Readiness<'_> {
    /// Returns why the host cannot serve a rule well; `None`: it can.
    pub fn trouble_of_rule(&self, rule: &Rule, ids: &RuleIds) -> Option<String> {
        let is_up = |(upstream, id): (&crate::desired::Upstream, &u32)| {
            let state = self.situation.overrides.get(id).copied().unwrap_or(upstream.state);
            state == State::Active && !self.situation.down.contains(id)
        };
        let any_is_up = rule.upstreams.iter().zip(&ids.upstreams).any(is_up);
        (!any_is_up).then(|| format!("rule {}: no upstream is up", rule.name))
    }

    /// Returns why packets do not meet the rules on all interfaces; `None`: they do.
    pub fn trouble_of_interfaces(&self) -> Option<String> {
        let names = self.unattached.join(", ");
        (!names.is_empty()).then(|| format!("the filter is not attached to {names}"))
    }

    /// Returns the first reason why the host cannot serve the chosen rules well.
    pub fn trouble(&self, chosen: impl Fn(&Rule) -> bool) -> Option<String> {
        let rules = self.desired.rules.iter().zip(self.ids).filter(|(rule, _)| chosen(rule));
        let mut troubles = rules.filter_map(|(rule, ids)| self.trouble_of_rule(rule, ids));
        self.trouble_of_interfaces().or_else(|| troubles.next())
    }

    /// Returns the addresses that are announced, each with the reason why the host cannot serve it well.
    pub fn addresses(&self) -> BTreeMap<IpAddr, Option<String>> {
        let addresses = self.desired.announced().into_iter();
        addresses
            .map(|address| {
                (address, self.trouble(|rule| rule.key.address == KeyAddress::Is(address)))
            })
            .collect()
    }
}

/// Returns the index of an interface that has an address besides those that announce it: the address
/// is this host's own, and not to be announced. Loopback interfaces do not count.
pub fn owner(address: IpAddr, own: &[OwnAddress], besides: &[u32]) -> Option<u32> {
    let elsewhere = |it: &&OwnAddress| it.ifindex != LOOPBACK && !besides.contains(&it.ifindex);
    own.iter().filter(elsewhere).find(|it| it.address == address).map(|it| it.ifindex)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::Readiness;
    use crate::config::{Config, State};
    use crate::datapath::spares::Situation;
    use crate::desired::{Desired, assign_ids};

    const FILE: &str = "
version: 1
interfaces: [eth0]
announce: { interface: anycast0 }
rules:
  - name: dns
    key: { address: 10.99.0.53, port: 53 }
    upstream: [{ address: 10.2.0.11 }, { address: 10.2.0.12 }]
  - name: dot
    key: { address: 10.99.0.53, port: 853 }
    upstream: [{ address: 10.2.0.11 }]
  - name: log
    key: { address: '2001:db8::99', port: 514 }
    upstream: [{ address: '2001:db8::1' }, { address: '2001:db8::2', state: drained }]
  - { key: { address: any, port: 514 }, upstream: [{ address: 10.2.0.11 }] }
  - { key: { address: 239.1.1.1, port: 5 }, options: { source: preserve }, upstream: [{ address: 10.2.0.11 }] }
";
    // ids: dns 1, its upstreams 2 and 3; dot 4, 5; log 6, 7 and 8

    /// Returns the troubles by address.
    fn troubles(unattached: &[&str], situation: &Situation) -> BTreeMap<String, String> {
        let config = Config::parse("test.yaml", FILE).expect("a good configuration");
        let desired = Desired::written(&config, &config.interfaces);
        let ids = assign_ids(&desired, &[], 100).expect("ids enough");
        let unattached = unattached.to_vec();
        let readiness = Readiness { desired: &desired, ids: &ids, unattached, situation };
        let all = readiness.addresses().into_iter();
        all.map(|(address, trouble)| (address.to_string(), trouble.unwrap_or_default())).collect()
    }

    fn expected(ipv4: &str, ipv6: &str) -> BTreeMap<String, String> {
        [("10.99.0.53", ipv4), ("2001:db8::99", ipv6)]
            .map(|(address, trouble)| (address.into(), trouble.into()))
            .into()
    }

    #[test]
    fn unicast_addresses_of_keys_are_judged() {
        assert_eq!(troubles(&[], &Situation::default()), expected("", ""));
    }

    #[test]
    fn each_rule_of_an_address_needs_an_upstream() {
        let down =
            |ids: &[u32]| Situation { down: ids.iter().copied().collect(), ..Situation::default() };
        assert_eq!(troubles(&[], &down(&[2])), expected("", ""));
        assert_eq!(troubles(&[], &down(&[2, 3])), expected("rule dns: no upstream is up", ""));
        assert_eq!(troubles(&[], &down(&[5])), expected("rule dot: no upstream is up", ""));
        assert_eq!(troubles(&[], &down(&[7])), expected("", "rule log: no upstream is up"));
    }

    #[test]
    fn overrides_come_before_the_file() {
        let by_hand = |overrides: &[(u32, State)]| Situation {
            overrides: overrides.iter().copied().collect(),
            ..Situation::default()
        };
        let all_drained = by_hand(&[(2, State::Drained), (3, State::Drained)]);
        assert_eq!(troubles(&[], &all_drained), expected("rule dns: no upstream is up", ""));
        let swapped = by_hand(&[(7, State::Drained), (8, State::Active)]);
        assert_eq!(troubles(&[], &swapped), expected("", ""));
    }

    #[test]
    fn a_missing_filter_concerns_all() {
        let text = "the filter is not attached to eth0";
        assert_eq!(troubles(&["eth0"], &Situation::default()), expected(text, text));
    }
}
