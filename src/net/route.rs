//! Routes and policy rules.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use foldhash::{HashMap, HashMapExt, HashSet, HashSetExt};
pub(super) use netlink_packet_route::route::RouteFlags;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteMetric, RouteNextHopFlags, RouteType, RouteVia,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use netlink_packet_route::{AddressFamily, IpProtocol, RouteNetlinkMessage};

use super::batch::{Answer, Batches};
use super::link::{Link, find_link};
use super::neighbour::NeighbourKey;
use super::{Netlink, family, family_of};
use crate::config::{Address, Network};
use crate::net::policy::{Match, PolicyAction, PolicyRule, RouteOutcome, TableRoute};

/// Route of packets to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    pub ifindex: u32,
    /// Address of the neighbour: a gateway, or the address itself.
    pub gateway: IpAddr,
    /// In bytes; `None` for that of the interface.
    pub mtu: Option<u32>,
    /// Source address that a local sender's packets would have.
    pub egress: Option<IpAddr>,
    /// True if the address is one of this host's.
    pub local: bool,
}

impl Route {
    /// Returns the neighbour that its packets go to.
    pub fn neighbour(&self) -> NeighbourKey {
        (self.ifindex, self.gateway)
    }
}

/// The prefixes of all routes of a family.
struct Prefixes {
    networks: HashSet<Network>,
    /// The lengths that occur, the longest first.
    lengths: Vec<u8>,
}

impl Prefixes {
    /// Number of requests that cost less than a dump.
    const FEW: usize = 256;

    /// Reads the prefixes that addresses of a family may match; `None` if to look up each address costs less.
    fn read(asked: &[IpAddr], ipv6: bool) -> io::Result<Option<Prefixes>> {
        let asked = asked.iter().filter(|address| address.is_ipv6() == ipv6).count();
        if asked < Prefixes::FEW {
            return Ok(None);
        }
        let mut message = RouteMessage::default();
        message.header.address_family = family_of(ipv6);
        let mut networks = HashSet::new();
        let read = Batches::open()?.dump(RouteNetlinkMessage::GetRoute(message), |reply| {
            if let RouteNetlinkMessage::NewRoute(message) = reply {
                networks.insert(network(&message));
            }
            networks.len() < asked / 4
        });
        let mut lengths: Vec<u8> = networks.iter().map(|network| network.prefix).collect();
        lengths.sort_unstable_by(|one, other| other.cmp(one));
        lengths.dedup();
        Ok(read?.then_some(Prefixes { networks, lengths }))
    }

    /// Returns the longest prefix in any table that matches an address. All addresses for which it is the same
    /// match the same routes: every shorter prefix matches all of them or none.
    fn longest(&self, address: IpAddr) -> Network {
        let mut networks = self.lengths.iter().map(|length| Network::new(address, *length));
        let longest = networks.find(|network| self.networks.contains(network));
        longest.filter(|_| !is_special(address)).unwrap_or(address.into())
    }
}

/// Returns true for addresses that the kernel does not only look up: of no network, to groups, broadcast or reserved,
/// and on one link.
fn is_special(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => matches!(address.octets()[0], 0 | 224..),
        IpAddr::V6(address) => {
            address.is_unspecified() || address.is_multicast() || address.is_unicast_link_local()
        }
    }
}

impl Netlink {
    /// Returns the rules of `ip rule` for a family, sorted by priority.
    pub async fn rules(&self, ipv6: bool) -> io::Result<Vec<PolicyRule>> {
        let mut message = RuleMessage::default();
        message.header.family = family_of(ipv6);
        let request = RouteNetlinkMessage::GetRule(message);
        let rules = self.dump(request, |reply| match reply {
            RouteNetlinkMessage::NewRule(message) => Some(policy_rule(&message)),
            _ => None,
        });
        let mut rules = rules.await?;
        rules.sort_by_key(|rule| rule.priority);
        Ok(rules)
    }

