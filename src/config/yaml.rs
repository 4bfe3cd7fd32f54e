//! YAML and JSON text.
//!
//! The parser tells a position only with an error. So values are found by a second reading, which
//! makes errors where they are.

use std::borrow::Cow;
use std::fmt;

use serde::de::{
    self, Deserialize, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor,
};
use serde_yaml::Location;

use super::diagnostic::{Complaint, Part, Place};
use super::node::{Entry, Fault, Node};
use super::path::{Path, Step};
use super::quote::shorten;

/// How many values a file may hold once its aliases are followed. The largest configuration that
/// fits into the maps has about half as many.
const VALUES: usize = 2_000_000;

/// How many fields a map may have: more than any has, and few enough to compare all with all.
pub(super) const FIELDS: usize = 64;

/// How deep `[` and `{` may nest in YAML, whose parser takes quadratic time over them.
const DEPTH: usize = 128;

pub(super) fn read(text: &str) -> Result<Node<'_>, Fault> {
    match read_json(text) {
        Some(node) => Ok(node),
        None => read_yaml(text),
    }
}

/// JSON reads ten times as fast by a parser of its own. What that does not accept, be it wrong or not
/// JSON at all, is for the YAML parser to judge.
fn read_json(text: &str) -> Option<Node<'_>> {
    if !text.trim_start().starts_with(['{', '[']) {
        return None;
    }
    let mut json = serde_json::Deserializer::from_str(text);
    let node = Reading::default().deserialize(&mut json).ok()?;
    json.end().ok()?;
    Some(node)
}

fn read_yaml(text: &str) -> Result<Node<'_>, Fault> {
    if let Some(offset) = too_deep(text) {
        return Err(Fault {
            complaint: Complaint::new(format!("nested deeper than {DEPTH} levels")),
            path: Path::default(),
            offset,
        });
    }
    let mut documents = serde_yaml::Deserializer::from_str(text);
    let Some(first) = documents.next() else {
        return Ok(Node::Null);
    };
    let mut reading = Reading::default();
    let node = match (&mut reading).deserialize(first) {
        Ok(node) => node,
        Err(error) => return Err(reading.fault(text, &error)),
    };
    match documents.next() {
        None => Ok(node),
        Some(second) => Err(another_document(text, second)),
    }
}

fn too_deep(text: &str) -> Option<usize> {
    let mut depth = 0_usize;
    text.bytes().position(|byte| {
        match byte {
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        depth > DEPTH
    })
}

/// What follows a whole document is another one, or no YAML.
fn another_document(text: &str, document: serde_yaml::Deserializer<'_>) -> Fault {
    const SEVERAL: &str = "a second YAML document begins here, and a configuration is one";
    // It is read as what it cannot be, for the position in the error.
    let error = Nothing::deserialize(document).err();
    let syntax = error.as_ref().map(message_of);
    let syntax = syntax.filter(|message| !message.contains(NOTHING));
    Fault {
        complaint: Complaint::new(syntax.unwrap_or_else(|| SEVERAL.into())),
        path: Path::default(),
        offset: error.map_or(text.len(), |error| offset_of(text, &error)),
    }
}

const NOTHING: &str = "nothing at all";

struct Nothing;

impl<'de> Deserialize<'de> for Nothing {
    fn deserialize<D: Deserializer<'de>>(document: D) -> Result<Nothing, D::Error> {
        document.deserialize_any(Nothing)
    }
}

impl Visitor<'_> for Nothing {
    type Value = Nothing;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(NOTHING)
    }
}

/// Reads any value into a [`Node`].
#[derive(Default)]
struct Reading {
    /// Values read so far; long strings count for several.
    values: usize,
    /// Why we, not the parser, refuse the file.
    refusal: Option<Complaint>,
    /// From the refused value outwards.
    steps: Vec<Step>,
}

impl Reading {
    fn refuse<E: de::Error>(&mut self, complaint: Complaint) -> E {
        self.refusal = Some(complaint);
        E::custom("refused")
    }

    /// Counts a value that takes up so many bytes.
    fn count<E: de::Error>(&mut self, bytes: usize) -> Result<(), E> {
        self.values += 1 + bytes / 32;
        if self.values > VALUES {
            let message = format!("more than {VALUES} values, counting what its aliases stand for");
            return Err(self.refuse(Complaint::new(message)));
        }
        Ok(())
    }

    fn fault(mut self, text: &str, error: &serde_yaml::Error) -> Fault {
        self.steps.reverse();
        let offset = offset_of(text, error);
        match self.refusal {
            Some(complaint) => Fault { complaint, path: Path(self.steps), offset },
            None => Fault {
                complaint: explain(text, offset, message_of(error)),
                path: Path::default(),
                offset,
            },
        }
    }
}

