//! What `arpd` reads and does.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::{self, File, TryLockError};
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use sd_notify::NotifyState;

use super::Options;
use super::dns::HostNames;
use super::groups::Groups;
use super::neighbours::{self, Effect, NeighbourTracker, Now, TrackedUpstream};
use crate::bpf::{OBJECT_SHA256, types};
use crate::datapath::description::{Generation, ProgramName};
use crate::datapath::environment::Environment;
use crate::datapath::lease::Heartbeat;
use crate::datapath::lock;
use crate::datapath::pins::{self, ReadGuard, Store};
use crate::datapath::spares::{self, Situation};
use crate::datapath::state_maps::{self, StateMaps};
use crate::datapath::tc::{self, Slot};
use crate::desired::dns::Answers;
use crate::desired::{Desired, partial};
use crate::error::{Failure, Result};
use crate::net::events::{Event, Events};
use crate::net::link::{Link, find_link};
use crate::net::neighbour::{self, Batches, NeighbourKey, NeighbourRequest, NeighbourTable};
use crate::net::{Netlink, nexthop, routing};
use crate::reconcile::observe::{Observed, observe};
use crate::reconcile::{addresses, confirm, execute, plan};
use crate::time;

/// Routes are not asked for more often than so many times as long as it takes: a routing daemon
/// that changes thousands of them costs a twentieth of a CPU at most.
const ROUTES_PAUSE: u32 = 20;
/// Until filters that were put back are looked at again.
const ATTACH_PAUSE: Duration = Duration::from_secs(1);
/// How long another udplb that writes is waited for; what was to be done is done later.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);

/// The generation that serves, and what goes with it.
struct Serving {
    generation: Generation,
    maps: StateMaps,
    heartbeat: Heartbeat,
    /// By name: where the filter was seen last.
    interfaces: BTreeMap<String, Seen>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Missing,
    /// On the interface with this index.
    Attached(u32),
    /// The interface is there, and `detach` has taken the filter off it.
    Detached(u32),
    /// It is there without the filter, and nobody said so: made again, or somebody removed the filter.
    Lost(u32),
}

/// The service's connections, and what it has read.
pub struct Service {
    pin_dir: PathBuf,
    options: Options,
    netlink: Netlink,
    batches: Batches,
    pub events: Events,
    /// One arpd for each pin directory.
    lock: File,
    tracker: NeighbourTracker,
    groups: Groups,
    pub names: HostNames,
    serving: Option<Serving>,
    /// The symlink `current` as it was when the generation was read.
    current: Option<u64>,
    stale: Stale,
    routes_not_before: Instant,
    round_due: Instant,
    beat_due: Instant,
    /// When an overdue rollback is tried again.
    rollback_due: Instant,
    /// Somebody who removes filters again and again is not answered more often.
    attach_not_before: Instant,
    notified: Instant,
    /// The time has come to see what is due.
    ticked: bool,
    unwritten: Vec<(u32, neighbours::NextHopEntry)>,
    /// The last of what went wrong, by what was tried, so that it is told once.
    troubles: BTreeMap<&'static str, String>,
    /// Reads and writes that failed and have to succeed before the lease is renewed again.
    blind: BTreeSet<&'static str>,
    status: String,
}

/// What has to be read again.
#[derive(Clone, Copy, Default)]
struct Stale {
    links: bool,
    routes: bool,
    neighbours: bool,
    generation: bool,
    interfaces: bool,
    /// Of this host.
    addresses: bool,
}

