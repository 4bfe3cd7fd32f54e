//! Reads the active configuration and its counters from the kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::Context;
use foldhash::HashMap;
use schemars::JsonSchema;
use serde::Serialize;

use crate::bpf::{self, DECAPSULATED, Runs, types};
use crate::config::{Address, Decap, Mode, State, Xdp};
use crate::datapath::counters::{Count, Counts};
use crate::datapath::description::{self, Generation};
use crate::datapath::pins::{self, ReadGuard, Store};
use crate::datapath::state_maps::{self, Pending, StateMaps};
use crate::datapath::{generation, lease, lines, nexthops, overrides, probes, xdp};
use crate::desired::partial::Unresolved;
use crate::desired::{Destination, Role, Rule, RuleIds, diff};
use crate::error::Result;
use crate::net::Netlink;
use crate::net::link::{Layer, Link, OwnAddress};
use crate::net::neighbour::{Neighbour, NeighbourKey, NudState};
use crate::net::routing;
use crate::reconcile::drain;
use crate::reconcile::observe::{Observed, observe};
use crate::telemetry::announcement::{AnnouncedAddress, Announcement};
use crate::telemetry::diagnosis::{self, Answer, Facts, Now, Routes, Silence, Source};
use crate::telemetry::flows::{self, FlowCounts};
use crate::telemetry::problem::Problem;
use crate::telemetry::senders::{self, SenderCounts};
use crate::telemetry::traffic::{Rate, Traffic};
use crate::time;

/// Output of `status`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Status {
    pub generation: Option<u32>,
    pub file: Option<String>,
    /// Time of the apply, in seconds since 1970.
    #[serde(rename = "applied", serialize_with = "time::rfc3339")]
    #[schemars(with = "Option<String>")]
    pub built: Option<u64>,
    pub version: Option<String>,
    /// Start of all counters, in seconds since 1970.
    #[serde(serialize_with = "time::rfc3339")]
    #[schemars(with = "Option<String>")]
    pub counted_since: Option<u64>,
    pub interfaces: Vec<InterfaceStatus>,
    /// Packets that XDP has sent since the generation was built; `None`: no interface has XDP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub xdp: Option<XdpStatus>,
    pub rules: Vec<RuleStatus>,
    /// Packets of no rule, by verdict.
    pub unmatched: Counts,
    /// Outer headers that are taken off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decap: Option<DecapStatus>,
    /// Parts of the file that the generation lacks.
    pub incomplete: Missing,
    /// The generation that a rollback left.
    pub held: Option<u32>,
    /// Change that waits for confirmation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pending: Option<PendingStatus>,
    /// True while arpd's lease holds; `None`: it never ran.
    pub arpd: Option<bool>,
    /// Addresses of `announce`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub announced: Vec<AnnouncedAddress>,
    /// Filled in by [`read`]. The exit code is 3 if one of them is more than a note.
    pub problems: Vec<Problem>,
    /// Counters, for rates between two readings.
    #[serde(skip)]
    pub traffic: Option<Traffic>,
    /// Maximum of ids of rules and upstreams.
    #[serde(skip)]
    pub max_ids: u32,
}

/// A change that is rolled back unless it is confirmed.
#[derive(Debug, Serialize, JsonSchema)]
pub struct PendingStatus {
    pub generation: u32,
    /// Generation that is restored; `None`: the filters are removed.
    pub previous: Option<u32>,
    /// Seconds until the rollback; 0: it is overdue.
    pub seconds_left: u64,
}

impl PendingStatus {
    pub fn new(pending: &Pending) -> PendingStatus {
        let Pending { generation, previous, .. } = *pending;
        // rounded up: 0 is a deadline that has passed
        let seconds_left = pending.remaining().as_millis().div_ceil(1000) as u64;
        PendingStatus { generation, previous, seconds_left }
    }
}

impl std::fmt::Display for PendingStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let PendingStatus { generation, previous, seconds_left } = self;
        write!(f, "generation {generation} waits for `udplb confirm`: in {seconds_left} s ")?;
        match previous {
            Some(previous) => write!(f, "generation {previous} serves again"),
            None => write!(f, "it is detached"),
        }
    }
}

