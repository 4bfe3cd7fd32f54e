//! `udplb get`: shows how a packet would be handled. A dry-run copy of the active program, on the same maps,
//! processes such a packet and reports events as for `trace`.

use std::cell::RefCell;
use std::fmt::{self, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;

use anyhow::{Context, anyhow};
use clap::Args;
use clap_complete::engine::ArgValueCandidates;
use etherparse::{LaxNetSlice, LaxSlicedPacket, PacketBuilder, TransportSlice};
use libbpf_rs::RingBufferBuilder;
use schemars::JsonSchema;
use serde::Serialize;

use super::{DEGRADED, complete, netlink};
use crate::bpf::{self, types};
use crate::cli::Global;
use crate::cli::output::report;
use crate::config::{Action, KeyAddress, Mode, State, health, with_port};
use crate::datapath::description::Generation;
use crate::datapath::generation::{self, DryRunProgram};
use crate::datapath::overrides;
use crate::datapath::pins::{self, ReadGuard};
use crate::datapath::state_maps::{self, StateMaps};
use crate::desired::miss::{self, Miss};
use crate::desired::quic;
use crate::desired::senders::{self, LeftOut};
use crate::desired::tables::is_group;
use crate::desired::{Desired, Rule, Upstream, diff};
use crate::error::{Failure, Result};
use crate::net::Netlink;
use crate::net::neighbour::{Neighbour, NudState};
use crate::reconcile::observe::{Observed, observe};
use crate::telemetry::event::{self, Event, Names};
use crate::telemetry::flows::{self, Flow, FlowState};
use crate::telemetry::status::{self, UpstreamStatus};
use crate::time;

/// Default source port.
const PORT: u16 = 1024;

/// The packet to handle.
#[derive(Args)]
pub struct Options {
    /// Source: an address, 10.0.0.9:5000 or [2001:db8::9]:5000; default port 1024.
    #[arg(value_name = "SRC[:PORT]")]
    source: Endpoint,
    /// Destination; the port is optional if the rules have only one for the address.
    #[arg(value_name = "DST[:PORT]")]
    destination: Endpoint,
    /// Content of the datagram: text, or hexadecimal digits after `0x`.
    #[arg(long, value_name = "TEXT", default_value = "", value_parser = payload)]
    payload: Payload,
    /// Receiving interface, required if there are several.
    #[arg(short, long, value_name = "IF", add = ArgValueCandidates::new(complete::interfaces))]
    interface: Option<String>,
}

/// An address, with or without a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub address: IpAddr,
    pub port: Option<u16>,
}

impl std::str::FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Endpoint, String> {
        if let Ok(both) = text.parse::<SocketAddr>() {
            return Ok(Endpoint { address: both.ip(), port: Some(both.port()) });
        }
        let address = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        match address.unwrap_or(text).parse() {
            Ok(address) => Ok(Endpoint { address, port: None }),
            Err(_) => Err("an address, `10.0.0.9:5000` or `[2001:db8::9]:5000`".into()),
        }
    }
}

/// Bytes of a datagram.
#[derive(Clone, Debug)]
struct Payload(Vec<u8>);

fn payload(text: &str) -> std::result::Result<Payload, String> {
    health::payload(text).map(Payload)
}

pub async fn run(global: &Global, options: &Options) -> Result<u8> {
    let answer = answer(global, options, &netlink()?).await?.ok_or(Failure::NothingApplied)?;
    report(global, &answer.to_string(), &answer)?;
    Ok(if answer.matched() { 0 } else { DEGRADED })
}

/// A packet to handle.
#[derive(Clone, Debug)]
pub struct Question {
    pub source: SocketAddr,
    pub destination: SocketAddr,
    pub payload: Vec<u8>,
}

/// Dry run of one generation.
pub struct Asker {
    dry_run: DryRunProgram,
    desired: Arc<Desired>,
}

