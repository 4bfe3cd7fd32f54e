//! The JSON of `-o json`: one vocabulary for all commands, and a schema of each output.
//!
//! A rule is `rule`, an upstream `upstream`, an interface `interface`, a rule's key `key`, as in the
//! configuration; shares are 0 to 1, times are RFC 3339, and a length of time has its unit in the name.

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde::Serialize;
use serde_json::Value;

use crate::commands::doctor::Report as Doctor;
use crate::commands::get::Answer;
use crate::commands::top;
use crate::config::{self, Diagnostic};
use crate::desired::diff::Changes;
use crate::error::Failure;
use crate::reconcile::drain::Standing;
use crate::telemetry::event::Account;
use crate::telemetry::status::{PendingStatus, Status};

/// Version of all outputs; it changes where a program that reads one may have to.
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

/// Output of `apply` and `rollback`.
#[derive(Serialize, JsonSchema)]
pub struct Applied {
    /// False: the kernel held the same already.
    pub changed: bool,
    pub generation: u32,
    /// Generation that served before.
    pub previous: Option<u32>,
    pub rule_count: usize,
    /// Upstreams and mirrors.
    pub upstream_count: usize,
    pub interfaces: Vec<String>,
    pub milliseconds: u64,
    /// Change that waits for confirmation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pending: Option<PendingStatus>,
    pub warnings: Vec<Diagnostic>,
    /// Parts of the file that could not be applied.
    pub missing: Vec<Diagnostic>,
}

/// Output of `plan` and `apply --dry-run`.
#[derive(Serialize, JsonSchema)]
pub struct Planned {
    /// True: an apply would change something.
    pub changed: bool,
    #[serde(flatten)]
    pub changes: Changes,
    /// Upstreams whose state is set by hand.
    pub overrides: Vec<Standing>,
}

/// Output of `rollback --dry-run`.
#[derive(Serialize, JsonSchema)]
pub struct RollbackPlanned {
    /// True: a rollback would change something.
    pub changed: bool,
    /// Generation that would serve; none: the filters would be removed.
    pub generation: Option<u32>,
    #[serde(flatten)]
    pub changes: Changes,
}

/// Output of `confirm`.
#[derive(Serialize, JsonSchema)]
pub struct Confirmed {
    pub changed: bool,
    pub generation: Option<u32>,
}

/// Output of `detach`.
#[derive(Serialize, JsonSchema)]
pub struct Detached {
    pub changed: bool,
    /// Interfaces that were attached.
    pub detached: Vec<String>,
}

/// Output of `drain` and of `enable` with an upstream.
#[derive(Serialize, JsonSchema)]
pub struct Steered {
    pub changed: bool,
    #[serde(flatten)]
    pub upstream: Standing,
    pub warnings: Vec<String>,
}

/// Output of `enable --all`.
#[derive(Serialize, JsonSchema)]
pub struct Enabled {
    pub changed: bool,
    /// Upstreams whose overrides were removed.
    pub upstreams: Vec<Standing>,
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

/// Output of a command that failed.
#[derive(Serialize, JsonSchema)]
pub struct Failed {
    pub error: ErrorReport,
}

/// An error; its text is on standard error too.
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

    /// Of wrong usage, as clap reports it.
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

/// Something whose JSON has a schema.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Subject {
    /// The configuration file, and the output of list.
    Config,
    Apply,
    Check,
    Confirm,
    Detach,
    Doctor,
    Drain,
    Enable,
    /// The output of any command that failed.
    Error,
    Get,
    Plan,
    Rollback,
    Status,
    Top,
    /// One line of trace.
    Trace,
}

impl Subject {
    /// Returns the JSON Schema (draft-07).
    pub fn schema(self) -> Value {
        match self {
            Subject::Config => config::schema(),
            Subject::Apply => either(schema::<Applied>(), schema::<Planned>()),
            Subject::Rollback => either(schema::<Applied>(), schema::<RollbackPlanned>()),
            Subject::Check => schema::<Checked>(),
            Subject::Confirm => schema::<Confirmed>(),
            Subject::Detach => schema::<Detached>(),
            Subject::Doctor => schema::<Doctor>(),
            Subject::Drain => schema::<Steered>(),
            Subject::Enable => either(schema::<Steered>(), schema::<Enabled>()),
            Subject::Error => schema::<Failed>(),
            Subject::Get => schema::<Answer>(),
            Subject::Plan => schema::<Planned>(),
            Subject::Status => schema::<Status>(),
            Subject::Top => schema::<top::View>(),
            Subject::Trace => schema::<Account>(),
        }
    }
}

fn schema<T: JsonSchema>() -> Value {
    let generator = SchemaSettings::draft07().for_serialize().into_generator();
    generator.into_root_schema_for::<Document<T>>().to_value()
}

/// A schema of one of two outputs, with the definitions of both.
fn either(mut one: Value, mut other: Value) -> Value {
    let (version, mut definitions) = (one["$schema"].take(), one["definitions"].take());
    if let (Some(all), Some(more)) =
        (definitions.as_object_mut(), other["definitions"].take().as_object_mut())
    {
        all.append(more);
    }
    for schema in [&mut one, &mut other] {
        if let Some(schema) = schema.as_object_mut() {
            schema.retain(|keyword, _| !["$schema", "definitions"].contains(&keyword.as_str()));
        }
    }
    serde_json::json!({ "$schema": version, "anyOf": [one, other], "definitions": definitions })
}
