//! Policy routing: rules of `ip rule`, routing tables, VRFs, and their outcome for a flow. Pure.

use std::cmp::Reverse;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use foldhash::HashMap;

use crate::config::Network;
use crate::net::link::Link;
use crate::net::route::Route;
use crate::net::routing::{Choice, Paths, Senders, Target, vrf};

/// A rule of `ip rule`.
#[derive(Clone, Debug)]
pub struct PolicyRule {
    pub priority: u32,
    /// The rule applies to packets that do not match.
    pub inverted: bool,
    pub from: Option<Network>,
    pub to: Option<Network>,
    /// The name of the input interface.
    pub input: Option<String>,
    /// The rule looks up the table of the packet's VRF (l3mdev).
    pub vrf: bool,
    /// Result of the other selectors, which is the same for all packets or unknown.
    pub others: Match,
    /// Routes with a prefix of at most this length are ignored.
    pub suppressed: Option<u8>,
    pub action: PolicyAction,
}

/// Action of a policy rule on packets that match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyAction {
    Table(u32),
    /// Continue at the rule with this priority.
    Goto(u32),
    Nop,
    /// The reason why there is no path.
    Refuse(&'static str),
}

/// The share of a flow's packets that a rule matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Match {
    No,
    Some,
    All,
}

/// A route of some table.
#[derive(Clone, Debug)]
pub struct TableRoute {
    pub table: u32,
    pub network: Network,
    pub metric: u32,
    /// The paths, on a link to the unspecified address; `None` continues with the next rule (`throw`).
    pub outcome: Option<RouteOutcome>,
}

/// Paths, or the reason why there are none.
pub type RouteOutcome = Result<Vec<Route>, String>;

/// The rules and routes of one family.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// In the order of their priority.
    pub rules: Vec<PolicyRule>,
    pub routes: Vec<TableRoute>,
}

/// A set of packets to route.
struct Flow<'a> {
    address: IpAddr,
    senders: &'a [Network],
    input: Option<&'a Link>,
    links: &'a HashMap<u32, Link>,
}

impl Flow<'_> {
    /// The VRF that the input interface belongs to.
    fn vrf(&self) -> Option<&Link> {
        vrf(self.input?, self.links)
    }
}

impl PolicyRule {
    /// Returns true for a rule as the kernel begins with: to the tables local, main and default.
    pub fn is_default(&self) -> bool {
        const DEFAULT: u32 = 253;
        const LOCAL: u32 = 255;
        let PolicyRule { inverted, from, to, input, vrf, others, suppressed, action, .. } = self;
        !inverted
            && from.is_none()
            && to.is_none()
            && input.is_none()
            && !vrf
            && *others == Match::All
            && suppressed.is_none()
            && matches!(action, PolicyAction::Table(DEFAULT..=LOCAL))
    }

    fn matches(&self, flow: &Flow<'_>) -> Match {
        let all_or_no = |matches: bool| if matches { Match::All } else { Match::No };
        let mut matched = self.others;
        if let Some(from) = self.from {
            matched = matched.min(covers(from, flow.senders));
        }
        if let Some(to) = self.to {
            matched = matched.min(all_or_no(to.contains(flow.address)));
        }
        if let Some(name) = &self.input {
            let vrf = flow.vrf().map(|vrf| &vrf.name);
            let is_input = flow.input.is_some_and(|link| link.name == *name);
            matched = matched.min(all_or_no(is_input || vrf == Some(name)));
        }
        if self.vrf {
            matched = matched.min(all_or_no(flow.vrf().is_some()));
        }
        match (self.inverted, matched) {
            (true, Match::All) => Match::No,
            (true, Match::No) => Match::All,
            (_, matched) => matched,
        }
    }
}

/// Returns the share of `senders` that a network covers; an empty list stands for all addresses.
pub fn covers(network: Network, senders: &[Network]) -> Match {
    let within = |it: &Network| it.prefix >= network.prefix && network.contains(it.address);
    let meets = |it: &Network| it.contains(network.address) || network.contains(it.address);
    if network.prefix == 0 || (!senders.is_empty() && senders.iter().all(within)) {
        Match::All
    } else if senders.is_empty() || senders.iter().any(meets) {
        Match::Some
    } else {
        Match::No
    }
}