impl Asker {
    pub fn new(guard: &ReadGuard, generation: &Generation) -> anyhow::Result<Asker> {
        let desired = generation.description.desired.clone();
        Ok(Asker { dry_run: generation::dry_run_program(guard, generation)?, desired })
    }

    /// Runs the program on a packet received by the interface with this MAC address. Returns an event for
    /// each copy, and the return value.
    pub fn ask(
        &self,
        ifindex: u32,
        own: [u8; 6],
        question: &Question,
    ) -> anyhow::Result<(Vec<Event>, i32)> {
        let to =
            match (question.destination.ip(), is_group(&self.desired, question.destination.ip())) {
                (_, false) => own,
                (address, true) => group_mac(address),
            };
        let events = RefCell::new(Vec::new());
        let mut builder = RingBufferBuilder::new();
        let take = |bytes: &[u8]| {
            events.borrow_mut().extend(Event::read(bytes));
            0
        };
        builder.add(&self.dry_run.events, take)?;
        let ring = builder.build()?;
        let action = bpf::run_on_frame(self.dry_run.program.as_fd(), ifindex, &frame(question, to))
            .context("the dry run failed")?;
        ring.consume()?;
        drop(ring);
        Ok((events.into_inner(), action))
    }
}

/// Returns the MAC address of a multicast or broadcast address.
fn group_mac(address: IpAddr) -> [u8; 6] {
    match address {
        IpAddr::V4(address) if address.is_multicast() => {
            let [_, a, b, c] = address.octets();
            [0x01, 0x00, 0x5e, a & 0x7f, b, c]
        }
        IpAddr::V4(_) => [0xff; 6],
        IpAddr::V6(address) => {
            let [.., a, b, c, d] = address.octets();
            [0x33, 0x33, a, b, c, d]
        }
    }
}

/// Builds the Ethernet frame of a packet.
fn frame(question: &Question, to: [u8; 6]) -> Vec<u8> {
    // a locally administered address
    const FROM: [u8; 6] = [2, 0, 0, 0, 0, 0xff];
    const LIMIT: u8 = 64;
    let Question { source, destination, payload } = question;
    let ethernet = PacketBuilder::ethernet2(FROM, to);
    let ip = match (source.ip(), destination.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            ethernet.ipv4(source.octets(), destination.octets(), LIMIT)
        }
        (source, destination) => {
            let [source, destination] = [source, destination].map(|address| match address {
                IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
                IpAddr::V6(address) => address.octets(),
            });
            ethernet.ipv6(source, destination, LIMIT)
        }
    };
    let udp = ip.udp(source.port(), destination.port());
    let mut frame = Vec::with_capacity(udp.size(payload.len()));
    udp.write(&mut frame, payload).expect("a vector takes what fits into a datagram");
    frame
}

/// Output of `get`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Answer {
    pub source: SocketAddr,
    pub destination: SocketAddr,
    pub interface: String,
    pub generation: u32,
    /// `None`: no rule matches.
    #[serde(flatten)]
    pub matched: Option<Matched>,
    /// Rules that nearly match, if none does.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub misses: Vec<Miss>,
    /// Source and destination of a packet that would match.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub example: Option<String>,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct Matched {
    pub rule: String,
    pub key: String,
    pub tc_action: Action,
    pub mode: Mode,
    /// Selection of the upstream, if there are several.
    pub selection: Option<Selection>,
    /// With `strategy: quic-cid`: the bytes at the place of the server's id, if there are any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server_id: Option<String>,
    /// One for each receiver of the packet or a copy.
    pub outcomes: Vec<Outcome>,
    /// Receivers that get no packets of this sender.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<LeftOut>,
    /// `sent`: the packet itself goes to the upstream; `delivered`: it is delivered here; `dropped`.
    pub packet: &'static str,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct Selection {
    #[serde(flatten)]
    pub of_packet: event::Selection,
    pub slots: u32,
    /// Owner of the slot, and why another got the packet.
    pub instead_of: Option<String>,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct Outcome {
    /// `None`: no upstream was selected.
    pub upstream: Option<String>,
    /// The upstream is this host.
    #[serde(skip)]
    here: bool,
    /// Other upstreams get the packet too.
    pub copy: bool,
    /// Only every N-th packet is sent to it.
    pub sample: u32,
    /// Health by arpd while it runs.
    pub health: Option<&'static str>,
    /// Override, or else the state in the file.
    pub state: Option<State>,
    #[serde(rename = "override")]
    pub override_state: Option<State>,
    pub next_hop: Option<Hop>,
    /// Source of the packet as it is sent.
    pub source: Option<SocketAddr>,
    pub destination: Option<SocketAddr>,
    /// Flow that the packet belongs to, or that it would make.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flow: Option<PacketFlow>,
    pub verdict: &'static str,
    #[serde(skip)]
    endpoint: Option<String>,
    /// State and override in words.
    #[serde(skip)]
    condition: Option<&'static str>,
}

