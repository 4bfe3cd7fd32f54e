//! The desired state of the kernel: a [`Config`] with resolved names and chosen interfaces. Pure.

pub mod choice;
mod choose;
pub mod diff;
pub mod dns;
pub mod export;
pub mod flow;
pub mod flow_copy;
pub mod flows;
pub mod id_set;
pub mod key_table;
pub mod miss;
pub mod partial;
pub mod quic;
pub mod sender_tables;
pub mod senders;
pub mod tables;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use foldhash::{HashMap, HashMapExt, HashSet, HashSetExt};
use serde::{Deserialize, Serialize};

use crate::config::{
    self, Action, Address, Addresses, Admission, AllDown, Announce, Config, Decap, Family, Flows,
    Fragments, Hash, Health, Host, Key, KeyAddress, Mode, Network, Payload, Ports, Reply, ServerId,
    ServerIdPlace, Source, State, Strategy, Templates, Via, Xdp, with_port,
};
use crate::desired::id_set::IdSet;
use crate::desired::partial::Incomplete;
use crate::net::routing::{Senders, Target};

/// A host name and the family of its addresses.
pub type Name = (String, Family);

/// A configuration as a generation stores it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Desired {
    /// Sorted, without duplicates, including missing ones.
    pub interfaces: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub announce: Option<Announce>,
    #[serde(default, skip_serializing_if = "is_default")]
    pub flows: Flows,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decap: Option<Decap>,
    /// Not in the JSON of a description, but behind it; earlier versions wrote them there.
    #[serde(default, skip_serializing)]
    pub rules: Vec<Rule>,
    /// The addresses of the interfaces, sorted: a key with `any` matches each. Empty if no rule has
    /// such a key.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
    /// Key addresses that are broadcast addresses of the interfaces' networks, sorted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub broadcasts: Vec<IpAddr>,
    /// Range of ephemeral ports, if a rule matches such ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local_ports: Option<Ports>,
    /// XDP modes other than `off`, by interface.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub xdp: BTreeMap<String, Xdp>,
    /// Parts of the file that this configuration lacks.
    #[serde(default, skip_serializing_if = "Incomplete::is_empty")]
    pub incomplete: Incomplete,
}

/// A rule. Generations of earlier versions lack the fields with a default.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    pub name: String,
    pub key: Key,
    pub action: Action,
    #[serde(default, skip_serializing_if = "is_default")]
    pub mode: Mode,
    pub strategy: Strategy,
    /// Present if and only if the strategy reads the payload.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub payload: Option<Payload>,
    /// Present if and only if the strategy is `quic-cid`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server_id: Option<ServerIdPlace>,
    pub hash: Hash,
    #[serde(default, skip_serializing_if = "is_default")]
    pub templates: Templates,
    /// Default for upstreams and mirrors without a `source` of their own.
    pub source: Source,
    #[serde(default, skip_serializing_if = "is_default")]
    pub reply: Reply,
    /// Default for upstreams without a `via` of their own; `None` unless `reply` is `direct`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub via: Option<Via>,
    /// Number of answers that ends a flow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answers: Option<u32>,
    /// Senders keep their upstream, by a flow each.
    #[serde(default, skip_serializing_if = "is_default")]
    pub sticky: bool,
    #[serde(default, skip_serializing_if = "is_default")]
    pub health: Health,
    #[serde(default, skip_serializing_if = "is_default")]
    pub all_down: AllDown,
    #[serde(default, skip_serializing_if = "is_default")]
    pub fragments: Fragments,
    /// UDP over IPv6 without a checksum.
    #[serde(default, skip_serializing_if = "Admission::is_denied")]
    pub zero_checksum: Admission,
    /// Packets whose source no router forwards.
    #[serde(default, skip_serializing_if = "Admission::is_denied")]
    pub martians: Admission,
    /// Number of senders that have room in the rule's table; `None`: they are not counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub senders: Option<u32>,
    /// Never empty; in the order of the file, which `modulo` depends on.
    pub upstreams: Vec<Upstream>,
    /// Hosts that get a copy of each packet in addition.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mirrors: Vec<Upstream>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upstream {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Host as written in the file.
    pub host: Host,
    /// The address that `host` was resolved to; for this host the key's, or unspecified.
    pub address: Address,
    /// With `all` several upstreams may have the same host.
    #[serde(default, skip_serializing_if = "is_default")]
    pub addresses: Addresses,
    /// `None` for the packet's destination port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Share of the flows, relative to the other upstreams.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub weight: u32,
    /// Packets come here while no upstream with a lower one can be selected.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub priority: u32,
    #[serde(default, skip_serializing_if = "is_default")]
    pub state: State,
    /// `None` for the rule's, see [`Rule::source_of`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    /// `None` for the rule's, see [`Rule::via_of`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub via: Option<Via>,
    /// N: one of N packets is sent, at random.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub sample: u32,
    /// Id in the connection ids of QUIC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server_id: Option<ServerId>,
    /// It gets packets of these senders; none: of any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub from: Vec<Network>,
    /// It gets no packets of these; the longest prefix of both lists decides.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub not_from: Vec<Network>,
}

