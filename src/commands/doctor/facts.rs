//! Facts about the host and what serves. Nothing is changed.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use foldhash::{HashMap, HashMapExt, HashSet};

use super::before::{self, Before};
use super::sample::{self, Growth};
use super::server::{self, ServerFacts};
use crate::bpf;
use crate::config::{Action, Config, Family, Health, KeyAddress, Message, Source, with_port};
use crate::datapath::description::Description;
use crate::datapath::hook::Attachment;
use crate::datapath::pins::Store;
use crate::datapath::{capabilities, kernel};
use crate::desired::{Desired, Rule, export, tables};
use crate::error::{Failure, Result};
use crate::net::link::{Link, OwnAddress};
use crate::net::neighbour::NeighbourTable;
use crate::net::{Netlink, ethtool, ipsec, nexthop, routing};
use crate::reconcile::observe::{Observed, observe};
use crate::reconcile::source::{self, ConfigFile, RESOLVE_TIMEOUT, Request, Text};
use crate::reconcile::warnings::Candidate;
use crate::reconcile::{drift, sockets};
use crate::telemetry::diagnosis;
use crate::telemetry::problem::Problem;
use crate::telemetry::status::{self, Reading, Status};

/// Directories of systemd units.
const UNIT_DIRS: [&str; 5] = [
    "/etc/systemd/system",
    "/run/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
];

/// Facts about the host and the active configuration.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// File for fixes: the given one, or the active one.
    pub file: String,
    /// True if the file differs from the active configuration, or why it cannot be compared.
    pub drift: Option<std::result::Result<bool, String>>,
    /// Descriptions of missing capabilities.
    pub missing_capabilities: Vec<String>,
    /// Reason why the pins cannot be read.
    pub unreadable: Option<String>,
    pub kernel: Kernel,
    /// Problems of the active configuration.
    pub problems: Vec<Problem>,
    /// Packets that were not sent, within a sample.
    pub growth: Vec<Growth>,
    /// TCP segments that this host received during the sample.
    pub tcp_segments: u64,
    /// Packets received by interfaces during the sample while the program never ran.
    pub hidden: BTreeMap<String, u64>,
    /// Descriptions of other pins that are damaged.
    pub damage: Vec<String>,
    /// The generation that a rollback left.
    pub held: Option<u32>,
    /// True while arpd's lease holds; `None`: it never ran.
    pub arpd: Option<bool>,
    /// True if systemd has a unit for arpd.
    pub arpd_unit: bool,
    pub inputs: Vec<Input>,
    pub upstreams: Vec<UpstreamFacts>,
    /// Sockets of this host that send to a key.
    pub senders: Vec<Sender>,
    /// Warnings of `apply`.
    pub warnings: Vec<String>,
    /// Addresses of keys that no interface has, each with its rule.
    pub unassigned: BTreeMap<String, String>,
    /// True if a rule leaves out upstreams that are down.
    pub wants_health: bool,
    pub neighbours: Vec<NeighbourTable>,
    /// Numbers of next hops of IPv4 and IPv6.
    pub next_hops: [usize; 2],
    /// Present if this host is an upstream of `reply: direct`.
    pub server: Option<ServerFacts>,
    /// True if nothing is applied, no file is named, and the host is an upstream: it needs none.
    pub needs_nothing: bool,
}

/// Features of the kernel.
#[derive(Clone, Copy, Debug, Default)]
pub struct Kernel {
    pub version: (u32, u32),
    /// Type information for relocating the program.
    pub btf: bool,
    /// Programs are compiled, not interpreted.
    pub jit: bool,
    /// Lockdown keeps the program from being loaded.
    pub locked_down: bool,
}

/// An interface of the configuration.
#[derive(Clone, Debug)]
pub struct Input {
    pub name: String,
    /// `None`: there is no such interface.
    pub link: Option<InputLink>,
}

