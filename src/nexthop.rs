//! The way to each upstream: route, gateway and the gateway's MAC address.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use libbpf_rs::{MapCore, MapFlags, MapHandle};

use crate::bpf::{OpenUdplbSkel, bytes_of, from_bytes, types};
use crate::chunks::Chunks;
use crate::netlink::{Link, Neighbour, Netlink, NudState, Route};
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
        let known =
            neighbour.filter(|neighbour| neighbour.state.is_valid()).and_then(|found| found.mac);
        hop.macs = own.zip(known);
        // one that failed before anybody asked now may have come back
        let failed = neighbour.is_some_and(|found| found.state == NudState::Failed);
        let gave_up = asked_for.contains(&key) && failed;
        if own.is_some() && known.is_none() && !gave_up {
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
    ways: &BTreeMap<Ipv4Addr, Way>,
) -> anyhow::Result<()> {
    nexthops.write_all(&entries(desired, ids, ways))
}

/// What the program is to know, by upstream id.
pub fn entries(
    desired: &Desired,
    ids: &[RuleIds],
    ways: &BTreeMap<Ipv4Addr, Way>,
) -> BTreeMap<u32, types::nexthop> {
    let rules = desired.rules.iter().zip(ids);
    rules
        .flat_map(|(rule, ids)| rule.upstreams.iter().zip(&ids.upstreams))
        .map(|(upstream, id)| (*id, entry(upstream.address, ways.get(&upstream.address))))
        .collect()
}

/// What the program is to know of a way.
pub fn entry(address: Ipv4Addr, way: Option<&Way>) -> types::nexthop {
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
        entry.macs = types::macs::MACS_FRESH;
    }
    entry
}

/// The neighbour that an entry's packets go to.
pub fn gateway(entry: &types::nexthop) -> IpAddr {
    if i32::from(entry.family) == libc::AF_INET6 {
        let mut octets = [0; 16];
        for (octets, word) in octets.chunks_mut(4).zip(entry.gateway) {
            octets.copy_from_slice(&word.to_ne_bytes());
        }
        IpAddr::V6(Ipv6Addr::from(octets))
    } else {
        IpAddr::V4(Ipv4Addr::from(entry.gateway[0].to_ne_bytes()))
    }
}
