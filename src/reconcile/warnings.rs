//! Warnings about configurations that are valid but probably not intended. Pure, but for reading /proc.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use foldhash::HashMap;

use super::sockets::{Listener, listeners, memberships};
use crate::bpf::xdp;
use crate::config::{
    self, Action, Config, Family, KeyAddress, Message, Mode, Path, RuleConfig, Xdp, with_port,
};
use crate::datapath::kernel;
use crate::desired::tables::takes_answers;
use crate::desired::{Desired, Rule, Upstream};
use crate::net::ethtool;
use crate::net::ipsec::{self, Effect, OutgoingFlow, SecurityPolicy};
use crate::net::link::{Link, OwnAddress, find_link};
use crate::net::nexthop::{Hop, Macs, NextHop};
use crate::net::routing::{Choice, Target};

/// A configuration to warn about.
#[derive(Clone, Copy)]
pub struct Candidate<'a> {
    pub config: &'a Config,
    pub desired: &'a Desired,
    /// Next hops of all upstreams; empty where none of the warnings depends on them.
    pub next_hops: &'a HashMap<Target, NextHop>,
}

impl<'a> Candidate<'a> {
    /// Returns the upstreams with their rules and their places in the file. Both lists have the same order,
    /// but `desired` may lack some.
    pub(super) fn upstreams(self) -> impl Iterator<Item = (&'a Path, &'a Rule, &'a Upstream)> {
        let mut rules = self.config.rules.iter();
        self.desired.rules.iter().flat_map(move |rule| {
            let written = rules.find(|it| it.name == rule.name);
            let mut written = written.into_iter().flat_map(RuleConfig::destinations).peekable();
            rule.destinations().filter_map(move |upstream| {
                let is_other = |it: &&config::UpstreamConfig| {
                    (&it.address, it.port) != (&upstream.host, upstream.port)
                };
                while written.next_if(is_other).is_some() {}
                Some((&written.peek()?.at, rule, upstream))
            })
        })
    }

    /// Returns true if some upstream has such a next hop. Mostly none has, and nothing is to be looked for.
    fn has(self, is_such: impl Fn(&NextHop) -> bool) -> bool {
        self.next_hops.values().any(is_such)
    }

    /// Returns the targets of the upstreams with their places in the file and their next hops.
    fn targets(self) -> impl Iterator<Item = (&'a Path, Target, Option<&'a NextHop>)> {
        self.upstreams().map(move |(at, rule, upstream)| {
            let target = self.desired.target(rule, upstream);
            let next_hop = self.next_hops.get(&target);
            (at, target, next_hop)
        })
    }

