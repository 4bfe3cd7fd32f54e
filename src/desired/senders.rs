//! The rule of a sender, and which of the rule's receivers get its packets. Pure.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use schemars::JsonSchema;
use serde::Serialize;

use crate::config::{Mode, Network, deciding};
use crate::desired::{Rule, Upstream};

/// A rule and its receivers that get the packets of a sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Share {
    /// Index of the rule.
    pub rule: usize,
    /// One bit for each receiver, in their order.
    pub receivers: u64,
}

/// Networks of senders with the share of each; none where no rule matches. The longest prefix decides.
pub type Shares = Vec<(Network, Option<Share>)>;

/// Returns the hosts that get each packet of a rule: all upstreams, or the mirrors.
pub fn receivers(rule: &Rule) -> &[Upstream] {
    match rule.mode {
        Mode::Replicate => &rule.upstreams,
        Mode::Balance => &rule.mirrors,
    }
}

/// A receiver that gets no packets of a sender.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct LeftOut {
    pub upstream: String,
    /// The network in `not-from` that decides; none: the sender is in none of `from`.
    pub not_from: Option<String>,
}

/// Returns the receivers of a rule that get no packets of a sender.
pub fn left_out(rule: &Rule, sender: IpAddr) -> Vec<LeftOut> {
    let left_out = |upstream: &Upstream| {
        let (takes, network) = deciding(&upstream.from, &upstream.not_from, &sender.into());
        let not_from = network.map(|network| network.to_string());
        (!takes).then(|| LeftOut { upstream: upstream.label(), not_from })
    };
    receivers(rule).iter().filter_map(left_out).collect()
}

/// Returns true if packets of a sender can match a rule.
pub fn admits(rule: &Rule, sender: IpAddr) -> bool {
    let is_received = || rule.mode == Mode::Balance || mask(rule, &sender.into()) != 0;
    rule.key.admits(sender) && is_received()
}

/// Returns the receivers that get the packets of senders in a network, a bit for each.
fn mask(rule: &Rule, sender: &Network) -> u64 {
    let receivers = receivers(rule).iter().enumerate();
    let takes = |upstream: &Upstream| deciding(&upstream.from, &upstream.not_from, sender).0;
    receivers.fold(0, |all, (place, upstream)| all | u64::from(takes(upstream)) << place)
}

/// Returns the shares of all senders of one address and port. `nearest` are the rules that match it, those
/// of the nearest key first. `everybody` is the network of all senders.
pub fn shares(rules: &[Rule], nearest: &[Vec<usize>], everybody: Network) -> Shares {
    let levels: Vec<Level<'_>> = nearest.iter().map(|level| Level::new(rules, level)).collect();
    let mut networks = BTreeSet::from([everybody]);
    for rule in nearest.iter().flatten().map(|rule| &rules[*rule]) {
        networks.extend(rule.key.from.iter().chain(&rule.key.not_from));
        for receiver in receivers(rule) {
            networks.extend(receiver.from.iter().chain(&receiver.not_from));
        }
    }
    let share = |network: &Network| {
        let rule = levels.iter().find_map(|level| level.rule_of(network))?;
        let receivers = mask(&rules[rule], network);
        (rules[rule].mode == Mode::Balance || receivers != 0).then_some(Share { rule, receivers })
    };
    let shares = networks.into_iter().map(|network| (network, share(&network)));
    shares.filter(|(network, share)| share.is_some() || network.prefix > 0).collect()
}

/// Returns the share of all senders where it is the only one of [`shares`]: one rule matches, and neither it nor its
/// receivers have networks of senders.
pub fn only_share(rules: &[Rule], nearest: &[Vec<usize>], everybody: Network) -> Option<Share> {
    let [level] = nearest else { return None };
    let [number] = level[..] else { return None };
    let rule = &rules[number];
    let mut of_receivers = receivers(rule).iter().flat_map(|it| [&it.from, &it.not_from]);
    let is_plain =
        rule.key.from.is_empty() && rule.key.not_from.is_empty() && of_receivers.all(Vec::is_empty);
    is_plain.then(|| Share { rule: number, receivers: mask(rule, &everybody) })
}

/// Rules whose keys are equally near to a packet.
struct Level<'a> {
    /// The networks of the rules; true for senders that match the rule.
    networks: HashMap<&'a Network, Vec<(usize, bool)>>,
    prefixes: BTreeSet<u8>,
    /// Rules without `from`.
    of_everybody: Vec<usize>,
}

