//! Events of the program about packets and copies, with the names of the configuration.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ffi::CStr;
use std::fmt;
use std::mem::offset_of;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use schemars::JsonSchema;
use serde::Serialize;

use crate::bpf::{NOTES, VERDICTS, from_bytes, is_forwarded, types, unwire};
use crate::config::{Mode, Strategy, StrategyPart, with_port};
use crate::datapath::description::Generation;
use crate::desired::miss::{self, Miss};
use crate::desired::{Rule, Upstream, diff};
use crate::time;

/// An event from the ring buffer. The frames are empty unless `--pcap` asked for them.
#[derive(Clone, Copy, Debug)]
pub struct Event(pub types::event);

/// Verdict of a packet that no rule matches.
const UNMATCHED: &str = "unmatched";

impl Event {
    /// Parses an event; `None` if it is too short.
    pub fn read(bytes: &[u8]) -> Option<Event> {
        if bytes.len() < offset_of!(types::event, received) {
            return None;
        }
        let mut whole = bytes.to_vec();
        whole.resize(size_of::<types::event>(), 0);
        let mut event = Event(from_bytes(&whole)?);
        // the buffer holds the previous packet's frame if this one was not sent
        if !event.is_sent() {
            event.0.sent = Default::default();
        }
        Some(event)
    }

    pub fn source(&self) -> IpAddr {
        unwire(self.0.source, self.is_ipv6())
    }

    pub fn destination(&self) -> IpAddr {
        unwire(self.0.destination, self.is_ipv6())
    }

    /// Returns the address of the neighbour, if one had to be resolved.
    pub fn gateway(&self) -> Option<IpAddr> {
        // an IPv4 address is in the first word
        let ipv6 = self.0.gateway[1..] != [0; 3];
        (self.0.gateway != [0; 4]).then(|| unwire(self.0.gateway, ipv6))
    }

    /// Returns the MAC address of the neighbour.
    pub fn mac(&self) -> Option<String> {
        let mac = &self.0.macs[..6];
        let text = || mac.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":");
        (*mac != [0; 6]).then(text)
    }

    pub fn verdict(&self) -> &'static str {
        if self.0.verdict == types::verdict::VERDICT_UNMATCHED {
            return UNMATCHED;
        }
        let mut names = VERDICTS.iter().chain(&NOTES);
        let name = names.find(|(verdict, _)| *verdict == self.0.verdict);
        name.map_or("unknown", |(_, name)| *name)
    }

    /// Returns true if the packet went to the upstream.
    pub fn is_sent(&self) -> bool {
        is_forwarded(self.0.verdict)
    }

    /// Returns true if the upstream was selected by a key, and not by a flow.
    pub fn is_selected(&self, rule: &Rule, is_copy: bool) -> bool {
        const NO_SLOT: u32 = u32::MAX;
        let found = self.0.upstream != 0 || self.verdict() == "no-upstream";
        let several = rule.mode == Mode::Balance && rule.upstreams.len() > 1;
        several && found && !is_copy && self.0.fragment == 0 && self.0.slot != NO_SLOT
    }

    fn is_ipv6(&self) -> bool {
        self.0.ipv6 != 0
    }

    fn port(&self, port: u16) -> Option<u16> {
        (self.0.fragment == 0).then(|| u16::from_be(port))
    }

    fn endpoint(&self, address: IpAddr, port: u16) -> String {
        self.port(port).map_or_else(|| address.to_string(), |port| with_port(address, port))
    }

    /// Returns the selection of the upstream, by the strategy of its rule.
    pub fn selection(&self, strategy: Strategy) -> Selection {
        Selection {
            strategy: diff::word(&strategy),
            value: self.key(strategy),
            number: self.0.key,
            slot: self.0.slot,
        }
    }

    /// Returns the selection key as text; `None` if it is not in the headers.
    fn key(&self, strategy: Strategy) -> Option<String> {
        match strategy {
            Strategy::SrcPort => Some(u16::from_be(self.0.source_port).to_string()),
            Strategy::SrcIp => Some(self.source().to_string()),
            // packets that name a server have no key
            Strategy::SrcIpPort | Strategy::QuicCid => {
                Some(self.endpoint(self.source(), self.0.source_port))
            }
            Strategy::DstPort => Some(u16::from_be(self.0.port).to_string()),
            Strategy::Random | Strategy::Payload => None,
            Strategy::Parts(parts) => {
                let values = parts.iter().map(|part| match part {
                    StrategyPart::SrcIp => self.key(Strategy::SrcIp),
                    StrategyPart::SrcPort => self.key(Strategy::SrcPort),
                    StrategyPart::DstPort => self.key(Strategy::DstPort),
                    StrategyPart::Payload => None,
                });
                values.collect::<Option<Vec<_>>>().map(|values| values.join(", "))
            }
        }
    }
}

