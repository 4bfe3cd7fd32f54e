//! The tree of values that YAML, JSON and TOML are read into.

use std::borrow::Cow;

use super::diagnostic::{Part, Place};
use super::path::Step;
use super::quote::shorten;

/// Offset of values that the parser of JSON reads.
pub(super) const UNKNOWN: usize = usize::MAX;

/// A value of the file, in any format.
#[derive(Clone, Debug)]
pub(super) struct Node<'t> {
    pub content: Content<'t>,
    /// Byte offset to point at in messages, or [`UNKNOWN`].
    pub at: usize,
}

#[derive(Clone, Debug)]
pub(super) enum Content<'t> {
    Null,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(Cow<'t, str>),
    /// TOML has dates; no field takes one.
    Date,
    List(Vec<Node<'t>>),
    Map(Vec<Entry<'t>>),
}

/// A field of a map.
#[derive(Clone, Debug)]
pub(super) struct Entry<'t> {
    pub name: Cow<'t, str>,
    /// Byte offset of the name.
    pub at: usize,
    pub node: Node<'t>,
}

impl Node<'_> {
    /// Describes the value for a message: "the number 5".
    pub fn describe(&self) -> String {
        match &self.content {
            Content::Null => "nothing".into(),
            Content::Bool(value) => format!("the boolean {value}"),
            Content::Int(value) => format!("the number {value}"),
            Content::Float(value) => format!("the number {value:?}"),
            Content::Text(text) => format!("the text `{}`", shorten(text)),
            Content::Date => "a date".into(),
            Content::List(_) => "a list".into(),
            Content::Map(_) => "a map".into(),
        }
    }

    /// Returns the byte offset of a place; where nothing is there, that of the nearest ancestor.
    pub fn find(&self, place: &Place) -> usize {
        let mut here = self;
        for (nth, step) in place.path.0.iter().enumerate() {
            let is_last = nth + 1 == place.path.0.len();
            here = match (&here.content, step) {
                (Content::List(nodes), Step::Index(index)) => match nodes.get(*index) {
                    Some(node) => node,
                    None => return here.at,
                },
                (Content::Map(entries), Step::Field(field)) => {
                    match entries.iter().find(|entry| entry.name == *field) {
                        Some(entry) if is_last && place.part == Part::Name => return entry.at,
                        Some(entry) => &entry.node,
                        None => return here.at,
                    }
                }
                _ => return here.at,
            };
        }
        here.at
    }
}
