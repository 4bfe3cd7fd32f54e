//! What is applied as it stands but probably not meant. Pure, but for reading /proc.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::config::{
    self, Action, Address, Config, Family, Finding, KeyAddress, Mode, Path, Rule, with_port,
};
use crate::kernel;
use crate::netlink::{Link, OwnAddress};
use crate::nexthop::{Hop, Macs, Way};
use crate::plan::Desired;

/// A bound UDP socket; the unspecified address stands for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    pub address: IpAddr,
    pub port: u16,
}

impl Listener {
    /// Of an IPv6 socket for all addresses it is not known whether it is for IPv6 only; the benefit
    /// of the doubt spares a warning.
    fn hears(&self, address: IpAddr) -> bool {
        match self.address {
            IpAddr::V4(all) if all.is_unspecified() => address.is_ipv4(),
            IpAddr::V6(all) if all.is_unspecified() => true,
            one => one == address,
        }
    }
}

/// Upstreams that are this host itself: errors, since their packets would come round again.
pub fn own_upstreams(
    config: &Config,
    desired: &Desired,
    ways: &BTreeMap<Address, Way>,
) -> Vec<Finding> {
    upstreams(config, desired)
        .filter(|(_, address)| ways.get(address) == Some(&Way::Local))
        .map(|(at, address)| {
            Finding::new(at, format!("{address} is an address of this host, which is no upstream"))
        })
        .collect()
}

/// Whatever does not depend on the ways to upstreams.
pub fn of_this_host(
    config: &Config,
    desired: &Desired,
    links: &[Link],
    addresses: &[OwnAddress],
) -> Vec<Finding> {
    let listeners = listeners();
    let mut findings = unheard(config, desired, &listeners);
    findings.extend(robbed(config, desired, &listeners));
    findings.extend(stacked(config, &desired.interfaces, links, addresses));
    findings.extend(met_twice(config, &desired.interfaces, links));
    findings.extend(beyond(config, kernel::version()));
    findings
}

/// Upstreams without a route, or whose next hop does not answer: their packets are dropped and counted
/// until that changes.
pub fn unreachable(
    config: &Config,
    desired: &Desired,
    ways: &BTreeMap<Address, Way>,
) -> Vec<Finding> {
    upstreams(config, desired)
        .filter_map(|(at, address)| match ways.get(address) {
            Some(Way::None(reason)) => {
                Some(Finding::new(at, format!("no route to {address}: {reason}")))
            }
            Some(Way::Hop(hop)) if hop.macs == Macs::Unknown => {
                Some(Finding::new(at, unanswered(address, hop)))
            }
            _ => None,
        })
        .collect()
}

fn unanswered(address: &Address, hop: &Hop) -> String {
    let Hop { gateway, interface, .. } = hop;
    let asked = if gateway.is_ipv4() { "ARP" } else { "NDP" };
    match *gateway == address.ip {
        true => format!("{address} on {interface} does not answer {asked}"),
        false => {
            format!("{gateway} on {interface}, the gateway to {address}, does not answer {asked}")
        }
    }
}

/// The upstreams that serve and are in the file, with their places in it. Both have the same order,
/// but what serves may lack some.
fn upstreams<'a>(
    config: &'a Config,
    desired: &'a Desired,
) -> impl Iterator<Item = (&'a Path, &'a Address)> {
    let by_name = config.rules.iter().map(|rule| (rule.name.as_str(), rule));
    let by_name: HashMap<&str, &Rule> = by_name.collect();
    desired.rules.iter().flat_map(move |rule| {
        let written = by_name.get(rule.name.as_str()).copied();
        let mut written = written.into_iter().flat_map(Rule::destinations).peekable();
        rule.destinations().filter_map(move |upstream| {
            let is_other =
                |it: &&config::Upstream| (&it.address, it.port) != (&upstream.host, upstream.port);
            while written.next_if(is_other).is_some() {}
            Some((&written.peek()?.at, &upstream.address))
        })
    })
}