/// Names for the numbers in events, from the descriptions of generations and the interfaces.
#[derive(Default)]
pub struct Names {
    generations: BTreeMap<u32, Words>,
    /// Generations without a description.
    gone: BTreeSet<u32>,
    interfaces: HashMap<u32, String>,
}

/// Names of one generation.
struct Words {
    generation: Generation,
    /// Index of a rule by its id.
    rules: HashMap<u32, usize>,
    /// Indexes of a rule and its destination by the id of the destination or of its answers.
    destinations: HashMap<u32, (usize, usize)>,
    /// Ids of answers.
    answers: HashSet<u32>,
}

impl Names {
    pub fn add(&mut self, generation: Generation) {
        let (mut rules, mut destinations) = (HashMap::new(), HashMap::new());
        for (index, ids) in generation.description.ids.iter().enumerate() {
            rules.insert(ids.rule, index);
            let answers = ids.answers.iter().copied().enumerate();
            for (place, id) in ids.destinations().enumerate().chain(answers) {
                destinations.entry(id).or_insert((index, place));
            }
        }
        let ids = generation.description.ids.iter();
        let answers = ids.flat_map(|ids| ids.answers.iter().copied()).collect();
        let words = Words { generation, rules, destinations, answers };
        self.generations.insert(words.generation.number, words);
    }

    /// Records that a generation has no description; its events are shown with ids.
    pub fn give_up(&mut self, generation: u32) {
        self.gone.insert(generation);
    }

    /// Returns true if the generation has been looked up, with or without success.
    pub fn knows(&self, generation: u32) -> bool {
        self.generations.contains_key(&generation) || self.gone.contains(&generation)
    }

    /// Returns the rule of an event.
    pub fn rule(&self, event: &Event) -> Option<&Rule> {
        let words = self.generations.get(&event.0.generation)?;
        words.generation.description.desired.rules.get(*words.rules.get(&event.0.rule)?)
    }

    /// Returns the upstream of an event, and whether it gets copies.
    pub fn upstream(&self, event: &Event) -> Option<(&Upstream, bool)> {
        let words = self.generations.get(&event.0.generation)?;
        let (rule, place) = words.destinations.get(&event.0.upstream)?;
        let rule = words.generation.description.desired.rules.get(*rule)?;
        let is_receiver = rule.mode == Mode::Replicate || *place >= rule.upstreams.len();
        let is_copy = is_receiver || event.0.copy != 0;
        Some((rule.destinations().nth(*place)?, is_copy))
    }

    /// Returns true for an upstream's answer.
    pub fn is_answer(&self, event: &Event) -> bool {
        let words = self.generations.get(&event.0.generation);
        words.is_some_and(|words| words.answers.contains(&event.0.upstream))
    }

    pub fn interface(&mut self, index: u32) -> String {
        self.interfaces.entry(index).or_insert_with(|| interface(index)).clone()
    }

    /// Returns the rules that come nearest to an unmatched packet.
    fn misses(&self, event: &Event, interface: &str) -> Vec<Miss> {
        let words = self.generations.get(&event.0.generation);
        let Some(words) = words.filter(|_| event.verdict() == UNMATCHED) else { return Vec::new() };
        let destination = SocketAddr::new(event.destination(), u16::from_be(event.0.port));
        let desired = &words.generation.description.desired;
        miss::explain(desired, event.source(), destination, interface)
    }