impl Serving {
    /// Writes next hops, and with them who stands in for upstreams that are down: before they go, and again
    /// when they are back.
    fn write(
        &self,
        guard: &ReadGuard,
        entries: &[(u32, neighbours::NextHopEntry)],
    ) -> anyhow::Result<()> {
        let nexthops = &self.maps.nexthops;
        let is_down = |entry: &types::nexthop| entry.health == types::health::HEALTH_DOWN;
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

    fn situation(&self) -> anyhow::Result<Situation> {
        Situation::leased(&self.maps, self.generation.ids().max().unwrap_or(0))
    }

    fn write_spares(
        &self,
        guard: &ReadGuard,
        situation: &Situation,
        changed: Option<&HashSet<u32>>,
    ) -> anyhow::Result<()> {
        let Generation { number, .. } = self.generation;
        spares::write(guard, number, self.generation.hosts(), &[situation], changed)
    }
}

impl Service {
    /// # Errors
    /// Another arpd serves these pins, or a privilege is missing.
    pub fn open(store: &Store, options: &Options) -> Result<Service> {
        let mut guard = pins::write(&store.pin_dir, store.lock_timeout)?;
        let lock = lock_state(&guard.state())?;
        guard.keep_mount();
        drop(guard);
        let now = Instant::now();
        Ok(Service {
            pin_dir: store.pin_dir.clone(),
            options: options.clone(),
            netlink: Netlink::open().context("netlink")?,
            batches: Batches::open().context("netlink")?,
            // before anything is read, so that nothing is missed
            events: Events::open().context("netlink")?,
            lock,
            tracker: NeighbourTracker::new(options.probe_interval),
            groups: Groups::default(),
            names: HostNames::new(options.resolve_interval),
            serving: None,
            current: None,
            stale: Stale::default(),
            routes_not_before: now,
            round_due: now,
            beat_due: now,
            rollback_due: now,
            attach_not_before: now,
            notified: now,
            ticked: true,
            unwritten: Vec::new(),
            troubles: BTreeMap::new(),
            blind: BTreeSet::new(),
            status: String::new(),
        })
    }

    /// Tells that something failed, when it is new.
    fn note(&mut self, what: &'static str, result: anyhow::Result<()>) {
        let text = match result {
            Ok(()) => {
                self.troubles.remove(what);
                return;
            }
            Err(error) => format!("{error:#}"),
        };
        if self.troubles.get(what) != Some(&text) {
            log::warn!("{what}: {text}");
            self.troubles.insert(what, text);
        }
    }

    /// As [`Service::note`], for what the lease vouches for: after a failure it is not renewed until
    /// the same succeeds. What was read before stands meanwhile, and the next attempt has new
    /// connections.
    fn vouch(&mut self, what: &'static str, result: anyhow::Result<()>) {
        match result {
            Ok(()) => _ = self.blind.remove(what),
            Err(_) => {
                self.blind.insert(what);
                if let Ok(netlink) = Netlink::open() {
                    self.netlink = netlink;
                }
            }
        }
        self.note(what, result);
    }

    /// Whether something failed and did not succeed since; it was told.
    pub fn is_in_trouble(&self) -> bool {
        !self.troubles.is_empty()
    }

    /// The service manager may go on.
    pub fn ready(&mut self) {
        let _ = sd_notify::notify(&[NotifyState::Ready]);
        if let Some(serving) = &self.serving {
            log::info!(
                "generation {}: {} next hops of {} upstreams",
                serving.generation.number,
                self.tracker.neighbours(),
                self.tracker.targets().len()
            );
        } else {
            log::info!("nothing is applied yet");
        }
        self.tell_status();
    }

    fn tell_status(&mut self) {
        let down = self.tracker.count(types::health::HEALTH_DOWN);
        let status = match &self.serving {
            None => "nothing is applied".to_string(),
            Some(_) if !self.blind.is_empty() => {
                let blind: Vec<&str> = self.blind.iter().copied().collect();
                format!("no lease until these succeed: {}", blind.join(", "))
            }
            Some(serving) => format!(
                "generation {}: {} next hops, {down} upstreams down",
                serving.generation.number,
                self.tracker.neighbours()
            ),
        };
        if status != self.status {
            let _ = sd_notify::notify(&[NotifyState::Status(&status)]);
            self.status = status;
        }
    }

    /// Takes what the kernel tells, and notes what has to be read again.
    pub async fn take_events(&mut self) {
        let taken = tokio::time::timeout(Duration::ZERO, self.events.take()).await;
        let events = match taken {
            Ok(Ok(events)) => events,
            Ok(Err(error)) => return self.vouch("events", Err(error.into())),
            // there are none
            Err(_) => return,
        };
        let now = now();
        for event in events {
            match event {
                Event::Neighbour(neighbour) => self.tracker.set_neighbour(neighbour, now),
                Event::NeighbourGone(key) => self.tracker.remove_neighbour(key, now),
                Event::Links => {
                    (self.stale.links, self.stale.routes) = (true, true);
                    (self.stale.interfaces, self.stale.addresses) = (true, true);
                }
                Event::Filters => self.stale.interfaces = true,
                Event::Routes => self.stale.routes = true,
                Event::Lost => {
                    self.stale = Stale { generation: self.stale.generation, ..Stale::all() };
                }
            }
        }
    }