/// Parts of the configuration that are not active.
#[derive(Debug, Default, Serialize, JsonSchema)]
pub struct Missing {
    pub interfaces: Vec<String>,
    /// Hosts without an address.
    pub hosts: Vec<Unresolved>,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct InterfaceStatus {
    #[serde(rename = "interface")]
    pub name: String,
    /// Generation of the attached filter.
    pub generation: Option<u32>,
    /// Number of times that arpd restored a removed filter.
    pub reattached: u64,
    /// Mode of the attached XDP program.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub xdp: Option<Xdp>,
}

#[derive(Clone, Copy, Debug, Serialize, JsonSchema)]
pub struct XdpStatus {
    pub packets: u64,
    /// Share of all packets that the generation has forwarded, 0 to 1.
    pub share: f64,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct RuleStatus {
    #[serde(rename = "rule")]
    pub name: String,
    pub key: String,
    pub tc_action: crate::config::Action,
    pub mode: Mode,
    pub upstreams: Vec<UpstreamStatus>,
    /// Receivers of additional copies.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub mirrors: Vec<UpstreamStatus>,
    /// Flows of the upstreams, with `reply: nat` or `sticky`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flows: Option<FlowCounts>,
    /// Senders, of a rule that counts them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub senders: Option<SenderCounts>,
    /// Each packet once, by verdict; also those of upstreams that it has lost.
    pub counters: Counts,
    /// The part of `counters` without an upstream.
    #[serde(skip)]
    pub own: Counts,
    /// Counters besides verdicts, unless 0.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub notes: BTreeMap<&'static str, Count>,
    /// Rate of all packets that matched.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate: Option<Rate>,
    /// Packets a second that were not forwarded, by reason.
    #[serde(rename = "not_forwarded_per_second", skip_serializing_if = "BTreeMap::is_empty")]
    pub losses: BTreeMap<&'static str, f64>,
    /// The part of `losses` without an upstream.
    #[serde(skip)]
    pub own_losses: BTreeMap<&'static str, f64>,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct UpstreamStatus {
    #[serde(skip)]
    pub id: u32,
    /// Unique in its rule.
    #[serde(rename = "upstream")]
    pub label: String,
    pub address: Address,
    pub port: Option<u16>,
    /// Override, or else the state in the file.
    pub state: State,
    /// Override by `drain` or `enable`.
    #[serde(rename = "override")]
    pub override_state: Option<State>,
    pub next_hop: Option<NextHopStatus>,
    /// Health by arpd while it runs: `up`, `stale` or `down`.
    pub health: Option<&'static str>,
    /// Start of that health, in seconds since 1970.
    #[serde(serialize_with = "time::rfc3339")]
    #[schemars(with = "Option<String>")]
    pub since: Option<u32>,
    /// Result of the last probes of the service: `DNS probe answered`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub evidence: Option<String>,
    /// Record of the probes of the service.
    #[serde(skip)]
    pub probe: Option<Box<types::probe>>,
    pub counters: Counts,
    /// Counters besides verdicts, unless 0.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(default)]
    pub notes: BTreeMap<&'static str, Count>,
    /// Answers of the upstream that came through this host; none where the rule's `reply` asks for none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub answers: Option<Counts>,
    /// Flows that go to it, with `reply: nat` or `sticky`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flows: Option<FlowCounts>,
    /// Rate of forwarded packets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate: Option<Rate>,
    /// Packets a second that were not forwarded, by reason.
    #[serde(rename = "not_forwarded_per_second", skip_serializing_if = "BTreeMap::is_empty")]
    pub losses: BTreeMap<&'static str, f64>,
    /// Share of the forwarded packets of the rule, 0 to 1; of those that matched, for a receiver of
    /// copies. Measured over the same time as `rate`. `None`: there were none.
    pub share: Option<f64>,
    /// Set if the next hop does not answer.
    #[serde(skip)]
    pub silence: Option<Silence>,
    #[serde(skip)]
    pub endpoint: String,
    /// State in words, see [`overrides::word`].
    #[serde(skip)]
    pub drained: Option<&'static str>,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct NextHopStatus {
    pub interface: String,
    pub gateway: IpAddr,
    /// Own address on that path.
    pub egress: Option<IpAddr>,
    pub mac: Option<String>,
    /// In the kernel's neighbour table, as `ip neigh` has it: `REACHABLE`.
    pub state: Option<String>,
    /// Seconds since it last answered the kernel.
    #[serde(rename = "age_seconds")]
    pub age: Option<u64>,
    /// Path MTU in bytes.
    pub mtu: Option<u16>,
    /// True if its MAC address is unknown.
    #[serde(skip)]
    pub unresolved: bool,
}

/// State of the network.
pub struct Network<'a> {
    pub observed: &'a Observed,
    pub neighbours: &'a [Neighbour],
}

/// One reading of the kernel, with the status derived from it.
pub struct Reading {
    /// Holds the active generation only.
    pub observed: Observed,
    pub status: Status,
    /// Run times of the active program.
    pub runs: Option<Runs>,
    /// See [`Routes`].
    pub routes: Routes,
}

impl Reading {
    /// Returns the next hops in state STALE.
    pub fn doubtful(&self) -> Vec<NeighbourKey> {
        let all = self.status.rules.iter().flat_map(RuleStatus::destinations);
        let hops = all.filter_map(|(upstream, _)| upstream.next_hop.as_ref());
        let stale = hops.filter(|hop| hop.state.as_deref() == Some("STALE"));
        let key = |hop: &NextHopStatus| {
            Some((self.observed.interfaces.get(&hop.interface)?.index, hop.gateway))
        };
        stale.filter_map(key).collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// Returns the problems of the active configuration. `source` is the file in their fixes.
    pub fn problems(&self, source: Source<'_>) -> Vec<Problem> {
        let serving = self.status.generation;
        diagnosis::problems(&Facts {
            observed: &self.observed,
            serving: serving.and_then(|number| self.observed.generations.get(&number)),
            rules: &self.status.rules,
            routes: &self.routes,
            source,
            now: Now { utc: time::now(), monotonic: lease::monotonic() },
        })
    }
}

/// Reads everything under the lock, and releases it; see [`Status::new`].
pub async fn read(
    store: &Store,
    netlink: &Netlink,
    rule: Option<&str>,
    earlier: Option<&Traffic>,
) -> Result<Reading> {
    let guard = pins::read(&store.pin_dir, store.lock_timeout)?;
    let mut observed = observe(guard.as_ref(), netlink).await?;
    let maps = guard.as_ref().map(state_maps::open).transpose()?.flatten();
    let traffic = guard.as_ref().zip(maps.as_ref());
    let traffic = traffic.map(|(guard, maps)| Traffic::read(guard, maps, &observed.generations));
    let traffic = traffic.transpose()?;
    // frees memory
    let serving = observed.serving();
    observed.generations.retain(|number, _| Some(*number) == serving);
    let neighbours = netlink.neighbours().await.context("neighbours")?;
    let network = Network { observed: &observed, neighbours: &neighbours };
    let mut status = Status::new(maps.as_ref().zip(traffic), &network, rule, earlier)?;
    status.counted_since = guard.as_ref().and_then(counted_since);
    let serving = serving.and_then(|number| observed.generations.get(&number));
    if let Some((guard, serving)) = guard.as_ref().zip(serving) {
        status.xdp = xdp_status(guard, serving)?;
        status.count_flows(guard, serving)?;
        status.count_senders(guard, serving)?;
        if serving.description.desired.announce.is_some() {
            let announcement = Announcement::read(guard, netlink, &observed, serving).await?;
            status.announced = announcement.addresses();
        }
    }
    let program = guard
        .as_ref()
        .zip(serving)
        .map(|(guard, it)| generation::program(guard, it, Layer::Ethernet));
    let runs =
        program.and_then(|program| Some(bpf::program_info(program.ok()?.as_fd()).ok()?.runs));
    drop(guard);
    let routes = routes(netlink, &status.rules, &observed).await?;
    let mut reading = Reading { observed, status, runs, routes };
    let file = reading.status.file.as_deref().unwrap_or("FILE");
    reading.status.problems = reading.problems(Source(file));
    Ok(reading)
}

/// Returns the share of packets that XDP has sent; `None`: no interface has XDP.
fn xdp_status(guard: &ReadGuard, serving: &Generation) -> anyhow::Result<Option<XdpStatus>> {
    let Some(packets) = xdp::sent(guard, serving)? else { return Ok(None) };
    let all: u64 = lines::read(guard, serving)?.iter().map(|(_, count)| count.packets).sum();
    Ok(Some(XdpStatus { packets, share: packets as f64 / all.max(1) as f64 }))
}

/// Looks up the routes that the diagnosis needs.
async fn routes(netlink: &Netlink, rules: &[RuleStatus], observed: &Observed) -> Result<Routes> {
    let suspects = diagnosis::suspects(rules, observed);
    if suspects.is_empty() {
        return Ok(Routes::default());
    }
    let links = netlink.links().await.context("interfaces")?;
    let links: HashMap<u32, Link> = links.into_iter().map(|link| (link.index, link)).collect();
    let name = |index: u32| links.get(&index).map_or_else(String::new, |link| link.name.clone());
    let serving = observed.serving().and_then(|number| observed.generations.get(&number));
    let desired = serving.map(|serving| serving.description.desired.clone()).unwrap_or_default();
    let mut targets = desired.targets();
    targets.retain(|target| suspects.contains(&target.address));
    let paths = routing::paths(netlink, &targets, &desired.interfaces, &links).await;
    let paths = paths.context("routes")?.into_iter();
    let paths = paths.map(|paths| paths.map(|paths| name(paths.routes[0].ifindex)));
    let own = netlink.addresses().await.context("addresses")?;
    let is_down = |own: &OwnAddress| links.get(&own.ifindex).is_some_and(|link| !link.up);
    let down = own.into_iter().filter(is_down);
    Ok(Routes {
        to: targets.into_iter().map(|target| target.address).zip(paths).collect(),
        down: down.map(|own| (name(own.ifindex), own.network)).collect(),
    })
}

impl Status {
    /// Builds a status. `state` is `None` if maps are missing; `rule` selects one rule; rates are since
    /// `earlier`.
    ///
    /// # Errors
    /// There is no such rule, or the maps cannot be read.
    pub fn new(
        state: Option<(&StateMaps, Traffic)>,
        network: &Network<'_>,
        rule: Option<&str>,
        earlier: Option<&Traffic>,
    ) -> anyhow::Result<Status> {
        let observed = network.observed;
        let serving = observed.serving().and_then(|number| observed.generations.get(&number));
        let mut status = Status {
            generation: serving.map(|generation| generation.number),
            file: serving.map(|generation| generation.description.origin.file.clone()),
            built: serving.map(|generation| generation.description.built),
            version: serving.map(|generation| generation.description.version.clone()),
            counted_since: None,
            interfaces: interfaces(observed, serving),
            xdp: None,
            rules: Vec::new(),
            unmatched: Counts::default(),
            decap: None,
            incomplete: missing(observed, serving),
            held: observed.held.map(|held| held.generation),
            pending: observed.pending.as_ref().map(PendingStatus::new),
            arpd: None,
            announced: Vec::new(),
            problems: Vec::new(),
            traffic: None,
            max_ids: 0,
        };
        let (Some(serving), Some((maps, total))) = (serving, state) else { return Ok(status) };
        let description = &serving.description;
        let ids = &description.ids;
        status.arpd = lease::remaining(&maps.heartbeat)?.map(|left| !left.is_zero());
        status.max_ids = maps.counters.max_ids();
        let max = description::all(ids).max().unwrap_or(0);
        let neighbours = network.neighbours.iter();
        let view = View {
            grown: earlier.map(|earlier| total.since(earlier)),
            total,
            nexthops: maps.nexthops.read_all(max).context("next hops")?,
            probes: maps.probes.read()?,
            vouched: status.arpd == Some(true),
            overrides: &observed.overrides,
            interfaces: observed
                .interfaces
                .iter()
                .map(|(name, interface)| (interface.index, name.as_str()))
                .collect(),
            neighbours: neighbours
                .filter(|neighbour| neighbour.state != NudState::None)
                .map(|neighbour| ((neighbour.ifindex, neighbour.address), neighbour))
                .collect(),
        };
        status.unmatched = view.total.of(0).clone();
        let decap = description.desired.decap.as_ref();
        status.decap = decap.map(|decap| DecapStatus::new(decap, &status.unmatched));
        if rule.is_none() {
            status.rules.reserve_exact(ids.len());
        }
        for (wanted, ids) in description.desired.rules.iter().zip(ids) {
            if rule.is_none_or(|name| name == wanted.name) {
                status.rules.push(rule_status(wanted, ids, &view));
            }
        }
        status.traffic = Some(view.total);
        if let Some(name) = rule {
            drain::rule_index(&description.desired, name)?;
        }
        Ok(status)
    }
}

/// Outer headers that are taken off packets to this host, and of how many they were.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct DecapStatus {
    /// Networks of senders.
    pub from: Vec<String>,
    /// Kinds of outer headers.
    pub via: Vec<String>,
    /// Packets that went up the stack, without the outer headers.
    #[serde(flatten)]
    pub count: Count,
}

impl DecapStatus {
    fn new(decap: &Decap, unmatched: &Counts) -> DecapStatus {
        let count = unmatched.notes().find(|(note, _)| *note == DECAPSULATED);
        DecapStatus {
            from: decap.from.iter().map(ToString::to_string).collect(),
            via: decap.via.iter().map(diff::word).collect(),
            count: count.map_or_else(Count::default, |(_, count)| count),
        }
    }
}

impl Status {
    /// Fills in the senders of rules that count them.
    fn count_senders(&mut self, guard: &ReadGuard, serving: &Generation) -> anyhow::Result<()> {
        let counts = senders::count(guard, serving)?;
        for rule in &mut self.rules {
            rule.senders = counts.get(rule.name.as_str()).copied();
        }
        Ok(())
    }