impl Policy {
    /// Returns the paths of a target's packets.
    pub fn paths(
        &self,
        target: &Target,
        inputs: &[&Link],
        links: &HashMap<u32, Link>,
    ) -> Result<Paths, String> {
        let unspecified: Network = match target.address.ip {
            IpAddr::V4(_) => IpAddr::from(Ipv4Addr::UNSPECIFIED).into(),
            IpAddr::V6(_) => IpAddr::from(Ipv6Addr::UNSPECIFIED).into(),
        };
        let senders = match &target.senders {
            // a source is chosen after the path
            Senders::Own => std::slice::from_ref(&unspecified),
            Senders::Among(networks) => networks,
        };
        self.paths_from(target.address.ip, senders, inputs, links)
    }

    /// Returns the paths of packets with the source address of `found`, if they differ from it.
    pub fn paths_from_own(
        &self,
        target: &Target,
        found: &Result<Paths, String>,
        inputs: &[&Link],
        links: &HashMap<u32, Link>,
    ) -> Option<Paths> {
        let first = found.as_ref().ok()?.routes.first()?;
        let own: Network = first.egress?.into();
        let other = self.paths_from(target.address.ip, &[own], inputs, links).ok()?;
        (other.routes.first()?.neighbour() != first.neighbour()).then_some(other)
    }

    fn paths_from(
        &self,
        address: IpAddr,
        senders: &[Network],
        inputs: &[&Link],
        links: &HashMap<u32, Link>,
    ) -> Result<Paths, String> {
        let flow = |input| Flow { address, senders, input, links };
        let mut by_input: Vec<Vec<RouteOutcome>> =
            inputs.iter().map(|input| self.outcomes(&flow(Some(*input)))).collect();
        if inputs.is_empty() {
            by_input.push(self.outcomes(&flow(None)));
        }
        let one_of_all = by_input.iter().all(|outcomes| *outcomes == by_input[0]);
        let several = by_input.iter().any(|outcomes| outcomes.len() > 1);
        let mut routes: Vec<Route> = Vec::new();
        let mut reason = None;
        for outcome in by_input.iter().flatten() {
            match outcome {
                Ok(found) => {
                    for route in found {
                        if routes.iter().all(|it| it.neighbour() != route.neighbour()) {
                            routes.push(*route);
                        }
                    }
                }
                Err(why) => reason = reason.or(Some(why)),
            }
        }
        if routes.is_empty() {
            return Err(reason.cloned().unwrap_or_else(|| "no route matches".into()));
        }
        let mut paths = Paths::of(address, routes, inputs);
        if !one_of_all {
            paths.by = Choice::Interface;
        } else if several {
            paths.by = Choice::Sender;
        }
        Ok(paths)
    }

    /// Returns the possible outcomes of a flow, each once. The first is that of packets which no partly
    /// matching rule applies to.
    fn outcomes(&self, flow: &Flow<'_>) -> Vec<RouteOutcome> {
        let mut found = Vec::new();
        self.walk(0, flow, &mut found);
        let mut outcomes: Vec<RouteOutcome> = Vec::new();
        for outcome in found.into_iter().rev() {
            if !outcomes.contains(&outcome) {
                outcomes.push(outcome);
            }
        }
        outcomes
    }

    /// Collects outcomes from the rule with index `start` on.
    fn walk(&self, start: usize, flow: &Flow<'_>, found: &mut Vec<RouteOutcome>) {
        for (index, rule) in self.rules.iter().enumerate().skip(start) {
            let matched = rule.matches(flow);
            if matched == Match::No {
                continue;
            }
            let outcome = match rule.action {
                PolicyAction::Nop => continue,
                PolicyAction::Goto(priority) => {
                    let later = self.rules.iter().skip(index + 1);
                    let skipped = later.take_while(|rule| rule.priority < priority).count();
                    self.walk(index + 1 + skipped, flow, found);
                    match matched {
                        Match::All => return,
                        _ => continue,
                    }
                }
                PolicyAction::Refuse(reason) => Some(Err(reason.into())),
                PolicyAction::Table(table) => self.look_up(rule, table, flow),
            };
            found.extend(outcome.clone());
            if outcome.is_some() && matched == Match::All {
                return;
            }
        }
        found.push(Err("no route matches".into()));
    }

