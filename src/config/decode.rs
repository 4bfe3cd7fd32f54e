//! The tree of a file made into rules, each value judged by itself.

use serde::Deserialize;
use serde::de::value::{Error, StrDeserializer};

use super::diagnostic::{Complaint, Part, Place, Problems};
use super::document::{Entry, Node};
use super::path::Trail;
use super::scalar;
use super::vocabulary::{self as words, Choice, Field, Root, Table, Word};
use super::{
    Action, Fragments, Hash, Health, Key, Mode, Ports, Rule, Source, State, Strategy, Upstream,
};

/// A file's content, as far as it could be understood.
pub(super) struct Decoded {
    pub root: Root,
    pub interfaces: Vec<String>,
    pub rules: Vec<Rule>,
    pub problems: Problems,
    /// Where the list of rules is, if it is there and empty.
    pub empty: Option<super::Path>,
}

pub(super) fn decode(node: &Node<'_>) -> Decoded {
    let root = match node {
        Node::List(_) => Root::List,
        _ => Root::Map,
    };
    let mut decoder = Decoder {
        decoded: Decoded {
            root,
            interfaces: Vec::new(),
            rules: Vec::new(),
            problems: Problems::default(),
            empty: None,
        },
    };
    match node {
        Node::List(rules) => decoder.rules(rules, &Options::default(), &Trail::ROOT),
        Node::Map(_) => decoder.map(node),
        _ => decoder.no_root(node),
    }
    decoder.decoded
}

/// A version that is missing is complained with the other missing fields.
fn version(node: &Node<'_>) -> Result<(), Complaint> {
    let Node::Map(entries) = node else {
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
        let entry = entries.find(|(name, _)| name == field.name);
        entry.map(|(_, value)| value)
    }
}

/// What a file says for a choice.
#[derive(Clone, Copy, Default)]
enum Said {
    #[default]
    Nothing,
    Nonsense,
    Word(&'static Word),
}

impl Said {
    fn or(self, other: Said) -> Said {
        match self {
            Said::Nothing => other,
            _ => self,
        }
    }
}

/// The options as they were given, for a rule or as defaults.
#[derive(Clone, Copy, Default)]
struct Options {
    action: Said,
    mode: Said,
    source: Said,
    strategy: Said,
    hash: Said,
    health: Said,
}

impl Options {
    fn or(&self, defaults: &Options) -> Options {
        Options {
            action: self.action.or(defaults.action),
            mode: self.mode.or(defaults.mode),
            source: self.source.or(defaults.source),
            strategy: self.strategy.or(defaults.strategy),
            hash: self.hash.or(defaults.hash),
            health: self.health.or(defaults.health),
        }
    }
}

/// The options of a rule after all defaults.
struct Chosen {
    action: Action,
    mode: Mode,
    strategy: Strategy,
    hash: Hash,
    source: Source,
    health: Health,
}

impl Decoder {
    fn complain(&mut self, at: &Trail<'_>, complaint: Complaint) {
        self.decoded.problems.push(at.path(), complaint);
    }

    /// Notes the complaint, if it is one.
    fn note<T>(&mut self, at: &Trail<'_>, result: Result<T, Complaint>) -> Option<T> {
        result.map_err(|complaint| self.complain(at, complaint)).ok()
    }

    fn no_root(&mut self, node: &Node<'_>) {
        let message = match node {
            Node::Null => "the file is empty".into(),
            _ => format!("expected a map or a list of rules, found {}", node.describe()),
        };
        let help =
            "a configuration is a map with `version: 1` and `rules:`, or a bare list of rules";
        self.complain(&Trail::ROOT, Complaint::new(message).help(help));
    }

    fn map(&mut self, node: &Node<'_>) {
        let at = &Trail::ROOT;
        // The words of another version are not ours to judge.
        if let Err(complaint) = version(node) {
            return self.complain(&at.field(words::VERSION.name), complaint);
        }
        let Some(fields) = self.fields(node, &words::ROOT_MAP, at) else {
            return;
        };
        if let Some(node) = fields.get(&words::INTERFACES) {
            self.interfaces(node, &at.field(words::INTERFACES.name));
        }
        let defaults = self.options(fields.get(&words::DEFAULTS), &at.field(words::DEFAULTS.name));
        if let Some(node) = fields.get(&words::RULES) {
            let at = at.field(words::RULES.name);
            if let Some(rules) = self.list(node, "a list of rules", &at) {
                self.rules(rules, &defaults, &at);
            }
        }
    }

