//! YAML and JSON text.
//!
//! YAML is read from its parser's events, which carry byte offsets. Messages point at a map or list by
//! the name of its field, at a map in a list by its first field, and at a scalar where it stands.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;

use granit_parser::{ErrorKind, Event, Parser, ScalarStyle, ScanError, StrInput, options};
use serde::Deserialize;
use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};

use super::diagnostic::Message;
use super::node::{Content, Entry, Node, UNKNOWN};
use super::path::{Path, Step};
use super::quote::shorten;

/// Maximum number of values of a file once its aliases are followed. The largest configuration that
/// fits into the maps has about half as many.
const VALUES: usize = 10_000_000;

/// Maximum number of fields of a map: more than any has, and few enough to compare all with all.
pub(super) const FIELDS: usize = 64;

/// Maximum nesting of lists and maps: deeper than any file, and shallow enough for recursion.
const DEPTH: usize = 128;

const STAR: &str =
    "`*` refers to an anchor in YAML; to match all addresses or ports of a key, write `any`";

pub(super) fn read(text: &str) -> Result<Node<'_>, Message> {
    match read_json(text) {
        Some(node) => Ok(node),
        None => read_yaml(text),
    }
}

/// Reads YAML, or JSON as YAML, into nodes that carry their positions.
pub(super) fn read_yaml(text: &str) -> Result<Node<'_>, Message> {
    let options = options! { flow_nesting_limit: DEPTH, block_nesting_limit: DEPTH };
    let reader = Reader {
        parser: Parser::new_from_str_with_options(text, options),
        text,
        anchors: HashMap::new(),
        count: Count::default(),
    };
    reader.document()
}

/// Values read so far; long strings count for several.
#[derive(Default)]
struct Count(usize);

impl Count {
    /// Counts a value that takes up so many bytes beside its node.
    fn add(&mut self, bytes: usize) -> Result<(), Message> {
        self.0 += 1 + bytes / 32;
        if self.0 > VALUES {
            let message = format!("more than {VALUES} values, counting what its aliases stand for");
            return Err(Message::new(message));
        }
        Ok(())
    }

    fn add_all(&mut self, node: &Node<'_>) -> Result<(), Message> {
        match &node.content {
            Content::Text(text) => self.add(text.len()),
            Content::List(nodes) => {
                self.add(0)?;
                nodes.iter().try_for_each(|node| self.add_all(node))
            }
            Content::Map(entries) => {
                self.add(0)?;
                entries.iter().try_for_each(|entry| {
                    self.add(entry.name.len())?;
                    self.add_all(&entry.node)
                })
            }
            _ => self.add(0),
        }
    }
}

struct Reader<'t> {
    parser: Parser<'t, StrInput<'t>>,
    text: &'t str,
    /// Values that aliases may stand for, by the parser's number of their anchor.
    anchors: HashMap<usize, Node<'t>>,
    count: Count,
}

