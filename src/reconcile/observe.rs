//! The observed state: generations under the pin directory, filters on interfaces. Reads only.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use anyhow::Context;

use crate::config::State;
use crate::datapath::announcements::Records;
use crate::datapath::description::Generation;
use crate::datapath::hook::{self, Hook, Known, Slot};
use crate::datapath::marks::Mark;
use crate::datapath::pin_search::{self, Place};
use crate::datapath::pins::ReadGuard;
use crate::datapath::state_maps::{self, Held, Pending, StateMaps};
use crate::datapath::{generation, retired, xdp};
use crate::desired::id_set::IdSet;
use crate::net::Netlink;
use crate::net::link::{Layer, Link, is_called};

/// The observed state.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// Inode of the network namespace.
    pub namespace: u64,
    pub generations: BTreeMap<u32, Generation>,
    /// Generations whose description is gone.
    pub damaged: Vec<u32>,
    /// Directories that a crash left half-built or half-removed.
    pub unfinished: Vec<String>,
    /// Target of the symlink; a hint only.
    pub current: Option<u32>,
    pub held: Option<Held>,
    /// Change that has to be confirmed.
    pub pending: Option<Pending>,
    /// Marks of interfaces that exist.
    pub marks: BTreeMap<String, Mark>,
    /// Override states of upstreams, set by `drain` and `enable`, by the id in any generation.
    pub overrides: BTreeMap<u32, State>,
    /// Announced addresses that arpd has placed, and those that are withdrawn by command.
    pub announcements: Records,
    /// All interfaces of the network namespace, by name.
    pub interfaces: BTreeMap<String, Interface>,
}

/// A filter of udplb that belongs to no generation here.
#[derive(Clone, Copy, Debug)]
pub struct Orphan<'a> {
    pub interface: &'a str,
    /// In words.
    pub filter: &'a str,
    /// Id of the tcx link; `None`: a tc filter.
    pub link: Option<u32>,
    pub home: Option<&'a Place>,
}

/// An interface and its ingress hook.
#[derive(Clone, Debug)]
pub struct Interface {
    pub index: u32,
    pub altnames: Vec<String>,
    /// See [`Layer`].
    pub layer: Option<Layer>,
    /// Administrative state.
    pub up: bool,
    pub carrier: bool,
    /// Number of packets received.
    pub received: u64,
    pub hook: Hook,
    /// The program on its XDP hook.
    pub xdp: xdp::Slot,
}

impl Observed {
    /// Returns the active generation: the one whose program most filters run, or else the target of
    /// `current`. A held one comes last: a rollback from it has begun.
    pub fn serving(&self) -> Option<u32> {
        let mut filters: BTreeMap<u32, usize> = BTreeMap::new();
        for interface in self.interfaces.values() {
            if let Slot::Generation(number) = interface.hook.slot() {
                *filters.entry(*number).or_default() += 1;
            }
        }
        filters
            .into_iter()
            .max_by_key(|(number, count)| {
                let is_held = self.held.is_some_and(|held| held.generation == *number);
                (!is_held, *count, Some(*number) == self.current, *number)
            })
            .map(|(number, _)| number)
            .or(self.current.filter(|number| self.generations.contains_key(number)))
    }

    /// Returns the kernel's name of an interface; `name` itself if it is missing.
    pub fn canonical(&self, name: &str) -> String {
        if self.interfaces.contains_key(name) {
            return name.into();
        }
        let is_it = |(own, it): &(&String, &Interface)| is_called(own, &it.altnames, name);
        self.interfaces.iter().find(is_it).map_or(name, |(own, _)| own).into()
    }

    /// Returns the interfaces whose filter runs a generation's program, with its number.
    pub fn attached(&self) -> impl Iterator<Item = (&str, u32)> {
        self.interfaces.iter().filter_map(|(name, interface)| match interface.hook.slot() {
            Slot::Generation(number) => Some((name.as_str(), *number)),
            _ => None,
        })
    }

    /// Returns the active generation; `None` if there is none.
    ///
    /// # Errors
    /// Its description is gone, while filters are still attached.
    pub fn described(&self) -> anyhow::Result<Option<&Generation>> {
        let Some(number) = self.serving() else { return Ok(None) };
        let generation = self.generations.get(&number);
        let damaged = || format!("generation {number} is damaged; apply the file again");
        generation.with_context(damaged).map(Some)
    }