#[derive(Clone, Debug)]
pub struct InputLink {
    /// In bytes.
    pub mtu: u32,
    /// Name of the device, this or a lower one, with large receive offload.
    pub lro: Option<String>,
    /// Names of the devices of a driver, this or lower ones, with generic receive offload.
    pub gro: Vec<String>,
    /// True if the qdisc was added by another program.
    pub foreign_qdisc: bool,
    /// Programs and filters that run before.
    pub before: Vec<Before>,
    /// The hook to which the next apply moves the program; `None`: it stays.
    pub moves_to: Option<Attachment>,
    /// Sysctls that disable forwarding there, of the families in use.
    pub not_forwarding: Vec<String>,
    /// Sysctl that disables IPv6 there, if a rule needs IPv6.
    pub no_ipv6: Option<String>,
    /// Strict reverse path filtering.
    pub strict: bool,
    /// The default route uses another interface.
    pub default_elsewhere: bool,
    /// An IPv4 rule passes packets to this host too.
    pub passes: bool,
    /// A rule passes packets to this host too.
    pub delivers: bool,
}

/// An upstream and the path to it.
#[derive(Clone, Debug)]
pub struct UpstreamFacts {
    pub rule: String,
    pub label: String,
    pub address: IpAddr,
    pub path: PathFacts,
    /// Source addresses are preserved.
    pub preserves: bool,
    /// The source should be an own address, but the path has none.
    pub lacks_egress: bool,
    /// Number of packets dropped as too large.
    pub too_large: u64,
    /// Number of packets dropped with an expired TTL.
    pub spent: u64,
}

#[derive(Clone, Debug)]
pub enum PathFacts {
    Local,
    /// Reason why there is no route.
    None(String),
    Hop(HopFacts),
}

/// A next hop, or the first of several.
#[derive(Clone, Debug)]
pub struct HopFacts {
    pub interface: String,
    pub gateway: IpAddr,
    /// In bytes.
    pub mtu: u32,
    /// Name and MTU of the lower interface, which limits the MTU.
    pub lower: Option<(String, u32)>,
}

/// A socket of this host that is connected to the key of a rule.
#[derive(Clone, Debug)]
pub struct Sender {
    pub rule: String,
    pub from: String,
    pub to: String,
    pub uid: u32,
}

/// Reads the facts. `file` is compared with the active configuration; default: the applied file. `served` are the
/// addresses that the host must have as an upstream of `reply: direct`.
///
/// # Errors
/// The given file cannot be read, the kernel returns an error, or another udplb holds the lock.
pub async fn read(
    store: &Store,
    netlink: &Netlink,
    file: Option<&Path>,
    served: &[IpAddr],
) -> Result<Facts> {
    let mut facts = Facts {
        kernel: abilities(),
        missing_capabilities: capabilities::missing_now(),
        neighbours: netlink.neighbour_tables().await.context("neighbours")?,
        ..Facts::default()
    };
    let reading = watch(&mut facts, store, netlink).await?;
    let unread;
    let (observed, status) = match &reading {
        Some(reading) => (&reading.observed, Some(&reading.status)),
        None => {
            unread = observe(None, netlink).await?;
            (&unread, None)
        }
    };
    let number = status.and_then(|status| status.generation);
    let serving = number.and_then(|number| observed.generations.get(&number));
    let serving = serving.map(|generation| &*generation.description);
    facts.damage = damage(observed);
    facts.held = observed.held.map(|held| held.generation);
    facts.arpd = status.and_then(|status| status.arpd);
    facts.arpd_unit =
        UNIT_DIRS.iter().any(|dir| Path::new(dir).join("udplb-arpd.service").exists());
    let desired = compare(&mut facts, netlink, file, observed, serving).await?;
    if let Some(reading) = &reading {
        facts.problems = reading.problems(diagnosis::Source(&facts.file));
    }
    if let Some(desired) = &desired {
        look(&mut facts, netlink, observed, status, serving, desired).await?;
    }
    if !served.is_empty() || desired.as_ref().is_some_and(|desired| desired.decap.is_some()) {
        facts.server = Some(server::read(netlink, served, desired.as_deref()).await?);
    }
    facts.needs_nothing = !served.is_empty() && desired.is_none() && file.is_none();
    Ok(facts)
}