    /// Listens anew where that failed; what was told meanwhile is lost.
    fn listen_again(&mut self) {
        let events = Events::open().map(|events| self.events = events);
        if events.is_ok() {
            self.stale = Stale { generation: self.stale.generation, ..Stale::all() };
        }
        self.vouch("events", events.map_err(Into::into));
    }

    /// Several times a second: renews the lease, looks for another generation, and at its time at
    /// everything.
    ///
    /// # Errors
    /// Another arpd has taken over.
    pub async fn tick(&mut self) -> Result<()> {
        let instant = Instant::now();
        self.ticked = true;
        if instant >= self.beat_due {
            self.beat_due = instant + (self.options.lease / 4).min(Duration::from_secs(1));
            let serving = self.serving.as_ref().filter(|_| self.blind.is_empty());
            let beat = serving.map_or(Ok(()), |serving| serving.heartbeat.beat());
            self.note("lease", beat);
        }
        if instant >= self.rollback_due {
            let result = self.settle_pending(instant).await;
            self.note("confirmation", result);
        }
        if current(&self.pin_dir) != self.current {
            self.stale.generation = true;
            self.relock()?;
        }
        if instant >= self.round_due {
            self.round_due = instant + self.options.interval;
            let generation = self.stale.generation;
            self.stale = Stale { generation, ..Stale::all() };
            self.tracker.rewrite();
        }
        if let Some(serving) = &self.serving {
            let timeout = self.options.resolve_timeout;
            self.names.ask(&serving.generation.description.desired, timeout);
        }
        let due = |most: Duration| self.notified.elapsed() >= most / 4;
        if self.blind.is_empty() && sd_notify::watchdog_enabled().is_some_and(due) {
            self.notified = instant;
            let _ = sd_notify::notify(&[NotifyState::Watchdog]);
        }
        Ok(())
    }

    /// Rolls back a change that was not confirmed in time.
    async fn settle_pending(&mut self, now: Instant) -> anyhow::Result<()> {
        let pending = self.serving.as_ref().map(|serving| serving.maps.pending()).transpose()?;
        if pending.flatten().is_none_or(|pending| !pending.remaining().is_zero()) {
            return Ok(());
        }
        self.rollback_due = now + confirm::RETRY_INTERVAL;
        let guard = match pins::write(&self.pin_dir, LOCK_PATIENCE) {
            Ok(guard) => guard,
            Err(Failure::Locked(_)) => return Ok(()),
            Err(failure) => bail!("{failure}"),
        };
        if let Some(done) = confirm::settle(&guard, &self.netlink).await? {
            log::warn!("{done}");
        }
        self.stale.generation = true;
        Ok(())
    }

    /// `detach --purge` removes what the lock is on.
    fn relock(&mut self) -> Result<()> {
        let directory = self.pin_dir.join(pins::STATE);
        let ours = self.lock.metadata().map(|meta| (meta.dev(), meta.ino())).ok();
        let there = fs::metadata(&directory).map(|meta| (meta.dev(), meta.ino())).ok();
        if there.is_some() && there != ours {
            self.lock = lock_state(&directory)?;
        }
        Ok(())
    }

    pub fn resolve_names_now(&mut self) {
        self.names.ask_now();
    }

    /// Reads everything anew.
    pub async fn look_at_everything(&mut self) {
        self.stale = Stale::all();
        self.tracker.rewrite();
        self.routes_not_before = Instant::now();
        self.work().await;
    }

    /// Whether every neighbour has answered or given up.
    pub fn unreachable(&self) -> Vec<String> {
        self.tracker.unreachable()
    }

    /// True if a configuration serves.
    pub fn serves(&self) -> bool {
        self.serving.is_some()
    }

    pub fn is_settled(&self) -> bool {
        self.tracker.is_settled()
    }

