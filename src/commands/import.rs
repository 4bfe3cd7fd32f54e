//! `udplb import`: prints samplicator's configuration as one of udplb.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use serde_json::Value;

use crate::cli::output::{pretty, print};
use crate::cli::{Global, Output};
use crate::config::samplicator::{self, CommandLine, Receiver};
use crate::config::{Config, KeyAddress};
use crate::error::{Failure, Result};
use crate::reconcile::source::Text;

/// samplicator's file and its command line.
#[derive(Args)]
pub struct Options {
    /// samplicator's configuration; - reads it from standard input.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Hosts that get all packets: ADDRESS[/PORT[/FREQUENCY]].
    #[arg(value_name = "RECEIVER")]
    receivers: Vec<Receiver>,
    /// Port that samplicator listens on.
    #[arg(short, long, default_value_t = samplicator::PORT)]
    port: u16,
    /// Address that samplicator listens on.
    #[arg(short = 's', long, default_value = "any")]
    address: KeyAddress,
    /// Receivers see the sender's address.
    #[arg(short = 'S', long)]
    spoof: bool,
    /// Interface that packets come in on; repeat for several.
    #[arg(short, long = "interface", value_name = "INTERFACE")]
    interfaces: Vec<String>,
}

pub fn run(global: &Global, options: &Options) -> Result<u8> {
    let text = Text::read(&options.file)?;
    let command = CommandLine {
        address: options.address,
        port: options.port,
        spoofs: options.spoof,
        interfaces: options.interfaces.clone(),
        receivers: options.receivers.clone(),
    };
    let yaml = samplicator::import(&text.name, text.as_str(), &command).map_err(Failure::Config)?;
    Config::parse("the imported configuration", &yaml).map_err(Failure::Config)?;
    if global.output != Output::Json {
        return print(&yaml);
    }
    // a configuration file, which has a version of its own
    print(&pretty(&serde_yaml::from_str::<Value>(&yaml).context("YAML")?)?)
}