/// Fills in what grows within a sample. Returns the last reading; none if there is nothing to read.
async fn watch(facts: &mut Facts, store: &Store, netlink: &Netlink) -> Result<Option<Reading>> {
    let segments = tcp_segments();
    let measured = bpf::measure_runs().inspect_err(|error| log::info!("run times: {error}"));
    match readings(store, netlink).await {
        Ok((before, links, after)) => {
            facts.tcp_segments = tcp_segments().saturating_sub(segments);
            facts.growth = sample::growth(&before.status, &after.status);
            if measured.is_ok() {
                facts.hidden = sample::hidden(&before, &links, &after);
            }
            Ok(Some(after))
        }
        // not a problem of the host
        Err(failure @ Failure::Locked(_)) => Err(failure),
        Err(failure) => {
            facts.unreadable = Some(failure.to_string());
            Ok(None)
        }
    }
}

/// Compares the file, or else the applied one, with the active configuration. Returns that, or else the
/// configuration of the file.
async fn compare(
    facts: &mut Facts,
    netlink: &Netlink,
    file: Option<&Path>,
    observed: &Observed,
    serving: Option<&Description>,
) -> Result<Option<Arc<Desired>>> {
    let given = match file {
        Some(file) => {
            Some((Text::read(file)?, ConfigFile { file: file.into(), interfaces: Vec::new() }))
        }
        None => serving.and_then(drift::source),
    };
    facts.file = match (&given, serving) {
        (Some((text, _)), _) => text.name.clone(),
        (None, Some(description)) => description.origin.file.clone(),
        (None, None) => "FILE".into(),
    };
    let mut desired = serving.map(|description| description.desired.clone());
    match (given, serving) {
        (Some((text, target)), Some(description)) => {
            facts.drift = Some(differs(&text, target, description, observed));
        }
        (Some((text, target)), None) => {
            let wanted = match Request::new(&text, &target, RESOLVE_TIMEOUT) {
                Ok(request) => source::load(request, observed, netlink).await,
                Err(failure) => Err(failure),
            };
            match wanted {
                Ok(wanted) => desired = Some(wanted.desired),
                Err(failure) => facts.drift = Some(Err(first_line(&failure))),
            }
        }
        (None, _) => {}
    }
    Ok(desired)
}

/// Takes two readings, one sample apart, and the links right after the first. Probes stale next hops meanwhile:
/// one that is down looks like one that was not needed for a while.
async fn readings(store: &Store, netlink: &Netlink) -> Result<(Reading, Vec<Link>, Reading)> {
    let before = status::read(store, netlink, None, None).await?;
    if before.status.arpd != Some(true) {
        netlink.probe(&before.doubtful()).await;
    }
    let links = netlink.links().await.context("interfaces")?;
    tokio::time::sleep(sample::LENGTH).await;
    let after = status::read(store, netlink, None, None).await?;
    Ok((before, links, after))
}

/// Compares a file, with the active interfaces if it names none.
fn differs(
    text: &Text,
    mut target: ConfigFile,
    description: &Description,
    observed: &Observed,
) -> std::result::Result<bool, String> {
    if text.parse().is_ok_and(|config| config.interfaces.is_empty()) {
        target.interfaces.clone_from(&description.desired.interfaces);
    }
    drift::differs(text, &target, description, observed).map_err(|failure| first_line(&failure))
}

fn first_line(failure: &Failure) -> String {
    failure.to_string().lines().next().unwrap_or_default().into()
}

fn abilities() -> Kernel {
    Kernel {
        version: kernel::version(),
        btf: kernel::has_btf(),
        locked_down: kernel::is_locked_down(),
        // a kernel that always compiles may not show it
        jit: sysctl("net/core/bpf_jit_enable").is_none_or(|value| value != 0),
    }
}

pub(super) fn sysctl(name: &str) -> Option<i64> {
    fs::read_to_string(Path::new("/proc/sys").join(name)).ok()?.trim().parse().ok()
}