/// Adds what to do about a parser's error to its message.
fn explain(text: &str, offset: usize, message: String) -> Complaint {
    let before = text.get(..offset).unwrap_or(text);
    let start = before.rfind('\n').map_or(0, |newline| newline + 1);
    let line = text[start..].lines().next().unwrap_or_default();
    let blank = |c: char| c == ' ' || c == '\t';
    let indent = &line[..line.len() - line.trim_start_matches(blank).len()];
    if indent.contains('\t') || text[before.len()..].starts_with('\t') {
        let complaint = Complaint::new("a tab stands where YAML takes blanks only");
        return complaint.help("indent with blanks");
    }
    let help = match message.as_str() {
        "mapping values are not allowed in this context" => {
            Some("give each field a line, or put them in braces: `{ address: 10.0.0.5, port: 53 }`")
        }
        _ if message.starts_with("did not find expected '-' indicator")
            || message.starts_with("did not find expected key") =>
        {
            Some("check the indentation: the fields of one map begin in one column")
        }
        _ => None,
    };
    let complaint = Complaint { help: help.map(String::from), ..Complaint::new(message) };
    match text[before.len()..].trim_start_matches('*').chars().next() {
        // colons mean something to YAML where an IPv6 address begins or ends with them
        _ if line.contains("::") => {
            complaint.help("put an IPv6 address that begins or ends with `:` in quotes")
        }
        _ if line.contains('*') => complaint.help(
            "`*` refers to an anchor in YAML; to match all addresses or ports of a key, write `any`",
        ),
        Some(c @ ('@' | '`' | '%' | '&' | '!' | '|' | '>')) => {
            complaint.help(format!("put text that begins with `{c}` in quotes"))
        }
        _ => complaint,
    }
}

impl<'de> DeserializeSeed<'de> for &mut Reading {
    type Value = Node<'de>;

    fn deserialize<D: Deserializer<'de>>(self, value: D) -> Result<Node<'de>, D::Error> {
        value.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for &mut Reading {
    type Value = Node<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Node<'de>, E> {
        self.count(0)?;
        Ok(Node::Null)
    }

    fn visit_none<E: de::Error>(self) -> Result<Node<'de>, E> {
        self.visit_unit()
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Node<'de>, E> {
        self.count(0)?;
        Ok(Node::Bool(value))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Node<'de>, E> {
        self.visit_i128(value.into())
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Node<'de>, E> {
        self.visit_i128(value.into())
    }

    fn visit_i128<E: de::Error>(self, value: i128) -> Result<Node<'de>, E> {
        self.count(0)?;
        Ok(Node::Int(value))
    }

    fn visit_u128<E: de::Error>(self, value: u128) -> Result<Node<'de>, E> {
        match i128::try_from(value) {
            Ok(value) => self.visit_i128(value),
            Err(_) => self.visit_f64(value as f64),
        }
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Node<'de>, E> {
        self.count(0)?;
        Ok(Node::Float(value))
    }

    fn visit_borrowed_str<E: de::Error>(self, text: &'de str) -> Result<Node<'de>, E> {
        self.count(0)?;
        Ok(Node::Text(Cow::Borrowed(text)))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Node<'de>, E> {
        self.count(text.len())?;
        Ok(Node::Text(Cow::Owned(text.into())))
    }

    fn visit_enum<A: de::EnumAccess<'de>>(self, _: A) -> Result<Node<'de>, A::Error> {
        Err(self.refuse(Complaint::new("YAML tags have no meaning here")))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Node<'de>, A::Error> {
        self.count(0)?;
        let mut nodes = Vec::new();
        loop {
            match access.next_element_seed(&mut *self) {
                Ok(Some(node)) => nodes.push(node),
                Ok(None) => return Ok(Node::List(nodes)),
                Err(error) => {
                    self.steps.push(Step::Index(nodes.len()));
                    return Err(error);
                }
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Node<'de>, A::Error> {
        self.count(0)?;
        let mut entries: Vec<Entry<'de>> = Vec::new();
        while let Some(name) = access.next_key_seed(Name { reading: self, before: &entries })? {
            match access.next_value_seed(&mut *self) {
                Ok(node) => entries.push((name, node)),
                Err(error) => {
                    let name = name.into_owned();
                    self.steps.push(Step::Field(name.into()));
                    return Err(error);
                }
            }
        }
        Ok(Node::Map(entries))
    }
}

/// Reads the name of a field. It is refused from within, so that the error's position is its own.
struct Name<'a, 'de> {
    reading: &'a mut Reading,
    before: &'a [Entry<'de>],
}

impl<'de> Name<'_, 'de> {
    fn check<E: de::Error>(self, name: &str) -> Result<(), E> {
        self.reading.refusal = None;
        self.reading.count(name.len())?;
        let complaint = if self.before.iter().any(|(before, _)| before == name) {
            let name = shorten(name);
            Complaint::new(format!("`{name}` is given twice in one map"))
        } else if self.before.len() >= FIELDS {
            Complaint::new(format!("more than {FIELDS} fields in one map"))
        } else if name == "<<" {
            Complaint::new("merge keys (`<<`) are not supported")
                .help("options that many rules share belong in `defaults`")
        } else {
            return Ok(());
        };
        Err(self.reading.refuse(complaint))
    }
}

