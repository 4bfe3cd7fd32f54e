//! Values of a valid configuration.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::health::{AllDown, Health};
use super::host::{self, Family, Host, KeyAddress, with_port};
use super::network::{Network, deciding};
use super::path::Path;
use super::period::Period;
use super::vocabulary::{self as words, ANY};

/// Treatment of the matched packet on this host, after a copy or the packet itself was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// The original goes up the local stack, byte-identical; the upstream gets a copy.
    Pass,
    /// The packet is not delivered here: it is forwarded, or dropped and counted.
    Block,
}

/// Number of upstreams that get a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// One.
    #[default]
    Balance,
    /// All.
    Replicate,
}

/// Part of a packet that selects its upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    SrcPort,
    SrcIp,
    SrcIpPort,
    DstPort,
    /// None: each packet by chance.
    Random,
    /// See [`Payload`].
    Payload,
    /// The server's id in the connection id of QUIC; else [`Strategy::SrcIpPort`].
    QuicCid,
    #[serde(untagged)]
    Parts(StrategyParts),
}

impl Strategy {
    /// Returns true if bytes of the payload select, alone or with other parts.
    pub fn reads_payload(self) -> bool {
        match self {
            Strategy::Parts(parts) => parts.has(StrategyPart::Payload),
            _ => self == Strategy::Payload,
        }
    }

    /// Returns true if the destination port selects, alone or with other parts.
    pub fn reads_dst_port(self) -> bool {
        match self {
            Strategy::Parts(parts) => parts.has(StrategyPart::DstPort),
            _ => self == Strategy::DstPort,
        }
    }
}

/// A part of a packet that selects its upstream together with others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StrategyPart {
    SrcIp,
    SrcPort,
    DstPort,
    Payload,
}

impl StrategyPart {
    /// The words of a file, in the order in which the parts are hashed.
    pub const WORDS: [(&str, StrategyPart); 4] = [
        ("src-ip", StrategyPart::SrcIp),
        ("src-port", StrategyPart::SrcPort),
        ("dst-port", StrategyPart::DstPort),
        ("payload", StrategyPart::Payload),
    ];

    /// Returns the word in a file.
    pub fn word(self) -> &'static str {
        StrategyPart::WORDS[self as usize].0
    }
}

/// Several parts of a packet that select its upstream together, in no order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "Vec<StrategyPart>", into = "Vec<StrategyPart>")]
pub struct StrategyParts {
    /// A bit for each part, by its number.
    mask: u8,
}

impl StrategyParts {
    pub fn has(self, part: StrategyPart) -> bool {
        self.mask & 1 << part as u8 != 0
    }

    pub fn iter(self) -> impl Iterator<Item = StrategyPart> {
        StrategyPart::WORDS.into_iter().map(|(_, part)| part).filter(move |part| self.has(*part))
    }
}

impl From<Vec<StrategyPart>> for StrategyParts {
    fn from(parts: Vec<StrategyPart>) -> StrategyParts {
        StrategyParts { mask: parts.into_iter().fold(0, |mask, part| mask | 1 << part as u8) }
    }
}

impl From<StrategyParts> for Vec<StrategyPart> {
    fn from(parts: StrategyParts) -> Vec<StrategyPart> {
        parts.iter().collect()
    }
}

/// Part of the payload that selects the upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Payload {
    Bytes {
        offset: u16,
        /// 1 to 64.
        length: u8,
    },
    /// The name of the first metric: all up to the first `:`.
    Statsd,
    /// The IPv4 address of an sFlow 5 agent.
    SflowAgent,
    /// The source id of a NetFlow 9 exporter.
    #[serde(rename = "netflow9-source")]
    Netflow9Source,
    /// The observation domain id of IPFIX.
    IpfixDomain,
    /// The tunnel endpoint id of GTP-U.
    GtpuTeid,
    /// The id of a DNS message.
    DnsId,
    /// The identifier of a RADIUS packet.
    RadiusId,
}

