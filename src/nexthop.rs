//! The way to each upstream: route, gateway and the gateway's MAC address.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use libbpf_rs::{MapCore, MapFlags, MapHandle};

use crate::bpf::{OpenUdplbSkel, bytes_of, from_bytes, types};
use crate::chunks::Chunks;
use crate::config::Address;
use crate::netlink::{Layer, Link, Neighbour, Netlink, NudState, Route};
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
    /// This host's own address on that way.
    pub egress: Option<IpAddr>,
    pub macs: Macs,
}

/// What is in front of a packet's IP header on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Macs {
    /// Nothing: the device has no MAC addresses.
    None,
    Unknown,
    Known {
        own: [u8; 6],
        neighbour: [u8; 6],
    },
}

impl Macs {
    /// On a link, with the neighbour's address if that is known.
    fn on(link: &Link, neighbour: Option<[u8; 6]>) -> Macs {
        match (link.layer, link.mac, neighbour) {
            (Some(Layer::Ip), _, _) => Macs::None,
            (Some(Layer::Ethernet), Some(own), Some(neighbour)) => Macs::Known { own, neighbour },
            _ => Macs::Unknown,
        }
    }
}

impl Hop {
    /// By a route to an address, over the link that it names, to a neighbour whose MAC address
    /// may be known.
    pub fn new(address: IpAddr, route: &Route, link: &Link, neighbour: Option<[u8; 6]>) -> Hop {
        Hop {
            interface: link.name.clone(),
            ifindex: link.index,
            gateway: route.gateway,
            mtu: route.mtu.unwrap_or_else(|| link.mtu_to(address)),
            egress: route.egress,
            macs: Macs::on(link, neighbour),
        }
    }
}

/// Finds the way to each address, and has the kernel ask for the neighbours it does not know;
/// waits for them, but for no longer than [`PATIENCE`].
pub async fn resolve(
    netlink: &Netlink,
    addresses: &BTreeSet<Address>,
) -> anyhow::Result<BTreeMap<Address, Way>> {
    let links: HashMap<u32, Link> =
        netlink.links().await?.into_iter().map(|link| (link.index, link)).collect();
    let asked: Vec<Address> = addresses.iter().cloned().collect();
    let paths = netlink.paths(&asked, &links).await;
    let mut ways = BTreeMap::new();
    for (address, paths) in asked.into_iter().zip(paths) {
        let way = way(address.ip, paths.map(|paths| paths[0]), &links);
        ways.insert(address, way);
    }
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

fn way(address: IpAddr, route: std::io::Result<Route>, links: &HashMap<u32, Link>) -> Way {
    let route = match route {
        Ok(route) if route.local => return Way::Local,
        Ok(route) => route,
        Err(error) => return Way::None(error.to_string()),
    };
    match links.get(&route.ifindex) {
        Some(link) => Way::Hop(Hop::new(address, &route, link, None)),
        None => Way::None(format!("the interface with index {} is gone", route.ifindex)),
    }
}

/// Fills in what the neighbour table has; returns the neighbours it lacks and that may yet answer.
fn add_macs(
    ways: &mut BTreeMap<Address, Way>,
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
        let Some(link) = links.get(&hop.ifindex) else { continue };
        let neighbour = table.get(&key);
        let known =
            neighbour.filter(|neighbour| neighbour.state.is_valid()).and_then(|found| found.mac);
        hop.macs = Macs::on(link, known);
        // one that failed before anybody asked now may have come back
        let failed = neighbour.is_some_and(|found| found.state == NudState::Failed);
        let gave_up = asked_for.contains(&key) && failed;
        let askable = link.layer == Some(Layer::Ethernet) && link.mac.is_some();
        if askable && known.is_none() && !gave_up {
            missing.insert(key);
        }
    }
    missing
}

/// The table that the program looks into, by upstream id.
pub struct NextHops(Chunks);

impl NextHops {
    /// See [`Chunks::open`].
    pub fn open(outer: MapHandle, state: &Path) -> anyhow::Result<NextHops> {
        Ok(NextHops(Chunks::open(outer, state, "nexthops")?))
    }

    /// See [`Chunks::is_whole`].
    pub fn is_whole(&self) -> anyhow::Result<bool> {
        self.0.is_whole()
    }

    /// The map that the program looks into.
    pub fn outer(&self) -> &MapHandle {
        self.0.outer()
    }

    /// Makes room for `ids`.
    pub fn prepare(
        &mut self,
        skeleton: &OpenUdplbSkel<'_>,
        ids: impl Iterator<Item = u32>,
    ) -> anyhow::Result<()> {
        self.0.grow(&skeleton.maps.nexthops_chunk, ids.max().unwrap_or(0))
    }

    fn slot(&self, id: u32) -> anyhow::Result<(&MapHandle, u32, types::nexthop_slot)> {
        let (chunk, key) = self.0.place(id).context("an id without a next hop")?;
        let bytes = chunk.lookup(&key.to_ne_bytes(), MapFlags::ANY)?.unwrap_or_default();
        let slot = from_bytes(&bytes).context("next hops of another layout")?;
        Ok((chunk, key, slot))
    }

    /// What is known of the way to an upstream; all zeroes: nothing.
    pub fn read(&self, id: u32) -> anyhow::Result<types::nexthop> {
        let (_, _, slot) = self.slot(id)?;
        Ok(slot.copies[(slot.sequence & 1) as usize])
    }

    /// What is known of the way to every upstream up to this id.
    pub fn read_all(&self, most: u32) -> anyhow::Result<Vec<types::nexthop>> {
        let mut all = Vec::with_capacity(self.0.room() as usize);
        for (_, chunk) in self.0.iter().take_while(|(first, _)| *first <= most) {
            let width = chunk.max_entries();
            for (_, slot) in chunk.lookup_batch(width, MapFlags::ANY, MapFlags::ANY)? {
                let slot: types::nexthop_slot =
                    from_bytes(&slot).context("next hops of another layout")?;
                all.push(slot.copies[(slot.sequence & 1) as usize]);
            }
        }
        Ok(all)
    }

