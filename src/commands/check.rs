//! `udplb check`: validates files without privileges.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use schemars::JsonSchema;
use serde::Serialize;

use crate::cli::output::{ErrorReport, plural, report, warn};
use crate::cli::{Global, Resolver};
use crate::config::Diagnostic;
use crate::error::{Failure, Result, say};
use crate::reconcile::source::{self, Text};

/// Files to check.
#[derive(Args)]
pub struct Options {
    /// YAML, TOML or JSON by extension; - reads YAML from standard input.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Do not resolve host names.
    #[arg(long)]
    no_resolve: bool,
    #[command(flatten)]
    resolver: Resolver,
}

/// Output of `check`.
#[derive(Serialize, JsonSchema)]
pub struct Checked {
    /// All files can be applied.
    pub valid: bool,
    pub files: Vec<CheckedFile>,
}

/// One file of `check`.
#[derive(Serialize, JsonSchema)]
pub struct CheckedFile {
    pub file: String,
    pub valid: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule_count: Option<usize>,
    /// Upstreams and mirrors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upstream_count: Option<usize>,
    /// Errors, or else warnings.
    pub diagnostics: Vec<Diagnostic>,
    /// Why the file could not be checked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorReport>,
}

impl CheckedFile {
    pub fn failed(file: String, failure: Failure) -> CheckedFile {
        let error = match &failure {
            Failure::Config(_) | Failure::Unresolved(_) => None,
            _ => Some(ErrorReport::new(&failure)),
        };
        let diagnostics = match failure {
            Failure::Config(diagnostics) | Failure::Unresolved(diagnostics) => diagnostics,
            _ => Vec::new(),
        };
        CheckedFile {
            file,
            valid: false,
            rule_count: None,
            upstream_count: None,
            diagnostics,
            error,
        }
    }
}

pub async fn run(global: &Global, options: &Options) -> Result<u8> {
    let timeout = (!options.no_resolve).then_some(options.resolver.resolve_timeout);
    let mut code = 0;
    let mut checked = Vec::new();
    let mut text = String::new();
    for file in &options.files {
        let name = file.display().to_string();
        checked.push(match check_one(file, timeout).await {
            Ok((rules, upstreams, warnings)) => {
                warn(global, &warnings);
                let counts = [plural(rules, "rule"), plural(upstreams, "upstream")];
                text += &format!("{name}: {}\n", counts.join(", "));
                CheckedFile {
                    file: name,
                    valid: true,
                    rule_count: Some(rules),
                    upstream_count: Some(upstreams),
                    diagnostics: warnings,
                    error: None,
                }
            }
            Err(failure) => {
                say(&failure);
                code = failure.exit_code();
                CheckedFile::failed(name, failure)
            }
        });
    }
    report(global, &text, Checked { valid: code == 0, files: checked })?;
    Ok(code)
}

/// Returns the numbers of rules and of upstreams, and warnings.
async fn check_one(
    file: &Path,
    timeout: Option<Duration>,
) -> Result<(usize, usize, Vec<Diagnostic>)> {
    let config = Text::read(file)?.parse()?;
    let mut warnings = config.warnings.clone();
    if let Some(timeout) = timeout {
        warnings.extend(source::check_names(&config, timeout).await?);
    }
    let upstreams = config.rules.iter().map(|rule| rule.destinations().count()).sum();
    Ok((config.rules.len(), upstreams, warnings))
}
