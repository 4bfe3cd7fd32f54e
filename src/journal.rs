//! Priorities at the beginning of each line for the systemd journal (sd-daemon(3)).

use std::env;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::OnceLock;

use log::Level;

/// Returns true if standard error goes to the journal.
fn is_active() -> bool {
    static IS_ACTIVE: OnceLock<bool> = OnceLock::new();
    *IS_ACTIVE.get_or_init(|| {
        let stream = env::var("JOURNAL_STREAM").unwrap_or_default();
        !stream.is_empty() && stream_of(io::stderr().as_fd()).is_ok_and(|own| own == stream)
    })
}

/// Returns device and inode in the format of JOURNAL_STREAM.
fn stream_of(descriptor: BorrowedFd<'_>) -> io::Result<String> {
    let file = File::from(descriptor.try_clone_to_owned()?).metadata()?;
    Ok(format!("{}:{}", file.dev(), file.ino()))
}

fn priority(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

/// Prefixes each line with a priority if standard error goes to the journal.
pub fn prefixed(level: Level, text: &str) -> String {
    if !is_active() {
        return text.into();
    }
    with_priority(level, text)
}

fn with_priority(level: Level, text: &str) -> String {
    let priority = priority(level);
    let lines: Vec<String> = text.lines().map(|line| format!("<{priority}>{line}")).collect();
    lines.join("\n")
}

/// Sets the log format: a priority on each line if standard error goes to the journal.
pub fn format(logger: &mut env_logger::Builder) {
    if is_active() {
        logger.format(|out, record| {
            writeln!(out, "{}", with_priority(record.level(), &record.args().to_string()))
        });
    }
}

#[cfg(test)]
mod tests {
    use log::Level;

    use super::with_priority;

    #[test]
    fn each_line_has_a_priority() {
        assert_eq!(with_priority(Level::Error, "error: a\n  b"), "<3>error: a\n<3>  b");
        assert_eq!(with_priority(Level::Warn, "w"), "<4>w");
        assert_eq!(with_priority(Level::Info, "i"), "<6>i");
        assert_eq!(with_priority(Level::Debug, "d"), "<7>d");
    }
}