/// `block` rules that take what sockets of this host listen for.
fn robbed(config: &Config, desired: &Desired, listeners: &[Listener]) -> Vec<Finding> {
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
        Some(Finding::new(&rule.at, message))
    });
    robbed.collect()
}

/// Returns the `pass` rules with a port on which nobody listens. What netfilter does to their packets
/// before delivery is not looked at.
fn unheard(config: &Config, desired: &Desired, listeners: &[Listener]) -> Vec<Finding> {
    config
        .rules
        .iter()
        .filter(|rule| rule.action == Action::Pass)
        .filter_map(|rule| {
            // what `any` stands for may change; and a group's senders get no answers
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
            Some(Finding::new(
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
) -> Vec<Finding> {
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
            Some(Finding::new(
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

/// Interfaces that what `pass` leaves here comes in by after another one that is named: rules match on
/// both, and what upstreams get is sent twice.
fn met_twice(config: &Config, interfaces: &[String], links: &[Link]) -> Vec<Finding> {
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
            Finding::new(&rule.at, message)
        })
        .collect()
}

/// Whether frames for the one come in on the other next, or later.
fn goes_up(lower: &Link, upper: &Link, links: &[Link]) -> bool {
    // few are stacked higher
    const MOST: usize = 8;
    let mut reached = vec![lower];
    for _ in 0..MOST {
        let above = |link: &&Link| reached.iter().any(|below| takes_over(link, below));
        reached = links.iter().filter(above).collect();
        if reached.iter().any(|link| link.index == upper.index) {
            return true;
        }
    }
    false
}

/// With another MAC address, the frames would be another host's for the one below.
fn takes_over(link: &Link, below: &Link) -> bool {
    is_above(link, below, &["vlan", "ipvlan", "bridge", "bond", "team"]) && link.mac == below.mac
}

/// Whether the one is a device of these kinds that is made upon the other, or has it as a port.
fn is_above(upper: &Link, lower: &Link, kinds: &[&str]) -> bool {
    let is_next = upper.lower == Some(lower.index) || lower.controller == Some(upper.index);
    is_next && kinds.contains(&upper.kind.as_str())
}

/// What a kernel cannot do that the configuration would have it do.
fn beyond(config: &Config, kernel: (u32, u32)) -> Option<Finding> {
    let answers = |rule: &&Rule| rule.action == Action::Block && rule.mode == Mode::Balance;
    let rule = config.rules.iter().find(answers).filter(|_| kernel < (5, 12))?;
    let (major, minor) = kernel;
    let message = format!(
        "Linux {major}.{minor} does not say how large a packet may be that is too large: senders \
         hear what `apply` or arpd found, and nothing where that has become less since (5.12 does)"
    );
    Some(Finding::new(&rule.at, message))
}

/// The bound UDP sockets of this network namespace.
fn listeners() -> Vec<Listener> {
    let mut listeners = Vec::new();
    for path in ["/proc/thread-self/net/udp", "/proc/thread-self/net/udp6"] {
        let table = fs::read_to_string(path).unwrap_or_default();
        listeners.extend(table.lines().skip(1).filter_map(listener));
    }
    listeners
}

/// A line of /proc/net/udp or udp6. A connected socket hears its peer only.
fn listener(line: &str) -> Option<Listener> {
    let mut words = line.split_whitespace().skip(1);
    let (address, port) = endpoint(words.next()?)?;
    let (_, peer_port) = words.next()?.rsplit_once(':')?;
    (u16::from_str_radix(peer_port, 16) == Ok(0)).then_some(Listener { address, port })
}

/// An address and a port, as /proc/net/udp and udp6 have them: hexadecimal words as they lie in memory.
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
            // an IPv4 address, of a socket for both families
            Ipv6Addr::from(octets).to_canonical()
        }
        _ => return None,
    };
    Some((address, u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::{Listener, listener};

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