fn one() -> u32 {
    1
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn is_one(number: &u32) -> bool {
    *number == 1
}

impl Rule {
    /// Returns a rule with the defaults of the map form.
    pub fn new(name: impl Into<String>, key: Key, upstreams: Vec<Upstream>) -> Rule {
        Rule {
            name: name.into(),
            key,
            action: Action::Pass,
            mode: Mode::Balance,
            strategy: Strategy::SrcIpPort,
            payload: None,
            server_id: None,
            hash: Hash::Maglev,
            templates: Templates::One,
            source: Source::Vip,
            reply: Reply::None,
            via: None,
            answers: None,
            sticky: false,
            health: Health::Off,
            all_down: AllDown::Open,
            fragments: Fragments::Follow,
            zero_checksum: Admission::Deny,
            martians: Admission::Deny,
            senders: None,
            upstreams,
            mirrors: Vec::new(),
        }
    }

    /// Returns the source address policy of this upstream or mirror.
    pub fn source_of(&self, upstream: &Upstream) -> Source {
        match upstream.host {
            Host::Local => Source::Preserve,
            _ => upstream.source.unwrap_or(self.source),
        }
    }

    /// Returns the way to this upstream; `None`: to its address.
    pub fn via_of(&self, upstream: &Upstream) -> Option<Via> {
        upstream.via.or(self.via)
    }

    /// Returns the family of all addresses of the rule.
    pub fn family(&self) -> Family {
        self.upstreams.first().map_or(Family::V4, |upstream| upstream.address.ip.into())
    }

    /// Returns the upstreams of the lowest priority, which slots refer to, each with its place in the list.
    pub fn preferred(&self) -> impl Iterator<Item = (usize, &Upstream)> {
        let lowest = self.upstreams.iter().map(|upstream| upstream.priority).min();
        let all = self.upstreams.iter().enumerate();
        all.filter(move |(_, upstream)| Some(upstream.priority) == lowest)
    }

    /// Returns all destinations: the upstreams, then the mirrors.
    pub fn destinations(&self) -> impl Iterator<Item = &Upstream> {
        self.upstreams.iter().chain(&self.mirrors)
    }

    /// Returns the destinations with their ids, each once even if listed twice.
    pub fn with_ids<'a>(&'a self, ids: &'a RuleIds) -> Vec<Destination<'a>> {
        let mut destinations = Vec::with_capacity(self.upstreams.len() + self.mirrors.len());
        // most rules have one, which is unique
        let are_several = self.upstreams.len() + self.mirrors.len() > 1;
        let (mut seen, mut labels) = (HashSet::new(), HashSet::new());
        let answers = &ids.answers;
        for (role, list, ids) in [
            (Role::Upstream, &self.upstreams, &ids.upstreams),
            (Role::Mirror, &self.mirrors, &ids.mirrors),
        ] {
            let mut answers = answers.iter().copied().filter(|_| role == Role::Upstream);
            for (upstream, id) in list.iter().zip(ids) {
                let answers = answers.next();
                if are_several && !seen.insert(*id) {
                    continue;
                }
                let mut label = upstream.label();
                while are_several && !labels.insert(label.clone()) {
                    label.push('\'');
                }
                destinations.push(Destination { id: *id, answers, role, upstream, label });
            }
        }
        destinations
    }
}

impl Upstream {
    /// Returns an upstream with all defaults.
    pub fn new(address: impl Into<Address>, port: Option<u16>) -> Upstream {
        let address = address.into();
        Upstream {
            name: None,
            host: Host::Address(address.clone()),
            address,
            addresses: Addresses::One,
            port,
            weight: 1,
            priority: 1,
            state: State::Active,
            source: None,
            via: None,
            sample: 1,
            server_id: None,
            from: Vec::new(),
            not_from: Vec::new(),
        }
    }

    /// Returns an upstream on this host, for packets to an address.
    pub fn local(address: impl Into<Address>, port: Option<u16>) -> Upstream {
        Upstream { host: Host::Local, ..Upstream::new(address, port) }
    }

    /// Returns the host name, if it has one.
    pub fn named(&self) -> Option<Name> {
        match &self.host {
            Host::Name(name) => Some((name.clone(), self.address.ip.into())),
            Host::Address(_) | Host::Local => None,
        }
    }

    /// Returns true for this host.
    pub fn is_local(&self) -> bool {
        self.host == Host::Local
    }

    /// Returns the display name: the name, or host and port. A host name that is used with all its
    /// addresses gets the address as suffix: `pool@10.0.9.11`.
    pub fn label(&self) -> String {
        match (&self.name, self.port) {
            (name, port)
                if self.addresses == Addresses::All && !self.address.ip.is_unspecified() =>
            {
                let host = self.host.to_string();
                let (of, port) = match name {
                    Some(name) => (name, None),
                    None => (&host, port),
                };
                let address =
                    port.map_or(self.address.to_string(), |port| with_port(&self.address, port));
                format!("{of}@{address}")
            }
            (Some(name), _) => name.clone(),
            (None, Some(port)) => with_port(&self.host, port),
            (None, None) => self.host.to_string(),
        }
    }
}

impl Desired {
    /// Converts a configuration; the addresses of its host names are unspecified, see
    /// [`partial::resolve`].
    pub fn written(config: &Config, interfaces: &[String]) -> Desired {
        let rules = config.rules.iter().map(written).collect();
        let interfaces: BTreeSet<String> = interfaces.iter().cloned().collect();
        let xdp = config.xdp.iter().filter(|(name, _)| interfaces.contains(*name));
        let xdp = xdp.map(|(name, xdp)| (name.clone(), *xdp)).collect();
        Desired {
            interfaces: interfaces.into_iter().collect(),
            announce: config.announce.clone(),
            flows: config.flows.clone(),
            decap: config.decap.clone(),
            rules,
            xdp,
            ..Desired::default()
        }
    }

    /// Counts the keys in the map, at most [`KEY_ENTRIES`](crate::config::KEY_ENTRIES), with each
    /// address that `any` matches.
    pub fn key_entries(&self) -> usize {
        let addresses = |rule: &Rule| match rule.key.address {
            KeyAddress::Is(_) => 1,
            KeyAddress::Any => {
                self.addresses.iter().filter(|address| rule.family() == (**address).into()).count()
            }
        };
        self.rules.iter().map(|rule| rule.key.entries() * addresses(rule)).sum()
    }

    /// Returns the configuration as [`Desired::written`] made it, including what is not applied.
    pub fn as_written(&self) -> Desired {
        let rules = self.written_rules().into_owned();
        Desired { rules, ..self.without_rules() }
    }

    /// Returns what was written besides the rules.
    pub fn without_rules(&self) -> Desired {
        // each field by its name: whether a new one is written has to be said here
        let Desired {
            interfaces,
            announce,
            flows,
            decap,
            xdp,
            rules: _,
            addresses: _,
            broadcasts: _,
            local_ports: _,
            incomplete: _,
        } = self;
        Desired {
            interfaces: interfaces.clone(),
            announce: announce.clone(),
            flows: flows.clone(),
            decap: decap.clone(),
            xdp: xdp.clone(),
            ..Desired::default()
        }
    }

    /// Returns the rules as written. Those of 10,000 rules without host names are not worth copies.
    fn written_rules(&self) -> Cow<'_, [Rule]> {
        let rules = match self.incomplete.rules.is_empty() {
            true => &self.rules,
            false => &self.incomplete.rules,
        };
        let is_plain = |host: &Upstream| {
            !matches!(host.host, Host::Name(_)) && host.addresses != Addresses::All
        };
        if rules.iter().flat_map(Rule::destinations).all(is_plain) {
            return Cow::Borrowed(rules);
        }
        let mut rules = rules.clone();
        for rule in &mut rules {
            for hosts in [&mut rule.upstreams, &mut rule.mirrors] {
                for upstream in &mut *hosts {
                    if let Host::Name(_) = upstream.host {
                        upstream.address = unspecified(upstream.address.ip.into());
                    }
                }
                hosts.dedup_by(|next, host| host.addresses == Addresses::All && next == host);
            }
        }
        Cow::Owned(rules)
    }

    /// Returns true if both are the same as [`Desired::as_written`].
    pub fn is_written_as(&self, other: &Desired) -> bool {
        std::ptr::eq(self, other)
            || (self.without_rules() == other.without_rules()
                && self.written_rules() == other.written_rules())
    }

    /// Records the rules as written, unless [`Desired::as_written`] can derive them.
    pub fn keep_written(&mut self, written: &[Rule]) {
        self.incomplete.rules.clear();
        if *self.written_rules() != *written {
            self.incomplete.rules = written.to_vec();
        }
    }

    /// Returns true if a generation with this configuration can be used for `other`. Causes may differ, and
    /// interfaces that it was attached to may be missing.
    pub fn serves(&self, other: &Desired) -> bool {
        let Desired { interfaces, announce, flows, decap, rules, xdp, .. } = self;
        let Desired { addresses, broadcasts, local_ports, incomplete, .. } = self;
        if std::ptr::eq(self, other) {
            return true;
        }
        let same = (interfaces, announce, flows, rules, xdp)
            == (&other.interfaces, &other.announce, &other.flows, &other.rules, &other.xdp)
            && *decap == other.decap
            && (addresses, broadcasts) == (&other.addresses, &other.broadcasts)
            && *local_ports == other.local_ports
            && incomplete.lacks_the_same(&other.incomplete);
        let is_missing = |name| other.incomplete.interfaces.contains(name);
        same && incomplete.interfaces.iter().all(is_missing)
    }

    /// Returns the multicast groups among the keys.
    pub fn groups(&self) -> impl Iterator<Item = IpAddr> {
        self.rules.iter().filter_map(|rule| match rule.key.address {
            KeyAddress::Is(address) if address.is_multicast() => Some(address),
            _ => None,
        })
    }

    /// Returns the addresses of the keys that a routing daemon can announce: unicast ones that are not
    /// bound to a link. None without `announce`.
    pub fn announced(&self) -> BTreeSet<IpAddr> {
        let can_be_announced = |address: &IpAddr| {
            let is_link_local = match address {
                IpAddr::V4(address) => address.is_link_local() || address.is_broadcast(),
                IpAddr::V6(address) => address.is_unicast_link_local(),
            };
            !address.is_multicast()
                && !address.is_loopback()
                && !is_link_local
                && !self.broadcasts.contains(address)
        };
        let rules = self.announce.iter().flat_map(|_| &self.rules);
        let keys = rules.filter_map(|rule| match rule.key.address {
            KeyAddress::Is(address) => Some(address),
            KeyAddress::Any => None,
        });
        keys.filter(can_be_announced).collect()
    }

    /// Returns the destination of a rule's packets for an upstream or a mirror, and their sender.
    pub fn target(&self, rule: &Rule, upstream: &Upstream) -> Target {
        let senders = match (rule.source_of(upstream), rule.key.address) {
            _ if matches!(rule.via_of(upstream), Some(Via::Ipip | Via::Gue)) => Senders::Own,
            (Source::Egress, _) => Senders::Own,
            (Source::Fixed { address, .. }, _) => Senders::Among(vec![address.into()]),
            (Source::Preserve, _) => Senders::Among(rule.key.from.clone()),
            (Source::Vip, KeyAddress::Is(address)) => Senders::Among(vec![address.into()]),
            (Source::Vip, KeyAddress::Any) => {
                let family = rule.family();
                let own = self.addresses.iter().filter(|own| family == (**own).into());
                Senders::Among(own.map(|own| (*own).into()).collect())
            }
        };
        Target { address: upstream.address.clone(), senders }
    }

    /// Returns the targets of all upstreams and mirrors on other hosts, each once, in the order of the rules.
    pub fn targets(&self) -> Vec<Target> {
        let targets = self.rules.iter().flat_map(|rule| {
            let remote = rule.destinations().filter(|upstream| !upstream.is_local());
            remote.map(move |upstream| self.target(rule, upstream))
        });
        let mut targets: Vec<Target> = targets.collect();
        let mut seen = HashSet::with_capacity(targets.len());
        let is_new: Vec<bool> = targets.iter().map(|target| seen.insert(target)).collect();
        let mut is_new = is_new.into_iter();
        targets.retain(|_| is_new.next() == Some(true));
        targets
    }

    /// Returns the upstreams and mirrors of all rules.
    pub fn upstreams(&self) -> impl Iterator<Item = &Upstream> {
        self.rules.iter().flat_map(Rule::destinations)
    }
}

