//! Failures of commands: exit codes and messages.

use std::any::Any;
use std::fmt;
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};

use anyhow::anyhow;

use crate::config::Diagnostic;
use crate::journal;

/// A failed command, by exit code.
#[derive(Debug)]
pub enum Failure {
    /// 1: any other error; the previous generation stays active.
    Failed(anyhow::Error),
    /// 3: nothing is applied.
    NothingApplied,
    /// 64: invalid arguments.
    Usage(String),
    /// 65: the configuration is invalid; nothing was changed.
    Config(Vec<Diagnostic>),
    /// 66: the file cannot be read.
    Unreadable(String),
    /// 75: another udplb holds the lock.
    Locked(String),
    /// 75: host names that do not resolve now.
    Unresolved(Vec<Diagnostic>),
    /// 77: a privilege is missing.
    Privileges(String),
}

pub type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    /// Returns the stable name of the kind, for programs.
    pub fn kind(&self) -> &'static str {
        match self {
            Failure::Failed(_) => "failed",
            Failure::NothingApplied => "nothing-applied",
            Failure::Usage(_) => "usage",
            Failure::Config(_) => "configuration",
            Failure::Unreadable(_) => "unreadable",
            Failure::Locked(_) | Failure::Unresolved(_) => "temporary",
            Failure::Privileges(_) => "privileges",
        }
    }

    /// Returns the exit code of the process.
    pub fn exit_code(&self) -> u8 {
        match self {
            Failure::Failed(_) => 1,
            Failure::NothingApplied => 3,
            Failure::Usage(_) => 64,
            Failure::Config(_) => 65,
            Failure::Unreadable(_) => 66,
            Failure::Locked(_) | Failure::Unresolved(_) => 75,
            Failure::Privileges(_) => 77,
        }
    }
}

/// Runs `work` and turns a panic into an error: some libraries panic on errors of the kernel.
pub fn catch<T>(work: impl FnOnce() -> T) -> anyhow::Result<T> {
    catch_unwind(AssertUnwindSafe(work))
        .map_err(|payload| anyhow!("internal error: {}; please report it", message(&*payload)))
}

fn message(payload: &dyn Any) -> &str {
    let owned = payload.downcast_ref::<String>().map(String::as_str);
    owned.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("a panic")
}

/// Writes to standard error, with a priority for the journal. Ignores errors, which must not stop a command.
pub fn say(text: impl fmt::Display) {
    let text = text.to_string();
    let level = match text.split([':', ' ']).next() {
        Some("error") => log::Level::Error,
        Some("warning") => log::Level::Warn,
        _ => log::Level::Info,
    };
    let _ = writeln!(io::stderr().lock(), "{}", journal::prefixed(level, &text));
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Failure {
        Failure::Failed(error)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Failed(error) => write!(f, "error: {error:#}"),
            Failure::NothingApplied => write!(f, "error: nothing is applied"),
            Failure::Usage(message)
            | Failure::Unreadable(message)
            | Failure::Locked(message)
            | Failure::Privileges(message) => write!(f, "error: {message}"),
            Failure::Config(diagnostics) | Failure::Unresolved(diagnostics) => {
                let texts: Vec<String> = diagnostics.iter().map(ToString::to_string).collect();
                write!(f, "{}", texts.join("\n"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::catch;

    #[test]
    fn panics_become_errors() {
        assert_eq!(catch(|| 5).expect("no panic"), 5);
        let error = catch(|| panic!("map {}", 7)).expect_err("a panic").to_string();
        assert_eq!(error, "internal error: map 7; please report it");
        assert!(catch(|| panic!("plain")).expect_err("a panic").to_string().contains("plain"));
    }
}
