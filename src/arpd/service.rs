//! I/O of `arpd`: reads what has changed, renews the lease, and carries out the effects of the
//! neighbour tracker.

mod announcing;
mod probing;
mod renewal;
mod serving;
mod tables;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::{self, File, TryLockError};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use sd_notify::NotifyState;
use serving::{Filter, Serving, tcx_programs};

use super::Options;
use super::announcer::Announcer;
use super::dns::HostNames;
use super::groups::Groups;
use super::neighbours::{Effect, NeighbourTracker, NextHopEntry, Now, TrackedUpstream};
use super::prober::Prober;
use super::probes::ProbeTracker;
use super::quotes::Quotes;
use crate::bpf::types;
use crate::datapath::pins::{self, Store, WriteGuard};
use crate::datapath::{generation, lock, state_maps};
use crate::error::{Failure, Result};
use crate::heap;
use crate::net::Netlink;
use crate::net::events::{Event, Events};
use crate::net::link::find_link;
use crate::net::neighbour::{Batches, NeighbourKey, NeighbourRequest};
use crate::reconcile::confirm;
use crate::reconcile::observe::observe;
use crate::time;

/// Pause after routes were read, as a multiple of the time that it took: a routing daemon that
/// changes thousands of routes costs at most a twentieth of a CPU.
const ROUTES_PAUSE: u32 = 20;
/// Time between probes with `--once`. Before 5.16 the kernel waits five seconds before it probes a stale
/// neighbour by itself.
const ONCE_PROBE_INTERVAL: Duration = Duration::from_secs(1);
/// Wait for another udplb that holds the lock. After that the work is postponed.
const LOCK_TIMEOUT: Duration = Duration::from_millis(500);

/// Connections of the service, and the state that it has read.
pub struct Service {
    pin_dir: PathBuf,
    options: Options,
    netlink: Netlink,
    batches: Batches,
    pub events: Events,
    /// Exclusive lock: one arpd for each pin directory.
    lock: File,
    tracker: NeighbourTracker,
    pub probes: ProbeTracker,
    pub prober: Prober,
    pub quotes: Quotes,
    groups: Groups,
    announcer: Announcer,
    /// Next look at the announced addresses.
    announce_due: Instant,
    /// Generation whose announced addresses have the lifetime of its configuration.
    renewed_in: Option<u32>,
    pub names: HostNames,
    serving: Option<Serving>,
    /// Inode of the symlink `current` when the generation was read.
    current: Option<u64>,
    stale: Stale,
    routes_not_before: Instant,
    round_due: Instant,
    beat_due: Instant,
    /// Next attempt of an overdue rollback.
    rollback_due: Instant,
    /// Limits attaching against a program that removes filters again and again.
    attach_not_before: Instant,
    notified: Instant,
    /// A tick has passed since the last work.
    ticked: bool,
    unwritten: Vec<(u32, NextHopEntry)>,
    /// The last error of each attempt, so that it is logged once.
    errors: BTreeMap<&'static str, String>,
    /// Reads and writes that must succeed before the lease is renewed again.
    failed_vitals: BTreeSet<&'static str>,
    status: String,
}