    /// The fields of a map, all of them known and none missing that is required, or it is complained.
    fn fields<'n, 't>(
        &mut self,
        node: &'n Node<'t>,
        table: &'static Table,
        at: &Trail<'_>,
    ) -> Option<Fields<'n, 't>> {
        let Node::Map(entries) = node else {
            let what = format!("{} (a map)", table.what);
            return self.note(at, scalar::expected(&what, node));
        };
        let root = self.decoded.root;
        for (name, _) in entries {
            if let Err(complaint) = table.field(name, root) {
                let path = at.path().field(name.clone().into_owned());
                let part = Part::Name;
                self.decoded.problems.push(Place { path, part }, complaint);
            }
        }
        let fields = Fields { entries, root };
        for field in table.fields.iter().filter(|field| field.required) {
            // Of a misspelt field, one complaint is enough.
            let misspelt = |(name, _): &Entry<'_>| table.nearest(name, root) == Some(field.name);
            let missing = field.is_usable(root) && fields.get(field).is_none();
            if missing && !entries.iter().any(misspelt) {
                let message = format!("`{}` is missing", field.name);
                self.complain(at, Complaint::new(message).help(field.about));
            }
        }
        Some(fields)
    }

    fn list<'n, 't>(
        &mut self,
        node: &'n Node<'t>,
        what: &str,
        at: &Trail<'_>,
    ) -> Option<&'n [Node<'t>]> {
        match node {
            Node::List(nodes) => Some(nodes),
            _ => self.note(at, scalar::expected(what, node)),
        }
    }

    fn interfaces(&mut self, node: &Node<'_>, at: &Trail<'_>) {
        let nodes = self.list(node, "a list of interfaces", at);
        for (index, node) in nodes.unwrap_or_default().iter().enumerate() {
            let interface = self.note(&at.index(index), scalar::interface(node));
            self.decoded.interfaces.extend(interface);
        }
    }

    fn rules(&mut self, nodes: &[Node<'_>], defaults: &Options, at: &Trail<'_>) {
        if nodes.is_empty() {
            self.decoded.empty = Some(at.path());
        }
        for (index, node) in nodes.iter().enumerate() {
            let rule = self.rule(node, defaults, &at.index(index));
            self.decoded.rules.extend(rule);
        }
    }

    fn rule(&mut self, node: &Node<'_>, defaults: &Options, at: &Trail<'_>) -> Option<Rule> {
        let fields = self.fields(node, &words::RULE_MAP, at)?;
        let name = self.name(fields.get(&words::NAME), &at.field(words::NAME.name));
        let key = fields.get(&words::KEY);
        let key = key.and_then(|node| self.key(node, &at.field(words::KEY.name)));
        let upstreams = fields.get(&words::UPSTREAM);
        let upstreams =
            upstreams.and_then(|node| self.upstreams(node, &at.field(words::UPSTREAM.name)));
        let options = self.options(fields.get(&words::OPTIONS), &at.field(words::OPTIONS.name));
        let chosen = self.settle_all(&options.or(defaults), &at.field(words::OPTIONS.name));

        let (name, key, chosen) = (name?, key?, chosen?);
        Some(Rule {
            name: name.unwrap_or_else(|| key.to_string()),
            key,
            action: chosen.action,
            mode: chosen.mode,
            strategy: chosen.strategy,
            payload: None,
            hash: chosen.hash,
            source: chosen.source,
            health: chosen.health,
            fragments: Fragments::Follow,
            upstreams: upstreams?,
            mirrors: Vec::new(),
            at: at.path(),
        })
    }

    fn settle_all(&mut self, said: &Options, at: &Trail<'_>) -> Option<Chosen> {
        let mode = self.settle::<Mode>(said.mode, &words::MODE, at);
        let action = self.settle(said.action, &words::TC_ACTION, at);
        let source = self.settle(said.source, &words::SOURCE, at);
        let strategy = self.settle(said.strategy, &words::STRATEGY, at);
        let hash = self.settle(said.hash, &words::HASH, at);
        let health = self.settle(said.health, &words::HEALTH, at);
        Some(Chosen {
            action: action?,
            mode: mode?,
            source: source?,
            strategy: strategy?,
            hash: hash?,
            health: health?,
        })
    }

    /// The value of an option after all defaults.
    fn settle<T: Deserialize<'static>>(
        &mut self,
        said: Said,
        choice: &'static Choice,
        at: &Trail<'_>,
    ) -> Option<T> {
        let word = match said {
            Said::Word(word) => word,
            Said::Nonsense => return None,
            Said::Nothing => self.note(at, choice.default_word(self.decoded.root))?,
        };
        let variant = T::deserialize(StrDeserializer::<Error>::new(word.name));
        let variant = variant.map_err(|_| words::not_built(word.name));
        self.note(&at.field(choice.field.name), variant)
    }

