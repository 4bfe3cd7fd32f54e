//! `udplb man`: the manual pages, from the command line's definition and the table of words.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, CommandFactory};

use super::Cli;
use crate::error::Result;
use crate::telemetry::diagnosis;
use crate::{bpf, config};

/// Sections of udplb(1) that the command line does not define.
const SECTIONS: &str = include_str!("udplb.1.roff");

/// The directory for the pages.
#[derive(Args)]
pub struct Options {
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

pub fn run(options: &Options) -> Result<u8> {
    let directory = &options.directory;
    write(directory).with_context(|| directory.display().to_string())?;
    Ok(0)
}

/// Writes a page for udplb and one for each command into a directory, which is created if it is missing.
fn write(directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    clap_mangen::generate_to(Cli::command(), directory)?;
    let mut page = OpenOptions::new().append(true).open(directory.join("udplb.1"))?;
    page.write_all(SECTIONS.as_bytes())?;
    fs::write(directory.join("udplb.yaml.5"), configuration())
}

/// Returns udplb.yaml(5).
fn configuration() -> String {
    let verdicts = bpf::VERDICTS.map(|(verdict, name)| {
        let meaning = match bpf::is_forwarded(verdict) {
            true => "Sent to the upstream.".into(),
            false => {
                let explanation = diagnosis::explain(name);
                format!("Not sent: {}. What to do: {}.", explanation.why, explanation.fix)
            }
        };
        (name, meaning)
    });
    config::manual(&verdicts)
}
