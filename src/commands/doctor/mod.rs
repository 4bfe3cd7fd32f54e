//! `udplb doctor`: finds what keeps packets from being forwarded, and how to fix it. `facts` reads the host;
//! `findings` is pure.

mod before;
mod facts;
mod findings;
mod sample;
mod server;

use std::net::IpAddr;
use std::path::PathBuf;

use clap::Args;
use schemars::JsonSchema;
use serde::Serialize;

use super::{DEGRADED, netlink};
use crate::cli::output::{Document, colour, pretty, print};
use crate::cli::{Global, Output};
use crate::error::Result;
use crate::telemetry::problem::{self, Problem};

/// The file to look at.
#[derive(Args)]
pub struct Options {
    /// Compare this file with the active configuration, instead of the file that was applied.
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    /// Check this host as an upstream of rules with `reply: direct` to these addresses; no file is needed.
    #[arg(long, value_name = "ADDRESS", value_delimiter = ',')]
    upstream: Vec<IpAddr>,
}

/// Output of `doctor`.
#[derive(Serialize, JsonSchema)]
pub struct Report {
    /// True if there are no problems; there may be notes.
    pub healthy: bool,
    /// Problems first, then notes.
    pub findings: Vec<Problem>,
}

pub async fn run(global: &Global, options: &Options) -> Result<u8> {
    let facts =
        facts::read(&global.store(), &netlink()?, options.file.as_deref(), &options.upstream)
            .await?;
    let findings = findings::diagnose(&facts);
    let problems = problem::any(&findings);
    match (global.output, global.quiet && !problems) {
        (Output::Json, _) => {
            let report = Report { healthy: !problems, findings };
            print(&pretty(&Document::new(report))?)?
        }
        (_, true) => 0,
        (_, false) => print(&findings::text(&findings, colour(global)))?,
    };
    Ok(if problems { DEGRADED } else { 0 })
}
