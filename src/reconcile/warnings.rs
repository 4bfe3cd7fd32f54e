//! Warnings about configurations that are valid but probably not intended. Pure, but for reading /proc.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::config::{
    self, Action, Config, Family, KeyAddress, Mode, Path, Rule, Unlocated, with_port,
};
use crate::datapath::kernel;
use crate::desired::tables::takes_answers;
use crate::desired::{self, Desired, Upstream};
use crate::net::ipsec::{self, Effect, OutgoingFlow, SecurityPolicy};
use crate::net::link::{Link, OwnAddress, find_link};
use crate::net::nexthop::{Hop, Macs, Way};
use crate::net::routing::{Choice, Target};

/// A bound UDP socket; the unspecified address means all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    pub address: IpAddr,
    pub port: u16,
}

impl Listener {
    /// Counts an IPv6 socket for all addresses as open for IPv4: /proc does not show `IPV6_V6ONLY`.
    fn hears(&self, address: IpAddr) -> bool {
        match self.address {
            IpAddr::V4(all) if all.is_unspecified() => address.is_ipv4(),
            IpAddr::V6(all) if all.is_unspecified() => true,
            one => one == address,
        }
    }
}

/// Returns errors for upstreams that are this host itself: their packets would loop.
pub fn own_upstreams(
    config: &Config,
    desired: &Desired,
    ways: &BTreeMap<Target, Way>,
) -> Vec<Unlocated> {
    targets(config, desired)
        .filter(|(_, target)| ways.get(target) == Some(&Way::Local))
        .map(|(at, Target { address, .. })| {
            Unlocated::new(
                at,
                format!("{address} is an address of this host, which is no upstream"),
            )
        })
        .collect()
}

/// Returns the warnings that do not depend on the next hops of upstreams.
pub fn of_this_host(
    config: &Config,
    desired: &Desired,
    links: &[Link],
    addresses: &[OwnAddress],
) -> Vec<Unlocated> {
    let listeners = listeners();
    let mut findings = unheard(config, desired, &listeners);
    findings.extend(robbed(config, desired, &listeners));
    findings.extend(stacked(config, &desired.interfaces, links, addresses));
    findings.extend(met_twice(config, &desired.interfaces, links));
    findings.extend(beyond(config, kernel::version()));
    findings.extend(answers_taken(config, desired, kernel::version()));
    findings.extend(unseen(config, &desired.interfaces, links, kernel::version()));
    findings
}

