//! The paths of packets from an input interface, as the kernel forwards them: by policy rules, VRFs and
//! the source address. An `RTM_GETROUTE` request cannot tell: with an input interface the kernel refuses
//! it while forwarding is off, and it refuses this host's own source addresses.

use std::io;
use std::net::IpAddr;

use foldhash::{HashMap, HashMapExt};

use crate::config::{Address, Network};
use crate::net::Netlink;
use crate::net::link::{Link, find_link};
use crate::net::policy::{Policy, PolicyRule, RouteOutcome};
use crate::net::route::Route;

/// An address that packets are sent to, and their senders.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target {
    pub address: Address,
    pub senders: Senders,
}

/// The source addresses of packets as they leave.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Senders {
    /// This host's own address on the path.
    Own,
    /// Any address in these networks; any at all if there are none.
    Among(Vec<Network>),
}

/// The paths that the packets to a target may take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    /// At least one.
    pub routes: Vec<Route>,
    pub by: Choice,
    /// Forwarding is on at every input interface, so that the program can look up each packet's route.
    pub routed: bool,
}

/// Input of the choice between several paths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// None: there is only one path.
    Only,
    /// A hash of the flow, over the paths of one route (ECMP).
    Flow,
    /// Rules that match some senders, ports or classes of service.
    Sender,
    /// The interface that the packet comes in by: rules for it, or its VRF.
    Interface,
}

/// Returns the VRF that an interface is, or is enslaved to.
pub fn vrf<'a>(link: &'a Link, links: &'a HashMap<u32, Link>) -> Option<&'a Link> {
    let controller = || links.get(&link.controller?);
    if link.vrf.is_some() { Some(link) } else { controller().filter(|it| it.vrf.is_some()) }
}

/// Returns the paths to each target for packets that come in by any of `interfaces`, in the order asked,
/// or the reason why there is none. `links` are all interfaces, by index.
///
/// # Errors
/// The request failed; the paths are unknown.
pub async fn paths(
    netlink: &Netlink,
    targets: &[Target],
    interfaces: &[String],
    links: &HashMap<u32, Link>,
) -> io::Result<Vec<Result<Paths, String>>> {
    let named = |name: &String| find_link(links.values(), name);
    let mut inputs: Vec<&Link> = interfaces.iter().filter_map(named).collect();
    inputs.sort_unstable_by_key(|link| link.index);
    inputs.dedup_by_key(|link| link.index);
    let policies = [policy(netlink, targets, false).await?, policy(netlink, targets, true).await?];
    let policy_of = |address: &Address| match address.scope {
        // A scoped address is on its link, whatever the tables contain.
        Some(_) => None,
        None => policies[usize::from(address.ip.is_ipv6())].as_ref(),
    };
    let mut plain = Vec::new();
    let mut numbers = HashMap::with_capacity(targets.len());
    for address in targets.iter().map(|target| &target.address) {
        if policy_of(address).is_none() {
            numbers.entry(address).or_insert_with(|| {
                plain.push(address.clone());
                plain.len() - 1
            });
        }
    }
    let found: Vec<RouteOutcome> = netlink.paths(&plain, links)?;
    let mut all = Vec::with_capacity(targets.len());
    for target in targets {
        let paths = match policy_of(&target.address) {
            None => {
                let found = found[numbers[&target.address]].clone();
                found.map(|routes| Paths::of(target.address.ip, routes, &inputs))
            }
            Some(policy) => policy.paths(target, &inputs, links),
        };
        all.push(paths);
    }
    let mut unsourced = Vec::new();
    for (target, paths) in targets.iter().zip(&mut all) {
        if policy_of(&target.address).is_some() {
            let routes = paths.iter_mut().flat_map(|paths| &mut paths.routes);
            unsourced.extend(routes.map(|route| (target.address.ip, route)));
        }
    }
    netlink.add_sources(&mut unsourced)?;
    for (target, paths) in targets.iter().zip(&mut all) {
        let (Some(policy), Senders::Own) = (policy_of(&target.address), &target.senders) else {
            continue;
        };
        if let Some(mut other) = policy.paths_from_own(target, paths, &inputs, links) {
            let routes = other.routes.iter_mut().map(|route| (target.address.ip, route));
            netlink.add_sources(&mut routes.collect::<Vec<_>>())?;
            *paths = Ok(other);
        }
    }
    Ok(all)
}

/// Reads rules and routes of a family; `None` if it has no targets, or only the kernel's default rules.
async fn policy(netlink: &Netlink, targets: &[Target], ipv6: bool) -> io::Result<Option<Policy>> {
    let routed = targets.iter().filter(|target| target.address.scope.is_none());
    let mut asked = routed.map(|target| target.address.ip).filter(|ip| ip.is_ipv6() == ipv6);
    let Some(first) = asked.next() else { return Ok(None) };
    let rules = netlink.rules(ipv6).await?;
    if rules.iter().all(PolicyRule::is_default) {
        return Ok(None);
    }
    let asked = [first].into_iter().chain(asked).collect();
    let routes = netlink.routes_to(&asked, ipv6).await?;
    Ok(Some(Policy { rules, routes }))
}

impl Paths {
    /// Returns the paths of one route.
    pub fn of(address: IpAddr, routes: Vec<Route>, inputs: &[&Link]) -> Paths {
        let mut hops = routes.iter().map(Route::neighbour);
        let first = hops.next();
        let by = if hops.any(|hop| Some(hop) != first) { Choice::Flow } else { Choice::Only };
        let routed = inputs.iter().all(|link| link.forwards[usize::from(address.is_ipv6())]);
        Paths { routes, by, routed }
    }
}
