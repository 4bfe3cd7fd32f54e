//! The text of a configuration file: read into a tree, and searched for the position of a value.
//!
//! Positions are looked up in the text again when there is something to report, so that a good file
//! is not kept as a tree.

use super::diagnostic::{Diagnostic, Excerpt, Message, Place, Related, Severity, Unlocated};
use super::node::{Node, UNKNOWN};
use super::path::Path;
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
        node.map_err(|error| {
            let position = Position::new(&self.text, error.offset);
            let path = error.path.unwrap_or_default();
            vec![self.diagnostic(Severity::Error, position, &path, error.message)]
        })
    }

    /// Finds the lines and columns of all diagnostics, in `node` or by reading the text again.
    pub fn diagnose(
        &self,
        severity: Severity,
        diagnostics: &[Unlocated],
        node: Option<&Node<'_>>,
    ) -> Vec<Diagnostic> {
        let places = diagnostics.iter().map(|diagnostic| &diagnostic.at);
        let related = diagnostics.iter().filter_map(|diagnostic| diagnostic.related.as_ref());
        let places: Vec<&Place> = places.chain(related.map(|(place, _)| place)).collect();
        let mut positions = self.positions(&places, node);
        let mut related = positions.split_off(diagnostics.len()).into_iter();
        let diagnose = |(diagnostic, position): (&Unlocated, Position)| {
            let second = diagnostic.related.as_ref();
            let second = second.and_then(|second| Some(self.related(second, related.next()?)));
            let message = diagnostic.message.clone();
            Diagnostic {
                related: second,
                ..self.diagnostic(severity, position, &diagnostic.at.path, message)
            }
        };
        diagnostics.iter().zip(positions).map(diagnose).collect()
    }

    fn related(&self, (place, label): &(Place, &'static str), position: Position) -> Related {
        Related {
            line: position.line,
            column: position.column,
            field: place.path.to_string(),
            label: (*label).into(),
            excerpt: position.excerpt(&self.text),
        }
    }

    fn diagnostic(
        &self,
        severity: Severity,
        position: Position,
        path: &Path,
        message: Message,
    ) -> Diagnostic {
        let advice = match severity {
            Severity::Error => hint::advice(position.line_of(&self.text)),
            Severity::Warning => None,
        };
        Diagnostic {
            severity,
            file: self.name.clone(),
            line: position.line,
            column: position.column,
            field: path.to_string(),
            message: message.text,
            help: advice.or(message.help),
            related: None,
            excerpt: position.excerpt(&self.text),
        }
    }

    fn positions(&self, places: &[&Place], node: Option<&Node<'_>>) -> Vec<Position> {
        let again = match (node, self.format) {
            (Some(node), _) if node.at != UNKNOWN => None,
            (_, Format::Toml) => toml::read(&self.text).ok(),
            (_, Format::Yaml) => yaml::read_yaml(&self.text).ok(),
        };
        let node = again.as_ref().or(node);
        let offset = |place: &&Place| match node.map_or(0, |node| node.find(place)) {
            UNKNOWN => 0,
            offset => offset,
        };
        places.iter().map(|place| Position::new(&self.text, offset(place))).collect()
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
