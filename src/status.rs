//! What serves and what became of the packets, for people and for `-o json`.

use std::collections::HashSet;
use std::fmt::Write;
use std::net::IpAddr;

use anyhow::Context;
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::bpf::types;
use crate::changes;
use crate::clock;
use crate::config::{Address, Mode, State};
use crate::counters::Counts;
use crate::generation::Generation;
use crate::lease;
use crate::netlink::{Neighbour, NudState};
use crate::nexthop;
use crate::observe::Observed;
use crate::overrides;
use crate::plan::{Rule, RuleIds, Upstream};
use crate::state::{ReadGuard, StateMaps};
use crate::tc::Slot;

/// Everything that `status` shows, copied out of the kernel.
#[derive(Serialize)]
pub struct Status {
    pub generation: Option<u32>,
    pub file: Option<String>,
    /// Seconds since 1970.
    pub built: Option<u64>,
    pub version: Option<String>,
    pub interfaces: Vec<InterfaceStatus>,
    pub rules: Vec<RuleStatus>,
    /// What belongs to no rule, by verdict.
    pub unmatched: Value,
    /// The generation that a rollback left.
    pub held: Option<u32>,
    /// Whether arpd vouches for the next hops; `None`: it never ran.
    pub arpd: Option<bool>,
    /// Why the exit code is 3; empty: all is well.
    pub trouble: Vec<String>,
}

#[derive(Serialize)]
pub struct InterfaceStatus {
    pub name: String,
    /// The generation whose program its filter runs.
    pub generation: Option<u32>,
}

#[derive(Serialize)]
pub struct RuleStatus {
    pub name: String,
    pub key: String,
    pub tc_action: crate::config::Action,
    pub upstreams: Vec<UpstreamStatus>,
    pub mirrors: Vec<UpstreamStatus>,
    /// Each packet once, by verdict.
    pub counters: Value,
    #[serde(skip)]
    counts: Counts,
}

#[derive(Serialize)]
pub struct UpstreamStatus {
    pub label: String,
    pub address: Address,
    pub port: Option<u16>,
    /// By hand, or else by the file.
    pub state: State,
    /// What `drain` and `enable` say of it.
    #[serde(rename = "override")]
    pub said: Option<State>,
    pub next_hop: Option<NextHopStatus>,
    /// What arpd makes of it: `up`, `stale`, `down`; only as long as arpd runs.
    pub health: Option<&'static str>,
    /// Since when, in seconds since 1970.
    pub since: Option<u32>,
    pub counters: Value,
    #[serde(skip)]
    endpoint: String,
    /// [`overrides::word`] of it.
    #[serde(skip)]
    drained: Option<&'static str>,
    #[serde(skip)]
    counts: Counts,
}

#[derive(Serialize)]
pub struct NextHopStatus {
    pub interface: String,
    pub gateway: IpAddr,
    /// This host's own address on that way.
    pub egress: Option<IpAddr>,
    pub mac: Option<String>,
    /// In the kernel's neighbour table, as `ip neigh` has it: `REACHABLE`.
    pub state: Option<String>,
    /// Seconds since it last answered the kernel.
    pub age: Option<u64>,
    /// It has a MAC address that is not known.
    #[serde(skip)]
    unresolved: bool,
}

/// What was read beside the pins.
pub struct Network<'a> {
    pub observed: &'a Observed,
    pub neighbours: &'a [Neighbour],
}