impl Payload {
    /// The words of a file.
    pub const WORDS: [(&str, Payload); 7] = [
        ("statsd", Payload::Statsd),
        ("sflow-agent", Payload::SflowAgent),
        ("netflow9-source", Payload::Netflow9Source),
        ("ipfix-domain", Payload::IpfixDomain),
        ("gtpu-teid", Payload::GtpuTeid),
        ("dns-id", Payload::DnsId),
        ("radius-id", Payload::RadiusId),
    ];

    /// Returns the word in a file; none for bytes at an offset.
    pub fn word(self) -> Option<&'static str> {
        Payload::WORDS.iter().find(|(_, payload)| *payload == self).map(|(word, _)| *word)
    }

    /// Returns offset and length of the bytes, as the protocols' documents have them; none for a name.
    pub fn bytes(self) -> Option<(u16, u8)> {
        match self {
            Payload::Bytes { offset, length } => Some((offset, length)),
            Payload::Statsd => None,
            Payload::SflowAgent => Some((8, 4)),
            Payload::Netflow9Source => Some((16, 4)), // RFC 3954, section 5.1
            Payload::IpfixDomain => Some((12, 4)),    // RFC 7011, section 3.1
            Payload::GtpuTeid => Some((4, 4)),        // 3GPP TS 29.281, section 5.1
            Payload::DnsId => Some((0, 2)),           // RFC 1035, section 4.1.1
            Payload::RadiusId => Some((1, 1)),        // RFC 2865, section 3
        }
    }
}

/// Place of the server's id in the connection ids of QUIC, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ServerIdPlace {
    pub offset: u8,
    /// 1 to 8.
    pub length: u8,
}

/// Id of a server in connection ids, as hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ServerId(Vec<u8>);

impl ServerId {
    /// Maximum length in bytes.
    pub const MAX: usize = 8;

    /// Returns the length in bytes.
    pub fn length(&self) -> usize {
        self.0.len()
    }

    /// Returns the id as a number, its first byte highest.
    pub fn number(&self) -> u64 {
        self.0.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
    }
}

impl From<&[u8]> for ServerId {
    fn from(bytes: &[u8]) -> ServerId {
        ServerId(bytes.to_vec())
    }
}

impl TryFrom<String> for ServerId {
    type Error = String;

    fn try_from(text: String) -> Result<ServerId, String> {
        let bytes = super::health::payload(&format!("0x{text}"))?;
        match bytes.len() {
            1..=ServerId::MAX => Ok(ServerId(bytes)),
            length => Err(format!("an id of {length} bytes (1 to {})", ServerId::MAX)),
        }
    }
}

impl From<ServerId> for String {
    fn from(id: ServerId) -> String {
        id.to_string()
    }
}

impl fmt::Display for ServerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Mapping from the selection key to a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Hash {
    Modulo,
    Maglev,
}

/// Number of upstreams that get a datagram with templates of NetFlow 9 or IPFIX.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Templates {
    /// As many as get any other.
    #[default]
    One,
    /// All of them, and all mirrors and samplers.
    All,
}

/// Treatment of the fragments of a datagram.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fragments {
    /// Sent to the upstream of the first one.
    #[default]
    Follow,
    /// Delivered here, and not sent on.
    Pass,
    /// Dropped.
    Drop,
}

/// Admission of packets that no router would forward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Admission {
    #[default]
    Deny,
    Allow,
}

impl Admission {
    pub fn is_denied(&self) -> bool {
        *self == Admission::Deny
    }
}

/// Hook that runs our program on an interface before the kernel has made packets an skb.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Xdp {
    #[default]
    Off,
    /// By the driver.
    Native,
    /// By the kernel, which has made the skb: for tests, and drivers without XDP.
    Generic,
}

/// State of an upstream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    #[default]
    Active,
    /// Keeps its place among the upstreams; others get its packets.
    Drained,
}

/// Number of addresses of a host name that are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Addresses {
    /// One of them.
    #[default]
    One,
    /// Each is an upstream of its own.
    All,
}

/// Source address of packets to the upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Source {
    /// The destination address that the packet matched.
    Vip,
    /// The sender's own.
    Preserve,
    /// This host's, on the way to the upstream.
    Egress,
    /// An address of the configuration. The port is in host byte order; none: the sender's own.
    Fixed { address: IpAddr, port: Option<u16> },
}

