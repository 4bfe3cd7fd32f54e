//! The neighbour tracker: a pure state machine for the next hops of all upstreams. Tables, events and
//! the time go in, effects come out.
//!
//! `state` holds the states of one neighbour and the table of their transitions.

mod messages;
mod state;
mod tracked;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use foldhash::{HashMap, HashMapExt};

use state::{LinkState, State};
use tracked::{Pacing, Step, Tracked};
use types::health as Health;

use crate::bpf::{bytes_of, types};
use crate::datapath::nexthops;
use crate::net::link::Link;
use crate::net::neighbour::{
    Neighbour, NeighbourKey, NeighbourRequest, NeighbourTable, OUR_PROTOCOL,
};
use crate::net::nexthop::{self, Chosen, Hop, NextHop};
use crate::net::route::Route;
use crate::net::routing::{Paths, Target};

/// Maximum probes a second, of all neighbours together. Where there are more neighbours, each is
/// probed less often.
const MAX_PROBES: u32 = 100;

/// An upstream of the active generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrackedUpstream {
    pub id: u32,
    pub target: Target,
}

/// An action that the caller has to carry out.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    Request(NeighbourKey, NeighbourRequest),
    /// Write the next hop of the upstream with this id.
    Write(u32, NextHopEntry),
    /// Log a change of state, as a warning if it is for the worse.
    Log {
        warning: bool,
        text: String,
    },
}

/// An entry of the program's table of next hops, comparable.
#[derive(Clone, Copy, Debug)]
pub struct NextHopEntry(pub types::nexthop);

impl PartialEq for NextHopEntry {
    fn eq(&self, other: &NextHopEntry) -> bool {
        bytes_of(&self.0) == bytes_of(&other.0)
    }
}

/// The present time, by two clocks.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    pub instant: Instant,
    /// Seconds since 1970.
    pub seconds: u32,
}

/// Next hops of all upstreams and the kernel's tables that they depend on.
pub struct NeighbourTracker {
    probe_interval: Duration,
    upstreams: Vec<TrackedUpstream>,
    links: HashMap<u32, Link>,
    /// Empty before the first routes are read.
    paths: BTreeMap<Target, Result<Paths, String>>,
    tracked: BTreeMap<NeighbourKey, Tracked>,
    written: BTreeMap<u32, NextHopEntry>,
    /// Upstreams whose service does not answer, and since when, in seconds since 1970.
    failed: HashMap<u32, u32>,
    /// Indexes of upstreams whose entry may have changed.
    dirty: BTreeSet<usize>,
    effects: Vec<Effect>,
    /// Neighbours that have changed: the key, true if it is down now, and the reason.
    changes: Vec<(NeighbourKey, bool, &'static str)>,
    /// Time of the last tick, in seconds since 1970.
    seconds: u32,
    /// Write all entries, even those that are believed to be written.
    rewrite: bool,
    /// The neighbour table has not been read yet.
    fresh: bool,
    /// New entries that the kernel's tables have room for, of IPv4 and of IPv6.
    room: [usize; 2],
}

impl NeighbourTracker {
    pub fn new(probe_interval: Duration) -> NeighbourTracker {
        NeighbourTracker {
            probe_interval,
            upstreams: Vec::new(),
            links: HashMap::new(),
            paths: BTreeMap::new(),
            tracked: BTreeMap::new(),
            written: BTreeMap::new(),
            failed: HashMap::new(),
            dirty: BTreeSet::new(),
            effects: Vec::new(),
            changes: Vec::new(),
            seconds: 0,
            rewrite: false,
            fresh: true,
            room: [usize::MAX; 2],
        }
    }

    /// Sets how many new entries the kernel's table of a family has room for. No more are requested:
    /// they would evict entries that the host needs, or be refused.
    pub fn set_room(&mut self, ipv6: bool, room: usize) {
        self.room[usize::from(ipv6)] = room;
    }

