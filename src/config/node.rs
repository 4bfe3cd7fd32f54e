//! The tree of values that YAML, JSON and TOML are read into.

use std::borrow::Cow;

use super::diagnostic::Complaint;
use super::path::Path;
use super::quote::shorten;

/// A value of the file, of whatever format.
#[derive(Debug)]
pub(super) enum Node<'t> {
    Null,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(Cow<'t, str>),
    /// TOML has dates; no field of ours has.
    Date,
    List(Vec<Node<'t>>),
    Map(Vec<Entry<'t>>),
}

/// A field of a map: its name and its value.
pub(super) type Entry<'t> = (Cow<'t, str>, Node<'t>);

impl Node<'_> {
    /// What stands there, for a message: "the number 5".
    pub fn describe(&self) -> String {
        match self {
            Node::Null => "nothing".into(),
            Node::Bool(value) => format!("the boolean {value}"),
            Node::Int(value) => format!("the number {value}"),
            Node::Float(value) => format!("the number {value:?}"),
            Node::Text(text) => format!("the text `{}`", shorten(text)),
            Node::Date => "a date".into(),
            Node::List(_) => "a list".into(),
            Node::Map(_) => "a map".into(),
        }
    }
}

/// Why a text cannot be read.
pub(super) struct Fault {
    pub complaint: Complaint,
    pub path: Path,
    /// Byte offset into the text.
    pub offset: usize,
}