    /// Converts an event to a record. `since_1970` is the offset of CLOCK_REALTIME from the clock of events.
    pub fn record(&mut self, event: &Event, since_1970: Duration) -> EventRecord {
        let time = since_1970 + Duration::from_nanos(event.0.time);
        let interface = self.interface(event.0.interface);
        let out = (event.0.out != 0).then(|| self.interface(event.0.out));
        let hop = NextHopRecord { interface: out, gateway: event.gateway(), mac: event.mac() };
        let rule = self.rule(event);
        let upstream = self.upstream(event);
        let is_copy = upstream.is_some_and(|(_, is_copy)| is_copy);
        let answer = self.is_answer(event);
        let selected = rule.filter(|rule| !answer && event.is_selected(rule, is_copy));
        let or_id = |name: Option<String>, id: u32| name.unwrap_or_else(|| format!("id {id}"));
        let sent_to =
            |name: Option<String>| (event.0.upstream != 0).then(|| or_id(name, event.0.upstream));
        EventRecord {
            time: time::exact(time),
            time_of_day: time::time_of_day(time),
            generation: event.0.generation,
            rule: (event.0.rule != 0)
                .then(|| or_id(rule.map(|rule| rule.name.clone()), event.0.rule)),
            source: event.endpoint(event.source(), event.0.source_port),
            destination: event.endpoint(event.destination(), event.0.port),
            length: event.0.length,
            fragment: event.0.fragment != 0,
            selection: selected.map(|rule| event.selection(rule.strategy)),
            upstream: sent_to(upstream.map(|(upstream, _)| upstream.label())),
            copy: is_copy,
            answer,
            next_hop: (hop.interface.is_some() || hop.gateway.is_some()).then_some(hop),
            sent: event.is_sent(),
            verdict: event.verdict(),
            endpoint: sent_to(upstream.map(|(upstream, _)| diff::endpoint(upstream))),
            misses: self.misses(event, &interface),
            interface,
        }
    }
}

/// Returns the name of an interface, or `if` and its index if it is gone.
fn interface(index: u32) -> String {
    let mut name = [0; libc::IF_NAMESIZE];
    // SAFETY: the name has room for IF_NAMESIZE bytes, of which the last is a zero.
    let found = unsafe { libc::if_indextoname(index, name.as_mut_ptr().cast()) };
    let text = CStr::from_bytes_until_nul(&name).map(CStr::to_string_lossy);
    match text {
        Ok(text) if !found.is_null() => text.into_owned(),
        _ => format!("if{index}"),
    }
}

/// The selection of an upstream by a packet.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Selection {
    pub strategy: String,
    /// The part of the packet that selects, where the headers show it.
    pub value: Option<String>,
    /// Hash or number of the value.
    pub number: u32,
    pub slot: u32,
}

/// Next hop of a packet, sent or not.
#[derive(Debug, Serialize, JsonSchema)]
pub struct NextHopRecord {
    pub interface: Option<String>,
    pub gateway: Option<IpAddr>,
    pub mac: Option<String>,
}

/// One event with names instead of numbers; as text it is one line.
#[derive(Debug, Serialize, JsonSchema)]
pub struct EventRecord {
    pub time: String,
    #[serde(skip)]
    time_of_day: String,
    pub interface: String,
    pub generation: u32,
    /// `None`: no rule matches the packet.
    pub rule: Option<String>,
    pub source: String,
    pub destination: String,
    /// Length of the frame in bytes.
    pub length: u32,
    /// A later fragment, which has no ports.
    pub fragment: bool,
    /// Selection of the upstream, if there are several.
    pub selection: Option<Selection>,
    pub upstream: Option<String>,
    /// Other upstreams get the packet too.
    pub copy: bool,
    /// The upstream has sent the packet.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    #[schemars(default)]
    pub answer: bool,
    pub next_hop: Option<NextHopRecord>,
    pub sent: bool,
    pub verdict: &'static str,
    #[serde(skip)]
    endpoint: Option<String>,
    /// Rules that nearly match an unmatched packet.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(default)]
    pub misses: Vec<Miss>,
}

impl fmt::Display for EventRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let EventRecord { time_of_day, interface, source, destination, length, .. } = self;
        let rule = self.rule.as_deref().unwrap_or("-");
        write!(f, "{time_of_day} {interface} {rule} {source} > {destination} length {length}")?;
        if self.fragment {
            write!(f, " fragment")?;
        }
        if let Some(Selection { strategy, value, slot, .. }) = &self.selection {
            write!(f, " {strategy}")?;
            if let Some(value) = value {
                write!(f, " {value}")?;
            }
            write!(f, " slot {slot}")?;
        }
        if let Some(endpoint) = &self.endpoint {
            let relation = match (self.answer, self.copy) {
                (true, _) => "answer of ",
                (_, true) => "-> copy to ",
                _ => "-> ",
            };
            write!(f, " {relation}{endpoint}")?;
        }
        if let Some(NextHopRecord { interface, gateway, mac }) = &self.next_hop {
            for (word, text) in [
                (" via ", gateway.map(|gateway| gateway.to_string())),
                (" dev ", interface.clone()),
                (" ", mac.clone()),
            ] {
                text.map_or(Ok(()), |text| write!(f, "{word}{text}"))?;
            }
        }
        write!(f, " {}", self.verdict)?;
        match self.misses.first() {
            Some(Miss { rule, text, .. }) => write!(f, ": rule {rule} {text}"),
            None => Ok(()),
        }
    }
}
