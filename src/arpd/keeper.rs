//! What is known of the way to every upstream, and what is to be done about it. Pure: tables,
//! events and the time go in, actions come out.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use crate::bpf::{bytes_of, types};
use crate::netlink::{
    Link, Neighbour, NeighbourKey, NeighbourRequest, NudState, OUR_PROTOCOL, Route,
};
use crate::nexthop::{self, Hop, Way};
use types::health as Health;

/// How long one waits for an answer before it is overdue: the kernel asks every second.
const OVERDUE: Duration = Duration::from_millis(1500);
/// An upstream that was down is up again when it has answered twice, this far apart.
const SETTLED: Duration = Duration::from_secs(1);
/// One that has moved to another address does not answer at its old one, which is all that the
/// kernel asks for; asked for by everybody's it answers at once.
const SECOND_CHANCE: Duration = Duration::from_millis(500);
/// The kernel is not asked twice for the same within this time.
const PATIENCE: Duration = Duration::from_secs(2);
/// Probes a second, of all neighbours together: more of them are probed less often.
const PROBES: u32 = 100;

/// An upstream of the generation that serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Upstream {
    pub id: u32,
    pub address: Ipv4Addr,
}

/// A step to be taken.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    Ask(NeighbourKey, NeighbourRequest),
    Write(u32, Entry),
    /// A change of state, to be logged; with trouble if it is for the worse.
    Tell {
        trouble: bool,
        text: String,
    },
}

/// What the program is to know of an upstream.
#[derive(Clone, Copy, Debug)]
pub struct Entry(pub types::nexthop);

impl PartialEq for Entry {
    fn eq(&self, other: &Entry) -> bool {
        bytes_of(&self.0) == bytes_of(&other.0)
    }
}

/// A neighbour that some upstream's packets go to.
struct Tracked {
    health: Health,
    /// In seconds since 1970.
    since: u32,
    /// When the kernel was last told to keep it, and to probe it.
    kept: Option<Instant>,
    probed: Option<Instant>,
    /// Since when it has not answered what it was asked.
    waiting: Option<Instant>,
    /// Since when the kernel has given up.
    failed: Option<Instant>,
    /// It was down, and since then answers.
    recovering: Option<Instant>,
    mac: Option<[u8; 6]>,
    upstreams: Vec<usize>,
}

/// Now, by both clocks.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    pub instant: Instant,
    /// Seconds since 1970.
    pub seconds: u32,
}

/// See the module.
pub struct Keeper {
    probe_interval: Duration,
    upstreams: Vec<Upstream>,
    links: HashMap<u32, Link>,
    /// `None` in front of the first answer.
    paths: HashMap<Ipv4Addr, Result<Vec<Route>, String>>,
    /// Of the kernel's table, what is tracked.
    neighbours: HashMap<NeighbourKey, Neighbour>,
    tracked: BTreeMap<NeighbourKey, Tracked>,
    written: HashMap<u32, Entry>,
    /// Upstreams whose entry may have changed.
    dirty: BTreeSet<usize>,
    actions: Vec<Action>,
    /// When it was last called, in seconds since 1970.
    seconds: u32,
    /// Entries are written though they are thought to be there.
    rewrite: bool,
    /// Its first look at the neighbour table is still to come.
    fresh: bool,
}

impl Keeper {
    pub fn new(probe_interval: Duration) -> Keeper {
        Keeper {
            probe_interval,
            upstreams: Vec::new(),
            links: HashMap::new(),
            paths: HashMap::new(),
            neighbours: HashMap::new(),
            tracked: BTreeMap::new(),
            written: HashMap::new(),
            dirty: BTreeSet::new(),
            actions: Vec::new(),
            seconds: 0,
            rewrite: false,
            fresh: true,
        }
    }

    /// The upstreams to look after, with what was last known of them; routes are to follow.
    pub fn set_upstreams(&mut self, upstreams: Vec<(Upstream, types::nexthop)>) {
        for (upstream, known) in &upstreams {
            self.written.insert(upstream.id, Entry(*known));
        }
        self.upstreams = upstreams.into_iter().map(|(upstream, _)| upstream).collect();
        let ids: BTreeSet<u32> = self.upstreams.iter().map(|upstream| upstream.id).collect();
        self.written.retain(|id, _| ids.contains(id));
    }

    /// The addresses whose routes are wanted.
    pub fn addresses(&self) -> Vec<Ipv4Addr> {
        let addresses: BTreeSet<Ipv4Addr> =
            self.upstreams.iter().map(|upstream| upstream.address).collect();
        addresses.into_iter().collect()
    }