    /// Replaces the upstreams; each comes with its next hop as it is written now. Their routes must be set next.
    pub fn set_upstreams(&mut self, upstreams: Vec<(TrackedUpstream, types::nexthop)>) {
        let written = upstreams.iter().map(|(upstream, known)| (upstream.id, NextHopEntry(*known)));
        self.written = written.collect();
        self.failed.retain(|id, _| self.written.contains_key(id));
        self.upstreams = Vec::with_capacity(upstreams.len());
        self.upstreams.extend(upstreams.into_iter().map(|(upstream, _)| upstream));
    }

    /// Sets since when the service of an upstream does not answer; `None`: it does, or nobody asks.
    pub fn set_failed(&mut self, id: u32, since: Option<u32>) {
        let before = match since {
            Some(since) => self.failed.insert(id, since),
            None => self.failed.remove(&id),
        };
        if before != since {
            self.dirty.extend(self.upstreams.iter().position(|upstream| upstream.id == id));
        }
    }

    /// Returns the entry of an upstream as it is written.
    pub fn written(&self, id: u32) -> Option<&types::nexthop> {
        self.written.get(&id).map(|entry| &entry.0)
    }

    /// Returns the targets whose paths are needed.
    pub fn targets(&self) -> Vec<Target> {
        let targets: BTreeSet<&Target> =
            self.upstreams.iter().map(|upstream| &upstream.target).collect();
        targets.into_iter().cloned().collect()
    }

    /// Returns all interfaces, by index.
    pub fn links(&self) -> &HashMap<u32, Link> {
        &self.links
    }

    /// Returns the number of tracked neighbours.
    pub fn neighbours(&self) -> usize {
        self.tracked.len()
    }

    /// Returns the number of tracked neighbours of a family.
    pub fn neighbours_of(&self, ipv6: bool) -> usize {
        self.tracked.keys().filter(|key| key.1.is_ipv6() == ipv6).count()
    }

    pub fn is_tracked(&self, key: NeighbourKey) -> bool {
        self.tracked.contains_key(&key)
    }

    /// Returns the number of upstreams with a given health.
    pub fn count(&self, health: Health) -> usize {
        let all = self.upstreams.iter();
        all.filter(|upstream| {
            self.written.get(&upstream.id).is_some_and(|entry| entry.0.health == health)
        })
        .count()
    }

    /// Returns true if every neighbour has answered or failed.
    pub fn is_settled(&self) -> bool {
        self.tracked.iter().all(|(key, tracked)| {
            !self.is_reachable_link(*key) || tracked.health() != Health::HEALTH_UNKNOWN
        })
    }

    /// Returns the upstreams without a route or with a next hop that does not answer.
    pub fn unreachable(&self) -> Vec<String> {
        let up = |upstream: &&TrackedUpstream| {
            let health = self.entry(upstream).health;
            [Health::HEALTH_UP, Health::HEALTH_STALE, Health::HEALTH_FAILED].contains(&health)
        };
        let dead = self.upstreams.iter().filter(|upstream| !up(upstream));
        dead.map(|upstream| upstream.target.address.to_string())
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect()
    }

    /// Replaces the interfaces.
    pub fn set_links(&mut self, links: Vec<Link>) {
        let links: HashMap<u32, Link> = links.into_iter().map(|link| (link.index, link)).collect();
        if links != self.links {
            self.links = links;
            self.dirty.extend(0..self.upstreams.len());
        }
    }

    /// Replaces the paths to each of [`NeighbourTracker::targets`].
    pub fn set_paths(&mut self, paths: Vec<(Target, Result<Paths, String>)>, now: Now) {
        let paths: BTreeMap<_, _> = paths.into_iter().collect();
        self.log_moves(&paths);
        self.paths = paths;
        self.track(now);
        self.dirty.extend(0..self.upstreams.len());
    }

