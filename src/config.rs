//! A configuration file: text in, [`Config`] or [`Diagnostic`]s out. Pure.
//!
//! ```text
//! text ── document ──> Node ── decode ──> rules ── check ──> Config
//!                                └──────────┴──> Problems ── document ──> Diagnostics
//! ```
//!
//! `document` reads by `yaml` and `toml`; `vocabulary` holds the words, `scalar`, `host` and `network`
//! judge single values, and `schema` describes the whole.

mod check;
mod decode;
mod diagnostic;
mod document;
mod hint;
mod host;
mod network;
mod path;
mod scalar;
mod schema;
mod toml;
mod vocabulary;
mod yaml;

use std::fmt;
use std::net::IpAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use diagnostic::{Complaint, Problem, Problems};
use document::Document;

pub use check::{KEY_ENTRIES, RECEIVERS, UPSTREAMS};
pub use diagnostic::{Diagnostic, Related, Severity};
pub use host::{Address, Family, Host, KeyAddress, upstream_refusal, with_port};
pub use network::Network;
pub use path::Path;
pub use schema::schema;
use vocabulary::INTERFACES;
pub use vocabulary::{ANY, STATSD, nearest};

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

/// A valid configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// The file's own; the command line may replace them. May be empty.
    pub interfaces: Vec<String>,
    pub rules: Vec<Rule>,
    /// What is probably not meant.
    pub warnings: Vec<Diagnostic>,
    document: Document,
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

impl Config {
    /// Reads and judges a file's text. Neither file nor network is touched.
    ///
    /// `name` is for the messages, and says the format: TOML if it ends in `.toml`, else YAML, which
    /// JSON is too.
    ///
    /// # Errors
    ///
    /// All that is wrong, in the file's order: at most 20 errors, and one more that counts the rest.
    pub fn parse(name: &str, text: &str) -> Result<Config, Vec<Diagnostic>> {
        let document = Document::new(name, text);
        let node = document.read()?;
        let mut decoded = decode::decode(&node);
        check::check(&mut decoded);
        if !decoded.problems.is_empty() {
            let locate = |problems: &[Problem]| document.diagnose(Severity::Error, problems);
            return Err(decoded.problems.diagnose(locate));
        }
        drop(node);
        let mut config = Config {
            interfaces: decoded.interfaces,
            rules: decoded.rules,
            warnings: Vec::new(),
            document,
        };
        config.warnings = config.warnings(decoded.warnings);
        Ok(config)
    }

    /// The host with this index among the destinations of the rule with that one.
    pub fn destination(&self, (rule, host): (usize, usize)) -> &Upstream {
        let rule = &self.rules[rule];
        rule.upstreams.get(host).unwrap_or_else(|| &rule.mirrors[host - rule.upstreams.len()])
    }

    /// The place of an interface's name.
    pub fn interface(&self, name: &str) -> Path {
        let nth = self.interfaces.iter().position(|it| it == name);
        Path::default().field(INTERFACES.name).index(nth.unwrap_or_default())
    }

    /// Errors of a later stage, each with its place in the file; of very many the first few and
    /// a count. Costs one pass over the file's text.
    pub fn errors(&self, findings: Vec<Finding>) -> Vec<Diagnostic> {
        self.diagnose(Severity::Error, findings)
    }

    /// Like [`Config::errors`].
    pub fn warnings(&self, findings: Vec<Finding>) -> Vec<Diagnostic> {
        self.diagnose(Severity::Warning, findings)
    }

    /// Line and column of each place, counted from 1.
    pub fn locate(&self, places: &[Path]) -> Vec<(usize, usize)> {
        let at = |path: &Path| Problem {
            at: path.clone().into(),
            complaint: Complaint::new(""),
            related: None,
        };
        let problems: Vec<Problem> = places.iter().map(at).collect();
        let found = self.document.diagnose(Severity::Error, &problems);
        found.into_iter().map(|found| (found.line, found.column)).collect()
    }

    fn diagnose(&self, severity: Severity, findings: Vec<Finding>) -> Vec<Diagnostic> {
        if findings.is_empty() {
            return Vec::new();
        }
        let mut problems = Problems::default();
        for finding in findings {
            problems.push(finding.at, Complaint::new(finding.message));
        }
        problems.diagnose(|problems| self.document.diagnose(severity, problems))
    }
}

/// What a later stage has to say about a place in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub at: Path,
    pub message: String,
}

impl Finding {
    pub fn new(at: &Path, message: impl Into<String>) -> Finding {
        Finding { at: at.clone(), message: message.into() }
    }
}

impl Ports {
    /// How many ports these are.
    pub fn count(&self) -> usize {
        usize::from(self.last).saturating_sub(self.first.into()) + 1
    }

    fn overlaps(self, other: Ports) -> bool {
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
    fn addresses(&self) -> impl Iterator<Item = IpAddr> {
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