    /// How many neighbours there are to look after.
    pub fn neighbours(&self) -> usize {
        self.tracked.len()
    }

    /// Whether a neighbour is one of them.
    pub fn is_tracked(&self, key: NeighbourKey) -> bool {
        self.tracked.contains_key(&key)
    }

    /// Upstreams with a given health.
    pub fn count(&self, health: Health) -> usize {
        let all = self.upstreams.iter();
        all.filter(|upstream| {
            self.written.get(&upstream.id).is_some_and(|entry| entry.0.health == health)
        })
        .count()
    }

    /// All neighbours have answered or given up.
    pub fn is_settled(&self) -> bool {
        self.tracked.iter().all(|(key, tracked)| {
            !self.is_reachable_link(*key) || tracked.health != Health::HEALTH_UNKNOWN
        })
    }

    /// All interfaces.
    pub fn set_links(&mut self, links: Vec<Link>) {
        let links: HashMap<u32, Link> = links.into_iter().map(|link| (link.index, link)).collect();
        if links != self.links {
            self.links = links;
            self.dirty.extend(0..self.upstreams.len());
        }
    }

    /// The paths to each of [`Keeper::addresses`].
    pub fn set_paths(&mut self, paths: Vec<(Ipv4Addr, Result<Vec<Route>, String>)>, now: Now) {
        let paths: HashMap<_, _> = paths.into_iter().collect();
        self.tell_moves(&paths);
        self.paths = paths;
        self.track(now);
        self.dirty.extend(0..self.upstreams.len());
    }

    fn tell_moves(&mut self, paths: &HashMap<Ipv4Addr, Result<Vec<Route>, String>>) {
        let mut moves: BTreeMap<(String, String), Vec<Ipv4Addr>> = BTreeMap::new();
        for (address, new) in paths {
            let Some(old) = self.paths.get(address) else { continue };
            let (old, new) = (self.path_text(old), self.path_text(new));
            if old != new {
                moves.entry((old, new)).or_default().push(*address);
            }
        }
        for ((old, new), mut addresses) in moves {
            addresses.sort_unstable();
            let others = match addresses.len() - 1 {
                0 => String::new(),
                others => format!(" and {others} more"),
            };
            let text = format!("{}{others}: {new}, was {old}", addresses[0]);
            self.actions.push(Action::Tell { trouble: new.starts_with("no route"), text });
        }
    }

    fn path_text(&self, paths: &Result<Vec<Route>, String>) -> String {
        match paths {
            Ok(paths) => {
                let hops: Vec<String> =
                    paths.iter().map(|path| self.name(path.neighbour())).collect();
                format!("via {}", hops.join(", "))
            }
            Err(reason) => format!("no route ({reason})"),
        }
    }

    fn name(&self, key: NeighbourKey) -> String {
        match self.links.get(&key.0) {
            Some(link) => format!("{} dev {}", key.1, link.name),
            None => format!("{} dev {}", key.1, key.0),
        }
    }

    /// Keeps the list of neighbours that are on some upstream's way; lets go of the others.
    fn track(&mut self, now: Now) {
        let mut users: BTreeMap<NeighbourKey, Vec<usize>> = BTreeMap::new();
        for (index, upstream) in self.upstreams.iter().enumerate() {
            let Some(Ok(paths)) = self.paths.get(&upstream.address) else { continue };
            for path in paths.iter().filter(|path| !path.local) {
                users.entry(path.neighbour()).or_default().push(index);
            }
        }
        let gone: Vec<NeighbourKey> =
            self.tracked.keys().filter(|key| !users.contains_key(key)).copied().collect();
        for key in gone {
            self.tracked.remove(&key);
            self.release(key);
            self.neighbours.remove(&key);
        }
        for (key, upstreams) in users {
            match self.tracked.get_mut(&key) {
                Some(tracked) => tracked.upstreams = upstreams,
                None => {
                    let (health, since) = self.last_known(key, &upstreams, now);
                    let tracked = Tracked {
                        health,
                        since,
                        kept: None,
                        probed: None,
                        waiting: None,
                        failed: None,
                        recovering: None,
                        mac: None,
                        upstreams,
                    };
                    self.tracked.insert(key, tracked);
                }
            }
        }
    }