/// Flow of a packet.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct PacketFlow {
    /// `None`: there is none yet. Its port is the one that it would get now.
    pub state: Option<FlowState>,
    /// Time since the last packet of either side.
    pub idle_seconds: Option<f64>,
}

/// Next hop of a packet.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Hop {
    pub interface: String,
    pub gateway: Option<IpAddr>,
    pub mac: Option<String>,
    /// State in the neighbour table, as in `ip neigh`.
    pub state: Option<String>,
    pub mtu: Option<u16>,
}

/// Runs the active program on the packet. `None`: nothing is applied.
async fn answer(global: &Global, options: &Options, netlink: &Netlink) -> Result<Option<Answer>> {
    crate::datapath::capabilities::require()?;
    let Some(guard) = pins::read(&global.pin_dir, global.lock_timeout)? else { return Ok(None) };
    let observed = observe(Some(&guard), netlink).await?;
    let Some(serving) = observed.described()? else { return Ok(None) };
    let desired = &serving.description.desired;
    let question = question(desired, options)?;
    let interface = interface(desired, &observed, options.interface.as_deref())?;
    let is_attached = desired.interfaces.contains(&interface);
    let links = netlink.links().await.context("interfaces")?;
    let link = links.iter().find(|link| link.name == interface);
    let link = link.with_context(|| format!("{interface}: there is no such interface"))?;
    let asker = Asker::new(&guard, serving)?;
    // zeros for an interface without MAC addresses
    let (events, action) = match is_attached {
        true => asker.ask(link.index, link.mac.unwrap_or_default(), &question)?,
        false => (Vec::new(), TC_ACT_UNSPEC),
    };
    let maps = state_maps::open(&guard)?.context(state_maps::INCOMPLETE)?;
    let flow_names = flows::Names::new(serving.hosts());
    let flow = flow_of(&guard, serving, &flow_names, &question)?;
    drop(guard);

    let mut answer = Answer {
        source: question.source,
        destination: question.destination,
        interface,
        generation: serving.number,
        matched: None,
        misses: Vec::new(),
        example: None,
    };
    if events.is_empty() {
        answer.explain_miss(desired);
        return Ok(Some(answer));
    }
    let mut names = Names::default();
    names.add(serving.clone());
    let rule = names.rule(&events[0]).context("the program reported an unknown rule")?.clone();
    let reading = status::read(&global.store(), netlink, Some(&rule.name), None).await?;
    let neighbours = netlink.neighbours().await.context("neighbours")?;
    let rules = reading.status.rules.iter();
    let rows = rules.flat_map(|rule| rule.destinations().map(|(upstream, _)| upstream));
    let rows = rows.collect();
    let looked = Looked { maps: &maps, rows, neighbours, dry_run: &asker.dry_run, flow };
    answer.matched = Some(looked.matched(rule, &question, &mut names, &events, action)?);
    Ok(Some(answer))
}

