//! The way to each upstream: route, gateway and the gateway's MAC address.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use libbpf_rs::{MapCore, MapFlags, MapHandle};

use crate::bpf::{bytes_of, from_bytes, types};
use crate::netlink::{Link, Neighbour, Netlink, Route};
use crate::plan::{Desired, RuleIds};
use crate::tables::wire;

/// How long `apply` waits for neighbours to answer.
pub const PATIENCE: Duration = Duration::from_secs(1);

/// What is known of the way to one address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Way {
    /// Out by an interface, to a neighbour whose MAC address may still be unknown.
    Hop(Hop),
    /// It is this host's own.
    Local,
    /// No route; the reason in the kernel's words.
    None(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hop {
    pub interface: String,
    pub ifindex: u32,
    /// The neighbour to ask for: a gateway, or the upstream itself.
    pub gateway: IpAddr,
    /// Bytes.
    pub mtu: u32,
    /// Own and neighbour's MAC address.
    pub macs: Option<([u8; 6], [u8; 6])>,
}

/// Finds the way to each address, and has the kernel ask for the neighbours it does not know;
/// waits for them, but for no longer than [`PATIENCE`].
pub async fn resolve(
    netlink: &Netlink,
    addresses: &BTreeSet<Ipv4Addr>,
) -> anyhow::Result<BTreeMap<Ipv4Addr, Way>> {
    let links: HashMap<u32, Link> =
        netlink.links().await?.into_iter().map(|link| (link.index, link)).collect();
    let asked: Vec<Ipv4Addr> = addresses.iter().copied().collect();
    let routes = netlink.routes(&asked).await;
    let mut ways: BTreeMap<Ipv4Addr, Way> =
        asked.into_iter().zip(routes.into_iter().map(|route| way(route, &links))).collect();
    let end = Instant::now() + PATIENCE;
    let mut asked_for = HashSet::new();
    loop {
        let missing = add_macs(&mut ways, &links, &netlink.neighbours().await?, &asked_for);
        let new: Vec<(u32, IpAddr)> =
            missing.iter().filter(|neighbour| asked_for.insert(**neighbour)).copied().collect();
        for (neighbour, result) in new.iter().zip(netlink.solicit(&new).await) {
            if let Err(error) = result {
                log::warn!("neighbour {}: {error}", neighbour.1);
            }
        }
        if missing.is_empty() || Instant::now() >= end {
            return Ok(ways);
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn way(route: std::io::Result<Route>, links: &HashMap<u32, Link>) -> Way {
    let route = match route {
        Ok(route) if route.local => return Way::Local,
        Ok(route) => route,
        Err(error) => return Way::None(error.to_string()),
    };
    let Some(link) = links.get(&route.ifindex) else {
        return Way::None(format!("the interface with index {} is gone", route.ifindex));
    };
    Way::Hop(Hop {
        interface: link.name.clone(),
        ifindex: link.index,
        gateway: route.gateway,
        mtu: route.mtu.unwrap_or(link.mtu),
        macs: None,
    })
}

/// Fills in what the neighbour table has; returns the neighbours it lacks and that may yet answer.
fn add_macs(
    ways: &mut BTreeMap<Ipv4Addr, Way>,
    links: &HashMap<u32, Link>,
    neighbours: &[Neighbour],
    asked_for: &HashSet<(u32, IpAddr)>,
) -> HashSet<(u32, IpAddr)> {
    let table: HashMap<(u32, IpAddr), &Neighbour> = neighbours
        .iter()
        .map(|neighbour| ((neighbour.ifindex, neighbour.address), neighbour))
        .collect();
    let mut missing = HashSet::new();
    for way in ways.values_mut() {
        let Way::Hop(hop) = way else { continue };
        let key = (hop.ifindex, hop.gateway);
        let own = links.get(&hop.ifindex).filter(|link| link.ethernet).and_then(|link| link.mac);
        let neighbour = table.get(&key);
        let known = neighbour.filter(|neighbour| neighbour.valid).and_then(|found| found.mac);
        hop.macs = own.zip(known);
        // one that failed before anybody asked now may have come back
        let gave_up = asked_for.contains(&key) && neighbour.is_some_and(|found| found.failed);
        if own.is_some() && known.is_none() && !gave_up {
            missing.insert(key);
        }
    }
    missing
}

/// Tells the program. `ids` are those of `desired`.
pub fn write(
    nexthops: &MapHandle,
    desired: &Desired,
    ids: &[RuleIds],
    ways: &BTreeMap<Ipv4Addr, Way>,
) -> anyhow::Result<()> {
    let mut entries: BTreeMap<u32, types::nexthop> = BTreeMap::new();
    for (rule, ids) in desired.rules.iter().zip(ids) {
        for (upstream, id) in rule.upstreams.iter().zip(&ids.upstreams) {
            entries.insert(*id, entry(upstream.address, ways.get(&upstream.address)));
        }
    }
    if entries.is_empty() {
        return Ok(());
    }
    let keys: Vec<u8> = entries.keys().flat_map(|id| id.to_ne_bytes()).collect();
    let values: Vec<&[u8]> = entries.values().map(bytes_of).collect();
    let count = entries.len() as u32;
    Ok(nexthops.update_batch(&keys, &values.concat(), count, MapFlags::ANY, MapFlags::ANY)?)
}

fn entry(address: Ipv4Addr, way: Option<&Way>) -> types::nexthop {
    let mut entry = types::nexthop { address: wire(address), ..Default::default() };
    let Some(Way::Hop(hop)) = way else { return entry };
    entry.ifindex = hop.ifindex;
    entry.mtu = u16::try_from(hop.mtu).unwrap_or(u16::MAX);
    match hop.gateway {
        IpAddr::V4(gateway) => {
            entry.family = libc::AF_INET as u16;
            entry.gateway[0] = wire(gateway);
        }
        IpAddr::V6(gateway) => {
            entry.family = libc::AF_INET6 as u16;
            for (word, octets) in entry.gateway.iter_mut().zip(gateway.octets().chunks(4)) {
                *word = u32::from_ne_bytes([octets[0], octets[1], octets[2], octets[3]]);
            }
        }
    }
    if let Some((source, destination)) = hop.macs {
        entry.source = source;
        entry.destination = destination;
        entry.resolved = 1;
    }
    entry
}

/// The entry of an upstream, as the program sees it.
pub fn read(nexthops: &MapHandle, id: u32) -> anyhow::Result<Option<types::nexthop>> {
    let bytes = nexthops.lookup(&id.to_ne_bytes(), MapFlags::ANY)?;
    Ok(bytes.and_then(|bytes| from_bytes(&bytes)))
}

/// Removes the entries of upstreams that are in no generation any more.
pub fn retain(nexthops: &MapHandle, ids: &HashSet<u32>) -> anyhow::Result<()> {
    let gone: Vec<Vec<u8>> = nexthops
        .keys()
        .filter(|key| {
            let id = <[u8; 4]>::try_from(key.as_slice()).map(u32::from_ne_bytes);
            id.map_or(true, |id| !ids.contains(&id))
        })
        .collect();
    for key in gone {
        nexthops.delete(&key)?;
    }
    Ok(())
}