impl Source {
    /// The words of a file.
    pub const WORDS: [(&str, Source); 3] =
        [("vip", Source::Vip), ("preserve", Source::Preserve), ("egress", Source::Egress)];

    /// Returns the address of the configuration.
    pub fn fixed(self) -> Option<IpAddr> {
        match self {
            Source::Fixed { address, .. } => Some(address),
            Source::Vip | Source::Preserve | Source::Egress => None,
        }
    }
}

/// `vip`, `10.0.0.9` or `10.0.0.9:9995`
impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Fixed { address, port: Some(port) } => f.write_str(&with_port(address, port)),
            Source::Fixed { address, port: None } => address.fmt(f),
            word => {
                let word = Source::WORDS.iter().find(|(_, source)| source == word);
                f.write_str(word.map_or("", |(word, _)| word))
            }
        }
    }
}

impl FromStr for Source {
    type Err = String;

    fn from_str(text: &str) -> Result<Source, String> {
        host::source(text).map_err(|message| message.text)
    }
}

/// Way of the upstreams' answers to the clients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// Leaves answers alone.
    #[default]
    None,
    /// The upstreams send them as the address that the client had asked; packets keep it.
    Direct,
    /// They route them through this host, or another one with the same configuration.
    Route,
    /// They answer to this host, which has a flow for each client.
    Nat,
}

/// Size of the table of flows, and how long they live.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flows {
    /// Number of flows of each family that have room.
    pub entries: u32,
    /// Ports of this host that flows get.
    pub ports: Ports,
    /// Addresses of this host that flows get; without one of a family those towards the upstreams.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
    /// Time after which a flow ends that is not assured, or one without answer is given to an upstream anew.
    pub unanswered: Period,
    /// Time without packets after which an assured flow ends.
    pub assured: Period,
}

impl Default for Flows {
    fn default() -> Flows {
        Flows {
            entries: 65_536,
            ports: Ports { first: 1024, last: 32_767 },
            addresses: Vec::new(),
            unanswered: Period::from_secs(30),
            assured: Period::from_secs(120),
        }
    }
}

/// Way of a packet that keeps its destination to its upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Via {
    /// By the upstream's MAC address.
    Link,
    /// In an IP header.
    Ipip,
    /// In a UDP header.
    Gue,
}

/// Outer headers that are taken off packets to this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decap {
    /// Networks of the hosts that put packets into them; at least one.
    pub from: Vec<Network>,
    /// [`Via::Ipip`], [`Via::Gue`] or both.
    pub via: Vec<Via>,
}

/// Interfaces that have the addresses of the keys, for a routing daemon to announce.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announce {
    /// Interface of the addresses that this host serves well.
    pub interface: String,
    /// Interface of the others; none: they are withdrawn.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_resort: Option<String>,
    /// Time after which a sick host is well again.
    pub hold_down: Period,
    /// Time that routers take to follow a withdrawal.
    pub settle: Period,
    /// The addresses have a lifetime, which arpd renews.
    pub expire: bool,
}

/// UDP ports `first..=last`, host byte order, never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Ports {
    pub first: u16,
    pub last: u16,
}

/// The packets that a rule matches: their destination, and their senders.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    pub address: KeyAddress,
    /// None: any port.
    pub ports: Vec<Ports>,
    /// None: any sender. Where several rules have one address and port, the longest prefix decides.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub from: Vec<Network>,
    /// Networks of other senders; the longest prefix of both lists decides.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub not_from: Vec<Network>,
}