impl<'de> DeserializeSeed<'de> for Name<'_, 'de> {
    type Value = Cow<'de, str>;

    fn deserialize<D: Deserializer<'de>>(self, value: D) -> Result<Cow<'de, str>, D::Error> {
        // Stands if what comes is a map or a list.
        self.reading.refusal = Some(Complaint::new("the name of a field must be text"));
        value.deserialize_str(self)
    }
}

impl<'de> Visitor<'de> for Name<'_, 'de> {
    type Value = Cow<'de, str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of a field")
    }

    fn visit_borrowed_str<E: de::Error>(self, name: &'de str) -> Result<Cow<'de, str>, E> {
        self.check(name)?;
        Ok(Cow::Borrowed(name))
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<Cow<'de, str>, E> {
        self.check(name)?;
        Ok(Cow::Owned(name.into()))
    }
}

/// The byte offsets of places; where nothing is there, of the nearest ancestor.
///
/// A scalar is found where it stands, a map or list at the name of its field, or in a list at its own
/// first field.
pub(super) fn find(text: &str, places: &[&Place]) -> Vec<Option<usize>> {
    let mut search = Search { places, marks: vec![None; places.len()], raised: false };
    let all: Vec<usize> = (0..places.len()).collect();
    let root = Descend { search: &mut search, here: &all, depth: 0, in_list: true };
    if let Some(document) = serde_yaml::Deserializer::from_str(text).next()
        && let Err(error) = root.deserialize(document)
    {
        // What was found before an error counts; the text was read once, so there is none.
        let _ = search.catch(error, &all);
    }
    let lines = Lines::new(text);
    let offset = |mark: Option<Mark>| mark.map(|mark| lines.offset(mark));
    search.marks.into_iter().map(offset).collect()
}

/// One pass over the text for several places.
///
/// At each scalar and name on the way it raises an error, which the parser gives a position, and
/// catches it one level up: after a scalar the parser can go on.
struct Search<'p> {
    places: &'p [&'p Place],
    /// What was found for each place, from outside inwards.
    marks: Vec<Option<Mark>>,
    /// Whether the error under way is ours.
    raised: bool,
}

/// A line and a column as libyaml counts, from 1.
type Mark = (usize, usize);

impl Search<'_> {
    /// Those of `here` that go on with a step, given by their index.
    fn through(&self, here: &[usize], depth: usize, wanted: impl Fn(&Step) -> bool) -> Vec<usize> {
        let goes = |place: &&usize| self.places[**place].path.0.get(depth).is_some_and(&wanted);
        here.iter().filter(goes).copied().collect()
    }

    /// Whether a place means the name of the field at its end.
    fn is_name(&self, place: usize, depth: usize) -> bool {
        let place = self.places[place];
        place.part == Part::Name && place.path.0.len() == depth + 1
    }

    fn raise<E: de::Error>(&mut self) -> E {
        self.raised = true;
        E::custom("found")
    }

    /// Notes the position of an error of ours; any other goes on.
    fn catch<E: de::Error>(&mut self, error: E, places: &[usize]) -> Result<(), E> {
        if !std::mem::take(&mut self.raised) {
            return Err(error);
        }
        // Within a visitor the error's type is not known, only its text. At the very beginning of
        // the file it says no position.
        let text = error.to_string();
        let position = text.rsplit_once(" at line ");
        let position = position.and_then(|(_, rest)| rest.split_once(" column "));
        let mark =
            position.and_then(|(line, column)| Some((line.parse().ok()?, column.parse().ok()?)));
        for place in places {
            self.marks[*place] = Some(mark.unwrap_or((1, 1)));
        }
        Ok(())
    }
}

/// A value on the way to places.
struct Descend<'s, 'p> {
    search: &'s mut Search<'p>,
    /// The places that are here or further inside.
    here: &'s [usize],
    /// How many steps from the root.
    depth: usize,
    /// Whether this is an element, which has no name of its own.
    in_list: bool,
}

