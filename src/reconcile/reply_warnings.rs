//! Warnings about `reply`: answers that are lost, and packets that do not reach their upstream. Pure, but for
//! reading /proc.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::path::Path;

use super::warnings::Candidate;
use crate::config::{Family, KeyAddress, Message, Reply, Via};
use crate::desired::{Rule, Upstream};
use crate::net::link::Link;
use crate::net::nexthop::{Hop, NextHop};

/// Returns the length in bytes of the outer headers on a way.
fn overhead(via: Via, family: Family) -> u32 {
    let ip = match family {
        Family::V4 => 20,
        Family::V6 => 40,
    };
    match via {
        Via::Link => 0,
        Via::Ipip => ip,
        Via::Gue => ip + 8,
    }
}

impl Candidate<'_> {
    /// Returns the warnings about `reply`.
    pub fn replies(self, links: &[Link]) -> Vec<Message> {
        let mut findings = self.not_on_the_link();
        findings.extend(self.too_narrow(links));
        findings.extend(self.two_origins());
        findings.extend(self.not_forwarding(links));
        findings
    }

    /// Warns of interfaces without forwarding: the kernel tells no next hop for answers that come in there.
    fn not_forwarding(self, links: &[Link]) -> Vec<Message> {
        let comes_back = |rule: &Rule| matches!(rule.reply, Reply::Route | Reply::Nat);
        let Some((at, rule, _)) = self.upstreams().find(|(_, it, _)| comes_back(it)) else {
            return Vec::new();
        };
        let version = match rule.family() {
            Family::V4 => "ipv4",
            Family::V6 => "ipv6",
        };
        let sysctl = |link: &Link| format!("net/{version}/conf/{}/forwarding", link.name);
        let is_off = |link: &&Link| {
            let value = fs::read_to_string(Path::new("/proc/sys").join(sysctl(link)));
            value.is_ok_and(|value| value.trim() == "0")
        };
        let off = self.links(links).filter(is_off).map(|link| {
            let message =
                format!("answers that come in on {} are dropped: it does not forward", link.name);
            let help =
                format!("sysctl -w {}=1, if upstreams send their answers there", sysctl(link));
            Message::about(at, message).help(help)
        });
        off.collect()
    }

    /// Warns of upstreams with `via: link` behind a router, which would route the packets back.
    fn not_on_the_link(self) -> Vec<Message> {
        let mut findings = Vec::new();
        let is_by_link = |rule: &Rule, upstream| rule.via_of(upstream) == Some(Via::Link);
        for (at, rule, upstream) in self.upstreams().filter(|(_, rule, it)| is_by_link(rule, it)) {
            let address = &upstream.address;
            let hop = self.hops(rule, upstream).iter().find(|hop| hop.gateway != address.ip);
            if let Some(hop) = hop {
                let message = format!(
                    "{address} is behind {}, which does not send packets on that keep their destination",
                    hop.gateway
                );
                let help = "`via: link` is for one network; say `via: ipip` or `via: gue`";
                findings.push(Message::about(at, message).help(help));
            }
        }
        findings
    }

    /// Warns of ways without room for outer headers, each width once.
    fn too_narrow(self, links: &[Link]) -> Vec<Message> {
        let widest = self.links(links).map(|link| link.mtu).max();
        let mut seen = BTreeSet::new();
        let mut findings = Vec::new();
        for (at, rule, upstream) in self.upstreams() {
            let Some((via, widest)) = rule.via_of(upstream).zip(widest) else { continue };
            let outer = overhead(via, rule.family());
            let hops = self.hops(rule, upstream).iter();
            let narrow = hops.map(|hop| hop.mtu).filter(|mtu| *mtu < widest + outer).min();
            let Some(mtu) = narrow.filter(|mtu| outer > 0 && seen.insert((*mtu, outer))) else {
                continue;
            };
            let message = format!(
                "packets of more than {} bytes do not fit on the way to {}: their senders are told so, and \
                 lose them",
                mtu.saturating_sub(outer),
                upstream.address
            );
            let help = format!("an MTU of {} on the whole way loses none", widest + outer);
            findings.push(Message::about(at, message).help(help));
        }
        findings
    }

    /// Warns of host names with an address that another rule's upstream has too.
    fn two_origins(self) -> Vec<Message> {
        let mut origins = BTreeMap::new();
        let mut findings = Vec::new();
        for (at, rule, upstream) in self.upstreams().filter(|(_, it, _)| it.reply == Reply::Route) {
            let from = (upstream.address.ip, upstream.port.or(rule.key.only_port()));
            let first: &mut &str = origins.entry(from).or_insert(&rule.name);
            if *first != rule.name {
                let address = &upstream.address;
                let message = format!("answers of {address} are taken for those of rule `{first}`");
                findings.push(Message::about(at, message));
            }
        }
        findings
    }

    /// Returns errors for rules that match packets to the ports of flows at this host's address towards an upstream.
    pub fn flow_ports_taken(self) -> Vec<Message> {
        let ports = self.desired.flows.ports;
        let with_flows = self.upstreams().filter(|(_, rule, _)| rule.has_flows());
        let hops = with_flows.flat_map(|(_, rule, upstream)| self.hops(rule, upstream));
        let egresses: BTreeSet<IpAddr> = hops.filter_map(|hop| hop.egress).collect();
        let chosen = |it: &&IpAddr| {
            self.desired.flows.addresses.iter().any(|own| own.is_ipv4() == it.is_ipv4())
        };
        let mut findings = Vec::new();
        for rule in &self.config.rules {
            let is_key = |it: &&IpAddr| rule.key.address == KeyAddress::Is(**it) && !chosen(it);
            let Some(egress) = egresses.iter().find(is_key) else { continue };
            if rule.key.has_port_in(ports) {
                let message = format!("{egress} has ports of {ports}, at which flows get answers");
                let help = "give the rule another port, or `flows` other `ports` or `addresses`";
                findings.push(Message::about(&rule.at.field("key"), message).help(help));
            }
        }
        findings
    }

    fn hops(&self, rule: &Rule, upstream: &Upstream) -> &[Hop] {
        let target = self.desired.target(rule, upstream);
        self.next_hops.get(&target).map_or(&[][..], NextHop::hops)
    }
}