impl<'a> Level<'a> {
    fn new(rules: &'a [Rule], level: &[usize]) -> Level<'a> {
        let mut networks: HashMap<&Network, Vec<(usize, bool)>> = HashMap::new();
        let mut of_everybody = Vec::new();
        for index in level {
            let key = &rules[*index].key;
            if key.from.is_empty() {
                of_everybody.push(*index);
            }
            for (list, matches) in [(&key.from, true), (&key.not_from, false)] {
                for network in list {
                    networks.entry(network).or_default().push((*index, matches));
                }
            }
        }
        let prefixes = networks.keys().map(|network| network.prefix).collect();
        Level { networks, prefixes, of_everybody }
    }

    /// Returns the rule of the senders in a network: for each rule its longest prefix decides, and then the
    /// longest one of the rules that match.
    fn rule_of(&self, sender: &Network) -> Option<usize> {
        let mut refused = Vec::new();
        for prefix in self.prefixes.range(..=sender.prefix).rev() {
            let wider = Network::new(sender.address, *prefix);
            for (rule, matches) in self.networks.get(&wider).into_iter().flatten() {
                match matches {
                    _ if refused.contains(rule) => {}
                    true => return Some(*rule),
                    false => refused.push(*rule),
                }
            }
        }
        self.of_everybody.iter().find(|rule| !refused.contains(rule)).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::{Share, only_share, shares};
    use crate::config::{Key, Mode, Network, Ports};
    use crate::desired::{Rule, Upstream};

    fn networks(text: &str) -> Vec<Network> {
        text.split_whitespace().map(|it| it.parse().expect("a network")).collect()
    }

    fn rule(from: &str, not_from: &str, receivers: &[(&str, &str)]) -> Rule {
        let upstream = |(place, (from, not_from)): (usize, &(&str, &str))| Upstream {
            from: networks(from),
            not_from: networks(not_from),
            ..Upstream::new([10, 0, 9, place as u8 + 1], None)
        };
        let key = Key {
            from: networks(from),
            not_from: networks(not_from),
            ..Key::new([10, 0, 0, 1], vec![Ports { first: 1, last: 1 }])
        };
        let upstreams = receivers.iter().enumerate().map(upstream).collect();
        Rule { mode: Mode::Replicate, ..Rule::new("rule", key, upstreams) }
    }

    /// Returns rule and receivers of each sender.
    fn shares_of(rules: &[Rule], senders: &[&str]) -> Vec<Option<(usize, u64)>> {
        let nearest = [(0..rules.len()).collect()];
        let all = shares(rules, &nearest, networks("0.0.0.0/0")[0]);
        let find = |sender: &&str| {
            let address = sender.parse().expect("an address");
            let holding = all.iter().filter(|(network, _)| network.contains(address));
            let (_, share) = holding.max_by_key(|(network, _)| network.prefix)?;
            share.map(|Share { rule, receivers }| (rule, receivers))
        };
        senders.iter().map(find).collect()
    }

    #[test]
    fn share_of_all_senders_is_the_only_one() {
        let everybody = networks("0.0.0.0/0")[0];
        let only = |rules: &[Rule]| only_share(rules, &[(0..rules.len()).collect()], everybody);
        let plain = [rule("", "", &[("", ""), ("", "")])];
        let share = only(&plain);
        assert_eq!(share, Some(Share { rule: 0, receivers: 3 }));
        assert_eq!(shares(&plain, &[vec![0]], everybody), [(everybody, share)]);
        let [plain] = plain;
        assert_eq!(only(&[plain.clone(), plain]), None);
        for other in [
            rule("10.0.0.0/8", "", &[("", "")]),
            rule("", "10.0.0.0/8", &[("", "")]),
            rule("", "", &[("", ""), ("10.0.0.0/8", "")]),
            rule("", "", &[("", "10.0.0.0/8")]),
        ] {
            assert_eq!(only(&[other]), None);
        }
    }

    #[test]
    fn receivers_get_the_senders_they_name() {
        let rule = rule("", "", &[("", ""), ("10.0.0.0/8", "10.1.0.0/16"), ("10.1.2.0/24", "")]);
        let senders = ["192.0.2.1", "10.9.9.9", "10.1.1.1", "10.1.2.3"];
        let shares = shares_of(&[rule], &senders);
        assert_eq!(shares, [Some((0, 1)), Some((0, 3)), Some((0, 1)), Some((0, 5))]);
    }

    #[test]
    fn senders_of_no_receiver_match_no_rule() {
        let rule = rule("", "", &[("10.0.0.0/8", "10.1.0.0/16"), ("10.1.2.0/24", "")]);
        let shares = shares_of(&[rule], &["192.0.2.1", "10.9.9.9", "10.1.1.1", "10.1.2.3"]);
        assert_eq!(shares, [None, Some((0, 1)), None, Some((0, 2))]);
    }

    #[test]
    fn senders_that_a_rule_refuses_have_the_next_one() {
        let rules = [
            rule("10.0.0.0/8", "10.1.0.0/16", &[("", "")]),
            rule("10.1.2.0/24", "", &[("", "")]),
            rule("", "10.1.3.0/24", &[("", "")]),
        ];
        let senders = ["192.0.2.1", "10.9.9.9", "10.1.1.1", "10.1.2.3", "10.1.3.1"];
        let shares = shares_of(&rules, &senders);
        let expected = [Some(2), Some(0), Some(2), Some(1), None].map(|it| it.map(|it| (it, 1)));
        assert_eq!(shares, expected);
    }
}