    /// Tracks the neighbours that are next hops of some upstream, and releases all others.
    fn track(&mut self, now: Now) {
        let mut users: BTreeMap<NeighbourKey, Vec<usize>> = BTreeMap::new();
        for (index, upstream) in self.upstreams.iter().enumerate() {
            let Some(Ok(paths)) = self.paths.get(&upstream.target) else { continue };
            for path in paths.routes.iter().filter(|path| !path.local) {
                users.entry(path.neighbour()).or_default().push(index);
            }
        }
        let gone: Vec<NeighbourKey> =
            self.tracked.keys().filter(|key| !users.contains_key(key)).copied().collect();
        for key in gone {
            self.release(key);
            self.tracked.remove(&key);
        }
        let count = users.len() as f32;
        for (index, (key, upstreams)) in users.into_iter().enumerate() {
            match self.tracked.get_mut(&key) {
                Some(tracked) => tracked.upstreams = upstreams,
                None => {
                    let (health, since) = self.last_known(key, &upstreams, now);
                    let tracked = Tracked {
                        entry: None,
                        state: State::from_health(health),
                        since,
                        pacing: Pacing::new(index as f32 / count),
                        mac: None,
                        upstreams,
                    };
                    self.tracked.insert(key, tracked);
                }
            }
        }
    }

    /// Returns the health that an earlier arpd has written, and since when.
    fn last_known(&self, key: NeighbourKey, upstreams: &[usize], now: Now) -> (Health, u32) {
        upstreams
            .iter()
            .filter_map(|index| self.written.get(&self.upstreams[*index].id))
            .filter(|entry| (entry.0.ifindex, nexthops::gateway(&entry.0)) == key)
            .filter(|entry| entry.0.since != 0)
            .map(|entry| (entry.0.health, entry.0.since))
            .next()
            .unwrap_or((Health::HEALTH_UNKNOWN, now.seconds))
    }

    fn release(&mut self, key: NeighbourKey) {
        let entry = self.tracked.get(&key).and_then(|tracked| tracked.entry);
        let ours = entry.as_ref().is_some_and(is_ours);
        if ours {
            self.effects.push(Effect::Request(key, NeighbourRequest::Release));
        }
    }

    /// Releases all neighbours; called once, at the end.
    pub fn release_all(&mut self) -> Vec<Effect> {
        let keys: Vec<NeighbourKey> = self.tracked.keys().copied().collect();
        for key in keys {
            self.release(key);
        }
        std::mem::take(&mut self.effects)
    }

    /// Replaces the neighbour table.
    pub fn set_neighbours(&mut self, table: Vec<Neighbour>, now: Now) {
        let first = std::mem::take(&mut self.fresh);
        let mut gone: BTreeSet<NeighbourKey> = self.tracked.keys().copied().collect();
        for neighbour in table {
            let key = (neighbour.ifindex, neighbour.address);
            if self.tracked.contains_key(&key) {
                gone.remove(&key);
                self.set_neighbour(neighbour, now);
            } else if first && is_ours(&neighbour) {
                // left behind by an arpd that was killed
                self.effects.push(Effect::Request(key, NeighbourRequest::Release));
            }
        }
        for key in gone {
            self.remove_neighbour(key, now);
        }
    }

    /// Adds or changes one entry of the neighbour table.
    pub fn set_neighbour(&mut self, neighbour: Neighbour, now: Now) {
        let key = (neighbour.ifindex, neighbour.address);
        let Some(tracked) = self.tracked.get_mut(&key) else { return };
        let old = tracked.entry.replace(neighbour);
        let changed = old.is_none_or(|old| {
            (old.mac, old.state.is_valid()) != (neighbour.mac, neighbour.state.is_valid())
        });
        if changed {
            self.dirty.extend(&tracked.upstreams);
        }
        self.log_mac(key, neighbour.mac);
        self.attend(key, now);
    }

    /// Removes one entry of the neighbour table.
    pub fn remove_neighbour(&mut self, key: NeighbourKey, now: Now) {
        let Some(tracked) = self.tracked.get_mut(&key) else { return };
        if tracked.entry.take().is_some() {
            tracked.pacing.kept = None;
            self.dirty.extend(&tracked.upstreams);
            self.attend(key, now);
        }
    }