    /// Returns the routes of all tables of a family that match any of these addresses.
    pub async fn routes_to(
        &self,
        addresses: &BTreeSet<IpAddr>,
        ipv6: bool,
    ) -> io::Result<Vec<TableRoute>> {
        let mut message = RouteMessage::default();
        message.header.address_family = family_of(ipv6);
        let mut matched = HashMap::<u8, HashSet<Network>>::new();
        self.dump(RouteNetlinkMessage::GetRoute(message), |reply| {
            let RouteNetlinkMessage::NewRoute(message) = reply else { return None };
            let route = table_route(&message, ipv6)?;
            let prefix = route.network.prefix;
            let networks = matched.entry(prefix).or_insert_with(|| {
                addresses.iter().map(|address| Network::new(*address, prefix)).collect()
            });
            networks.contains(&route.network).then_some(route)
        })
        .await
    }

    /// Returns the interface of the default route for IPv4.
    ///
    /// # Errors
    /// The request failed; the route is unknown.
    pub fn default_interface(&self) -> io::Result<Option<u32>> {
        // an address for documentation (RFC 5737)
        const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
        let paths = self.paths(&[ELSEWHERE.into()], &HashMap::new())?.pop();
        Ok(paths.and_then(|paths| Some(paths.ok()?.first()?.ifindex)))
    }

    /// Returns all paths to each address, at least one, in the order asked, or the kernel's reason why
    /// there is none. `links` are all interfaces, by index.
    ///
    /// # Errors
    /// The request failed; the paths are unknown.
    pub fn paths(
        &self,
        addresses: &[Address],
        links: &HashMap<u32, Link>,
    ) -> io::Result<Vec<Result<Vec<Route>, String>>> {
        let routed = addresses.iter().filter(|address| address.scope.is_none());
        let routed: Vec<IpAddr> = routed.map(|address| address.ip).collect();
        let mut routes = self.matched_routes(&routed)?.into_iter();
        let path_of = |address: &Address| match &address.scope {
            Some(interface) => Some(on_link(address.ip, interface, links).map(|path| vec![path])),
            None => routes.next(),
        };
        let mut all: Vec<_> = addresses.iter().filter_map(path_of).collect();
        let mut unsourced: Vec<(IpAddr, &mut Route)> = addresses
            .iter()
            .zip(&mut all)
            .flat_map(|(address, paths)| paths.iter_mut().flatten().map(|path| (address.ip, path)))
            .collect();
        self.add_sources(&mut unsourced)?;
        Ok(all)
    }

    /// Looks up the route that each address matches, once for all addresses that match the same prefix.
    fn matched_routes(&self, asked: &[IpAddr]) -> io::Result<Vec<RouteOutcome>> {
        let prefixes = [Prefixes::read(asked, false)?, Prefixes::read(asked, true)?];
        let mut groups = HashMap::new();
        let (mut requests, mut group_of) = (Vec::new(), Vec::with_capacity(asked.len()));
        for address in asked {
            let prefixes = prefixes[usize::from(address.is_ipv6())].as_ref();
            let group = prefixes.map_or((*address).into(), |prefixes| prefixes.longest(*address));
            group_of.push(*groups.entry(group).or_insert_with(|| {
                requests.push(route_request(*address, 0, RouteFlags::FibMatch));
                requests.len() - 1
            }));
        }
        let answers = self.batches.request(requests)?;
        asked.iter().zip(group_of).map(|(ip, group)| routes_of(*ip, &answers[group])).collect()
    }

    /// Sets the source address of paths to these addresses, if the route has none.
    pub fn add_sources(&self, paths: &mut [(IpAddr, &mut Route)]) -> io::Result<()> {
        let is_unsourced = |path: &Route| !path.local && path.egress.is_none();
        let asked: HashMap<_, _> = paths
            .iter()
            .filter(|(_, path)| is_unsourced(path))
            .map(|(address, path)| (source_key(*address, path), *address))
            .collect();
        // The kernel would choose one of several paths, but each has its own source address.
        let requests = asked.iter().map(|(key, address)| (*address, key.0, RouteFlags::empty()));
        let found = self.routes(&requests.collect::<Vec<_>>())?;
        let sources: HashMap<_, _> = asked.keys().zip(found).collect();
        for (address, path) in paths.iter_mut().filter(|(_, path)| is_unsourced(path)) {
            if let Some(Ok(found)) = sources.get(&source_key(*address, path))
                && let [found, ..] = found[..]
            {
                (path.egress, path.local) = (found.egress, found.local);
            }
        }
        Ok(())
    }

