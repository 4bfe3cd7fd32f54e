//! The contents of a generation's maps, and the share of flows that a change moves. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;

use foldhash::{HashMap, HashMapExt};

use crate::bpf::types::{self, rule_flags as flags};
use crate::bpf::wire;
use crate::config::{
    Action, Admission, AllDown, Fragments, Hash, Health, KeyAddress, Mode, Network, Payload, Ports,
    Reply, ServerIdPlace, Source, State, Strategy, StrategyPart, Templates, Via,
};
use crate::desired::key_table::{Key4, Key6};
use crate::desired::sender_tables::SenderTable;
use crate::desired::senders::{self, Share, Shares};
use crate::desired::{Desired, Rule, RuleIds, Upstream, flow};
use crate::maglev::{self, Member};

/// Contents of a generation's maps for the packet path.
#[derive(Default)]
pub struct Tables {
    /// The rules of the configuration in their order, then variants of them for some keys.
    pub rules: Vec<types::rule>,
    /// The keys with their entries.
    pub keys: Vec<(Key4, u32)>,
    pub keys6: Vec<(Key6, u32)>,
    /// Networks of senders with the rule's index in `rules`.
    pub senders: Vec<(types::sender_key, u32)>,
    pub addresses: Vec<(types::key_address, u32)>,
    pub answers: Vec<(types::answer_key, u32)>,
    /// Addresses and ports that answers are routed from, with the index in `upstreams` of their entry.
    pub origins: Vec<(types::destination_key, u32)>,
    /// Upstreams of rules with flows by id.
    pub indexes: Vec<(u32, u32)>,
    /// Upstreams by their ids in connection ids.
    pub servers: Vec<(types::server_key, u32)>,
    /// Entry of answers of flows whose upstream is not among `upstreams`.
    pub orphans: u32,
    /// Tables of the rules that count their senders.
    pub sender_tables: Vec<SenderTable>,
    pub slots: Vec<types::slot_line>,
    pub upstreams: Vec<types::upstream>,
    /// The upstreams by address and port.
    pub destinations: Vec<(types::destination_key, types::destination)>,
    pub decap: types::decap_settings,
    /// Features of the packet path in use; its number and the kernel's clock are set later.
    pub features: types::features,
}

impl Tables {
    /// Returns the tables; `ids` are those of `desired`. Ports and addresses are in network byte order.
    pub fn new(desired: &Desired, ids: &[RuleIds]) -> Tables {
        let mut tables = Tables::default();
        let mut slots = Slots::default();
        for (rule, ids) in desired.rules.iter().zip(ids) {
            let value = types::rule {
                flags: flags_of(rule, desired),
                ..tables.rule(rule, ids, &mut slots)
            };
            tables.rules.push(value);
        }
        tables.slots = slots.lines();
        tables.destinations = by_destination(&tables.upstreams);
        tables.answers = answers(desired, ids);
        tables.indexes = indexes(desired, ids);
        tables.servers = servers(desired, ids);
        tables.answer_entries(desired, ids);
        tables.orphans(desired);
        tables.source_entries(desired);
        // last, since they repeat upstreams
        tables.keys(desired);
        tables.features = features(desired, &tables);
        tables.decap(desired);
        tables
    }

    /// Adds the networks whose outer headers are taken off, as a group of senders for each family.
    fn decap(&mut self, desired: &Desired) {
        let Some(decap) = &desired.decap else { return };
        let [senders, senders6] = DECAP_SENDERS;
        for network in &decap.from {
            let group = if network.address.is_ipv6() { senders6 } else { senders };
            self.senders.push((sender_key(group, *network), NO_RULE));
        }
        let takes = |via| decap.via.contains(&via).into();
        self.decap = types::decap_settings {
            senders,
            senders6,
            ipip: takes(Via::Ipip),
            gue: takes(Via::Gue),
            ..Default::default()
        };
    }

    /// Appends an entry for the answers of each upstream of rules with `reply`.
    fn answer_entries(&mut self, desired: &Desired, ids: &[RuleIds]) {
        let firsts = Vec::from_iter(first_upstreams(desired));
        let mut origins = BTreeMap::new();
        for (index, ((rule, ids), first)) in desired.rules.iter().zip(ids).zip(firsts).enumerate() {
            for (place, (upstream, id)) in (first..).zip(rule.upstreams.iter().zip(&ids.answers)) {
                let entry = self.upstreams.len() as u32;
                let rule_index = index as u32;
                let answers = types::upstream {
                    id: *id,
                    rule: rule_index,
                    line: entry,
                    ..Default::default()
                };
                match rule.reply {
                    Reply::None | Reply::Direct => {}
                    Reply::Route => self.origin(rule, upstream, answers, &mut origins),
                    Reply::Nat => {
                        let source = types::source::SOURCE_FLOW_VIP;
                        self.upstreams.push(types::upstream { source, ..answers });
                        self.upstreams[place as usize].linked = entry;
                    }
                }
            }
        }
        let key = |(address, port)| types::destination_key { address, port, unused: 0 };
        self.origins = origins.into_iter().map(|(from, entry)| (key(from), entry)).collect();
    }

    /// Appends the entry of routed answers. Where two upstreams have the same address and port, the first one's
    /// answers are recognised.
    fn origin(
        &mut self,
        rule: &Rule,
        upstream: &Upstream,
        answers: types::upstream,
        origins: &mut BTreeMap<([u32; 4], u16), u32>,
    ) {
        let KeyAddress::Is(vip) = rule.key.address else { return };
        let port = rule.key.only_port();
        let from = (wire(upstream.address.ip), upstream.port.or(port).unwrap_or(0).to_be());
        origins.entry(from).or_insert(self.upstreams.len() as u32);
        self.upstreams.push(types::upstream {
            address: wire(vip),
            port: port.unwrap_or(0).to_be(),
            source: types::source::SOURCE_ORIGIN,
            ..answers
        });
    }