    /// Fills in the flows of rules that have them.
    fn count_flows(&mut self, guard: &ReadGuard, serving: &Generation) -> anyhow::Result<()> {
        let desired = &serving.description.desired;
        let with_flows = desired.rules.iter().filter(|rule| rule.has_flows());
        let with_flows: BTreeSet<&str> = with_flows.map(|rule| rule.name.as_str()).collect();
        if with_flows.is_empty() {
            return Ok(());
        }
        let counts = flows::count(guard, serving)?;
        let rules = self.rules.iter_mut();
        for rule in rules.filter(|rule| with_flows.contains(rule.name.as_str())) {
            for upstream in &mut rule.upstreams {
                upstream.flows = Some(counts.get(&upstream.id).copied().unwrap_or_default());
            }
            rule.flows = Some(rule.upstreams.iter().filter_map(|upstream| upstream.flows).sum());
        }
        Ok(())
    }
}

/// Returns when the map of counters was made, in seconds since 1970.
fn counted_since(guard: &ReadGuard) -> Option<u64> {
    let made = fs::metadata(guard.state().join("counters")).ok()?.modified().ok()?;
    Some(made.duration_since(UNIX_EPOCH).ok()?.as_secs())
}

/// Sources of the rows of rules and upstreams.
struct View<'a> {
    total: Traffic,
    /// Growth since the earlier reading.
    grown: Option<Traffic>,
    /// By upstream id.
    nexthops: Vec<types::nexthop>,
    /// Records of probes by upstream id.
    probes: BTreeMap<u32, types::probe>,
    /// True while arpd runs and its health is valid.
    vouched: bool,
    /// Names of interfaces by index.
    interfaces: HashMap<u32, &'a str>,
    neighbours: HashMap<NeighbourKey, &'a Neighbour>,
    /// Overrides by id.
    overrides: &'a BTreeMap<u32, State>,
}