fn written(rule: &config::RuleConfig) -> Rule {
    let upstream = |upstream: &config::UpstreamConfig| Upstream {
        name: upstream.name.clone(),
        host: upstream.address.clone(),
        address: match &upstream.address {
            Host::Address(address) => address.clone(),
            Host::Name(_) => unspecified(rule.family()),
            Host::Local => match rule.key.address {
                KeyAddress::Is(address) => address.into(),
                KeyAddress::Any => unspecified(rule.family()),
            },
        },
        addresses: upstream.addresses,
        port: upstream.port,
        weight: upstream.weight.unwrap_or(1),
        priority: upstream.priority.unwrap_or(1),
        state: upstream.state,
        // Equal to the default: the same configuration.
        source: upstream
            .source
            .filter(|source| *source != rule.source && upstream.address != Host::Local),
        via: upstream.via.filter(|via| Some(*via) != rule.via),
        sample: upstream.sample.unwrap_or(1),
        server_id: upstream.server_id.clone(),
        from: upstream.from.clone(),
        not_from: upstream.not_from.clone(),
    };
    Rule {
        name: rule.name.clone(),
        key: rule.key.clone(),
        action: rule.action,
        mode: rule.mode,
        strategy: rule.strategy,
        payload: rule.payload,
        server_id: rule.server_id,
        hash: rule.hash,
        templates: rule.templates,
        source: rule.source,
        reply: rule.reply,
        via: rule.via,
        answers: rule.answers,
        sticky: rule.sticky,
        health: rule.health.clone(),
        all_down: rule.all_down,
        fragments: rule.fragments,
        zero_checksum: rule.zero_checksum,
        martians: rule.martians,
        senders: rule.senders,
        upstreams: rule.upstreams.iter().map(upstream).collect(),
        mirrors: rule.mirrors.iter().map(upstream).collect(),
    }
}

