//! The way to each upstream: route, gateway and the gateway's MAC address.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use libbpf_rs::{MapCore, MapFlags, MapHandle};

use crate::bpf::{OpenUdplbSkel, bytes_of, from_bytes, types};
use crate::datapath::chunked_map::Chunks;
use crate::desired::tables::wire;
use crate::desired::{Desired, RuleIds};
use crate::net::Netlink;
use crate::net::link::{Layer, Link, OwnAddress};
use crate::net::neighbour::{Neighbour, NudState};
use crate::net::route::Route;
use crate::net::routing::{self, Choice, Paths, Senders, Target};

/// How long `apply` waits for neighbours to answer.
pub const PATIENCE: Duration = Duration::from_secs(1);
/// How long it waits before that for the detection of duplicate addresses, which takes up to two seconds.
const DETECTION: Duration = Duration::from_secs(3);

/// What is known of the way to one target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Way {
    /// Out by an interface, to a neighbour whose MAC address may still be unknown.
    Hop(Hop),
    /// By one of several hops. Where forwarding is on the kernel is asked for each packet which; otherwise
    /// all take the first.
    Several { hops: Vec<Hop>, by: Choice, routed: bool },
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
    /// Returns true for the hop of this route.
    pub fn is_by(&self, route: &Route) -> bool {
        (self.ifindex, self.gateway) == route.neighbour()
    }
}

impl Way {
    /// Returns true where there is no route, or a next hop has not answered.
    pub fn is_wanting(&self) -> bool {
        matches!(self, Way::None(_)) || self.hops().iter().any(|hop| hop.macs == Macs::Unknown)
    }