impl UpstreamStatus {
    /// Returns the time since which it does not answer, in seconds since 1970.
    pub fn down_since(&self) -> Option<u64> {
        self.silence?.since
    }
}

impl RuleStatus {
    /// Returns upstreams and mirrors; true marks a mirror.
    pub fn destinations(&self) -> impl Iterator<Item = (&UpstreamStatus, bool)> {
        let upstreams = self.upstreams.iter().map(|upstream| (upstream, false));
        upstreams.chain(self.mirrors.iter().map(|mirror| (mirror, true)))
    }
}

fn interfaces(observed: &Observed, serving: Option<&Generation>) -> Vec<InterfaceStatus> {
    let wanted = serving.map_or(&[][..], |generation| &generation.description.desired.interfaces);
    let attached: Vec<(&str, u32)> = observed.attached().collect();
    let mut names: Vec<&str> = wanted.iter().map(String::as_str).collect();
    names.extend(attached.iter().map(|(name, _)| *name));
    names.sort_unstable();
    names.dedup();
    names
        .into_iter()
        .map(|name| InterfaceStatus {
            name: name.into(),
            reattached: observed.marks.get(name).map_or(0, |mark| mark.reattached),
            generation: attached
                .iter()
                .find(|(other, _)| *other == name)
                .map(|(_, number)| *number),
            xdp: observed.interfaces.get(name).and_then(|interface| match interface.xdp {
                xdp::Slot::Own { mode, .. } => Some(mode),
                _ => None,
            }),
        })
        .collect()
}