    /// Appends the entry for answers of flows whose upstream has been removed.
    fn orphans(&mut self, desired: &Desired) {
        let rule = desired.rules.iter().position(|rule| rule.reply == Reply::Nat);
        let Some(rule) = rule else { return };
        self.orphans = self.upstreams.len() as u32;
        let source = types::source::SOURCE_FLOW_VIP;
        self.upstreams.push(types::upstream {
            source,
            rule: rule as u32,
            line: self.orphans,
            ..Default::default()
        });
    }

    /// Appends an entry for each source that is an address, and links the upstreams that have it.
    fn source_entries(&mut self, desired: &Desired) {
        let mut entries = HashMap::new();
        let hosts = desired
            .rules
            .iter()
            .flat_map(|rule| rule.destinations().map(move |upstream| rule.source_of(upstream)));
        for (place, source) in hosts.enumerate() {
            let Source::Fixed { address, port } = source else { continue };
            self.upstreams[place].linked = *entries.entry(source).or_insert_with(|| {
                let line = self.upstreams.len() as u32;
                let port = port.unwrap_or(0).to_be();
                let address = wire(address);
                self.upstreams.push(types::upstream { address, port, line, ..Default::default() });
                line
            });
        }
    }

    /// Returns a rule's value for a key that is no group's and has one rule for all senders.
    fn rule(&mut self, rule: &Rule, ids: &RuleIds, slots: &mut Slots) -> types::rule {
        let replicates = rule.mode == Mode::Replicate;
        let mut twins = HashMap::new();
        let mut duplicate = |upstream: &Upstream, balanced: bool| {
            // on this host the packet itself may be received too
            let least = u8::from(upstream.is_local());
            let next = twins.entry(upstream.address.ip).or_insert(least);
            let before = if balanced { least } else { *next };
            *next = before.saturating_add(1);
            before
        };
        let to_one = !replicates && !copies_templates(rule);
        let upstreams = self.destinations(rule, &rule.upstreams, &ids.upstreams, |upstream| {
            duplicate(upstream, to_one)
        });
        let mirrors =
            self.destinations(rule, &rule.mirrors, &ids.mirrors, |mirror| duplicate(mirror, false));
        let (first_receiver, receivers) = if replicates { upstreams } else { mirrors };
        let (first_slot, slots) = if replicates { (0, 0) } else { slots.place(rule) };
        let server_id = rule.server_id.map(|place| (place.offset.into(), place.length));
        let (payload_offset, payload_length) =
            rule.payload.and_then(Payload::bytes).or(server_id).unwrap_or_default();
        types::rule {
            id: ids.rule,
            senders: 0,
            flags: flags(0),
            action: action(rule.action),
            strategy: strategy(rule),
            parts: parts(rule),
            fragments: fragments(rule.fragments),
            first_slot,
            slots,
            first_upstream: upstreams.0,
            first_receiver,
            // at most 64 and 65,535
            receivers: receivers as u16,
            upstreams: upstreams.1 as u16,
            payload_offset,
            payload_length: payload_length.into(),
            answers: rule.answers.unwrap_or(0),
            sender_table: self.sender_table(rule, ids),
            refused_table: NO_TABLE,
        }
    }

    /// Appends the table of a rule's senders, if it counts them, and returns its number.
    fn sender_table(&mut self, rule: &Rule, ids: &RuleIds) -> types::sender_table {
        let Some(senders) = rule.senders else { return NO_TABLE };
        let table = SenderTable::new(ids.rule, senders);
        self.sender_tables.push(table);
        table.number(self.sender_tables.len() - 1)
    }

    /// Returns the table of senders that no rule of a key takes: that of the key's first rule that has one.
    fn refused_table(&self, shares: &Shares) -> types::sender_table {
        let rules = shares.iter().filter_map(|(_, share)| Some(share.as_ref()?.rule));
        let counting = rules.filter(|rule| self.rules[*rule].sender_table != NO_TABLE);
        counting.min().map_or(NO_TABLE, |rule| {
            let refused = types::sender_table::TABLE_REFUSED.0;
            types::sender_table(self.rules[rule].sender_table.0 | refused)
        })
    }

    /// Appends upstreams or mirrors of a rule; returns the index of the first and their number.
    fn destinations(
        &mut self,
        rule: &Rule,
        list: &[Upstream],
        ids: &[u32],
        mut duplicate: impl FnMut(&Upstream) -> u8,
    ) -> (u32, u32) {
        let first = self.upstreams.len() as u32;
        let rule_index = self.rules.len() as u32;
        self.upstreams.extend((first..).zip(list.iter().zip(ids)).map(|(line, (upstream, id))| {
            types::upstream {
                id: *id,
                address: wire(upstream.address.ip),
                port: upstream.port.unwrap_or(0).to_be(),
                source: source_for(rule, upstream, list),
                via: if upstream.is_local() {
                    types::via::VIA_HERE
                } else {
                    via(rule.via_of(upstream))
                },
                drained: (upstream.state == State::Drained).into(),
                duplicate: duplicate(upstream),
                sample: upstream.sample,
                rule: rule_index,
                linked: 0,
                line,
            }
        }));
        (first, list.len() as u32)
    }

