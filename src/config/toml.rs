//! TOML text. The parser's own tree has a span for every value.

use ::toml::Spanned;
use ::toml::de::{DeArray, DeTable, DeValue};

use super::diagnostic::{Complaint, Part, Place};
use super::node::{Fault, Node};
use super::path::{Path, Step};

pub(super) fn read(text: &str) -> Result<Node<'_>, Fault> {
    match DeTable::parse(text) {
        Ok(table) => Ok(map(table.into_inner())),
        Err(error) => Err(Fault {
            complaint: Complaint::new(error.message()),
            path: Path::default(),
            offset: error.span().map_or(0, |span| span.start),
        }),
    }
}

/// Recursion is bounded: the parser refuses what is nested deeper than 80 levels.
fn node(value: DeValue<'_>) -> Node<'_> {
    match value {
        DeValue::String(text) => Node::Text(text),
        DeValue::Integer(number) => i128::from_str_radix(number.as_str(), number.radix())
            .map_or(Node::Float(f64::INFINITY), Node::Int),
        DeValue::Float(number) => Node::Float(number.as_str().parse().unwrap_or(f64::NAN)),
        DeValue::Boolean(value) => Node::Bool(value),
        DeValue::Datetime(_) => Node::Date,
        DeValue::Array(values) => {
            let values = values.into_iter().map(|value| node(value.into_inner()));
            Node::List(values.collect())
        }
        DeValue::Table(table) => map(table),
    }
}

fn map(table: DeTable<'_>) -> Node<'_> {
    let entries =
        table.into_iter().map(|(name, value)| (name.into_inner(), node(value.into_inner())));
    Node::Map(entries.collect())
}

/// The byte offsets of places; where nothing is there, of the nearest ancestor.
pub(super) fn find(text: &str, places: &[&Place]) -> Vec<Option<usize>> {
    match DeTable::parse(text) {
        Ok(root) => {
            let found = places.iter().map(|place| find_one(&root, place));
            found.map(Some).collect()
        }
        Err(_) => vec![None; places.len()],
    }
}

fn find_one(root: &Spanned<DeTable<'_>>, place: &Place) -> usize {
    let (name, steps) = match place.path.0.split_last() {
        Some((name, steps)) if place.part == Part::Name => (Some(name), steps),
        _ => (None, &place.path.0[..]),
    };
    let mut offset = root.span().start;
    let mut here = Inside::Map(root.get_ref());
    for step in steps {
        let Some((at, inside)) = here.enter(step) else {
            return offset;
        };
        (offset, here) = (at, inside);
    }
    name.and_then(|name| here.name(name)).unwrap_or(offset)
}

/// The value that a search has come to.
enum Inside<'a> {
    Map(&'a DeTable<'a>),
    List(&'a DeArray<'a>),
    Scalar,
}

impl<'a> Inside<'a> {
    fn enter(&self, step: &Step) -> Option<(usize, Inside<'a>)> {
        let value = match (self, step) {
            (Inside::Map(table), Step::Field(name)) => table.get(name.as_ref()),
            (Inside::List(array), Step::Index(index)) => array.get(*index),
            _ => None,
        }?;
        let inside = match value.get_ref() {
            DeValue::Table(table) => Inside::Map(table),
            DeValue::Array(array) => Inside::List(array),
            _ => Inside::Scalar,
        };
        Some((value.span().start, inside))
    }

    /// The byte offset of a field's name.
    fn name(&self, step: &Step) -> Option<usize> {
        match (self, step) {
            (Inside::Map(table), Step::Field(name)) => {
                let (name, _) = table.get_key_value(name.as_ref())?;
                Some(name.span().start)
            }
            _ => None,
        }
    }
}