/// Returns the flow that a client's packet finds.
fn flow_of<'a>(
    guard: &ReadGuard,
    serving: &Generation,
    names: &'a flows::Names<'_>,
    question: &Question,
) -> anyhow::Result<Option<Flow<'a>>> {
    let client = Some(question.source.into());
    let selection = flows::Selection { client, ..flows::Selection::default() };
    let mut found = None;
    flows::read(guard, serving, names, &selection, |flow| {
        if flow.vip == question.destination {
            found = Some(flow);
        }
    })?;
    Ok(found)
}

// linux/pkt_cls.h
const TC_ACT_UNSPEC: i32 = -1;
const TC_ACT_SHOT: i32 = 2;

fn question(desired: &Desired, options: &Options) -> Result<Question> {
    let Endpoint { address, port } = options.source;
    let to = options.destination;
    if address.is_ipv4() != to.address.is_ipv4() {
        return Err(Failure::Usage("both addresses must be IPv4 or both IPv6".into()));
    }
    let length = options.payload.0.len();
    if length > 60_000 {
        return Err(Failure::Usage("the payload has at most 60000 bytes".into()));
    }
    let port = port.unwrap_or(PORT);
    let to_port = to.port.map_or_else(|| only_port(desired, to.address), Ok)?;
    Ok(Question {
        source: SocketAddr::new(address, port),
        destination: SocketAddr::new(to.address, to_port),
        payload: options.payload.0.clone(),
    })
}

/// Returns the only port that the rules have for an address.
fn only_port(desired: &Desired, address: IpAddr) -> Result<u16> {
    let ports = desired
        .rules
        .iter()
        .filter(|rule| match rule.key.address {
            KeyAddress::Is(key) => key == address,
            KeyAddress::Any => desired.addresses.contains(&address),
        })
        .flat_map(|rule| &rule.key.ports);
    let mut ports: Vec<_> = ports.map(|ports| (ports.first, ports.last)).collect();
    ports.sort_unstable();
    ports.dedup();
    match ports[..] {
        [(first, last)] if first == last => Ok(first),
        _ => {
            let endpoint = with_port(address, "PORT");
            Err(Failure::Usage(format!("which port? give it as {endpoint}")))
        }
    }
}

/// Returns the receiving interface.
fn interface(desired: &Desired, observed: &Observed, named: Option<&str>) -> Result<String> {
    let all = &desired.interfaces;
    let named = named.map(|name| observed.canonical(name));
    match (named.as_deref(), &all[..]) {
        // an interface without rules is a valid answer: no rule matches
        (Some(name), _) if observed.interfaces.contains_key(name) => Ok(name.into()),
        (Some(name), _) => Err(anyhow!("{name}: there is no such interface").into()),
        (None, [only]) => Ok(only.clone()),
        (None, _) => {
            Err(Failure::Usage(format!("which interface? give one with -i: {}", all.join(", "))))
        }
    }
}

/// State besides the events.
struct Looked<'a> {
    maps: &'a StateMaps,
    rows: Vec<&'a UpstreamStatus>,
    neighbours: Vec<Neighbour>,
    dry_run: &'a DryRunProgram,
    /// Flow of packets with the same ends.
    flow: Option<Flow<'a>>,
}