/// State that must be read again.
#[derive(Clone, Copy, Default)]
struct Stale {
    links: bool,
    routes: bool,
    neighbours: bool,
    generation: bool,
    interfaces: bool,
    /// Addresses of this host.
    addresses: bool,
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
            tracker: NeighbourTracker::new(match options.once {
                true => options.probe_interval.min(ONCE_PROBE_INTERVAL),
                false => options.probe_interval,
            }),
            probes: ProbeTracker::new(now),
            prober: Prober::default(),
            quotes: Quotes::default(),
            groups: Groups::default(),
            announcer: Announcer::default(),
            announce_due: now,
            renewed_in: None,
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
            errors: BTreeMap::new(),
            failed_vitals: BTreeSet::new(),
            status: String::new(),
        })
    }

    /// Logs a failure once, until the same attempt succeeds or fails differently.
    fn report(&mut self, what: &'static str, result: anyhow::Result<()>) {
        let text = match result {
            Ok(()) => {
                self.errors.remove(what);
                return;
            }
            Err(error) => format!("{error:#}"),
        };
        if self.errors.get(what) != Some(&text) {
            log::warn!("{what}: {text}");
            self.errors.insert(what, text);
        }
    }

    /// Like [`Service::report`], for reads and writes that the lease depends on: it is not renewed until
    /// they succeed. The next attempt has a new connection; until then the last values stay in use.
    fn report_vital(&mut self, what: &'static str, result: anyhow::Result<()>) {
        match result {
            Ok(()) => _ = self.failed_vitals.remove(what),
            Err(_) => {
                self.failed_vitals.insert(what);
                if let Ok(netlink) = Netlink::open() {
                    self.netlink = netlink;
                }
            }
        }
        self.report(what, result);
    }

    /// Returns true if an attempt has failed and has not succeeded since, or a name has no address.
    pub fn has_errors(&self) -> bool {
        !self.errors.is_empty() || self.names.has_failures()
    }

    /// Notifies the service manager that arpd is ready.
    pub fn ready(&mut self) {
        let _ = sd_notify::notify(&[NotifyState::Ready]);
        if let Some(serving) = &self.serving {
            log::info!(
                "generation {}: {} next hops of {} upstreams",
                serving.number,
                self.tracker.neighbours(),
                self.tracker.targets().len()
            );
        } else {
            log::info!("nothing is applied yet");
        }
        self.send_status();
    }

    fn send_status(&mut self) {
        let down = [types::health::HEALTH_DOWN, types::health::HEALTH_FAILED];
        let down: usize = down.map(|health| self.tracker.count(health)).iter().sum();
        let status = match &self.serving {
            None => "nothing is applied".to_string(),
            Some(_) if !self.failed_vitals.is_empty() => {
                let failed: Vec<&str> = self.failed_vitals.iter().copied().collect();
                format!("no lease until these succeed: {}", failed.join(", "))
            }
            Some(serving) => format!(
                "generation {}: {} next hops, {down} upstreams down",
                serving.number,
                self.tracker.neighbours()
            ),
        };
        if status != self.status {
            let _ = sd_notify::notify(&[NotifyState::Status(&status)]);
            self.status = status;
        }
    }

    /// Takes the kernel's events, and marks what must be read again.
    pub async fn take_events(&mut self) {
        let taken = tokio::time::timeout(Duration::ZERO, self.events.take()).await;
        let events = match taken {
            Ok(Ok(events)) => events,
            Ok(Err(error)) => return self.report_vital("events", Err(error.into())),
            // no events
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

    /// Subscribes to events again after a failure, and marks everything stale: events were lost.
    fn listen_again(&mut self) {
        let events = Events::open().map(|events| self.events = events);
        if events.is_ok() {
            self.stale = Stale { generation: self.stale.generation, ..Stale::all() };
        }
        self.report_vital("events", events.map_err(Into::into));
    }

    /// Renews the lease, looks for another generation, and marks everything stale when the interval has
    /// passed; called several times a second.
    ///
    /// # Errors
    /// Another arpd has taken over.
    pub async fn tick(&mut self) -> Result<()> {
        let instant = Instant::now();
        self.ticked = true;
        if instant >= self.beat_due {
            self.beat_due = instant + (self.options.lease / 4).min(Duration::from_secs(1));
            self.look_at_tcx();
            let serving = self.serving.as_ref().filter(|_| self.failed_vitals.is_empty());
            let beat = serving.map_or(Ok(()), |serving| serving.heartbeat.beat());
            self.report("lease", beat);
        }
        if instant >= self.rollback_due {
            let result = self.settle_pending(instant).await;
            self.report("confirmation", result);
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
        self.ask_names();
        let due = |timeout: Duration| self.notified.elapsed() >= timeout / 4;
        if self.failed_vitals.is_empty() && sd_notify::watchdog_enabled().is_some_and(due) {
            self.notified = instant;
            let _ = sd_notify::notify(&[NotifyState::Watchdog]);
        }
        Ok(())
    }

    /// Marks the interfaces stale if the tcx programs of one have changed: of these there are no events.
    fn look_at_tcx(&mut self) {
        let Some(serving) = &mut self.serving else { return };
        let programs = tcx_programs(&serving.interfaces);
        if programs != serving.tcx {
            serving.tcx = programs;
            self.stale.interfaces = true;
        }
    }

    /// Rolls back a change that was not confirmed in time.
    async fn settle_pending(&mut self, now: Instant) -> anyhow::Result<()> {
        let pending = self.serving.as_ref().map(|serving| serving.maps.pending()).transpose()?;
        if pending.flatten().is_none_or(|pending| !pending.remaining().is_zero()) {
            return Ok(());
        }
        self.rollback_due = now + confirm::RETRY_INTERVAL;
        let Some(guard) = self.lock_for_writing()? else { return Ok(()) };
        if let Some(done) = confirm::settle(&guard, &self.netlink).await? {
            log::warn!("{done}");
        }
        self.stale.generation = true;
        Ok(())
    }

    /// Returns `None` if another udplb holds the lock.
    fn lock_for_writing(&self) -> anyhow::Result<Option<WriteGuard>> {
        unless_locked(pins::write(&self.pin_dir, LOCK_TIMEOUT))
    }

    /// Takes the lock again if its directory was replaced: `detach --purge` removes it.
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

    /// Resolves the host names and waits for the answers, under the timeout of the options. A name that
    /// has lost most of its addresses is resolved twice.
    pub async fn resolve_names(&mut self) {
        for _ in 0..2 {
            self.names.ask_now();
            self.ask_names();
            if !self.names.is_asking() {
                return;
            }
            let answers = self.names.answer().await;
            self.take_answers(answers).await;
            self.work().await;
            if self.names.shrunk.is_empty() {
                return;
            }
        }
    }

    fn ask_names(&mut self) {
        if let Some(serving) = &self.serving {
            let timeout = self.options.resolve_timeout;
            let is_complete = serving.outline.incomplete.hosts.is_empty();
            self.names.ask(&serving.names, is_complete, timeout);
        }
    }

    /// Reads everything again.
    pub async fn read_everything(&mut self) {
        self.stale = Stale::all();
        self.tracker.rewrite();
        self.routes_not_before = Instant::now();
        self.work().await;
    }

    /// Returns the addresses of upstreams that cannot be reached.
    pub fn unreachable(&self) -> Vec<String> {
        self.tracker.unreachable()
    }

    /// Returns true if a configuration is active.
    pub fn is_active(&self) -> bool {
        self.serving.is_some()
    }

    /// Returns true if every neighbour has answered or failed.
    pub fn is_settled(&self) -> bool {
        self.tracker.is_settled()
    }

    /// Reads what is stale and does what is due.
    pub async fn work(&mut self) {
        let was_stale = self.stale.any();
        let reads_much = self.stale.generation || self.stale.routes;
        if self.failed_vitals.contains("events") {
            self.listen_again();
        }
        if self.stale.generation {
            let result = self.read_generation().await;
            match result {
                Ok(Some(unusable)) => {
                    self.report_vital("generation", Ok(()));
                    self.report("generation", Err(unusable));
                }
                Ok(None) => self.report_vital("generation", Ok(())),
                Err(error) => self.report_vital("generation", Err(error)),
            }
        }
        if self.stale.links {
            let result = self.read_links().await;
            self.report_vital("interfaces", result);
        }
        if was_stale {
            let result = self.follow_groups();
            self.report("joining multicast groups", result);
        }
        if self.stale.routes && Instant::now() >= self.routes_not_before {
            let result = self.read_routes().await;
            self.report_vital("routes", result);
        }
        if self.stale.neighbours {
            let result = self.read_neighbours().await;
            self.report_vital("neighbours", result);
        }
        if self.stale.interfaces && Instant::now() >= self.attach_not_before {
            let result = self.read_interfaces().await;
            self.stale.interfaces |= result.is_err();
            self.report("attaching again", result);
        }
        // addresses of an interface arrive one after the other: wait for the next tick
        if self.stale.addresses && self.ticked {
            let result = self.read_addresses().await;
            self.report("addresses", result);
        }
        if self.ticked || was_stale {
            self.ticked = false;
            self.tracker.tick(now());
            self.write_probes();
            self.send_status();
        }
        let effects = self.tracker.effects();
        if !effects.is_empty() {
            self.carry_out(effects).await;
        }
        if !self.unwritten.is_empty() {
            let result = self.write();
            self.report_vital("next hops", result);
            self.announce_due = Instant::now();
        }
        if was_stale || Instant::now() >= self.announce_due {
            let result = self.announce().await;
            self.report("announcing", result);
        }
        generation::forget_descriptions();
        if reads_much {
            heap::trim();
        }
    }

    /// Reads the active generation; returns the reason if it is unusable.
    async fn read_generation(&mut self) -> anyhow::Result<Option<anyhow::Error>> {
        // an apply may be under way: try again at the next tick
        let Some(guard) = unless_locked(pins::read(&self.pin_dir, LOCK_TIMEOUT))? else {
            return Ok(None);
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
        self.serving = match (found, maps, &guard) {
            (Some(generation), Some(maps), Some(guard)) => {
                Some(Serving::new(guard, generation, &observed, maps, self.options.lease)?)
            }
            _ => None,
        };
        if let (Some(serving), Some(guard)) = (&self.serving, &guard) {
            serving.write_spares(guard, &serving.situation()?, None)?;
        }
        drop(guard);
        self.current = symlink;
        self.unwritten.clear();
        self.track_upstreams()?;
        self.track_services()?;
        self.stale = Stale { generation: false, ..Stale::all() };
        self.routes_not_before = Instant::now();
        self.beat_due = Instant::now();
        Ok(unusable)
    }

    /// Hands the upstreams of the generation to the tracker; none if every filter is detached.
    fn track_upstreams(&mut self) -> anyhow::Result<()> {
        let mut upstreams = Vec::new();
        let mut ids = HashSet::new();
        if let Some(serving) = self.serving.as_ref().filter(|serving| serving.is_attached()) {
            let description = serving.description()?;
            for (rule, ids_of) in description.desired.rules.iter().zip(&description.ids) {
                for (upstream, id) in rule.destinations().zip(ids_of.destinations()) {
                    if !upstream.is_local() && ids.insert(id) {
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

    /// Joins the multicast groups of the active configuration on its attached interfaces.
    fn follow_groups(&mut self) -> anyhow::Result<()> {
        let serving = self.serving.as_ref();
        let groups = serving.map(|serving| &serving.groups);
        let links = self.tracker.links();
        let is_here = |(_, filter): &(&String, &Filter)| !matches!(filter, Filter::Detached(_));
        let here =
            serving.into_iter().flat_map(|serving| serving.interfaces.iter().filter(is_here));
        let here = here.filter_map(|(name, _)| find_link(links.values(), name));
        self.groups.follow(groups, here)
    }

    /// Releases the neighbours to the kernel as ordinary entries. The lease is left to expire, so that a
    /// restart changes nothing.
    pub fn release_neighbours(&mut self) {
        let _ = sd_notify::notify(&[NotifyState::Stopping]);
        let requests: Vec<(NeighbourKey, NeighbourRequest)> = self
            .tracker
            .release_all()
            .into_iter()
            .filter_map(|effect| match effect {
                Effect::Request(key, request) => Some((key, request)),
                _ => None,
            })
            .collect();
        if let Err(error) = self.batches.neighbours(&requests) {
            log::warn!("releasing neighbours: {error}");
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

/// Returns `None` instead of the error that another udplb holds the lock.
fn unless_locked<T>(guard: Result<T>) -> anyhow::Result<Option<T>> {
    match guard {
        Ok(guard) => Ok(Some(guard)),
        Err(Failure::Locked(_)) => Ok(None),
        Err(failure) => bail!("{failure}"),
    }
}

fn now() -> Now {
    Now { instant: Instant::now(), seconds: time::now() as u32 }
}

/// Returns the inode of the symlink `current`. Every apply and rollback makes a new symlink, even to
/// the same generation.
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