impl<'t> Reader<'t> {
    fn document(mut self) -> Result<Node<'t>, Message> {
        self.next()?;
        let (Event::DocumentStart(..), _) = self.next()? else {
            return Ok(Node { content: Content::Null, at: self.text.len() });
        };
        let (event, at) = self.next()?;
        let node = self.node(event, at, None)?;
        self.next()?;
        match self.next()? {
            (Event::DocumentStart(..), at) => {
                let message = "a second YAML document begins here, and a configuration is one";
                Err(error(at, Message::new(message)))
            }
            _ => Ok(node),
        }
    }

    /// Returns the next event and where it begins: with its tag, if it has one. Where nothing follows
    /// the `:` of a field, it begins behind that.
    fn next(&mut self) -> Result<(Event<'t>, usize), Message> {
        let (event, span) = match self.parser.next_event() {
            Some(Ok(event)) => event,
            Some(Err(error)) => return Err(self.syntax(&error)),
            None => return Ok((Event::StreamEnd, self.text.len())),
        };
        let start = span.tag_start.as_ref().unwrap_or(&span.start);
        let at = start.byte_offset().unwrap_or(0);
        let is_empty = span.start == span.end && self.text[at..].starts_with(':');
        Ok((event, at + usize::from(is_empty)))
    }

    /// Reads the value that begins with `event`. `name` is the offset of its field's name.
    fn node(
        &mut self,
        event: Event<'t>,
        at: usize,
        name: Option<usize>,
    ) -> Result<Node<'t>, Message> {
        let (content, anchor) = match event {
            Event::Alias(anchor) => return self.alias(anchor, at),
            Event::Scalar(text, style, anchor, tag) => {
                self.checked(at, |count| count.add(text.len()))?;
                let content = match tag.as_ref().map(|tag| tag.core_suffix()) {
                    None if style == ScalarStyle::Plain => plain(text),
                    None | Some(Some("str")) => Content::Text(text),
                    Some(Some("bool" | "float" | "int" | "null")) => plain(text),
                    Some(_) => return Err(tagged(at)),
                };
                (content, anchor)
            }
            Event::SequenceStart(_, anchor, tag) => match tag {
                Some(tag) if !tag.is_yaml_core_schema_tag("seq") => return Err(tagged(at)),
                _ => (self.list(at)?, anchor),
            },
            Event::MappingStart(_, anchor, tag) => match tag {
                Some(tag) if !tag.is_yaml_core_schema_tag("map") => return Err(tagged(at)),
                _ => (self.map(at)?, anchor),
            },
            // The grammar has nothing else here.
            _ => (Content::Null, 0),
        };
        let at = match (&content, name) {
            (Content::Map(_) | Content::List(_), Some(name)) => name,
            (Content::Map(entries), None) => entries.first().map_or(at, |first| first.at),
            _ => at,
        };
        let node = Node { content, at };
        if anchor != 0 {
            self.checked(at, |count| count.add_all(&node))?;
            self.anchors.insert(anchor, node.clone());
        }
        Ok(node)
    }

    fn alias(&mut self, anchor: usize, at: usize) -> Result<Node<'t>, Message> {
        let Some(node) = self.anchors.get(&anchor) else {
            let message = "this alias is part of what it stands for";
            return Err(error(at, Message::new(message).help(STAR)));
        };
        let counted = self.count.add_all(node);
        let node = Node { at, ..node.clone() };
        counted.map_err(|message| error(at, message))?;
        Ok(node)
    }

    fn list(&mut self, at: usize) -> Result<Content<'t>, Message> {
        self.checked(at, |count| count.add(0))?;
        let mut nodes = Vec::new();
        loop {
            let (event, at) = self.next()?;
            if matches!(event, Event::SequenceEnd) {
                return Ok(Content::List(nodes));
            }
            let node = self.node(event, at, None);
            nodes.push(node.map_err(|error| error.inside(Step::Index(nodes.len())))?);
        }
    }

    fn map(&mut self, at: usize) -> Result<Content<'t>, Message> {
        self.checked(at, |count| count.add(0))?;
        let mut entries: Vec<Entry<'t>> = Vec::new();
        loop {
            let (event, at) = self.next()?;
            if matches!(event, Event::MappingEnd) {
                return Ok(Content::Map(entries));
            }
            let name = self.name(event, at)?;
            self.checked(at, |count| count.add(name.len()))?;
            check_name(&name, &entries).map_err(|message| error(at, message))?;
            let (event, value_at) = self.next()?;
            match self.node(event, value_at, Some(at)) {
                Ok(node) => entries.push(Entry { name, at, node }),
                Err(error) => return Err(error.inside(Step::Field(name.into_owned().into()))),
            }
        }
    }

    /// Reads the name of a field: a scalar as it is written, or an alias of text.
    fn name(&mut self, event: Event<'t>, at: usize) -> Result<Cow<'t, str>, Message> {
        let name = match event {
            Event::Scalar(text, _, anchor, None) => {
                if anchor != 0 {
                    let content = Content::Text(text.clone());
                    self.anchors.insert(anchor, Node { content, at });
                }
                Some(text)
            }
            Event::Alias(anchor) => match self.anchors.get(&anchor).map(|node| &node.content) {
                Some(Content::Text(text)) => Some(text.clone()),
                _ => None,
            },
            _ => None,
        };
        let message = || Message::new("the name of a field must be text");
        name.ok_or_else(|| error(at, message()))
    }

    fn checked(
        &mut self,
        at: usize,
        count: impl FnOnce(&mut Count) -> Result<(), Message>,
    ) -> Result<(), Message> {
        count(&mut self.count).map_err(|message| error(at, message))
    }

    fn syntax(&self, error: &ScanError) -> Message {
        let offset = error.marker().byte_offset().unwrap_or(self.text.len());
        explain(self.text, offset, error.kind())
    }
}