/// Returns warnings about upstreams without a route; their packets are dropped and counted.
pub fn unreachable(
    config: &Config,
    desired: &Desired,
    ways: &BTreeMap<Target, Way>,
) -> Vec<Unlocated> {
    targets(config, desired)
        .filter_map(|(at, target)| match ways.get(&target) {
            Some(Way::None(reason)) => {
                Some(Unlocated::new(at, format!("no route to {}: {reason}", target.address)))
            }
            _ => None,
        })
        .collect()
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

/// Returns warnings about next hops that have not answered, each once, at its first upstream.
pub fn unanswered(
    config: &Config,
    desired: &Desired,
    ways: &BTreeMap<Target, Way>,
) -> Vec<Unlocated> {
    let mut seen = BTreeSet::new();
    let mut findings = Vec::new();
    for (at, target) in targets(config, desired) {
        let hops = ways.get(&target).map_or(&[][..], Way::hops);
        for hop in hops.iter().filter(|hop| hop.macs == Macs::Unknown) {
            if !seen.insert((hop.ifindex, hop.gateway)) {
                continue;
            }
            findings.push(Unlocated::new(at, does_not_answer(&target.address, hop)));
        }
    }
    findings
}

/// Returns warnings about upstreams that IPsec policies apply to: packets to them leave in clear.
pub fn in_clear(
    config: &Config,
    desired: &Desired,
    ways: &BTreeMap<Target, Way>,
    policies: &[SecurityPolicy],
) -> Vec<Unlocated> {
    let mut findings = Vec::new();
    for (at, rule, upstream) in upstreams(config, desired) {
        let target = desired.target(rule, upstream);
        let hops = ways.get(&target).map_or(&[][..], Way::hops);
        // Without a port of its own the upstream gets the packet's.
        let port = upstream.port.or(match rule.key.ports[..] {
            [ports] if ports.first == ports.last => Some(ports.first),
            _ => None,
        });
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
        findings.push(Unlocated::new(
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
pub fn several(config: &Config, desired: &Desired, ways: &BTreeMap<Target, Way>) -> Vec<Unlocated> {
    let mut seen = BTreeSet::new();
    let mut findings = Vec::new();
    for (at, target) in targets(config, desired) {
        let Some(Way::Several { hops, by, routed }) = ways.get(&target) else { continue };
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
            findings.push(Unlocated::new(at, message));
        }
    }
    findings
}

/// Returns warnings about multicast keys that this host has not joined on an existing interface.
pub fn not_joined(config: &Config, interfaces: &[String], links: &[Link]) -> Vec<Unlocated> {
    let Some(joined) = memberships() else { return Vec::new() };
    let mut seen = BTreeSet::new();
    let mut findings = Vec::new();
    for rule in &config.rules {
        let KeyAddress::Is(group) = rule.key.address else { continue };
        if !group.is_multicast() {
            continue;
        }
        for link in interfaces.iter().filter_map(|name| find_link(links.iter(), name)) {
            let name = &link.name;
            if joined.contains(&(name.clone(), group)) || !seen.insert((name, group)) {
                continue;
            }
            let prefix = if group.is_ipv4() { 32 } else { 128 };
            findings.push(Unlocated::new(
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

/// Returns the groups that this host has joined, by interface; `None` if /proc lacks them.
fn memberships() -> Option<BTreeSet<(String, IpAddr)>> {
    let read = |name: &str| fs::read_to_string(format!("/proc/thread-self/net/{name}"));
    // Without IPv6 there is no igmp6.
    let (table, table6) = (read("igmp").ok()?, read("igmp6").unwrap_or_default());
    Some(members(&table).into_iter().chain(table6.lines().filter_map(member6)).collect())
}

/// Parses /proc/net/igmp: a line for each interface, then indented ones for its groups.
fn members(table: &str) -> Vec<(String, IpAddr)> {
    let mut members = Vec::new();
    let mut interface = "";
    for line in table.lines().skip(1) {
        let mut words = line.split_whitespace();
        if line.starts_with(char::is_whitespace) {
            let group = words.next().and_then(|word| u32::from_str_radix(word, 16).ok());
            // A word in the byte order of memory.
            let group = group.map(|group| Ipv4Addr::from(group.to_ne_bytes()));
            members.extend(group.map(|group| (interface.into(), group.into())));
        } else {
            interface = words.nth(1).unwrap_or_default();
        }
    }
    members
}

/// Parses a line of /proc/net/igmp6.
fn member6(line: &str) -> Option<(String, IpAddr)> {
    let mut words = line.split_whitespace();
    let (name, group) = (words.nth(1)?, words.next()?);
    Some((name.into(), Ipv6Addr::from(u128::from_str_radix(group, 16).ok()?).into()))
}

/// Returns the upstreams of `desired` with their rules and their places in the file. Both have the same
/// order, but `desired` may lack some.
fn upstreams<'a>(
    config: &'a Config,
    desired: &'a Desired,
) -> impl Iterator<Item = (&'a Path, &'a desired::Rule, &'a Upstream)> {
    let by_name = config.rules.iter().map(|rule| (rule.name.as_str(), rule));
    let by_name: HashMap<&str, &Rule> = by_name.collect();
    desired.rules.iter().flat_map(move |rule| {
        let written = by_name.get(rule.name.as_str()).copied();
        let mut written = written.into_iter().flat_map(Rule::destinations).peekable();
        rule.destinations().filter_map(move |upstream| {
            let is_other =
                |it: &&config::Upstream| (&it.address, it.port) != (&upstream.host, upstream.port);
            while written.next_if(is_other).is_some() {}
            Some((&written.peek()?.at, rule, upstream))
        })
    })
}

/// Returns warnings about `block` rules that take packets for sockets of this host.
fn robbed(config: &Config, desired: &Desired, listeners: &[Listener]) -> Vec<Unlocated> {
    let blocks = config.rules.iter().filter(|rule| rule.action == Action::Block);
    let robbed = blocks.filter_map(|rule| {
        let addresses = match rule.key.address {
            KeyAddress::Is(address) => vec![address],
            KeyAddress::Any => desired.addresses.clone(),
        };
        let of_family =
            addresses.into_iter().filter(|address| Family::from(*address) == rule.family());
        let takes = |port: u16| {
            rule.key.ports.is_empty() || rule.key.ports.iter().any(|ports| ports.contains(port))
        };
        let mut taken: Vec<String> = of_family
            .flat_map(|address| {
                let heard = listeners.iter().filter(move |it| it.hears(address));
                heard.filter(|it| takes(it.port)).map(move |it| with_port(address, it.port))
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
        Some(Unlocated::new(&rule.at, message))
    });
    robbed.collect()
}

/// Returns the targets of [`upstreams`].
fn targets<'a>(
    config: &'a Config,
    desired: &'a Desired,
) -> impl Iterator<Item = (&'a Path, Target)> {
    upstreams(config, desired).map(|(at, rule, upstream)| (at, desired.target(rule, upstream)))
}

/// Returns the `pass` rules with a port on which nobody listens. What netfilter does to their packets
/// before delivery is not looked at.
fn unheard(config: &Config, desired: &Desired, listeners: &[Listener]) -> Vec<Unlocated> {
    config
        .rules
        .iter()
        .filter(|rule| rule.action == Action::Pass)
        .filter_map(|rule| {
            // The addresses of `any` may change; senders to a group expect no answer.
            let KeyAddress::Is(address) = rule.key.address else { return None };
            let all = IpAddr::V4(Ipv4Addr::BROADCAST);
            if address.is_multicast() || address == all || desired.broadcasts.contains(&address) {
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
            Some(Unlocated::new(
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

/// Returns the keys whose address sits on a device stacked above an interface, with another MAC
/// address: every packet for it looks as if it were for another host there.
fn stacked(
    config: &Config,
    interfaces: &[String],
    links: &[Link],
    addresses: &[OwnAddress],
) -> Vec<Unlocated> {
    const KINDS: [&str; 4] = ["macvlan", "ipvlan", "macvtap", "bridge"];
    let named: Vec<&Link> = links.iter().filter(|link| interfaces.contains(&link.name)).collect();
    config
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
            Some(Unlocated::new(
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
fn met_twice(config: &Config, interfaces: &[String], links: &[Link]) -> Vec<Unlocated> {
    let Some(rule) = config.rules.iter().find(|rule| rule.action == Action::Pass) else {
        return Vec::new();
    };
    let named: Vec<&Link> = links.iter().filter(|link| interfaces.contains(&link.name)).collect();
    let pairs = named.iter().flat_map(|lower| named.iter().map(move |upper| (lower, upper)));
    pairs
        .filter(|(lower, upper)| goes_up(lower, upper, links))
        .map(|(lower, upper)| {
            let message = format!(
                "{} is above {}: what `tc_action: pass` copies on {} is copied once more on {}; name \
                 one of them in `interfaces`",
                upper.name, lower.name, lower.name, upper.name
            );
            Unlocated::new(&rule.at, message)
        })
        .collect()
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

/// Returns a warning if the configuration needs a feature that this kernel lacks.
fn beyond(config: &Config, kernel: (u32, u32)) -> Option<Unlocated> {
    let answers = |rule: &&Rule| rule.action == Action::Block && rule.mode == Mode::Balance;
    let rule = config.rules.iter().find(answers).filter(|_| kernel < (5, 12))?;
    let (major, minor) = kernel;
    let message = format!(
        "Linux {major}.{minor} does not report the MTU of a route to the program (5.12 does): senders of \
         too large packets get the MTU that `apply` or arpd found, and no error if it has become lower since"
    );
    Some(Unlocated::new(&rule.at, message))
}

/// Returns a warning if a rule takes answers to this host's own sockets and the kernel does not show the program
/// which sockets wait for some.
fn answers_taken(config: &Config, desired: &Desired, kernel: (u32, u32)) -> Option<Unlocated> {
    let taken = |rule: &&desired::Rule| takes_answers(rule, desired.local_ports);
    let rule = desired.rules.iter().find(taken).filter(|_| kernel < (6, 2))?;
    let written = config.rules.iter().find(|it| it.name == rule.name)?;
    let (major, minor) = kernel;
    let message = format!(
        "with `tc_action: block` this rule takes answers to this host's own questions (DNS, NTP) too, unless \
         their sockets are connected: Linux {major}.{minor} does not show which ports it chose itself (6.2 does); \
         leave the ports of net.ipv4.ip_local_port_range out"
    );
    Some(Unlocated::new(&written.at, message))
}

/// Returns the tunnels whose packets reach the filter with the tunnel's own header first, so that no rule
/// matches: those of the kernel itself before Linux 5.14.
fn unseen(
    config: &Config,
    interfaces: &[String],
    links: &[Link],
    kernel: (u32, u32),
) -> Vec<Unlocated> {
    let named = interfaces.iter().filter_map(|name| find_link(links.iter(), name));
    let unseen = named.filter(|link| hides_packets(&link.kind, kernel));
    let (major, minor) = kernel;
    let finding = |link: &Link| {
        let message = format!(
            "no packet will match on the {} tunnel {}: Linux {major}.{minor} shows filters the tunnel's own \
             header (5.14 does not); relay at its other end, or boot a later kernel",
            link.kind, link.name
        );
        Unlocated::new(&config.interface(&link.name), message)
    };
    unseen.map(finding).collect()
}

fn hides_packets(kind: &str, kernel: (u32, u32)) -> bool {
    kernel < (5, 14) && ["gre", "ip6gre", "ipip", "sit", "ip6tnl"].contains(&kind)
}

/// Returns the bound UDP sockets of this network namespace.
fn listeners() -> Vec<Listener> {
    let mut listeners = Vec::new();
    for path in ["/proc/thread-self/net/udp", "/proc/thread-self/net/udp6"] {
        let table = fs::read_to_string(path).unwrap_or_default();
        listeners.extend(table.lines().skip(1).filter_map(listener));
    }
    listeners
}

/// Parses a line of /proc/net/udp or udp6; `None` for a connected socket, which receives from its peer only.
fn listener(line: &str) -> Option<Listener> {
    let mut words = line.split_whitespace().skip(1);
    let (address, port) = endpoint(words.next()?)?;
    let (_, peer_port) = words.next()?.rsplit_once(':')?;
    (u16::from_str_radix(peer_port, 16) == Ok(0)).then_some(Listener { address, port })
}

/// Parses an address and a port of /proc/net/udp or udp6: hexadecimal words in the byte order of memory.
pub fn endpoint(text: &str) -> Option<(IpAddr, u16)> {
    let (address, port) = text.split_once(':')?;
    let word = |at: usize| {
        let word = u32::from_str_radix(address.get(at..at + 8)?, 16).ok()?;
        Some(word.to_ne_bytes())
    };
    let address = match address.len() {
        8 => Ipv4Addr::from(word(0)?).into(),
        32 => {
            let words = [word(0)?, word(8)?, word(16)?, word(24)?];
            let octets: [u8; 16] = words.concat().try_into().ok()?;
            // A mapped IPv4 address, of a socket for both families.
            Ipv6Addr::from(octets).to_canonical()
        }
        _ => return None,
    };
    Some((address, u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use crate::config::{Config, Ports};
    use crate::desired::Desired;

    use super::{Listener, answers_taken, hides_packets, listener, member6, members};

    #[test]
    fn kernel_that_hides_waiting_sockets_is_named() {
        let text = "{ version: 1, interfaces: [a], rules: [{ key: { address: 10.0.0.5, port: any }, \
                    options: { tc_action: block }, upstream: [{ address: 10.0.9.1 }] }] }";
        let config = Config::parse("test.yaml", text).expect("a good configuration");
        let mut desired = Desired::written(&config, &config.interfaces);
        assert!(answers_taken(&config, &desired, (6, 1)).is_none());
        desired.local_ports = Some(Ports { first: 32_768, last: 60_999 });
        assert!(answers_taken(&config, &desired, (6, 1)).is_some());
        assert!(answers_taken(&config, &desired, (6, 2)).is_none());
    }

    #[test]
    fn tunnels_hide_packets_from_filters_of_old_kernels() {
        assert!(hides_packets("gre", (5, 10)) && hides_packets("ip6tnl", (5, 13)));
        assert!(!hides_packets("gre", (5, 14)) && !hides_packets("wireguard", (5, 10)));
    }

    #[test]
    fn lines_of_proc_net_igmp() {
        let table = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n\
                     1\tlo        :     1      V3\n\t\t\t\t010000E0     1 0:00000000\t\t0\n\
                     2\teth0      :     2      V3\n\t\t\t\t010101EF     1 0:00000000\t\t0\n\
                     \t\t\t\t010000E0     1 0:00000000\t\t0\n";
        if cfg!(target_endian = "little") {
            let wanted = [("lo", "224.0.0.1"), ("eth0", "239.1.1.1"), ("eth0", "224.0.0.1")];
            let wanted = wanted.map(|(name, group)| (name.into(), group.parse().unwrap()));
            assert_eq!(members(table), wanted);
        }
        let line = "2    eth0            ff050000000000000000000000000005     1 00000004 0";
        assert_eq!(member6(line), Some(("eth0".into(), "ff05::5".parse().unwrap())));
        assert_eq!(member6("2 eth0"), None);
    }

    #[test]
    fn lines_of_proc_net_udp() {
        let line = "  12: 0100007F:0035 00000000:0000 07 00000000:00000000 00:00000000 00000000";
        if cfg!(target_endian = "little") {
            let address = "127.0.0.1".parse().unwrap();
            assert_eq!(listener(line), Some(Listener { address, port: 53 }));
        }
        let of = |address: &str| listener(&format!("   5: {address}:1FBD 0:0 07"));
        let at = |address: &str| Some(Listener { address: address.parse().unwrap(), port: 8125 });
        assert_eq!(of("00000000000000000000000000000000"), at("::"));
        if cfg!(target_endian = "little") {
            assert_eq!(of("B80D0120000000000000000005000000"), at("2001:db8::5"));
            assert_eq!(of("0000000000000000FFFF00000500000A"), at("10.0.0.5"));
        }
        assert_eq!(of("0000000000"), None);
        let connected = "  12: 0100007F:0035 0100007F:1FBD 01 00000000:00000000";
        assert_eq!(listener(connected), None);
        assert_eq!(listener(""), None);
        assert_eq!(listener("1: x:y"), None);
    }

    #[test]
    fn whom_a_socket_hears() {
        let hears = |socket: &str, address: &str| {
            let listener = Listener { address: socket.parse().unwrap(), port: 1 };
            listener.hears(address.parse().unwrap())
        };
        assert!(hears("0.0.0.0", "10.0.0.5") && !hears("0.0.0.0", "2001:db8::5"));
        assert!(hears("::", "10.0.0.5") && hears("::", "2001:db8::5"));
        assert!(hears("2001:db8::5", "2001:db8::5") && !hears("2001:db8::6", "2001:db8::5"));
    }
}
