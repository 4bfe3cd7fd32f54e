//! TOML text.

use ::toml::Spanned;
use ::toml::de::{DeTable, DeValue};

use super::diagnostic::Message;
use super::node::{Content, Entry, Node};

pub(super) fn read(text: &str) -> Result<Node<'_>, Message> {
    match DeTable::parse(text) {
        Ok(table) => Ok(Node { at: table.span().start, content: map(table.into_inner()) }),
        Err(error) => {
            let offset = error.span().map_or(0, |span| span.start);
            Err(Message::new(error.message()).offset(offset))
        }
    }
}

/// Recursion is bounded: the parser refuses what is nested deeper than 80 levels.
fn node(value: Spanned<DeValue<'_>>) -> Node<'_> {
    let at = value.span().start;
    let content = match value.into_inner() {
        DeValue::String(text) => Content::Text(text),
        DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix())
            .map_or(Content::Float(f64::INFINITY), Content::Int),
        DeValue::Float(number) => Content::Float(number.as_str().parse().unwrap_or(f64::NAN)),
        DeValue::Boolean(value) => Content::Bool(value),
        DeValue::Datetime(_) => Content::Date,
        DeValue::Array(values) => Content::List(values.into_iter().map(node).collect()),
        DeValue::Table(table) => map(table),
    };
    Node { content, at }
}

fn map(table: DeTable<'_>) -> Content<'_> {
    let entry = |(name, value): (Spanned<_>, _)| Entry {
        at: name.span().start,
        name: name.into_inner(),
        node: node(value),
    };
    Content::Map(table.into_iter().map(entry).collect())
}