impl Status {
    /// `rule` leaves out all others.
    ///
    /// # Errors
    /// There is no such rule, or the maps cannot be read.
    pub fn new(
        guard: Option<&ReadGuard>,
        network: &Network<'_>,
        rule: Option<&str>,
    ) -> anyhow::Result<Status> {
        let observed = network.observed;
        let serving = observed.serving().and_then(|number| observed.generations.get(&number));
        let mut status = Status {
            generation: serving.map(|generation| generation.number),
            file: serving.map(|generation| generation.description.origin.file.clone()),
            built: serving.map(|generation| generation.description.built),
            version: serving.map(|generation| generation.description.version.clone()),
            interfaces: interfaces(observed, serving),
            rules: Vec::new(),
            unmatched: json!({}),
            held: observed.held.map(|held| held.generation),
            arpd: None,
            trouble: trouble(observed, serving),
        };
        let maps = guard.map(ReadGuard::maps).transpose()?.flatten();
        let (Some(serving), Some(maps)) = (serving, maps) else { return Ok(status) };
        status.unmatched = by_verdict(&maps.counters.read(0)?);
        status.arpd = lease::remaining(&maps.heartbeat)?.map(|left| !left.is_zero());
        let view = View { network, maps: &maps, vouched: status.arpd == Some(true) };
        let description = &serving.description;
        for (wanted, ids) in description.desired.rules.iter().zip(&description.ids) {
            if rule.is_none_or(|name| name == wanted.name) {
                status.rules.push(rule_status(wanted, ids, &view)?);
            }
        }
        let now_down = status.rules.iter().flat_map(|rule| rule.down());
        status.trouble.extend(now_down.collect::<Vec<_>>());
        match rule {
            Some(name) if status.rules.is_empty() => anyhow::bail!("there is no rule `{name}`"),
            _ => Ok(status),
        }
    }
}

/// Where the rows of the table come from.
struct View<'a> {
    network: &'a Network<'a>,
    maps: &'a StateMaps,
    /// arpd runs: what it says of health is so.
    vouched: bool,
}

impl RuleStatus {
    /// The upstreams that do not answer, in words.
    fn down(&self) -> impl Iterator<Item = String> {
        let all = self.upstreams.iter().chain(&self.mirrors);
        let down = all.filter(|upstream| upstream.health == Some("down"));
        down.map(|upstream| {
            let since = upstream.since.filter(|since| *since > 0);
            let since = since.map(|since| format!(" since {}", clock::utc(since.into())));
            format!("{}: {} is down{}", self.name, upstream.label, since.unwrap_or_default())
        })
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
            generation: attached
                .iter()
                .find(|(other, _)| *other == name)
                .map(|(_, number)| *number),
        })
        .collect()
}

fn trouble(observed: &Observed, serving: Option<&Generation>) -> Vec<String> {
    let mut trouble = Vec::new();
    let Some(serving) = serving else {
        return vec![match observed.serving() {
            Some(number) => format!("generation {number} is damaged; apply the file again"),
            None => "nothing is applied".into(),
        }];
    };
    let number = serving.number;
    if !serving.intact {
        trouble.push(format!("generation {number}: pins are missing; apply the file again"));
    }
    if serving.description.namespace != observed.namespace {
        trouble.push(format!(
            "the pins belong to another network namespace (net:[{}])",
            serving.description.namespace
        ));
    }
    for name in &serving.description.desired.interfaces {
        let Some(interface) = observed.interfaces.get(name) else {
            trouble.push(format!("{name}: there is no such interface"));
            continue;
        };
        match &interface.hook.slot {
            Slot::Generation(attached) if *attached == number => {}
            Slot::Generation(attached) => trouble.push(format!(
                "{name}: generation {attached} still serves here; apply the file again"
            )),
            Slot::Empty => {
                trouble.push(format!("{name}: not attached; apply the file again"));
            }
            Slot::Orphan { filter, .. } | Slot::Foreign(filter) => {
                trouble.push(format!("{name}: another filter has its place: {filter}"));
            }
        }
    }
    for (name, attached) in observed.attached() {
        if !serving.description.desired.interfaces.iter().any(|wanted| wanted == name) {
            trouble
                .push(format!("{name}: generation {attached} serves here; apply the file again"));
        }
    }
    trouble
}