    /// Reads what is stale and does what is due.
    pub async fn work(&mut self) {
        let looked = self.stale.any();
        if self.blind.contains("events") {
            self.listen_again();
        }
        if self.stale.generation {
            let result = self.read_generation().await;
            match result {
                Ok(Some(unusable)) => {
                    self.vouch("generation", Ok(()));
                    self.note("generation", Err(unusable));
                }
                Ok(None) => self.vouch("generation", Ok(())),
                Err(error) => self.vouch("generation", Err(error)),
            }
        }
        if self.stale.links {
            let result = self.read_links().await;
            self.vouch("interfaces", result);
        }
        if looked {
            let result = self.follow_groups();
            self.note("joining multicast groups", result);
        }
        if self.stale.routes && Instant::now() >= self.routes_not_before {
            let result = self.read_routes().await;
            self.vouch("routes", result);
        }
        if self.stale.neighbours {
            let result = self.read_neighbours().await;
            self.vouch("neighbours", result);
        }
        if self.stale.interfaces && Instant::now() >= self.attach_not_before {
            let result = self.read_interfaces().await;
            self.stale.interfaces |= result.is_err();
            self.note("attaching again", result);
        }
        // those of an interface come one after the other: not at once
        if self.stale.addresses && self.ticked {
            let result = self.read_addresses().await;
            self.note("addresses", result);
        }
        if self.ticked || looked {
            self.ticked = false;
            self.tracker.tick(now());
            self.tell_status();
        }
        let actions = self.tracker.effects();
        if !actions.is_empty() {
            self.carry_out(actions).await;
        }
        if !self.unwritten.is_empty() {
            let result = self.write();
            self.vouch("next hops", result);
        }
    }

    /// Returns why the generation that is there cannot be looked after, where that is so.
    async fn read_generation(&mut self) -> anyhow::Result<Option<anyhow::Error>> {
        let guard = match pins::read(&self.pin_dir, LOCK_PATIENCE) {
            Ok(guard) => guard,
            // an apply is under way; there is time for it until the next tick
            Err(Failure::Locked(_)) => return Ok(None),
            Err(failure) => bail!("{failure}"),
        };
        let symlink = current(&self.pin_dir);
        let observed = observe(guard.as_ref(), &self.netlink).await?;
        let maps = guard.as_ref().map(state_maps::open).transpose()?.flatten();
        let found = observed.serving().and_then(|number| observed.generations.get(&number));
        let unusable = match found {
            Some(it) if it.description.namespace != observed.namespace => {
                Some(anyhow!("the pins belong to another network namespace"))
            }
            Some(it) if !it.intact => Some(anyhow!("pins are missing; apply the file again")),
            _ => None,
        };
        let found = found.filter(|_| unusable.is_none());
        self.serving = match (found, maps) {
            (Some(generation), Some(maps)) => Some(Serving {
                interfaces: seen(generation, &observed),
                generation: generation.clone(),
                heartbeat: Heartbeat::load(&maps.heartbeat, self.options.lease)?,
                maps,
            }),
            _ => None,
        };
        if let (Some(serving), Some(guard)) = (&self.serving, &guard) {
            serving.write_spares(guard, &serving.situation()?, None)?;
        }
        drop(guard);
        self.current = symlink;
        self.unwritten.clear();
        self.take_up()?;
        self.stale = Stale { generation: false, ..Stale::all() };
        self.routes_not_before = Instant::now();
        self.beat_due = Instant::now();
        Ok(unusable)
    }

    /// Hands the upstreams of the generation to the tracker. Where every filter was taken off
    /// there are none to look after.
    fn take_up(&mut self) -> anyhow::Result<()> {
        let mut upstreams = Vec::new();
        let mut ids = HashSet::new();
        if let Some(serving) = &self.serving
            && !serving.interfaces.values().all(|seen| matches!(seen, Seen::Detached(_)))
        {
            let description = &serving.generation.description;
            for (rule, given) in description.desired.rules.iter().zip(&description.ids) {
                for (upstream, id) in rule.destinations().zip(given.destinations()) {
                    if ids.insert(id) {
                        let known = serving.maps.nexthops.read(id)?;
                        let target = description.desired.target(rule, upstream);
                        upstreams.push((TrackedUpstream { id, target }, known));
                    }
                }
            }
        }
        self.tracker.set_upstreams(upstreams);
        Ok(())
    }