    /// What the arpd before this one left in the table.
    fn last_known(&self, key: NeighbourKey, upstreams: &[usize], now: Now) -> (Health, u32) {
        upstreams
            .iter()
            .filter_map(|index| self.written.get(&self.upstreams[*index].id))
            .filter(|entry| (entry.0.ifindex, nexthop::gateway(&entry.0)) == key)
            .filter(|entry| entry.0.since != 0)
            .map(|entry| (entry.0.health, entry.0.since))
            .next()
            .unwrap_or((Health::HEALTH_UNKNOWN, now.seconds))
    }

    fn release(&mut self, key: NeighbourKey) {
        let ours = self.neighbours.get(&key).is_some_and(is_ours);
        if ours {
            self.actions.push(Action::Ask(key, NeighbourRequest::Release));
        }
    }

    /// Lets go of all neighbours, as the last thing.
    pub fn release_all(&mut self) -> Vec<Action> {
        let keys: Vec<NeighbourKey> = self.tracked.keys().copied().collect();
        for key in keys {
            self.release(key);
        }
        std::mem::take(&mut self.actions)
    }

    /// The whole neighbour table: whatever it does not have is gone.
    pub fn set_neighbours(&mut self, table: Vec<Neighbour>, now: Now) {
        let first = std::mem::take(&mut self.fresh);
        let mut gone: BTreeSet<NeighbourKey> = self.neighbours.keys().copied().collect();
        for neighbour in table {
            let key = (neighbour.ifindex, neighbour.address);
            if self.tracked.contains_key(&key) {
                gone.remove(&key);
                self.set_neighbour(neighbour, now);
            } else if first && is_ours(&neighbour) {
                // an arpd that was killed has left it
                self.actions.push(Action::Ask(key, NeighbourRequest::Release));
            }
        }
        for key in gone {
            self.remove_neighbour(key, now);
        }
    }

    /// One entry of the table is new or has changed.
    pub fn set_neighbour(&mut self, neighbour: Neighbour, now: Now) {
        let key = (neighbour.ifindex, neighbour.address);
        if !self.tracked.contains_key(&key) {
            return;
        }
        let old = self.neighbours.insert(key, neighbour);
        self.tell_mac(key, neighbour.mac);
        let changed = old.is_none_or(|old| {
            (old.mac, old.state.is_valid()) != (neighbour.mac, neighbour.state.is_valid())
        });
        if changed {
            self.touch(key);
        }
        self.judge(key, now);
    }

    fn tell_mac(&mut self, key: NeighbourKey, new: Option<[u8; 6]>) {
        let (Some(tracked), Some(new)) = (self.tracked.get_mut(&key), new) else { return };
        if let Some(old) = tracked.mac.replace(new).filter(|old| *old != new) {
            let text = format!("{}: now at {}, was {}", self.name(key), mac(new), mac(old));
            self.actions.push(Action::Tell { trouble: false, text });
        }
    }

    /// One entry of the table is gone.
    pub fn remove_neighbour(&mut self, key: NeighbourKey, now: Now) {
        if self.neighbours.remove(&key).is_some() {
            self.touch(key);
            if let Some(tracked) = self.tracked.get_mut(&key) {
                tracked.kept = None;
            }
            self.judge(key, now);
        }
    }

    fn touch(&mut self, key: NeighbourKey) {
        if let Some(tracked) = self.tracked.get(&key) {
            self.dirty.extend(&tracked.upstreams);
        }
    }

    fn is_reachable_link(&self, key: NeighbourKey) -> bool {
        self.links.get(&key.0).is_some_and(|link| link.up && link.carrier && link.ethernet)
    }

    /// Makes up its mind about one neighbour.
    fn judge(&mut self, key: NeighbourKey, now: Now) {
        let link = self.links.get(&key.0);
        let state = self.neighbours.get(&key).map_or(NudState::None, |neighbour| neighbour.state);
        let link_down = link.is_none_or(|link| !link.up || !link.carrier);
        let asked_for = link.is_some_and(|link| link.ethernet);
        let Some(tracked) = self.tracked.get_mut(&key) else { return };
        let (health, why) = if link_down {
            (Health::HEALTH_DOWN, "its interface is down")
        } else if !asked_for {
            (Health::HEALTH_UP, "")
        } else {
            tracked.observe(state, now.instant)
        };
        if health == tracked.health {
            return;
        }
        let old = tracked.health;
        (tracked.health, tracked.since) = (health, now.seconds);
        let upstreams = tracked.upstreams.len();
        self.touch(key);
        self.tell_health(key, old, health, why, upstreams);
    }

