//! Values of a valid configuration.

use std::fmt;
use std::net::IpAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::host::{Family, Host, KeyAddress, with_port};
use super::network::Network;
use super::path::Path;
use super::vocabulary::ANY;

/// What happens to a matched packet here, after it was sent to its upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// The original goes up the local stack, byte-identical; the upstream gets a copy.
    Pass,
    /// The packet ends here: forwarded, or dropped and counted.
    Block,
}

/// How many upstreams get a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// One.
    #[default]
    Balance,
    /// All.
    Replicate,
}

/// What of a packet selects its upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    SrcPort,
    SrcIp,
    SrcIpPort,
    /// Nothing: each packet by chance.
    Random,
    /// See [`Payload`].
    Payload,
}

/// What of the payload selects the upstream.
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
}

/// How the selected key becomes a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Hash {
    Modulo,
    Maglev,
}

/// What happens to the fragments of a datagram.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fragments {
    /// They go where the first one goes.
    #[default]
    Follow,
    /// They are delivered here, and not sent on.
    Pass,
    /// They end here.
    Drop,
}

/// Whether packets that no router would forward are sent on.
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

/// Whether an upstream is given packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    #[default]
    Active,
    /// It keeps its place among the upstreams, and others get its packets.
    Drained,
}

/// How many of the addresses of a host name are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Addresses {
    /// One of them.
    #[default]
    One,
    /// Each is an upstream of its own.
    All,
}

/// The source address of what is sent to the upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// The destination address that the packet matched.
    Vip,
    /// The sender's own.
    Preserve,
    /// This host's, on the way to the upstream.
    Egress,
}

/// What of an upstream must be well for it to be selected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Health {
    /// Nothing.
    #[default]
    Off,
    /// Its next hop answers. Of a host behind a router that says little.
    Neighbour,
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
}

/// What to do with the packets to one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Unique among the rules; the key's text where the file gives none.
    pub name: String,
    /// Overlaps no other rule's with the same senders.
    pub key: Key,
    pub action: Action,
    pub mode: Mode,
    pub strategy: Strategy,
    /// If and only if that is the strategy.
    pub payload: Option<Payload>,
    pub hash: Hash,
    pub source: Source,
    pub health: Health,
    pub fragments: Fragments,
    /// UDP over IPv6 without a checksum.
    pub zero_checksum: Admission,
    /// Packets whose source no router forwards.
    pub martians: Admission,
    /// At least one.
    pub upstreams: Vec<Upstream>,
    /// Those that get a copy of each packet besides.
    pub mirrors: Vec<Upstream>,
    /// The rule's place in the file.
    pub at: Path,
}

/// A host that packets are sent to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upstream {
    /// Unique in its rule.
    pub name: Option<String>,
    pub address: Host,
    /// Of a host name.
    pub addresses: Addresses,
    /// Host byte order; none: the port that the packet was sent to.
    pub port: Option<u16>,
    /// Its share of the flows, beside those of the others; none: 1.
    pub weight: Option<u32>,
    pub state: State,
    /// None: the rule's.
    pub source: Option<Source>,
    /// It gets every N-th packet; none: 1.
    pub sample: Option<u32>,
    /// The upstream's place in the file.
    pub at: Path,
}

impl Ports {
    /// How many ports these are.
    pub fn count(&self) -> usize {
        usize::from(self.last).saturating_sub(self.first.into()) + 1
    }

    pub(super) fn overlaps(self, other: Ports) -> bool {
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
    /// With any sender.
    pub fn new(address: impl Into<KeyAddress>, ports: Vec<Ports>) -> Key {
        Key { address: address.into(), ports, from: Vec::new() }
    }

    /// Each port, for each network of senders; what `any` stands for is not counted.
    pub fn entries(&self) -> usize {
        let ports: usize = self.ports.iter().map(Ports::count).sum();
        ports.max(1) * self.from.len().max(1)
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

    /// Whether what is sent to this port of this address matches; no port means the one that a
    /// packet of the key came to.
    pub fn is(&self, address: IpAddr, port: Option<u16>) -> bool {
        let has = |port| self.ports.iter().any(|ports| ports.contains(port));
        self.address == KeyAddress::Is(address) && (self.ports.is_empty() || port.is_none_or(has))
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

impl Rule {
    /// All that packets are sent to: the upstreams, then the mirrors.
    pub fn destinations(&self) -> impl Iterator<Item = &Upstream> {
        self.upstreams.iter().chain(&self.mirrors)
    }

    /// The one that all addresses of the rule are of. Where it says none, with `any` and host names
    /// only, it is not left to a name server which packets are matched.
    pub fn family(&self) -> Family {
        self.addresses().next().map_or(Family::V4, Family::from)
    }

    /// The addresses that the file says, those of networks included.
    pub(super) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        let key = match self.key.address {
            KeyAddress::Is(address) => Some(address),
            KeyAddress::Any => None,
        };
        let from = self.key.from.iter().map(|network| network.address);
        let hosts = self.destinations().filter_map(|upstream| match &upstream.address {
            Host::Address(address) => Some(address.ip),
            Host::Name(_) => None,
        });
        key.into_iter().chain(from).chain(hosts)
    }
}

impl Upstream {
    /// `10.0.9.11:9995`, or without the port where it is the packet's own.
    pub fn endpoint(&self) -> String {
        match self.port {
            Some(port) => with_port(&self.address, port),
            None => self.address.to_string(),
        }
    }
}