    /// Joins the groups of what serves, on the interfaces where it is attached.
    fn follow_groups(&mut self) -> anyhow::Result<()> {
        let serving = self.serving.as_ref();
        let desired = serving.map(|serving| &serving.generation.description.desired);
        let links = self.tracker.links();
        let is_here = |(_, seen): &(&String, &Seen)| !matches!(seen, Seen::Detached(_));
        let here =
            serving.into_iter().flat_map(|serving| serving.interfaces.iter().filter(is_here));
        let here = here.filter_map(|(name, _)| find_link(links.values(), name));
        self.groups.follow(desired, here)
    }

    async fn read_links(&mut self) -> anyhow::Result<()> {
        self.tracker.set_links(self.netlink.links().await?);
        self.stale.links = false;
        Ok(())
    }

    async fn read_routes(&mut self) -> anyhow::Result<()> {
        let started = Instant::now();
        let targets = self.tracker.targets();
        let interfaces = self
            .serving
            .as_ref()
            .map_or(&[][..], |serving| &serving.generation.description.desired.interfaces);
        let links = self.tracker.links();
        let paths = routing::paths(&self.netlink, &targets, interfaces, links).await?;
        self.tracker.set_paths(targets.into_iter().zip(paths).collect(), now());
        self.stale.routes = false;
        self.routes_not_before = started + started.elapsed() * ROUTES_PAUSE;
        // neighbours that nobody looked at so far may be known
        self.stale.neighbours = true;
        Ok(())
    }

    async fn read_neighbours(&mut self) -> anyhow::Result<()> {
        let table = self.netlink.neighbours().await?;
        // of each family
        let mut known = [0; 2];
        for entry in &table {
            let tracked = self.tracker.is_tracked((entry.ifindex, entry.address));
            known[usize::from(entry.address.is_ipv6())] += usize::from(tracked);
        }
        self.tracker.set_neighbours(table, now());
        for table in self.netlink.neighbour_tables().await? {
            let others = (table.entries as usize).saturating_sub(known[usize::from(table.ipv6)]);
            let advice =
                neighbour::overflow(self.tracker.neighbours_of(table.ipv6), others, &table);
            let what = table_of(table.ipv6);
            let room = neighbours::room(&table);
            self.tracker.set_room(table.ipv6, room);
            let advice = match room {
                0 => advice.map(|advice| format!("{advice}; until then no next hops are added")),
                _ => advice,
            };
            match advice {
                // the others come and go, which is not worth telling each time
                Some(_) if self.troubles.contains_key(what) => {}
                Some(advice) => self.note(what, Err(anyhow!(advice))),
                None => self.note(what, Ok(())),
            }
        }
        self.stale.neighbours = false;
        Ok(())
    }

    /// Puts the filter back onto interfaces that have lost it without a `detach`: they were made again,
    /// or somebody else has removed it or the qdisc under it.
    async fn read_interfaces(&mut self) -> anyhow::Result<()> {
        self.stale.interfaces = false;
        let Some(serving) = &mut self.serving else { return Ok(()) };
        let found = hooks(&self.netlink, serving).await?;
        let desired = &serving.generation.description.desired;
        let lacked = |name: &String| desired.incomplete.interfaces.contains(name);
        let appeared: Vec<String> = found
            .iter()
            .filter(|(name, seen)| lacked(name) && matches!(seen, Seen::Lost(_)))
            .map(|(name, _)| name.clone())
            .collect();
        if !appeared.is_empty() {
            let mut desired = desired.clone();
            desired.incomplete.interfaces.retain(|name| !appeared.contains(name));
            return self.attach_new(desired, &appeared).await;
        }
        let lost: Vec<String> = found
            .iter()
            .filter(|(name, seen)| !lacked(name) && matches!(seen, Seen::Lost(_)))
            .map(|(name, _)| name.clone())
            .collect();
        if lost.is_empty() {
            if serving.interfaces != found {
                serving.interfaces = found;
                self.take_up()?;
                self.stale.routes = true;
            }
            return Ok(());
        }
        // until it has worked, what was seen before stands
        self.stale.interfaces = true;
        self.attach_not_before = Instant::now() + ATTACH_PAUSE;
        self.attach_again(&lost).await
    }

