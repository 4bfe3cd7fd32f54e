//! Diagnostics about a file, and their text.

use std::fmt;

use schemars::JsonSchema;
use serde::Serialize;

use super::path::{Path, Step};
use super::quote::printable;

/// Maximum number of diagnostics that one run shows; the rest is only counted.
const SHOWN: usize = 20;

/// The longest piece of a source line that is shown, in characters.
const WIDTH: usize = 120;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The file cannot be applied.
    Error,
    /// The file can be applied; something in it is probably not intended.
    Warning,
}

/// An error or a warning about a file, with the place in it.
///
/// `Display` shows it as text over several lines, without colour and without a final newline.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Diagnostic {
    pub severity: Severity,
    /// The file's name as it was given.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub file: String,
    /// Counted from 1; 0: it is not about the file.
    #[serde(skip_serializing_if = "is_zero")]
    pub line: usize,
    /// Counted from 1, in characters.
    #[serde(skip_serializing_if = "is_zero")]
    pub column: usize,
    /// The place in the configuration, like `rules[2].key.port`; empty where it is the file's syntax.
    pub field: String,
    pub message: String,
    pub help: Option<String>,
    /// The other place, where two contradict each other.
    pub related: Option<Related>,
    #[serde(skip)]
    pub(super) excerpt: Excerpt,
}

/// A second place that a [`Diagnostic`] is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Related {
    /// Counted from 1.
    pub line: usize,
    /// Counted from 1, in characters.
    pub column: usize,
    pub field: String,
    /// Label of the place, like "first defined here".
    pub label: String,
    #[serde(skip)]
    pub(super) excerpt: Excerpt,
}

fn is_zero(number: &usize) -> bool {
    *number == 0
}

impl Diagnostic {
    /// Returns an error that is not about the file.
    pub fn without_place(message: String) -> Diagnostic {
        Diagnostic {
            severity: Severity::Error,
            file: String::new(),
            line: 0,
            column: 0,
            field: String::new(),
            message,
            help: None,
            related: None,
            excerpt: Excerpt::default(),
        }
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Severity::Error => "error",
            Severity::Warning => "warning",
        })
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.severity)?;
        if self.line > 0 {
            write!(f, "{}:{}:{}: ", self.file, self.line, self.column)?;
        }
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.message)?;
        let last = self.related.as_ref().map_or(0, |related| related.line);
        let gutter = self.line.max(last).to_string().len();
        self.excerpt.show(f, gutter, self.line, "")?;
        if let Some(related) = &self.related {
            let label = &related.label;
            related.excerpt.show(f, gutter, related.line, label)?;
        }
        match &self.help {
            Some(help) => write!(f, "\n{:gutter$} = help: {help}", ""),
            None => Ok(()),
        }
    }
}

/// A line of the file and the character to point at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Excerpt {
    line: String,
    /// Characters before the caret.
    caret: usize,
}

impl Excerpt {
    /// `column` counts characters from 1. Of a long line only the part around it is kept.
    pub fn new(line: &str, column: usize) -> Excerpt {
        let caret = column.saturating_sub(1);
        let length = line.chars().count();
        if length <= WIDTH {
            let line = line.chars().map(printable).collect();
            return Excerpt { line, caret };
        }
        let start = caret.saturating_sub(WIDTH / 2).min(length.saturating_sub(WIDTH));
        let middle = line.chars().skip(start).take(WIDTH).map(printable);
        let (before, after) = (start > 0, start + WIDTH < length);
        Excerpt {
            line: ellipsis(before).chain(middle).chain(ellipsis(after)).collect(),
            caret: caret - start + usize::from(before),
        }
    }

    fn show(
        &self,
        f: &mut fmt::Formatter<'_>,
        gutter: usize,
        number: usize,
        label: &str,
    ) -> fmt::Result {
        if self.line.is_empty() {
            return Ok(());
        }
        // Tabs are repeated under the line, so that the caret stands right whatever their width.
        let indent = self.line.chars().chain(std::iter::repeat(' ')).take(self.caret);
        let indent: String = indent.map(|c| if c == '\t' { c } else { ' ' }).collect();
        let line = self.line.trim_end();
        write!(f, "\n{:gutter$} |\n{number:gutter$} | {line}\n{:gutter$} | {indent}^", "", "")?;
        if !label.is_empty() {
            write!(f, " {label}")?;
        }
        Ok(())
    }
}

fn ellipsis(wanted: bool) -> impl Iterator<Item = char> {
    wanted.then_some('…').into_iter()
}

/// The text of a field that a position refers to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Part {
    Name,
    #[default]
    Value,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    pub(super) path: Path,
    pub(super) part: Part,
}

impl From<Path> for Place {
    fn from(path: Path) -> Place {
        Place { path, part: Part::Value }
    }
}

/// A [`Diagnostic`] before its line and column are known: looking them up costs a pass over the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub(super) text: String,
    pub(super) help: Option<String>,
    /// `None` for an error of syntax, which is in no value.
    pub(super) place: Option<Place>,
    /// Byte offset into the text, where it is known.
    pub(super) offset: Option<usize>,
    /// A second place and its label.
    pub(super) related: Option<Box<(Place, &'static str)>>,
}

impl Message {
    /// Returns a message without a place.
    pub fn new(text: impl Into<String>) -> Message {
        Message { text: text.into(), help: None, place: None, offset: None, related: None }
    }

    /// Returns a message about the value at a path.
    pub fn about(path: &Path, text: impl Into<String>) -> Message {
        Message::new(text).at(path.clone())
    }

    pub fn help(self, help: impl Into<String>) -> Message {
        Message { help: Some(help.into()), ..self }
    }

    pub fn at(self, place: impl Into<Place>) -> Message {
        Message { place: Some(place.into()), ..self }
    }

    /// Sets the byte offset, where a value that cannot be read begins.
    pub(super) fn offset(self, offset: usize) -> Message {
        Message { offset: Some(offset), ..self }
    }

    /// Adds a second place, with a label.
    pub(super) fn related(self, place: impl Into<Place>, label: &'static str) -> Message {
        Message { related: Some(Box::new((place.into(), label))), ..self }
    }

    /// Returns the message of a value with its place seen from the value around it.
    pub(super) fn inside(mut self, step: Step) -> Message {
        if let Some(place) = &mut self.place {
            place.path.0.insert(0, step);
        }
        self
    }

    /// Returns the message without its place.
    pub fn into_text(self) -> String {
        self.text
    }
}

/// The diagnostics of one file, as many as will be shown.
#[derive(Debug, Default)]
pub(super) struct Diagnostics {
    first: Vec<Message>,
    count: usize,
}

impl Diagnostics {
    pub fn push(&mut self, message: Message) {
        self.count += 1;
        if self.count <= SHOWN + 1 {
            self.first.push(message);
        }
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Returns the diagnostics in the order of the file, with a last one that counts the rest.
    pub fn diagnose(&self, locate: impl Fn(&[Message]) -> Vec<Diagnostic>) -> Vec<Diagnostic> {
        let mut shown = locate(&self.first);
        let more = self.count.saturating_sub(SHOWN);
        let rest = if more > 1 { shown.pop() } else { None };
        shown.sort_by_key(|diagnostic| (diagnostic.line, diagnostic.column));
        shown.extend(rest.map(|first| Diagnostic {
            message: format!("and {more} more {}s", first.severity),
            help: None,
            related: None,
            excerpt: Excerpt::default(),
            ..first
        }));
        shown
    }
}