    fn keys(&mut self, desired: &Desired) {
        let keys = Keys::new(desired);
        let mut variants = Variants::default();
        let mut known: HashMap<(Vec<Vec<usize>>, bool), Shares> = HashMap::new();
        let mut groups: HashMap<(Shares, bool), u32> = HashMap::new();
        for (address, port) in keys.places() {
            let nearest = keys.nearest(address, port);
            let group = is_group(desired, address);
            let everybody = Network::new(address, 0);
            // as most keys have it, and nothing of it is worth remembering
            if let Some(share) = senders::only_share(&desired.rules, &nearest, everybody) {
                let index = variants.index(self, share, group, 0);
                self.key(address, port, index);
                continue;
            }
            let shares = known.entry((nearest, address.is_ipv4()));
            let shares: &Shares = shares.or_insert_with_key(|(nearest, _)| {
                senders::shares(&desired.rules, nearest, everybody)
            });
            let Some(first) = shares.iter().find_map(|(_, share)| *share) else { continue };
            let senders = match shares[..] {
                [(network, Some(_))] if network.prefix == 0 => 0,
                _ => {
                    let next = groups.len() as u32 + 1;
                    *groups.entry((shares.clone(), group)).or_insert_with(|| {
                        for (network, share) in shares {
                            let index = share.map(|share| variants.index(self, share, group, 0));
                            self.senders
                                .push((sender_key(next, *network), index.unwrap_or(NO_RULE)));
                        }
                        next
                    })
                }
            };
            let index = variants.index(self, first, group, senders);
            if senders != 0 {
                self.rules[index as usize].refused_table = self.refused_table(shares);
            }
            self.key(address, port, index);
        }
        self.addresses = keys
            .claims
            .keys()
            .map(|address| (types::key_address { words: wire(*address) }, 1))
            .collect();
    }

    /// Appends a key that leads to a rule.
    fn key(&mut self, address: IpAddr, port: u16, index: u32) {
        let entry = self.entry(index);
        match address {
            IpAddr::V4(address) => self.keys.push((Key4 { address, port }, entry)),
            IpAddr::V6(address) => self.keys6.push((Key6 { address, port }, entry)),
        }
    }

    /// Appends the upstreams of a rule's receivers in `chosen` once more, and returns the index of the first.
    fn repeat_receivers(&mut self, rule: &types::rule, chosen: u64) -> u32 {
        let first = self.upstreams.len() as u32;
        let receivers = rule.first_receiver as usize..;
        for (place, index) in receivers.take(rule.receivers.into()).enumerate() {
            if chosen >> place & 1 == 1 {
                self.upstreams.push(self.upstreams[index]);
            }
        }
        first
    }
}

/// Groups in `senders` of `decap`, of IPv4 and of IPv6; those of rules are counted from 1.
const DECAP_SENDERS: [u32; 2] = [u32::MAX - 1, u32::MAX];

/// Index in `rules` of senders that match no rule.
const NO_RULE: u32 = u32::MAX;

/// Table of senders that are not counted.
const NO_TABLE: types::sender_table = types::sender_table(0);

impl Tables {
    /// Returns the entry of a key that leads to a rule: its kind tells the fast path how to send.
    fn entry(&self, index: u32) -> u32 {
        use types::entry as entries;
        let rule = &self.rules[index as usize];
        let slow = flags::RULE_OF_GROUP.0 | flags::RULE_SOCKETS.0 | flags::RULE_STICKY.0;
        let has_flows = rule.flags.0 & flags::RULE_FLOWS.0 != 0;
        let first = rule.first_receiver;
        // the fast path finds lines by the index of the upstream
        let is_slow = |(index, receiver): (u32, &types::upstream)| {
            receiver.sample > 1 || receiver.line != index || self.has_no_line(receiver)
        };
        let is_only_slow = || {
            self.upstreams.get(rule.first_upstream as usize).is_some_and(|it| self.has_no_line(it))
        };
        let receivers = || (first..).zip(self.upstreams.iter().skip(first as usize));
        let has_slow = || receivers().take(rule.receivers.into()).any(is_slow);
        let fast = match rule.action {
            types::action::ACTION_BLOCK => entries::ENTRY_BLOCK,
            _ => entries::ENTRY_PASS,
        };
        let (kind, index) = match (rule.receivers, rule.upstreams) {
            _ if rule.senders != 0 || rule.flags.0 & slow != 0 => (entries::ENTRY_RULE, index),
            // a connection id comes before the flow, and leads to an upstream that is drained for others
            _ if rule.strategy == types::strategy::STRATEGY_QUIC_CID => {
                (entries::ENTRY_RULE, index)
            }
            // the fast path of flows has no stack left to count senders
            (0, _) if has_flows && rule.sender_table == NO_TABLE => (entries::ENTRY_FLOW, index),
            _ if has_flows => (entries::ENTRY_RULE, index),
            (1.., _) if rule.flags.0 & flags::RULE_REPLICATES.0 != 0 && !has_slow() => {
                (entries::ENTRY_REPLICATE, index)
            }
            (0, 1) if is_only_slow() => (entries::ENTRY_RULE, index),
            (0, 1) if rule.sender_table == NO_TABLE => (fast, rule.first_upstream),
            // the rule has the table
            (0, 1) => (entries::ENTRY_BALANCE, index),
            (0, 2..) if !reads_payload(rule) => (entries::ENTRY_BALANCE, index),
            _ => (entries::ENTRY_RULE, index),
        };
        kind.0 | index
    }

    /// Returns true for an upstream that the slow path fills no line for: one on this host, or a source with a
    /// port.
    fn has_no_line(&self, upstream: &types::upstream) -> bool {
        let is_fixed = upstream.source == types::source::SOURCE_FIXED;
        let has_port = || self.upstreams[upstream.linked as usize].port != 0;
        upstream.via == types::via::VIA_HERE || is_fixed && has_port()
    }
}