impl<'de> DeserializeSeed<'de> for Descend<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, value: D) -> Result<(), D::Error> {
        // The visitor takes maps and lists only, and so the parser refuses a scalar.
        self.search.raised = true;
        value.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Descend<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map or a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<(), A::Error> {
        self.search.raised = false;
        for index in 0.. {
            let is_this = |step: &Step| *step == Step::Index(index);
            let inside = self.search.through(self.here, self.depth, is_this);
            let element = if inside.is_empty() {
                let ignored = access.next_element::<IgnoredAny>();
                ignored.map(|element| element.map(|_| ()))
            } else {
                access.next_element_seed(Descend {
                    search: self.search,
                    here: &inside,
                    depth: self.depth + 1,
                    in_list: true,
                })
            };
            match element {
                Ok(Some(())) => {}
                Ok(None) => break,
                Err(error) => self.search.catch(error, &inside)?,
            }
        }
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<(), A::Error> {
        self.search.raised = false;
        let mut first = self.in_list;
        loop {
            let mut inside = Vec::new();
            let name = access.next_key_seed(FindName {
                search: self.search,
                here: self.here,
                depth: self.depth,
                first,
                inside: &mut inside,
            });
            match name {
                Ok(Some(())) => {}
                Ok(None) => return Ok(()),
                Err(error) if first => self.search.catch(error, self.here)?,
                Err(error) => self.search.catch(error, &inside)?,
            }
            first = false;
            inside.retain(|place| !self.search.is_name(*place, self.depth));
            if inside.is_empty() {
                access.next_value::<IgnoredAny>()?;
                continue;
            }
            let value = access.next_value_seed(Descend {
                search: self.search,
                here: &inside,
                depth: self.depth + 1,
                in_list: false,
            });
            value.or_else(|error| self.search.catch(error, &inside))?;
        }
    }
}

/// The name of a field on the way to places.
struct FindName<'s, 'p> {
    search: &'s mut Search<'p>,
    here: &'s [usize],
    depth: usize,
    /// Whether its position is also that of the map.
    first: bool,
    /// The places that go through the field.
    inside: &'s mut Vec<usize>,
}

impl<'de> DeserializeSeed<'de> for FindName<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, value: D) -> Result<(), D::Error> {
        value.deserialize_str(self)
    }
}

impl Visitor<'_> for FindName<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of a field")
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<(), E> {
        let is_this = |step: &Step| matches!(step, Step::Field(field) if field == name);
        *self.inside = self.search.through(self.here, self.depth, is_this);
        if self.first || !self.inside.is_empty() {
            return Err(self.search.raise());
        }
        Ok(())
    }
}

/// Where each line begins, by libyaml's count: more characters than `\n` end a line.
struct Lines<'t> {
    text: &'t str,
    starts: Vec<usize>,
}

impl<'t> Lines<'t> {
    fn new(text: &'t str) -> Lines<'t> {
        let breaks = text.match_indices(['\n', '\r', '\u{85}', '\u{2028}', '\u{2029}']);
        let ends = breaks.map(|(at, end)| (at + end.len(), end));
        let ends = ends.filter(|(next, end)| *end != "\r" || !text[*next..].starts_with('\n'));
        let starts = std::iter::once(0).chain(ends.map(|(next, _)| next));
        Lines { text, starts: starts.collect() }
    }

    fn offset(&self, (line, column): Mark) -> usize {
        let start = self.starts.get(line.saturating_sub(1));
        let start = start.copied().unwrap_or(self.text.len());
        let mut characters = self.text[start..].char_indices();
        let character = characters.nth(column.saturating_sub(1));
        character.map_or(self.text.len(), |(offset, _)| start + offset)
    }
}

/// libyaml counts characters. Bytes that it cannot read at all it reports by their offset, and in the
/// message only.
fn offset_of(text: &str, error: &serde_yaml::Error) -> usize {
    let message = error.to_string();
    let unreadable = message.split_once(" at position ").map(|(_, rest)| rest);
    if let Some(offset) = unreadable.and_then(|rest| rest.parse().ok()) {
        return offset;
    }
    let index = error.location().map_or(0, |location| location.index());
    let character = text.char_indices().nth(index);
    character.map_or(text.len(), |(offset, _)| offset)
}

/// The parser's message without the position, which is shown in our own way.
fn message_of(error: &serde_yaml::Error) -> String {
    let message = error.to_string();
    let position = |at: Location| format!(" at line {} column {}", at.line(), at.column());
    let message = match error.location() {
        Some(at) => message.replacen(&position(at), "", 1),
        None => message,
    };
    match message.split_once(" at position ") {
        Some((message, _)) => message.into(),
        None => message,
    }
}