fn unspecified(family: Family) -> Address {
    match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// The ids of a rule, and of its upstreams and mirrors in their order.
///
/// They index counters and next hops. The same rule and the same endpoint keep their ids from generation
/// to generation. If a rule changes its mode, its endpoints get new ids: in one mode they count packets of
/// the rule, in the other copies.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleIds {
    pub rule: u32,
    pub upstreams: Vec<u32>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mirrors: Vec<u32>,
    /// Ids of the upstreams' answers; empty if these do not come here.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub answers: Vec<u32>,
}

impl RuleIds {
    /// Returns the ids in the order of [`Rule::destinations`].
    pub fn destinations(&self) -> impl Iterator<Item = u32> {
        self.upstreams.iter().chain(&self.mirrors).copied()
    }

    /// Returns every id: the rule's, those of destinations, and those of answers.
    pub fn all(&self) -> impl Iterator<Item = u32> {
        [self.rule].into_iter().chain(self.destinations()).chain(self.answers.iter().copied())
    }
}

/// Error for more rules and upstreams than counters.
#[derive(Debug, PartialEq, Eq)]
pub struct IdsExhausted;

/// Returns the ids of every rule and endpoint: the one in the first of the `known` generations that has it,
/// or else an unused one. Ids are from 1 to `limit - 1`.
pub fn assign_ids(
    desired: &Desired,
    known: &[(&Desired, &[RuleIds])],
    limit: u32,
) -> Result<Vec<RuleIds>, IdsExhausted> {
    /// Packets that are counted under one id: a rule's, those to one of its upstreams or mirrors, or the
    /// answers of an upstream.
    type Holder<'a> = (&'a str, Option<(Packets, Mode, &'a Address, Option<u16>)>);
    #[derive(Clone, Copy, PartialEq, Eq, Hash)]
    enum Packets {
        To(Role),
        Answers,
    }
    fn holders(rule: &Rule, packets: Packets) -> impl Iterator<Item = Holder<'_>> {
        let all = match packets {
            Packets::To(Role::Upstream) => &rule.upstreams[..],
            Packets::To(Role::Mirror) => &rule.mirrors,
            Packets::Answers if matches!(rule.reply, Reply::Route | Reply::Nat) => &rule.upstreams,
            Packets::Answers => &[],
        };
        let name = rule.name.as_str();
        all.iter().map(move |it| (name, Some((packets, rule.mode, &it.address, it.port))))
    }
    let (to_upstream, to_mirror) = (Packets::To(Role::Upstream), Packets::To(Role::Mirror));
    let all = || known.iter().flat_map(|(_, given)| *given).flat_map(RuleIds::all);
    let held: IdSet = all().collect();
    let mut ids: HashMap<Holder<'_>, u32> = HashMap::with_capacity(all().count());
    for (desired, given) in known {
        for (rule, given) in desired.rules.iter().zip(*given) {
            let upstreams = holders(rule, to_upstream).zip(&given.upstreams);
            let mirrors = holders(rule, to_mirror).zip(&given.mirrors);
            let answers = holders(rule, Packets::Answers).zip(&given.answers);
            let rule = ((rule.name.as_str(), None), &given.rule);
            let hosts = upstreams.chain(mirrors).chain(answers);
            for (holder, id) in [rule].into_iter().chain(hosts) {
                ids.entry(holder).or_insert(*id);
            }
        }
    }
    let mut free = (1..limit).filter(|id| !held.contains(*id));
    let mut id_of = |holder| match ids.get(&holder) {
        Some(id) => Ok(*id),
        None => {
            let id = free.next().ok_or(IdsExhausted)?;
            ids.insert(holder, id);
            Ok(id)
        }
    };
    desired
        .rules
        .iter()
        .map(|rule| {
            let id = id_of((rule.name.as_str(), None))?;
            let mut ids_of =
                |packets| holders(rule, packets).map(&mut id_of).collect::<Result<Vec<u32>, _>>();
            let (upstreams, mirrors) = (ids_of(to_upstream)?, ids_of(to_mirror)?);
            let answers = ids_of(Packets::Answers)?;
            Ok(RuleIds { rule: id, upstreams, mirrors, answers })
        })
        .collect()
}

