//! Decodes the tree of a file into rules, each value checked by itself.

mod probe;

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::Deserialize;
use serde::de::value::{Error, StrDeserializer};

use super::diagnostic::{Diagnostics, Message, Part, Place};
use super::node::{Content, Entry, Node};
use super::path::Trail;
use super::quote::shorten;
use super::vocabulary::{self as words, ANY, EnumField, Field, Number, Root, Shape, Table};
use super::{
    Action, Announce, Decap, Flows, Hash, Health, Host, Key, KeyAddress, Mode, Network, Payload,
    Period, Ports, Reply, RuleConfig, ServerIdPlace, Source, Strategy, StrategyPart, StrategyParts,
    Templates, UpstreamConfig, Via, Xdp, host, scalar,
};

/// The valid part of a file, and its diagnostics.
pub(super) struct Decoded {
    pub root: Root,
    pub interfaces: Vec<String>,
    pub announce: Option<Announce>,
    pub xdp: BTreeMap<String, Xdp>,
    pub flows: Flows,
    pub decap: Option<Decap>,
    pub rules: Vec<RuleConfig>,
    pub diagnostics: Diagnostics,
    /// Valid but probably not intended.
    pub warnings: Vec<Message>,
}

pub(super) fn decode(node: &Node<'_>) -> Decoded {
    let root = match &node.content {
        Content::List(_) => Root::List,
        _ => Root::Map,
    };
    let mut decoder = Decoder {
        decoded: Decoded {
            root,
            interfaces: Vec::new(),
            announce: None,
            xdp: BTreeMap::new(),
            flows: Flows::default(),
            decap: None,
            rules: Vec::new(),
            diagnostics: Diagnostics::default(),
            warnings: Vec::new(),
        },
    };
    match &node.content {
        Content::List(rules) => decoder.bare(rules),
        Content::Map(_) => decoder.map(node),
        _ => decoder.no_root(node),
    }
    decoder.decoded
}

/// Ports whose receivers tell senders apart by their addresses.
const TELEMETRY: [(u16, &str); 7] = [
    (162, "SNMP traps"),
    (514, "syslog"),
    (2055, "NetFlow"),
    (4739, "IPFIX"),
    (6343, "sFlow"),
    (9995, "NetFlow"),
    (9996, "NetFlow"),
];

/// Checks the version. A missing one is reported with the other missing fields.
fn version(node: &Node<'_>) -> Result<(), Message> {
    let Content::Map(entries) = &node.content else {
        return Ok(());
    };
    let root = Root::Map;
    let version = Fields { entries, root }.get(&words::VERSION);
    version.map_or(Ok(()), scalar::version)
}

struct Decoder {
    decoded: Decoded,
}

/// The fields of a map that can be used in the file.
struct Fields<'n, 't> {
    entries: &'n [Entry<'t>],
    root: Root,
}

impl<'n, 't> Fields<'n, 't> {
    fn get(&self, field: &Field) -> Option<&'n Node<'t>> {
        if !field.is_usable(self.root) {
            return None;
        }
        let mut entries = self.entries.iter();
        let entry = entries.find(|entry| entry.name == field.name);
        entry.map(|entry| &entry.node)
    }
}

/// Value of an option in the file.
#[derive(Clone, Copy, Default)]
enum Given<T> {
    #[default]
    Missing,
    Invalid,
    Valid(T),
}

impl<T> Given<T> {
    fn or(self, other: Given<T>) -> Given<T> {
        match self {
            Given::Missing => other,
            given => given,
        }
    }

    fn is_given(&self) -> bool {
        !matches!(self, Given::Missing)
    }

    /// Returns the value; none if it is missing or invalid.
    fn value(self) -> Option<T> {
        match self {
            Given::Valid(value) => Some(value),
            _ => None,
        }
    }
}

/// The options in the file, of a rule or of `defaults`.
#[derive(Clone, Default)]
struct Options {
    /// Value of each choice, at its place in [`words::OPTIONS_MAP`].
    choices: [Given<&'static str>; words::OPTIONS_MAP.fields.len()],
    strategy: Given<Strategy>,
    source: Given<Source>,
    payload: Given<Payload>,
    server_id: Given<ServerIdPlace>,
    health: Given<Health>,
    answers: Given<u32>,
    senders: Given<u32>,
    sticky: Given<bool>,
}

impl Options {
    fn or(&self, defaults: &Options) -> Options {
        let mut choices = self.choices;
        for (choice, default) in choices.iter_mut().zip(defaults.choices) {
            *choice = choice.or(default);
        }
        Options {
            choices,
            strategy: self.strategy.or(defaults.strategy),
            source: self.source.or(defaults.source),
            payload: self.payload.or(defaults.payload),
            server_id: self.server_id.or(defaults.server_id),
            answers: self.answers.or(defaults.answers),
            senders: self.senders.or(defaults.senders),
            sticky: self.sticky.or(defaults.sticky),
            health: self.health.clone().or(defaults.health.clone()),
        }
    }

    fn get(&self, choice: &EnumField) -> Given<&'static str> {
        let mut fields = words::OPTIONS_MAP.fields.iter();
        let place = fields.position(|field| std::ptr::eq(*field, &choice.field));
        place.map_or(Given::Missing, |place| self.choices[place])
    }
}

/// Returns the variant that serde names by a word of the vocabulary.
fn variant<T: Deserialize<'static>>(word: &'static str) -> Option<T> {
    T::deserialize(StrDeserializer::<Error>::new(word)).ok()
}

/// Returns the reader of a number within its limits.
fn number(number: &'static Number) -> impl FnOnce(&Node<'_>) -> Result<u32, Message> {
    move |node| scalar::number_of(node, number)
}