fn reads_payload(rule: &types::rule) -> bool {
    use types::strategy as by;
    let parts = types::parts::PART_PAYLOAD.0 | types::parts::PART_METRIC.0;
    let whole = [by::STRATEGY_PAYLOAD, by::STRATEGY_STATSD, by::STRATEGY_QUIC_CID];
    whole.contains(&rule.strategy) || rule.parts.0 & parts != 0
}

/// Indices of the rules' variants: with some of the receivers, for groups, and with this group of senders.
#[derive(Default)]
struct Variants(HashMap<(Share, bool, u32), u32>);

impl Variants {
    /// Returns the index of a rule's variant and adds it where it is missing.
    fn index(&mut self, tables: &mut Tables, share: Share, group: bool, senders: u32) -> u32 {
        let rule = tables.rules[share.rule];
        let all = share.receivers.count_ones() == u32::from(rule.receivers);
        if all && !group && senders == 0 {
            return share.rule as u32;
        }
        *self.0.entry((share, group, senders)).or_insert_with(|| {
            let mut variant = types::rule { senders, ..rule };
            if group {
                variant.flags.0 |= flags::RULE_OF_GROUP.0;
            }
            if !all {
                variant.first_receiver = tables.repeat_receivers(&rule, share.receivers);
                variant.receivers = share.receivers.count_ones() as u16;
            }
            tables.rules.push(variant);
            tables.rules.len() as u32 - 1
        })
    }
}

/// Returns the upstreams by address and port, with the sources of all upstreams there merged.
fn by_destination(
    upstreams: &[types::upstream],
) -> Vec<(types::destination_key, types::destination)> {
    let mut destinations = BTreeMap::new();
    for upstream in upstreams.iter().filter(|it| it.via != types::via::VIA_HERE) {
        let destination = destinations.entry((upstream.address, upstream.port));
        let new = types::destination { upstream: upstream.id, sources: 0 };
        destination.or_insert(new).sources |= 1 << upstream.source.0;
    }
    let key = |(address, port)| types::destination_key { address, port, unused: 0 };
    destinations.into_iter().map(|(place, destination)| (key(place), destination)).collect()
}

/// The rules by address and port; port 0 means any.
struct Keys {
    claims: BTreeMap<IpAddr, BTreeMap<u16, Vec<RuleClaim>>>,
}

/// True if the rule has any address, and the rule's index.
type RuleClaim = (bool, usize);

impl Keys {
    fn new(desired: &Desired) -> Keys {
        let mut claims: BTreeMap<IpAddr, BTreeMap<u16, Vec<RuleClaim>>> = BTreeMap::new();
        for (index, rule) in desired.rules.iter().enumerate() {
            let family = rule.family();
            let (any, addresses) = match rule.key.address {
                KeyAddress::Is(address) => (false, vec![address]),
                KeyAddress::Any => {
                    let all = desired.addresses.iter().copied();
                    (true, all.filter(|address| family == (*address).into()).collect())
                }
            };
            for address in addresses {
                let ports = claims.entry(address).or_default();
                let mut claim = |port| ports.entry(port).or_default().push((any, index));
                match rule.key.ports.is_empty() {
                    true => claim(0),
                    false => rule
                        .key
                        .ports
                        .iter()
                        .flat_map(|ports| ports.first..=ports.last)
                        .for_each(claim),
                }
            }
        }
        Keys { claims }
    }

    fn places(&self) -> impl Iterator<Item = (IpAddr, u16)> {
        self.claims
            .iter()
            .flat_map(|(address, ports)| ports.keys().map(move |port| (*address, *port)))
    }

    /// Returns the rules at a place by nearness: exact addresses come before `any`, then exact ports.
    fn nearest(&self, address: IpAddr, port: u16) -> Vec<Vec<usize>> {
        let ports = &self.claims[&address];
        let mut nearest = Vec::new();
        for any in [false, true] {
            for port in [Some(port), Some(0).filter(|any_port| *any_port != port)] {
                let claims = port.and_then(|port| ports.get(&port)).into_iter().flatten();
                let level = claims.filter(|(claims_any, _)| *claims_any == any);
                nearest.push(level.map(|(_, rule)| *rule).collect());
            }
        }
        nearest.retain(|level: &Vec<usize>| !level.is_empty());
        nearest
    }
}

/// Returns true if a rule takes answers to this host's own sockets. A single port is assumed to
/// belong to the rule.
pub fn takes_answers(rule: &Rule, local: Option<Ports>) -> bool {
    let meets = |local: Ports, ports: &Ports| {
        ports.first < ports.last && ports.first <= local.last && local.first <= ports.last
    };
    let ports = &rule.key.ports;
    rule.action == Action::Block
        && local
            .is_some_and(|local| ports.is_empty() || ports.iter().any(|ports| meets(local, ports)))
}

/// Returns the index of each rule's first upstream in the table of all.
pub fn first_upstreams(desired: &Desired) -> impl Iterator<Item = u32> {
    desired.rules.iter().scan(0, |next, rule| {
        let first = *next;
        *next += (rule.upstreams.len() + rule.mirrors.len()) as u32;
        Some(first)
    })
}

/// Returns the places of upstreams that have flows, by id.
fn indexes(desired: &Desired, ids: &[RuleIds]) -> Vec<(u32, u32)> {
    let rules = desired.rules.iter().zip(ids).zip(first_upstreams(desired));
    let with_flows = rules.filter(|((rule, _), _)| rule.has_flows());
    with_flows.flat_map(|((_, ids), first)| ids.upstreams.iter().copied().zip(first..)).collect()
}