    async fn attach_again(&mut self, lost: &[String]) -> anyhow::Result<()> {
        let guard = match pins::write(&self.pin_dir, LOCK_PATIENCE) {
            Ok(guard) => guard,
            Err(Failure::Locked(_)) => return Ok(()),
            Err(failure) => bail!("{failure}"),
        };
        let observed = observe(Some(&guard), &self.netlink).await?;
        self.stale.generation = true;
        let number = self.serving.as_ref().map(|serving| serving.generation.number);
        if observed.serving() != number {
            return Ok(());
        }
        // one that `detach` was faster with is left alone
        let lost: Vec<String> =
            lost.iter().filter(|name| !observed.is_detached(name)).cloned().collect();
        let plan = plan::attach_again(&observed, &lost).map_err(|refusal| anyhow!("{refusal}"))?;
        let ways = BTreeMap::new();
        let mut executor = execute::Executor::new(&guard, &self.netlink, &observed, &ways);
        executor.run(&plan.actions, &mut execute::log).await?;
        let before = self.serving.as_ref().map(|serving| &serving.interfaces);
        for name in plan.attached() {
            let index = observed.interfaces[name].index;
            let before = match before.and_then(|before| before.get(name)) {
                Some(Seen::Attached(old) | Seen::Detached(old) | Seen::Lost(old)) => Some(*old),
                Some(Seen::Missing) | None => None,
            };
            if before != Some(index) {
                log::info!("{name} was made again: attached");
                continue;
            }
            log::warn!("{name}: udplb's filter was gone, and no detach took it: attached again");
            execute::count_reattached(&guard, &observed, name)?;
        }
        self.stale.interfaces = false;
        Ok(())
    }

    /// Attaches to interfaces that were missing so far. A new generation does: only that says whose their
    /// qdiscs are, and has a program for such without an Ethernet header.
    async fn attach_new(
        &mut self,
        mut desired: Desired,
        appeared: &[String],
    ) -> anyhow::Result<()> {
        if let Some(renewed) = addresses::renewed(&self.netlink, &desired).await? {
            desired = renewed;
        }
        let Some(serving) = &self.serving else { return Ok(()) };
        let number = serving.generation.number;
        match self.renew(number, &desired).await? {
            Some(renewed) => {
                let names = appeared.join(", ");
                log::info!("attached to {names}: generation {number} -> {renewed}");
            }
            None => self.stale.interfaces = true,
        }
        Ok(())
    }

    /// Where `any` stands for other addresses, or a broadcast address of a key came or went: builds
    /// a generation with them, as `apply` would.
    async fn read_addresses(&mut self) -> anyhow::Result<()> {
        self.stale.addresses = false;
        let Some(serving) = &self.serving else { return Ok(()) };
        let desired = &serving.generation.description.desired;
        Environment::read(&self.netlink).await?.write(
            &serving.maps,
            [desired].into_iter(),
            true,
        )?;
        let lacked = &desired.incomplete.interfaces;
        // one that is made again has its addresses back soon
        let mut gone = serving.interfaces.iter().filter(|(name, _)| !lacked.contains(name));
        let is_gone = gone.any(|(_, seen)| *seen == Seen::Missing);
        if is_gone || !serving.interfaces.values().any(is_attached) {
            return Ok(());
        }
        let Some(desired) = addresses::renewed(&self.netlink, desired).await? else {
            return Ok(());
        };
        let number = serving.generation.number;
        match self.renew(number, &desired).await? {
            Some(renewed) => {
                let all: Vec<String> = desired.addresses.iter().map(IpAddr::to_string).collect();
                log::info!("any is now {}: generation {number} -> {renewed}", all.join(", "));
            }
            None => self.stale.addresses = true,
        }
        Ok(())
    }

    async fn carry_out(&mut self, actions: Vec<Effect>) {
        let mut requests = Vec::new();
        for action in actions {
            match action {
                Effect::Request(key, request) => requests.push((key, request)),
                Effect::Write(id, entry) => self.unwritten.push((id, entry)),
                Effect::Log { warning: true, text } => log::warn!("{text}"),
                Effect::Log { warning: false, text } => log::info!("{text}"),
            }
        }
        if !requests.is_empty() {
            self.ask(&requests).await;
        }
    }

