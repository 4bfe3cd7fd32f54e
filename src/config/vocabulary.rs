//! The words of a configuration file, each defined once: the decoder, suggestions, the JSON Schema,
//! docs/configuration.md, udplb.yaml(5) and the NixOS module's check read this table.

use super::diagnostic::Message;
use super::hint::nearest;
use super::quote::shorten;
use super::{Payload, Period, Source, StrategyPart};

/// The address or port of a key that matches all.
pub const ANY: &str = "any";

/// The address of an upstream that is this host.
pub const LOCAL: &str = "local";

/// Returns the words of a table.
const fn words_of<T: Copy, const COUNT: usize>(
    table: &[(&'static str, T); COUNT],
) -> [&'static str; COUNT] {
    let (mut words, mut place) = ([""; COUNT], 0);
    while place < COUNT {
        words[place] = table[place].0;
        place += 1;
    }
    words
}

pub const PAYLOAD_WORDS: [&str; Payload::WORDS.len()] = words_of(&Payload::WORDS);
pub const PART_WORDS: [&str; StrategyPart::WORDS.len()] = words_of(&StrategyPart::WORDS);

/// The two forms of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Root {
    /// The bare list of rules, which has fewer words.
    List,
    /// The map with `version: 1`.
    Map,
}

/// A field of a map.
#[derive(Debug)]
pub struct Field {
    pub name: &'static str,
    /// Meaning, one or more sentences.
    pub about: &'static str,
    pub shape: Shape,
    /// Value that holds where the field is missing, for people; a [`EnumField`] has its own.
    pub default: &'static str,
    /// A value in YAML.
    pub example: &'static str,
    pub required: bool,
    /// True if the bare list has the field too.
    pub in_list: bool,
}

/// The type of a field's value.
#[derive(Clone, Copy, Debug)]
pub enum Shape {
    Version,
    /// Name of a rule or an upstream.
    Name,
    Interface,
    /// A list of interfaces, each a name or a map.
    Interfaces(&'static Table),
    /// An IP address or `any`; in a bare list an address.
    Address,
    /// An IP address, a host name or `local`; in a bare list not the latter.
    Host,
    Port,
    /// `any`, a port, a range, or a list of the latter two; in a bare list one port.
    Ports,
    /// A range of ports, or one port.
    PortRange,
    /// A network or a list of them.
    Networks,
    /// A list of addresses of this host.
    Addresses,
    Number(&'static Number),
    Duration(&'static Limits),
    /// `true` or `false`.
    Switch,
    Choice(&'static EnumField),
    /// One of some words, or a list of these; in a bare list a word.
    ChoiceOrList(&'static EnumField, &'static [&'static str]),
    /// One of the words, or an IP address with or without a port.
    ChoiceOrEndpoint(&'static EnumField),
    /// One of some words, or a list of them.
    Words(&'static [&'static str]),
    /// Any text.
    Text,
    /// Bytes as hexadecimal digits.
    HexDigits,
    /// One of some words, or a map.
    WordsOrMap(&'static [&'static str], &'static Table),
    Map(&'static Table),
    /// A list of maps.
    Maps(&'static Table),
}

/// A whole number with its limits.
#[derive(Debug)]
pub struct Number {
    /// Name with its article: "a weight".
    pub what: &'static str,
    pub first: u32,
    pub last: u32,
}

/// A duration with its limits.
#[derive(Debug)]
pub struct Limits {
    /// Name with its article: "a hold-down time".
    pub what: &'static str,
    pub first: Period,
    pub last: Period,
}

/// The fields of a map.
#[derive(Debug)]
pub struct Table {
    /// Name of the map with its article: "a rule".
    pub what: &'static str,
    pub fields: &'static [&'static Field],
}

/// A field whose value is one word out of several.
#[derive(Debug)]
pub struct EnumField {
    pub field: Field,
    /// Also serde's names for the variants of the enum.
    pub words: &'static [&'static str],
    /// The words that the bare list has.
    list_words: &'static [&'static str],
    /// Values that hold where the field is missing: in a bare list, in a map.
    defaults: Option<(&'static str, &'static str)>,
}

impl Field {
    const fn new(name: &'static str, shape: Shape, about: &'static str) -> Field {
        Field { name, about, shape, default: "", example: "", required: false, in_list: false }
    }

    const fn required(self) -> Field {
        Field { required: true, ..self }
    }

    const fn in_list(self) -> Field {
        Field { in_list: true, ..self }
    }

    const fn default(self, default: &'static str) -> Field {
        Field { default, ..self }
    }

    const fn example(self, example: &'static str) -> Field {
        Field { example, ..self }
    }

    pub fn is_usable(&self, root: Root) -> bool {
        root == Root::Map || self.in_list
    }
}

impl EnumField {
    /// `this` is the static that is being defined.
    const fn new(
        this: &'static EnumField,
        name: &'static str,
        words: &'static [&'static str],
        about: &'static str,
    ) -> EnumField {
        let field = Field::new(name, Shape::Choice(this), about);
        EnumField { field, words, list_words: &[], defaults: None }
    }

    const fn default(self, default: &'static str) -> EnumField {
        EnumField { defaults: Some((default, default)), ..self }
    }

    /// A list of some words may stand in place of a word; `this` is the static that is being defined.
    const fn or_list(self, this: &'static EnumField, words: &'static [&'static str]) -> EnumField {
        EnumField { field: Field { shape: Shape::ChoiceOrList(this, words), ..self.field }, ..self }
    }

    /// The bare list has the field too, with these words and this default.
    const fn in_list(
        self,
        list_words: &'static [&'static str],
        default: &'static str,
    ) -> EnumField {
        let (_, map) = match self.defaults {
            Some(defaults) => defaults,
            None => (default, default),
        };
        let field = Field { in_list: true, ..self.field };
        EnumField { field, list_words, defaults: Some((default, map)), ..self }
    }

    /// The bare list lacks the field, and this holds there.
    const fn list_default(self, default: &'static str) -> EnumField {
        let in_list = self.field.in_list;
        let choice = self.in_list(&[], default);
        EnumField { field: Field { in_list, ..choice.field }, ..choice }
    }

    /// `this` is the static that is being defined. Its value can be an address too.
    const fn or_endpoint(self, this: &'static EnumField) -> EnumField {
        EnumField { field: Field { shape: Shape::ChoiceOrEndpoint(this), ..self.field }, ..self }
    }

    /// Another field's value holds where this one is missing.
    const fn inherits(self, default: &'static str) -> EnumField {
        EnumField { field: self.field.default(default), ..self }
    }

    const fn example(self, example: &'static str) -> EnumField {
        EnumField { field: self.field.example(example), ..self }
    }
}

pub static VERSION: Field =
    Field::new("version", Shape::Version, "Version of this format: 1.").required().example("1");
pub static INTERFACES: Field = Field::new(
    "interfaces",
    Shape::Interfaces(&INTERFACE_MAP),
    "Interfaces whose incoming packets the rules see. The option `-i` replaces them.",
)
.default("none")
.example("[ens3]");
pub static ANNOUNCE: Field = Field::new(
    "announce",
    Shape::Map(&ANNOUNCE_MAP),
    "Interfaces on which `udplb arpd` keeps the addresses of the keys while this host can serve them. A routing daemon announces the addresses of these interfaces.",
)
.default("none")
.example("{ interface: anycast0, last_resort: anycast1 }");
pub static INTERFACE_NAME: Field =
    Field::new("name", Shape::Interface, "Name of the interface.").required().example("ens3");
pub static XDP: EnumField = EnumField::new(&XDP, "xdp", &["off", "native", "generic"], "Sends packets of `block` rules on before the kernel has made them an skb: in the driver (`native`), or in the kernel (`generic`, which saves less). All others go on to tc. See [XDP](performance.md#xdp) for its conditions.").default("off").example("native");
pub static FLOWS: Field = Field::new(
    "flows",
    Shape::Map(&FLOWS_MAP),
    "Table of the flows of rules with `reply: nat` or `sticky`.",
)
.example("{ entries: 262144, ports: \"1024-65535\" }");
pub static FLOWS_ENTRIES: Field = Field::new(
    "entries",
    Shape::Number(&FLOW_COUNT),
    "Number of flows of IPv4, and as many of IPv6. Flows go on in a table of another size.",
)
.default("65536")
.example("262144");
pub static FLOW_COUNT: Number = Number { what: "a number of flows", first: 1024, last: 4_194_288 };
pub static FLOWS_PORTS: Field = Field::new("ports", Shape::PortRange, "Ports of this host that flows get, a range. A port serves one flow for each upstream, and rests for a second before another flow gets it. Ports that the host's own sockets use are left out.").default("1024-32767").example("1024-65535");
pub static FLOWS_ADDRESSES: Field = Field::new("addresses", Shape::Addresses, "Addresses of this host that new flows are spread over, at most 16 of a family, each with all of `ports`. Flows of one that is left out later go on.").default("this host's address towards the upstream").example("[10.2.0.254, 10.2.0.253]");
pub static FLOWS_UNANSWERED: Field = Field::new("unanswered", Shape::Duration(&FLOW_TIMEOUT), "Time without packets after which a flow ends whose client has not spoken again two seconds after its first packet. After that time without an answer an upstream is selected anew.").default("30s").example("10s");
pub static FLOWS_ASSURED: Field = Field::new(
    "assured",
    Shape::Duration(&FLOW_TIMEOUT),
    "Time without packets after which other flows end. These are never evicted for new ones.",
)
.default("2m")
.example("1h");
pub static FLOW_TIMEOUT: Limits = Limits {
    what: "a lifetime of flows",
    first: Period::from_secs(1),
    last: Period::from_secs(86_400),
};
pub static DECAP: Field = Field::new("decap", Shape::Map(&DECAP_MAP), "Outer headers that are taken off packets to this host, an upstream of rules with `reply: direct` elsewhere. What is in them goes up the stack, past the rules.").default("none").example("{ from: [10.2.0.0/24], via: [ipip, gue] }");
pub static DECAP_FROM: Field = Field::new("from", Shape::Networks, "Networks of the balancers, by the source address of outer headers. Packets of others stay as they are.").required().example("[10.2.0.0/24, \"2001:db8:2::/64\"]");
pub static DECAP_VIA: Field = Field::new("via", Shape::Words(TUNNELS), "Outer headers: an IP header (`ipip`: IPv4 in IPv4, IPv6 in IPv6), or a UDP header to port 6080 (`gue`, variant 1).").required().example("[ipip, gue]");
pub const TUNNELS: &[&str] = &["ipip", "gue"];
pub static DEFAULTS: Field = Field::new(
    "defaults",
    Shape::Map(&OPTIONS_MAP),
    "Any of `options`, for the rules that do not set them.",
)
.example("{ source: preserve }");
pub static RULES: Field =
    Field::new("rules", Shape::Maps(&RULE_MAP), "The rules. A file with `decap` may have none.")
        .default("required, but with `decap`");

pub static ANNOUNCE_INTERFACE: Field = Field::new("interface", Shape::Interface, "Interface that has an address while the host is well: the filter is attached to all `interfaces`, and each rule of the address has an upstream that is up. A dummy interface that nothing else uses.").required().example("anycast0");
pub static ANNOUNCE_LAST_RESORT: Field = Field::new("last_resort", Shape::Interface, "Interface that has an address while the host is sick, to be announced as worse, so that the hosts serve where all are sick.").default("none: a sick host withdraws the address").example("anycast1");
pub static ANNOUNCE_HOLD_DOWN: Field = Field::new(
    "hold_down",
    Shape::Duration(&HOLD_DOWN),
    "Time without interruption after which a host that was sick counts as well again.",
)
.default("10s")
.example("30s");
pub static HOLD_DOWN: Limits =
    Limits { what: "a hold-down time", first: Period::from_secs(0), last: Period::from_secs(3600) };
pub static ANNOUNCE_SETTLE: Field = Field::new("settle", Shape::Duration(&SETTLE), "Time in which routers stop sending after addresses were withdrawn: `udplb detach` waits that long before it removes the filter, and `udplb withdraw --wait` before it returns.").default("2s").example("5s");
pub static SETTLE: Limits =
    Limits { what: "a time to settle", first: Period::from_secs(0), last: Period::from_secs(300) };
pub static ANNOUNCE_EXPIRE: Field = Field::new("expire", Shape::Switch, "With `true` the addresses have a lifetime that `udplb arpd` renews, and disappear when it has died. With `false` they stay, and packets are forwarded without arpd.").default("false").example("true");

pub static NAME: Field = Field::new("name", Shape::Name, "Name of the rule, unique in the file.")
    .default("the key, as in `10.0.0.5:2055`")
    .example("flows");
pub static KEY: Field = Field::new("key", Shape::Map(&KEY_MAP), "Packets that the rule matches.")
    .required()
    .in_list()
    .example("{ address: 10.0.0.5, port: 514 }");
pub static OPTIONS: Field =
    Field::new("options", Shape::Map(&OPTIONS_MAP), "Treatment of the matched packets.")
        .in_list()
        .example("{ mode: replicate, source: preserve }");
pub static UPSTREAM: Field =
    Field::new("upstream", Shape::Maps(&UPSTREAM_MAP), "Hosts that matched packets are sent to.")
        .required()
        .in_list()
        .example("[{ address: 10.0.9.11 }]");
pub static MIRROR: Field = Field::new("mirror", Shape::Maps(&MIRROR_MAP), "Hosts that get a copy of each packet of a balanced rule as well, with the words of `upstream` except `weight`, `priority` and `server-id`.").default("none").example("[{ address: 10.0.9.13, sample: 10 }]");

pub static KEY_ADDRESS: Field = Field::new("address", Shape::Address, "Destination address of the packet: an address of this host, a multicast group or a broadcast address (neither of the two with `source: vip`). `any` is each address of the interfaces except link-local ones.").required().in_list().example("10.0.0.5");
pub static KEY_PORT: Field = Field::new(
    "port",
    Shape::Ports,
    "Destination port of the packet: a port, a range like \"6343-6350\", a list of both, or `any`.",
)
.required()
.in_list()
.example("[2055, \"6343-6350\"]");
pub static KEY_FROM: Field = Field::new("from", Shape::Networks, "Networks of senders; only their packets match. Of several keys with one address and port the longest prefix decides.").default("any sender").example("[10.20.0.0/16]");
pub static KEY_NOT_FROM: Field = Field::new("not-from", Shape::Networks, "Networks of senders whose packets do not match. The longest prefix of `from` and `not-from` decides.").default("none").example("[10.20.1.0/24]");

pub static TC_ACTION: EnumField = EnumField::new(&TC_ACTION, "tc_action", &["pass", "block"], "`pass` sends a copy to the upstream and delivers the packet here as if udplb were not there. `block` sends the packet itself; nobody here gets it.").default("pass").in_list(&["pass", "block"], "pass").example("block");
pub static MODE: EnumField = EnumField::new(
    &MODE,
    "mode",
    &["balance", "replicate"],
    "`balance` sends each packet to one upstream, `replicate` to all of them.",
)
.default("balance")
.example("replicate");
const SOURCES: &[&str] = &[Source::WORDS[0].0, Source::WORDS[1].0, Source::WORDS[2].0];
pub static SOURCE: EnumField = EnumField::new(&SOURCE, "source", SOURCES, "Sender that the upstream sees: the address that the packet was sent to (`vip`), the packet's sender (`preserve`), this host's address on the way to the upstream (`egress`), or an address of your own, with a port if the sender's is to be replaced too.").or_endpoint(&SOURCE).default("vip").example("preserve");
pub static REPLY: EnumField = EnumField::new(&REPLY, "reply", &["none", "direct", "route", "nat"], "Way of the upstreams' answers. `direct`: packets keep their destination, and the upstreams, which have that address too, answer the client themselves. `route`: the upstreams see the client and route their answers through a host with this rule, where they get the address and port as source that the client had sent to. `nat`: the upstreams see this host, with a port of its own for each client, and answer to it; they need nothing for that. All need `tc_action: block` and `mode: balance`; `nat` needs `source: egress`, the others `source: preserve`, their defaults then.").default("none").example("route");
const WAYS: &[&str] = &["link", "ipip", "gue"];
pub static VIA: EnumField = EnumField::new(&VIA, "via", WAYS, "With `reply: direct`: the packet goes to the upstream by its MAC address (`link`, in one network), in an IP header (`ipip`), or in a UDP header to port 6080 (`gue`).").inherits("none, and `reply: direct` needs one").example("gue");
pub static ANSWERS: Field = Field::new("answers", Shape::Number(&ANSWER_COUNT), "Number of answers after which a flow of `reply: nat` ends at once, for protocols that are known to answer so often. An answer in fragments is one.").default("none: a flow ends when it has expired").example("1");
pub static ANSWER_COUNT: Number = Number { what: "a number of answers", first: 1, last: 1_000_000 };
pub static STICKY: Field = Field::new("sticky", Shape::Switch, "With `true` a sender keeps its upstream when others are added, drained ones come back or weights change: its address and port have a flow in the table of `flows`. It moves when the upstream is removed, or down with `health`. A drained one keeps it. With `reply: nat` senders have flows anyway.").default("false").example("true");
pub static STRATEGY: EnumField = EnumField::new(&STRATEGY, "strategy", &["src-port", "src-ip", "src-ip-port", "dst-port", "random", "payload", "quic-cid"], "Part of the packet that selects its upstream: address or port of the sender, both, the port that the packet was sent to, or bytes of the payload; `random` selects for each packet anew; `quic-cid` by the id that the servers of QUIC have put into the connection id, see `server-id`, and other packets by `src-ip-port`. A list selects by several parts together, in any order, as in `[src-ip, payload]`.").or_list(&STRATEGY, &PART_WORDS).default("src-ip-port").in_list(&["src-port", "src-ip"], "src-port").example("src-ip");
pub static PAYLOAD: Field = Field::new("payload", Shape::WordsOrMap(&PAYLOAD_WORDS, &PAYLOAD_MAP), "Bytes that the `strategy` `payload` selects by: the name of the first StatsD metric (`statsd`), a field of sFlow 5 (`sflow-agent`, of IPv4), NetFlow 9 (`netflow9-source`), IPFIX (`ipfix-domain`), GTP-U (`gtpu-teid`), DNS (`dns-id`) or RADIUS (`radius-id`), or `offset` and `length`. A packet that is too short is selected by `src-ip-port`.").default("none").example("{ offset: 4, length: 8 }");
pub static SERVER_ID: Field = Field::new("server-id", Shape::Map(&SERVER_ID_MAP), "Place of the server's id in connection ids, with `strategy: quic-cid` (the plaintext form of QUIC-LB). Each upstream has its `server-id`.").default("none").example("{ offset: 1, length: 2 }");
pub static SERVER_ID_OFFSET: Field = Field::new("offset", Shape::Number(&SERVER_ID_OFFSETS), "Offset of the id in the connection id, in bytes; the byte before it holds the rotation of QUIC-LB.").default("1").example("1");
pub static SERVER_ID_OFFSETS: Number =
    Number { what: "an offset in a connection id", first: 0, last: 19 };
pub static SERVER_ID_LENGTH: Field =
    Field::new("length", Shape::Number(&SERVER_ID_LENGTHS), "Length of the id in bytes. A client's first packets have a random connection id: with two bytes and more it seldom names an upstream by chance.")
        .required()
        .example("2");
pub static SERVER_ID_LENGTHS: Number = Number { what: "a length of server ids", first: 1, last: 8 };
pub static HASH: EnumField = EnumField::new(&HASH, "hash", &["modulo", "maglev"], "Mapping from the selecting part to an upstream. With `maglev` another upstream, or one less, moves few flows of the others; `modulo` goes by the place in the list.").default("maglev").list_default("modulo").example("modulo");
pub static TEMPLATES: EnumField = EnumField::new(&TEMPLATES, "templates", &["one", "all"], "With `all`, datagrams of NetFlow 9 and IPFIX that have templates or options templates go to all upstreams that are not drained, down or not, and to each mirror whatever its `sample`; flows in them then go to all as well. Others are balanced. With `mode: replicate` it is for upstreams with `sample`.").default("one").example("all");
pub static PAYLOAD_OFFSET: Field = Field::new(
    "offset",
    Shape::Number(&OFFSET),
    "Number of bytes of the payload before the selecting ones.",
)
.required()
.example("4");
pub static OFFSET: Number = Number { what: "an offset", first: 0, last: 65_535 };
pub static PAYLOAD_LENGTH: Field =
    Field::new("length", Shape::Number(&LENGTH), "Number of selecting bytes.")
        .required()
        .example("8");
pub static LENGTH: Number = Number { what: "a length", first: 1, last: 64 };
pub static HEALTH: Field = Field::new("health", Shape::WordsOrMap(HEALTH_WORDS, &HEALTH_MAP), "Check by `udplb arpd` that an upstream must pass to be selected: its next hop answers (`neighbour`), or so does the service as well. A map has one check and its pace; a check that needs no words can stand alone.").default("off").example("dns");
pub const HEALTH_WORDS: &[&str] =
    &["off", "neighbour", "icmp", "dns", "ntp", "snmp", "sip", "syslog"];
pub static ALL_DOWN: EnumField = EnumField::new(
    &ALL_DOWN,
    "all-down",
    &["open", "drop"],
    "While all upstreams are down, packets go to them as if all were up (`open`), or are dropped.",
)
.default("open")
.example("drop");
static HEALTH_UDP: Field = Field::new("udp", Shape::Map(&UDP_MAP), "A datagram and its answer.")
    .example("{ send: ping, expect: pong }");
static HEALTH_TCP: Field =
    Field::new("tcp", Shape::Port, "A TCP connection to this port is accepted.").example("514");
static HEALTH_HTTP: Field =
    Field::new("http", Shape::Map(&HTTP_MAP), "An HTTP request over TCP, without TLS.")
        .example("{ port: 8080, path: /healthz }");
static HEALTH_ICMP: Field =
    Field::new("icmp", Shape::Map(&ICMP_MAP), "An ICMP echo, which tells of the host alone.")
        .example("{}");
static HEALTH_DNS: Field = Field::new(
    "dns",
    Shape::Map(&DNS_MAP),
    "A DNS query over UDP: any answer counts but SERVFAIL, or with `name` only NOERROR.",
)
.example("{ name: example.org }");
static HEALTH_NTP: Field = Field::new(
    "ntp",
    Shape::Map(&PORT_MAP),
    "An NTP request; the answer must come from a clock that is synchronised.",
)
.example("{}");
static HEALTH_SNMP: Field =
    Field::new("snmp", Shape::Map(&SNMP_MAP), "An SNMPv2c request of `sysUpTime`.")
        .example("{ community: public, port: 161 }");
static HEALTH_SIP: Field = Field::new(
    "sip",
    Shape::Map(&PORT_MAP),
    "A SIP `OPTIONS` over UDP; any answer below 500 counts.",
)
.example("{}");
static HEALTH_RADIUS: Field = Field::new(
    "radius",
    Shape::Map(&RADIUS_MAP),
    "A RADIUS `Status-Server` (RFC 5997), whose answer is authenticated.",
)
.example("{ secret: testing123 }");
static HEALTH_SYSLOG: Field =
    Field::new("syslog", Shape::Map(&PORT_MAP), "A TCP connection to the upstream's own port.")
        .example("{}");
pub static HEALTH_INTERVAL: Field = Field::new(
    "interval",
    Shape::Duration(&PROBE_INTERVAL),
    "Time between two probes of an upstream.",
)
.default("2s")
.example("5s");
pub static HEALTH_TIMEOUT: Field = Field::new(
    "timeout",
    Shape::Duration(&PROBE_TIMEOUT),
    "Time that an answer may take, at most `interval`.",
)
.default("1s")
.example("500ms");
pub static HEALTH_RISE: Field =
    Field::new("rise", Shape::Number(&RISE), "Answers in a row that bring an upstream back.")
        .default("2")
        .example("3");
pub static HEALTH_FALL: Field =
    Field::new("fall", Shape::Number(&FALL), "Failures in a row that take an upstream out.")
        .default("3")
        .example("2");
pub static PROBE_PORT: Field = Field::new("port", Shape::Port, "Port of the service to probe.")
    .default("that of the upstream")
    .example("8080");
pub static PROBE_SEND: Field =
    Field::new("send", Shape::Text, "The datagram: text, or hexadecimal digits after `0x`.")
        .required()
        .example("\"0x00 01\"");
pub static PROBE_EXPECT: Field = Field::new(
    "expect",
    Shape::Text,
    "What its answer begins with: text, or after `0x` hexadecimal digits with `?` for any digit.",
)
.default("any answer")
.example("\"0x81 ?? 00\"");
pub static PROBE_PATH: Field =
    Field::new("path", Shape::Text, "Path of the request.").default("/").example("/healthz");
pub static PROBE_STATUS: Field =
    Field::new("status", Shape::Number(&STATUS), "Status of the answer.")
        .default("200 to 399")
        .example("204");
pub static PROBE_NAME: Field = Field::new("name", Shape::Text, "Name that must have a record.")
    .default("the root, which need not be known")
    .example("example.org");
pub static PROBE_COMMUNITY: Field = Field::new("community", Shape::Text, "Community of SNMPv2c.")
    .default(super::health::COMMUNITY)
    .example("public");
pub static PROBE_SECRET: Field = Field::new("secret", Shape::Text, "Secret that the RADIUS server shares with this host. It stands in the kernel's copy of the configuration, which root alone reads.").required().example("testing123");
pub static STATUS: Number = Number { what: "an HTTP status", first: 100, last: 599 };

static PROBE_INTERVAL: Limits =
    Limits { what: "an interval", first: Period::from_millis(100), last: Period::from_secs(3600) };
static PROBE_TIMEOUT: Limits =
    Limits { what: "a timeout", first: Period::from_millis(10), last: Period::from_secs(60) };
pub static RISE: Number = Number { what: "a number of answers", first: 1, last: 100 };
pub static FALL: Number = Number { what: "a number of failures", first: 1, last: 100 };
pub static FRAGMENTS: EnumField = EnumField::new(&FRAGMENTS, "fragments", &["follow", "pass", "drop"], "Fragments go where the first one of their datagram goes (`follow`), are only delivered here (`pass`), or are dropped (`drop`).").default("follow").example("drop");
const ADMISSIONS: &[&str] = &["deny", "allow"];
pub static ZERO_CHECKSUM: EnumField = EnumField::new(&ZERO_CHECKSUM, "zero-checksum", ADMISSIONS, "UDP over IPv6 without a checksum, as tunnels send it (RFC 6935). `allow` sends it on without one.").default("deny").example("allow");
pub static MARTIANS: EnumField = EnumField::new(
    &MARTIANS,
    "martians",
    ADMISSIONS,
    "Packets whose source address no router forwards. `allow` sends them on.",
)
.default("deny")
.example("allow");
pub static SENDERS: Field = Field::new("senders", Shape::Number(&SENDER_COUNT), "Number of senders that have room in a table of the rule, with packets, bytes, and when each was first and last heard, for `udplb senders` and metrics.").default("none").example("4096");
pub static SENDER_COUNT: Number = Number { what: "a number of senders", first: 16, last: 262_144 };

pub static UPSTREAM_NAME: Field =
    Field::new("name", Shape::Name, "Name of the host in output, unique in the rule.")
        .default("address and port")
        .example("nfcapd");
pub static UPSTREAM_ADDRESS: Field = Field::new("address", Shape::Host, "IP address of the upstream, a link-local one with its interface (`fe80::1%ens3`), or a host name, which `apply` resolves. `local` is this host: a receiver on it gets the packet, or a copy, with sender and destination address as they came, at `port`.").required().in_list().example("10.0.9.11");
pub static UPSTREAM_ADDRESSES: EnumField = EnumField::new(&UPSTREAM_ADDRESSES, "addresses", &["one", "all"], "Addresses of a host name that are used: `one`, or `all` of the rule's family, each as an upstream of its own called `NAME@ADDRESS`, up to 64.").default("one").example("all");
pub static UPSTREAM_PORT: Field = Field::new("port", Shape::Port, "Port of the upstream.")
    .in_list()
    .default("the port that the packet was sent to")
    .example("9995");
pub static UPSTREAM_WEIGHT: Field = Field::new(
    "weight",
    Shape::Number(&WEIGHT),
    "Share of the flows beside those of the others, with `mode: balance` and `hash: maglev`.",
)
.default("1")
.example("2");
pub static WEIGHT: Number = Number { what: "a weight", first: 1, last: 10_000 };
pub static UPSTREAM_FROM: Field = Field::new("from", Shape::Networks, "Networks of senders; it gets only their packets. For mirrors and with `mode: replicate`. Senders that nobody gets packets of match no rule.").default("any sender").example("[10.20.0.0/16]");
pub static UPSTREAM_NOT_FROM: Field = Field::new("not-from", Shape::Networks, "Networks of senders whose packets it does not get. The longest prefix of `from` and `not-from` decides.").default("none").example("[10.20.1.0/24]");
pub static UPSTREAM_PRIORITY: Field = Field::new("priority", Shape::Number(&PRIORITY), "Upstreams of a higher number get packets only while all of the lower ones are drained or down, with `mode: balance`.").default("1").example("2");
pub static PRIORITY: Number = Number { what: "a priority", first: 1, last: 255 };
pub static UPSTREAM_STATE: EnumField = EnumField::new(&UPSTREAM_STATE, "state", &["active", "drained"], "A `drained` upstream keeps its place, and the others get its flows. `udplb drain` and `udplb enable` override it.").default("active").example("drained");
pub static UPSTREAM_SOURCE: EnumField = EnumField::new(
    &UPSTREAM_SOURCE,
    "source",
    SOURCES,
    "Sender that this upstream sees, as in `options`.",
)
.or_endpoint(&UPSTREAM_SOURCE)
.inherits("that of the rule")
.example("egress");
pub static UPSTREAM_VIA: EnumField =
    EnumField::new(&UPSTREAM_VIA, "via", WAYS, "Way to this upstream, as in `options`.")
        .inherits("that of the rule")
        .example("link");
pub static UPSTREAM_SERVER_ID: Field = Field::new("server-id", Shape::HexDigits, "With `strategy: quic-cid`: the id that this upstream puts into its connection ids, as hexadecimal digits in quotes, unique in the rule.").default("none, and `strategy: quic-cid` needs one").example("\"0a01\"");
pub static UPSTREAM_SAMPLE: Field = Field::new("sample", Shape::Number(&SAMPLE), "N: of N packets in turn one is sent, chosen at random. For mirrors and with `mode: replicate`.").default("1").example("10");
pub static SAMPLE: Number = Number { what: "a sampling rate", first: 1, last: 1_000_000 };

pub static ROOT_MAP: Table = Table {
    what: "a configuration",
    fields: &[&VERSION, &INTERFACES, &ANNOUNCE, &FLOWS, &DECAP, &DEFAULTS, &RULES],
};
pub static DECAP_MAP: Table =
    Table { what: "the outer headers to take off", fields: &[&DECAP_FROM, &DECAP_VIA] };
pub static ANNOUNCE_MAP: Table = Table {
    what: "the announcement",
    fields: &[
        &ANNOUNCE_INTERFACE,
        &ANNOUNCE_LAST_RESORT,
        &ANNOUNCE_HOLD_DOWN,
        &ANNOUNCE_SETTLE,
        &ANNOUNCE_EXPIRE,
    ],
};
pub static INTERFACE_MAP: Table =
    Table { what: "an interface", fields: &[&INTERFACE_NAME, &XDP.field] };
pub static FLOWS_MAP: Table = Table {
    what: "the table of flows",
    fields: &[&FLOWS_ENTRIES, &FLOWS_PORTS, &FLOWS_ADDRESSES, &FLOWS_UNANSWERED, &FLOWS_ASSURED],
};
pub static RULE_MAP: Table =
    Table { what: "a rule", fields: &[&NAME, &KEY, &OPTIONS, &UPSTREAM, &MIRROR] };
pub static KEY_MAP: Table =
    Table { what: "a key", fields: &[&KEY_ADDRESS, &KEY_PORT, &KEY_FROM, &KEY_NOT_FROM] };
pub static OPTIONS_MAP: Table = Table {
    what: "options",
    fields: &[
        &TC_ACTION.field,
        &MODE.field,
        &SOURCE.field,
        &REPLY.field,
        &VIA.field,
        &ANSWERS,
        &STICKY,
        &STRATEGY.field,
        &PAYLOAD,
        &SERVER_ID,
        &HASH.field,
        &TEMPLATES.field,
        &HEALTH,
        &ALL_DOWN.field,
        &FRAGMENTS.field,
        &ZERO_CHECKSUM.field,
        &MARTIANS.field,
        &SENDERS,
    ],
};
pub static PAYLOAD_MAP: Table =
    Table { what: "a part of the payload", fields: &[&PAYLOAD_OFFSET, &PAYLOAD_LENGTH] };
pub static SERVER_ID_MAP: Table =
    Table { what: "a place of server ids", fields: &[&SERVER_ID_OFFSET, &SERVER_ID_LENGTH] };
/// The checks of `health`, of which a map has one.
pub static CHECKS: [&Field; 10] = [
    &HEALTH_UDP,
    &HEALTH_TCP,
    &HEALTH_HTTP,
    &HEALTH_ICMP,
    &HEALTH_DNS,
    &HEALTH_NTP,
    &HEALTH_SNMP,
    &HEALTH_SIP,
    &HEALTH_RADIUS,
    &HEALTH_SYSLOG,
];
pub static HEALTH_MAP: Table = Table {
    what: "a health check",
    fields: &[
        &HEALTH_UDP,
        &HEALTH_TCP,
        &HEALTH_HTTP,
        &HEALTH_ICMP,
        &HEALTH_DNS,
        &HEALTH_NTP,
        &HEALTH_SNMP,
        &HEALTH_SIP,
        &HEALTH_RADIUS,
        &HEALTH_SYSLOG,
        &HEALTH_INTERVAL,
        &HEALTH_TIMEOUT,
        &HEALTH_RISE,
        &HEALTH_FALL,
    ],
};
pub static UDP_MAP: Table =
    Table { what: "a UDP probe", fields: &[&PROBE_SEND, &PROBE_EXPECT, &PROBE_PORT] };
pub static HTTP_MAP: Table =
    Table { what: "an HTTP probe", fields: &[&PROBE_PORT, &PROBE_PATH, &PROBE_STATUS] };
pub static ICMP_MAP: Table = Table { what: "an ICMP probe", fields: &[] };
pub static DNS_MAP: Table = Table { what: "a DNS probe", fields: &[&PROBE_NAME, &PROBE_PORT] };
pub static PORT_MAP: Table = Table { what: "a probe of a port", fields: &[&PROBE_PORT] };
pub static SNMP_MAP: Table =
    Table { what: "an SNMP probe", fields: &[&PROBE_COMMUNITY, &PROBE_PORT] };
pub static RADIUS_MAP: Table =
    Table { what: "a RADIUS probe", fields: &[&PROBE_SECRET, &PROBE_PORT] };
pub static UPSTREAM_MAP: Table = Table {
    what: "an upstream",
    fields: &[
        &UPSTREAM_NAME,
        &UPSTREAM_ADDRESS,
        &UPSTREAM_ADDRESSES.field,
        &UPSTREAM_PORT,
        &UPSTREAM_WEIGHT,
        &UPSTREAM_PRIORITY,
        &UPSTREAM_STATE.field,
        &UPSTREAM_SOURCE.field,
        &UPSTREAM_VIA.field,
        &UPSTREAM_SERVER_ID,
        &UPSTREAM_SAMPLE,
        &UPSTREAM_FROM,
        &UPSTREAM_NOT_FROM,
    ],
};
pub static MIRROR_MAP: Table = Table {
    what: "a mirror",
    fields: &[
        &UPSTREAM_NAME,
        &UPSTREAM_ADDRESS,
        &UPSTREAM_ADDRESSES.field,
        &UPSTREAM_PORT,
        &UPSTREAM_STATE.field,
        &UPSTREAM_SOURCE.field,
        &UPSTREAM_SAMPLE,
        &UPSTREAM_FROM,
        &UPSTREAM_NOT_FROM,
    ],
};

static TABLES: [&Table; 19] = [
    &ROOT_MAP,
    &ANNOUNCE_MAP,
    &INTERFACE_MAP,
    &FLOWS_MAP,
    &RULE_MAP,
    &KEY_MAP,
    &OPTIONS_MAP,
    &PAYLOAD_MAP,
    &SERVER_ID_MAP,
    &UPSTREAM_MAP,
    &MIRROR_MAP,
    &HEALTH_MAP,
    &UDP_MAP,
    &HTTP_MAP,
    &ICMP_MAP,
    &DNS_MAP,
    &PORT_MAP,
    &SNMP_MAP,
    &RADIUS_MAP,
];

impl Table {
    /// The field of that name, if it can be used in such a file.
    pub fn field(&self, name: &str, root: Root) -> Result<&'static Field, Message> {
        let field = self.fields.iter().find(|field| field.name == name);
        match field {
            None => Err(self.unknown(name, root)),
            Some(field) if !field.is_usable(root) => Err(map_only(&format!("`{name}`"))),
            Some(field) => Ok(field),
        }
    }

    fn unknown(&self, name: &str, root: Root) -> Message {
        let holds = |table: &&&Table| {
            let mut fields = table.fields.iter();
            fields.any(|field| field.name == name && field.is_usable(root))
        };
        let help = match (TABLES.iter().find(holds), self.nearest(name, root)) {
            (Some(table), _) => format!("`{name}` is a field of {}", table.what),
            (None, Some(near)) => format!("did you mean `{near}`?"),
            (None, None) => format!("known here: {}", list(&self.usable(root))),
        };
        Message::new(format!("unknown field `{}`", shorten(name))).help(help)
    }

    /// The field that was probably meant by a name that is none.
    pub fn nearest(&self, name: &str, root: Root) -> Option<&'static str> {
        nearest(name, &self.usable(root))
    }

    fn usable(&self, root: Root) -> Vec<&'static str> {
        let usable = self.fields.iter().filter(|field| field.is_usable(root));
        usable.map(|field| field.name).collect()
    }
}

impl EnumField {
    /// Returns the word of that name, if it can be used in such a file.
    pub fn word(&'static self, name: &str, root: Root) -> Result<&'static str, Message> {
        match self.words.iter().find(|word| **word == name) {
            None => Err(unknown_word(name, self.usable(root))),
            Some(word) if !self.usable(root).contains(word) => Err(map_only(&format!("`{name}`"))),
            Some(word) => Ok(word),
        }
    }

    pub fn usable(&self, root: Root) -> &'static [&'static str] {
        match root {
            Root::List => self.list_words,
            Root::Map => self.words,
        }
    }

    /// Returns the value that holds where the field is missing; none where another field's does.
    pub fn default_word(&self, root: Root) -> Option<&'static str> {
        let (list, map) = self.defaults?;
        Some(if root == Root::List { list } else { map })
    }

    /// All words that can be used in such a file, for a message.
    pub fn list(&self, root: Root) -> String {
        format!("one of {}", list(self.usable(root)))
    }
}

/// Returns the message of a word that is none of some.
pub fn unknown_word(name: &str, words: &[&'static str]) -> Message {
    let help = match nearest(name, words) {
        Some(near) => format!("did you mean `{near}`?"),
        None => format!("known here: {}", list(words)),
    };
    Message::new(format!("unknown word `{}`", shorten(name))).help(help)
}

pub fn map_only(what: &str) -> Message {
    Message::new(format!("{what} needs the map form of the file"))
        .help("write `version: 1` at its top and the list under `rules:`")
}

/// `a`, `b`, `c`
pub fn list(words: &[&str]) -> String {
    let words: Vec<_> = words.iter().map(|word| format!("`{word}`")).collect();
    words.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_has_fewer_fields_than_a_reader_takes() {
        for table in TABLES {
            assert!(table.fields.len() < super::super::yaml::FIELDS);
        }
    }
}