/// Returns the places of upstreams that connection ids name.
fn servers(desired: &Desired, ids: &[RuleIds]) -> Vec<(types::server_key, u32)> {
    let rules = desired.rules.iter().zip(ids).zip(first_upstreams(desired));
    let all = rules.flat_map(|((rule, ids), first)| {
        (first..).zip(&rule.upstreams).filter_map(|(index, upstream)| {
            let server = upstream.server_id.as_ref()?.number();
            Some((types::server_key { server, rule: ids.rule, unused: 0 }, index))
        })
    });
    all.collect()
}

/// Returns the sources of upstreams' answers. A host that is no sender of a rule never looks them up.
fn answers(desired: &Desired, ids: &[RuleIds]) -> Vec<(types::answer_key, u32)> {
    let mut answers = Vec::new();
    for (rule, ids) in desired.rules.iter().zip(ids) {
        for upstream in rule.destinations() {
            let address = upstream.address.ip;
            if rule.key.admits(address) && !upstream.is_local() {
                answers.push((wire(address), ids.rule, upstream.port.unwrap_or(0).to_be()));
            }
        }
    }
    answers.sort_unstable();
    answers.dedup();
    let key = |(address, rule, port)| types::answer_key { address, rule, port, unused: 0 };
    answers.into_iter().map(|answer| (key(answer), 1)).collect()
}

/// Returns true for multicast and broadcast addresses.
pub fn is_group(desired: &Desired, address: IpAddr) -> bool {
    address.is_multicast()
        || address == IpAddr::from([255; 4])
        || desired.broadcasts.contains(&address)
}

fn sender_key(senders: u32, network: Network) -> types::sender_key {
    types::sender_key {
        bits: u32::BITS + u32::from(network.prefix),
        senders,
        address: wire(network.address),
    }
}

/// All slot tables, concatenated; rules with equal tables share one.
#[derive(Default)]
struct Slots {
    all: Vec<u16>,
    placed: HashMap<SlotTable, (u32, u32)>,
}

/// The input of a table.
#[derive(PartialEq, Eq, std::hash::Hash)]
pub(super) enum SlotTable {
    /// Upstreams in their order, by place.
    InTurn(Vec<u16>),
    /// Upstreams by place, identity and weight.
    Maglev(Vec<(u16, String, u32)>),
}

impl SlotTable {
    pub(super) fn of(rule: &Rule) -> SlotTable {
        // at most 65,535
        let preferred = rule.preferred().map(|(place, upstream)| (place as u16, upstream));
        if rule.hash == Hash::Modulo || rule.preferred().count() < 2 {
            return SlotTable::InTurn(preferred.map(|(place, _)| place).collect());
        }
        let member = |(place, upstream)| (place, identity(upstream), upstream.weight);
        SlotTable::Maglev(preferred.map(member).collect())
    }

    /// Returns the index of the rule's upstream in each slot.
    pub(super) fn slots(&self) -> Vec<u16> {
        match self {
            SlotTable::InTurn(places) => places.clone(),
            SlotTable::Maglev(list) => {
                let members: Vec<Member<'_>> = list
                    .iter()
                    .map(|(_, identity, weight)| Member {
                        identity: identity.as_bytes(),
                        weight: *weight,
                    })
                    .collect();
                let weights: Vec<u32> = members.iter().map(|member| member.weight).collect();
                // Weights without a table are refused when a file is read.
                let size = maglev::size(&weights).unwrap_or(maglev::LARGEST);
                let slots = maglev::table(&members, size);
                slots.into_iter().map(|member| list[usize::from(member)].0).collect()
            }
        }
    }
}

/// Returns the text that an upstream's slots are hashed from, the same on every machine.
fn identity(upstream: &Upstream) -> String {
    match upstream.port {
        Some(port) => format!("{} {port}", upstream.address),
        None => upstream.address.to_string(),
    }
}

impl Slots {
    /// Adds the rule's table; returns its first slot and its length.
    fn place(&mut self, rule: &Rule) -> (u32, u32) {
        let table = SlotTable::of(rule);
        if let Some(place) = self.placed.get(&table) {
            return *place;
        }
        let slots = table.slots();
        let place = (self.all.len() as u32, slots.len() as u32);
        self.all.extend_from_slice(&slots);
        self.placed.insert(table, place);
        place
    }

    fn lines(&self) -> Vec<types::slot_line> {
        let mut line = types::slot_line::default();
        let width = line.upstream.len();
        self.all
            .chunks(width)
            .map(|chunk| {
                line.upstream = Default::default();
                line.upstream[..chunk.len()].copy_from_slice(chunk);
                line
            })
            .collect()
    }
}

fn features(desired: &Desired, tables: &Tables) -> types::features {
    let any = |is: &dyn Fn(&Rule) -> bool| desired.rules.iter().any(is).into();
    let extras = types::extras {
        any_port: any(&|rule| rule.key.ports.is_empty()),
        senders: (!tables.senders.is_empty()).into(),
        payload: any(&|rule| rule.strategy.reads_payload()),
        origins: (!tables.origins.is_empty()).into(),
        flows: any(&Rule::has_flows),
        direct: any(&|rule| rule.reply == Reply::Direct),
        tunnels: any(&|rule| rule.upstreams.iter().any(|it| is_tunnel(rule.via_of(it)))),
        parts: any(&|rule| strategy(rule) == types::strategy::STRATEGY_PARTS),
        sources: any(&|rule| rule.destinations().any(|it| rule.source_of(it).fixed().is_some())),
        decap: desired.decap.is_some().into(),
        sender_tables: (!tables.sender_tables.is_empty()).into(),
        here: any(&|rule| rule.destinations().any(Upstream::is_local)),
        quic: (!tables.servers.is_empty()).into(),
        templates: any(&copies_templates),
    };
    types::features {
        extras,
        ipv6: (!tables.keys6.is_empty()).into(),
        fragments: any(&|rule| rule.fragments != Fragments::Pass),
        receivers: tables.rules_with_receivers().into(),
        copies: any(&|rule| rule.action == Action::Pass || rule.mode == Mode::Replicate),
        errors: any(&|rule| rule.action == Action::Block && rule.mode == Mode::Balance),
        sockets: any(&|rule| takes_answers(rule, desired.local_ports)),
        ..Default::default()
    }
}