    /// Looks up routes of local senders, each by address, index of the interface that the sender is bound to,
    /// or 0, and flags. An inner error is the kernel's reason why there is no path.
    fn routes(&self, asked: &[(IpAddr, u32, RouteFlags)]) -> io::Result<Vec<RouteOutcome>> {
        let request = |(address, output, flags): &_| route_request(*address, *output, *flags);
        let answers = self.batches.request(asked.iter().map(request).collect())?;
        asked
            .iter()
            .zip(&answers)
            .map(|((address, ..), answer)| routes_of(*address, answer))
            .collect()
    }
}

/// Returns the request for the route of a local sender, bound to an interface if its index is not 0. With an
/// input interface the kernel refuses to answer while forwarding is off.
pub(super) fn route_request(
    address: IpAddr,
    output: u32,
    flags: RouteFlags,
) -> RouteNetlinkMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(address);
    message.header.destination_prefix_length = if address.is_ipv4() { 32 } else { 128 };
    message.header.flags = flags;
    message.attributes.push(RouteAttribute::Destination(address.into()));
    if output != 0 {
        message.attributes.push(RouteAttribute::Oif(output));
    }
    RouteNetlinkMessage::GetRoute(message)
}

/// Returns the paths of an answer. The inner error is the kernel's reason why there is none.
fn routes_of(address: IpAddr, answer: &Answer) -> io::Result<RouteOutcome> {
    let routes = match answer {
        Ok(RouteNetlinkMessage::NewRoute(message)) => route(address, message),
        Ok(_) => Vec::new(),
        Err(error) => {
            let failed = || match error.raw_os_error() {
                Some(code) => io::Error::from_raw_os_error(code),
                None => io::Error::new(error.kind(), error.to_string()),
            };
            return no_route(error).map(Err).ok_or_else(failed);
        }
    };
    Ok(if routes.is_empty() { Err("no unicast route".into()) } else { Ok(routes) })
}

/// Returns the key of a local sender's address: the interface, and the destination or, on IPv4,
/// the gateway, which many destinations share.
fn source_key(destination: IpAddr, path: &Route) -> (u32, IpAddr, bool) {
    let by_gateway = destination.is_ipv4() && path.gateway != destination;
    (path.ifindex, if by_gateway { path.gateway } else { destination }, by_gateway)
}

/// Returns the route to an address that exists on one link only; no table is looked up.
fn on_link(address: IpAddr, interface: &str, links: &HashMap<u32, Link>) -> Result<Route, String> {
    let link = find_link(links.values(), interface);
    let link = link.ok_or_else(|| format!("there is no interface {interface}"))?;
    Ok(Route { ifindex: link.index, gateway: address, mtu: None, egress: None, local: false })
}

/// Returns the reason why an address has no route, from the error of a look-up; `None` for errors of the
/// request itself.
fn no_route(error: &io::Error) -> Option<String> {
    let reason = match error.raw_os_error()? {
        libc::EINVAL => "a blackhole route drops its packets",
        libc::EACCES => "a prohibit route refuses its packets",
        libc::EHOSTUNREACH => "an unreachable route refuses its packets",
        libc::ENETUNREACH => "no route matches",
        libc::ENETDOWN | libc::ENODEV | libc::EADDRNOTAVAIL => return Some(error.to_string()),
        _ => return None,
    };
    Some(reason.into())
}

/// Returns the paths of a route, those that are down last; none for a blackhole, unreachable, multicast or
/// broadcast route.
fn route(address: IpAddr, message: &RouteMessage) -> Vec<Route> {
    let local = message.header.kind == RouteType::Local;
    if !local && message.header.kind != RouteType::Unicast {
        return Vec::new();
    }
    let mtu = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Metrics(metrics) => metrics.iter().find_map(|metric| match metric {
            RouteMetric::Mtu(mtu) => Some(*mtu),
            _ => None,
        }),
        _ => None,
    });
    let egress = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::PrefSource(address) => ip(address),
        _ => None,
    });
    let mut only = Route { ifindex: 0, gateway: address, mtu, egress, local };
    let (mut alive, mut dead) = (Vec::new(), Vec::new());
    for attribute in &message.attributes {
        let RouteAttribute::MultiPath(hops) = attribute else { continue };
        for hop in hops {
            let mut path = Route { ifindex: hop.interface_index, ..only };
            read_hop(&mut path, &hop.attributes);
            let down = RouteNextHopFlags::Dead | RouteNextHopFlags::Linkdown;
            if hop.flags.intersects(down) { dead.push(path) } else { alive.push(path) }
        }
    }
    if address.is_ipv6() {
        // The kernel may list any of them first.
        alive.sort_by_key(Route::neighbour);
        dead.sort_by_key(Route::neighbour);
    }
    read_hop(&mut only, &message.attributes);
    alive.append(&mut dead);
    alive.push(only);
    alive.retain(|path| path.ifindex != 0);
    alive
}