fn missing(observed: &Observed, serving: Option<&Generation>) -> Missing {
    let Some(serving) = serving else { return Missing::default() };
    let desired = &serving.description.desired;
    let is_missing = |name: &&String| !observed.interfaces.contains_key(*name);
    Missing {
        interfaces: desired.interfaces.iter().filter(is_missing).cloned().collect(),
        hosts: desired.incomplete.hosts.clone(),
    }
}

fn rule_status(rule: &Rule, ids: &RuleIds, view: &View<'_>) -> RuleStatus {
    let counters = view.total.of_rule(ids.rule);
    let grown = view.grown.as_ref().map(|grown| (grown, grown.of_rule(ids.rule)));
    let recent = grown.map_or(counters, |(_, counts)| counts);
    let [matched, forwarded] = [recent.matched(), recent.forwarded()].map(|count| count.packets);
    let destinations = rule.with_ids(ids);
    let rows = |role, shared| {
        let all = || destinations.iter().filter(|destination| destination.role == role);
        // a vector that grows has room for four, of a kilobyte each
        let mut rows = Vec::with_capacity(all().count());
        rows.extend(all().map(|destination| upstream_status(rule, destination, shared, view)));
        rows
    };
    let shared = match rule.mode {
        Mode::Balance => forwarded,
        Mode::Replicate => matched,
    };
    let upstreams = rows(Role::Upstream, shared);
    let mirrors = rows(Role::Mirror, matched);
    RuleStatus {
        name: rule.name.clone(),
        key: diff::key(rule),
        tc_action: rule.action,
        mode: rule.mode,
        upstreams,
        mirrors,
        flows: None,
        senders: None,
        counters: counters.clone(),
        own: view.total.of(ids.rule).clone(),
        notes: counters.notes().collect(),
        rate: grown.and_then(|(grown, counts)| grown.rate(counts.matched())),
        losses: grown.map_or_else(BTreeMap::new, |(grown, counts)| losses(grown, counts)),
        own_losses: grown
            .map_or_else(BTreeMap::new, |(grown, _)| losses(grown, grown.of(ids.rule))),
    }
}