impl Tables {
    /// Returns the number of upstreams: all, if any gets samples.
    pub fn samples(&self) -> usize {
        let any = self.upstreams.iter().any(|upstream| upstream.sample > 1);
        if any { self.upstreams.len() } else { 0 }
    }

    fn rules_with_receivers(&self) -> bool {
        self.rules.iter().any(|rule| rule.receivers > 0)
    }
}

fn flags_of(rule: &Rule, desired: &Desired) -> flags {
    let set = [
        (flags::RULE_REPLICATES, rule.mode == Mode::Replicate),
        (flags::RULE_SKIPS_DOWN, rule.health != Health::Off),
        (flags::RULE_NEEDS_UP, rule.all_down == AllDown::Drop),
        (flags::RULE_HASHES, is_hashed(rule)),
        (flags::RULE_NO_CHECKSUM, rule.zero_checksum == Admission::Allow),
        (flags::RULE_MARTIANS, rule.martians == Admission::Allow),
        (flags::RULE_SOCKETS, takes_answers(rule, desired.local_ports)),
        (flags::RULE_REPLIES, matches!(rule.reply, Reply::Direct | Reply::Route)),
        (flags::RULE_FLOWS, rule.reply == Reply::Nat),
        (flags::RULE_STICKY, rule.sticky),
        (flags::RULE_TEMPLATES, copies_templates(rule)),
    ]
    .into_iter()
    .filter(|(_, is)| *is);
    flags(set.fold(0, |all, (flag, _)| all | flag.0))
}

/// Returns true if there are hosts that get datagrams with templates and not all others.
fn copies_templates(rule: &Rule) -> bool {
    let several = rule.mode == Mode::Balance && rule.upstreams.len() > 1;
    rule.templates == Templates::All && (several || rule.destinations().any(|it| it.sample > 1))
}

/// Returns true if the selection key is a hash: where several parts select together, there is no number.
fn is_hashed(rule: &Rule) -> bool {
    rule.hash == Hash::Maglev || matches!(rule.strategy, Strategy::Parts(_))
}

fn action(action: Action) -> types::action {
    match action {
        Action::Pass => types::action::ACTION_PASS,
        Action::Block => types::action::ACTION_BLOCK,
    }
}

fn strategy(rule: &Rule) -> types::strategy {
    match (rule.strategy, rule.payload) {
        (Strategy::SrcPort, _) => types::strategy::STRATEGY_SRC_PORT,
        (Strategy::SrcIp, _) => types::strategy::STRATEGY_SRC_IP,
        (Strategy::SrcIpPort, _) => types::strategy::STRATEGY_SRC_IP_PORT,
        (Strategy::Random, _) => types::strategy::STRATEGY_RANDOM,
        (Strategy::Payload, Some(Payload::Statsd)) => types::strategy::STRATEGY_STATSD,
        (Strategy::Payload, _) => types::strategy::STRATEGY_PAYLOAD,
        (Strategy::DstPort | Strategy::Parts(_), _) => types::strategy::STRATEGY_PARTS,
        (Strategy::QuicCid, _) => types::strategy::STRATEGY_QUIC_CID,
    }
}

/// Returns the parts of STRATEGY_PARTS.
fn parts(rule: &Rule) -> types::parts {
    let bit = |part| match (part, rule.payload) {
        (StrategyPart::SrcIp, _) => types::parts::PART_SRC_IP,
        (StrategyPart::SrcPort, _) => types::parts::PART_SRC_PORT,
        (StrategyPart::DstPort, _) => types::parts::PART_DST_PORT,
        (StrategyPart::Payload, Some(Payload::Statsd)) => types::parts::PART_METRIC,
        (StrategyPart::Payload, _) => types::parts::PART_PAYLOAD,
    };
    types::parts(match rule.strategy {
        Strategy::DstPort => bit(StrategyPart::DstPort).0,
        Strategy::Parts(parts) => parts.iter().fold(0, |all, part| all | bit(part).0),
        _ => 0,
    })
}

fn fragments(fragments: Fragments) -> types::fragments {
    match fragments {
        Fragments::Follow => types::fragments::FRAGMENTS_FOLLOW,
        Fragments::Pass => types::fragments::FRAGMENTS_PASS,
        Fragments::Drop => types::fragments::FRAGMENTS_DROP,
    }
}

/// Returns the source of packets to a host in one of the rule's lists.
fn source_for(rule: &Rule, upstream: &Upstream, list: &[Upstream]) -> types::source {
    match rule.reply == Reply::Nat && std::ptr::eq(list, rule.upstreams.as_slice()) {
        true => types::source::SOURCE_FLOW,
        false => source(rule.source_of(upstream)),
    }
}

fn source(source: Source) -> types::source {
    match source {
        Source::Vip => types::source::SOURCE_VIP,
        Source::Preserve => types::source::SOURCE_PRESERVE,
        Source::Egress => types::source::SOURCE_EGRESS,
        Source::Fixed { .. } => types::source::SOURCE_FIXED,
    }
}

