//! `udplb schema`: prints the JSON Schema of the configuration or of an output.

use clap::{Args, ValueEnum};
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::Value;

use super::announce::{Announced, AnnouncementChanged};
use super::apply::Applied;
use super::check::Checked;
use super::confirm::Confirmed;
use super::detach::Detached;
use super::drain::{Drained, DrainedFields, OverrideChanged};
use super::enable::Enabled;
use super::flows::Flows;
use super::forget::Forgotten;
use super::list::Digests;
use super::plan::Planned;
use super::ready::Ready;
use super::rollback::RollbackPlanned;
use super::senders::Senders;
use super::{doctor, get, top};
use crate::cli::output::{Document, Failed, pretty, print};
use crate::config;
use crate::error::Result;
use crate::telemetry::event::EventRecord;
use crate::telemetry::status::Status;

/// The output to describe.
#[derive(Args)]
pub struct Options {
    #[arg(value_enum, default_value = "config", value_name = "OF")]
    subject: Subject,
}

pub fn run(options: &Options) -> Result<u8> {
    print(&pretty(&options.subject.schema())?)
}

/// Something whose JSON has a schema.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Subject {
    /// The configuration file, and the output of list.
    Config,
    Announce,
    Apply,
    Check,
    Confirm,
    Detach,
    Doctor,
    Drain,
    Enable,
    /// The output of any command that failed.
    Error,
    Flows,
    Forget,
    Get,
    /// The output of list --digest.
    List,
    Plan,
    Ready,
    Rollback,
    Senders,
    Status,
    Top,
    /// One line of trace.
    Trace,
    Withdraw,
}

impl Subject {
    /// Returns the JSON Schema (draft-07).
    pub fn schema(self) -> Value {
        match self {
            Subject::Config => config::schema(),
            Subject::Announce => either(schema::<Announced>(), schema::<AnnouncementChanged>()),
            Subject::Apply => either(schema::<Applied>(), schema::<Planned>()),
            Subject::Rollback => either(schema::<Applied>(), schema::<RollbackPlanned>()),
            Subject::Check => schema::<Checked>(),
            Subject::Confirm => schema::<Confirmed>(),
            Subject::Detach => schema::<Detached>(),
            Subject::Doctor => schema::<doctor::Report>(),
            Subject::Drain => either(schema::<Drained>(), schema::<DrainedFields>()),
            Subject::Enable => either(schema::<OverrideChanged>(), schema::<Enabled>()),
            Subject::Error => schema::<Failed>(),
            Subject::Flows => schema::<Flows<'_>>(),
            Subject::Forget => schema::<Forgotten>(),
            Subject::Get => schema::<get::Answer>(),
            Subject::List => schema::<Digests>(),
            Subject::Plan => schema::<Planned>(),
            Subject::Ready => schema::<Ready>(),
            Subject::Senders => schema::<Senders<'_>>(),
            Subject::Status => schema::<Status>(),
            Subject::Top => schema::<top::View>(),
            Subject::Trace => schema::<EventRecord>(),
            Subject::Withdraw => schema::<AnnouncementChanged>(),
        }
    }
}

fn schema<T: JsonSchema>() -> Value {
    let generator = SchemaSettings::draft07().for_serialize().into_generator();
    generator.into_root_schema_for::<Document<T>>().to_value()
}

/// Merges two schemas into one that accepts either.
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