/// Builds the row of an upstream. `shared` is the number of packets that are 100 % of its share.
fn upstream_status(
    rule: &Rule,
    destination: &Destination<'_>,
    shared: u64,
    view: &View<'_>,
) -> UpstreamStatus {
    let Destination { id, answers, upstream, .. } = *destination;
    let entry = view.nexthops.get(id as usize).copied().unwrap_or_default();
    let override_state = view.overrides.get(&id).copied();
    let health = view.vouched.then(|| health(&entry)).flatten();
    let grown = view.grown.as_ref();
    let forwarded = grown.unwrap_or(&view.total).of(id).forwarded();
    UpstreamStatus {
        id,
        label: destination.label.clone(),
        address: upstream.address.clone(),
        port: upstream.port,
        state: override_state.unwrap_or(upstream.state),
        override_state,
        drained: overrides::word(upstream.state, override_state),
        next_hop: next_hop(&entry, view),
        health,
        since: health.map(|_| entry.since),
        evidence: view.vouched.then(|| evidence(rule, id, &entry, view)).flatten(),
        probe: view.probes.get(&id).copied().map(Box::new),
        silence: silence(&entry, health, view),
        counters: view.total.of(id).clone(),
        notes: view.total.of(id).notes().collect(),
        answers: answers.map(|id| view.total.of(id).clone()),
        flows: None,
        rate: grown.and_then(|grown| grown.rate(forwarded)),
        losses: grown.map_or_else(BTreeMap::new, |grown| losses(grown, grown.of(id))),
        share: (shared > 0).then(|| forwarded.packets as f64 / shared as f64),
        endpoint: diff::endpoint(upstream),
    }
}