/// Returns true for a way in outer headers.
pub fn is_tunnel(via: Option<Via>) -> bool {
    matches!(via, Some(Via::Ipip | Via::Gue))
}

fn via(via: Option<Via>) -> types::via {
    match via {
        None => types::via::VIA_ADDRESS,
        Some(Via::Link) => types::via::VIA_LINK,
        Some(Via::Ipip) => types::via::VIA_IPIP,
        Some(Via::Gue) => types::via::VIA_GUE,
    }
}

/// Returns the share of a rule's flows, 0 to 1, that `new` sends elsewhere than `old`; 0 if either
/// replicates.
pub fn moved_share(old: &Rule, new: &Rule) -> f64 {
    if old.mode == Mode::Replicate || new.mode == Mode::Replicate {
        return 0.0;
    }
    let (before, after) = (SlotTable::of(old).slots(), SlotTable::of(new).slots());
    let (old_ends, new_ends) = (ends(old), ends(new));
    let several = old.upstreams.len().max(new.upstreams.len()) > 1;
    let drained = |rule: &Rule| rule.upstreams.iter().any(|it| it.state == State::Drained);
    if several && (drained(old) || drained(new)) {
        let same_key = selection(old) == selection(new);
        return flow::moved((old, &before), (new, &after), same_key);
    }
    if several && selection(old) != selection(new) {
        return moved_by_selection((&before, &old_ends), (&after, &new_ends));
    }
    maglev::moved((&before, &old_ends), (&after, &new_ends))
}

/// Returns the options that select a flow's slot, besides the table.
fn selection(rule: &Rule) -> (Strategy, Option<Payload>, Option<ServerIdPlace>, Hash) {
    (rule.strategy, rule.payload, rule.server_id, rule.hash)
}

fn ends(rule: &Rule) -> Vec<flow::End<'_>> {
    let end = |upstream: &Upstream| upstream.state == State::Active;
    let endpoint = |upstream| -> flow::End<'_> {
        let upstream: &Upstream = upstream;
        end(upstream).then_some((&upstream.address, upstream.port))
    };
    rule.upstreams.iter().map(endpoint).collect()
}