    fn tell_health(
        &mut self,
        key: NeighbourKey,
        old: Health,
        new: Health,
        why: &str,
        count: usize,
    ) {
        let name = self.name(key);
        let upstreams = match count {
            1 => "1 upstream".into(),
            count => format!("{count} upstreams"),
        };
        let (trouble, text) = match new {
            Health::HEALTH_DOWN => (true, format!("{name} is down: {why} ({upstreams})")),
            Health::HEALTH_UP if old == Health::HEALTH_DOWN => {
                (false, format!("{name} is up again ({upstreams})"))
            }
            // most of what is overdue comes yet
            _ => return,
        };
        self.actions.push(Action::Tell { trouble, text });
    }

    /// What is due by now; to be called several times a second.
    pub fn tick(&mut self, now: Now) {
        self.seconds = now.seconds;
        let keys: Vec<NeighbourKey> = self.tracked.keys().copied().collect();
        let interval = self.probe_interval.max(Duration::from_secs(1) * keys.len() as u32 / PROBES);
        for (index, key) in keys.iter().enumerate() {
            self.judge(*key, now);
            if self.is_reachable_link(*key) {
                self.ask(*key, index, keys.len(), interval, now.instant);
            }
        }
    }

    fn ask(
        &mut self,
        key: NeighbourKey,
        index: usize,
        of: usize,
        interval: Duration,
        now: Instant,
    ) {
        let neighbour = self.neighbours.get(&key);
        let Some(tracked) = self.tracked.get_mut(&key) else { return };
        let request = match neighbour {
            Some(entry) if is_others(entry) => None,
            Some(entry) if entry.state.is_valid() && entry.protocol == OUR_PROTOCOL => {
                // one after the other, not all at once
                let first = || now.checked_sub(interval * index as u32 / of as u32).unwrap_or(now);
                let probed = *tracked.probed.get_or_insert_with(first);
                let settling = tracked.recovering.is_some();
                let wait = if settling { SETTLED.min(interval) } else { interval };
                let idle = !matches!(entry.state, NudState::Probe | NudState::Delay);
                (idle && now.duration_since(probed) >= wait).then_some(NeighbourRequest::Probe)
            }
            _ => {
                let recently = tracked.kept.is_some_and(|kept| {
                    now.duration_since(kept) < PATIENCE
                        && tracked.failed.is_none_or(|failed| failed < kept)
                });
                (!recently).then_some(NeighbourRequest::Keep)
            }
        };
        let Some(request) = request else { return };
        match request {
            NeighbourRequest::Probe => tracked.probed = Some(now),
            _ => tracked.kept = Some(now),
        }
        tracked.waiting.get_or_insert(now);
        if request == NeighbourRequest::Probe
            && let Some(entry) = self.neighbours.get_mut(&key)
        {
            entry.state = NudState::Probe;
        }
        self.actions.push(Action::Ask(key, request));
    }

    /// All entries, whether or not they are thought to be written: another program may have
    /// changed them.
    pub fn rewrite(&mut self) {
        self.rewrite = true;
        self.dirty.extend(0..self.upstreams.len());
    }

    /// The actions that have come together.
    pub fn actions(&mut self) -> Vec<Action> {
        let rewrite = std::mem::take(&mut self.rewrite);
        for index in std::mem::take(&mut self.dirty) {
            let Some(upstream) = self.upstreams.get(index).copied() else { continue };
            if !self.paths.contains_key(&upstream.address) {
                continue;
            }
            let entry = Entry(self.entry(upstream));
            if rewrite || self.written.get(&upstream.id) != Some(&entry) {
                self.written.insert(upstream.id, entry);
                self.actions.push(Action::Write(upstream.id, entry));
            }
        }
        std::mem::take(&mut self.actions)
    }

    fn entry(&self, upstream: Upstream) -> types::nexthop {
        let down = |path: &&Route| {
            let tracked = self.tracked.get(&path.neighbour());
            tracked.is_none_or(|tracked| tracked.health == Health::HEALTH_DOWN)
        };
        let path = match self.paths.get(&upstream.address) {
            // any path reaches it; the first that is alive, so that all arpds choose alike
            Some(Ok(paths)) => paths.iter().find(|path| !down(path)).or(paths.first()),
            _ => None,
        };
        let way = path.filter(|path| !path.local).and_then(|path| self.way(path));
        let mut entry = nexthop::entry(upstream.address, way.as_ref());
        match path.and_then(|path| self.tracked.get(&path.neighbour())) {
            Some(tracked) => (entry.health, entry.since) = (tracked.health, tracked.since),
            None => {
                let last = self.written.get(&upstream.id).map(|entry| &entry.0);
                let before = last.filter(|last| {
                    last.address == entry.address && last.health == Health::HEALTH_DOWN
                });
                entry.health = Health::HEALTH_DOWN;
                entry.since = before.map_or(self.seconds, |before| before.since);
            }
        }
        let valid = path.and_then(|path| self.neighbours.get(&path.neighbour()));
        if !valid.is_some_and(|neighbour| neighbour.state.is_valid()) {
            self.keep_last_macs(upstream.id, &mut entry);
        }
        entry
    }