impl Looked<'_> {
    /// Describes events of one packet; there is at least one. `action` is the program's return value.
    fn matched(
        &self,
        rule: Rule,
        question: &Question,
        names: &mut Names,
        events: &[Event],
        action: i32,
    ) -> anyhow::Result<Matched> {
        let outcomes = events.iter().map(|event| self.outcome(event, names));
        let mut outcomes = outcomes.collect::<anyhow::Result<Vec<Outcome>>>()?;
        for outcome in outcomes.iter_mut().filter(|it| rule.has_flows() && !it.copy) {
            outcome.flow = self.flow_to(outcome);
        }
        Ok(Matched {
            key: diff::key(&rule),
            tc_action: rule.action,
            mode: rule.mode,
            selection: self.selection(events, &rule, names)?,
            outcomes,
            server_id: rule.server_id.and_then(|place| {
                quic::server_id(&question.payload, place).map(|id| id.to_string())
            }),
            left_out: senders::left_out(&rule, question.source.ip()),
            packet: match action {
                TC_ACT_SHOT => "dropped",
                TC_ACT_UNSPEC => "delivered",
                _ => "sent",
            },
            rule: rule.name,
        })
    }

    fn outcome(&self, event: &Event, names: &mut Names) -> anyhow::Result<Outcome> {
        let upstream = names.upstream(event).map(|(upstream, copy)| (upstream.clone(), copy));
        let row = self.rows.iter().find(|row| row.id == event.0.upstream);
        let out = (event.0.out != 0).then(|| names.interface(event.0.out));
        // the recorded hop may differ from the one that the kernel chose
        let hop = row.and_then(|row| row.next_hop.as_ref());
        let hop = hop.filter(|hop| Some(&hop.interface) == out.as_ref());
        let gateway = event.gateway().or(hop.map(|hop| hop.gateway));
        let hop = hop.filter(|hop| Some(hop.gateway) == gateway);
        let left = addresses(&event.0.sent);
        let (left, copy) = match &upstream {
            Some((_, copy)) => (left, *copy),
            None => (None, false),
        };
        let condition = match &upstream {
            Some((upstream, _)) => Some(self.state(upstream, event.0.upstream)?),
            None => None,
        };
        Ok(Outcome {
            here: upstream.as_ref().is_some_and(|(upstream, _)| upstream.is_local()),
            upstream: upstream.as_ref().map(|(upstream, _)| upstream.label()),
            endpoint: upstream.as_ref().map(|(upstream, _)| diff::endpoint(upstream)),
            copy,
            sample: upstream.as_ref().map_or(1, |(upstream, _)| upstream.sample),
            health: row.and_then(|row| row.health),
            state: row.map(|row| row.state),
            override_state: row.and_then(|row| row.override_state),
            condition,
            next_hop: out.map(|interface| Hop {
                interface,
                gateway,
                mac: event.mac(),
                state: gateway.and_then(|gateway| self.neighbour(event.0.out, gateway)),
                mtu: hop.and_then(|hop| hop.mtu),
            }),
            source: left.map(|(source, _)| source),
            destination: left.map(|(_, destination)| destination),
            flow: None,
            verdict: event.verdict(),
        })
    }

    /// Returns the flow of a packet that is sent; one to elsewhere makes room for a new one.
    fn flow_to(&self, outcome: &Outcome) -> Option<PacketFlow> {
        let (source, destination) = (outcome.source?, outcome.destination?);
        let known = self.flow.as_ref().filter(|flow| {
            flow.server == destination && flow.egress.is_none_or(|egress| egress == source)
        });
        Some(PacketFlow {
            state: known.map(|flow| flow.state),
            idle_seconds: known.map(|flow| flow.idle),
        })
    }

    /// Returns the state of a next hop, as in `ip neigh`.
    fn neighbour(&self, ifindex: u32, gateway: IpAddr) -> Option<String> {
        let key = (ifindex, gateway);
        let mut all = self.neighbours.iter();
        let found = all.find(|neighbour| (neighbour.ifindex, neighbour.address) == key)?;
        (found.state != NudState::None).then(|| found.state.to_string())
    }

    fn selection(
        &self,
        events: &[Event],
        rule: &Rule,
        names: &Names,
    ) -> anyhow::Result<Option<Selection>> {
        let is_copy = |event: &Event| names.upstream(event).is_some_and(|(_, copy)| copy);
        let Some(event) = events.iter().find(|event| event.is_selected(rule, is_copy(event)))
        else {
            return Ok(None);
        };
        let tables = &self.dry_run.tables;
        let entry = tables.rules.iter().find(|entry| entry.id == event.0.rule);
        let entry = entry.context("the program reported an unknown rule")?;
        let slot = entry.first_slot + event.0.slot;
        let width = types::slot_line::default().upstream.len();
        let line = tables.slots.get(slot as usize / width).context("no such slot")?;
        let owner = usize::from(line.upstream[slot as usize % width]);
        let place = entry.first_upstream as usize + owner;
        let id = tables.upstreams.get(place).context("no such upstream")?.id;
        let owner = rule.upstreams.get(owner).context("no such upstream")?;
        let instead_of = match id == event.0.upstream {
            true => None,
            false => {
                let state = self.state(owner, id)?;
                let row = self.rows.iter().find(|row| row.id == id);
                let evidence = row.and_then(|row| row.evidence.as_ref());
                let why = match (state.starts_with("drained"), evidence) {
                    (true, _) => state.into(),
                    (false, None) => "down".into(),
                    (false, Some(evidence)) => format!("down ({evidence})"),
                };
                Some(format!("{}, which is {why}", diff::endpoint(owner)))
            }
        };
        Ok(Some(Selection {
            of_packet: event.selection(rule.strategy),
            slots: entry.slots,
            instead_of,
        }))
    }

    /// Returns the state of an upstream, as in `status`.
    fn state(&self, upstream: &Upstream, id: u32) -> anyhow::Result<&'static str> {
        let override_state = self.maps.overrides.read(id)?.get(&id).copied();
        Ok(overrides::word(upstream.state, override_state).unwrap_or("active"))
    }
}