    /// Returns the interfaces that the kernel has.
    pub(super) fn links(self, links: &'a [Link]) -> impl Iterator<Item = &'a Link> {
        self.desired.interfaces.iter().filter_map(|name| find_link(links.iter(), name))
    }

    /// Returns errors for upstreams that are this host itself: their packets would loop.
    pub fn own_upstreams(self) -> Vec<Message> {
        if !self.has(|next_hop| *next_hop == NextHop::Local) {
            return Vec::new();
        }
        let own = self.targets().filter(|(.., next_hop)| *next_hop == Some(&NextHop::Local));
        own.map(|(at, Target { address, .. }, _)| {
            let message = format!("{address} is an address of this host, which is no upstream");
            Message::about(at, message)
        })
        .collect()
    }

    /// Returns the warnings that do not depend on the next hops of upstreams.
    pub fn of_this_host(self, links: &[Link], addresses: &[OwnAddress]) -> Vec<Message> {
        let (listeners, kernel) = (listeners(), kernel::version());
        let mut findings = self.unheard(&listeners);
        findings.extend(self.unheard_here(&listeners));
        findings.extend(self.robbed(&listeners));
        findings.extend(self.stacked(links, addresses));
        findings.extend(self.met_twice(links));
        findings.extend(self.beyond(kernel));
        findings.extend(self.answers_taken(kernel));
        findings.extend(self.unseen(links, kernel));
        findings.extend(self.unannounced(links));
        findings.extend(self.foreign_addresses(addresses));
        findings
    }

    /// Returns warnings about addresses of flows and sources that this host does not have, each address once.
    fn foreign_addresses(self, own: &[OwnAddress]) -> Vec<Message> {
        let at = Path::default().field("flows").field("addresses");
        let flows = self.desired.flows.addresses.iter().enumerate();
        let flows = flows
            .map(|(index, address)| (at.index(index), *address, "answers to its flows are lost"));
        let sources = self.config.rules.iter().flat_map(RuleConfig::sources).map(|(at, address)| {
            let why = "routers that check the way back (uRPF) drop packets from it, and ICMP errors \
                       about them go elsewhere";
            (at, address, why)
        });
        let mut seen: BTreeSet<IpAddr> = own.iter().map(|own| own.address).collect();
        let foreign = flows.chain(sources).filter(|(_, address, _)| seen.insert(*address));
        let message = |(at, address, why): (_, IpAddr, &str)| {
            Message::about(&at, format!("{address} is no address of this host: {why}"))
                .help(format!("ip addr add {address} dev IFACE"))
        };
        foreign.map(message).collect()
    }

    /// Returns warnings about interfaces of `announce` that are missing or down, and about an announcement
    /// without addresses.
    fn unannounced(self, links: &[Link]) -> Vec<Message> {
        let Some(announce) = &self.desired.announce else { return Vec::new() };
        let at = Path::default().field("announce");
        let named = [
            ("interface", Some(&announce.interface)),
            ("last_resort", announce.last_resort.as_ref()),
        ];
        let mut findings: Vec<Message> = named
            .into_iter()
            .filter_map(|(field, name)| {
                let name = name?;
                let link = find_link(links.iter(), name);
                let (state, help) = match link {
                    None => ("there is no interface", format!("ip link add {name} up type dummy")),
                    Some(link) if link.up => return None,
                    Some(_) => (
                        "nothing is announced from a link that is down,",
                        format!("ip link set {name} up"),
                    ),
                };
                Some(Message::about(&at.field(field), format!("{state} {name}")).help(help))
            })
            .collect();
        if self.desired.announced().is_empty() {
            let message = "no key has an address that can be announced";
            findings.push(Message::about(&at, message));
        }
        findings
    }

    /// Returns warnings about conditions of XDP that interfaces do not meet.
    pub fn of_xdp(self, links: &[Link]) -> Vec<Message> {
        let hops = self.next_hops.values().flat_map(NextHop::hops);
        let egress: BTreeMap<u32, &str> =
            hops.map(|hop| (hop.ifindex, hop.interface.as_str())).collect();
        let mute = egress.iter().filter(|(ifindex, _)| !xdp::takes_frames(**ifindex));
        let mute: Vec<&str> = mute.map(|(_, name)| *name).collect();
        let mut findings = Vec::new();
        for (name, mode) in &self.desired.xdp {
            let at = self.config.interface(name);
            if *mode == Xdp::Native && !mute.is_empty() {
                let message = format!(
                    "XDP cannot send to {}: the driver, or Linux before 6.3, does not offer it, so these \
                     packets go by tc (`generic` sends to all; a veth needs `ethtool -K PEER gro on` at \
                     its other end)",
                    mute.join(", ")
                );
                findings.push(Message::about(&at, message));
            }
            let index = find_link(links.iter(), name).map(|link| link.index);
            let carries_vlans = links.iter().any(|link| link.vlan.is_some() && link.lower == index);
            if carries_vlans && ethtool::get(name, ethtool::FLAGS) & ethtool::RX_VLAN != 0 {
                let message = format!(
                    "{name} takes the tags out of frames, so XDP cannot tell packets of VLANs that this host \
                     is not in: ethtool -K {name} rx-vlan-offload off"
                );
                findings.push(Message::about(&at, message));
            }
        }
        findings
    }

    /// Returns warnings about upstreams without a route, whose packets are dropped and counted, and about
    /// next hops that have not answered, each once, at its first upstream.
    pub fn missing_hops(self) -> Vec<Message> {
        if !self.has(NextHop::is_wanting) {
            return Vec::new();
        }
        let no_route = self.targets().filter_map(|(at, target, next_hop)| match next_hop {
            Some(NextHop::None(reason)) => {
                Some(Message::about(at, format!("no route to {}: {reason}", target.address)))
            }
            _ => None,
        });
        let mut findings: Vec<Message> = no_route.collect();
        let mut seen = BTreeSet::new();
        for (at, target, next_hop) in self.targets() {
            let unknown = next_hop
                .map_or(&[][..], NextHop::hops)
                .iter()
                .filter(|it| it.macs == Macs::Unknown);
            for hop in unknown.filter(|hop| seen.insert((hop.ifindex, hop.gateway))) {
                findings.push(Message::about(at, does_not_answer(&target.address, hop)));
            }
        }
        findings
    }

    /// Returns warnings about upstreams that IPsec policies apply to: packets to them leave in clear.
    pub fn in_clear(self, policies: &[SecurityPolicy]) -> Vec<Message> {
        let mut findings = Vec::new();
        if policies.is_empty() {
            return findings;
        }
        for (at, rule, upstream) in self.upstreams() {
            let target = self.desired.target(rule, upstream);
            let hops = self.next_hops.get(&target).map_or(&[][..], NextHop::hops);
            // Without a port of its own the upstream gets the packet's.
            let port = upstream.port.or(rule.key.only_port());
            let policy = hops.iter().find_map(|hop| {
                let flow = OutgoingFlow {
                    address: target.address.ip,
                    senders: &target.senders,
                    egress: hop.egress,
                    port,
                    ifindex: hop.ifindex,
                };
                ipsec::in_the_way(policies, &flow)
            });
            let Some(policy) = policy else { continue };
            let would = match policy.effect {
                Effect::Drop => "drops",
                _ => "encrypts",
            };
            let address = &target.address.ip;
            findings.push(Message::about(
                at,
                format!(
                    "an IPsec policy {would} packets to {address} ({}), and udplb would send them in clear; if that \
                     is meant: ip xfrm policy add dst {address} proto udp dir out priority 0",
                    policy.text()
                ),
            ));
        }
        findings
    }

    /// Returns warnings about upstreams with several paths, one for each set of paths.
    pub fn several(self) -> Vec<Message> {
        if !self.has(|next_hop| matches!(next_hop, NextHop::Several { .. })) {
            return Vec::new();
        }
        let mut seen = BTreeSet::new();
        let mut findings = Vec::new();
        for (at, target, next_hop) in self.targets() {
            let Some(NextHop::Several { hops, by, routed }) = next_hop else { continue };
            let first = &hops[0].gateway;
            let mut names: Vec<String> =
                hops.iter().map(|hop| format!("{} dev {}", hop.gateway, hop.interface)).collect();
            names.sort_unstable();
            let names = names.join(" or ");
            let by = match by {
                Choice::Sender => "routing rules decide by the sender",
                Choice::Interface => "routing decides by the interface that a packet comes in by",
                Choice::Flow | Choice::Only => "a route with several next hops decides by the flow",
            };
            let then = match routed {
                true => "the kernel is asked for each packet".to_string(),
                false => {
                    format!("with `source: egress`, or where forwarding is off, all go via {first}")
                }
            };
            if seen.insert((by, names.clone())) {
                let address = &target.address;
                let message = format!("{by} whether packets to {address} go via {names}: {then}");
                findings.push(Message::about(at, message));
            }
        }
        findings
    }

    /// Returns warnings about multicast keys that this host has not joined on an existing interface.
    pub fn not_joined(self, links: &[Link]) -> Vec<Message> {
        let Some(joined) = memberships() else { return Vec::new() };
        let mut seen = BTreeSet::new();
        let mut findings = Vec::new();
        for rule in &self.config.rules {
            let KeyAddress::Is(group) = rule.key.address else { continue };
            if !group.is_multicast() {
                continue;
            }
            for link in self.links(links) {
                let name = &link.name;
                if joined.contains(&(name.clone(), group)) || !seen.insert((name, group)) {
                    continue;
                }
                let prefix = if group.is_ipv4() { 32 } else { 128 };
                findings.push(Message::about(
                    &rule.at,
                    format!(
                        "nobody here is a member of {group} on {name}, and a switch or router may send none of \
                         its packets: run arpd, which joins it, or: ip addr add {group}/{prefix} dev {name} autojoin"
                    ),
                ));
            }
        }
        findings
    }

    /// Returns warnings about `block` rules that take packets for sockets of this host.
    fn robbed(self, listeners: &[Listener]) -> Vec<Message> {
        let blocks = self.config.rules.iter().filter(|rule| rule.action == Action::Block);
        let robbed = blocks.filter_map(|rule| {
            let addresses = match rule.key.address {
                KeyAddress::Is(address) => vec![address],
                KeyAddress::Any => self.desired.addresses.clone(),
            };
            let of_family =
                addresses.into_iter().filter(|address| Family::from(*address) == rule.family());
            let mut taken: Vec<String> = of_family
                .flat_map(|address| {
                    let heard = listeners.iter().filter(move |it| it.hears(address));
                    heard.filter(|it| rule.key.has_port(it.port)).map(move |it| with_port(address, it.port))
                })
                .collect();
            taken.sort_unstable();
            taken.dedup();
            let first = taken.first()?;
            let more = match taken.len() - 1 {
                0 => String::new(),
                more => format!(", and on {more} more of its addresses and ports"),
            };
            let message = format!(
                "a socket of this host listens on {first}{more}: with `tc_action: block` it gets nothing"
            );
            Some(Message::about(&rule.at, message))
        });
        robbed.collect()
    }

    /// Returns the `pass` rules with a port on which nobody listens. What netfilter does to their packets
    /// before delivery is not looked at.
    fn unheard(self, listeners: &[Listener]) -> Vec<Message> {
        let passes = self.config.rules.iter().filter(|rule| rule.action == Action::Pass);
        passes
            .filter_map(|rule| {
                // The addresses of `any` may change; senders to a group expect no answer.
                let KeyAddress::Is(address) = rule.key.address else { return None };
                let all = IpAddr::V4(Ipv4Addr::BROADCAST);
                if address.is_multicast() || address == all || self.desired.broadcasts.contains(&address) {
                    return None;
                }
                let heard = |port: u16| {
                    listeners.iter().any(|listener| listener.port == port && listener.hears(address))
                };
                let deaf: Vec<u16> = rule
                    .key
                    .ports
                    .iter()
                    .flat_map(|ports| ports.first..=ports.last)
                    .filter(|port| !heard(*port))
                    .collect();
                let first = deaf.first()?;
                let more = match deaf.len() - 1 {
                    0 => String::new(),
                    more => format!(" and {more} more of its ports"),
                };
                Some(Message::about(
                    &rule.at,
                    format!(
                        "nobody listens on {}{more}: `tc_action: pass` delivers there, and senders get \
                         ICMP errors unless a firewall drops or translates the packets (DNAT)",
                        with_port(address, first)
                    ),
                ))
            })
            .collect()
    }

    /// Returns the upstreams on this host at whose port nobody listens.
    fn unheard_here(self, listeners: &[Listener]) -> Vec<Message> {
        let local = self.upstreams().filter(|(_, _, upstream)| upstream.is_local());
        local
            .filter_map(|(at, rule, upstream)| {
                let KeyAddress::Is(address) = rule.key.address else { return None };
                let port = upstream.port.or(rule.key.only_port())?;
                let hears = |it: &Listener| it.port == port && it.hears(address);
                if address.is_multicast() || listeners.iter().any(hears) {
                    return None;
                }
                let message = format!(
                    "nobody listens on {}, where packets are delivered, unless a firewall translates them (DNAT)",
                    with_port(address, port)
                );
                Some(Message::about(at, message))
            })
            .collect()
    }

    /// Returns the keys whose address sits on a device stacked above an interface, with another MAC
    /// address: every packet for it looks as if it were for another host there.
    fn stacked(self, links: &[Link], addresses: &[OwnAddress]) -> Vec<Message> {
        const KINDS: [&str; 4] = ["macvlan", "ipvlan", "macvtap", "bridge"];
        let named: Vec<&Link> = self.links(links).collect();
        self.config
            .rules
            .iter()
            .filter_map(|rule| {
                let KeyAddress::Is(address) = rule.key.address else { return None };
                let holders = addresses.iter().filter(|own| own.address == address);
                let holder = holders
                    .filter_map(|own| links.iter().find(|link| link.index == own.ifindex))
                    .find_map(|holder| {
                        let mut named = named.iter();
                        let hidden =
                            |link: &&&Link| is_above(holder, link, &KINDS) && holder.mac != link.mac;
                        named.find(hidden).zip(Some(holder))
                    });
                let (interface, holder) = holder?;
                Some(Message::about(
                    &rule.at,
                    format!(
                        "{} is an address of {}, a {} above {}: no packet will match on {}; name {} \
                         in `interfaces` instead",
                        rule.key.address,
                        holder.name,
                        holder.kind,
                        interface.name,
                        interface.name,
                        holder.name
                    ),
                ))
            })
            .collect()
    }

    /// Returns warnings about named interfaces that are stacked: packets that `pass` delivers match on both, so
    /// that upstreams get them twice.
    fn met_twice(self, links: &[Link]) -> Vec<Message> {
        let Some(rule) = self.config.rules.iter().find(|rule| rule.action == Action::Pass) else {
            return Vec::new();
        };
        let named: Vec<&Link> = self.links(links).collect();
        let pairs = named.iter().flat_map(|lower| named.iter().map(move |upper| (lower, upper)));
        pairs
            .filter(|(lower, upper)| goes_up(lower, upper, links))
            .map(|(lower, upper)| {
                let message = format!(
                    "{} is above {}: what `tc_action: pass` copies on {} is copied once more on {}; name \
                     one of them in `interfaces`",
                    upper.name, lower.name, lower.name, upper.name
                );
                Message::about(&rule.at, message)
            })
            .collect()
    }

    /// Returns a warning if the configuration needs a feature that this kernel lacks.
    fn beyond(self, kernel: (u32, u32)) -> Option<Message> {
        let answers =
            |rule: &&RuleConfig| rule.action == Action::Block && rule.mode == Mode::Balance;
        let rule = self.config.rules.iter().find(answers).filter(|_| kernel < (5, 12))?;
        let (major, minor) = kernel;
        let message = format!(
            "Linux {major}.{minor} does not report the MTU of a route to the program (5.12 does): senders of \
             too large packets get the MTU that `apply` or arpd found, and no error if it has become lower since"
        );
        Some(Message::about(&rule.at, message))
    }

    /// Returns a warning if a rule takes answers to this host's own sockets and the kernel does not show the program
    /// which sockets wait for some.
    fn answers_taken(self, kernel: (u32, u32)) -> Option<Message> {
        let taken = |rule: &&Rule| takes_answers(rule, self.desired.local_ports);
        let rule = self.desired.rules.iter().find(taken).filter(|_| kernel < (6, 2))?;
        let written = self.config.rules.iter().find(|it| it.name == rule.name)?;
        let (major, minor) = kernel;
        let message = format!(
            "with `tc_action: block` this rule takes answers to this host's own questions (DNS, NTP) too, unless \
             their sockets are connected: Linux {major}.{minor} does not show which ports it chose itself (6.2 does); \
             leave the ports of net.ipv4.ip_local_port_range out"
        );
        Some(Message::about(&written.at, message))
    }

    /// Returns the tunnels whose packets reach the filter with the tunnel's own header first, so that no rule
    /// matches: those of the kernel itself before Linux 5.14.
    fn unseen(self, links: &[Link], kernel: (u32, u32)) -> Vec<Message> {
        let unseen = self.links(links).filter(|link| hides_packets(&link.kind, kernel));
        let (major, minor) = kernel;
        let finding = |link: &Link| {
            let message = format!(
                "no packet will match on the {} tunnel {}: Linux {major}.{minor} shows filters the tunnel's own \
                 header (5.14 does not); relay at its other end, or boot a later kernel",
                link.kind, link.name
            );
            Message::about(&self.config.interface(&link.name), message)
        };
        unseen.map(finding).collect()
    }
}

fn does_not_answer(address: &config::Address, hop: &Hop) -> String {
    let Hop { gateway, interface, .. } = hop;
    let asked = if gateway.is_ipv4() { "ARP" } else { "NDP" };
    match *gateway == address.ip {
        true => format!("{address} on {interface} does not answer {asked}"),
        false => {
            format!("{gateway} on {interface}, the gateway to {address}, does not answer {asked}")
        }
    }
}

/// Returns true if frames of the lower interface are received on the upper one next, or later.
fn goes_up(lower: &Link, upper: &Link, links: &[Link]) -> bool {
    // Stacks are rarely higher.
    const MAX_HEIGHT: usize = 8;
    let mut reached = vec![lower];
    for _ in 0..MAX_HEIGHT {
        let above = |link: &&Link| reached.iter().any(|below| takes_over(link, below));
        reached = links.iter().filter(above).collect();
        if reached.iter().any(|link| link.index == upper.index) {
            return true;
        }
    }
    false
}

/// Returns true if `link` receives the frames of `below`, which has the same MAC address.
fn takes_over(link: &Link, below: &Link) -> bool {
    is_above(link, below, &["vlan", "ipvlan", "bridge", "bond", "team"]) && link.mac == below.mac
}

/// Returns true if `upper` is of one of these kinds and is stacked on `lower` or has it as a port.
fn is_above(upper: &Link, lower: &Link, kinds: &[&str]) -> bool {
    let is_next = upper.lower == Some(lower.index) || lower.controller == Some(upper.index);
    is_next && kinds.contains(&upper.kind.as_str())
}

fn hides_packets(kind: &str, kernel: (u32, u32)) -> bool {
    kernel < (5, 14) && ["gre", "ip6gre", "ipip", "sit", "ip6tnl"].contains(&kind)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Ports;

    #[test]
    fn kernel_that_hides_waiting_sockets_is_named() {
        let text = "{ version: 1, interfaces: [a], rules: [{ key: { address: 10.0.0.5, port: any }, \
                    options: { tc_action: block }, upstream: [{ address: 10.0.9.1 }] }] }";
        let config = Config::parse("test.yaml", text).expect("a good configuration");
        let mut desired = Desired::written(&config, &config.interfaces);
        let warned = |desired: &Desired, kernel| {
            let next_hops = HashMap::default();
            let candidate = Candidate { config: &config, desired, next_hops: &next_hops };
            candidate.answers_taken(kernel).is_some()
        };
        assert!(!warned(&desired, (6, 1)));
        desired.local_ports = Some(Ports { first: 32_768, last: 60_999 });
        assert!(warned(&desired, (6, 1)));
        assert!(!warned(&desired, (6, 2)));
    }

    #[test]
    fn tunnels_hide_packets_from_filters_of_old_kernels() {
        assert!(hides_packets("gre", (5, 10)) && hides_packets("ip6tnl", (5, 13)));
        assert!(!hides_packets("gre", (5, 14)) && !hides_packets("wireguard", (5, 10)));
    }
}