/// Describes damaged pins, except those of the active generation.
fn damage(observed: &Observed) -> Vec<String> {
    let serving = observed.serving();
    let is_other = |number: &&u32| Some(**number) != serving;
    let damaged = observed.damaged.iter().filter(is_other);
    let damaged = damaged.map(|number| format!("the description of generation {number} is gone"));
    let others = observed.generations.values().filter(|it| is_other(&&it.number) && !it.intact);
    let others = others.map(|it| format!("pins of generation {} are missing", it.number));
    let unfinished = observed.unfinished.iter().map(|name| format!("{name} was left by a crash"));
    damaged.chain(others).chain(unfinished).collect()
}

async fn look(
    facts: &mut Facts,
    netlink: &Netlink,
    observed: &Observed,
    status: Option<&Status>,
    serving: Option<&Description>,
    desired: &Desired,
) -> Result<()> {
    let links = netlink.links().await.context("interfaces")?;
    let addresses = netlink.addresses().await.context("addresses")?;
    facts.inputs = inputs(netlink, observed, &links, serving, desired).await?;
    let next_hops = nexthop::look(netlink, desired.targets(), &desired.interfaces).await?;
    facts.upstreams = upstreams(&next_hops, &links, status, desired);
    let hops: HashSet<(&str, IpAddr)> = facts
        .upstreams
        .iter()
        .filter_map(|upstream| match &upstream.path {
            PathFacts::Hop(hop) => Some((hop.interface.as_str(), hop.gateway)),
            _ => None,
        })
        .collect();
    for (_, gateway) in hops {
        facts.next_hops[usize::from(gateway.is_ipv6())] += 1;
    }
    facts.senders = senders(desired);
    facts.wants_health = desired.rules.iter().any(|rule| rule.health != Health::Off);
    facts.warnings = warnings(desired, &next_hops, &links, &addresses);
    let own: HashSet<IpAddr> = addresses.iter().map(|own| own.address).collect();
    facts.unassigned = desired
        .rules
        .iter()
        .rev()
        .filter_map(|rule| match rule.key.address {
            KeyAddress::Is(address) => Some((address, rule)),
            KeyAddress::Any => None,
        })
        .filter(|(address, _)| !tables::is_group(desired, *address) && !own.contains(address))
        .map(|(address, rule)| (address.to_string(), rule.name.clone()))
        .collect();
    Ok(())
}

/// Returns the warnings of `apply` for the active configuration.
fn warnings(
    desired: &Desired,
    next_hops: &HashMap<routing::Target, nexthop::NextHop>,
    links: &[Link],
    addresses: &[OwnAddress],
) -> Vec<String> {
    let text = export::document(desired).to_string();
    let Ok(config) = Config::parse("what serves", &text) else { return Vec::new() };
    let candidate = Candidate { config: &config, desired, next_hops };
    let mut findings = candidate.of_this_host(links, addresses);
    // a missing privilege is reported on its own
    findings.extend(candidate.in_clear(&ipsec::security_policies().unwrap_or_default()));
    findings.extend(candidate.several());
    findings.extend(candidate.not_joined(links));
    findings.into_iter().map(Message::into_text).collect()
}