    /// None for a bad name, Some(None) for no name.
    fn name(&mut self, node: Option<&Node<'_>>, at: &Trail<'_>) -> Option<Option<String>> {
        match node {
            None => Some(None),
            Some(node) => self.note(at, scalar::name(node)).map(Some),
        }
    }

    fn key(&mut self, node: &Node<'_>, at: &Trail<'_>) -> Option<Key> {
        let fields = self.fields(node, &words::KEY_MAP, at)?;
        let address = fields.get(&words::KEY_ADDRESS).and_then(|node| {
            let at = at.field(words::KEY_ADDRESS.name);
            self.note(&at, scalar::key_address(node))
        });
        let ports = fields.get(&words::KEY_PORT).and_then(|node| {
            let at = at.field(words::KEY_PORT.name);
            self.ports(node, &at)
        });
        Some(Key::new(address?, ports?))
    }

    fn ports(&mut self, node: &Node<'_>, at: &Trail<'_>) -> Option<Vec<Ports>> {
        let Node::List(nodes) = node else {
            let ports = self.note(at, scalar::ports(node))?;
            if self.decoded.root == Root::List && ports.first != ports.last {
                self.complain(at, words::map_only("a range of ports"));
                return None;
            }
            return Some(vec![ports]);
        };
        if self.decoded.root == Root::List {
            self.complain(at, words::map_only("a list of ports"));
            return None;
        }
        if nodes.is_empty() {
            self.complain(at, Complaint::new("no ports: a key needs at least one"));
            return None;
        }
        let ports: Vec<_> = nodes
            .iter()
            .enumerate()
            .map(|(index, node)| self.note(&at.index(index), scalar::ports(node)))
            .collect();
        ports.into_iter().collect()
    }

    fn upstreams(&mut self, node: &Node<'_>, at: &Trail<'_>) -> Option<Vec<Upstream>> {
        let nodes = self.list(node, "a list of upstreams", at)?;
        if nodes.is_empty() {
            self.complain(at, Complaint::new("no upstreams: a rule needs at least one"));
            return None;
        }
        let upstreams: Vec<_> = nodes
            .iter()
            .enumerate()
            .map(|(index, node)| self.upstream(node, &at.index(index)))
            .collect();
        upstreams.into_iter().collect()
    }

    fn upstream(&mut self, node: &Node<'_>, at: &Trail<'_>) -> Option<Upstream> {
        let fields = self.fields(node, &words::UPSTREAM_MAP, at)?;
        let name = fields.get(&words::UPSTREAM_NAME);
        let name = self.name(name, &at.field(words::UPSTREAM_NAME.name));
        let address = fields.get(&words::UPSTREAM_ADDRESS).and_then(|node| {
            let at = at.field(words::UPSTREAM_ADDRESS.name);
            self.note(&at, scalar::upstream_address(node))
        });
        let port = match fields.get(&words::UPSTREAM_PORT) {
            None => Some(None),
            Some(node) => {
                let at = at.field(words::UPSTREAM_PORT.name);
                self.note(&at, scalar::port(node)).map(Some)
            }
        };
        Some(Upstream {
            name: name?,
            address: address?,
            port: port?,
            weight: 1,
            state: State::Active,
            source: None,
            sample: 1,
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
        Options {
            action: self.choice(&fields, &words::TC_ACTION, at),
            mode: self.choice(&fields, &words::MODE, at),
            source: self.choice(&fields, &words::SOURCE, at),
            strategy: self.choice(&fields, &words::STRATEGY, at),
            hash: self.choice(&fields, &words::HASH, at),
            health: self.choice(&fields, &words::HEALTH, at),
        }
    }

    fn choice(&mut self, fields: &Fields<'_, '_>, choice: &'static Choice, at: &Trail<'_>) -> Said {
        let Some(node) = fields.get(&choice.field) else {
            return Said::Nothing;
        };
        let root = self.decoded.root;
        let word = match node {
            Node::Text(name) => choice.word(name, root),
            _ => scalar::expected(&choice.list(root), node),
        };
        match self.note(&at.field(choice.field.name), word) {
            Some(word) => Said::Word(word),
            None => Said::Nonsense,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn has_variants<T: Deserialize<'static>>(choice: &'static Choice) {
        for word in choice.words {
            let variant = T::deserialize(StrDeserializer::<Error>::new(word.name));
            assert_eq!(variant.is_ok(), word.built, "{}", word.name);
        }
    }

    #[test]
    fn a_word_is_built_if_its_enum_has_it() {
        has_variants::<Action>(&words::TC_ACTION);
        has_variants::<Mode>(&words::MODE);
        has_variants::<Source>(&words::SOURCE);
        has_variants::<Strategy>(&words::STRATEGY);
        has_variants::<Hash>(&words::HASH);
    }
}
