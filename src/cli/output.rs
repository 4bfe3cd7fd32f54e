//! Prints text or JSON (`-o json`), with the colour and width of the terminal.
//!
//! A rule is `rule`, an upstream `upstream`, an interface `interface`, a rule's key `key`, as in the
//! configuration; shares are 0 to 1, times are RFC 3339, and a length of time has its unit in the name.

use std::io::{self, IsTerminal, Write};

use anyhow::{Context, anyhow};
use schemars::JsonSchema;
use serde::Serialize;

use crate::cli::{Color, Global, Output, terminal};
use crate::config::Diagnostic;
use crate::error::{Failure, Result, say};

/// Version of all JSON outputs; it changes with incompatible changes.
pub const FORMAT_VERSION: u32 = 1;

/// An output with the version of its format.
#[derive(Serialize, JsonSchema)]
pub struct Document<T> {
    /// Version of the format: 1.
    format_version: u32,
    #[serde(flatten)]
    content: T,
}

impl<T> Document<T> {
    pub fn new(content: T) -> Document<T> {
        Document { format_version: FORMAT_VERSION, content }
    }
}

/// Output of a command that failed.
#[derive(Serialize, JsonSchema)]
pub struct Failed {
    pub error: ErrorReport,
}

/// An error. Its text is on standard error too.
#[derive(Clone, Serialize, JsonSchema)]
pub struct ErrorReport {
    /// Stable name of the kind: `failed`, `nothing-applied`, `usage`, `configuration`, `unreadable`,
    /// `temporary` or `privileges`.
    pub kind: &'static str,
    pub exit_code: u8,
    pub message: String,
    /// Errors of the configuration.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub diagnostics: Vec<Diagnostic>,
}

impl ErrorReport {
    pub fn new(failure: &Failure) -> ErrorReport {
        let message = failure.to_string();
        ErrorReport {
            kind: failure.kind(),
            exit_code: failure.exit_code(),
            message: message.strip_prefix("error: ").unwrap_or(&message).into(),
            diagnostics: match failure {
                Failure::Config(diagnostics) | Failure::Unresolved(diagnostics) => {
                    diagnostics.clone()
                }
                _ => Vec::new(),
            },
        }
    }

    /// Builds the report of a usage error from clap's message.
    pub fn usage(message: &str) -> ErrorReport {
        let message = message.strip_prefix("error: ").unwrap_or(message).trim_end();
        let diagnostics = Vec::new();
        ErrorReport { kind: "usage", exit_code: 64, message: message.into(), diagnostics }
    }

    /// Returns the error as a line of JSON.
    pub fn line(self) -> String {
        let document = Document::new(Failed { error: self });
        serde_json::to_string(&document).unwrap_or_default() + "\n"
    }
}

/// Writes to standard output. A closed pipe is not an error.
pub fn print(text: &str) -> Result<u8> {
    match io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(anyhow!(error).context("standard output").into())
        }
        _ => Ok(0),
    }
}

pub fn pretty(value: &impl Serialize) -> Result<String> {
    Ok(serde_json::to_string_pretty(value).context("JSON")? + "\n")
}

/// Prints `json` with `-o json`, else `text` unless `--quiet` is given.
pub fn report(global: &Global, text: &str, json: impl Serialize) -> Result<u8> {
    match global.output {
        Output::Json => print(&pretty(&Document::new(json))?),
        _ if global.quiet => Ok(0),
        _ => print(text),
    }
}

/// Like [`report`], but only warns if it cannot write, because the change has been made.
pub fn report_done(global: &Global, text: &str, json: impl Serialize) -> Result<u8> {
    if let Err(failure) = report(global, text, json) {
        let why = failure.to_string();
        let why = why.strip_prefix("error: ").unwrap_or(&why);
        say(format_args!("warning: the change was made, but could not be reported: {why}"));
    }
    Ok(0)
}

pub fn warn(global: &Global, warnings: &[Diagnostic]) {
    if !global.quiet {
        for warning in warnings {
            say(warning);
        }
    }
}

pub fn plural(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

/// Colour and width of text.
#[derive(Clone, Copy)]
pub struct TerminalStyle {
    pub colour: bool,
    /// Columns of the terminal. Without one no cell is empty or cut, and every row of a table
    /// names its rule.
    pub width: Option<usize>,
}

pub const BOLD: &str = "\x1b[1m";
pub const RED: &str = "\x1b[31m";
pub const GREEN: &str = "\x1b[32m";
pub const YELLOW: &str = "\x1b[33m";
const PLAIN: &str = "\x1b[0m";

impl TerminalStyle {
    pub fn painted(self, style: &str, text: &str) -> String {
        match self.colour && !style.is_empty() {
            true => format!("{style}{text}{PLAIN}"),
            false => text.into(),
        }
    }
}

pub fn terminal_style(global: &Global) -> TerminalStyle {
    TerminalStyle { colour: colour(global), width: terminal::width() }
}

pub fn colour(global: &Global) -> bool {
    match global.color {
        Color::Always => true,
        Color::Never => false,
        Color::Auto => std::env::var_os("NO_COLOR").is_none() && io::stdout().is_terminal(),
    }
}
