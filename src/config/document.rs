//! The text of a configuration file: read into a tree, and searched for the position of a value.
//!
//! Positions are looked up in the text again when there is something to report, so that a good file
//! is not kept as a tree.

use super::diagnostic::{Diagnostic, Excerpt, Message, Place, Related, Severity};
use super::node::{Node, UNKNOWN};
use super::{hint, toml, yaml};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    /// YAML, and JSON, which is YAML too.
    Yaml,
    Toml,
}

/// A file's name and text.
#[derive(Clone, Debug)]
pub(super) struct Document {
    name: String,
    text: String,
    format: Format,
}

impl Document {
    pub fn new(name: &str, text: &str) -> Document {
        let extension = std::path::Path::new(name).extension();
        let toml = extension.is_some_and(|extension| extension.eq_ignore_ascii_case("toml"));
        Document {
            name: name.into(),
            // A byte order mark has no column.
            text: text.trim_start_matches('\u{feff}').into(),
            format: if toml { Format::Toml } else { Format::Yaml },
        }
    }

    pub fn read(&self) -> Result<Node<'_>, Vec<Diagnostic>> {
        let node = match self.format {
            Format::Toml => toml::read(&self.text),
            Format::Yaml => yaml::read(&self.text),
        };
        node.map_err(|error| self.diagnose(Severity::Error, &[error], None))
    }

    /// Finds the lines and columns of all messages, in `node` or by reading the text again.
    pub fn diagnose(
        &self,
        severity: Severity,
        messages: &[Message],
        node: Option<&Node<'_>>,
    ) -> Vec<Diagnostic> {
        let is_located = node.is_some_and(|node| node.at != UNKNOWN);
        let again = match self.format {
            _ if is_located || messages.iter().all(|it| it.offset.is_some()) => None,
            Format::Toml => toml::read(&self.text).ok(),
            Format::Yaml => yaml::read_yaml(&self.text).ok(),
        };
        let node = again.as_ref().or(node);
        messages.iter().map(|message| self.diagnostic(severity, message, node)).collect()
    }

    fn diagnostic(
        &self,
        severity: Severity,
        message: &Message,
        node: Option<&Node<'_>>,
    ) -> Diagnostic {
        let position = match (message.offset, &message.place) {
            (None, Some(place)) => self.position(place, node),
            (offset, _) => Position::new(&self.text, offset.unwrap_or(0)),
        };
        let related = message.related.as_deref().map(|(place, label)| {
            let position = self.position(place, node);
            Related {
                line: position.line,
                column: position.column,
                field: place.path.to_string(),
                label: (*label).into(),
                excerpt: position.excerpt(&self.text),
            }
        });
        let advice = match severity {
            Severity::Error => hint::advice(position.line_of(&self.text)),
            Severity::Warning => None,
        };
        let field = message.place.as_ref().map(|place| place.path.to_string());
        Diagnostic {
            severity,
            file: self.name.clone(),
            line: position.line,
            column: position.column,
            field: field.unwrap_or_default(),
            message: message.text.clone(),
            help: advice.or_else(|| message.help.clone()),
            related,
            excerpt: position.excerpt(&self.text),
        }
    }

    fn position(&self, place: &Place, node: Option<&Node<'_>>) -> Position {
        let offset = node.map(|node| node.find(place)).filter(|offset| *offset != UNKNOWN);
        Position::new(&self.text, offset.unwrap_or(0))
    }
}

/// Line and column, both counted from 1, the column in characters.
struct Position {
    line: usize,
    column: usize,
    /// Byte offset of the line's first character.
    start: usize,
}

impl Position {
    /// Returns the position of a byte offset; one behind the last word of the text means that word's end.
    fn new(text: &str, offset: usize) -> Position {
        let end = offset.min(text.trim_end().len());
        let offset = (0..=end).rev().find(|&at| text.is_char_boundary(at));
        let before = &text[..offset.unwrap_or(0)];
        let start = before.rfind('\n').map_or(0, |newline| newline + 1);
        Position {
            line: before.matches('\n').count() + 1,
            column: before[start..].chars().count() + 1,
            start,
        }
    }

    fn line_of<'t>(&self, text: &'t str) -> &'t str {
        text[self.start..].lines().next().unwrap_or("")
    }

    fn excerpt(&self, text: &str) -> Excerpt {
        Excerpt::new(self.line_of(text), self.column)
    }
}