/// Parses source and destination of a frame, which may be cut off.
fn addresses(frame: &types::snapshot) -> Option<(SocketAddr, SocketAddr)> {
    let bytes = frame.bytes.get(..frame.captured as usize)?;
    let packet = LaxSlicedPacket::from_ethernet(bytes).ok()?;
    let (source, destination): (IpAddr, IpAddr) = match packet.net? {
        LaxNetSlice::Ipv4(ip) => {
            (ip.header().source_addr().into(), ip.header().destination_addr().into())
        }
        LaxNetSlice::Ipv6(ip) => {
            (ip.header().source_addr().into(), ip.header().destination_addr().into())
        }
        LaxNetSlice::Arp(_) => return None,
    };
    let TransportSlice::Udp(udp) = packet.transport? else { return None };
    let source = SocketAddr::new(source, udp.source_port());
    Some((source, SocketAddr::new(destination, udp.destination_port())))
}

impl Answer {
    pub fn matched(&self) -> bool {
        self.matched.is_some()
    }

    fn explain_miss(&mut self, desired: &Desired) {
        let (source, destination) = (self.source.ip(), self.destination);
        self.misses = miss::explain(desired, source, destination, &self.interface);
        self.example = self.misses.first().and_then(|miss| {
            let rule = desired.rules.iter().find(|rule| rule.name == miss.rule)?;
            miss.example(rule, source, destination)
        });
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Answer { source, destination, interface, generation, .. } = self;
        let Some(matched) = &self.matched else {
            writeln!(
                f,
                "no rule matches {destination} from {source} on {interface} (generation {generation}): \
                 the packet is let alone"
            )?;
            for Miss { rule, text, .. } in &self.misses {
                writeln!(f, "rule {rule} {text}")?;
            }
            return match &self.example {
                Some(example) => writeln!(f, "would match: udplb get {example}"),
                None => Ok(()),
            };
        };
        let action = match matched.tc_action {
            Action::Pass => "pass",
            Action::Block => "block",
        };
        let mode = if matched.mode == Mode::Replicate { " replicate" } else { "" };
        let mut line = |title: &str, text: &str| writeln!(f, "{title:10}{text}");
        line("packet", &format!("{source} > {destination} on {interface}"))?;
        let Matched { rule, key, .. } = matched;
        line("rule", &format!("{rule}: {key} {action}{mode}, generation {generation}"))?;
        if let Some(selection) = &matched.selection {
            let Selection { of_packet, slots, instead_of } = selection;
            let event::Selection { strategy, value, number, slot } = of_packet;
            let key = value.as_ref().map(|key| format!(" {key}")).unwrap_or_default();
            line("key", &format!("{strategy}{key}, as a number {number}"))?;
            let instead = instead_of.as_ref().map(|of| format!(", of {of}"));
            line("slot", &format!("{slot} of {slots}{}", instead.unwrap_or_default()))?;
        }
        if let Some(id) = &matched.server_id {
            line("server id", id)?;
        }
        for outcome in &matched.outcomes {
            outcome.lines(&mut line)?;
        }
        for LeftOut { upstream, not_from } in &matched.left_out {
            let why = match not_from {
                Some(network) => format!("no packets from {network}"),
                None => "only packets from other senders".into(),
            };
            line("left out", &format!("{upstream}: it gets {why}"))?;
        }
        let is_here = matched.outcomes.iter().any(|outcome| outcome.here);
        match (matched.packet, matched.tc_action) {
            ("delivered", Action::Block) if is_here => Ok(()),
            ("delivered", _) => line("here", "delivered as it came"),
            ("dropped", _) => line("here", "not delivered"),
            _ => Ok(()),
        }
    }
}

