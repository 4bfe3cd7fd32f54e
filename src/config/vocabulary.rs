//! The words of a configuration file, each said once: decoding, suggestions and the schema read them
//! from here.

use super::diagnostic::Complaint;
use super::quote::shorten;

/// The address or port of a key that matches all.
pub const ANY: &str = "any";

/// Which of the two forms a file has.
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
    pub about: &'static str,
    pub shape: Shape,
    pub required: bool,
    pub in_list: bool,
}

/// What a field's value is.
#[derive(Clone, Copy, Debug)]
pub enum Shape {
    Version,
    /// A rule's or an upstream's name.
    Name,
    Interfaces,
    /// An IP address or `any`; in a bare list an address.
    Address,
    /// An IP address or a host name.
    Host,
    Port,
    /// `any`, a port, a range, or a list of the latter two; in a bare list one port.
    Ports,
    /// A network or a list of them.
    Networks,
    Number(&'static Number),
    Choice(&'static Choice),
    /// A word, or a map.
    WordOrMap(&'static str, &'static Table),
    Map(&'static Table),
    /// A list of maps.
    Maps(&'static Table),
}

/// A whole number with its limits.
#[derive(Debug)]
pub struct Number {
    /// With its article: "a weight".
    pub what: &'static str,
    pub first: u32,
    pub last: u32,
}

/// The fields of a map.
#[derive(Debug)]
pub struct Table {
    /// What the map is, with its article: "a rule".
    pub what: &'static str,
    pub fields: &'static [&'static Field],
}

/// A field whose value is one word out of several.
#[derive(Debug)]
pub struct Choice {
    pub field: Field,
    pub words: &'static [Word],
    /// What holds where nothing is said: in a bare list, in a map. None: what others say.
    default_list: Option<&'static str>,
    default_map: Option<&'static str>,
}

#[derive(Debug)]
pub struct Word {
    /// Also what serde calls the variant of the enum.
    pub name: &'static str,
    pub in_list: bool,
}

impl Field {
    const fn new(name: &'static str, shape: Shape, about: &'static str) -> Field {
        Field { name, about, shape, required: false, in_list: false }
    }

    const fn required(self) -> Field {
        Field { required: true, ..self }
    }

    const fn in_list(self) -> Field {
        Field { in_list: true, ..self }
    }

    pub fn is_usable(&self, root: Root) -> bool {
        root == Root::Map || self.in_list
    }
}

impl Word {
    const fn new(name: &'static str) -> Word {
        Word { name, in_list: false }
    }

    const fn in_list(self) -> Word {
        Word { in_list: true, ..self }
    }

    pub fn is_usable(&self, root: Root) -> bool {
        root == Root::Map || self.in_list
    }
}

pub static VERSION: Field =
    Field::new("version", Shape::Version, "The version of this format: 1.").required();
pub static INTERFACES: Field = Field::new(
    "interfaces",
    Shape::Interfaces,
    "The network interfaces whose incoming packets are looked at. The option -i replaces them.",
);
pub static DEFAULTS: Field = Field::new(
    "defaults",
    Shape::Map(&OPTIONS_MAP),
    "Options for all rules that do not say otherwise.",
);
pub static RULES: Field = Field::new("rules", Shape::Maps(&RULE_MAP), "The rules.").required();

pub static NAME: Field = Field::new(
    "name",
    Shape::Name,
    "The rule's name, unique in the file. By default the key: `10.0.0.5:2055`.",
);
pub static KEY: Field =
    Field::new("key", Shape::Map(&KEY_MAP), "What the rule matches.").required().in_list();
pub static OPTIONS: Field =
    Field::new("options", Shape::Map(&OPTIONS_MAP), "How matched packets are treated.").in_list();
pub static UPSTREAM: Field = Field::new(
    "upstream",
    Shape::Maps(&UPSTREAM_MAP),
    "The hosts that matched packets are sent to.",
)
.required()
.in_list();
pub static MIRROR: Field = Field::new(
    "mirror",
    Shape::Maps(&MIRROR_MAP),
    "Hosts that get a copy of each packet besides, whichever upstream it goes to.",
);

pub static KEY_ADDRESS: Field = Field::new(
    "address",
    Shape::Address,
    "The destination address of the packet; `any`: each address of the interfaces.",
)
.required()
.in_list();
pub static KEY_PORT: Field = Field::new(
    "port",
    Shape::Ports,
    "The destination port of the packet: one, a range like \"6343-6350\", a list of both, or `any`.",
)
.required()
.in_list();
pub static KEY_FROM: Field = Field::new(
    "from",
    Shape::Networks,
    "The senders' networks, like 10.20.0.0/16. By default any sender is matched.",
);

pub static TC_ACTION: Choice = Choice {
    field: Field::new(
        "tc_action",
        Shape::Choice(&TC_ACTION),
        "`pass` delivers the packet locally besides, `block` ends its way here.",
    )
    .in_list(),
    words: &[Word::new("pass").in_list(), Word::new("block").in_list()],
    default_list: Some("pass"),
    default_map: Some("pass"),
};
pub static MODE: Choice = Choice {
    field: Field::new(
        "mode",
        Shape::Choice(&MODE),
        "Whether one upstream gets the packet (`balance`) or all of them do (`replicate`).",
    ),
    words: &[Word::new("balance"), Word::new("replicate")],
    default_list: Some("balance"),
    default_map: Some("balance"),
};
const SOURCES: &[Word] = &[Word::new("vip"), Word::new("preserve"), Word::new("egress")];
pub static SOURCE: Choice = Choice {
    field: Field::new(
        "source",
        Shape::Choice(&SOURCE),
        "The source that the upstream sees: `vip` is the address that the packet was sent to, \
         `preserve` the sender's, `egress` this host's own on the way to the upstream.",
    ),
    words: SOURCES,
    default_list: Some("vip"),
    default_map: Some("vip"),
};
pub static STRATEGY: Choice = Choice {
    field: Field::new(
        "strategy",
        Shape::Choice(&STRATEGY),
        "What of the packet selects its upstream.",
    )
    .in_list(),
    words: &[
        Word::new("src-port").in_list(),
        Word::new("src-ip").in_list(),
        Word::new("src-ip-port"),
        Word::new("random"),
        Word::new("payload"),
    ],
    default_list: Some("src-port"),
    default_map: Some("src-ip-port"),
};
pub static HASH: Choice = Choice {
    field: Field::new("hash", Shape::Choice(&HASH), "How what was selected becomes an upstream."),
    words: &[Word::new("modulo"), Word::new("maglev")],
    default_list: Some("modulo"),
    default_map: Some("maglev"),
};

pub static PAYLOAD: Field = Field::new(
    "payload",
    Shape::WordOrMap(STATSD, &PAYLOAD_MAP),
    "What of the payload selects the upstream, for the strategy of that name: some bytes, or the \
     name of a StatsD metric.",
);
pub const STATSD: &str = "statsd";
pub static PAYLOAD_OFFSET: Field =
    Field::new("offset", Shape::Number(&OFFSET), "The bytes of the payload before those.")
        .required();
pub static OFFSET: Number = Number { what: "an offset", first: 0, last: 65_535 };
pub static PAYLOAD_LENGTH: Field =
    Field::new("length", Shape::Number(&LENGTH), "How many bytes are looked at.").required();
pub static LENGTH: Number = Number { what: "a length", first: 1, last: 64 };

pub static FRAGMENTS: Choice = Choice {
    field: Field::new(
        "fragments",
        Shape::Choice(&FRAGMENTS),
        "Whether fragments go where their first one goes (`follow`), are only delivered locally \
         (`pass`) or are dropped (`drop`).",
    ),
    words: &[Word::new("follow"), Word::new("pass"), Word::new("drop")],
    default_list: Some("follow"),
    default_map: Some("follow"),
};
pub static ZERO_CHECKSUM: Choice = Choice {
    field: Field::new(
        "zero-checksum",
        Shape::Choice(&ZERO_CHECKSUM),
        "Whether UDP over IPv6 without a checksum is sent on, as tunnels send it.",
    ),
    words: ADMISSIONS,
    default_list: Some("deny"),
    default_map: Some("deny"),
};
pub static MARTIANS: Choice = Choice {
    field: Field::new(
        "martians",
        Shape::Choice(&MARTIANS),
        "Whether packets are sent on whose source address no router forwards.",
    ),
    words: ADMISSIONS,
    default_list: Some("deny"),
    default_map: Some("deny"),
};
const ADMISSIONS: &[Word] = &[Word::new("deny"), Word::new("allow")];
pub static HEALTH: Choice = Choice {
    field: Field::new(
        "health",
        Shape::Choice(&HEALTH),
        "Whether an upstream is left out while its next hop does not answer (`neighbour`). Needs `udplb arpd`.",
    ),
    words: &[Word::new("off"), Word::new("neighbour")],
    default_list: Some("off"),
    default_map: Some("off"),
};

pub static UPSTREAM_NAME: Field =
    Field::new("name", Shape::Name, "The upstream's name, unique in the rule.");
pub static UPSTREAM_ADDRESS: Field =
    Field::new("address", Shape::Host, "The upstream's IP address or host name.")
        .required()
        .in_list();
pub static UPSTREAM_ADDRESSES: Choice = Choice {
    field: Field::new(
        "addresses",
        Shape::Choice(&UPSTREAM_ADDRESSES),
        "Whether one address of a host name is used (`one`), or each is an upstream of its own (`all`).",
    ),
    words: &[Word::new("one"), Word::new("all")],
    default_list: Some("one"),
    default_map: Some("one"),
};
pub static UPSTREAM_PORT: Field = Field::new(
    "port",
    Shape::Port,
    "The upstream's port. By default the one that the packet was sent to.",
)
.in_list();

pub static UPSTREAM_WEIGHT: Field = Field::new(
    "weight",
    Shape::Number(&WEIGHT),
    "The upstream's share of the flows beside those of the others, 1 by default.",
);
pub static WEIGHT: Number = Number { what: "a weight", first: 1, last: 10_000 };
pub static UPSTREAM_STATE: Choice = Choice {
    field: Field::new(
        "state",
        Shape::Choice(&UPSTREAM_STATE),
        "Whether the upstream gets packets; while it is `drained`, others get its own.",
    ),
    words: &[Word::new("active"), Word::new("drained")],
    default_list: Some("active"),
    default_map: Some("active"),
};
pub static UPSTREAM_SOURCE: Choice = Choice {
    field: Field::new(
        "source",
        Shape::Choice(&UPSTREAM_SOURCE),
        "The source that this upstream sees. By default that of the rule.",
    ),
    words: SOURCES,
    default_list: None,
    default_map: None,
};
pub static UPSTREAM_SAMPLE: Field = Field::new(
    "sample",
    Shape::Number(&SAMPLE),
    "N: every N-th packet is sent, for mirrors and with `mode: replicate`. 1 by default.",
);
pub static SAMPLE: Number = Number { what: "a sampling rate", first: 1, last: 1_000_000 };

pub static ROOT_MAP: Table =
    Table { what: "a configuration", fields: &[&VERSION, &INTERFACES, &DEFAULTS, &RULES] };
pub static RULE_MAP: Table =
    Table { what: "a rule", fields: &[&NAME, &KEY, &OPTIONS, &UPSTREAM, &MIRROR] };
pub static KEY_MAP: Table = Table { what: "a key", fields: &[&KEY_ADDRESS, &KEY_PORT, &KEY_FROM] };
pub static OPTIONS_MAP: Table = Table {
    what: "options",
    fields: &[
        &TC_ACTION.field,
        &MODE.field,
        &SOURCE.field,
        &STRATEGY.field,
        &PAYLOAD,
        &HASH.field,
        &HEALTH.field,
        &FRAGMENTS.field,
        &ZERO_CHECKSUM.field,
        &MARTIANS.field,
    ],
};
pub static PAYLOAD_MAP: Table =
    Table { what: "a part of the payload", fields: &[&PAYLOAD_OFFSET, &PAYLOAD_LENGTH] };
pub static UPSTREAM_MAP: Table = Table {
    what: "an upstream",
    fields: &[
        &UPSTREAM_NAME,
        &UPSTREAM_ADDRESS,
        &UPSTREAM_ADDRESSES.field,
        &UPSTREAM_PORT,
        &UPSTREAM_WEIGHT,
        &UPSTREAM_STATE.field,
        &UPSTREAM_SOURCE.field,
        &UPSTREAM_SAMPLE,
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
    ],
};

static TABLES: [&Table; 7] =
    [&ROOT_MAP, &RULE_MAP, &KEY_MAP, &OPTIONS_MAP, &PAYLOAD_MAP, &UPSTREAM_MAP, &MIRROR_MAP];

impl Table {
    /// The field of that name, if it can be used in such a file.
    pub fn field(&self, name: &str, root: Root) -> Result<&'static Field, Complaint> {
        let field = self.fields.iter().find(|field| field.name == name);
        match field {
            None => Err(self.unknown(name, root)),
            Some(field) if !field.is_usable(root) => Err(map_only(&format!("`{name}`"))),
            Some(field) => Ok(field),
        }
    }

    fn unknown(&self, name: &str, root: Root) -> Complaint {
        let holds = |table: &&&Table| {
            let mut fields = table.fields.iter();
            fields.any(|field| field.name == name && field.is_usable(root))
        };
        let help = match (TABLES.iter().find(holds), self.nearest(name, root)) {
            (Some(table), _) => format!("`{name}` is a field of {}", table.what),
            (None, Some(near)) => format!("did you mean `{near}`?"),
            (None, None) => format!("known here: {}", list(&self.usable(root))),
        };
        Complaint::new(format!("unknown field `{}`", shorten(name))).help(help)
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

impl Choice {
    /// The word of that name, if it can be used in such a file.
    pub fn word(&'static self, name: &str, root: Root) -> Result<&'static Word, Complaint> {
        let word = self.words.iter().find(|word| word.name == name);
        match word {
            None => Err(self.unknown(name, root)),
            Some(word) if !word.is_usable(root) => Err(map_only(&format!("`{name}`"))),
            Some(word) => Ok(word),
        }
    }

    fn unknown(&self, name: &str, root: Root) -> Complaint {
        let names = self.usable(root);
        let help = match nearest(name, &names) {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!("known here: {}", list(&names)),
        };
        Complaint::new(format!("unknown word `{}`", shorten(name))).help(help)
    }

    pub fn usable(&self, root: Root) -> Vec<&'static str> {
        let words = self.words.iter().filter(|word| word.is_usable(root));
        words.map(|word| word.name).collect()
    }

    /// What holds where nothing is said.
    pub fn default(&self, root: Root) -> Option<&'static str> {
        match root {
            Root::List => self.default_list,
            Root::Map => self.default_map,
        }
    }

    /// All words that can be used in such a file, for a message.
    pub fn list(&self, root: Root) -> String {
        format!("one of {}", list(&self.usable(root)))
    }
}

pub fn map_only(what: &str) -> Complaint {
    Complaint::new(format!("{what} needs the map form of the file"))
        .help("write `version: 1` at its top and the list under `rules:`")
}

/// `a`, `b`, `c`
fn list(words: &[&str]) -> String {
    let words: Vec<_> = words.iter().map(|word| format!("`{word}`")).collect();
    words.join(", ")
}

/// The known word that `word` is probably a slip of.
pub fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let word: Vec<char> = word.to_lowercase().replace('_', "-").chars().collect();
    if word.len() > 32 {
        return None;
    }
    let slips = |known: &str| {
        let known: Vec<char> = known.to_lowercase().replace('_', "-").chars().collect();
        distance(&word, &known)
    };
    let near = known.iter().map(|known| (slips(known), *known)).min()?;
    (near.0 <= (word.len() / 3).max(1) && near.0 < word.len()).then_some(near.1)
}

/// How many characters to insert, delete, replace or swap with their neighbour to make `b` out of `a`.
fn distance(a: &[char], b: &[char]) -> usize {
    let mut older = vec![0; b.len() + 1];
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for i in 0..a.len() {
        let mut row = vec![i + 1; b.len() + 1];
        for j in 0..b.len() {
            let replaced = last[j] + usize::from(a[i] != b[j]);
            row[j + 1] = replaced.min(last[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && a[i] == b[j - 1] && a[i - 1] == b[j] {
                row[j + 1] = row[j + 1].min(older[j - 1] + 1);
            }
        }
        older = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_word_is_suggested_for_a_slip_only() {
        let known = ["tc_action", "strategy", "source", "port"];
        for (slip, word) in [
            ("tc-action", Some("tc_action")),
            ("Strategy", Some("strategy")),
            ("stratgey", Some("strategy")),
            ("sources", Some("source")),
            ("prot", Some("port")),
            ("", None),
            ("x", None),
            ("weight", None),
        ] {
            assert_eq!(nearest(slip, &known), word, "{slip}");
        }
    }

    #[test]
    fn a_map_has_fewer_fields_than_a_reader_takes() {
        for table in TABLES {
            assert!(table.fields.len() < super::super::yaml::FIELDS);
        }
    }
}
