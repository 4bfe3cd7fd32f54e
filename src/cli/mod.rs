//! The command line: global options, parsers of values, printing and the terminal.

pub mod output;
pub mod table;
pub mod terminal;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::datapath::pins::{PIN_DIR, Store};

#[derive(Args, Clone)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// Output format.
    #[arg(short, long, global = true, value_enum, default_value = "table")]
    pub output: Output,
    /// Use colour; NO_COLOR disables it too.
    #[arg(long, global = true, value_enum, default_value = "auto", value_name = "WHEN")]
    pub color: Color,
    /// Print more details; repeat for debug output.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Print only errors and problems.
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Directory of the pins, in a bpffs.
    #[arg(long, global = true, value_name = "DIR", default_value = PIN_DIR, value_parser = pin_dir)]
    pub pin_dir: PathBuf,
    /// Wait this long for another udplb, in seconds.
    #[arg(long, global = true, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    pub lock_timeout: Duration,
}

impl Global {
    /// Returns the pin directory and the timeout of its lock.
    pub fn store(&self) -> Store {
        Store { pin_dir: self.pin_dir.clone(), lock_timeout: self.lock_timeout }
    }
}

fn pin_dir(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    match path.file_name() {
        None => Err("a directory of its own in a bpffs, like /sys/fs/bpf/udplb".into()),
        Some(name) if name.to_string_lossy().contains('.') => {
            Err("a bpffs takes no names with a dot (`.`); choose one without".into())
        }
        Some(_) => Ok(path),
    }
}

/// Parses seconds, with or without a fraction. Limited to `u32::MAX`, so that no clock overflows.
pub fn seconds(text: &str) -> Result<Duration, String> {
    const MAX: Duration = Duration::from_secs(u32::MAX as u64);
    let wrong = || "a number of seconds, like 2 or 0.5".to_string();
    let seconds = text.parse().map_err(|_| wrong())?;
    let duration = Duration::try_from_secs_f64(seconds).map_err(|_| wrong())?;
    Ok(duration.min(MAX))
}

/// Parses a number other than zero.
pub fn at_least_one<T: std::str::FromStr + Default + PartialEq>(text: &str) -> Result<T, String> {
    let number = text.parse().ok().filter(|number| *number != T::default());
    number.ok_or_else(|| "a number, at least 1".into())
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Table,
    /// With next hops, MAC addresses, ages and totals (status).
    Wide,
    Json,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Color {
    Auto,
    Always,
    Never,
}

/// Options for resolving host names.
#[derive(Args, Clone, Copy)]
pub struct Resolver {
    /// Wait this long for the addresses of all host names together, in seconds.
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = some_seconds)]
    pub resolve_timeout: Duration,
}

/// Parses an interval from 0.1 seconds to a day.
pub fn some_seconds(text: &str) -> Result<Duration, String> {
    const MIN: Duration = Duration::from_millis(100);
    match seconds(text)? {
        seconds if seconds < MIN => Err("at least 0.1 seconds".into()),
        seconds => Ok(seconds.min(Duration::from_secs(86_400))),
    }
}
