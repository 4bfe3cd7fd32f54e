//! What is known of the way to every upstream, and what is to be done about it. Pure: tables,
//! events and the time go in, actions come out.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use types::health as Health;

use crate::bpf::{bytes_of, types};
use crate::config::Address;
use crate::datapath::nexthops;
use crate::net::link::{Layer, Link};
use crate::net::neighbour::{
    Neighbour, NeighbourKey, NeighbourRequest, NeighbourTable, NudState, OUR_PROTOCOL,
};
use crate::net::nexthop::{self, Chosen, Hop, Way};
use crate::net::route::Route;
use crate::net::routing::{Paths, Target};

/// How long one waits for an answer before it is overdue: the kernel asks every second.
const OVERDUE: Duration = Duration::from_millis(1500);
/// An upstream that was down is up again when it has answered twice, this far apart.
const SETTLED: Duration = Duration::from_secs(1);
/// One that has moved to another address does not answer at its old one, which is all that the
/// kernel asks for; asked for by everybody's it answers at once.
const SECOND_CHANCE: Duration = Duration::from_millis(250);
/// The kernel is not asked twice for the same within this time.
const PATIENCE: Duration = Duration::from_secs(2);
/// Probes a second, of all neighbours together: more of them are probed less often.
const PROBES: u32 = 100;

/// An upstream of the generation that serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upstream {
    pub id: u32,
    pub target: Target,
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
    /// The kernel's entry.
    entry: Option<Neighbour>,
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
    /// 0 to 1: neighbours are probed one after the other, not all at once.
    turn: f32,
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
    paths: HashMap<Target, Result<Paths, String>>,
    tracked: BTreeMap<NeighbourKey, Tracked>,
    written: HashMap<u32, Entry>,
    /// Upstreams whose entry may have changed.
    dirty: BTreeSet<usize>,
    actions: Vec<Action>,
    /// Neighbours that are down now, or up again, and why.
    changes: Vec<(NeighbourKey, bool, &'static str)>,
    /// When it was last called, in seconds since 1970.
    seconds: u32,
    /// Entries are written though they are thought to be there.
    rewrite: bool,
    /// Its first look at the neighbour table is still to come.
    fresh: bool,
    /// New entries that the kernel's tables have room for, of IPv4 and of IPv6.
    room: [usize; 2],
}

impl Keeper {
    pub fn new(probe_interval: Duration) -> Keeper {
        Keeper {
            probe_interval,
            upstreams: Vec::new(),
            links: HashMap::new(),
            paths: HashMap::new(),
            tracked: BTreeMap::new(),
            written: HashMap::new(),
            dirty: BTreeSet::new(),
            actions: Vec::new(),
            changes: Vec::new(),
            seconds: 0,
            rewrite: false,
            fresh: true,
            room: [usize::MAX; 2],
        }
    }