    async fn ask(&mut self, requests: &[(NeighbourKey, NeighbourRequest)]) {
        let results = match self.batches.neighbours(requests) {
            Ok(results) => results,
            Err(error) => {
                // answers of this one must not be taken for those of the next
                if let Ok(batches) = Batches::open() {
                    self.batches = batches;
                }
                // nothing was asked that the tracker thinks was
                self.stale.neighbours = true;
                return self.note("asking neighbours", Err(error.into()));
            }
        };
        self.note("asking neighbours", Ok(()));
        let mut plainly = Vec::new();
        for ((key, request), result) in requests.iter().zip(results) {
            let Err(error) = result else { continue };
            match (request, error.raw_os_error()) {
                (NeighbourRequest::Keep, Some(libc::EINVAL | libc::EOPNOTSUPP)) => {
                    plainly.push(*key);
                }
                (NeighbourRequest::Keep, Some(libc::ENOBUFS)) => {
                    let ipv6 = key.1.is_ipv6();
                    self.tracker.set_room(ipv6, 0);
                    let sysctl = NeighbourTable { ipv6, ..Default::default() }.sysctl("gc_thresh3");
                    if !self.troubles.contains_key(table_of(ipv6)) {
                        let advice = format!("it is full: raise the sysctl {sysctl}");
                        self.note(table_of(ipv6), Err(anyhow!(advice)));
                    }
                }
                // it went away meanwhile; events tell
                _ => log::debug!("neighbour {}: {error}", key.1),
            }
        }
        self.netlink.solicit(&plainly).await;
    }

    /// Writes next hops, unless another udplb is at work: then later. The shared lock keeps an
    /// apply out, and what serves is still what was read.
    fn write(&mut self) -> anyhow::Result<()> {
        let guard = match pins::read(&self.pin_dir, Duration::ZERO) {
            Ok(guard) => guard,
            Err(Failure::Locked(_)) => return Ok(()),
            Err(failure) => bail!("{failure}"),
        };
        if guard.is_some() && current(&self.pin_dir) != self.current {
            self.stale.generation = true;
            return Ok(());
        }
        if let (Some(serving), Some(guard)) = (&self.serving, &guard) {
            serving.write(guard, &self.unwritten)?;
        }
        drop(guard);
        self.unwritten.clear();
        Ok(())
    }

    /// HostNames stand for other addresses: builds a generation with them, as `apply` would.
    pub async fn renamed(&mut self, answers: Answers) {
        let own = match addresses::own(&self.netlink).await {
            Ok(own) => own,
            Err(error) => return self.note("names", Err(error)),
        };
        let Some(serving) = &self.serving else { return };
        if !serving.interfaces.values().any(is_attached) {
            return;
        }
        let before = &serving.generation.description.desired;
        let (desired, unresolved) = partial::renew(before, &answers, &own, &mut self.names.shrunk);
        self.names.tell(&unresolved);
        if desired.serves(before) {
            self.troubles.remove("names");
            return;
        }
        let number = serving.generation.number;
        let text = partial::moved(before, &desired);
        let result = self.renew(number, &desired).await;
        if let Ok(Some(renewed)) = &result {
            log::info!("{text}: generation {number} -> {renewed}");
        }
        self.note("names", result.map(drop));
    }

    async fn renew(&mut self, number: u32, desired: &Desired) -> anyhow::Result<Option<u32>> {
        let (targets, interfaces) = (desired.targets(), &desired.interfaces);
        let ways = nexthop::resolve(&self.netlink, &targets, interfaces).await?;
        if let Some((target, _)) = ways.iter().find(|(_, way)| **way == nexthop::Way::Local) {
            let address = &target.address;
            bail!("{address} is an address of this host, which is no upstream");
        }
        let guard = match pins::write(&self.pin_dir, LOCK_PATIENCE) {
            Ok(guard) => guard,
            Err(Failure::Locked(_)) => return Ok(None),
            Err(failure) => bail!("{failure}"),
        };
        let observed = observe(Some(&guard), &self.netlink).await?;
        let Some(serving) = observed.serving().and_then(|other| observed.generations.get(&other))
        else {
            bail!("nothing is applied any more");
        };
        self.stale.generation = true;
        if serving.number != number {
            // somebody was faster, and has asked for the names too
            return Ok(None);
        }
        if serving.description.object != OBJECT_SHA256 {
            bail!("generation {number} was built by another udplb: restart arpd");
        }
        let plan = plan::renew(&observed, desired, &serving.description.origin)
            .map_err(|refusal| anyhow!("{refusal}"))?;
        let outcome = execute::reconcile(&guard, &self.netlink, &observed, &plan, &ways).await?;
        Ok(Some(outcome.generation))
    }