/// An error at a value that the parser takes.
fn error(offset: usize, message: Message) -> Message {
    message.at(Path::default()).offset(offset)
}

fn tagged(at: usize) -> Message {
    error(at, Message::new("YAML tags have no meaning here"))
}

/// Refuses a name that a map cannot have beside those before it.
fn check_name(name: &str, before: &[Entry<'_>]) -> Result<(), Message> {
    if before.iter().any(|entry| entry.name == name) {
        return Err(Message::new(format!("`{}` is given twice in one map", shorten(name))));
    }
    if before.len() >= FIELDS {
        return Err(Message::new(format!("more than {FIELDS} fields in one map")));
    }
    if name == "<<" {
        return Err(Message::new("merge keys (`<<`) are not supported")
            .help("options that many rules share belong in `defaults`"));
    }
    Ok(())
}

/// Returns the value of a scalar without quotes, by YAML's core schema and its binary numbers.
fn plain(text: Cow<'_, str>) -> Content<'_> {
    match text.as_ref() {
        "" | "~" | "null" | "Null" | "NULL" => return Content::Null,
        "true" | "True" | "TRUE" => return Content::Bool(true),
        "false" | "False" | "FALSE" => return Content::Bool(false),
        ".nan" | ".NaN" | ".NAN" => return Content::Float(f64::NAN),
        _ => {}
    }
    // Most texts are told by their first character.
    let (sign, digits) = match text.strip_prefix(['-', '+']) {
        Some(digits) => (&text[..1], digits),
        None => ("", text.as_ref()),
    };
    if !digits.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return Content::Text(text);
    }
    match number(sign == "-", digits) {
        Some(content) => content,
        None => Content::Text(text),
    }
}

fn number(negative: bool, digits: &str) -> Option<Content<'static>> {
    if matches!(digits, ".inf" | ".Inf" | ".INF") {
        return Some(Content::Float(if negative { f64::NEG_INFINITY } else { f64::INFINITY }));
    }
    let (radix, rest) = match digits.get(..2) {
        Some("0x") => (16, &digits[2..]),
        Some("0o") => (8, &digits[2..]),
        Some("0b") => (2, &digits[2..]),
        _ => (10, digits),
    };
    let has_sign = rest.starts_with(['-', '+']);
    if !has_sign && let Ok(value) = i64::from_str_radix(rest, radix) {
        // A leading zero means octal elsewhere.
        let is_plain = radix != 10 || digits == "0" || !digits.starts_with('0');
        return is_plain.then_some(Content::Int(if negative { -value } else { value }));
    }
    let is_octal = digits.len() > 1 && digits.bytes().all(|byte| byte.is_ascii_digit());
    if is_octal && digits.starts_with('0') || radix != 10 {
        return None;
    }
    let value: f64 = digits.parse().ok()?;
    value.is_finite().then_some(Content::Float(if negative { -value } else { value }))
}

/// Returns the message for a parser's error, with what to do about it, and the offset to point at.
fn explain(text: &str, offset: usize, error: &ErrorKind) -> Message {
    let (before, after) = text.split_at_checked(offset).unwrap_or((text, ""));
    let start = before.rfind('\n').map_or(0, |newline| newline + 1);
    let line = text[start..].lines().next().unwrap_or_default();
    let indent = line.len() - line.trim_start_matches([' ', '\t']).len();
    let tab = line[..indent].find('\t').map(|nth| start + nth);
    if let Some(tab) = tab.or(after.starts_with('\t').then_some(offset)) {
        let message = Message::new("a tab stands where YAML takes blanks only");
        return message.help("indent with blanks").offset(tab);
    }
    Message { help: help(line, after, error), ..Message::new(message(error)) }.offset(offset)
}