    /// The hops that packets may take.
    pub fn hops(&self) -> &[Hop] {
        match self {
            Way::Hop(hop) => std::slice::from_ref(hop),
            Way::Several { hops, .. } => hops,
            Way::Local | Way::None(_) => &[],
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

/// Finds the way to each target of packets that come in by any of `interfaces`, and has the kernel ask
/// for the neighbours it does not know; waits for them, but for no longer than [`PATIENCE`], and before
/// that for own addresses that are still tentative.
pub async fn resolve(
    netlink: &Netlink,
    targets: &BTreeSet<Target>,
    interfaces: &[String],
) -> anyhow::Result<BTreeMap<Target, Way>> {
    let links = links(netlink).await?;
    let asked: Vec<Target> = targets.iter().cloned().collect();
    let paths = settled_paths(netlink, &asked, interfaces, &links).await?;
    let mut found = Found::all(&asked, paths, &links);
    let end = Instant::now() + PATIENCE;
    let mut asked_for = HashSet::new();
    loop {
        let hops = found.iter_mut().flat_map(Found::hops);
        let missing = add_macs(hops, &links, &netlink.neighbours().await?, &asked_for);
        let new: Vec<(u32, IpAddr)> =
            missing.iter().filter(|neighbour| asked_for.insert(**neighbour)).copied().collect();
        for (neighbour, result) in new.iter().zip(netlink.solicit(&new).await) {
            if let Err(error) = result {
                log::warn!("neighbour {}: {error}", neighbour.1);
            }
        }
        if missing.is_empty() || Instant::now() >= end {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(found
        .into_iter()
        .zip(asked)
        .map(|(found, target)| (target.clone(), found.way(&target)))
        .collect())
}

/// Finds the same ways with the neighbours that the kernel knows now, and has it ask for none.
pub async fn look(
    netlink: &Netlink,
    targets: &BTreeSet<Target>,
    interfaces: &[String],
) -> anyhow::Result<BTreeMap<Target, Way>> {
    let links = links(netlink).await?;
    let asked: Vec<Target> = targets.iter().cloned().collect();
    let paths = routing::paths(netlink, &asked, interfaces, &links).await?;
    let mut found = Found::all(&asked, paths, &links);
    let hops = found.iter_mut().flat_map(Found::hops);
    add_macs(hops, &links, &netlink.neighbours().await?, &HashSet::new());
    Ok(found
        .into_iter()
        .zip(asked)
        .map(|(found, target)| (target.clone(), found.way(&target)))
        .collect())
}

/// All interfaces, by index.
async fn links(netlink: &Netlink) -> anyhow::Result<HashMap<u32, Link>> {
    Ok(netlink.links().await?.into_iter().map(|link| (link.index, link)).collect())
}

/// Asks for the paths, again where the kernel may not send on one yet because its own IPv6 addresses
/// there are tentative: while it looks for duplicates it neither asks for neighbours nor has a source.
async fn settled_paths(
    netlink: &Netlink,
    targets: &[Target],
    interfaces: &[String],
    links: &HashMap<u32, Link>,
) -> anyhow::Result<Vec<Result<Paths, String>>> {
    let end = Instant::now() + DETECTION;
    let mut waited = false;
    loop {
        let found = routing::paths(netlink, targets, interfaces, links).await?;
        let tentative: HashSet<u32> = match targets.iter().any(|it| it.address.ip.is_ipv6()) {
            true => {
                let own = netlink.addresses().await?;
                let is_tested = |own: &OwnAddress| {
                    let link = links.get(&own.ifindex);
                    own.tentative && link.is_some_and(|link| link.up && link.carrier)
                };
                own.into_iter().filter(is_tested).map(|own| own.ifindex).collect()
            }
            false => HashSet::new(),
        };
        let routes = found.iter().flatten().flat_map(|paths| &paths.routes);
        let waits = routes
            .filter(|route| route.gateway.is_ipv6())
            .any(|route| tentative.contains(&route.ifindex));
        if !waits || Instant::now() >= end {
            return Ok(found);
        }
        if !std::mem::replace(&mut waited, true) {
            log::info!("waiting for IPv6 addresses that are still tentative");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A target's paths, with what is learned of their neighbours.
enum Found {
    Paths(Paths, Vec<Hop>),
    Way(Way),
}

impl Found {
    fn all(
        targets: &[Target],
        paths: Vec<Result<Paths, String>>,
        links: &HashMap<u32, Link>,
    ) -> Vec<Found> {
        let paths = targets.iter().zip(paths);
        paths.map(|(target, paths)| Found::new(target, paths, links)).collect()
    }

    fn new(target: &Target, paths: Result<Paths, String>, links: &HashMap<u32, Link>) -> Found {
        let paths = match paths {
            Ok(paths) if paths.routes.iter().any(|route| route.local) => {
                return Found::Way(Way::Local);
            }
            Ok(paths) => paths,
            Err(reason) => return Found::Way(Way::None(reason)),
        };
        let mut hops = Vec::new();
        for route in &paths.routes {
            match links.get(&route.ifindex) {
                Some(link) => hops.push(Hop::new(target.address.ip, route, link, None)),
                None => {
                    let reason = format!("the interface with index {} is gone", route.ifindex);
                    return Found::Way(Way::None(reason));
                }
            }
        }
        Found::Paths(paths, hops)
    }

    fn hops(&mut self) -> &mut [Hop] {
        match self {
            Found::Paths(_, hops) => hops,
            Found::Way(_) => &mut [],
        }
    }

    fn way(self, target: &Target) -> Way {
        let (paths, mut hops) = match self {
            Found::Paths(paths, hops) => (paths, hops),
            Found::Way(way) => return way,
        };
        let alive: Vec<bool> = hops.iter().map(|hop| hop.macs != Macs::Unknown).collect();
        match choose(&paths, &target.senders, &hops, &alive) {
            // whichever path of one route it is, it leads there
            Ok(Chosen { path, leased: true }) if paths.by != Choice::Sender => {
                Way::Hop(hops.swap_remove(path))
            }
            Ok(Chosen { path, leased }) => {
                hops.swap(0, path);
                Way::Several { hops, by: paths.by, routed: !leased }
            }
            Err(reason) => Way::None(reason.into()),
        }
    }
}

/// The path of several that an entry of the table is for.
pub struct Chosen {
    /// Its index.
    pub path: usize,
    /// The entry stands for the path of every packet, so that the kernel need not be asked.
    pub leased: bool,
}

/// Chooses the path that the program is told of. `alive` tells for each whether its neighbour answers.
///
/// # Errors
/// No path is right for all packets, and the kernel cannot be asked for each; the reason why.
pub fn choose(
    paths: &Paths,
    senders: &Senders,
    hops: &[Hop],
    alive: &[bool],
) -> Result<Chosen, &'static str> {
    let Paths { by, routed, .. } = *paths;
    let first_alive = alive.iter().position(|alive| *alive).unwrap_or(0);
    // its source is the address of one path, whatever the kernel's hash says
    let own = *senders == Senders::Own;
    match by {
        Choice::Only => Ok(Chosen { path: 0, leased: true }),
        Choice::Flow => {
            // nor does the kernel know a neighbour where there are no MAC addresses
            let bare = hops.iter().any(|hop| hop.macs == Macs::None);
            let leased = !routed || own || bare || alive.contains(&false);
            Ok(Chosen { path: first_alive, leased })
        }
        Choice::Sender => Ok(Chosen { path: 0, leased: !routed || own }),
        Choice::Interface if own => Err(
            "with `source: egress` the interfaces need the same path: give each a rule of its own",
        ),
        Choice::Interface if !routed => {
            Err("it depends on the interface, and forwarding is off there")
        }
        Choice::Interface => Ok(Chosen { path: 0, leased: false }),
    }
}

/// Fills in what the neighbour table has; returns the neighbours it lacks and that may yet answer.
fn add_macs<'a>(
    hops: impl Iterator<Item = &'a mut Hop>,
    links: &HashMap<u32, Link>,
    neighbours: &[Neighbour],
    asked_for: &HashSet<(u32, IpAddr)>,
) -> HashSet<(u32, IpAddr)> {
    let table: HashMap<(u32, IpAddr), &Neighbour> = neighbours
        .iter()
        .map(|neighbour| ((neighbour.ifindex, neighbour.address), neighbour))
        .collect();
    let mut missing = HashSet::new();
    for hop in hops {
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
    ways: &BTreeMap<Target, Way>,
) -> anyhow::Result<()> {
    nexthops.write_all(&entries(desired, ids, |target| ways.get(target)))
}

/// What the program is to know, by upstream id.
pub fn entries<'a>(
    desired: &Desired,
    ids: &[RuleIds],
    way_to: impl Fn(&Target) -> Option<&'a Way>,
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

/// What the program is to know of a way.
pub fn entry(address: IpAddr, way: Option<&Way>) -> types::nexthop {
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
    match hop.macs {
        Macs::None if !matches!(way, Some(Way::Several { routed: true, .. })) => {
            entry.macs = types::macs::MACS_NONE;
        }
        Macs::None => {}
        Macs::Unknown => {}
        Macs::Known { own, neighbour } => {
            (entry.source, entry.destination) = (own, neighbour);
            entry.macs = match way {
                // the kernel says for each packet which hop it is
                Some(Way::Several { routed: true, .. }) => types::macs::MACS_KNOWN,
                _ => types::macs::MACS_FRESH,
            };
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
