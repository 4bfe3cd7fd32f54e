//! `udplb list`: prints the active configuration as a file, or its digest.

use std::fmt::Write;

use anyhow::Context;
use clap::Args;
use schemars::JsonSchema;
use serde::Serialize;

use super::{look, netlink};
use crate::cli::output::{pretty, print, report};
use crate::cli::{Global, Output};
use crate::desired::{choice, export};
use crate::error::{Failure, Result};
use crate::reconcile::drain::effective_rules;
use crate::reconcile::observe::Observed;

/// The form to print.
#[derive(Args)]
pub struct Options {
    /// Print a digest of what decides which upstream a packet goes to, for each rule and for all; equal on
    /// hosts that choose alike, overrides of drain included.
    #[arg(long)]
    digest: bool,
}

/// Output of `list --digest`.
#[derive(Serialize, JsonSchema)]
pub struct Digests {
    /// 12 hexadecimal digits, of all rules with their names and keys.
    pub digest: String,
    pub rules: Vec<RuleDigest>,
}

#[derive(Serialize, JsonSchema)]
pub struct RuleDigest {
    pub rule: String,
    /// The value of the metric `udplb_choice_hash` in hexadecimal.
    pub digest: String,
}

pub async fn run(global: &Global, options: &Options) -> Result<u8> {
    let observed = look(global, &netlink()?).await?;
    if options.digest {
        return digest(global, &observed);
    }
    let serving = observed.described()?.ok_or(Failure::NothingApplied)?;
    let document = export::document(&serving.description.desired);
    let yaml = serde_yaml::to_string(&document).context("YAML")?;
    match global.output {
        // a configuration file, which has a version of its own
        Output::Json => print(&pretty(&document)?),
        _ => report(global, &yaml, &document),
    }
}

fn digest(global: &Global, observed: &Observed) -> Result<u8> {
    let (desired, ids) = observed.described()?.ok_or(Failure::NothingApplied)?.hosts();
    let rules = effective_rules(desired, ids, &observed.overrides);
    let digests = choice::digests(&rules);
    let hexadecimal = |hash| format!("{hash:012x}");
    let total = hexadecimal(choice::total(&rules, &digests));
    let each = rules
        .iter()
        .zip(&digests)
        .map(|(rule, digest)| RuleDigest { rule: rule.name.clone(), digest: hexadecimal(*digest) });
    let output = Digests { digest: total, rules: each.collect() };
    let mut text = String::new();
    for RuleDigest { rule, digest } in &output.rules {
        let _ = writeln!(text, "{digest} rule {rule}");
    }
    let _ = writeln!(text, "{} all", output.digest);
    report(global, &text, output)
}