fn rule_status(rule: &Rule, ids: &RuleIds, view: &View<'_>) -> anyhow::Result<RuleStatus> {
    let mut counts = view.maps.counters.read(ids.rule)?;
    let upstreams = host_statuses(&rule.upstreams, &ids.upstreams, view)?;
    // what is copied is counted at the rule, and each copy besides
    if rule.mode == Mode::Balance {
        upstreams.iter().for_each(|upstream| counts += upstream.counts);
    }
    Ok(RuleStatus {
        name: rule.name.clone(),
        key: changes::key(rule),
        tc_action: rule.action,
        upstreams,
        mirrors: host_statuses(&rule.mirrors, &ids.mirrors, view)?,
        counters: by_verdict(&counts),
        counts,
    })
}

/// Of upstreams or mirrors; one that is listed twice is one.
fn host_statuses(
    hosts: &[Upstream],
    ids: &[u32],
    view: &View<'_>,
) -> anyhow::Result<Vec<UpstreamStatus>> {
    let mut seen = HashSet::new();
    let once = hosts.iter().zip(ids).filter(|(_, id)| seen.insert(**id));
    once.map(|(host, id)| upstream_status(host, *id, view)).collect()
}

fn upstream_status(
    upstream: &Upstream,
    id: u32,
    view: &View<'_>,
) -> anyhow::Result<UpstreamStatus> {
    let counts = view.maps.counters.read(id)?;
    let entry = view.maps.nexthops.read(id).context("next hops")?;
    let said = view.network.observed.overrides.get(&id).copied();
    let health = view.vouched.then(|| health(&entry)).flatten();
    Ok(UpstreamStatus {
        label: upstream.label(),
        address: upstream.address.clone(),
        port: upstream.port,
        state: said.unwrap_or(upstream.state),
        said,
        drained: overrides::word(upstream.state, said),
        next_hop: next_hop(&entry, view),
        health,
        since: health.map(|_| entry.since),
        counters: by_verdict(&counts),
        endpoint: changes::endpoint(upstream),
        counts,
    })
}

fn next_hop(entry: &types::nexthop, view: &View<'_>) -> Option<NextHopStatus> {
    let interfaces = &view.network.observed.interfaces;
    let (interface, _) =
        interfaces.iter().find(|(_, interface)| interface.index == entry.ifindex)?;
    let gateway = nexthop::gateway(entry);
    let neighbours = view.network.neighbours.iter();
    let neighbour = neighbours
        .filter(|neighbour| (neighbour.ifindex, neighbour.address) == (entry.ifindex, gateway))
        .find(|neighbour| neighbour.state != NudState::None);
    let known = [types::macs::MACS_KNOWN, types::macs::MACS_FRESH].contains(&entry.macs);
    let written = known.then_some(entry.destination);
    let mac = written.or_else(|| neighbour?.mac);
    Some(NextHopStatus {
        interface: interface.clone(),
        gateway,
        egress: nexthop::egress(entry),
        mac: mac.map(|mac| mac.map(|byte| format!("{byte:02x}")).join(":")),
        unresolved: mac.is_none() && neighbour.is_none() && entry.macs != types::macs::MACS_NONE,
        state: neighbour.map(|neighbour| neighbour.state.to_string()),
        age: neighbour.and_then(|neighbour| neighbour.confirmed).map(|age| age.as_secs()),
    })
}

/// What arpd makes of the upstream.
fn health(entry: &types::nexthop) -> Option<&'static str> {
    match entry.health {
        types::health::HEALTH_UP => Some("up"),
        types::health::HEALTH_STALE => Some("stale"),
        types::health::HEALTH_DOWN => Some("down"),
        _ => None,
    }
}

impl NextHopStatus {
    fn text(&self) -> String {
        let mut text = format!("{} dev {}", self.gateway, self.interface);
        for word in [&self.mac, &self.state].into_iter().flatten() {
            text += &format!(" {word}");
        }
        if self.unresolved {
            text += " unresolved";
        }
        if let (Some(age), Some(_)) = (self.age, &self.mac) {
            text += &format!(" {}", clock::age(age));
        }
        text
    }
}

