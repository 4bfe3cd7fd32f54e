//! YAML and JSON text.
//!
//! The parser tells a position only with an error. So a value is found by a second reading, which
//! fails where the value is.

use std::borrow::Cow;

use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_yaml::Location;

use super::diagnostic::{Complaint, Part, Place, shorten};
use super::document::{Entry, Fault, Node};
use super::path::{Path, Step};

/// How many values a file may hold once its aliases are followed. The largest configuration that
/// fits into the maps has about half as many.
const VALUES: usize = 2_000_000;

/// How many fields a map may have: more than any has, and few enough to compare all with all.
const FIELDS: usize = 64;

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
    let find = Find { steps: &[], part: Part::Value };
    match find.deserialize(document) {
        Err(error) => Fault {
            complaint: Complaint::new(if error.to_string().contains(FOUND) {
                SEVERAL_DOCUMENTS.into()
            } else {
                message_of(&error)
            }),
            path: Path::default(),
            offset: offset_of(text, &error),
        },
        Ok(()) => Fault {
            complaint: Complaint::new(SEVERAL_DOCUMENTS),
            path: Path::default(),
            offset: text.len(),
        },
    }
}

const SEVERAL_DOCUMENTS: &str = "a second YAML document begins here, and a configuration is one";

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
                complaint: Complaint::new(message_of(error)),
                path: Path::default(),
                offset,
            },
        }
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

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
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
        // Stands if the visitor is asked for anything but a string.
        self.reading.refusal = Some(Complaint::new("the name of a field must be text"));
        value.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Name<'_, 'de> {
    type Value = Cow<'de, str>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
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

const FOUND: &str = "found it";

/// Walks to a place and fails there.
struct Find<'a> {
    steps: &'a [Step],
    part: Part,
}

fn found<E: de::Error>() -> Result<(), E> {
    Err(E::custom(FOUND))
}

impl<'de> DeserializeSeed<'de> for Find<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, value: D) -> Result<(), D::Error> {
        value.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Find<'_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(FOUND)
    }

    fn visit_none<E: de::Error>(self) -> Result<(), E> {
        found()
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<(), A::Error> {
        if let Some((Step::Index(index), steps)) = self.steps.split_first() {
            for _ in 0..*index {
                if access.next_element::<IgnoredAny>()?.is_none() {
                    return found();
                }
            }
            let part = self.part;
            access.next_element_seed(Find { steps, part })?;
        }
        found()
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<(), A::Error> {
        let Some((Step::Field(wanted), steps)) = self.steps.split_first() else {
            return found();
        };
        let part = self.part;
        let seed = FindName { wanted, here: steps.is_empty() && part == Part::Name };
        while let Some(same) = access.next_key_seed(seed)? {
            if same {
                return access.next_value_seed(Find { steps, part });
            }
            access.next_value::<IgnoredAny>()?;
        }
        found()
    }
}

/// Compares the name of a field; fails there if it is what was looked for.
#[derive(Clone, Copy)]
struct FindName<'a> {
    wanted: &'a str,
    here: bool,
}

impl<'de> DeserializeSeed<'de> for FindName<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, value: D) -> Result<bool, D::Error> {
        value.deserialize_any(self)
    }
}

impl Visitor<'_> for FindName<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the name of a field")
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<bool, E> {
        if name == self.wanted && self.here {
            return Err(E::custom(FOUND));
        }
        Ok(name == self.wanted)
    }
}

/// The byte offset of a place. Any value but a map or list on the way fails too, there: the nearest
/// ancestor that exists.
pub(super) fn find(text: &str, place: &Place) -> Option<usize> {
    let document = serde_yaml::Deserializer::from_str(text).next()?;
    let find = Find { steps: &place.path.0, part: place.part };
    let error = find.deserialize(document).err()?;
    Some(offset_of(text, &error))
}

/// libyaml counts characters, and does not count a byte order mark. Bytes that it cannot read at all
/// it reports by their offset, in the message only.
fn offset_of(text: &str, error: &serde_yaml::Error) -> usize {
    let message = error.to_string();
    let unreadable = message.split_once(" at position ").map(|(_, rest)| rest);
    if let Some(offset) = unreadable.and_then(|rest| rest.parse().ok()) {
        return offset;
    }
    let mark = text.len() - text.trim_start_matches('\u{feff}').len();
    let index = error.location().map_or(0, |location| location.index());
    let mut characters = text[mark..].char_indices();
    characters.nth(index).map_or(text.len(), |(offset, _)| mark + offset)
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
