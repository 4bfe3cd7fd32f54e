//! `udplb man`: the manual pages, from the command line's definition.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use clap::CommandFactory;

use crate::cli::Cli;

/// Sections of udplb(1) that the command line does not define.
const SECTIONS: &str = include_str!("udplb.1.roff");

/// Writes a page for udplb and one for each command into a directory, which is created if it is missing.
pub fn write(directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    clap_mangen::generate_to(Cli::command(), directory)?;
    let mut page = OpenOptions::new().append(true).open(directory.join("udplb.1"))?;
    page.write_all(SECTIONS.as_bytes())
}