    /// Sets how many entries the kernel's table of a family has room for. Beyond that none is asked for
    /// that is not there: it would take the place of one that the host needs, or be refused.
    pub fn set_room(&mut self, ipv6: bool, room: usize) {
        self.room[usize::from(ipv6)] = room;
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

    /// Whose paths are wanted.
    pub fn targets(&self) -> Vec<Target> {
        let targets: BTreeSet<&Target> =
            self.upstreams.iter().map(|upstream| &upstream.target).collect();
        targets.into_iter().cloned().collect()
    }

    /// All interfaces, by index.
    pub fn links(&self) -> &HashMap<u32, Link> {
        &self.links
    }

    /// How many neighbours there are to look after.
    pub fn neighbours(&self) -> usize {
        self.tracked.len()
    }

    /// How many of one family.
    pub fn neighbours_of(&self, ipv6: bool) -> usize {
        self.tracked.keys().filter(|key| key.1.is_ipv6() == ipv6).count()
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

    /// The upstreams that cannot be reached: without a route, or with a next hop that does not answer.
    pub fn unreachable(&self) -> Vec<String> {
        let up = |upstream: &&Upstream| {
            let health = self.entry(upstream).health;
            [Health::HEALTH_UP, Health::HEALTH_STALE].contains(&health)
        };
        let dead = self.upstreams.iter().filter(|upstream| !up(upstream));
        dead.map(|upstream| upstream.target.address.to_string())
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect()
    }

    /// All interfaces.
    pub fn set_links(&mut self, links: Vec<Link>) {
        let links: HashMap<u32, Link> = links.into_iter().map(|link| (link.index, link)).collect();
        if links != self.links {
            self.links = links;
            self.dirty.extend(0..self.upstreams.len());
        }
    }

    /// The paths to each of [`Keeper::targets`].
    pub fn set_paths(&mut self, paths: Vec<(Target, Result<Paths, String>)>, now: Now) {
        let paths: HashMap<_, _> = paths.into_iter().collect();
        self.tell_moves(&paths);
        self.paths = paths;
        self.track(now);
        self.dirty.extend(0..self.upstreams.len());
    }

    fn tell_moves(&mut self, paths: &HashMap<Target, Result<Paths, String>>) {
        let mut moves: BTreeMap<(String, String), BTreeSet<&Address>> = BTreeMap::new();
        for (target, new) in paths {
            let Some(old) = self.paths.get(target) else { continue };
            let (old, new) = (self.path_text(old), self.path_text(new));
            if old != new {
                moves.entry((old, new)).or_default().insert(&target.address);
            }
        }
        for ((old, new), addresses) in moves {
            let others = match addresses.len() - 1 {
                0 => String::new(),
                others => format!(" and {others} more"),
            };
            let first = addresses.first().expect("one that moved");
            let text = format!("{first}{others}: {new}, was {old}");
            self.actions.push(Action::Tell { trouble: new.starts_with("no route"), text });
        }
    }

    fn path_text(&self, paths: &Result<Paths, String>) -> String {
        match paths {
            Ok(paths) => {
                let hops: Vec<String> =
                    paths.routes.iter().map(|path| self.name(path.neighbour())).collect();
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
        let of = users.len() as f32;
        for (index, (key, upstreams)) in users.into_iter().enumerate() {
            match self.tracked.get_mut(&key) {
                Some(tracked) => tracked.upstreams = upstreams,
                None => {
                    let (health, since) = self.last_known(key, &upstreams, now);
                    let tracked = Tracked {
                        entry: None,
                        health,
                        since,
                        kept: None,
                        probed: None,
                        waiting: None,
                        failed: None,
                        recovering: None,
                        mac: None,
                        turn: index as f32 / of,
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
        let mut gone: BTreeSet<NeighbourKey> = self.tracked.keys().copied().collect();
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
        let Some(tracked) = self.tracked.get_mut(&key) else { return };
        let old = tracked.entry.replace(neighbour);
        let changed = old.is_none_or(|old| {
            (old.mac, old.state.is_valid()) != (neighbour.mac, neighbour.state.is_valid())
        });
        if changed {
            self.dirty.extend(&tracked.upstreams);
        }
        self.tell_mac(key, neighbour.mac);
        self.attend(key, now);
    }

    /// One entry of the table is gone.
    pub fn remove_neighbour(&mut self, key: NeighbourKey, now: Now) {
        let Some(tracked) = self.tracked.get_mut(&key) else { return };
        if tracked.entry.take().is_some() {
            tracked.kept = None;
            self.dirty.extend(&tracked.upstreams);
            self.attend(key, now);
        }
    }

    fn tell_mac(&mut self, key: NeighbourKey, new: Option<[u8; 6]>) {
        let (Some(tracked), Some(new)) = (self.tracked.get_mut(&key), new) else { return };
        if let Some(old) = tracked.mac.replace(new).filter(|old| *old != new) {
            let text = format!("{}: now at {}, was {}", self.name(key), mac(new), mac(old));
            self.actions.push(Action::Tell { trouble: false, text });
        }
    }

    fn is_reachable_link(&self, key: NeighbourKey) -> bool {
        LinkState::of(self.links.get(&key.0)) == LinkState::Asking
    }

    /// What is due by now; to be called several times a second.
    pub fn tick(&mut self, now: Now) {
        self.seconds = now.seconds;
        let interval = self.interval();
        // there are many neighbours and few links
        let mut link = (0, LinkState::Down);
        for (key, tracked) in &mut self.tracked {
            if link.0 != key.0 {
                link = (key.0, LinkState::of(self.links.get(&key.0)));
            }
            let mut step = tracked.step(link.1, interval, now);
            step.fit(*key, tracked, &mut self.room);
            step.take(*key, tracked, &mut self.dirty, &mut self.actions, &mut self.changes);
        }
    }

    /// The same for one neighbour of which there is news.
    fn attend(&mut self, key: NeighbourKey, now: Now) {
        let interval = self.interval();
        let link = LinkState::of(self.links.get(&key.0));
        let Some(tracked) = self.tracked.get_mut(&key) else { return };
        let mut step = tracked.step(link, interval, now);
        step.fit(key, tracked, &mut self.room);
        step.take(key, tracked, &mut self.dirty, &mut self.actions, &mut self.changes);
    }

    fn interval(&self) -> Duration {
        self.probe_interval.max(Duration::from_secs(1) * self.tracked.len() as u32 / PROBES)
    }

    /// One line for all that happened alike.
    fn tell_changes(&mut self) {
        let mut alike: BTreeMap<(bool, &str, u32), Vec<NeighbourKey>> = BTreeMap::new();
        for (key, down, why) in std::mem::take(&mut self.changes) {
            alike.entry((down, why, key.0)).or_default().push(key);
        }
        for ((down, why, _), keys) in alike {
            let upstreams: usize = keys
                .iter()
                .filter_map(|key| self.tracked.get(key))
                .map(|tracked| tracked.upstreams.len())
                .sum();
            let others = match keys.len() - 1 {
                0 => String::new(),
                others => format!(" and {others} more"),
            };
            let is = match (keys.len(), down) {
                (1, true) => format!("is down: {why}"),
                (1, false) => "is up again".into(),
                (_, true) => format!("are down: {why}"),
                (_, false) => "are up again".into(),
            };
            let plural = if upstreams == 1 { "" } else { "s" };
            let name = self.name(keys[0]);
            let text = format!("{name}{others} {is} ({upstreams} upstream{plural})");
            self.actions.push(Action::Tell { trouble: down, text });
        }
    }

    /// All entries, whether or not they are thought to be written: another program may have
    /// changed them.
    pub fn rewrite(&mut self) {
        self.rewrite = true;
        self.dirty.extend(0..self.upstreams.len());
    }

    /// The actions that have come together.
    pub fn actions(&mut self) -> Vec<Action> {
        self.tell_changes();
        let rewrite = std::mem::take(&mut self.rewrite);
        for index in std::mem::take(&mut self.dirty) {
            let Some(upstream) = self.upstreams.get(index) else { continue };
            if !self.paths.contains_key(&upstream.target) {
                continue;
            }
            let (id, entry) = (upstream.id, Entry(self.entry(upstream)));
            if rewrite || self.written.get(&id) != Some(&entry) {
                self.written.insert(id, entry);
                self.actions.push(Action::Write(id, entry));
            }
        }
        std::mem::take(&mut self.actions)
    }

    fn entry(&self, upstream: &Upstream) -> types::nexthop {
        let chosen = self.choose(upstream);
        let way = chosen.as_ref().map(|(way, _)| way);
        let mut entry = nexthops::entry(upstream.target.address.ip, way);
        match chosen.as_ref().and_then(|(_, tracked)| *tracked) {
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
        if entry.macs == types::macs::MACS_UNKNOWN {
            self.keep_last_macs(upstream.id, &mut entry);
        }
        entry
    }

    /// Returns the way that the program is told of, and the neighbour whose health is the upstream's:
    /// of several hops that packets may take, the one that fares best.
    fn choose(&self, upstream: &Upstream) -> Option<(Way, Option<&Tracked>)> {
        let paths = self.paths.get(&upstream.target)?.as_ref().ok()?;
        if paths.routes.iter().any(|path| path.local) {
            return None;
        }
        let tracked = |path: &Route| self.tracked.get(&path.neighbour());
        let is_alive = |path: &Route| {
            tracked(path).is_some_and(|tracked| tracked.health != Health::HEALTH_DOWN)
        };
        let alive: Vec<bool> = paths.routes.iter().map(is_alive).collect();
        let hops: Vec<Hop> =
            paths.routes.iter().filter_map(|path| self.hop(upstream, path)).collect();
        let chosen = nexthop::choose(paths, &upstream.target.senders, &hops, &alive).ok()?;
        let Chosen { path, leased } = chosen;
        if leased {
            let path = &paths.routes[path];
            return Some((Way::Hop(self.hop(upstream, path)?), tracked(path)));
        }
        let mut hops = hops;
        // of one whose interface is gone there is no hop
        let place = hops.iter().position(|hop| hop.is_by(&paths.routes[path]))?;
        hops.swap(0, place);
        let best =
            paths.routes.iter().filter_map(tracked).min_by_key(|tracked| rank(tracked.health));
        Some((Way::Several { hops, by: paths.by, routed: true }, best))
    }

    fn hop(&self, upstream: &Upstream, path: &Route) -> Option<Hop> {
        let link = self.links.get(&path.ifindex)?;
        let mac = self.valid_entry(path).and_then(|entry| entry.mac);
        Some(Hop::new(upstream.target.address.ip, path, link, mac))
    }

    fn valid_entry(&self, path: &Route) -> Option<Neighbour> {
        let entry = self.tracked.get(&path.neighbour())?.entry?;
        entry.state.is_valid().then_some(entry)
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

/// The better, the lower.
fn rank(health: Health) -> u8 {
    match health {
        Health::HEALTH_UP => 0,
        Health::HEALTH_STALE => 1,
        Health::HEALTH_UNKNOWN => 2,
        _ => 3,
    }
}

/// What can be expected of the neighbours on a link.
#[derive(Clone, Copy, PartialEq, Eq)]
enum LinkState {
    Down,
    /// It has no MAC addresses to ask for.
    Pointed,
    Asking,
}

impl LinkState {
    fn of(link: Option<&Link>) -> LinkState {
        match link {
            Some(link) if !link.up || !link.carrier => LinkState::Down,
            Some(link) if link.layer != Some(Layer::Ethernet) => LinkState::Pointed,
            Some(_) => LinkState::Asking,
            None => LinkState::Down,
        }
    }
}

/// What comes of a look at one neighbour.
#[derive(Default)]
struct Step {
    request: Option<NeighbourRequest>,
    /// The health before, where it is another now, and why.
    changed: Option<(Health, &'static str)>,
}

impl Step {
    /// Takes back a request for a new entry that there is no room for.
    fn fit(&mut self, key: NeighbourKey, tracked: &Tracked, room: &mut [usize; 2]) {
        if self.request != Some(NeighbourRequest::Keep) || tracked.entry.is_some() {
            return;
        }
        let room = &mut room[usize::from(key.1.is_ipv6())];
        match room.checked_sub(1) {
            Some(left) => *room = left,
            None => self.request = None,
        }
    }

    fn take(
        self,
        key: NeighbourKey,
        tracked: &Tracked,
        dirty: &mut BTreeSet<usize>,
        actions: &mut Vec<Action>,
        changes: &mut Vec<(NeighbourKey, bool, &'static str)>,
    ) {
        if let Some(request) = self.request {
            actions.push(Action::Ask(key, request));
        }
        let Some((before, why)) = self.changed else { return };
        dirty.extend(&tracked.upstreams);
        match (before, tracked.health) {
            (_, Health::HEALTH_DOWN) => changes.push((key, true, why)),
            (Health::HEALTH_DOWN, Health::HEALTH_UP) => changes.push((key, false, "")),
            // most of what is overdue comes yet
            _ => {}
        }
    }
}

impl Tracked {
    /// Makes up its mind, and says what is to be asked for.
    fn step(&mut self, link: LinkState, interval: Duration, now: Now) -> Step {
        let mut step = Step::default();
        let state = self.entry.map_or(NudState::None, |entry| entry.state);
        let (health, why) = match link {
            LinkState::Down => (Health::HEALTH_DOWN, "its interface is down"),
            LinkState::Pointed => (Health::HEALTH_UP, ""),
            LinkState::Asking => self.observe(state, now.instant),
        };
        if health != self.health {
            step.changed = Some((self.health, why));
            (self.health, self.since) = (health, now.seconds);
        }
        if link == LinkState::Asking {
            step.request = self.request(interval, now.instant);
        }
        step
    }

    fn request(&mut self, interval: Duration, now: Instant) -> Option<NeighbourRequest> {
        let request = match &self.entry {
            Some(entry) if is_others(entry) => return None,
            Some(entry) if entry.state.is_valid() && entry.protocol == OUR_PROTOCOL => {
                let first = || now.checked_sub(interval.mul_f32(self.turn)).unwrap_or(now);
                let probed = *self.probed.get_or_insert_with(first);
                let settling = self.recovering.is_some();
                let wait = if settling { SETTLED.min(interval) } else { interval };
                let idle = !matches!(entry.state, NudState::Probe | NudState::Delay);
                (idle && now.duration_since(probed) >= wait).then_some(NeighbourRequest::Probe)
            }
            _ => {
                let recently = self.kept.is_some_and(|kept| {
                    now.duration_since(kept) < PATIENCE
                        && self.failed.is_none_or(|failed| failed <= kept)
                });
                (!recently).then_some(NeighbourRequest::Keep)
            }
        }?;
        match request {
            NeighbourRequest::Probe => {
                self.probed = Some(now);
                if let Some(entry) = &mut self.entry {
                    entry.state = NudState::Probe;
                }
            }
            _ => self.kept = Some(now),
        }
        self.waiting.get_or_insert(now);
        Some(request)
    }

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

/// Returns how many entries a table has room for. A sixteenth is left to the host itself.
pub fn room(table: &NeighbourTable) -> usize {
    (table.threshold3 - table.threshold3 / 16).saturating_sub(table.entries) as usize
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::*;
    use crate::net::routing::{Choice, Senders};

    const OWN: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const THEIRS: [u8; 6] = [2, 0, 0, 0, 0, 2];
    const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
    const KEY: NeighbourKey = (7, IpAddr::V4(ADDRESS));

    /// A keeper of one upstream on the link, and a clock.
    struct World {
        keeper: Keeper,
        start: Instant,
        passed: Duration,
        layer: Layer,
        address: IpAddr,
    }

    impl World {
        fn new() -> World {
            World::of(ADDRESS.into(), Layer::Ethernet)
        }

        /// Of an upstream at an address, on a link of a kind.
        fn of(address: IpAddr, layer: Layer) -> World {
            let keeper = Keeper::new(Duration::from_secs(2));
            let (start, passed) = (Instant::now(), Duration::ZERO);
            let mut world = World { keeper, start, passed, layer, address };
            let upstream = Upstream { id: 1, target: target(address) };
            world.keeper.set_upstreams(vec![(upstream, types::nexthop::default())]);
            world.link(true);
            world.route(address);
            world
        }

        fn now(&self) -> Now {
            Now { instant: self.start + self.passed, seconds: 1000 + self.passed.as_secs() as u32 }
        }

        fn link(&mut self, carrier: bool) {
            let link = Link {
                index: 7,
                name: "eth0".into(),
                mac: Some(OWN),
                mtu: 1500,
                up: true,
                carrier,
                layer: Some(self.layer),
                forwards: [true; 2],
                ..Link::default()
            };
            self.keeper.set_links(vec![link]);
        }

        fn route(&mut self, gateway: impl Into<IpAddr>) {
            self.route_from(gateway, None);
        }

        fn route_from(&mut self, gateway: impl Into<IpAddr>, egress: Option<IpAddr>) {
            let gateway = gateway.into();
            let path = Route { ifindex: 7, gateway, mtu: None, egress, local: false };
            let paths = Paths { routes: vec![path], by: Choice::Only, routed: true };
            self.keeper.set_paths(vec![(target(self.address), Ok(paths))], self.now());
        }

        fn neighbour(&mut self, state: NudState) {
            let mac = state.is_valid().then_some(THEIRS);
            self.keeper.set_neighbour(entry((7, self.address), state, mac), self.now());
        }

        /// Lets time pass and returns what is to be done then.
        fn after(&mut self, milliseconds: u64) -> Vec<Action> {
            self.passed += Duration::from_millis(milliseconds);
            self.keeper.tick(self.now());
            self.keeper.actions()
        }

        fn entry(&self) -> types::nexthop {
            self.keeper.written[&1].0
        }

        fn health(&self) -> Health {
            self.entry().health
        }
    }

    /// An upstream that gets packets of anybody.
    fn target(address: IpAddr) -> Target {
        Target { address: address.into(), senders: Senders::Among(Vec::new()) }
    }

    fn entry(key: NeighbourKey, state: NudState, mac: Option<[u8; 6]>) -> Neighbour {
        Neighbour {
            ifindex: key.0,
            address: key.1,
            mac,
            state,
            confirmed: None,
            updated: None,
            managed: true,
            protocol: OUR_PROTOCOL,
            learned: false,
        }
    }

    fn asked(actions: &[Action]) -> Vec<NeighbourRequest> {
        let request = |action: &Action| match action {
            Action::Ask(_, request) => Some(*request),
            _ => None,
        };
        actions.iter().filter_map(request).collect()
    }

    fn told(actions: &[Action]) -> Vec<String> {
        let text = |action: &Action| match action {
            Action::Tell { text, .. } => Some(text.clone()),
            _ => None,
        };
        actions.iter().filter_map(text).collect()
    }

    #[test]
    fn a_neighbour_is_kept_then_probed() {
        let mut world = World::new();
        assert_eq!(asked(&world.after(0)), [NeighbourRequest::Keep]);
        assert!(asked(&world.after(250)).is_empty());
        world.neighbour(NudState::Reachable);
        let actions = world.after(0);
        assert!(matches!(&actions[..], [Action::Write(1, entry)] if entry.0.destination == THEIRS));
        assert_eq!(world.health(), Health::HEALTH_UP);
        assert!(asked(&world.after(1750)).is_empty());
        assert_eq!(asked(&world.after(250)), [NeighbourRequest::Probe]);
        // until it has answered there is nothing to add
        assert!(asked(&world.after(2000)).is_empty());
    }

    #[test]
    fn one_of_ipv6_likewise() {
        let address: IpAddr = "2001:db8::2".parse().unwrap();
        let mut world = World::of(address, Layer::Ethernet);
        let asked_for = |actions: Vec<Action>| match actions[..] {
            [Action::Ask(key, request), ..] => (key, request),
            _ => panic!("{actions:?}"),
        };
        assert_eq!(asked_for(world.after(0)), ((7, address), NeighbourRequest::Keep));
        world.neighbour(NudState::Reachable);
        world.after(0);
        let entry = world.entry();
        assert_eq!((entry.health, entry.macs), (Health::HEALTH_UP, types::macs::MACS_FRESH));
        assert_eq!(nexthops::gateway(&entry), address);
        assert_eq!(entry.address.map(u32::from_be), [0x2001_0db8, 0, 0, 2]);
        assert_eq!(asked_for(world.after(2000)), ((7, address), NeighbourRequest::Probe));
    }

    #[test]
    fn where_there_are_no_mac_addresses_nobody_asks() {
        let mut world = World::of(ADDRESS.into(), Layer::Ip);
        for _ in 0..3 {
            assert!(asked(&world.after(2000)).is_empty());
        }
        assert!(world.keeper.is_settled());
        let entry = world.entry();
        assert_eq!((entry.health, entry.macs), (Health::HEALTH_UP, types::macs::MACS_NONE));
        assert_eq!((entry.ifindex, nexthops::gateway(&entry)), (7, ADDRESS.into()));
        world.link(false);
        assert_eq!(told(&world.after(0)).len(), 1);
        assert_eq!(world.health(), Health::HEALTH_DOWN);
        world.link(true);
        world.after(0);
        assert_eq!(world.health(), Health::HEALTH_UP);
    }

    #[test]
    fn the_own_address_on_the_way_is_followed() {
        let mut world = World::new();
        world.after(0);
        for own in [Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 7)] {
            world.route_from(ADDRESS, Some(own.into()));
            world.after(0);
            assert_eq!(world.entry().egress, [u32::from_ne_bytes(own.octets()), 0, 0, 0]);
        }
    }

    #[test]
    fn down_takes_a_second_chance_and_up_two_answers() {
        let mut world = World::new();
        world.neighbour(NudState::Reachable);
        world.after(0);
        assert_eq!(asked(&world.after(2000)), [NeighbourRequest::Probe]);
        world.after(1500);
        assert_eq!(world.health(), Health::HEALTH_STALE);
        world.after(1500);
        world.neighbour(NudState::Failed);
        // asked for by everybody's address
        assert_eq!(asked(&world.after(0)), [NeighbourRequest::Keep]);
        assert_eq!(world.health(), Health::HEALTH_STALE);
        let actions = world.after(250);
        assert_eq!(told(&actions), ["10.0.0.2 dev eth0 is down: no answer (1 upstream)"]);
        let entry = world.entry();
        assert_eq!((entry.health, entry.since), (Health::HEALTH_DOWN, 1005));
        // the last address is kept for copies
        assert_eq!((entry.macs, entry.destination), (types::macs::MACS_KNOWN, THEIRS));

        world.neighbour(NudState::Reachable);
        assert_eq!(asked(&world.after(0)), [NeighbourRequest::Probe]);
        world.neighbour(NudState::Reachable);
        assert_eq!(asked(&world.after(1000)), [NeighbourRequest::Probe]);
        assert_eq!(world.health(), Health::HEALTH_DOWN);
        world.neighbour(NudState::Reachable);
        assert_eq!(told(&world.after(0)), ["10.0.0.2 dev eth0 is up again (1 upstream)"]);
    }

    #[test]
    fn an_entry_that_vanishes_is_asked_for_at_once() {
        let mut world = World::new();
        world.after(0);
        world.neighbour(NudState::Reachable);
        world.after(0);
        world.keeper.remove_neighbour(KEY, world.now());
        assert_eq!(asked(&world.keeper.actions()), [NeighbourRequest::Keep]);
        world.keeper.set_neighbours(vec![entry(KEY, NudState::Stale, Some(THEIRS))], world.now());
        world.keeper.set_neighbours(Vec::new(), world.now());
        assert_eq!(asked(&world.keeper.actions()), [NeighbourRequest::Keep]);
    }

    #[test]
    fn without_carrier_it_is_down_and_nobody_asks() {
        let mut world = World::new();
        world.neighbour(NudState::Reachable);
        world.after(0);
        world.link(false);
        world.keeper.remove_neighbour(KEY, world.now());
        let actions = world.after(0);
        assert!(asked(&actions).is_empty(), "{actions:?}");
        assert_eq!(
            told(&actions),
            ["10.0.0.2 dev eth0 is down: its interface is down (1 upstream)"]
        );
    }

    const GATEWAYS: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 0, 0, 8), Ipv4Addr::new(10, 0, 0, 9)];

    impl World {
        /// Both gateways answer, and something chooses between them for each packet.
        fn two_paths(&mut self, by: Choice, routed: bool, senders: Senders) {
            let address = ADDRESS.into();
            let target = Target { address, senders };
            let upstream = Upstream { id: 1, target: target.clone() };
            self.keeper.set_upstreams(vec![(upstream, types::nexthop::default())]);
            let routes = GATEWAYS.map(|gateway| Route {
                ifindex: 7,
                gateway: gateway.into(),
                mtu: None,
                egress: None,
                local: false,
            });
            let paths = Paths { routes: routes.to_vec(), by, routed };
            self.keeper.set_paths(vec![(target, Ok(paths))], self.now());
            for gateway in GATEWAYS {
                let entry = entry((7, gateway.into()), NudState::Reachable, Some(THEIRS));
                self.keeper.set_neighbour(entry, self.now());
            }
            self.after(0);
        }

        fn fail(&mut self, gateway: Ipv4Addr) {
            let failed = entry((7, gateway.into()), NudState::Failed, None);
            self.keeper.set_neighbour(failed, self.now());
            self.after(500);
        }

        /// Gateway, whether it stands for all packets, and health.
        fn told(&self) -> (IpAddr, bool, Health) {
            let entry = self.entry();
            let leased = entry.macs == types::macs::MACS_FRESH;
            (nexthops::gateway(&entry), leased, entry.health)
        }
    }

    #[test]
    fn of_two_paths_the_kernel_chooses_while_both_are_alive() {
        let mut world = World::new();
        let [first, second] = GATEWAYS.map(IpAddr::from);
        world.two_paths(Choice::Flow, true, Senders::Among(Vec::new()));
        assert_eq!(world.told(), (first, false, Health::HEALTH_UP));
        world.fail(GATEWAYS[0]);
        assert_eq!(world.told(), (second, true, Health::HEALTH_UP));
    }

    #[test]
    fn of_two_paths_one_where_the_kernel_cannot_choose() {
        for (routed, senders) in [(false, Senders::Among(Vec::new())), (true, Senders::Own)] {
            let mut world = World::new();
            world.two_paths(Choice::Flow, routed, senders);
            assert_eq!(world.told(), (GATEWAYS[0].into(), true, Health::HEALTH_UP));
            world.fail(GATEWAYS[0]);
            assert_eq!(world.told(), (GATEWAYS[1].into(), true, Health::HEALTH_UP));
        }
    }

    #[test]
    fn paths_by_sender_are_up_while_one_is() {
        let mut world = World::new();
        world.two_paths(Choice::Sender, true, Senders::Among(Vec::new()));
        world.fail(GATEWAYS[0]);
        assert_eq!(world.told(), (GATEWAYS[0].into(), false, Health::HEALTH_UP));
        world.fail(GATEWAYS[1]);
        assert_eq!(world.health(), Health::HEALTH_DOWN);
    }

    /// What is sent to another VRF's network is worse than what is lost.
    #[test]
    fn paths_by_interface_need_the_kernel() {
        let mut world = World::new();
        world.two_paths(Choice::Interface, true, Senders::Among(Vec::new()));
        assert_eq!(world.told(), (GATEWAYS[0].into(), false, Health::HEALTH_UP));
        for (routed, senders) in [(false, Senders::Among(Vec::new())), (true, Senders::Own)] {
            let mut world = World::new();
            world.two_paths(Choice::Interface, routed, senders);
            assert_eq!((world.entry().ifindex, world.health()), (0, Health::HEALTH_DOWN));
        }
    }

    #[test]
    fn new_entries_are_asked_for_while_there_is_room() {
        let mut world = World::new();
        world.keeper.set_room(false, 0);
        assert!(asked(&world.after(3000)).is_empty());
        // one that is there takes no room
        world.neighbour(NudState::Stale);
        assert!(asked(&world.after(3000)).contains(&NeighbourRequest::Probe));
        world.keeper.remove_neighbour(KEY, world.now());
        world.keeper.set_room(true, 1);
        assert!(asked(&world.after(3000)).is_empty());
        world.keeper.set_room(false, 1);
        assert_eq!(asked(&world.after(3000)), [NeighbourRequest::Keep]);
        assert!(asked(&world.after(3000)).is_empty());
    }

    #[test]
    fn a_sixteenth_of_the_table_is_the_hosts() {
        let table = |entries| NeighbourTable { entries, threshold3: 1024, ..Default::default() };
        assert_eq!([0, 900, 960, 2000].map(|entries| room(&table(entries))), [960, 60, 0, 0]);
    }

    #[test]
    fn others_entries_are_left_alone() {
        for change in [
            |entry: &mut Neighbour| entry.state = NudState::Permanent,
            |entry: &mut Neighbour| entry.learned = true,
            |entry: &mut Neighbour| entry.protocol = 42,
        ] {
            let mut world = World::new();
            let mut entry = entry(KEY, NudState::Reachable, Some(THEIRS));
            change(&mut entry);
            world.keeper.set_neighbour(entry, world.now());
            let actions = world.after(60_000);
            assert!(asked(&actions).is_empty(), "{entry:?}: {actions:?}");
            assert_eq!(world.health(), Health::HEALTH_UP);
        }
    }

    #[test]
    fn what_is_not_wanted_is_let_go_once_and_only_if_ours() {
        let mut world = World::new();
        let old = entry((7, Ipv4Addr::new(10, 0, 0, 3).into()), NudState::Reachable, None);
        let others = Neighbour { protocol: 0, ..old };
        world.keeper.set_neighbours(vec![others], world.now());
        assert!(!asked(&world.after(0)).contains(&NeighbourRequest::Release));
        let mut world = World::new();
        world.keeper.set_neighbours(vec![old], world.now());
        assert!(asked(&world.after(0)).contains(&NeighbourRequest::Release));
        // it is somebody else's by now
        world.keeper.set_neighbours(vec![old], world.now());
        assert!(!asked(&world.after(0)).contains(&NeighbourRequest::Release));
    }

    #[test]
    fn a_route_that_moves_is_told_in_one_line() {
        let mut world = World::new();
        world.route(Ipv4Addr::new(10, 0, 0, 9));
        let moved = "10.0.0.2: via 10.0.0.9 dev eth0, was via 10.0.0.2 dev eth0";
        assert_eq!(told(&world.after(0)), [moved]);
    }
}
