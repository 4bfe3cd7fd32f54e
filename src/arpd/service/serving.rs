//! The active generation, and the state of its filters.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::arpd::neighbours::NextHopEntry;
use crate::bpf::tcx::{self, Attached};
use crate::datapath::description::{Description, Generation};
use crate::datapath::generation::DescriptionMap;
use crate::datapath::hook::{self, Known, Slot};
use crate::datapath::lease::Heartbeat;
use crate::datapath::nexthops::is_down;
use crate::datapath::pins::ReadGuard;
use crate::datapath::spares::{self, Situation};
use crate::datapath::state_maps::StateMaps;
use crate::desired::partial::Incomplete;
use crate::desired::{Desired, Name, dns};
use crate::net::Netlink;
use crate::net::link::{Link, find_link};
use crate::reconcile::observe::Observed;

/// The active generation and its maps. Its description is read again wherever rules are needed.
pub(super) struct Serving {
    pub(super) number: u32,
    description: DescriptionMap,
    programs: Vec<Known>,
    /// The configuration besides its rules and what follows from this host's addresses.
    pub(super) outline: Desired,
    /// Host names of the rules as written.
    pub(super) names: BTreeSet<Name>,
    /// Multicast groups among the keys.
    pub(super) groups: BTreeSet<IpAddr>,
    /// The highest id.
    max_id: u32,
    pub(super) maps: StateMaps,
    pub(super) heartbeat: Heartbeat,
    /// State of the filter by interface name, as last read.
    pub(super) interfaces: BTreeMap<String, Filter>,
    /// The tcx programs of those interfaces by index, as last read. The kernel does not notify of changes.
    pub(super) tcx: BTreeMap<u32, Vec<Attached>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filter {
    /// The interface is missing.
    Missing,
    /// On the interface with this index.
    Attached(u32),
    /// Removed from the interface by `detach`.
    Detached(u32),
    /// Gone without a `detach`: the interface was recreated, or another program removed the filter.
    Lost(u32),
}

impl Serving {
    /// Takes over a generation.
    pub(super) fn new(
        guard: &ReadGuard,
        generation: &Generation,
        observed: &Observed,
        maps: StateMaps,
        lease: Duration,
    ) -> anyhow::Result<Serving> {
        let desired = &generation.description.desired;
        let Incomplete { interfaces, hosts, .. } = &desired.incomplete;
        let (interfaces, hosts) = (interfaces.clone(), hosts.clone());
        let incomplete = Incomplete { interfaces, hosts, ..Incomplete::default() };
        Ok(Serving {
            number: generation.number,
            description: DescriptionMap::open(&guard.generation(generation.number))?,
            programs: generation.programs().collect(),
            outline: Desired { incomplete, ..desired.without_rules() },
            names: dns::names(&desired.as_written()),
            groups: desired.groups().collect(),
            max_id: generation.ids().max().unwrap_or(0),
            heartbeat: Heartbeat::load(&maps.heartbeat, lease)?,
            maps,
            interfaces: filters_of(generation, observed),
            tcx: BTreeMap::new(),
        })
    }

    /// Reads the whole description, which takes milliseconds for thousands of rules.
    pub(super) fn description(&self) -> anyhow::Result<Arc<Description>> {
        self.description.read()
    }

    /// Returns true unless every filter is detached.
    pub(super) fn is_attached(&self) -> bool {
        !self.interfaces.values().all(|filter| matches!(filter, Filter::Detached(_)))
    }

    /// Writes next hops. Spares for upstreams that go down are written before, those of upstreams that
    /// come up are removed after.
    pub(super) fn write(
        &self,
        guard: &ReadGuard,
        entries: &[(u32, NextHopEntry)],
    ) -> anyhow::Result<()> {
        let nexthops = &self.maps.nexthops;
        let (mut gone, mut back) = (HashSet::new(), HashSet::new());
        for (id, entry) in entries {
            match (is_down(&nexthops.read(*id)?), is_down(&entry.0)) {
                (false, true) => gone.insert(*id),
                (true, false) => back.insert(*id),
                _ => false,
            };
        }
        let changed: HashSet<u32> = gone.union(&back).copied().collect();
        let mut situation = self.situation()?;
        if !changed.is_empty() {
            situation.down.extend(gone);
            self.write_spares(guard, &situation, Some(&changed))?;
        }
        for (id, entry) in entries {
            nexthops.write(*id, &entry.0)?;
        }
        if !back.is_empty() {
            situation.down.retain(|id| !back.contains(id));
            self.write_spares(guard, &situation, Some(&changed))?;
        }
        Ok(())
    }

    pub(super) fn situation(&self) -> anyhow::Result<Situation> {
        Situation::leased(&self.maps, self.max_id)
    }

    pub(super) fn write_spares(
        &self,
        guard: &ReadGuard,
        situation: &Situation,
        changed: Option<&HashSet<u32>>,
    ) -> anyhow::Result<()> {
        let Description { desired, ids, .. } = &*self.description()?;
        spares::write(guard, self.number, (desired, ids), &[situation], changed, &self.maps.gate)
    }
}

/// Returns the state of the generation's filter on each of its interfaces, from an observation.
fn filters_of(generation: &Generation, observed: &Observed) -> BTreeMap<String, Filter> {
    let interfaces = generation.description.desired.interfaces.iter();
    interfaces
        .map(|name| {
            let seen = match observed.interfaces.get(name) {
                None => Filter::Missing,
                Some(interface) => match interface.hook.slot() {
                    Slot::Empty if observed.is_detached(name) => Filter::Detached(interface.index),
                    Slot::Empty => Filter::Lost(interface.index),
                    _ => Filter::Attached(interface.index),
                },
            };
            (name.clone(), seen)
        })
        .collect()
}

/// Reads the state of the filter on each of the generation's interfaces.
pub(super) async fn filters(
    netlink: &Netlink,
    serving: &Serving,
) -> anyhow::Result<BTreeMap<String, Filter>> {
    let links: Vec<Link> = netlink.links().await?;
    let qdiscs: BTreeMap<u32, _> = netlink.qdiscs().await?.into_iter().collect();
    let mut found = BTreeMap::new();
    for name in &serving.outline.interfaces {
        let seen = match find_link(links.iter(), name) {
            None => Filter::Missing,
            Some(link) => {
                let qdisc = qdiscs.get(&link.index).copied();
                let mark = serving.maps.marks.get(name)?.filter(|mark| mark.is_of(link.index));
                match hook::read(netlink, link.index, qdisc, &serving.programs).await?.slot() {
                    Slot::Empty if mark.is_some_and(|mark| mark.detached) => {
                        Filter::Detached(link.index)
                    }
                    Slot::Empty => Filter::Lost(link.index),
                    _ => Filter::Attached(link.index),
                }
            }
        };
        found.insert(name.clone(), seen);
    }
    Ok(found)
}

/// Reads the tcx programs of interfaces.
pub(super) fn tcx_programs(interfaces: &BTreeMap<String, Filter>) -> BTreeMap<u32, Vec<Attached>> {
    let present = interfaces.values().filter_map(|seen| match seen {
        Filter::Attached(index) | Filter::Detached(index) | Filter::Lost(index) => Some(*index),
        Filter::Missing => None,
    });
    present.map(|index| (index, tcx::query(index).ok().flatten().unwrap_or_default())).collect()
}

pub(super) fn is_attached(seen: &Filter) -> bool {
    matches!(seen, Filter::Attached(_))
}
