//! `udplb list`: prints the active configuration as a file.

use anyhow::Context;

use super::{look, netlink};
use crate::cli::output::{pretty, print, report};
use crate::cli::{Global, Output};
use crate::desired::export;
use crate::error::{Failure, Result};

pub async fn run(global: &Global) -> Result<u8> {
    let observed = look(global, &netlink()?).await?;
    let Some(serving) = observed.described()? else {
        return Err(Failure::NothingApplied);
    };
    let document = export::document(&serving.description.desired);
    let yaml = serde_yaml::to_string(&document).context("YAML")?;
    match global.output {
        // a configuration file, which has a version of its own
        Output::Json => print(&pretty(&document)?),
        _ => report(global, &yaml, &document),
    }
}