async fn inputs(
    netlink: &Netlink,
    observed: &Observed,
    links: &[Link],
    serving: Option<&Description>,
    desired: &Desired,
) -> Result<Vec<Input>> {
    let default = netlink.default_interface().context("routes")?;
    let of = |family: Family| desired.rules.iter().filter(move |rule| rule.family() == family);
    let passes = of(Family::V4).any(|rule| rule.action == Action::Pass);
    let delivers = desired.rules.iter().any(|rule| rule.action == Action::Pass);
    let families: Vec<(&str, u16)> = [(Family::V4, "ipv4", 0x0800), (Family::V6, "ipv6", 0x86dd)]
        .into_iter()
        .filter(|(family, ..)| of(*family).next().is_some())
        .map(|(_, name, protocol)| (name, protocol))
        .collect();
    let protocols: Vec<u16> = families.iter().map(|(_, protocol)| *protocol).collect();
    let mut inputs = Vec::new();
    for name in &desired.interfaces {
        let seen = observed.interfaces.get(name);
        let link = links.iter().find(|link| link.name == *name);
        let Some((seen, link)) = seen.zip(link) else {
            inputs.push(Input { name: name.clone(), link: None });
            continue;
        };
        let conf = |interface: &str, what: &str| {
            sysctl(&format!("net/ipv4/conf/{interface}/{what}")).unwrap_or(0)
        };
        let is = |what: &str, wanted: i64| sysctl(&what.replace('.', "/")) == Some(wanted);
        let no_ipv6 = format!("net.ipv6.conf.{name}.disable_ipv6");
        let qdisc = seen.hook.qdisc;
        inputs.push(Input {
            name: name.clone(),
            link: Some(InputLink {
                mtu: link.mtu,
                lro: devices_below(link, links)
                    .find(|device| ethtool::get(device, ethtool::FLAGS) & ethtool::LRO != 0)
                    .map(String::from),
                gro: devices_below(link, links)
                    .filter(|device| {
                        is_hardware(device, links) && ethtool::get(device, ethtool::GRO) != 0
                    })
                    .map(String::from)
                    .collect(),
                foreign_qdisc: qdisc.is_some()
                    && seen.hook.present() == Some(Attachment::Filter)
                    && serving.is_some_and(|serving| !serving.clsact.contains(name)),
                moves_to: Some(seen.hook.attachment)
                    .filter(|to| seen.hook.present().is_some_and(|present| present != *to)),
                before: before::read(netlink, link, seen, &protocols).await?,
                not_forwarding: families
                    .iter()
                    .map(|(family, _)| format!("net.{family}.conf.{name}.forwarding"))
                    .filter(|sysctl| is(sysctl, 0))
                    .collect(),
                no_ipv6: Some(no_ipv6)
                    .filter(|sysctl| of(Family::V6).next().is_some() && is(sysctl, 1)),
                strict: conf("all", "rp_filter").max(conf(name, "rp_filter")) == 1,
                default_elsewhere: default.is_some_and(|ifindex| ifindex != link.index),
                passes,
                delivers,
            }),
        });
    }
    Ok(inputs)
}

/// Returns the lowest devices that a link receives by: its members, or its lower devices. The flags of a bond
/// itself are not those of its members.
fn devices_below<'a>(link: &'a Link, links: &'a [Link]) -> impl Iterator<Item = &'a str> {
    // limit against loops
    const MAX_DEPTH: usize = 8;
    let mut below = vec![link];
    for _ in 0..MAX_DEPTH {
        below = below.into_iter().flat_map(|link| next_below(link, links)).collect();
    }
    below.into_iter().map(|link| link.name.as_str())
}

fn next_below<'a>(link: &'a Link, links: &'a [Link]) -> Vec<&'a Link> {
    let made_upon = ["vlan", "macvlan", "ipvlan", "macvtap"].contains(&link.kind.as_str());
    let is_next = |other: &&Link| {
        other.controller == Some(link.index) || made_upon && link.lower == Some(other.index)
    };
    let next: Vec<&Link> = links.iter().filter(is_next).collect();
    if next.is_empty() { vec![link] } else { next }
}

/// Returns true for a device of a driver. Most others, such as veth, hand packets over one by one, whatever
/// their flag of generic receive offload says.
fn is_hardware(name: &str, links: &[Link]) -> bool {
    links.iter().any(|link| link.name == name && link.kind.is_empty())
}

/// Returns the number of TCP segments that this network namespace has received.
fn tcp_segments() -> u64 {
    let table = fs::read_to_string("/proc/thread-self/net/snmp").unwrap_or_default();
    let mut lines = table.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (Some(names), Some(values)) = (lines.next(), lines.next()) else { return 0 };
    let mut pairs = names.split(' ').zip(values.split(' '));
    pairs.find(|(name, _)| *name == "InSegs").and_then(|(_, value)| value.parse().ok()).unwrap_or(0)
}