/// Treatment of the packets to one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleConfig {
    /// Unique among the rules; the key's text where the file gives none.
    pub name: String,
    /// Overlaps no other rule's with the same senders.
    pub key: Key,
    pub action: Action,
    pub mode: Mode,
    pub strategy: Strategy,
    /// Present if and only if [`Strategy::reads_payload`] is true.
    pub payload: Option<Payload>,
    /// Present if and only if the strategy is [`Strategy::QuicCid`].
    pub server_id: Option<ServerIdPlace>,
    pub hash: Hash,
    /// [`Templates::One`] where all upstreams get everything.
    pub templates: Templates,
    pub source: Source,
    pub reply: Reply,
    /// None unless `reply` is [`Reply::Direct`].
    pub via: Option<Via>,
    /// Number of answers that ends a flow; none ends it without.
    pub answers: Option<u32>,
    /// Senders keep their upstream.
    pub sticky: bool,
    pub health: Health,
    pub all_down: AllDown,
    pub fragments: Fragments,
    /// UDP over IPv6 without a checksum.
    pub zero_checksum: Admission,
    /// Packets with a source address that no router forwards.
    pub martians: Admission,
    /// Number of senders that have room in the rule's table; none: they are not counted.
    pub senders: Option<u32>,
    /// At least one.
    pub upstreams: Vec<UpstreamConfig>,
    /// Hosts that get a copy of each packet as well.
    pub mirrors: Vec<UpstreamConfig>,
    /// The rule's place in the file.
    pub at: Path,
}

/// A host that packets are sent to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamConfig {
    /// Unique in its rule.
    pub name: Option<String>,
    pub address: Host,
    /// [`Addresses::One`] where `address` is no host name.
    pub addresses: Addresses,
    /// Host byte order; none: the port that the packet was sent to.
    pub port: Option<u16>,
    /// Share of the flows beside those of the others; none: 1.
    pub weight: Option<u32>,
    /// Packets come here while no upstream with a lower one can be selected; none: 1.
    pub priority: Option<u32>,
    pub state: State,
    /// None: the rule's.
    pub source: Option<Source>,
    /// None: the rule's.
    pub via: Option<Via>,
    /// It gets every N-th packet; none: 1.
    pub sample: Option<u32>,
    /// Id in connection ids, with [`Strategy::QuicCid`].
    pub server_id: Option<ServerId>,
    /// It gets packets of these senders; none: of any.
    pub from: Vec<Network>,
    /// It gets no packets of these; the longest prefix of both lists decides.
    pub not_from: Vec<Network>,
    /// The upstream's place in the file.
    pub at: Path,
}

impl Ports {
    /// Returns the number of ports.
    pub fn count(&self) -> usize {
        usize::from(self.last).saturating_sub(self.first.into()) + 1
    }

    pub fn overlaps(self, other: Ports) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    pub fn contains(&self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }
}

/// `2055` or `6343-6350`
impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.first == self.last {
            true => self.first.fmt(f),
            false => write!(f, "{}-{}", self.first, self.last),
        }
    }
}

impl Key {
    /// Returns a key with any sender.
    pub fn new(address: impl Into<KeyAddress>, ports: Vec<Ports>) -> Key {
        Key { address: address.into(), ports, from: Vec::new(), not_from: Vec::new() }
    }

    /// Returns true if packets of a sender match.
    pub fn admits(&self, sender: IpAddr) -> bool {
        deciding(&self.from, &self.not_from, &sender.into()).0
    }

    /// Returns the number of ports, counted once for each network of senders; `any` counts once.
    pub fn entries(&self) -> usize {
        let ports: usize = self.ports.iter().map(Ports::count).sum();
        ports.max(1) * (self.from.len() + self.not_from.len()).max(1)
    }

    /// Returns the port of a key that has one alone.
    pub fn only_port(&self) -> Option<u16> {
        match self.ports[..] {
            [only] if only.first == only.last => Some(only.first),
            _ => None,
        }
    }

    /// Returns true if packets to a port match.
    pub fn has_port(&self, port: u16) -> bool {
        self.ports.is_empty() || self.ports.iter().any(|ports| ports.contains(port))
    }

    /// Returns true if packets to one of these ports match.
    pub fn has_port_in(&self, ports: Ports) -> bool {
        self.ports.is_empty() || self.ports.iter().any(|own| own.overlaps(ports))
    }

    /// Returns true if packets match both keys and nothing decides between them.
    pub fn overlaps(&self, other: &Key) -> bool {
        let ports = match (&self.ports[..], &other.ports[..]) {
            ([], []) => true,
            (some, others) => some.iter().any(|one| others.iter().any(|it| one.overlaps(*it))),
        };
        let senders = match (&self.from[..], &other.from[..]) {
            ([], []) => true,
            (some, others) => some.iter().any(|network| others.contains(network)),
        };
        self.address == other.address && ports && senders
    }