impl Decoder {
    fn error(&mut self, at: &Trail<'_>, message: Message) {
        self.decoded.diagnostics.push(message.at(at.path()));
    }

    fn warn(&mut self, at: &Trail<'_>, message: &str) {
        self.decoded.warnings.push(Message::new(message).at(at.path()));
    }

    /// Returns the value, or reports the error at a place.
    fn ok<T>(&mut self, at: &Trail<'_>, result: Result<T, Message>) -> Option<T> {
        result.map_err(|message| self.error(at, message)).ok()
    }

    fn no_root(&mut self, node: &Node<'_>) {
        let message = match &node.content {
            Content::Null => "the file is empty".into(),
            _ => format!("expected a map or a list of rules, found {}", node.describe()),
        };
        let help =
            "a configuration is a map with `version: 1` and `rules:`, or a bare list of rules";
        self.error(&Trail::ROOT, Message::new(message).help(help));
    }

    /// Reads the bare list of rules.
    fn bare(&mut self, rules: &[Node<'_>]) {
        self.warn_of_no_rules(rules, &Trail::ROOT);
        self.rules(rules, &Options::default(), &Trail::ROOT);
    }

    fn warn_of_no_rules(&mut self, rules: &[Node<'_>], at: &Trail<'_>) {
        if rules.is_empty() {
            self.warn(at, "no rules: nothing will match");
        }
    }

    fn map(&mut self, node: &Node<'_>) {
        let at = &Trail::ROOT;
        // Another version has words that are unknown here.
        if let Err(message) = version(node) {
            return self.error(&at.field(words::VERSION.name), message);
        }
        let Some(fields) = self.fields(node, &words::ROOT_MAP, at) else {
            return;
        };
        if let Some(node) = fields.get(&words::INTERFACES) {
            self.interfaces(node, &at.field(words::INTERFACES.name));
        }
        if let Some(node) = fields.get(&words::ANNOUNCE) {
            self.decoded.announce = self.announce(node, &at.field(words::ANNOUNCE.name));
        }
        if let Some(node) = fields.get(&words::FLOWS) {
            let flows = self.flows(node, &at.field(words::FLOWS.name));
            self.decoded.flows = flows.unwrap_or_default();
        }
        let decap = fields.get(&words::DECAP);
        if let Some(node) = decap {
            self.decoded.decap = self.decap(node, &at.field(words::DECAP.name));
        }
        let defaults = self.options(fields.get(&words::DEFAULTS), &at.field(words::DEFAULTS.name));
        match fields.get(&words::RULES) {
            Some(node) => {
                let at = at.field(words::RULES.name);
                let rules = self.list(node, "a list of rules", &at).unwrap_or_default();
                if decap.is_none() {
                    self.warn_of_no_rules(rules, &at);
                }
                self.rules(rules, &defaults, &at);
            }
            None if decap.is_none() => self.missing(&fields, &words::RULES, &words::ROOT_MAP, at),
            None => {}
        }
    }

    /// Returns the fields of a map; reports unknown and missing ones.
    fn fields<'n, 't>(
        &mut self,
        node: &'n Node<'t>,
        table: &'static Table,
        at: &Trail<'_>,
    ) -> Option<Fields<'n, 't>> {
        let Content::Map(entries) = &node.content else {
            let expected = scalar::expected(&format!("{} (a map)", table.what), node);
            let is_host = table.fields.iter().any(|it| std::ptr::eq(*it, &words::UPSTREAM_ADDRESS));
            return match &node.content {
                Content::Text(text) if is_host => {
                    let help = format!("write `address: {}`", shorten(text));
                    self.ok(at, expected.map_err(|message: Message| message.help(help)))
                }
                _ => self.ok(at, expected),
            };
        };
        let root = self.decoded.root;
        for Entry { name, .. } in entries {
            if let Err(message) = table.field(name, root) {
                let path = at.path().field(name.clone().into_owned());
                self.decoded.diagnostics.push(message.at(Place { path, part: Part::Name }));
            }
        }
        let fields = Fields { entries, root };
        for field in table.fields.iter().filter(|field| field.required) {
            if field.is_usable(root) && fields.get(field).is_none() {
                self.missing(&fields, field, table, at);
            }
        }
        Some(fields)
    }

    /// Reports a field that a map lacks, unless it is there under a misspelt name, which has been reported.
    fn missing(
        &mut self,
        fields: &Fields<'_, '_>,
        field: &'static Field,
        table: &'static Table,
        at: &Trail<'_>,
    ) {
        let nearest = |entry: &Entry<'_>| table.nearest(&entry.name, fields.root);
        if fields.entries.iter().all(|entry| nearest(entry) != Some(field.name)) {
            let message = format!("`{}` is missing", field.name);
            self.error(at, Message::new(message).help(field.about));
        }
    }

    fn list<'n, 't>(
        &mut self,
        node: &'n Node<'t>,
        what: &str,
        at: &Trail<'_>,
    ) -> Option<&'n [Node<'t>]> {
        match &node.content {
            Content::List(nodes) => Some(nodes),
            _ => self.ok(at, scalar::list(what, node)),
        }
    }

    fn interfaces(&mut self, node: &Node<'_>, at: &Trail<'_>) {
        let nodes = self.list(node, scalar::INTERFACES, at);
        for (index, node) in nodes.unwrap_or_default().iter().enumerate() {
            self.interface(node, &at.index(index));
        }
    }

    fn announce(&mut self, node: &Node<'_>, at: &Trail<'_>) -> Option<Announce> {
        let fields = self.fields(node, &words::ANNOUNCE_MAP, at)?;
        let hold_down = self.duration(&fields, &words::ANNOUNCE_HOLD_DOWN, at);
        let settle = self.duration(&fields, &words::ANNOUNCE_SETTLE, at);
        let expire = self.optional(&fields, &words::ANNOUNCE_EXPIRE, at, scalar::switch);
        let interface = self.optional(&fields, &words::ANNOUNCE_INTERFACE, at, scalar::interface);
        let last_resort =
            self.optional(&fields, &words::ANNOUNCE_LAST_RESORT, at, scalar::interface);
        Some(Announce {
            interface: interface??,
            last_resort: last_resort?,
            hold_down: hold_down?,
            settle: settle?,
            expire: expire?.unwrap_or(false),
        })
    }

    fn interface(&mut self, node: &Node<'_>, at: &Trail<'_>) {
        if !matches!(node.content, Content::Map(_)) {
            let name = self.ok(at, scalar::interface(node));
            self.decoded.interfaces.extend(name);
            return;
        }
        let Some(fields) = self.fields(node, &words::INTERFACE_MAP, at) else { return };
        let name = self.optional(&fields, &words::INTERFACE_NAME, at, scalar::interface);
        let xdp = self.choice(&fields, &words::XDP, at);
        let (Some(Some(name)), Some(xdp)) = (name, self.settle(xdp, &words::XDP)) else { return };
        if xdp != Xdp::Off {
            self.decoded.xdp.insert(name.clone(), xdp);
        }
        self.decoded.interfaces.push(name);
    }

    fn flows(&mut self, node: &Node<'_>, at: &Trail<'_>) -> Option<Flows> {
        let fields = self.fields(node, &words::FLOWS_MAP, at)?;
        let entries = self.optional(&fields, &words::FLOWS_ENTRIES, at, number(&words::FLOW_COUNT));
        let ports = self.optional(&fields, &words::FLOWS_PORTS, at, scalar::ports);
        let addresses = self.own_addresses(&fields, &words::FLOWS_ADDRESSES, at);
        let unanswered = self.duration(&fields, &words::FLOWS_UNANSWERED, at);
        let assured = self.duration(&fields, &words::FLOWS_ASSURED, at);
        let default = Flows::default();
        Some(Flows {
            entries: entries?.unwrap_or(default.entries),
            ports: ports?.unwrap_or(default.ports),
            addresses: addresses?,
            unanswered: unanswered?,
            assured: assured?,
        })
    }

    fn decap(&mut self, node: &Node<'_>, at: &Trail<'_>) -> Option<Decap> {
        let fields = self.fields(node, &words::DECAP_MAP, at)?;
        let from = self.senders(&fields, &words::DECAP_FROM, at);
        let via = fields.get(&words::DECAP_VIA);
        let at = at.field(words::DECAP_VIA.name);
        let via = via.and_then(|node| self.tunnels(node, &at));
        Some(Decap { from: from?, via: via? })
    }

    /// Returns the kind or kinds of outer headers, at least one.
    fn tunnels(&mut self, node: &Node<'_>, at: &Trail<'_>) -> Option<Vec<Via>> {
        match &node.content {
            Content::List(nodes) if nodes.is_empty() => {
                let help = format!("write one of {}, or several", words::list(words::TUNNELS));
                self.error(at, Message::new("an empty list").help(help));
                None
            }
            Content::List(nodes) => self.each(nodes, at, scalar::tunnel),
            _ => self.ok(at, scalar::tunnel(node)).map(|via| vec![via]),
        }
    }

    fn rules(&mut self, nodes: &[Node<'_>], defaults: &Options, at: &Trail<'_>) {
        self.decoded.rules.reserve(nodes.len());
        for (index, node) in nodes.iter().enumerate() {
            let rule = self.rule(node, defaults, &at.index(index));
            self.decoded.rules.extend(rule);
        }
    }

    fn rule(&mut self, node: &Node<'_>, defaults: &Options, at: &Trail<'_>) -> Option<RuleConfig> {
        let fields = self.fields(node, &words::RULE_MAP, at)?;
        let name = self.optional(&fields, &words::NAME, at, scalar::name);
        let key = fields.get(&words::KEY);
        let key = key.and_then(|node| self.key(node, &at.field(words::KEY.name)));
        let upstreams = fields.get(&words::UPSTREAM).and_then(|node| {
            let at = at.field(words::UPSTREAM.name);
            self.hosts(node, &words::UPSTREAM_MAP, &at)
        });
        let mirrors = match fields.get(&words::MIRROR) {
            None => Some(Vec::new()),
            Some(node) => self.hosts(node, &words::MIRROR_MAP, &at.field(words::MIRROR.name)),
        };
        let at_options = at.field(words::OPTIONS.name);
        let own = self.options(fields.get(&words::OPTIONS), &at_options);
        let options = own.or(defaults);
        let selection = self.selection(&own, &options, &at_options);
        let reply = self.option(&options, &words::REPLY);
        if own.answers.is_given() && reply.is_some_and(|reply| reply != Reply::Nat) {
            let message = Message::new("`answers` ends flows, which only `reply: nat` has");
            let message = message.help("leave it out, or set `reply: nat`");
            self.error(&at_options.field(words::ANSWERS.name), message);
        }
        let sticky = self.sticky(&own, &options, reply, &at_options);

        let (name, key, (strategy, payload, hash)) = (name?, key?, selection?);
        let server_id = self.server_id_of(&own, &options, strategy, &at_options)?;
        let mut rule = RuleConfig {
            name: name.unwrap_or_else(|| key.to_string()),
            key,
            action: self.option(&options, &words::TC_ACTION)?,
            mode: self.option(&options, &words::MODE)?,
            strategy,
            payload,
            server_id,
            hash,
            templates: self.option(&options, &words::TEMPLATES)?,
            source: self.source(&options, reply?)?,
            reply: reply?,
            via: self.via(&own, &options, reply?, &at_options),
            answers: options.answers.value().filter(|_| reply == Some(Reply::Nat)),
            sticky,
            health: match &options.health {
                Given::Missing => Health::Off,
                Given::Invalid => return None,
                Given::Valid(health) => health.clone(),
            },
            all_down: self.option(&options, &words::ALL_DOWN)?,
            fragments: self.option(&options, &words::FRAGMENTS)?,
            zero_checksum: self.option(&options, &words::ZERO_CHECKSUM)?,
            martians: self.option(&options, &words::MARTIANS)?,
            senders: options.senders.value(),
            upstreams: upstreams?,
            mirrors: mirrors?,
            at: at.path(),
        };
        self.has_port_to_probe(&rule, &at_options);
        self.has_ports_to_select(&rule, &own, &at_options);
        self.check_templates(&mut rule, &own, &at_options);
        if self.decoded.root == Root::Map {
            self.unwritten(&rule, &options, &at_options);
        }
        if rule.action == Action::Block
            && rule.key.address == KeyAddress::Any
            && rule.key.ports.is_empty()
        {
            let message = "with `tc_action: block`, `any` address and port take every datagram that \
                           comes to this host, also those for its own services: DNS answers, DHCP, \
                           VPNs";
            self.warn(&at.field(words::KEY.name), message);
        }
        Some(rule)
    }

    /// Reports a probe whose port depends on the packet.
    fn has_port_to_probe(&mut self, rule: &RuleConfig, at: &Trail<'_>) {
        let check = rule.health.probe().map(|probe| &probe.check);
        let Some(check) = check.filter(|check| check.has_port() && check.port().is_none()) else {
            return;
        };
        if rule.key.only_port().is_some() {
            return;
        }
        if let Some(upstream) =
            rule.upstreams.iter().find(|it| it.port.is_none() && it.address != Host::Local)
        {
            let message = format!(
                "the {} probe needs a `port`: {} has the one that each packet came to",
                check.name(),
                upstream.endpoint()
            );
            self.error(&at.field(words::HEALTH.name), Message::new(message));
        }
    }

    /// Reports a destination port that selects and is always the same. In a list from the file's defaults it
    /// is for other rules.
    fn has_ports_to_select(&mut self, rule: &RuleConfig, own: &Options, at: &Trail<'_>) {
        let is_meant = own.strategy.is_given() || rule.strategy == Strategy::DstPort;
        let Some(port) = rule.key.only_port() else { return };
        if is_meant && rule.strategy.reads_dst_port() {
            let message = format!("`dst-port` selects nothing: the key has port {port} alone");
            let help = "select by another part, or give the key several ports";
            let at = at.field(words::STRATEGY.field.name);
            self.error(&at, Message::new(message).help(help));
        }
    }

    /// Reports `templates: all` in a rule where it means nothing; there the file's default does not hold.
    fn check_templates(&mut self, rule: &mut RuleConfig, own: &Options, at: &Trail<'_>) {
        let samples = rule.upstreams.iter().any(|it| it.sample.is_some());
        let (message, help) = match (rule.mode, rule.reply) {
            _ if rule.templates == Templates::One => return,
            (_, Reply::Nat) => (
                "with `reply: nat` a packet has one upstream, which answers it",
                "collectors do not answer: leave `reply` out",
            ),
            (Mode::Replicate, _) if !samples => (
                "with `mode: replicate` all upstreams get every packet, templates too",
                "leave it out: it is for `mode: balance`, and for upstreams with `sample`",
            ),
            _ => return,
        };
        rule.templates = Templates::One;
        if own.get(&words::TEMPLATES).is_given() {
            let at = at.field(words::TEMPLATES.field.name);
            self.error(&at, Message::new(message).help(help));
        }
    }

    /// Warns of defaults that are often not intended. A bare list has no words for anything else.
    fn unwritten(&mut self, rule: &RuleConfig, options: &Options, at: &Trail<'_>) {
        let all = rule.upstreams.len();
        // These mean something for balancing alone.
        let balances = options.get(&words::HASH).is_given()
            || rule.upstreams.iter().any(|it| it.weight.is_some());
        let chosen =
            options.get(&words::MODE).is_given() || options.strategy.is_given() || balances;
        if all > 1 && !chosen {
            let message = format!(
                "each packet goes to one of the {all} upstreams (`mode: balance`, the default): say \
                 `mode: replicate` if all are to get it, or else `mode: balance`"
            );
            self.warn(at, &message);
        }
        let has_source = |it: &UpstreamConfig| it.source.is_some() || it.address == Host::Local;
        let own_sources = rule.destinations().all(has_source);
        if options.source.is_given() || own_sources || rule.reply != Reply::None {
            return;
        }
        let telemetry = TELEMETRY
            .iter()
            .find(|(port, _)| rule.key.ports.iter().any(|ports| ports.contains(*port)));
        if rule.mode == Mode::Replicate {
            let message = "with `source: vip`, the default, all senders look like this host to \
                           the upstreams: say `source`";
            self.warn(at, message);
        } else if let Some((port, protocol)) = telemetry {
            let message = format!(
                "port {port} ({protocol}): with `source: vip`, the default, all senders look like this \
                 host to the upstreams: say `source: preserve`, or `source: vip`"
            );
            self.warn(at, &message);
        }
    }

    /// Returns the options that select an upstream. `options` are `own`, the rule's, after the defaults
    /// of the file.
    fn selection(
        &mut self,
        own: &Options,
        options: &Options,
        at: &Trail<'_>,
    ) -> Option<(Strategy, Option<Payload>, Hash)> {
        let strategy = self.strategy_of(options);
        let hash = self.option(options, &words::HASH);
        match self.option(options, &words::MODE)? {
            Mode::Balance => {
                let payload = self.payload_of(own, options, strategy, at);
                Some((strategy?, payload?, hash?))
            }
            Mode::Replicate => {
                self.needs_balance(own, at);
                // Defaults for selecting are for rules that balance.
                Some((Strategy::SrcIpPort, None, Hash::Maglev))
            }
        }
    }

    /// Returns the strategy after all defaults; none if it is invalid.
    fn strategy_of(&self, options: &Options) -> Option<Strategy> {
        match options.strategy {
            Given::Missing => self.settle(Given::Missing, &words::STRATEGY),
            given => given.value(),
        }
    }

    /// Returns the value of an option after all defaults; none if it is invalid.
    fn option<T: Deserialize<'static>>(
        &self,
        options: &Options,
        choice: &'static EnumField,
    ) -> Option<T> {
        self.settle(options.get(choice), choice)
    }

    /// Returns the way to the upstreams of a rule, and reports one that has no meaning.
    fn via(
        &mut self,
        own: &Options,
        options: &Options,
        reply: Reply,
        at: &Trail<'_>,
    ) -> Option<Via> {
        if reply == Reply::Direct {
            return options.get(&words::VIA).value().and_then(variant);
        }
        if own.get(&words::VIA).is_given() {
            let message = Message::new("`via` needs `reply: direct`");
            self.error(&at.field(words::VIA.field.name), message);
        }
        None
    }

    /// Returns true if senders keep their upstream, and reports where this has no meaning.
    fn sticky(
        &mut self,
        own: &Options,
        options: &Options,
        reply: Option<Reply>,
        at: &Trail<'_>,
    ) -> bool {
        let message = match (self.option(options, &words::MODE), reply) {
            (Some(Mode::Replicate), _) => {
                "`sticky` needs `mode: balance`: with `mode: replicate` every upstream gets each packet"
            }
            (_, Some(Reply::Nat)) => {
                "with `reply: nat` senders keep their upstream anyway, by the flow of their answers"
            }
            _ => return options.sticky.value().unwrap_or(false),
        };
        if own.sticky.value() == Some(true) {
            let message = Message::new(message).help("leave `sticky` out");
            self.error(&at.field(words::STICKY.name), message);
        }
        false
    }

    /// Returns the source of outgoing packets: answers that are routed need the client's own, and those of
    /// flows this host's.
    fn source(&self, options: &Options, reply: Reply) -> Option<Source> {
        match (options.source, reply) {
            (Given::Missing, Reply::Direct | Reply::Route) => Some(Source::Preserve),
            (Given::Missing, Reply::Nat) => Some(Source::Egress),
            (Given::Missing, Reply::None) => {
                variant(words::SOURCE.default_word(self.decoded.root)?)
            }
            (given, _) => given.value(),
        }
    }

    /// Reports options that select an upstream, in a rule that replicates.
    fn needs_balance(&mut self, own: &Options, at: &Trail<'_>) {
        let given = [
            (&words::STRATEGY.field, own.strategy.is_given()),
            (&words::PAYLOAD, own.payload.is_given()),
            (&words::SERVER_ID, own.server_id.is_given()),
            (&words::HASH.field, own.get(&words::HASH).is_given()),
        ];
        for (field, _) in given.iter().filter(|(_, given)| *given) {
            let message = format!(
                "`{}` selects one of several upstreams, and with `mode: replicate` all of them \
                 get the packet",
                field.name
            );
            self.error(&at.field(field.name), Message::new(message));
        }
    }

    /// Returns the payload's key of the strategy; the outer none is an error.
    fn payload_of(
        &mut self,
        own: &Options,
        options: &Options,
        strategy: Option<Strategy>,
        at: &Trail<'_>,
    ) -> Option<Option<Payload>> {
        match (strategy?, options.payload) {
            (strategy, Given::Missing) if strategy.reads_payload() => {
                let message = "the strategy `payload` needs the option `payload`";
                let help = "`payload: statsd`, or `payload: { offset: 0, length: 8 }`";
                let at = at.field(words::STRATEGY.field.name);
                self.error(&at, Message::new(message).help(help));
                None
            }
            (strategy, payload) if strategy.reads_payload() => payload.value().map(Some),
            _ if own.payload.is_given() => {
                let message = "`payload` needs `strategy: payload`, or a list with `payload`";
                self.error(&at.field(words::PAYLOAD.name), Message::new(message));
                None
            }
            _ => Some(None),
        }
    }

    /// Returns the place of server ids of the strategy; the outer none is an error.
    fn server_id_of(
        &mut self,
        own: &Options,
        options: &Options,
        strategy: Strategy,
        at: &Trail<'_>,
    ) -> Option<Option<ServerIdPlace>> {
        match (strategy, options.server_id) {
            (Strategy::QuicCid, Given::Missing) => {
                let message = "the strategy `quic-cid` needs the option `server-id`";
                let help =
                    "the place of the id in connection ids: `server-id: { offset: 1, length: 2 }`";
                let at = at.field(words::STRATEGY.field.name);
                self.error(&at, Message::new(message).help(help));
                None
            }
            (Strategy::QuicCid, place) => place.value().map(Some),
            _ if own.server_id.is_given()
                && self.option(options, &words::MODE) == Some(Mode::Balance) =>
            {
                let message = "`server-id` needs `strategy: quic-cid`";
                self.error(&at.field(words::SERVER_ID.name), Message::new(message));
                None
            }
            _ => Some(None),
        }
    }

    /// Returns the value of a choice or its default; none if it is invalid.
    fn settle<T: Deserialize<'static>>(
        &self,
        given: Given<&'static str>,
        choice: &'static EnumField,
    ) -> Option<T> {
        match given {
            Given::Missing => variant(choice.default_word(self.decoded.root)?),
            given => variant(given.value()?),
        }
    }