fn upstreams(
    next_hops: &HashMap<routing::Target, nexthop::NextHop>,
    links: &[Link],
    status: Option<&Status>,
    desired: &Desired,
) -> Vec<UpstreamFacts> {
    let links: HashMap<u32, Link> = links.iter().map(|link| (link.index, link.clone())).collect();
    let mut known = HashMap::new();
    for rule in status.iter().flat_map(|status| &status.rules) {
        for (upstream, _) in rule.destinations() {
            known.insert((rule.name.as_str(), upstream.label.as_str()), upstream);
        }
    }
    let mut upstreams = Vec::new();
    for rule in &desired.rules {
        for upstream in rule.destinations().filter(|it| !it.is_local()) {
            let label = upstream.label();
            let found = next_hops.get(&desired.target(rule, upstream));
            let hop = found.and_then(|found| found.hops().first());
            let status = known.get(&(rule.name.as_str(), label.as_str()));
            let dropped = |reason| {
                let drop = status.and_then(|it| it.counters.drops().find(|it| it.0 == reason));
                drop.map_or(0, |(_, count)| count.packets)
            };
            upstreams.push(UpstreamFacts {
                rule: rule.name.clone(),
                address: upstream.address.ip,
                path: found.map_or(PathFacts::Local, |found| path(found, &links)),
                preserves: rule.source_of(upstream) == Source::Preserve,
                lacks_egress: rule.source_of(upstream) == Source::Egress
                    && hop.is_some_and(|hop| hop.egress.is_none()),
                too_large: dropped("mtu"),
                spent: dropped("ttl"),
                label,
            });
        }
    }
    upstreams
}

/// Converts a next hop, or the first of several. `links` are all interfaces by index.
fn path(next_hop: &nexthop::NextHop, links: &HashMap<u32, Link>) -> PathFacts {
    let hop = match (next_hop, next_hop.hops().first()) {
        (nexthop::NextHop::None(reason), _) => return PathFacts::None(reason.clone()),
        (_, Some(hop)) => hop,
        (_, None) => return PathFacts::Local,
    };
    let link = links.get(&hop.ifindex);
    // the lower index of a veth is its peer
    let lower = link.and_then(|link| link.outer.or(link.lower.filter(|_| link.kind != "veth")));
    let lower = lower.and_then(|lower| links.get(&lower));
    PathFacts::Hop(HopFacts {
        interface: hop.interface.clone(),
        gateway: hop.gateway,
        mtu: hop.mtu,
        lower: lower.map(|lower| (lower.name.clone(), lower.mtu)),
    })
}

/// Returns the sockets that are connected to a key.
fn senders(desired: &Desired) -> Vec<Sender> {
    let mut keys: HashMap<IpAddr, Vec<&Rule>> = HashMap::new();
    for rule in &desired.rules {
        match rule.key.address {
            KeyAddress::Is(address) => keys.entry(address).or_default().push(rule),
            KeyAddress::Any => {
                let family = rule.family();
                for address in desired.addresses.iter().filter(|it| family == (**it).into()) {
                    keys.entry(*address).or_default().push(rule);
                }
            }
        }
    }
    let mut senders = Vec::new();
    for line in sockets::udp_sockets() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, from, to, _, _, _, _, uid, ..] = words[..] else { continue };
        let Some((from, to)) = sockets::endpoint(from).zip(sockets::endpoint(to)) else {
            continue;
        };
        let Some(rules) = keys.get(&to.0) else { continue };
        let rule = rules.iter().find(|rule| rule.key.has_port(to.1) && rule.key.admits(from.0));
        if let Some(rule) = rule {
            senders.push(Sender {
                rule: rule.name.clone(),
                from: with_port(from.0, from.1),
                to: with_port(to.0, to.1),
                uid: uid.parse().unwrap_or(0),
            });
        }
    }
    senders
}

#[cfg(test)]
mod tests {
    use super::tcp_segments;

    #[test]
    fn segments_are_counted() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let before = tcp_segments();
        let address = listener.local_addr().expect("an address");
        let _connection = std::net::TcpStream::connect(address).expect("a connection");
        assert!(tcp_segments() > before);
    }
}