    /// Changes an entry, and leaves alone one that is the same.
    pub fn write(&self, id: u32, entry: &types::nexthop) -> anyhow::Result<()> {
        let (chunk, key, mut slot) = self.slot(id)?;
        if change(&mut slot, entry) {
            turn(chunk, &mut [(key, slot)])?;
        }
        Ok(())
    }

    /// Changes many entries; what is known of an upstream's health stays.
    pub fn write_all(&self, entries: &BTreeMap<u32, types::nexthop>) -> anyhow::Result<()> {
        for (first, chunk) in self.0.iter() {
            let width = chunk.max_entries();
            if entries.range(first..first + width).next().is_none() {
                continue;
            }
            let mut changed = Vec::new();
            for (key, slot) in chunk.lookup_batch(width, MapFlags::ANY, MapFlags::ANY)? {
                let key = u32::from_ne_bytes(key.as_slice().try_into()?);
                let Some(entry) = entries.get(&(first + key)) else { continue };
                let mut slot: types::nexthop_slot =
                    from_bytes(&slot).context("next hops of another layout")?;
                let old = slot.copies[(slot.sequence & 1) as usize];
                let mut new = *entry;
                if old.address == new.address {
                    (new.health, new.since) = (old.health, old.since);
                }
                if change(&mut slot, &new) {
                    changed.push((key, slot));
                }
            }
            turn(chunk, &mut changed)?;
        }
        Ok(())
    }
}

/// Writes an entry to the copy that is not in use; false if it is the same as the one in use.
fn change(slot: &mut types::nexthop_slot, entry: &types::nexthop) -> bool {
    let used = (slot.sequence & 1) as usize;
    slot.copies[1 - used] = *entry;
    bytes_of(&slot.copies[used]) != bytes_of(entry)
}

/// Tells the program: first the other copy, then that it is the one in use.
fn turn(chunk: &MapHandle, slots: &mut [(u32, types::nexthop_slot)]) -> anyhow::Result<()> {
    if slots.is_empty() {
        return Ok(());
    }
    let keys: Vec<u8> = slots.iter().flat_map(|(key, _)| key.to_ne_bytes()).collect();
    for sequence in [0, 1] {
        for (_, slot) in &mut *slots {
            slot.sequence = slot.sequence.wrapping_add(sequence);
        }
        let values: Vec<&[u8]> = slots.iter().map(|(_, slot)| bytes_of(slot)).collect();
        let (any, count) = (MapFlags::ANY, slots.len() as u32);
        chunk.update_batch(&keys, &values.concat(), count, any, any)?;
    }
    Ok(())
}

/// Tells the program what `apply` found. `ids` are those of `desired`.
pub fn write(
    nexthops: &NextHops,
    desired: &Desired,
    ids: &[RuleIds],
    ways: &BTreeMap<Address, Way>,
) -> anyhow::Result<()> {
    nexthops.write_all(&entries(desired, ids, ways))
}

/// What the program is to know, by upstream id.
pub fn entries(
    desired: &Desired,
    ids: &[RuleIds],
    ways: &BTreeMap<Address, Way>,
) -> BTreeMap<u32, types::nexthop> {
    let rules = desired.rules.iter().zip(ids);
    rules
        .flat_map(|(rule, ids)| rule.destinations().zip(ids.destinations()))
        .map(|(upstream, id)| (id, entry(upstream.address.ip, ways.get(&upstream.address))))
        .collect()
}

/// What the program is to know of a way.
pub fn entry(address: IpAddr, way: Option<&Way>) -> types::nexthop {
    let mut entry = types::nexthop { address: wire(address), ..Default::default() };
    let Some(Way::Hop(hop)) = way else { return entry };
    entry.ifindex = hop.ifindex;
    entry.mtu = u16::try_from(hop.mtu).unwrap_or(u16::MAX);
    entry.gateway = wire(hop.gateway);
    entry.family = match hop.gateway {
        IpAddr::V4(_) => libc::AF_INET as u16,
        IpAddr::V6(_) => libc::AF_INET6 as u16,
    };
    entry.egress = hop.egress.map(wire).unwrap_or_default();
    match hop.macs {
        Macs::None => entry.macs = types::macs::MACS_NONE,
        Macs::Unknown => {}
        Macs::Known { own, neighbour } => {
            (entry.source, entry.destination) = (own, neighbour);
            entry.macs = types::macs::MACS_FRESH;
        }
    }
    entry
}

/// The neighbour that an entry's packets go to.
pub fn gateway(entry: &types::nexthop) -> IpAddr {
    unwire(entry.gateway, i32::from(entry.family) == libc::AF_INET6)
}

/// This host's own address on an entry's way, if it is known.
pub fn egress(entry: &types::nexthop) -> Option<IpAddr> {
    // an IPv6 address in use has something behind its first word
    let ipv6 = entry.egress[1..] != [0; 3];
    (entry.egress != [0; 4]).then(|| unwire(entry.egress, ipv6))
}

/// See [`wire`].
pub fn unwire(words: [u32; 4], ipv6: bool) -> IpAddr {
    let mut octets = [0; 16];
    for (octets, word) in octets.chunks_mut(4).zip(words) {
        octets.copy_from_slice(&word.to_ne_bytes());
    }
    match ipv6 {
        true => Ipv6Addr::from(octets).into(),
        false => Ipv4Addr::from(words[0].to_ne_bytes()).into(),
    }
}