    /// Returns the interfaces with a filter of udplb that belongs to no generation here and still forwards
    /// packets.
    pub fn orphans(&self) -> impl Iterator<Item = Orphan<'_>> {
        self.interfaces.iter().filter_map(|(name, interface)| match interface.hook.slot() {
            Slot::Orphan { filter, link, home, .. } => {
                let (interface, home) = (name.as_str(), home.as_ref());
                Some(Orphan { interface, filter, link: *link, home })
            }
            _ => None,
        })
    }

    /// Drops marks of interfaces that are gone or were replaced.
    fn forget_marks(&mut self) {
        let interfaces = &self.interfaces;
        self.marks.retain(|name, mark| mark.index == 0 || interfaces.contains_key(name));
        for (name, mark) in &mut self.marks {
            if interfaces.get(name).is_some_and(|interface| !mark.is_of(interface.index)) {
                *mark = Mark { reattached: mark.reattached, ..Mark::default() };
            }
        }
    }

    /// Returns true if `detach` removed the filter.
    pub fn is_detached(&self, interface: &str) -> bool {
        self.marks.get(interface).is_some_and(|mark| mark.detached)
    }

    /// Returns true if any filter runs the generation's program.
    pub fn is_attached(&self, number: u32) -> bool {
        self.attached().any(|(_, attached)| attached == number)
    }
}

/// Returns the inode of this thread's network namespace.
pub fn namespace() -> anyhow::Result<u64> {
    const PATH: &str = "/proc/thread-self/ns/net";
    Ok(fs::metadata(PATH).with_context(|| format!("{PATH}, which needs /proc"))?.ino())
}

/// Reads the whole state. Without a guard there are no pins, and only interfaces are read.
pub async fn observe(guard: Option<&ReadGuard>, netlink: &Netlink) -> anyhow::Result<Observed> {
    let mut observed = Observed { namespace: namespace()?, ..Observed::default() };
    let mut known = Vec::new();
    if let Some(guard) = guard {
        observed.current = guard.current();
        observed.unfinished = guard.unfinished()?;
        let maps = state_maps::open(guard)?;
        observed.held = maps.as_ref().map(StateMaps::held).transpose()?.flatten();
        observed.pending = maps.as_ref().map(StateMaps::pending).transpose()?.flatten();
        observed.marks =
            maps.as_ref().map(|maps| maps.marks.read()).transpose()?.unwrap_or_default();
        observed.announcements =
            maps.as_ref().map(|maps| maps.announcements.read()).transpose()?.unwrap_or_default();
        let retired = retired::read(guard)?;
        for number in guard.numbers()? {
            known.extend(generation::pinned_programs(guard, number)?);
            match generation::read(guard, maps.as_ref(), number)? {
                Some(generation) => {
                    known.extend(generation.programs());
                    if retired.has(&generation) {
                        observed.unfinished.push(ReadGuard::name_of(number));
                    } else {
                        observed.generations.insert(number, generation);
                    }
                }
                None => observed.damaged.push(number),
            }
        }
        if let Some((number, origin)) = maps.as_ref().map(StateMaps::origin).transpose()?.flatten()
            && let Some(generation) = observed.generations.get_mut(&number)
            && generation.description.origin != origin
        {
            Arc::make_mut(&mut generation.description).origin = origin;
        }
        let held = observed.generations.values().flat_map(Generation::ids);
        let held: IdSet = held.collect();
        if let (Some(maps), Some(most)) = (&maps, held.max()) {
            observed.overrides = maps.overrides.read(most)?;
            observed.overrides.retain(|id, _| held.contains(*id));
        }
    }
    let programs = observed.generations.values().filter_map(|generation| {
        Some((generation.description.program_xdp.as_ref()?.id, generation.number))
    });
    observed.interfaces = interfaces(netlink, guard, &known, &programs.collect()).await?;
    observed.forget_marks();
    for interface in observed.interfaces.values_mut() {
        for slot in [&mut interface.hook.filter, &mut interface.hook.link] {
            if let Slot::Orphan { program, home, .. } = slot {
                *home = pin_search::find(*program);
            }
        }
    }
    Ok(observed)
}

async fn interfaces(
    netlink: &Netlink,
    guard: Option<&ReadGuard>,
    known: &[Known],
    known_xdp: &BTreeMap<u32, u32>,
) -> anyhow::Result<BTreeMap<String, Interface>> {
    let qdiscs: BTreeMap<u32, _> = netlink.qdiscs().await?.into_iter().collect();
    let mut interfaces = BTreeMap::new();
    for link in netlink.links().await? {
        let qdisc = qdiscs.get(&link.index).copied();
        let hook = hook::read(netlink, link.index, qdisc, known).await;
        let hook = hook.with_context(|| format!("{}: its filters", link.name))?;
        let xdp = xdp::read(guard, &link, known_xdp);
        let Link { index, layer, up, carrier, received, altnames, .. } = link;
        let interface = Interface { index, altnames, layer, up, carrier, received, hook, xdp };
        interfaces.insert(link.name, interface);
    }
    Ok(interfaces)
}