    fn is_reachable_link(&self, key: NeighbourKey) -> bool {
        LinkState::new(self.links.get(&key.0)) == LinkState::Ethernet
    }

    /// Moves all neighbours on; called several times a second.
    pub fn tick(&mut self, now: Now) {
        self.seconds = now.seconds;
        let interval = self.interval();
        // there are many neighbours and few links
        let mut link = (0, LinkState::Down);
        let mut steps = Vec::new();
        for (key, tracked) in &mut self.tracked {
            if link.0 != key.0 {
                link = (key.0, LinkState::new(self.links.get(&key.0)));
            }
            let step = tracked.step(link.1, interval, now);
            if step != Step::default() {
                steps.push((*key, step));
            }
        }
        for (key, step) in steps {
            self.take(key, step);
        }
    }

    /// Moves one neighbour on.
    fn attend(&mut self, key: NeighbourKey, now: Now) {
        let interval = self.interval();
        let link = LinkState::new(self.links.get(&key.0));
        let Some(tracked) = self.tracked.get_mut(&key) else { return };
        let step = tracked.step(link, interval, now);
        self.take(key, step);
    }

    fn take(&mut self, key: NeighbourKey, step: Step) {
        let Some(tracked) = self.tracked.get(&key) else { return };
        if let Some(request) = step.request {
            let creates = request == NeighbourRequest::Keep && tracked.entry.is_none();
            let room = &mut self.room[usize::from(key.1.is_ipv6())];
            if !creates || *room > 0 {
                *room -= usize::from(creates);
                self.effects.push(Effect::Request(key, request));
            }
        }
        let Some(before) = step.before else { return };
        self.dirty.extend(&tracked.upstreams);
        match (before, tracked.health()) {
            (_, Health::HEALTH_DOWN) => self.changes.push((key, true, tracked.reason())),
            (Health::HEALTH_DOWN, Health::HEALTH_UP) => self.changes.push((key, false, "")),
            // most overdue answers still arrive
            _ => {}
        }
    }

    fn interval(&self) -> Duration {
        self.probe_interval.max(Duration::from_secs(1) * self.tracked.len() as u32 / MAX_PROBES)
    }

    /// Writes all entries again: another program may have changed them.
    pub fn rewrite(&mut self) {
        self.rewrite = true;
        self.dirty.extend(0..self.upstreams.len());
    }

    /// Takes the effects that have accumulated.
    pub fn effects(&mut self) -> Vec<Effect> {
        self.log_changes();
        let rewrite = std::mem::take(&mut self.rewrite);
        for index in std::mem::take(&mut self.dirty) {
            let Some(upstream) = self.upstreams.get(index) else { continue };
            if !self.paths.contains_key(&upstream.target) {
                continue;
            }
            let (id, entry) = (upstream.id, NextHopEntry(self.entry(upstream)));
            if rewrite || self.written.get(&id) != Some(&entry) {
                self.written.insert(id, entry);
                self.effects.push(Effect::Write(id, entry));
            }
        }
        std::mem::take(&mut self.effects)
    }

    fn entry(&self, upstream: &TrackedUpstream) -> types::nexthop {
        let chosen = self.choose(upstream);
        let next_hop = chosen.as_ref().map(|(next_hop, _)| next_hop);
        let mut entry = nexthops::entry(upstream.target.address.ip, next_hop);
        match chosen.as_ref().and_then(|(_, tracked)| *tracked) {
            Some(tracked) => (entry.health, entry.since) = (tracked.health(), tracked.since),
            None => {
                let last = self.written.get(&upstream.id).map(|entry| &entry.0);
                let before = last.filter(|last| {
                    last.address == entry.address && last.health == Health::HEALTH_DOWN
                });
                entry.health = Health::HEALTH_DOWN;
                entry.since = before.map_or(self.seconds, |before| before.since);
            }
        }
        if let Some(since) = self.failed.get(&upstream.id)
            && entry.health != Health::HEALTH_DOWN
        {
            (entry.health, entry.since) = (Health::HEALTH_FAILED, *since);
        }
        if entry.macs == types::macs::MACS_UNKNOWN {
            self.keep_last_macs(upstream.id, &mut entry);
        }
        entry
    }

