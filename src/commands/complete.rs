//! Shell completion: scripts, and candidates from the active configuration and the interfaces of this host. An error
//! yields no candidates.

use std::ffi::CStr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use std::{env, io};

use anyhow::Context;
use clap::{Args, CommandFactory};
use clap_complete::Shell;
use clap_complete::engine::CompletionCandidate;
use clap_complete::env::{CompleteEnv, Shells};

use super::Cli;
use crate::cli::output::print;
use crate::datapath::pins::{self, PIN_DIR};
use crate::datapath::{generation, state_maps};
use crate::desired::Desired;
use crate::error::Result;

/// Environment variable with which a completion script calls udplb for candidates.
const VARIABLE: &str = "UDPLB_COMPLETE";

/// The shell to complete for.
#[derive(Args)]
pub struct Options {
    #[arg(value_name = "SH")]
    shell: Shell,
}

pub fn run(options: &Options) -> Result<u8> {
    let shell = options.shell;
    print(&script(shell).with_context(|| format!("a script for {shell}"))?)
}

/// Prints candidates and exits if a completion script has called; else returns.
pub fn answer() {
    CompleteEnv::with_factory(Cli::command).var(VARIABLE).complete();
}

/// Returns the completion script of a shell.
fn script(shell: Shell) -> io::Result<String> {
    let mut script = Vec::new();
    let name = shell.to_string();
    let completer = Shells::builtins();
    let completer = completer.completer(&name).ok_or(io::ErrorKind::Unsupported)?;
    completer.write_registration(VARIABLE, "udplb", "udplb", "udplb", &mut script)?;
    Ok(String::from_utf8_lossy(&script).into_owned())
}

/// Returns the names of the active rules.
pub fn rules() -> Vec<CompletionCandidate> {
    let desired = serving().unwrap_or_default();
    desired.rules.iter().map(|rule| CompletionCandidate::new(&rule.name)).collect()
}

/// Returns the active upstreams and mirrors as arguments of `drain`. Shells break words at colons, so an
/// unnamed host that occurs once in its rule is written without its port.
pub fn upstreams() -> Vec<CompletionCandidate> {
    let desired = serving().unwrap_or_default();
    let mut all = Vec::new();
    for rule in &desired.rules {
        let hosts: Vec<String> = rule.destinations().map(|it| it.host.to_string()).collect();
        for (upstream, host) in rule.destinations().zip(&hosts) {
            let once = hosts.iter().filter(|other| *other == host).count() == 1;
            let label = match &upstream.name {
                Some(name) => name.clone(),
                None if once => host.clone(),
                None => upstream.label(),
            };
            all.push(CompletionCandidate::new(format!("{}/{label}", rule.name)));
        }
    }
    all
}

/// Returns the names of the interfaces in this network namespace.
pub fn interfaces() -> Vec<CompletionCandidate> {
    let mut all = Vec::new();
    // SAFETY: the array ends with an index of 0, its names are C strings, and it is freed once.
    unsafe {
        let first = libc::if_nameindex();
        let mut entry = first;
        while !entry.is_null() && (*entry).if_index != 0 {
            let name = CStr::from_ptr((*entry).if_name).to_string_lossy();
            all.push(CompletionCandidate::new(name.as_ref()));
            entry = entry.add(1);
        }
        if !first.is_null() {
            libc::if_freenameindex(first);
        }
    }
    all
}

/// Reads the active configuration from the pin directory named on the command line.
fn serving() -> Option<Arc<Desired>> {
    let guard = pins::read(&pin_dir(env::args()), Duration::ZERO).ok()??;
    let maps = state_maps::open(&guard).ok()?;
    let generation = generation::read(&guard, maps.as_ref(), guard.current()?).ok()??;
    Some(generation.description.desired.clone())
}

fn pin_dir(words: impl Iterator<Item = String>) -> PathBuf {
    const OPTION: &str = "--pin-dir";
    let mut words = words;
    while let Some(word) = words.next() {
        match word.strip_prefix(OPTION) {
            Some("") => return words.next().unwrap_or_default().into(),
            Some(value) if value.starts_with('=') => return value[1..].into(),
            _ => {}
        }
    }
    PIN_DIR.into()
}

#[cfg(test)]
mod tests {
    use super::{PIN_DIR, pin_dir};

    #[test]
    fn pin_directory_is_that_of_the_words() {
        let of = |words: &str| pin_dir(words.split(' ').map(String::from));
        assert_eq!(of("udplb -- udplb drain"), *PIN_DIR);
        assert_eq!(of("udplb -- udplb --pin-dir /run/a drain"), *"/run/a");
        assert_eq!(of("udplb -- udplb --pin-dir=/run/b drain"), *"/run/b");
    }
}
