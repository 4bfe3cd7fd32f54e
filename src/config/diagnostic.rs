//! What is wrong with a file, and how it is shown.

use std::fmt;

use schemars::JsonSchema;
use serde::Serialize;

use super::path::Path;
use super::quote::printable;

/// How many errors one run shows; the rest is only counted.
const SHOWN: usize = 20;

/// The longest piece of a source line that is shown, in characters.
const WIDTH: usize = 120;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The file cannot be applied.
    Error,
    /// The file can be applied; something in it is probably not meant.
    Warning,
}

/// One finding about a file, with the place in it.
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
    /// What is there, like "first defined here".
    pub label: String,
    #[serde(skip)]
    pub(super) excerpt: Excerpt,
}

fn is_zero(number: &usize) -> bool {
    *number == 0
}

impl Diagnostic {
    /// An error that is not about the file.
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

/// A message and what to do about it, before it has a place.
#[derive(Clone, Debug)]
pub(super) struct Complaint {
    pub message: String,
    pub help: Option<String>,
}

impl Complaint {
    pub fn new(message: impl Into<String>) -> Complaint {
        Complaint { message: message.into(), help: None }
    }

    pub fn help(self, help: impl Into<String>) -> Complaint {
        Complaint { help: Some(help.into()), ..self }
    }
}

/// Which text of a field a position means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Name,
    Value,
}

#[derive(Debug)]
pub(super) struct Place {
    pub path: Path,
    pub part: Part,
}

impl From<Path> for Place {
    fn from(path: Path) -> Place {
        Place { path, part: Part::Value }
    }
}

/// A finding whose line and column are not known yet: looking them up costs a pass over the file.
#[derive(Debug)]
pub(super) struct Problem {
    pub at: Place,
    pub complaint: Complaint,
    /// A second place, and what to say about it.
    pub related: Option<(Place, &'static str)>,
}

/// The problems of one file, as many as will be shown.
#[derive(Debug, Default)]
pub(super) struct Problems {
    first: Vec<Problem>,
    count: usize,
}

impl Problems {
    pub fn push(&mut self, at: impl Into<Place>, complaint: Complaint) {
        self.add(at.into(), complaint, None);
    }

    pub fn push_pair(
        &mut self,
        at: impl Into<Place>,
        complaint: Complaint,
        first: impl Into<Place>,
        label: &'static str,
    ) {
        self.add(at.into(), complaint, Some((first.into(), label)));
    }

    fn add(&mut self, at: Place, complaint: Complaint, related: Option<(Place, &'static str)>) {
        self.count += 1;
        if self.count <= SHOWN + 1 {
            self.first.push(Problem { at, complaint, related });
        }
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// In the order of the file, with a last one that counts what is left out.
    pub fn diagnose(&self, locate: impl Fn(&[Problem]) -> Vec<Diagnostic>) -> Vec<Diagnostic> {
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