    /// Leaves the neighbours to the kernel as ordinary entries. The lease runs out by itself: an
    /// arpd that is restarted changes nothing.
    pub fn end(&mut self) {
        let _ = sd_notify::notify(&[NotifyState::Stopping]);
        let requests: Vec<(NeighbourKey, NeighbourRequest)> = self
            .tracker
            .release_all()
            .into_iter()
            .filter_map(|action| match action {
                Effect::Request(key, request) => Some((key, request)),
                _ => None,
            })
            .collect();
        if let Err(error) = self.batches.neighbours(&requests) {
            log::warn!("letting go of the neighbours: {error}");
        }
    }
}

impl Stale {
    fn any(self) -> bool {
        self.links || self.routes || self.neighbours || self.generation || self.interfaces
    }

    fn all() -> Stale {
        Stale {
            links: true,
            routes: true,
            neighbours: true,
            generation: true,
            interfaces: true,
            addresses: true,
        }
    }
}

fn now() -> Now {
    Now { instant: Instant::now(), seconds: time::now() as u32 }
}

/// Which symlink `current` is: every apply and rollback makes another, though it may point at
/// the same number.
fn current(pin_dir: &Path) -> Option<u64> {
    fs::symlink_metadata(pin_dir.join("current")).map(|symlink| symlink.ino()).ok()
}

fn lock_state(directory: &Path) -> Result<File> {
    let file = File::open(directory).with_context(|| directory.display().to_string())?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Failure::Locked(format!(
            "another arpd looks after {}: {}",
            directory.display(),
            lock::holders(directory)
        ))),
        Err(TryLockError::Error(error)) => {
            Err(anyhow!(error).context(directory.display().to_string()).into())
        }
    }
}

/// What troubles with a neighbour table are told under.
fn table_of(ipv6: bool) -> &'static str {
    if ipv6 { "IPv6 neighbour table" } else { "neighbour table" }
}

/// Where the generation's filter is, of the interfaces that it is meant for.
fn seen(generation: &Generation, observed: &Observed) -> BTreeMap<String, Seen> {
    let interfaces = generation.description.desired.interfaces.iter();
    interfaces
        .map(|name| {
            let seen = match observed.interfaces.get(name) {
                None => Seen::Missing,
                Some(interface) => match interface.hook.slot {
                    Slot::Empty if observed.is_detached(name) => Seen::Detached(interface.index),
                    Slot::Empty => Seen::Lost(interface.index),
                    _ => Seen::Attached(interface.index),
                },
            };
            (name.clone(), seen)
        })
        .collect()
}

/// The same, asked of the kernel for these interfaces alone.
async fn hooks(netlink: &Netlink, serving: &Serving) -> anyhow::Result<BTreeMap<String, Seen>> {
    let generation = &serving.generation;
    let names = generation.description.programs();
    let programs: Vec<(u32, ProgramName)> =
        names.map(|(_, name)| (generation.number, name.clone())).collect();
    let links: Vec<Link> = netlink.links().await?;
    let qdiscs: BTreeMap<u32, _> = netlink.qdiscs().await?.into_iter().collect();
    let mut found = BTreeMap::new();
    for name in &generation.description.desired.interfaces {
        let seen = match find_link(links.iter(), name) {
            None => Seen::Missing,
            Some(link) => {
                let qdisc = qdiscs.get(&link.index).copied();
                let mark = serving.maps.marks.get(name)?.filter(|mark| mark.is_of(link.index));
                match tc::hook(netlink, link.index, qdisc, &programs).await?.slot {
                    Slot::Empty if mark.is_some_and(|mark| mark.detached) => {
                        Seen::Detached(link.index)
                    }
                    Slot::Empty => Seen::Lost(link.index),
                    _ => Seen::Attached(link.index),
                }
            }
        };
        found.insert(name.clone(), seen);
    }
    Ok(found)
}

fn is_attached(seen: &Seen) -> bool {
    matches!(seen, Seen::Attached(_))
}