/// Returns the prefix of a route.
fn network(message: &RouteMessage) -> Network {
    let anywhere: IpAddr = match message.header.address_family {
        AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
        _ => Ipv4Addr::UNSPECIFIED.into(),
    };
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(address) => ip(address),
        _ => None,
    });
    Network::new(address.unwrap_or(anywhere), message.header.destination_prefix_length)
}

/// Parses a route of a dump.
fn table_route(message: &RouteMessage, ipv6: bool) -> Option<TableRoute> {
    let anywhere: IpAddr = match ipv6 {
        true => Ipv6Addr::UNSPECIFIED.into(),
        false => Ipv4Addr::UNSPECIFIED.into(),
    };
    let header = &message.header;
    let (mut table, mut address, mut metric) = (u32::from(header.table), anywhere, 0);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(id) => table = *id,
            RouteAttribute::Destination(destination) => address = ip(destination)?,
            RouteAttribute::Priority(priority) => metric = *priority,
            // Routes for some senders only are not modelled; they are rare.
            RouteAttribute::Source(_) => return None,
            _ => {}
        }
    }
    let outcome = match header.kind {
        RouteType::Throw => None,
        RouteType::BlackHole => Some(Err("a blackhole route drops its packets".into())),
        RouteType::Prohibit => Some(Err("a prohibit route refuses its packets".into())),
        RouteType::Unreachable => Some(Err("an unreachable route refuses its packets".into())),
        _ => match route(anywhere, message) {
            routes if routes.is_empty() => Some(Err("no unicast route".into())),
            routes => Some(Ok(routes)),
        },
    };
    let network = Network::new(address, header.destination_prefix_length);
    Some(TableRoute { table, network, metric, outcome })
}

/// Reads a rule of `ip rule`. Packets in question have no mark, like the route look-ups of the program;
/// their source port and class of service are unknown.
fn policy_rule(message: &RuleMessage) -> PolicyRule {
    let header = &message.header;
    let mut rule = PolicyRule {
        priority: 0,
        inverted: header.flags.contains(RuleFlags::Invert),
        from: None,
        to: None,
        input: None,
        vrf: false,
        others: if header.tos == 0 { Match::All } else { Match::Some },
        suppressed: None,
        action: PolicyAction::Nop,
    };
    let (mut table, mut target, mut mark, mut mask) = (u32::from(header.table), 0, 0, u32::MAX);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Source(address) => {
                rule.from = Some(Network::new(*address, header.src_len));
            }
            RuleAttribute::Destination(address) => {
                rule.to = Some(Network::new(*address, header.dst_len));
            }
            RuleAttribute::Iifname(name) => rule.input = Some(name.clone()),
            RuleAttribute::L3MDev(is_set) => rule.vrf = *is_set,
            // All ones stand for none.
            RuleAttribute::SuppressPrefixLen(length) => {
                rule.suppressed = u8::try_from(*length).ok();
            }
            RuleAttribute::Priority(priority) => rule.priority = *priority,
            RuleAttribute::Table(id) => table = *id,
            RuleAttribute::Goto(priority) => target = *priority,
            RuleAttribute::FwMark(bits) => mark = *bits,
            RuleAttribute::FwMask(bits) => mask = *bits,
            other => rule.others = rule.others.min(selector(other)),
        }
    }
    if mark & mask != 0 {
        rule.others = Match::No;
    }
    rule.action = match header.action {
        RuleAction::ToTable => PolicyAction::Table(table),
        RuleAction::Goto if !header.flags.contains(RuleFlags::Unresolved) => {
            PolicyAction::Goto(target)
        }
        RuleAction::Blackhole => PolicyAction::Refuse("a blackhole rule drops its packets"),
        RuleAction::Unreachable => PolicyAction::Refuse("an unreachable rule refuses its packets"),
        RuleAction::Prohibit => PolicyAction::Refuse("a prohibit rule refuses its packets"),
        _ => PolicyAction::Nop,
    };
    rule
}