    /// Returns the outcome of one rule's table; `None` continues with the next rule.
    fn look_up(&self, rule: &PolicyRule, table: u32, flow: &Flow<'_>) -> Option<RouteOutcome> {
        let vrf = flow.vrf().filter(|_| rule.vrf);
        let table = vrf.and_then(|vrf| vrf.vrf).unwrap_or(table);
        let routes = self.routes.iter().filter(|route| {
            route.table == table
                && route.network.contains(flow.address)
                && rule.suppressed.is_none_or(|max| route.network.prefix > max)
        });
        let best = routes.max_by_key(|route| (route.network.prefix, Reverse(route.metric)));
        let outcome = best.and_then(|route| route.outcome.clone());
        match (outcome, vrf) {
            // the tables of the host itself, which the kernel asks next, lead out of the VRF
            (None, Some(vrf)) => {
                Some(Err(format!("no route matches in table {table} of the VRF {}", vrf.name)))
            }
            (outcome, _) => outcome.map(|it| it.map(|routes| to(flow.address, routes))),
        }
    }
}

/// Sets the gateway of on-link routes to the address itself.
fn to(address: IpAddr, mut routes: Vec<Route>) -> Vec<Route> {
    for route in &mut routes {
        if route.gateway.is_unspecified() {
            route.gateway = address;
        }
    }
    routes
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn network(text: &str) -> Network {
        text.parse().expect("a network")
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn link(index: u32, name: &str, controller: Option<u32>, vrf: Option<u32>) -> Link {
        Link {
            index,
            name: name.into(),
            controller,
            vrf,
            up: true,
            carrier: true,
            forwards: [true; 2],
            ..Link::default()
        }
    }

    fn rule(priority: u32, table: u32) -> PolicyRule {
        PolicyRule {
            priority,
            inverted: false,
            from: None,
            to: None,
            input: None,
            vrf: false,
            others: Match::All,
            suppressed: None,
            action: PolicyAction::Table(table),
        }
    }

    fn from(priority: u32, senders: &str, table: u32) -> PolicyRule {
        PolicyRule { from: Some(network(senders)), ..rule(priority, table) }
    }

    fn via(table: u32, to: &str, gateway: &str) -> TableRoute {
        let (mtu, egress, local) = (None, None, false);
        let route = Route { ifindex: table, gateway: ip(gateway), mtu, egress, local };
        TableRoute { table, network: network(to), metric: 0, outcome: Some(Ok(vec![route])) }
    }

    /// Rules, each with a default route in its table by the gateway 10.0.0.N, over main's.
    fn policy(mut rules: Vec<PolicyRule>) -> Policy {
        let tables: BTreeSet<u32> = rules
            .iter()
            .filter_map(|rule| match rule.action {
                PolicyAction::Table(table) => Some(table),
                _ => None,
            })
            .collect();
        let default = |table: &u32| via(*table, "0.0.0.0/0", &format!("10.0.0.{table}"));
        let mut routes: Vec<TableRoute> = tables.iter().map(default).collect();
        rules.push(rule(32766, 254));
        routes.push(default(&254));
        Policy { rules, routes }
    }

    /// Asserts the choice between paths and the gateways in their order.
    #[track_caller]
    fn check(policy: &Policy, senders: &[&str], inputs: &[Link], by: Choice, gateways: &[&str]) {
        let links: HashMap<u32, Link> = inputs.iter().map(|it| (it.index, it.clone())).collect();
        let named: Vec<&Link> = inputs.iter().filter(|link| link.vrf.is_none()).collect();
        let senders: Vec<Network> = senders.iter().map(|text| network(text)).collect();
        let paths = policy.paths_from(ip("192.0.2.10"), &senders, &named, &links);
        let paths = paths.expect("paths");
        let found: Vec<String> =
            paths.routes.iter().map(|route| route.gateway.to_string()).collect();
        assert_eq!(paths.by, by, "{found:?}");
        assert_eq!(found, gateways);
    }

    #[test]
    fn rules_by_source_decide_for_known_senders() {
        let eth0 = [link(1, "eth0", None, None)];
        let policy = policy(vec![from(100, "10.1.0.0/16", 100)]);
        check(&policy, &["10.1.0.5"], &eth0, Choice::Only, &["10.0.0.100"]);
        check(&policy, &["10.2.0.5"], &eth0, Choice::Only, &["10.0.0.254"]);
        check(&policy, &["10.1.2.0/24", "10.1.3.0/24"], &eth0, Choice::Only, &["10.0.0.100"]);
        let both = ["10.0.0.254", "10.0.0.100"];
        check(&policy, &["10.1.0.0/24", "10.2.0.0/24"], &eth0, Choice::Sender, &both);
        check(&policy, &["10.0.0.0/8"], &eth0, Choice::Sender, &both);
        check(&policy, &[], &eth0, Choice::Sender, &both);
    }

    #[test]
    fn rules_by_interface_decide_for_each_input() {
        let links = [link(1, "eth0", None, None), link(2, "eth1", None, None)];
        let by_input = PolicyRule { input: Some("eth1".into()), ..rule(100, 100) };
        let policy = policy(vec![by_input]);
        check(&policy, &[], &links[..1], Choice::Only, &["10.0.0.254"]);
        check(&policy, &[], &links[1..], Choice::Only, &["10.0.0.100"]);
        check(&policy, &[], &links, Choice::Interface, &["10.0.0.254", "10.0.0.100"]);
    }

    #[test]
    fn ports_and_marks_and_inversion() {
        let eth0 = [link(1, "eth0", None, None)];
        let others =
            |others, inverted| policy(vec![PolicyRule { others, inverted, ..rule(100, 100) }]);
        for (matches, inverted, by, gateways) in [
            (Match::No, false, Choice::Only, &["10.0.0.254"][..]),
            (Match::No, true, Choice::Only, &["10.0.0.100"]),
            (Match::All, true, Choice::Only, &["10.0.0.254"]),
            (Match::Some, false, Choice::Sender, &["10.0.0.254", "10.0.0.100"]),
            (Match::Some, true, Choice::Sender, &["10.0.0.254", "10.0.0.100"]),
        ] {
            check(&others(matches, inverted), &["10.1.0.5"], &eth0, by, gateways);
        }
    }

    #[test]
    fn tables_without_a_route_and_suppressed_ones_are_passed_over() {
        let eth0 = [link(1, "eth0", None, None)];
        let mut policy =
            policy(vec![PolicyRule { suppressed: Some(0), ..rule(100, 254) }, rule(200, 100)]);
        check(&policy, &[], &eth0, Choice::Only, &["10.0.0.100"]);
        policy.routes.push(via(254, "192.0.2.0/24", "10.0.0.7"));
        check(&policy, &[], &eth0, Choice::Only, &["10.0.0.7"]);
        // a worse one, and one whose prefix is longer
        policy.routes.push(TableRoute { metric: 9, ..via(254, "192.0.2.0/24", "10.0.0.8") });
        check(&policy, &[], &eth0, Choice::Only, &["10.0.0.7"]);
        policy.routes.push(TableRoute { outcome: None, ..via(254, "192.0.2.0/25", "10.0.0.9") });
        check(&policy, &[], &eth0, Choice::Only, &["10.0.0.100"]);
    }

    #[test]
    fn goto_and_refusing_rules() {
        let eth0 = [link(1, "eth0", None, None)];
        let mut policy = policy(vec![from(100, "10.1.0.0/16", 0), rule(200, 100), rule(300, 101)]);
        policy.rules[0].action = PolicyAction::Goto(300);
        check(&policy, &["10.1.0.5"], &eth0, Choice::Only, &["10.0.0.101"]);
        check(&policy, &["10.2.0.5"], &eth0, Choice::Only, &["10.0.0.100"]);
        check(&policy, &[], &eth0, Choice::Sender, &["10.0.0.100", "10.0.0.101"]);
        policy.rules[0].action = PolicyAction::Refuse("a rule forbids it");
        let senders = [network("10.1.0.5")];
        let named = [&eth0[0]];
        let refused = policy.paths_from(ip("192.0.2.1"), &senders, &named, &HashMap::default());
        assert_eq!(refused, Err("a rule forbids it".into()));
    }

    #[test]
    fn a_vrf_has_its_own_table_and_no_other() {
        let links = [
            link(1, "eth0", None, None),
            link(2, "eth1", Some(9), None),
            link(9, "red", None, Some(10)),
        ];
        let mut policy = policy(vec![PolicyRule { vrf: true, ..rule(1000, 0) }]);
        policy.routes.push(via(10, "192.0.2.0/24", "10.0.0.10"));
        check(&policy, &[], &links[..1], Choice::Only, &["10.0.0.254"]);
        check(&policy, &[], &links[1..], Choice::Only, &["10.0.0.10"]);
        check(&policy, &[], &links, Choice::Interface, &["10.0.0.254", "10.0.0.10"]);
        policy.routes.retain(|route| route.table != 10);
        let all: HashMap<u32, Link> = links.iter().map(|it| (it.index, it.clone())).collect();
        let lost = policy.paths_from(ip("192.0.2.10"), &[], &[&links[1]], &all);
        assert_eq!(lost, Err("no route matches in table 10 of the VRF red".into()));
    }
}