impl Outcome {
    fn lines(&self, line: &mut impl FnMut(&str, &str) -> fmt::Result) -> fmt::Result {
        if let Some(endpoint) = &self.endpoint {
            let mut text = endpoint.clone();
            for word in self.health.into_iter().chain(self.condition) {
                write!(text, ", {word}")?;
            }
            if self.sample > 1 {
                write!(text, ", one packet in {}", self.sample)?;
            }
            line(if self.copy { "copy to" } else { "upstream" }, &text)?;
        }
        if let Some(Hop { interface, gateway: Some(gateway), mac, state, mtu }) = &self.next_hop {
            let mut text = format!("{gateway} dev {interface}");
            for word in [mac, state].into_iter().flatten() {
                write!(text, " {word}")?;
            }
            if let Some(mtu) = mtu {
                write!(text, ", MTU {mtu}")?;
            }
            line("next hop", &text)?;
        }
        if let (Some(source), Some(destination)) = (self.source, self.destination) {
            line(
                if self.here { "here" } else { "leaves as" },
                &format!("{source} > {destination}"),
            )?;
        }
        match &self.flow {
            Some(PacketFlow { state: Some(state), idle_seconds }) => {
                let idle = time::age(idle_seconds.unwrap_or(0.0) as u64);
                line("flow", &format!("{}, idle for {idle}", state.word()))?;
            }
            Some(_) => line("flow", "new, with the port that it would get now")?,
            None => {}
        }
        line("verdict", self.verdict)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_have_lengths_and_checksums() {
        for (source, destination, wanted) in [
            (
                "10.0.0.9:5000",
                "10.0.0.5:53",
                "08004500001f00004000401126c10a0000090a00000513880035000b04a96f6464",
            ),
            (
                "[2001:db8::9]:5000",
                "[2001:db8::5]:53",
                "86dd60000000000b114020010db800000000000000000000000920010db800000000000000000000000513880035000bbd366f6464",
            ),
        ] {
            let question = Question {
                source: source.parse().expect("an address"),
                destination: destination.parse().expect("an address"),
                payload: b"odd".to_vec(),
            };
            let frame = frame(&question, [2, 0, 0, 0, 0, 1]);
            let hex: String = frame.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(hex, format!("0200000000010200000000ff{wanted}"));
        }
    }

    #[test]
    fn endpoints() {
        let endpoint = |text: &str| text.parse::<Endpoint>().ok().map(|it| (it.address, it.port));
        let v4 = IpAddr::from([10, 0, 0, 9]);
        let v6: IpAddr = "2001:db8::9".parse().expect("an address");
        assert_eq!(endpoint("10.0.0.9"), Some((v4, None)));
        assert_eq!(endpoint("10.0.0.9:53"), Some((v4, Some(53))));
        assert_eq!(endpoint("2001:db8::9"), Some((v6, None)));
        assert_eq!(endpoint("[2001:db8::9]"), Some((v6, None)));
        assert_eq!(endpoint("[2001:db8::9]:53"), Some((v6, Some(53))));
        assert_eq!(endpoint("host:53"), None);
    }
}