/// Returns the share of packets that a selector matches.
fn selector(attribute: &RuleAttribute) -> Match {
    match attribute {
        RuleAttribute::Oifname(_) => Match::No,
        RuleAttribute::TunId(id) if *id != 0 => Match::No,
        RuleAttribute::IpProtocol(protocol) if *protocol != IpProtocol::Udp => Match::No,
        RuleAttribute::UidRange(range) if range.start != 0 => Match::No,
        RuleAttribute::TunId(_) | RuleAttribute::IpProtocol(_) | RuleAttribute::UidRange(_) => {
            Match::All
        }
        // The protocol that made the rule, and its realm: no selectors.
        RuleAttribute::Protocol(_) | RuleAttribute::Realm(_) => Match::All,
        // Ports, and selectors that are unknown here.
        _ => Match::Some,
    }
}

fn read_hop(route: &mut Route, attributes: &[RouteAttribute]) {
    for attribute in attributes {
        match attribute {
            RouteAttribute::Oif(index) => route.ifindex = *index,
            RouteAttribute::Gateway(gateway) => {
                route.gateway = ip(gateway).unwrap_or(route.gateway);
            }
            RouteAttribute::Via(RouteVia::Inet6(gateway)) => route.gateway = (*gateway).into(),
            _ => {}
        }
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    use super::{Netlink, Network, Prefixes, RouteFlags, RouteOutcome};

    fn prefixes(networks: &[&str]) -> Prefixes {
        let networks: Vec<Network> =
            networks.iter().map(|network| network.parse().expect("a network")).collect();
        let mut lengths: Vec<u8> = networks.iter().map(|network| network.prefix).collect();
        lengths.sort_unstable_by(|one, other| other.cmp(one));
        Prefixes { networks: networks.into_iter().collect(), lengths }
    }

    #[test]
    fn longest_prefix_is_that_of_any_table() {
        let prefixes = prefixes(&["10.0.0.0/8", "10.1.0.0/16", "10.1.2.3/32", "224.0.0.0/4"]);
        for (address, longest) in [
            ("10.9.9.9", "10.0.0.0/8"),
            ("10.1.2.4", "10.1.0.0/16"),
            ("10.1.2.3", "10.1.2.3/32"),
            ("11.0.0.1", "11.0.0.1/32"),
            ("224.0.0.1", "224.0.0.1/32"),
        ] {
            let found = prefixes.longest(address.parse().expect("an address"));
            assert_eq!(found, longest.parse().expect("a network"), "{address}");
        }
    }

    /// Half of the addresses share routes of this host's tables, and the others have any or none.
    #[test]
    fn shared_answers_are_those_of_each_address() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let addresses: Vec<IpAddr> = (0..1000_u32)
            .flat_map(|nth| {
                let random = nth.wrapping_mul(2_654_435_761);
                [
                    Ipv4Addr::from_bits(0x7f00_0001 + nth).into(),
                    Ipv4Addr::from_bits(random).into(),
                    Ipv6Addr::from_bits(u128::from(random) << 96).into(),
                ]
            })
            .collect();
        runtime.expect("a runtime").block_on(async {
            let netlink = Netlink::open().expect("a socket");
            let each: Vec<_> =
                addresses.iter().map(|address| (*address, 0, RouteFlags::FibMatch)).collect();
            let each: Vec<RouteOutcome> = netlink.routes(&each).expect("answers");
            let shared = netlink.matched_routes(&addresses).expect("answers");
            for ((address, each), shared) in addresses.iter().zip(each).zip(shared) {
                assert_eq!(shared, each, "{address}");
            }
            assert!(Prefixes::read(&addresses, false).expect("a dump").is_some());
        });
    }
}