    /// Returns true if packets to this port of this address match; no port means the one that a
    /// packet of the key came to.
    pub fn is(&self, address: IpAddr, port: Option<u16>) -> bool {
        self.address == KeyAddress::Is(address) && port.is_none_or(|port| self.has_port(port))
    }
}

/// The address and the first port or range, which is also the name of a rule that has no other.
impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&match self.ports.first() {
            Some(ports) => with_port(self.address, ports),
            None => with_port(self.address, ANY),
        })
    }
}

impl RuleConfig {
    /// Returns all hosts that packets are sent to: the upstreams, then the mirrors.
    pub fn destinations(&self) -> impl Iterator<Item = &UpstreamConfig> {
        self.upstreams.iter().chain(&self.mirrors)
    }

    /// Returns the family of all addresses of the rule. It is IPv4 where the rule has `any` and host
    /// names only: a name server does not decide which packets match.
    pub fn family(&self) -> Family {
        self.addresses().next().map_or(Family::V4, Family::from)
    }

    /// Returns the addresses in the file, including those of networks.
    pub(super) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        let key = match self.key.address {
            KeyAddress::Is(address) => Some(address),
            KeyAddress::Any => None,
        };
        let senders = [(&self.key.from, &self.key.not_from)].into_iter();
        let senders = senders.chain(self.destinations().map(|it| (&it.from, &it.not_from)));
        let senders = senders.flat_map(|(from, not_from)| from.iter().chain(not_from));
        let from = senders.map(|network| network.address);
        let hosts = self.destinations().filter_map(|upstream| match &upstream.address {
            Host::Address(address) => Some(address.ip),
            Host::Name(_) | Host::Local => None,
        });
        let sources = self.sources().map(|(_, address)| address);
        key.into_iter().chain(from).chain(hosts).chain(sources)
    }

    /// Returns the sources that are addresses: the rule's and those of its destinations, with their places.
    pub fn sources(&self) -> impl Iterator<Item = (Path, IpAddr)> {
        let of_rule = self.source.fixed().map(|address| {
            (self.at.field(words::OPTIONS.name).field(words::SOURCE.field.name), address)
        });
        let own = self.destinations().filter_map(|upstream| {
            let address = upstream.source?.fixed()?;
            Some((upstream.at.field(words::UPSTREAM_SOURCE.field.name), address))
        });
        of_rule.into_iter().chain(own)
    }
}

impl UpstreamConfig {
    /// `10.0.9.11:9995`, or without the port where it is the packet's own.
    pub fn endpoint(&self) -> String {
        match self.port {
            Some(port) => with_port(&self.address, port),
            None => self.address.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Payload;

    #[test]
    fn words_are_fields_of_their_protocols() {
        let ff = |count| vec![0xff; count];
        // a header of each protocol, with ff in the field
        let headers = [
            (Payload::SflowAgent, [vec![0, 0, 0, 5, 0, 0, 0, 1], ff(4), vec![0; 16]].concat()),
            (Payload::Netflow9Source, [vec![0, 9, 0, 1], vec![0; 12], ff(4)].concat()),
            (Payload::IpfixDomain, [vec![0, 10, 0, 16], vec![0; 8], ff(4)].concat()),
            (Payload::GtpuTeid, [vec![0x30, 0x7e, 0, 4], ff(4), vec![0; 4]].concat()),
            (Payload::DnsId, [ff(2), vec![1, 0, 0, 1, 0, 0, 0, 0, 0, 0]].concat()),
            (Payload::RadiusId, [vec![12], ff(1), vec![0, 20], vec![0; 16]].concat()),
        ];
        for (payload, header) in headers {
            let (offset, length) = payload.bytes().expect("a field");
            let field = usize::from(offset)..usize::from(offset) + usize::from(length);
            let is_field = |(at, byte): (usize, &u8)| field.contains(&at) == (*byte == 0xff);
            assert!(header.iter().enumerate().all(is_field), "{payload:?}");
        }
    }
}