fn by_verdict(counts: &Counts) -> Value {
    let mut map: Map<String, Value> =
        counts.by_verdict().map(|(name, count)| (name.into(), json!(count))).collect();
    map.insert("matched".into(), json!(counts.matched()));
    Value::Object(map)
}

impl Status {
    /// For a terminal or a pipe; `now` is in seconds since 1970.
    pub fn text(&self, now: u64, bold: bool) -> String {
        let mut text = String::new();
        if let (Some(number), Some(built), Some(file)) = (self.generation, self.built, &self.file) {
            let _ = writeln!(
                text,
                "generation {number} of {file}, applied {} ({} ago)",
                clock::utc(built),
                clock::age(now.saturating_sub(built))
            );
        }
        for interface in &self.interfaces {
            let state = match interface.generation {
                Some(number) if Some(number) == self.generation => "attached".into(),
                Some(number) => format!("generation {number}"),
                None => "not attached".into(),
            };
            let _ = writeln!(text, "{}: {state}", interface.name);
        }
        if let Some(held) = self.held {
            let _ = writeln!(text, "generation {held} is held: a rollback left it");
        }
        match self.arpd {
            Some(true) => text += "arpd keeps the next hops\n",
            Some(false) => text += "arpd has ended; the kernel's own table is relied on\n",
            None => {}
        }
        for trouble in &self.trouble {
            let _ = writeln!(text, "! {trouble}");
        }
        if !self.rules.is_empty() {
            let table = self.table().trim_fmt();
            let (header, rows) = table.split_once('\n').unwrap_or((&table, ""));
            let _ = match bold {
                true => writeln!(text, "\n\x1b[1m{header}\x1b[0m\n{rows}"),
                false => writeln!(text, "\n{header}\n{rows}"),
            };
        }
        text
    }

    fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header([
            "RULE",
            "KEY",
            "UPSTREAM",
            "NEXT HOP",
            "FORWARDED",
            "BYTES",
            "NOT FORWARDED",
        ]);
        for rule in &self.rules {
            let action = match rule.tc_action {
                crate::config::Action::Pass => "pass",
                crate::config::Action::Block => "block",
            };
            table.add_row(row(
                [rule.name.clone(), format!("{} {action}", rule.key), String::new(), String::new()],
                &rule.counts,
            ));
            let upstreams = rule.upstreams.iter().map(|upstream| ("", upstream));
            let mirrors = rule.mirrors.iter().map(|mirror| ("mirror ", mirror));
            for (role, upstream) in upstreams.chain(mirrors) {
                let hop = upstream.next_hop.as_ref();
                let mut via = hop.map_or("no route".into(), NextHopStatus::text);
                if let Some(health) = upstream.health.filter(|health| *health != "up") {
                    via += &format!(" ({health})");
                }
                if let Some(drained) = upstream.drained {
                    via += &format!(", {drained}");
                }
                table.add_row(row(
                    [String::new(), String::new(), format!("{role}{}", upstream.endpoint), via],
                    &upstream.counts,
                ));
            }
        }
        for column in [4, 5] {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        table
    }
}

fn row(start: [String; 4], counts: &Counts) -> Vec<String> {
    const STALE: &str = "stale-neighbour";
    let forwarded = counts.forwarded();
    let mut packets = forwarded.packets.to_string();
    let mut others = Vec::new();
    for (name, count) in counts.by_verdict().skip(1).filter(|(_, count)| count.packets > 0) {
        match name {
            STALE => packets += &format!(" ({} stale)", count.packets),
            _ => others.push(format!("{name} {}", count.packets)),
        }
    }
    let mut row = start.to_vec();
    row.extend([packets, forwarded.bytes.to_string(), others.join(", ")]);
    row
}