fn message(error: &ErrorKind) -> String {
    match error {
        ErrorKind::RecursionLimitExceeded => format!("nested deeper than {DEPTH} levels"),
        ErrorKind::UnknownAnchor => "unknown anchor".into(),
        ErrorKind::MissingAnchorOrAliasName => "an anchor or alias without a name".into(),
        ErrorKind::UnexpectedCharacter { character } if character.is_control() => {
            "control characters are not allowed".into()
        }
        ErrorKind::UnexpectedCharacter { character } => {
            format!("`{character}` cannot begin a value")
        }
        ErrorKind::UnclosedFlowCollection { open } => format!("this `{open}` is never closed"),
        ErrorKind::UnclosedQuotedScalar => "this quote is never closed".into(),
        ErrorKind::MisplacedFlowCollectionEnd => "this bracket closes nothing".into(),
        ErrorKind::MismatchedFlowCollectionEnd { open, close } => {
            format!("`{close}` cannot close what `{open}` opened")
        }
        error => error.to_string(),
    }
}

/// Returns what to do about an error in `line`, just before `after`.
fn help(line: &str, after: &str, error: &ErrorKind) -> Option<String> {
    // colons mean something to YAML where an IPv6 address begins or ends with them
    if line.contains("::") {
        return Some("put an IPv6 address that begins or ends with `:` in quotes".into());
    }
    if line.contains('*') {
        return Some(STAR.into());
    }
    let help = match (after.chars().next(), error) {
        (Some(c @ ('@' | '`' | '%' | '&' | '!' | '|' | '>')), _) => {
            return Some(format!("put text that begins with `{c}` in quotes"));
        }
        (_, ErrorKind::MappingValueNotAllowed) => {
            "give each field a line, or put them in braces: `{ address: 10.0.0.5, port: 53 }`"
        }
        (_, ErrorKind::ExpectedBlockSequenceEntry | ErrorKind::ExpectedBlockMappingKey) => {
            "check the indentation: the fields of one map begin in one column"
        }
        _ => return None,
    };
    Some(help.into())
}

/// Reads JSON by a parser of its own, which is ten times as fast. The YAML parser decides about what that one
/// refuses, and finds positions.
fn read_json(text: &str) -> Option<Node<'_>> {
    if !text.trim_start().starts_with(['{', '[']) {
        return None;
    }
    let mut json = serde_json::Deserializer::from_str(text);
    let node = Json(&mut Count::default()).deserialize(&mut json).ok()?;
    json.end().ok()?;
    Some(node)
}

/// Reads any value of JSON into a [`Node`] without a position.
struct Json<'c>(&'c mut Count);

/// The name of a field, which is copied only where it has escapes.
#[derive(Deserialize)]
struct JsonName<'t>(#[serde(borrow)] Cow<'t, str>);

impl Json<'_> {
    fn leaf<'t, E: de::Error>(self, content: Content<'t>) -> Result<Node<'t>, E> {
        let counted = match &content {
            Content::Text(text) => self.0.add(text.len()),
            _ => self.0.add(0),
        };
        counted.map_err(|message| E::custom(message.text))?;
        Ok(Node { content, at: UNKNOWN })
    }
}

impl<'de> DeserializeSeed<'de> for Json<'_> {
    type Value = Node<'de>;

    fn deserialize<D: Deserializer<'de>>(self, value: D) -> Result<Node<'de>, D::Error> {
        value.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Json<'_> {
    type Value = Node<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Node<'de>, E> {
        self.leaf(Content::Null)
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Node<'de>, E> {
        self.leaf(Content::Bool(value))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Node<'de>, E> {
        self.leaf(Content::Int(value))
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Node<'de>, E> {
        let int = i64::try_from(value).map(Content::Int);
        self.leaf(int.unwrap_or(Content::Float(value as f64)))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Node<'de>, E> {
        self.leaf(Content::Float(value))
    }

    fn visit_borrowed_str<E: de::Error>(self, text: &'de str) -> Result<Node<'de>, E> {
        self.leaf(Content::Text(Cow::Borrowed(text)))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Node<'de>, E> {
        self.leaf(Content::Text(Cow::Owned(text.into())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Node<'de>, A::Error> {
        let mut nodes = Vec::new();
        while let Some(node) = access.next_element_seed(Json(self.0))? {
            nodes.push(node);
        }
        self.leaf(Content::List(nodes))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Node<'de>, A::Error> {
        let mut entries = Vec::new();
        while let Some(JsonName(name)) = access.next_key()? {
            check_name(&name, &entries).map_err(|it| de::Error::custom(it.text))?;
            let node = access.next_value_seed(Json(self.0))?;
            entries.push(Entry { name, at: UNKNOWN, node });
        }
        self.leaf(Content::Map(entries))
    }
}
