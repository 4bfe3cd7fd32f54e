//! Problems and notes, as reported by `status` and `doctor`.

use std::fmt;

use schemars::JsonSchema;
use serde::Serialize;

use crate::time;

/// A problem or a note, with its cause and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Problem {
    /// Stable name of its kind, for programs: `interface-down`.
    pub id: &'static str,
    pub level: Level,
    /// An interface, a rule, `RULE/UPSTREAM` or a file; empty: the whole host.
    #[serde(rename = "where")]
    pub place: String,
    pub what: String,
    pub why: String,
    /// Seconds since 1970; `None`: unknown.
    #[serde(serialize_with = "time::rfc3339", skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub since: Option<u64>,
    /// A command, or an instruction where none is enough.
    pub fix: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Packets are lost or go elsewhere.
    Problem,
    /// Packets may be lost under conditions that cannot be checked here.
    Note,
}

/// Returns a problem without its cause and fix; `place` is empty for the whole host.
pub fn problem(id: &'static str, place: impl Into<String>, what: impl Into<String>) -> Problem {
    let (place, what, level) = (place.into(), what.into(), Level::Problem);
    Problem { id, level, place, what, why: String::new(), since: None, fix: String::new() }
}

/// Returns a note, like [`problem`].
pub fn note(id: &'static str, place: impl Into<String>, what: impl Into<String>) -> Problem {
    Problem { level: Level::Note, ..problem(id, place, what) }
}

impl Problem {
    pub fn why(self, why: impl Into<String>) -> Problem {
        Problem { why: why.into(), ..self }
    }

    pub fn since(self, since: Option<u64>) -> Problem {
        Problem { since, ..self }
    }

    pub fn fix(self, fix: impl Into<String>) -> Problem {
        Problem { fix: fix.into(), ..self }
    }

    /// Returns place, what and since when, without cause and fix.
    pub fn title(&self) -> String {
        let since = self.since.map(|since| format!(" since {}", time::utc(since)));
        let place = if self.place.is_empty() { "" } else { ": " };
        format!("{}{place}{}{}", self.place, self.what, since.unwrap_or_default())
    }
}

/// `problem` or `note`.
impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Level::Problem { "problem" } else { "note" })
    }
}

/// One line without the fix.
impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.title())?;
        match self.why.is_empty() {
            true => Ok(()),
            false => write!(f, ": {}", self.why),
        }
    }
}

/// Returns true if any is a problem, not a note.
pub fn any(problems: &[Problem]) -> bool {
    problems.iter().any(|problem| problem.level == Level::Problem)
}
