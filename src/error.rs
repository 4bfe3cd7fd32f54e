//! How a command fails: the exit code and what is said.

use std::any::Any;
use std::fmt;
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};

use anyhow::anyhow;

use crate::config::Diagnostic;
use crate::journal;

/// A failed command. Everything else than [`Failure::Failed`] has an exit code of its own.
#[derive(Debug)]
pub enum Failure {
    /// 1: the old generation still serves.
    Failed(anyhow::Error),
    /// 3: there is no configuration in the kernel.
    NothingApplied,
    /// 64: the call's words are off.
    Usage(String),
    /// 65: the configuration is bad; nothing was touched.
    Config(Vec<Diagnostic>),
    /// 66: the file cannot be read.
    Unreadable(String),
    /// 75: somebody else holds the lock.
    Locked(String),
    /// 75: host names that the resolver may know later.
    Unresolved(Vec<Diagnostic>),
    /// 77: a privilege is missing.
    Privileges(String),
}

pub type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    /// Stable name of the kind, for programs.
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

    /// The process's exit code.
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

/// Runs `work`, and makes an error of a panic in it: some libraries panic where the kernel refuses.
pub fn catch<T>(work: impl FnOnce() -> T) -> anyhow::Result<T> {
    catch_unwind(AssertUnwindSafe(work))
        .map_err(|payload| anyhow!("internal error: {}; please report it", message(&*payload)))
}

fn message(payload: &dyn Any) -> &str {
    let owned = payload.downcast_ref::<String>().map(String::as_str);
    owned.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("a panic")
}

/// Writes to standard error. That nobody reads it, or that its disk is full, keeps nothing from being
/// done.
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
