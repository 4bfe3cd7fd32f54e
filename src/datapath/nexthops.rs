//! The next hops that the program looks up, by upstream id.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context, ensure};
use foldhash::HashMap;
use libbpf_rs::{MapCore, MapFlags, MapHandle};

use crate::bpf::{OpenUdplbSkel, bytes_of, from_bytes, read_array, types, unwire, wire};
use crate::datapath::chunked_map::Chunks;
use crate::datapath::gate::Gate;
use crate::desired::{Desired, RuleIds};
use crate::net::nexthop::{Macs, NextHop};
use crate::net::routing::Target;

/// The program's table of next hops, by upstream id.
pub struct NextHops(Chunks, Gate);

impl NextHops {
    /// See [`Chunks::open`].
    pub fn open(outer: MapHandle, state: &Path, gate: Gate) -> anyhow::Result<NextHops> {
        Ok(NextHops(Chunks::open(outer, state, "nexthops")?, gate))
    }

    /// See [`Chunks::is_whole`].
    pub fn is_whole(&self) -> anyhow::Result<bool> {
        self.0.is_whole()
    }

    /// Returns the map that the program looks up.
    pub fn outer(&self) -> &MapHandle {
        self.0.outer()
    }

    /// Grows the table to hold `ids`.
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

    /// Returns the next hop of an upstream; all zeroes if it is unknown.
    pub fn read(&self, id: u32) -> anyhow::Result<types::nexthop> {
        let (_, _, slot) = self.slot(id)?;
        Ok(slot.copies[(slot.sequence & 1) as usize])
    }

    /// Returns the next hops of all upstreams up to this id.
    pub fn read_all(&self, most: u32) -> anyhow::Result<Vec<types::nexthop>> {
        let mut all = Vec::with_capacity(self.0.room() as usize);
        let mut whole = true;
        for (_, chunk) in self.0.iter().take_while(|(first, _)| *first <= most) {
            read_array(chunk, chunk.max_entries(), |slot| match from_bytes(slot) {
                Some(types::nexthop_slot { copies, sequence, .. }) => {
                    all.push(copies[(sequence & 1) as usize]);
                }
                None => whole = false,
            })?;
        }
        ensure!(whole, "next hops of another layout");
        Ok(all)
    }

    /// Writes an entry if it differs.
    pub fn write(&self, id: u32, entry: &types::nexthop) -> anyhow::Result<()> {
        let (chunk, key, mut slot) = self.slot(id)?;
        if change(&mut slot, entry) {
            turn(chunk, &mut [(key, slot)])?;
            self.1.advance();
        }
        Ok(())
    }

    /// Writes many entries; keeps the health of each upstream.
    pub fn write_all(&self, entries: &BTreeMap<u32, types::nexthop>) -> anyhow::Result<()> {
        for (first, chunk) in self.0.iter() {
            let here = || entries.range(first..first + chunk.max_entries());
            let Some((last, _)) = here().next_back() else { continue };
            let mut slots = Vec::with_capacity(chunk.max_entries() as usize);
            read_array(chunk, last - first + 1, |slot| {
                slots.extend(from_bytes::<types::nexthop_slot>(slot));
            })?;
            let mut changed = Vec::new();
            for (id, entry) in here() {
                let key = id - first;
                let mut slot = *slots.get(key as usize).context("next hops of another layout")?;
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
        self.1.advance();
        Ok(())
    }
}

/// Writes an entry to the copy that is not in use; false if it is the same as the one in use.
fn change(slot: &mut types::nexthop_slot, entry: &types::nexthop) -> bool {
    let used = (slot.sequence & 1) as usize;
    slot.copies[1 - used] = *entry;
    bytes_of(&slot.copies[used]) != bytes_of(entry)
}

/// Publishes an entry: first the copy, then the sequence number that selects it.
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

/// Writes the next hops that `apply` resolved. `ids` are those of `desired`.
pub fn write(
    nexthops: &NextHops,
    desired: &Desired,
    ids: &[RuleIds],
    ways: &HashMap<Target, NextHop>,
) -> anyhow::Result<()> {
    nexthops.write_all(&entries(desired, ids, |target| ways.get(target)))
}

/// Returns the next hop entries of all upstreams, by id.
pub fn entries<'a>(
    desired: &Desired,
    ids: &[RuleIds],
    way_to: impl Fn(&Target) -> Option<&'a NextHop>,
) -> BTreeMap<u32, types::nexthop> {
    let mut entries = BTreeMap::new();
    for (rule, ids) in desired.rules.iter().zip(ids) {
        for (upstream, id) in rule.destinations().zip(ids.destinations()) {
            let way = way_to(&desired.target(rule, upstream));
            entries.insert(id, entry(upstream.address.ip, way));
        }
    }
    entries
}

/// Returns the entry for a next hop.
pub fn entry(address: IpAddr, way: Option<&NextHop>) -> types::nexthop {
    let mut entry = types::nexthop { address: wire(address), ..Default::default() };
    let Some(hop) = way.and_then(|way| way.hops().first()) else { return entry };
    entry.ifindex = hop.ifindex;
    entry.mtu = u16::try_from(hop.mtu).unwrap_or(u16::MAX);
    entry.gateway = wire(hop.gateway);
    entry.family = match hop.gateway {
        IpAddr::V4(_) => libc::AF_INET as u16,
        IpAddr::V6(_) => libc::AF_INET6 as u16,
    };
    entry.egress = hop.egress.map(wire).unwrap_or_default();
    let routed = matches!(way, Some(NextHop::Several { routed: true, .. }));
    entry.by_packet = routed.into();
    match hop.macs {
        Macs::None if !routed => entry.macs = types::macs::MACS_NONE,
        Macs::None => {}
        Macs::Unknown => {}
        Macs::Known { own, neighbour } => {
            (entry.source, entry.destination) = (own, neighbour);
            // the kernel selects the hop of each packet
            let (known, fresh) = (types::macs::MACS_KNOWN, types::macs::MACS_FRESH);
            entry.macs = if routed { known } else { fresh };
        }
    }
    entry
}

/// Returns true if the upstream is not selected where others can be.
pub fn is_down(entry: &types::nexthop) -> bool {
    [types::health::HEALTH_DOWN, types::health::HEALTH_FAILED].contains(&entry.health)
}

/// Returns the neighbour that an entry's packets are sent to.
pub fn gateway(entry: &types::nexthop) -> IpAddr {
    unwire(entry.gateway, i32::from(entry.family) == libc::AF_INET6)
}

/// Returns this host's source address towards the next hop, if it is known.
pub fn egress(entry: &types::nexthop) -> Option<IpAddr> {
    // an IPv6 address in use has a bit set after its first word
    let ipv6 = entry.egress[1..] != [0; 3];
    (entry.egress != [0; 4]).then(|| unwire(entry.egress, ipv6))
}