/// Returns the share of flows that move if the selection key changes. The keys are independent: a slot by
/// one key combines with every slot by the other.
fn moved_by_selection(
    (old, old_ends): (&[u16], &[flow::End<'_>]),
    (new, new_ends): (&[u16], &[flow::End<'_>]),
) -> f64 {
    let mut shares: HashMap<flow::End<'_>, (usize, usize)> = HashMap::new();
    for slot in old {
        shares.entry(old_ends[usize::from(*slot)]).or_default().0 += 1;
    }
    for slot in new {
        shares.entry(new_ends[usize::from(*slot)]).or_default().1 += 1;
    }
    let stay: usize = shares.values().map(|(before, after)| before * after).sum();
    1.0 - stay as f64 / (old.len() * new.len()) as f64
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::{Key4, Tables, moved_share, types, wire};
    use crate::config::{Action, Hash, Key, Ports, Reply, ServerIdPlace, State, Strategy};
    use crate::desired::{Desired, Rule, Upstream, assign_ids};

    const KEY: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 5);

    fn rule(name: &str, first: u16, last: u16, upstreams: &[u8]) -> Rule {
        let upstream = |host: &u8| Upstream::new([10, 0, 9, *host], None);
        Rule {
            action: Action::Block,
            strategy: Strategy::SrcIp,
            hash: Hash::Modulo,
            ..Rule::new(
                name,
                Key::new(KEY, vec![Ports { first, last }]),
                upstreams.iter().map(upstream).collect(),
            )
        }
    }

    fn tables(rules: Vec<Rule>) -> Tables {
        let desired = Desired { rules, ..Desired::default() };
        let ids = assign_ids(&desired, &[], 1 << 19).expect("ids enough");
        Tables::new(&desired, &ids)
    }

    #[test]
    fn keys_lead_to_the_rule_and_its_upstreams() {
        let mut one = rule("one", 514, 514, &[1]);
        one.upstreams[0].port = Some(0x1234);
        let tables = tables(vec![one]);
        let [(key, entry)] = tables.keys[..] else { panic!("{:?}", tables.keys) };
        assert_eq!(key, Key4 { address: KEY, port: 514 });
        assert_eq!(entry, types::entry::ENTRY_BLOCK.0);
        assert_eq!(tables.upstreams[0].rule, 0);
        let value = tables.rules[0];
        assert_eq!((value.slots, value.first_slot), (1, 0));
        let upstream = tables.upstreams[0];
        assert_eq!(upstream.address, wire([10, 0, 9, 1].into()));
        assert_eq!(upstream.port.to_ne_bytes(), [0x12, 0x34]);
    }

    #[test]
    fn a_range_is_an_entry_for_each_port() {
        let tables =
            tables(vec![rule("range", 1000, 1099, &[1, 2]), rule("last", 65_535, 65_535, &[1])]);
        let ports: Vec<u16> = tables.keys.iter().map(|(key, _)| key.port).collect();
        assert_eq!(ports, (1000..1100).chain([65_535]).collect::<Vec<_>>());
        let entries: Vec<u32> = tables.keys.iter().map(|(_, entry)| *entry).collect();
        // the first rule, and the upstream behind its two
        let (balance, block) = (types::entry::ENTRY_BALANCE.0, types::entry::ENTRY_BLOCK.0 | 2);
        assert_eq!(entries, [[balance; 100].as_slice(), &[block]].concat());
        assert_eq!([0, 1].map(|index: usize| tables.rules[index].first_slot), [0, 2]);
    }

    #[test]
    fn connection_ids_are_left_to_the_slow_path() {
        for hosts in [&[1][..], &[1, 2]] {
            let place = ServerIdPlace { offset: 1, length: 2 };
            let strategy = Strategy::QuicCid;
            let quic = Rule { strategy, server_id: Some(place), ..rule("quic", 443, 443, hosts) };
            assert_eq!(tables(vec![quic]).keys[0].1, types::entry::ENTRY_RULE.0, "{hosts:?}");
        }
    }

    #[test]
    fn the_fast_path_knows_rules_with_flows() {
        let flows = Rule { reply: Reply::Nat, ..rule("flows", 53, 53, &[1]) };
        let mirrored = Rule { mirrors: vec![Upstream::new([10, 0, 9, 2], None)], ..flows.clone() };
        for (rule, kind) in
            [(flows, types::entry::ENTRY_FLOW), (mirrored, types::entry::ENTRY_RULE)]
        {
            assert_eq!(tables(vec![rule]).keys[0].1, kind.0);
        }
    }

    #[test]
    fn slots_lead_to_the_upstreams_in_the_files_order() {
        let hosts: Vec<u8> = (1..=50).chain([7]).collect();
        let tables = tables(vec![rule("one", 1, 1, &[9]), rule("many", 2, 2, &hosts)]);
        let many = tables.rules[1];
        assert_eq!(many.slots, 51);
        let found: Vec<u8> = (0..many.slots)
            .map(|slot| (many.first_slot + slot) as usize)
            .map(|slot| {
                let width = tables.slots[0].upstream.len();
                let index = tables.slots[slot / width].upstream[slot % width];
                tables.upstreams[(many.first_upstream + u32::from(index)) as usize].address[0]
                    .to_ne_bytes()[3]
            })
            .collect();
        assert_eq!(found, hosts);
        // none is shared between rules: it has another id
        let rules: Vec<u32> = tables.upstreams.iter().map(|upstream| upstream.rule).collect();
        assert_eq!(rules, [[0].as_slice(), &[1; 51]].concat());
    }

    #[test]
    fn no_rules() {
        let tables = tables(Vec::new());
        assert!(tables.rules.is_empty() && tables.slots.is_empty() && tables.upstreams.is_empty());
    }

    #[test]
    fn the_share_that_moves() {
        let of = |upstreams: &[u8]| rule("one", 1, 1, upstreams);
        for (old, new, moved) in [
            (&[1, 2][..], &[1, 2][..], 0.0),
            (&[1], &[2], 1.0),
            (&[1], &[1, 2], 0.5),
            (&[1, 2], &[2, 1], 1.0),
            (&[1, 2], &[1, 2, 1, 2], 0.0),
            (&[1, 2, 3], &[1, 2], 4.0 / 6.0),
        ] {
            let share = moved_share(&of(old), &of(new));
            assert!((share - moved).abs() < 1e-9, "{old:?} -> {new:?}: {share}");
        }
        // by something else of the packet: only what meets by chance stays
        for (old, new, moved) in
            [(&[1][..], &[1][..], 0.0), (&[1, 2], &[1, 2], 0.5), (&[1, 2], &[3], 1.0)]
        {
            let by_port = Rule { strategy: Strategy::SrcPort, ..of(new) };
            assert_eq!(moved_share(&of(old), &by_port), moved, "{old:?} -> {new:?}");
        }
    }

    #[test]
    fn flows_of_drained_upstreams_are_somewhere_else_already() {
        let of = |drained: &[u8]| {
            let mut rule = rule("one", 1, 1, &[1, 2, 3, 4]);
            rule.hash = Hash::Maglev;
            for upstream in drained {
                rule.upstreams[usize::from(*upstream)].state = State::Drained;
            }
            rule
        };
        for (old, new, moved) in [
            (&[][..], &[][..], 0.0),
            (&[], &[0], 0.25),
            (&[0], &[], 0.25),
            (&[0], &[0], 0.0),
            // what the first left to the second is a third of a quarter
            (&[0], &[0, 1], 0.25 + 0.25 / 3.0),
            (&[0], &[1], 0.5),
            (&[0, 1, 2, 3], &[0, 1, 2, 3], 0.0),
            (&[0, 1, 2], &[0, 1, 2, 3], 1.0),
        ] {
            let share = moved_share(&of(old), &of(new));
            assert!((share - moved).abs() < 0.01, "{old:?} -> {new:?}: {share}");
        }
    }

    #[test]
    fn flows_come_to_the_next_priority_together() {
        let of = |drained: &[usize]| {
            let mut rule = rule("one", 1, 1, &[1, 2, 3, 4]);
            rule.hash = Hash::Maglev;
            rule.upstreams[2].priority = 2;
            rule.upstreams[3].priority = 2;
            for upstream in drained {
                rule.upstreams[*upstream].state = State::Drained;
            }
            rule
        };
        for (old, new, moved) in [
            (&[][..], &[2, 3][..], 0.0),
            (&[], &[0], 0.5),
            (&[], &[0, 1], 1.0),
            (&[0, 1], &[0, 1, 3], 0.5),
        ] {
            let share = moved_share(&of(old), &of(new));
            assert!((share - moved).abs() < 0.01, "{old:?} -> {new:?}: {share}");
        }
    }

    #[test]
    fn the_share_of_long_lists_is_counted_in_reasonable_time() {
        let long = |length: usize| {
            let upstreams: Vec<u8> = (0..length).map(|index| index as u8).collect();
            rule("one", 1, 1, &upstreams)
        };
        let share = moved_share(&long(4099), &long(4111));
        assert!((0.9..=1.0).contains(&share), "{share}");
    }
}