    fn way(&self, path: &Route) -> Option<Way> {
        let link = self.links.get(&path.ifindex)?;
        let neighbour = self.neighbours.get(&path.neighbour());
        let known = neighbour.filter(|neighbour| neighbour.state.is_valid());
        Some(Way::Hop(Hop {
            interface: link.name.clone(),
            ifindex: link.index,
            gateway: path.gateway,
            mtu: path.mtu.unwrap_or(link.mtu),
            macs: link.mac.filter(|_| link.ethernet).zip(known.and_then(|known| known.mac)),
        }))
    }

    /// Of a neighbour that does not answer the last address is better than none, for copies.
    fn keep_last_macs(&self, id: u32, entry: &mut types::nexthop) {
        let Some(Entry(last)) = self.written.get(&id) else { return };
        let same = (last.address, last.ifindex, last.gateway)
            == (entry.address, entry.ifindex, entry.gateway);
        if same && last.macs != types::macs::MACS_UNKNOWN {
            (entry.source, entry.destination) = (last.source, last.destination);
            entry.macs = types::macs::MACS_KNOWN;
        }
    }
}

impl Tracked {
    /// What an entry's state says of the neighbour's health, and why if it is down.
    fn observe(&mut self, state: NudState, now: Instant) -> (Health, &'static str) {
        match state {
            NudState::Reachable | NudState::Noarp | NudState::Permanent => {
                (self.waiting, self.failed) = (None, None);
                if self.health != Health::HEALTH_DOWN {
                    return (Health::HEALTH_UP, "");
                }
                let since = *self.recovering.get_or_insert(now);
                let again = self.probed.is_some_and(|probed| probed >= since + SETTLED / 2);
                if state.is_static() || again {
                    self.recovering = None;
                    return (Health::HEALTH_UP, "");
                }
                (Health::HEALTH_DOWN, "")
            }
            // the kernel has asked three times
            NudState::Failed => {
                self.recovering = None;
                self.failed.get_or_insert(now);
                self.unless_it_answers(now)
            }
            _ if self.failed.is_some() => self.unless_it_answers(now),
            _ => {
                let overdue =
                    self.waiting.is_some_and(|since| now.duration_since(since) >= OVERDUE);
                let health = match self.health {
                    Health::HEALTH_UP if overdue => Health::HEALTH_STALE,
                    health => health,
                };
                (health, "")
            }
        }
    }
}

impl Tracked {
    fn unless_it_answers(&self, now: Instant) -> (Health, &'static str) {
        let known = !matches!(self.health, Health::HEALTH_DOWN | Health::HEALTH_UNKNOWN);
        let asked = self.failed.is_none_or(|since| now.duration_since(since) >= SECOND_CHANCE);
        let health = if known && !asked { Health::HEALTH_STALE } else { Health::HEALTH_DOWN };
        (health, "no answer")
    }
}

/// An entry that we had the kernel keep.
fn is_ours(neighbour: &Neighbour) -> bool {
    neighbour.managed && neighbour.protocol == OUR_PROTOCOL
}

/// An entry that somebody else looks after.
fn is_others(neighbour: &Neighbour) -> bool {
    let kept = neighbour.managed && neighbour.protocol != OUR_PROTOCOL;
    neighbour.state.is_static() || neighbour.learned || kept
}

fn mac(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Whether more neighbours are wanted than the kernel's table holds; with the advice to give.
pub fn overflow(wanted: usize, others: usize, threshold2: u32, threshold3: u32) -> Option<String> {
    let all = wanted + others;
    let (name, limit) = if all >= threshold3 as usize {
        ("gc_thresh3", threshold3)
    } else if all > threshold2 as usize {
        ("gc_thresh2", threshold2)
    } else {
        return None;
    };
    Some(format!(
        "{all} neighbours ({wanted} next hops, {others} others) are more than the kernel's table is set for: \
         raise the sysctl net.ipv4.neigh.default.{name} (now {limit})"
    ))
}

/// The family of a neighbour, to leave out those of the other table.
pub fn is_ipv4(key: &NeighbourKey) -> bool {
    matches!(key.1, IpAddr::V4(_))
}