    /// Reads a field that may be missing: `None` if it is invalid, `Some(None)` if it is missing.
    fn optional<T>(
        &mut self,
        fields: &Fields<'_, '_>,
        field: &'static Field,
        at: &Trail<'_>,
        read: impl FnOnce(&Node<'_>) -> Result<T, Message>,
    ) -> Option<Option<T>> {
        match fields.get(field) {
            None => Some(None),
            Some(node) => self.ok(&at.field(field.name), read(node)).map(Some),
        }
    }

    /// Reads a number of an option.
    fn count(
        &mut self,
        fields: &Fields<'_, '_>,
        field: &'static Field,
        limits: &'static Number,
        at: &Trail<'_>,
    ) -> Given<u32> {
        match self.optional(fields, field, at, number(limits)) {
            None => Given::Invalid,
            Some(None) => Given::Missing,
            Some(Some(count)) => Given::Valid(count),
        }
    }

    /// Reads a duration, or the field's default.
    fn duration(
        &mut self,
        fields: &Fields<'_, '_>,
        field: &'static Field,
        at: &Trail<'_>,
    ) -> Option<Period> {
        let Shape::Duration(limits) = field.shape else { return None };
        match self.optional(fields, field, at, |node| scalar::duration(node, limits))? {
            None => field.default.parse().ok(),
            given => given,
        }
    }

    fn key(&mut self, node: &Node<'_>, at: &Trail<'_>) -> Option<Key> {
        let fields = self.fields(node, &words::KEY_MAP, at)?;
        let address = fields.get(&words::KEY_ADDRESS).and_then(|node| {
            let at = at.field(words::KEY_ADDRESS.name);
            let address = self.ok(&at, scalar::key_address(node))?;
            self.unless_list(&at, "`any`", address == KeyAddress::Any)?;
            Some(address)
        });
        let ports = fields.get(&words::KEY_PORT).and_then(|node| {
            let at = at.field(words::KEY_PORT.name);
            self.ports(node, &at)
        });
        let from = self.senders(&fields, &words::KEY_FROM, at);
        let not_from = self.senders(&fields, &words::KEY_NOT_FROM, at);
        Some(Key { address: address?, ports: ports?, from: from?, not_from: not_from? })
    }

    /// Reports a value that the bare list does not take, and returns None.
    fn unless_list(&mut self, at: &Trail<'_>, what: &str, is_there: bool) -> Option<()> {
        if is_there && self.decoded.root == Root::List {
            self.error(at, words::map_only(what));
            return None;
        }
        Some(())
    }

    /// Returns the ports of a key; none of them means any.
    fn ports(&mut self, node: &Node<'_>, at: &Trail<'_>) -> Option<Vec<Ports>> {
        if matches!(&node.content, Content::Text(text) if text == ANY) {
            self.unless_list(at, "`any`", true)?;
            return Some(Vec::new());
        }
        let Content::List(nodes) = &node.content else {
            let ports = self.ok(at, scalar::ports(node))?;
            self.unless_list(at, "a range of ports", ports.first != ports.last)?;
            return Some(vec![ports]);
        };
        self.unless_list(at, "a list of ports", true)?;
        if nodes.is_empty() {
            let message = Message::new("no ports: a key needs at least one");
            self.error(at, message.help("`port: any` matches all"));
            return None;
        }
        self.each(nodes, at, scalar::ports)
    }

    /// Returns the networks of a field; none of them means that it is missing.
    fn senders(
        &mut self,
        fields: &Fields<'_, '_>,
        field: &'static Field,
        at: &Trail<'_>,
    ) -> Option<Vec<Network>> {
        let Some(node) = fields.get(field) else { return Some(Vec::new()) };
        let at = &at.field(field.name);
        let Content::List(nodes) = &node.content else {
            return self.ok(at, scalar::networks(node)).map(|network| vec![network]);
        };
        if nodes.is_empty() {
            let help = match field.required {
                true => "name at least one".into(),
                false => format!("leave `{}` out where it names nobody", field.name),
            };
            self.error(at, Message::new("an empty list of networks").help(help));
            return None;
        }
        self.each(nodes, at, scalar::network)
    }

    /// Returns the addresses of a list, which may be left out.
    fn own_addresses(
        &mut self,
        fields: &Fields<'_, '_>,
        field: &'static Field,
        at: &Trail<'_>,
    ) -> Option<Vec<IpAddr>> {
        let Some(node) = fields.get(field) else { return Some(Vec::new()) };
        let at = &at.field(field.name);
        let nodes = self.list(node, "a list of addresses of this host", at)?;
        if nodes.is_empty() {
            let help = format!("leave `{}` out for the address towards each upstream", field.name);
            self.error(at, Message::new("an empty list of addresses").help(help));
            return None;
        }
        self.each(nodes, at, scalar::own_address)
    }

    /// Returns all values of a list, or None if one is invalid.
    fn each<T>(
        &mut self,
        nodes: &[Node<'_>],
        at: &Trail<'_>,
        read: fn(&Node<'_>) -> Result<T, Message>,
    ) -> Option<Vec<T>> {
        let values = nodes.iter().enumerate();
        let values: Vec<_> =
            values.map(|(index, node)| self.ok(&at.index(index), read(node))).collect();
        values.into_iter().collect()
    }

    /// Returns the upstreams or mirrors of a rule.
    fn hosts(
        &mut self,
        node: &Node<'_>,
        table: &'static Table,
        at: &Trail<'_>,
    ) -> Option<Vec<UpstreamConfig>> {
        let Content::List(nodes) = &node.content else {
            let what = format!("a list, each {} (a map)", table.what);
            return self.ok(at, scalar::list(&what, node));
        };
        if nodes.is_empty() && std::ptr::eq(table, &words::UPSTREAM_MAP) {
            self.error(at, Message::new("no upstreams: a rule needs at least one"));
            return None;
        }
        let upstreams: Vec<_> = nodes
            .iter()
            .enumerate()
            .map(|(index, node)| self.host(node, table, &at.index(index)))
            .collect();
        upstreams.into_iter().collect()
    }

    fn host(
        &mut self,
        node: &Node<'_>,
        table: &'static Table,
        at: &Trail<'_>,
    ) -> Option<UpstreamConfig> {
        let fields = self.fields(node, table, at)?;
        let name = self.optional(&fields, &words::UPSTREAM_NAME, at, scalar::name);
        let address = fields.get(&words::UPSTREAM_ADDRESS).and_then(|node| {
            let at = at.field(words::UPSTREAM_ADDRESS.name);
            let host = self.ok(&at, scalar::upstream_address(node))?;
            self.unless_list(&at, "`local`", host == Host::Local)?;
            Some(host)
        });
        let addresses = self.choice(&fields, &words::UPSTREAM_ADDRESSES, at);
        if let (Some(Host::Address(_) | Host::Local), true) = (&address, addresses.is_given()) {
            let message = Message::new("`addresses` needs a host name, and this is an address");
            self.error(&at.field(words::UPSTREAM_ADDRESSES.field.name), message);
        }
        let addresses = self.settle(addresses, &words::UPSTREAM_ADDRESSES);
        let port = self.optional(&fields, &words::UPSTREAM_PORT, at, scalar::port);
        let weight = self.optional(&fields, &words::UPSTREAM_WEIGHT, at, number(&words::WEIGHT));
        let priority =
            self.optional(&fields, &words::UPSTREAM_PRIORITY, at, number(&words::PRIORITY));
        let sample = self.optional(&fields, &words::UPSTREAM_SAMPLE, at, number(&words::SAMPLE));
        let server_id = self.optional(&fields, &words::UPSTREAM_SERVER_ID, at, scalar::server_id);
        let from = self.senders(&fields, &words::UPSTREAM_FROM, at);
        let not_from = self.senders(&fields, &words::UPSTREAM_NOT_FROM, at);
        let state = self.choice(&fields, &words::UPSTREAM_STATE, at);
        let state = self.settle(state, &words::UPSTREAM_STATE);
        let source = match self.sender(&fields, &words::UPSTREAM_SOURCE, at) {
            Given::Missing => Some(None),
            given => given.value().map(Some),
        };
        let via = match self.choice(&fields, &words::UPSTREAM_VIA, at) {
            Given::Missing => Some(None),
            given => given.value().and_then(variant).map(Some),
        };
        Some(UpstreamConfig {
            name: name?,
            address: address?,
            addresses: addresses?,
            port: port?,
            weight: weight?,
            priority: priority?,
            state: state?,
            source: source?,
            via: via?,
            sample: sample?,
            server_id: server_id?,
            from: from?,
            not_from: not_from?,
            at: at.path(),
        })
    }

    fn options(&mut self, node: Option<&Node<'_>>, at: &Trail<'_>) -> Options {
        let Some(node) = node else {
            return Options::default();
        };
        let Some(fields) = self.fields(node, &words::OPTIONS_MAP, at) else {
            return Options::default();
        };
        let mut options = Options::default();
        for (value, field) in options.choices.iter_mut().zip(words::OPTIONS_MAP.fields) {
            if let Shape::Choice(choice) = field.shape {
                *value = self.choice(&fields, choice, at);
            }
        }
        options.strategy = self.strategy(&fields, at);
        options.source = self.sender(&fields, &words::SOURCE, at);
        if let Some(node) = fields.get(&words::PAYLOAD) {
            let payload = self.payload(node, &at.field(words::PAYLOAD.name));
            options.payload = payload.map_or(Given::Invalid, Given::Valid);
        }
        if let Some(node) = fields.get(&words::SERVER_ID) {
            let place = self.server_id_place(node, &at.field(words::SERVER_ID.name));
            options.server_id = place.map_or(Given::Invalid, Given::Valid);
        }
        if let Some(node) = fields.get(&words::HEALTH) {
            let health = self.health(node, &at.field(words::HEALTH.name));
            options.health = health.map_or(Given::Invalid, Given::Valid);
        }
        options.answers = self.count(&fields, &words::ANSWERS, &words::ANSWER_COUNT, at);
        options.senders = self.count(&fields, &words::SENDERS, &words::SENDER_COUNT, at);
        if let Some(node) = fields.get(&words::STICKY) {
            let sticky = self.ok(&at.field(words::STICKY.name), scalar::switch(node));
            options.sticky = sticky.map_or(Given::Invalid, Given::Valid);
        }
        options
    }

    fn strategy(&mut self, fields: &Fields<'_, '_>, at: &Trail<'_>) -> Given<Strategy> {
        let strategy = match fields.get(&words::STRATEGY.field).map(|node| &node.content) {
            Some(Content::List(nodes)) => {
                self.parts(nodes, &at.field(words::STRATEGY.field.name)).map(Strategy::Parts)
            }
            _ => match self.choice(fields, &words::STRATEGY, at) {
                Given::Missing => return Given::Missing,
                given => given.value().and_then(variant),
            },
        };
        strategy.map_or(Given::Invalid, Given::Valid)
    }

    /// Returns the parts of a packet that select together. A single word has no second spelling as a list.
    fn parts(&mut self, nodes: &[Node<'_>], at: &Trail<'_>) -> Option<StrategyParts> {
        self.unless_list(at, "a list of parts", true)?;
        let parts = self.each(nodes, at, scalar::part)?;
        let mut distinct = parts.iter().enumerate();
        if let Some((twice, _)) = distinct.find(|(index, part)| parts[..*index].contains(part)) {
            self.error(&at.index(twice), Message::new("this part is already in the list"));
            return None;
        }
        let help = match parts[..] {
            [] => "leave it out for the default".into(),
            [part] => format!("write `{}: {}`", words::STRATEGY.field.name, part.word()),
            [StrategyPart::SrcIp, StrategyPart::SrcPort]
            | [StrategyPart::SrcPort, StrategyPart::SrcIp] => {
                format!("write `{}: src-ip-port`", words::STRATEGY.field.name)
            }
            _ => return Some(parts.into()),
        };
        let message = match parts.len() {
            0 => "an empty list of parts",
            1 => "a list needs two parts at least",
            _ => "these parts together are a word of their own",
        };
        self.error(at, Message::new(message).help(help));
        None
    }

    fn server_id_place(&mut self, node: &Node<'_>, at: &Trail<'_>) -> Option<ServerIdPlace> {
        /// Maximum length of a connection id (RFC 9000, section 17.2).
        const CONNECTION_ID: u32 = 20;
        let fields = self.fields(node, &words::SERVER_ID_MAP, at)?;
        let offset =
            self.optional(&fields, &words::SERVER_ID_OFFSET, at, number(&words::SERVER_ID_OFFSETS));
        let length =
            self.optional(&fields, &words::SERVER_ID_LENGTH, at, number(&words::SERVER_ID_LENGTHS));
        let (offset, length) = (offset?.unwrap_or(1), length??);
        if offset + length > CONNECTION_ID {
            let message = format!(
                "{length} bytes at {offset} end beyond a connection id, which has at most \
                 {CONNECTION_ID} bytes"
            );
            self.error(at, Message::new(message));
            return None;
        }
        Some(ServerIdPlace { offset: offset as u8, length: length as u8 })
    }

    fn payload(&mut self, node: &Node<'_>, at: &Trail<'_>) -> Option<Payload> {
        match &node.content {
            Content::Text(text) => {
                let known = Payload::WORDS.iter().find(|(word, _)| word == text);
                return match known {
                    Some((_, payload)) => Some(*payload),
                    None => self.ok(at, Err(words::unknown_word(text, &words::PAYLOAD_WORDS))),
                };
            }
            Content::Map(_) => {}
            _ => {
                let what = "a word such as `statsd`, or a map of `offset` and `length`";
                return self.ok(at, scalar::expected(what, node));
            }
        }
        let fields = self.fields(node, &words::PAYLOAD_MAP, at)?;
        let offset = self.optional(&fields, &words::PAYLOAD_OFFSET, at, number(&words::OFFSET));
        let length = self.optional(&fields, &words::PAYLOAD_LENGTH, at, number(&words::LENGTH));
        Some(Payload::Bytes {
            offset: offset??.try_into().ok()?,
            length: length??.try_into().ok()?,
        })
    }

    /// Returns the source of outgoing packets: one of the choice's words, or an address.
    fn sender(
        &mut self,
        fields: &Fields<'_, '_>,
        choice: &'static EnumField,
        at: &Trail<'_>,
    ) -> Given<Source> {
        let Some(node) = fields.get(&choice.field) else { return Given::Missing };
        let root = self.decoded.root;
        let source = match &node.content {
            Content::Text(text) if host::resembles_address(text) => host::source(text),
            Content::Text(name) => choice.word(name, root).and_then(host::source),
            _ => scalar::expected(&format!("{}, or an address", choice.list(root)), node),
        };
        self.ok(&at.field(choice.field.name), source).map_or(Given::Invalid, Given::Valid)
    }

    /// Returns the word of a choice.
    fn choice(
        &mut self,
        fields: &Fields<'_, '_>,
        choice: &'static EnumField,
        at: &Trail<'_>,
    ) -> Given<&'static str> {
        let Some(node) = fields.get(&choice.field) else {
            return Given::Missing;
        };
        let root = self.decoded.root;
        let word = match &node.content {
            Content::Text(name) => choice.word(name, root),
            _ => scalar::expected(&choice.list(root), node),
        };
        self.ok(&at.field(choice.field.name), word).map_or(Given::Invalid, Given::Valid)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Addresses, Admission, AllDown, Fragments, State};
    use super::*;

    fn has_variants<T: Deserialize<'static>>(choice: &'static EnumField) {
        for word in choice.words {
            assert!(variant::<T>(word).is_some(), "{word}");
        }
    }

    #[test]
    fn every_word_is_a_variant() {
        has_variants::<Action>(&words::TC_ACTION);
        has_variants::<Mode>(&words::MODE);
        has_variants::<Source>(&words::SOURCE);
        has_variants::<Reply>(&words::REPLY);
        has_variants::<Via>(&words::VIA);
        has_variants::<Strategy>(&words::STRATEGY);
        has_variants::<Hash>(&words::HASH);
        has_variants::<AllDown>(&words::ALL_DOWN);
        has_variants::<Templates>(&words::TEMPLATES);
        has_variants::<Fragments>(&words::FRAGMENTS);
        has_variants::<Admission>(&words::ZERO_CHECKSUM);
        has_variants::<Admission>(&words::MARTIANS);
        has_variants::<State>(&words::UPSTREAM_STATE);
        has_variants::<Addresses>(&words::UPSTREAM_ADDRESSES);
    }
}