/// Returns the packets per second that were not forwarded, by reason.
fn losses(grown: &Traffic, counts: &Counts) -> BTreeMap<&'static str, f64> {
    let drops = counts.drops();
    drops.filter_map(|(name, count)| Some((name, grown.rate(count)?.packets_per_second))).collect()
}

fn next_hop(entry: &types::nexthop, view: &View<'_>) -> Option<NextHopStatus> {
    let interface = view.interfaces.get(&entry.ifindex)?;
    let gateway = nexthops::gateway(entry);
    let neighbour = view.neighbours.get(&(entry.ifindex, gateway));
    let known = [types::macs::MACS_KNOWN, types::macs::MACS_FRESH].contains(&entry.macs);
    let written = known.then_some(entry.destination);
    let mac = written.or_else(|| neighbour?.mac);
    Some(NextHopStatus {
        interface: (*interface).into(),
        gateway,
        egress: nexthops::egress(entry),
        mac: mac
            .map(|[a, b, c, d, e, f]| format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")),
        unresolved: mac.is_none() && neighbour.is_none() && entry.macs != types::macs::MACS_NONE,
        state: neighbour.map(|neighbour| neighbour.state.to_string()),
        mtu: (entry.mtu != 0).then_some(entry.mtu),
        age: neighbour.and_then(|neighbour| neighbour.confirmed).map(|age| age.as_secs()),
    })
}

/// Time by which a neighbour that is up has answered the kernel's probe.
const ANSWERS: Duration = Duration::from_millis(800);

/// Returns the silence of a next hop that does not answer, by arpd or else by the neighbour table.
fn silence(entry: &types::nexthop, health: Option<&str>, view: &View<'_>) -> Option<Silence> {
    let since = |age: Option<Duration>| Some(time::now().saturating_sub(age?.as_secs()));
    match health {
        Some("down") => {
            let since = (entry.since > 0).then_some(entry.since.into());
            let state = match entry.health {
                types::health::HEALTH_FAILED => Answer::Failing,
                _ => Answer::Down,
            };
            return Some(Silence { state, since });
        }
        Some(_) => return None,
        None if entry.macs == types::macs::MACS_NONE => return None,
        None => {}
    }
    let neighbour = view.neighbours.get(&(entry.ifindex, nexthops::gateway(entry)));
    let unknown = entry.macs == types::macs::MACS_UNKNOWN;
    match neighbour.map(|neighbour| (neighbour.state, neighbour.updated)) {
        Some((state @ NudState::Failed, age)) => {
            Some(Silence { state: Answer::Failed(state), since: since(age) })
        }
        Some((state @ NudState::Probe, Some(age))) if age >= ANSWERS => {
            Some(Silence { state: Answer::Failed(state), since: since(Some(age)) })
        }
        Some((NudState::Incomplete, age)) if unknown => {
            Some(Silence { state: Answer::Never, since: since(age) })
        }
        None if unknown && entry.ifindex != 0 => {
            Some(Silence { state: Answer::Never, since: None })
        }
        _ => None,
    }
}

/// Describes the last evidence about the service. While the next hop is down, that is the evidence.
fn evidence(rule: &Rule, id: u32, entry: &types::nexthop, view: &View<'_>) -> Option<String> {
    let probe = rule.health.probe()?;
    if entry.health == types::health::HEALTH_DOWN {
        return None;
    }
    probes::evidence(&probe.check, probe.fall, view.probes.get(&id)?)
}

/// Returns the name of a health.
fn health(entry: &types::nexthop) -> Option<&'static str> {
    match entry.health {
        types::health::HEALTH_UP => Some("up"),
        types::health::HEALTH_STALE => Some("stale"),
        types::health::HEALTH_DOWN | types::health::HEALTH_FAILED => Some("down"),
        _ => None,
    }
}