/// An upstream or mirror of a rule with its id.
#[derive(Clone, Debug)]
pub struct Destination<'a> {
    pub id: u32,
    /// Id of the upstream's answers, if these come here.
    pub answers: Option<u32>,
    pub role: Role,
    pub upstream: &'a Upstream,
    /// Display name, made unique in the rule: a name may equal another host's address, and a host may be
    /// both upstream and mirror.
    pub label: String,
}

/// The part of a host in a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// An upstream; with `replicate`, a receiver.
    Upstream,
    Mirror,
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::collection::{btree_map, vec};
    use proptest::prelude::*;

    use super::{Desired, IdsExhausted, Rule, RuleIds, Upstream, assign_ids};
    use crate::config::{Key, Mode, Ports, Source};

    /// Mode, upstreams and mirrors by rule.
    type File = BTreeMap<u8, (Mode, Vec<Endpoint>, Vec<Endpoint>)>;
    type Endpoint = (u8, Option<u16>);

    fn desired(rules: &File) -> Desired {
        let hosts = |hosts: &[Endpoint]| {
            let host = |(host, port): &Endpoint| Upstream::new([10, 0, 9, *host], *port);
            hosts.iter().map(host).collect()
        };
        let rule = |(number, (mode, upstreams, mirrors)): (&u8, &(Mode, Vec<_>, Vec<_>))| {
            let key = Key::new([10, 0, 0, 5], vec![Ports { first: 1, last: 1 }]);
            let rule = Rule::new(number.to_string(), key, hosts(upstreams));
            Rule { mode: *mode, mirrors: hosts(mirrors), ..rule }
        };
        Desired { rules: rules.iter().map(rule).collect(), ..Desired::default() }
    }

    /// Each rule, and each endpoint of it in its mode, with its id.
    fn holders(desired: &Desired, ids: &[RuleIds]) -> BTreeMap<String, u32> {
        let mut holders = BTreeMap::new();
        for (rule, ids) in desired.rules.iter().zip(ids) {
            assert_eq!(rule.upstreams.len(), ids.upstreams.len());
            assert_eq!(rule.mirrors.len(), ids.mirrors.len());
            let (name, mode) = (&rule.name, rule.mode);
            let roles = ["upstream"].repeat(rule.upstreams.len()).into_iter();
            let roles = roles.chain(["mirror"].repeat(rule.mirrors.len()));
            let endpoints = rule.destinations().zip(roles).map(|(it, role)| {
                format!("{name} {mode:?} to {role} {} {:?}", it.address, it.port)
            });
            let named = endpoints.zip(ids.destinations()).chain([(name.clone(), ids.rule)]);
            for (holder, id) in named {
                assert_eq!(*holders.entry(holder.clone()).or_insert(id), id, "{holder}");
            }
        }
        holders
    }

    fn file() -> impl Strategy<Value = File> {
        let endpoint = || (0..4_u8, prop::option::of(1..3_u16));
        let mode = prop::sample::select(vec![Mode::Balance, Mode::Replicate]);
        btree_map(0..5_u8, (mode, vec(endpoint(), 1..5), vec(endpoint(), 0..3)), 0..4)
    }

    proptest! {
        #[test]
        fn an_id_stays_with_its_holder_while_any_generation_knows_it(files in vec(file(), 1..8)) {
            let mut known: Vec<(Desired, Vec<RuleIds>)> = Vec::new();
            for file in &files {
                let desired = desired(file);
                let before: Vec<(&Desired, &[RuleIds])> =
                    known.iter().map(|(desired, ids)| (desired, ids.as_slice())).collect();
                let ids = assign_ids(&desired, &before, 1000).expect("enough");
                let mine = holders(&desired, &ids);
                let theirs: BTreeMap<String, u32> =
                    known.iter().flat_map(|(desired, ids)| holders(desired, ids)).collect();
                let all: BTreeMap<&String, u32> =
                    theirs.iter().chain(&mine).map(|(holder, id)| (holder, *id)).collect();
                // nobody's changed, and no two have one
                for (holder, id) in theirs.iter().chain(&mine) {
                    prop_assert_eq!(all[holder], *id);
                    prop_assert_ne!(*id, 0);
                }
                let distinct: BTreeSet<u32> = all.values().copied().collect();
                prop_assert_eq!(distinct.len(), all.len());
                known.push((desired, ids));
                // the kernel keeps two
                let gone = known.len().saturating_sub(2);
                known.drain(..gone);
            }
        }
    }

    #[test]
    fn ids_end() {
        let upstreams = vec![(1, None), (2, None), (1, None)];
        let desired = desired(&[(1, (Mode::Balance, upstreams, vec![(2, None)]))].into());
        // one for the rule and one for each endpoint, from 1
        assert_eq!(assign_ids(&desired, &[], 4), Err(IdsExhausted));
        let ids = assign_ids(&desired, &[], 5);
        let answers = Vec::new();
        let expected = RuleIds { rule: 1, upstreams: vec![2, 3, 2], mirrors: vec![4], answers };
        assert_eq!(ids, Ok(vec![expected]));
    }

    #[test]
    fn what_an_earlier_udplb_wrote_is_read() {
        let old = r#"{ "interfaces": ["eth0"], "rules": [{ "name": "one",
            "key": { "address": "10.0.0.5", "ports": [{ "first": 1, "last": 1 }] },
            "action": "pass", "strategy": "src-ip-port", "hash": "maglev", "source": "preserve",
            "upstreams": [{ "host": "10.0.9.1", "address": "10.0.9.1" }] }] }"#;
        let old: Desired = serde_json::from_str(old).expect("a description");
        let key = Key::new([10, 0, 0, 5], vec![Ports { first: 1, last: 1 }]);
        let rule = Rule::new("one", key, vec![Upstream::new([10, 0, 9, 1], None)]);
        let rule = Rule { source: Source::Preserve, ..rule };
        assert_eq!(rule.source_of(&rule.upstreams[0]), Source::Preserve);
        assert_eq!(old.rules, [rule]);
    }
}