    /// Returns the next hops to write and the neighbour that determines the upstream's health: the best
    /// one where packets may take several.
    fn choose(&self, upstream: &TrackedUpstream) -> Option<(NextHop, Option<&Tracked>)> {
        let paths = self.paths.get(&upstream.target)?.as_ref().ok()?;
        if paths.routes.iter().any(|path| path.local) {
            return None;
        }
        let tracked = |path: &Route| self.tracked.get(&path.neighbour());
        let is_alive = |path: &Route| {
            tracked(path).is_some_and(|tracked| tracked.health() != Health::HEALTH_DOWN)
        };
        let alive: Vec<bool> = paths.routes.iter().map(is_alive).collect();
        let hops: Vec<Hop> =
            paths.routes.iter().filter_map(|path| self.hop(upstream, path)).collect();
        let chosen = nexthop::choose(paths, &upstream.target.senders, &hops, &alive).ok()?;
        let Chosen { path, leased } = chosen;
        if leased {
            let path = &paths.routes[path];
            return Some((NextHop::Hop(self.hop(upstream, path)?), tracked(path)));
        }
        let mut hops = hops;
        // hops whose interface is gone are missing
        let place = hops.iter().position(|hop| hop.is_by(&paths.routes[path]))?;
        hops.swap(0, place);
        let best =
            paths.routes.iter().filter_map(tracked).min_by_key(|tracked| rank(tracked.health()));
        Some((NextHop::Several { hops, by: paths.by, routed: true }, best))
    }

    fn hop(&self, upstream: &TrackedUpstream, path: &Route) -> Option<Hop> {
        let link = self.links.get(&path.ifindex)?;
        let mac = self.valid_entry(path).and_then(|entry| entry.mac);
        Some(Hop::new(upstream.target.address.ip, path, link, mac))
    }

    fn valid_entry(&self, path: &Route) -> Option<Neighbour> {
        let entry = self.tracked.get(&path.neighbour())?.entry?;
        entry.state.is_valid().then_some(entry)
    }

    /// Keeps the last MAC addresses of a neighbour that does not answer: copies are still sent there.
    fn keep_last_macs(&self, id: u32, entry: &mut types::nexthop) {
        let Some(NextHopEntry(last)) = self.written.get(&id) else { return };
        let same = (last.address, last.ifindex, last.gateway)
            == (entry.address, entry.ifindex, entry.gateway);
        if same && last.macs != types::macs::MACS_UNKNOWN {
            (entry.source, entry.destination) = (last.source, last.destination);
            entry.macs = types::macs::MACS_KNOWN;
        }
    }
}

/// Returns an order of healths, the best first.
fn rank(health: Health) -> u8 {
    match health {
        Health::HEALTH_UP => 0,
        Health::HEALTH_STALE => 1,
        Health::HEALTH_UNKNOWN => 2,
        _ => 3,
    }
}

/// Returns true if the kernel keeps the entry for udplb.
fn is_ours(neighbour: &Neighbour) -> bool {
    neighbour.managed && neighbour.protocol == OUR_PROTOCOL
}

/// Returns true if another program or an administrator manages the entry.
fn is_others(neighbour: &Neighbour) -> bool {
    let kept = neighbour.managed && neighbour.protocol != OUR_PROTOCOL;
    neighbour.state.is_static() || neighbour.learned || kept
}

/// Returns the number of entries that a table has room for. A sixteenth is reserved for the host.
pub fn room(table: &NeighbourTable) -> usize {
    (table.threshold3 - table.threshold3 / 16).saturating_sub(table.entries) as usize
}

#[cfg(test)]
mod tests;
